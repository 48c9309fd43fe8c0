# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 03 · RMSNorm three times: written, derived, fast
#
# One small equation, all the way from the formula to a GPU kernel. The equation is the norm that stands before every
# block of a modern decoder:
#
# $$y=\mathbf g\odot\frac{\mathbf x}{\sqrt{\frac1d\sum_ix_i^2+\varepsilon_0}}.$$
#
# Equations: `rmsnorm`, `layernorm`, `layernorm-backward`, `rmsnorm-layernorm-relation`, `pre-ln`, `gradient-check`.
#
# After it you can
# - derive the gradient of a normalisation and see why it is orthogonal to its input,
# - count the bytes that an implementation moves, and predict from them how fast it can be,
# - write a Triton kernel with its masks, and hold it against a reference.

# %%
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # run kernels on the CPU; this must come before triton is imported

import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl

from kernels.norm import op, traffic
from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional import norms as written
from minillm.fused import norms as derived
from minillm.plotting import BLUE, GREEN, ORANGE, VERMILION, use_style

use_style()

# %% [markdown]
# ## 1. As written
#
# Composed of primitives, the equation is three lines (lesson 00 printed them), and the engine supplies the gradient. What
# does that cost? Every primitive reads its arguments and writes its result. The tape knows them all, so we can count.

# %%
x = Tensor(np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32), requires_grad=True)
g = Tensor(np.ones(256, np.float32), requires_grad=True)


def bytes_of_the_forward(y):
    """Bytes read and written by the recorded operations behind a tensor, and their names."""
    seen, stack, total = set(), [y.node], 0
    names = []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        names.append(node.operation.name)
        total += node.output.nbytes if node.output is not None else 0
        for argument in node.inputs:
            total += argument.data.nbytes if isinstance(argument, Tensor) else 0
            if isinstance(argument, Tensor) and argument.node is not None:
                stack.append(argument.node)
    return total, names[::-1]


moved, names = bytes_of_the_forward(written.rms_norm(x, g))
needed = traffic.forward_bytes(64, 256, 4, 4, centred=False, residual=False, shift=False)
print("operations:", ", ".join(names))
print(f"bytes moved {moved:,}, bytes that must be moved {needed:,}: {moved / needed:.1f} times as many")

# %% [markdown]
# On any modern processor, moving a number costs far more than computing with it. So an implementation is as good as the
# number of times it touches the data, and the best there can be touches each element once on the way in and once on the way
# out.
#
# ## 2. As derived
#
# Let $\rho=1/\sqrt{\frac1d\sum_jx_j^2+\varepsilon_0}$ and $\hat x=\rho x$, so $y=g\odot\hat x$. The scale $\rho$ depends on every
# $x_j$: $\partial\rho/\partial x_j=-\rho^3x_j/d$. For a cotangent $\bar y$, with $\hat g=g\odot\bar y$,
#
# $$\bar x_j=\rho\,\hat g_j+\sum_i\hat g_ix_i\frac{\partial\rho}{\partial x_j}
#          =\rho\Big(\hat g_j-\hat x_j\,\frac1d\sum_i\hat g_i\hat x_i\Big),\qquad
#   \bar g_j=\sum_{\rm rows}\bar y_j\hat x_j .$$
#
# Look at the bracket: it removes from $\hat g$ its component along $\hat x$. A norm ignores the length of its input, so its
# gradient has no part along the input. Does it?

# %%
rng = np.random.default_rng(1)
x64, g64 = (Tensor(rng.normal(size=s), requires_grad=True) for s in ((4, 32), (32,)))
cotangent = rng.normal(size=(4, 32))
dx = grad(derived.rms_norm(x64, g64, eps=0.0), x64, cotangent).data
cosine = (dx * x64.data).sum(-1) / np.linalg.norm(dx, axis=-1) / np.linalg.norm(x64.data, axis=-1)
print("largest cosine between gradient and input is below 1e-15:", np.abs(cosine).max() < 1e-15)

# %% [markdown]
# ### Exercise 1: write the derived form
#
# Return the value and a function `vjp(dy) -> (dx, dg)` for arrays `x` of shape $(N,d)$ and `g` of shape $(d,)$.


# %%
def my_rms_norm(x, g, eps=1e-6):
    """RMSNorm with its hand-derived gradient."""
    ### BEGIN SOLUTION
    rho = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    x_hat = x * rho

    def vjp(dy):
        g_hat = dy * g
        dx = rho * (g_hat - x_hat * (g_hat * x_hat).mean(-1, keepdims=True))
        return dx, (dy * x_hat).sum(0)

    return g * x_hat, vjp
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: write the derived form
y, vjp = my_rms_norm(x64.data, g64.data)
reference = written.rms_norm(x64, g64)
np.testing.assert_allclose(y, reference.data, rtol=1e-12, err_msg="the value is off")
for ours, theirs, name in zip(vjp(cotangent), grad(reference, [x64, g64], cotangent), ("dx", "dg"), strict=True):
    np.testing.assert_allclose(ours, theirs.data, rtol=1e-9, atol=1e-12, err_msg=f"{name} is off")
print("right")

# %% [markdown]
# And the other norm? LayerNorm is RMSNorm of the centred row, exactly, because centring is linear:

# %%
shift = np.zeros(32)
left = written.layer_norm(x64, g64, Tensor(shift), eps=1e-5).data
centred = Tensor(x64.data - x64.data.mean(-1, keepdims=True))
print("LN(x) = RMSNorm(Cx):", np.allclose(left, written.rms_norm(centred, g64, eps=1e-5).data, atol=1e-14))
print("and its gradient passes the check:", gradcheck(derived.layer_norm, [x64.data, g64.data, shift]).passed)

# %% [markdown]
# ## 3. As fast
#
# A GPU runs thousands of programs at once; a Triton kernel is the text of one of them. For a norm, one program takes one
# row (or a few): load it once, keep it in registers, square, sum, scale, store. Numbers are loaded in **tiles** whose length
# must be a power of two, so a row of 100 is loaded as 128, and the last 28 lanes must be masked: they must not be read, and
# must not enter the sum.
#
# ### Exercise 2: the mask
#
# Complete the kernel. Inside, `cols` are the column numbers of the tile and `d` is the length of the row. A masked lane of
# `tl.load` takes the value `other`. Which value does no harm to the sum of squares?


# %%
@triton.jit
def my_kernel(X, G, Y, d, eps, BLOCK: tl.constexpr):
    """One program normalises one row of a contiguous (N, d) matrix."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * d wraps around in 32
    cols = tl.arange(0, BLOCK)
    ### BEGIN SOLUTION
    mask = cols < d
    x = tl.load(X + row * d + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G + cols, mask=mask, other=0.0).to(tl.float32)
    rho = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / d + eps)
    tl.store(Y + row * d + cols, (g * x * rho).to(Y.dtype.element_ty), mask=mask)
    ### END SOLUTION


def my_norm_on_the_gpu(x, g, eps=1e-6):
    """Launch one program a row."""
    y = torch.empty_like(x)
    my_kernel[(x.shape[0],)](x, g, y, x.shape[1], eps, BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


# %% tags=["check"]
# Exercise 2: the mask
torch.manual_seed(0)
for d in (1, 7, 64, 100):
    inside = torch.full((5, d), float("nan"))  # NaN around the rows: reading outside them would show
    inside[1:4] = torch.randn(3, d)
    gain = torch.randn(d)
    got = my_norm_on_the_gpu(inside[1:4].contiguous(), gain)
    wanted = torch.nn.functional.rms_norm(inside[1:4], (d,), gain, 1e-6)
    torch.testing.assert_close(got, wanted, msg=f"wrong for rows of length {d}")
print("right")

# %% [markdown]
# The package's kernel does the same with more care: any strides, rows longer than a tile, a fused residual addition, sums
# in float32 whatever the input, and a backward pass whose weight gradient is added in a fixed order, so that two runs give
# the same bits. All three forms of the equation, side by side:

# %%
rows, width = 6, 100
x_np, g_np, dy_np = (rng.normal(size=s).astype(np.float32) for s in ((rows, width), (width,), (rows, width)))
results = {}
for name, form in (("written", written.rms_norm), ("derived", derived.rms_norm)):
    a, b = Tensor(x_np, requires_grad=True), Tensor(g_np, requires_grad=True)
    y = form(a, b)
    results[name] = [y.data, *(d.data for d in grad(y, [a, b], dy_np))]
a, b = (torch.tensor(t, requires_grad=True) for t in (x_np, g_np))
y = op.rms_norm(a, b)
y.backward(torch.tensor(dy_np))
results["fast"] = [t.detach().numpy() for t in (y, a.grad, b.grad)]
exact = Tensor(x_np.astype(np.float64), requires_grad=True), Tensor(g_np.astype(np.float64), requires_grad=True)
y = written.rms_norm(*exact)
truth = [y.data, *(d.data for d in grad(y, exact, dy_np))]
for name, arrays in results.items():
    errors = [np.abs(ours - true).max() / np.abs(true).max() for ours, true in zip(arrays, truth, strict=True)]
    print(f"{name}: y, dx, dg each within 1e-6 of float64:", [bool(e < 1e-6) for e in errors])

# %% [markdown]
# ## 4. Why the sum is in float32
#
# Half precision has three decimal digits and ends at 65504. A sum of squares meets both limits. The experiment: rows of
# growing length, values of size 1 and of size 200, summed in float16 and in float32.

# %%
lengths = 2 ** np.arange(3, 15)
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.3), sharey=True)
overflowed = {}
for panel, size in zip(axes, (1.0, 200.0), strict=True):
    for dtype, colour in ((np.float16, VERMILION), (np.float32, BLUE)):
        errors = []
        for d in lengths:
            row = (rng.normal(size=d) * size).astype(np.float16)
            true = np.sqrt((row.astype(np.float64) ** 2).mean())
            with np.errstate(over="ignore", invalid="ignore"):
                squares = row.astype(dtype) ** 2
                total = np.add.accumulate(squares, dtype=dtype)[-1]
                rms = np.sqrt(np.float64(total) / d)
            errors.append(abs(rms / true - 1) if np.isfinite(rms) else np.nan)
        overflowed[size, dtype.__name__] = bool(np.isnan(errors).any())
        panel.loglog(lengths, np.maximum(errors, 1e-9), "o-", color=colour, markersize=4, label=f"summed in {dtype.__name__}")
    panel.set(title=f"values of size {size:g}", xlabel="row length")
axes[0].set_ylabel("relative error of the RMS")
axes[1].text(0.5, 0.7, "float16: the sum of squares\nis infinite at every length", transform=axes[1].transAxes, color=VERMILION, ha="center")
axes[0].legend()
plt.show()
print("float16 overflows at size 1:  ", overflowed[1.0, "float16"])
print("float16 overflows at size 200:", overflowed[200.0, "float16"])
print("float32 ever overflows:       ", overflowed[1.0, "float32"] or overflowed[200.0, "float32"])

# %% [markdown]
# ## 5. How fast could it be?
#
# Count the bytes: $N\cdot d$ numbers in, as many out, and small change. A GPU's copy rate then gives the floor in time, and
# "fraction of the copy rate" is the only honest mark of a norm kernel. Fusing the residual addition saves a whole round trip:

# %%
N, d, size = 16_384, 4096, 2  # bfloat16
kinds = {
    "add, then norm": 3 * N * d * size + traffic.forward_bytes(N, d, size, size, centred=False, residual=False, shift=False),
    "fused add + norm": traffic.forward_bytes(N, d, size, size, centred=False, residual=True, shift=False),
    "norm alone": traffic.forward_bytes(N, d, size, size, centred=False, residual=False, shift=False),
}
figure, axes = plt.subplots(figsize=(8, 2.4))
axes.barh(list(kinds), [b / 1e6 for b in kinds.values()], color=[VERMILION, GREEN, ORANGE], height=0.6)
axes.set(xlabel="compulsory megabytes, forward, 16,384 rows of 4096 in bfloat16")
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
plt.show()
print("fusing saves", f"{1 - kinds['fused add + norm'] / kinds['add, then norm']:.0%}", "of the traffic")

# %% [markdown]
# ### Exercise 3: the floor
#
# A card copies at `rate` bytes per second (reads and writes counted). What is the least time in microseconds of the forward
# pass of RMSNorm, for `N` rows of length `d` with `itemsize` bytes a number, weights and row statistics neglected?


# %%
def least_microseconds(N, d, itemsize, rate):
    """The floor in time of an RMSNorm forward."""
    ### BEGIN SOLUTION
    return 2 * N * d * itemsize / rate * 1e6
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the floor
assert abs(least_microseconds(16_384, 4096, 2, 4.3e12) - 62.4) < 0.1, "each number is read once and written once"
assert least_microseconds(1, 1, 2, 4.0) == 1e6
print("right: on a card that copies 4.3 TB/s, at least", round(least_microseconds(16_384, 4096, 2, 4.3e12)), "microseconds")

# %% [markdown]
# ## What to take along
#
# 1. *Written* shows the formula, *derived* shows the gradient, *fast* shows the machine. They are one function.
# 2. The gradient of a norm is orthogonal to its input. It costs one more reduction, not one more matrix.
# 3. A norm is bound by memory: count the bytes first.
#
# Hold a kernel of your own against the reference: `python -m kernels compare norm --impl my_file.py:my_rms_norm`. See what
# the compiler makes of ours for four GPUs, without having one: `python -m kernels compile norm`.
