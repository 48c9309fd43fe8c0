r"""Device code of the rotary positions.

Mathematics, for a pair $(a,b)$ of coordinates at position $p$ with the angle $\varphi=p\,\theta_i$:

$$a'=a\cos\varphi-b\sin\varphi,\qquad b'=b\cos\varphi+a\sin\varphi.$$

A rotation is orthogonal, so the backward turns by $-\varphi$: the same kernel with BACKWARD. Pairs are neighbours
$(2i,2i+1)$ (INTERLEAVED: a row is loaded whole and split, so that loads stay 16 bytes wide) or lie half a head apart.
Nothing is saved but the table. Rounding: loads are converted to fp32, results rounded once; cosines and sines are
fp32 whatever the dtype of x. Bytes: each element in and out once; the table is shared by all heads (`traffic.py`).
A program reads its tile before it writes it, so the result may take the place of x.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "start"])
def _turn_kernel(
    X, COS, SIN, POSITIONS, Y, n_rows, heads, length, half, start,
    stride_x_batch, stride_x_head, stride_x_row, stride_x_col,
    stride_y_batch, stride_y_head, stride_y_row, stride_y_col, stride_table, stride_positions,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_ROWS rows of x (batch, heads, length, 2 half).

    COS and SIN have contiguous columns. POSITIONS is None (then a row's position is start + its place in the text) or
    (batch or 1, length) with contiguous columns, to which start is added.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = rows < n_rows
    place = rows % length
    head = (rows // length) % heads
    batch = rows // length // heads
    position = place
    if POSITIONS is not None:
        position = tl.load(POSITIONS + batch * stride_positions + place, mask=real, other=0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF).to(tl.int64)
    in_table = real[:, None] & (pairs < half)[None, :]
    table = (position + start)[:, None] * stride_table + pairs[None, :]
    cos = tl.load(COS + table, mask=in_table, other=0.0)
    sin = tl.load(SIN + table, mask=in_table, other=0.0)
    if BACKWARD:
        sin = -sin
    x_rows = X + (batch * stride_x_batch + head * stride_x_head + place * stride_x_row)[:, None]
    y_rows = Y + (batch * stride_y_batch + head * stride_y_head + place * stride_y_row)[:, None]
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF).to(tl.int64)[None, :]
        mask = real[:, None] & (cols < 2 * half)
        x = tl.load(x_rows + cols * stride_x_col, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_ROWS, BLOCK_HALF, 2)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        y = tl.reshape(turned, (BLOCK_ROWS, 2 * BLOCK_HALF)).to(Y.dtype.element_ty)
        tl.store(y_rows + cols * stride_y_col, y, mask=mask)
    else:
        low = pairs[None, :]
        high = low + half
        a = tl.load(x_rows + low * stride_x_col, mask=in_table, other=0.0).to(tl.float32)
        b = tl.load(x_rows + high * stride_x_col, mask=in_table, other=0.0).to(tl.float32)
        tl.store(y_rows + low * stride_y_col, (a * cos - b * sin).to(Y.dtype.element_ty), mask=in_table)
        tl.store(y_rows + high * stride_y_col, (b * cos + a * sin).to(Y.dtype.element_ty), mask=in_table)
