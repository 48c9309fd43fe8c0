r"""Synthetic languages whose entropy rate is known, so that a model's loss can be held against the floor."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import message, require, require_positive


class HiddenMarkovSource:
    r"""A hidden Markov source: from state s emit symbol x and go to state s' with probability $T_{s,x,s'}$.

    Shapes: transition (S, V, S), every ``transition[s]`` summing to 1
    Raises: ValueError for another shape, negative entries, rows that do not sum to 1, or a source that falls apart
        into several that never reach each other (its entropy rate would depend on chance).
    Source: Cover and Thomas, *Elements of Information Theory*, sections 4.2 and 4.5.

    The states follow a Markov chain and the symbols are what is seen of it. When the symbol leaves no choice of the
    next state the source is *unifilar*: states are a bookkeeping of past symbols and the entropy rate is exact.
    All logarithms are natural: nats per symbol.
    """

    def __init__(self, transition: Float[np.ndarray, "S V S"] | Sequence):
        where = type(self).__name__
        transition = np.array(transition, np.float64)
        square = transition.ndim == 3 and transition.shape[0] == transition.shape[2] and transition.size > 0
        require(square, where, "transition", "of shape (S, V, S)", transition)
        rows = transition.sum((1, 2))
        sound = bool((transition >= 0).all() and np.allclose(rows, 1, atol=1e-9))
        require(sound, where, "every transition[s]", "non-negative with sum 1", f"sums {rows}")
        self.transition = transition / rows[:, None, None]
        self.n_states, self.vocab_size = transition.shape[:2]
        self.stationary = _stationary(self.transition.sum(1))

    @property
    def is_unifilar(self) -> bool:
        """Whether state and symbol determine the next state."""
        return bool((np.count_nonzero(self.transition, axis=2) <= 1).all())

    def entropy_rate(self) -> float:
        r"""Nats per symbol of a unifilar source, exactly: $h=-\sum_s\pi_s\sum_x p(x\mid s)\ln p(x\mid s)$.

        Raises: ValueError for a source that is not unifilar, which has no such formula.
        """
        hint = "Use entropy_rate_bounds(n)."
        require(self.is_unifilar, "entropy_rate", "the source", "unifilar", "one with a choice of next state", hint)
        return float(self.stationary @ _entropy(self.transition.sum(2)))

    def entropy_rate_bounds(self, n: int) -> tuple[float, float]:
        r"""Exact bounds that close in as n grows: $H(X_n\mid X_{<n},S_1)\le h\le H(X_n\mid X_{<n})$.

        Every word of n symbols is visited, so time and memory grow as ``vocab_size ** n * n_states ** 2``.
        """
        where = "entropy_rate_bounds"
        require_positive(n, where, "n", integer=True)
        cost = float(self.vocab_size) ** n * self.n_states**2
        require(cost < 3e8, where, "vocab_size ** n * n_states ** 2", "below 3e8", cost, "Take a smaller n.")
        # words[s, w, s']: probability of word w and of ending in s', having started in s
        words = np.eye(self.n_states)[:, None, :]  # (S, 1, S)
        known, unknown = [0.0], [0.0]  # entropies of words of length 0, 1 .. with and without the first state known
        for _ in range(n):
            words = np.einsum("iws,sxt->iwxt", words, self.transition)  # (S, W, V, S)
            words = words.reshape(self.n_states, -1, self.n_states)  # (S, W V, S)
            laws = words.sum(2)  # (S, W V)
            *by_start, mixed = _entropy(np.vstack([laws, self.stationary @ laws]))
            known.append(float(self.stationary @ by_start))
            unknown.append(float(mixed))
        return known[-1] - known[-2], unknown[-1] - unknown[-2]

    def sample(self, rng: np.random.Generator, n: int) -> Int[np.ndarray, " n"]:
        """Draw n symbols, the first from the stationary distribution."""
        require_positive(n, "sample", "n", integer=True, zero_ok=True)
        cumulative = self.transition.reshape(self.n_states, -1).cumsum(1)  # (S, V S)
        rows = [row / row[-1] for row in cumulative]
        state = int(rng.choice(self.n_states, p=self.stationary))
        symbols = np.empty(n, np.int64)
        for i, u in enumerate(rng.random(n)):
            symbols[i], state = divmod(int(rows[state].searchsorted(u, side="right")), self.n_states)
        return symbols

    def optimal_nll(self, tokens: Int[np.ndarray, "*B L"] | Sequence) -> Float[np.ndarray, "*B L"]:
        r"""What the best predictor pays for each token: $-\ln p(x_t\mid x_1\dots x_{t-1})$ under the true source.

        The forward algorithm, from the stationary distribution.

        Shapes: tokens (..., L) -> (..., L) nats
        Raises: IndexError for symbols outside the vocabulary, ValueError for a sequence that this source cannot emit.

        A model that sees windows knows nothing of what lies before them, and neither does this predictor: on the
        same windows its mean is the lowest loss in expectation, a little above the entropy rate.
        """
        where, tokens = "optimal_nll", np.asarray(tokens)
        whole = tokens.ndim >= 1 and np.issubdtype(tokens.dtype, np.integer)
        require(whole, where, "tokens", "integers with at least one axis", tokens)
        inside = tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < self.vocab_size)
        require(inside, where, "every token", f"in [0, {self.vocab_size})", tokens, error=IndexError)
        rows = tokens.reshape(-1, tokens.shape[-1])  # (B, L)
        by_symbol = self.transition.transpose(1, 0, 2)  # (V, S, S)
        belief = np.broadcast_to(self.stationary, (len(rows), self.n_states))  # (B, S)
        nll = np.empty(rows.shape)
        for t in range(rows.shape[1]):
            joint = np.einsum("bs,bst->bt", belief, by_symbol[rows[:, t]])  # (B, S)
            probability = joint.sum(1)
            if (probability <= 0).any():
                place = f"symbol {rows[probability <= 0, t][0]} at position {t}"
                raise ValueError(message(where, "tokens", "a sequence that the source can emit", place))
            nll[:, t] = -np.log(probability)
            belief = joint / probability[:, None]
        return nll.reshape(tokens.shape)


def markov_source(rows: Float[np.ndarray, "contexts V"] | Sequence) -> HiddenMarkovSource:
    """A Markov chain of any order k: ``rows[c]`` is the next symbol's law after the k symbols that spell c in base V.

    Shapes: rows (V ** k, V)
    Raises: ValueError if the number of contexts is not a power of V.
    """
    rows = np.asarray(rows, np.float64)
    require(rows.ndim == 2 and rows.shape[1] > 0, "markov_source", "rows", "of shape (V ** k, V)", rows)
    contexts, vocab_size = rows.shape
    order = round(np.log(contexts) / np.log(vocab_size)) if vocab_size > 1 and contexts else 0
    require(vocab_size**order == contexts, "markov_source", "rows", "of shape (V ** k, V)", rows)
    transition = np.zeros((contexts, vocab_size, contexts))
    for context in range(contexts):
        for symbol in range(vocab_size):
            transition[context, symbol, (context * vocab_size + symbol) % contexts] = rows[context, symbol]
    return HiddenMarkovSource(transition)


def noisy_source(
    chain: Float[np.ndarray, "S S"] | Sequence, emission: Float[np.ndarray, "S V"] | Sequence
) -> HiddenMarkovSource:
    """The textbook hidden Markov model: move by ``chain``, then emit by the new state's row of ``emission``.

    Shapes: chain (S, S), emission (S, V)
    Unifilar only if no symbol is shared by two states, so its entropy rate is known by bounds.
    """
    chain, emission = np.asarray(chain, np.float64), np.asarray(emission, np.float64)
    fits = chain.ndim == 2 and emission.ndim == 2 and chain.shape == (len(emission), len(emission))
    require(
        fits, "noisy_source", "chain and emission", "of shapes (S, S) and (S, V)", f"{chain.shape}, {emission.shape}"
    )
    return HiddenMarkovSource(chain[:, None, :] * emission.T[None, :, :])


def even_source(p: float = 0.5) -> HiddenMarkovSource:
    """Zeros anywhere, ones only in runs of even length: two states, yet no finite number of past symbols suffices."""
    require(0 < p < 1, "even_source", "p", "between 0 and 1", p)
    transition = np.zeros((2, 2, 2))
    transition[0, 0, 0], transition[0, 1, 1] = p, 1 - p
    transition[1, 1, 0] = 1.0
    return HiddenMarkovSource(transition)


def bracket_source(
    kinds: int = 2, depth: int = 2, letters: int = 8, p_open: float = 0.2, p_close: float = 0.25, sharpness: float = 2.0
) -> HiddenMarkovSource:
    r"""Properly nested brackets up to a depth, with letters whose law depends on the innermost open bracket.

    Raises: ValueError for sizes below 1 or probabilities without room for letters.

    Symbols: ``kinds`` opening brackets, then their closing ones, then ``letters`` letters. The state is the stack of
    open brackets, so the source is unifilar and its entropy rate exact; to predict it, a model has to find the
    bracket that is still open, however far back. Letter i weighs ``sharpness ** (-((i - shift) % letters))``, with a
    shift of its own for every kind and for the outside; no randomness is involved.
    """
    where = "bracket_source"
    for name, value in (("kinds", kinds), ("depth", depth), ("letters", letters)):
        require_positive(value, where, name, integer=True)
    require_positive(sharpness, where, "sharpness")
    fits = p_open > 0 and p_close > 0 and p_open + p_close < 1
    require(fits, where, "p_open and p_close", "positive with a sum below 1", f"{p_open} and {p_close}")

    stacks: list[tuple[int, ...]] = [()]
    for stack in stacks:  # grows while it is walked: every stack after the ones below it
        if len(stack) < depth:
            stacks += [(*stack, kind) for kind in range(kinds)]
    number = {stack: i for i, stack in enumerate(stacks)}
    transition = np.zeros((len(stacks), 2 * kinds + letters, len(stacks)))
    for stack, state in number.items():
        room = 1.0
        if len(stack) < depth:
            room -= p_open
            for kind in range(kinds):
                transition[state, kind, number[*stack, kind]] = p_open / kinds
        if stack:
            room -= p_close
            transition[state, kinds + stack[-1], number[stack[:-1]]] = p_close
        shift = (stack[-1] + 1) * letters // (kinds + 1) if stack else 0
        weights = float(sharpness) ** -((np.arange(letters) - shift) % letters)
        transition[state, 2 * kinds :, state] = room * weights / weights.sum()
    return HiddenMarkovSource(transition)


def _stationary(chain: Float[np.ndarray, "S S"]) -> Float[np.ndarray, " S"]:
    n = len(chain)
    flow = chain.T - np.eye(n)
    hint = "Keep one group of states that can all be reached from every state."
    single = int(np.linalg.matrix_rank(flow, tol=1e-10)) == n - 1
    require(single, "HiddenMarkovSource", "the source", "one with a single stationary distribution", "several", hint)
    weights = np.linalg.lstsq(np.vstack([flow, np.ones(n)]), np.append(np.zeros(n), 1.0), rcond=None)[0]
    weights = np.maximum(weights, 0)
    return weights / weights.sum()


def _entropy(p: Float[np.ndarray, "*B V"]) -> Float[np.ndarray, "*B"]:
    """Entropy of the last axis in nats, with 0 ln 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
