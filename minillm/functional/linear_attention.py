r"""Linear attention as written, in its four forms: at once, quadratic, recurrent and in chunks.

All take mapped queries and keys, $\phi(q)$ and $\phi(k)$ (`feature_maps.py`), and weigh the values by
$\phi(q_i)\cdot\phi(k_j)$ over the sum of these. Summing over j first makes a state of fixed size:
$\mathbf S=\sum_j\phi(k_j)v_j^\top$, $(d_\phi,d_v)$, and $\mathbf z=\sum_j\phi(k_j)$, $(d_\phi,)$. The rows of the
catalogue write the transposed state; what comes out is the same.
"""

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor, cat
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import causal_mask

EPS = 1e-6


def check_mapped(name: str, phi_q, phi_k, v, causal: bool) -> None:
    """Refuse mapped queries, keys and values that do not belong together."""
    require(phi_q.ndim == 4, name, "phi_q", "of shape (B, H, L_q, d_phi)", phi_q)
    B, H, L_q, d_phi = phi_q.shape
    fits = phi_k.ndim == 4 and phi_k.shape[:2] == (B, H) and phi_k.shape[3] == d_phi
    require(fits, name, "phi_k", f"of shape (B={B}, H={H}, L_k, d_phi={d_phi})", phi_k)
    require(v.ndim == 4 and v.shape[:3] == phi_k.shape[:3], name, "v", f"of shape {(*phi_k.shape[:3], 'd_v')}", v)
    require(not causal or phi_k.shape[2] == L_q, name, "the number of keys", f"that of queries, {L_q}", phi_k)


def check_state(name: str, state, normaliser, phi_k, v) -> None:
    """Refuse a running state that does not fit."""
    require((state is None) == (normaliser is None), name, "state and normaliser", "given together", "one of them")
    if state is None:
        return
    B, H, _, d_phi = phi_k.shape
    require(state.shape == (B, H, d_phi, v.shape[3]), name, "state", f"of shape {(B, H, d_phi, v.shape[3])}", state)
    require(normaliser.shape == (B, H, d_phi), name, "normaliser", f"of shape {(B, H, d_phi)}", normaliser)


def _draw(rng, L_q: int, L_k: int):
    d_phi, d_v = [(3, 2), (1, 1), (2, 3)][rng.integers(3)]
    return (*(rng.uniform(0.1, 1.5, size=(2, 2, L, d_phi)) for L in (L_q, L_k)), rng.normal(size=(2, 2, L_k, d_v)))


def _example_full(rng):
    return _draw(rng, *[(3, 3), (1, 4), (4, 1)][rng.integers(3)]), {}


@written("linear_attention", example=_example_full)
def linear_attention(
    phi_q: Float[Tensor, "B H L_q m"],
    phi_k: Float[Tensor, "B H L_k m"],
    v: Float[Tensor, "B H L_k d_v"],
    eps: float = EPS,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Attention over all keys in time linear in their number.

    Equation: `linear-attention` $\mathrm{attn}_i=\frac{\mathbf S_V\phi(\mathbf q_i)}{\mathbf S_K\phi(\mathbf q_i)+\varepsilon_0}$
    Shapes: phi_q (B, H, L_q, d_phi), phi_k (B, H, L_k, d_phi), v (B, H, L_k, d_v) -> (B, H, L_q, d_v)
    Raises: ValueError if the shapes do not belong together.
    Source: notes §4.10; Katharopoulos et al. 2020.
    Differs: rows and columns as they have to be for the products to exist (erratum 28).
    """
    check_mapped("linear_attention", phi_q, phi_k, v, causal=False)
    state = phi_k.T @ v  # (B, H, d_phi, d_v)
    normaliser = phi_k.sum(2).unsqueeze(-1)  # (B, H, d_phi, 1)
    return (phi_q @ state) / (phi_q @ normaliser + eps)


def _example_quadratic(rng):
    causal = bool(rng.integers(2))
    return _draw(rng, *((3, 3) if causal else [(2, 3), (1, 1)][rng.integers(2)])), {"causal": causal}


@written("linear_attention_quadratic", example=_example_quadratic)
def linear_attention_quadratic(
    phi_q: Float[Tensor, "B H L_q m"],
    phi_k: Float[Tensor, "B H L_k m"],
    v: Float[Tensor, "B H L_k d_v"],
    causal: bool = False,
    eps: float = EPS,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""The same with all weights written out: what the linear forms are checked against.

    Equation: `linear-attention` $\frac{\sum_j\phi(q_i)\cdot\phi(k_j)\,v_j}{\sum_j\phi(q_i)\cdot\phi(k_j)+\varepsilon_0}$
    Shapes: phi_q (B, H, L_q, d_phi), phi_k (B, H, L_k, d_phi), v (B, H, L_k, d_v) -> (B, H, L_q, d_v)
    Raises: ValueError if the shapes do not belong together, or for a causal form with other numbers of keys.
    Source: notes §4.10.
    """
    check_mapped("linear_attention_quadratic", phi_q, phi_k, v, causal)
    weights = phi_q @ phi_k.T  # (B, H, L_q, L_k)
    if causal:
        weights = weights * causal_mask(phi_q.shape[2]).astype(weights.dtype)
    return (weights @ v) / (weights.sum(-1, keepdims=True) + eps)


def _example_state(rng):
    phi_q, phi_k, v = _draw(rng, *[(5, 5), (1, 1), (4, 4)][rng.integers(3)])
    state = (
        rng.uniform(0.1, 1.0, size=(2, 2, phi_k.shape[3], v.shape[3])),
        rng.uniform(0.1, 1, size=(2, 2, phi_k.shape[3])),
    )
    return (phi_q, phi_k, v, *((None, None) if rng.integers(2) else state)), {}


States = tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H m d_v"], Float[Tensor, "B H m"]]


@written("linear_attention_recurrent", example=_example_state)
def linear_attention_recurrent(
    phi_q: Float[Tensor, "B H L m"],
    phi_k: Float[Tensor, "B H L m"],
    v: Float[Tensor, "B H L d_v"],
    state: Float[Tensor, "B H m d_v"] | None = None,
    normaliser: Float[Tensor, "B H m"] | None = None,
    eps: float = EPS,
) -> States:
    r"""Causal linear attention one token after the other, with a state that does not grow.

    Equation: `linear-attention-causal` $\mathbf S_V^{(t)}=\mathbf S_V^{(t-1)}+\mathbf v_t\phi(\mathbf k_t)^\top$, read with $\phi(\mathbf q_t)$
    Shapes: phi_q, phi_k (B, H, L, d_phi), v (B, H, L, d_v), state (B, H, d_phi, d_v), normaliser (B, H, d_phi)
        -> output (B, H, L, d_v) and the state and normaliser after the last token
    Raises: ValueError if the shapes do not belong together, or only one of state and normaliser is given.
    Source: notes §4.10.
    Differs: token t is read with its own query, not that of another index (erratum 28).
    """
    check_mapped("linear_attention_recurrent", phi_q, phi_k, v, causal=True)
    check_state("linear_attention_recurrent", state, normaliser, phi_k, v)
    S, z = _start(state, normaliser, phi_k, v)
    outputs = []
    for t in range(phi_q.shape[2]):
        now = slice(t, t + 1)
        S = S + phi_k[:, :, now].T @ v[:, :, now]  # (B, H, d_phi, d_v)
        z = z + phi_k[:, :, t]  # (B, H, d_phi)
        q = phi_q[:, :, now]  # (B, H, 1, d_phi)
        outputs.append((q @ S) / (q @ z.unsqueeze(-1) + eps))
    return cat(outputs, axis=2) if outputs else v, S, z  # no tokens: v has the shape of their output


def _example_chunked(rng):
    return _example_state(rng)[0], {"chunk": int(rng.integers(1, 6))}


@written("linear_attention_chunked", example=_example_chunked)
def linear_attention_chunked(
    phi_q: Float[Tensor, "B H L m"],
    phi_k: Float[Tensor, "B H L m"],
    v: Float[Tensor, "B H L d_v"],
    state: Float[Tensor, "B H m d_v"] | None = None,
    normaliser: Float[Tensor, "B H m"] | None = None,
    *,
    chunk: int = 64,
    eps: float = EPS,
) -> States:
    r"""Causal linear attention in chunks: the quadratic form inside, the state of earlier chunks from outside.

    Equation: `linear-attention-causal` $\phi(\mathbf q_t)$ reads $\mathbf S$ of earlier chunks and the masked products inside
    Shapes: phi_q, phi_k (B, H, L, d_phi), v (B, H, L, d_v), state (B, H, d_phi, d_v), normaliser (B, H, d_phi)
        -> output (B, H, L, d_v) and the state and normaliser after the last token
    Raises: ValueError if the shapes do not belong together, chunk is not a positive integer, or only one of state and
        normaliser is given.
    Source: notes §4.10.
    """
    check_mapped("linear_attention_chunked", phi_q, phi_k, v, causal=True)
    check_state("linear_attention_chunked", state, normaliser, phi_k, v)
    require_positive(chunk, "linear_attention_chunked", "chunk", integer=True)
    S, z = _start(state, normaliser, phi_k, v)
    outputs = []
    for start in range(0, phi_q.shape[2], chunk):
        q, k, value = (x[:, :, start : start + chunk] for x in (phi_q, phi_k, v))
        inside = (q @ k.T) * causal_mask(q.shape[2]).astype(q.dtype)  # (B, H, C, C)
        total = inside.sum(-1, keepdims=True) + q @ z.unsqueeze(-1)  # (B, H, C, 1)
        outputs.append((inside @ value + q @ S) / (total + eps))
        S, z = S + k.T @ value, z + k.sum(2)
    return cat(outputs, axis=2) if outputs else v, S, z  # no tokens: v has the shape of their output


def _start(state, normaliser, phi_k, v) -> tuple[Tensor, Tensor]:
    """The state given, or an empty one."""
    if state is not None and normaliser is not None:
        return as_tensor(state), as_tensor(normaliser)
    B, H, _, d_phi = phi_k.shape
    return Tensor(np.zeros((B, H, d_phi, v.shape[3]), v.dtype)), Tensor(np.zeros((B, H, d_phi), v.dtype))
