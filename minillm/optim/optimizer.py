r"""What every optimiser shares: adding shares of a gradient, clipping it, keeping state."""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive

Shares = Sequence[Sequence[np.ndarray]]


def add_shares(shares: Shares) -> list[np.ndarray]:
    r"""The gradient of a whole batch from those of its shares (micro-batches or threads).

    Equation: `grad-accumulation` $g=\sum_ig_i$, every share's loss divided by the token count of the whole batch
    Shapes: one list of gradients per share, each with one array per parameter -> one list
    Raises: ValueError without shares.
    Source: topics #8.
    """
    require(len(shares) > 0, "add_shares", "the gradients", "at least one share", "none")
    return [reduce(np.add, parts) for parts in zip(*shares, strict=True)]


def clip_global_norm(
    gradients: Sequence[np.ndarray], max_norm: float | None, eps: float = 1e-6
) -> tuple[list[np.ndarray], float]:
    r"""Shorten a gradient that is too long; its direction stays.

    Equation: `grad-clip` $g\leftarrow g\min(1,c/(\lVert g\rVert+\varepsilon_0))$, one norm over all parameters
    Shapes: one array per parameter -> the same, and the norm before
    Raises: FloatingPointError if the norm is not finite.
    Source: notes §4.7; topics #20.
    """
    norm = float(np.sqrt(sum(float(np.vdot(g, g)) for g in gradients)))
    if not np.isfinite(norm):
        raise FloatingPointError(
            f"clip_global_norm: the gradient's norm must be finite, got {norm}. "
            "Lower the learning rate or look for a division by zero in the loss."
        )
    scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + eps))
    return [g if scale == 1.0 else g * g.dtype.type(scale) for g in gradients], norm


class Optimizer:
    """A list of parameters and, per parameter, the arrays named in ``slots``, which start at 0.

    A subclass says in ``update`` what one step does to one parameter, in place.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, parameters: Sequence[Tensor], lr: float):
        where = type(self).__name__
        require(len(parameters) > 0, where, "the parameters", "at least one tensor", "an empty list")
        require_positive(lr, where, "lr", zero_ok=True)
        self.parameters, self.lr, self.t = list(parameters), lr, 0
        self.state = {name: [np.zeros_like(p.data) for p in parameters] for name in self.slots}

    def update(self, theta: np.ndarray, g: np.ndarray, *slots: np.ndarray) -> None:
        """Change ``theta`` and the slots of one parameter in place; ``self.t`` counts steps from 1."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def step(self, gradients: Shares | None = None, max_norm: float | None = None) -> float:
        """Update all parameters once and return the gradient's norm before clipping.

        Shapes: gradients: one list per share of the batch, each with one array per parameter; shares are added.
            Without it, ``.grad`` of the parameters is used.
        Raises: FloatingPointError if the norm is not finite; nothing is changed then.
        """
        shares = [[_grad_of(p) for p in self.parameters]] if gradients is None else gradients
        clipped, norm = clip_global_norm(add_shares(shares), max_norm)
        self.t += 1
        for i, (p, g) in enumerate(zip(self.parameters, clipped, strict=True)):
            self.update(p.data, g, *(self.state[name][i] for name in self.slots))
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """The step count and the slots, per parameter: what a checkpoint needs to go on."""
        arrays = {f"{name}.{i}": a for name in self.slots for i, a in enumerate(self.state[name])}
        return {"t": np.asarray(self.t, dtype=np.int64), **arrays}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state_dict` returned, for the same parameters.

        Raises: ValueError if names or shapes differ; nothing is changed then.
        """
        where, own = f"{type(self).__name__}.load_state_dict", self.state_dict()
        require(own.keys() == state.keys(), where, "the entries", ", ".join(own), ", ".join(state))
        for key, value in own.items():
            require(np.shape(state[key]) == value.shape, where, key, f"of shape {value.shape}", np.asarray(state[key]))
        self.t = int(state["t"])
        for key, value in own.items():
            if key != "t":
                value[...] = state[key]


def _grad_of(p: Tensor) -> np.ndarray:
    return np.zeros(p.shape, p.dtype) if p.grad is None else p.grad.data
