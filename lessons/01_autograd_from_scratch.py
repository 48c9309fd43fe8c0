# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 01 · Autograd from scratch
#
# A language model is trained by one number, the loss, and the derivative of that number with respect to
# every weight. This lesson builds the machine that computes those derivatives, breaks it in three ways,
# and shows how each break is found.
#
# Equations: `autograd-engine`, `gradient-check`, `stop-gradient`.
#
# After it you can
# - write the vector-Jacobian product (VJP) of a new operation and prove it right,
# - say why gradients must flow in topological order,
# - choose the step of a finite difference, and say what the choice trades.

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import GradientError, Tensor, grad, gradcheck
from minillm.autograd import primitives as ops
from minillm.autograd.operation import Primitive, sum_to
from minillm.functional.linear import linear
from minillm.functional.linear_algebra import (
    column_decomposition,
    gemm,
    linear_collapse,
    merge_heads,
    project_batch,
    row_decomposition,
    split_heads,
)  # fmt: skip
from minillm.functional.softmax import log_softmax, logsumexp, softmax, softmax_unshifted, token_logprobs
from minillm.functional.variational import convex_conjugate, fenchel_young_slack
from minillm.plotting import BLUE, GREEN, VERMILION, use_style

use_style()

# %% [markdown]
# ## 1. One rule per operation
#
# Let $y=f(x_1,\dots,x_n)$ be one step of a longer computation that ends in a scalar $\ell$. Write
# $\bar y=\partial\ell/\partial y$ for what arrives from above: the **cotangent**. All that the step has to know is
# how to turn $\bar y$ into $\bar x_i=\bar y\,\partial f/\partial x_i$. That is its VJP. No Jacobian is ever built.
#
# The engine keeps a table with the forward function and the VJPs of each argument side by side. This is the row of
# multiplication, as it stands in the package:

# %%
source = inspect.getsource(ops)
start = source.index("multiply = primitive(")
print(source[start : source.index("\n)\n", start) + 2])

# %% [markdown]
# Read it aloud: the cotangent of `x` is `g * y`, that of `y` is `g * x`.
#
# A detail hides in `broadcasts=True`. If `x` has shape `(3,)` and the product `(2, 3)`, then every element of `x` was
# used twice, and its gradient is the sum of two shares. Summing back what was stretched is the same for every such
# operation, so it is done in one place:

# %%
print(inspect.getsource(sum_to).split('"""')[2].rstrip())
x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
y = Tensor(np.array([[1.0, 10.0, 100.0], [1.0, 1.0, 1.0]]))
print(grad((x * y).sum(), x))

# %% [markdown]
# ### Exercise 1: the VJPs of a quotient
#
# For $z=x/y$, what are $\bar x$ and $\bar y$ in terms of $\bar z$ (`g`), `x` and `y`?


# %%
def quotient_vjps(g, x, y):
    """Return the cotangents of x and of y, for z = x / y with cotangent g."""
    ### BEGIN SOLUTION
    return g / y, -g * x / (y * y)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: the VJPs of a quotient
rng = np.random.default_rng(0)
g, u, v = rng.normal(size=4), rng.normal(size=4), rng.uniform(1, 2, size=4)
tensors = [Tensor(u, requires_grad=True), Tensor(v, requires_grad=True)]
wanted = grad(tensors[0] / tensors[1], tensors, g)
for ours, theirs, name in zip(quotient_vjps(g, u, v), wanted, "xy", strict=True):
    np.testing.assert_allclose(ours, theirs.data, err_msg=f"the cotangent of {name} is off")
print("right")

# %% [markdown]
# ## 2. The tape
#
# Every tensor that comes out of an operation remembers the operation and its inputs. `grad` walks that graph from the
# loss back to the leaves,
#
# $$\bar u=\sum_{v\in\mathrm{succ}(u)}\bar v\,\frac{\partial v}{\partial u},$$
#
# one term for every place where $u$ was used. The sum is where it gets interesting.
#
# ### The diamond
#
# Take $b=a+a$ and $c=b+b$. So $c=4a$ and $dc/da=4$. An engine that walks down as soon as *something* arrives looks
# innocent:


# %%
def eager_gradient(loss):
    """A broken engine: it pushes each share of a gradient down at once, instead of waiting for the others."""
    total = {}

    def visit(tensor, cotangent):
        total[id(tensor)] = total.get(id(tensor), 0.0) + cotangent
        if tensor.node is not None:
            shares = tensor.node.operation.pull(tensor.node, [np.asarray(total[id(tensor)])], False)
            for parent, share in zip(tensor.node.inputs, shares, strict=True):
                visit(parent, share)

    visit(loss, np.ones(()))
    return total


a = Tensor(np.array(1.0), requires_grad=True)
b = a + a
c = b + b
print("eager walk:", float(eager_gradient(c)[id(a)]))
print("the engine:", float(grad(c, a).data))

# %% [markdown]
# The eager walk visits $b$ twice. The first time it pushes down one share; the second time it pushes down *both*, and
# the first is counted again: $2+4=6$.
#
# The cure is to wait. A node may run only when every consumer of its output has run. Counting consumers first, and
# running a node when its count reaches zero, gives such an order without any recursion, so a graph may be as deep as
# memory allows:

# %%
deep = Tensor(np.array(1.0), requires_grad=True)
z = deep
for _ in range(100_000):
    z = z * 1.00001
print("depth 100,000:", round(float(grad(z, deep).data), 4), " exact:", round(1.00001**100_000, 4))

# %% [markdown]
# Here is the order for a small graph with a fork and a join, $\ell=\big(\tanh(wx)+wx\big)^2$. The number on a node is
# the turn in which it runs on the way back.

# %%
w, x = Tensor(np.array(0.5), requires_grad=True), Tensor(np.array(1.5), requires_grad=True)
product = w * x
bent = product.tanh()
total = bent + product
loss = total * total
names = {"wx": (2.0, 1), "tanh": (3.2, 1.8), "+": (4.4, 1), "square": (5.6, 1), "w": (0.8, 1.6), "x": (0.8, 0.4)}
arrows = [("w", "wx"), ("x", "wx"), ("wx", "tanh"), ("wx", "+"), ("tanh", "+"), ("+", "square")]
turns = {"square": 1, "+": 2, "tanh": 3, "wx": 4}
figure, axes = plt.subplots(figsize=(8, 2.8))
for start, stop in arrows:
    axes.annotate(
        "",
        xy=names[stop],
        xytext=names[start],
        arrowprops={"arrowstyle": "-|>", "color": "#666666", "shrinkA": 21, "shrinkB": 21, "lw": 1.6},
    )
for name, (left, up) in names.items():
    leaf = name in "wx" and len(name) == 1
    axes.text(
        left,
        up,
        name,
        ha="center",
        va="center",
        fontsize=12,
        color="white",
        bbox={"boxstyle": "round,pad=0.45", "color": GREEN if leaf else BLUE},
    )
    if name in turns:
        axes.text(left, up - 0.48, f"backward turn {turns[name]}", ha="center", color=VERMILION, fontsize=10)
axes.set(xlim=(0.2, 6.4), ylim=(0, 2.3), title="wx waits for both of its consumers: tanh and +")
axes.axis("off")
plt.show()

# %% [markdown]
# ### Exercise 2: an order that waits
#
# `consumers_of` maps every node name of a graph to the nodes that use it. Return the names in an order in which
# every node comes after all of its consumers, without recursion.


# %%
def backward_order(consumers_of):
    """List the names so that each one comes after all of its consumers."""
    ### BEGIN SOLUTION
    waiting = {name: len(users) for name, users in consumers_of.items()}
    ready = [name for name, n in waiting.items() if n == 0]
    order = []
    while ready:
        name = ready.pop()
        order.append(name)
        for below, users in consumers_of.items():
            if name in users:
                waiting[below] -= users.count(name)
                if waiting[below] == 0:
                    ready.append(below)
    return order
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: an order that waits
graph = {"w": ["wx"], "x": ["wx"], "wx": ["tanh", "+"], "tanh": ["+"], "+": ["square"], "square": []}
order = backward_order(graph)
assert sorted(order) == sorted(graph), f"every node should appear once, got {order}"
for name, users in graph.items():
    assert all(order.index(user) < order.index(name) for user in users), f"{name} came before a consumer: {order}"
assert backward_order({"a": ["b", "b"], "b": []}) == ["b", "a"]
print("right")

# %% [markdown]
# ## 3. Is a derivative what it claims to be?
#
# Nothing in this project is believed because it looks right. Every VJP is held against a central difference,
#
# $$\frac{\partial f}{\partial x_i}\approx\frac{f(x+he_i)-f(x-he_i)}{2h}.$$
#
# Suppose somebody derives the gradient of $\tanh$ and forgets the square: $\bar x=\bar y(1-y)$. At $y=0$ and $y=1$
# that is even right.

# %%
bad_tanh = Primitive("bad_tanh", np.tanh, (lambda g, out, x: g * (1.0 - out),), broadcasts=False, doc="")
print(gradcheck(ops.tanh, [rng.normal(size=5)]).passed)
try:
    gradcheck(bad_tanh, [rng.normal(size=5)])
except GradientError as error:
    print("found:", str(error).split(" at ")[0])

# %% [markdown]
# ### How small should the step be?
#
# Two errors pull in opposite directions. The formula itself is off by a term of order $h^2$ (truncation); and the
# subtraction loses digits, an error of order $\epsilon/h$ (rounding). Their sum is smallest near
# $h=\epsilon^{1/3}$, about $6\cdot10^{-6}$ in float64. Let us see whether that is so, and what happens in float32.

# %%
steps = 10.0 ** np.arange(-12, 0.01, 0.25)
figure, axes = plt.subplots(figsize=(8, 3.4))
best = {}
for dtype, colour in ((np.float64, BLUE), (np.float32, VERMILION)):
    point, exact = dtype(0.7), 1 - np.tanh(0.7) ** 2
    errors = []
    for h in steps:
        ahead, behind = dtype(point + dtype(h)), dtype(point - dtype(h))
        numeric = (np.tanh(ahead) - np.tanh(behind)) / dtype(2 * h)
        errors.append(abs(float(numeric) - exact) / exact)
    errors = np.array(errors)
    best[dtype.__name__] = errors.min()
    axes.loglog(steps, np.maximum(errors, 1e-13), color=colour, label=dtype.__name__)
    axes.axvline(np.finfo(dtype).eps ** (1 / 3), color=colour, linestyle=":", linewidth=1.5)
axes.set(xlabel="step h", ylabel="relative error", title="Finite differences of tanh: dotted, the cube root of epsilon")
axes.legend()
plt.show()
print("float64 reaches 1e-9: ", best["float64"] < 1e-9)
print("float32 reaches 1e-6: ", best["float32"] < 1e-6)

# %% [markdown]
# In float32 the best that a finite difference can do here is five to six digits, at a step that has to be found, and
# far fewer at any other: too coarse to see a small mistake. That is why the check runs in float64, whatever the
# model uses.

# %% [markdown]
# ### Exercise 3: the gradient of log-sum-exp
#
# $\mathrm{LSE}(z)=\log\sum_je^{z_j}$. Write its gradient as a function of the array `z`, so that it survives
# $z=(1000,1001,999)$. (Hint: it is a probability distribution.)


# %%
def lse_gradient(z):
    """The gradient of log-sum-exp at z."""
    ### BEGIN SOLUTION
    e = np.exp(z - z.max())
    return e / e.sum()
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the gradient of log-sum-exp
lse = Primitive("lse", lambda z: np.logaddexp.reduce(z), (lambda g, out, z: g * lse_gradient(z.data),), False, "")
gradcheck(lse, [np.array([0.3, -1.2, 2.0])])
gradcheck(lse, [np.array([1000.0, 1001.0, 999.0])])
print("right:", np.round(lse_gradient(np.array([1000.0, 1001.0, 999.0])), 4))

# %% [markdown]
# ## 4. Derivatives of derivatives
#
# The VJPs in the table are written with tensor operations. So the walk back can be recorded too, and differentiated
# again. Newton's method needs exactly that: $x\leftarrow x-f'(x)/f''(x)$. On a function that is not a parabola, does it
# beat plain descent with a well-chosen rate?


# %%
def f(x):
    return (x * x + 1.0).sqrt() + 0.1 * x  # minimum at -0.1 / sqrt(1 - 0.01)


minimum = -0.1 / np.sqrt(1 - 0.01)
newton, descent = [0.9], [0.9]
for _ in range(8):
    x = Tensor(np.array(newton[-1]), requires_grad=True)
    slope = grad(f(x), x, create_graph=True)
    newton.append(float(x.data - slope.data / grad(slope, x).data))
    x = Tensor(np.array(descent[-1]), requires_grad=True)
    descent.append(float(x.data - 0.9 * grad(f(x), x).data))

figure, axes = plt.subplots(figsize=(8, 3.2))
axes.semilogy(np.abs(np.array(newton) - minimum) + 1e-17, "o-", label="Newton (second derivative)")
axes.semilogy(np.abs(np.array(descent) - minimum) + 1e-17, "s-", label="gradient descent, rate 0.9")
axes.set(xlabel="step", ylabel="distance to the minimum", title="Newton's method squares its error, once it is close")
axes.legend()
plt.show()
print("after 8 steps, Newton is closer:", abs(newton[-1] - minimum) < abs(descent[-1] - minimum))

# %% [markdown]
# Start Newton at 1.5 instead of 0.9 and it flies away: $|x|>1$ is where its step overshoots. Try it.
#
# ## 5. Stopping the gradient
#
# Reinforcement learning will need constants that are computed by the network itself. $\mathrm{sg}[x]$ has the value of
# $x$ and the derivative 0; in code, `x.detach()`.

# %%
x = Tensor(np.array(3.0), requires_grad=True)
print("d(x x)/dx     =", grad(x * x, x).item())
print("d(sg[x] x)/dx =", grad(x.detach() * x, x).item())

# %% [markdown]
# ## 6. The algebra that everything after this leans on
#
# Nine identities carry the whole course. Each is a line of the package, and each gets one test here that could fail.
#
# **A matrix is a sum of its columns, or of its rows** (`column-decomposition`, `row-decomposition`):
# $\mathbf A=\sum_j\mathbf A_{:j}e_j^\top=\sum_ie_i\mathbf A_{i:}$, terms of rank one at most (a zero column gives a term
# of rank 0, which is erratum 1). A product $\mathbf{AB}$ is therefore a sum of outer products, column of $\mathbf A$ times
# row of $\mathbf B$, and that is how a GPU adds up a tile, and why the gradient of a weight is a sum over tokens.
#
# **One product for a whole batch** (`gemm`, `linear-layer`, `batched-matmul`, `head-split-merge`): positions and
# sequences are all rows of one matrix, so $B$ products with the same weight are one; and a head is a slice of the width.

# %%
rng = np.random.default_rng(0)
A, B = Tensor(rng.integers(-3, 4, (3, 4)) * [1.0, 1, 0, 1]), Tensor(rng.integers(-3, 4, (4, 2)).astype(float))
columns, rows = column_decomposition(A), row_decomposition(B)
print(
    "columns add up:", np.array_equal(columns.sum(0).data, A.data), "| rows:", np.array_equal(rows.sum(0).data, B.data)
)
print("ranks of the terms:", [int(np.linalg.matrix_rank(term)) for term in columns.data])
outer = sum(np.outer(A.data[:, j], B.data[j]) for j in range(4))
print("AB is the sum of outer products:", np.array_equal(outer, gemm(A, B).data))

X, W = Tensor(rng.normal(size=(2, 5, 6))), Tensor(rng.normal(size=(6, 8)))  # (B, L, d_in), (d_in, d_out)
Q = project_batch(X, W)  # (B, L, d_out)
print("one product for the batch:", np.allclose(Q.data, [x @ W.data for x in X.data], rtol=0, atol=1e-14))
heads = split_heads(Q, H=2)  # (B, H, L, d_head)
print(
    "head 1 reads columns 4 to 7:",
    np.array_equal(heads.data[:, 1], Q.data[..., 4:]),
    "| merged again:",
    np.array_equal(merge_heads(heads).data, Q.data),
)

# %% [markdown]
# **Linear layers in a row are one linear layer** (`linear-collapse`). Depth alone buys nothing. Is that so in training
# too? Three networks learn $|x|$: a single linear layer, four of them in a row, and four with a ReLU between.


# %%
def fit(widths, activation, steps=400):
    rng = np.random.default_rng(1)
    layers = [
        [Tensor(rng.normal(size=(o, i)) / np.sqrt(i), requires_grad=True), Tensor(np.zeros(o), requires_grad=True)]
        for i, o in zip(widths, widths[1:], strict=False)
    ]
    parameters = [p for layer in layers for p in layer]
    x = Tensor(np.linspace(-1, 1, 41)[:, None])  # (41, 1)

    def network(x):
        for k, (W, b) in enumerate(layers):
            x = linear(x, W, b)
            x = activation(x) if k < len(layers) - 1 else x
        return x

    for _ in range(steps):
        loss = ((network(x) - x.abs()) ** 2).mean()
        for p, g in zip(parameters, grad(loss, parameters), strict=True):
            p.data -= 0.1 * g.data
    return layers, network(x).data[:, 0], float(loss.data)


def identity(x):
    return x


fits = {
    "one linear layer": fit([1, 1], identity),
    "four linear layers": fit([1, 16, 16, 16, 1], identity),
    "four with ReLU": fit([1, 16, 16, 16, 1], ops.relu),
}
grid = np.linspace(-1, 1, 41)
figure, axes = plt.subplots(figsize=(8, 3.2))
axes.plot(grid, np.abs(grid), color="#bbbbbb", linewidth=5, label="|x|")
for (name, (_, values, _)), colour, style in zip(fits.items(), (VERMILION, BLUE, GREEN), ("-", "--", "-"), strict=True):
    axes.plot(grid, values, color=colour, linestyle=style, label=name)
axes.set(xlabel="x", title="Depth without an activation is no depth")
axes.legend(fontsize=8)
plt.show()
layers = fits["four linear layers"][0]
W, b = layers[0]
for W_2, b_2 in layers[1:]:
    W, b = linear_collapse(W_2, b_2, W, b)
apart = np.abs(linear(Tensor(grid[:, None]), W, b).data[:, 0] - fits["four linear layers"][1]).max()
print("mean squared error:", {name: round(loss, 3) for name, (_, _, loss) in fits.items()})
print("the four layers as one differ by less than 0.02:", apart < 0.02, "| weight of that one layer:", W.shape)

# %% [markdown]
# The best line through $|x|$ on $[-1,1]$ is the constant $\frac12$, with error $\frac1{12}\approx0.08$, and both linear
# networks end there.
#
# **The softmax and its logarithm** (`softmax`, `softmax-stable`, `logsumexp`, `log-softmax`, `gather-logprob`).
# $\mathrm{softmax}(z)_i=e^{z_i}/\sum_je^{z_j}$ as it is written overflows once a logit passes $\ln$ of the largest
# float. Subtracting the maximum changes nothing in exact arithmetic, and everything in a computer. What is the first
# whole number at which the plain form breaks, in each precision?

# %%
first = {}
for dtype in (np.float16, np.float32, np.float64):
    for z in range(1, 1000):
        with np.errstate(all="ignore"):
            e = np.exp(np.array([z, 0], dtype))
            broken = not np.isfinite(e / e.sum(dtype=dtype)).all()
        if broken:
            first[np.dtype(dtype).name] = (z, int(np.ceil(np.log(float(np.finfo(dtype).max)))))
            break
print("first logit that breaks (found, predicted):", first)
z = Tensor(np.array([1000.0, 999.0, 0.0]))
with np.errstate(all="ignore"):
    print("plain:  ", softmax_unshifted(z).data)
print("shifted:", np.round(softmax(z).data, 4), "| LSE", np.round(logsumexp(z).data, 4))
with np.errstate(divide="ignore"):
    print("log of the softmax:", np.log(softmax(z).data).round(2), "| log-softmax:", log_softmax(z).data.round(2))
print("log-prob of word 2:", token_logprobs(z, np.array(2)).data.round(2))

# %% [markdown]
# The logarithm of the softmax has lost word 2 for good: its gradient would be $0\cdot\infty$. The log-softmax has not.
#
# **Convexity** (`jensen-convexity-tools`). $\mathrm{LSE}$ is convex, and for a convex $\Omega$ with conjugate
# $\Omega^*(t)=\sup_u\{ut-\Omega(u)\}$ the product never exceeds the sum: $ut\le\Omega(u)+\Omega^*(t)$, with equality
# exactly where $t$ is the slope at $u$. Lower bounds, DPO and the KL-regularised optimum all come from this one line.
# For $\Omega(u)=\log(1+e^u)$, where is the slack 0? Where $t=\sigma(u)$, the slope:


# %%
def softplus(u):
    return np.logaddexp(0, u)


def negative_entropy(t):
    return t * np.log(t) + (1 - t) * np.log(1 - t)


u, t = np.meshgrid(np.linspace(-4, 4, 161), np.linspace(0.02, 0.98, 97))
slack = fenchel_young_slack(softplus, negative_entropy, u, t)
searched = convex_conjugate(softplus, t[:, 0], np.linspace(-8, 8, 4001))
figure, axes = plt.subplots(figsize=(8, 3.2))
shades = axes.contourf(u, t, slack, levels=[0, 0.01, 0.05, 0.2, 0.5, 1, 2, 4], cmap="cividis_r")
axes.plot(u[0], 1 / (1 + np.exp(-u[0])), color=VERMILION, label="slope of the softplus, the sigmoid")
axes.set(xlabel="u", ylabel="t", title="Fenchel-Young slack: zero along the slope, positive elsewhere")
axes.legend(loc="upper left", fontsize=8, frameon=True, facecolor="white", framealpha=1)
figure.colorbar(shades, ax=axes, label="slack")
plt.show()
print(
    "smallest slack:",
    abs(round(float(slack.min()), 3)),
    "| at the sigmoid below 0.01:",
    bool((slack[np.abs(t - 1 / (1 + np.exp(-u))) < 0.01] < 0.01).all()),
)
print("conjugate found by search agrees:", np.abs(searched - negative_entropy(t[:, 0])).max() < 1e-4)

# %% [markdown]
# ## What to take along
#
# 1. An operation is a forward function and one VJP per argument. Everything else is bookkeeping.
# 2. A gradient is a sum over consumers, so a node waits for all of them: topological order.
# 3. A VJP that has not been checked against finite differences, in float64, is a guess.
# 4. Identities that are equal on paper (softmax with and without the shift) are not equal in a computer.
#
# Next: **02 · One training step**, where this engine differentiates a transformer. To see every function of the
# package pass its check, run `minillm gradcheck`.
