# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 08 · Attention
#
# A token asks, the others answer. Attention is a dictionary whose keys need not match exactly: a query is compared with
# every key, the comparisons become weights, and what comes back is the weighted mean of the values:
#
# $$\mathbf S=\frac{\mathbf Q\mathbf K^\top}{\sqrt{d_{\rm head}}}+\mathbf M,\qquad
#   \alpha_{t,s}=\frac{e^{S_{t,s}}}{\sum_{s'}e^{S_{t,s'}}},\qquad \mathbf c_t=\sum_s\alpha_{t,s}\mathbf v_s.$$
#
# Equations: `qkv-projection`, `scaled-dot-product`, `attention-weights`, `attention-context`, `score-variance`, `mha`,
# `mha-cost-invariance`, `gqa`, `mqa`, `mha-to-gqa`, `cross-attention`, `self-attention`, `attention-dropout`; the masks
# `mask-causal`, `mask-full`, `mask-padding`, `mask-cross`, `mask-prefix`, `mask-block-diagonal`, `mask-loss`, `mask-combine`;
# what it costs: `attention-complexity`, `attention-scenarios`, `flash-attention`; and other kinds, named where they come.
#
# After it you can
# - write attention with its mask and derive its gradient by hand,
# - say what it costs in operations and in memory, and which of the two a streaming form saves,
# - name the patterns and kernels that avoid the square, and what they forget in exchange.

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, cat, grad, gradcheck, no_grad
from minillm.functional import attention as written
from minillm.functional import masks, sparse_masks
from minillm.functional.attention_cost import attention_cost, graph_cost, linear_attention_cost, scenario_cost
from minillm.functional.dual_chunk import dual_chunk_distances
from minillm.functional.feature_maps import FEATURE_MAPS, draw_directions, exp_features
from minillm.functional.linear_attention import linear_attention, linear_attention_chunked, linear_attention_quadratic
from minillm.functional.multi_head import multi_head_attention, pool_heads
from minillm.functional.streaming_attention import online_softmax_step, streaming_attention
from minillm.fused.attention import scaled_dot_product_attention as fused_attention
from minillm.fused.linear import embedding, linear
from minillm.fused.losses import cross_entropy
from minillm.fused.norms import rms_norm
from minillm.nn.linear_attention import LinearAttention
from minillm.nn.module import Module, parameter
from minillm.nn.multi_head import MultiHeadAttention
from minillm.nn.perceiver import InducedSetAttention, LatentBlock
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, VERMILION, use_style
from minillm.training.step import BatchThreads, loss_and_gradients

use_style()
LONGER = False  # True: the experiments with more steps and lengths, some minutes


def body(function):
    """The code of a function below its docstring."""
    text = inspect.getsource(function)
    return text[text.rindex('"""') + 4 :].rstrip()


# %% [markdown]
# ## 1. The equation, in the package's words
#
# Three small functions. The scores:

# %%
print(body(written.scaled_scores))
print(body(written.attention_weights))

# %% [markdown]
# The largest score of a row is subtracted before the exponential, which changes nothing in the quotient and keeps it from
# overflowing. A query that may see nothing gets weights 0, not 0/0. Now a dictionary with three keys, asked four times:

# %%
keys = np.array([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
values = np.array([[1.0], [2.0], [3.0]])
angles = np.linspace(0, 2 * np.pi, 200)
queries = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.1))
for sharpness, style in ((1.0, ":"), (5.0, "--"), (40.0, "-")):
    scores = written.scaled_scores(Tensor(queries[None, None]), Tensor(keys[None, None]), scale=sharpness)
    weights = written.attention_weights(scores).data[0, 0]
    axes[1].plot(np.degrees(angles), weights @ values, style, color=BLUE, label=f"scores times {sharpness:g}")
    if sharpness == 5.0:
        for s, colour in enumerate((VERMILION, GREEN, PURPLE)):
            axes[0].plot(np.degrees(angles), weights[:, s], color=colour, label=f"key {s + 1}, value {s + 1}")
for panel, title in zip(axes, ("weights, scores times 5", "what comes back"), strict=True):
    panel.set(title=title, xlabel="direction of the query, degrees", xticks=[0, 120, 240, 360])
axes[0].set_ylim(-0.03, 1.45)
axes[0].legend(fontsize=9, ncols=3, loc="upper center", columnspacing=1.0, handlelength=1.2)
axes[1].legend(fontsize=9)
plt.show()
print("close to 60 degrees, half-way between keys 1 and 2, even sharp weights share:", weights[33].round(1))

# %% [markdown]
# Soft scores average, sharp scores look up. The context is a convex combination of the values, so it can never leave their
# range; to write anything new, a transformer needs the FFN.
#
# **Heads.** One dictionary gives one answer per token. Multi-head attention cuts queries, keys and values into $H$ narrow
# ones. Self-attention is cross-attention of a sequence with itself; with fewer key and value heads than query heads, heads
# share them: `gqa`, and with one for all, `mqa`. Pooling trained key heads by their mean (`mha-to-gqa`) loses nothing
# exactly if the heads of a group agree already.

# %%
rng = np.random.default_rng(0)
H, d_model, L = 4, 16, 6
x, z = Tensor(rng.normal(size=(1, L, d_model))), Tensor(rng.normal(size=(1, 3, d_model)))
w_q, w_k, w_v, w_o = (Tensor(rng.normal(size=(d_model, d_model)) / 4) for _ in range(4))
self_attention = multi_head_attention(x, x, w_q, w_k, w_v, w_o, H=H)
cross_attention = multi_head_attention(z, x, w_q, w_k, w_v, w_o, H=H)
print("self:", self_attention.shape, " cross, as long as its queries:", cross_attention.shape)

twins = [Tensor(np.concatenate([w.data[:4]] * 2 + [w.data[8:12]] * 2)) for w in (w_k, w_v)]  # heads agree in pairs
pooled = [Tensor(pool_heads(w.data, 4, 2)) for w in twins]
all_heads = multi_head_attention(x, x, w_q, *twins, w_o, H=4)
grouped = multi_head_attention(x, x, w_q, *pooled, w_o, H=4, H_kv=2)
print("pooling heads that agree changes nothing:", np.allclose(all_heads.data, grouped.data))

order = rng.permutation(L)
shuffled = multi_head_attention(x[:, order], x[:, order], w_q, w_k, w_v, w_o, H=H)
print("shuffling the tokens shuffles the answers, no more:", np.allclose(shuffled.data, self_attention.data[:, order]))

# %% [markdown]
# The last line is why positions have to be put in from outside (lesson 05).
#
# ## 2. Why the root of d_head
#
# The inner product of a query and a key is a sum of $d_{\rm head}$ terms. If entries are independent with variance 1, it has
# variance $d_{\rm head}$, *linear* in the width **of a head**. The lecture notes say that it is over $d_{\rm model}$ and
# grows quadratically (erratum 20): neither fits their own remedy, the root of $d_{\rm head}$. What do wrong scales do? Look at
# the entropy of the weights and at how much gradient still gets through the softmax:

# %%
d_heads, H, n_keys = 2 ** np.arange(2, 10), 8, 64
scales = {
    "1": (lambda d: 1.0, VERMILION),
    "1/√d_head": (lambda d: d**-0.5, BLUE),
    "1/√d_model": (lambda d: (H * d) ** -0.5, ORANGE),
    "1/d_head": (lambda d: 1.0 / d, GREEN),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
variances = {}
for name, (scale, colour) in scales.items():
    curves = []
    for d in d_heads:
        q, k = Tensor(rng.normal(size=(1, 1, 200, d))), Tensor(rng.normal(size=(1, 1, n_keys, d)))
        scores = written.scaled_scores(q, k, scale(d))
        p = written.attention_weights(scores).data
        entropy = -(p * np.log(p + 1e-300)).sum(-1).mean() / np.log(n_keys)
        slope = (p * (1 - p)).sum(-1).mean()  # trace of the softmax's Jacobian
        curves.append((scores.data.var(), entropy, slope))
    variances[name] = [v for v, _, _ in curves]
    for panel, curve in zip(axes, zip(*curves, strict=True), strict=True):
        panel.plot(d_heads, curve, "o-", markersize=3, color=colour, label=name)
for panel, title in zip(axes, ("variance of the scores", "entropy over log L", "slope left in the softmax"), strict=True):
    panel.set(title=title, xlabel="d_head", xscale="log")
axes[0].set(yscale="log", ylim=(1e-3, 1e5))
axes[0].legend(fontsize=9, ncols=2, loc="upper left")
plt.show()
ratio = np.array(variances["1"]) / d_heads
print("variance over d_head, between 0.8 and 1.2 for all widths:", bool((ratio > 0.8).all() and (ratio < 1.2).all()))
print(f"with 1/√d_model and {H} heads the variance is about 1/{round(1 / np.mean(variances['1/√d_model']))}")

# %% [markdown]
# Undivided, wide heads look up hard from the first step, and a hard softmax passes almost no gradient: training starts
# stuck. Divided by too much, all weights are equal and the heads start as an average.
#
# ## 3. Who may see whom
#
# A mask is an array of booleans that broadcasts to the scores $(B,H,L_q,L_k)$, true where attention is allowed. As something
# to add it is its logarithm, $0$ or $-\infty$; AND of masks is the sum of these (`mask-combine`). A gallery, queries downwards, keys to
# the right. Beside the masks of encoders and decoders stand the sparse patterns: `sparse-attention-window`, `sparse-attention-dilated`,
# `sparse-attention-strided` (strided and fixed), `sparse-attention-global`, `sparse-attention-bigbird` and `attention-sink`.

# %%
L = 16
real = np.arange(L) < 11
documents = np.repeat([0, 1, 2], [5, 7, 4])[None]
gallery = {
    "full": masks.full_mask(L),
    "causal": masks.causal_mask(L),
    "prefix of 6": masks.prefix_mask(L, 6),
    "padding after 11": np.broadcast_to(masks.padding_mask(real[None])[0, 0], (L, L)),
    "three documents": masks.document_mask(documents)[0, 0],
    "window of 4": sparse_masks.window_mask(L, 4),
    "dilated, every 3rd": sparse_masks.dilated_mask(L, 4, 3),
    "strided by 4": sparse_masks.strided_mask(L, 4),
    "fixed, blocks of 4": sparse_masks.fixed_mask(L, 4, 1),
    "window, global 0 and 8": sparse_masks.global_mask(L, 3, [0, 8], causal=False),
    "BigBird, blocks of 2": sparse_masks.expand_blocks(
        sparse_masks.bigbird_blocks(8, 2, 1, 1, np.random.default_rng(4), causal=False), 2, L, L, causal=False
    ),
    "2 sinks, window of 4": sparse_masks.sink_mask(L, 4, 2),
}
figure, axes = plt.subplots(2, 6, figsize=(11.5, 4.4))
for panel, (name, keep) in zip(axes.flat, gallery.items(), strict=True):
    panel.imshow(keep, cmap="Blues", vmin=0, vmax=1.4)
    panel.set_title(name, fontsize=9)
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
figure.supxlabel("key: what is looked at", fontsize=10)
figure.supylabel("query: who looks", fontsize=10)
plt.show()
print({name: int(keep.sum()) for name, keep in gallery.items()})

# %% [markdown]
# Three slips of the source, in numbers. It calls the causal mask *strict* (erratum 30): a strict one, $j<i$, leaves the first
# token nothing to see. It treats padding as normal tokens (erratum 31): then what stands in the padding leaks out. It lets
# two cases of the prefix mask overlap at $i=m$ (erratum 32): harmless, for both say the same.

# %%
strict = np.tril(np.ones((4, 4), bool), -1)
print("pairs per row of a strict mask:", strict.sum(1), " of the causal one:", masks.causal_mask(4).sum(1))

text = rng.normal(size=(1, 5, d_model))
other = text.copy()
other[:, 3:] = rng.normal(size=(1, 2, d_model))  # other things in the padding
real = np.array([[True, True, True, False, False]])
weights = (w_q, w_k, w_v, w_o)
for name, keep in (("as normal tokens", None), ("masked", masks.padding_mask(real))):
    a, b = (multi_head_attention(Tensor(t), Tensor(t), *weights, H=4, keep=keep).data[:, :3] for t in (text, other))
    print(f"padding {name}: real tokens change with what stands there:", np.abs(a - b).max() > 0.01)

L, same = 9, True
for m in range(L + 1):
    i, j = np.arange(1, L + 1)[:, None], np.arange(1, L + 1)  # the source counts from 1
    printed = ((i <= m) & (j <= m)) | ((i >= m) & (j <= m)) | ((i > m) & (m < j) & (j <= i))
    same &= bool((printed == masks.prefix_mask(L, m)).all())
print("prefix masks equal for every m, printed or corrected:", same)

# %% [markdown]
# For the loss there is another mask: on the answer, not on the question (`mask-loss`). And cross-attention hides the
# encoder's padding with a mask of shape $(B,1,1,L_{\rm enc})$ (`mask-cross`).
#
# ### Exercise 1: a mask for packed documents
#
# Several short documents lie in one row of tokens; `segments` $(L,)$ says which document a token belongs to. Return the mask
# $(L,L)$ under which every document is read causally and hears nothing of the others.


# %%
def my_document_mask(segments):
    """Causal, and never across a border."""
    ### BEGIN SOLUTION
    places = np.arange(len(segments))
    return (segments[:, None] == segments) & (places <= places[:, None])
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: a mask for packed documents
segments = np.array([0, 0, 0, 1, 1, 2])
keep = my_document_mask(segments)
assert keep.shape == (6, 6) and keep.dtype == bool, "a boolean array (L, L) is wanted"
packed = Tensor(rng.normal(size=(1, 6, d_model)))
together = multi_head_attention(packed, packed, *weights, H=4, keep=keep).data[0]
for n in range(3):
    mine = np.flatnonzero(segments == n)
    alone = multi_head_attention(packed[:, mine], packed[:, mine], *weights, H=4, keep=masks.causal_mask(len(mine)))
    np.testing.assert_allclose(together[mine], alone.data[0], atol=1e-12, err_msg=f"document {n} is not read alone")
print("right: packed equals one by one")

# %% [markdown]
# ## 4. The gradient
#
# Let $O=PV$ with $P=\mathrm{softmax}(S)$, and let $\bar O$ come in. The product gives $\bar V=P^\top\bar O$ and $\bar P=\bar OV^\top$.
# The Jacobian of a softmax row is $\mathrm{diag}(p)-pp^\top$, so
#
# $$\bar S=P\odot(\bar P-\delta),\qquad \delta_i=\sum_j\bar P_{ij}P_{ij}=\sum_d\bar O_{id}O_{id},
#   \qquad \bar Q=\bar SK/\sqrt{d},\qquad \bar K=\bar S^\top Q/\sqrt d.$$
#
# The second expression for $\delta$ is the useful one: it needs the output, not the $L\times L$ weights. So a backward pass
# may throw the weights away and make them again, block by block, from one number per query, the logarithm of its
# normaliser. That is what the package's fused form does.
#
# ### Exercise 2: the derived form
#
# Arrays `q`, `k`, `v` of shapes $(L_q,d)$, $(L_k,d)$, $(L_k,d_v)$ and a mask `keep`. Return the output and a function that maps
# $\bar O$ to $(\bar Q,\bar K,\bar V)$.


# %%
def my_attention(q, k, v, keep):
    """One head and its hand-derived gradient."""
    ### BEGIN SOLUTION
    scale = q.shape[-1] ** -0.5
    s = np.where(keep, q @ k.T * scale, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ v

    def vjp(d_out):
        delta = (d_out * out).sum(-1, keepdims=True)
        ds = p * (d_out @ v.T - delta)
        return ds @ k * scale, ds.T @ q * scale, p.T @ d_out

    return out, vjp
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: the derived form
arrays = [rng.normal(size=s) for s in ((5, 4), (5, 4), (5, 3))]
cotangent = rng.normal(size=(5, 3))
tensors = [Tensor(a[None, None], requires_grad=True) for a in arrays]
reference = written.scaled_dot_product_attention(*tensors, masks.causal_mask(5))
out, vjp = my_attention(*arrays, masks.causal_mask(5))
np.testing.assert_allclose(out, reference.data[0, 0], rtol=1e-10, err_msg="the output is off")
for ours, theirs, name in zip(vjp(cotangent), grad(reference, tensors, cotangent[None, None]), "qkv", strict=True):
    np.testing.assert_allclose(ours, theirs.data[0, 0], rtol=1e-8, atol=1e-10, err_msg=f"the gradient of {name} is off")
print("right")

# %%
heads = [rng.normal(size=s) for s in ((1, 4, 5, 3), (1, 2, 5, 3), (1, 2, 5, 2))]
for name, form in (("written", written.scaled_dot_product_attention), ("fused", fused_attention)):
    checked = gradcheck(lambda q, k, v, form=form: form(q, k, v, causal=True, window=3), heads)
    print(f"{name}: four heads over two, causal, window of 3: gradient check passed:", checked.passed)

# %% [markdown]
# **Dropout** on the weights (`attention-dropout`) is the one thing that needs them whole; large models do without it.
#
# ## 5. What it costs
#
# Operations, two for a multiplication with its addition: the tables of the notes, with constants. The tape knows every
# operation of the written form, so the formula can be held against a count. Two slips show at once: the printed cost *per
# head* is that of all heads (erratum 26), and the number of heads does not matter for the products but does for the softmax
# (erratum 21).

# %%
B, L, d_model = 2, 32, 64
for H in (1, 4, 16):
    z = Tensor(rng.normal(size=(B, L, d_model)), requires_grad=True)
    matrices = [Tensor(rng.normal(size=(d_model, d_model)), requires_grad=True) for _ in range(4)]
    counted, cost = graph_cost(multi_head_attention(z, z, *matrices, H=H)), attention_cost(B, L, d_model, H)
    products = cost.projections + cost.scores + cost.mixing + cost.output
    print(f"{H:2d} heads: products counted {counted.products:,}, formula {products:,}; exponentials {counted.exponentials:,}")

# %% [markdown]
# The scores are the only thing that grows with $L^2$, in time *and* in memory. The memory can be had back without any
# approximation. Go through the keys in blocks and keep, per query, the largest score so far $m$, the sum $\ell$ of exponentials and the
# weighted sum $o$ of values. If a later block has a larger score, what was summed is corrected by $e^{m-m'}$ (`flash-attention`):
#
# $$m'=\max(m,\tilde m),\qquad \ell'=e^{m-m'}\ell+\textstyle\sum e^{\tilde S-m'},\qquad o'=e^{m-m'}o+e^{\tilde S-m'}\mathbf V,\qquad\text{output }o/\ell.$$
#
# ### Exercise 3: one step of the running softmax
#
# For one query: `state` is $(m,\ell,o)$, at the start $(-\infty,0,0)$; `scores` $(n,)$ and `v` $(n,d_v)$ are the next block.


# %%
def my_step(state, scores, v):
    """Take in one more block of keys."""
    ### BEGIN SOLUTION
    m, total, out = state
    new = max(m, scores.max())
    p = np.exp(scores - new)
    return new, np.exp(m - new) * total + p.sum(), np.exp(m - new) * out + p @ v
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: one step of the running softmax
scores, v = 300 * rng.normal(size=12), rng.normal(size=(12, 3))
state = (-np.inf, 0.0, np.zeros(3))
for start in range(0, 12, 4):
    state = my_step(state, scores[start : start + 4], v[start : start + 4])
p = np.exp(scores - scores.max())
np.testing.assert_allclose(state[2] / state[1], p @ v / p.sum(), atol=1e-12, err_msg="not the softmax of all scores")
print("right, with scores of size 300 that no exponential could hold")

# %%
print(body(online_softmax_step))

# %% [markdown]
# Count again, now over lengths, forward only: operations of the products, and the largest array that is ever recorded.

# %%
H, d_head, counts = 2, 16, {}
lengths = 2 ** np.arange(5, 11)
for L in lengths:
    q, k, v = (Tensor(rng.normal(size=(1, H, int(L), d_head)).astype(np.float32), requires_grad=True) for _ in range(3))
    phi_q, phi_k = (FEATURE_MAPS["elu1"].function(t) for t in (q, k))
    forms = {
        "dense": written.scaled_dot_product_attention(q, k, v),
        "streaming": streaming_attention(q, k, v, block=16),
        "linear, chunks of 16": linear_attention_chunked(phi_q, phi_k, v, chunk=16)[0],
    }
    for name, out in forms.items():
        counts.setdefault(name, []).append(graph_cost(out))
formulas = {
    "dense": [scenario_cost("train", 1, H, d_head, int(L)) for L in lengths],
    "streaming": [scenario_cost("streaming", 1, H, d_head, int(L)) for L in lengths],
}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
for (name, found), colour, marker in zip(counts.items(), (VERMILION, BLUE, GREEN), "osx", strict=True):
    size = {"markersize": 11 if name == "dense" else 6, "fillstyle": "none" if name == "dense" else "full"}
    axes[0].loglog(lengths, [c.products for c in found], marker, color=colour, label=f"{name}, counted", **size)
    axes[1].loglog(lengths, [c.largest for c in found], marker, color=colour, **size)
    if name in formulas:
        axes[0].loglog(lengths, [f.operations for f in formulas[name]], ":", color=colour)
        axes[1].loglog(lengths, [f.memory for f in formulas[name]], ":", color=colour)
    else:
        linear_cost = [linear_attention_cost(1, H, int(L), d_head, d_head, 16) for L in lengths]
        axes[0].loglog(lengths, linear_cost, ":", color=colour)
axes[0].set(title="operations (dotted: formula)", xlabel="L")
axes[1].set(title="largest array, numbers", xlabel="L")
axes[0].legend(fontsize=9)
plt.show()
last = {name: found[-1] for name, found in counts.items()}
print(f"L = {lengths[-1]}: streaming does {last['streaming'].products / last['dense'].products:g} times the products of dense,")
print(f"and its largest array is {last['dense'].largest / last['streaming'].largest:g} times smaller")

# %% [markdown]
# The notes' second table has one $L$ too many in the cross-attention row and no batch in the decoding row (erratum 27).
# In a decoding step at position $t$, attention costs $4td_{\rm model}$ and the four projections $8d_{\rm model}^2$: the cache has to be
# twice as long as the model is wide before attending costs as much as projecting.
#
# ## 6. Another kernel: linear attention
#
# If $e^{q\cdot k/\sqrt d}$ were an inner product $\phi(q)\cdot\phi(k)$, the sum over keys could be done once for all queries
# (`linear-attention`). A causal sum becomes a state of fixed size, $\sum_j\phi(k_j)v_j^\top$, and attention a recurrent network
# (`linear-attention-causal`). The notes' transposes do not fit each other (erratum 28); with fitting ones, all forms agree:

# %%
q, k = (np.exp(rng.normal(size=(1, 2, 50, 8))) for _ in range(2))
v = rng.normal(size=(1, 2, 50, 4))
phi_q, phi_k, v = Tensor(q), Tensor(k), Tensor(v)
once, square = linear_attention(phi_q, phi_k, v), linear_attention_quadratic(phi_q, phi_k, v)
print("at once = quadratic:", np.abs(once.data - square.data).max() < 1e-14)
chunks, state, normaliser = linear_attention_chunked(phi_q, phi_k, v, chunk=16)
causal = linear_attention_quadratic(phi_q, phi_k, v, causal=True)
print("in chunks = quadratic, masked:", np.abs(chunks.data - causal.data).max() < 1e-13, "; state", state.shape)

# %% [markdown]
# Which $\phi$? The notes list ELU + 1 (`feature-map-elu1`), ReLU and its square (`feature-map-relu`), $e^{x/d}$
# (`feature-map-exp`) and random Fourier features (`feature-map-rff`) as positive approximations of the softmax's kernel. Elementwise maps
# define *other* kernels, and Fourier features are signed (erratum 29). The one that is positive and right on average is
# $e^{\omega x-\lVert x\rVert^2/2}$ (`feature-map-favor`), better with orthogonal $\omega$ (`feature-map-normalised`).

# %%
d = 16
q, k = (0.8 * rng.normal(size=(120, d)) for _ in range(2))
true = (q @ k.T / np.sqrt(d)).ravel()
omega = draw_directions(512, d, np.random.default_rng(1), orthogonal=True)
candidates = {
    "ELU + 1": (FEATURE_MAPS["elu1"].function, {}, ORANGE),
    "exp(x / d)": (lambda x: exp_features(x, c=float(d)), {}, VERMILION),
    "random Fourier, 512": (FEATURE_MAPS["fourier"].function, {"omega": omega}, PURPLE),
    "positive random, 512": (FEATURE_MAPS["positive"].function, {"omega": omega}, BLUE),
}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharex=True)
for panel, (name, (phi, how, colour)) in zip(axes, candidates.items(), strict=True):
    kernel = (phi(Tensor(q), **how).data @ phi(Tensor(k), **how).data.T).ravel()
    panel.plot(true[::7], kernel[::7], ".", color=colour, markersize=2)
    grid = np.linspace(true.min(), true.max(), 100)
    if "random" in name:
        panel.plot(grid, np.exp(grid), color="black", linewidth=1)
    correlation = np.corrcoef(np.log(np.abs(kernel)), true)[0, 1]
    panel.set_title(f"{name}\ncorrelation of the log {correlation:.2f}", fontsize=10)
    panel.set_xlabel("q · k / √d")
    print(f"{name:21s} ever negative: {bool((kernel < 0).any())!s:5}  follows exp(score): {correlation > 0.8}")
axes[0].set_ylabel("φ(q) · φ(k)")
plt.show()

# %% [markdown]
# ## 7. Who can look something up? An experiment
#
# The claim to test: a state of fixed size, or a window, must forget. Show a model $n$ pairs of a key and a value, then one of
# the keys, and ask for its value. One layer, keys and values summed in one token, so that a single look is enough. Full
# attention, a window of five positions, and linear attention with two feature maps; guessing gets 1 in 16. Before you run
# it: what do you expect of linear attention at $n=24$, whose state holds 16 × 17 numbers a head?

# %%
N_KEYS, N_VALUES, WIDTH = 32, 16, 32
STEPS, PAIRS = (2000, (2, 4, 7, 10, 16, 24, 31)) if LONGER else (300, (4, 10, 24))


def draw_pairs(n, batch, rng):
    """Keys (batch, n), all different, their values, the key asked for and its value."""
    keys = rng.permuted(np.tile(np.arange(N_KEYS), (batch, 1)), axis=1)[:, :n]
    values, asked, rows = rng.integers(N_VALUES, size=(batch, n)), rng.integers(n, size=batch), np.arange(batch)
    return keys, values, keys[rows, asked], values[rows, asked]


class Recall(Module):
    """Pairs and a question through one mixer to logits over values."""

    def __init__(self, mixer, rng):
        self.keys = parameter(rng.normal(0, 0.5, size=(N_KEYS, WIDTH)))
        self.values = parameter(rng.normal(0, 0.5, size=(N_VALUES, WIDTH)))
        self.mixer, self.gain = mixer, parameter(np.ones(WIDTH))
        self.head = parameter(rng.normal(0, 0.2, size=(N_VALUES, WIDTH)))

    def forward(self, keys, values, asked):
        pairs = embedding(keys, self.keys) + embedding(values, self.values)  # (B, n, d)
        x = cat([pairs, embedding(asked[:, None], self.keys)], axis=1)  # (B, n + 1, d)
        return linear(rms_norm(self.mixer(x)[:, -1], self.gain), self.head)  # (B, values)


mixers = {
    "full": (BLUE, lambda rng: MultiHeadAttention(WIDTH, 2, rng, causal=True, std=0.2)),
    "window of 5": (VERMILION, lambda rng: MultiHeadAttention(WIDTH, 2, rng, causal=True, window=5, std=0.2)),
    "linear, ELU + 1": (ORANGE, lambda rng: LinearAttention(WIDTH, 2, rng, std=0.2)),
    "linear, ReLU²": (GREEN, lambda rng: LinearAttention(WIDTH, 2, rng, std=0.2, features="relu2")),
} | ({} if not LONGER else {
    "linear, positive": (PURPLE, lambda rng: LinearAttention(WIDTH, 2, rng, std=0.2, features="positive", n_features=32)),
})


def train_recall(make, n):
    """Train one mixer on n pairs; return how often it then answers right."""
    rng = np.random.default_rng(0)
    model = Recall(make(rng), rng)
    optimiser = AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for step in range(STEPS):
        *seen, answer = draw_pairs(n, 32, rng)
        optimiser.lr = 2e-2 * min(1, (step + 1) / 20) * (1 - step / STEPS)
        _, gradients = loss_and_gradients(cross_entropy(model(*seen), answer), model.parameters())
        optimiser.step([gradients], max_norm=1.0)
    with no_grad():
        *seen, answer = draw_pairs(n, 1000, rng)
        return float((model(*seen).data.argmax(-1) == answer).mean())


with BatchThreads(1).running():  # one thread for such small products
    accuracy = {(name, n): train_recall(make, n) for name, (_, make) in mixers.items() for n in PAIRS}

# %%
figure, axes = plt.subplots(figsize=(7, 3.8))
for name, (colour, _) in mixers.items():
    axes.plot(PAIRS, [accuracy[name, n] for n in PAIRS], "o-", color=colour, label=name)
span = np.arange(4, max(PAIRS) + 1)
axes.plot(span, 4 / span + (1 - 4 / span) / N_VALUES, ":", color=VERMILION, label="4 of n seen, the rest guessed")
axes.axhline(1 / N_VALUES, color="grey", linewidth=1, linestyle="--")
axes.text(min(PAIRS), 1 / N_VALUES + 0.02, "guessing", ha="left", color="grey")
axes.set(title="recall of one value among n", xlabel="n, pairs shown", ylabel="right answers", ylim=(0, 1.05), xticks=PAIRS)
axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()
few, many = PAIRS[0], PAIRS[-1]
line = {n: 4 / n + (1 - 4 / n) / N_VALUES for n in PAIRS}
print(f"full attention right at least 19 times in 20, also with {many} pairs:", accuracy["full", many] > 0.95)
print("the window never above its line by 5 points:", all(accuracy["window of 5", n] < line[n] + 0.05 for n in PAIRS))
print(f"with {many} pairs ReLU² finds at least 1.5 times as many as ELU + 1:", (
    accuracy["linear, ReLU²", many] > 1.5 * accuracy["linear, ELU + 1", many]))

# %% [markdown]
# Full attention finds the value wherever it stands. The window finds it if it happens to be near, and no training can take
# it above the dotted line. Linear attention is in between, and *which kernel* it has matters as much as that it is linear: a
# flat one (ELU + 1) cannot point, one with a square can. This is one layer and few steps, and its settings (widths, learning
# rate, spread of the weights) were searched on the one seed that it runs with: a tendency, not a ranking. Two more seeds, tried
# once with the same settings, gave 0.83 and 0.76 for ReLU² at 24 pairs, and 0.39 and 0.36 for ELU + 1.
# `LONGER = True` adds steps, lengths and the positive random features.
#
# Content may choose instead of the position: `sparse-attention-topk` keeps the $k$ largest scores of each row. And patterns made of blocks
# save what they promise, since whole blocks are left out of the computation (`sparse-attention-block`).
#
# ## 8. Through a few latents
#
# The square can also be avoided by asking with fewer queries. $M$ learnt latents read the sequence
# (`perceiver-latent-attention`), then each other (`latent-transformer-block`), at $O(BMLd)$. The notes call this *MLA*; DeepSeek's
# MLA shortens the cache's width, not the sequence (erratum 24), and is the subject of lesson 09. The notes also lost the residual
# additions (erratum 25). Sent back to the elements, the latents make attention between the members of a set
# (`set-transformer-isab`), which does not know in which order they came:

# %%
rng = np.random.default_rng(3)
block, isab = LatentBlock(32, 4, 64, rng), InducedSetAttention(32, 4, 64, 4, rng)
latents = Tensor(rng.normal(size=(1, 4, 32)).astype(np.float32))
for L in (10, 500):
    x = Tensor(rng.normal(size=(1, L, 32)).astype(np.float32))
    print(f"a sequence of {L}: 4 latents come out,", block(latents, x).shape)
order = rng.permutation(L)
same = np.abs(isab(x[:, order]).data - isab(x).data[:, order]).max()
print("permuting a set permutes the result:", same < 1e-5)
dense, through = scenario_cost("train", 1, 4, 8, 500), scenario_cost("cross", 1, 4, 8, 4, 500)
print(f"operations of scores and mixing at L = 500: {dense.operations / through.operations:g} times fewer through 4 latents")

# %% [markdown]
# ## 9. One acronym, two mechanisms: DCA
#
# The notes have a heading *DCA* and one line about medical images. That is **dual cross-attention** (`dca-dual-cross-attention`): channels of one
# scale of an image encoder look at the channels of all scales, then patches at patches. In the literature on language
# models DCA is **dual chunk attention** (`dca-dual-chunk`): a model trained on $c$ positions reads a longer text without ever
# meeting a larger distance. Positions are counted inside chunks of $s<c$; a query has one position for its own chunk, one for
# the chunk before, and $c-1$ for all that is older.

# %%
L, s, c = 36, 8, 12
plain = np.where(masks.causal_mask(L), np.arange(L)[:, None] - np.arange(L), -1)
dual = dual_chunk_distances(L, s, c)
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.7))
for panel, distances, title in zip(axes, (plain, dual), ("plain distances", f"dual chunk, s = {s}, c = {c}"), strict=True):
    shown = panel.imshow(np.ma.masked_less(distances, 0), vmin=0, vmax=L - 1)
    panel.set(title=title, xlabel="key", ylabel="query")
    panel.grid(visible=False)
figure.colorbar(shown, ax=axes, label="distance seen by RoPE")
plt.show()
near = (plain >= 0) & (plain <= c - s)
print("largest distance, plain:", plain.max(), " dual chunk:", dual.max())
print(f"exact up to {c - s} tokens back:", bool((plain[near] == dual[near]).all()))

# %% [markdown]
# ## What to take along
#
# 1. Attention is a soft dictionary. Divide by the root of a *head's* width, or it starts hard and learns nothing.
# 2. A mask is part of the model, not an afterthought: padding, documents and prefixes are tested by *changing what must
#    not be seen*.
# 3. The $L\times L$ memory is an artefact of writing the weights down; blocks and a running maximum avoid it exactly. The
#    $L^2$ time is not, and every way around it forgets something. Measure what.
#
# ### Exercise 4: how long is too long?
#
# A layer has $d_{\rm model}$ and $H$ heads of $d_{\rm model}/H$. From which $L$ on (self-attention, a whole sequence, no mask) do scores and
# mixing together cost more operations than the four projections? Leave the softmax out.


# %%
def break_even(d_model):
    """The length at which the square costs as much as the projections."""
    ### BEGIN SOLUTION
    return 2 * d_model  # 4 L^2 d = 8 L d^2
    ### END SOLUTION


# %% tags=["check"]
# Exercise 4: how long is too long?
for d_model in (64, 512):
    cost = attention_cost(1, break_even(d_model), d_model, 8)
    assert cost.scores + cost.mixing == cost.projections + cost.output, "compare 4 L² d with 8 L d²"
print("right: a model of width 4096 works more on the square than on projections from", break_even(4096), "tokens on")
