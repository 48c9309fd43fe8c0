"""Launching the kernels over existing logits on tensors that `op.py` has checked: rows, strides, buffers, grids."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.launching import FUSED_MULTIPLY_ADD, on, rows_of
from kernels.token_loss import kernel_rows, kernel_softmax, kernel_terms
from kernels.token_loss.config import TOKENS, RowTile, lane_elements, loss_tile, packed, row_tile

rows_code: Any = kernel_rows  # what triton.jit returns, no type checker follows
softmax_code: Any = kernel_softmax
terms_code: Any = kernel_terms
LOG2_E = 1.0 / math.log(2.0)
KINDS = {"k1": 1, "k2": 2, "k3": 3}
LEVELS = ("token", "sequence", "sequence-mean")


@dataclass(frozen=True)
class Statistics:
    """What one pass over the logits gives for each row (n_rows,), in fp32; the last two are kept for the backward."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None
    mean: Tensor | None
    top: Tensor
    log_sum: Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """The data of a policy loss, flat and in fp32, and its switches."""

    old: Tensor
    advantage: Tensor
    ref: Tensor | None = None
    importance: Tensor | None = None
    low: float = 0.8
    high: float = 1.2
    dual: float = math.inf
    beta: float = 0.0
    kl: str = "k3"
    kl_ratio: bool = False
    entropy_coef: float = 0.0
    level: str = "token"
    length: int = 1  # tokens a response, padding included


@dataclass(frozen=True)
class LikelihoodTerms:
    """The switches of a likelihood loss."""

    smoothing: float = 0.0
    z_loss: float = 0.0


Loss = PolicyTerms | LikelihoodTerms


def as_column(gradient_: Tensor | None) -> Tensor | None:
    """What arrives at a per-row result, as the kernels want it: flat, contiguous, fp32."""
    return None if gradient_ is None else gradient_.reshape(-1).to(torch.float32).contiguous()


@dataclass(frozen=True)
class Terms:
    """Every token's share of the loss, what to watch, and the derivatives by the statistics (None: always 0)."""

    value: Tensor
    a: Tensor
    b: Tensor | None
    c: Tensor | None
    d: Tensor | None
    watched: tuple[Tensor, ...] = ()  # ratio, flag, k1, k2, k3


def _column(like: Tensor, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    return launching.empty((like.numel(),), dtype, like.device) if wanted else None


def _watched(like: Tensor) -> tuple[Tensor, ...]:
    return tuple(_column(like, dtype=torch.int8 if index == 1 else torch.float32) for index in range(5))


def _lanes(rows: Tensor) -> dict[str, Any]:
    size = rows.element_size()
    return {"LANE": lane_elements(size), "PACKED": packed(rows.shape[-1], size)}


def statistics(
    logits: Tensor, targets: Tensor, temperature: float, ignored: int,
    entropy: bool = True, mean: bool = False, tile: RowTile | None = None,
) -> Statistics:  # fmt: skip
    """One pass over the logits. Shapes: logits (..., V), targets (n_rows,) contiguous -> columns (n_rows,)."""
    rows, V = rows_of(logits), logits.shape[-1]
    found = Statistics(
        _column(targets), _column(targets), _column(targets, entropy), _column(targets, mean),
        _column(targets), _column(targets),
    )  # fmt: skip
    if len(rows) == 0:
        return found
    tile = tile or row_tile(V, logits.element_size())
    with on(logits):
        rows_code._statistics_kernel[(triton.cdiv(len(rows), tile.block_rows),)](
            rows, targets, found.logp, found.lse, found.entropy, found.mean, found.top, found.log_sum,
            len(rows), V, *rows.stride(), 1.0 / temperature, LOG2_E / temperature, ignored,
            BLOCK_ROWS=tile.block_rows, BLOCK_V=tile.block_v, STAGES=tile.stages, **_lanes(rows),
            num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return found


def _own(rows: Tensor, logits: Tensor) -> Tensor:
    """The rows, if they are the logits' own memory: written over a copy, the gradient would be lost without a word."""
    if rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"in place needs logits whose rows are a view, got strides {logits.stride()}: call .contiguous()."
        )
    return rows


def gradient(
    logits: Tensor, targets: Tensor, found: Statistics, coefficients: tuple[Tensor | None, ...], temperature: float,
    ignored: int, inplace: bool = False, tile: RowTile | None = None,
) -> Tensor:  # fmt: skip
    """The logits' gradient from the derivatives by log-prob, entropy, log-sum-exp and mean, (n_rows,) each or None."""
    rows, V = rows_of(logits), logits.shape[-1]
    out = logits if inplace else launching.empty(logits.shape, logits.dtype, logits.device)
    if out.numel() == 0:
        return out
    a, b, c, d = coefficients
    tile = tile or row_tile(V, logits.element_size())
    written = _own(rows, logits) if inplace else rows_of(out)
    with on(logits):
        rows_code._gradient_kernel[(triton.cdiv(len(rows), tile.block_rows),)](
            rows, targets, found.top, found.log_sum, None if b is None else found.entropy, a, b, c, d, written,
            len(rows), V, *rows.stride(), *written.stride(), 1.0 / temperature, LOG2_E / temperature, ignored,
            BLOCK_ROWS=tile.block_rows, BLOCK_V=tile.block_v, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return out


def loss_and_gradient(
    logits: Tensor, targets: Tensor, weight: Tensor, terms: Loss, temperature: float,
    ignored: int, inplace: bool = True, tile: RowTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...], Tensor]:  # fmt: skip
    """Statistics, terms and the logits' gradient (for 1 arriving at the sum of the terms) in one launch.

    Returns value, logp, lse, entropy, what to watch (each (n_rows,)), and the gradient, which with ``inplace`` has replaced the logits.
    """
    rows, V = rows_of(logits), logits.shape[-1]
    policy = terms if isinstance(terms, PolicyTerms) else None
    smoothing, z_loss = (0.0, 0.0) if isinstance(terms, PolicyTerms) else (terms.smoothing, terms.z_loss)
    value, logp, lse = _column(targets), _column(targets), _column(targets)
    entropy = _column(targets, policy is not None)
    watched = _watched(targets) if policy else ()
    out = logits if inplace else launching.empty(logits.shape, logits.dtype, logits.device)
    if len(rows) == 0:
        return value, logp, lse, entropy, watched, out
    tile = tile or loss_tile(V, logits.element_size())
    written = _own(rows, logits) if inplace else rows_of(out)
    p = policy or PolicyTerms(old=weight, advantage=weight)  # the numbers of a policy loss that is not asked for
    with on(logits):
        rows_code._loss_kernel[(triton.cdiv(len(rows), tile.block_rows),)](
            rows, targets, weight, *((p.old, p.ref, p.advantage, p.importance) if policy else (None,) * 4), written,
            value, logp, lse, entropy, *(watched or (None,) * 5),
            len(rows), V, *rows.stride(), *written.stride(), 1.0 / temperature, LOG2_E / temperature, ignored,
            smoothing, z_loss, p.low, p.high, p.dual, p.beta, p.entropy_coef,
            POLICY=policy is not None, SMOOTH=smoothing != 0, KL=KINDS[p.kl], KL_RATIO=p.kl_ratio,
            BONUS=p.entropy_coef != 0, WHOLE=tile.covers(V),
            BLOCK_ROWS=tile.block_rows, BLOCK_V=tile.block_v, STAGES=tile.stages, **_lanes(rows),
            num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return value, logp, lse, entropy, watched, out


def token_terms(
    found: Statistics, targets: Tensor, weight: Tensor, terms: Loss, ignored: int,
    block: int = TOKENS,
) -> Terms:  # fmt: skip
    """Terms of a loss and their derivatives from the statistics, all (n_rows,)."""
    n_rows = targets.numel()
    policy = isinstance(terms, PolicyTerms)
    value, a = _column(targets), _column(targets)
    b = _column(targets, policy and terms.entropy_coef != 0)
    c = _column(targets, not policy and (terms.smoothing != 0 or terms.z_loss != 0))
    d = _column(targets, not policy and terms.smoothing != 0)
    watched = _watched(targets) if policy else ()
    made = Terms(value, a, b, c, d, watched)
    if n_rows == 0:
        return made
    with on(targets):
        if isinstance(terms, LikelihoodTerms):
            terms_code._token_terms_kernel[(triton.cdiv(n_rows, block),)](
                found.logp, found.lse, None, found.mean, targets, weight, *(None,) * 4, value, a, b, c, d, *(None,) * 5,
                n_rows, ignored, terms.smoothing, terms.z_loss, *(0.0,) * 5,
                POLICY=False, KL=3, KL_RATIO=False, BLOCK=block, **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
            return made
        bounds = terms.low, terms.high, terms.dual, terms.beta, terms.entropy_coef
        data = terms.old, terms.ref, terms.advantage, terms.importance
        switches = {"KL": KINDS[terms.kl], "KL_RATIO": terms.kl_ratio, "BLOCK": block, **FUSED_MULTIPLY_ADD}
        if terms.level == "token":
            terms_code._token_terms_kernel[(triton.cdiv(n_rows, block),)](
                found.logp, found.lse, found.entropy, None, targets, weight, *data, value, a, b, c, d, *watched,
                n_rows, ignored, 0.0, 0.0, *bounds, POLICY=True, **switches,
            )  # fmt: skip
        else:
            terms_code._sequence_terms_kernel[(n_rows // terms.length,)](
                found.logp, found.entropy, targets, weight, *data, value, a, b, *watched,
                terms.length, ignored, *bounds, PER_LENGTH=terms.level == "sequence-mean", **switches,
            )  # fmt: skip
    return made


def scale(gradient_: Tensor, factor: Tensor) -> None:
    """Multiply a gradient by what arrived at the loss, in place; a factor of 1 costs a launch and no traffic."""
    if gradient_.numel() == 0:
        return
    rows = rows_of(gradient_)
    block = min(row_tile(rows.shape[1], 4).block_v, 8_192)
    with on(gradient_):
        rows_code._scale_kernel[(len(rows),)](
            rows, factor, len(rows), rows.shape[1], *rows.stride(), BLOCK_V=block, num_warps=4, **FUSED_MULTIPLY_ADD
        )


def softmax(x: Tensor, log: bool, tile: RowTile | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """softmax or its logarithm over the last axis, and the largest entry and log2 of the sum of every row."""
    rows, V = rows_of(x), x.shape[-1]
    y = launching.empty(x.shape, x.dtype, x.device)
    top, log_sum = (launching.empty((len(rows),), torch.float32, x.device) for _ in range(2))
    if x.numel() == 0:
        return y, top.zero_(), log_sum.zero_()
    tile = tile or row_tile(V, x.element_size())
    with on(x):
        softmax_code._softmax_kernel[(triton.cdiv(len(rows), tile.block_rows),)](
            rows, y, top, log_sum, len(rows), V, *rows.stride(), LOG2_E,
            LOG=log, BLOCK_ROWS=tile.block_rows, BLOCK_V=tile.block_v, STAGES=tile.stages, **_lanes(rows),
            num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return y, top, log_sum


def softmax_backward(
    dy: Tensor, x: Tensor, top: Tensor, log_sum: Tensor, log: bool, tile: RowTile | None = None
) -> Tensor:
    """Pull dy back through softmax or its logarithm."""
    rows, V = rows_of(x), x.shape[-1]
    dx = launching.empty(x.shape, x.dtype, x.device)
    if x.numel() == 0:
        return dx
    tile = tile or row_tile(V, x.element_size())
    arriving = rows_of(dy)
    with on(x):
        softmax_code._softmax_backward_kernel[(triton.cdiv(len(rows), tile.block_rows),)](
            arriving, rows, top, log_sum, dx, len(rows), V, *arriving.stride(), *rows.stride(), LOG2_E,
            LOG=log, BLOCK_ROWS=tile.block_rows, BLOCK_V=tile.block_v, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return dx
