"""Optimisers, schedules and clipping."""

from minillm.optim.adamw import AdamW

__all__ = ["AdamW"]
