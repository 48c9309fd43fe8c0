r"""Rotary positions for texts longer than those of the training."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.checks import require, require_one_of, require_positive
from minillm.functional.positions import rotation_angles

KINDS = ("none", "linear", "ntk", "yarn", "llama3")
RAMPS = ("turns", "pairs", "whole pairs")


@dataclass(frozen=True)
class RopeScaling:
    r"""How rotary positions are stretched: the kind, the factor s, and the length of the training.

    ``low`` and ``high`` are the numbers of turns within the training's length below which a pair is stretched
    fully and above which not at all. In between the share rises evenly in the number of turns (``ramp="turns"``, as
    the paper of YaRN has it) or in the number of the pair (``"pairs"``, as its program has it; ``"whole pairs"`` with
    both ends rounded outwards, as checkpoints expect). ``magnitude`` replaces YaRN's own, $0.1\ln s+1$.
    """

    kind: str = "none"
    factor: float = 1.0
    L_train: int = 2048
    low: float = 1.0
    high: float = 32.0
    ramp: str = "turns"
    magnitude: float | None = None

    def __post_init__(self) -> None:
        require_one_of(self.kind, KINDS, "RopeScaling", "kind")
        require(self.factor >= 1, "RopeScaling", "the factor", "at least 1", self.factor)
        require(self.L_train > 0, "RopeScaling", "L_train", "a positive number of tokens", self.L_train)
        require_one_of(self.ramp, RAMPS, "RopeScaling", "ramp")
        if self.magnitude is not None:
            require_positive(self.magnitude, "RopeScaling", "the magnitude")
        require(
            0 < self.low < self.high,
            "RopeScaling",
            "low and high",
            "ordered, 0 < low < high",
            f"{self.low}, {self.high}",
        )

    @property
    def own_magnitude(self) -> float:
        """What YaRN multiplies queries and keys by, unless another number is given."""
        return 0.1 * float(np.log(self.factor)) + 1.0


class Rotation(NamedTuple):
    """Angles (L, d_head / 2), and what queries and keys are multiplied by besides."""

    angles: Float[np.ndarray, "L half"]
    magnitude: float


def scaled_rotation(
    positions: np.ndarray, d_head: int, base: float = 10_000.0, scaling: RopeScaling | None = None
) -> Rotation:
    r"""The angles of rotary positions, stretched.

    Equation: `pos-rope-scaling` linear $p/s$; NTK base $b\,s^{d_{\rm head}/(d_{\rm head}-2)}$; YaRN $\theta_i\leftarrow\big(\frac{1-w_i}s+w_i\big)\theta_i,\ w_i=\mathrm{clip}\big(\frac{L_{\rm train}\theta_i/2\pi-1}{32-1},0,1\big)$, and q, k times $0.1\ln s+1$
    Shapes: positions (L,) -> angles (L, d_head / 2) and one number
    Raises: ValueError for an odd d_head, a base that is not above 1, or NTK with d_head = 2.
    Source: notes §6; Chen et al. 2023 (linear), Peng et al. 2023 (YaRN), LLaMA 3.1's published configuration.

    "llama3" interpolates as YaRN does, from 1 to ``high`` = 4 turns, and leaves magnitudes alone.
    """
    require(base > 1, "scaled_rotation", "the base", "above 1", base)
    scaling = scaling or RopeScaling()
    s, kind = scaling.factor, scaling.kind
    if kind == "linear":
        return Rotation(rotation_angles(np.asarray(positions) / s, d_head, base), 1.0)
    if kind == "ntk":
        require(d_head > 2, "scaled_rotation", "d_head", "above 2 (the exponent is d / (d - 2))", d_head)
        return Rotation(rotation_angles(positions, d_head, base * s ** (d_head / (d_head - 2))), 1.0)
    angles = rotation_angles(positions, d_head, base)
    if kind == "none":
        return Rotation(angles, 1.0)
    w = _kept_share(d_head, base, scaling)
    magnitude = scaling.own_magnitude if scaling.magnitude is None else scaling.magnitude
    return Rotation(angles * ((1 - w) / s + w), magnitude if kind == "yarn" else 1.0)


def _kept_share(d_head: int, base: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """How much of its frequency each pair keeps: 1 for fast ones, 0 for slow ones."""
    if scaling.ramp == "turns":
        theta = rotation_angles(np.ones(1), d_head, base)[0]  # (d_head / 2,)
        turns = scaling.L_train * theta / (2 * np.pi)
        return np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)

    def pair(turns: float) -> float:  # the pair, as a real number, that turns so often within the training's length
        return d_head * float(np.log(scaling.L_train / (2 * np.pi * turns)) / (2 * np.log(base)))

    first, last = pair(scaling.high), pair(scaling.low)
    if scaling.ramp == "whole pairs":
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, d_head - 1.0)
    last = first + 1e-3 if first == last else last
    return 1 - np.clip((np.arange(d_head // 2) - first) / (last - first), 0, 1)
