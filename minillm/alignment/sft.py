r"""Supervised fine-tuning: imitate demonstrations, mistakes included."""

from dataclasses import dataclass

import numpy as np

from minillm.alignment.policy import PolicySize, fresh_policy, response_logits
from minillm.alignment.stage import Metrics, Stage, StageConfig
from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.data.tasks import AdditionTask
from minillm.fused.losses import cross_entropy


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Settings of the supervised stage."""

    updates: int = 600
    lr: float = 5e-3
    warmup: int = 50
    weight_decay: float = 0.1
    evaluate_every: int = 100
    batch: int = 256  # demonstrations an update, always fresh ones
    noise: float = 0.6  # share of demonstrations with one wrong digit

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.batch, "SFTConfig", "batch", integer=True)
        require(0 <= self.noise <= 1, "SFTConfig", "noise", "a share in [0, 1]", self.noise)


class SFT(Stage):
    r"""Maximise the likelihood of demonstrated answers; the prompt enters no loss, EOS does.

    Equation: `sft-loss` $-\frac1{L_y}\sum_t\log p_\theta(y_t\mid y_{<t},\mathbf p)$
    Equation: `sft-argmin` $\arg\min_\theta\mathbb E[-\log\pi_\theta(y^*\mid x)]$, approached by AdamW
    Source: notes §10.3, §10.5 (stage 1); deepseek (SFT).

    All answers are equally long, so the mean over tokens is also the mean over sequences of token means.
    """

    name = "sft"
    config: SFTConfig

    def update(self) -> Metrics:
        """One step on a fresh batch of demonstrations."""
        batch = self.task.demonstrations(self.rng, self.config.batch, self.config.noise)

        def loss_of_share(prompts: np.ndarray, answers: np.ndarray) -> Tensor:
            return cross_entropy(response_logits(self.model, prompts, answers), answers, divisor=batch.answers.size)

        loss, gradients = self.threads.gradients(loss_of_share, self.optimizer.parameters, batch.prompts, batch.answers)
        return {"loss": loss, "gradient_norm": self.optimizer.step(gradients, self.config.max_norm)}


def new_sft(task: AdditionTask, config: SFTConfig, size: PolicySize | None = None) -> SFT:
    """The supervised stage of an untrained policy; the seed of the configuration fixes its initial weights too."""
    return SFT(fresh_policy(task, size or PolicySize(), np.random.default_rng(config.seed)), task, config)
