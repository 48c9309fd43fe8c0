# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 04 · Probability and information
#
# A language model is a probability law over texts. Everything that trains one is a statement about such laws: how surprised it is, how
# far it has moved from another, what a mean is worth that was taken over a handful of samples. This lesson is the grammar of all later
# ones, on laws so small that every claim can be checked by listing all outcomes.
#
# Equations: `chain-rule-sequence`, `likelihood`, `nll`, `expectation-mc`, `entropy`, `cross-entropy`, `cross-entropy-logits`,
# `kl-divergence`, `kl-forward-reverse`, `kl-chain-rule`, `kl-token-exact`, `kl-estimator-k1`, `kl-estimator-k2`, `kl-estimator-k3`,
# `kl-estimator-is`, `kl-estimator-k3-inverted`, `chi2-divergence`, `kl-bernoulli-gaussian`, `perplexity`, `mle-equals-min-kl`,
# `map-bayes`, `label-smoothing`, `softmax-temperature-limit`, `variance-second-moment`, `importance-sampling`, `self-normalised-is`,
# `score-function-zero-mean`, `sampling-algorithms`, `donsker-varadhan`. Figure of the sources: `wn-donsker-varadhan`.
#
# After it you can
# - turn a loss into bits, a perplexity, and a statement about compression,
# - choose between the two directions of the KL divergence, and predict what each choice does to a model that is too simple,
# - say which KL estimator to put into a reward, which into a loss, and prove it by enumeration.

# %%
import inspect
import itertools
import os

import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional import information as info
from minillm.functional import kl_estimators as kl
from minillm.functional import likelihood as lik
from minillm.functional import monte_carlo as mc
from minillm.functional import variational
from minillm.functional.softmax import log_softmax, softmax
from minillm.fused.losses import cross_entropy
from minillm.plotting import BLUE, VERMILION, use_style

use_style()
LONG = os.environ.get("LESSON_LONG") == "1"  # ten times the samples
SAMPLES = 200_000 if LONG else 20_000
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. A law over texts, word by word
#
# $p_\theta(\mathbf x)=\prod_tp_\theta(x_t\mid x_{<t})$. For three words and texts of three tokens there are 27 texts, and we can list them.
# Here is a tiny "model": a table of next-word laws for the first word, and for every pair of words after it.

# %%
V, L = 3, 3
first = rng.dirichlet(np.ones(V))
after = rng.dirichlet(np.ones(V), size=(V, V))  # after[previous but one, previous]: law of the next word


def token_logprobs(text):
    """log p of each token given those before it."""
    previous = [0, 0]
    logs = []
    for i, word in enumerate(text):
        law = first if i == 0 else after[previous[-2], previous[-1]]
        logs.append(np.log(law[word]))
        previous.append(word)
    return logs


texts = list(itertools.product(range(V), repeat=L))
logs = np.array([token_logprobs(text) for text in texts])  # (27, 3)
p = np.exp(lik.sequence_logprob(Tensor(logs), np.ones_like(logs, bool)).data)
print(f"the probabilities of all {len(texts)} texts add up to {p.sum():.12f}")

# %% [markdown]
# ## 2. Surprise, and what it is measured in
#
# $-\log p$ is a text's surprise; its mean is the **entropy** when the texts come from the law itself, and the **cross-entropy** when they
# come from another. The difference is what it costs to believe in the wrong law: the **KL divergence**.

# %%
q = rng.dirichlet(np.ones(27))  # somebody else's law
P, Q = Tensor(p), Tensor(q)
H, HX, D = info.entropy(P).item(), info.cross_entropy_between(P, Q).item(), info.kl_divergence(P, Q).item()
print(f"entropy {H:.4f}, cross-entropy {HX:.4f}, KL {D:.4f} nats;  entropy + KL = {H + D:.4f}")
per_token = H / L
print(f"per token {per_token:.4f} nats = {lik.bits_per_token(Tensor(np.array(per_token))).item():.4f} bits = perplexity {lik.perplexity(Tensor(np.array(per_token))).item():.3f} (of at most {V})")
print("gradient check of the KL divergence:", gradcheck(info.kl_divergence, [rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))]).passed)

# %% [markdown]
# The loss that models train on is the cross-entropy with the text as the other law: $-\mathbf o_t[x_{t+1}]+\mathrm{LSE}(\mathbf o_t)$.
# Maximum likelihood is minimising the forward KL to the data, for the two differ by the entropy of the data, a constant:

# %%
counts = np.array([5, 3, 2])
data = np.repeat(np.arange(3), counts)
data_law = Tensor(lik.empirical_distribution(data, 3))
for z in (np.zeros(3), np.array([0.5, 0.0, -0.4]), np.log(counts)):
    nll = cross_entropy(Tensor(np.tile(z, (10, 1)).astype(np.float32)), data).item()
    gap = nll - info.kl_divergence(data_law, softmax(Tensor(z))).item()
    print(f"logits {np.round(z, 2)}: loss {nll:.4f}, loss - KL(data, model) = {gap:.4f}")
print(f"entropy of the data: {info.entropy(data_law).item():.4f}")

# %% [markdown]
# With few data one adds what is known beforehand. A Dirichlet prior adds imagined counts to the real ones; label smoothing does the same
# to every single target:

# %%
posterior = lik.dirichlet_posterior(counts, 1.0)
print("counts", counts, " likelihood", data_law.data, " with one imagined count each", np.round(posterior.mean, 3))
print("smoothed target for word 0:", lik.smoothed_targets(np.array([0]), 3, 0.1)[0].round(4))

# %% [markdown]
# ### Exercise 1: temperature
#
# Return the law $p^{(T)}\propto e^{z/T}$ for an array of logits, without overflow for any $T>0$. What does it become for very small and
# very large $T$?


# %%
def tempered(z, T):
    """softmax(z / T)."""
    ### BEGIN SOLUTION
    e = np.exp((z - z.max()) / T)
    return e / e.sum()
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: temperature
z = np.array([1000.0, 1001.0, 999.0])
np.testing.assert_allclose(tempered(z, 1.0), softmax(Tensor(z)).data, rtol=1e-9, err_msg="T = 1 is softmax")
np.testing.assert_allclose(tempered(z, 1e-3), [0, 1, 0], atol=1e-12, err_msg="a small T picks the largest")
np.testing.assert_allclose(tempered(z, 1e9), np.full(3, 1 / 3), rtol=1e-6, err_msg="a large T forgets the logits")
entropies = [info.entropy(Tensor(tempered(z, T))).item() for T in (0.3, 1, 3, 10)]
assert np.all(np.diff(entropies) > 0), "the entropy grows with T"
print("right")

# %% [markdown]
# ## 3. Two directions
#
# $D_{\rm KL}(P\Vert Q)$ is an average under $P$: it punishes $Q$ for being small where $P$ is not. Fit a single bump to a law with two bumps, in
# either direction. One will stretch over both, one will choose. Which is which? (The sources swap the names in places, erratum 4; here
# the direction is always an argument.)

# %%
grid = np.linspace(-5, 5, 81)
two = np.exp(-((grid - 2.2) ** 2) / 0.7) + 0.8 * np.exp(-((grid + 2.2) ** 2) / 0.7)
two /= two.sum()


def fit_from(direction, mean, spread, steps=400):
    """Walk downhill from a start: loss, mean, spread and the law on the grid."""
    mean, log_s = Tensor(np.array(mean), requires_grad=True), Tensor(np.log(np.array(spread)), requires_grad=True)
    for _ in range(steps):
        bump = softmax((Tensor(grid) - mean) ** 2 * (log_s * -2.0).exp() * -0.5)
        loss = info.kl_directional(bump, Tensor(two), direction=direction)
        for parameter, gradient in zip((mean, log_s), grad([loss], [mean, log_s])):
            parameter.data -= 0.05 * gradient.data
    return loss.item(), mean.item(), np.exp(log_s.item()), bump.data


def fit(direction):
    """The best end of four starts: wide or narrow, left or right."""
    return min((fit_from(direction, m, s) for m in (-1.0, 1.0) for s in (0.7, 2.0)), key=lambda end: end[0])[1:]


figure, axes = plt.subplots(figsize=(8, 3))
axes.fill_between(grid, two, color="#cccccc", label="two bumps")
for direction, colour in (("forward", BLUE), ("reverse", VERMILION)):
    mean, spread, bump = fit(direction)
    axes.plot(grid, bump, color=colour, label=f"{direction}: mean {mean:.1f}, spread {spread:.1f}")
    print(f"{direction}: {'covers both' if spread > 1.2 else 'chooses one'}")
axes.set(title="One bump fitted to two, by either direction of the KL divergence", yticks=[])
axes.set(xlabel="x", ylabel="probability")
axes.legend()
plt.show()

# %% [markdown]
# Imitation (maximum likelihood) is the forward direction: it covers. Reinforcement with a KL penalty is the reverse one: it seeks a mode.
#
# ## 4. What a mean over samples is worth
#
# A sum over all texts is out of reach, so means are estimated: $\frac1n\sum f(x_i)$. Never report one without its **standard error**,
# $s/\sqrt n$. Here: the mean of $-\log q$ under $p$ by plain sampling, and by samples from another law with importance weights.

# %%
f = -np.log(q)
exact = mc.expectation(p, f)
proposal = np.full(27, 1 / 27)
figure, axes = plt.subplots(figsize=(8, 3))
sizes = np.array([30, 100, 300, 1000, 3000, 10_000])
for name, colour in (("from p", BLUE), ("from a uniform law, weighted", VERMILION)):
    estimates = []
    for n in sizes:
        if name == "from p":
            estimates.append(mc.expectation_mc(f[mc.sample_inverse_cdf(p, n, rng)]))
        else:
            i = rng.integers(27, size=n)
            estimates.append(mc.importance_sampling(f[i], np.log(p[i]), np.log(proposal[i])))
    axes.errorbar(sizes * (1.06 if name != "from p" else 1), [e.value for e in estimates], yerr=[2 * e.standard_error for e in estimates], fmt="o", color=colour, capsize=3, label=name)
axes.axhline(exact, color="black", linewidth=1)
axes.set(xscale="log", xlabel="samples", ylabel="estimate, two standard errors", title="An error bar tells how far the truth may be")
axes.legend()
plt.show()
hits = [abs(e.value - exact) < 2 * e.standard_error for e in (mc.expectation_mc(f[mc.sample_inverse_cdf(p, 400, np.random.default_rng(s))]) for s in range(400))]
print(f"the truth lies within two standard errors in {100 * np.mean(hits):.0f} of 100 runs")

# %% [markdown]
# Samples themselves come from uniform numbers: by the inverse of the distribution function, by adding Gumbel noise to logits and taking
# the largest, by rejection, or by a Markov chain that forgets where it began.

# %%
logits = np.log(first)
for name, drawn in (
    ("inverse CDF", mc.sample_inverse_cdf(first, SAMPLES, rng)),
    ("Gumbel-max", mc.sample_gumbel_max(logits, SAMPLES, rng)),
):
    shares = np.bincount(drawn, minlength=3) / SAMPLES
    print(f"{name:<12} shares within 0.015 of the law:", bool(np.abs(shares - first).max() < 0.015))

# %% [markdown]
# ## 5. Estimating a KL divergence from samples
#
# With $y\sim\pi_\theta$ and the log-ratio $r=\log\pi_\theta(y)-\log\pi_{\rm ref}(y)$, three estimators are in use: $k_1=r$, $k_2=\frac12r^2$ and
# $k_3=e^{-r}-1+r$. Their code, and their value and spread on all three actions of a tiny policy:

# %%
print(inspect.getsource(kl.kl_estimator_k3).split('"""')[2].strip())
z_policy, z_reference = np.array([0.8, 0.1, -0.6]), np.array([0.0, 0.5, 0.2])
pi, ref = softmax(Tensor(z_policy)).data, softmax(Tensor(z_reference)).data
reverse, forward = info.kl_divergence(Tensor(pi), Tensor(ref)).item(), info.kl_divergence(Tensor(ref), Tensor(pi)).item()
estimators = {"k1": kl.kl_estimator_k1, "k2": kl.kl_estimator_k2, "k3": kl.kl_estimator_k3, "k3 inverted": kl.kl_estimator_k3_inverted}
values = {name: e(Tensor(np.log(pi)), np.log(ref)).data for name, e in estimators.items()}
print(f"KL(policy, reference) = {reverse:.4f}")
for name, value in values.items():
    mean = pi @ value
    print(f"{name:<12} mean {mean:.4f}, standard deviation {np.sqrt(pi @ (value - mean) ** 2):.4f}, smallest {value.min():+.4f}")

# %% [markdown]
# $k_1$ and $k_3$ are unbiased; $k_3$ is never negative and varies less. The inverted form, which a slide shows, estimates something else:
# $\chi^2-D_{\rm KL}$ (erratum 6). So far the *values*. In a loss, what counts is the **gradient** of the sampled estimator. Enumerate it:

# %%
def mean_gradient(estimator):
    """The gradient that sampling y from the policy and differentiating the estimator gives on average."""
    total = np.zeros(3)
    for y in range(3):
        z = Tensor(z_policy, requires_grad=True)
        value = estimator(log_softmax(z)[y : y + 1], np.log(ref)[y : y + 1])
        total += pi[y] * grad([value], [z], [np.ones(1)])[0].data
    return total


def exact_gradient(direction):
    """The gradient of the divergence itself."""
    z = Tensor(z_policy, requires_grad=True)
    first, second = (softmax(z), Tensor(ref)) if direction == "reverse" else (Tensor(ref), softmax(z))
    return grad([info.kl_divergence(first, second)], [z])[0].data


print("gradient of the reverse KL:", exact_gradient("reverse").round(4))
print("gradient of the forward KL:", exact_gradient("forward").round(4))
for name in ("k1", "k2", "k3"):
    print(f"mean gradient of {name}:      ", mean_gradient(estimators[name]).round(4) + 0.0)

# %% [markdown]
# Read the last lines twice. $k_1$ in a loss has no gradient on average: it is pure noise (the score has mean zero). $k_2$, whose *value* is
# biased, has the gradient of the reverse divergence. $k_3$, whose value estimates the reverse one, pulls along the gradient of the
# *forward* one (erratum 5). In a reward, which is not differentiated, the value counts and $k_1$ or $k_3$ is right.
#
# ### Exercise 2: why the score has mean zero
#
# Return the matrix whose row $a$ is $\nabla_z\log\pi(a)$ for a softmax law with logits $z$, and check that its mean under $\pi$ is 0.


# %%
def scores(z):
    """Row a: the gradient of log softmax(z)[a] for z."""
    ### BEGIN SOLUTION
    law = np.exp(z - z.max())
    law /= law.sum()
    return np.eye(len(z)) - law
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: why the score has mean zero
S = scores(z_policy)
for a in range(3):
    t = Tensor(z_policy, requires_grad=True)
    np.testing.assert_allclose(S[a], grad([log_softmax(t)[a : a + 1]], [t], [np.ones(1)])[0].data, atol=1e-12, err_msg="one-hot minus the law")
assert np.abs(pi @ S).max() < 1e-12, "its mean under the policy is 0"
print("right")

# %% [markdown]
# ## 6. The best law at a price
#
# What law earns most, if leaving a reference costs $\beta$ per nat? The reference tilted by $e^{r/\beta}$; and what it earns is
# $\beta\log\mathbb E_{\rm ref}e^{r/\beta}$. On the example of the notes, both are 0.459468. All of alignment is in this line.

# %%
reference, reward, beta = np.array([0.2, 0.3, 0.5]), np.array([1.0, -1.0, 0.5]), 0.7
best = reference * np.exp(reward / beta)
best /= best.sum()
achieved = variational.regularised_reward_objective(*map(Tensor, (best, reward, reference)), beta).item()
bound = variational.donsker_varadhan(Tensor(reward), Tensor(reference), beta).item()
print(f"achieved by the tilted law {achieved:.8f}, the bound {bound:.8f}")
others = [variational.regularised_reward_objective(Tensor(law), Tensor(reward), Tensor(reference), beta).item() for law in rng.dirichlet(np.ones(3), 2000)]
print("no law of 2000 random ones does better:", max(others) < bound)

# %% [markdown]
# ### Exercise 3: the chain rule of the KL divergence
#
# For two models of texts, the divergence of whole texts is the expected sum of the divergences of the next-word laws. Return it for the
# model of section 1 (`first`, `after`) and another (`first_2`, `after_2`), without listing texts longer than needed: for texts of **two**
# words.


# %%
first_2, after_2 = rng.dirichlet(np.ones(V)), rng.dirichlet(np.ones(V), size=(V, V))


def kl_of_two_words(first, after, first_2, after_2):
    """KL of the laws of (x_1, x_2); the second word's law after x_1 is after[0, x_1]."""
    ### BEGIN SOLUTION
    total = np.sum(first * np.log(first / first_2))
    for x in range(len(first)):
        total += first[x] * np.sum(after[0, x] * np.log(after[0, x] / after_2[0, x]))
    return total
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: the chain rule of the KL divergence
joint, joint_2 = ((a[:, None] * b[0]).reshape(-1) for a, b in ((first, after), (first_2, after_2)))
wanted = info.kl_divergence(Tensor(joint), Tensor(joint_2)).item()
assert abs(kl_of_two_words(first, after, first_2, after_2) - wanted) < 1e-12, "first word, plus the mean over it of the second"
print("right")

# %% [markdown]
# ## What to take along
#
# - Loss, bits, perplexity: one number in three coats. The loss is the entropy of the data plus what the model gets wrong.
# - Forward KL covers, reverse KL chooses. Say the direction every time.
# - A mean without its standard error is a rumour.
# - The value of an estimator and its gradient are two things: $k_1$ for rewards, $k_2$ for a reverse-KL loss, and know what $k_3$ does.
#
# Next: lesson 05, from ids to vectors and back.
