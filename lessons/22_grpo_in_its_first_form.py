# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 22 · GRPO in its first form
#
# The same network, the same engine, the same optimiser. Only the question changes: not "which word came next in the
# book?" but "was the answer right?". This lesson takes a small transformer that *knows* how to add but answers
# carelessly, and teaches it by reward alone.
#
# Equations: `verifiable-dataset`, `group-baseline`, `grpo-advantage-mean`, `grpo-advantage-std`, `importance-ratio`,
# `ppo-clip`, `grpo-clip`, `grpo-loss`, `grpo-zero-variance`, `kl-estimator-k1`, `kl-estimator-k2`, `kl-estimator-k3`,
# `log-derivative-trick`, `entropy`.
#
# After it you can
# - write the GRPO update in fifteen lines and say what each of them is for,
# - explain why a group replaces the critic of PPO, and when a group teaches nothing,
# - tell three estimators of the KL divergence apart by their gradients.

# %%
import matplotlib.pyplot as plt
import numpy as np

from minillm.autograd import Tensor, grad, no_grad
from minillm.autograd import primitives as ops
from minillm.data.tasks import AdditionTask
from minillm.decoding import generate
from minillm.functional.advantages import dead_groups, grpo_advantage_std
from minillm.functional.clipping import clip_term
from minillm.functional.information import entropy_from_logits
from minillm.functional.policy_losses import grpo_loss
from minillm.functional.softmax import log_softmax, softmax
from minillm.fused.losses import cross_entropy
from minillm.fused.softmax import token_logprobs
from minillm.models import Config, Decoder
from minillm.optim import AdamW
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, VERMILION, use_style
from minillm.training.step import BatchThreads

use_style()

# %% [markdown]
# ## 1. What changes, and what does not
#
# | | likelihood | GRPO |
# |---|---|---|
# | network | a transformer $p_\theta$ | the same, now called a policy $\pi_\theta$ |
# | data | a fixed text | what the policy itself says |
# | signal | the right next token, everywhere | one number per answer |
# | objective | $\min_\theta-\sum\log p_\theta(x_t\mid x_{<t})$ | $\max_\theta\ \mathbb E_{y\sim\pi_\theta}[A(y)]$, kept near the old policy |
#
# The task is the sum of two two-digit numbers, answered units first so that every carry is known when it is needed. A
# program can check an answer, so no human and no reward model is required.

# %%
task = AdditionTask(digits=2)
problem = np.array([[12, 19]])
print("prompt:", task.tokenizer.decode(task.prompt_ids(problem)[0]), " right answer:", task.answer_ids(problem)[0])
attempts = np.array([[1, 3, 0, task.eos_id], [1, 2, 0, task.eos_id], [1, 3, 0, 0]])
print("rewards of 130<eos>, 120<eos>, 1300:", task.verify(problem.repeat(3, axis=0), attempts))

# %% [markdown]
# ## 2. A careless student
#
# First we imitate a bad teacher: 60 % of the demonstrations carry one wrong digit. Likelihood training reproduces what it
# sees, mistakes included. Asked for its *most likely* answer the student is nearly always right; asked to *sample*, it
# makes the teacher's mistakes. The knowledge is there; the behaviour is not.

# %%
SFT_STEPS, UPDATES, PROMPTS, GROUP = 500, 60, 16, 8


def accuracy(model, rng, n=500, **how):
    """Share of held-out problems answered right."""
    problems = task.problems(rng, n, "held_out")
    answers = generate(model, task.prompt_ids(problems), task.answer_length, rng, eos_id=task.eos_id, **how)
    return float(task.verify(problems, answers.tokens).mean())


def imitate(seed):
    """Likelihood training on the bad teacher's demonstrations."""
    rng = np.random.default_rng(seed)
    config = Config(task.vocab_size, d_model=64, n_layers=2, n_heads=4, context=12, init_std=0.1)
    model = Decoder(config, rng)
    optimiser = AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)

    def loss_of_share(inputs, targets):
        return cross_entropy(model(inputs), targets, divisor=kept)

    with BatchThreads(2).running() as threads:
        for step in range(SFT_STEPS):
            optimiser.lr = 4e-3 * min(1, step / 50, 2 * (1 - step / SFT_STEPS))
            batch = task.demonstrations(rng, 128, noise=0.6).batch()
            kept = int((batch.targets >= 0).sum())
            _, gradients = threads.gradients(loss_of_share, model.parameters(), batch.inputs, batch.targets)
            optimiser.step(gradients, max_norm=1.0)
    return model


student = imitate(seed=0)
start = {name: array.copy() for name, array in student.state_dict().items()}
sampled = accuracy(student, np.random.default_rng(1))
greedy = accuracy(student, np.random.default_rng(1), temperature=0.0)
print("greedy accuracy above 0.7:", greedy > 0.7)
print("sampled accuracy below 0.6:", sampled < 0.6)

# %% [markdown]
# ## 3. A group is its own yardstick
#
# For one prompt, draw $G$ answers and reward each. How good is an answer? Better than what the policy usually does
# *here*: compare it with the group's mean $b=\frac1G\sum_jr_j$,
#
# $$A_i=\frac{r_i-b}{\mathrm{std}(\mathbf r)+\varepsilon_0}.$$
#
# PPO trains a second network to predict $b$. GRPO asks the policy a few more times instead.

# %%
rng = np.random.default_rng(5)
problems = task.problems(rng, 6)
answers = generate(student, task.prompt_ids(problems), task.answer_length, rng, eos_id=task.eos_id, copies=GROUP)
rewards = task.verify(problems.repeat(GROUP, axis=0), answers.tokens).reshape(6, GROUP)
advantages = grpo_advantage_std(rewards)

figure, axes = plt.subplots(figsize=(8, 3.4))
image = axes.imshow(advantages, cmap="PuOr", vmin=-2.6, vmax=2.6, aspect="auto")
for row in range(6):
    for column in range(GROUP):
        said = "".join(str(t) for t in answers.tokens.reshape(6, GROUP, -1)[row, column][:3][::-1])
        axes.text(
            column,
            row,
            said,
            ha="center",
            va="center",
            fontsize=10,
            color="white" if advantages[row, column] > 1.8 else "black",
        )
axes.set(
    xticks=range(GROUP),
    yticks=range(6),
    xlabel="answer in the group",
    title="Six groups: what was said, coloured by its advantage",
)
axes.set_yticklabels([f"{a} + {b}" for a, b in problems])
axes.grid(False)
figure.colorbar(image, label="advantage")
plt.show()
print("advantages of a group sum to zero:", np.allclose(advantages.sum(-1), 0))

# %% [markdown]
# ### Exercise 1: advantages, and groups that teach nothing
#
# Write the standardised advantage for rewards of shape `(P, G)` (population standard deviation). What happens to a group
# whose answers are all right, or all wrong? Such *dead* groups give no gradient; for 0/1 rewards and a success rate $p$
# their expected share is $p^G+(1-p)^G$. Return both.


# %%
def my_advantages(rewards, eps=1e-6):
    """(P, G) rewards -> (P, G) advantages."""
    ### BEGIN SOLUTION
    centred = rewards - rewards.mean(-1, keepdims=True)
    return centred / (rewards.std(-1, keepdims=True) + eps)
    ### END SOLUTION


def expected_dead(p, G):
    """Expected share of groups without a gradient."""
    ### BEGIN SOLUTION
    return p**G + (1 - p) ** G
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: advantages, and groups that teach nothing
np.testing.assert_allclose(my_advantages(rewards), grpo_advantage_std(rewards), atol=1e-6)
assert not my_advantages(np.ones((1, 4))).any(), "a group of equal rewards has advantage 0, not NaN"
draws = np.random.default_rng(0).random((200_000, 4)) < 0.7
assert abs(dead_groups(draws).mean() - expected_dead(0.7, 4)) < 0.005, "compare with 200,000 simulated groups"
print("right: with p = 0.7 and G = 4, a share of", round(float(expected_dead(0.7, 4)), 3), "is dead")

# %% [markdown]
# ## 4. From advantages to a gradient
#
# We cannot differentiate the reward: a sampled answer is a discrete thing. But we can differentiate its probability,
# $\nabla\pi=\pi\,\nabla\log\pi$, so
#
# $$\nabla\,\mathbb E_{y\sim\pi_\theta}[r(y)]=\mathbb E_{y\sim\pi_\theta}\big[r(y)\,\nabla\log\pi_\theta(y)\big].$$
#
# On a vocabulary of three words both sides can be computed exactly. No sampling, no excuse:

# %%
logits = Tensor(np.array([0.2, -0.4, 1.0]), requires_grad=True)
reward = np.array([1.0, 0.0, 0.3])
left = grad((softmax(logits) * reward).sum(), logits).data
right = sum(softmax(logits).data[y] * reward[y] * grad(log_softmax(logits)[y], logits).data for y in range(3))
print("both sides:", np.round(left, 6), np.round(right, 6))

# %% [markdown]
# In practice one batch of answers is used for more than one step. After the first, the policy is no longer the one that
# sampled. The ratio $\rho_t=\pi_\theta(y_t)/\pi_{\rm old}(y_t)$ corrects for that, and the clip takes the incentive away to move
# further than $1\pm\varepsilon$ on the strength of old data: maximise $\min(\rho A,\ \mathrm{clip}(\rho,1-\varepsilon,1+\varepsilon)A)$.

# %%
rho = np.linspace(0.4, 1.8, 300)
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2))
for panel, A in zip(axes, (1.0, -1.0), strict=True):
    ratio = Tensor(rho, requires_grad=True)
    term = clip_term(ratio, np.full(300, A))
    slope = grad(term.sum(), ratio).data
    panel.plot(rho, rho * A, color="#999999", linestyle=":", label="unclipped")
    panel.plot(rho, term.data, color=BLUE, label="clipped")
    dead = rho[slope == 0]
    panel.axvspan(dead.min(), dead.max(), color=ORANGE, alpha=0.25, linewidth=0, label="no gradient")
    panel.set(xlabel=r"ratio $\rho$", title=f"advantage {A:+.0f}")
axes[0].legend()
plt.show()

# %% [markdown]
# For a good answer ($A>0$) the push stops once it has become $1+\varepsilon$ times as likely. For a bad one it stops at
# $1-\varepsilon$ times; but a bad answer that has become *more* likely is pushed back at full strength, however far it went.
#
# ### Exercise 2: the clipped term
#
# Write it for arrays, and find its value at $\rho=3$ for $A=1$ and for $A=-1$ with $\varepsilon=0.2$.


# %%
def my_clip_term(rho, A, eps=0.2):
    """The clipped surrogate, to be maximised."""
    ### BEGIN SOLUTION
    return np.minimum(rho * A, np.clip(rho, 1 - eps, 1 + eps) * A)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: the clipped term
for rho_, A_, wanted in ((3.0, 1.0, 1.2), (3.0, -1.0, -3.0), (0.1, 1.0, 0.1), (0.1, -1.0, -0.8)):
    got = float(my_clip_term(np.array(rho_), np.array(A_)))
    assert abs(got - wanted) < 1e-12, f"at ratio {rho_} and advantage {A_}: got {got}, wanted {wanted}"
print("right")

# %% [markdown]
# ## 5. The loop
#
# Everything is there. One update: ask $P$ prompts $G$ times each, reward, compare within groups, take one gradient step on
# the GRPO loss. The log-probabilities under which the answers were drawn come with them.


# %%
def grpo(model, lr, updates, seed, watch=True):
    """GRPO on the verifier alone; returns what to watch."""
    rng = np.random.default_rng(seed)
    curves = {"reward": [], "entropy": [], "dead": [], "right": [], "sampled": [], "greedy": []}
    optimiser = AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    first = task.prompt_length - 1  # the position whose logits answer

    def loss_of_share(tokens, old, advantages, mask):
        logprobs = token_logprobs(model(tokens[:, :-1]), tokens[:, 1:])[:, first:]  # (B, T)
        return grpo_loss(logprobs, old, advantages, mask, divisor=PROMPTS * GROUP).loss

    with BatchThreads(2).running() as threads:
        for update in range(updates):
            problems = task.problems(rng, PROMPTS)
            prompts = task.prompt_ids(problems)
            answers = generate(model, prompts, task.answer_length, rng, eos_id=task.eos_id, copies=GROUP)
            rewards = task.verify(problems.repeat(GROUP, axis=0), answers.tokens).reshape(PROMPTS, GROUP)
            tokens = np.concatenate([prompts.repeat(GROUP, axis=0), answers.tokens], axis=1)
            _, gradients = threads.gradients(
                loss_of_share,
                model.parameters(),
                tokens,
                answers.logprobs,
                grpo_advantage_std(rewards).reshape(-1),
                answers.mask,
            )
            optimiser.step(gradients, max_norm=1.0)
            curves["reward"].append(rewards.mean())
            curves["dead"].append(dead_groups(rewards).mean())
            curves["right"].append((rewards == 1).all(-1).mean())
            with no_grad():
                law = entropy_from_logits(model(tokens[:, :-1])[:, first:]).data
            curves["entropy"].append(law[answers.mask].mean())
            if watch and update % 10 == 9:
                curves["sampled"].append(accuracy(model, np.random.default_rng(2)))
                curves["greedy"].append(accuracy(model, np.random.default_rng(2), temperature=0.0))
    return curves


curves = grpo(student, lr=1e-3, updates=UPDATES, seed=3)
after = accuracy(student, np.random.default_rng(1))
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.1))
smooth = np.convolve(curves["reward"], np.ones(5) / 5, "valid")
axes[0].plot(curves["reward"], color=BLUE, alpha=0.3)
axes[0].plot(np.arange(4, UPDATES), smooth, color=BLUE, label="reward of the batch")
axes[0].plot(np.arange(9, UPDATES, 10), curves["greedy"], "s-", color=GREEN, label="greedy, held out")
axes[0].plot(np.arange(9, UPDATES, 10), curves["sampled"], "o-", color=VERMILION, label="sampled, held out")
axes[0].set(title="right answers", ylim=(0, 1.02), xlabel="update")
axes[0].legend(fontsize=8, loc="lower right")
axes[1].plot(curves["entropy"], color=PURPLE)
axes[1].set(title="entropy per token (nats)", xlabel="update", ylim=(0, None))
axes[2].plot(np.convolve(curves["dead"], np.ones(5) / 5, "valid"), color=ORANGE, label="dead: all equal")
axes[2].plot(np.convolve(curves["right"], np.ones(5) / 5, "valid"), color=GREEN, label="of these, all right")
axes[2].set(title="share of groups", xlabel="update", ylim=(0, 1))
axes[2].legend(fontsize=8)
plt.show()
print("sampled accuracy rose by more than 0.15:", after - sampled > 0.15)
print("entropy fell:", np.mean(curves["entropy"][-10:]) < np.mean(curves["entropy"][:10]))
print("groups that are all right became more frequent:", np.mean(curves["right"][-10:]) > np.mean(curves["right"][:10]))

# %% [markdown]
# Not one right answer was ever shown in this phase. The reward did not teach addition either; that was known. It
# *sharpened*: what the policy did sometimes, it now does most of the time. The entropy is the price. Look at the dead
# groups: in the beginning they are those where no answer was right, later more and more those where every answer was.
# Either way they teach nothing, and as the second kind takes over, the signal dries up by itself.
#
# The full run, three seeds, with learning curves and their spread, is `minillm grpo` and `minillm figures`.
#
# ## 6. How fast may it learn?
#
# Reinforcement learning eats its own output: a step too far spoils the data of the next one. Three learning rates from
# the same start. Which one would you have chosen?

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
final = {}
for lr, colour in ((3e-4, GREEN), (1e-3, BLUE), (3e-2, VERMILION)):
    student.load_state_dict(start)
    run = grpo(student, lr, updates=20, seed=3, watch=False)
    final[lr] = np.mean(run["reward"][-5:])
    axes.plot(run["reward"], color=colour, label=f"learning rate {lr:g}")
axes.set(
    xlabel="update", ylabel="reward of the batch", ylim=(-0.02, 1.02), title="The same start, three learning rates"
)
axes.legend()
plt.show()
print("the largest rate ended below where it began:", final[3e-2] < sampled)

# %% [markdown]
# At the large rate nobody is right any more, so *every* group is dead, so no gradient comes that could repair it. Nothing
# in the loss warns you; the curve of dead groups does.
#
# ## 7. Staying close: three estimators of one divergence
#
# GRPO can also hold the policy near a reference by a penalty, $\beta D_{\rm KL}(\pi_\theta\Vert\pi_{\rm ref})$, estimated from
# the sampled tokens. With $d=\log\pi_{\rm ref}-\log\pi_\theta$: $k_1=-d$, $k_2=\frac12d^2$, $k_3=e^d-d-1$. On three words we can
# compute what each of them is on average, and what the average of its *gradient* is.
#
# ### Exercise 3: which gradient is whose?
#
# Fill in the three estimators, run the cell, and name the one whose mean gradient is that of
# $D_{\rm KL}(\pi_\theta\Vert\pi_{\rm ref})$: set `reverse` to `"k1"`, `"k2"` or `"k3"`.


# %%
def estimators(logprobs, ref_logprobs):
    """The three estimators for every word, as tensors."""
    d = ref_logprobs - logprobs
    ### BEGIN SOLUTION
    return {"k1": -d, "k2": 0.5 * d * d, "k3": ops.exp(d) - d - 1.0}
    ### END SOLUTION


reverse = None
### BEGIN SOLUTION
reverse = "k2"
### END SOLUTION

# %% tags=["check"]
# Exercise 3: which gradient is whose?
theta = Tensor(np.array([0.5, -1.0, 0.3]), requires_grad=True)
reference = log_softmax(Tensor(np.array([-0.5, 0.2, 0.4])))
p, logp = softmax(theta), log_softmax(theta)
true_gradient = grad((p * (logp - reference)).sum(), theta, retain_graph=True).data
other_gradient = grad(-(ops.exp(reference) * log_softmax(theta)).sum(), theta).data
for name, values in estimators(log_softmax(theta), reference).items():
    mean_value = float((p.data * values.data).sum())
    mean_gradient = grad(
        (values * p.data).sum(), theta, retain_graph=True
    ).data  # the samples are fixed: p is a constant here
    same = "reverse KL" if np.allclose(mean_gradient, true_gradient, atol=1e-9) else ""
    same = same or ("forward KL" if np.allclose(mean_gradient, other_gradient, atol=1e-9) else "")
    same = same or ("zero" if np.allclose(mean_gradient, 0, atol=1e-9) else "something else")
    print(f"{name}: mean value {mean_value:.4f}, mean gradient is that of: {same}")
    if name == "k2":
        assert same == "reverse KL", "k2 should have the gradient of the reverse KL"
    if name == "k3":
        assert same == "forward KL" and mean_value > 0, "k3 should have the gradient of the forward KL"
assert reverse == "k2", "look at the table just printed"

# %% [markdown]
# So $k_3$, which GRPO puts in its loss, *values* one divergence and *descends* the other. Near the reference the two
# agree; far from it they do not. $k_1$ in a loss does nothing at all: it belongs in the reward.
#
# ## What to take along
#
# 1. GRPO is likelihood training on the policy's own answers, each weighted by how much better it was than its group.
# 2. Reward sharpens what sampling already shows. A group that never succeeds, or always does, teaches nothing.
# 3. Watch four curves: reward, entropy, dead groups, greedy accuracy. The loss is not one of them.
