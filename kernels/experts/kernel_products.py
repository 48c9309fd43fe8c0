r"""Device code of the products: every expert's rows times its own matrices, with nothing in between.

Row j of the packed rows belongs to assignment `ORDER[j]`, hence to token $\pi(j)$ = ORDER[j] // k. With [value; gate]
halves of $W^{\rm in}$ and cotangent $\bar Z$ of the layer's output, and a bar for cotangents throughout,

$$H_j=X_{\pi(j)}W^{{\rm in}\top},\quad A_j=V_j\odot\mathrm{SiLU}(G_j)\ \text{with}\ H_j=[V_j;G_j],\quad Y_j=A_jW^{{\rm down}\top};$$
$$U_j=\bar Z_{\pi(j)}W^{\rm down},\quad \bar g_j=\langle A_j,U_j\rangle\ (=\langle\bar Z_{\pi(j)},Y_j\rangle),\quad
  \bar A_j=g_jU_j,\quad \bar X_j=\bar H_jW^{\rm in},$$
$$\bar W^{\rm in}_e=\sum_{j\in e}\bar H_j^\top X_{\pi(j)},\qquad
  \bar W^{\rm down}_e=\sum_{j\in e}\bar Z_{\pi(j)}^\top(g_jA_j).$$

The packed copies of X and $\bar Z$ never exist: a tile of the left factor is loaded row by row from where the tokens
are. The SwiGLU happens while the products are still in registers; its derivative has a pass of its own, because U, H
and three results do not fit into registers beside an accumulator. $Y$ is not kept.

A program has one tile of rows of one expert, found in the list `TILES` (`kernel_packing.py`), and one tile of
columns; programs are launched GROUP row tiles at a time over all columns, so that neighbours share an expert's matrix
and the tokens' rows in the second-level cache. The weights' gradients have a program for every tile of every expert's
matrix: it walks that expert's rows in order. An expert without rows writes zeros. No atomics.

Rounding: products are accumulated in fp32. H, A, U and what is handed to the next product are rounded once when
stored; the gate's gradient is added up in fp32, a row of U and A at a time.
"""

# Triton's functions are typed by their stand-ins, some of which never return.
# pyright: reportGeneralTypeIssues=false

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
    at = TILES + (group * GROUP + rest % height).to(tl.int64)
    expert = tl.load(at)
    first = tl.load(at + n_tiles)
    end = tl.load(at + 2 * tl.cast(n_tiles, tl.int64))
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
    a = (value * gate * _sigmoid(gate)).to(A.dtype.element_ty)
    if H is not None:
        out = H + rows[:, None] * (2 * d_ff) + cols[None, :]
        tl.store(out, value.to(H.dtype.element_ty), mask=mask)
        tl.store(out + d_ff, gate.to(H.dtype.element_ty), mask=mask)
    tl.store(A + rows[:, None] * d_ff + cols[None, :], a, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _activation_backward_kernel(
    U, ORDER, H, GATES, DH, GA, DG, n_rows, d_ff, top_k, stride_gates_row, stride_gates_col,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From U and H the gradient DH (A, 2 d_ff), the weighted activations GA (A, d_ff) and the gates' gradient DG (A,).

    A program has BLOCK_R whole rows, however long, so DG is a sum in one fixed order. Rows of nobody have gate 0.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < n_rows
    assignment = tl.load(ORDER + rows, mask=in_rows, other=-1)
    at = (assignment // top_k).to(tl.int64) * stride_gates_row + (assignment % top_k).to(tl.int64) * stride_gates_col
    g = tl.load(GATES + at, mask=in_rows & (assignment >= 0), other=0.0).to(tl.float32)[:, None]
    dg = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, d_ff, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = in_rows[:, None] & (cols < d_ff)[None, :]
        out = rows[:, None] * d_ff + cols[None, :]
        wide = rows[:, None] * (2 * d_ff) + cols[None, :]
        u = tl.load(U + out, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(H + wide, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(H + wide + d_ff, mask=mask, other=0.0).to(tl.float32)
        sigma = _sigmoid(gate)
        silu = gate * sigma
        dg += tl.sum(value * silu * u, axis=1)
        tl.store(GA + out, (g * value * silu).to(GA.dtype.element_ty), mask=mask)
        u *= g
        tl.store(DH + wide, (u * silu).to(DH.dtype.element_ty), mask=mask)
        dgate = u * value * sigma * (1.0 + gate * (1.0 - sigma))
        tl.store(DH + wide + d_ff, dgate.to(DH.dtype.element_ty), mask=mask)
    tl.store(DG + rows, dg, mask=in_rows)


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
