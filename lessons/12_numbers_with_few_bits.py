# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 12 · Numbers with few bits
#
# A model is mostly a list of numbers, and the bits of a number decide how much memory it takes, how fast it moves, and what
# is lost. A floating-point number with sign $s$, exponent $e$ and mantissa $m$ is
#
# $$(-1)^s(1.m)\,2^{e-\mathrm{bias}}\ \text{(normal)},\qquad(-1)^s(0.m)\,2^{1-\mathrm{bias}}\ \text{(subnormal)}.$$
#
# Equations: `float-format`, `float-format-table`, `fp32`, `fp16`, `bf16`, `tf32`, `fp8-e4m3`, `fp8-e5m2`, `ulp`,
# `rounding-modes`, `loss-scaling`, `dynamic-loss-scaling`, `master-weights`, `mixed-precision-policy`, `fp8-scaling`,
# `scale-granularity`, `fp8-gemm`, `fp8-recipe`, `int8-quant`, `int4-quant`, `quant-asymmetric`, `nf4-levels`, `nf4-quant`,
# `double-quant`, `wn-formats`, `wn-fp8-ulp`, `wn-tf32-bits`, `wn-nf4`.
#
# After it you can
# - read a format's range and accuracy from its widths, and encode a number by hand,
# - say which of overflow, underflow and rounding a training run suffers from, and what helps against it,
# - choose scales for eight and four bits, and bound the error before measuring it.

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import gradcheck
from minillm.data.float_formats import FORMATS, decode_float, encode_float, float_format, round_float, ulp
from minillm.functional import fp8_gemm as fp8
from minillm.functional import loss_scaling, nf4, quantisation
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, VERMILION, use_style

use_style()
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. Formats
#
# Everything follows from two widths: $\mathrm{bias}=2^{\mathrm{exponent\ bits}-1}-1$, the smallest normal is
# $2^{1-\mathrm{bias}}$, and neighbours at 1 are $2^{-m}$ apart.

# %%
print(f"{'format':9} {'bits':>4} {'e/m':>5} {'smallest normal':>16} {'smallest of all':>16} {'largest':>10} {'ulp(1)':>10}")
for f in FORMATS.values():
    print(f"{f.name:9} {f.bits:>4} {f.exponent:>2}/{f.mantissa:<2} {f.smallest_normal:16.5e} {f.smallest_subnormal:16.5e} {f.largest:10.4g} {f.ulp_at_one:10.3g}")

# %% [markdown]
# Three corrections to what one reads elsewhere, in numbers:
#
# - Tables give $9.2\cdot10^{-8}$ and $3\cdot10^{-10}$ as the lower ends of the two FP8 formats. Both become 0 in them
#   (erratum 47).
# - Not every number is $1.m\cdot2^e$: without subnormals there would be no zero. And E4M3 keeps its top exponent for numbers,
#   so that it ends at 448, where an IEEE-like format would end at 240 (erratum 51).
# - bfloat16 was made to avoid the overflow and underflow of *fp16* (erratum 49).

# %%
print("9.2e-8 in E4M3:", round_float(9.2e-8, "fp8_e4m3"), "  3e-10 in E5M2:", round_float(3e-10, "fp8_e5m2"))
print("IEEE-like E4M3 would end at", (2 - 2.0**-3) * 2.0**7, "; it ends at", float_format("fp8_e4m3").largest)
for number in (1e5, 1e-8):
    with np.errstate(over="ignore"):
        print(f"{number:g}: fp16 {round_float(number, 'fp16'):.6g}, bf16 {round_float(number, 'bf16'):.6g}")

# %% [markdown]
# All the numbers of a format, and the gaps between them: equal steps inside every power of two, and a floor where the
# subnormals begin.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4))
for name, colour, height in (("fp8_e4m3", BLUE, 1), ("fp8_e5m2", VERMILION, 0)):
    f = float_format(name)
    values = decode_float(np.arange(f.largest_code + 1, dtype=np.uint8), name)
    inside = values[values <= 4]
    axes[0].plot(inside, np.full(len(inside), height), "|", color=colour, markersize=26)
axes[0].set(yticks=[0, 1], yticklabels=["E5M2", "E4M3"], ylim=(-0.6, 1.6), xlabel="every number from 0 to 4", title="Eight bits: where the numbers lie")
axes[0].grid(visible=False)
x = 2.0 ** np.linspace(-30, 15, 800)
for name, colour in (("fp8_e4m3", BLUE), ("fp8_e5m2", VERMILION), ("fp16", GREEN), ("bf16", PURPLE)):
    known = x[x <= float_format(name).largest]
    axes[1].loglog(known, ulp(known, name) / known, color=colour, label=name, linewidth=1.4)
axes[1].set(xlabel="x", ylabel="ulp(x) / x", title="Relative spacing", ylim=(3e-4, 50))
axes[1].legend(loc="upper right")
plt.show()

# %% [markdown]
# ### Encoding is counting
#
# The magnitudes of a format, in order, have consecutive codes. So: find the exponent $e$ (no lower than that of the smallest
# normal), count the number in steps of $2^{e-m}$, round, and add $2^m$ codes for every exponent below. A mantissa that rounds
# up to the next power of two lands on the right code without a special case.
#
# ### Exercise 1: encode E4M3
#
# Return the code (0 to 126) of a positive number up to 448, rounded to nearest with ties to even (`np.rint` does that).


# %%
def my_e4m3(x):
    """The seven bits of the magnitude."""
    ### BEGIN SOLUTION
    lowest, m = -6, 3
    e = lowest if x == 0 else max(int(np.floor(np.log2(x))), lowest)
    r = int(np.rint(x / 2.0 ** (e - m)))
    return r + (e - lowest) * 2**m
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: encode E4M3
tried = np.concatenate([[0.0, 1.0, 448.0, 2.0**-9, 2.0**-10, 0.9999, 1.0625], rng.uniform(0, 448, 200), rng.uniform(0, 0.1, 200)])
for number in tried:
    assert my_e4m3(number) == encode_float(number, "fp8_e4m3"), f"the code of {number} is another"
print("right")

# %% [markdown]
# ## 2. Rounding
#
# Nearest-even makes the smallest error. But an update that is smaller than half a step is lost every time: the *bias* of
# always rounding back is what hurts. Stochastic rounding goes up with just the probability that makes it right on average,
# $\mathbb E[\mathrm{sr}(x)]=x$. The experiment: 1000 updates of $10^{-4}$ on a weight that starts at 1. What ends near 1.1?

# %%
steps, update = 1000, np.float32(1e-4)
nearest, chance, master = np.ones(1, np.float32), np.ones(64, np.float32), np.ones(1, np.float32)
paths = {"nearest": [], "stochastic": [], "master": []}
for _ in range(steps):
    nearest = round_float(nearest + update, "bf16")
    chance = round_float(chance + update, "bf16", rounding="stochastic", rng=rng)
    master, low = loss_scaling.update_master(master, np.full(1, update), "bf16")
    for name, value in (("nearest", nearest[0]), ("stochastic", chance.copy()), ("master", low[0])):
        paths[name].append(value)
figure, axes = plt.subplots(figsize=(7.4, 3.3))
axes.plot(np.array(paths["stochastic"])[:, :12], color=ORANGE, linewidth=0.6, alpha=0.6)
axes.plot(np.mean(paths["stochastic"], axis=1), color=VERMILION, label="bf16, stochastic: mean of 64 (thin: single runs)")
axes.plot(paths["master"], color=BLUE, label="float32 master, copied to bf16")
axes.plot(paths["nearest"], color="black", label="bf16, nearest: nothing happens")
axes.set(xlabel="update", ylabel="weight", title="A thousand updates of 0.0001")
axes.legend(loc="upper left")
plt.show()
print(f"nearest {nearest[0]:.4f}, master {master[0]:.4f}, stochastic mean within 0.02 of 1.1: {abs(chance.mean() - 1.1) < 0.02}")

# %% [markdown]
# That is why mixed precision keeps its weights and the optimiser's state in float32, and why sums, softmax, norms and the
# loss run in float32 too. TF32 is the same idea inside a product: 19 bits go in ($1+8+10$), float32 adds up. It is a mode that
# one asks for, not what every library does with float32 (erratum 50).

# %%
print({operation: loss_scaling.precision_of(operation) for operation in loss_scaling.POLICY})
a, b = rng.normal(size=(64, 256)), rng.normal(size=(256, 64))
for name in ("tf32", "fp16", "bf16"):
    error = np.linalg.norm(loss_scaling.low_precision_matmul(a, b, name) - a @ b) / np.linalg.norm(a @ b)
    print(f"product with inputs in {name}: relative error about 2^{np.log2(error):.0f}")

# %% [markdown]
# ## 3. Loss scaling
#
# Gradients are small and spread over many powers of two. In fp16 those below $2^{-25}$ become 0. Multiply the loss by $S$ and
# all of them move up; divide before the step. Too large an $S$ overflows: then the step is skipped and $S$ halved.

# %%
gradients = np.abs(rng.normal(size=40_000)) * 10.0 ** rng.normal(-6.5, 1.2, size=40_000)
figure, axes = plt.subplots(figsize=(7.6, 3.2))
bins = np.linspace(-36, 16, 105)
with np.errstate(over="ignore"):
    for scale, colour in ((1.0, VERMILION), (2.0**12, BLUE)):
        scaled = gradients * scale
        lost = np.mean(round_float(scaled, "fp16") == 0)
        axes.hist(np.log2(scaled), bins=bins, color=colour, alpha=0.6, label=f"S = {scale:g}: {lost:.1%} become 0")
        print(f"S = {scale:g}: {lost:.1%} of the gradients become 0")
axes.axvspan(-36, -25, color="grey", alpha=0.25)
top = axes.get_ylim()[1] * 1.15
axes.text(-35.3, 0.97 * top, "0 in fp16", va="top")
axes.axvline(-14, color="black", linewidth=1, linestyle="--")
axes.text(-13.6, 0.97 * top, "normal from here", va="top")
axes.set(xlabel="log2 of the scaled gradient", ylabel="count", title="Scaling moves the gradients into the range of fp16", xlim=(-36, 16), ylim=(0, top))
axes.legend(loc="center right")
plt.show()
print("scaled loss passes the gradient check:", gradcheck(lambda w: loss_scaling.scale_loss((w * w).sum(), 1024.0), [rng.normal(size=3)]).passed)

# %%
print(inspect.getsource(loss_scaling.DynamicLossScale.unscale))

# %% [markdown]
# ### Exercise 2: a dynamic scale
#
# Given a list of booleans (true: this step overflowed), return the scale after each step. It halves on overflow, and doubles
# after `n` good steps in a row; the count starts again after either.


# %%
def my_scales(overflows, scale=1024.0, n=3):
    """The scale after each step."""
    ### BEGIN SOLUTION
    scales, good = [], 0
    for overflow in overflows:
        if overflow:
            scale, good = scale / 2, 0
        else:
            good += 1
            if good == n:
                scale, good = scale * 2, 0
        scales.append(scale)
    return scales
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: a dynamic scale
pattern = [False, False, True, False, False, False, False, True, True, False, False, False]
reference = loss_scaling.DynamicLossScale(1024.0, interval=3)
expected = []
for bad in pattern:
    reference.unscale([np.array([np.inf if bad else 1.0])])
    expected.append(reference.scale)
assert my_scales(pattern) == expected, f"wanted {expected}"
print("right")

# %% [markdown]
# ## 4. FP8 products
#
# With 4 bits of exponent nothing fits by itself. So scale first, $S=\max_{\rm fp8}/\max|x|$, cast, multiply with sums in
# float32, and take the scales out: $\mathbf O=\mathbf O_{\rm scaled}/(S_XS_W)$.
#
# A prediction before the measurement: does one scale for each channel beat one for the whole matrix? For integers it must.
# For floating point a quiet row loses nothing *until it reaches the subnormals*.

# %%
quietness = np.arange(0, 27, 2)
x = rng.normal(size=(256, 64)).astype(np.float32)
rows = rng.normal(size=(len(quietness), 256)).astype(np.float32)
rows *= np.abs(rows[:1]).max() / np.abs(rows).max(1, keepdims=True)
w = (rows * 2.0 ** -quietness[:, None]).astype(np.float32)
exact = w.astype(np.float64) @ x
errors = {}
for kind, product in {
    "FP8, one scale": fp8.fp8_gemm(w, x),
    "FP8, one a row": fp8.fp8_gemm(w, x, per_channel=True),
    "int8, one scale": quantisation.dequantise(quantisation.quantise_int8(w)) @ x,
    "int8, one a row": quantisation.dequantise(quantisation.quantise_int8(w, -1)) @ x,
}.items():
    errors[kind] = np.sqrt(((product - exact) ** 2).mean(1) / (exact**2).mean(1))
figure, axes = plt.subplots(figsize=(8.8, 3.5))
for (kind, error), colour, style in zip(errors.items(), (BLUE, BLUE, VERMILION, VERMILION), ("o-", "o:", "s-", "s:"), strict=True):
    axes.semilogy(quietness, error, style, color=colour, label=kind, markersize=4)
axes.set(xlabel="how much quieter the row is than the loudest: factor 2 to the minus …", ylabel="relative error of its outputs", title="A scale for each channel: necessary for int8, a reserve for FP8")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
for i in (0, 4, 10, 13):
    print(f"row 2^-{quietness[i]}: " + ", ".join(f"{kind} {error[i]:.3f}" for kind, error in errors.items()))
bound = fp8.fp8_gemm_bound(w, x)
print("every element below its bound:", bool((np.abs(fp8.fp8_gemm(w, x) - exact) <= bound).all()))

# %% [markdown]
# In training, weights and activations go forward in E4M3, gradients come back in E5M2: they spread wider. The scale of a
# tensor is taken from the largest magnitudes of the last steps, so that it is known before the tensor is.

# %%
spread = 10.0 ** np.linspace(-7, 0, 50, dtype=np.float32)
for name in fp8.FP8:
    back = fp8.uncast_fp8(fp8.cast_fp8(spread, name))
    kept = back > 0
    print(f"{name}: {np.sum(~kept)} of 50 gradients vanish; largest relative error above 0.01: {np.max(np.abs(back / spread - 1)[spread > 0.01]):.3f}")
delayed = fp8.DelayedScale(history=3)
for amax in (2.0, 4.0, 1.0, 1.0, 1.0):
    delayed.cast(np.array([amax], np.float32))
    print(f"largest magnitude {amax:g} -> next scale {delayed.scale:g}")

# %% [markdown]
# ## 5. Integers
#
# int8 has 255 equal steps, int4 has 15, from $-7$ to $7$. The step is the scale $s$ (not $1/16$, erratum 48) and the error at
# most $s/2$. A zero point shifts the range, for numbers that lie to one side.
#
# ### Exercise 3: a zero point
#
# Quantise to `bits` bits: $s=(\max-\min)/(2^b-1)$ over a range that contains 0, $z=\mathrm{round}(-\min/s)$,
# $q=\mathrm{clip}(\mathrm{round}(x/s)+z,0,2^b-1)$. Return $\hat x=s(q-z)$.


# %%
def my_round_trip(x, bits):
    """What comes back of x."""
    ### BEGIN SOLUTION
    low, high, top = min(x.min(), 0.0), max(x.max(), 0.0), 2**bits - 1
    s = (high - low) / top
    z = np.rint(-low / s)
    q = np.clip(np.rint(x / s) + z, 0, top)
    return s * (q - z)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: a zero point
for shift in (-3.0, 0.0, 5.0):
    sample = np.append(rng.normal(size=500) + shift, 0.0).astype(np.float32)
    wanted = quantisation.dequantise_asymmetric(quantisation.quantise_asymmetric(sample, 4))
    np.testing.assert_allclose(my_round_trip(sample.astype(np.float64), 4), wanted, atol=1e-5)
    assert my_round_trip(sample, 4)[-1] == 0, "zero must stay zero"
print("right")

# %% [markdown]
# ## 6. NF4: levels where the numbers are
#
# Weights look like a bell curve, so equal steps waste codes in the tails. NF4 puts its sixteen levels at quantiles of the
# normal distribution, with an exact 0. Nothing about them is learned (erratum 56). Each block of 64 weights has a scale, and
# the scales are quantised once more.

# %%
weights = rng.normal(size=(4096, 64)).astype(np.float32)
found = {
    "int4": quantisation.dequantise(quantisation.quantise_int4(weights, -1)),
    "NF4": nf4.dequantise_nf4(nf4.quantise_nf4(weights)),
}
once = nf4.quantise_nf4(weights)
found["NF4, scales quantised"] = nf4.dequantise_nf4(once._replace(scale=nf4.dequantise_scales(nf4.quantise_scales(once.scale))))
for name, back in found.items():
    print(f"{name:22} mean squared error {np.mean((back - weights) ** 2):.4f}")
print(f"bits per weight: {nf4.bits_per_weight(64, None)} and {nf4.bits_per_weight():.3f}; 16-bit memory falls by {16 / nf4.bits_per_weight():.3f}")
figure, axes = plt.subplots(figsize=(7.6, 3.2))
normalised = (weights / np.abs(weights).max(1, keepdims=True)).reshape(-1)
axes.hist(normalised, bins=120, density=True, color="#cccccc")
top = axes.get_ylim()[1]
axes.vlines(nf4.nf4_levels(), -0.16 * top, -0.02 * top, color=BLUE, linewidth=2)
axes.vlines(np.arange(-7, 8) / 7, -0.32 * top, -0.18 * top, color=VERMILION, linewidth=2)
axes.text(1.04, -0.09 * top, "NF4", color=BLUE, va="center")
axes.text(1.04, -0.25 * top, "int4", color=VERMILION, va="center")
axes.set(xlabel="weight over the largest of its block", ylabel="density", title="Sixteen quantiles and fifteen equal steps", xlim=(-1.1, 1.2), ylim=(-0.36 * top, top), yticks=[0, 0.5, 1])
axes.grid(visible=False)
plt.show()

# %% [markdown]
# Would the result survive other weights? On uniform ones the quantiles should lose. Do they?

# %%
others = {"normal": weights, "uniform": rng.uniform(-1, 1, weights.shape), "heavy tails": rng.standard_t(3, weights.shape)}
for name, sample in others.items():
    sample = sample.astype(np.float32)
    mse = [
        np.mean((back - sample) ** 2) / np.mean(sample**2)
        for back in (nf4.dequantise_nf4(nf4.quantise_nf4(sample)), quantisation.dequantise(quantisation.quantise_int4(sample, -1)))
    ]
    print(f"{name:12} NF4 {mse[0]:.4f}, int4 {mse[1]:.4f}: {'NF4' if mse[0] < mse[1] else 'int4'} is better")

# %% [markdown]
# ## What to take along
#
# 1. Exponent bits are range, mantissa bits are accuracy; below the smallest normal, accuracy fades out.
# 2. Small updates need float32 (or chance), small gradients need a scale, few bits need a scale for each part.
# 3. A scale for each channel is vital for integers, and for FP8 only once rows reach the subnormals.
# 4. Levels should lie where the numbers are: NF4 beats equal steps on bell-shaped weights, and not on flat ones.
