r"""How evenly tokens are shared out, and what an arrangement of experts costs."""

from fractions import Fraction
from math import comb
from typing import Any, NamedTuple

import numpy as np

from minillm.checks import require, require_positive
from minillm.functional.frozen import frozen


class LoadFigures(NamedTuple):
    """Largest over mean load, entropy of the shares in nats (at most ln E), and experts without a token."""

    max_over_mean: float
    entropy: float
    dead: int


def load_figures(loads: Any) -> LoadFigures:
    r"""Has the routing collapsed?

    Equation: `moe-collapse-metrics` max load / mean load, entropy $-\sum_ef_e\ln f_e$, number with $N_e=0$
    Shapes: loads (E,), not negative -> three numbers; even: 1, ln E, 0; collapsed on one: E, 0, E - 1
    Raises: ValueError unless loads is a vector of non-negative numbers with a positive sum.
    Source: deepseek (routing collapse); notes §8.8.
    """
    loads = frozen(loads).astype(np.float64)
    fits = loads.ndim == 1 and loads.size > 0 and bool((loads >= 0).all()) and loads.sum() > 0
    require(fits, "load_figures", "the loads", "(E,) numbers, none negative, with a positive sum", loads)
    shares = loads / loads.sum()
    used = shares[shares > 0]
    return LoadFigures(float(loads.max() / loads.mean()), float(-(used * np.log(used)).sum()), int((loads == 0).sum()))


class Arrangement(NamedTuple):
    """E routed experts of inner width d_ff, k of them per token, and K_s shared ones that every token visits."""

    E: int
    k: int
    d_ff: int
    K_s: int = 0

    @property
    def combinations(self) -> int:
        """How many sets of routed experts a token can get."""
        return comb(self.E, self.k)


def _checked(where: str, arrangement: Arrangement) -> Arrangement:
    E, k, d_ff, K_s = arrangement
    for value, name in ((E, "E"), (k, "k"), (d_ff, "d_ff")):
        require_positive(value, where, name, integer=True)
    require_positive(K_s, where, "K_s", integer=True, zero_ok=True)
    require(k <= E, where, "k", f"at most E = {E}", k)
    return arrangement


def fine_grained(arrangement: Arrangement, m: int) -> Arrangement:
    r"""Cut every expert into m, and visit m times as many.

    Equation: `moe-fine-grained` $mE$ experts of width $d_{\rm ff}/m$, route $mk$
    Raises: ValueError unless m is a positive divisor of d_ff, and for shared experts, which come after.
    Source: deepseek (fine-grained expert segmentation); Dai et al. 2024.
    Differs: the experts get narrower and k grows, or active compute would fall by m (erratum 41).
    """
    E, k, d_ff, K_s = _checked("fine_grained", arrangement)
    require_positive(m, "fine_grained", "m", integer=True)
    require(d_ff % m == 0, "fine_grained", "m", f"a divisor of d_ff = {d_ff}", m)
    require(K_s == 0, "fine_grained", "K_s", "0 (share experts after cutting them)", K_s)
    return Arrangement(m * E, m * k, d_ff // m)


def with_shared(arrangement: Arrangement, K_s: int) -> Arrangement:
    r"""Make K_s of the experts shared, at equal parameters and equal compute.

    Equation: `moe-shared-experts` $mE-K_s$ routed, $mk-K_s$ of them active
    Raises: ValueError unless some routed expert stays active.
    Source: deepseek (shared expert isolation); Dai et al. 2024.
    Differs: the slide adds the shared expert to the 2N routed ones, which is one too many (erratum 42).
    """
    E, k, d_ff, already = _checked("with_shared", arrangement)
    require_positive(K_s, "with_shared", "K_s", integer=True, zero_ok=True)
    require(K_s < k, "with_shared", "K_s", f"below k = {k}, so that a routed expert stays active", K_s)
    return Arrangement(E - K_s, k - K_s, d_ff, already + K_s)


class ParameterCount(NamedTuple):
    """All parameters of a layer, and those that one token uses."""

    total: int
    active: int


def moe_parameters(arrangement: Arrangement, d_model: int, *, gated: bool = True, bias: bool = False) -> ParameterCount:
    r"""Parameters of a layer of experts and its router.

    Equation: `moe-params-active` $P_{\rm tot}=(E+K_s)P_e+P_r,\ P_{\rm act}=(k+K_s)P_e+P_r$, $P_e=3d_{\rm model}d_{\rm ff}$
        (gated) or $2d_{\rm model}d_{\rm ff}$, $P_r=d_{\rm model}E$, and $E$ more with a router bias
    Raises: ValueError for sizes that are not positive, or k > E.
    Source: deepseek (pros and cons); notes §8.8.
    """
    E, k, d_ff, K_s = _checked("moe_parameters", arrangement)
    require_positive(d_model, "moe_parameters", "d_model", integer=True)
    P_e, P_r = (3 if gated else 2) * d_model * d_ff, E * (d_model + bias)
    return ParameterCount((E + K_s) * P_e + P_r, (k + K_s) * P_e + P_r)


def budget_ratio(arrangement: Arrangement, other: Arrangement) -> Fraction:
    r"""The experts' parameters of one arrangement over those of another, exactly.

    Equation: `moe-shared-experts` equal budget: ratio 1
    Raises: ValueError for sizes that are not positive, or k > E.
    Source: deepseek (shared expert isolation).
    """
    for given in (arrangement, other):
        _checked("budget_ratio", given)
    return Fraction((arrangement.E + arrangement.K_s) * arrangement.d_ff, (other.E + other.K_s) * other.d_ff)
