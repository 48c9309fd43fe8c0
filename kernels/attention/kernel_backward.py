r"""Device code of the backward: three passes, each of which writes its own results and nobody else's.

With $p_{ij}=e^{s_{ij}-\mathrm{LSE}_i}$ made again from the saved log-sum-exp, and bars for what arrives,

$$\bar v_j=\sum_ip_{ij}\bar o_i,\qquad \bar p_{ij}=\langle\bar o_i,v_j\rangle,\qquad
  \bar s_{ij}=p_{ij}\,(\bar p_{ij}-\delta_i),\qquad \delta_i=\langle o_i,\bar o_i\rangle-\overline{\mathrm{LSE}}_i,$$
$$\bar q_i=\sigma\sum_j\bar s_{ij}k_j,\qquad \bar k_j=\sigma\sum_i\bar s_{ij}q_i,$$

where $\sum_jp_{ij}\bar p_{ij}=\langle o_i,\bar o_i\rangle$ spares a pass over the row, and what arrives at the log-sum-exp
costs one subtraction. A soft cap multiplies $\bar s_{ij}$ by $1-(s_{ij}/c)^2$.

1. `_delta_kernel`: one number a query.
2. `_backward_keys_kernel`: a tile of keys stays, all queries that see it pass by, of every query head of its group, so
   dK and dV are summed over the group in registers and K and V are never expanded.
3. `_backward_queries_kernel`: a tile of queries stays, its keys pass by.

Scores and $\bar p$ are computed in both 2 and 3: seven products a tile where five would do, if programs could add into
one dQ. They could only with atomics, whose order changes from run to run; without them, two runs agree in every bit.
"""

import triton
import triton.language as tl

from kernels.attention.kernel_forward import LOG2E, capped, rows_of
from kernels.attention.kernel_masks import keys_of, queries_of
from kernels.device import dot


@triton.jit(do_not_specialize=["H", "L_q", "n_rows"])
def _delta_kernel(
    OUT, DO, DLSE, DELTA,
    n_rows, H, L_q,
    stride_o_batch, stride_o_head, stride_o_row,
    stride_do_batch, stride_do_head, stride_do_row, stride_do_col,
    stride_dlse_batch, stride_dlse_head, stride_dlse_row,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = <o, do> - dlse for BLOCK_M of the B H L_q rows. DELTA is contiguous, DLSE may be None."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < n_rows
    i, head, batch = rows % L_q, rows // L_q % H, rows // L_q // H
    dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    mask = there[:, None] & (dv < DV)[None, :]
    at_o = batch * stride_o_batch + head * stride_o_head + i * stride_o_row
    at_do = batch * stride_do_batch + head * stride_do_head + i * stride_do_row
    o = tl.load(OUT + at_o[:, None] + dv[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(DO + at_do[:, None] + dv[None, :] * stride_do_col, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, axis=1)
    if DLSE is not None:
        at = batch * stride_dlse_batch + head * stride_dlse_head + i * stride_dlse_row
        delta -= tl.load(DLSE + at, mask=there, other=0.0)
    tl.store(DELTA + rows, delta, mask=there)


@triton.jit
def _probabilities(s, lse, scale, cap, CAPPED: tl.constexpr):
    """p from scores that are not scaled yet, and the derivative of the soft cap (1 without one)."""
    slope = 1.0
    unit = scale * LOG2E
    if CAPPED:
        s = capped(s * scale, cap)
        part = s * (1.0 / cap)
        slope = 1.0 - part * part
        unit = LOG2E
    return tl.exp2(s * unit - lse), slope


@triton.jit(do_not_specialize=["H_kv", "group", "L_q", "L_k", "offset", "window"])
def _backward_keys_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV_OUT, KEY_LENGTHS, PREFIX, FIRST, LAST,
    H_kv, group, L_q, L_k, offset, window, scale, cap,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_do_batch, stride_do_head, stride_do_row, stride_do_col,
    stride_dk_batch, stride_dk_head, stride_dk_row,
    stride_dv_batch, stride_dv_head, stride_dv_row,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key/value head: its dK and dV, summed over the group's query heads in order.

    FIRST and LAST (L_k,) are the intervals of packed documents or None. LSE and DELTA (B, H, L_q) are contiguous.
    The first block of keys of a causal mask has most to do, and comes first.
    """
    program = tl.program_id(0)
    n_blocks = tl.cdiv(L_k, BLOCK_N)
    block = program % n_blocks
    head = (program // n_blocks) % H_kv
    batch = program // n_blocks // H_kv
    b, h_kv = batch.to(tl.int64), head.to(tl.int64)
    PACKED: tl.constexpr = FIRST is not None
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_DV: tl.constexpr = DV == BLOCK_DV
    n_keys = L_k
    if KEY_LENGTHS is not None:
        n_keys = tl.minimum(tl.maximum(tl.load(KEY_LENGTHS + b).to(tl.int32), 0), L_k)
    prefix = 0
    if PREFIX is not None:
        prefix = tl.load(PREFIX + b).to(tl.int32)

    start = block * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    far = cols.to(tl.int64)
    d, dv_cols = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_DV).to(tl.int64)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    in_d, in_dv = d < D, dv_cols < DV
    real = cols < n_keys
    k = tl.load(
        K + b * stride_k_batch + h_kv * stride_k_head + far[:, None] * stride_k_row + d[None, :] * stride_k_col,
        mask=real[:, None] & in_d[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(
        V + b * stride_v_batch + h_kv * stride_v_head + far[:, None] * stride_v_row + dv_cols[None, :] * stride_v_col,
        mask=real[:, None] & in_dv[None, :], other=0.0,
    )  # fmt: skip
    at_q = m[:, None] * stride_q_row + d[None, :] * stride_q_col
    at_do = m[:, None] * stride_do_row + dv_cols[None, :] * stride_do_col

    first, last = queries_of(cols, n_keys, offset, window, prefix, FIRST, LAST, CAUSAL, WINDOWED, PACKED, L_q, L_k)
    end = tl.minimum(start + BLOCK_N, n_keys) - 1  # the last key that is there, if one is
    first_0, last_0 = queries_of(start, n_keys, offset, window, prefix, FIRST, LAST, CAUSAL, WINDOWED, PACKED, L_q, L_k)
    first_1, last_1 = queries_of(end, n_keys, offset, window, prefix, FIRST, LAST, CAUSAL, WINDOWED, PACKED, L_q, L_k)
    stop = tl.where(start < n_keys, tl.maximum(last_1, 0), 0)
    begin = first_0 // BLOCK_M * BLOCK_M
    clear = tl.minimum(tl.cdiv(first_1, BLOCK_M) * BLOCK_M, tl.cdiv(stop, BLOCK_M) * BLOCK_M)
    clear_end = tl.maximum(tl.maximum(last_0, 0) // BLOCK_M * BLOCK_M, clear)
    clear_end = tl.where(start + BLOCK_N <= n_keys, clear_end, clear)  # a block that is not full is masked throughout

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for g in range(group):
        h = h_kv * group + g
        q_head = Q + b * stride_q_batch + h * stride_q_head
        do_head = DO + b * stride_do_batch + h * stride_do_head
        of_head = (b * H_kv * group + h) * L_q
        for m0 in range(begin, stop, BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            row, there = tl.cast(m0, tl.int64), rows < L_q
            q = rows_of(q_head + row * stride_q_row, at_q, there, in_d, EVEN_D)  # (BLOCK_M, BLOCK_D)
            lse = tl.load(LSE + of_head + rows.to(tl.int64), mask=there, other=0.0) * LOG2E
            s = dot(k, tl.trans(q), None)  # (BLOCK_N, BLOCK_M)
            p, slope = _probabilities(s, lse[None, :], scale, cap, CAPPED)
            if (m0 < clear) | (m0 >= clear_end):  # otherwise all queries see all keys
                p = tl.where((rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None]), p, 0.0)
            do = rows_of(do_head + row * stride_do_row, at_do, there, in_dv, EVEN_DV)  # (BLOCK_M, BLOCK_DV)
            dv = dot(p.to(do.dtype), do, dv)
            dp = dot(v, tl.trans(do), None)
            delta = tl.load(DELTA + of_head + rows.to(tl.int64), mask=there, other=0.0)
            ds = p * (dp - delta[None, :]) * slope
            dk = dot(ds.to(q.dtype), q, dk)

    here = (cols < L_k)[:, None]
    tl.store(
        DK + b * stride_dk_batch + h_kv * stride_dk_head + far[:, None] * stride_dk_row + d[None, :],
        (dk * scale).to(DK.dtype.element_ty), mask=here & in_d[None, :],
    )  # fmt: skip
    tl.store(
        DV_OUT + b * stride_dv_batch + h_kv * stride_dv_head + far[:, None] * stride_dv_row + dv_cols[None, :],
        dv.to(DV_OUT.dtype.element_ty), mask=here & in_dv[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "group", "L_q", "L_k", "offset", "window"])
def _backward_queries_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, KEY_LENGTHS, PREFIX, LO, HI,
    H, group, L_q, L_k, offset, window, scale, cap,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_do_batch, stride_do_head, stride_do_row, stride_do_col,
    stride_dq_batch, stride_dq_head, stride_dq_row,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: its dQ, over the same tiles of keys as in the forward."""
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
    far, there = rows.to(tl.int64), rows < L_q
    d, dv = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_DV).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_d, in_dv = d < D, dv < DV
    q = tl.load(
        Q + b * stride_q_batch + h * stride_q_head + far[:, None] * stride_q_row + d[None, :] * stride_q_col,
        mask=there[:, None] & in_d[None, :], other=0.0,
    )  # fmt: skip
    do = tl.load(
        DO + b * stride_do_batch + h * stride_do_head + far[:, None] * stride_do_row + dv[None, :] * stride_do_col,
        mask=there[:, None] & in_dv[None, :], other=0.0,
    )  # fmt: skip
    lse = tl.load(LSE + (b * H + h) * L_q + far, mask=there, other=0.0) * LOG2E
    delta = tl.load(DELTA + (b * H + h) * L_q + far, mask=there, other=0.0)
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

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n0 in range(begin, stop, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        row, real = tl.cast(n0, tl.int64), cols < n_keys
        k = rows_of(K + row * stride_k_row, at_k, real, in_d, EVEN_D)  # (BLOCK_N, BLOCK_D)
        v = rows_of(V + row * stride_v_row, at_v, real, in_dv, EVEN_DV)  # (BLOCK_N, BLOCK_DV)
        s = dot(q, tl.trans(k), None)  # (BLOCK_M, BLOCK_N)
        dp = dot(do, tl.trans(v), None)
        p, slope = _probabilities(s, lse[:, None], scale, cap, CAPPED)
        if (n0 < clear) | (n0 >= clear_end):
            p = tl.where((cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None]), p, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq = dot(ds.to(k.dtype), k, dq)
    tl.store(
        DQ + b * stride_dq_batch + h * stride_dq_head + far[:, None] * stride_dq_row + d[None, :],
        (dq * scale).to(DQ.dtype.element_ty), mask=there[:, None] & in_d[None, :],
    )  # fmt: skip
