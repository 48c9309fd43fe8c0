r"""Cutting a batch of roll-outs into minibatches: whole episodes, or single steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from minillm.checks import require_positive
from minillm.functional.frozen import frozen, kept_positions


def episode_minibatches(n_episodes: int, size: int, rng: np.random.Generator) -> Iterator[Int[np.ndarray, " size"]]:
    r"""Shuffled indices of episodes, ``size`` at a time; the last minibatch may be smaller.

    A token mean over each is a ratio of two random numbers, so its average is not the batch's token mean
    unless the lengths are equal: give `aggregate` a fixed divisor.

    Equation: `minibatch-modes` shuffle episodes
    Shapes: -> index arrays that together hold every episode once
    Raises: ValueError if the size is not a positive integer.
    Source: notes §10.6.
    """
    require_positive(size, "episode_minibatches", "size", integer=True)
    order = rng.permutation(n_episodes)
    for start in range(0, n_episodes, size):
        yield order[start : start + size]


def step_minibatches(mask: Any, size: int, rng: np.random.Generator) -> Iterator[Bool[np.ndarray, "B T"]]:
    r"""Masks that keep ``size`` shuffled real steps at a time; the last may keep fewer.

    Of equal size, their token means average to the batch's token mean.

    Equation: `minibatch-modes` shuffle $(b,t)$ pairs
    Shapes: mask (B, T) -> masks (B, T) that together hold every kept step once
    Raises: ValueError if the size is not a positive integer, or for a mask of other values than 0 and 1.
    Source: notes §10.6.
    """
    require_positive(size, "step_minibatches", "size", integer=True)
    keep = kept_positions(mask, frozen(mask).shape, "step_minibatches")
    order = rng.permutation(np.flatnonzero(keep))
    for start in range(0, len(order), size):
        part = np.zeros(keep.size, bool)
        part[order[start : start + size]] = True
        yield part.reshape(keep.shape)
