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

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.checks import check_floats, check_places
from kernels.launching import rows_of
from kernels.token_loss import custom_ops, gradients, prepare
from kernels.token_loss.gradients import loss_of, traced
from kernels.token_loss.launch import LikelihoodTerms, Loss
from minillm.checks import require

IGNORE = -100


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
    prepare.check_logits("token_logprobs", logits, targets, temperature, ignore_index)
    found = _statistics(logits, prepare.flat(targets), temperature, ignore_index, True, False)
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
    prepare.check_logits("cross_entropy", logits, targets, 1.0, ignore_index)
    prepare.check_likelihood("cross_entropy", reduction, label_smoothing, z_loss)
    flat = prepare.flat(targets)
    weight = prepare.likelihood_weights(flat, ignore_index, reduction, divisor)
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
    prepare.check_logits("policy_loss", logits, targets, temperature, None)
    chosen, weight, terms = prepare.policy(
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
    prepare.check_linear("linear_token_logprobs", hidden, weight, targets, temperature, ignore_index)
    found = _linear_statistics(hidden, weight, prepare.flat(targets), temperature, ignore_index, True, False)
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
    prepare.check_linear("linear_cross_entropy", hidden, weight, targets, 1.0, ignore_index)
    prepare.check_likelihood("linear_cross_entropy", reduction, label_smoothing, z_loss)
    flat = prepare.flat(targets)
    found = _linear_statistics(hidden, weight, flat, 1.0, ignore_index, False, label_smoothing != 0)
    share = prepare.likelihood_weights(flat, ignore_index, reduction, divisor)
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
    prepare.check_linear(where, hidden, weight, targets, temperature, None)
    chosen, share, terms = prepare.policy(
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
    return custom_ops.softmax_op(logits, log)[0] if traced(logits) else gradients.Softmax.apply(logits, log)  # type: ignore[return-value]


def _statistics(
    logits: Tensor, targets: Tensor, temperature: float, ignored: int, entropy: bool, mean: bool
) -> tuple[Tensor | None, ...]:
    if traced(logits, targets):
        return custom_ops.statistics_op(logits, targets, temperature, ignored, mean)[:4]
    return gradients.TokenStatistics.apply(logits, targets, temperature, ignored, entropy, mean)  # type: ignore[return-value]


def _linear_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ignored: int, entropy: bool, mean: bool
) -> tuple[Tensor | None, ...]:
    if traced(hidden, weight, targets):
        return custom_ops.linear_statistics_op(hidden, weight, targets, temperature, ignored, mean)[:4]
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
