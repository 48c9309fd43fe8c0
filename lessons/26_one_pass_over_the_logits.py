# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 26 · One pass over the logits: log-softmax and the policy loss
#
# The largest tensor of a training step is the last one: one number for every token and every word of the vocabulary. Eight
# thousand tokens before 128,256 words are a billion logits, 2.1 GB in bfloat16. All that a loss wants from them is three
# numbers a token: the log-probability of the word that was chosen, the log-sum-exp, and perhaps the entropy. So the whole
# question is how often those gigabytes are read. The answer of this lesson is once, and written once as their own gradient;
# and in the last form, never stored at all.
#
# Equations: `logsumexp`, `log-softmax`, `softmax-stable`, `gather-logprob`, `entropy`, `cross-entropy-logits`, `label-smoothing`,
# `importance-ratio`, `ppo-clip`, `ppo-gradient-region`, `grpo-loss`, `kl-estimator-k1`, `kl-estimator-k2`, `kl-estimator-k3`,
# `entropy-bonus`, `loss-aggregation`, `lm-head`, `gradient-check`.
#
# After it you can
# - compute log-sum-exp and entropy of a row that never fits in memory, and merge parts of it in any order,
# - write the gradient of every loss on logits as one formula with four coefficients,
# - say what in-place gradients and the fused linear loss save, in bytes, before anybody measures it.

# %%
import inspect
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # run kernels on the CPU; this must come before triton is imported

import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl

from kernels import compare
from kernels.problem import Problem, to_array
from kernels.subject import Subject, execute
from kernels.token_loss import config, family, kernel_tiles, op, traffic
from kernels.tolerance import error_map
from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional import information, policy_losses, reductions
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, VERMILION, use_style

use_style()
np.seterr(all="ignore")  # lanes outside a row hold minus infinity, and 0 times infinity there is no news
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. A running log-sum-exp
#
# The textbook form needs the maximum first, and so reads the row twice:
# $\mathrm{LSE}(z)=m+\log\sum_je^{z_j-m}$ with $m=\max_jz_j$. But the pair $(m,s)$ with $s=\sum_je^{z_j-m}$ can be kept *while*
# reading. When a tile raises the maximum from $m$ to $m'$, everything summed so far was measured against the wrong height; one
# factor repairs it:
#
# $$s\gets s\,e^{m-m'}+\sum_{j\in\text{tile}}e^{z_j-m'}.$$

# %%
logits = np.linspace(0, 6, 64) + 1.3 * rng.normal(size=64)
BLOCK = 8
m, s, track = -np.inf, 0.0, []
for start in range(0, 64, BLOCK):
    tile = logits[start : start + BLOCK]
    higher = max(m, tile.max())
    factor = np.exp(m - higher)
    s = s * factor + np.exp(tile - higher).sum()
    m = higher
    track.append((start + BLOCK, m, s, factor))
ends, tops, sums, factors = np.array(track).T
truth = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
print("running:", round(m + np.log(s), 10), " all at once:", round(truth, 10))

figure, axes = plt.subplots(2, 1, figsize=(8.4, 4.6), sharex=True, height_ratios=(2, 1))
axes[0].bar(np.arange(64) + 0.5, logits, color=BLUE, width=0.8, alpha=0.55)
axes[0].step(np.r_[0, ends], np.r_[tops[0], tops], where="pre", color=VERMILION, label="running maximum m")
axes[0].plot(ends, tops + np.log(sums), "o-", color=GREEN, ms=5, label="m + log s: the log-sum-exp so far")
for end, factor in zip(ends, factors):
    if 0 < factor < 1:
        axes[0].annotate(f"x {factor:.2g}", (end, logits.min() + 0.2), ha="right", fontsize=8, color=VERMILION)
axes[0].legend(loc="upper left")
axes[0].set(title="Tiles of 8; in red what multiplies the old sum when the maximum rises")
axes[1].bar(ends - 4, sums, width=7, color=ORANGE)
axes[1].set(ylabel="s", xlabel="position in the row")
for axis in axes:
    axis.set_xticks(ends)
plt.show()

# %% [markdown]
# ### The entropy in the same pass
#
# $\mathcal H=-\sum_jp_j\log p_j$ looks as if it needed $p$ first. Carry a third number, $u=\sum_je^{z_j-m}(z_j-m)$. Since
# $\log p_j=z_j-m-\log s$,
#
# $$\mathcal H=\log s-\frac us.$$
#
# When the maximum rises by $-g=m'-m$, each summand of $u$ changes twice: its weight by $r=e^{g}$, and its height by $g$. So
# $u\gets r\,(u+g\,s)$.
#
# ### Exercise 1: merge two parts
#
# Two programs have each read a part of the row. Merge their `(m, s, u)`. An empty part is `(-inf, 0, 0)`, and merging it must change
# nothing (beware of $-\infty-(-\infty)$).


# %%
def part(z):
    """(m, s, u) of some logits."""
    if len(z) == 0:
        return -np.inf, 0.0, 0.0
    m = z.max()
    return m, np.exp(z - m).sum(), (np.exp(z - m) * (z - m)).sum()


def merge(a, b):
    """(m, s, u) of both parts together."""
    ### BEGIN SOLUTION
    m = max(a[0], b[0])
    s = u = 0.0
    for m_part, s_part, u_part in (a, b):
        if m_part > -np.inf:
            g = m_part - m
            s += np.exp(g) * s_part
            u += np.exp(g) * (u_part + g * s_part)
    return m, s, u
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: merge two parts
whole = part(logits)
for cut in (0, 1, 10, 63, 64):
    found = merge(part(logits[:cut]), part(logits[cut:]))
    assert np.allclose(found, whole), f"cut at {cut}: {found} is not {whole}"
a, b, c = part(logits[:9]), part(logits[9:30]), part(logits[30:])
assert np.allclose(merge(merge(a, b), c), merge(a, merge(b, c))), "merging must not depend on the order"
assert merge((-np.inf, 0.0, 0.0), (-np.inf, 0.0, 0.0)) == (-np.inf, 0.0, 0.0)
print("right: entropy", round(np.log(whole[1]) - whole[2] / whole[1], 4), "nats")

# %% [markdown]
# Because the merge is associative and commutative, the row may be cut *anywhere*: over tiles, over programs, over the threads of a
# program. The package's kernel uses that to the end. Each thread keeps an own $(m,s,u)$ for every 16 bytes that it loads at once, so threads
# exchange nothing until the row is finished. This is the device function that absorbs one tile:

# %%
print(inspect.getsource(kernel_tiles.absorb.fn))

# %% [markdown]
# Count its exponentials: `exp2(depth)` once an element, `exp2(gap)` once a lane of eight (for 16-bit logits). That number can
# be read off the machine code: `python -m kernels compile token_loss` fails unless a thread with 16 elements executes exactly
# $16+2+2$ of them (the last two when lanes are merged). Does it compute the right thing, and is the reference's own gradient right?

# %%
z = rng.normal(size=(4, 50)).astype(np.float32) * 3
chosen = rng.integers(0, 50, 4)
ours = [to_array(t) for t in op.token_logprobs(torch.from_numpy(z), torch.from_numpy(chosen))]
exact = z.astype(np.float64)
lse = np.log(np.exp(exact).sum(-1))
log_p = exact - lse[:, None]
wanted = [log_p[np.arange(4), chosen], lse, -(np.exp(log_p) * log_p).sum(-1)]
for name, got, want in zip(("log-prob", "log-sum-exp", "entropy"), ours, wanted):
    print(f"{name:12} within 2e-6 of float64: {bool(np.abs(got - want).max() < 2e-6)}")
worst = gradcheck(information.entropy_from_logits, [Tensor(exact[:2, :6], requires_grad=True)])
print("finite differences agree with the entropy's gradient:", worst.passed)

# %% [markdown]
# ### Exercise 2: write the kernel
#
# One program takes one row of a contiguous matrix and walks it in tiles of `BLOCK`. Complete the loop. Masked lanes need a
# value that adds nothing to the sum and is never the maximum. Then `compare` tries it on rows of 2 to 64 logits.


# %%
@triton.jit
def my_lse_kernel(X, LSE, V, BLOCK: tl.constexpr):
    """The log-sum-exp of one row."""
    row = tl.program_id(0).to(tl.int64)
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        ### BEGIN SOLUTION
        x = tl.load(X + row * V + cols, mask=cols < V, other=-float("inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
        ### END SOLUTION
    tl.store(LSE + row, top + tl.log(total))


def statistics_with(kernel):
    """A `token_logprobs` around a log-sum-exp kernel; the rest is torch."""

    def token_logprobs(logits, targets, temperature, ignore_index):
        keep = targets != ignore_index
        z = (torch.where(keep[..., None], logits.detach().float(), torch.zeros(())) / temperature).contiguous()
        lse = torch.zeros(z.shape[:-1])
        kernel[(lse.numel(),)](z, lse, z.shape[-1], BLOCK=16)
        ids = torch.where(keep, targets, torch.zeros_like(targets))
        log_p = torch.log_softmax(z, -1)
        entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, torch.zeros(())).sum(-1)
        logp = z.gather(-1, ids[..., None])[..., 0] - lse
        return tuple(torch.where(keep, x, torch.zeros(())) for x in (logp, lse, entropy))

    return token_logprobs


def outcome_of(kernel, examples=12):
    """What `compare` finds when the kernel stands in for ours."""
    subject = Subject({"token_logprobs": statistics_with(kernel)}, "cpu", "interpreter", ours=False, differentiable=False)
    (found,) = compare.compare("token_loss", subject, examples=examples, number=0, properties=["reference"], dtypes=["float32"])
    return found


# %% tags=["check"]
# Exercise 2: write the kernel
found = outcome_of(my_lse_kernel)
assert found.passed, compare.report([found])
print("right, on every problem that compare tried")

# %% [markdown]
# ## 2. A kernel that is almost right
#
# Forget the factor that repairs the old sum. The code runs, and gives the right answer for every vocabulary that fits in one tile,
# and for every row whose maximum stands in the first tile. A test with one friendly shape would pass.


# %%
@triton.jit
def forgetful_kernel(X, LSE, V, BLOCK: tl.constexpr):
    """Log-sum-exp without the rescaling."""
    row = tl.program_id(0).to(tl.int64)
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * V + cols, mask=cols < V, other=-float("inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total + tl.sum(tl.exp(x - higher), axis=0)  # the old sum is measured against the old maximum
        top = higher
    tl.store(LSE + row, top + tl.log(total))


found = outcome_of(forgetful_kernel, 20)
assert not found.passed
smallest = found.problem
print("caught; the smallest case found has rows longer than a tile of 16:", smallest.inputs["logits"].shape[-1] > 16)

# %% [markdown]
# `compare` searches at random and then shrinks what failed, so the smallest case is a hint: it never fits in one tile. A picture
# of many rows says the rest. Each row below has its maximum somewhere else.

# %%
V, n_rows = 64, 24
z = rng.normal(size=(n_rows, V)) * 0.4
peak = np.sort(rng.integers(0, V, n_rows))
z[np.arange(n_rows), peak] = 3.0
z = z.astype(np.float32).astype(np.float64)
problem = Problem(
    "token_logprobs", "float32", {"logits": z}, {"logp": None, "lse": None, "entropy": None},
    {"temperature": 1.0, "ignore_index": -100}, constants={"targets": peak}, dtypes={n: "float32" for n in ("logp", "lse", "entropy")},
)
shown = {}
for name, kernel in (("forgetful", forgetful_kernel), ("yours", my_lse_kernel)):
    subject = Subject({"token_logprobs": statistics_with(kernel)}, "cpu", "interpreter", ours=False, differentiable=False)
    run = execute(subject, problem, gradients=False)
    judged = Problem(**{**vars(problem), "cotangents": {n: np.zeros(n_rows) for n in problem.cotangents}})
    shown[name] = error_map(to_array(run.outputs[1]), family.expectations(judged)[1])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(2, 1))
axes[0].imshow(z, aspect="auto", cmap="Blues")
for edge in (16, 32, 48):
    axes[0].axvline(edge - 0.5, color=VERMILION, linewidth=1)
axes[0].set(title="The logits; red: where tiles begin", xlabel="column", ylabel="row")
axes[1].barh(np.arange(n_rows), np.maximum(shown["forgetful"], 1e-2), color=VERMILION, label="forgetful")
axes[1].plot(np.maximum(shown["yours"], 1e-2), np.arange(n_rows), "o", color=GREEN, ms=4, label="yours")
axes[1].axvline(1, color="black", linewidth=0.8, linestyle="--")
axes[1].set(xscale="log", ylim=(n_rows - 0.5, -0.5), title="LSE: |error| / allowed", xlabel="limit 1; 0 drawn at 0.01")
axes[1].legend(loc="upper right", fontsize=8)
for axis in axes:
    axis.grid(visible=False)
plt.show()
wrong = shown["forgetful"] > 1
print("rows with the maximum in the first tile that are wrong:", int(wrong[peak < 16].sum()), "of", int((peak < 16).sum()))
print("rows with the maximum behind it that are wrong:        ", int(wrong[peak >= 16].sum()), "of", int((peak >= 16).sum()))

# %% [markdown]
# ## 3. One backward for every loss
#
# Let a loss depend on a row's logits through $\log p_y$, $\mathcal H$ and LSE, with derivatives $a$, $b$ and $c$ (and $d$ by the mean
# logit, for label smoothing). Then, with temperature 1,
#
# $$\bar z_j=p_j\,\big(c-a-b\,(\log p_j+\mathcal H)\big)+a\,\mathbf 1\{j=y\}+\frac dV .$$
#
# | loss of a token with weight $w$ | $a$ | $b$ | $c$ | $d$ |
# |---|---|---|---|---|
# | cross-entropy | $-w$ | | | |
# | with smoothing $\epsilon$ | $-w(1-\epsilon)$ | | $w\epsilon$ | $-w\epsilon$ |
# | penalty $\zeta\,\mathrm{LSE}^2$ | | | $2w\zeta\,\mathrm{LSE}$ | |
# | policy gradient | $-wA$ | | | |
# | clipped, ratio $\rho$ | $-wA\rho$, or 0 where clipped | | | |
# | KL penalty $\beta k_3$ | $w\beta(1-e^d)$ | | | |
# | entropy bonus $c_e\mathcal H$ | | $-wc_e$ | | |
#
# So one kernel reads the logits and writes their gradient, and a second, tiny one makes four numbers a token. The formula
# against the engine's gradient of the entropy and of the log-probability, for random coefficients:

# %%
z = rng.normal(size=9)
y, (a, b, c) = 4, rng.normal(size=3)
x = Tensor(z, requires_grad=True)
log_p = z - np.log(np.exp(z).sum())
p, H = np.exp(log_p), -(np.exp(log_p) * log_p).sum()
formula = p * (c - a - b * (log_p + H)) + a * (np.arange(9) == y)
lse = (x - x.data.max()).exp().sum().log() + x.data.max()
loss = (x[y] - lse) * a + information.entropy_from_logits(x) * b + lse * c
print("formula = gradient:", bool(np.abs(formula - grad([loss], [x])[0].numpy()).max() < 1e-12))

# %% [markdown]
# ### The three estimators, told apart
#
# The divergence of the policy from a reference is estimated from the sampled token alone, by $k_1=-d$, $k_2=d^2/2$ or
# $k_3=e^d-1-d$ with $d=\log\pi_{\rm ref}-\log\pi_\theta$. $k_1$ and $k_3$ have the right *mean*. Which of them has the right mean
# *gradient*? On a small vocabulary nothing needs to be sampled: every token is one row of a batch, weighted by its
# probability, and the kernel does the rest. Guess before you look.

# %%
V = 12
z, ref = rng.normal(size=(2, V))
log_p, log_q = (v - np.log(np.exp(v).sum()) for v in (z, ref))
p = np.exp(log_p)


def column(values):
    """(V, 1): one response of one token for every word."""
    return torch.from_numpy(np.asarray(values, np.float32)[:, None])


mean_gradient, mean_value = {}, {}
for kind in ("k1", "k2", "k3"):
    rows = torch.from_numpy(np.tile(z, (V, 1, 1)).astype(np.float32)).requires_grad_()
    found = op.policy_loss(
        rows, torch.arange(V)[:, None], column(log_p), torch.zeros(V), torch.ones(V, 1, dtype=torch.bool), column(log_q),
        column(p), beta=1.0, kl=kind, reduction="sum",
    )
    (gradient,) = torch.autograd.grad(found.loss, rows)
    mean_gradient[kind] = p @ gradient[:, 0].double().numpy()
    mean_value[kind] = p @ getattr(found, kind)[:, 0].double().numpy()
exact = {}
for direction in ("reverse", "forward"):
    x = Tensor(z, requires_grad=True)
    exact[direction] = grad([information.kl_token_exact(x, Tensor(ref), direction)], [x])[0].numpy()
figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), sharey=True)
for axis, kind in zip(axes, mean_gradient):
    axis.plot(exact["reverse"], color=BLUE, linewidth=5, alpha=0.35, label="gradient of KL(policy || reference)")
    axis.plot(exact["forward"], color=ORANGE, linewidth=5, alpha=0.35, label="gradient of KL(reference || policy)")
    axis.plot(mean_gradient[kind], "o", color="black", ms=4, label="mean gradient of the estimator")
    axis.set(title=f"{kind}: mean value {mean_value[kind]:.3f}", xlabel="logit")
figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.12))
plt.show()
divergence = float(p @ (log_p - log_q))
print("the divergence itself:", round(divergence, 3))
for kind in mean_gradient:
    same = [name for name, g in exact.items() if np.abs(g - mean_gradient[kind]).max() < 1e-5]
    print(kind, "has the mean gradient of:", (same or ["nothing" if np.abs(mean_gradient[kind]).max() < 1e-5 else "neither"])[0])

# %% [markdown]
# The estimator with the wrong value ($k_2$) has the right gradient; the one with the best value ($k_3$) pulls along the other
# direction; and $k_1$ as a loss does nothing on average. A test of means alone would never have told them apart.
#
# ## 4. In place: one read and one write
#
# Written out of torch operations, loss and gradient of a policy step move the logits many times. Two launches of our kernels
# read them twice and write once. One launch does better when the row is still in the second-level cache when its gradient is due:
# memory then sees one read and one write. The gradient goes where the logits were (`inplace=True`), for nobody needs those any more.

# %%
N, V, size = 8192, 128_256, 2  # bfloat16
one = N * V * size / 1e9
moved = {
    "torch, one operation at a time": (6 + 8 + 12 + 6) * N * V / 1e9,  # to fp32; log-softmax; its backward; to bf16
    "two launches: 2 reads + 1 write": traffic.split_loss_bytes(N, V, size, policy=True) / 1e9,
    "one launch, in place: 1 read + 1 write": traffic.loss_bytes(N, V, size, policy=True) / 1e9,
}
figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.2), width_ratios=(3, 2))
axes[0].barh(list(moved), list(moved.values()), color=[VERMILION, ORANGE, GREEN], height=0.6)
axes[0].set(xlabel="GB, forward and backward of 8192 x 128,256 bf16 logits")
axes[0].invert_yaxis()
axes[0].grid(axis="y", visible=False)
vocabularies = np.array([16, 32, 64, 128, 256]) * 1024
for programs, colour in ((1, GREEN), (2, ORANGE), (4, VERMILION)):
    axes[1].loglog(vocabularies / 1024, 132 * programs * vocabularies * size / 2**20, "o-", color=colour, label=f"{programs} a multiprocessor")
axes[1].axhline(50, color="black", linestyle="--", linewidth=1)
axes[1].text(17, 56, "50 MB of cache", fontsize=8)
axes[1].set(xlabel="vocabulary (thousands)", ylabel="MB of rows in flight", title="Do rows stay in the cache?")
axes[1].set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
axes[1].minorticks_off()
axes[1].legend(fontsize=8)
figure.tight_layout()
plt.show()
print("logits:", round(one, 2), "GB; moved:", {name.split(",")[0].split(":")[0]: round(gb, 1) for name, gb in moved.items()})
tile = config.loss_tile(V, size)
print("our tile for this row:", tile.warps, "warps, so that only one program fits on a multiprocessor")

# %% [markdown]
# The right panel explains a choice that looks odd: for long rows the kernel takes 32 warps *in order that* no second program
# fits beside it. (How near it comes to the two floors on a GPU has not been measured yet: `python -m kernels bench token_loss`.)
# What in-place means, with numbers:

# %%
torch.manual_seed(0)
leaf = torch.randn(3, 6, requires_grad=True)
z, targets = leaf * 1, torch.tensor([1, 5, -100])
before = z.detach().clone()
loss = op.cross_entropy(z, targets, inplace=True)
p_minus = torch.softmax(before, -1) - torch.nn.functional.one_hot(targets.clamp(min=0), 6)
print("the logits' memory is now (p - onehot) / 2:", bool(torch.allclose(z.detach()[:2], p_minus[:2] / 2, atol=1e-6)))
print("and 0 in the row that does not count:      ", bool((z.detach()[2] == 0).all()))

# %% [markdown]
# ## 5. Never store them
#
# Logits are a product, $\mathbf o=\mathbf W\mathbf h$. A tile of it can be computed, merged into $(m,s,u)$ and forgotten. The backward computes
# tiles again, strip by strip of the vocabulary, turns each strip into its gradient and multiplies it with both factors: four matrix products
# instead of three, and memory that no longer grows with the vocabulary. The formulas are in `traffic.py`:

# %%
d, rows = 4096, 2 ** np.arange(10, 17)
stored = 2 * rows * V * size  # logits and their gradient
forward, backward = np.array([
    traffic.extra_bytes_of_plan(n, d, V, size, config.linear_plan(n, d, V, size, 132)) for n in map(int, rows)
]).T  # fmt: skip
figure, axes = plt.subplots(figsize=(7.6, 3.4))
axes.loglog(rows, stored / 2**20, "o-", color=VERMILION, label="logits and their gradient, stored")
axes.loglog(rows, backward / 2**20, "o-", color=BLUE, label="fused, backward: one strip + fp32 sum of the hidden gradient")
axes.loglog(rows, forward / 2**20, "o-", color=GREEN, label="fused, forward: four numbers a row and share")
axes.axhline(256, color="black", linestyle="--", linewidth=1)
axes.set(xlabel="tokens", ylabel="MiB beside operands and gradients", title="Width 4096, vocabulary 128,256, bf16")
axes.set_xticks(rows, [f"{n:,}" for n in rows], fontsize=8)
axes.minorticks_off()
axes.legend(fontsize=8)
plt.show()
at = list(rows).index(8192)
print("at 8192 tokens:", *(f"{b[at] / 2**20:.0f} MiB" for b in (stored, backward, forward)), "(stored, fused backward, fused forward)")

# %% [markdown]
# A strip's width is a matter of memory and must be none of the result. It is none, to the last bit, because sums run over the
# same blocks in the same order whatever the strip:

# %%
from dataclasses import replace

from kernels.token_loss import launch_linear
from kernels.token_loss.config import LinearPlan, LinearTile

tile = LinearTile(16, 16, 16, 1, 1)
plan = LinearPlan(tile, tile, tile, splits=2, chunk=16)
h, w = torch.randn(10, 24), torch.randn(50, 24) / 5
targets, ones = torch.arange(10), torch.ones(10)
found = launch_linear.statistics(h, w, targets, 1.0, -100, plan=plan)
gradients = [
    launch_linear.gradient(h, w, targets, found, (-ones, None, None, None), 1.0, -100, replace(plan, chunk=width)) for width in (16, 32, 64)
]
print("strips of 16, 32 and 64 columns give equal bits:", all(torch.equal(x, y) for g in gradients[1:] for x, y in zip(gradients[0], g)))
h.requires_grad_()
reference = torch.autograd.grad(torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum"), h)[0]
print("and torch's gradient within 1e-5:", bool((gradients[0][0] - reference).abs().max() < 1e-5))

# %% [markdown]
# ## 6. Why the reduction matters
#
# A batch has one short response with a good reward and one long one with a bad reward. The same tokens, the same advantages,
# four divisors: how much does a single token of each weigh?

# %%
mask = np.zeros((2, 20), bool)
mask[0, :4] = mask[1, :] = True
weights = {
    r: reductions.aggregation_weights(mask, r, length=32) for r in ("token-mean", "seq-mean", "seq-sum", "constant")
}
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.2))
x = np.arange(4)
axes[0].bar(x - 0.2, [w[0, 0] for w in weights.values()], 0.38, color=GREEN, label="a token of the short one (4)")
axes[0].bar(x + 0.2, [w[1, 0] for w in weights.values()], 0.38, color=PURPLE, label="a token of the long one (20)")
axes[0].set(yscale="log", title="Weight of one token")
share = [w[1].sum() / w.sum() for w in weights.values()]
axes[1].bar(x, share, 0.5, color=PURPLE)
axes[1].axhline(0.5, color="black", linestyle="--", linewidth=1)
axes[1].set(ylim=(0, 1), title="Share of the long response in the whole loss")
for axis in axes:
    axis.set_xticks(x, list(weights))
axes[0].legend(fontsize=8)
plt.show()
for r, w in weights.items():
    print(f"{r:11} short token / long token: {w[0, 0] / w[1, 0]:.0f},  long response's share: {w[1].sum() / w.sum():.2f}")

# %% [markdown]
# Under `seq-mean` a bad response that is longer is punished less for each token: a policy learns to be wrong at length. The
# other three weigh tokens alike, and a long response counts in proportion. None of them is *the* right one, which is why the
# kernel takes the weights as data and every reduction of the package is a few numbers made beforehand.
#
# ### Exercise 3: the weights by hand
#
# Return the weight of every token, `(B, T)`, for `"token-mean"` and `"seq-mean"`. A response without any kept token adds nothing, and
# still counts as one of the B responses.


# %%
def my_weights(mask, reduction):
    """Weights that turn token terms into the loss."""
    ### BEGIN SOLUTION
    kept = mask.astype(float)
    if reduction == "token-mean":
        return kept / max(kept.sum(), 1)
    return kept / np.maximum(kept.sum(-1, keepdims=True), 1) / len(mask)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the weights by hand
for keep in (mask, np.array([[True, False], [False, False], [True, True]]), np.zeros((2, 3), bool)):
    for reduction in ("token-mean", "seq-mean"):
        expected = reductions.aggregation_weights(keep, reduction)
        assert np.allclose(my_weights(keep, reduction), expected), f"{reduction}: {expected.tolist()} is wanted for {keep.astype(int).tolist()}"
logits_ = rng.normal(size=(2, 20, 7)).astype(np.float32)
ids, old = rng.integers(0, 7, (2, 20)), np.full((2, 20), -1.9, np.float32)
found = op.policy_loss(*(torch.from_numpy(v) for v in (logits_, ids, old)), torch.tensor([1.0, -1.0]), torch.from_numpy(mask))
plain = policy_losses.grpo_loss(Tensor(to_array(found.logprobs)), old, np.array([1.0, -1.0]), mask)
assert abs(found.loss.item() - plain.loss.item()) < 1e-6
print("right; and the kernel's loss is the package's:", round(found.loss.item(), 4))

# %% [markdown]
# ## What to take along
#
# 1. $(m,s,u)$ is all that a row of logits is needed for; it merges in any order, so a row can be cut anywhere.
# 2. Every loss on logits is four numbers a token and one formula for the gradient.
# 3. Count bytes: one read and one write, if rows stay in the cache; no logits at all, for one more matrix product.
# 4. A right value does not mean a right gradient, and a right gradient on one shape does not mean a right kernel.
#
# Hold a kernel of your own against the reference: `python -m kernels compare token_loss --impl my_file.py:cross_entropy`. What the
# compiler makes of ours for four GPUs: `python -m kernels compile token_loss`.
