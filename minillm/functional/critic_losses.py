r"""The critic's losses: regression of values on frozen targets."""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.frozen import Array, frozen, frozen_where, kept_positions
from minillm.functional.reductions import aggregate


def _example_critic(rng):
    shape = [(3, 4), (2, 1)][rng.integers(2)]
    return (rng.normal(size=shape),), {"targets": rng.normal(size=shape), "mask": rng.random(shape) < 0.7}


def _example_critic_clip(rng):
    (values,), kwargs = _example_critic(rng)
    shift = rng.choice([-0.6, -0.1, 0.1, 0.6], size=values.shape)
    return (values,), {**kwargs, "old_values": values + shift, "clip": 0.2}


def _example_scores(rng):
    (values,), kwargs = _example_critic(rng)
    return (values,), {"scores": rng.normal(size=len(values)), "mask": kwargs["mask"]}


@written("critic_loss", example=_example_critic)
def critic_loss(
    values: Float[Array, "B T"],
    targets: Float[Array, "B T"],
    mask: Any,
    reduction: str = "token-mean",
    **options: Any,
) -> Float[Tensor, ""]:
    r"""Mean squared error of the critic; its targets are frozen.

    Equation: `critic-loss` $\frac1{\lvert\mathcal M\rvert}\sum(V_\psi(s_t)-\hat G_t)^2$
    Shapes: values, targets, mask (B, T) -> scalar
    Raises: ValueError if the shapes do not match.
    Source: notes §10.5 and §10.6; lecture06.
    Differs: the target is a return, not the reward model's score of a prefix (erratum 58).
    """
    v = as_tensor(values)
    keep = kept_positions(mask, v.shape, "critic_loss")
    gap = where(keep, v, 0.0) - frozen_where(keep, targets, "critic_loss", "targets")
    return aggregate(gap * gap, keep, reduction, **options)


@written("critic_loss_rm", example=_example_scores)
def critic_loss_rm(values: Float[Array, "B T"], scores: Float[Array, " B"], mask: Any) -> Float[Tensor, ""]:
    r"""The lecture's variant: every token's value is to predict the score of the finished response.

    Equation: `critic-loss-rm` $\mathbb E_t[(V_\psi(s_t)-\mathrm{sg}(R_\phi))^2]$
    Shapes: values, mask (B, T), scores (B,) -> scalar; the Monte Carlo target at discount 1 without a KL
        reward
    Raises: ValueError if the shapes do not match.
    Source: lecture06 (critic).
    Differs: the score is that of the complete response, for all its prefixes (erratum 58).
    """
    final = frozen(scores)
    require(final.shape == values.shape[:1], "critic_loss_rm", "scores", f"of shape {values.shape[:1]}", final)
    return critic_loss(values, np.broadcast_to(final[:, None], values.shape), mask)


@written("clipped_critic_loss", example=_example_critic_clip)
def clipped_critic_loss(
    values: Float[Array, "B T"],
    targets: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    mask: Any,
    clip: float = 0.2,
    reduction: str = "token-mean",
    **options: Any,
) -> Float[Tensor, ""]:
    r"""The critic's error, not rewarded for moving further than the clip from the value at roll-out.

    Equation: `value-clip` $\max((V-\hat G)^2,(V_{\rm clip}-\hat G)^2)$, $V_{\rm
        clip}=V_{\psi_k}+\mathrm{clip}(V-V_{\psi_k},-\varepsilon_v,\varepsilon_v)$
    Shapes: values, targets, old_values, mask (B, T) -> scalar
    Raises: ValueError if the shapes do not match or the clip is not positive.
    Source: topics #10.
    """
    require_positive(clip, "clipped_critic_loss", "clip")
    v = as_tensor(values)
    keep = kept_positions(mask, v.shape, "clipped_critic_loss")
    v = where(keep, v, 0.0)
    before = frozen_where(keep, old_values, "clipped_critic_loss", "old_values")
    goal = frozen_where(keep, targets, "clipped_critic_loss", "targets")
    gap, clipped_gap = v - goal, (v - before).clamp(-clip, clip) + (before - goal)
    return aggregate(ops.maximum(gap * gap, clipped_gap * clipped_gap), keep, reduction, **options)
