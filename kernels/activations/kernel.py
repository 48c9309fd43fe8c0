r"""Device code of the gated linear units.

Mathematics, for a value $v$ and a gate $z$ with the activation $a(z)=z\,\Sigma(z)$, where $\Sigma$ is the logistic
function (SwiGLU) or the Gaussian distribution function (GEGLU):

$$y=v\,a(z),\qquad \bar v=\bar y\,a(z),\qquad \bar z=\bar y\,v\,a'(z),$$
$$a'(z)=\sigma+z\,\sigma(1-\sigma)=\sigma(1-a)+a\ \text{(SiLU)},\qquad a'(z)=\Phi(z)+z\,\varphi(z)\ \text{(GELU)}.$$

Saved for the backward: value and gate, inputs anyway; $\Sigma(z)$ is computed again. Rounding: loads are converted
to fp32, each result is rounded once. Bytes: forward two in, one out; backward three in, two out (`traffic.py`).
Value, gate and their gradients have strides of their own, so both halves of a joint projection are read where they
lie. A program reads its tile before it writes it: gradients may take the place of value and gate.
"""

# Triton types device functions as if nobody called them from Python.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _gate(z, SILU: tl.constexpr):
    """The activation of the gate and its slope; the slope is dropped by the compiler where nobody uses it."""
    if SILU:
        sigma = tl.sigmoid(z)
        a = z * sigma
        slope = sigma * (1.0 - a) + a
    else:
        phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        a = z * phi
        slope = phi + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    return a, slope


@triton.jit
def _place(n_rows, d, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, columns and mask of a program's tile; neighbours in the grid are neighbours in a row."""
    strips = tl.cdiv(d, BLOCK_D)
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    return rows[:, None], cols[None, :], (rows < n_rows)[:, None] & (cols < d)[None, :]


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    VALUE, GATE, Y, n_rows, d, stride_v_row, stride_v_col, stride_z_row, stride_z_col,
    SILU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of y, which is contiguous."""
    rows, cols, mask = _place(n_rows, d, BLOCK_ROWS, BLOCK_D)
    v = tl.load(VALUE + rows * stride_v_row + cols * stride_v_col, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(GATE + rows * stride_z_row + cols * stride_z_col, mask=mask, other=0.0).to(tl.float32)
    a, _ = _gate(z, SILU)
    tl.store(Y + rows * d + cols, (v * a).to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    DY, VALUE, GATE, DVALUE, DGATE, n_rows, d, stride_dy_row, stride_dy_col,
    stride_v_row, stride_v_col, stride_z_row, stride_z_col, stride_dv_row, stride_dz_row,
    SILU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients, whose columns are contiguous."""
    rows, cols, mask = _place(n_rows, d, BLOCK_ROWS, BLOCK_D)
    dy = tl.load(DY + rows * stride_dy_row + cols * stride_dy_col, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(VALUE + rows * stride_v_row + cols * stride_v_col, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(GATE + rows * stride_z_row + cols * stride_z_col, mask=mask, other=0.0).to(tl.float32)
    a, slope = _gate(z, SILU)
    tl.store(DVALUE + rows * stride_dv_row + cols, (dy * a).to(DVALUE.dtype.element_ty), mask=mask)
    tl.store(DGATE + rows * stride_dz_row + cols, (dy * v * slope).to(DGATE.dtype.element_ty), mask=mask)
