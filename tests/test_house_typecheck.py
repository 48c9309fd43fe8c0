"""The check of annotations at call time really looks, and leaves a function's own errors alone."""

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from minillm.functional import norms
from tests.typecheck import check_after_the_call


@jaxtyped(typechecker=check_after_the_call)
def double(x: Float[np.ndarray, "B d"], scale: float = 1.0, **options: int) -> Float[np.ndarray, "B d"]:
    if x.ndim > 2:
        raise ValueError("double: x must have two axes")
    return x[:, :-1] if scale < 0 else 2 * scale * x


def test_a_fitting_call_passes():
    assert double(np.ones((2, 3))).sum() == 12
    assert double(np.ones((2, 3)), 2, option=3).sum() == 24  # an int will do for a float


def test_a_result_of_the_wrong_shape_is_found():
    with pytest.raises(TypeCheckError):
        double(np.ones((2, 3)), -1.0)


@pytest.mark.parametrize("x", [np.ones(3), np.ones((2, 3), int)])
def test_an_argument_taken_against_the_annotation_is_found(x):
    with pytest.raises(TypeCheckError):
        double(x)


def test_the_functions_own_error_comes_first():
    with pytest.raises(ValueError, match="two axes"):
        double(np.ones((1, 2, 3)))


def test_the_library_is_instrumented():
    assert norms.rms_norm.__wrapped__.__module__ == "minillm.functional.norms"
