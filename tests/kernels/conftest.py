"""Kernels run in Triton's interpreter where there is no GPU, which `tests/conftest.py` has settled."""

import pytest

pytest.importorskip("torch", reason="the kernels need torch")
pytest.importorskip("hypothesis")
pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """0 * inf in lanes that are masked out is no news."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield
