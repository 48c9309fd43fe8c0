r"""Sequences of different length in one batch: padding, what it wastes, grouping by length, labels for SFT."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from minillm.checks import require, require_one_of, require_positive
from minillm.data.batches import IGNORE


class PaddedBatch(NamedTuple):
    """Tokens (B, L_max) and the mask (B, L_max) that is True at real tokens."""

    tokens: np.ndarray
    mask: np.ndarray


class LabelledBatch(NamedTuple):
    """Inputs, their targets (``IGNORE`` where no loss is due) and the mask of real inputs, all (B, L)."""

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


def pad_batch(sequences: Sequence[Sequence[int] | np.ndarray], pad_id: int, *, side: str = "right") -> PaddedBatch:
    r"""Pad to the longest sequence of this batch.

    Equation: `padding-dynamic` $L_{\max}=\max_iL_i$ of the batch, $m_{it}=1$ for real tokens
    Equation: `special-tokens` PAD fills the gaps and the mask keeps it out of attention and loss
    Shapes: B sequences of L_i -> tokens (B, L_max), mask (B, L_max)
    Raises: ValueError for an empty batch, a sequence that is not one-dimensional or an unknown side.
    Source: notes §10.5, footnote 15.
    Differs: the mask is one row a sequence, and PAD is never treated as a normal token (erratum 31).

    The mask comes from the lengths, never from comparing with ``pad_id``, which may be a real token as well.
    """
    where = "pad_batch"
    require_one_of(side, ("left", "right"), where, "side")
    require(len(sequences) > 0, where, "sequences", "at least one", "none")
    rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    for i, row in enumerate(rows):
        require(row.ndim == 1, where, f"sequence {i}", "one-dimensional", row)
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max())
    place = np.arange(width)
    mask = place < lengths[:, None] if side == "right" else place >= width - lengths[:, None]  # (B, L_max)
    tokens = np.full(mask.shape, pad_id, dtype=np.int64)
    tokens[mask] = np.concatenate(rows)
    return PaddedBatch(tokens, mask)


def padding_waste(lengths: Sequence[int] | np.ndarray, batch_size: int | None = None) -> float:
    r"""Share of places that hold no token, in one batch or over consecutive batches of ``batch_size``.

    Equation: `padding-waste` $1-\frac{\sum_iL_i}{BL_{\max}}$
    Shapes: lengths (B,) -> share in [0, 1)
    Raises: ValueError for no lengths or negative ones.
    Source: topics #19.
    Differs: how much is wasted depends on the law of the lengths; no figure is asserted (erratum 14).
    """
    where, lengths = "padding_waste", np.asarray(lengths)
    sound = lengths.ndim == 1 and lengths.size > 0 and lengths.min() >= 0 and lengths.max() > 0
    require(sound, where, "lengths", "one-dimensional, not negative and not all zero", lengths)
    size = len(lengths) if batch_size is None else batch_size
    require_positive(size, where, "batch_size", integer=True)
    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return float(1 - lengths.sum() / sum(len(batch) * int(batch.max()) for batch in batches))


def bucket_by_length(
    lengths: Sequence[int] | np.ndarray, batch_size: int, *, window: int | None = None
) -> list[Int[np.ndarray, " B"]]:
    r"""Batches of indices of similar length: sort within windows of ``window`` batches (all, if not given), then cut.

    Equation: `bucketing` sort $L_i$ within windows
    Shapes: lengths (N,) -> ceil(N / batch_size) arrays of indices, each index once
    Raises: ValueError for sizes that are not positive.
    Source: topics #19.

    Smaller windows keep more of the order, and so of the randomness, that the data came in. Shuffle the list of
    batches before training, or the lengths rise within every window.
    """
    where, lengths = "bucket_by_length", np.asarray(lengths)
    require(lengths.ndim == 1, where, "lengths", "one-dimensional", lengths)
    require_positive(batch_size, where, "batch_size", integer=True)
    if window is not None:
        require_positive(window, where, "window", integer=True)
    span = max(len(lengths), 1) if window is None else window * batch_size
    batches = []
    for start in range(0, len(lengths), span):
        order = start + np.argsort(lengths[start : start + span], kind="stable")
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def sft_labels(
    prompt: Sequence[int] | np.ndarray, target: Sequence[int] | np.ndarray, *, bos_id: int | None, eos_id: int
) -> tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"]]:
    r"""Frame one demonstration and label only what the model has to learn to say.

    Equation: `sft-masking` $\langle\mathrm{bos}\rangle\,\mathbf p$ masked, $\mathbf y\,\langle\mathrm{eos}\rangle$ kept
    Shapes: prompt (L_p,), target (L_y,) -> tokens and labels (1 + L_p + L_y + 1,), labels[t] belonging to tokens[t]
    Source: notes §10.3.

    With ``bos_id=None`` there is no BOS. EOS is kept, or the model would never learn to stop.
    """
    head = [bos_id] if bos_id is not None else []
    framed = np.concatenate([np.asarray(part, np.int64) for part in (head, prompt, target, [eos_id])])
    labels = framed.copy()
    labels[: len(head) + len(prompt)] = IGNORE
    return framed, labels


def sft_batch(
    prompts: Sequence[Sequence[int] | np.ndarray],
    targets: Sequence[Sequence[int] | np.ndarray],
    *,
    bos_id: int | None,
    eos_id: int,
    pad_id: int,
    side: str = "right",
) -> LabelledBatch:
    r"""Demonstrations as one padded batch with shifted targets, ready for a cross-entropy that skips ``IGNORE``.

    Equation: `sft-masking` loss on $\mathbf y\,\langle\mathrm{eos}\rangle$ only
    Shapes: B pairs -> inputs, targets and mask (B, L_max - 1)
    Raises: ValueError for lists of different length, no pairs or an unknown side.
    Source: notes §10.3.
    """
    same = len(prompts) == len(targets)
    require(same, "sft_batch", "targets", f"one for each of {len(prompts)} prompts", f"{len(targets)}")
    framed = [sft_labels(p, y, bos_id=bos_id, eos_id=eos_id) for p, y in zip(prompts, targets, strict=True)]
    # shifted before padding, so that with padding on the left, too, no PAD is a target and every input is real
    inputs, mask = pad_batch([tokens[:-1] for tokens, _ in framed], pad_id, side=side)
    labels, _ = pad_batch([labels[1:] for _, labels in framed], IGNORE, side=side)
    return LabelledBatch(inputs, labels, mask)
