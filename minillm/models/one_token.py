r"""One new token through the decoder, in plain NumPy: what a generated token costs, and nothing else.

For a single position every product is of a matrix and a vector, memory decides how fast it goes, and what Python adds
around each operation shows: with tensors it takes a third as long as the products. So this step, the same equations
as in :mod:`minillm.models.decoder`, works on arrays and knows no gradient.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minillm.nn import KVCache


def one_token(model: Any, ids: Int[np.ndarray, " B"], cache: KVCache) -> Float[np.ndarray, "B d_model"]:
    r"""The normalised stream after one new token of each sequence, which the cache then holds.

    Equation: `kv-cache` append $k_t,v_t$; attend $q_t$ over $1..t$
    Equation: `pre-ln` $\mathbf x\leftarrow\mathbf x+F(\mathrm{RMSNorm}(\mathbf x))$ for attention, then for the FFN
    Shapes: ids (B,) in [0, V) -> (B, d_model)
    Raises: ValueError if the cache is full.
    Source: notes §4.3; lecture06 (the LLaMA slides).

    ``model`` is a Decoder, whose module imports this one.
    """
    turn = _rotation(model, int(cache.reserve(1)[0]))
    eps, d_ff = model.config.norm_eps, model.config.d_ff or 0
    x = model.embedding.weight.data[ids]  # (B, d_model)
    with np.errstate(over="ignore"):  # exp(-z) of a gate far below 0 is infinite, and the gate 0
        for i, block in enumerate(model.blocks):
            qkv = _normalised(x, block.attention_norm.gain.data, eps) @ block.attention.w_qkv.data.T
            x += _attention(model, qkv, turn, cache, i) @ block.attention.w_out.data.T
            h = _normalised(x, block.ffn_norm.gain.data, eps) @ block.ffn.w_value_gate.data.T  # (B, 2 d_ff)
            value, gate = h[:, :d_ff], h[:, d_ff:]
            value *= gate / (1 + np.exp(-gate))
            x += value @ block.ffn.w_down.data.T
    cache.advance(1)
    return _normalised(x, model.final_norm.gain.data, eps)


def lay_out(model: Any) -> None:
    """Put the wide matrices of a decoder into the order in which products with one vector read memory fastest.

    Measured on two cores in GB/s, by rows (d_out, d_in) and by columns: value and gate 26 and 32, head 28 and 42,
    attention's output 14 and 17; the others are faster by rows. Names, shapes and values stay.
    """
    wide = [matrix for block in model.blocks for matrix in (block.ffn.w_value_gate, block.attention.w_out)]
    for matrix in (*wide, model.output_weight):
        matrix.data = np.asfortranarray(matrix.data)


def _normalised(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    squares = np.vecdot(x, x)[:, None]  # (B, 1)
    return x * (gain / np.sqrt(squares / x.dtype.type(x.shape[1]) + x.dtype.type(eps)))


def _rotation(model: Any, position: int) -> np.ndarray:
    """What turns the queries and keys of all heads at one position: $e^{i\\varphi}$ of each pair, queries scaled."""
    c = model.config
    factor = np.exp(1j * model._angles[position])  # (d_head / 2,)
    scale = np.repeat([model.blocks[0].attention.scale, 1.0], [c.n_heads, c.n_kv_heads or c.n_heads])
    return (scale[:, None] * factor).astype(np.result_type(model.embedding.weight.dtype, np.complex64))


def _attention(model: Any, qkv: np.ndarray, turn: np.ndarray, cache: KVCache, layer: int) -> np.ndarray:
    """Attention of one position over the cache: (B, (H + 2 H_kv) d_head) -> (B, H d_head)."""
    c = model.config
    B, H, H_kv, d = len(qkv), c.n_heads, c.n_kv_heads or c.n_heads, c.d_head
    heads = qkv.reshape(B, H + 2 * H_kv, d)
    qk = heads[:, : H + H_kv]
    if c.rope_pairing == "interleaved":
        pairs = qk.view(turn.dtype)
        pairs *= turn
    else:
        a, b, cos, sin = qk[..., : d // 2], qk[..., d // 2 :], np.real(turn), np.imag(turn)
        qk[...] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    keys, values = cache.write(layer, qk[:, H:, None], heads[:, H + H_kv :, None])  # (B, H_kv, t, d_head)
    s = qk[:, :H].reshape(B, H_kv, H // H_kv, d) @ keys.swapaxes(-1, -2)  # (B, H_kv, H/H_kv, t)
    s -= s.max(-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(-1, keepdims=True)
    return (s @ values).reshape(B, H * d)
