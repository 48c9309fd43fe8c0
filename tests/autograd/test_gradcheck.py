"""The gradient check itself: it lets right gradients pass, catches wrong ones, and says where."""

import numpy as np
import pytest

from minillm.autograd import GradientError, Tensor, gradcheck
from minillm.autograd import primitives as ops
from minillm.autograd.gradcheck import ELEMENTWISE_UP_TO, FLOOR, check_row
from minillm.autograd.operation import Derived
from minillm.autograd.registry import Row, register, row, rows

pytestmark = pytest.mark.equation("gradient-check")


def form(slope, name="cube_for_this_test"):
    """x^3 with a claimed gradient of dy * slope(x), as a derived form that no registry knows."""
    return Derived(name, lambda x: (x**3, lambda dy: dy * slope(x)))


X = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])


def test_a_right_gradient_passes_with_room():
    result = gradcheck(form(lambda x: 3 * x**2), [X])
    assert result.passed and result.max_rel_error < result.allowed and result.allowed >= FLOOR
    assert result.checks == 1 + X.size


def one_wrong_entry(x):
    slope = 3 * x**2
    slope[1, 2] *= 1.001
    return slope


WRONG = {
    "a flipped sign": lambda x: -3 * x**2,
    "a wrong factor": lambda x: 2 * x**2,
    "one part in a million": lambda x: 3 * x**2 * (1 + 1e-6),
    "one entry": one_wrong_entry,
    "a dropped term": lambda x: 3 * x**2 - x,
    "zeros": lambda x: 0 * x,
    "NaN": lambda x: np.where(x == 2.0, np.nan, 3 * x**2),
    "infinity": lambda x: np.where(x == 2.0, np.inf, 3 * x**2),
    "the neighbour's": lambda x: np.roll(3 * x**2, 1),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_gradient_is_caught(mistake):
    result = gradcheck(form(WRONG[mistake]), [X], raise_on_failure=False)
    assert not result.passed
    with pytest.raises(GradientError, match="gradcheck: cube has a wrong gradient at"):
        gradcheck(form(WRONG[mistake]), [X], name="cube")


def test_the_failure_names_the_worst_entry_and_both_numbers():
    with pytest.raises(GradientError, match=r"input 0, entry \(1, 2\): gradient 0\.6108\d*, finite difference 0\.6101"):
        gradcheck(form(one_wrong_entry), [X])


def test_a_large_input_is_checked_along_a_random_direction():
    x = np.random.default_rng(0).normal(size=(ELEMENTWISE_UP_TO + 1,))
    result = gradcheck(form(lambda x: 3 * x**2), [x])
    assert result.passed and result.checks == 1

    def wrong_in_one(x):
        slope = 3 * x**2
        slope[17] += 1.0
        return slope

    failed = gradcheck(form(wrong_in_one), [x], raise_on_failure=False)
    assert not failed.passed and "along a random direction" in failed.worst


def test_a_forgotten_dependence_is_caught():
    """A result that depends on its input but says that it does not."""
    assert not gradcheck(lambda x: Tensor(x.data * 2.0), [X], raise_on_failure=False).passed
    assert not gradcheck(lambda x: x.detach() * x, [X], raise_on_failure=False).passed


def test_a_broadcast_that_is_not_undone_cannot_hide():
    stretched = Derived("stretched", lambda x, y: (x * y, lambda dy: (dy * y, (dy * x)[0])))
    assert not gradcheck(stretched, [X, np.ones(3)], raise_on_failure=False).passed


def test_inputs_of_several_kinds():
    index = np.array([2, 0])
    assert gradcheck(lambda x, i: x[:, i] * 2.0, [X, index]).passed
    assert gradcheck(lambda x, flag: x * (2.0 if flag else 1.0), [X, True]).passed
    assert gradcheck(lambda x, y: x @ y, [Tensor(X), X.T.astype(np.float32)]).passed
    assert gradcheck(lambda x, power: x**power, [np.abs(X)], {"power": 3}).passed
    assert gradcheck(lambda x: (x, {"note": 1}, x * 2.0), [X]).passed
    assert gradcheck(ops.exp, [np.float64(0.5)]).passed
    assert gradcheck(ops.exp, [np.zeros((0, 3))]).passed


def test_no_floating_point_input_is_an_error():
    with pytest.raises(ValueError, match="needs at least one floating-point input"):
        gradcheck(lambda i: i, [np.arange(3)], name="counting")


def test_inputs_are_not_changed_and_nothing_accumulates():
    x = Tensor(X.copy(), requires_grad=True)
    gradcheck(ops.exp, [x])
    assert x.grad is None and np.array_equal(x.data, X)


def test_the_allowance_grows_where_finite_differences_are_poor():
    """Next to a pole the truncation error is large; halving the step tells, and no correct gradient fails."""
    result = gradcheck(lambda x: 1.0 / x, [np.array([2e-4])])
    assert result.passed and result.allowed > 10 * FLOOR


def test_a_row_without_example_is_an_error():
    with pytest.raises(ValueError, match="'bare' has no example to be checked at"):
        check_row(Row("bare", written=lambda x: x), np.random.default_rng(0))


def test_a_row_is_checked_in_every_form_and_the_worst_draw_is_reported():
    draws = iter([X, X * 2, X])
    line = Row(
        "cube",
        written=lambda x: x**3,
        derived=form(lambda x: 3 * x**2 + (np.abs(x).max() > 3)),
        example=lambda rng: ((next(draws),), {}),
    )
    good, bad = check_row(line, np.random.default_rng(0), draws=3)
    assert good.name == "cube[written]" and good.passed
    assert bad.name == "cube[derived]" and not bad.passed


def test_the_registry_refuses_a_name_twice_and_says_what_it_does_not_know():
    with pytest.raises(ValueError, match="'exp' already has a primitive form"):
        register("exp", primitive=lambda x: x)
    with pytest.raises(KeyError, match="no function called 'expp'"):
        row("expp")
    assert "exp" in {r.name for r in rows()}
