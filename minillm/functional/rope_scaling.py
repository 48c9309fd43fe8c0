r"""Rotary positions for texts longer than those of the training."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.checks import require, require_one_of
from minillm.functional.positions import rotation_angles

KINDS = ("none", "linear", "ntk", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched: the kind, the factor s, and the length of the training.

    ``low`` and ``high`` are the numbers of turns within the training's length below which a pair is stretched
    fully and above which not at all.
    """

    kind: str = "none"
    factor: float = 1.0
    L_train: int = 2048
    low: float = 1.0
    high: float = 32.0

    def __post_init__(self) -> None:
        require_one_of(self.kind, KINDS, "RopeScaling", "kind")
        require(self.factor >= 1, "RopeScaling", "the factor", "at least 1", self.factor)
        require(self.L_train > 0, "RopeScaling", "L_train", "a positive number of tokens", self.L_train)
        require(
            0 < self.low < self.high,
            "RopeScaling",
            "low and high",
            "ordered, 0 < low < high",
            f"{self.low}, {self.high}",
        )


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
    theta = rotation_angles(np.ones(1), d_head, base)[0]  # (d_head / 2,)
    turns = scaling.L_train * theta / (2 * np.pi)
    w = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return Rotation(angles * ((1 - w) / s + w), 0.1 * float(np.log(s)) + 1.0 if kind == "yarn" else 1.0)
