r"""Device code of the forward: a tile of queries stays, tiles of keys and values pass by.

For one query, with scores $s_j=\sigma\langle q,k_j\rangle$ over the keys it sees (and $s\leftarrow c\tanh(s/c)$ with a soft
cap), the softmax is corrected as tiles come: with $m$ the largest score so far, $\ell$ the sum of $e^{s_j-m}$ and $a$ the
sum of $e^{s_j-m}v_j$, a tile with largest score $\tilde m$ gives

$$m'=\max(m,\tilde m),\quad \ell'=e^{m-m'}\ell+\textstyle\sum_je^{s_j-m'},\quad a'=e^{m-m'}a+\sum_je^{s_j-m'}v_j,$$

and at the end $o=a/\ell$, $\mathrm{LSE}=m+\log\ell$, which is all that the backward needs: it makes the probabilities
again as $e^{s_j-\mathrm{LSE}}$. Nothing of size $L_q\times L_k$ is ever stored.

Exponentials are powers of two of scores times $\log_2 e$, one multiply-add and one instruction an element. Scores,
$m$, $\ell$ and $a$ are fp32; the probabilities are rounded to the dtype of V before they meet it, the output once.
A query that sees no key gets 0 and LSE $-\infty$. Lanes outside load 0; keys outside are masked by the interval of
`kernel_masks.py`, and values outside load 0, so that whatever padding holds (NaN too) has no effect.
"""

import triton
import triton.language as tl

from kernels.attention.kernel_masks import keys_of
from kernels.device import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(s, cap):
    """c tanh(s / c), with the tanh made of one power of two."""
    return cap - 2.0 * cap / (tl.exp2(s * (2.0 * LOG2E / cap)) + 1.0)


@triton.jit
def rows_of(X, at, present, in_width, EVEN: tl.constexpr):
    """Load rows of a matrix, 0 where there are none; a width that fills the tile (EVEN) needs no mask of its own."""
    if EVEN:
        return tl.load(X + at, mask=present[:, None], other=0.0)
    return tl.load(X + at, mask=present[:, None] & in_width[None, :], other=0.0)


@triton.jit(do_not_specialize=["H", "group", "L_q", "L_k", "offset", "window"])
def _forward_kernel(
    Q, K, V, OUT, LSE, KEY_LENGTHS, PREFIX, LO, HI,
    H, group, L_q, L_k, offset, window, scale, cap,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_o_batch, stride_o_head, stride_o_row,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: its outputs and log-sum-exps.

    KEY_LENGTHS (B,), PREFIX (B,) and LO, HI (L_q,), the intervals of packed documents, may be None. LSE (B, H, L_q) is
    contiguous, OUT has unit columns. Query head h reads key/value head h // group. Blocks of a causal mask are
    taken from the last, which has most to do, so that the short ones fill the gaps at the end.
    """
    program = tl.program_id(0)
    n_blocks = tl.cdiv(L_q, BLOCK_M)
    block = program % n_blocks
    if CAUSAL:
        block = n_blocks - 1 - block
    head = (program // n_blocks) % H
    batch = program // n_blocks // H
    b, h, h_kv = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    PACKED: tl.constexpr = LO is not None
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_DV: tl.constexpr = DV == BLOCK_DV
    n_keys = L_k
    if KEY_LENGTHS is not None:
        n_keys = tl.minimum(tl.maximum(tl.load(KEY_LENGTHS + b).to(tl.int32), 0), L_k)
    prefix = 0
    if PREFIX is not None:
        prefix = tl.load(PREFIX + b).to(tl.int32)

    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    far = rows.to(tl.int64)
    d, dv = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_DV).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_d, in_dv = d < D, dv < DV
    q = tl.load(
        Q + b * stride_q_batch + h * stride_q_head + far[:, None] * stride_q_row + d[None, :] * stride_q_col,
        mask=(rows < L_q)[:, None] & in_d[None, :], other=0.0,
    )  # fmt: skip
    K += b * stride_k_batch + h_kv * stride_k_head
    V += b * stride_v_batch + h_kv * stride_v_head
    at_k = n[:, None] * stride_k_row + d[None, :] * stride_k_col
    at_v = n[:, None] * stride_v_row + dv[None, :] * stride_v_col

    lo, hi = keys_of(rows, n_keys, offset, window, prefix, LO, HI, CAUSAL, WINDOWED, PACKED, L_q)
    final = tl.minimum(start + BLOCK_M, L_q) - 1
    lo_first, hi_first = keys_of(start, n_keys, offset, window, prefix, LO, HI, CAUSAL, WINDOWED, PACKED, L_q)
    lo_final, hi_final = keys_of(final, n_keys, offset, window, prefix, LO, HI, CAUSAL, WINDOWED, PACKED, L_q)
    stop = tl.maximum(hi_final, 0)
    begin = lo_first // BLOCK_N * BLOCK_N
    clear = tl.minimum(tl.cdiv(lo_final, BLOCK_N) * BLOCK_N, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
    clear_end = tl.maximum(tl.maximum(hi_first, 0) // BLOCK_N * BLOCK_N, clear)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    a = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for n0 in range(begin, stop, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        row = tl.cast(n0, tl.int64)
        k = rows_of(K + row * stride_k_row, at_k, cols < n_keys, in_d, EVEN_D)  # (BLOCK_N, BLOCK_D)
        s = dot(q, tl.trans(k), None)  # (BLOCK_M, BLOCK_N)
        unit = scale * LOG2E  # from here on in units of log 2
        if CAPPED:
            s = capped(s * scale, cap)
            unit = LOG2E
        if (n0 < clear) | (n0 >= clear_end):  # otherwise all rows see all columns
            s = tl.where((cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * unit)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # exp2(-inf - 0) is 0, exp2(-inf + inf) is not
        p = tl.exp2(s * unit - shift[:, None])
        old = tl.exp2(top - shift)
        v = rows_of(V + row * stride_v_row, at_v, cols < n_keys, in_dv, EVEN_DV)  # (BLOCK_N, BLOCK_DV)
        total = total * old + tl.sum(p, axis=1)
        a = dot(p.to(v.dtype), v, a * old[:, None])
        top = new_top

    some = total > 0.0
    a = a / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(LSE + (b * H + h) * L_q + far, lse, mask=rows < L_q)
    tl.store(
        OUT + b * stride_o_batch + h * stride_o_head + far[:, None] * stride_o_row + dv[None, :],
        a.to(OUT.dtype.element_ty), mask=(rows < L_q)[:, None] & in_dv[None, :],
    )  # fmt: skip
