"""The truth for this family: softmax, likelihood and policy losses of `minillm.functional`, put together.

All take and return `minillm` tensors, then arrays (ids, masks, log-probs of other policies), then numbers and
names. A reader's own kernel has these signatures on torch tensors (`--impl`). Rows that do not count (an
ignored id, a mask of 0) give 0 everywhere, whatever they hold, and gradients of exactly 0.
"""

from typing import Any

import numpy as np

from minillm.autograd import Tensor, where
from minillm.functional import clipping, information, kl_estimators, likelihood, losses, policy_losses
from minillm.functional import linear as linear_forms
from minillm.functional import softmax as softmax_forms
from minillm.functional.frozen import frozen_where


def softmax(logits: Tensor) -> Tensor:
    """logits (..., V) -> (..., V)."""
    return softmax_forms.softmax(logits)


def log_softmax(logits: Tensor) -> Tensor:
    """logits (..., V) -> (..., V)."""
    return softmax_forms.log_softmax(logits)


def _kept(logits: Tensor, targets: np.ndarray, ignore_index: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    ids, keep = losses.kept_targets(logits, targets, ignore_index)
    return where(keep[..., None], logits, 0.0), ids, keep


def token_logprobs(
    logits: Tensor, targets: np.ndarray, temperature: float = 1.0, ignore_index: int = losses.IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (..., V), targets (...) -> log-prob of the chosen token, log-sum-exp and entropy, each (...)."""
    safe, ids, keep = _kept(logits, targets, ignore_index)
    tempered = safe * (1.0 / temperature)
    found = (
        softmax_forms.token_logprobs(tempered, ids),
        softmax_forms.logsumexp(tempered),
        information.entropy_from_logits(tempered),
    )
    return tuple(where(keep, f, 0.0) for f in found)  # type: ignore[return-value]


def cross_entropy(
    logits: Tensor, targets: np.ndarray, ignore_index: int = losses.IGNORE, reduction: str = "token-mean",
    divisor: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """logits (..., V), targets (...) -> scalar; smoothed targets and a penalty on log-sum-exp squared if asked for."""
    if not label_smoothing and not z_loss:
        return losses.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction, divisor=divisor)
    safe, ids, keep = _kept(logits, targets, ignore_index)
    terms = -softmax_forms.token_logprobs(safe, ids)
    if label_smoothing:
        wanted = likelihood.smoothed_targets(ids, logits.shape[-1], label_smoothing).astype(logits.dtype)
        terms = -(softmax_forms.log_softmax(safe) * wanted).sum(-1)
    lse = softmax_forms.logsumexp(safe)
    terms = terms + lse * lse * z_loss
    return where(keep, terms, 0.0).sum() * (1.0 / losses.divisor_for(reduction, keep, divisor))


def policy_loss(
    logits: Tensor, targets: np.ndarray, old_logprobs: np.ndarray, advantages: np.ndarray, mask: np.ndarray,
    ref_logprobs: np.ndarray | None = None, token_weights: np.ndarray | None = None,
    clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, level: str = "token",
    beta: float = 0.0, kl: str = "k3", kl_ratio: bool = False, entropy_coef: float = 0.0,
    reduction: str = "seq-mean", length: int | None = None, divisor: float | None = None,
    temperature: float = 1.0, ignore_index: int = losses.IGNORE,
) -> tuple[Any, ...]:  # fmt: skip
    """logits (B, T, V), targets (B, T), ... -> loss, then (B, T): log-prob, log-sum-exp, entropy, ratio, flag, k1, k2, k3.

    The flag is -1 (1) where the clip at the lower (upper) bound took the gradient away, 2 where the dual clip did.
    """
    keep = (np.asarray(mask) == 1) & (targets != ignore_index)
    chosen = np.where(keep, targets, ignore_index)
    logp, lse, entropy = token_logprobs(logits, chosen, temperature, ignore_index)
    found = policy_losses.grpo_loss(
        logp, old_logprobs, advantages, keep, ref_logprobs, beta=beta, kl=kl, kl_ratio=kl_ratio,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, level=level, token_weights=token_weights,
        entropies=entropy, entropy_coef=entropy_coef, reduction=reduction, length=length, divisor=divisor,
    )  # fmt: skip
    a = np.broadcast_to(frozen_where(keep, advantages, "policy_loss", "advantages"), keep.shape)
    ratio = np.broadcast_to(clipping.ratios_at_level(logp, old_logprobs, keep, level).data, keep.shape)
    dead = clipping.zero_gradient_region(ratio, a, clip_low, clip_high) & (a != 0) & keep
    flag = np.where(dead, np.where(ratio < 1, -1, 1), 0)
    if dual_clip is not None:
        flag = np.where(keep & (a < 0) & (ratio > dual_clip), 2, flag)
    reference = logp.data if ref_logprobs is None else np.where(keep, ref_logprobs, 0.0)
    ks = [np.where(keep, kl_estimators.kl_estimate(logp, reference, kind).data, 0) for kind in ("k1", "k2", "k3")]
    return found.loss, logp, lse, entropy, np.where(keep, ratio, 0), flag.astype(np.int8), *ks


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: np.ndarray, temperature: float = 1.0, ignore_index: int = losses.IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (..., d), weight (V, d), targets (...) -> what `token_logprobs` says of the logits hidden @ weight.T."""
    return token_logprobs(_logits(hidden, weight, targets, ignore_index), targets, temperature, ignore_index)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: np.ndarray, ignore_index: int = losses.IGNORE,
    reduction: str = "token-mean", divisor: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """hidden (..., d), weight (V, d), targets (...) -> scalar, as `cross_entropy` of the logits hidden @ weight.T."""
    logits = _logits(hidden, weight, targets, ignore_index)
    return cross_entropy(logits, targets, ignore_index, reduction, divisor, label_smoothing, z_loss)


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: np.ndarray, old_logprobs: np.ndarray, advantages: np.ndarray,
    mask: np.ndarray, ref_logprobs: np.ndarray | None = None, token_weights: np.ndarray | None = None,
    clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, level: str = "token",
    beta: float = 0.0, kl: str = "k3", kl_ratio: bool = False, entropy_coef: float = 0.0,
    reduction: str = "seq-mean", length: int | None = None, divisor: float | None = None,
    temperature: float = 1.0, ignore_index: int = losses.IGNORE,
) -> tuple[Any, ...]:  # fmt: skip
    """hidden (B, T, d), weight (V, d), then and from then on as `policy_loss`."""
    keep = (np.asarray(mask) == 1) & (targets != ignore_index)
    logits = _logits(hidden, weight, np.where(keep, targets, ignore_index), ignore_index)
    return policy_loss(
        logits, targets, old_logprobs, advantages, mask, ref_logprobs, token_weights, clip_low, clip_high, dual_clip,
        level, beta, kl, kl_ratio, entropy_coef, reduction, length, divisor, temperature, ignore_index,
    )  # fmt: skip


def _logits(hidden: Tensor, weight: Tensor, targets: np.ndarray, ignore_index: int) -> Tensor:
    """Logits of the rows that count; what the others hold, NaN included, reaches neither value nor gradient."""
    return linear_forms.linear(where((targets != ignore_index)[..., None], hidden, 0.0), weight)
