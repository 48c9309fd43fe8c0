r"""Estimates of a divergence from the log-probs of sampled tokens: value and gradient are two questions.

With $d=\log\pi_{\rm ref}-\log\pi_\theta$ at a token sampled from $\pi_\theta$, reverse
$=D_{\rm KL}(\pi_\theta\Vert\pi_{\rm ref})$ and forward $=D_{\rm KL}(\pi_{\rm ref}\Vert\pi_\theta)$:

| estimator | term | mean | mean of its pathwise gradient |
|---|---|---|---|
| k1 | $-d$ | reverse; a sample may be negative | 0: useless as a loss, right in a reward |
| k2 | $d^2/2$ | biased | gradient of reverse |
| k3 | $e^d-1-d$ | reverse; a sample is never negative | gradient of forward, the other direction |

On samples of an older policy each needs the importance ratio, see `kl_estimator_is`.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.frozen import Array, frozen


def _example(rng):
    shape = [(2, 3), (4,), (2, 1), (), (0, 2)][rng.integers(5)]
    return (rng.normal(size=shape), rng.normal(size=shape)), {}


def _example_switch(rng):
    return _example(rng)[0], {"kind": ["k1", "k2", "k3"][rng.integers(3)]}


def _example_is(rng):
    (logprobs, ref), kind = _example_switch(rng)
    return (logprobs,), {"ref_logprobs": ref, "old_logprobs": rng.normal(size=ref.shape), **kind}


def _log_ratio(name: str, upper: Any, lower: Any) -> Tensor:
    """The difference of two log-probs of the same tokens; other shapes would be stretched without a word."""
    over, under = as_tensor(upper).shape, as_tensor(lower).shape
    require(over == under, name, "the two log-probs", "of one shape", f"{over} and {under}")
    return ops.subtract(upper, lower)  # as they came: an array takes the precision of the tensor beside it


@written("kl_estimator_k1", example=_example)
def kl_estimator_k1(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""The log-ratio: unbiased, of either sign, and with a gradient whose mean is zero.

    Equation: `kl-estimator-k1` $k_1=\log\frac{\pi_\theta}{\pi_{\rm ref}},\ y\sim\pi_\theta$
    Shapes: log-probs of the sampled tokens (...), twice -> (...)
    Raises: ValueError for two shapes.
    Source: deepseek (RLHF); notes §10.5; lecture06 (drift penalty).
    Differs: not a differentiable estimate: put it into the reward (erratum 5).
    """
    return _log_ratio("kl_estimator_k1", logprobs, ref_logprobs)


@written("kl_estimator_k2", example=_example)
def kl_estimator_k2(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""Half the squared log-ratio: biased as a value, and with exactly the reverse divergence's mean
    gradient.

    Equation: `kl-estimator-k2` $k_2=\tfrac12\big(\log\frac{\pi_\theta}{\pi_{\rm ref}}\big)^2$
    Shapes: log-probs of the sampled tokens (...), twice -> (...)
    Raises: ValueError for two shapes.
    Source: completes the three; Schulman 2020.
    """
    gap = _log_ratio("kl_estimator_k2", logprobs, ref_logprobs)
    return gap * gap * 0.5


@written("kl_estimator_k3", example=_example)
def kl_estimator_k3(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""The log-ratio with a control variate: unbiased and never negative.

    Equation: `kl-estimator-k3` $k_3=u-1-\log u,\ u=\frac{\pi_{\rm ref}}{\pi_\theta},\ y\sim\pi_\theta$
    Shapes: log-probs of the sampled tokens (...), twice -> (...)
    Raises: ValueError for two shapes.
    Source: deepseek (GRPO, KL estimate); Schulman 2020.
    Differs: the slide has the ratio upside down (erratum 6).
    """
    d = _log_ratio("kl_estimator_k3", ref_logprobs, logprobs)
    return ops.expm1(d) - d


@written("kl_estimator_k3_inverted", example=_example)
def kl_estimator_k3_inverted(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""The inverted k3 of the slide, kept to show what it estimates: never used in a loss.

    Equation: `kl-estimator-k3-inverted` $v-1-\log v,\ v=\frac{\pi_\theta}{\pi_{\rm ref}}$; mean
        $\chi^2-D_{\rm KL}$ under $\pi_\theta$
    Shapes: log-probs of the sampled tokens (...), twice -> (...)
    Raises: ValueError for two shapes.
    Source: deepseek (GRPO, KL estimate).
    Differs: erratum 6.
    """
    return kl_estimator_k3(ref_logprobs, logprobs)


ESTIMATORS = {"k1": kl_estimator_k1, "k2": kl_estimator_k2, "k3": kl_estimator_k3}


@written("kl_estimate", example=_example_switch)
def kl_estimate(
    logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"], kind: str = "k3"
) -> Float[Tensor, "*B"]:
    r"""One of the three estimators by name.

    Equation: `kl-estimator-k1` `kind="k1"`
    Equation: `kl-estimator-k2` `kind="k2"`
    Equation: `kl-estimator-k3` `kind="k3"`
    Shapes: log-probs of the sampled tokens (...), twice -> (...)
    Raises: ValueError for another name, or two shapes.
    Source: deepseek (RLHF, GRPO); notes §10.5.
    """
    require_one_of(kind, ESTIMATORS, "kl_estimate", "kind")
    return ESTIMATORS[kind](logprobs, ref_logprobs)


@written("kl_estimator_is", example=_example_is)
def kl_estimator_is(
    logprobs: Float[Array, "*B"],
    ref_logprobs: Float[Array, "*B"],
    old_logprobs: Float[Array, "*B"],
    kind: str = "k3",
    stop_ratio: bool = False,
) -> Float[Tensor, "*B"]:
    r"""An estimator on samples of an older policy, weighted by the importance ratio.

    With the ratio differentiated k1 and k3 both have the mean gradient of the reverse divergence; with
    ``stop_ratio`` k2 has it, and k3 that of the forward one.

    Equation: `kl-estimator-is` $\mathbb E_{y\sim\pi_{\rm old}}[\rho\,k_j],\ \rho=\frac{\pi_\theta}{\pi_{\rm
        old}}$
    Shapes: three log-probs of the sampled tokens (...) -> (...); old and reference log-probs are frozen
    Raises: ValueError for an unknown estimator.
    Source: completes the estimators; DeepSeek-AI 2025 (V3.2).
    """
    current = as_tensor(logprobs)
    ratio = (current - frozen(old_logprobs)).exp()
    term = kl_estimate(current, np.asarray(frozen(ref_logprobs)), kind)
    return (ratio.detach() if stop_ratio else ratio) * term
