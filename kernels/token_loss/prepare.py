"""What a loss is given, checked and brought into the form that the kernels want: ids, weights, other policies' numbers."""

import math

import torch
from torch import Tensor

from kernels import launching
from kernels.checks import check_floats, check_integers, check_places
from kernels.token_loss.gradients import traced
from kernels.token_loss.launch import KINDS, LEVELS, PolicyTerms
from minillm.checks import require, require_one_of

REDUCTIONS = ("token-mean", "seq-mean", "seq-sum", "constant", "sum")


def flat(targets: Tensor) -> Tensor:
    """One id a row, contiguous."""
    return targets.reshape(-1).contiguous()


def likelihood_weights(targets: Tensor, ignored: int, reduction: str, divisor: float | None) -> Tensor:
    keep = (targets != ignored).to(torch.float32)
    if reduction == "sum":
        return keep
    return keep / (keep.sum().clamp(min=1.0) if divisor is None else float(divisor))


def policy(
    where: str, V: int, targets: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor | None,
    importance: Tensor | None, clip_low: float, clip_high: float | None, dual_clip: float | None, level: str, beta: float,
    kl: str, kl_ratio: bool, entropy_coef: float, reduction: str, length: int | None, divisor: float | None, ignored: int,
) -> tuple[Tensor, Tensor, PolicyTerms]:  # fmt: skip
    """Targets with dropped tokens ignored, the weight of every token, and the data and switches of the terms."""
    shape = targets.shape
    high = clip_low if clip_high is None else clip_high
    require_one_of(level, LEVELS, where, "level")
    require_one_of(kl, KINDS, where, "kl")
    require_one_of(reduction, REDUCTIONS, where, "reduction")
    require(0 <= clip_low <= 1 and high >= 0, where, "the clip widths", "low in [0, 1] and high at least 0",
            f"{clip_low}, {high}")  # fmt: skip
    require(
        dual_clip is None or dual_clip > 1 + high,
        where,
        "dual_clip",
        f"above the upper clip bound {1 + high}",
        dual_clip,
    )
    require(beta == 0 or ref is not None, where, "ref_logprobs", "given when beta is not 0", ref)
    require(reduction != "constant" or (length is not None and length > 0), where, "length",
            "the largest response length for reduction='constant'", length)  # fmt: skip
    require(divisor is None or (divisor > 0 and reduction != "sum"), where, "divisor",
            "positive, and left out for reduction='sum'", divisor)  # fmt: skip
    require(mask.shape == shape, where, "the mask", f"of shape {tuple(shape)}", mask)
    require(
        advantages.shape in (shape, shape[:1]),
        where,
        "advantages",
        f"of shape {tuple(shape)} or {tuple(shape[:1])}",
        advantages,
    )
    given = [("old_logprobs", old), ("ref_logprobs", ref), ("token_weights", importance)]
    for name, tensor in given:
        require(tensor is None or tensor.shape == shape, where, name, f"of shape {tuple(shape)}", tensor)
    check_places(where, [(n, t) for n, t in [*given, ("advantages", advantages), ("the mask", mask)] if t is not None])
    keep = (mask if mask.dtype == torch.bool else mask == 1) & (targets != ignored)
    chosen = torch.where(keep, targets, ignored).reshape(-1)
    if launching.INTERPRETED and not traced(targets):
        odd = mask[(mask != 0) & (mask != 1)] if mask.dtype != torch.bool else mask[:0]
        require(
            odd.numel() == 0,
            where,
            "the mask",
            "of booleans, zeros and ones",
            f"the value {odd.reshape(-1)[:1].tolist()}",
        )
        _check_ids(where, chosen, V, ignored)

    def column(data: Tensor | None) -> Tensor | None:
        if data is None:
            return None
        data = data.unsqueeze(-1).expand(shape) if data.shape != shape else data
        return data.detach().to(torch.float32).reshape(-1).contiguous()

    terms = PolicyTerms(
        column(old), column(advantages), column(ref), column(importance), 1.0 - clip_low, 1.0 + high,  # type: ignore[arg-type]
        math.inf if dual_clip is None else float(dual_clip), float(beta), kl, kl_ratio, float(entropy_coef), level, shape[-1],
    )  # fmt: skip
    return chosen, token_weights(keep, reduction, length, divisor).reshape(-1), terms


def token_weights(keep: Tensor, reduction: str, length: int | None, divisor: float | None) -> Tensor:
    """Every token's weight in the loss, (B, T): `minillm.functional.reductions.aggregation_weights` without leaving the device."""
    kept = keep.to(torch.float32)
    count = len(keep) * float(length or 0) if reduction == "constant" else float(len(keep))
    weights = kept / (kept.sum().clamp(min=1.0) if reduction == "token-mean" and divisor is None else
                      float(divisor) if divisor is not None else 1.0 if reduction == "sum" else max(count, 1.0))  # fmt: skip
    if reduction == "seq-mean":
        weights = weights / kept.sum(-1, keepdim=True).clamp(min=1.0)
    return weights


# ---- checks


def check_logits(where: str, logits: Tensor, targets: Tensor, temperature: float, ignored: int | None) -> None:
    require(logits.ndim >= 1 and logits.shape[-1] >= 1, where, "logits", "of shape (..., V) with V at least 1", logits)
    check_floats(where, (("logits", logits),))
    _check_targets(where, logits.shape[:-1], logits.shape[-1], logits, targets, temperature, ignored)


def check_linear(
    where: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ignored: int | None
) -> None:
    require(weight.ndim == 2 and weight.numel() > 0, where, "weight", "of shape (V, d), not empty", weight)
    V, d = weight.shape
    require(
        hidden.ndim >= 1 and hidden.shape[-1] == d, where, "hidden", f"of shape (..., {d}), as the weight wants", hidden
    )
    check_floats(where, (("hidden", hidden), ("weight", weight)))
    require(
        weight.dtype == hidden.dtype,
        where,
        "weight",
        f"of the hidden states' dtype {hidden.dtype}",
        weight,
        error=TypeError,
    )
    _check_targets(where, hidden.shape[:-1], V, hidden, targets, temperature, ignored)


def _check_targets(
    where: str, shape: torch.Size, V: int, beside: Tensor, targets: Tensor, temperature: float, ignored: int | None
) -> None:
    require(targets.shape == shape, where, "targets", f"of shape {tuple(shape)}, one id for every row", targets)
    check_integers(where, (("targets", targets),))
    check_places(where, [("the first operand", beside), ("targets", targets)])
    require(0 < temperature < math.inf, where, "temperature", "a positive number", temperature)
    if ignored is not None and launching.INTERPRETED and not traced(targets):
        _check_ids(where, targets, V, ignored)


def _check_ids(where: str, targets: Tensor, V: int, ignored: int) -> None:
    wrong = targets[(targets != ignored) & ((targets < 0) | (targets >= V))]
    require(wrong.numel() == 0, where, "targets", f"in [0, {V}) or {ignored}", f"the id {wrong[:1].tolist()}",
            "Was the text encoded with another tokenizer?", error=IndexError)  # fmt: skip


def check_likelihood(where: str, reduction: str, smoothing: float, z_loss: float) -> None:
    require_one_of(reduction, ("token-mean", "sum"), where, "reduction")
    require(0 <= smoothing <= 1, where, "label_smoothing", "in [0, 1]", smoothing)
    require(z_loss >= 0, where, "z_loss", "at least 0", z_loss)
