r"""Latent attention over a cache, with absorbed weights; no gradient."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor, is_recording
from minillm.autograd.tape import wrap
from minillm.checks import require


def cached_latent_attention(
    q_c: Tensor, q_r: Tensor, joint: np.ndarray, w_up_kv: Tensor, keep: np.ndarray | None = None, bias: Any = None
) -> Tensor:
    r"""Attend to cached latents without unpacking them, for one new token or several.

    Content and rotary parts lie side by side in the cache, so both kinds of score are one product:
    $[\mathbf W^{UK}_hq^C;q^R]^\top[c;k^R]$. The heads are the rows of that product, since all read the same cache.
    A long text read in one piece is cheaper unpacked; the result is the same.

    Equation: `mla-absorb` $(\mathbf W_h^{UK}q)^\top c$ and $(\sum_s\alpha_sc_s)\mathbf W_h^{UV}$
    Equation: `kv-cache-mla` reads $\mathbf c^{KV}$ and the rope key of all positions
    Shapes: q_c (B, H, L, d_head), q_r (B, H, L, d_R), joint (B, S, d_c + d_R), w_up_kv (H (d_head + d_v), d_c), keep and
        bias broadcastable to (B, H, L, S) -> (B, L, H, d_v)
    Raises: ValueError if the widths do not fit; RuntimeError if a gradient would be needed.
    Source: deepseek (the slides on latent attention).
    """
    if is_recording() and any(t.requires_grad for t in (q_c, q_r, w_up_kv)):
        raise RuntimeError(
            "cached_latent_attention: decoding with a cache has no gradient. Wrap it in `with no_grad():`."
        )
    B, H, L, d_head = q_c.shape
    d_c, d_R = w_up_kv.shape[1], q_r.shape[3]
    require(
        joint.ndim == 3 and joint.shape[0] == B and joint.shape[2] == d_c + d_R,
        "cached_latent_attention",
        "the cache",
        f"of shape (B={B}, S, d_c + d_R = {d_c + d_R})",
        joint,
    )
    require(len(w_up_kv) % H == 0, "cached_latent_attention", "w_up_kv", f"of a multiple of H = {H} rows", w_up_kv)
    up = w_up_kv.data.reshape(H, -1, d_c)  # (H, d_head + d_v, d_c)
    scale = joint.dtype.type(1.0 / np.sqrt(d_head + d_R))
    q = np.empty((B, H, L, d_c + d_R), joint.dtype)
    np.matmul(q_c.data, up[:, :d_head], out=q[..., :d_c])
    q[..., d_c:] = q_r.data
    q *= scale
    s = (q.reshape(B, H * L, d_c + d_R) @ joint.swapaxes(1, 2)).reshape(B, H, L, -1)
    if bias is not None:
        s += bias.data if isinstance(bias, Tensor) else bias
    if keep is not None:
        s = np.where(keep, s, s.dtype.type(-np.inf))
    top = s.max(-1, keepdims=True)
    s -= np.where(np.isfinite(top), top, 0)
    np.exp(s, out=s)
    total = s.sum(-1, keepdims=True)
    s /= np.where(total == 0, 1, total)
    context = (s.reshape(B, H * L, -1) @ joint[..., :d_c]).reshape(B, H, L, d_c)
    out = context @ up[:, d_head:].swapaxes(1, 2)  # (B, H, L, d_v)
    return wrap(np.ascontiguousarray(out.swapaxes(1, 2)))
