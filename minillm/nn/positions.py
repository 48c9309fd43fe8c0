r"""How a model tells places apart: by name, what adds to the stream, what turns queries and keys, what biases scores.

A kind of positions has three methods, of which most do nothing:

* ``add(x, positions)``: the stream (B, L, d) with positions added, before the first block;
* ``turn(heads, positions)``: queries or keys (B, H, L, d_head), turned;
* ``bias(q_positions, k_positions)``: what is added to the scores, (H, L_q, L_k), or None.
"""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require_one_of, require_positive
from minillm.functional.absolute_positions import add_learned_positions, check_positions, sinusoidal_positions
from minillm.functional.relative_positions import alibi_bias, relative_bias
from minillm.functional.rope_scaling import RopeScaling, scaled_rotation
from minillm.fused.positions import rope
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter


class NoPositions(Module):
    r"""Nothing: a causal mask alone tells a decoder where it is; an encoder sees a set.

    Equation: `pos-nope` $\mathbf X\mapsto\mathbf X$
    Shapes: x (B, L, d) -> (B, L, d)
    Source: notes §6.
    """

    turns = False
    biases = False

    def add(self, x: Tensor, positions: np.ndarray) -> Tensor:
        """The stream as it is."""
        return x

    def turn(self, heads: Tensor, positions: np.ndarray) -> Tensor:
        """Queries or keys as they are."""
        return heads

    def bias(self, q_positions: np.ndarray, k_positions: np.ndarray) -> Any:
        """Nothing to add to the scores."""
        return None


class SinusoidalPositions(NoPositions):
    r"""Sines and cosines, added to the stream.

    Equation: `pos-sinusoidal` $\mathrm{PE}_{p,2i}=\sin(p\,b^{-2i/d}),\ \mathrm{PE}_{p,2i+1}=\cos(\cdot)$
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: ValueError for an odd width.
    Source: notes §6, §8.
    """

    def __init__(self, context: int, d: int):
        self.table = sinusoidal_positions(np.arange(context), d).astype(np.float32)  # (L_max, d)

    def add(self, x: Tensor, positions: np.ndarray) -> Tensor:
        return x + self.table[check_positions("SinusoidalPositions", positions, x.shape[1], len(self.table))]


class LearnedPositions(NoPositions):
    r"""A learnt vector for each place, added to the stream.

    Equation: `pos-learned` $\mathbf X\leftarrow\mathbf X+\mathbf W_{\rm pos}[0{:}L]$
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: IndexError for a position outside [0, L_max).
    Source: notes §6.
    """

    def __init__(self, context: int, d: int, rng: np.random.Generator, std: float = INIT_STD):
        self.weight = parameter(rng.normal(0.0, std, size=(context, d)))

    def add(self, x: Tensor, positions: np.ndarray) -> Tensor:
        return add_learned_positions(x, self.weight, positions)


class RotaryPositions(NoPositions):
    r"""Queries and keys turned by an angle that grows with the position, stretched or not.

    Equation: `pos-rope` $q'_{2i,2i+1}=R(p\,\theta_i)\,q_{2i,2i+1}$
    Equation: `pos-rope-scaling` linear, NTK, YaRN or LLaMA 3's
    Shapes: heads (B, H, L, d_head) -> (B, H, L, d_head)
    Raises: ValueError for an odd d_head; IndexError for a position outside [0, L_max).
    Source: notes §6.
    """

    turns = True

    def __init__(
        self,
        context: int,
        d_head: int,
        base: float = 10_000.0,
        pairing: str = "interleaved",
        scaling: RopeScaling | None = None,
    ):
        self.angles, self.magnitude = scaled_rotation(np.arange(context), d_head, base, scaling)  # (L_max, d_head / 2)
        self.pairing = pairing

    def turn(self, heads: Tensor, positions: np.ndarray) -> Tensor:
        positions = check_positions("RotaryPositions", positions, heads.shape[2], len(self.angles))
        turned = rope(heads, angles=self.angles[positions], pairing=self.pairing)
        return turned if self.magnitude == 1.0 else turned * self.magnitude


class AlibiPositions(NoPositions):
    r"""A penalty for distance, steeper in some heads than in others; nothing is learnt.

    Equation: `pos-alibi` $S_{ij}\mathrel{+}=-m_h|i-j|$
    Shapes: positions (L_q,), (L_k,) -> (H, L_q, L_k)
    Source: notes §6.
    """

    biases = True

    def __init__(self, n_heads: int):
        require_positive(n_heads, "AlibiPositions", "n_heads", integer=True)
        self.n_heads = n_heads

    def bias(self, q_positions: np.ndarray, k_positions: np.ndarray) -> np.ndarray:
        return alibi_bias(q_positions, k_positions, self.n_heads).astype(np.float32)


class BucketPositions(NoPositions):
    r"""A learnt number for each head and bucket of distances, shared by all layers (T5).

    Equation: `pos-relative-bias` $S_{ij}\mathrel{+}=b_{h,\mathrm{bucket}(i-j)}$
    Shapes: positions (L_q,), (L_k,) -> (H, L_q, L_k)
    Raises: ValueError for an odd number of buckets.
    Source: notes §6.
    """

    biases = True

    def __init__(
        self,
        n_heads: int,
        rng: np.random.Generator,
        *,
        bidirectional: bool,
        n_buckets: int = 32,
        D_max: int = 128,
        std: float = INIT_STD,
    ):
        self.table = parameter(rng.normal(0.0, std, size=(n_heads, n_buckets)))
        self.bidirectional, self.D_max = bidirectional, D_max

    def bias(self, q_positions: np.ndarray, k_positions: np.ndarray) -> Tensor:
        return relative_bias(self.table, q_positions, k_positions, self.D_max, bidirectional=self.bidirectional)


class ShawPositions(NoPositions):
    r"""A learnt vector for every distance up to c, on keys and on values; every layer's attention has its own.

    Equation: `pos-relative-shaw` $a_{ij}=w_{\mathrm{clip}(j-i,-c,c)}$, in `minillm.nn.shaw_attention`
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: ValueError for a distance that is not a positive integer.
    Source: notes §6; Shaw et al. 2018.
    """

    def __init__(self, distance: int):
        require_positive(distance, "ShawPositions", "distance", integer=True)
        self.distance = distance


KINDS = ("none", "sinusoidal", "learned", "rope", "alibi", "t5", "shaw")


def make_positions(
    kind: str,
    rng: np.random.Generator,
    *,
    context: int,
    d_model: int,
    n_heads: int,
    d_head: int,
    rope_base: float = 10_000.0,
    rope_pairing: str = "interleaved",
    rope_scaling: RopeScaling | None = None,
    bidirectional: bool = False,
    shaw_distance: int = 16,
    std: float = INIT_STD,
) -> NoPositions:
    """Positions by the name of their kind.

    Raises: ValueError for an unknown kind.
    """
    require_one_of(kind, KINDS, "make_positions", "positions")
    if kind == "sinusoidal":
        return SinusoidalPositions(context, d_model)
    if kind == "learned":
        return LearnedPositions(context, d_model, rng, std)
    if kind == "rope":
        return RotaryPositions(context, d_head, rope_base, rope_pairing, rope_scaling)
    if kind == "alibi":
        return AlibiPositions(n_heads)
    if kind == "t5":
        return BucketPositions(n_heads, rng, bidirectional=bidirectional, std=std)
    if kind == "shaw":
        return ShawPositions(shaw_distance)
    return NoPositions()
