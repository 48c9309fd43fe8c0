# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 10 · Experts, and more than one token at a time
#
# Two ways to get more out of a model that costs no more to run. **Experts**: many feed-forward networks, of which a token
# visits a few. **Multi-token prediction**: the model learns to look further ahead than the next token, and afterwards uses
# that to check several tokens in one pass.
#
# Equations of the router: `router-logits`, `router-mlp`, `gating-softmax`, `gating-sigmoid`, `topk-renormalise`, `keep-topk`,
# `noisy-topk-gating`, `switch-top1`, `moe-gshard-top2`, `moe-expert-choice`. Of the layer: `moe-output`, `moe-dispatch`,
# `moe-expert`, `moe-combine`, `moe-capacity`, `moe-drop`, `moe-reroute`, `moe-pad`, `moe-fine-grained`, `moe-shared-experts`,
# `moe-params-active`. Of balance: `moe-aux-loss`, `moe-total-loss`, `moe-importance-loss`, `moe-z-loss`,
# `moe-sequence-balance`, `moe-bias-balancing`, `moe-collapse-metrics`. Of looking ahead: `mtp-parallel-heads`,
# `mtp-sequential-module`, `mtp-loss`, `speculative-decoding`. Worked numbers: `wn-switch-figure`, `wn-capacity`,
# `wn-aux-uniform`, `wn-moe-segmentation`, `wn-moe-combinations`.
#
# After it you can
# - write a layer of experts in six steps and show that it loses no token,
# - say what goes wrong when nothing keeps the experts busy, and repair it in two ways,
# - train a model to propose its own next tokens, and say which kind of proposal is accepted more often, and why.

# %%
import inspect
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad, gradcheck, no_grad
from minillm.decoding import Law, generate, speculative_generate
from minillm.decoding.multi_token_drafters import ParallelDrafter, SequentialDrafter
from minillm.decoding.speculative import acceptance_rate
from minillm.functional import balance, capacity, dispatch, experts, load_figures, routing
from minillm.functional.load_figures import Arrangement
from minillm.functional.softmax import softmax
from minillm.fused.experts import mixture_of_experts as fused_experts
from minillm.models import Config, Decoder
from minillm.models.multi_token import ParallelPrediction, SequentialPrediction
from minillm.nn.experts import MixtureOfExperts
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, VERMILION, use_style
from minillm.training.step import loss_and_gradients

use_style()
LONG = False  # True: longer trainings, some minutes


def show(function):
    """The code of a function without its docstring."""
    head, _, body = textwrap.dedent(inspect.getsource(function)).split('"""')
    head = head[head.index("def ") :].rstrip().removesuffix("r").rstrip()
    print(head + body.rstrip() + "\n")


# %% [markdown]
# ## 1. A layer of experts in six steps
#
# Let $\mathbf X$ be the tokens, $N=BL$ of them, and $E$ the number of experts.
#
# 1. **Router** (`router-logits`): one score per token and expert, $\mathbf R=\mathbf X\mathbf W_r$. A slide makes it a small
#    network (`router-mlp`, erratum 36); one linear map is usual.
# 2. **Gates** (`gating-softmax`): $\mathbf P=\mathrm{softmax}(\mathbf R)$.
# 3. **Choice** (`topk-renormalise`): keep the $k$ best, $\tilde P_e=P_e/\sum_{j\in\mathcal T_k}P_j$.
# 4. **Dispatch** (`moe-dispatch`): copy every token to its experts' lists, $\mathbf X_e[j]=\mathbf X[\pi_e(j)]$.
# 5. **Experts** (`moe-expert`): $\mathbf Y_e=\mathrm{FFN}_e(\mathbf X_e)$.
# 6. **Combine** (`moe-combine`): $\mathbf Z[n]=\sum_{e\in\mathcal T_k(n)}g_e[\eta_e(n)]\,\mathbf Y_e[\eta_e(n)]$.
#
# The maps $\pi_e$ and $\eta_e$ look heavy on paper. In code they are one sort:

# %%
show(dispatch.pack)
show(experts.mixture_of_experts)

# %% [markdown]
# Eight tokens, four experts, two for each token. On the left the weights $\tilde P$; on the right the same assignments
# sorted by expert. Every matrix product on the right is dense: no gaps, no masks.

# %%
rng = np.random.default_rng(3)
N, E, k, d, d_ff = 8, 4, 2, 6, 5
P = softmax(Tensor(1.3 * rng.normal(size=(N, E))))
routed = routing.top_k(P, k)
gates = routing.topk_renormalise(P, routed)
packing = dispatch.pack(routed)

figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4), width_ratios=(1, 2.2))
picture = left.imshow(np.where(routed, gates.data, np.nan), cmap="cividis", vmin=0, vmax=1)
left.set(title="weights", xlabel="expert", ylabel="token", xticks=range(E), yticks=range(N))
left.grid(False)
figure.colorbar(picture, ax=left, shrink=0.8)
colours = (BLUE, VERMILION, GREEN, PURPLE)
right.bar(range(N * k), [1] * (N * k), width=0.96, color=[colours[e] for e in packing.experts])
for j, n in enumerate(packing.tokens):
    right.text(j, 0.5, f"{n}", ha="center", va="center", color="white", fontsize=12)
for e in range(E):
    right.text(packing.offsets[e : e + 2].mean() - 0.5, 1.06, f"expert {e}: {packing.loads[e]}", ha="center", color=colours[e])
right.set(title="the same, in the order of the experts", ylim=(0, 1.25), xlim=(-0.6, N * k + 0.2), yticks=[], xticks=[])
right.spines[["left", "bottom"]].set_visible(False)
plt.show()
print("assignments:", packing.loads.sum(), "=", f"{k} x {N}")

# %% [markdown]
# **No token is lost.** If every expert returned what it was given, the layer would have to return its input, because the
# weights of a token sum to 1. That is a test of steps 4 and 6 together:

# %%
X = Tensor(rng.normal(size=(N, d)))
packed, g = dispatch.dispatch(X, gates, packing)
print("combine(dispatch(x)) = x:", np.allclose(dispatch.combine(packed, g, packing).data, X.data, atol=1e-14))

# %% [markdown]
# The meaning of the layer is the sum over *all* experts, $y=\sum_eG(x)_eE_e(x)$ (`moe-output`), with most weights 0. The
# slide has $G(x)E_i(x)$ without the index: every expert would be multiplied by the whole vector (erratum 37). The package
# has four forms: that sum, the packed form, buffers padded to one size (`moe-pad`), and the fused form that models run, whose
# gradient is derived by hand. They must agree, and the gradient check must pass:

# %%
w_in, w_down = rng.normal(size=(E, 2 * d_ff, d)), rng.normal(size=(E, d, d_ff))
args = [X, gates, routed, Tensor(w_in), Tensor(w_down)]
meaning = experts.moe_output(*args).data
for name, value in {
    "packed": experts.mixture_of_experts(*args).data,
    "padded": experts.padded_experts(*args, C=int(packing.loads.max())).data,
    "fused ": fused_experts(*args).data,
}.items():
    print(name, "agrees with the sum over all experts:", np.allclose(value, meaning, atol=1e-12))
checked = gradcheck(lambda x, p, a, b: fused_experts(x, p, routed, a, b), [X.data, gates.data, w_in, w_down])
print("hand-derived gradient passes:", checked.passed)

# %% [markdown]
# ### Exercise 1: the weights of the chosen
#
# The source writes the divisor as $\sum_{j=1}^{|\mathcal T_k|}P_j$: the first $k$ experts of all (erratum 38). Write what is
# meant, for an array `p` of shape $(N,E)$. Of equal scores take the expert of the lower number.


# %%
def my_topk_gates(p, k):
    """Gates (N, E): the k largest of every row in proportion, zeros elsewhere."""
    ### BEGIN SOLUTION
    order = np.argsort(-p, axis=-1, kind="stable")[:, :k]
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order, np.take_along_axis(p, order, -1), -1)
    return kept / kept.sum(-1, keepdims=True)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: the weights of the chosen
np.testing.assert_allclose(my_topk_gates(P.data, k), gates.data, err_msg="the weights are off")
np.testing.assert_allclose(my_topk_gates(np.array([[0.25, 0.25, 0.25, 0.25]]), 2), [[0.5, 0.5, 0, 0]], err_msg="ties")
print("right")

# %% [markdown]
# Softmax of the kept logits (`keep-topk`, the dropped ones at $-\infty$) gives the same weights. The two papers' recipes are
# one:

# %%
R = Tensor(rng.normal(size=(5, 6)))
print("KeepTopK then softmax = softmax then renormalise:",
      np.allclose(routing.keep_topk(R, 3).data, routing.topk_renormalise(softmax(R), routing.top_k(R, 3)).data))  # fmt: skip

# %% [markdown]
# With **one** expert a token (`switch-top1`) renormalising would make every weight 1, and a weight that is always 1 teaches
# the router nothing. So Switch multiplies by the probability itself. The figure on the slide: "More" goes to one expert,
# "Parameters" to another, each weighted by its gate.

# %%
P2 = Tensor(np.array([[0.1, 0.65, 0.15, 0.1], [0.8, 0.1, 0.05, 0.05]]))
print(routing.switch_top1(P2).data)
r = Tensor(np.array([[1.0, 0.2, -0.3]]), requires_grad=True)
for name, rule in (("times its probability", routing.switch_top1), ("renormalised", lambda p: routing.topk_renormalise(p, routing.top_k(p, 1)))):
    size = np.abs(grad(rule(softmax(r)).sum(), r).data).max()
    print(f"{name}: gradient at the router is {'zero' if size < 1e-12 else 'not zero'}")

# %% [markdown]
# Other routers in a line each: *noisy* top-k adds noise of learnt size while training (`noisy-topk-gating`); *GShard* takes
# two experts and skips a weak second at random (`moe-gshard-top2`); *expert choice* turns the choice round, so that every
# expert takes its favourite tokens (`moe-expert-choice`), which is perfectly balanced but lets a token's experts depend on
# later tokens; *sigmoid* affinities do not compete (`gating-sigmoid`), DeepSeek-V3's choice.
#
# ## 2. When an expert is full
#
# Buffers on an accelerator have a size that must be known before the routing is. The capacity per expert is
# $C_e=\lceil c\,kN/E\rceil$ (`moe-capacity`). The notes print $\lfloor c\,N/E\rfloor$ (erratum 39, `wn-capacity`):

# %%
print("512 tokens, 8 experts, k = 2, c = 1")
print("  as printed:", capacity.capacity(1.0, 512, 8, 2, as_printed=True), "each:", 8 * capacity.capacity(1.0, 512, 8, 2, as_printed=True), "places for 1024 assignments")
print("  with k:    ", capacity.capacity(1.0, 512, 8, 2), "each")
try:
    capacity.capacity(1.0, 3, 8, 2, as_printed=True)
except ValueError as error:
    print("3 tokens:", error)

# %% [markdown]
# What does not fit is dropped (`moe-drop`): its expert contributes nothing, the residual stream passes unchanged. Or it is
# sent to the next-best expert with room (`moe-reroute`). How much is lost depends on how uneven the router is:

# %%
factors = np.linspace(0.5, 2.5, 17)
lost, noise, direction = {}, rng.normal(size=(512, 8)), np.linspace(-1.5, 1.5, 8)
for skew in (0.0, 0.5, 1.0):
    P3 = softmax(Tensor(noise + skew * direction))
    wanted = routing.top_k(P3, 2)
    caps = [capacity.capacity(c, 512, 8, 2) for c in factors]
    lost[skew] = (
        [capacity.drop_rate(wanted, capacity.drop_overflow(wanted, C)) for C in caps],
        [capacity.drop_rate(wanted, capacity.reroute_overflow(P3, wanted, C)) for C in caps],
    )
figure, axes = plt.subplots(figsize=(8, 3.3))
for (skew, (dropped, _)), colour in zip(lost.items(), (BLUE, GREEN, VERMILION), strict=True):
    axes.plot(factors, 100 * np.array(dropped), "-", color=colour, label=f"dropping, skew {skew:g}")
axes.plot(factors, 100 * np.array(lost[1.0][1]), ":", color=PURPLE, label="rerouting, skew 1")
axes.axvline(1, color="#999999", linewidth=1)
axes.set(xlabel="capacity factor c", ylabel="assignments lost, %", title="512 tokens over 8 experts, k = 2")
axes.legend()
plt.show()
at_one = list(factors).index(1.0)
print("lost at c = 1, skew 1: dropping", f"{lost[1.0][0][at_one]:.0%}, rerouting {lost[1.0][1][at_one]:.1%}")

# %% [markdown]
# ### Exercise 2: drop in order
#
# Keep the first `C` tokens of every expert. `wanted` is a boolean array $(N,E)$; return the assignments that are served.
# One line is enough.


# %%
def my_drop(wanted, C):
    """The assignments that find a place, tokens served in order."""
    ### BEGIN SOLUTION
    return wanted & (np.cumsum(wanted, axis=0) <= C)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: drop in order
for C in (1, 7, 64, 999):
    np.testing.assert_array_equal(my_drop(wanted, C), capacity.drop_overflow(wanted, C), err_msg=f"wrong for C = {C}")
print("right")

# %% [markdown]
# ## 3. Keeping everybody busy
#
# An expert that is chosen more is trained more, gets better, and is chosen more. Nothing in the task's loss stops that:
# **routing collapse**, seen in the figures of `moe-collapse-metrics` (largest over mean load, entropy, dead experts).
#
# The classical remedy is a loss (`moe-aux-loss`, added with a small weight, `moe-total-loss`):
# $\mathcal L_{\rm aux}=E\sum_ef_em_e$, with $f_e$ the share of assignments and $m_e$ the mean probability. Only $m_e$ has a
# gradient. The notes divide $N_e$ by $BL$ without the $k$, so that even routing gives $k$, and say that evenness is the
# minimum. It is not (erratum 40, `wn-aux-uniform`):

# %%
for experts_, per_token in ((8, 1), (8, 2), (64, 6)):
    even = np.zeros((experts_, experts_), bool)
    for n in range(experts_):
        even[n, (n * per_token + np.arange(per_token)) % experts_] = True
    flat = Tensor(np.full((experts_, experts_), 1 / experts_))
    values = [float(balance.aux_loss(flat, even, normalise_by_k=by_k).data) for by_k in (True, False)]
    print(f"E = {experts_}, k = {per_token}: even routing gives {values[0]:.3f}, as printed {values[1]:.3f}")
odd = np.array([[0.51, 0.49]] * 60 + [[0.01, 0.99]] * 40)
print("60 tokens at (.51, .49) and 40 at (.01, .99):", round(float(balance.aux_loss(Tensor(odd), routing.top_k(odd, 1)).data), 3))

# %% [markdown]
# Its relatives: the squared variation of summed gates and of smooth loads (`moe-importance-loss`), small router logits
# (`moe-z-loss`), evenness within every sequence (`moe-sequence-balance`).
#
# Such losses pull the router away from what the task wants. DeepSeek's remedy has no loss (`moe-bias-balancing`): a bias
# $b_e$ takes part in the *choice* and never in the *weight*, and after each step $b_e\leftarrow b_e+u\,\mathrm{sign}(\bar N-N_e)$.
#
# ### Exercise 3: the bias
#
# Return the new bias. Experts with too few tokens rise by `u`, those with too many fall by `u`.


# %%
def my_updated_bias(bias, loads, u):
    """The bias after a step."""
    ### BEGIN SOLUTION
    return bias + u * np.sign(loads.mean() - loads)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the bias
np.testing.assert_allclose(my_updated_bias(np.zeros(4), np.array([9.0, 1, 4, 2]), 0.1), [-0.1, 0.1, 0, 0.1], err_msg="direction, size, and 0 at the mean")
s = 1 / (1 + np.exp(-(rng.normal(size=(300, 5)) + np.linspace(-1, 1, 5))))
bias = np.zeros(5)
for _ in range(300):
    bias = my_updated_bias(bias, balance.biased_choice(s, bias, 2).sum(0), 0.003)
assert load_figures.load_figures(balance.biased_choice(s, bias, 2).sum(0)).max_over_mean < 1.1, "the loads do not even out"
print("right")

# %% [markdown]
# ### The experiment
#
# Tokens come from eight clusters of unequal size, and each cluster has a map of its own to learn, so it pays to specialise.
# One layer with eight experts, two for each token, sigmoid router. Three runs from the same start: nothing balances, the loss
# does, the bias does. **Which one has the lowest error in the end? Write down your guess.**

# %%
STEPS = 1500 if LONG else 250
data = np.random.default_rng(11)
CLUSTERS, D = 8, 16
centres = 1.5 * data.normal(size=(CLUSTERS, D))
maps = data.normal(size=(CLUSTERS, D, D)) / np.sqrt(D)
frequency = 1 / np.arange(1, CLUSTERS + 1)
frequency /= frequency.sum()


def tokens(n, rng):
    """Inputs and targets."""
    which = rng.choice(CLUSTERS, size=n, p=frequency)
    x = centres[which] + 0.5 * rng.normal(size=(n, D))
    return x.astype(np.float32), np.tanh(np.einsum("nd,ndf->nf", x, maps[which])).astype(np.float32)


def run(loss_weight, bias_rate):
    """Train one layer; the error and the load figures along the way."""
    moe = MixtureOfExperts(D, 12, 8, 2, np.random.default_rng(5), router="sigmoid", std=0.3, std_out=0.2)
    optimiser, stream, history = AdamW(moe.parameters(), 1e-2, weight_decay=0.0), np.random.default_rng(6), []
    for _ in range(STEPS):
        record = []
        x, y = tokens(256, stream)
        difference = moe(Tensor(x), record) - y
        error = (difference * difference).mean()
        loss = balance.moe_total_loss(error, record[0].aux_loss, loss_weight)
        optimiser.step([loss_and_gradients(loss, moe.parameters())[1]], 1.0)
        if bias_rate:
            moe.update_bias(record[0].loads, bias_rate)
        history.append((float(error.data), *load_figures.load_figures(record[0].loads)))
    return np.array(history)


runs = {"nothing": run(0.0, 0.0), "loss 0.1": run(0.1, 0.0), "bias 0.005": run(0.0, 0.005)}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.3))
smooth = np.ones(15) / 15
for (name, history), colour in zip(runs.items(), (VERMILION, ORANGE, BLUE), strict=True):
    left.plot(np.convolve(history[:, 1], smooth, "valid"), color=colour, label=name)
    right.semilogy(np.convolve(history[:, 0], smooth, "valid"), color=colour, label=name)
left.axhline(1, color="#999999", linewidth=1)
left.set(title="largest over mean load (1 is even)", xlabel="step", ylim=(0.9, None))
ticks = (0.02, 0.05, 0.1, 0.2, 0.5)
right.set(title="error of the task", xlabel="step", yticks=ticks, yticklabels=[f"{t:g}" for t in ticks])
right.minorticks_off()
left.legend(title="balanced by")
plt.show()
final = {name: history[-50:].mean(0) for name, history in runs.items()}
print("without balancing the busiest expert has over 1.4 times its share:", bool(final["nothing"][1] > 1.4))
print("loss and bias bring the loads closer together:", all(f[1] < final["nothing"][1] - 0.1 for n, f in final.items() if n != "nothing"))
print("lowest error to highest:", ", ".join(sorted(final, key=lambda name: final[name][0])))

# %% [markdown]
# Read both panels. Balance is not the aim; it is the price of running in parallel, and a help where experts would otherwise
# die. Here no expert dies, and the clusters themselves are uneven: forcing evenness splits the large ones and makes small ones
# share an expert. So the run that nobody balanced has the lowest error, and balancing costs: the bias less than the loss, at
# the same evenness. That is one small task and one setting; change `frequency` to equal clusters and look again.
#
# ## 4. More and smaller experts, and shared ones
#
# Cut each of $E$ experts into $m$ and visit $mk$ (`moe-fine-grained`). "Nothing else changes", says the slide; but each
# expert gets narrower *and* $k$ grows, or the active compute would fall by $m$ (erratum 41). What it buys is combinations
# (`wn-moe-combinations`). Then make one expert *shared*, visited by all (`moe-shared-experts`). The slide has $2N$ routed and
# one shared, which is one too many (erratum 42, `wn-moe-segmentation`).

# %%
N_experts = 16
coarse = Arrangement(E=N_experts, k=2, d_ff=1024)
fine = load_figures.fine_grained(coarse, 4)
halves = load_figures.fine_grained(coarse, 2)
shared = load_figures.with_shared(halves, 1)
slide = Arrangement(2 * N_experts, 4, 512, 1)
for name, a in (("coarse", coarse), ("in four", fine), ("in two, one shared", shared), ("the slide", slide)):
    count = load_figures.moe_parameters(a, 512)  # `moe-params-active`
    budget = load_figures.budget_ratio(a, coarse)
    print(f"{name:19s} {a.K_s} + {a.E:2d} experts, {a.k} routed, width {a.d_ff:4d}: {a.combinations:13,d} combinations, budget {budget}, active {count.active / count.total:.1%}")

# %% [markdown]
# ## 5. Looking further ahead
#
# A model trained on the next token alone learns what comes next. Two ways to ask for more:
#
# - **Heads side by side** (`mtp-parallel-heads`): head $i$ reads $\mathbf h_t$ and predicts $x_{t+i}$, without knowing what
#   comes in between.
# - **Modules in a chain** (`mtp-sequential-module`, DeepSeek-V3): module $i$ reads $\mathbf h^{i-1}_t$ *and the embedding of
#   $x_{t+i}$*, and predicts $x_{t+i+1}$.
#
# The loss is $\mathcal L_{\rm main}+\frac\lambda D\sum_i\mathcal L^i$ (`mtp-loss`), with the targets shifted further at
# each depth:

# %%
show(SequentialPrediction.losses)

# %% [markdown]
# ### Exercise 4: whose target is it?
#
# `ids` is a text of $L+1$ tokens. For a chain, return the pairs `(inputs, targets)` of module `i`: the tokens whose
# embeddings it reads at its positions, and the tokens it has to predict there. (Position $t$ reads $x_{t+i}$ and predicts
# $x_{t+i+1}$; all positions that have both exist.)


# %%
def my_pairs(ids, i):
    """Tokens read and tokens predicted by module i, two arrays of one length."""
    ### BEGIN SOLUTION
    return ids[i:-1], ids[i + 1 :]
    ### END SOLUTION


# %% tags=["check"]
# Exercise 4: whose target is it?
text = np.arange(10)
for i in (1, 2, 3):
    read, predicted = my_pairs(text, i)
    assert len(read) == len(predicted) == 9 - i, f"module {i} has {9 - i} positions"
    assert read[0] == i and (predicted == read + 1).all() and predicted[-1] == 9, f"module {i} is shifted"
print("right")

# %% [markdown]
# ### The experiment
#
# A toy language: twelve words, each with a first letter of its own, the other letters at random, written without spaces. A word's
# first letter cannot be foreseen; the rest can. **Guess: at depth 2, are proposals of the heads or of the chain accepted more
# often?** The probability that a token drawn from $q$ is accepted is $\sum_x\min(p,q)$ (`speculative-decoding`).

# %%
letters = np.random.default_rng(2)
V, WORDS = 24, 12
words = [np.concatenate([[w], letters.integers(WORDS, V, size=letters.integers(2, 5))]) for w in range(WORDS)]


def sentences(B, L, rng):
    """Texts of L letters that begin with a word."""
    rows = [np.concatenate([words[w] for w in rng.integers(WORDS, size=L)])[:L] for _ in range(B)]
    return np.array(rows)


def train(kind, steps, reach=2):
    """A trunk and what looks ahead, trained together; the losses along the way."""
    rng = np.random.default_rng(0)
    trunk = Decoder(Config(V, 48, 1, 4, context=64, init_std=0.15), rng)
    model = SequentialPrediction(trunk, reach, rng) if kind == "chain" else ParallelPrediction(trunk, reach + 1, rng)
    parameters, history, stream = model.parameters(), [], np.random.default_rng(1)
    optimiser = AdamW(parameters, 5e-3, weight_decay=0.0)
    for _ in range(steps):
        losses = model.losses(sentences(8, 33, stream))
        optimiser.step([loss_and_gradients(losses.total(0.5), parameters)[1]], 1.0)
        history.append([float(losses.main.data), *losses.depths.data])
    return model, np.array(history)


TRAINING = 800 if LONG else 120
trained = {kind: train(kind, TRAINING) for kind in ("chain", "heads")}


# %%
def acceptance(model, drafter, n_texts=40):
    """The mean probability of acceptance of the first and the second proposal, on fresh text."""
    rng, rates = np.random.default_rng(7), []
    for text in sentences(n_texts, 24, rng):
        T = int(rng.integers(12, 22))
        drafter.begin(text)
        with no_grad():
            draft = drafter.propose(text[:T], model.trunk.hidden(text[None, : T - 1]).data[0], 2, rng)
            written = np.append(text[:T], draft.tokens)[None]
            p = softmax(model.trunk(written)).data[0, T - 1 : -1]
        rates.append(acceptance_rate(p.astype(np.float64), draft.laws))
    return np.mean(rates, 0)


drafters = {kind: (SequentialDrafter if kind == "chain" else ParallelDrafter)(trained[kind][0]) for kind in trained}
rates = {kind: acceptance(trained[kind][0], drafters[kind]) for kind in trained}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.3), width_ratios=(1.6, 1))
for i, name in enumerate(("next token", "depth 1", "depth 2")):
    for kind, style in (("chain", "-"), ("heads", ":")):
        curve = np.convolve(trained[kind][1][:, i], np.ones(8) / 8, "valid")
        left.plot(curve, style, color=(BLUE, GREEN, VERMILION)[i], label=f"{name}, {kind}")
left.set(title="losses in nats", xlabel="step", ylim=(0, None))
left.legend(ncols=3, fontsize=8, loc="upper right")
for kind, shift, colour in (("chain", -0.18, BLUE), ("heads", 0.18, ORANGE)):
    right.bar(np.arange(2) + shift, rates[kind], width=0.34, color=colour, label=kind)
right.set(title="probability of acceptance", xticks=[0, 1], xticklabels=["1st proposal", "2nd proposal"], ylim=(0, 1.2), yticks=np.arange(0, 1.1, 0.2))
right.legend(ncols=2, loc="upper center")
plt.show()
print("every loss fell:", all(bool((h[-10:].mean(0) < h[:5].mean(0) - 0.5).all()) for _, h in trained.values()))
print("the second proposal of the chain is accepted more often:", bool(rates["chain"][1] > rates["heads"][1] + 0.05))

# %% [markdown]
# The chain *knows what it proposed first*. Where a word ends, the heads can only spread their second proposal over the second
# letters of all twelve words; the chain reads the first letter it has just drawn and completes the word.
#
# Whatever is proposed, what comes out is the trunk's own law. At temperature 0 that can be seen token by token:

# %%
greedy = Law(temperature=0.0)
prompts = sentences(2, 6, np.random.default_rng(8))
for kind, (model, _) in trained.items():
    drafter = (SequentialDrafter if kind == "chain" else ParallelDrafter)(model, greedy)
    plain = generate(model.trunk, prompts, 30, np.random.default_rng(0), temperature=0.0)
    fast = speculative_generate(model.trunk, drafter, prompts, 30, np.random.default_rng(0), count=2, law=greedy)
    same = np.array_equal(plain.tokens, fast.generation.tokens)
    print(f"{kind}: the same 30 tokens: {same}; in fewer than 30 passes: {bool(fast.passes.max() < 30)}")

# %% [markdown]
# ## What to take along
#
# 1. A layer of experts is a sort, dense products, and a sort back. Test it by conservation: weights sum to 1, nothing is lost.
# 2. Parameters and compute come apart: all experts are stored, $k$ are run. Capacity, not compute, decides what is dropped.
# 3. Nothing in the task's loss keeps experts busy. A loss does it against the task, a bias beside it.
# 4. Looking ahead trains more per token, and what it learns can propose. Proposals that know one another are accepted more.
