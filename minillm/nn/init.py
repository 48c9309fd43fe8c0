r"""How large weights are at the start: schemes that keep the size of a signal from layer to layer."""

import numpy as np
from jaxtyping import Float

from minillm.checks import require_positive


def xavier_normal(d_in: int, d_out: int, rng: np.random.Generator) -> Float[np.ndarray, "d_out d_in"]:
    r"""Weights that keep the size of signals on average of the way forward and the way back.

    Equation: `init-schemes` Xavier: variance $\frac2{d_{\rm in}+d_{\rm out}}$
    Shapes: -> (d_out, d_in)
    Raises: ValueError unless both sizes are positive integers.
    Source: notes §8.9; Glorot and Bengio 2010.
    """
    require_positive(d_in, "xavier_normal", "d_in", integer=True)
    require_positive(d_out, "xavier_normal", "d_out", integer=True)
    return rng.normal(0.0, np.sqrt(2 / (d_in + d_out)), size=(d_out, d_in))


def kaiming_normal(d_in: int, d_out: int, rng: np.random.Generator) -> Float[np.ndarray, "d_out d_in"]:
    r"""Weights that keep the mean square of signals forward when a ReLU sets half of them to 0.

    Equation: `init-schemes` Kaiming: variance $\frac2{d_{\rm in}}$ (ReLU)
    Shapes: -> (d_out, d_in)
    Raises: ValueError unless both sizes are positive integers.
    Source: notes §8.9; He et al. 2015.
    """
    require_positive(d_in, "kaiming_normal", "d_in", integer=True)
    require_positive(d_out, "kaiming_normal", "d_out", integer=True)
    return rng.normal(0.0, np.sqrt(2 / d_in), size=(d_out, d_in))
