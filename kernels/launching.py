"""What every family's launcher needs: where kernels run, buffers to write to, the device a launch belongs to."""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels import device, interpreter

INTERPRETED = not isinstance(device.dot, triton.JITFunction)
if INTERPRETED:
    interpreter.quicken()
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # said aloud: Triton's default changes between versions


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer that a kernel writes to is made here: call it as ``launching.empty``, for the guard-zone check
    replaces this function."""
    return torch.empty(shape, dtype=dtype, device=device)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share the work; one in the interpreter, which runs programs in turn."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def rows_of(tensor: Tensor) -> Tensor:
    """All axes but the last as one: a view where the strides allow it (expanded and sliced too), else a copy."""
    d = tensor.shape[-1]
    return tensor.reshape(tensor.shape[:-1].numel(), d)  # (n_rows, d)


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


_NOTHING = _Nothing()


def on(tensor: Tensor) -> Any:
    """Launch on the tensor's device; asking costs microseconds, so only where several devices exist."""
    if INTERPRETED or torch.cuda.device_count() == 1:
        return _NOTHING
    return torch.cuda.device(tensor.device)
