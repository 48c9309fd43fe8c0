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
# - predict what goes wrong when an encoder writes, or when a decoder labels,
# - count the parameters of a LLaMA to the last one, on paper,
# - estimate operations and memory of a training run, and say what the estimate leaves out.

# %%
import inspect
import os
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional import blocks
from minillm.functional.dropout import draw_kept, droppath
from minillm.functional.masked_language import corrupt, mlm_loss, replaced_token_loss
from minillm.functional.pooling import cls_pooling, mean_pooling
from minillm.fused.losses import cross_entropy
from minillm.models import Config, EncoderDecoder, Transformer, costs, counting
from minillm.models.families import FAMILIES, LLAMA, gpt_config, tiny
from minillm.models.heads import model_type_table
from minillm.nn.multi_head import MultiHeadAttention
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, use_style
from minillm.training.step import loss_and_gradients

use_style()
LONG = os.environ.get("LESSON_LONG") == "1"  # three seeds and longer trainings, some minutes


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
# Two ways to be gentle with a deep stack. `branch-scales` gives each branch a learnt weight that starts small: at 0 the block
# is the identity. `droppath` leaves a branch out for some samples of a batch and makes it larger for the others, so that its
# expectation stays. Its spread does not: what is kept is stretched.

# %%
samples = Tensor(np.broadcast_to(rng.normal(size=(1, 4)), (40_000, 4)).copy())
branch = samples * samples
print("weights of 0, the identity:", np.array_equal(
    blocks.parallel_block_gains(x, lambda u: u * u, lambda u: u.tanh(), g, Tensor(np.zeros(1)), Tensor(np.zeros(1))).data, x.data))
for rate in (0.0, 0.2, 0.5):
    dropped = droppath(samples, branch, draw_kept((len(samples.data),), rate, rng), rate).data
    spread = ((dropped - samples.data) / branch.data).std()
    print(f"rate {rate}: the mean is kept {np.allclose(dropped.mean(0), (samples + branch).data[0], atol=0.05)}, spread of the factor {spread:.1f}")

# %% [markdown]
# **Erratum 34.** A stack of $N$ blocks makes $\mathbf H^{k+1}=\mathrm{Enc}_k(\mathbf H^k)$ for $k=0,\dots,N-1$ (`encoder-stack`). The
# source lets $k$ run over $1,\dots,N$. By hand, with three blocks, in both ways:

# %%
deep = Transformer(Config(11, 16, 3, 4, context=8, architecture="encoder", positions="none", init_std=0.3), rng)
ids = np.arange(8)[None]
for title, numbers in (("k = 0, 1, 2", (0, 1, 2)), ("k = 1, 2, 3", (1, 2, 3))):
    H = deep.embedding(ids)
    for k in (k for k in numbers if k < 3):  # there is no fourth block
        H = deep.stack.blocks[k](H)
    print(f"{title}: the model's memory {np.allclose(deep.stack.final_norm(H).data, deep.hidden(ids).data, atol=1e-5)}")

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
# The last picture is why two stacks are worth having: a token of the answer sees the whole source, and the source sees itself.
# The source need not be text (`vision-text-cross`): queries from five words, keys and values from nine patches of another width.

# %%
look = MultiHeadAttention(16, 4, rng, d_memory=48)
words, patches = (Tensor(rng.normal(size=shape).astype(np.float32)) for shape in ((2, 5, 16), (2, 9, 48)))
print("words", words.shape, "patches", patches.shape, "->", look(words, memory=patches).shape)

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
# And the other way round? The task now: read eight symbols, and give them back in reverse order. An encoder and a decoder *label*:
# the answer to place $i$ is read off at place $i$, all at once. A decoder, a prefix decoder and an encoder-decoder *write*: they read the
# source and then produce the answer, symbol by symbol. Before you run it: who fails, where exactly, and who learns first?

# %%
SYMBOLS, PLACES, BEGIN = 6, 8, 6
ROUNDS = 400 if LONG else 100
WAYS = {  # architecture, layers, and whether the answer is written behind the source
    "encoder labels": ("encoder", 2, False),
    "decoder labels": ("decoder", 2, False),
    "decoder writes": ("decoder", 2, True),
    "prefix decoder writes": ("prefix", 2, True),
    "encoder-decoder writes": ("encoder-decoder", 1, True),
}


def answers(model, s, t, writes):
    """Logits of the answer t to the source s, (B, PLACES, V)."""
    kind, given = model.config.architecture, blocks.shift_right(t, BEGIN)
    if kind == "encoder-decoder":
        return model(s, given)
    if not writes:
        return model(s)
    both = np.concatenate([s, given], axis=1)
    return (model(both, prefix=PLACES) if kind == "prefix" else model(both))[:, PLACES:]


def learn(kind, layers, writes, seed=0):
    """Shares of right symbols by place, every ten steps, (rounds, PLACES), and the model's size."""
    config = Config(7, 32, layers, 4, d_ff=64, context=16, positions="learned", init_std=0.15, architecture=kind)
    made = EncoderDecoder if kind == "encoder-decoder" else Transformer
    model, draws, right = made(config, np.random.default_rng(seed)), np.random.default_rng(seed + 1), []
    optimiser, exam = AdamW(model.parameters(), lr=5e-3), np.random.default_rng(9).integers(SYMBOLS, size=(100, PLACES))
    for step in range(ROUNDS):
        s = draws.integers(SYMBOLS, size=(32, PLACES))
        loss = cross_entropy(answers(model, s, s[:, ::-1], writes), s[:, ::-1])
        optimiser.step([[d.data for d in grad([loss], model.parameters())]], 1.0)
        if step % 10 == 9:
            guess = answers(model, exam, exam[:, ::-1], writes).data.argmax(-1)
            right.append((guess == exam[:, ::-1]).mean(0))
    return np.array(right), model.count_parameters()


runs = {name: [learn(*way, seed) for seed in range(3 if LONG else 1)] for name, way in WAYS.items()}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1.2, 1])
for (name, seeds), colour in zip(runs.items(), (BLUE, VERMILION, GREEN, PURPLE, ORANGE), strict=True):
    by_place = np.mean([r for r, _ in seeds], axis=0)
    left.plot(10 * np.arange(1, len(by_place) + 1), 100 * by_place.mean(1), color=colour, label=name)
    if "labels" in name:
        right.plot(range(1, PLACES + 1), 100 * by_place[-1], "o-", color=colour, label=name)
left.set(xlabel="step", ylabel="symbols right, %", ylim=(0, 105), title="One task, five models")
left.legend(loc="lower right", fontsize=9)
right.axhline(100 / SYMBOLS, color="0.5", lw=1, ls="--", label="guessing")
right.set(xlabel="place", ylim=(0, 105), title="What a decoder cannot see, it cannot label")
right.legend(fontsize=9)
plt.show()
for name, seeds in runs.items():
    last = np.mean([r[-1] for r, _ in seeds], axis=0)
    verdict = ["right" if share > 0.9 else "guessed" if share < 0.35 else "half known" for share in last]
    print(f"{name:24}{seeds[0][1]:>7,} parameters   first half {verdict[0]:8} last half {verdict[-1]}")

# %% [markdown]
# The decoder that labels is right from the middle on, and no training will ever help it with the first half: there, the answer stands
# to its right. Let it *write*, and the same weights and the same mask suffice, for by then it has read everything. That is how decoders
# came to do the encoders' work, at the price of reading the source and writing the answer in one long text. The prefix mask and the second stack
# buy the source a look ahead of itself, which this task does not need.
#
# ### What encoders learn from
#
# An encoder cannot predict the next token, so some tokens are hidden (`mlm-loss`) or replaced (`replaced-token-detection`). Of 15 %
# chosen tokens, 80 % become a mask, 10 % another token, 10 % stay: the model is never told which of the visible ones to trust.

# %%
show(mlm_loss)
text = rng.integers(0, 99, size=(500, 128))
hidden = corrupt(text, mask_id=99, V=100, rng=rng)
asked = hidden.chosen
shares = [asked.mean(), (hidden.ids[asked] == 99).mean(), (hidden.ids[asked] == text[asked]).mean()]
print("chosen {:.2f}, of these masked {:.1f}, left as they were {:.1f}".format(*shares))

zeros = Tensor(np.zeros((500, 128, 100)))
loss = mlm_loss(zeros, text, asked)
print(f"knowing nothing costs log 100 = {loss.item():.3f} a masked token, ", end="")
print(f"and log 2 = {replaced_token_loss(Tensor(np.zeros((500, 128))), hidden.ids != text).item():.3f} for every 'replaced?'")

# %% [markdown]
# What comes out is a vector for every token. A task reads the first one (`cls-pooling`), their mean, each of them, or the start and the
# end of a span (`encoder-heads`). Whoever pools has to leave out the padding:

# %%
H = rng.normal(size=(1, 3, 4))
padded, real = np.concatenate([H, 9 * np.ones((1, 2, 4))], axis=1), np.array([[True, True, True, False, False]])
alone = mean_pooling(Tensor(H)).data
print("first token, padded or not:", np.array_equal(cls_pooling(Tensor(H)).data, cls_pooling(Tensor(padded)).data))
for title, mask in (("with a mask", real), ("without", None)):
    print(f"mean {title}:", np.allclose(mean_pooling(Tensor(padded), mask).data, alone))

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
    "queries, keys, values": 3 * c.d_model * c.n_heads * c.d_head,
    "attention, a layer": counting.count_attention(c.d_model, c.n_heads),
    "FFN, a layer": counting.count_ffn(c.d_model, c.d_ff, gated=True),
    "a norm": counting.count_norm(c.d_model),
    "head": counting.count_lm_head(c.d_model, c.vocab_size),
    "all": counting.count_model(c).total,
}
for name, n in parts.items():
    print(f"{name:22} {n:>15,}")
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
# A formula is believed when it equals what a living model holds. All families, small, and then whatever a die makes of the choices:

# %%
for family in FAMILIES:
    config = tiny(family, 50)
    kind = EncoderDecoder if config.architecture == "encoder-decoder" else Transformer
    live = kind(config, np.random.default_rng(0)).count_parameters()
    print(f"{family:8} formula {counting.count_model(config).total:7,}  live {live:7,}")

dice, differing = np.random.default_rng(5), 0
for _ in range(40):
    choices = {
        name: options[dice.integers(len(options))]
        for name, options in {
            "architecture": ("decoder", "encoder", "prefix", "encoder-decoder"),
            "positions": ("none", "sinusoidal", "learned", "rope", "alibi", "t5"),
            "ffn": ("relu", "gelu", "swiglu", "geglu", "experts"),
            "norm": ("rmsnorm", "layernorm"),
            "norm_place": ("pre", "post"),
            "n_kv_heads": (1, 2, 4),
            "tied": (True, False),
            "bias": (True, False),
            "qk_norm": (True, False),
            "branches": ("plain", "learnt"),
        }.items()
    }
    config = Config(int(dice.integers(5, 60)), 16, int(dice.integers(1, 4)), 4, context=12, **choices)
    kind = EncoderDecoder if config.architecture == "encoder-decoder" else Transformer
    differing += kind(config, dice).count_parameters() != counting.count_model(config).total
print(f"40 random configurations, of which {differing} are miscounted")

# %% [markdown]
# So large ones may be counted without being made. With experts, what a token *uses* is much less than what is held (`count-moe`); and
# fine-tuning by adapters or low-rank updates adds next to nothing (`count-peft`).

# %%
print(f"GPT-2 {counting.count_model(gpt_config()).total:,}")
print(f"latent attention of DeepSeek-V3 {counting.count_mla(7168, 128, 128, 512, 64, 1536):,} a layer")
mixtral = Config(32_000, 4096, 32, 32, 8, 14336, ffn="experts", n_experts=8, experts_per_token=2)
print(f"Mixtral 8x7B holds {counting.count_model(mixtral).total:,}, a token uses {counting.count_active(mixtral):,}")
seven = LLAMA["LLaMA 7B"].config
low_rank = counting.count_peft(lora=((4096, 4096),) * 2 * seven.n_layers, r=8)
print(f"LoRA of rank 8 on queries and values of 7B: {low_rank:,}, {100 * low_rank / counting.count_model(seven).total:.2f} %")

# %% [markdown]
# **Erratum 17.** The feed-forward networks are said to hold 50 to 60 % of the parameters. The table says otherwise. And
# only the largest stay near the 20 tokens a parameter at which a budget is spent best (`compute-optimal`). The small ones
# have seen far more: they are made to be run, not only to be trained.

# %%
names = list(LLAMA)
counted = [counting.count_model(LLAMA[n].config) for n in names]
shares = [100 * costs.ffn_share(LLAMA[n].config) for n in names]
ratios = [costs.tokens_per_parameter(p.total, LLAMA[n].tokens) for n, p in zip(names, counted, strict=True)]
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, width_ratios=[1.5, 1])
start = np.zeros(len(names))
for part, colour, numbers in (
    ("FFN", BLUE, [p.ffn for p in counted]),
    ("attention", SKY, [p.attention for p in counted]),
    ("embedding and head", ORANGE, [p.embedding + p.head for p in counted]),
):
    width = 100 * np.array(numbers) / [p.total for p in counted]
    left.barh(names, width, left=start, color=colour, label=part)
    start += width
left.axvspan(50, 60, facecolor="none", edgecolor="white", hatch="///", lw=0)
left.text(55, len(names) - 0.35, "FFN, as claimed", ha="center", va="top", fontsize=9)
left.set(xlabel="% of parameters", xlim=(0, 100), ylim=(len(names) + 0.1, -0.6), title="Where the parameters are")
left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=3)
left.grid(False)
right.barh(names, ratios, color=GREEN)
right.axvline(20, color=VERMILION, lw=1.5)
for row, ratio in enumerate(ratios):
    right.text(1.08 * ratio, row, f"{ratio:.0f}", va="center", fontsize=9)
right.set(xscale="log", xlabel="tokens per parameter (line: 20)", xlim=(10, 6000), title="How long they were trained")
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

# %% [markdown]
# With formulas that hold, the large models can be asked: what does a token's forward pass go into, as the text grows? And what lies in
# memory while it is generated? Guess first: from which length on do the keys and values of *one* text need more room than all weights?

# %%
lengths = 2 ** np.arange(9, 19)
m = LLAMA["LLaMA 7B"].config
P = counting.count_model(m)
work = {
    "FFN": np.full(len(lengths), 2.0 * P.ffn),
    "maps of attention": np.full(len(lengths), 2.0 * P.attention),
    "head": np.full(len(lengths), 2.0 * P.head),
    "scores and mixing": 4 * (lengths + 1) / 2 * m.d_model * m.n_layers,
}
total = sum(work.values())
print("the parts add up:", all(np.isclose(t, costs.forward_flops(m, 1, int(L)) / L) for t, L in zip(total, lengths, strict=True)))

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.stackplot(lengths, [100 * w / total for w in work.values()], labels=work, colors=[BLUE, SKY, ORANGE, VERMILION])
left.set(xscale="log", xlim=(lengths[0], lengths[-1]), ylim=(0, 100), xlabel="length of the text", ylabel="% of operations")
left.set_title("LLaMA 7B: operations a token")
left.legend(loc="lower left", frameon=True)
for name, colour in (("LLaMA 7B", VERMILION), ("LLaMA-2 70B", PURPLE), ("LLaMA-3 8B", GREEN)):
    model = LLAMA[name].config
    cache = np.array([costs.cache_bytes(model, 1, int(L), itemsize=2) for L in lengths]) / 1e9
    weights = 2e-9 * counting.count_model(model).total
    right.plot(lengths, cache, color=colour, label=name)
    right.axhline(weights, color=colour, lw=1, ls="--")
    print(f"{name:12} weights {weights:5.0f} GB, as much cache after {weights / cache[0] * lengths[0]:9,.0f} tokens")
right.set(xscale="log", yscale="log", xlabel="length of the text", ylabel="gigabytes", title="Cache of one text (dashed: weights)")
right.legend()
plt.show()

over = [costs.training_flops(m, 1, int(L)) / L / costs.flops_6nd(P.total, 1) for L in lengths]
print("operations / 6PN:", {int(L): round(float(r), 2) for L, r in zip(lengths[::2], over[::2], strict=True)})

# %% [markdown]
# `flops-6nd`, $6PN_{\rm tok}$, forgets the scores and counts the embedding, which does no products. Both are small at the lengths that
# these models were trained on, so the rule of thumb holds there, and not at 100,000 tokens. Eight query heads to one key head (70B, and
# 8B with four) push the length at which the cache outgrows the weights far out.
#
# Memory of training, bytes a parameter (`memory-training`):

# %%
table = {method: costs.training_memory(1.0, method, added=0.01) for method in costs.METHODS}
trained = {"sft": 1, "ppo": 2, "grpo": 1, "grpo-rule": 1, "lora": 0.01, "qlora": 0.01}
names = ["SFT", "PPO", "GRPO", "GRPO,\nrules as reward", "LoRA\n(1 % added)", "QLoRA\n(1 % added)"]
fig, ax = plt.subplots(figsize=(8, 3.4))
base = np.zeros(len(names))
for part, size, colour in (("weights", 2, BLUE), ("gradients", 2, SKY), ("master copy", 4, GREEN), ("Adam's moments", 8, ORANGE)):
    height = size * np.array(list(trained.values()))
    ax.bar(names, height, bottom=base, color=colour, label=part)
    base += height
ax.bar(names, np.array(list(table.values())) - base, bottom=base, color="0.6", label="frozen models")
for place, value in enumerate(table.values()):
    ax.text(place, value + 0.5, f"{value:.3g}", ha="center", fontsize=9)
ax.set(ylabel="bytes a parameter", title="What training holds, before activations", ylim=(0, 40))
ax.legend()
ax.grid(axis="x", visible=False)
plt.show()
print({method: round(value, 2) for method, value in table.items()})

# %% [markdown]
# **Erratum 83.** GRPO is said to save half of memory *and* of compute. Memory: nearly, or half where rules give the reward. Operations, in
# $P$ a token of answer: reading or sampling 2, training 6. Without a critic, 8 of 20 are saved on an answer; but a prompt gets $G$
# answers, and GRPO needs at least two of them, for it compares them.

# %%
print(f"memory: {100 * (1 - table['grpo'] / table['ppo']):.0f} % less, {100 * (1 - table['grpo-rule'] / table['ppo']):.0f} % with rules")
grpo_answer = 2 + 6 + 2 + 2  # sample, train, reference, reward model
ppo_answer = grpo_answer + 2 + 6  # the critic reads, and is trained
for G in (1, 2, 8):
    print(f"G = {G}: operations a prompt, GRPO / PPO = {G * grpo_answer / ppo_answer:.1f}")

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
# - An encoder that writes sees the answer; a decoder that labels does not see the question. Writing behind the source cures the second.
# - $6PN$ is a good estimate for short texts. At 100,000 tokens attention is most of the work, and the cache of one text may outweigh
#   the model.
#
# Next: lesson 12, numbers with few bits, makes every one of these bytes smaller.
