# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 09 · The attention family and the KV cache
#
# A model writes one token at a time, and every token looks back at all the others. What has to be remembered of them decides
# how long a text may be and how many people one machine can serve. This lesson is about that memory: what is in it, five
# ways to make it smaller, and what one does with the logits that come out.
#
# Equations: `kv-cache`, `kv-cache-size`, `kv-cache-prefix`, `kv-cache-window`, `kv-cache-quantised`, `kv-cache-mla`,
# `mha`, `mqa`, `gqa`, `mla-deepseek`, `mla-decoupled-rope`, `mla-absorb`, `mla-cache-size`, `greedy`,
# `sample-temperature`, `sample-top-k`, `sample-top-p`, `sample-combine`, `sample-penalties`, `sample-behaviour-logprob`,
# `beam-search`, `speculative-decoding`, `stop-conditions`, `best-of-n`, `self-consistency`, `cot-template`.
# Worked numbers: `wn-mqa-cache`, `wn-kv-bytes`, `wn-topp-range`.
#
# After it you can
# - compute the cache of a model from its configuration, and say which of the family has which,
# - derive why DeepSeek's attention may be decoded without unpacking its cache, and why the rotary part stands apart,
# - name the law that a sampler draws from, and make decoding faster without changing that law.

# %%
import inspect
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, gradcheck, no_grad
from minillm.decoding import Law, ModelDrafter, beam_search, generate, speculative_generate
from minillm.decoding.choosing import cot_prompt, expected_best, parse_cot, self_consistency
from minillm.decoding.samplers import keep_min_p, keep_top_k, keep_top_p, probabilities
from minillm.decoding.speculative import acceptance_rate, residual_law
from minillm.functional import latent_attention as latent
from minillm.functional.attention import scaled_dot_product_attention
from minillm.functional.masks import causal_mask
from minillm.functional.positions import rotation_angles
from minillm.models import Config, Decoder
from minillm.nn import KVCache
from minillm.nn.latent_attention import LatentAttention
from minillm.nn.quantised_cache import QuantisedCache
from minillm.nn.window_cache import WindowCache
from minillm.plotting import BLUE, GREEN, ORANGE, SKY, VERMILION, use_style

use_style()
LONG = False  # more texts in the last experiment

# %% [markdown]
# ## 1. What is computed twice
#
# Position $t$ needs the keys and values of all positions before it (`kv-cache`). They depend on the tokens before them and
# on nothing after, so once computed they stay right. Without a cache the text of length $T$ is read $1+2+\dots+T$ times over;
# with one, every position is read once.

# %%
config = Config(17, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, context=64)
model = Decoder(config, np.random.default_rng(0))
for parameter in model.parameters():  # large weights, so that the laws are far from uniform
    parameter.data *= 4.0 if parameter.ndim > 1 else 1.0
ids = np.random.default_rng(1).integers(0, 17, size=(2, 24))
with no_grad():
    whole = model(ids).data
    cache = model.new_cache(2)
    pieces = [model(ids[:, :10], cache).data] + [model(ids[:, t : t + 1], cache).data for t in range(10, 24)]
print("cached logits equal those of one pass:", np.allclose(np.concatenate(pieces, 1), whole, atol=1e-4))
T = 24
print(f"positions computed for {T} tokens: {T * (T + 1) // 2} without a cache, {T} with one")

# %% [markdown]
# A prefix that many texts share (a system prompt) lies in the same cache and is read once for all of them; an encoder's
# output is projected once and read at every step (`kv-cache-prefix`).
#
# **Erratum 43.** The notes reuse what is cached for $x_{t+1},\dots$ after dropping the first token $x_t$, as if that were the
# same as reading the shorter text. In the first layer it is. From the second layer on, a cached key was made from a stream
# that has already looked at $x_t$:

# %%
for layers in (1, 2):
    deep = Decoder(Config(17, d_model=32, n_layers=layers, n_heads=4, d_ff=48, context=64), np.random.default_rng(2))
    for parameter in deep.parameters():
        parameter.data *= 4.0 if parameter.ndim > 1 else 1.0
    with no_grad():
        shorter = deep(ids[:1, 1:9]).data[:, -1]
        full, dropped = deep.new_cache(1), deep.new_cache(1)
        deep(ids[:1, :8], full)
        for part in ("keys", "values"):
            getattr(dropped, part)[:, :, :, :7] = getattr(full, part)[:, :, :, 1:8]
        dropped.advance(7)
        deep._angles = deep._angles[1:]  # the kept keys were turned by positions 1 to 7, so the next one is 8
        gap = np.abs(deep(ids[:1, 8:9], dropped).data[:, -1] - shorter).max()
    print(f"{layers} layer(s): dropping the first token differs from the shorter text by", "nothing" if gap < 1e-4 else "much")

# %% [markdown]
# So a cache grows with its context. A ring of fixed size (`kv-cache-window`) is right for a model whose attention has that
# window, and for no other:

# %%
rng = np.random.default_rng(3)
q, k, v = (Tensor(rng.normal(size=(1, 2, 12, 4))) for _ in range(3))
windowed = scaled_dot_product_attention(q, k, v, causal=True, window=4).data
ring = WindowCache(1, 2, 4, 4, dtype=np.float64)
steps = []
for t in range(12):
    keys, values = ring.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    steps.append(scaled_dot_product_attention(q[:, :, t : t + 1], keys, values).data)
print("a ring of 4 gives attention with a window of 4:", np.allclose(np.concatenate(steps, 2), windowed))
print("places of the ring now hold positions", ring.key_positions.tolist())

# %% [markdown]
# ## 2. How large
#
# Keys and values of every layer, for $H_{kv}$ heads (`kv-cache-size`): $2N_{\rm layer}BLH_{kv}d_{\rm head}$ numbers. **Erratum
# 44:** the notes call $2BHLd_{\rm head}$ the cost "per token"; with the $L$ in it, it is the cost per *layer* for all $L$
# tokens. What the arrays really take (`wn-kv-bytes`):

# %%
for name, layers, heads in (("13B, 40 heads", 40, 40), ("70B, 64 heads", 80, 64), ("70B, 8 groups", 80, 8)):
    one_token = KVCache(layers, 1, heads, 1, 128, dtype=np.float16)
    print(f"{name}: {one_token.nbytes:>9,} bytes for each token")
    assert one_token.nbytes == 2 * layers * heads * 128 * 2
print("multi-query against multi-head (`wn-mqa-cache`):", KVCache(1, 1, 32, 9, 8).nbytes // KVCache(1, 1, 1, 9, 8).nbytes, "= H")

# %% [markdown]
# At 4096 tokens, one conversation with the 70B model would hold 10.7 GB of keys and values with all 64 heads; with eight
# groups (`gqa`) it is 1.3 GB. Sharing one head (`mqa`) is the end of that road. The next section takes another road.
#
# ### Exercise 1: the longest text
#
# Given a configuration and a memory in bytes, how many tokens fit into the cache of one conversation?


# %%
def longest_text(memory: int, n_layers: int, n_kv_heads: int, d_head: int, bytes_per_number: int) -> int:
    """The number of tokens whose keys and values fit."""
    ### BEGIN SOLUTION
    return memory // (2 * n_layers * n_kv_heads * d_head * bytes_per_number)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: the longest text
assert longest_text(10**9, 40, 40, 128, 2) == 1220, "13B with 16-bit numbers: 819,200 bytes a token"
assert longest_text(10**9, 80, 8, 128, 2) == 3051, "70B with eight groups: 327,680 bytes a token"
assert longest_text(10**9, 80, 8, 128, 1) == 6103, "half the bytes, twice the tokens"
print("right")

# %% [markdown]
# ## 3. Latent attention
#
# **Erratum 24.** "MLA" means two things. In the notes it is an array of learned latents that the sequence is read into: it
# makes the *sequence* short. DeepSeek's multi-head latent attention squeezes each token's keys and values into one narrow
# vector: it makes the *cache* narrow. Here it is the second.
#
# Keys and values of all heads are made from one latent $\mathbf c_t=\mathbf h_t\mathbf W^{DKV}$ of width $d_c$ (`mla-deepseek`):
#
# $$\mathbf K^C=\mathbf c\,\mathbf W^{UK},\qquad \mathbf V^C=\mathbf c\,\mathbf W^{UV}.$$

# %%
source = inspect.getsource(latent.latent_attention)
print(source[: source.index('    r"""')] + source[source.rindex('"""') + 4 :])

# %% [markdown]
# Unpacking the whole cache for each new token would be a bad bargain. It is not needed (`mla-absorb`). The score of a query
# $q$ with a key $k=\mathbf W^{UK}_hc$ is
#
# $$q^\top(\mathbf W^{UK}_hc)=(\mathbf W^{UK\top}_hq)^\top c ,$$
#
# so one carries the *query* to the latents, once, and not all latents to the queries. The same with values: the weighted sum of
# latents passes through $\mathbf W^{UV}_h$ once.

# %%
rng = np.random.default_rng(4)
B, H, L, d_head, d_c, d_R = 2, 3, 6, 4, 5, 2
shapes = [(B, H, L, d_head), (B, H, L, d_R), (B, L, d_c), (B, L, d_R), (H * d_head, d_c), (H * d_head, d_c)]
arrays = [rng.normal(size=shape) for shape in shapes]
one = latent.latent_attention(*map(Tensor, arrays), causal_mask(L)).data
other = latent.absorbed_latent_attention(*map(Tensor, arrays), causal_mask(L)).data
print("absorbed equals unpacked to 1e-14:", np.abs(one - other).max() < 1e-14)
for form in (latent.latent_attention, latent.absorbed_latent_attention):
    print(form.__name__, "passes the gradient check:", gradcheck(form, arrays).passed)

# %% [markdown]
# **Why the rotary part stands apart** (`mla-decoupled-rope`). Absorbing works since nothing stands between $\mathbf W^{UQ}$ and
# $\mathbf W^{UK}$. A rotation would: $q^\top R(t-s)\,\mathbf W^{UK}c$ has another matrix for each distance. So DeepSeek gives
# every head a few extra coordinates that turn, with one rotary key per token for all heads, and caches that key beside the
# latent. In numbers: the absorbed product and the true score of turned vectors, by distance.

# %%
w_q, w_k, x, c = (rng.normal(size=s) for s in ((4, 8), (4, 5), 8, 5))


def turned(vector, position):
    """Pairs of a vector, turned as RoPE does at a position."""
    pairs = vector.reshape(-1, 2) @ np.array([1, 1j]) * np.exp(1j * rotation_angles(np.array([position]), 4)[0])
    return np.stack([pairs.real, pairs.imag], -1).ravel()


absorbed = (w_k.T @ w_q @ x) @ c
for distance in (0, 1, 4):
    print(f"distance {distance}: score {turned(w_q @ x, 9) @ turned(w_k @ c, 9 - distance):6.3f}, absorbed {absorbed:6.3f}")

# %% [markdown]
# The module decides by counting: reading a prompt it unpacks, for one new token it absorbs. Here are the products that
# either form needs at the sizes of DeepSeek-V3, for one layer.

# %%
print(inspect.getsource(LatentAttention.unpacking_is_cheaper))
H, d_head, d_c, d_R = 128, 128, 512, 64


def unpacked_products(L, S):
    """Multiplications to make all keys and values and to attend with L queries."""
    return H * (S * d_c * 2 * d_head + L * S * (2 * d_head + d_R))


def absorbed_products(L, S):
    """Multiplications to carry L queries to the latents and to attend there."""
    return H * (L * d_c * 2 * d_head + L * S * (2 * d_c + d_R))


S = np.logspace(0, 5, 60)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axis, queries, title in ((axes[0], 1, "one new token"), (axes[1], S, "reading the whole text")):
    axis.loglog(S, unpacked_products(queries, S), color=BLUE)
    axis.loglog(S, absorbed_products(queries, S), color=VERMILION)
    axis.set(title=title, xlabel="tokens in the cache")
axes[0].set_ylabel("multiplications in a layer")
axes[0].text(2e2, 2e10, "unpacked", color=BLUE, ha="right")
axes[0].text(2e3, 3e7, "absorbed", color=VERMILION, ha="left", va="top")
ratio = unpacked_products(1, 4096) / absorbed_products(1, 4096)
print(f"one new token, 4096 cached: absorbing takes {ratio:.0f} times fewer multiplications")
ratio = absorbed_products(4096, 4096) / unpacked_products(4096, 4096)
print(f"reading 4096 tokens: absorbing takes {ratio:.1f} times more")
plt.show()

# %% [markdown]
# And the size (`kv-cache-mla`, `mla-cache-size`): $d_c+d_R$ numbers a token and layer, whatever the number of heads.

# %%
narrow, full, ratio = latent.latent_cache_width(512, 64, 128, 128)
print(f"DeepSeek-V3: {narrow} numbers a token and layer; its heads would take {full}, {ratio:.1f} times as many")
kinds = {
    "multi-head, 128 heads": (full, BLUE),
    "grouped, 8 heads": (2 * 8 * 128, SKY),
    "latent, 512 + 64": (narrow, VERMILION),
    "multi-query, 1 head": (2 * 128, GREEN),
}
figure, axis = plt.subplots(figsize=(8, 2.4))
for i, (width, colour) in enumerate(kinds.values()):
    axis.barh(-i, width, color=colour)
    axis.text(width * 1.15, -i, f"{width:,}", va="center")
axis.set(xscale="log", xlim=(100, 1e5), xlabel="numbers cached for each token and layer (heads of width 128)")
axis.set_yticks(range(0, -len(kinds), -1), list(kinds))
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# ### Exercise 2: absorb
#
# One head, one query, a cache of latents `C` of shape $(S,d_c)$. Return the head's output without ever making a key or a value.


# %%
def absorbed_head(q, C, w_uk, w_uv, scale):
    """Output (d_v,) for q (d_head,), C (S, d_c), w_uk (d_head, d_c), w_uv (d_v, d_c)."""
    ### BEGIN SOLUTION
    scores = C @ (w_uk.T @ q) * scale
    weights = np.exp(scores - scores.max())
    return w_uv @ (weights @ C / weights.sum())
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: absorb
rng = np.random.default_rng(5)
q1, C, w_uk, w_uv = (rng.normal(size=s) for s in (4, (7, 5), (4, 5), (3, 5)))
p = probabilities((C @ w_uk.T) @ q1 * 0.5)
np.testing.assert_allclose(absorbed_head(q1, C, w_uk, w_uv, 0.5), p @ (C @ w_uv.T), err_msg="not the head's output")
big, wide = absorbed_head(q1 * 1e3, C, w_uk, w_uv, 0.5), rng.normal(size=(100_000, 5))
assert np.isfinite(big).all(), "large scores must not overflow"
assert absorbed_head(q1, wide, w_uk, w_uv, 0.5).shape == (3,), "the output is one vector of width d_v"
print("right")

# %% [markdown]
# ## 4. Fewer bits
#
# A third road: the same numbers in eight or four bits (`kv-cache-quantised`). Symmetric rounding has an error of at most half a
# step, and the step is set by the largest number that shares a scale. So it matters *who shares*. Keys of trained models have
# channels that are large for every token; values have none. The cache of the package gives keys a scale per channel (for
# 32 tokens at a time) and values one per token. Would one per token do for keys too? The experiment puts three such
# channels into random keys and looks at the error of the attention weights, 256 tokens, four heads.

# %%
rng = np.random.default_rng(6)
tokens, d = 256, 32
keys, values = rng.normal(size=(1, 4, tokens, d)), rng.normal(size=(1, 4, tokens, d))
keys[..., [3, 11, 20]] *= 15
queries = rng.normal(size=(1, 4, 64, d))
queries[..., [3, 11, 20]] /= 15


def weights_of(keys):
    """Attention weights of all queries."""
    return probabilities(queries @ keys.swapaxes(-1, -2) / np.sqrt(d))


def rounded(x, bits, axis):
    """x with one scale for all numbers along an axis."""
    step = np.abs(x).max(axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(x / step) * step


truth, errors = weights_of(keys), {}
for bits in (8, 4):
    cache = QuantisedCache(1, 4, tokens, d, bits=bits, group=32)
    cache.append(keys.astype(np.float32), values.astype(np.float32))
    for name, found in (("per channel", cache.read()[0]), ("per token", rounded(keys, bits, -1))):
        errors[bits, name] = 0.5 * np.abs(weights_of(found) - truth).sum(-1).mean()
    print(f"{bits} bits: {cache.nbytes / (2 * 4 * 4 * tokens * d):.2f} of the float32 cache")
better = [errors[bits, "per token"] / errors[bits, "per channel"] for bits in (8, 4)]
print("a scale per channel is better at 8 bits and at 4:", [bool(r > 1) for r in better])

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), gridspec_kw={"width_ratios": [1.1, 1]})
picture = axes[0].imshow(np.abs(keys[0, 0, :64]), aspect="auto", vmax=30)
axes[0].set(title="keys of one head, magnitude", xlabel="channel", ylabel="token")
axes[0].grid(visible=False)
figure.colorbar(picture, ax=axes[0])
for i, (name, colour) in enumerate((("per channel", BLUE), ("per token", ORANGE))):
    heights = [errors[bits, name] for bits in (8, 4)]
    axes[1].bar(np.arange(2) + 0.4 * i, heights, 0.36, color=colour, label=f"a scale {name}")
axes[1].set(title="error of the attention weights", ylabel="total variation", yscale="log", ylim=(1e-4, 3))
axes[1].set_xticks(np.arange(2) + 0.2, ["8 bits", "4 bits"])
axes[1].legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 5. From logits to tokens
#
# `greedy` takes the most likely token. `sample-temperature` divides the logits by $T$: below 1 the law gets sharper, and $T\to0$
# is greedy. Truncation leaves only some tokens: the $k$ most likely (`sample-top-k`), the smallest set with mass $p$
# (`sample-top-p`), or those with at least a share of the largest (`sample-penalties`, min-p). Their order is fixed
# (`sample-combine`): temperature, then top-$k$, then top-$p$; the notes advise $T\in[0.7,1]$ and $p\in[0.9,0.95]$
# (`wn-topp-range`). Two laws, a peaked and a flat one:

# %%
laws = {"peaked": np.array([6.0, 3.4, 3.0, 2.2, 1.4, 0.8, 0.3, -0.5]), "flat": np.linspace(1.2, 0, 8)}
cuts = {"top-k, k = 3": lambda z: keep_top_k(z, 3), "top-p, p = 0.9": lambda z: keep_top_p(z, 0.9)}
cuts["min-p, 0.1"] = lambda z: keep_min_p(z, 0.1)
figure, axes = plt.subplots(2, 3, figsize=(9, 3.8), sharex=True, sharey="row")
for row, (name, z) in zip(axes, laws.items(), strict=True):
    for axis, (cut, keep) in zip(row, cuts.items(), strict=True):
        kept = np.isfinite(keep(z[None]))[0]
        axis.bar(range(8), probabilities(z), color=np.where(kept, BLUE, "#cccccc"))
        axis.set_title(f"{cut}: {kept.sum()} of 8" if name == "peaked" else f"{kept.sum()} of 8")
        axis.set_xticks([])
    row[0].set_ylabel(f"{name} law")
figure.supxlabel("tokens by probability; grey ones are excluded")
plt.show()

# %% [markdown]
# A fixed $k$ keeps bad tokens of a peaked law and drops good ones of a flat one; the other two follow the law. Penalties
# (`sample-penalties`) make what was said before less likely, by a factor (repetition), by count (frequency) or once (presence),
# or forbid to say an $n$-gram again.
#
# **Erratum 45.** The notes sample at a temperature or from a nucleus, and record the model's own log-probability. The tokens
# come from the *tempered* law (`sample-behaviour-logprob`). With the wrong one an advantage is not even zero on average:

# %%
z, reward = np.array([1.0, 0.2, -0.5]), np.array([1.0, 0.0, -1.0])
p, p_T = probabilities(z), probabilities(z / 0.7)
advantage = reward - p @ reward  # against the model's own mean
print(f"E[A] of samples at T = 0.7: {p_T @ advantage:.4f}; weighted by p / p_T: {abs(p_T @ (p / p_T * advantage)):.4f}")

# %% [markdown]
# `generate` therefore returns log-probabilities of the law it sampled. It also says how each text ended (`stop-conditions`):
# `terminated` by EOS or a stop sequence, `truncated` by the length; a learner must treat the two differently.

# %%
made = generate(model, ids[:1, :4].repeat(64, 0), 12, np.random.default_rng(0), temperature=0.8, top_p=0.95, eos_id=3)
print("every text is exactly one of terminated and truncated:", bool((made.terminated ^ made.truncated).all()))
print("both kinds occurred:", bool(made.terminated.any() and made.truncated.any()))

# %% [markdown]
# **Beam search** (`beam-search`) keeps the $b$ most likely texts instead of one. Is the most likely text the best? Take a
# language whose law is known: after each token one of eight follows, by a table. What does each way of decoding say, and how
# likely is it?


# %%
class Known:
    """A language model with a table for a law; its cache only counts."""

    def __init__(self, table, context=200):
        self.config = SimpleNamespace(vocab_size=len(table), context=context)
        self.table, self.output_weight, self.passes = table, Tensor(table.T.copy()), 0

    def new_cache(self, batch, capacity=None):
        """Something with a length that can be set back."""
        cache = SimpleNamespace(length=0, select=lambda rows: None)
        cache.save = lambda: cache.length
        cache.rewind = lambda mark, length: setattr(cache, "length", length)
        return cache

    def hidden(self, ids, cache=None):
        """One-hot vectors: the head is the table."""
        cache.length += ids.shape[1]
        return Tensor(np.eye(len(self.table))[ids])

    def laws(self):
        """Transition probabilities."""
        return probabilities(self.table)


language = Known(np.random.default_rng(7).normal(0, 1.3, (8, 8)))
start, n = np.zeros((1, 1), int), 40
P = language.laws()
texts = {
    "greedy": generate(language, start, n, np.random.default_rng(0), temperature=0).tokens,
    "beam, b = 8": beam_search(language, start, n, beams=8).tokens[:, 0],
    "T = 0.7": generate(language, start, n, np.random.default_rng(0), temperature=0.7, copies=200).tokens,
    "T = 1": generate(language, start, n, np.random.default_rng(0), copies=200).tokens,
}
stationary = np.linalg.matrix_power(P, 200)[0]
entropy = -(stationary[:, None] * P * np.log(P)).sum()
print(f"the language has {entropy:.2f} nats a token")
summary = {}
for name, found in texts.items():
    path = np.concatenate([np.zeros((len(found), 1), int), found], 1)
    surprise = -np.log(P[path[:, :-1], path[:, 1:]]).mean()
    distinct = np.mean([len(set(zip(row, row[1:], strict=False))) for row in found.tolist()])
    summary[name] = surprise, distinct
    print(f"{name:12} {surprise:5.2f} nats a token, {distinct:4.1f} different pairs in {n} tokens")

# %% [markdown]
# The likeliest texts are far likelier than what the language says on average, and they are loops. The most probable outcome
# need not be a typical one: a die that shows six a little more often than the rest has "only sixes" as its likeliest sequence, and
# nobody will ever see it thrown. Beam search is for tasks with one right answer (translation); for open text one samples.
#
# ### Exercise 3: no pair twice
#
# Write the control that forbids a token if it would say a pair again that the text has already.


# %%
def forbid_repeated_pairs(logits, text):
    """Logits (V,) with minus infinity where (text[-1], v) already occurs in text (a list of ints)."""
    ### BEGIN SOLUTION
    out = logits.copy()
    for first, second in zip(text, text[1:], strict=False):
        if first == text[-1]:
            out[second] = -np.inf
    return out
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: no pair twice
free = forbid_repeated_pairs(np.zeros(5), [1, 2, 3, 1, 4, 1])
np.testing.assert_array_equal(np.isinf(free), [False, False, True, False, True], err_msg="after 1 came 2 and 4")
np.testing.assert_array_equal(forbid_repeated_pairs(np.ones(3), [2]), np.ones(3), err_msg="no pair was said yet")
text = [0]
for _ in range(12):
    text.append(int(forbid_repeated_pairs(language.table[text[-1]], text).argmax()))
wanted = generate(language, start, 12, np.random.default_rng(0), temperature=0, no_repeat_ngram=2).tokens[0]
assert text[1:] == wanted.tolist(), "greedy decoding with your control is that of the package"
print("right")

# %% [markdown]
# ## 6. Several tokens a pass
#
# One token a pass reads all weights for one vector; checking five tokens reads them once too. So let something cheap draft a few
# tokens and let the model check them (`speculative-decoding`). A draft $x\sim q$ is accepted with probability
# $\min(1,p(x)/q(x))$. After a rejection a token is drawn from $(p-q)_+$, normalised. Why is the result exactly $p$?
#
# $$\underbrace{q(x)\min\Big(1,\frac{p(x)}{q(x)}\Big)}_{\min(p,q)}+\Big(1-\sum_y\min(p(y),q(y))\Big)\frac{(p(x)-q(x))_+}
# {\sum_y(p(y)-q(y))_+}=\min(p,q)+(p-q)_+=p ,$$
#
# as $\sum_y(p-q)_+=1-\sum_y\min(p,q)$. The draft decides how fast, never what:

# %%
rng = np.random.default_rng(8)
p, q = rng.dirichlet(np.ones(6), 2)
accepted = acceptance_rate(p, q)
print("the law of the outcome is p:", np.allclose(np.minimum(p, q) + (1 - accepted) * residual_law(p, q), p))

# %% [markdown]
# **How fast?** If each draft is accepted with probability $\alpha$, a pass with $\gamma$ drafts yields
# $1+\alpha+\dots+\alpha^\gamma$ tokens. That assumes independent acceptances, which a language need not grant. Three
# drafters for the known language: its table with more and more noise.

# %%
counts, n_texts = (1, 2, 4, 8), 60 if LONG else 12
figure, axis = plt.subplots(figsize=(7, 3.6))
gaps = []
for noise, colour in ((0.3, BLUE), (1.0, GREEN), (2.5, VERMILION)):
    drafter = Known(language.table + np.random.default_rng(9).normal(0, noise, (8, 8)))
    alpha = float(stationary @ acceptance_rate(P, drafter.laws()))
    measured = []
    for count in counts:
        run = speculative_generate(
            language, ModelDrafter(drafter), np.zeros((n_texts, 1), int), 120, np.random.default_rng(10), count=count
        )
        measured.append(run.generation.mask.sum() / run.passes.sum())
    expected = [(1 - alpha ** (count + 1)) / (1 - alpha) for count in counts]
    gaps += [abs(m / e - 1) for m, e in zip(measured, expected, strict=True)]
    fine = np.linspace(0, 8, 50)
    axis.plot(fine, (1 - alpha ** (fine + 1)) / (1 - alpha), color=colour)
    axis.plot(counts, measured, "o", color=colour)
    axis.text(8.15, expected[-1], f"accepts {alpha:.2f}", color=colour, va="center")
axis.set(xlabel="drafts in a pass", ylabel="tokens from a pass", xlim=(0, 10), ylim=(0.9, None))
axis.set_title("dots: measured; lines: independent acceptances")
print("the formula is within 15 % of what was measured:", max(gaps) < 0.15)
plt.show()

# %% [markdown]
# More drafts help a good drafter and are wasted on a bad one. (The dots lie a little low: the first pass reads the prompt, and the
# last one may draft no further than the text goes.) And the law? Compare the frequencies of pairs with those of plain
# sampling: both must be the language's.

# %%
bad = Known(language.table + np.random.default_rng(9).normal(0, 2.5, (8, 8)))
run = speculative_generate(
    language, ModelDrafter(bad), np.zeros((60 if LONG else 20, 1), int), 150, np.random.default_rng(11), law=Law()
)
path = run.generation.tokens
pairs = np.zeros((8, 8))
np.add.at(pairs, (path[:, :-1].ravel(), path[:, 1:].ravel()), 1)
seen = pairs / pairs.sum()
away = 0.5 * np.abs(seen - stationary[:, None] * P).sum()
drafts_law = 0.5 * np.abs(stationary[:, None] * (bad.laws() - P)).sum()
print(f"pairs are off by less than 0.08: {away < 0.08}; the drafter's own law is off by {drafts_law:.2f}")

# %% [markdown]
# ## 7. Several answers
#
# Where a program can judge, or answers can be compared, one asks several times. The best of $n$ by a score (`best-of-n`) grows
# with $n$; a majority vote (`self-consistency`) is right more often than a single answer as soon as the right one is the most
# likely. For both, the answer must be found in the text: a template asks to think first, in a region of its own (`cot-template`).

# %%
scores, law = np.array([0.0, 1.0, 2.0]), np.array([0.6, 0.3, 0.1])
print("expected best of 1, 4, 16:", [round(expected_best(scores, law, n), 2) for n in (1, 4, 16)])
draws = np.random.default_rng(12).choice(["42", "24", "7"], p=[0.45, 0.35, 0.2], size=(500, 25))
votes = np.mean([self_consistency(row.tolist())[0] == "42" for row in draws])
print(f"one answer is right with 0.45, a vote of 25 with {votes:.1f}")
print(cot_prompt("What is 6 times 7?"))
print(parse_cot("six sevens </think><answer>42</answer>"))

# %% [markdown]
# ## To take away
#
# - Keys and values never change, so one keeps them; from the second layer on they contain the tokens before them (43).
# - A cache is $2N_{\rm layer}H_{kv}d_{\rm head}$ numbers a token. Share heads, squeeze into latents, use a window, use
#   fewer bits: each pays with something else.
# - Latents need not be unpacked to decode, if nothing that depends on positions stands between the two maps.
# - Sampling draws from a law; record *that* law. Speculation changes the time and nothing else.
