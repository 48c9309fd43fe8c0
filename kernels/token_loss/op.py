r"""The losses over logits on torch tensors: checks, weights, and the choice of the path.

`softmax`, `log_softmax`, `token_logprobs`, `cross_entropy` and `policy_loss` take existing logits; the three
`linear_*` take hidden states and the head's matrix and never store logits. Float32, float16 or bfloat16 of any
layout on a GPU; in Triton's interpreter (TRITON_INTERPRET=1, no GPU) float32 and float16. Statistics and losses are
float32; gradients have their operand's dtype.

Rows that do not count, because their target is ``ignore_index`` or their mask is 0, are not read: they give 0, and a
gradient of exactly 0, whatever they hold. A loss without any row that counts is 0.

``inplace=True`` (existing logits only) writes the gradient over the logits during the forward call: one read and one
write of memory for loss and gradient together. The logits are gone afterwards, and backward can be called once. Under
`torch.compile` it is taken for False.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import launching
from kernels.checks import check_floats, check_integers, check_places
from kernels.launching import rows_of
from kernels.token_loss import gradients
from kernels.token_loss.gradients import Loss, loss_of, traced
from kernels.token_loss.launch import KINDS, LEVELS, LikelihoodTerms, PolicyTerms
from minillm.checks import require, require_one_of

IGNORE = -100
REDUCTIONS = ("token-mean", "seq-mean", "seq-sum", "constant", "sum")


class PolicyLoss(NamedTuple):
    """A loss and, per token (0 where the token does not count), what it was made of; only the loss has a gradient."""

    loss: Tensor
    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor  # int8: -1 at the lower bound, 1 at the upper, 2 at the dual clip; 0 where the gradient flows
    k1: Tensor  # the three estimates of the divergence from the reference; 0 without one
    k2: Tensor
    k3: Tensor


def softmax(logits: Tensor) -> Tensor:
    r"""Probabilities from logits.

    Equation: `softmax-stable` $e^{z_i-\max z}/\sum_je^{z_j-\max z}$
    Equation: `softmax` the same function
    Shapes: logits (..., V) -> (..., V)
    Raises: ValueError for a device without kernels; TypeError for other dtypes.
    Source: notes §4.1 (6), (7).
    """
    return _softmax("softmax", logits, False)


def log_softmax(logits: Tensor) -> Tensor:
    r"""Log-probabilities from logits.

    Equation: `log-softmax` $\log p_i=z_i-\mathrm{LSE}(z)$
    Shapes: logits (..., V) -> (..., V)
    Raises: ValueError for a device without kernels; TypeError for other dtypes.
    Source: bridging §1.6.
    """
    return _softmax("log_softmax", logits, True)


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Log-prob of the chosen token, log-sum-exp and entropy of every position, in one pass over the logits.

    Equation: `gather-logprob` $\ell_t=(\log\mathrm{softmax}(\mathbf o_{t-1}))[y_t]$
    Equation: `logsumexp` $\mathrm{LSE}(z)=\max z+\log\sum_je^{z_j-\max z}$
    Equation: `entropy` $\mathcal H=\log s-u/s$, see `kernel_tiles.py`
    Equation: `sample-behaviour-logprob` with the sampler's ``temperature``, the logits divided by it first
    Shapes: logits (..., V), targets (...) -> three of (...), float32
    Raises: ValueError for shapes or a temperature that do not fit, TypeError for other dtypes, IndexError
        (interpreter) for ids outside [0, V); on a GPU such an id makes its row NaN.
    Source: bridging §1.6; notes §10.5.
    """
    _check_logits("token_logprobs", logits, targets, temperature, ignore_index)
    found = _statistics(logits, _flat(targets), temperature, ignore_index, True, False)
    return tuple(f.view(targets.shape) for f in found[:3])  # type: ignore[union-attr, return-value]


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE, reduction: str = "token-mean",
    divisor: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0, inplace: bool = False,
) -> Tensor:  # fmt: skip
    r"""Negative log-likelihood of the targets, to be minimised.

    Equation: `cross-entropy-logits` $-\mathbf o_t[x_{t+1}]+\mathrm{LSE}(\mathbf o_t)$
    Equation: `label-smoothing` $(1-\epsilon)\mathrm{NLL}+\epsilon(\mathrm{LSE}-\bar{\mathbf o})$, the mean logit $\bar{\mathbf o}$ from the same pass
    Shapes: logits (..., V), targets (...) -> scalar; ``z_loss`` adds its multiple of the squared log-sum-exp.
        ``divisor`` replaces the number of targets that count, as when this is one micro-batch of several.
    Raises: ValueError, TypeError and IndexError as `token_logprobs`, ValueError for an unknown reduction.
    Source: bridging §1.6; topics #5.
    """
    _check_logits("cross_entropy", logits, targets, 1.0, ignore_index)
    _check_likelihood("cross_entropy", reduction, label_smoothing, z_loss)
    flat = _flat(targets)
    weight = _likelihood_weights(flat, ignore_index, reduction, divisor)
    terms = LikelihoodTerms(label_smoothing, z_loss)
    if _may_replace("cross_entropy", logits, inplace):
        return gradients.InPlaceLoss.apply(logits, flat, weight, terms, 1.0, ignore_index)[0]  # type: ignore[index]
    found = _statistics(logits, flat, 1.0, ignore_index, False, label_smoothing != 0)
    return loss_of(found, flat, weight, terms, ignore_index)[0]


def policy_loss(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    ref_logprobs: Tensor | None = None, token_weights: Tensor | None = None,
    clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, level: str = "token",
    beta: float = 0.0, kl: str = "k3", kl_ratio: bool = False, entropy_coef: float = 0.0,
    reduction: str = "seq-mean", length: int | None = None, divisor: float | None = None,
    temperature: float = 1.0, ignore_index: int = IGNORE, inplace: bool = False,
) -> PolicyLoss:  # fmt: skip
    r"""The clipped policy loss of PPO, GRPO and their relatives, straight from logits; to be minimised.

    Equation: `grpo-loss` $-\frac1G\sum_i\frac1{\lvert y_i\rvert}\sum_t\big[\min(\rho A,\mathrm{clip}(\rho)A)-\beta k_3\big]$
    Equation: `ppo-lm-loss` with ``beta=0``
    Equation: `grpo-clip-higher` with ``clip_high`` wider than ``clip_low``
    Equation: `grpo-ratio-token` ``level="token"``; `sequence` and `sequence-mean` (`gspo`) take one ratio a response
    Equation: `gspo` ``level="sequence-mean"``
    Equation: `grpo-ratio-sequence` ``level="sequence"``
    Equation: `importance-ratio` $\rho=\exp(\log\pi_\theta-\log\pi_{\rm old})$
    Equation: `entropy-bonus` $-c_e\mathcal H$, summed exactly over the vocabulary
    Equation: `loss-aggregation` five reductions
    Equation: `tis` the weights come in as ``token_weights``
    Shapes: logits (B, T, V), targets, old_logprobs, mask, ref_logprobs, token_weights (B, T), advantages (B,) or (B, T)
        -> scalar and (B, T) each. Everything but the logits is data.
    Raises: ValueError for shapes, numbers or names that do not fit, TypeError and IndexError as `token_logprobs`.
    Source: deepseek (PPO, GRPO); notes §10.6; as `minillm.functional.policy_losses.grpo_loss`.
    """
    require(logits.ndim == 3, "policy_loss", "logits", "of shape (B, T, V)", logits)
    _check_logits("policy_loss", logits, targets, temperature, None)
    chosen, weight, terms = _policy(
        "policy_loss", logits.shape[-1], targets, old_logprobs, advantages, mask, ref_logprobs, token_weights, clip_low,
        clip_high, dual_clip, level, beta, kl, kl_ratio, entropy_coef, reduction, length, divisor, ignore_index,
    )  # fmt: skip
    check_places("policy_loss", [("logits", logits), ("old_logprobs", old_logprobs)])
    if _may_replace("policy_loss", logits, inplace):
        found = gradients.InPlaceLoss.apply(logits, chosen, weight, terms, temperature, ignore_index)
        return PolicyLoss(found[0], *(f.view(targets.shape) for f in found[1:]))  # type: ignore[index]
    statistics = _statistics(logits, chosen, temperature, ignore_index, True, False)
    return _watched(statistics, chosen, weight, terms, ignore_index, targets.shape)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    r"""What `token_logprobs` says of the logits hidden @ weight.T, which are never stored.

    Equation: `lm-head` $\mathbf o_t=\mathbf W\mathbf h_t$, one tile at a time
    Equation: `gather-logprob` and the rest as in `token_logprobs`
    Shapes: hidden (..., d), weight (V, d), targets (...) -> three of (...), float32
    Raises: as `token_logprobs`.
    Source: notes §3.1; bridging §1.6.
    """
    _check_linear("linear_token_logprobs", hidden, weight, targets, temperature, ignore_index)
    found = _linear_statistics(hidden, weight, _flat(targets), temperature, ignore_index, True, False)
    return tuple(f.view(targets.shape) for f in found[:3])  # type: ignore[union-attr, return-value]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE, reduction: str = "token-mean",
    divisor: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    r"""`cross_entropy` of the logits hidden @ weight.T, which are never stored.

    Equation: `cross-entropy-logits` $-\mathbf w_{x_{t+1}}\cdot\mathbf h_t+\mathrm{LSE}(\mathbf W\mathbf h_t)$
    Equation: `lm-head` inside
    Shapes: hidden (..., d), weight (V, d), targets (...) -> scalar
    Raises: as `cross_entropy`.
    Source: bridging §1.6; notes §3.1.
    """
    _check_linear("linear_cross_entropy", hidden, weight, targets, 1.0, ignore_index)
    _check_likelihood("linear_cross_entropy", reduction, label_smoothing, z_loss)
    flat = _flat(targets)
    found = _linear_statistics(hidden, weight, flat, 1.0, ignore_index, False, label_smoothing != 0)
    share = _likelihood_weights(flat, ignore_index, reduction, divisor)
    return loss_of(found, flat, share, LikelihoodTerms(label_smoothing, z_loss), ignore_index)[0]


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    ref_logprobs: Tensor | None = None, token_weights: Tensor | None = None,
    clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, level: str = "token",
    beta: float = 0.0, kl: str = "k3", kl_ratio: bool = False, entropy_coef: float = 0.0,
    reduction: str = "seq-mean", length: int | None = None, divisor: float | None = None,
    temperature: float = 1.0, ignore_index: int = IGNORE,
) -> PolicyLoss:  # fmt: skip
    r"""`policy_loss` of the logits hidden @ weight.T, which are never stored.

    Equation: `grpo-loss` and the rest as in `policy_loss`
    Equation: `lm-head` inside
    Shapes: hidden (B, T, d), weight (V, d), the rest as in `policy_loss`
    Raises: as `policy_loss`.
    Source: deepseek (PPO, GRPO); notes §3.1 and §10.6.
    """
    where = "linear_policy_loss"
    require(hidden.ndim == 3, where, "hidden", "of shape (B, T, d)", hidden)
    _check_linear(where, hidden, weight, targets, temperature, None)
    chosen, share, terms = _policy(
        where, weight.shape[0], targets, old_logprobs, advantages, mask, ref_logprobs, token_weights, clip_low,
        clip_high, dual_clip, level, beta, kl, kl_ratio, entropy_coef, reduction, length, divisor, ignore_index,
    )  # fmt: skip
    check_places(where, [("hidden", hidden), ("old_logprobs", old_logprobs)])
    statistics = _linear_statistics(hidden, weight, chosen, temperature, ignore_index, True, False)
    return _watched(statistics, chosen, share, terms, ignore_index, targets.shape)


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module; with ``inplace`` the logits' memory becomes their gradient."""

    def __init__(
        self, ignore_index: int = IGNORE, reduction: str = "token-mean", label_smoothing: float = 0.0,
        z_loss: float = 0.0, inplace: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.settings = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
                         "z_loss": z_loss, "inplace": inplace}  # fmt: skip

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits (..., V) and targets (...)."""
        return cross_entropy(logits, targets, **self.settings)  # type: ignore[arg-type]


# ---- paths


def _softmax(where: str, logits: Tensor, log: bool) -> Tensor:
    require(logits.ndim >= 1, where, "logits", "of shape (..., V)", logits)
    check_floats(where, (("logits", logits),))
    return gradients.softmax_op(logits, log)[0] if traced(logits) else gradients.Softmax.apply(logits, log)  # type: ignore[return-value]


def _statistics(
    logits: Tensor, targets: Tensor, temperature: float, ignored: int, entropy: bool, mean: bool
) -> tuple[Tensor | None, ...]:
    if traced(logits, targets):
        return gradients.statistics_op(logits, targets, temperature, ignored, mean)[:4]
    return gradients.TokenStatistics.apply(logits, targets, temperature, ignored, entropy, mean)  # type: ignore[return-value]


def _linear_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ignored: int, entropy: bool, mean: bool
) -> tuple[Tensor | None, ...]:
    if traced(hidden, weight, targets):
        return gradients.linear_statistics_op(hidden, weight, targets, temperature, ignored, mean)[:4]
    return gradients.LinearStatistics.apply(hidden, weight, targets, temperature, ignored, entropy, mean)  # type: ignore[return-value]


def _watched(
    statistics: tuple[Tensor | None, ...], chosen: Tensor, weight: Tensor, terms: Loss, ignored: int, shape: torch.Size
) -> PolicyLoss:
    loss, watched = loss_of(statistics, chosen, weight, terms, ignored)
    seen = [f.detach() for f in statistics[:3] if f is not None]
    return PolicyLoss(loss, *(f.view(shape) for f in (*seen, *watched)))


def _may_replace(where: str, logits: Tensor, inplace: bool) -> bool:
    """Whether the gradient is written over the logits now: only where one is wanted and the memory allows it."""
    if not inplace or not (logits.requires_grad and torch.is_grad_enabled()) or traced(logits):
        return False
    rows = rows_of(logits)
    own = logits.numel() == 0 or (rows.data_ptr() == logits.data_ptr() and 0 not in _strides(rows))
    require(own, where, "logits", "a tensor whose elements have memory of their own for inplace=True",
            f"strides {logits.stride()}", "Call .contiguous() on them first.")  # fmt: skip
    return True


def _strides(rows: Tensor) -> list[int]:
    return [stride for stride, size in zip(rows.stride(), rows.shape) if size > 1]


def _flat(targets: Tensor) -> Tensor:
    return targets.reshape(-1).contiguous()


def _likelihood_weights(targets: Tensor, ignored: int, reduction: str, divisor: float | None) -> Tensor:
    keep = (targets != ignored).to(torch.float32)
    if reduction == "sum":
        return keep
    return keep / (keep.sum().clamp(min=1.0) if divisor is None else float(divisor))


def _policy(
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
    return chosen, _weights(keep, reduction, length, divisor).reshape(-1), terms


def _weights(keep: Tensor, reduction: str, length: int | None, divisor: float | None) -> Tensor:
    """Every token's weight in the loss, (B, T): `minillm.functional.reductions.aggregation_weights` without leaving the device."""
    kept = keep.to(torch.float32)
    count = len(keep) * float(length or 0) if reduction == "constant" else float(len(keep))
    weights = kept / (kept.sum().clamp(min=1.0) if reduction == "token-mean" and divisor is None else
                      float(divisor) if divisor is not None else 1.0 if reduction == "sum" else max(count, 1.0))  # fmt: skip
    if reduction == "seq-mean":
        weights = weights / kept.sum(-1, keepdim=True).clamp(min=1.0)
    return weights


# ---- checks


def _check_logits(where: str, logits: Tensor, targets: Tensor, temperature: float, ignored: int | None) -> None:
    require(logits.ndim >= 1 and logits.shape[-1] >= 1, where, "logits", "of shape (..., V) with V at least 1", logits)
    check_floats(where, (("logits", logits),))
    _check_targets(where, logits.shape[:-1], logits.shape[-1], logits, targets, temperature, ignored)


def _check_linear(
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


def _check_likelihood(where: str, reduction: str, smoothing: float, z_loss: float) -> None:
    require_one_of(reduction, ("token-mean", "sum"), where, "reduction")
    require(0 <= smoothing <= 1, where, "label_smoothing", "in [0, 1]", smoothing)
    require(z_loss >= 0, where, "z_loss", "at least 0", z_loss)
