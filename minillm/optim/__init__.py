"""Optimisers, schedules and clipping."""

from minillm.optim.adamw import AdamW
from minillm.optim.adaptive import AdaGrad, Adam, RMSProp
from minillm.optim.optimizer import Optimizer, add_shares, clip_global_norm
from minillm.optim.schedules import schedule
from minillm.optim.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Momentum",
    "Optimizer",
    "RMSProp",
    "add_shares",
    "clip_global_norm",
    "schedule",
]
