r"""Group-relative policy optimisation with a verifiable reward, read from top to bottom.

    prompts -> G responses each -> rewards -> advantages within each group -> a few clipped gradient steps -> again

There is no critic: the other responses to the same prompt are the yardstick. There is no reward model either: a
program checks the answer.
"""

from dataclasses import dataclass, replace

import numpy as np

from minillm.alignment.policy import frozen_copy, response_logprobs
from minillm.alignment.rollout import Rollout, roll_out, roll_out_live
from minillm.alignment.stage import Metrics, Stage, StageConfig
from minillm.autograd import Tensor, no_grad
from minillm.checks import require, require_one_of, require_positive
from minillm.data.tasks import AdditionTask
from minillm.functional.advantages import ADVANTAGES, group_advantage, live_groups
from minillm.functional.kl_estimators import ESTIMATORS
from minillm.functional.policy_losses import GRPOLoss, grpo_loss
from minillm.functional.reductions import REDUCTIONS, aggregation_divisor
from minillm.models import Decoder
from minillm.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class GRPOConfig(StageConfig):
    """Settings of GRPO; the defaults reach a sampled accuracy above 0.99 on sums of two digits."""

    updates: int = 800
    lr: float = 3e-4
    evaluate_every: int = 25
    prompts: int = 32  # an update
    group: int = 8  # G, responses a prompt
    temperature: float = 1.0  # of sampling, and of the log-probs in the ratio
    advantage: str = "std"  # or "mean", "rloo", "batch-std"
    ddof: int = 0  # of the standard deviation: 0 population, 1 unbiased
    eps: float = 1e-6  # added to the standard deviation
    clip_low: float = 0.2
    clip_high: float | None = None  # None: as clip_low
    beta: float = 0.0  # weight of the divergence from the policy at the start
    kl: str = "k3"
    reduction: str = "seq-mean"
    epochs: int = 2  # passes over a rollout; from the second on the ratio is not 1 and the clip acts
    minibatches: int = 1  # steps in a pass
    dynamic_sampling: bool = False  # replace dead groups by further prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts", "group", "epochs", "minibatches"):
            require_positive(getattr(self, name), "GRPOConfig", name, integer=True)
        require(self.group >= 2, "GRPOConfig", "group", "at least 2: a response is compared with its group", self.group)
        require(self.minibatches <= self.prompts * self.group, "GRPOConfig", "minibatches",
                f"at most the number of responses, {self.prompts * self.group}", self.minibatches)  # fmt: skip
        require_positive(self.temperature, "GRPOConfig", "temperature")
        for name in ("eps", "beta", *(("clip_high",) if self.clip_high is not None else ())):
            require_positive(getattr(self, name), "GRPOConfig", name, zero_ok=True)
        require(0 <= self.clip_low <= 1, "GRPOConfig", "clip_low", "in [0, 1]", self.clip_low)
        for name, allowed in (("advantage", ADVANTAGES), ("kl", ESTIMATORS), ("reduction", REDUCTIONS)):
            require_one_of(getattr(self, name), allowed, "GRPOConfig", name)
        require(self.ddof in (0, 1), "GRPOConfig", "ddof", "0 or 1", self.ddof)


class GRPO(Stage):
    r"""Improve a policy by the rewards of its own responses.

    Equation: `grpo-loss` $-\frac1G\sum_i\frac1{\lvert y_i\rvert}\sum_t\big[\min(\rho_{i,t}A_i,\mathrm{clip}(\rho_{i,t})A_i)-\beta k_3\big]$
    Source: deepseek (GRPO); lecture06; Shao et al. 2024.
    """

    name = "grpo"
    config: GRPOConfig

    def __init__(self, model: Decoder, task: AdditionTask, config: GRPOConfig):
        super().__init__(model, task, config)
        self.reference = frozen_copy(model) if config.beta else None

    def update(self) -> Metrics:
        """Sample, compare within groups, take ``epochs`` times ``minibatches`` gradient steps."""
        c = self.config
        sampled = self.sample()
        rollout = sampled.groups(live_groups(sampled.rewards)[: c.prompts]) if c.dynamic_sampling else sampled
        advantages = group_advantage(rollout.rewards, c.advantage, c.ddof, c.eps).astype(rollout.old_logprobs.dtype)
        steps = []
        for _ in range(c.epochs):
            rows = np.arange(len(rollout.responses))
            if c.minibatches > 1:
                self.rng.shuffle(rows)
            steps += [self.step(rollout, advantages.reshape(-1), part) for part in np.array_split(rows, c.minibatches)]
        return {
            "reward": float(sampled.rewards.mean()),
            "dead_groups": float(sampled.dead.mean()),
            "entropy": sampled.entropy,
            "length": sampled.mean_length,
            **{name: float(np.mean([step[name] for step in steps])) for name in steps[0]},
        }

    def sample(self) -> Rollout:
        """Responses of the current policy, which from now on is the old one."""
        c = self.config
        if c.dynamic_sampling:
            return roll_out_live(self.model, self.task, c.prompts, c.group, self.rng, c.temperature)
        problems = self.task.problems(self.rng, c.prompts)
        return roll_out(self.model, self.task, problems, c.group, self.rng, c.temperature)

    def step(self, rollout: Rollout, advantages: np.ndarray, rows: np.ndarray) -> Metrics:
        """One gradient step on some responses of a rollout; none where no response has anything to teach.

        Equation: `grpo-zero-variance` a response without advantage has no policy gradient: left out of the work, kept in the divisor
        """
        c, longest = self.config, rollout.mask.shape[1]
        divisor = aggregation_divisor(rollout.mask[rows], c.reduction, length=longest)
        if self.reference is None:
            rows = rows[advantages[rows] != 0]
        if len(rows) == 0:
            return dict.fromkeys(("loss", "gradient_norm", *self.monitors), 0.0)
        shares: dict[int, tuple[int, GRPOLoss]] = {}

        def loss_of_share(rows: np.ndarray) -> Tensor:
            prompts, responses, mask = rollout.prompts[rows], rollout.responses[rows], rollout.mask[rows]
            found = grpo_loss(
                response_logprobs(self.model, prompts, responses, c.temperature),
                rollout.old_logprobs[rows],
                advantages[rows],
                mask,
                self.reference_logprobs(prompts, responses),
                beta=c.beta,
                kl=c.kl,
                clip_low=c.clip_low,
                clip_high=c.clip_high,
                reduction=c.reduction,
                length=longest,
                divisor=None if c.reduction == "sum" else divisor,
            )
            shares[int(rows[0])] = int(mask.sum()), found
            return found.loss

        loss, gradients = self.threads.gradients(loss_of_share, self.optimizer.parameters, rows)
        norm = self.optimizer.step(gradients, c.max_norm)
        in_order = [shares[first] for first in sorted(shares)]  # whichever thread came first
        total = sum(tokens for tokens, _ in in_order)
        means = {
            name: sum(tokens * getattr(found, field) for tokens, found in in_order) / total
            for name, field in self.monitors.items()
        }
        return {"loss": loss, "gradient_norm": norm, **means}

    @property
    def monitors(self) -> dict[str, str]:
        """Names of the metrics that come from the loss, with the field of `GRPOLoss` that holds each."""
        always = {"kl_old": "old_kl", "clip_fraction": "clip_fraction"}
        return always if self.reference is None else {**always, "kl_reference": "kl"}

    def reference_logprobs(self, prompts: np.ndarray, responses: np.ndarray) -> np.ndarray | None:
        """What the policy of the start thinks of the responses; None where the loss does not ask."""
        if self.reference is None:
            return None
        with no_grad():
            return response_logprobs(self.reference, prompts, responses, self.config.temperature).data

    def checkpoint(self) -> Checkpoint:
        """Everything that a run needs to go on, the reference included."""
        saved = super().checkpoint()
        reference = {} if self.reference is None else self.reference.state_dict()
        return replace(saved, tensors=saved.tensors | {f"reference.{name}": array for name, array in reference.items()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was made, with the reference of then."""
        super().restore(checkpoint)
        if self.reference is not None:
            self.reference.load_state_dict(checkpoint.part("reference"))
