r"""Device code of the products: every expert's rows times its own matrices, with nothing in between.

Row j of the packed rows belongs to assignment `ORDER[j]`, hence to token $\pi(j)$ = ORDER[j] // k. With [value; gate]
halves of $W^{\rm in}$ and cotangent $\bar Z$ of the layer's output, and a bar for cotangents throughout,

$$H_j=X_{\pi(j)}W^{{\rm in}\top},\quad A_j=V_j\odot\mathrm{SiLU}(G_j)\ \text{with}\ H_j=[V_j;G_j],\quad Y_j=A_jW^{{\rm down}\top};$$
$$U_j=\bar Z_{\pi(j)}W^{\rm down},\quad \bar g_j=\langle A_j,U_j\rangle\ (=\langle\bar Z_{\pi(j)},Y_j\rangle),\quad
  \bar A_j=g_jU_j,\quad \bar X_j=\bar H_jW^{\rm in},$$
$$\bar W^{\rm in}_e=\sum_{j\in e}\bar H_j^\top X_{\pi(j)},\qquad
  \bar W^{\rm down}_e=\sum_{j\in e}\bar Z_{\pi(j)}^\top(g_jA_j).$$

The packed copies of X and $\bar Z$ never exist: a tile of the left factor is loaded row by row from where the tokens
are. The SwiGLU and its derivative happen while the products are still in registers. $Y$ and $U$ are not kept.

A program has one tile of rows of one expert, found in the list `TILES` (`kernel_packing.py`), and one tile of
columns; programs are launched GROUP row tiles at a time over all columns, so that neighbours share an expert's matrix
and the tokens' rows in the second-level cache. The weights' gradients have a program for every tile of every expert's
matrix: it walks that expert's rows in order. An expert without rows writes zeros. No atomics.

Rounding: products are accumulated in fp32. H, A and what is handed to the next product are rounded once when stored;
the gate's gradient is added up in fp32, in one share for every tile of columns.
"""

import triton
import triton.language as tl

from kernels.device import dot


@triton.jit
def _own_tile(TILES, n_tiles, n_cols, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Expert, first row, end of the expert's rows, and the tile of columns of this program."""
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    per_group = GROUP * col_tiles
    group = tl.program_id(0) // per_group
    height = tl.minimum(n_tiles - group * GROUP, GROUP)
    rest = tl.program_id(0) % per_group
    tile = group * GROUP + rest % height
    expert = tl.load(TILES + tile)
    first = tl.load(TILES + n_tiles + tile)
    end = tl.load(TILES + 2 * n_tiles + tile)
    return expert, first, end, rest // height


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _left_rows(ORDER, rows, mask, top_k, GATHER: tl.constexpr):
    """Where the rows of the left factor lie: at their tokens, or in place."""
    if GATHER:
        return (tl.load(ORDER + rows, mask=mask, other=0) // top_k).to(tl.int64)
    else:
        return rows


@triton.jit(do_not_specialize=["n_tiles"])
def _grouped_kernel(
    X, ORDER, W, TILES, Y,
    n_tiles, n_cols, n_inner, top_k, stride_x_row, stride_x_col, stride_w_expert, stride_w_inner, stride_w_col,
    GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y[j] = X[row of j] @ W[e]: Y (A, n_cols) contiguous; rows of nobody give zeros."""
    expert, first, end, strip = _own_tile(TILES, n_tiles, n_cols, BLOCK_N, GROUP)
    if first >= end:
        return
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = strip.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = rows < end
    in_cols = cols < n_cols
    left = _left_rows(ORDER, rows, in_rows, top_k, GATHER)
    x_at = X + left[:, None] * stride_x_row + inner.to(tl.int64)[None, :] * stride_x_col
    w_at = W + expert.to(tl.int64) * stride_w_expert
    w_at += inner.to(tl.int64)[:, None] * stride_w_inner + cols[None, :] * stride_w_col
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.where(expert < 0, 0, n_inner), BLOCK_K):
        inside = inner < n_inner - start
        x = tl.load(x_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None] & in_cols[None, :], other=0.0)
        acc = dot(x, w, acc)
        x_at += tl.cast(BLOCK_K, tl.int64) * stride_x_col
        w_at += tl.cast(BLOCK_K, tl.int64) * stride_w_inner
    out = Y + rows[:, None] * n_cols + cols[None, :]
    tl.store(out, acc.to(Y.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["n_tiles"])
def _up_kernel(
    X, ORDER, W, TILES, H, A,
    n_tiles, d_ff, n_inner, top_k, stride_x_row, stride_x_col, stride_w_expert, stride_w_inner, stride_w_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A[j] = value * SiLU(gate) with [value; gate] = X[token of j] @ W_in[e]^T; H (A, 2 d_ff) keeps both, or is None."""
    expert, first, end, strip = _own_tile(TILES, n_tiles, d_ff, BLOCK_N, GROUP)
    if first >= end:
        return
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = strip.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = rows < end
    in_cols = cols < d_ff
    left = _left_rows(ORDER, rows, in_rows, top_k, True)
    x_at = X + left[:, None] * stride_x_row + inner.to(tl.int64)[None, :] * stride_x_col
    value_at = W + expert.to(tl.int64) * stride_w_expert
    value_at += inner.to(tl.int64)[:, None] * stride_w_inner + cols[None, :] * stride_w_col
    gate_at = value_at + tl.cast(d_ff, tl.int64) * stride_w_col
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.where(expert < 0, 0, n_inner), BLOCK_K):
        inside = inner < n_inner - start
        x = tl.load(x_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
        w = tl.load(value_at, mask=inside[:, None] & in_cols[None, :], other=0.0)
        value = dot(x, w, value)
        w = tl.load(gate_at, mask=inside[:, None] & in_cols[None, :], other=0.0)
        gate = dot(x, w, gate)
        x_at += tl.cast(BLOCK_K, tl.int64) * stride_x_col
        value_at += tl.cast(BLOCK_K, tl.int64) * stride_w_inner
        gate_at += tl.cast(BLOCK_K, tl.int64) * stride_w_inner
    mask = in_rows[:, None] & in_cols[None, :]
    if H is not None:  # what is kept is what the backward computes with
        out = H + rows[:, None] * (2 * d_ff) + cols[None, :]
        tl.store(out, value.to(H.dtype.element_ty), mask=mask)
        tl.store(out + d_ff, gate.to(H.dtype.element_ty), mask=mask)
    a = value * gate * _sigmoid(gate)
    tl.store(A + rows[:, None] * d_ff + cols[None, :], a.to(A.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tiles", "n_rows"])
def _down_backward_kernel(
    DZ, ORDER, W, TILES, H, GATES, DH, GA, SHARES,
    n_tiles, n_rows, d_ff, n_inner, top_k, stride_dz_row, stride_dz_col, stride_w_expert, stride_w_inner, stride_w_col,
    stride_gates_row, stride_gates_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """U[j] = DZ[token of j] @ W_down[e], and from it DH (A, 2 d_ff), the weighted GA (A, d_ff), and a share of <A, U>.

    SHARES (column tiles, A) fp32 holds the part of the gate's gradient that this tile of columns has.
    """
    expert, first, end, strip = _own_tile(TILES, n_tiles, d_ff, BLOCK_N, GROUP)
    if first >= end:
        return
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = strip.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = rows < end
    in_cols = cols < d_ff
    assignment = tl.load(ORDER + rows, mask=in_rows, other=0)
    served = in_rows & (assignment >= 0)
    token = (assignment // top_k).to(tl.int64)
    dz_at = DZ + token[:, None] * stride_dz_row + inner.to(tl.int64)[None, :] * stride_dz_col
    w_at = W + expert.to(tl.int64) * stride_w_expert
    w_at += inner.to(tl.int64)[:, None] * stride_w_inner + cols[None, :] * stride_w_col
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.where(expert < 0, 0, n_inner), BLOCK_K):
        inside = inner < n_inner - start
        dz = tl.load(dz_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None] & in_cols[None, :], other=0.0)
        u = dot(dz, w, u)
        dz_at += tl.cast(BLOCK_K, tl.int64) * stride_dz_col
        w_at += tl.cast(BLOCK_K, tl.int64) * stride_w_inner

    mask = in_rows[:, None] & in_cols[None, :]
    slot = (assignment % top_k).to(tl.int64)
    g = tl.load(GATES + token * stride_gates_row + slot * stride_gates_col, mask=served, other=0.0).to(tl.float32)
    h_at = rows[:, None] * (2 * d_ff) + cols[None, :]
    value = tl.load(H + h_at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(H + h_at + d_ff, mask=mask, other=0.0).to(tl.float32)
    sigma = _sigmoid(gate)
    silu = gate * sigma
    a = value * silu
    tl.store(SHARES + strip.to(tl.int64) * n_rows + rows, tl.sum(a * u, axis=1), mask=in_rows)
    tl.store(GA + rows[:, None] * d_ff + cols[None, :], (g[:, None] * a).to(GA.dtype.element_ty), mask=mask)
    da = g[:, None] * u
    tl.store(DH + h_at, (da * silu).to(DH.dtype.element_ty), mask=mask)
    dgate = da * value * sigma * (1.0 + gate * (1.0 - sigma))
    tl.store(DH + h_at + d_ff, dgate.to(DH.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient_kernel(
    P, Q, ORDER, OFFSETS, DW,
    n_out, n_in, top_k, stride_p_row, stride_p_col, stride_q_row, stride_q_col,
    GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """DW[e] = sum over the rows j of e of P[j]^T Q[j]: DW (E, n_out, n_in) contiguous. BLOCK_K rows at a time."""
    in_tiles = tl.cdiv(n_in, BLOCK_N)
    tiles = tl.cdiv(n_out, BLOCK_M) * in_tiles
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    outs = (tile // in_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ins = (tile % in_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_outs = outs < n_out
    in_ins = ins < n_in
    end = tl.load(OFFSETS + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.load(OFFSETS + expert), end, BLOCK_K):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        there = rows < end
        at = _left_rows(ORDER, rows, there, top_k, GATHER_P)
        p_at = P + at[None, :] * stride_p_row + outs[:, None] * stride_p_col
        p = tl.load(p_at, mask=in_outs[:, None] & there[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        at = _left_rows(ORDER, rows, there, top_k, GATHER_Q)
        q_at = Q + at[:, None] * stride_q_row + ins[None, :] * stride_q_col
        q = tl.load(q_at, mask=there[:, None] & in_ins[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = dot(p, q, acc)
    out = DW + expert * n_out * n_in + outs[:, None] * n_in + ins[None, :]
    tl.store(out, acc.to(DW.dtype.element_ty), mask=in_outs[:, None] & in_ins[None, :])
