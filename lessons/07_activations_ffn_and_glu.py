# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 07 · Activations, the feed-forward network and its gate
#
# Attention moves information between tokens; what happens *to* a token happens in the feed-forward network, which holds between half
# and four fifths of a model's parameters. It is two matrices and a bend between them, lately three matrices and a gate.
#
# Equations: `relu`, `relu-squared`, `gelu`, `gelu-tanh`, `silu`, `swish-beta`, `sigmoid`, `softplus`, `elu`, `activation-zoo`,
# `dead-relu`, `ffn`, `ffn-expansion`, `llama-ffn-rounding`, `ffn-share`, `attention-linear-in-values`, `rank-collapse`, `glu`,
# `glu-ffn`, `glu-split`, `swiglu`, `geglu`, `reglu-bilinear`, `glu-param-parity`, `dropout`. Figures of the sources:
# `wn-ratio-13b`, `wn-ffn-rounding`, `wn-ffn-share`, `wn-ffn-ratio`, `wn-dff-2.4`, `wn-gelu-tanh`.
#
# After it you can
# - draw the common activations with their slopes, and say which of them can die,
# - show why attention without a feed-forward network collapses,
# - write a gated network in either of its two layouts, and size it fairly against a plain one.

# %%
import inspect
import os

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional import dropout as drop
from minillm.functional import feed_forward as ff
from minillm.functional.activation_family import ACTIVATIONS, dead_share
from minillm.functional.activations import gelu, gelu_tanh, swiglu
from minillm.fused.losses import cross_entropy
from minillm.nn.ffn import FeedForward
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, SKY, VERMILION, use_style

use_style()
LONG = os.environ.get("LESSON_LONG") == "1"  # more seeds in the last experiment, some minutes
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. Bends
#
# Without a bend two layers are one: $\mathbf W_2(\mathbf W_1\mathbf x)=(\mathbf W_2\mathbf W_1)\mathbf x$. Here are nine, and the slopes that a gradient
# is multiplied by on its way back. The slopes come from the engine, not from a table.

# %%
z = np.linspace(-4, 4, 401) + 0.001
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
for name, colour, line in (
    ("relu", BLUE, "-"), ("leaky_relu", BLUE, ":"), ("elu", SKY, "-"), ("softplus", SKY, "--"), ("gelu", VERMILION, "-"),
    ("silu", ORANGE, "-"), ("mish", ORANGE, ":"), ("tanh", GREEN, "-"), ("sigmoid", GREEN, "--"),
):  # fmt: skip
    t = Tensor(z, requires_grad=True)
    y = ACTIVATIONS[name](t)
    left.plot(z, y.data, color=colour, linestyle=line, label=name)
    right.plot(z, grad([y], [t], [np.ones(len(z))])[0].data, color=colour, linestyle=line)
left.set(title="activation", xlabel="x", ylim=(-1.5, 3))
right.set(title="slope", xlabel="x")
left.legend(ncols=3, fontsize=8)
plt.show()

# %% [markdown]
# Tanh and the logistic function saturate on both sides: behind a few of them, gradients are gone. ReLU saturates on one side, exactly:
# a unit that is below 0 for every input gets no gradient and stays there. It is dead.

# %%
pre = rng.normal(size=(2000, 400))
for shift in (0, 2, 3, 4):
    print(f"ReLU units shifted by -{shift}: {dead_share(np.maximum(pre - shift, 0)):6.1%} dead on 2000 inputs")
print("GELU never gives exactly 0 for all of them:", dead_share(gelu(Tensor(pre - 4.0)).data) < 1)

# %% [markdown]
# What is GELU? A source says that it approximates the Gaussian distribution. It is the input *times* its distribution function (erratum 15):

# %%
some = np.array([-2.0, -0.5, 0.3, 1.7])
print("GELU(x) / x = Phi(x):", np.allclose(gelu(Tensor(some)).data / some, scipy.stats.norm.cdf(some)))
wide = np.linspace(-6, 6, 100_001)
gap = np.abs(gelu(Tensor(wide)).data - gelu_tanh(Tensor(wide)).data).max()
print(f"largest gap of the form with a hyperbolic tangent: {gap:.1e}")
for name in ("gelu", "silu", "mish"):
    print(f"{name} passes the gradient check:", gradcheck(ACTIVATIONS[name], [rng.normal(size=(3, 4))]).passed)

# %% [markdown]
# ### Exercise 1: the slope of SiLU
#
# $\mathrm{SiLU}(x)=x\,\sigma(x)$. Return its derivative, and compute it from $\sigma(x)$ alone, without another exponential: that is what
# the fused form of this package does.


# %%
def silu_slope(x):
    """The derivative of x times its logistic function."""
    sigma = 1 / (1 + np.exp(-x))
    ### BEGIN SOLUTION
    return sigma + x * sigma * (1 - sigma)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: the slope of SiLU
t = Tensor(z, requires_grad=True)
wanted = grad([ACTIVATIONS["silu"](t)], [t], [np.ones(len(z))])[0].data
np.testing.assert_allclose(silu_slope(z), wanted, rtol=1e-9, err_msg="product rule: sigma + x sigma'")
print("right")

# %% [markdown]
# ## 2. Why attention needs it
#
# For fixed weights, attention is linear in the values: it mixes, and it cannot bend. Mixing makes rows alike. Without additions and
# without a feed-forward network, how many layers until all tokens are (almost) the same vector? Guess before you look.

# %%
seeds = range(8)
figure, axes = plt.subplots(figsize=(7, 3))
for skip, colour, label in ((False, VERMILION, "attention alone"), (True, BLUE, "with residual additions")):
    curves = np.array([ff.collapse_by_depth(16, 32, 10, np.random.default_rng(s), skip=skip) for s in seeds])
    axes.plot(np.maximum(curves.mean(0), 1e-16), color=colour, label=label)
    axes.fill_between(range(11), np.maximum(curves.min(0), 1e-16), curves.max(0), color=colour, alpha=0.2, linewidth=0)
    if not skip:
        print("layers until the rows differ by less than a hundredth:", int(np.argmax(curves.mean(0) < 0.01)))
axes.set(yscale="log", xlabel="layers", ylabel="distance from equal rows", title="Rank collapse")
axes.legend()
plt.show()

# %% [markdown]
# It is not even geometric: once rows are alike, so are the weights, and the next layer mixes more evenly still.
#
# ## 3. The network, token by token
#
# $\mathrm{FFN}(\mathbf x)=\mathbf W_2\,\phi_{\rm act}(\mathbf W_1\mathbf x+\mathbf b_1)+\mathbf b_2$, the same at every position.

# %%
print(inspect.getsource(ff.ffn).split('"""')[2].strip())
print(inspect.getsource(ff.glu).split('"""')[2].strip())

# %% [markdown]
# The second line is the gate: one linear map decides, entry by entry, how much of another passes. The activation is on the *gate*, and a
# third matrix leads back to the model's width (erratum 18). Which activation makes which name:

# %%
print({kind: act for kind, act in ff.GATES.items()})
x, w_v, w_g = rng.normal(size=(2, 5)), rng.normal(size=(8, 5)), rng.normal(size=(8, 5))
apart = ff.glu(Tensor(x), Tensor(w_v), Tensor(w_g), act="silu").data
joint = swiglu(Tensor(x @ np.concatenate([w_v, w_g]).T)).data
print("two maps, or one map in halves [value; gate]:", np.allclose(apart, joint))

# %% [markdown]
# A gate of the identity leaves a product of two linear maps, the *bilinear* unit. So a gated unit can multiply two features of a token,
# which a plain network has to build from bends. On the other side it has three matrices, and a fair comparison shrinks them:
# $3d\,d_{\rm ff}'=2d\,d_{\rm ff}$ gives two thirds of the width, so the usual expansion of 4 becomes $\frac83$. LLaMA rounds up:

# %%
print(inspect.getsource(ff.llama_width).split('"""')[2].strip())
for name, d, multiple, factor in (("7B", 4096, 256, 1.0), ("13B", 5120, 256, 1.0), ("33B", 6656, 256, 1.0), ("65B", 8192, 256, 1.0), ("2-70B", 8192, 4096, 1.3), ("3-8B", 4096, 1024, 1.3)):
    width = ff.llama_width(d, multiple, factor)
    print(f"LLaMA {name:<6} width {d}, inner width {width}: {ff.expansion(width, d):.4f} times as wide")
print("a source says 2, or around 2.4; it is 8/3 rounded up, and 3.5 with the multiplier (erratum 16)")

# %% [markdown]
# ### Exercise 2: whose parameters?
#
# "50 to 60 % of the parameters" of a model are said to be in its feed-forward networks. Return the share for a LLaMA: embedding and head
# of $V\times d$ each, $N$ layers of attention with $2d^2+2d\,d_{kv}$ weights, a gated network of $3d\,d_{\rm ff}$, two norms of $d$, and one
# norm at the end.


# %%
def llama_ffn_share(V, d, n_layers, d_kv, d_ff):
    """The share of all parameters in the feed-forward networks."""
    ### BEGIN SOLUTION
    network = 3 * d * d_ff
    total = 2 * V * d + n_layers * (2 * d * d + 2 * d * d_kv + network + 2 * d) + d
    return n_layers * network / total
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: whose parameters?
table = {"7B": (32000, 4096, 32, 4096, 11008, 64.2), "13B": (32000, 5120, 40, 5120, 13824, 65.3), "2-70B": (32000, 8192, 80, 1024, 28672, 81.7), "3-8B": (128256, 4096, 32, 1024, 14336, 70.2)}
for name, (*shape, percent) in table.items():
    assert abs(100 * llama_ffn_share(*shape) - percent) < 0.06, f"LLaMA {name} has {percent} %"
print("right: from 64 to 82 %, not 50 to 60 (erratum 17)")

# %% [markdown]
# ## 4. Is the gate worth it?
#
# A fair race: the same number of parameters, the same data, the same optimiser. The task has to be learnt from 24 inputs: half of the
# score of each class is a sum of features, half a sum of products of two features. Which kind will win? Nothing is tuned for any of them.

# %%
d, n_classes, d_plain = 24, 8, 48
KINDS = ("relu", "gelu", "relu_squared", "glu", "swiglu", "geglu", "reglu", "bilinear")


def task(generator, n):
    x = generator.normal(size=(n, d)).astype(np.float32)
    truth = np.random.default_rng(123)
    linear, left, right = (truth.normal(size=(d, n_classes)) for _ in range(3))
    scores = (x @ linear) / np.sqrt(d) + (x @ left) * (x @ right) / d
    return x, scores.argmax(1)


def race(kind, seed, steps=200):
    generator = np.random.default_rng(seed)
    gated = kind in ff.GATES
    width = round(ff.parity_width(d_plain)) if gated else d_plain
    net = FeedForward(d, width, kind, generator, std=d**-0.5)
    readout = FeedForward(d, n_classes, "tanh", generator, std=d**-0.5).w_in  # (n_classes, d)
    parameters = [*net.parameters(), readout]
    optimiser = AdamW(parameters, 5e-3, weight_decay=0.01)
    for _ in range(steps):
        x, labels = task(generator, 256)
        loss = cross_entropy((Tensor(x) + net(Tensor(x))) @ readout.T, labels)
        optimiser.step([[g.data for g in grad([loss], parameters)]])
    x, labels = task(np.random.default_rng(10_000), 4000)
    right = ((Tensor(x) + net(Tensor(x))) @ readout.T).data.argmax(1) == labels
    return right.mean(), sum(p.size for p in net.parameters())


n_seeds = 10 if LONG else 3
results = {kind: [race(kind, seed) for seed in range(n_seeds)] for kind in KINDS}
accuracy = {kind: np.array([a for a, _ in runs]) for kind, runs in results.items()}
print("parameters:", {kind: runs[0][1] for kind, runs in results.items()})
order = sorted(KINDS, key=lambda kind: accuracy[kind].mean())
figure, axes = plt.subplots(figsize=(8, 3.2))
for i, kind in enumerate(order):
    colour = GREEN if kind in ff.GATES else BLUE
    axes.plot(accuracy[kind], [i] * n_seeds, "o", color=colour, markersize=5, alpha=0.6)
    axes.plot(accuracy[kind].mean(), i, "|", color=colour, markersize=20, markeredgewidth=3)
axes.set_yticks(range(len(order)), order)
axes.set(xlabel=f"right on new inputs (dots: {n_seeds} seeds, bar: their mean)", title="Green: gated, blue: plain; equal parameters")
plt.show()
print("the winner:", order[-1])

# %% [markdown]
# The unit that is nothing but a product wins a task made of products. The others lie close together, gated and plain, closer than their
# seeds: had we shown one run of SwiGLU beside one of ReLU, we would have "found" a difference. Change `scores` to a sum of features only
# and run again. On language the gain of a gate is small and was found by experiment, without a reason given (Shazeer 2020).
#
# ## 5. Forgetting on purpose
#
# Dropout sets entries to 0 with probability $p$ in training and enlarges the others by $1/(1-p)$, so that nothing has to be rescaled at
# inference.

# %%
activations = np.ones((1, 50_000))
kept = drop.draw_kept(activations.shape, 0.3, rng)
dropped = drop.dropout(Tensor(activations), kept, 0.3).data
print(f"values: {np.unique(dropped).round(4)}, mean {dropped.mean():.2f}; in evaluation it is the identity:", np.array_equal(drop.dropout(Tensor(activations), None, 0.3).data, activations))

# %% [markdown]
# ### Exercise 3: noise that depends on size
#
# For a fixed activation $a$, what is the variance of its dropped-out value? Return it as a function of `a` and `p`.


# %%
def dropout_variance(a, p):
    """Variance of a * Bernoulli(1 - p) / (1 - p)."""
    ### BEGIN SOLUTION
    return a**2 * p / (1 - p)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: noise that depends on size
for a, p in ((1.0, 0.3), (2.5, 0.1)):
    values = drop.dropout(Tensor(np.full(200_000, a)), drop.draw_kept((200_000,), p, rng), p).data
    assert abs(dropout_variance(a, p) / values.var() - 1) < 0.05, "E[x^2] - E[x]^2 with x = a / (1 - p) or 0"
print("right")

# %% [markdown]
# ## What to take along
#
# - A bend is what makes depth count; its slope is what gradients are multiplied by.
# - Attention alone averages tokens into one another, fast; additions and the feed-forward network keep them apart.
# - A gate multiplies two views of a token. Compare it at two thirds of the width.
#
# Next: lesson 08, attention itself.
