r"""From tokens to experts and back: packing, the experts, combining; steps (iv) to (vi) of notes §8.8."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import Tensor
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.frozen import frozen


@dataclass(frozen=True)
class Packing:
    r"""The maps between tokens and the experts' own lists.

    The assignments are sorted by expert and, within an expert, by token. Those of expert e are
    ``tokens[offsets[e]:offsets[e + 1]]``, which is the map $\pi_e$; ``eta`` is its inverse.

    Equation: `moe-dispatch` $\pi_e$: from $[N_e]$ to the tokens, $\eta_e$ its inverse
    Shapes: tokens (A,), experts (A,), offsets (E + 1,), A the number of assignments
    """

    n_tokens: int
    tokens: Int[np.ndarray, " A"]
    experts: Int[np.ndarray, " A"]
    offsets: Int[np.ndarray, " E1"]

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.offsets) - 1

    @property
    def loads(self) -> Int[np.ndarray, " E"]:
        """How many tokens each expert has."""
        return np.diff(self.offsets)

    @property
    def places(self) -> Int[np.ndarray, " A"]:
        """The place of every assignment in its expert's list."""
        return np.arange(len(self.tokens)) - self.offsets[self.experts]

    @property
    def eta(self) -> Int[np.ndarray, "N E"]:
        """The place of a token in an expert's list, -1 where it is not there."""
        eta = np.full((self.n_tokens, self.n_experts), -1)
        eta[self.tokens, self.experts] = self.places
        return eta

    def rows(self, e: int) -> slice:
        """Where expert e's assignments lie."""
        return slice(int(self.offsets[e]), int(self.offsets[e + 1]))


def pack(routed: Any) -> Packing:
    r"""Sort the assignments by expert.

    Equation: `moe-dispatch` $\pi_e$ lists the tokens that are routed to e, in their order
    Shapes: routed booleans (N, E) -> A assignments; $A=\sum_eN_e=kN$ when every token has k experts
    Raises: ValueError unless routed is a boolean matrix.
    Source: notes §8.8 (iv).
    """
    routed = frozen(routed)
    require(routed.dtype == bool and routed.ndim == 2, "pack", "the choice", "booleans of shape (N, E)", routed)
    experts, tokens = np.nonzero(routed.T)
    offsets = np.zeros(routed.shape[1] + 1, np.int64)
    np.cumsum(routed.sum(0), out=offsets[1:])
    return Packing(len(routed), tokens, experts, offsets)


def _routing(rng) -> Bool[np.ndarray, "N E"]:
    return rng.random([(4, 3), (3, 1), (1, 4), (0, 2)][rng.integers(4)]) < 0.6


def _example_dispatch(rng):
    routed = _routing(rng)
    return (rng.normal(size=(len(routed), 3)), rng.normal(size=routed.shape), pack(routed)), {}


def _example_combine(rng):
    packing = pack(_routing(rng))
    A = len(packing.tokens)
    return (rng.normal(size=(A, 3)), rng.normal(size=A), packing), {}


def _example_padding(rng):
    packing = pack(_routing(rng))
    return (rng.normal(size=(len(packing.tokens), 3)), packing, int(packing.loads.max() + rng.integers(3))), {}


@written("dispatch", example=_example_dispatch)
def dispatch(
    x: Float[Tensor, "N d"], gates: Float[Tensor, "N E"], packing: Packing
) -> tuple[Float[Tensor, "A d"], Float[Tensor, " A"]]:
    r"""Copy every token to the lists of its experts, with its weights.

    Equation: `moe-dispatch` $\mathbf X_e[j]=\mathbf X[\pi_e(j)],\ g_e[j]=\tilde P[\pi_e(j),e]$
    Shapes: x (N, d_model), gates (N, E) -> (A, d_model), (A,); expert e's are ``packing.rows(e)``
    Raises: ValueError if x or the gates have other sizes than the packing.
    Source: notes §8.8 (iv).
    """
    wanted = (packing.n_tokens, packing.n_experts)
    require(x.ndim == 2 and len(x) == wanted[0], "dispatch", "x", f"of shape ({wanted[0]}, d_model)", x)
    require(gates.shape == wanted, "dispatch", "the gates", f"of shape {wanted}", gates)
    return x[packing.tokens], gates[packing.tokens, packing.experts]


@written("combine", example=_example_combine)
def combine(y: Float[Tensor, "A d"], g: Float[Tensor, " A"], packing: Packing) -> Float[Tensor, "N d"]:
    r"""Weigh what the experts return and add it up at the tokens' own places.

    Equation: `moe-combine` $\mathbf Z[b,l]=\sum_{e\in\mathcal T_k(b,l)}g_e[\eta_e(b,l)]\,\mathbf Y_e[\eta_e(b,l)]$
    Shapes: y (A, d_model), g (A,) -> (N, d_model); a token without an expert gets zeros
    Raises: ValueError if y or g have other sizes than the packing.
    Source: notes §8.8 (vi).
    """
    A = len(packing.tokens)
    require(y.ndim == 2 and len(y) == A, "combine", "y", f"of shape ({A}, d_model)", y)
    require(g.shape == (A,), "combine", "the weights g", f"of shape ({A},)", g)
    weighted = g.unsqueeze(-1) * y  # (A, d_model)
    return ops.scatter_add(weighted, shape=(packing.n_tokens, y.shape[1]), index=packing.tokens)


@written("pad_to_capacity", example=_example_padding)
def pad_to_capacity(x: Float[Tensor, "A d"], packing: Packing, C: int) -> Float[Tensor, "E C d"]:
    r"""One buffer of C rows per expert, so that all experts run in one batched product.

    Equation: `moe-pad` $(E,C,d)$ buffers; rows behind an expert's load are 0 and ignored by `unpad`
    Shapes: x (A, d) -> (E, C, d)
    Raises: ValueError if an expert's load exceeds C.
    Source: notes §8.8.
    """
    A, largest = len(packing.tokens), int(packing.loads.max(initial=0))
    require(x.ndim == 2 and len(x) == A, "pad_to_capacity", "x", f"of shape ({A}, d)", x)
    hint = "Drop or reroute the overflow first."
    require(largest <= C, "pad_to_capacity", "the capacity C", f"at least the largest load, {largest}", C, hint)
    slots = packing.experts * C + packing.places
    return ops.scatter_add(x, shape=(packing.n_experts * C, x.shape[1]), index=slots).reshape(
        packing.n_experts, C, x.shape[1]
    )


def _example_unpad(rng):
    (_, packing, C), _ = _example_padding(rng)
    return (rng.normal(size=(packing.n_experts, C, 3)), packing), {}


@written("unpad", example=_example_unpad)
def unpad(y: Float[Tensor, "E C d"], packing: Packing) -> Float[Tensor, "A d"]:
    r"""The rows of the buffers that belong to tokens.

    Equation: `moe-pad` padded rows ignored
    Shapes: y (E, C, d) -> (A, d)
    Raises: ValueError if the buffers are not those of the packing.
    Source: notes §8.8.
    """
    fits = y.ndim == 3 and len(y) == packing.n_experts and y.shape[1] >= packing.loads.max(initial=0)
    require(fits, "unpad", "the buffers", f"of shape ({packing.n_experts}, C, d), C at least the largest load", y)
    return y[packing.experts, packing.places]
