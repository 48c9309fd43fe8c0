r"""Importance ratios and what PPO makes of them, token by token.

Every ``*_term`` is the contribution of one token to an objective that is to be *maximised*; a loss is the
negative of their aggregate. Advantages and old log-probs are data: no gradient reaches them.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.frozen import Array, frozen, frozen_where, kept_positions

LEVELS = ("token", "sequence", "sequence-mean")


def draw_log_ratios(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Log-ratios well inside or well outside the clip range of 0.2, for examples where the clip is smooth."""
    sign = rng.choice([-1.0, 1.0], size=shape)
    return sign * np.where(rng.random(shape) < 0.5, rng.uniform(0.0, 0.12, shape), rng.uniform(0.35, 0.9, shape))


def _example_ratio(rng):
    shape = [(3, 4), (2,), (2, 1), ()][rng.integers(4)]
    return (rng.normal(size=shape),), {"old_logprobs": rng.normal(size=shape)}


def _example_sequence(rng):
    shape = [(3, 4), (2, 1)][rng.integers(2)]
    mask = rng.random(shape) < 0.7
    return (rng.normal(size=shape),), {"old_logprobs": rng.normal(size=shape), "mask": mask}


def _example_level(rng):
    args, kwargs = _example_sequence(rng)
    return args, {**kwargs, "level": LEVELS[rng.integers(3)]}


def _example_term(rng):
    shape = [(3, 4), (2,), (2, 1)][rng.integers(3)]
    return (np.exp(draw_log_ratios(rng, shape)),), {"advantages": rng.normal(size=shape)}


def _example_dual(rng):
    (ratio,), kwargs = _example_term(rng)
    return (ratio * rng.choice([1.0, 8.0], size=ratio.shape),), kwargs


@written("importance_ratio", example=_example_ratio)
def importance_ratio(logprobs: Float[Array, "*B"], old_logprobs: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""How much more likely an action has become since it was sampled.

    Equation: `importance-ratio` $\rho_t=\exp(\log\pi_\theta(a_t\mid s_t)-\log\pi_{\rm old}(a_t\mid s_t))$
    Equation: `grpo-ratio-token` $\rho_{i,t}$, one for every token of every response
    Shapes: log-probs of the actions taken (...), twice -> (...)
    Raises: ValueError if the shapes differ.
    Source: lecture06; notes §10.6; deepseek; bridging §2.2.
    Differs: called rho, since the sources share its letter with the reward (erratum 72).
    """
    old = frozen(old_logprobs)
    current = as_tensor(logprobs)
    require(old.shape == current.shape, "importance_ratio", "old_logprobs", f"of shape {current.shape}", old)
    return (current - old).exp()


@written("sequence_ratio", example=_example_sequence)
def sequence_ratio(logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Any) -> Float[Tensor, " B"]:
    r"""The ratio of whole responses: the product of their token ratios.

    Equation: `grpo-ratio-sequence` $\rho_i=\frac{\pi_\theta(a^i\mid x)}{\pi_{\rm old}(a^i\mid
        x)}=\prod_t\rho_{i,t}$
    Shapes: two (B, T), mask (B, T) -> (B,); 1 for a response without kept tokens
    Raises: ValueError if the shapes differ.
    Source: bridging §2.1; lecture06.
    Differs: the documents disagree on token or response; the token ratio is the default (erratum 81).
    """
    return masked_log_ratio(logprobs, old_logprobs, mask, "sequence_ratio").sum(-1).exp()


@written("sequence_mean_ratio", example=_example_sequence)
def sequence_mean_ratio(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Any
) -> Float[Tensor, " B"]:
    r"""The geometric mean of a response's token ratios.

    Equation: `gspo` $s_i=\exp\big(\frac1{\lvert y_i\rvert}\sum_t\log\rho_{i,t}\big)=\rho_i^{1/\lvert
        y_i\rvert}$
    Shapes: two (B, T), mask (B, T) -> (B,); 1 for a response without kept tokens
    Raises: ValueError if the shapes differ.
    Source: Zheng et al. 2025 (GSPO).
    """
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask, "sequence_mean_ratio")
    lengths = np.maximum((frozen(mask) != 0).sum(-1), 1)  # (B,)
    return (log_ratio.sum(-1) / lengths).exp()


@written("masked_log_ratio", example=_example_sequence)
def masked_log_ratio(logprobs: Array, old_logprobs: Array, mask: Any, where_: str = "masked_log_ratio") -> Tensor:
    """Log-ratios with 0 at dropped tokens, whatever these hold."""
    current = as_tensor(logprobs)
    keep = kept_positions(mask, current.shape, where_)
    return where(keep, current, 0.0) - frozen_where(keep, old_logprobs, where_, "old_logprobs")


@written("ratios_at_level", example=_example_level)
def ratios_at_level(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Any, level: str = "token"
) -> Float[Tensor, "B _"]:
    r"""Ratios of tokens, of whole responses, or of responses normalised by length, in a shape that broadcasts
    over tokens.

    Equation: `grpo-ratio-token` `level="token"`
    Equation: `grpo-ratio-sequence` `level="sequence"`
    Equation: `gspo` `level="sequence-mean"`
    Shapes: two (B, T), mask (B, T) -> (B, T), or (B, 1) for responses
    Raises: ValueError for another level or if the shapes differ.
    Source: deepseek; bridging §2.1; lecture06.
    """
    require_one_of(level, LEVELS, "ratios_at_level", "level")
    if level == "token":
        return masked_log_ratio(logprobs, old_logprobs, mask, "ratios_at_level").exp()
    ratio = sequence_ratio if level == "sequence" else sequence_mean_ratio
    return ratio(logprobs, old_logprobs, mask).unsqueeze(-1)  # (B, 1)


def clip_range(where_: str, low: float, high: float | None) -> tuple[float, float]:
    """The two bounds of the ratio, from the widths of the clip; one width serves both sides."""
    high = low if high is None else high
    require(
        0 <= low <= 1 and high >= 0,
        where_,
        "the clip widths",
        "low in [0, 1] and high at least 0",
        f"{low}, {high}",
    )
    return 1.0 - low, 1.0 + high


@written("clip_term", example=_example_term)
def clip_term(
    ratio: Float[Array, "*#B"],
    advantages: Float[Array, "*#B"],
    clip_low: float = 0.2,
    clip_high: float | None = None,
) -> Float[Tensor, "..."]:
    r"""The clipped surrogate of one token: the more pessimistic of the plain and the clipped product.

    Equation: `ppo-clip` $\min(\rho_t\hat A_t,\ \mathrm{clip}(\rho_t,1-\varepsilon,1+\varepsilon)\hat A_t)$
    Equation: `grpo-clip-higher` $\mathrm{clip}(\rho,1-\varepsilon_{\rm low},1+\varepsilon_{\rm high})$ when
        ``clip_high`` is given
    Shapes: ratio and advantages, broadcast against each other -> that shape; to be maximised
    Raises: ValueError for negative widths or a lower width above 1.
    Source: lecture06; notes §10.6; bridging §2.2; Schulman et al. 2017; Yu et al. 2025 (clip-higher).
    Differs: an objective, not a loss (erratum 71); it removes the incentive to move on, and does not bound
        the ratio (erratum 73).
    """
    low, high = clip_range("clip_term", clip_low, clip_high)
    rho, a = as_tensor(ratio), frozen(advantages)
    return ops.minimum(rho * a, rho.clamp(low, high) * a)


@written("clip_term_g", example=_example_term)
def clip_term_g(ratio: Float[Array, "*#B"], advantages: Float[Array, "*#B"], clip: float = 0.2) -> Float[Tensor, "..."]:
    r"""The same term by the bound g that the product may not exceed.

    Equation: `ppo-clip-g` $\min(\rho A,g(\varepsilon,A))$, $g=(1+\varepsilon)A$ if $A\ge0$, else
        $(1-\varepsilon)A$
    Shapes: ratio and advantages (...) -> (...); to be maximised
    Source: deepseek (PPO).
    """
    a = frozen(advantages)
    return ops.minimum(as_tensor(ratio) * a, np.where(a >= 0, (1 + clip) * a, (1 - clip) * a))


@written("clip_term_cases", example=_example_term)
def clip_term_cases(
    ratio: Float[Array, "*#B"], advantages: Float[Array, "*#B"], clip: float = 0.2
) -> Float[Tensor, "..."]:
    r"""The same term by the sign of the advantage.

    Equation: `ppo-clip-cases` $A>0$: $\min(\rho,1+\varepsilon)A$; $A<0$: $\max(\rho,1-\varepsilon)A$
    Shapes: ratio and advantages (...) -> (...); to be maximised
    Source: deepseek (PPO); lecture06.
    Differs: the bound of 1.2 A holds only for A > 0; for A < 0 the ratio of 3 counts in full (erratum 73).
    """
    rho, a = as_tensor(ratio), frozen(advantages)
    return where(a >= 0, ops.minimum(rho, 1 + clip), ops.maximum(rho, 1 - clip)) * a


def zero_gradient_region(
    ratio: Float[Array, "*#B"],
    advantages: Float[Array, "*#B"],
    clip_low: float = 0.2,
    clip_high: float | None = None,
) -> Bool[np.ndarray, "..."]:
    r"""Where the clipped surrogate pulls on nothing: no advantage, or already far enough in the direction it
    wants.

    Equation: `ppo-gradient-region` $A=0$, or $A>0$ and $\rho>1+\varepsilon$, or $A<0$ and
        $\rho<1-\varepsilon$
    Shapes: ratio and advantages, broadcast against each other -> booleans
    Raises: ValueError for negative widths or a lower width above 1.
    Source: deepseek; notes §10.6.
    """
    low, high = clip_range("zero_gradient_region", clip_low, clip_high)
    rho, a = frozen(ratio), frozen(advantages)
    return (a == 0) | ((a > 0) & (rho > high)) | ((a < 0) & (rho < low))


@written("dual_clip_term", example=_example_dual)
def dual_clip_term(
    ratio: Float[Array, "*#B"],
    advantages: Float[Array, "*#B"],
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = 3.0,
) -> Float[Tensor, "..."]:
    r"""The clipped surrogate with a floor for bad actions that have become much more likely.

    Equation: `ppo-dual-clip` $A<0$: $\max\big(\min(\rho A,\mathrm{clip}(\rho,1-\varepsilon,1+\varepsilon)A),\
        cA\big)$; $A\ge0$: `ppo-clip`
    Shapes: ratio and advantages, broadcast against each other -> that shape; to be maximised
    Raises: ValueError if the bound c is not above the upper clip bound.
    Source: Ye et al. 2020.
    """
    _, high = clip_range("dual_clip_term", clip_low, clip_high)
    require(dual_clip > high, "dual_clip_term", "dual_clip", f"above the upper clip bound {high}", dual_clip)
    term, a = clip_term(ratio, advantages, clip_low, clip_high), frozen(advantages)
    return ops.maximum(term, np.where(a < 0, dual_clip * np.where(a < 0, a, -1), -np.inf))
