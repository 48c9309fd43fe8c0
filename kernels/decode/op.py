r"""Attention over a cache on torch tensors: checks, the custom ops for `torch.compile`, and a module.

Forward only: a cache is read when tokens are generated, and then nothing is differentiated. Asking for a gradient
raises an error that names the kernel to train with. float32, float16 or bfloat16 of any layout on a GPU; in Triton's
interpreter (TRITON_INTERPRET=1, no GPU) float32 and float16. Outputs are contiguous, of the dtype of the queries;
log-sum-exps are float32.
"""

import math

import torch
from torch import Tensor, nn

from kernels.checks import check_floats, check_integers, check_places
from kernels.decode import launch
from minillm.checks import require, require_positive


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, max_length: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Attention of the newest L_q tokens of every sequence over its cache, themselves included.

    Equation: `kv-cache` $\mathbf K\leftarrow[\mathbf K;k_t],\ \mathbf V\leftarrow[\mathbf V;v_t],\ o_t=\mathrm{Attn}(q_t,\mathbf K,\mathbf V)$
    Equation: `flash-attention` the merge $m'=\max(m,\tilde m),\ o'=e^{m-m'}o+e^{\tilde m-m'}\tilde o$ of parts of the keys
    Equation: `gqa` query head h reads key/value head $\lfloor hH_{kv}/H\rfloor$, and a group shares one reading
    Equation: `mqa` the same with $H_{kv}=1$
    Equation: `sparse-attention-window` with ``window``: $i-w<j\le i$
    Equation: `logit-softcap` with ``softcap``: $c\tanh(\mathbf s/c)$ of the scores
    Shapes: q (B, H, L_q, d), k (B, H_kv, capacity, d), v (B, H_kv, capacity, d_v), lengths (B,) integers, the number
        of tokens with the new ones (None: capacity) -> o (B, H, L_q, d_v), lse (B, H, L_q) float32. What lies behind
        a length is not read; lengths beyond the capacity count as it. A query without keys gets 0 and -inf.
    Raises: ValueError for shapes that do not fit or a device without kernels; TypeError for other dtypes; RuntimeError
        if a gradient would be needed.
    Source: notes §4.1; lecture07.

    ``max_length`` bounds the lengths where the caller knows a bound, so that the number of splits suits them.
    """
    where = "decode_attention"
    scale = _check(where, q, k, v, scale, window, softcap, max_length)
    require(k.shape[0] == q.shape[0], where, "k", f"a cache of B = {q.shape[0]} sequences", k)
    _check_lengths(where, q, lengths)
    return _decode(q, k, v, lengths, None, scale, window, softcap, max_length)


def paged_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, table: Tensor, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, max_length: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""The same over a cache in pages that lie anywhere: a table says which pages a sequence has, in order.

    Equation: `kv-cache` $o_t=\mathrm{Attn}(q_t,\mathbf K,\mathbf V)$, token j on page ``table[b, j // page]``, place ``j % page``
    Shapes: q (B, H, L_q, d), k (pages, H_kv, page, d), v (pages, H_kv, page, d_v), table (B, n) int32 or int64
        -> o (B, H, L_q, d_v), lse (B, H, L_q) float32. Entries of the table behind a length are not read.
    Raises: as `decode_attention`. Entries outside of the pages are not looked for: they read elsewhere.
    Source: the same equation as without pages.
    """
    where = "paged_decode_attention"
    scale = _check(where, q, k, v, scale, window, softcap, max_length)
    require(k.shape[2] > 0, where, "the page", "at least one token long", k)
    check_integers(where, (("the table", table),), (torch.int32, torch.int64))
    check_places(where, [("q", q), ("the table", table)])
    require(
        table.ndim == 2 and table.shape[0] == q.shape[0], where, "the table", f"of shape (B={q.shape[0]}, n)", table
    )
    require(table.stride(1) == 1 or table.shape[1] <= 1, where, "the table", "one with unit columns", table.stride(),
            hint="Call .contiguous() on it.")  # fmt: skip
    _check_lengths(where, q, lengths)
    return _decode(q, k, v, lengths, table, scale, window, softcap, max_length)


def latent_decode_attention(
    q: Tensor, c: Tensor, lengths: Tensor | None, d_v: int, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, max_length: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Latent attention in absorbed form: one cached vector a token is the key of all heads and, in part, their value.

    Equation: `mla-absorb` $q^\top(\mathbf W_h^{UK\top}c)=(\mathbf W_h^{UK}q)^\top c$: the caller multiplies queries and outputs, here is what lies between
    Equation: `kv-cache-mla` $(\mathbf c^{KV}_t,\mathbf k^R_t)$ is c, read once
    Shapes: q (B, H, L_q, d_c + d_R), c (B, capacity, d_c + d_R), d_v = d_c -> o (B, H, L_q, d_c), lse (B, H, L_q)
        float32; the value of a token is the first d_v columns of its c
    Raises: as `decode_attention`; ValueError unless 0 < d_v <= the width of c.
    Source: deepseek (multi-head latent attention).

    ``scale`` defaults to one over the root of the latent's width; a model that absorbed its matrices passes its own.
    """
    where = "latent_decode_attention"
    require(c.ndim == 3, where, "c", "of shape (B, capacity, d)", c)
    require_positive(d_v, where, "d_v", integer=True)
    require(d_v <= c.shape[2], where, "d_v", f"at most the width of c, {c.shape[2]}", d_v)
    k = c.unsqueeze(1)  # (B, 1, capacity, d)
    scale = _check(where, q, k, k[..., :d_v], scale, window, softcap, max_length)
    require(k.shape[0] == q.shape[0], where, "c", f"a cache of B = {q.shape[0]} sequences", c)
    _check_lengths(where, q, lengths)
    if _traced(q):
        return latent_op(q, c, lengths, d_v, scale, window, softcap, max_length)
    return launch.decode(q, k, k[..., :d_v], lengths, None, scale, window, softcap, True, max_length)


def merge_attention(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    r"""Put attention over disjoint sets of keys together: in any order, any number, with empty parts.

    Equation: `flash-attention` $m'=\max(m,\tilde m),\ \ell'=e^{m-m'}\ell+e^{\tilde m-m'}\tilde\ell,\ o'=e^{m-m'}o+e^{\tilde m-m'}\tilde o$, then $o/\ell$
    Shapes: o (n, ..., d_v), lse (n, ...) float32 -> (..., d_v), (...) float32. A part with lse -inf is empty and its o
        is not read; without any part that is not, 0 and -inf.
    Raises: ValueError for shapes that do not fit; TypeError for other dtypes; RuntimeError if a gradient would be needed.
    Source: notes §4.1.
    """
    where = "merge_attention"
    check_floats(where, (("o", o),))
    check_floats(where, (("lse", lse),), (torch.float32,))
    check_places(where, [("o", o), ("lse", lse)])
    require(o.ndim >= 2, where, "o", "of shape (n, ..., d_v)", o)
    require(lse.shape == o.shape[:-1], where, "lse", f"of shape {tuple(o.shape[:-1])}", lse)
    _refuse_gradient(where, o, lse)
    return merge_op(o, lse) if _traced(o) else launch.merge(o, lse)


def _check(
    where: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None,
    max_length: int | None,
) -> float:  # fmt: skip
    """Refuse what the kernel cannot take, before anything is launched; return the scale."""
    require(q.ndim == 4, where, "q", "of shape (B, H, L_q, d)", q)
    check_floats(where, (("q", q), ("k", k), ("v", v)))
    require(k.ndim == 4 and k.shape[3] == q.shape[3], where, "k", f"of shape (..., H_kv, capacity, d={q.shape[3]})", k)
    require(v.ndim == 4 and v.shape[:3] == k.shape[:3], where, "v", f"of shape {(*k.shape[:3], 'd_v')}", v)
    for name, other in (("k", k), ("v", v)):
        require(other.dtype == q.dtype, where, name, f"of the queries' dtype {q.dtype}", other, error=TypeError)
    H, H_kv = q.shape[1], k.shape[1]
    require(H_kv > 0 and H % H_kv == 0, where, "H_kv", f"a positive divisor of H = {H}", H_kv)
    require(q.shape[3] > 0 and v.shape[3] > 0, where, "the widths", "positive", (q.shape[3], v.shape[3]))
    require(max(q.shape[3], v.shape[3]) <= 1024, where, "the widths", "at most 1024", (q.shape[3], v.shape[3]))
    for name, value in (("window", window), ("max_length", max_length)):
        if value is not None:
            require_positive(value, where, name, integer=True)
    if softcap is not None:
        require_positive(softcap, where, "softcap")
    require(scale is None or math.isfinite(scale), where, "scale", "a finite number", scale)
    _refuse_gradient(where, q, k, v)
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _check_lengths(where: str, q: Tensor, lengths: Tensor | None) -> None:
    if lengths is not None:
        check_integers(where, (("lengths", lengths),), (torch.int32, torch.int64))
        check_places(where, [("q", q), ("lengths", lengths)])
        require(lengths.shape == q.shape[:1], where, "lengths", f"of shape (B={q.shape[0]},)", lengths)
        require(lengths.is_contiguous(), where, "lengths", "contiguous", lengths.stride(),
                hint="Call .contiguous() on them.")  # fmt: skip


def _refuse_gradient(where: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{where}: attention over a cache has no gradient, and an input requires one. "
            "Call it under torch.no_grad() to generate; train with kernels.attention."
        )


def _traced(q: Tensor) -> bool:
    """Whether a tracer is looking, which needs the custom op; the op costs microseconds that plain tensors save."""
    plain = type(q) is Tensor or type(q) is nn.Parameter
    return not plain or torch.compiler.is_compiling()


def _decode(q, k, v, lengths, table, scale, window, softcap, max_length) -> tuple[Tensor, Tensor]:
    if _traced(q):
        return decode_op(q, k, v, lengths, table, scale, window, softcap, max_length)
    return launch.decode(q, k, v, lengths, table, scale, window, softcap, False, max_length)


# ---- the same as custom ops: what a tracer sees


@torch.library.custom_op("minillm::decode_attention", mutates_args=())
def decode_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, table: Tensor | None, scale: float,
    window: int | None, softcap: float | None, max_length: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse."""
    return launch.decode(q, k, v, lengths, table, scale, window, softcap, False, max_length)


@decode_op.register_fake
def _decode_fake(q, k, v, lengths, table, scale, window, softcap, max_length):
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("minillm::latent_decode_attention", mutates_args=())
def latent_op(
    q: Tensor, c: Tensor, lengths: Tensor | None, d_v: int, scale: float,
    window: int | None, softcap: float | None, max_length: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse."""
    k = c.unsqueeze(1)
    return launch.decode(q, k, k[..., :d_v], lengths, None, scale, window, softcap, True, max_length)


@latent_op.register_fake
def _latent_fake(q, c, lengths, d_v, scale, window, softcap, max_length):
    return q.new_empty((*q.shape[:3], d_v)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("minillm::merge_attention", mutates_args=())
def merge_op(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse."""
    return launch.merge(o, lse)


@merge_op.register_fake
def _merge_fake(o, lse):
    return o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])


class DecodeAttention(nn.Module):
    """`decode_attention` that keeps its cache: give it the new queries, keys and values, it appends and attends.

    The cache has room for ``capacity`` tokens of ``batch`` sequences; ``lengths`` (batch,) says how many each has.
    ``window`` and ``softcap`` are those of the function. `reset` forgets everything.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def __init__(
        self, batch: int, n_kv_heads: int, capacity: int, d_head: int, d_v: int | None = None, *,
        window: int | None = None, softcap: float | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.window, self.softcap, self.used = window, softcap, 0
        for name, width in (("keys", d_head), ("values", d_head if d_v is None else d_v)):
            empty = torch.zeros(batch, n_kv_heads, capacity, width, device=device, dtype=dtype)
            self.register_buffer(name, empty, persistent=False)
        self.register_buffer("lengths", torch.zeros(batch, dtype=torch.int32, device=device), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, L_new, d), k (B, H_kv, L_new, d), v (B, H_kv, L_new, d_v) -> (B, H, L_new, d_v)."""
        stop = self.used + k.shape[2]
        require(
            stop <= self.keys.shape[2], "DecodeAttention", "the number of tokens", f"at most {self.keys.shape[2]}", stop
        )
        self.keys[:, :, self.used : stop] = k.detach()
        self.values[:, :, self.used : stop] = v.detach()
        self.used = stop
        self.lengths.fill_(stop)
        return decode_attention(
            q, self.keys, self.values, self.lengths, None, self.window, self.softcap, max_length=stop
        )[0]  # fmt: skip

    def reset(self) -> None:
        """Start anew."""
        self.used = 0
        self.lengths.zero_()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{tuple(self.keys.shape)}, used={self.used}, window={self.window}, softcap={self.softcap}"
