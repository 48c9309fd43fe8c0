r"""Device code of AdamW: one step of all tensors in one launch, and the norm of all gradients in two.

Mathematics, with the clipped gradient $cg$ and the step's number $t$ from 1, in fp32 whatever is stored:

$$m\leftarrow\beta_1m+(1-\beta_1)cg,\qquad n\leftarrow\beta_2n+(1-\beta_2)(cg)^2,$$
$$\theta\leftarrow(1-\eta\lambda)\theta-\frac{\eta}{1-\beta_1^t}\,\frac{m}{\sqrt n/\sqrt{1-\beta_2^t}+\varepsilon}.$$

Everything that depends on t alone is computed on the host in float64. m and n are fp32. A 16-bit parameter may have
an fp32 master, which is then what is updated, and the parameter its rounding, written and not read.

The tensors of a model differ in size, so a program finds its work in two tables: OWNER gives the tensor of each
program, and that tensor's row of TABLE the addresses of its parts, its size, its first program, whether it decays.
Gradients are read where autograd has put them. A program of a whole tile has no masks, for a mask of unknown size
would split its 16-byte accesses. Bytes: `traffic.py`.

The norm is a sum of squares for each tile, then the sum of these in a fixed order: two runs agree in every bit. A
norm that is not finite gives a factor of NaN, on which the update does nothing.
"""

# Triton's types are not those that a type checker sees in device code.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# Columns of TABLE.
THETA, GRADIENT, FIRST_MOMENT, SECOND_MOMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MASTER, SIZE, FIRST, DECAYED, COLUMNS = (
    tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
)  # fmt: skip


@triton.jit
def _work(TABLE, OWNER, BLOCK: tl.constexpr):
    """The tensor's row of the table, the first element of this program's tile, and the tensor's size."""
    row = TABLE + tl.load(OWNER + tl.program_id(0)).to(tl.int64) * COLUMNS
    start = (tl.program_id(0).to(tl.int64) - tl.load(row + FIRST)) * BLOCK
    return row, start, tl.load(row + SIZE)


@triton.jit
def _at(row, column: tl.constexpr, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements of one part; alignment is promised where the host has seen it."""
    part = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        part = tl.multiple_of(part, 16)
    return part + offsets


@triton.jit
def _load(pointers, offsets, size, MASKED: tl.constexpr):
    if MASKED:
        found = tl.load(pointers, mask=offsets < size, other=0.0)
    else:
        found = tl.load(pointers)
    return found.to(tl.float32)


@triton.jit
def _store(pointers, value, offsets, size, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, value.to(pointers.dtype.scalar.element_ty), mask=offsets < size)
    else:
        tl.store(pointers, value.to(pointers.dtype.scalar.element_ty))


@triton.jit
def _tile(
    row, start, size, scale, beta1, rest1, beta2, rest2, eps, keep, rate, root,
    THETA_TYPE: tl.constexpr, G_TYPE: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read every part of a tile, update it, write it back."""
    offsets = start + tl.arange(0, BLOCK)
    at_theta = _at(row, THETA, offsets, THETA_TYPE, ALIGNED)
    at_m = _at(row, FIRST_MOMENT, offsets, tl.float32, ALIGNED)
    at_n = _at(row, SECOND_MOMENT, offsets, tl.float32, ALIGNED)
    at_weight = _at(row, MASTER, offsets, tl.float32, ALIGNED) if HAS_MASTER else at_theta
    weight = _load(at_weight, offsets, size, MASKED)
    g = _load(_at(row, GRADIENT, offsets, G_TYPE, ALIGNED), offsets, size, MASKED) * scale
    m = beta1 * _load(at_m, offsets, size, MASKED) + rest1 * g
    n = beta2 * _load(at_n, offsets, size, MASKED) + rest2 * (g * g)
    kept = tl.where(tl.load(row + DECAYED) != 0, keep, 1.0)
    weight = weight * kept - rate * tl.div_rn(m, tl.sqrt_rn(n) * root + eps)
    _store(at_m, m, offsets, size, MASKED)
    _store(at_n, n, offsets, size, MASKED)
    _store(at_theta, weight, offsets, size, MASKED)
    if HAS_MASTER:
        _store(at_weight, weight, offsets, size, MASKED)


@triton.jit
def _step_kernel(
    TABLE, OWNER, SCALE, beta1, rest1, beta2, rest2, eps, keep, rate, root,
    THETA_TYPE: tl.constexpr, G_TYPE: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor. rest = 1 - beta, keep = 1 - lr wd, rate and root hold the corrections of the bias."""
    row, start, size = _work(TABLE, OWNER, BLOCK)
    scale = tl.load(SCALE)
    if scale == scale:
        if start + BLOCK <= size:
            _tile(row, start, size, scale, beta1, rest1, beta2, rest2, eps, keep, rate, root,
                  THETA_TYPE, G_TYPE, HAS_MASTER, ALIGNED, False, BLOCK)  # fmt: skip
        else:
            _tile(row, start, size, scale, beta1, rest1, beta2, rest2, eps, keep, rate, root,
                  THETA_TYPE, G_TYPE, HAS_MASTER, ALIGNED, True, BLOCK)  # fmt: skip


@triton.jit
def _squares_kernel(TABLE, OWNER, PARTS, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of one tile of one gradient."""
    row, start, size = _work(TABLE, OWNER, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    pointers = _at(row, GRADIENT, offsets, G_TYPE, ALIGNED)
    if start + BLOCK <= size:
        g = _load(pointers, offsets, size, False)
        tl.store(PARTS + tl.program_id(0).to(tl.int64), tl.sum(g * g))
    else:
        g = _load(pointers, offsets, size, True)
        tl.store(PARTS + tl.program_id(0).to(tl.int64), tl.sum(g * g))


@triton.jit(do_not_specialize=["n_parts"])
def _clip_kernel(PARTS, NORM, SCALE, n_parts, max_norm, BLOCK: tl.constexpr):
    """The norm out of its parts, and the factor that shortens the gradient: NaN where the norm is not finite."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_parts, BLOCK):
        offsets = tl.arange(0, BLOCK).to(tl.int64) + start
        total += tl.load(PARTS + offsets, mask=offsets < n_parts, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total))
    tl.store(NORM, norm)
    scale = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    tl.store(SCALE, tl.where(norm < float("inf"), scale, float("nan")))
