"""Evaluating the forms of a registered function: value, gradients, gradients of gradients."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import minillm.functional
import minillm.fused
from minillm.autograd import Tensor, grad, registry
from minillm.autograd.tape import recording

PACKAGES = (minillm.functional, minillm.fused)


def import_all() -> list[Any]:
    """Import every module that registers functions, so that no row is missing; return the modules."""
    return [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for package in PACKAGES
        for found in pkgutil.iter_modules(package.__path__)
    ]


def all_rows() -> dict[str, registry.Row]:
    """Every row of the registry by name."""
    import_all()
    return {row.name: row for row in registry.rows()}


def is_float_array(x: Any) -> bool:
    """Whether an argument is one that gradients are taken with respect to."""
    return isinstance(x, np.ndarray | np.floating) and x.dtype.kind == "f"


def as_dtype(args: Sequence[Any], dtype: Any) -> list[Any]:
    """The arguments with every floating-point array in another precision."""
    return [x.astype(dtype) if is_float_array(x) else x for x in args]


def float_tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result, which may be one tensor or a tuple of things."""
    results = list(result) if isinstance(result, tuple | list) else [result]
    return [r for r in results if isinstance(r, Tensor) and r.dtype.kind == "f"]


def cotangents_for(outputs: Sequence[Any], seed: int = 0) -> list[np.ndarray]:
    """One random cotangent for each output, in its precision."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=o.shape).astype(o.dtype) for o in outputs]


@dataclass
class Evaluation:
    """What a form gave: its values, and one gradient for each floating-point argument."""

    values: list[np.ndarray]
    gradients: list[np.ndarray]

    @property
    def arrays(self) -> list[np.ndarray]:
        """Values, then gradients."""
        return self.values + self.gradients


def evaluate(
    form: Callable, args: Sequence[Any], kwargs: dict, cotangents: Sequence[np.ndarray] | None = None
) -> Evaluation:
    """Run a form forward and backward on arrays; an argument without influence has gradient 0."""
    given = [Tensor(x, requires_grad=True) if is_float_array(x) else x for x in args]
    outputs = float_tensors(form(*given, **kwargs))
    cotangents = cotangents_for(outputs) if cotangents is None else cotangents
    wanted = [t for t in given if isinstance(t, Tensor)]
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found: list[Any] = [None] * len(wanted)
    if live:
        found = grad([o for o, _ in live], wanted, [c for _, c in live], allow_unused=True)
    gradients = [np.zeros_like(t.data) if g is None else g.data for t, g in zip(wanted, found, strict=True)]
    return Evaluation([o.data for o in outputs], gradients)


def gradient_function(form: Callable, args: Sequence[Any], kwargs: dict) -> tuple[Callable, list[np.ndarray]]:
    """The gradient of a form as a function of its float arguments and of the cotangents, and where to check it.

    It is differentiable itself (``create_graph``), so that a gradient check of it checks second derivatives.
    """
    slots = [i for i, x in enumerate(args) if is_float_array(x)]
    points = [np.asarray(args[i]) for i in slots]
    shapes = [o.shape for o in float_tensors(form(*[Tensor(x) if is_float_array(x) else x for x in args], **kwargs))]
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=shape) for shape in shapes]

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        with recording(True):
            own = [t if t.requires_grad else Tensor(t.data, requires_grad=True) for t in inputs]
            given = list(args)
            for i, tensor in zip(slots, own[: len(slots)], strict=True):
                given[i] = tensor
            outputs = float_tensors(form(*given, **kwargs))
            seeds = own[len(slots) :]
            live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
            found = grad(
                [o for o, _ in live], own[: len(slots)], [s for _, s in live], create_graph=True, allow_unused=True
            )
        zeros = [Tensor(np.zeros(p.shape)) for p in points]
        return tuple(z if g is None else g for z, g in zip(zeros, found, strict=True))

    return gradient, points + cotangents
