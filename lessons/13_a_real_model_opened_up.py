# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 13 · A real model opened up
#
# SmolLM2-135M-Instruct has 30 layers, 9 query heads to 3 key/value heads, rotary positions, RMSNorm, SwiGLU and a head that
# is its embedding: nothing that the lessons before this one have not built. Its weights are open, so we run it in our own
# engine and look at what it does: which tokens it attends to, when it knows what it is going to say, and what sampling
# makes of its distribution.
#
# Equations: `llama-config`, `next-token-distribution`, `perplexity`, `attention-weights`, `gqa`, `pos-rope`, `pre-ln`,
# `final-ln`, `weight-tying`, `lm-head`, `kv-cache`, `tokenizer-bpe`, `greedy`, `sample-temperature`, `sample-top-p`,
# `sample-behaviour-logprob`, `entropy`, `gradient-check`.
#
# After it you can
# - read a model file and say what every number in it is for,
# - look into a forward pass: attention maps, the logit lens, heads that copy,
# - test by removing it whether a part does what its picture suggests,
# - say what temperature and nucleus do to a real distribution.
#
# needs: smollm2. The weights (93 MB) come with `make smollm2`; without them the outputs stored below still show everything.

# %%
import inspect
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from minillm.autograd import Tensor, grad, no_grad
from minillm.data import python_docs_text
from minillm.data.gguf import read_gguf
from minillm.data.templates import Message, chatml_text
from minillm.decoding import generate
from minillm.decoding.samplers import truncate
from minillm.functional.activations import swiglu
from minillm.functional.norms import rms_norm
from minillm.functional.positions import rope, rotation_angles
from minillm.functional.softmax import log_softmax, softmax
from minillm.models import one_token
from minillm.models.pretrained import load_pretrained, smollm2_path
from minillm.plotting import BLUE, GREEN, ORANGE, VERMILION, use_style

use_style()
threadpool_limits(1, user_api="blas")  # products on two threads have hung in a notebook on a busy machine
pretrained = load_pretrained("smollm2", context=512)
model, tokenizer, config = pretrained.model, pretrained.tokenizer, pretrained.model.config

# %% [markdown]
# ## 1. What is in the file
#
# A GGUF file is a list of named values and a list of named matrices. Most matrices here are stored with 4 bits a number:
# blocks of 32 share a scale and a smallest value (lesson 12), so a number takes 5 bits in all.

# %%
file = read_gguf(smollm2_path())
kinds = Counter(tensor.kind.name for tensor in file.tensors.values())
numbers = sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
stored = sum(tensor.blocks.nbytes for tensor in file.tensors.values())
print("tensors:", dict(sorted(kinds.items())))
print(f"{numbers:,} numbers in {stored:,} bytes: {8 * stored / numbers:.2f} bits each; {4 * numbers:,} bytes in float32")

d, f, V = config.d_model, config.d_ff, config.vocab_size
kv = config.n_kv_heads * config.d_head
by_formula = V * d + d + config.n_layers * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d)
print(f"counted from the sizes: {by_formula:,}; our model holds {model.count_parameters():,}")
print(f"share of the embedding, which is also the head (`weight-tying`): {V * d / numbers:.0%}")
assert by_formula == numbers == model.count_parameters()

# %% [markdown]
# The tokenizer is byte-level BPE (`tokenizer-bpe`). Numbers are cut into digits, and a space belongs to the word behind it.
# A conversation is text with two special tokens:

# %%
print([tokenizer.decode([i]) for i in tokenizer.encode("Tokenizers cut unbelievable words, and 2026 into digits.")])
print(chatml_text([Message("user", "What is the capital of France?")], system="Be brief."))

# %% [markdown]
# ## 2. The forward pass, open
#
# This is the code that generates, one token at a time:

# %%
print(inspect.getsource(one_token.one_token).split('"""')[2])

# %% [markdown]
# To look inside we write the same equations once more for a whole text, from the functions of the lessons before, and keep
# everything on the way: the stream $\mathbf x^{(\ell)}$ after every layer, and the attention weights
# $\mathbf A=\mathrm{softmax}(\mathbf Q\mathbf K^\top/\sqrt{d_{\rm head}})$ of all 270 heads. `without` removes heads, by
# setting what they write to zero; we shall need that later.

# %%
def head_of(x):
    """Logits that the stream would give if it were the last layer's: final norm, then the embedding as head."""
    return rms_norm(x, model.final_norm.gain.data, eps=config.norm_eps) @ model.output_weight.data.T


def open_up(x, without=()):
    """From embeddings (L, d_model) to logits (L, V), with the streams and the attention maps on the way."""
    H, H_kv, d_head, L = config.n_heads, config.n_kv_heads, config.d_head, x.shape[0]
    angles = rotation_angles(np.arange(L), d_head, config.rope_base)
    future = np.triu(np.ones((L, L), bool), 1)
    streams, maps = [x], []
    for layer, block in enumerate(model.blocks):
        y = rms_norm(x, block.attention_norm.gain.data, eps=config.norm_eps)
        heads = (y @ block.attention.w_qkv.data.T).reshape(L, H + 2 * H_kv, d_head).transpose(0, 1)  # (heads, L, d_head)
        q, k, v = heads[:H], heads[H : H + H_kv], heads[H + H_kv :]
        q, k = rope(q, angles, config.rope_pairing), rope(k, angles, config.rope_pairing)
        group = np.arange(H) // (H // H_kv)  # which key/value head a query head reads
        scores = q @ k[group].transpose(1, 2) * (1 / d_head**0.5)  # (H, L, L)
        a = softmax(scores.masked_fill(future, -np.inf))
        kept = np.array([[[(layer, h) not in without]] for h in range(H)], np.float32)
        context = (a @ v[group] * kept).transpose(0, 1).reshape(L, H * d_head)
        x = x + context @ block.attention.w_out.data.T
        y = rms_norm(x, block.ffn_norm.gain.data, eps=config.norm_eps)
        x = x + swiglu(y @ block.ffn.w_value_gate.data.T) @ block.ffn.w_down.data.T
        streams.append(x)
        maps.append(a)
    return head_of(x), streams, maps


def look(ids, without=()):
    """`open_up` on token ids, without gradients, as arrays: logits (L, V), streams (31, L, d), maps (30, 9, L, L)."""
    with no_grad():
        logits, streams, maps = open_up(Tensor(model.embedding.weight.data[ids]), without)
    return logits.data, np.stack([s.data for s in streams]), np.stack([m.data for m in maps])


text = "The capital of France is"
ids = tokenizer.encode(text)
logits, streams, maps = look(ids)
with no_grad():
    fast = model(ids[None]).data[0]
print("largest difference to the model's own pass is below 1e-3:", np.abs(logits - fast).max() < 1e-3)
p = np.exp(log_softmax(Tensor(logits[-1])).data)
print("next:", [(tokenizer.decode([i]), f"{p[i]:.2f}") for i in np.argsort(-p)[:5]])

# %% [markdown]
# ### Gradient check
#
# The engine differentiates this pass too. Which words does the answer hang on? The gradient of
# $\log p(\text{" Paris"})$ with respect to the embeddings says, and a central difference along a random direction checks it
# (in float32, so to a percent).

# %%
answer = int(tokenizer.encode(" Paris")[0])
x0 = Tensor(model.embedding.weight.data[ids], requires_grad=True)
objective = log_softmax(open_up(x0)[0])[-1, answer]
(gradient,) = grad(objective, [x0])

direction = np.random.default_rng(0).normal(size=x0.shape).astype(np.float32)
step = 0.002 / np.abs(direction).max()


def log_p(shift):
    """log p of the answer with shifted embeddings."""
    with no_grad():
        return float(log_softmax(open_up(Tensor(x0.data + np.float32(shift) * direction))[0]).data[-1, answer])


slope = (log_p(step) - log_p(-step)) / (2 * step)
predicted = float((gradient.data * direction).sum())
print("central difference and gradient agree within 2 %:", abs(slope - predicted) < 0.02 * abs(predicted))
strength = np.linalg.norm(gradient.data * x0.data, axis=1)
ranked = [tokenizer.decode([i]) for i in ids[np.argsort(-strength)]]
print("the three words with the most influence:", ranked[:3])

# %% [markdown]
# ## 3. Reading a text: perplexity
#
# Logits at position $t$ score the token at $t+1$ (`next-token-distribution`). The sources once wrote the loss with both at
# $t$ (erratum 8); on a real model the mistake shows at once.

# %%
page = tokenizer.encode(python_docs_text()[20_000:23_000])[:256]
page_logits, _, page_maps = look(page)
log_probs = log_softmax(Tensor(page_logits)).data
shifted = -log_probs[np.arange(255), page[1:]].mean()
same_place = -log_probs[np.arange(255), page[:-1]].mean()
print(f"perplexity with targets one place on: {np.exp(shifted):.1f}")
print(f"with targets in the same place (erratum 8): {np.exp(same_place):.0e}")
print(f"a uniform guess: {V}")

# %% [markdown]
# ### Exercise 1: perplexity
#
# Write `my_perplexity(logits, ids)` for logits (L, V) and ids (L,) of the same text: the exponential of the mean negative
# log-likelihood of every token that has a predecessor.

# %%
def my_perplexity(logits, ids):
    """Perplexity of a text under its logits."""
    ### BEGIN SOLUTION
    z = logits[:-1].astype(np.float64)
    log_z = np.logaddexp.reduce(z, axis=-1)
    return float(np.exp((log_z - z[np.arange(len(ids) - 1), ids[1:]]).mean()))
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: perplexity
np.testing.assert_allclose(my_perplexity(np.zeros((5, 7)), np.arange(5)), 7, err_msg="uniform over 7: perplexity 7")
np.testing.assert_allclose(my_perplexity(page_logits, page), np.exp(shifted), rtol=1e-4, err_msg="on the page above")
print("right")

# %% [markdown]
# ## 4. The logit lens: when does it know?
#
# Every block adds to the stream, so the stream of any layer can be read as if it were the last: through the final norm and
# the head. Where does the answer surface? It could be anywhere, or nowhere before the end.

# %%
prompts = {
    "The capital of France is": " Paris",
    "The opposite of hot is": " cold",
    "Monday, Tuesday, Wednesday, Thursday,": " Friday",
    "Romeo and": " Juliet",
    "red blue green red blue green red blue": " green",
    "def add(a, b):\n    return a +": " b",
}
ranks = {}
for prompt, wanted in prompts.items():
    target = int(tokenizer.encode(wanted)[0])
    _, inside, _ = look(tokenizer.encode(prompt))
    with no_grad():
        lens = head_of(Tensor(inside[:, -1])).data  # (31, V)
    ranks[prompt] = (lens > lens[:, target : target + 1]).sum(1)
    first = int(np.flatnonzero(ranks[prompt] == 0)[0]) if (ranks[prompt] == 0).any() else None
    print(f"{prompt.splitlines()[-1]!r:42} -> {wanted!r:9} first on top after layer {first}, among the best ten at the end: {ranks[prompt][-1] < 10}")

figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.15, 1])
for (prompt, wanted), colour in zip(prompts.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"]):
    axes[0].plot(ranks[prompt] + 1, color=colour, label=f"…{prompt.splitlines()[-1][-14:]}{wanted}")
axes[0].set(yscale="log", xlabel="after layer", ylabel="rank of the answer (1: on top)", title="The answer rises late")
axes[0].invert_yaxis()
axes[0].legend(fontsize=8, loc="upper left")

_, inside, _ = look(ids)
with no_grad():
    lens = head_of(Tensor(inside[[0, 4, 8, 12, 16, 20, 22, 24, 26, 28, 30], 1:].reshape(-1, d))).data.reshape(11, len(ids) - 1, V)
    best, sure = lens.argmax(-1), softmax(Tensor(lens)).data.max(-1)
picture = axes[1].imshow(sure, aspect="auto", vmin=0, vmax=1, cmap="cividis")
for row in range(11):
    for column in range(len(ids) - 1):
        word = tokenizer.decode([best[row, column]]).strip().replace("\n", "⏎")
        word = word if word.isascii() else "·"
        axes[1].text(column, row, word[:9], ha="center", va="center", fontsize=8, color="white" if sure[row, column] < 0.6 else "black")
axes[1].set_xticks(range(len(ids) - 1), [repr(tokenizer.decode([i]))[1:-1] for i in ids[1:]])
axes[1].set_yticks(range(11), [0, 4, 8, 12, 16, 20, 22, 24, 26, 28, 30])
axes[1].set(ylabel="after layer", title="Best next token, layer by layer")
axes[1].grid(False)
figure.colorbar(picture, ax=axes[1], label="its probability")
plt.show()

# %% [markdown]
# ### Exercise 2: the lens
#
# Write `my_lens(stream)`: from the stream (n, d_model) of any layer to log-probabilities (n, V). Use `model.final_norm.gain`,
# `config.norm_eps` and `model.output_weight`.

# %%
def my_lens(stream):
    """Log-probabilities that a stream would give if the model ended there."""
    ### BEGIN SOLUTION
    gain = model.final_norm.gain.data
    normal = gain * stream / np.sqrt((stream**2).mean(-1, keepdims=True) + config.norm_eps)
    z = normal @ model.output_weight.data.T
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: the lens
found = my_lens(streams[-1])
np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-3, err_msg="a distribution sums to 1")
np.testing.assert_allclose(found, log_softmax(Tensor(logits)).data, atol=2e-3, err_msg="after the last layer it is the model")
print("right")

# %% [markdown]
# ## 5. Attention maps, and heads that copy
#
# Two patterns that one finds in most language models. Many heads put most of their weight on the very first token, whatever
# it is: a place to look at when there is nothing to look for. And some heads, on a text that repeats itself, look from a
# token to what came *after its last occurrence*: they are ready to copy. To find them, read 40 random tokens twice, and
# measure how much weight each head puts there.

# %%
rng = np.random.default_rng(0)
period = 40
once = rng.integers(1000, 20_000, size=period)
twice = np.concatenate([[0], once, once])
rep_logits, _, rep_maps = look(twice)
second = np.arange(period + 1, 2 * period)  # places in the repetition that have a successor
copying = rep_maps[:, :, second, second - period + 1].mean(-1)  # (30, 9)
sink = page_maps[:, :, 32:, 0].mean(-1)  # (30, 9)
top = [tuple(map(int, np.unravel_index(i, copying.shape))) for i in np.argsort(-copying, axis=None)[:8]]
print(f"mean weight on the first token, over all heads: {sink.mean():.2f}; heads that give it more than half: {(sink > 0.5).sum()} of 270")
print("copying heads (layer, head): weight", {head: round(float(copying[head]), 2) for head in top[:4]})
print(f"median of the other heads: {np.median(copying):.3f}")

figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), width_ratios=[1, 1, 1.1, 1.1])
for axis, scores, title in ((axes[0], sink, "weight on the first token"), (axes[1], copying, "weight on what followed")):
    picture = axis.imshow(scores, aspect="auto", vmin=0, vmax=1)
    axis.set(xlabel="head", ylabel="layer", title=title, xticks=range(0, config.n_heads, 2))
    axis.grid(False)
    figure.colorbar(picture, ax=axis, label="attention weight")
for axis, head in zip(axes[2:], top[:2]):
    axis.imshow(np.sqrt(rep_maps[head]), cmap="cividis")
    axis.set(xlabel="key", ylabel="query", title=f"layer {head[0]}, head {head[1]} (roots)")
    axis.grid(False)
plt.show()

# %% [markdown]
# Three of the best four sit in one layer and read the same key/value head (`gqa`: heads 3, 4 and 5 share head 1), so they
# look for the same thing.
#
# A picture of attention says where a head looks, not that it matters. So remove the eight best copying heads (3 % of all) and
# read the repetition again; as a control remove eight heads drawn at random, five times. If copying were spread over the
# model, or done in another way, the loss would hardly move.

# %%
def repeat_loss(without):
    """Mean loss in nats on the second occurrence."""
    z = log_softmax(Tensor(look(twice, without)[0])).data
    return -z[second, twice[second + 1]].mean()


others = [(layer, h) for layer in range(config.n_layers) for h in range(config.n_heads) if (layer, h) not in top]
whole, without_top = repeat_loss(()), repeat_loss(top)
random_losses = [repeat_loss([others[i] for i in rng.choice(len(others), 8, replace=False)]) for _ in range(5)]
first_time = -log_softmax(Tensor(rep_logits)).data[np.arange(1, period), twice[2 : period + 1]].mean()
print(f"loss on the first reading {first_time:.1f}, on the second {whole:.2f} nats")
print(f"without the eight copying heads {without_top:.1f}; without eight others {min(random_losses):.2f} to {max(random_losses):.2f}")

figure, axis = plt.subplots(figsize=(6.5, 2.6))
names = ["first reading", "without 8 copying heads", "without 8 other heads", "second reading, whole model"]
axis.barh(names, [first_time, without_top, np.mean(random_losses), whole], color=[ORANGE, VERMILION, BLUE, GREEN])
axis.plot(random_losses, [2] * 5, "k|", markersize=14)
axis.set(xlabel="loss in nats a token", title="Repeated random tokens: eight heads do most of the copying")
plt.show()

# %% [markdown]
# ### Exercise 3: the copying score
#
# Write `my_copying(a, period)` for one attention map (L, L) of a text of one token and then a sequence of `period` tokens
# twice, so that $L=2\,\mathrm{period}+1$: the mean weight that queries $t=\mathrm{period}+1,\dots,2\,\mathrm{period}-1$ put
# on the key $t-\mathrm{period}+1$.

# %%
def my_copying(a, period):
    """Mean weight on the token after the earlier occurrence."""
    ### BEGIN SOLUTION
    return float(np.mean([a[t, t - period + 1] for t in range(period + 1, 2 * period)]))
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the copying score
small = np.zeros((9, 9))
small[5, 2] = small[6, 3] = 1.0
np.testing.assert_allclose(my_copying(small, 4), 2 / 3, err_msg="two of the three queries look there")
np.testing.assert_allclose(my_copying(rep_maps[top[0]], period), copying[top[0]], rtol=1e-5, err_msg="on the map above")
print("right")

# %% [markdown]
# ## 6. Sampling
#
# `greedy` takes the most likely token; temperature flattens or sharpens the law (`sample-temperature`), the nucleus cuts its
# tail (`sample-top-p`). On a real vocabulary the tail matters: 49 thousand tokens of which almost all are wrong.

# %%
story = tokenizer.encode("Once upon a time, in a small village by the sea,")
for temperature, top_p in ((0.0, None), (0.7, 0.9), (1.6, None)):
    made = generate(model, story[None], 32, np.random.default_rng(1), temperature=temperature, top_p=top_p)
    print(f"T = {temperature}, top-p {top_p}: {tokenizer.decode(made.tokens[0])!r}\n")

z = look(story)[0][-1:]
temperatures = np.linspace(0.2, 2.0, 19)
laws = [softmax(Tensor(truncate(z, float(t)))).data[0].astype(np.float64) for t in temperatures]
entropies = [-(law[law > 0] * np.log(law[law > 0])).sum() for law in laws]
beyond = [np.sort(law)[:-50].sum() for law in laws]
nucleus = [int((np.sort(law)[::-1].cumsum() < 0.9).sum()) + 1 for law in laws]
for t in (0.4, 1.0, 1.6):
    i = int(np.abs(temperatures - t).argmin())
    print(f"T = {t}: entropy {entropies[i]:.2f} nats, {beyond[i]:.0%} beyond the best 50, nucleus of 90 %: {nucleus[i]} tokens")

figure, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot(temperatures, entropies, color=BLUE)
axes[0].set(xlabel="temperature", ylabel="entropy in nats", title="Entropy of the next token")
axes[1].plot(temperatures, np.array(beyond), color=VERMILION)
axes[1].set(xlabel="temperature", ylabel="share of the law", title="What lies beyond the best 50 tokens", ylim=(0, 1))
plt.show()

# %% [markdown]
# The log-probability that an importance ratio needs is that of the law which was sampled, temperature and truncation
# included (`sample-behaviour-logprob`, erratum 45). How far off is the model's own log-probability?

# %%
made = generate(model, story[None], 32, np.random.default_rng(1), temperature=0.7, top_p=0.9)
full = np.concatenate([story, made.tokens[0]])
own = log_softmax(Tensor(look(full)[0])).data[len(story) - 1 : -1]
own = own[np.arange(32), made.tokens[0]].sum()
print(f"32 tokens at T = 0.7, top-p 0.9: log-probability of the sampled law {made.logprobs.sum():.1f}, of the model {own:.1f}")
print(f"taking one for the other makes a ratio of exp({made.logprobs.sum() - own:.1f}) out of 1")

# %% [markdown]
# ## What to take away
#
# - A language model of 135 million numbers is the decoder of lesson 11, read from a file; its quirks are in the tokenizer and
#   the order of rows, not in the equations.
# - The stream can be read at any depth. Here answers come on top in the last four layers, if at all.
# - A picture is a hypothesis; removing the part is the test.
# - Sampling is a choice of law, and whoever uses its samples later needs that law's probabilities.
#
# A longer version: `minillm chat` talks to the model, and `minillm bench --case smollm2` compares the time of a token with
# transformers on the same weights and with the memory floor.
