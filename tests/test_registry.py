"""The walk over the registry: every form of every function is checked, and none can be left out."""

import dataclasses
import inspect
import typing
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from minillm.autograd import Tensor, gradcheck, registry
from minillm.autograd.operation import Derived
from tests import forms
from tests.strategies import examples, laid_out, layouts, seeds
from tests.tolerance import allowances, assert_within

ROWS = forms.all_rows()
FORMS = [(name, kind) for name, row in ROWS.items() for kind in row.forms]
PAIRS = [name for name, row in ROWS.items() if row.derived is not None]
EVERY_ROW = pytest.mark.parametrize("name", list(ROWS))
EVERY_FORM = pytest.mark.parametrize(("name", "kind"), FORMS, ids=[f"{n}-{k}" for n, k in FORMS])
EVERY_PAIR = pytest.mark.parametrize("name", PAIRS)

# Rounding may tell two float64 evaluations apart by some thousand units in the last place, no mistake by so few.
TIGHT = 1e-11


def example(name: str, seed: int) -> tuple[tuple, dict]:
    draw = ROWS[name].example
    assert draw is not None
    return draw(np.random.default_rng(seed))


def assert_close(found: list[np.ndarray], wanted: list[np.ndarray], what: str) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, (what, i, a.shape, b.shape)
        scale = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=TIGHT * scale, err_msg=f"{what}, array {i}")


# ---------------------------------------------------------------------------- nothing is left out


@EVERY_ROW
def test_a_row_has_an_example_and_the_right_forms(name):
    row = ROWS[name]
    assert row.example is not None, "a row without an example cannot be checked"
    assert row.primitive is not None or row.written is not None, "a derived form needs its as-written twin"
    assert not (row.primitive is not None and row.written is not None), "a primitive is its own as-written form"


def mentions_tensor(annotation: Any, seen: frozenset = frozenset()) -> bool:
    """Whether a type is, contains, or has a field that is a Tensor."""
    if annotation is Tensor or (isinstance(annotation, str) and "Tensor" in annotation):
        return True
    if annotation in seen or annotation is inspect.Parameter.empty:
        return False
    seen = seen | {annotation}
    inner = [getattr(annotation, "array_type", None), *typing.get_args(annotation)]
    if isinstance(annotation, type) and (dataclasses.is_dataclass(annotation) or issubclass(annotation, tuple)):
        inner += list(getattr(annotation, "__annotations__", {}).values())
    return any(mentions_tensor(part, seen) for part in inner if part is not None and part.__hash__ is not None)


def public_functions(module: ModuleType) -> dict[str, Any]:
    """The functions that a module defines itself and shows."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, Derived))
        and value.__module__ == module.__name__
    }


def differentiable(function: Any) -> bool:
    """Whether a function promises a tensor, so that somebody may ask for its gradient."""
    return mentions_tensor(inspect.signature(function).return_annotation)


# Public functions that return tensors and have no row, each with its reason.
NO_ROW = {
    "minillm.functional.feature_maps.feature_map": "looks a registered function up by its name",
    "minillm.functional.activation_family.activation": "looks a registered function up by its name",
    "minillm.fused.attention.cached_attention": "decoding only; refuses to be differentiated",
    "minillm.fused.latent_attention.cached_latent_attention": "decoding only; refuses to be differentiated",
    "minillm.functional.policy_losses.penalised_loss": "the common tail of the registered policy losses",
}


def unregistered(module: ModuleType) -> list[str]:
    """Names of the public differentiable functions of a module that no row names."""
    known = {id(form) for row in registry.rows() for form in row.forms.values()}
    return [
        f"{module.__name__}.{name}"
        for name, function in public_functions(module).items()
        if differentiable(function) and id(function) not in known and f"{module.__name__}.{name}" not in NO_ROW
    ]


@pytest.mark.parametrize("module", forms.import_all(), ids=lambda m: m.__name__)
def test_every_public_differentiable_function_is_registered(module):
    missing = unregistered(module)
    assert not missing, f"register these with @written(name, example=...), or they go unchecked: {missing}"


@pytest.mark.parametrize("module", forms.import_all(), ids=lambda m: m.__name__)
def test_every_public_function_that_takes_tensors_says_what_it_returns(module):
    silent = [
        name
        for name, function in public_functions(module).items()
        if not isinstance(function, Derived)
        and any(mentions_tensor(p.annotation) for p in inspect.signature(function).parameters.values())
        and inspect.signature(function).return_annotation is inspect.Signature.empty
    ]
    assert not silent, f"annotate the results of {silent}, so that a differentiable one cannot hide"


def test_the_detection_sees_a_function_that_was_forgotten():
    module = ModuleType("forgotten")
    exec(
        "from minillm.autograd import Tensor\n"
        "from typing import NamedTuple\n"
        "class Pair(NamedTuple):\n    loss: Tensor\n    count: int\n"
        "def loss(x: Tensor) -> Tensor: return x * x\n"
        "def pair(x: Tensor) -> Pair: return Pair(x, 1)\n"
        "def maybe(x: Tensor) -> Tensor | None: return x\n"
        "def count(x: Tensor) -> int: return 1\n"
        "def _hidden(x: Tensor) -> Tensor: return x\n",
        module.__dict__,
    )
    for value in vars(module).values():
        if inspect.isfunction(value):
            value.__module__ = "forgotten"
    assert unregistered(module) == ["forgotten.loss", "forgotten.pair", "forgotten.maybe"]


def test_an_exemption_names_a_function_that_exists():
    every = {f"{m.__name__}.{name}" for m in forms.import_all() for name in public_functions(m)}
    assert set(NO_ROW) <= every


# ---------------------------------------------------------------------------- gradients


@EVERY_FORM
@settings(max_examples=examples(3, 15))
@given(seed=seeds())
@pytest.mark.equation("gradient-check", "autograd-engine")
def test_the_gradient_is_that_of_finite_differences(name, kind, seed):
    args, kwargs = example(name, seed)
    gradcheck(ROWS[name].forms[kind], args, kwargs, name=f"{name}[{kind}]", rng=np.random.default_rng(seed))


@EVERY_FORM
@settings(max_examples=examples(1, 4))
@given(seed=seeds())
@pytest.mark.equation("gradient-check")
def test_the_gradient_of_the_gradient_is_that_of_finite_differences(name, kind, seed):
    """``create_graph``: primitives through their VJPs, derived forms through their as-written twins."""
    args, kwargs = example(name, seed)
    gradient, points = forms.gradient_function(ROWS[name].forms[kind], args, kwargs)
    gradcheck(gradient, points, name=f"gradient of {name}[{kind}]", rng=np.random.default_rng(seed))


# ---------------------------------------------------------------------------- written = derived


@EVERY_PAIR
@settings(max_examples=examples(6, 30))
@given(seed=seeds())
def test_written_equals_derived_in_float64(name, seed):
    args, kwargs = example(name, seed)
    written = forms.evaluate(ROWS[name].written, args, kwargs)
    derived = forms.evaluate(ROWS[name].derived, args, kwargs)
    assert_close(derived.arrays, written.arrays, name)


@EVERY_PAIR
@settings(max_examples=examples(6, 30))
@given(seed=seeds())
def test_written_equals_derived_in_float32_by_the_rule(name, seed):
    args, kwargs = example(name, seed)
    low = forms.as_dtype(args, np.float32)
    cotangents = forms.cotangents_for(forms.evaluate(ROWS[name].written, low, kwargs).values)

    def written(*inputs):
        outs = forms.evaluate(ROWS[name].written, inputs[: len(args)], kwargs, inputs[len(args) :])
        return outs.arrays

    longest = max([x.size for x in low if forms.is_float_array(x)], default=1)
    rng = np.random.default_rng(seed)
    allowed = allowances(written, [*low, *cotangents], K=max(longest, 1), rng=rng)
    derived = forms.evaluate(ROWS[name].derived, low, kwargs, cotangents)
    assert_within(derived.arrays, allowed, name)


@EVERY_PAIR
@settings(max_examples=examples(5, 15))
@given(seed=seeds())
def test_each_result_of_several_may_be_the_only_one_used(name, seed):
    """A derived form with several results gets no cotangent for those that nothing depends on."""
    args, kwargs = example(name, seed)
    n_results = len(forms.evaluate(ROWS[name].written, args, kwargs).values)

    for used in range(n_results):

        def only(form, used=used):
            return lambda *a, **k: forms.float_tensors(form(*a, **k))[used]

        written = forms.evaluate(only(ROWS[name].written), args, kwargs)
        derived = forms.evaluate(only(ROWS[name].derived), args, kwargs)
        assert_close(derived.arrays, written.arrays, f"{name}, result {used}")


# ---------------------------------------------------------------------------- contracts of every form


def takes_only_floats(name: str, args: tuple) -> bool:
    return name != "astype" and any(forms.is_float_array(x) for x in args)


@EVERY_FORM
@settings(max_examples=examples(3, 10))
@given(seed=seeds())
def test_float32_stays_float32(name, kind, seed):
    args, kwargs = example(name, seed)
    if not takes_only_floats(name, args):
        return
    found = forms.evaluate(ROWS[name].forms[kind], forms.as_dtype(args, np.float32), kwargs)
    assert {a.dtype for a in found.arrays} == {np.dtype(np.float32)}


@EVERY_FORM
@settings(max_examples=examples(2, 5))
@given(seed=seeds())
def test_inputs_and_cotangents_are_left_as_they_were(name, kind, seed):
    args, kwargs = example(name, seed)
    cotangents = forms.cotangents_for(forms.evaluate(ROWS[name].forms[kind], args, kwargs).values)
    held = [x for x in [*args, *kwargs.values(), *cotangents] if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in held]
    forms.evaluate(ROWS[name].forms[kind], args, kwargs, cotangents)
    assert [x.tobytes() for x in held] == before


@EVERY_FORM
@settings(max_examples=examples(2, 5))
@given(seed=seeds())
def test_two_calls_are_bitwise_equal(name, kind, seed):
    args, kwargs = example(name, seed)
    first = forms.evaluate(ROWS[name].forms[kind], args, kwargs)
    again = forms.evaluate(ROWS[name].forms[kind], args, kwargs)
    assert [a.tobytes() for a in first.arrays] == [a.tobytes() for a in again.arrays]


@EVERY_FORM
@settings(max_examples=examples(3, 10))
@given(seed=seeds(), layout=layouts())
def test_the_memory_layout_of_inputs_and_cotangents_does_not_matter(name, kind, seed, layout):
    args, kwargs = example(name, seed)
    form = ROWS[name].forms[kind]
    plain = forms.evaluate(form, args, kwargs)
    cotangents = forms.cotangents_for(plain.values)

    def relaid(x):
        return laid_out(x, layout) if isinstance(x, np.ndarray) and kind != "scatter_add" else x

    found = forms.evaluate(
        form,
        [relaid(x) for x in args],
        {key: relaid(x) for key, x in kwargs.items()},
        [laid_out(c, layout) for c in cotangents],
    )
    assert_close(found.arrays, plain.arrays, f"{name}[{kind}] {layout}")


# ---------------------------------------------------------------------------- the empty batch


def leading_axis(annotation: Any) -> str | None:
    """The first axis that a jaxtyping annotation names, or None."""
    for part in (annotation, *typing.get_args(annotation)):
        axes = getattr(part, "dim_str", "").split()
        if axes:
            return axes[0]
    return None


def named_axes(annotation: Any) -> int:
    """How many axes an annotation names one by one."""
    for part in (annotation, *typing.get_args(annotation)):
        if hasattr(part, "dim_str"):
            return len([axis for axis in part.dim_str.split() if axis[0] not in "*."])
    return 0


def without_batch(function: Any, args: tuple, kwargs: dict) -> tuple[list, dict] | None:
    """The arguments with no sequence in the batch, or None where the function has no batch axis."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    notes = {k: p.annotation for k, p in inspect.signature(function).parameters.items()}
    batch = None
    for key, value in bound.arguments.items():
        axis = leading_axis(notes[key])
        if (
            isinstance(value, np.ndarray)
            and axis in ("B", "*B")
            and value.ndim > named_axes(notes[key]) - (axis == "B")
        ):
            batch = value.shape[0] if value.ndim else None
            break
    if batch is None:
        return None

    def cut(value: Any, note: Any) -> Any:
        shapeless = leading_axis(note) is None and (note in (Any, None) or mentions_tensor(note))
        batched = shapeless or leading_axis(note) in ("B", "*B")
        fits = isinstance(value, np.ndarray) and value.ndim >= 1 and value.shape[0] == batch
        return value[:0] if batched and fits else value

    names = list(bound.arguments)
    return (
        [cut(value, notes[key]) for key, value in zip(names, args)],
        {key: cut(value, notes.get(key)) for key, value in kwargs.items()},
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n, k in FORMS if k != "primitive"],
    ids=[f"{n}-{k}" for n, k in FORMS if k != "primitive"],
)
def test_an_empty_batch_is_no_error(name, kind):
    for seed in range(6):
        cut = without_batch(ROWS[name].written, *example(name, seed))
        if cut is None:
            continue
        found = forms.evaluate(ROWS[name].forms[kind], *cut)
        assert all(np.all(np.isfinite(a)) for a in found.values), found.values
