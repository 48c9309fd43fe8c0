r"""Causal linear attention in chunks in one piece, with a hand-derived gradient.

Equation: `linear-attention-causal` inside a chunk the masked products, from outside the state
Source: notes §4.10.

With a column of ones beside the values, $V'=[V,1]$, numerator and normaliser are one expression that is linear in
$V'$. Per chunk c, with $T$ the lower triangle and $S_c=\sum_{c'<c}K_{c'}^\top V'_{c'}$:
$N_c=T(Q_cK_c^\top)V'_c+Q_cS_c$, and the output is $Y=N_{:,:d_v}/D$ with $D=N_{:,d_v}+\varepsilon_0$.

The gradient. $\bar N=[\bar Y/D,\ -\sum_d\bar Y\odot Y/D]$. With $R_c=\sum_{c'>c}Q_{c'}^\top\bar N_{c'}+\bar S_{\rm last}$:
$\bar Q=T(\bar NV'^\top)K+\bar NS^\top$, $\bar K=T(\bar NV'^\top)^\top Q+V'R^\top$,
$\bar V'=T(QK^\top)^\top\bar N+KR$. The state before the first token receives $R$ with all chunks in it.

All chunks are worked on at once, and only the states are summed along them: memory is $O(BHL(C+d))$.
"""

import numpy as np

from minillm.autograd.operation import derived
from minillm.checks import require_positive
from minillm.functional.linear_attention import EPS, check_mapped, check_state


@derived("linear_attention_chunked")
def linear_attention_chunked(
    phi_q: np.ndarray,
    phi_k: np.ndarray,
    v: np.ndarray,
    state: np.ndarray | None = None,
    normaliser: np.ndarray | None = None,
    *,
    chunk: int = 64,
    eps: float = EPS,
):
    r"""Causal linear attention with a state that goes in and comes out.

    Equation: `linear-attention-causal` $\mathbf S^{(t)}=\mathbf S^{(t-1)}+\phi(k_t)v_t^\top$, read with $\phi(q_t)$
    Shapes: phi_q, phi_k (B, H, L, d_phi), v (B, H, L, d_v), state (B, H, d_phi, d_v), normaliser (B, H, d_phi)
        -> output (B, H, L, d_v) and the state and normaliser after the last token; keeps the states before each chunk.
    Raises: ValueError as its twin as written.
    Source: notes §4.10.
    """
    name = "linear_attention_chunked"
    check_mapped(name, phi_q, phi_k, v, causal=True)
    check_state(name, state, normaliser, phi_k, v)
    require_positive(chunk, name, "chunk", integer=True)
    (B, H, L, d_phi), d_v = phi_k.shape, v.shape[3]
    C = min(chunk, L)
    ones = np.ones((B, H, L, 1), v.dtype)
    q, k, w = (_chunks(x, C) for x in (phi_q, phi_k, np.concatenate([v, ones], axis=-1)))  # (B, H, n, C, ...)
    S = np.zeros((B, H, q.shape[2] + 1, d_phi, d_v + 1), v.dtype)  # before each chunk, and after the last
    if state is not None and normaliser is not None:
        S[:, :, 0, :, :d_v], S[:, :, 0, :, d_v] = state, normaliser
    np.matmul(k.swapaxes(-1, -2), w, out=S[:, :, 1:])
    np.cumsum(S, axis=2, out=S)
    below = np.tril(np.ones((C, C), v.dtype))
    weights = _triangle(q @ k.swapaxes(-1, -2), below)  # (B, H, n, C, C)
    N = weights @ w + q @ S[:, :, :-1]  # (B, H, n, C, d_v + 1)
    D = N[..., d_v:] + v.dtype.type(eps)
    Y = N[..., :d_v] / D

    def vjp(dy, d_state=None, d_normaliser=None):
        dN = np.zeros_like(N)
        if dy is not None:
            dY = _chunks(dy, C)
            np.divide(dY, D, out=dN[..., :d_v])
            dN[..., d_v] = -np.einsum("...d,...d->...", dN[..., :d_v], Y)
        R = np.zeros_like(S)  # what arrives at the state before each chunk, and at the last one
        if d_state is not None:
            R[:, :, -1, :, :d_v] = d_state
        if d_normaliser is not None:
            R[:, :, -1, :, d_v] = d_normaliser
        np.matmul(q.swapaxes(-1, -2), dN, out=R[:, :, :-1])
        np.cumsum(R[:, :, ::-1], axis=2, out=R[:, :, ::-1])
        later = R[:, :, 1:]
        dA = _triangle(dN @ w.swapaxes(-1, -2), below)  # (B, H, n, C, C)
        dq = dA @ k + dN @ S[:, :, :-1].swapaxes(-1, -2)
        dk = dA.swapaxes(-1, -2) @ q + w @ later.swapaxes(-1, -2)
        dw = weights.swapaxes(-1, -2) @ dN + k @ later
        given = (None, None) if state is None else (R[:, :, 0, :, :d_v], R[:, :, 0, :, d_v])
        return (*(_whole(x, L) for x in (dq, dk, dw[..., :d_v])), *given)

    return (_whole(Y, L), S[:, :, -1, :, :d_v], S[:, :, -1, :, d_v]), vjp


def _triangle(square: np.ndarray, below: np.ndarray) -> np.ndarray:
    square *= below
    return square


def _chunks(x: np.ndarray, C: int) -> np.ndarray:
    """(B, H, L, d) as (B, H, n, C, d); the last chunk is filled up with zeros."""
    B, H, L, d = x.shape
    n = -(-L // C) if C else 0
    if n * C != L:
        x = np.concatenate([x, np.zeros((B, H, n * C - L, d), x.dtype)], axis=2)
    return x.reshape(B, H, n, C, d)


def _whole(x: np.ndarray, L: int) -> np.ndarray:
    """Undo `_chunks`."""
    B, H, n, C, d = x.shape
    return x.reshape(B, H, n * C, d)[:, :, :L]
