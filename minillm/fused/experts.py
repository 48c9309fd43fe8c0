r"""A layer of experts with a hand-derived gradient: sorted by expert, one matrix product an expert."""

from collections.abc import Callable

import numpy as np
import scipy.special

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.functional.dispatch import Packing, pack
from minillm.functional.experts import check_layer
from minillm.fused.activations import geglu, swiglu

Pullback = Callable[[np.ndarray], np.ndarray]


def _relu(h: np.ndarray) -> tuple[np.ndarray, Pullback]:
    return np.maximum(h, 0), lambda dy: dy * (h > 0)


def _gelu(h: np.ndarray) -> tuple[np.ndarray, Pullback]:
    phi = scipy.special.ndtr(h)
    density = h.dtype.type(1 / np.sqrt(2 * np.pi))
    return h * phi, lambda dy: dy * (phi + h * (density * np.exp(-0.5 * h * h)))


def _silu(h: np.ndarray) -> tuple[np.ndarray, Pullback]:
    sigma = scipy.special.expit(h)
    return h * sigma, lambda dy: dy * (sigma * (1 + h * (1 - sigma)))


# What a layer can run; every kind works on the rows of all experts at once.
KINDS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, Pullback]]] = {
    "swiglu": swiglu.arrays,
    "geglu": geglu.arrays,
    "relu": _relu,
    "gelu": _gelu,
    "silu": _silu,
}


def _per_expert(packing: Packing, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The rows of every expert times its matrix: x (A, m), w (E, m, n) -> (A, n)."""
    y = scratch.empty((len(x), w.shape[2]), x.dtype)
    for e in np.flatnonzero(packing.loads).tolist():
        rows = packing.rows(e)
        np.matmul(x[rows], w[e], out=y[rows])
    return y


def _weight_gradient(packing: Packing, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """For every expert the product over its rows: dy (A, n), x (A, m) -> (E, n, m)."""
    dw = scratch.empty((packing.n_experts, dy.shape[1], x.shape[1]), x.dtype)
    for e in range(packing.n_experts):
        rows = packing.rows(e)
        np.matmul(dy[rows].T, x[rows], out=dw[e])  # zeros for an expert without a row
    return dw


def _products_added_up(packing: Packing, x: np.ndarray, w: np.ndarray, g: np.ndarray | None = None) -> np.ndarray:
    """The rows of every expert times its matrix, weighted, and added at their tokens' places: (A, m) -> (N, n).

    A token is in an expert's list at most once, so the places of one expert are distinct and plain indexing adds up.
    """
    z = np.zeros((packing.n_tokens, w.shape[2]), x.dtype)
    for e in np.flatnonzero(packing.loads).tolist():
        rows = packing.rows(e)
        y = x[rows] @ w[e]
        if g is not None:
            y *= g[rows, None]
        places = packing.tokens[rows]
        y += z[places]
        z[places] = y
    return z


@derived("mixture_of_experts")
def mixture_of_experts(
    x: np.ndarray,
    gates: np.ndarray,
    routed: np.ndarray,
    w_in: np.ndarray,
    w_down: np.ndarray,
    *,
    activation: str = "swiglu",
):
    r"""The routed experts of every token, weighted and added up.

    Rows are copied in the order of the experts, so each expert is two products with nothing in between. With
    $A_j=\phi(X_jW^{\rm in})$ and $Z_n=\sum_{j:\pi(j)=n}g_jA_jW^{\rm down}$, a cotangent $\bar Z$ gives every row
    $U_j=\bar Z_{\pi(j)}W^{{\rm down}\top}$, hence $\bar g_j=\langle A_j,U_j\rangle$ and $\bar A_j=g_jU_j$: the experts' outputs
    are not needed again. $\bar W^{\rm down}=\sum_j(g_j\bar Z_{\pi(j)})^\top A_j$; the rest is a dense layer's.

    Equation: `moe-output` $y=\sum_{e\in\mathcal T}G(x)_e\,E_e(x)$
    Equation: `moe-dispatch` rows sorted by expert
    Equation: `moe-combine` the output of each expert added where its tokens are
    Shapes: x (N, d_model), gates (N, E), routed booleans (N, E), w_in (E, f_in, d_model), w_down (E, d_model, d_ff)
        -> (N, d_model); keeps the packed rows, the activations and what their gradient needs.
    Raises: ValueError for arguments that do not fit one another, or an unknown activation.
    Source: notes §8.8 (iv) to (vi).
    """
    routed = check_layer("mixture_of_experts", x, gates, routed, w_in, w_down, activation)
    packing = pack(routed)
    tokens = packing.tokens
    g = gates[tokens, packing.experts]  # (A,)
    packed = np.take(x, tokens, axis=0, out=scratch.empty((len(tokens), x.shape[1]), x.dtype), mode="clip")
    hidden, pull_hidden = KINDS[activation](_per_expert(packing, packed, w_in.swapaxes(1, 2)))  # (A, d_ff)
    z = _products_added_up(packing, hidden, w_down.swapaxes(1, 2), g)  # (N, d_model)

    def vjp(dz):
        dy = np.take(dz, tokens, axis=0, out=scratch.empty(packed.shape, x.dtype), mode="clip")
        u = _per_expert(packing, dy, w_down)  # (A, d_ff)
        dgates = np.zeros_like(gates)
        dgates[tokens, packing.experts] = np.einsum("ij,ij->i", hidden, u)
        dy *= g[:, None]
        dw_down = _weight_gradient(packing, dy, hidden)
        u *= g[:, None]
        dh = pull_hidden(u)  # (A, f_in)
        dw_in = _weight_gradient(packing, dh, packed)
        dx = _products_added_up(packing, dh, w_in)
        return dx, dgates, None, dw_in, dw_down

    return z, vjp
