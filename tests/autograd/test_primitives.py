"""Every primitive beside torch and HIPS autograd: values, gradients, broadcasting, ties, names."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minillm.autograd import primitives as ops
from minillm.autograd import registry
from tests import forms, strategies
from tests.oracles import hips, torch_oracle

pytestmark = pytest.mark.equation("autograd-engine")

PRIMITIVES = [row.name for row in registry.rows() if row.primitive is not None]
EVERY_PRIMITIVE = pytest.mark.parametrize("name", PRIMITIVES)
BINARY = ["add", "subtract", "multiply", "divide", "maximum", "minimum", "logaddexp", "power"]
UNARY = ["negative", "exp", "expm1", "sin", "cos", "tanh", "sigmoid", "erf", "absolute", "relu", "alias"]
ON_POSITIVE = ["log", "log1p", "sqrt"]
TIGHT = 1e-12


def agree(ours: forms.Evaluation, theirs: forms.Evaluation, what: str) -> None:
    for a, b in zip(ours.arrays, theirs.arrays, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (what, a.shape, b.shape, a.dtype, b.dtype)
        np.testing.assert_allclose(a, b, rtol=TIGHT, atol=TIGHT, err_msg=what)


def compare(name: str, args, kwargs=None, **also) -> None:
    kwargs = kwargs or {}
    ours = forms.evaluate(registry.row(name).primitive, args, kwargs)
    cotangents = forms.cotangents_for(ours.values)
    agree(ours, torch_oracle.evaluate(torch_oracle.TWINS[name], args, kwargs, cotangents), f"{name} and torch")
    if also.get("second", True):
        agree(ours, hips.evaluate(hips.TWINS[name], args, kwargs, cotangents[0]), f"{name} and HIPS")


@pytest.mark.parametrize("oracle", [torch_oracle, hips])
def test_every_primitive_has_a_twin_in_both_libraries(oracle):
    assert set(oracle.TWINS) == set(PRIMITIVES)


@EVERY_PRIMITIVE
@settings(max_examples=10)
@given(seed=strategies.seeds())
def test_a_primitive_agrees_with_both_libraries_at_its_examples(name, seed):
    args, kwargs = registry.row(name).example(np.random.default_rng(seed))
    compare(name, args, kwargs)


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=25)
@given(data=st.data(), shapes=strategies.broadcast_shapes(2))
def test_a_binary_primitive_undoes_every_broadcast(name, data, shapes):
    left, right = shapes
    x = data.draw(strategies.positive(left) if name == "power" else strategies.contents(left))
    y = data.draw(strategies.positive(right) if name == "divide" else strategies.contents(right))
    compare(name, (x, y))


@settings(max_examples=25)
@given(data=st.data(), shapes=strategies.broadcast_shapes(3))
def test_where_undoes_every_broadcast(data, shapes):
    condition = data.draw(strategies.keep_masks(shapes[0]))
    compare("where", (condition, data.draw(strategies.contents(shapes[1])), data.draw(strategies.contents(shapes[2]))))


@pytest.mark.parametrize("name", UNARY + ON_POSITIVE)
@settings(max_examples=12)
@given(data=st.data(), shape=strategies.shapes())
def test_a_unary_primitive_takes_every_shape_and_ties_and_zeros(name, data, shape):
    x = data.draw(strategies.positive(shape) if name in ON_POSITIVE else strategies.contents(shape))
    compare(name, (x,), second=name != "absolute")  # HIPS gives |x| the slope NaN at 0


@settings(max_examples=25)
@given(data=st.data(), low=st.sampled_from([None, -1.0, 0.0]), high=st.sampled_from([None, 1.0]))
def test_clip_passes_the_gradient_at_its_bounds(data, low, high):
    x = data.draw(strategies.tied((2, 3)))
    ours = forms.evaluate(ops.clip, (x,), {"low": low, "high": high})
    inside = (x >= (-np.inf if low is None else low)) & (x <= (np.inf if high is None else high))
    np.testing.assert_array_equal(ours.gradients[0], np.where(inside, forms.cotangents_for(ours.values)[0], 0))
    if low is not None or high is not None:
        compare("clip", (x,), {"low": low, "high": high}, second=False)  # HIPS stops it there


@pytest.mark.parametrize("name", ["sum", "amax", "amin"])
@settings(max_examples=25)
@given(data=st.data())
def test_a_reduction_over_any_axes_shares_ties_evenly(name, data):
    shape = data.draw(strategies.shapes(max_dims=3, min_side=0 if name == "sum" else 1))
    axes = st.sets(st.integers(-len(shape), len(shape) - 1)) if shape else st.just(set())
    drawn = data.draw(st.one_of(st.none(), axes.map(lambda found: {a % len(shape) for a in found} if shape else found)))
    axis = None if drawn is None else tuple(sorted(drawn))
    if axis == ():
        return  # torch takes an empty tuple for all axes, NumPy for none
    keepdims = data.draw(st.booleans())
    x = data.draw(strategies.contents(shape))
    compare(name, (x,), {"axis": axis, "keepdims": keepdims}, second=bool(x.size) and axis is None)


@settings(max_examples=25)
@given(data=st.data(), batch=strategies.broadcast_shapes(2, max_dims=2), sizes=st.tuples(*[st.integers(0, 3)] * 3))
def test_matmul_undoes_the_broadcast_of_its_batch(data, batch, sizes):
    m, p, n = sizes
    x = data.draw(strategies.ordinary((*batch[0], m, p)))
    y = data.draw(strategies.ordinary((*batch[1], p, n)))
    compare("matmul", (x, y), second=False)


@settings(max_examples=40)
@given(data=st.data(), shape=strategies.shapes(min_dims=1, min_side=1))
def test_any_basic_index(data, shape):
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    compare("getitem", (data.draw(strategies.ordinary(shape)),), {"index": index})


@settings(max_examples=25)
@given(data=st.data(), shape=strategies.shapes(min_dims=1, min_side=1))
def test_any_integer_index_with_repeats_and_any_mask(data, shape):
    x = data.draw(strategies.ordinary(shape))
    compare("getitem", (x,), {"index": data.draw(hnp.integer_array_indices(shape))})
    compare("getitem", (x,), {"index": data.draw(hnp.arrays(np.bool_, shape))})


@settings(max_examples=20)
@given(data=st.data(), parts=st.integers(1, 3), axis=st.integers(-2, 1))
def test_concatenate_parts_of_any_length(data, parts, axis):
    shapes = [(2, 3) for _ in range(parts)]
    drawn = [list(s) for s in shapes]
    for s in drawn:
        s[axis] = data.draw(st.integers(0, 3))
    compare("concatenate", tuple(data.draw(strategies.ordinary(tuple(s))) for s in drawn), {"axis": axis % 2})


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "relu", "absolute", "erf"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_values_give_what_torch_gives(name, dtype):
    x = np.array([-np.inf, -1e30, -800.0, -100.0, 0.0, 100.0, 800.0, 1e30, np.inf, np.nan]).astype(dtype)
    with np.errstate(all="ignore"):
        ours = forms.evaluate(getattr(ops, name), (x,), {})
    theirs = torch_oracle.evaluate(torch_oracle.TWINS[name], (x,), {}, forms.cotangents_for(ours.values))
    np.testing.assert_allclose(ours.values[0], theirs.values[0], rtol=1e-6)
    at_a_point = np.isfinite(x)
    np.testing.assert_allclose(ours.gradients[0][at_a_point], theirs.gradients[0][at_a_point], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
@settings(max_examples=25)
def test_logaddexp_of_huge_values_does_not_overflow(dtype, data):
    x, y = data.draw(strategies.huge((4,), dtype)), data.draw(strategies.huge((4,), dtype))
    found = forms.evaluate(ops.logaddexp, (x, y), {})
    assert all(np.all(np.isfinite(a)) for a in found.arrays)
    total = np.abs(found.gradients[0] + found.gradients[1] - forms.cotangents_for(found.values)[0])
    assert total.max() < 1e-5  # the two shares of the gradient add up to the whole


def test_the_slope_of_a_power_at_zero():
    """x ** 0 is constant, and 0 ** y has no finite slope in y: both give 0 and not NaN."""
    x, y = np.array([0.0, 0.0, 2.0, -2.0]), np.array([0.0, 2.0, 0.0, 2.0])
    found = forms.evaluate(ops.power, (x, y), {})
    theirs = torch_oracle.evaluate(torch_oracle.TWINS["power"], (x, y), {}, forms.cotangents_for(found.values))
    np.testing.assert_allclose(found.gradients[0], theirs.gradients[0])
    np.testing.assert_allclose(found.gradients[1][:3], theirs.gradients[1][:3])
    assert found.gradients[1][3] == 0
