"""The base of everything that owns parameters."""

from collections.abc import Iterator

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import message


class Module:
    """A tree of parameters: tensors with ``requires_grad``, sub-modules, and lists of sub-modules.

    Assigning one of these to an attribute is all that is needed; names follow the attributes, as in torch:
    ``blocks.0.attention.w_qkv``.
    """

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        """Compute the module's function; every subclass says what that is."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """All parameters with their dotted names, in order of definition; a shared one appears once."""
        seen: set[int] = set()
        for name, parameter in self._walk(prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _walk(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.requires_grad:
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value._walk(f"{prefix}{name}.")
            elif isinstance(value, list | tuple):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield from item._walk(f"{prefix}{name}.{i}.")

    def submodules(self) -> Iterator["Module"]:
        """This module and all below it, in order of definition."""
        yield self
        for value in vars(self).values():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, Module):
                    yield from item.submodules()

    def parameters(self) -> list[Tensor]:
        """All parameters, in order of definition."""
        return [parameter for _, parameter in self.named_parameters()]

    def count_parameters(self) -> int:
        """The number of trained numbers."""
        return sum(parameter.size for parameter in self.parameters())

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters' arrays by name: shared with the module, not copied."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Copy arrays into the parameters in place; names and shapes must match exactly.

        Raises: ValueError that lists missing and unexpected names, or the first wrong shape. Nothing is copied then.
        """
        own = dict(self.named_parameters())
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise ValueError(
                f"load_state_dict: the names do not match: missing {_few(missing)}, unexpected {_few(extra)}. "
                "Is the file of another architecture?"
            )
        for name, parameter in own.items():
            if np.shape(state[name]) != parameter.shape:
                raise ValueError(
                    message("load_state_dict", name, f"of shape {parameter.shape}", np.asarray(state[name]))
                )
        for name, parameter in own.items():
            parameter.data[...] = state[name]


def _few(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def parameter(array: np.ndarray, dtype: type | np.dtype = np.float32) -> Tensor:
    """A tensor that is trained."""
    return Tensor(np.ascontiguousarray(array, dtype=dtype), requires_grad=True)
