"""Kernels run in Triton's interpreter where there is no GPU; Triton decides when it is first imported."""

import os
import sys

import pytest

torch = pytest.importorskip("torch", reason="the kernels need torch")
pytest.importorskip("hypothesis")

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """0 * inf in lanes that are masked out is no news."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield
