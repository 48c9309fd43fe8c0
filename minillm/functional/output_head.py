r"""From the stream to logits of a good size: how large they are, and three ways to keep them so."""

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require_one_of, require_positive

SCALINGS = ("none", "sqrt", "mup")


def logit_std(d_model: int, s_w: float) -> float:
    r"""The spread over the vocabulary of the logits of a vector with root mean square 1.

    Equation: `logit-variance` $\mathrm{Var}_w(w^\top x)=s_w^2\lVert x\rVert^2=s_w^2d_{\rm model}$ for independent weights of spread $s_w$
    Shapes: -> a standard deviation
    Raises: ValueError unless both are positive.
    Source: notes §3.1.
    Differs: exact for any fixed x of RMS 1, whatever its direction (erratum 9).
    """
    require_positive(d_model, "logit_std", "d_model", integer=True)
    require_positive(s_w, "logit_std", "s_w")
    return float(s_w * np.sqrt(d_model))


def _example(rng):
    return (rng.normal(size=[(2, 5), (1,), (3, 2, 4)][rng.integers(3)]),), {
        "d_model": 16, "mode": SCALINGS[rng.integers(3)]
    }  # fmt: skip


@written("scale_logits", example=_example)
def scale_logits(o: Float[Tensor, "*B V"], d_model: int, mode: str = "none") -> Float[Tensor, "*B V"]:
    r"""Logits whose size does not depend on the width.

    Equation: `logit-scaling` $\tilde{\mathbf o}=\mathbf o/\sqrt{d_{\rm model}}$ (sqrt) or $\mathbf o/d_{\rm model}$ (mup)
    Shapes: o (..., V) -> (..., V)
    Raises: ValueError for an unknown mode or a width that is not positive.
    Source: notes §3.1.
    Differs: dividing by the root is right for weights of spread 1 only; with spread $d^{-1/2}$ the logits are of size 1
        already, so the default is none (erratum 9, decision 9).
    """
    require_one_of(mode, SCALINGS, "scale_logits", "mode")
    require_positive(d_model, "scale_logits", "d_model", integer=True)
    return o * float({"none": 1.0, "sqrt": d_model**-0.5, "mup": 1.0 / d_model}[mode])


@written("softcap", example=lambda rng: ((rng.normal(size=(3, 4)) * 10,), {"cap": 5.0}))
def softcap(o: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
    r"""Bounded logits: unchanged near 0, never beyond the cap.

    Equation: `logit-softcap` $c\tanh(\mathbf o/c)$
    Shapes: o (...) -> (...), in (-c, c)
    Raises: ValueError unless the cap is positive.
    Source: notes §3.1 (companion).
    """
    require_positive(cap, "softcap", "the cap")
    return (o * (1.0 / cap)).tanh() * float(cap)
