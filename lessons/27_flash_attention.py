# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 27 · Flash attention, forward and backward
#
# Lesson 08 took a softmax block by block. Here that idea becomes a kernel: exact attention of any length without a matrix of
# scores in memory, and its gradient, which has even more reason to want one.
#
# $$m'=\max(m,\tilde m),\qquad \ell'=e^{m-m'}\ell+e^{\tilde m-m'}\tilde\ell,\qquad a'=e^{m-m'}a+e^{\tilde m-m'}\tilde a .$$
#
# Equations: `flash-attention`, `attention-context`, `logsumexp`, `softmax-jacobian`, `gqa`, `mqa`, `mask-causal`, `mask-prefix`,
# `mask-padding`, `mask-block-diagonal`, `sparse-attention-window`, `logit-softcap`.
#
# After it you can
# - merge partial softmaxes in any order, empty ones too,
# - say which tiles a mask lets a kernel skip, and check what a kernel really reads,
# - derive the backward from one identity, and say what determinism costs,
# - write the forward as a Triton kernel, and know which tests would have missed its usual mistakes.

# %%
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # run kernels on the CPU; this must come before triton is imported

import inspect
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl
from matplotlib.colors import ListedColormap, LogNorm

from kernels import compare
from kernels.attention import family, kernel_forward, op, reference, traffic
from kernels.problem import Problem, to_array
from kernels.subject import Subject, execute
from kernels.tolerance import error_map
from minillm.autograd import gradcheck
from minillm.functional.streaming_attention import online_softmax_step
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, use_style

use_style()
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. What must not be stored
#
# A layer of 16 heads with 128 columns each, in 16 bits, one sequence. Queries, keys, values and output grow with the length;
# the scores with its square, and training keeps them. Flash attention keeps two numbers a query instead.

# %%
lengths = 2 ** np.arange(9, 18)
heads, d, gib = 16, 128, 2.0**30
operands = np.array([traffic.forward_bytes(1, heads, heads, int(L), int(L), d, d, 2) for L in lengths]) / gib
scores = heads * lengths.astype(float) ** 2 * 2 / gib
extra = np.array([traffic.extra_bytes(1, heads, int(L)) for L in lengths]) / gib
figure, axes = plt.subplots(figsize=(7.4, 3.5))
for values, colour, label in ((scores, VERMILION, "one matrix of scores"), (operands, BLUE, "q, k, v, o"), (extra, GREEN, "what flash attention adds")):
    axes.plot(lengths, values, "o-", color=colour)
    axes.text(lengths[-1] * 1.15, values[-1], label, color=colour, va="center")
axes.axhline(141, color="black", linewidth=1, linestyle="--")
axes.text(lengths[0], 165, "memory of one H200", va="bottom")
axes.set_xscale("log", base=2)
axes.set(yscale="log", xlabel="length", ylabel="GiB", title="One layer, one sequence", xlim=(lengths[0] * 0.9, lengths[-1] * 8))
axes.set_xticks(lengths, [f"{L // 1024}k" if L >= 1024 else str(L) for L in lengths])
plt.show()
for L in (4096, 131_072):
    i = int(np.log2(L)) - 9
    print(f"length {L}: scores {scores[i]:.2f} GiB, operands {operands[i]:.2f} GiB, flash attention adds {extra[i]:.3f} GiB")

# %% [markdown]
# ## 2. The state of a softmax
#
# What must be known of the keys seen so far? For one query: the largest score $m$, the sum $\ell=\sum e^{s_j-m}$ and the sum
# $a=\sum e^{s_j-m}v_j$. Two sets of keys, each with its $(m,\ell,a)$, merge by the three equations above. Nothing in them
# says which set came first: merging is associative and commutative, and the empty set $(-\infty,0,0)$ changes nothing. So keys
# may come in tiles, from several processors, in any order.
#
# ### Exercise 1: merge
#
# Write it for arrays of queries: `m`, `total` of shape (n,), `a` of shape (n, d). Mind the empty set: $-\infty-(-\infty)$ is not 0.


# %%
def my_merge(left, right):
    """(m, total, a) of both sets of keys together."""
    ### BEGIN SOLUTION
    (m1, l1, a1), (m2, l2, a2) = left, right
    m = np.maximum(m1, m2)
    shift = np.where(np.isfinite(m), m, 0.0)
    e1, e2 = np.exp(m1 - shift), np.exp(m2 - shift)
    return m, e1 * l1 + e2 * l2, e1[:, None] * a1 + e2[:, None] * a2
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: merge
s, v = 30 * rng.normal(size=(5, 12)), rng.normal(size=(12, 3))


def state(cols):
    """(m, total, a) of some of the keys."""
    part = s[:, cols]
    m = part.max(1, initial=-np.inf)
    e = np.exp(part - np.where(np.isfinite(m), m, 0.0)[:, None])
    return m, e.sum(1), e @ v[cols]


p = np.exp(s - s.max(1, keepdims=True))
exact = p @ v / p.sum(1, keepdims=True)
parts = [state(np.arange(12)[part]) for part in (slice(0, 5), slice(5, 5), slice(5, 6), slice(6, 12))]
for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 0, 1)):
    one, two, three, four = (parts[i] for i in order)
    for m, total, a in (my_merge(my_merge(my_merge(one, two), three), four), my_merge(my_merge(one, two), my_merge(three, four))):
        np.testing.assert_allclose(a / total[:, None], exact, atol=1e-12)
        np.testing.assert_allclose(m, s.max(1))
nothing = my_merge(parts[1], parts[1])
assert (nothing[0] == -np.inf).all() and not nothing[1].any() and not nothing[2].any(), "two empty sets are an empty set"
print("right")

# %% [markdown]
# The package's step is the same with the right-hand set given as scores and values:

# %%
print(inspect.getsource(online_softmax_step).split('"""')[-1].strip("\n"))

# %% [markdown]
# One query meets 48 keys in tiles of 8. The staircase is $m$; each time it steps up, what was gathered shrinks by
# $e^{m-m'}$. Leave the correction out and the output is wrong from the first step on, for ever: the early keys keep a
# weight that belongs to a smaller maximum.

# %%
n, tile = 48, 8
s1 = rng.normal(size=n) + np.linspace(0, 3, n)
v1 = np.linspace(1, -1, n) + 0.3 * rng.normal(size=n)
tops, totals, right_out, wrong_out = [], [], [], []
m, total, a, a_wrong = -np.inf, 0.0, 0.0, 0.0
for start in range(0, n, tile):
    part, values = s1[start : start + tile], v1[start : start + tile]
    new = max(m, part.max())
    e = np.exp(part - new)
    total, a, a_wrong = np.exp(m - new) * total + e.sum(), np.exp(m - new) * a + e @ values, a_wrong + e @ values
    m = new
    tops.append(m)
    totals.append(total)
    right_out.append(a / total)
    wrong_out.append(a_wrong / total)
so_far = [np.average(v1[:end], weights=np.exp(s1[:end] - s1[:end].max())) for end in range(tile, n + 1, tile)]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
axes[0].plot(np.arange(n), s1, ".", color="#999999", label="scores")
axes[0].step(np.arange(0, n + 1, tile), [tops[0], *tops], where="pre", color=BLUE, label="largest so far, $m$")
axes[0].plot(np.arange(tile, n + 1, tile) - 0.5, totals, "s--", color=ORANGE, label="sum so far, $\\ell$")
axes[0].set(xlabel="key", title="The state after each tile", ylim=(s1.min() - 0.5, max(max(totals), max(tops)) + 4.5))
axes[0].legend(loc="upper left")
axes[1].plot(np.arange(tile, n + 1, tile), so_far, "o", color="#bbbbbb", markersize=11, label="softmax of the keys so far")
axes[1].plot(np.arange(tile, n + 1, tile), right_out, "x-", color=BLUE, label="$a/\\ell$")
axes[1].plot(np.arange(tile, n + 1, tile), wrong_out, "^-", color=VERMILION, label="$a$ never corrected")
axes[1].set(xlabel="keys seen", title="Output after each tile")
axes[1].legend()
plt.show()
steps_up = int(sum(b > a for a, b in zip(tops, tops[1:])))
print(f"the maximum stepped up {steps_up} times; the output is right with the correction: {np.isclose(right_out[-1], so_far[-1])}, and off by {abs(wrong_out[-1] - so_far[-1]):.2f} without")

# %% [markdown]
# ## 3. Which tiles?
#
# Every mask we need lets query $i$ see *an interval of keys*, $lo_i\le j<hi_i$, and both ends only ever go up with $i$:
#
# | mask | $lo_i$ | $hi_i$ |
# |---|---|---|
# | full | $0$ | $L_k$ |
# | causal (`mask-causal`) | $0$ | $i+o+1$, with offset $o=0$ (top-left) or $L_k-L_q$ (bottom-right) |
# | window (`sparse-attention-window`) | $i+o+1-w$ | $i+o+1$ |
# | prefix (`mask-prefix`) | $0$ | $\max(i+o+1,P)$ |
# | padding (`mask-padding`) | $0$ | the length |
# | packed documents (`mask-block-diagonal`) | where the document begins | where it ends |
#
# So for a block of queries the *first* row's $lo$ and the *last* row's $hi$ bound the loop, and between the last row's $lo$
# and the first row's $hi$ no mask is needed. That is all the scheduling there is, for every mask.

# %%
L, block = 96, 8
place = np.arange(L)
documents = np.searchsorted([0, 21, 33, 70], place, side="right")
masks = {
    "full": reference.mask(L, L, None, False, None, "top-left"),
    "causal": reference.mask(L, L, None, True, None, "top-left"),
    "window of 20": reference.mask(L, L, None, True, 20, "top-left"),
    "prefix of 29": reference.mask(L, L, np.array([29]), True, None, "top-left")[0, 0],
    "padding from 60 on": np.broadcast_to(place < 60, (L, L)),
    "packed documents": documents[:, None] == documents[None, :],
}
colours = ListedColormap(["#ffffff", SKY, ORANGE])
figure, axes = plt.subplots(2, 3, figsize=(10, 7))
for axis, (name, keep) in zip(axes.flat, masks.items()):
    found = traffic.tiles(*traffic.intervals(keep), L, block, block)
    axis.imshow(found, cmap=colours, vmin=0, vmax=2, extent=(0, L, L, 0))
    axis.contour(place + 0.5, place + 0.5, keep.astype(float), levels=[0.5], colors="black", linewidths=1)
    axis.set(xticks=range(0, L + 1, block), yticks=range(0, L + 1, block), xticklabels=[], yticklabels=[], title=f"{name}: {(found > 0).mean():.0%} of the tiles")
    axis.tick_params(length=0)
    clear, edge = int((found == 1).sum()), int((found == 2).sum())
    print(f"{name:20} skipped {int((found == 0).sum()):3d}, without a mask {clear:3d}, with one {edge:3d}; pairs seen {keep.mean():.0%}")
axes[0, 0].set_ylabel("queries")
axes[1, 0].set_ylabel("queries")
for axis in axes[1]:
    axis.set_xlabel("keys")
plt.show()

# %% [markdown]
# White tiles are never loaded, blue ones need no mask, orange ones do. Is that what the kernel does, or only what its author
# says? An experiment that could have gone the other way. Put NaN into the values of one block of keys and run the kernel. A
# query that has merely *masked* a key computes $0\cdot\mathrm{NaN}=\mathrm{NaN}$; a query whose tile was *skipped* cannot
# notice. So NaN in the output is a map of the tiles that were read.

# %%
q, k, v = (torch.from_numpy(rng.normal(size=(1, 1, 64, 8)).astype(np.float32)) for _ in range(3))
figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.3))
for axis, (name, how) in zip(axes, {"causal": {}, "window of 20": {"window": 20}}.items()):
    read = np.zeros((4, 4), dtype=int)
    for poisoned in range(4):
        bad = v.clone()
        bad[:, :, 16 * poisoned : 16 * (poisoned + 1)] = float("nan")
        out = op.attention(q, k, bad, causal=True, **how)  # tiles of 16 x 16 in the interpreter
        read[:, poisoned] = torch.isnan(out[0, 0]).reshape(4, -1).any(1)
    predicted = traffic.tiles(*traffic.intervals(reference.mask(64, 64, None, True, how.get("window"), "top-left")), 64, 16, 16)
    axis.imshow(read, cmap=ListedColormap(["#ffffff", PURPLE]), vmin=0, vmax=1)
    axis.set(xticks=range(4), yticks=range(4), xlabel="block of keys", ylabel="block of queries", title=f"{name}: tiles read")
    axis.grid(visible=False)
    print(f"{name}: read exactly the tiles that were predicted: {bool((read == (predicted > 0)).all())}, {int(read.sum())} of 16")
plt.show()

# %% [markdown]
# ### Exercise 2: how many tiles does a window cost?
#
# Causal, a window of $w$ keys, square tiles of side $b$, $w$ and $i_0$ multiples of $b$, far from the ends: how many tiles of
# keys does one block of queries read? And how many of them need no mask? Then the share of wasted work follows.


# %%
def my_window_tiles(w, b):
    """(tiles read by one block of queries, tiles among them that need no mask)"""
    ### BEGIN SOLUTION
    read = w // b + 1  # from the tile of i0 + 1 - w to the block's own
    clear = w // b - 1  # all but the first and the last
    return read, clear
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: how many tiles does a window cost?
for b in (8, 16):
    for w in (b, 2 * b, 3 * b, 5 * b):
        found = traffic.tiles(*traffic.intervals(reference.mask(256, 256, None, True, w, "top-left")), 256, b, b)
        row = found[128 // b]
        assert my_window_tiles(w, b) == (int((row > 0).sum()), int((row == 1).sum())), f"another number at w = {w}, b = {b}: count the row of a picture"
print("right")

# %% [markdown]
# ## 4. The forward kernel
#
# One program takes a block of queries, keeps $m$, $\ell$, $a$ in registers, and loops over its tiles. Keys come in, are used
# and are gone. With grouped heads (`gqa`, `mqa`) query head $h$ just reads the key head $\lfloor hH_{kv}/H\rfloor$: nothing
# is expanded. The package's loop, between loading a tile and the next:

# %%
lines = Path(kernel_forward.__file__).read_text().split("    for n0 in range(begin, stop, BLOCK_N):\n")[1].split("    some = total")[0]
print(lines.rstrip())

# %% [markdown]
# ### Exercise 3: write it
#
# The frame below finds the intervals and launches; the kernel has the block of queries and the loop. You write what happens
# to a tile. Given: `s` (BLOCK, BLOCK), scaled and capped but not masked, `keys` (BLOCK,), the interval `lo`, `hi` of each
# query (BLOCK,), `n_keys` (`hi` is never beyond it), `v` (BLOCK, DV), and the state `m`, `total` (BLOCK,), `a` (BLOCK, DV). Useful: `tl.where(condition, x, y)`, `tl.maximum`,
# `tl.max(x, axis=1)`, `tl.sum(x, axis=1)`, `tl.exp`, `tl.dot(p, v, input_precision="ieee")`, `float("-inf")`, and `x[:, None]`.
#
# It is compared with the reference by `compare`, the command that does it for a file of yours:
# `python -m kernels compare attention --impl my_file.py:attention`.


# %%
@triton.jit
def my_tile(s, keys, lo, hi, n_keys, v, m, total, a):
    """The state (m, total, a) after one more tile."""
    ### BEGIN SOLUTION
    s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - shift[:, None])
    old = tl.exp(m - shift)
    return new, old * total + tl.sum(p, axis=1), old[:, None] * a + tl.dot(p, v, input_precision="ieee")
    ### END SOLUTION


# %%
@triton.jit
def kernel(Q, K, V, LO, HI, OUT, L_q, L_k, d, d_v, scale, cap, TILE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):
    blocks = tl.cdiv(L_q, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    c, c_v = tl.arange(0, D), tl.arange(0, DV)
    lo = tl.load(LO + head * L_q + rows, mask=rows < L_q, other=0)
    hi = tl.load(HI + head * L_q + rows, mask=rows < L_q, other=0)
    q = tl.load(Q + head * L_q * d + rows[:, None] * d + c[None, :], mask=(rows < L_q)[:, None] & (c < d)[None, :], other=0.0).to(tl.float32)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    a = tl.zeros((BLOCK, DV), tl.float32)
    for start in range(0, L_k, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        here = (keys < L_k)[:, None]
        k = tl.load(K + head * L_k * d + keys[:, None] * d + c[None, :], mask=here & (c < d)[None, :], other=0.0).to(tl.float32)
        v = tl.load(V + head * L_k * d_v + keys[:, None] * d_v + c_v[None, :], mask=here & (c_v < d_v)[None, :], other=0.0).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            s = cap * (2.0 * tl.sigmoid(2.0 * s / cap) - 1.0)
        m, total, a = TILE(s, keys, lo, hi, L_k, v, m, total, a)
    out = a / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(OUT + head * L_q * d_v + rows[:, None] * d_v + c_v[None, :], out.to(OUT.dtype.element_ty), mask=(rows < L_q)[:, None] & (c_v < d_v)[None, :])


def kernel_around(tile):
    """A forward kernel whose tile is the given function, as a function like the reference's."""

    def attention(q, k, v, key_lengths=None, prefix=None, causal=False, window=None, align="bottom-right", scale=None, softcap=None):
        (B, H, L_q, d), (_, H_kv, L_k, d_v) = q.shape, v.shape
        keep = np.broadcast_to(reference.mask(L_q, L_k, None if prefix is None else prefix.numpy(), causal, window, align), (B, 1, L_q, L_k))
        if key_lengths is not None:
            keep = keep & (np.arange(L_k) < key_lengths.numpy()[:, None, None, None])
        ends = zip(*(traffic.intervals(one) for one in keep[:, 0].repeat(H, axis=0)))
        lo, hi = (torch.from_numpy(np.stack(end).astype(np.int32)) for end in ends)  # (B H, L_q)
        k, v = (t.detach().repeat_interleave(H // H_kv, 1).contiguous() for t in (k, v))
        out = torch.empty(B, H, L_q, d_v, dtype=q.dtype)
        widths = {"D": max(16, triton.next_power_of_2(d)), "DV": max(16, triton.next_power_of_2(d_v))}
        numbers = L_q, L_k, d, d_v, d**-0.5 if scale is None else scale, softcap or 1.0
        kernel[(B * H * triton.cdiv(L_q, 16),)](q.detach().contiguous(), k, v, lo, hi, out, *numbers, TILE=tile, CAPPED=softcap is not None, BLOCK=16, **widths)
        return out

    return attention


def outcome_of(tile, examples=12):
    """What `compare` finds on the values of a kernel around this tile."""
    subject = Subject({"attention": kernel_around(tile)}, "cpu", "interpreter", ours=False, differentiable=False)
    (outcome,) = compare.compare("attention", subject, examples=examples, number=0, properties=["reference"], dtypes=["float32"])
    return subject, outcome


# %% tags=["check"]
# Exercise 3: write it
_, outcome = outcome_of(my_tile)
assert outcome.passed, compare.report([outcome])
print("right: all masks, head groups and widths that were drawn")

# %% [markdown]
# ## 5. Two kernels that are almost right
#
# Both mistakes are classics, and both pass a test with one short sequence. The first forgets that $a$ belongs to an older
# maximum. The second masks what is hidden *within* the keys, and forgets that the last tile reaches beyond them: lanes
# outside load 0, a score of 0 is not $-\infty$, and the softmax is shared with keys that do not exist.


# %%
@triton.jit
def no_rescale(s, keys, lo, hi, n_keys, v, m, total, a):
    s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - shift[:, None])
    return new, tl.exp(m - shift) * total + tl.sum(p, axis=1), a + tl.dot(p, v, input_precision="ieee")


@triton.jit
def no_last_mask(s, keys, lo, hi, n_keys, v, m, total, a):
    hidden = (keys[None, :] < lo[:, None]) | ((keys[None, :] >= hi[:, None]) & (keys[None, :] < n_keys))
    s = tl.where(hidden, float("-inf"), s)
    new = tl.maximum(m, tl.max(s, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - shift[:, None])
    old = tl.exp(m - shift)
    return new, old * total + tl.sum(p, axis=1), old[:, None] * a + tl.dot(p, v, input_precision="ieee")


failing = {"no rescale": outcome_of(no_rescale, 30), "mask dropped in the last block": outcome_of(no_last_mask, 30)}
for name, (_, outcome) in failing.items():
    print(f"{name}: caught {not outcome.passed}; keys in the smallest failing case: {'more than one tile' if outcome.problem.inputs['k'].shape[2] > 16 else 'one tile is enough'}")

# %% [markdown]
# `compare` searches, then shrinks what failed. The smallest case says *when* it goes wrong; a picture of one that we choose,
# causal with 40 keys in tiles of 16, says *where*. And a test with one full tile of keys?


# %%
def causal_problem(L):
    """Causal attention of one head over L positions, as `compare` would draw it."""
    inputs = {name: rng.normal(size=(1, 1, L, 8)).astype(np.float32).astype(float) for name in "qkv"}
    how = {"causal": True, "window": None, "align": "top-left", "scale": None, "softcap": None}
    return Problem("attention", "float32", inputs, {"o": np.ones((1, 1, L, 8))}, how, constants={"key_lengths": None, "prefix": None})


chosen, short = causal_problem(40), causal_problem(16)
figure, axes = plt.subplots(2, 2, figsize=(10.5, 6.4), width_ratios=[1.6, 1])
for row, (name, (subject, outcome)) in zip(axes, failing.items()):
    for axis, problem in ((row[0], outcome.problem), (row[1], chosen)):
        out = to_array(execute(subject, problem, gradients=False).outputs[0])
        expected = family.expectations(problem)[0]
        share, keys = error_map(out, expected).reshape(-1, out.shape[-1]), problem.inputs["k"].shape[2]
        image = axis.imshow(np.clip(share, 1e-3, 1e3), norm=LogNorm(1e-3, 1e3), cmap="RdBu_r", aspect="auto", interpolation="nearest")
        axis.grid(visible=False)
        what = "causal, 40 keys" if problem is chosen else f"smallest failing case, {keys} key{'s' if keys > 1 else ''}"
        axis.set(xlabel="column of the output", ylabel="query", title=f"{name}:\n{what}", yticks=[0] if len(share) == 1 else range(0, 41, 8))
        if len(share) == 1:
            for column, (got, wanted) in enumerate(zip(out.ravel(), expected.truth.ravel())):
                text = f"{got:.2f}" if share[0, column] <= 1 else f"{got:.2f}\nnot\n{wanted:.2f}"
                axis.text(column, 0, text, ha="center", va="center", color="white", fontsize=9)
    figure.colorbar(image, ax=row[1], label="|error| / allowed")
plt.show()
for name, (subject, _) in failing.items():
    errors = error_map(to_array(execute(subject, chosen, gradients=False).outputs[0]), family.expectations(chosen)[0])[0, 0].max(1)
    tested = error_map(to_array(execute(subject, short, gradients=False).outputs[0]), family.expectations(short)[0])
    print(f"{name}: wrong from query {int(np.flatnonzero(errors > 1)[0])} on, {int((errors > 1).sum())} of 40; one full tile of keys passes: {bool(tested.max() <= 1)}")

# %% [markdown]
# Without the rescale only queries are wrong whose largest score comes after the first tile; nothing crashes, and most of the
# picture is blue. The dropped mask shrinks every output, because every program walks to the end of the keys.
#
# ## 6. The backward
#
# Let a bar mean the gradient of the loss. From $o_i=\sum_jp_{ij}v_j$ and the Jacobian of the softmax (`softmax-jacobian`),
#
# $$\bar v_j=\sum_ip_{ij}\bar o_i,\qquad\bar p_{ij}=\langle\bar o_i,v_j\rangle,\qquad
#   \bar s_{ij}=p_{ij}\Big(\bar p_{ij}-\sum_{j'}p_{ij'}\bar p_{ij'}\Big).$$
#
# The sum in the bracket runs over a whole row, which a kernel in tiles has not got. But
#
# $$\sum_{j'}p_{ij'}\bar p_{ij'}=\sum_{j'}p_{ij'}\langle\bar o_i,v_{j'}\rangle=\langle\bar o_i,o_i\rangle=:\delta_i ,$$
#
# one number a query, from two vectors that are there anyway. And $p_{ij}=e^{s_{ij}-\mathrm{LSE}_i}$ can be made again, tile by
# tile, from the saved log-sum-exp $\mathrm{LSE}_i=m_i+\log\ell_i$: no matrix is stored, one product is done twice.
#
# ### Exercise 4: the gradient from a log-sum-exp
#
# One head, no mask. You get $o$ and $\mathrm{LSE}$, and may not take another softmax, maximum or row sum of $p$.


# %%
def my_backward(q, k, v, o, lse, do, scale):
    """dq, dk, dv."""
    ### BEGIN SOLUTION
    p = np.exp(scale * q @ k.T - lse[:, None])
    delta = (o * do).sum(-1)
    ds = p * (do @ v.T - delta[:, None])
    return scale * ds @ k, scale * ds.T @ q, p.T @ do
    ### END SOLUTION


# %% tags=["check"]
# Exercise 4: the gradient from a log-sum-exp
q, k, v = (torch.from_numpy(rng.normal(size=(1, 1, n, 6))).requires_grad_() for n in (9, 13, 13))
do = rng.normal(size=(9, 6))
scores = 0.4 * q @ k.transpose(-1, -2)
out = torch.softmax(scores, -1) @ v
wanted = torch.autograd.grad(out, (q, k, v), torch.from_numpy(do)[None, None])
arrays = [t.detach().numpy()[0, 0] for t in (q, k, v, out, torch.logsumexp(scores, -1))]
for name, ours, theirs in zip(("dq", "dk", "dv"), my_backward(*arrays, do, 0.4), wanted):
    np.testing.assert_allclose(ours, theirs.numpy()[0, 0], atol=1e-12, err_msg=name)
print("right")

# %% [markdown]
# Two consequences that need no reference, and are properties of `compare`: each row of $\bar s$ sums to 0, so $\sum_j\bar k_j=0$
# when nothing else is done to the scores; and each row of $p$ to 1, so $\sum_j\bar v_j=\sum_i\bar o_i$. On the kernel, in float32, with two query
# heads on one key head:

# %%
q, k, v = (torch.from_numpy(rng.normal(size=(1, h, n, 8)).astype(np.float32)).requires_grad_() for h, n in ((2, 40), (1, 33), (1, 33)))
do = torch.from_numpy(rng.normal(size=(1, 2, 40, 8)).astype(np.float32))
dq, dk, dv = torch.autograd.grad(op.attention(q, k, v), (q, k, v), do)
print(f"largest |dk| {dk.abs().max():.1f}; its sum over the keys is below 1e-4: {bool(dk.sum(2).abs().max() < 1e-4)}")
print(f"sum of dv = sum of do over both heads: {bool(torch.allclose(dv.sum((1, 2)), do.sum((1, 2)), atol=1e-4))}")
checked = gradcheck(lambda q, k, v: reference.attention(q, k, v, causal=True), [rng.normal(size=(1, h, n, 3)) for h, n in ((2, 5), (1, 5), (1, 5))])
print("and the reference itself passes the gradient check:", checked.passed)

# %% [markdown]
# ### Who stays, who passes
#
# dQ sums over keys, dK and dV sum over queries (and over the query heads of their group). One loop cannot keep all three in
# registers. Programs that stay with their keys could *add* their share of dQ into memory as they go, but then whoever comes
# first is added first, and that changes from run to run. Does the order matter?

# %%
shares = rng.normal(size=(64, 16)).astype(np.float32)  # what 64 tiles of keys send to 16 numbers of dQ
sums = set()
for _ in range(200):
    total = np.zeros(16, np.float32)
    for tile_number in rng.permutation(64):
        total += shares[tile_number]
    sums.add(total.tobytes())
print(f"200 orders of adding the same 64 shares give more than 100 different results: {len(sums) > 100}")
n = traffic.pairs(4096, 4096)
print(f"products of a tile: {traffic.forward_flops(n, 128, 128) // (2 * n * 128)} forward, {traffic.backward_flops(n, 128, 128) // (2 * n * 128)} needed backward, {traffic.issued_backward_flops(n, 128, 128) // (2 * n * 128)} made by two passes")

# %% [markdown]
# Our backward walks the tiles twice, once with keys staying and once with queries, makes seven products where five would
# do, and gives the same bits every time. In the picture the arrow is the direction of the loop; what is kept in registers
# lies across it.

# %%
found = traffic.tiles(*traffic.intervals(masks["causal"]), L, 16, 16)
figure, axes = plt.subplots(1, 2, figsize=(8.2, 4))
for axis, title, kept in ((axes[0], "dQ: queries stay, keys pass", "row"), (axes[1], "dK, dV: keys stay, queries pass", "column")):
    axis.imshow(found, cmap=colours, vmin=0, vmax=2)
    for i in range(6):
        seen = np.flatnonzero(found[i] if kept == "row" else found[:, i])
        start, stop = seen[0] - 0.35, seen[-1] + 0.35
        ends = ((start, i), (stop, i)) if kept == "row" else ((i, start), (i, stop))
        axis.annotate("", xy=ends[1], xytext=ends[0], arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.6})
    axis.set(xticks=range(6), yticks=range(6), xlabel="block of keys", ylabel="block of queries", title=title)
    axis.grid(visible=False)
plt.show()

# %% [markdown]
# ## 7. In which precision
#
# Scores, $m$, $\ell$, $a$ are float32 whatever comes in. Two roundings are the kernel's own: probabilities are rounded to
# 16 bits before they meet V, and the saved output before $\delta$ is made of it. The rule that judges the kernel knows
# both (`kernels/attention/problems.py`, `scales`). How near does the kernel come?

# %%
for dtype, prop in (("float32", "reference"), ("float16", "gradient")):
    (outcome,) = [o for o in compare.compare("attention", examples=3, number=1, dtypes=[dtype], properties=[prop]) if o.function == "attention"]
    print(f"{dtype} {prop:9}: passed {outcome.passed}; measured below half of what is allowed: {outcome.verdict.ratio < 0.5}")

# %% [markdown]
# What the compiler makes of it needs no GPU either: `python -m kernels compile attention` shows registers, shared memory and
# tensor-core instructions for four machines, and lesson 29 reads them. The speed does need one, and has not been measured.
#
# ## What to take along
#
# 1. A softmax over any set of keys is three numbers (one of them a vector), and they merge in any order.
# 2. Masks are intervals: their ends bound the loop, and say which tiles need no mask.
# 3. $\delta_i=\langle o_i,\bar o_i\rangle$ and the log-sum-exp replace the matrix of probabilities in the backward.
# 4. Without atomics: seven products instead of five, and the same bits every time.
# 5. A test with one tile of keys finds neither a missing rescale nor a missing mask.
