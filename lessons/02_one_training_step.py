# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 02 · One training step, every equation of it
#
# Text goes in, one number comes out, and every weight learns in which direction to move. This lesson follows one
# sentence through a transformer decoder, equation by equation, with the shape of every tensor, and then back.
#
# Equations: `training-step`, `token-embedding`, `rmsnorm`, `qkv-projection`, `pos-rope`, `scaled-dot-product`,
# `attention-weights`, `attention-context`, `mha`, `swiglu`, `lm-head`, `next-token-distribution`,
# `cross-entropy-logits`, `softmax-jacobian`, `adamw`, `grad-clip`.
#
# After it you can
# - draw a decoder block and put a shape on every arrow,
# - say what the first loss of any language model must be,
# - do one AdamW step on paper.

# %%
import threading

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad
from minillm.autograd.parallel import PaddedSlots, parallel_map
from minillm.autograd.scratch import arena, empty
from minillm.functional.activations import swiglu
from minillm.functional.attention import attention_weights, causal_mask, scaled_scores
from minillm.functional.linear import embedding, linear
from minillm.functional.losses import cross_entropy
from minillm.functional.norms import rms_norm
from minillm.functional.positions import rope
from minillm.functional.softmax import softmax
from minillm.models import Config, Decoder
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, VERMILION, use_style

use_style()

# %% [markdown]
# ## 1. The text and the question
#
# Nine words, numbered. The model reads positions $1..t$ and must say which word comes at $t+1$. One sentence is
# therefore eight questions, and one forward pass answers them all.

# %%
words = "LLMs learn to predict one word at a time".split()
vocabulary = sorted(set(words))
ids = np.array([[vocabulary.index(word) for word in words]])  # (B, L + 1) = (1, 9)
inputs, targets = ids[:, :-1], ids[:, 1:]  # (1, 8) each
for t in range(3):
    print(" ".join(words[: t + 1]), "->", words[t + 1])

# %% [markdown]
# The inputs are `ids[:, :-1]` and the targets `ids[:, 1:]`. If the targets were not shifted, a network that copies
# its input would have loss 0 and know nothing.
#
# ## 2. Forward, one equation at a time
#
# A tiny decoder: width $d_{\rm model}=16$, $H=2$ heads of width 8, one block. The model owns the weights; we use them
# with the *as-written* functions, which are the equations composed of primitives.

# %%
config = Config(vocab_size=len(vocabulary), d_model=16, n_layers=1, n_heads=2, d_ff=32, context=8)
model = Decoder(config, np.random.default_rng(0))
for parameter in model.parameters():
    parameter.data *= 4 if parameter.ndim == 2 else 1  # larger than usual, so that the pictures show something
block = model.blocks[0]
B, L, H, d_head = 1, 8, 2, 8

x = embedding(inputs, model.embedding.weight)  # (B, L, d_model)
y = rms_norm(x, block.attention_norm.gain, eps=config.norm_eps)  # (B, L, d_model)
print("RMS of each token after the norm:", np.round(np.sqrt((y.data**2).mean(-1)), 2))

# %% [markdown]
# **Attention.** Queries, keys and values are linear maps of the normalised stream, cut into heads. Queries and keys
# are turned by an angle that grows with the position, so that their inner product depends on the distance only.

# %%
qkv = linear(y, block.attention.w_qkv)  # (B, L, 3 d_model)
heads = qkv.reshape(B, L, 3 * H, d_head).transpose(1, 2)  # (B, 3 H, L, d_head)
q, k, v = heads[:, :H], heads[:, H : 2 * H], heads[:, 2 * H :]  # (B, H, L, d_head) each
q, k = rope(q, angles=model._angles), rope(k, angles=model._angles)
scores = scaled_scores(q, k)  # (B, H, L, L)
weights = attention_weights(scores, causal_mask(L))  # (B, H, L, L): rows sum to 1
context = weights @ v  # (B, H, L, d_head)
merged = context.transpose(1, 2).reshape(B, L, H * d_head)  # (B, L, d_model)
x = x + linear(merged, block.attention.w_out)

figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.2), sharey=True)
for h, panel in enumerate(axes):
    image = panel.imshow(np.where(causal_mask(L), weights.data[0, h], np.nan), vmin=0, vmax=1)
    panel.set(title=f"head {h}", xticks=range(L), yticks=range(L), xlabel="key: what is looked at")
    panel.set_xticklabels(words[:-1], rotation=60, ha="right")
    panel.grid(False)
axes[0].set_yticklabels(words[:-1])
axes[0].set_ylabel("query: who looks")
figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
plt.show()
print("rows sum to one:", np.allclose(weights.data.sum(-1), 1))
print("the first word sees only itself, with weight", weights.data[0, 0, 0, 0])

# %% [markdown]
# **Feed-forward.** A gated unit: one map gives a value and a gate, $\mathrm{SiLU}(\text{gate})$ decides how much of the
# value passes, a second map brings it back to the width of the stream. Tokens do not meet here.

# %%
y = rms_norm(x, block.ffn_norm.gain, eps=config.norm_eps)
x = x + linear(swiglu(linear(y, block.ffn.w_value_gate)), block.ffn.w_down)  # (B, L, d_model)
h = rms_norm(x, model.final_norm.gain, eps=config.norm_eps)
logits = linear(h, model.head.weight)  # (B, L, V)
p = softmax(logits)  # (B, L, V)
loss = cross_entropy(logits, targets)
print("the same logits as the model's fused forward:", np.allclose(logits.data, model(inputs).data, atol=1e-5))

# %% [markdown]
# **The loss** is the mean of $-\log p(\text{right word})$. Before training the model knows nothing. If it spread its
# bets evenly over $V$ words, the loss would be $\ln V$; that is the first thing to look at in any training run.

# %%
fresh = Decoder(config, np.random.default_rng(0))
print(f"ln V = {np.log(len(vocabulary)):.3f}, a fresh model {cross_entropy(fresh(inputs), targets).item():.3f}")

# %% [markdown]
# ### Exercise 1: the loss by hand
#
# Compute the mean of $-\mathbf o_t[y_t]+\mathrm{LSE}(\mathbf o_t)$ from the array `o` of shape $(L,V)$ and the targets `y`
# of shape $(L,)$, with NumPy alone, so that logits of 1000 do no harm.


# %%
def token_loss(o, y):
    """Mean negative log-likelihood of targets y under logits o."""
    ### BEGIN SOLUTION
    top = o.max(axis=-1, keepdims=True)
    lse = np.log(np.exp(o - top).sum(-1)) + top[:, 0]
    return (lse - o[np.arange(len(y)), y]).mean()
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: the loss by hand
o = logits.data[0].astype(np.float64)
assert abs(token_loss(o, targets[0]) - float(loss.data)) < 1e-5, "differs from the package's loss"
assert np.isfinite(token_loss(o + 1000.0, targets[0])), "overflows for large logits"
print("right")

# %% [markdown]
# ## 3. Backward
#
# One call walks the tape. Its first result deserves a look: the derivative of the loss with respect to the logits is
# probabilities minus one-hot targets, $\partial\ell/\partial\mathbf o_t=\frac1L(p_t-\mathrm{onehot}(y_t))$. Every
# position pushes its right word up by what is missing to 1, and all others down by their share.

# %%
(d_logits,) = grad(loss, [logits], retain_graph=True)
onehot = np.eye(len(vocabulary))[targets]
print("gradient = (p - onehot) / L:", np.allclose(d_logits.data, (p.data - onehot) / L, atol=1e-6))

names = [name for name, _ in model.named_parameters()]
gradients = grad(cross_entropy(model(inputs), targets), model.parameters())
sizes = [float(np.sqrt((g.data**2).sum())) for g in gradients]
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.barh(range(len(names)), sizes, color=BLUE)
axes.set(yticks=range(len(names)), xlabel="length of the gradient", title="Every parameter receives its share")
axes.set_yticklabels(names, fontsize=9)
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# Is it the true gradient? A gradient promises that a small step $-\eta g$ changes the loss by $-\eta\lVert g\rVert^2$.
# For small steps the promise should hold; for large ones it must fail, because the loss is not a plane.

# %%
start = {name: parameter.data.copy() for name, parameter in model.named_parameters()}
before = float(cross_entropy(model(inputs), targets).data)
squared = sum(size**2 for size in sizes)
rates = 10.0 ** np.arange(-3, 1.01, 0.2)
changes = []
for rate in rates:
    for (_, parameter), g in zip(model.named_parameters(), gradients, strict=True):
        parameter.data[...] = parameter.data - rate * g.data
    changes.append(float(cross_entropy(model(inputs), targets).data) - before)
    model.load_state_dict(start)
figure, axes = plt.subplots(figsize=(8, 3.2))
axes.semilogx(rates, changes, "o-", color=BLUE, label="measured")
axes.semilogx(rates, -rates * squared, color=VERMILION, linestyle="--", label="promised by the gradient")
axes.axhline(0, color="#888888", linewidth=1)
axes.set(
    xlabel="step size", ylabel="change of the loss", title="The promise of a gradient holds near by", ylim=(-2.6, 2.6)
)
axes.legend()
plt.show()
print(f"at 0.001 the promise is kept to {abs(changes[0] / (-rates[0] * squared) - 1):.1%}")
print("at 10 the step made things worse than promised:", changes[-1] > -rates[-1] * squared)

# %% [markdown]
# ### Exercise 2: who may look at whom
#
# Write the causal keep-mask of $L$ positions, true where query $i$ may see key $j$, and count the pairs that are
# allowed. The notes call the mask "strict"; with a strict mask, what would the first word look at?


# %%
def my_causal_mask(L):
    """(L, L) booleans, true where j <= i."""
    ### BEGIN SOLUTION
    return np.arange(L)[None, :] <= np.arange(L)[:, None]
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: who may look at whom
for n in (1, 2, 8):
    mask = my_causal_mask(n)
    assert mask.shape == (n, n) and mask.dtype == bool, "wanted an (L, L) array of booleans"
    np.testing.assert_array_equal(mask, causal_mask(n))
    assert mask.sum() == n * (n + 1) // 2
print("right")

# %% [markdown]
# ## 4. Clip and step
#
# **Clipping.** If the length of the whole gradient exceeds $c$, it is scaled down to $c$; its direction stays.
#
# **AdamW** keeps a running mean $m$ of the gradient and $n$ of its square, corrects both for having started at zero,
# and divides: $\theta\leftarrow\theta-\eta\,(\hat m/(\sqrt{\hat n}+\varepsilon_0)+\lambda\theta)$. On the very first step
# $\hat m=g$ and $\hat n=g^2$, so that every weight moves by about $\eta$, whatever the size of its gradient.

# %%
optimiser = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
norm = optimiser.step([[g.data for g in gradients]], max_norm=1.0)
moved = np.concatenate([(start[name] - parameter.data).ravel() for name, parameter in model.named_parameters()])
felt = np.concatenate([g.data.ravel() for g in gradients]) != 0
print("gradient length before clipping above 1:", norm > 1.0)
print("median step of the weights that have a gradient:", round(float(np.median(np.abs(moved[felt]))), 4))

# %% [markdown]
# ### Exercise 3: the first AdamW step
#
# From a gradient `g`, a parameter `theta`, a rate `lr` and a decay `wd`, compute the parameter after the **first**
# step, with the bias corrections worked out ($\beta$ cancels).


# %%
def first_adamw_step(theta, g, lr, wd, eps=1e-8):
    """The parameter after step 1."""
    ### BEGIN SOLUTION
    return theta - lr * (g / (np.abs(g) + eps) + wd * theta)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the first AdamW step
rng = np.random.default_rng(3)
theta, g = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
tensor = Tensor(theta.copy(), requires_grad=True)
AdamW([tensor], lr=0.1, weight_decay=0.5).step([[g]])
np.testing.assert_allclose(first_adamw_step(theta, g, lr=0.1, wd=0.5), tensor.data, rtol=1e-6)
print("right")

# %% [markdown]
# ## 5. Many steps
#
# A training run is this step again and again. With one sentence there is nothing to generalise to; the model learns it
# by heart, and the loss should go to zero. Does clipping or the learning rate decide how fast? An experiment, with the
# same start for every run:

# %%
curves = {}
for lr in (0.001, 0.01, 0.1):
    run = Decoder(config, np.random.default_rng(0))
    optimiser = AdamW(run.parameters(), lr=lr, weight_decay=0.0)
    curve = []
    for _ in range(60):
        loss = cross_entropy(run(inputs), targets)
        curve.append(float(loss.data))
        optimiser.step([[g.data for g in grad(loss, run.parameters())]], max_norm=1.0)
    curves[lr] = curve
figure, axes = plt.subplots(figsize=(8, 3.2))
for (lr, curve), colour in zip(curves.items(), (GREEN, BLUE, ORANGE), strict=True):
    axes.semilogy(curve, color=colour, label=f"learning rate {lr}")
axes.axhline(np.log(len(vocabulary)), color="#888888", linestyle=":", linewidth=1.5)
axes.text(59, np.log(len(vocabulary)) * 1.15, "ln V", ha="right", color="#666666")
axes.set(xlabel="step", ylabel="loss (nats)", title="Learning one sentence by heart")
axes.legend()
plt.show()
ranking = sorted(curves, key=lambda lr: curves[lr][-1])
print("lowest loss after 60 steps at learning rate", ranking[0])
print("highest at", ranking[-1])

# %% [markdown]
# ## 6. Memory and threads
#
# The step that you have just read asks for the same arrays again and again. Three rules make it fast in NumPy, and each
# can be watched.
#
# **Scratch memory** (`scratch-buffer`): an array that nobody holds any more is handed out again instead of asking the
# system for fresh pages. After a first step, how many new blocks does the second one need?

# %%
model = Decoder(config, np.random.default_rng(0))
batch = np.tile(inputs, (64, 1))  # large enough for the arena: it ignores what is below 16 KiB
wanted = np.tile(targets, (64, 1))
arena().clear()
held = []
for _ in range(4):
    loss = cross_entropy(model(batch), wanted)
    gradients = grad(loss, model.parameters())
    del loss, gradients
    held.append(sum(len(blocks) for blocks in arena().blocks.values()))
print("new blocks in steps 1 to 4:", ["some" if n else "none" for n in np.diff([0, *held])])

# %% [markdown]
# **A thread's memory is its own** (`thread-local-isolation`). Two threads that share an arena would write into each
# other's activations. So the same work in threads must give the same bits as one after the other. **Heads and experts
# are independent** (`parallel-heads`), which makes them the natural pieces:

# %%
rng = np.random.default_rng(0)
Q, K, V = (rng.normal(size=(4, 64, 16)).astype(np.float32) for _ in range(3))  # (H, L, d_head)


def head(q, k, v):
    scores = empty((len(q), len(k)), q.dtype)  # from this thread's arena
    np.matmul(q, k.T, out=scores)
    p = softmax(Tensor(scores / np.float32(4.0))).data
    return p @ v, threading.get_ident(), arena()


serial = parallel_map(head, Q, K, V, threads=1)
threaded = parallel_map(head, Q, K, V, threads=2)
print("equal in every bit:", all(np.array_equal(a[0], b[0]) for a, b in zip(serial, threaded, strict=True)))
owners = {}
for _, thread, memory in threaded:
    owners.setdefault(thread, set()).add(id(memory))
print("one arena per thread:", all(len(arenas) == 1 for arenas in owners.values()))

# %% [markdown]
# **Slots on cache lines of their own** (`false-sharing-padding`). A core fetches memory in lines of 64 bytes. If two
# threads keep their partial sums in one line, each write takes the line away from the other, although they never touch
# the same number. A slot every $64\lceil n/64\rceil$ bytes, the first at a multiple of 64, ends that. Which slots of 24 bytes
# share a line, packed and padded?

# %%
packed = PaddedSlots(1, (6, 3), np.float64)[0]  # six threads, three float64 each: 24 bytes, from a line's start
padded = PaddedSlots(6, (3,), np.float64)


def lines(array):
    first = array.ctypes.data // 64
    return set(range(first, (array.ctypes.data + array.nbytes - 1) // 64 + 1))


figure, axes = plt.subplots(figsize=(8, 2.2))
for row, slots in enumerate(([packed[i] for i in range(6)], [padded[i] for i in range(6)])):
    start = slots[0].ctypes.data
    for i, slot in enumerate(slots):
        axes.broken_barh(
            [(slot.ctypes.data - start, slot.nbytes)], (row - 0.3, 0.6), color=(BLUE, GREEN, ORANGE)[i % 3]
        )
for line in range(0, 6 * 64 + 1, 64):
    axes.axvline(line, color="#888888", linewidth=1)
axes.set(yticks=[0, 1], yticklabels=["packed", "padded"], xlabel="bytes from the first slot (grey: 64-byte lines)")
axes.set_title("Six threads' slots: packed ones share lines, padded ones do not")
axes.grid(False)
plt.show()
shared = [sum(bool(lines(a) & lines(b)) for a, b in zip(s, s[1:], strict=False)) for s in (list(packed), list(padded))]
print("neighbours that share a line, of 5: packed", shared[0], "and padded", shared[1])
print("bytes from slot to slot:", packed.strides[0], "and", padded.stride)

# %% [markdown]
# ## What to take along
#
# 1. A step is: forward, loss, backward, clip, optimiser, schedule. You have now seen every tensor in it.
# 2. The first loss is $\ln V$; anything else is a bug or a leak.
# 3. The gradient at the logits is $p-\mathrm{onehot}$: the whole of language modelling in one line.
#
# Next: **03 · RMSNorm three times**, one equation as written, as derived and as a GPU kernel. To run the real thing:
# `minillm train`.
