r"""Training in few bits without losing small gradients and small updates: loss scaling, master weights, a policy."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of, require_positive
from minillm.data.float_formats import float_format, round_float

LARGEST_SCALE = 2.0**24

POLICY = {
    "matmul": "low",
    "convolution": "low",
    "activation": "low",
    "softmax": "fp32",
    "norm": "fp32",
    "reduction": "fp32",
    "loss": "fp32",
    "optimizer": "fp32",
    "master weights": "fp32",
}


def _example(rng):
    return (np.array(rng.normal()),), {"scale": float(rng.choice([1.0, 4.0, 1024.0]))}


@written("scale_loss", example=_example)
def scale_loss(loss: Float[Tensor, ""], scale: float) -> Float[Tensor, ""]:
    r"""The loss times a constant, so that its gradients are too.

    Equation: `loss-scaling` $L_{\rm scaled}=SL$
    Shapes: loss () -> ()
    Raises: ValueError for a loss that is not a number or a scale that is not positive.
    Source: notes §7.
    """
    require(loss.shape == (), "scale_loss", "the loss", "a single number", loss)
    require_positive(scale, "scale_loss", "the scale")
    return loss * scale


def unscale_gradients(gradients: Iterable[np.ndarray], scale: float) -> list[np.ndarray]:
    r"""The gradients of the loss from those of the scaled loss, in float32.

    Equation: `loss-scaling` $g=g_{\rm scaled}/S$
    Shapes: each (*S) -> (*S) float32
    Raises: ValueError for a scale that is not positive.
    Source: notes §7.
    """
    require_positive(scale, "unscale_gradients", "the scale")
    return [np.asarray(g, np.float32) / np.float32(scale) for g in gradients]


def overflowed(gradients: Iterable[np.ndarray]) -> bool:
    r"""Whether any gradient is infinite or NaN.

    Equation: `dynamic-loss-scaling` the sign of an overflow
    Source: notes §7.
    """
    return not all(bool(np.isfinite(g).all()) for g in gradients)


class DynamicLossScale:
    r"""A scale that halves on overflow, when the step is skipped, and doubles after a run of good steps.

    Equation: `dynamic-loss-scaling` $S\leftarrow S/2$ on overflow, $S\leftarrow2S$ after $n$ good steps
    Raises: ValueError for a scale that is not positive or an interval that is no positive integer.
    Source: notes §7.
    """

    def __init__(self, scale: float = 2.0**16, interval: int = 2000, smallest: float = 1.0):
        require_positive(scale, "DynamicLossScale", "scale")
        require_positive(smallest, "DynamicLossScale", "smallest")
        require_positive(interval, "DynamicLossScale", "interval", integer=True)
        self.scale, self.interval, self.smallest = float(scale), int(interval), float(smallest)
        self.good_steps = 0

    def unscale(self, gradients: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        r"""Gradients to step with, or None: skip this step. Adapts the scale either way.

        Equation: `dynamic-loss-scaling` skip the step and halve, or count and double
        """
        if overflowed(gradients):
            self.scale, self.good_steps = max(self.scale / 2, self.smallest), 0
            return None
        gradients = unscale_gradients(gradients, self.scale)
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps = min(self.scale * 2, LARGEST_SCALE), 0
        return gradients

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError unless the state has a positive scale and a count below the interval."""
        where = "DynamicLossScale.load_state_dict"
        require(set(state) == {"scale", "good_steps"}, where, "the state", "a scale and good_steps", str(sorted(state)))
        require_positive(state["scale"], where, "scale")
        require_positive(state["good_steps"], where, "good_steps", integer=True, zero_ok=True)
        require(state["good_steps"] < self.interval, where, "good_steps", f"below {self.interval}", state["good_steps"])
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


def update_master(
    master: Float[np.ndarray, "*S"], step: Float[np.ndarray, "*S"], name: str = "bf16"
) -> tuple[Float[np.ndarray, "*S"], Float[np.ndarray, "*S"]]:
    r"""Add a step to the float32 weights; give them and their copy for computing.

    Equation: `master-weights` $\theta_{32}\leftarrow\theta_{32}+\Delta,\ \theta_{16}=\mathrm{cast}(\theta_{32})$
    Shapes: master (*S), step (*S) -> master (*S) and its copy, rounded to the format
    Raises: ValueError if the shapes differ, the master is not float32, or the format is unknown.
    Source: notes §7 footnote 5.
    """
    require(master.dtype == np.float32, "update_master", "the master weights", "in float32", master)
    require(step.shape == master.shape, "update_master", "the step", f"of shape {master.shape}", step)
    float_format(name)
    master = master + step.astype(np.float32)
    return master, round_float(master, name)


def precision_of(operation: str, low: str = "bf16") -> str:
    r"""The format in which a kind of operation runs.

    Equation: `mixed-precision-policy` products low; softmax, norms, reductions, loss in float32
    Raises: ValueError for an unknown operation or format.
    Source: notes §7.
    """
    require_one_of(operation, POLICY, "precision_of", "the operation")
    return float_format(low if POLICY[operation] == "low" else "fp32").name


def low_precision_matmul(
    a: Float[np.ndarray, "m k"], b: Float[np.ndarray, "k n"], name: str = "tf32"
) -> Float[np.ndarray, "m n"]:
    r"""A product whose inputs are rounded to a format and whose sums are float32.

    Equation: `tf32` 10-bit mantissas in, float32 accumulation
    Equation: `mixed-precision-policy` the product in few bits, its reduction in float32
    Shapes: a (m, k), b (k, n) -> (m, n) float32
    Raises: ValueError if the shapes do not fit or the format is unknown.
    Source: notes §7.
    Differs: an explicit mode, off unless asked for (erratum 50).
    """
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    require(fits, "low_precision_matmul", "the inputs", "matrices (m, k) and (k, n)", f"{a.shape} and {b.shape}")
    return round_float(a, name) @ round_float(b, name)
