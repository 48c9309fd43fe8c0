r"""Documents of different length in rows of one length, without padding or almost."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from minillm.checks import message, require, require_positive
from minillm.data.batches import IGNORE, Batch, next_token_chunks

Document = Sequence[int] | np.ndarray


class PackedBatch(NamedTuple):
    """Rows that hold several documents each, all arrays (B, n_ctx).

    ``segments`` numbers the documents of a row from 0 (-1 at padding), ``positions`` starts again at 0 with each,
    ``targets`` is ``IGNORE`` at padding and wherever the next token belongs to another document.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


def concat_documents(documents: Iterable[Document], eos_id: int) -> Int[np.ndarray, " N"]:
    r"""One stream of all documents, each closed by EOS.

    Equation: `packing-concat` $d_1\,\langle\mathrm{eos}\rangle\,d_2\,\langle\mathrm{eos}\rangle\dots$
    Shapes: documents of L_i -> (sum of L_i + 1,)
    Raises: ValueError for no documents or one that is not a sequence of ids.
    Source: topics #19.
    """
    parts: list[np.ndarray] = []
    for i, document in enumerate(documents):
        ids = np.asarray(document)
        sound = ids.ndim == 1 and (ids.size == 0 or np.issubdtype(ids.dtype, np.integer))
        require(sound, "concat_documents", f"document {i}", "a sequence of ids", ids)
        parts += [ids.astype(np.int64), np.array([eos_id])]
    require(len(parts) > 0, "concat_documents", "documents", "at least one", "none")
    return np.concatenate(parts)


def pack_concat(documents: Iterable[Document], n_ctx: int, eos_id: int) -> Batch:
    r"""Cut the EOS-joined stream into rows of inputs and shifted targets; documents may be split between rows.

    Equation: `packing-concat` EOS-joined stream cut in blocks of $n_{ctx}$
    Shapes: documents of L_i -> inputs and targets (B, n_ctx), no padding
    Raises: ValueError if the stream is shorter than one row and its targets.
    Source: topics #19.
    """
    return next_token_chunks(concat_documents(documents, eos_id), n_ctx)


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, n_ctx: int) -> list[list[int]]:
    r"""Fill bins of ``n_ctx``: longest document first, each into the first bin with room.

    Equation: `packing-ffd` $\min\#\text{bins}$ such that $\sum_{i\in\mathrm{bin}}L_i\le n_{ctx}$, greedily
    Shapes: lengths (N,) -> bins of indices, each index once
    Raises: ValueError for a length that is not positive or does not fit in n_ctx.
    Source: topics #19; Johnson 1973.
    """
    where, lengths = "first_fit_decreasing", np.asarray(lengths, dtype=np.int64)
    require_positive(n_ctx, where, "n_ctx", integer=True)
    require(lengths.ndim == 1, where, "lengths", "one-dimensional", lengths)
    wrong = np.flatnonzero((lengths < 1) | (lengths > n_ctx))
    if wrong.size:
        received = f"{int(lengths[wrong[0]])} for document {int(wrong[0])}"
        raise ValueError(message(where, "every length", f"in [1, {n_ctx}]", received, "Split or drop that document."))
    room = np.full(len(lengths), n_ctx)  # of all the bins that could ever be opened
    bins: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        first = int(np.argmax(room >= lengths[i]))
        if first == len(bins):
            bins.append([])
        bins[first].append(int(i))
        room[first] -= lengths[i]
    return bins


def pack_documents(documents: Sequence[Document], n_ctx: int, *, pad_id: int) -> PackedBatch:
    r"""Whole documents side by side in rows of ``n_ctx``, with the marks that keep them apart.

    Equation: `packing-positions` positions restart with every document; no target across a boundary
    Equation: `packing-ffd` rows filled by first-fit decreasing
    Shapes: documents of L_i -> tokens, targets, segments and positions (B, n_ctx)
    Raises: ValueError for an empty document or one longer than n_ctx.
    Source: topics #19.

    Attention has to stay inside a segment (block-diagonal mask); then the loss per kept target is that of the
    documents one by one. Add EOS to the documents first if the model is to learn where they end.
    """
    rows = [np.asarray(document, dtype=np.int64) for document in documents]
    bins = first_fit_decreasing([len(row) for row in rows], n_ctx)
    shape = (len(bins), n_ctx)
    tokens, targets = np.full(shape, pad_id), np.full(shape, IGNORE)
    segments, positions = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    for b, members in enumerate(bins):
        start = 0
        for segment, i in enumerate(members):
            end = start + len(rows[i])
            tokens[b, start:end] = rows[i]
            targets[b, start : end - 1] = rows[i][1:]
            segments[b, start:end] = segment
            positions[b, start:end] = np.arange(end - start)
            start = end
    return PackedBatch(tokens, targets, segments, positions)
