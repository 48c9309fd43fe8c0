r"""The settings of a training run, beside the model's own."""

from dataclasses import asdict, dataclass

from minillm.checks import require, require_one_of, require_positive
from minillm.optim.schedules import SCHEDULES, schedule


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on what batches, with which optimiser, and how often to look and to save.

    A step reads ``accumulate`` batches of ``batch_size`` sequences of ``n_ctx`` tokens. ``lr_min`` is a share of
    ``lr``. Things are done every so many steps: 0 means only at the end.
    """

    steps: int = 1000
    batch_size: int = 8
    n_ctx: int = 256
    accumulate: int = 1
    lr: float = 2e-3
    lr_min: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_norm: float = 1.0
    seed: int = 0
    threads: int = 1
    log_every: int = 1
    validate_every: int = 100
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    aux_coefficient: float = 0.01  # of the load-balancing loss, for a model with experts
    bias_rate: float = 1e-3  # of the biases of sigmoid routers, after every step

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "n_ctx", "accumulate", "threads", "log_every", "keep_checkpoints"):
            require_positive(getattr(self, name), "TrainingConfig", name, integer=True)
        for name in ("seed", "validate_every", "checkpoint_every", "warmup_steps"):
            require_positive(getattr(self, name), "TrainingConfig", name, integer=True, zero_ok=True)
        for name in ("lr", "max_norm"):
            require_positive(getattr(self, name), "TrainingConfig", name)
        for name in ("weight_decay", "aux_coefficient", "bias_rate"):
            require_positive(getattr(self, name), "TrainingConfig", name, zero_ok=True)
        for name in ("lr_min", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value <= 1 and (value < 1 or name == "lr_min"), "TrainingConfig", name, "in [0, 1)", value)
        require_one_of(self.schedule, SCHEDULES, "TrainingConfig", "schedule")
        fits = self.warmup_steps <= self.steps
        require(fits, "TrainingConfig", "warmup_steps", f"at most steps = {self.steps}", self.warmup_steps)

    @property
    def tokens_per_step(self) -> int:
        """How many tokens a step reads."""
        return self.batch_size * self.n_ctx * self.accumulate

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step; steps count from 1."""
        return schedule(self.schedule, self.lr, self.warmup_steps, self.steps, self.lr * self.lr_min)(step)

    def to_dict(self) -> dict:
        """The settings as plain data."""
        return asdict(self)
