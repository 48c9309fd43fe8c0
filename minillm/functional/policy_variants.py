r"""Relatives of GRPO: sequence ratios, clipped weights, and the correction for a sampler that differs."""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import as_tensor, where
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.clipping import clip_range
from minillm.functional.frozen import Array, frozen, frozen_where, kept_positions
from minillm.functional.policy_losses import (
    GRPOLoss,
    example_responses,
    example_with_reference,
    grpo_loss,
    penalised_loss,
)


def _example_outside(rng):
    """Ratios beyond the bounds only: there the frozen weight is constant, and a finite difference sees no
    other path.
    """
    (logprobs,), kwargs = example_with_reference(rng)
    gap = rng.choice([-1.0, 1.0], size=logprobs.shape) * rng.uniform(0.35, 0.9, logprobs.shape)
    return (logprobs,), {**kwargs, "old_logprobs": logprobs - gap, "clip_low": 0.2, "clip_high": 0.2}


@written("gspo_loss", example=example_responses)
def gspo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    ref_logprobs: Float[Array, "B T"] | None = None,
    *,
    clip_low: float = 3e-4,
    clip_high: float | None = 4e-4,
    **options: Any,
) -> GRPOLoss:
    r"""GSPO: one ratio for a response, the geometric mean of its tokens', so that its tokens clip together.

    Equation: `gspo` $-\frac1G\sum_i\min(s_iA_i,\mathrm{clip}(s_i,1-\varepsilon_{\rm low},1+\varepsilon_{\rm
        high})A_i)$, $s_i=\exp\big(\frac1{\lvert y_i\rvert}\sum_t\log\rho_{i,t}\big)$
    Shapes: as in `policy_losses`; further options are those of `grpo_loss` -> loss (scalar) and numbers
    Raises: ValueError as `grpo_loss`.
    Source: Zheng et al. 2025.
    """
    return grpo_loss(
        logprobs, old_logprobs, advantages, mask, ref_logprobs,
        clip_low=clip_low, clip_high=clip_high, level="sequence-mean", **options,
    )  # fmt: skip


@written("cispo_loss", example=_example_outside)
def cispo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    ref_logprobs: Float[Array, "B T"] | None = None,
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
    reduction: str = "token-mean",
    **options: Any,
) -> GRPOLoss:
    r"""CISPO: the ratio is a clipped, frozen weight, so that every token keeps its gradient.

    Equation: `cispo` $-\frac1{\sum_i\lvert y_i\rvert}\sum_{i,t}\mathrm{sg}[\min(\rho_{i,t},1+\varepsilon_{\rm
        high})]\,A_i\log\pi_\theta(y_{i,t}\mid s_{i,t})$
    Shapes: as in `policy_losses`; further options are those of `grpo_loss` -> loss (scalar) and numbers. The
        weight's cap is ``1 + clip_high``; ``clip_low`` adds a lower bound, off by default.
    Raises: ValueError as `grpo_loss`.
    Source: MiniMax 2025.
    """
    keep = kept_positions(mask, logprobs.shape, "cispo_loss")
    current = where(keep, as_tensor(logprobs), 0.0)
    old = frozen_where(keep, old_logprobs, "cispo_loss", "old_logprobs")
    a = frozen_where(keep, advantages, "cispo_loss", "advantages")
    ratio = np.exp(current.data - old)  # (B, T)
    low, high = clip_range("cispo_loss", 1.0 if clip_low is None else clip_low, clip_high)
    term = current * (np.clip(ratio, low, high) * a)
    clipped = (keep & (ratio < low), keep & (ratio > high))
    return penalised_loss("cispo_loss", term, current, old, keep, clipped, ref_logprobs, reduction=reduction, **options)


def tis_weights(
    old_logprobs: Float[Array, "*B"],
    sampler_logprobs: Float[Array, "*B"],
    cap: float = 2.0,
    band: tuple[float, float] | None = None,
) -> Float[np.ndarray, "*B"]:
    r"""Weights that undo the difference between the law that sampled and the one the trainer computes,
    truncated.

    Equation: `tis` $w_t=\min\big(\frac{\pi_{\rm old}(a_t\mid s_t)}{\mu(a_t\mid s_t)},C\big)$, or with a band
        $w_t=0$ outside $[c_{\rm lo},c_{\rm hi}]$
    Shapes: two (...) -> (...), frozen; multiply the token terms of a loss by them
    Raises: ValueError if the shapes differ or the cap is not positive.
    Source: Yao et al. 2025; erratum 45.
    """
    old, sampler = frozen(old_logprobs), frozen(sampler_logprobs)
    require(old.shape == sampler.shape, "tis_weights", "sampler_logprobs", f"of shape {old.shape}", sampler)
    require(cap > 0, "tis_weights", "the cap", "positive (infinity allowed)", cap)
    weights = np.exp(np.minimum(old - sampler, np.log(cap)))
    if band is None:
        return weights
    ratio = np.exp(old - sampler)
    return np.where((ratio >= band[0]) & (ratio <= band[1]), ratio, 0)
