r"""What proposes tokens in speculative decoding: a small model, or the text itself."""

import numpy as np

from minillm.checks import require, require_positive
from minillm.decoding.interface import LanguageModel, last_logits
from minillm.decoding.law import Law
from minillm.decoding.speculative import Draft


class ModelDrafter:
    r"""A smaller model with the same vocabulary draws the proposals.

    Equation: `speculative-decoding` drafts from a small model's law $q$
    Raises: ValueError when the text is longer than the small model's context.
    Source: deepseek (the slide on predicting several tokens); Leviathan et al. 2023.

    ``law`` should be that of the generation; another one costs time and changes nothing else.
    """

    def __init__(self, model: LanguageModel, law: Law | None = None):
        self.model, self.law = model, Law() if law is None else law

    def begin(self, text: np.ndarray) -> None:
        """Start a new text with an empty cache."""
        self.cache = self.model.new_cache(1, self.model.config.context)
        self.mark, self.read = self.cache.save(), text[:0]

    def propose(self, text: np.ndarray, stream: np.ndarray, count: int, rng: np.random.Generator) -> Draft:
        """Draw ``count`` tokens, fewer when the small model's context ends before."""
        context = self.model.config.context
        require(len(text) <= context, "ModelDrafter", "the text", f"at most {context} tokens long", f"{len(text)}")
        self.cache.rewind(self.mark, min(_agreeing(self.read, text), len(text) - 1))
        logits = last_logits(self.model, text[None, self.cache.length :], self.cache)
        self.mark = self.cache.save()  # what comes after this may be rejected
        written, laws = text, []
        for i in range(min(count, context - len(text) + 1)):
            if i > 0:
                logits = last_logits(self.model, written[None, -1:], self.cache)
            law = self.law.probabilities(logits, written[None])[0]
            written, laws = np.append(written, rng.choice(len(law), p=law)), [*laws, law]
        self.read = written[:-1]
        return Draft(written[len(text) :], np.array(laws))


def _agreeing(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts have in common at the front."""
    n = min(len(one), len(other))
    differs = np.flatnonzero(one[:n] != other[:n])
    return int(differs[0]) if differs.size else n


class LookupDrafter:
    r"""Proposes what followed the last time that the newest n tokens were said; no model at all.

    Its law has all its mass on what it proposes, so a proposal x is accepted with probability p(x).

    Equation: `speculative-decoding` $q$ a point: accepted with probability $p(x)$, else drawn from $p$ without $x$
    Raises: ValueError for sizes that are not positive.
    Source: deepseek (the slide on predicting several tokens); Saxena 2023 (prompt look-up).
    """

    def __init__(self, vocab_size: int, n: int = 2):
        require_positive(vocab_size, "LookupDrafter", "vocab_size", integer=True)
        require_positive(n, "LookupDrafter", "n", integer=True)
        self.vocab_size, self.n = vocab_size, n

    def begin(self, text: np.ndarray) -> None:
        """Nothing is remembered between proposals."""

    def propose(self, text: np.ndarray, stream: np.ndarray, count: int, rng: np.random.Generator) -> Draft:
        """What followed the last earlier occurrence of the newest n tokens, or nothing."""
        found = np.empty(0, np.int64)
        if len(text) > self.n:
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], self.n)
            places = np.flatnonzero((windows == text[-self.n :]).all(-1))
            if places.size:
                found = text[places[-1] + self.n :][:count]
        return Draft(found, np.eye(self.vocab_size)[found])
