r"""From one long stream of ids to inputs and targets: prefixes, consecutive chunks, random windows."""

import copy
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from minillm.checks import require, require_one_of, require_positive

IGNORE = -100  # the label of a place that enters no loss


class Batch(NamedTuple):
    """Inputs and the targets that stand one place further on, both (B, L)."""

    inputs: np.ndarray
    targets: np.ndarray


def prefix_samples(words: Sequence) -> list[tuple[Sequence, Any]]:
    r"""Every prefix of a sentence with the word that follows it.

    Equation: `prefix-samples` $(x_1\dots x_n)\mapsto x_{n+1}$ for $n=1\dots L-1$
    Shapes: L words -> L - 1 pairs
    Source: lecture06 (Pre-training).

    A causal model reads all of them in one pass: ``shift(words)`` holds the same pairs, position by position.
    """
    return [(words[:n], words[n]) for n in range(1, len(words))]


def shift(tokens: Shaped[np.ndarray, "*B L"]) -> Batch:
    r"""Give every token its successor as target.

    Equation: `next-token-chunks` inputs $x_1\dots x_{L-1}$, targets $x_2\dots x_L$
    Shapes: tokens (..., L) -> inputs and targets (..., L - 1)
    Raises: ValueError for fewer than two tokens.
    Source: lecture06 (sample text).
    """
    tokens = np.asarray(tokens)
    require(tokens.ndim >= 1 and tokens.shape[-1] >= 2, "shift", "tokens", "at least two along the last axis", tokens)
    return Batch(tokens[..., :-1], tokens[..., 1:])


def next_token_chunks(tokens: Sequence | np.ndarray, n_ctx: int, *, last: str = "drop", pad_id: int = 0) -> Batch:
    r"""Cut a stream into consecutive chunks of ``n_ctx``, targets shifted by one.

    Equation: `next-token-chunks` row $i$: inputs $x_{in},\dots,x_{in+n-1}$, targets $x_{in+1},\dots,x_{in+n}$, $n=n_{ctx}$
    Shapes: tokens (N,) -> inputs and targets (B, n_ctx)
    Raises: ValueError if n_ctx is not positive or the stream is too short for one chunk and its targets.
    Source: lecture06 (sample text).

    Every token but the first is a target exactly once. What does not fill a chunk is dropped, or with ``last="pad"``
    kept, filled up with ``pad_id`` and with targets that no loss counts: what an exact figure on a whole text needs.
    """
    where, tokens = "next_token_chunks", np.asarray(tokens)
    require_one_of(last, ("drop", "pad"), where, "last")
    require_positive(n_ctx, where, "n_ctx", integer=True)
    require(tokens.ndim == 1, where, "tokens", "one stream", tokens)
    least = n_ctx + 1 if last == "drop" else 2
    require(len(tokens) >= least, where, "tokens", f"at least {least}", f"{len(tokens)}", "Take a smaller n_ctx.")
    rows, rest = divmod(len(tokens) - 1, n_ctx)
    inputs, targets = tokens[:-1], tokens[1:]
    if last == "pad" and rest:
        rows, gap = rows + 1, n_ctx - rest
        inputs = np.append(inputs, np.full(gap, pad_id, tokens.dtype))
        targets = np.append(targets.astype(np.int64), np.full(gap, IGNORE))
    whole = rows * n_ctx
    return Batch(inputs[:whole].reshape(rows, n_ctx), targets[:whole].reshape(rows, n_ctx))  # (B, n_ctx)


class BatchStream:
    r"""Endless batches of windows that start anywhere in a stream, resumable to the bit.

    Equation: `next-token-chunks` inputs $x_s\dots x_{s+n-1}$, targets $x_{s+1}\dots x_{s+n}$, $s$ uniform
    Shapes: tokens (N,) -> batches of (batch_size, n_ctx)
    Raises: ValueError for sizes that are not positive or a stream shorter than one window and its targets.
    Source: lecture06 (sample text).

    Give it a generator of its own. ``tokens`` may be a memory-mapped array; it is not copied.
    """

    def __init__(self, tokens: np.ndarray, n_ctx: int, batch_size: int, rng: np.random.Generator):
        where, tokens = "BatchStream", np.asarray(tokens)
        require_positive(n_ctx, where, "n_ctx", integer=True)
        require_positive(batch_size, where, "batch_size", integer=True)
        whole = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
        require(whole, where, "tokens", "one stream of integer ids", tokens, "Encode the text first.")
        enough = len(tokens) > n_ctx
        require(enough, where, "tokens", f"more than n_ctx = {n_ctx}", f"{len(tokens)}", "Take a smaller n_ctx.")
        self.tokens, self.n_ctx, self.batch_size, self.rng = tokens, n_ctx, batch_size, rng
        self.batches_drawn = 0

    @property
    def epochs(self) -> float:
        """How often the stream has been read so far, on average over its tokens."""
        return self.batches_drawn * self.batch_size * self.n_ctx / len(self.tokens)

    def next_batch(self) -> Batch:
        """Draw the next batch."""
        starts = self.rng.integers(len(self.tokens) - self.n_ctx, size=(self.batch_size, 1))
        self.batches_drawn += 1
        return shift(self.tokens[starts + np.arange(self.n_ctx + 1)].astype(np.int64))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as values that JSON keeps (with the default generator, PCG64)."""
        return {
            "batches_drawn": self.batches_drawn,
            "rng": copy.deepcopy(self.rng.bit_generator.state),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where another stream over the same data stood; the batches that follow are the same to the bit.

        Raises: ValueError if the state belongs to other data, sizes or another kind of generator.
        """
        where = "BatchStream.load_state_dict"
        complete = isinstance(state, dict) and {"batches_drawn", "rng", "settings"} <= set(state)
        require(complete, where, "the state", "what state_dict() returned", state)
        hint = "Resume with the data and the sizes of the first run."
        require(
            state["settings"] == self._settings(), where, "the settings", str(self._settings()), state["settings"], hint
        )
        try:
            self.rng.bit_generator.state = state["rng"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{where}: the generator's state does not fit this generator: {error}") from error
        self.batches_drawn = state["batches_drawn"]

    def _settings(self) -> dict[str, int]:
        # the first and last thousand ids tell two corpora of one length apart at no cost
        ends = np.concatenate([self.tokens[:1000], self.tokens[-1000:]]).astype("<i8")
        return {
            "n_tokens": len(self.tokens),
            "fingerprint": zlib.crc32(ends.tobytes()),
            "n_ctx": int(self.n_ctx),
            "batch_size": int(self.batch_size),
        }
