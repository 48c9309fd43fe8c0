r"""Learning rates as functions of the step, which counts from 1.

Every schedule is a pure function of the step, so a resumed run needs nothing but the step to go on.
"""

import math
from collections.abc import Callable

from minillm.checks import require, require_one_of, require_positive


def warmup(t: float, lr: float, t_w: int) -> float:
    r"""A linear rise to the full rate.

    Equation: `lr-warmup` $\eta_t=\eta\min(1,t/t_w)$
    Source: topics #22; notes §4.7.
    """
    return lr if t >= t_w else lr * t / t_w


def cosine(t: float, lr: float, t_w: int, t_max: int, lr_min: float = 0.0) -> float:
    r"""Warm-up, then half a cosine down to ``lr_min``, which holds afterwards.

    Equation: `lr-cosine` $\eta_{\min}+\frac12(\eta-\eta_{\min})(1+\cos\pi\frac{t-t_w}{t_{\max}-t_w})$ for $t_w\le t\le t_{\max}$
    Source: topics #20, #22; Loshchilov and Hutter 2017.
    """
    if t < t_w:
        return warmup(t, lr, t_w)
    return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * _share(t, t_w, t_max)))


def linear(t: float, lr: float, t_w: int, t_max: int, lr_min: float = 0.0) -> float:
    r"""Warm-up, then a straight line down to ``lr_min``, which holds afterwards.

    Equation: `lr-linear-invsqrt-wsd` $\eta_{\min}+(\eta-\eta_{\min})\frac{t_{\max}-t}{t_{\max}-t_w}$
    Source: topics #22.
    """
    return warmup(t, lr, t_w) if t < t_w else lr_min + (lr - lr_min) * (1 - _share(t, t_w, t_max))


def inverse_sqrt(t: float, lr: float, t_w: int) -> float:
    r"""Warm-up, then the inverse root of the step; needs no end.

    Equation: `lr-linear-invsqrt-wsd` $\eta\min(\frac t{t_w},\sqrt{t_w/t})$
    Source: topics #22.
    """
    return lr * min(t / t_w, math.sqrt(t_w / t)) if t > 0 else 0.0


def noam(t: float, lr: float, t_w: int) -> float:
    r"""The inverse root as the first Transformer had it; its peak is $\eta\,t_w^{-1/2}$.

    Equation: `lr-linear-invsqrt-wsd` $\eta\min(t^{-1/2},t\,t_w^{-3/2})$
    Source: topics #22; Vaswani et al. 2017 (with $\eta=d_{\rm model}^{-1/2}$).
    """
    return inverse_sqrt(t, lr / math.sqrt(t_w), t_w)


def warmup_stable_decay(t: float, lr: float, t_w: int, t_s: int, t_max: int, lr_min: float = 0.0) -> float:
    r"""Warm-up, the full rate until ``t_s``, then a straight line down to ``lr_min``.

    Equation: `lr-linear-invsqrt-wsd` WSD: $\eta$ until $t_s$, then linear from $t_s$ to $t_{\max}$
    Source: topics #22; Hu et al. 2024.
    """
    return warmup(t, lr, t_w) if t < t_s else lr_min + (lr - lr_min) * (1 - _share(t, t_s, t_max))


SCHEDULES = ("constant", "cosine", "linear", "inverse-sqrt", "wsd")
STABLE_SHARE = 0.8  # of all steps, in the warm-up, stable, decay schedule


def schedule(kind: str, lr: float, warmup_steps: int, steps: int, lr_min: float = 0.0) -> Callable[[int], float]:
    """The learning rate of every step of a run of ``steps`` steps, by the schedule's name.

    Raises: ValueError for an unknown name or settings out of range.
    """
    require_one_of(kind, SCHEDULES, "schedule", "the schedule")
    require_positive(lr, "schedule", "lr", zero_ok=True)
    require_positive(steps, "schedule", "steps", integer=True)
    require_positive(warmup_steps, "schedule", "warmup_steps", integer=True, zero_ok=True)
    require(0 <= lr_min <= lr, "schedule", "lr_min", f"in [0, lr = {lr}]", lr_min)
    require(warmup_steps <= steps, "schedule", "warmup_steps", f"at most the number of steps, {steps}", warmup_steps)
    t_w = max(1, warmup_steps)
    return {
        "constant": lambda t: warmup(t, lr, t_w),
        "cosine": lambda t: cosine(t, lr, t_w, steps, lr_min),
        "linear": lambda t: linear(t, lr, t_w, steps, lr_min),
        "inverse-sqrt": lambda t: inverse_sqrt(t, lr, t_w),
        "wsd": lambda t: warmup_stable_decay(t, lr, t_w, max(t_w, round(STABLE_SHARE * steps)), steps, lr_min),
    }[kind]


def _share(t: float, start: int, end: int) -> float:
    """How much of the way from start to end is done: 1 from the end on."""
    return 1.0 if t >= end else (t - start) / (end - start)
