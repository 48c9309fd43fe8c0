# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 06 · Norms and the residual stream
#
# A deep network adds branch upon branch to one stream. Norms decide how large the stream gets, and whether a gradient that
# starts at the top reaches the bottom with its size intact. There are five norms in this lesson, and they are one formula,
#
# $$y=g\,\frac{x-\mu}{\sqrt{s^2+\varepsilon_0}}+b,$$
#
# with five answers to the question *which numbers are averaged?*
#
# Equations: `layernorm`, `layernorm-backward`, `rmsnorm`, `rmsnorm-layernorm-relation`, `rmsnorm-mean-shift`, `batchnorm-1d`,
# `batchnorm-2d`, `batchnorm-running`, `groupnorm`, `pre-ln`, `post-ln`, `final-ln`, `norm-gradient-flow`, `warmup-need`,
# `norm-cost`. Figures of the sources: `wn-layernorm-eps`, `wn-rmsnorm-norm`, `wn-preln-speed`, `wn-rmsnorm-speed`.
#
# After it you can
# - say for each norm what it averages over, and what that means for a single sentence at inference,
# - predict how the stream of a pre-norm network grows with depth, and measure it,
# - explain why a post-norm network wants its learning rate warmed up.

# %%
import inspect
import os

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional import batch_norms as bn
from minillm.functional.norms import layer_norm, rms_norm, split_mean_shift
from minillm.nn.depth_experiments import PLACEMENTS, last_layer_gradient, stream_variance, warmup_trial
from minillm.plotting import BLUE, GREEN, VERMILION, use_style

use_style()
LONG = os.environ.get("LESSON_LONG") == "1"  # more seeds and deeper stacks, some minutes
SEEDS = 20 if LONG else 4

# %% [markdown]
# ## 1. Which numbers are averaged?
#
# Take activations of shape (batch, channels, places). Number each entry by the group that shares its mean and variance.

# %%
B, C, P = 4, 6, 5
groups = {
    "BatchNorm: a channel, over the batch": np.broadcast_to(np.arange(C)[None, :], (B, C)),
    "LayerNorm: a sample (or a token)": np.broadcast_to(np.arange(B)[:, None], (B, C)),
    "GroupNorm: half of a sample's channels": 2 * np.arange(B)[:, None] + (np.arange(C) >= C // 2)[None, :],
    "InstanceNorm: one channel of one sample": np.arange(B * C).reshape(B, C),
}
figure, panels = plt.subplots(1, 4, figsize=(12, 2.6))
for panel, (title, numbers) in zip(panels, groups.items()):
    panel.imshow(numbers, aspect="auto")
    for (i, j), number in np.ndenumerate(numbers):
        panel.text(j, i, number, ha="center", va="center", fontsize=8, color="white" if number < 0.6 * numbers.max() else "black")
    panel.set_title(title, fontsize=9)
    panel.set(xlabel="channel", ylabel="sample", xticks=range(C), yticks=range(B))
    panel.grid(False)
plt.show()

# %% [markdown]
# Equal number, one mean. RMSNorm averages what LayerNorm does, but takes no mean away. In code, they share a helper:

# %%
print(inspect.getsource(bn._normalise))
print(inspect.getsource(bn.batch_norm_2d).split('"""')[2])
print(inspect.getsource(bn.group_norm).split('"""')[2])

# %% [markdown]
# The gradient of each comes from the engine. Finite differences agree, and so does a formula: with $\hat g=g\odot\bar y$ and a bar
# for the mean over whatever was averaged,
#
# $$\bar x=\frac1{\sqrt{s^2+\varepsilon_0}}\big(\hat g-\overline{\hat g}-\hat x\,\overline{\hat g\odot\hat x}\big).$$

# %%
rng = np.random.default_rng(0)
x2, g2, b2 = rng.normal(size=(6, 4)), rng.normal(size=4), rng.normal(size=4)
for name, function in (("batch norm", bn.batch_norm_1d), ("layer norm", layer_norm)):
    print(name, "passes the gradient check:", gradcheck(function, [x2, g2, b2]).passed)

x = Tensor(x2, requires_grad=True)
dy = rng.normal(size=(6, 4))
(found,) = grad([bn.batch_norm_1d(x, Tensor(g2), Tensor(b2))], [x], [dy])
s = np.sqrt(x2.var(0) + 1e-5)
x_hat, g_hat = (x2 - x2.mean(0)) / s, g2 * dy
formula = (g_hat - g_hat.mean(0) - x_hat * (g_hat * x_hat).mean(0)) / s
print("and is the formula with means over the batch:", np.allclose(found.data, formula))

# %% [markdown]
# ### Exercise 1: GroupNorm from LayerNorm
#
# Write GroupNorm (without gain and shift) for `x` of shape $(B,C,P)$ using nothing but reshapes and one normalisation of a
# last axis.


# %%
def my_group_norm(x, n_groups, eps=1e-5):
    """Normalise each group of channels of each sample."""
    ### BEGIN SOLUTION
    rows = x.reshape(x.shape[0], n_groups, -1)
    centred = rows - rows.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)).reshape(x.shape)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: GroupNorm from LayerNorm
sample = rng.normal(size=(B, C, P))
for n in (1, 2, 3, 6):
    theirs = bn.group_norm(Tensor(sample), Tensor(np.ones(C)), Tensor(np.zeros(C)), n).data
    np.testing.assert_allclose(my_group_norm(sample, n), theirs, atol=1e-12, err_msg=f"{n} groups")
print("right")

# %% [markdown]
# ## 2. Why language models do not use BatchNorm
#
# It couples the samples of a batch: what a sentence is mapped to depends on who else is in the batch. And for a single
# sentence at inference there is no batch, so running averages from training stand in: another function than was trained.

# %%
running = bn.RunningStatistics.fresh(4)
gaps = []
ones, zeros = Tensor(np.ones(4)), Tensor(np.zeros(4))
for _ in range(60):
    batch = 1.5 + 2 * rng.normal(size=(32, 4))
    running.update(batch)
    trained, used = bn.batch_norm_1d(Tensor(batch), ones, zeros).data, running.apply(Tensor(batch), ones, zeros).data
    gaps.append(np.abs(trained - used).mean())
alone = np.array([[2.0, -1.0, 0.5, 3.0]])
together = np.concatenate([alone, 10 + rng.normal(size=(31, 4))])
print("LayerNorm, alone and in a batch, the same:", np.array_equal(
    layer_norm(Tensor(alone), ones, zeros).data[0], layer_norm(Tensor(together), ones, zeros).data[0]))
print("BatchNorm of a sample alone:", bn.batch_norm_1d(Tensor(alone), ones, zeros).data[0], " (every feature is its own mean)")

figure, axes = plt.subplots(figsize=(7, 2.6))
axes.plot(gaps, color=BLUE)
axes.set(xlabel="batches seen", ylabel="mean gap", ylim=(0, None), title="BatchNorm: what was trained and what is used at inference differ")
plt.show()

# %% [markdown]
# ## 3. LayerNorm and RMSNorm: what the mean is for
#
# $\mathrm{LN}(\mathbf x)=\mathrm{RMSNorm}(\mathbf C\mathbf x)$ with $\mathbf C=\mathbf I-\frac1d\mathbf 1\mathbf 1^\top$, exactly. One often
# reads that the mean does not matter because a following bias could absorb it. The identity
# $\mathbf Wy+b=\mathbf W(y-\mu_y\mathbf 1)+(b+\mu_y\mathbf W\mathbf 1)$ is right, but $\mu_y$ is another one for every token (erratum 12):

# %%
tokens = rng.normal(size=(5, 64)) + rng.normal(size=(5, 1))
weight = rng.normal(size=(3, 64))
from_mean, rest = split_mean_shift(Tensor(tokens), Tensor(weight), Tensor(np.zeros(3)))
print("the two parts add up:", np.allclose(from_mean.data + rest.data, tokens @ weight.T))
print("what a constant bias would have to be, token by token:")
print(np.round(from_mean.data, 1))

# %% [markdown]
# Two slips that numbers settle. A source divides by $\sqrt{s+\varepsilon_0}$, the root of the standard deviation (erratum 10). And
# RMSNorm makes the root mean square 1, so the *length* of a row of 5120 is $\sqrt{5120}$ and not 1, as a slide has it (erratum 11).

# %%
wide = 10 * rng.normal(size=(200, 256))
right = layer_norm(Tensor(wide), Tensor(np.ones(256)), Tensor(np.zeros(256))).data
slip = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.std(-1, keepdims=True) + 1e-5)
print(f"spread 10 becomes {right.std():.2f} with the root of the variance, {slip.std():.2f} with the root of the deviation")
row = rms_norm(Tensor(rng.normal(size=5120) * 7), Tensor(np.ones(5120)), 0.0).data
print(f"root mean square {np.sqrt((row**2).mean()):.3f}, length {np.linalg.norm(row):.3f}")
for kind in ("layernorm", "rmsnorm"):
    cost = bn.norm_cost(kind, 5120)
    print(f"{kind:<10}{cost.reductions} sums over the row, {cost.operations:,} operations, {cost.parameters:,} parameters")

# %% [markdown]
# How much *time* that saves depends on the machine and on who wrote the code. The sources say 30 % of a norm and 2 to 6 % of a
# model; this course measures (lesson 03) and does not assert.
#
# ### Exercise 2: the smallest eps that matters
#
# With $\varepsilon_0=10^{-5}$ and a row whose entries all have size $a$, RMSNorm returns entries of size $a/\sqrt{a^2+\varepsilon_0}$.
# Return the $a$ at which they are exactly one half.


# %%
def half_size(eps):
    """The size of the entries at which the norm returns one half."""
    ### BEGIN SOLUTION
    return np.sqrt(eps / 3)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: the smallest eps that matters
a = half_size(1e-5)
value = rms_norm(Tensor(np.full(8, a)), Tensor(np.ones(8)), 1e-5).data
np.testing.assert_allclose(value, 0.5, rtol=1e-9, err_msg="a / sqrt(a^2 + eps) is not one half")
print("right")

# %% [markdown]
# ## 4. Before the branch or after the addition?
#
# Post-norm, the original: $\mathbf x\leftarrow\mathrm{LN}(\mathbf x+F(\mathbf x))$. Pre-norm, today's: $\mathbf x\leftarrow\mathbf x+F(\mathrm{LN}(\mathbf x))$, with
# one more norm at the end. A source says that pre-norm keeps the variance of the stream at bay. Before you run the next cell:
# for branches of variance about 1, what will the variance be after 48 blocks, in either?

# %%
depth = 48
figure, axes = plt.subplots(figsize=(7, 3))
for placement, colour in zip(PLACEMENTS, (BLUE, VERMILION)):
    curves = np.array([stream_variance(depth, placement, np.random.default_rng(s)) for s in range(SEEDS)])
    axes.plot(curves.mean(0), color=colour, label=f"{placement}-norm")
    axes.fill_between(range(depth + 1), curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
    print(f"{placement}-norm: variance after {depth} blocks {'about 1' if curves[:, -1].mean() < 1.1 else 'more than half of 48' if curves[:, -1].mean() > 24 else 'something else'}")
axes.set(xlabel="blocks", ylabel="variance of the stream", title="The stream at initialisation")
axes.legend()
plt.show()

# %% [markdown]
# Pre-norm normalises what a branch *reads*, not what is added up: variances of independent branches add, so the stream grows about
# linearly (erratum 13). The final norm makes up for it once, before the head. Now the gradients.

# %%
depths = (6, 12, 24, 48)
lengths = {
    placement: np.array([[last_layer_gradient(n, placement, np.random.default_rng(s)) for n in depths] for s in range(SEEDS)])
    for placement in PLACEMENTS
}
figure, axes = plt.subplots(figsize=(7, 3))
for placement, colour in zip(PLACEMENTS, (BLUE, VERMILION)):
    mean = lengths[placement].mean(0)
    axes.plot(depths, mean, "o-", color=colour, label=f"{placement}-norm")
    axes.fill_between(depths, lengths[placement].min(0), lengths[placement].max(0), color=colour, alpha=0.2, linewidth=0)
reference = lengths["pre"].mean(0)[0] * np.sqrt(depths[0] / np.array(depths))
axes.plot(depths, reference, "--", color="grey", label="falls with one over the root of depth")
axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="length of the gradient", title="The last block's gradient at initialisation")
axes.set_xticks(depths, [str(n) for n in depths])
axes.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
axes.minorticks_off()
axes.legend()
plt.show()
print("pre-norm falls with depth:", bool((np.diff(lengths["pre"].mean(0)) < 0).all()))
print("post-norm keeps at least half of it from 6 to 48:", bool(lengths["post"].mean(0)[-1] > 0.5 * lengths["post"].mean(0)[0]))

# %% [markdown]
# In a pre-norm stack every block writes a share of a stream that $N$ blocks share, so the gradient that each receives falls with
# $1/\sqrt N$. In a post-norm stack the last block's gradient does not fall: with many layers and a full learning rate from the
# first step, the first updates are too large.
#
# ## 5. Who needs warm-up?
#
# The same task, the same learning rate, with and without 60 steps of warm-up. What do you expect?

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
ends = {}
for panel, placement in zip(panels, PLACEMENTS):
    trials = [warmup_trial(placement, seed) for seed in range(3)]
    for curves, colour, label in (
        (np.array([t.without for t in trials]), VERMILION, "from the first step"),
        (np.array([t.with_warmup for t in trials]), GREEN, "warmed up"),
    ):
        panel.plot(curves.mean(0), color=colour, label=label)
        panel.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
        ends[placement, label] = curves[:, -1].mean()
    panel.set(yscale="log", xlabel="step", title=f"{placement}-norm, 12 blocks")
panels[0].set_ylabel("training loss")
panels[0].legend()
plt.show()
for (placement, label), end in ends.items():
    print(f"{placement}-norm, {label:<20} {'learnt' if end < 0.01 else 'not learnt'}")

# %% [markdown]
# One task, three seeds: a trend, not a constant. In other settings pre-norm models profit from warm-up too, and "1.3 to 1.5 times
# faster", as a source has it, is a figure of one setting (erratum 14).
#
# ### Exercise 3: how large must the branches be?
#
# A trick of GPT-2: multiply the maps that write into the stream by $1/\sqrt{2N}$ at initialisation. If each of $2N$ branches has
# variance $v$ and they are independent, what does the stream's variance come to, starting from 1? Return it as a function of
# `n_blocks` (with two branches each), `v` and whether the trick is used.


# %%
def final_variance(n_blocks, v, scaled):
    """Variance of the stream after all branches."""
    ### BEGIN SOLUTION
    branches = 2 * n_blocks
    return 1 + branches * v / (branches if scaled else 1)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: how large must the branches be?
for n_blocks, v in ((6, 1.0), (24, 0.5)):
    for scaled in (False, True):
        factor = 1 / np.sqrt(2 * n_blocks) if scaled else 1.0
        branches = rng.normal(size=(2 * n_blocks, 40_000)) * np.sqrt(v) * factor
        simulated = (rng.normal(size=40_000) + branches.sum(0)).var()
        assert abs(final_variance(n_blocks, v, scaled) / simulated - 1) < 0.05, f"{n_blocks} blocks, scaled={scaled}"
print("right")

# %% [markdown]
# ## What to take along
#
# - Five norms, one formula; they differ in what is averaged, and only averages over a token's own features leave tokens alone.
# - Pre-norm: a highway whose variance grows with depth, gradients that shrink with its root, no warm-up needed here.
# - Post-norm: a stream of constant size, gradients that do not shrink, and a start that has to be gentle.
#
# Next: lesson 07 looks at what stands behind the second norm of a block, the feed-forward network.
