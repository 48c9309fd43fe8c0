r"""Rollouts: groups of responses of the current policy, with everything that an update needs later."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from minillm.checks import require, require_positive
from minillm.data.tasks import AdditionTask
from minillm.decoding import generate
from minillm.functional.advantages import dead_groups, live_groups
from minillm.models import Decoder


class Rollout(NamedTuple):
    r"""Responses of the policy that sampled them, in groups: the G responses to one prompt stand together.

    Equation: `rollout-buffer` $\{(s_t,a_t,r_t,\log\pi_{\rm old})\}$, one reward at the end of a response
    Shapes: prompts (N, P), responses, old_logprobs, mask (N, T), terminated (N,), rewards (N / G, G); N / G prompts
    Source: notes §10.6; deepseek (GRPO).
    Differs: the single flag for the end of an episode is two, of which one is stored: what has not ended with EOS
        was cut off (erratum 46).

    ``mask`` is true up to and including EOS, which is an action like any other. Behind it ``old_logprobs`` are 0.
    """

    prompts: np.ndarray
    responses: np.ndarray
    old_logprobs: np.ndarray
    mask: np.ndarray
    terminated: np.ndarray
    rewards: np.ndarray

    @property
    def group_size(self) -> int:
        """G."""
        return self.rewards.shape[1]

    @property
    def dead(self) -> Bool[np.ndarray, " groups"]:
        """Groups whose responses all got the same reward."""
        return dead_groups(self.rewards)

    @property
    def entropy(self) -> float:
        r"""Entropy of the sampled law in nats a token, estimated by $-\log\pi_{\rm old}$ of the sampled tokens."""
        return -float(self.old_logprobs[self.mask].mean(dtype=np.float64))

    @property
    def mean_length(self) -> float:
        """Tokens a response, EOS included."""
        return float(self.mask.sum(-1).mean())

    def groups(self, chosen: Int[np.ndarray, " n"]) -> "Rollout":
        """Some of the groups, in the given order."""
        rows = (chosen[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)
        return Rollout._make([*(array[rows] for array in self[:-1]), self.rewards[chosen]])


def roll_out(
    model: Decoder,
    task: AdditionTask,
    problems: Int[np.ndarray, "groups 2"],
    group_size: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
) -> Rollout:
    r"""Sample a group of responses to every problem and let the verifier score them.

    Equation: `grpo-group-per-prompt` $G$ complete responses per prompt from $\pi_{\rm old}$
    Shapes: problems (N / G, 2) -> N responses; the G of a prompt stand together
    Raises: ValueError for no problems or a group size or temperature that is not positive.
    Source: deepseek (GRPO); lecture06.
    Differs: responses per prompt, and one advantage each, not one group over all prompts (erratum 80).
    """
    require(len(problems) > 0, "roll_out", "the problems", "at least one", problems)
    require_positive(group_size, "roll_out", "group_size", integer=True)
    require_positive(temperature, "roll_out", "temperature")
    prompts, longest = task.prompt_ids(problems), task.answer_length
    pad_id = task.eos_id if task.tokenizer.pad_id is None else task.tokenizer.pad_id
    sampled = generate(
        model, prompts, longest, rng, temperature=temperature, copies=group_size,
        eos_id=task.eos_id, pad_id=pad_id,
    )  # fmt: skip
    missing = longest - sampled.tokens.shape[1]  # columns that generation saved, when all responses ended early
    rewards = task.verify(problems.repeat(group_size, axis=0), sampled.tokens)
    return Rollout(
        prompts=prompts.repeat(group_size, axis=0),
        responses=np.pad(sampled.tokens, ((0, 0), (0, missing)), constant_values=pad_id),
        old_logprobs=np.pad(sampled.logprobs, ((0, 0), (0, missing))),
        mask=np.pad(sampled.mask, ((0, 0), (0, missing))),
        terminated=sampled.terminated,
        rewards=rewards.reshape(len(problems), group_size),
    )


def roll_out_live(
    model: Decoder,
    task: AdditionTask,
    n_groups: int,
    group_size: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
    most_rounds: int = 4,
) -> Rollout:
    r"""Sample prompts until ``n_groups`` of them have responses with unequal rewards, or for ``most_rounds`` rounds.

    Everything that was sampled comes back, dead groups included, since their share is worth knowing; `live_groups` of
    the rewards are those to train on.

    Equation: `grpo-dynamic-sampling` keep a prompt iff $\mathrm{std}(\mathbf r)>0$; sample further prompts until the batch is full
    Shapes: -> at least n_groups groups
    Raises: ValueError for counts that are not positive.
    Source: Yu et al. 2025 (DAPO).
    """
    require_positive(n_groups, "roll_out_live", "n_groups", integer=True)
    require_positive(most_rounds, "roll_out_live", "most_rounds", integer=True)
    rounds, alive = [], 0
    while alive < n_groups and len(rounds) < most_rounds:
        rounds.append(roll_out(model, task, task.problems(rng, n_groups), group_size, rng, temperature))
        alive += len(live_groups(rounds[-1].rewards))
    return Rollout._make(np.concatenate(arrays) for arrays in zip(*rounds))
