# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 05 · Embeddings and positions
#
# A transformer sees a set of vectors. This lesson is about its two ends, where ids become vectors and vectors become logits, and
# about what tells it which vector came first: seven ways to say where a token stands.
#
# Equations: `token-embedding`, `embedding-as-onehot-matmul`, `weight-tying`, `lm-head`, `next-token-distribution`, `logit-variance`,
# `logit-scaling`, `logit-softcap`, `pos-sinusoidal`, `pos-learned`, `pos-rope`, `pos-rope-scaling`, `pos-alibi`,
# `pos-relative-bias`, `pos-relative-shaw`, `pos-nope`, `special-tokens`, `tokenizer-bpe`.
#
# After it you can
# - compute how large logits are before training starts, and what tying the two ends does to their gradient,
# - say what each kind of positions adds, turns or biases, and check its defining property,
# - stretch rotary positions beyond the length they were trained for, and see what each way of stretching costs.

# %%
import inspect
import os

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad, gradcheck
from minillm.data import BPETokenizer, ByteTokenizer
from minillm.functional import output_head as head
from minillm.functional import relative_positions as relative
from minillm.functional.absolute_positions import sinusoidal_positions
from minillm.functional.attention import scaled_dot_product_attention
from minillm.functional.linear import embedding, linear
from minillm.functional.norms import rms_norm
from minillm.functional.positions import rope, rotation_angles
from minillm.functional.rope_scaling import RopeScaling, scaled_rotation
from minillm.fused.losses import cross_entropy
from minillm.fused.softmax import token_logprobs
from minillm.models import Config, Decoder
from minillm.nn.positions import make_positions
from minillm.optim import AdamW
from minillm.plotting import BLUE, CYCLE, GREEN, PURPLE, VERMILION, use_style

use_style()
LONG = os.environ.get("LESSON_LONG") == "1"  # three seeds instead of one in the last experiment, some minutes
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. Ids, and what is reserved
#
# Byte-pair encoding starts from the 256 bytes and joins the most frequent pair, again and again. Special tokens get ids that no text
# encodes to; each has a vector of its own like any other token.

# %%
text = "low lower lowest slow slower slowest " * 20
bpe = BPETokenizer.train(text, vocab_size=270)
print("pieces:", [bpe.decode([i]) for i in bpe.encode("slowest flow")])
special = ByteTokenizer(specials=("bos", "eos", "pad"))
ids = special.encode("hi", bos=True, eos=True)
print("with its ends:", ids, "   of", special.vocab_size, "ids")
print("a text that spells <bos> is not the token:", special.bos_id not in special.encode("<bos> bos"))

# %% [markdown]
# Looking a row up *is* multiplying by a one-hot vector. The look-up is cheaper; its gradient adds up the rows of repeated ids.

# %%
table = Tensor(rng.normal(size=(5, 3)), requires_grad=True)
some = np.array([1, 3, 1])
rows = embedding(some, table)
print("same as a product with one-hot rows:", np.array_equal(rows.data, np.eye(5)[some] @ table.data))
(into_table,) = grad([rows], [table], [np.ones((3, 3))])
print("how often each row was used:", into_table.data[:, 0])

# %% [markdown]
# ## 2. The other end: how large are logits?
#
# After the last norm, a token's vector $x$ has root mean square 1. With independent weights of spread $s_w$, the logits have variance
# $s_w^2\lVert x\rVert^2=s_w^2d_{\rm model}$: a spread of 32 at width 1024 and $s_w=1$. The source divides by $\sqrt{d_{\rm model}}$. Is
# that right?

# %%
d, V = 1024, 4000
x = rms_norm(Tensor(rng.normal(size=d)), Tensor(np.ones(d)), 0.0).data
print(f"{'spread of weights':>18}{'none':>8}{'sqrt':>8}{'mup':>8}")
for s_w, name in ((1.0, "1"), (d**-0.5, "1/sqrt(d)")):
    logits = Tensor(rng.normal(size=(V, d)) @ x * s_w)
    spreads = [head.scale_logits(logits, d, mode).data.std() for mode in head.SCALINGS]
    print(f"{name:>18}" + "".join(f"{spread:8.2f}" for spread in spreads))
print("predicted for spread 1:", head.logit_std(d, 1.0))

# %% [markdown]
# It is right for weights of spread 1 and wrong, by the same factor, for the usual $d^{-1/2}$ (erratum 9). What does the spread mean for
# the loss before training? Logits of spread 1 are nearly harmless; logits of spread 32 are confident nonsense.

# %%
targets = rng.integers(V, size=512)
for spread in (0.0, 1.0, 32.0):
    loss = cross_entropy(Tensor((spread * rng.normal(size=(512, V))).astype(np.float32)), targets).item()
    print(f"logits of spread {spread:>4}: loss {loss:6.1f}   (ln V = {np.log(V):.1f})")

# %% [markdown]
# A soft cap, $c\tanh(o/c)$, bounds them without a corner.
#
# ### Exercise 1: the gradient of tied ends
#
# With weight tying the embedding matrix is also the head: one parameter used twice, so its gradient is the sum of two. For logits
# $H W^\top$ with $H=W[\text{ids}]$ (no layers between), return the gradient of $\sum_{nv}G_{nv}\,(HW^\top)_{nv}$ for $W$, given arrays.


# %%
def tied_gradient(W, ids, G):
    """The gradient for W of the sum of G * (W[ids] @ W.T)."""
    ### BEGIN SOLUTION
    through_head = G.T @ W[ids]
    through_embedding = np.zeros_like(W)
    np.add.at(through_embedding, ids, G @ W)
    return through_head + through_embedding
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: the gradient of tied ends
W, ids_, G = rng.normal(size=(6, 4)), np.array([0, 2, 2, 5]), rng.normal(size=(4, 6))
w = Tensor(W, requires_grad=True)
(wanted,) = grad([linear(embedding(ids_, w), w)], [w], [G])
np.testing.assert_allclose(tied_gradient(W, ids_, G), wanted.data, atol=1e-12, err_msg="did both uses contribute?")
print("right")

# %% [markdown]
# ## 3. Without positions
#
# Attention treats keys as a set: shuffle the tokens and the outputs are shuffled alike. With a causal mask that is no longer so: each
# query sees another set, which is enough for a decoder to work out where it is.

# %%
tokens, order = rng.normal(size=(1, 1, 6, 4)), np.array([3, 1, 0, 5, 4, 2])
for causal in (False, True):
    plain, moved = (scaled_dot_product_attention(*(Tensor(t),) * 3, causal=causal).data for t in (tokens, tokens[:, :, order]))
    print(f"causal={causal!s:<6} shuffling the input shuffles the output: {np.allclose(moved, plain[:, :, order])}")

# %% [markdown]
# ## 4. Added to the stream: sinusoids and learnt vectors
#
# Sines and cosines of many wavelengths. The property that matters: the vector of position $p+\Delta$ is a *rotation* of that of $p$, by
# angles that depend on $\Delta$ only. So inner products depend on the distance.

# %%
pe = sinusoidal_positions(np.arange(128), 64)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=[1.3, 1])
shown = left.imshow(pe.T, aspect="auto", cmap="RdBu_r")
left.set(xlabel="position", ylabel="coordinate", title="Sinusoidal positions")
left.grid(False)
figure.colorbar(shown, ax=left, label="value")
similarity = pe @ pe.T
for p, colour in ((20, BLUE), (64, VERMILION), (100, GREEN)):
    right.plot(np.arange(128) - p, similarity[p], color=colour, label=f"position {p}")
right.set(xlabel="distance", ylabel="inner product", title="A function of the distance alone")
right.legend()
plt.show()

# %% [markdown]
# ## 5. Turned: rotary positions
#
# Do not add the rotation, apply it: turn pairs of coordinates of queries and keys by $p\,\theta_i$. Then
# $\langle R_mq,R_nk\rangle=\langle q,R_{n-m}k\rangle$.

# %%
print(inspect.getsource(rope).split('"""')[2])
q, k = rng.normal(size=(1, 64)), rng.normal(size=(1, 64))


def score(m, n):
    turned = [rope(Tensor(a), angles=rotation_angles(np.array([p]), 64)).data for a, p in ((q, m), (k, n))]
    return float((turned[0] * turned[1]).sum())


print(f"same distance, same score: {score(3, 10):.6f} {score(503, 510):.6f};  another distance: {score(3, 11):.6f}")
print("lengths are kept:", np.allclose(np.linalg.norm(rope(Tensor(q), angles=rotation_angles(np.array([77]), 64)).data), np.linalg.norm(q)))
angles = rotation_angles(np.arange(3), 4)
print("gradient check:", gradcheck(lambda t: rope(t, angles=angles), [rng.normal(size=(2, 3, 4))]).passed)

# %% [markdown]
# ### Exercise 2: two pairings
#
# The paper turns coordinates $(2i,2i+1)$; the LLaMA weights on the hub are stored for $(i,i+d/2)$. Return the permutation `order` with
# which `rope(x[..., order], pairing="half")` equals `rope(x, pairing="interleaved")[..., order]`, for width d.


# %%
def to_half(d):
    """Where each coordinate of the half-split layout comes from in the interleaved one."""
    ### BEGIN SOLUTION
    return np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: two pairings
xs, turn_by = rng.normal(size=(5, 8)), rotation_angles(np.arange(5), 8)
order_ = np.asarray(to_half(8))
a = rope(Tensor(xs[:, order_]), angles=turn_by, pairing="half").data
b = rope(Tensor(xs), angles=turn_by, pairing="interleaved").data[:, order_]
np.testing.assert_allclose(a, b, atol=1e-12, err_msg="the first half has to hold the first coordinate of every pair")
print("right")

# %% [markdown]
# ## 6. Added to the scores: biases by distance
#
# ALiBi subtracts $m_h|i-j|$ with a slope for each head. T5 learns a number for each head and *bucket* of distances: near ones have
# buckets of their own, far ones share ever wider ones. Shaw's vectors put the distance into keys and values.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3))
for h, slope in enumerate(relative.alibi_slopes(8)):
    panels[0].plot(np.arange(64), -slope * np.arange(64), color=plt.cm.cividis(h / 8), label=f"head {h + 1}" if h in (0, 3, 7) else None)
panels[0].set(xlabel="distance", ylabel="added to the score", title="ALiBi: eight slopes", ylim=(-33, 1))
panels[0].legend()
panels[1].step(np.arange(200), relative.relative_bucket(np.arange(200)), where="post", color=VERMILION)
panels[1].set(xlabel="distance", ylabel="bucket", title="T5: 32 buckets, the last from 113 on", yticks=[0, 8, 16, 24, 31])
plt.show()
print("slopes of 8 heads:", relative.alibi_slopes(8))
far = np.array([0, 1, 15, 16, 31, 64, 127, 128, 5000])
print("distance -> bucket:", dict(zip(far.tolist(), relative.relative_bucket(far).tolist())))

# %% [markdown]
# Which places do these kinds work in? One call each, `make_positions(kind, ...)`:

# %%
sizes = dict(context=64, d_model=8, n_heads=2, d_head=4)
stream, heads, at = Tensor(rng.normal(size=(1, 5, 8)).astype(np.float32)), Tensor(rng.normal(size=(1, 2, 5, 4)).astype(np.float32)), np.arange(5)
print(f"{'kind':<12}{'adds to the stream':>20}{'turns q and k':>16}{'biases scores':>16}{'parameters':>12}")
for kind in ("none", "sinusoidal", "learned", "rope", "alibi", "t5"):
    made = make_positions(kind, rng, **sizes)
    does = (made.add(stream, at).data is not stream.data, made.turn(heads, at).data is not heads.data, made.bias(at, at) is not None)
    print(f"{kind:<12}" + f"{does[0]!s:>20}{does[1]!s:>16}{does[2]!s:>16}{made.count_parameters():>12}")

# %% [markdown]
# ## 7. Beyond the trained length
#
# Rotary positions can be evaluated anywhere, but a model has never seen the slow pairs turn further than in training. Four ways to
# stretch by a factor $s$: squeeze all positions (linear), change the base so that the slow pairs are squeezed and the fast ones are not
# (NTK), or decide pair by pair how far to squeeze (YaRN, LLaMA 3).

# %%
plain = rotation_angles(np.ones(1), 64)[0]
figure, axes = plt.subplots(figsize=(8, 3))
for kind, colour in zip(("linear", "ntk", "yarn", "llama3"), CYCLE):
    scaling = RopeScaling(kind, 4.0, 256, 1.0, 4.0 if kind == "llama3" else 32.0)
    axes.plot(scaled_rotation(np.ones(1), 64, scaling=scaling).angles[0] / plain, "o-", markersize=3, color=colour, label=kind)
axes.set(xlabel="pair of coordinates, from fast to slow", ylabel="angle, share of the plain one", title="What is squeezed, stretching by 4", ylim=(0, 1.05))
axes.legend(ncols=4, loc="lower left")
plt.show()

# %% [markdown]
# Now an experiment. A small decoder learns sequences that repeat after 12 symbols, on windows of 32, and is then read on windows of 96
# without any further training, and then after a little of it. The loss by position tells what each way of stretching saves. Write
# down your guess first: which curve is lowest beyond position 32, on the left and on the right?

# %%
def periodic(n, length, generator, period=12, V=16):
    motifs = generator.integers(V, size=(n, period))
    return np.tile(motifs, (1, length // period + 2))[:, : length + 1]


def train(seed, steps=150):
    generator = np.random.default_rng(seed)
    config = Config(16, d_model=32, n_layers=2, n_heads=2, d_ff=64, context=32, init_std=0.1, tied=True)
    model = Decoder(config, generator)
    optimiser = AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    for _ in range(steps):
        batch = periodic(16, 32, generator)
        loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        optimiser.step([[g.data for g in grad([loss], model.parameters())]])
    return model


def stretched(model, kind, length=96):
    """The same weights with rotary angles for three times the trained length."""
    longer = Decoder(Config(**{**model.config.to_dict(), "context": length}), np.random.default_rng(0))
    longer.load_state_dict(model.state_dict())
    scaling = RopeScaling(kind, 3.0 if kind != "none" else 1.0, 32, 1.0, 4.0 if kind == "llama3" else 32.0)
    longer._angles = scaled_rotation(np.arange(length), longer.config.d_head, scaling=scaling).angles
    return longer


def loss_by_position(model, length=96):
    """Mean loss at every position."""
    batch = periodic(64, length, np.random.default_rng(99))
    return -token_logprobs(model(batch[:, :-1]), batch[:, 1:]).data.mean(0)


def fine_tune(model, steps=30, length=96):
    """A few steps on the longer windows."""
    generator, optimiser = np.random.default_rng(7), AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    for _ in range(steps):
        batch = periodic(8, length, generator)
        loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        optimiser.step([[g.data for g in grad([loss], model.parameters())]])
    return model


models = [train(seed) for seed in range(3 if LONG else 1)]
figure, panels = plt.subplots(1, 2, figsize=(12, 3.4), sharey=True)
means = {}
for kind, colour in zip(("none", "linear", "ntk", "llama3"), (VERMILION, BLUE, GREEN, PURPLE)):
    for panel, tuned in zip(panels, (False, True)):
        longer = [stretched(model, kind) for model in models]
        curve = np.mean([loss_by_position(fine_tune(m) if tuned else m) for m in longer], axis=0)
        panel.plot(np.convolve(curve, np.ones(6) / 6, "valid"), color=colour, label={"none": "not stretched"}.get(kind, kind))
        means[kind, tuned] = (curve[14:32].mean(), curve[32:].mean())
for panel, title in zip(panels, ("as trained on windows of 32", "after 30 steps on windows of 96")):
    panel.axvline(32, color="grey", linestyle=":")
    panel.set(xlabel="position", title=title, ylim=(0, None))
panels[0].set_ylabel("loss (nats)")
panels[1].legend()
plt.show()
print("plain rotations: learnt within the window", means["none", False][0] < 0.5, "  worse beyond it", means["none", False][1] > 1.0)
print("any way of stretching better beyond the window, untuned:", any(means[k, False][1] < means["none", False][1] for k in ("linear", "ntk", "llama3")))
print("repaired by 30 steps:", ", ".join(k for k in ("none", "linear", "ntk", "llama3") if means[k, True][1] < 0.5) or "none")

# %% [markdown]
# Did you expect that? Stretching alone breaks this model, inside the window too. It copies by looking back exactly 12 places, and with
# angles squeezed by three, what lies 12 places back looks as if it lay 4 back. The plain angles carry it a good way past the window, for
# the distance 12 itself is nothing new there. A little training on longer windows repairs what kept the fast pairs nearly as they were;
# linear stretching squeezed those too, and they are what tells neighbours apart. That is why the later methods decide pair by pair, why
# stretching and a short training go together, and why reports of stretching without any come from text, where distances matter roughly.
#
# ### Exercise 3: how slow is the slowest pair?
#
# Return the number of positions after which the slowest pair of a head of width `d_head` and base `base` has made one whole turn.
# (LLaMA 3 raised the base from 10,000 to 500,000. Why?)


# %%
def longest_wave(d_head, base):
    """Positions for one turn of the slowest pair."""
    ### BEGIN SOLUTION
    return 2 * np.pi * base ** ((d_head - 2) / d_head)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: how slow is the slowest pair?
for base in (1e4, 5e5):
    slowest = rotation_angles(np.ones(1), 128, base)[0, -1]
    assert abs(longest_wave(128, base) * slowest / (2 * np.pi) - 1) < 1e-9, "the last frequency is base ** (-(d - 2) / d)"
print("right")

# %% [markdown]
# ## What to take along
#
# - The two ends of a model are one matrix or two; tied, the gradient is the sum of both uses.
# - Logits have spread $s_w\sqrt d$: divide by the root only if the weights have spread 1.
# - Positions add, turn or bias. What they share is that, in the end, scores should depend on distances.
# - Reading further than the training is a matter of what the slow pairs have seen.
#
# Next: lesson 06, norms and the residual stream.
