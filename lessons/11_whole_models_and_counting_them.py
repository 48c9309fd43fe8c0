# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 11 · Whole models, and counting them
#
# The parts of the last lessons fit together in a few ways only. This lesson builds them from one configuration, shows who
# sees what in each, and counts what they hold and do, without making them.
#
# Equations of the block: `block-pre-ln`, `block-post-ln`, `block-parallel`, `block-parallel-scaled`, `branch-scales`,
# `droppath`, `decoder-block-cross`. Of models: `encoder-stack`, `encoder-only-model`, `decoder-only-model`,
# `prefix-decoder-model`, `seq2seq-model`, `shift-right`, `llama-config`, `gpt-config`, `bert-config`, `t5-config`,
# `palm-config`, `model-type-table`, `single-type-failure`, `vision-text-cross`. Of encoders' tasks: `cls-pooling`,
# `encoder-heads`, `mlm-loss`, `replaced-token-detection`. Of counting: `count-embedding`, `count-attention`, `count-ffn`,
# `count-norm`, `count-lm-head`, `count-model`, `count-moe`, `count-mla`, `count-peft`, `count-encdec-vs-prefix`,
# `flops-block`, `flops-6nd`, `memory-training`, `compute-optimal`. Worked numbers: `wn-embedding-13b`, `wn-untied-head`,
# `wn-heads-13b`, `wn-qkv-13b`, `wn-out-proj-13b`, `wn-rmsnorm-13b`, `wn-swiglu-13b`, `wn-logits-shape`, `wn-llama-table`,
# `wn-llama-totals`, `wn-tokens`, `wn-parallel-scale`.
#
# After it you can
# - say from a configuration which model it is, and which token sees which,
# - count the parameters of a LLaMA to the last one, on paper,
# - estimate operations and memory of a training run, and say what the estimate leaves out.

# %%
import inspect
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, gradcheck
from minillm.functional import blocks
from minillm.fused.losses import cross_entropy
from minillm.models import Config, EncoderDecoder, Transformer, costs, counting
from minillm.models.families import FAMILIES, LLAMA, gpt_config, tiny
from minillm.models.heads import model_type_table
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, VERMILION, use_style
from minillm.training.step import loss_and_gradients

use_style()
LONG = False  # True: longer trainings


def show(function):
    """The code of a function without its docstring."""
    head, _, body = textwrap.dedent(inspect.getsource(function)).split('"""')
    head = head[head.index("def ") :].rstrip().removesuffix("r").rstrip()
    print(head + body.rstrip() + "\n")


# %% [markdown]
# ## 1. Blocks
#
# A block is two branches around a residual stream. What differs is where the norm stands, and whether the second branch
# reads what the first has written.

# %%
for form in (blocks.pre_ln_block, blocks.post_ln_block, blocks.parallel_block_scaled):
    show(form)

# %% [markdown]
# Their gradients, against finite differences:

# %%
rng = np.random.default_rng(0)
x, g = Tensor(rng.normal(size=(2, 3, 4)), requires_grad=True), Tensor(np.ones(4))
for form, n_gains in ((blocks.pre_ln_block, 2), (blocks.post_ln_block, 2), (blocks.parallel_block, 1)):
    gradcheck(lambda t, f=form, n=n_gains: f(t, lambda u: u * u, lambda u: u.tanh(), *[g] * n), [x])
    print(f"{form.__name__}: gradient right")

# %% [markdown]
# **Erratum 33.** Dividing the sum of two parallel branches by $\sqrt2$ keeps its variance only if the branches are
# independent. But both read the same input. At correlation $c$ the variance is $1+c$:

# %%
correlations = np.linspace(-0.9, 0.9, 13)
a, b = rng.normal(size=(2, 100_000))
measured = [np.var((a + (c * a + np.sqrt(1 - c * c) * b)) / np.sqrt(2)) for c in correlations]
for c in (0.0, 0.5):
    f = c * a + np.sqrt(1 - c * c) * b
    print(f"correlation {c}: variance {np.var((a + f) / np.sqrt(2)):.1f}")

fig, ax = plt.subplots(figsize=(5, 3))
ax.plot(correlations, 1 + correlations, color=BLUE, label="1 + c")
ax.plot(correlations, measured, "o", color=ORANGE, label="measured")
ax.axhline(1, color="0.6", lw=1)
ax.set(xlabel="correlation of the branches", ylabel="variance of (a + f) / √2", title="√2 is right for c = 0 only")
ax.legend()
plt.show()

# %% [markdown]
# ## 2. Who sees what
#
# Four models from one `Config`. We change one token at a time and look at which outputs move.

# %%
SIZES = {"vocab_size": 11, "d_model": 16, "n_layers": 2, "n_heads": 4, "context": 16, "init_std": 0.3}


def reach(logits_of, L=8):
    """Which inputs (columns) each output (row) depends on."""
    ids = np.arange(L)[None]
    base, seen = logits_of(ids), np.zeros((L, L), bool)
    for j in range(L):
        changed = ids.copy()
        changed[0, j] = 10
        seen[:, j] = np.abs(logits_of(changed) - base)[0].max(-1) > 1e-6
    return seen


def make(**choices):
    return Transformer(Config(**SIZES, **choices), np.random.default_rng(0))


decoder, encoder, prefix = make(), make(architecture="encoder"), make(architecture="prefix")
two = EncoderDecoder(Config(**SIZES, architecture="encoder-decoder"), np.random.default_rng(0))
source = np.arange(8)[None]
pictures = {
    "encoder": reach(lambda i: encoder(i).data),
    "decoder": reach(lambda i: decoder(i).data),
    "prefix of 3": reach(lambda i: prefix(i, prefix=3).data),
    "enc–dec: own past": reach(lambda i: two(source, i).data),
    "enc–dec: the source": reach(lambda i: two(i, source).data),
}
fig, axes = plt.subplots(1, 5, figsize=(11, 2.6))
for ax, (title, seen) in zip(axes, pictures.items(), strict=True):
    ax.imshow(seen, cmap="Blues", vmin=0, vmax=1.4)
    ax.set(title=title, xlabel="input", xticks=[], yticks=[])
axes[0].set_ylabel("output")
plt.show()
print({title: int(seen.sum()) for title, seen in pictures.items()})

# %% [markdown]
# What each is for (`model-type-table`):

# %%
print(model_type_table())

# %% [markdown]
# **Why two kinds of block** (`single-type-failure`). Give an encoder the decoder's task: predict the next token. The text
# is random, so nobody can do better than $\log 11\approx2.4$ nats, unless he sees the answer.

# %%
STEPS = 400 if LONG else 100


def curve(architecture):
    """Losses of training on random tokens."""
    draws = np.random.default_rng(1)
    config = Config(**{**SIZES, "init_std": 0.1}, architecture=architecture, positions="learned")
    model, losses = Transformer(config, np.random.default_rng(0)), []
    optimiser = AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        tokens = draws.integers(0, 11, (8, 9))
        loss, gradients = loss_and_gradients(cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]), model.parameters())
        optimiser.step([gradients])
        losses.append(loss)
    return losses


curves = {name: curve(name) for name in ("decoder", "encoder")}
fig, ax = plt.subplots(figsize=(5.5, 3))
for (name, losses), colour in zip(curves.items(), (BLUE, VERMILION), strict=True):
    ax.plot(losses, color=colour, label=name)
ax.axhline(np.log(11), color="0.5", lw=1, ls="--", label="log 11")
ax.set(xlabel="step", ylabel="loss", title="Predicting noise: the encoder copies")
ax.legend()
plt.show()
print("the encoder has seen the answer:", np.mean(curves["encoder"][-10:]) < 0.7 * np.log(11))
print("the decoder has not:", np.mean(curves["decoder"][-10:]) > 0.9 * np.log(11))

# %% [markdown]
# ### Exercise 1: the decoder's input
#
# An encoder-decoder is trained on a target that stands one place to the right, behind a first token (`shift-right`).


# %%
def my_shift(y, bos):
    """[bos, y_1, ..., y_{L-1}] for every row of y (B, L)."""
    ### BEGIN SOLUTION
    return np.concatenate([np.full((len(y), 1), bos), y[:, :-1]], axis=1)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: one place to the right
y = np.arange(1, 7).reshape(2, 3)
np.testing.assert_array_equal(my_shift(y, 0), blocks.shift_right(y, 0), err_msg="not yet one place to the right")
print("right")

# %% [markdown]
# ## 3. Counting parameters
#
# The slides count a 13B model. Attention has four maps, the feed-forward network three, every norm a vector.

# %%
c = LLAMA["LLaMA 13B"].config
parts = {
    "embedding": counting.count_embedding(c.vocab_size, c.d_model),
    "attention, a layer": counting.count_attention(c.d_model, c.n_heads),
    "FFN, a layer": counting.count_ffn(c.d_model, c.d_ff, gated=True),
    "a norm": counting.count_norm(c.d_model),
    "head": counting.count_lm_head(c.d_model, c.vocab_size),
    "all": counting.count_model(c).total,
}
for name, n in parts.items():
    print(f"{name:20} {n:>15,}")
with_biases = counting.count_ffn(c.d_model, c.d_ff, True, bias=True) - counting.count_ffn(c.d_model, c.d_ff, True)
print(f"erratum 7: the slide's biases would add {with_biases:,} a layer, and the total would not be that of the model")

# %% [markdown]
# ### Exercise 2: a LLaMA on paper
#
# Write the total in $V$, $d$, $N$, $H$, $H_{kv}$ and $d_{\rm ff}$.


# %%
def my_total(V, d, N, H, H_kv, d_ff):
    """Parameters of a LLaMA with a head of its own."""
    ### BEGIN SOLUTION
    attention = 2 * d * d + 2 * d * H_kv * (d // H)
    return 2 * V * d + N * (attention + 3 * d * d_ff + 2 * d) + d
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: the whole table
for name, (m, _) in LLAMA.items():
    mine = my_total(m.vocab_size, m.d_model, m.n_layers, m.n_heads, m.n_kv_heads, m.d_ff)
    assert mine == counting.count_model(m).total, f"{name}: {mine} is not its number of parameters"
print("right")

# %% [markdown]
# A formula is believed when it equals what a living model holds. All families, small:

# %%
for family in FAMILIES:
    config = tiny(family, 50)
    kind = EncoderDecoder if config.architecture == "encoder-decoder" else Transformer
    live = kind(config, np.random.default_rng(0)).count_parameters()
    print(f"{family:7} formula {counting.count_model(config).total:7,}  live {live:7,}")
print(f"GPT-2 {counting.count_model(gpt_config()).total:,}")
print(f"latent attention of DeepSeek-V3 {counting.count_mla(7168, 128, 128, 512, 64, 1536):,} a layer")

# %% [markdown]
# **Erratum 17.** The feed-forward networks are said to hold 50 to 60 % of the parameters. The table says otherwise. And
# only the largest stay near the 20 tokens a parameter at which a budget is spent best (`compute-optimal`). The small ones
# have seen far more: they are made to be run, not only to be trained.

# %%
names = list(LLAMA)
shares = [100 * costs.ffn_share(LLAMA[n].config) for n in names]
ratios = [costs.tokens_per_parameter(counting.count_model(LLAMA[n].config).total, LLAMA[n].tokens) for n in names]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
left.barh(names, shares, color=BLUE)
left.axvspan(50, 60, color=ORANGE, alpha=0.3)
left.text(55, -0.75, "claimed", ha="center", fontsize=8)
left.set(xlabel="FFN, % of parameters")
left.invert_yaxis()
right.barh(names, ratios, color=GREEN)
right.axvline(20, color=VERMILION, lw=1)
right.set(xscale="log", xlabel="tokens per parameter (line: 20)")
plt.tight_layout()
plt.show()
for name, share, ratio in zip(names, shares, ratios, strict=True):
    print(f"{name:12} {share:4.1f} %  {ratio:5.0f}")

# %% [markdown]
# **Erratum 35.** For two texts of 6 + 6 layers (`count-encdec-vs-prefix`):

# %%
print("encoder-decoder:", counting.attention_blocks(6, 6), "blocks of attention")
print("prefix decoder of the same depth:", counting.attention_blocks(6, 6, prefix=True), "or of half:", counting.attention_blocks(0, 6, prefix=True))

# %% [markdown]
# ## 4. Operations and memory
#
# A matrix with $W$ weights costs $2W$ operations a token; scores and mixing cost $4L_kd_{\rm model}$ (`flops-block`). The
# tape has recorded every product, so the formula can be held against it.

# %%
config = Config(50, 32, 2, 4, context=32)
ids = np.zeros((2, 24), int)
done = costs.measured_products(Transformer(config, rng)(ids))
print("on the tape", sum(done.values()), " formula", int(costs.forward_flops(config, 2, 24, causal=False)))

lengths = 2 ** np.arange(9, 18)
m = LLAMA["LLaMA 7B"].config
P = counting.count_model(m).total
over = [costs.training_flops(m, 1, int(L)) / L / costs.flops_6nd(P, 1) for L in lengths]
fig, ax = plt.subplots(figsize=(5.5, 3))
ax.plot(lengths, over, "o-", color=BLUE)
ax.axhline(1, color="0.5", lw=1)
ax.set(xscale="log", xlabel="length of the text", ylabel="operations / 6 P N", title="6PN forgets attention (7B)")
plt.show()
print({int(L): round(float(r), 2) for L, r in zip(lengths[::2], over[::2], strict=True)})

# %% [markdown]
# Memory of training, bytes a parameter (`memory-training`). **Erratum 83**: GRPO is said to save half of memory *and*
# operations. Memory yes, nearly; operations depend on how many answers are sampled.

# %%
table = {method: costs.training_memory(1.0, method, added=0.01) for method in costs.METHODS}
fig, ax = plt.subplots(figsize=(5.5, 2.8))
ax.bar(table.keys(), table.values(), color=[BLUE, VERMILION, GREEN, GREEN, ORANGE, ORANGE])
ax.set(ylabel="bytes a parameter", title="Weights, gradients, moments, frozen models")
plt.show()
print({method: round(value, 2) for method, value in table.items()})
print(f"GRPO beside PPO: {100 * (1 - table['grpo'] / table['ppo']):.0f} % less")

# %% [markdown]
# ### Exercise 3: what a token of cache costs
#
# Bytes of keys and values of one token in half precision, for all layers.


# %%
def my_cache_bytes(n_layers, H_kv, d_head):
    """Bytes a token."""
    ### BEGIN SOLUTION
    return 2 * n_layers * H_kv * d_head * 2
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: cache of the table's models
for name, (m, _) in LLAMA.items():
    mine = my_cache_bytes(m.n_layers, m.n_kv_heads, m.d_head)
    assert mine == costs.cache_bytes(m, 1, 1, itemsize=2), f"{name}: {mine} bytes is not right"
print("right")

# %% [markdown]
# ## What to remember
#
# - A model is a mask, a place for the norm, and a few sizes; one `Config` says all of it.
# - Counts are exact or they are wrong: 13,015,864,320, not 13 billion.
# - $6PN$ is a good estimate for short texts. At 100,000 tokens attention is most of the work.
