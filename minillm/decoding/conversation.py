"""A conversation with a model: several turns that share one cache, so that nothing is read twice."""

from collections.abc import Iterator

import numpy as np

from minillm.autograd import no_grad
from minillm.checks import message, require
from minillm.data import Tokenizer
from minillm.data.templates import TURN_ENDS, Message, chatml_ids
from minillm.decoding.interface import LanguageModel
from minillm.decoding.samplers import sample


class Conversation:
    """Turns of a user and a model in the form ChatML.

    Raises: ValueError if the tokenizer lacks the marks of ChatML, or if a turn does not fit into the context.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, system: str | None = None, context: int | None = None
    ):
        end = tokenizer.special_id(TURN_ENDS)
        require(end is not None, "Conversation", "the tokenizer", f"one with a special token {TURN_ENDS}", tokenizer)
        self.model, self.tokenizer, self.end = model, tokenizer, end or 0
        self.cache = model.new_cache(1, context)
        self.capacity = self.cache.capacity or context or model.config.context  # a ring or a sum has no end of its own
        self.pending = np.empty(0, np.int64)  # ids that are part of the conversation and that the model has not read
        self.system = system
        self.messages: list[Message] = []

    def ask(
        self, text: str, rng: np.random.Generator, *, max_new_tokens: int | None = None, **law: float | int | None
    ) -> Iterator[int]:
        """The tokens of the answer to a message as they are drawn, up to the mark that ends the turn.

        ``law``: temperature, top_k, top_p, min_p of :func:`minillm.decoding.samplers.sample`.
        """
        opening = chatml_ids(self.tokenizer, [Message("user", text)], system=None if self.messages else self.system)
        reading = np.concatenate([self.pending, opening])
        room = self.capacity - self.cache.length - len(reading)
        if room < 1:
            used = f"{self.cache.length} tokens and a message of {len(reading)}"
            wanted = f"at most {self.capacity} tokens long"
            raise ValueError(message("Conversation", "the conversation", wanted, used, "Begin a new one."))
        answer: list[int] = []
        ending = np.array([self.end, *self.tokenizer.encode_next("\n")], np.int64)
        try:
            for _ in range(room if max_new_tokens is None else min(max_new_tokens, room)):
                with no_grad():  # not around the yield: the caller's code must not run under it
                    hidden = self.model.hidden(reading[None], self.cache).data[:, -1]
                self.pending = ending
                logits = hidden @ self.model.output_weight.data.T  # (1, V)
                token = int(sample(logits, rng.random(1), **law).ids[0])  # pyright: ignore[reportArgumentType]
                if token == self.end:
                    break
                answer.append(token)
                reading = np.array([token], np.int64)
                self.pending = np.concatenate([reading, ending])
                yield token
        finally:  # an answer that its reader broke off is part of the conversation as far as it went
            said = self.tokenizer.decode_next(answer).decode("utf-8", "replace")
            self.messages += [Message("user", text), Message("assistant", said)]
