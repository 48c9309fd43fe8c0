r"""Proposing with what multi-token prediction has trained: the model drafts for itself."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.decoding.law import Law
from minillm.decoding.speculative import Draft
from minillm.models.multi_token import ParallelPrediction, SequentialPrediction


class _SelfDrafter:
    """What the two drafters share: a cache of one layer for every head, and drawing from a head's logits."""

    def __init__(self, model: SequentialPrediction | ParallelPrediction, n_heads: int, law: Law | None):
        config = model.trunk.config
        forgets = config.window is None and config.attention != "linear"
        received = f"window = {config.window}, attention = {config.attention!r}"
        hint = "Draft with another model: a ring or a running sum cannot drop what was rejected."
        wanted = "one whose caches can drop tokens, without a window or linear attention"
        require(forgets, type(self).__name__, "the trunk", wanted, received, hint)
        self.model, self.n_heads, self.law = model, n_heads, Law() if law is None else law
        self.heads: list[Any] = model.modules if isinstance(model, SequentialPrediction) else model.heads

    def begin(self, text: Int[np.ndarray, " T"]) -> None:
        """Start a new text with empty caches."""
        self.caches = [head.new_cache(self.model.trunk.output_weight.dtype) for head in self.heads]

    def _law(self, normed: Tensor, text: np.ndarray) -> Float[np.ndarray, " V"]:
        logits = normed.data[:, -1] @ self.model.trunk.output_weight.data.T  # (1, V)
        return self.law.probabilities(logits, text[None])[0]

    def _check(self, text: np.ndarray, stream: np.ndarray) -> None:
        wanted = (len(text) - 1, self.model.trunk.config.d_model)
        require(stream.shape == wanted, type(self).__name__, "the stream", f"of shape {wanted}", stream)


def _draft(tokens: list[int], laws: list[np.ndarray], V: int) -> Draft:
    return Draft(np.array(tokens, np.int64), np.array(laws).reshape(len(laws), V))


class SequentialDrafter(_SelfDrafter):
    r"""The modules of DeepSeek-V3 as a drafter of up to D tokens.

    The trunk has read the text $x_0,\dots,x_{T-1}$ but for its last token. Module 1 at position T - 2 reads
    $\mathbf h_{T-2}$ and $x_{T-1}$ and proposes $x_T$; module 2 reads what module 1 returned, and $x_T$; and so on.
    What a module computed at a position is final when it rests on accepted tokens only, that is for module i at
    positions up to T - 1 - i. Later ones are forgotten before the next proposal.

    Equation: `mtp-sequential-module` used for `speculative-decoding`: draft with the modules, verify with the trunk
    Raises: ValueError for a stream that is not the text's.
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """

    model: SequentialPrediction

    def __init__(self, model: SequentialPrediction, law: Law | None = None):
        super().__init__(model, len(model.modules), law)

    def begin(self, text: Int[np.ndarray, " T"]) -> None:
        """Start a new text with empty caches."""
        super().begin(text)
        config = self.model.trunk.config
        shape = (self.n_heads, config.context, config.d_model)
        self.streams = np.zeros(shape, self.model.trunk.output_weight.dtype)
        self.final = [0] * self.n_heads  # how many positions of each module rest on accepted tokens

    def propose(
        self, text: Int[np.ndarray, " T"], stream: Float[np.ndarray, "T1 d"], count: int, rng: np.random.Generator
    ) -> Draft:
        """Up to min(count, D) tokens that may follow."""
        self._check(text, stream)
        T, V = len(text), self.model.trunk.config.vocab_size
        written, laws = text, []
        for i in range(1, min(count, self.n_heads) + 1 if T > 1 else 1):
            cache, module = self.caches[i - 1], self.model.modules[i - 1]
            cache.rewind(0, min(cache.length, self.final[i - 1]))
            start = cache.length
            below = (stream if i == 1 else self.streams[i - 2])[start : T - 1]
            tokens = self.model.trunk.embedding(written[None, start + i : T - 1 + i])
            h = module(Tensor(np.ascontiguousarray(below)[None]), tokens, cache)
            self.streams[i - 1, start : T - 1] = h.data[0]
            self.final[i - 1] = max(0, T - i)
            laws.append(self._law(module.out(h[:, -1:]), written))
            written = np.append(written, rng.choice(V, p=laws[-1]))
        return _draft(written[T:].tolist(), laws, V)


class ParallelDrafter(_SelfDrafter):
    r"""Heads side by side as a drafter of up to n - 1 tokens, none of which knows the others.

    Equation: `mtp-parallel-heads` used for `speculative-decoding`: head i at position T - 2 proposes $x_{T-2+i}$
    Raises: ValueError for a stream that is not the text's.
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    """

    model: ParallelPrediction

    def __init__(self, model: ParallelPrediction, law: Law | None = None):
        super().__init__(model, len(model.heads), law)

    def propose(
        self, text: Int[np.ndarray, " T"], stream: Float[np.ndarray, "T1 d"], count: int, rng: np.random.Generator
    ) -> Draft:
        """Up to min(count, n - 1) tokens that may follow."""
        self._check(text, stream)
        T, V = len(text), self.model.trunk.config.vocab_size
        written, laws = text, []
        for head, cache in list(zip(self.model.heads, self.caches, strict=True))[: count if T > 1 else 0]:
            new = np.ascontiguousarray(stream[cache.length :])
            h = head(Tensor(new[None]), cache)
            laws.append(self._law(head.out(h[:, -1:]), written))
            written = np.append(written, rng.choice(V, p=laws[-1]))
        return _draft(written[T:].tolist(), laws, V)
