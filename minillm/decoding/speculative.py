r"""Speculative decoding: something cheap proposes tokens, the model checks them all in one pass.

What comes out follows the model's law exactly, whatever the proposals are; only the time depends on them.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import no_grad
from minillm.checks import require, require_positive
from minillm.decoding.generate import Generation
from minillm.decoding.interface import LanguageModel, Stops, check_lengths, check_tokens, checked_prompts
from minillm.decoding.law import Law


class Draft(NamedTuple):
    """Proposed tokens (n,) and the laws (n, V) that they were drawn from; n may be 0."""

    tokens: Int[np.ndarray, " n"]
    laws: Float[np.ndarray, "n V"]


@runtime_checkable
class Drafter(Protocol):
    """What proposes: a small model, heads on the model itself, or a look into the text.

    ``begin(text)`` is called once for every text. ``propose`` gets the text so far (T,), prompt included, and the
    model's own stream (T - 1, d_model) after every token but the last, which it has not read yet; a head for several
    tokens starts from these. It returns up to ``count`` tokens, each drawn from the law returned with it.
    """

    def begin(self, text: np.ndarray) -> None:
        """Forget everything: a new text starts."""
        ...

    def propose(self, text: np.ndarray, stream: np.ndarray, count: int, rng: np.random.Generator) -> Draft:
        """Up to ``count`` tokens that may follow."""
        ...


def acceptance_rate(p: Float[np.ndarray, "*B V"], q: Float[np.ndarray, "*B V"]) -> Float[np.ndarray, "*B"]:
    r"""How likely a token drawn from q is accepted.

    Equation: `speculative-decoding` acceptance rate $\sum_x\min(p,q)$
    Shapes: p, q (..., V) -> (...)
    Raises: ValueError if p and q differ in shape.
    Source: deepseek (the slide on predicting several tokens); Leviathan et al. 2023.
    """
    require(p.shape == q.shape, "acceptance_rate", "q", f"of the shape of p, {p.shape}", q)
    return np.asarray(np.minimum(p, q).sum(-1))


def residual_law(p: Float[np.ndarray, "*B V"], q: Float[np.ndarray, "*B V"]) -> Float[np.ndarray, "*B V"]:
    r"""The law that a token is drawn from after a rejection.

    Equation: `speculative-decoding` $(p-q)_+$ normalised
    Shapes: p, q (..., V) -> (..., V); p itself where p = q, since then nothing is rejected
    Raises: ValueError if p and q differ in shape.
    Source: deepseek (the slide on predicting several tokens); Leviathan et al. 2023.
    """
    require(p.shape == q.shape, "residual_law", "q", f"of the shape of p, {p.shape}", q)
    left = np.maximum(p - q, 0.0)
    total = left.sum(-1, keepdims=True)
    return np.where(total > 0, left / np.where(total > 0, total, 1.0), p)


def verify(draft: Draft, laws: Float[np.ndarray, "n1 V"], uniforms: Float[np.ndarray, " n1"]) -> Int[np.ndarray, " m"]:
    r"""Accept proposals from the front while chance allows, then add one token of the model's own.

    A uniform number u accepts x if $u<p(x)/q(x)$. At the first rejection what is left of u, which is uniform again on
    $[p/q,1)$, draws from the residual law; if all are accepted the last number draws from the model's law.

    Equation: `speculative-decoding` accept $x\sim q$ with prob. $\min(1,p/q)$, else resample from $(p-q)_+$ and drop the later drafts; all accepted: one more token from $p$
    Shapes: draft of n tokens, laws (n + 1, V) of the model, uniforms (n + 1,) in [0, 1) -> m tokens, 1 <= m <= n + 1
    Raises: ValueError if there is not one law and one number for every token and one more.
    Source: deepseek (the slide on predicting several tokens); Leviathan et al. 2023.
    """
    n = len(draft.tokens)
    require(len(laws) == n + 1, "verify", "laws", f"one for each of {n} tokens and one more", laws)
    require(uniforms.shape == (n + 1,), "verify", "uniforms", f"of shape ({n + 1},)", uniforms)
    require(
        draft.laws.shape == laws[:-1].shape, "verify", "the draft's laws", f"of shape {laws[:-1].shape}", draft.laws
    )
    for i, (x, q, p, u) in enumerate(zip(draft.tokens, draft.laws, laws, uniforms)):
        require(
            bool(q[x] > 0), "verify", f"the draft's law of token {x}", "above 0 (it was drawn from it)", float(q[x])
        )
        ratio = p[x] / q[x]
        if u >= ratio:
            return np.append(draft.tokens[:i], _draw(residual_law(p, q), (u - ratio) / (1.0 - ratio)))
    return np.append(draft.tokens, _draw(laws[-1], uniforms[-1]))


def _draw(law: np.ndarray, u: float) -> int:
    cumulative = law.cumsum()
    return int((cumulative > u * cumulative[-1]).argmax())


class Speculation(NamedTuple):
    """What was generated, and how the proposals did: (B,) proposed and accepted tokens and passes of the model."""

    generation: Generation
    proposed: Int[np.ndarray, " B"]
    accepted: Int[np.ndarray, " B"]
    passes: Int[np.ndarray, " B"]


def speculative_generate(
    model: LanguageModel,
    drafter: Drafter,
    prompts: Int[np.ndarray, "B L"],
    max_new_tokens: int,
    rng: np.random.Generator,
    *,
    count: int = 4,
    law: Law | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    pad_id: int | None = None,
) -> Speculation:
    r"""Continue prompts with up to ``count`` proposals a pass; the law of the result is the model's own.

    Rows accept different numbers of tokens, so each prompt is continued by itself. Works with every kind of cache: one
    that cannot drop rejected tokens goes back to before them, and reads the accepted ones again.

    Equation: `speculative-decoding` output law is exactly $p$
    Equation: `stop-conditions` as in `generate`; accepted tokens behind an end are dropped
    Shapes: prompts (B, L) -> a `Generation` (B, T), and counts (B,)
    Raises: ValueError for a count or setting out of range, prompts of unequal length, or a request longer than the
        context; IndexError for ids outside the vocabulary.
    Source: deepseek (the slide on predicting several tokens); Leviathan et al. 2023.
    """
    law = Law() if law is None else law
    prompts, V = checked_prompts("speculative_generate", prompts), model.config.vocab_size
    check_lengths("speculative_generate", model, prompts.shape[1], max_new_tokens)
    require_positive(count, "speculative_generate", "count", integer=True)
    stops = Stops("speculative_generate", V, eos_id, stop)
    if pad_id is not None:
        check_tokens("speculative_generate", "pad_id", pad_id, V)
    B, T = len(prompts), max_new_tokens
    tokens = np.full((B, T), stops.filler if pad_id is None else pad_id, np.int64)
    logprobs, mask = np.zeros((B, T), model.output_weight.dtype), np.zeros((B, T), bool)
    terminated, counts = np.zeros(B, bool), np.zeros((3, B), np.int64)
    for row, prompt in enumerate(prompts):
        with no_grad():
            one = _one_text(model, drafter, prompt, T, rng, count, law, stops)
        n = len(one.tokens)
        tokens[row, :n], logprobs[row, :n], mask[row, :n] = one.tokens, one.logprobs, True
        terminated[row], counts[:, row] = one.terminated, one.counts
    steps = int(mask.sum(1).max())
    return Speculation(Generation(tokens[:, :steps], logprobs[:, :steps], mask[:, :steps], terminated), *counts)


class _Text(NamedTuple):
    tokens: np.ndarray
    logprobs: np.ndarray
    terminated: bool
    counts: tuple[int, int, int]


def _one_text(model, drafter, prompt, T: int, rng, count: int, law: Law, stops: Stops) -> _Text:
    """One text, token by accepted token."""
    text, start = prompt, len(prompt)
    stream = np.empty((0, model.output_weight.shape[1]), model.output_weight.dtype)
    logprobs: list[float] = []
    proposed = accepted = passes = 0
    cache = model.new_cache(1, start + T - 1)
    drafter.begin(text)
    while True:
        # Before the model has read anything there is no stream, and a proposal must leave room for one more token.
        room = min(count, start + T - len(text) - 1) if len(stream) else 0
        draft = drafter.propose(text, stream, room, rng) if room > 0 else Draft(text[:0], np.empty((0, 0)))
        n = len(draft.tokens)
        require(n <= room, "speculative_generate", "the drafter's proposal", f"at most {room} tokens long", f"{n}")
        mark, full = cache.save(), np.append(text, draft.tokens)
        hidden = model.hidden(full[None, cache.length :], cache).data[0]
        logits = hidden[-(n + 1) :] @ model.output_weight.data.T  # (n + 1, V), after the text and every proposal
        laws = np.stack([law.probabilities(logits[i, None], full[None, : len(text) + i])[0] for i in range(n + 1)])
        draft = draft if n else Draft(draft.tokens, laws[:0])
        new = verify(draft, laws, rng.random(n + 1))
        passes, proposed, accepted = passes + 1, proposed + n, accepted + len(new) - 1
        stream = np.concatenate([stream, hidden[len(stream) - (len(full) - len(hidden)) :]])[: len(text) + len(new) - 1]
        for i, token in enumerate(new):
            text = np.append(text, token)
            logprobs.append(float(np.log(laws[i, token])))
            ended = bool(stops.ended(text[None, start:])[0])
            if ended or len(text) == start + T:
                counts = (proposed, accepted, passes)
                return _Text(text[start:], np.array(logprobs), ended, counts)
        cache.rewind(mark, len(text) - 1)
        if cache.length < len(text) - 1:  # it could only go back to the mark: read the accepted tokens again
            model.hidden(text[None, cache.length : -1], cache)
