"""Softmax and its relatives, and the affine map: written and derived, beside torch, at huge and infinite logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, no_grad
from minillm.functional import linear as written_linear
from minillm.functional import softmax as written
from minillm.fused import linear as derived_linear
from minillm.fused import softmax as derived
from tests import forms, strategies
from tests.oracles import torch_oracle

BOTH = pytest.mark.parametrize("form", [written, derived], ids=["written", "derived"])
BOTH_LINEAR = pytest.mark.parametrize("form", [written_linear, derived_linear], ids=["written", "derived"])
ROWS = st.sampled_from([(3,), (2, 4), (1, 1), (0, 3), (2, 2, 5)])


def agree(ours, theirs, atol=1e-12):
    for a, b in zip(ours.arrays, theirs.arrays, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-12)


FUNCTIONS = {
    "softmax": lambda z: torch.softmax(z, -1),
    "log_softmax": lambda z: torch.log_softmax(z, -1),
    "logsumexp": lambda z: torch.logsumexp(z, -1),
}


@BOTH
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.equation("softmax", "softmax-stable", "logsumexp", "log-softmax")
@settings(max_examples=15)
@given(data=st.data(), shape=ROWS)
def test_values_and_gradients_are_those_of_torch(form, name, data, shape):
    z = data.draw(strategies.contents(shape)) * data.draw(st.sampled_from([1.0, 100.0]))
    ours = forms.evaluate(getattr(form, name), (z,), {})
    agree(ours, torch_oracle.evaluate(FUNCTIONS[name], (z,), {}, forms.cotangents_for(ours.values)))


@BOTH
@pytest.mark.equation("softmax-stable", "log-softmax", "logsumexp")
@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]))
def test_huge_logits_stay_finite_and_rows_sum_to_one(form, data, dtype):
    z = data.draw(strategies.huge((2, 4), dtype))
    for name in FUNCTIONS:
        found = forms.evaluate(getattr(form, name), (z,), {})
        assert all(np.all(np.isfinite(a)) for a in found.arrays), name
    np.testing.assert_allclose(form.softmax(Tensor(z)).data.sum(-1), 1, rtol=1e-6)


@pytest.mark.equation("softmax", "softmax-stable")
@settings(max_examples=25)
@given(data=st.data(), shape=ROWS)
def test_the_shift_changes_nothing_but_the_overflow(data, shape):
    z = data.draw(strategies.ordinary(shape))
    plain = forms.evaluate(written.softmax_unshifted, (z,), {})
    shifted = forms.evaluate(written.softmax, (z,), {})
    for a, b in zip(plain.arrays, shifted.arrays, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
    with np.errstate(all="ignore"), no_grad():
        assert np.isnan(written.softmax_unshifted(Tensor([1000.0, 1001.0])).data).all()
    assert np.isfinite(written.softmax(Tensor([1000.0, 1001.0])).data).all()


@BOTH
@pytest.mark.equation("softmax-stable", "log-softmax")
def test_an_impossible_choice_has_probability_zero(form):
    z = Tensor(np.array([[1.0, -np.inf, 2.0]]))
    assert form.softmax(z).data[0, 1] == 0 and form.log_softmax(z).data[0, 1] == -np.inf
    two = form.softmax(Tensor(np.array([[1.0, 2.0]]))).data[0]
    np.testing.assert_allclose(form.softmax(z).data[0, [0, 2]], two, atol=1e-15)


@BOTH
@pytest.mark.equation("logsumexp")
def test_a_sum_of_nothing_possible_is_zero_and_its_logarithm_minus_infinity(form):
    z = Tensor(np.array([[-np.inf, -np.inf], [0.0, -np.inf]]))
    with np.errstate(divide="ignore"):
        assert form.logsumexp(z).tolist() == [-np.inf, 0.0]


@BOTH
@pytest.mark.equation("gather-logprob", "log-softmax")
@settings(max_examples=25)
@given(data=st.data(), shape=st.sampled_from([(2, 3, 5), (4, 2), (3,), (0, 4), (2, 1, 1)]))
def test_the_chosen_log_probability_is_one_entry_of_log_softmax(form, data, shape):
    z = data.draw(strategies.contents(shape))
    chosen = data.draw(st.integers(0, 2**31)) + np.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1])
    chosen = np.asarray(chosen % shape[-1])
    ours = forms.evaluate(form.token_logprobs, (z, chosen), {})

    def theirs(logits, ids):
        picks = torch.as_tensor(ids)[..., None]
        return torch.log_softmax(logits, -1).gather(-1, picks)[..., 0]

    agree(ours, torch_oracle.evaluate(theirs, (z, chosen), {}, forms.cotangents_for(ours.values)))


@BOTH
@pytest.mark.equation("gather-logprob")
def test_erratum_8_the_log_probability_of_a_token_comes_from_the_position_before_it(form):
    """Logits at t - 1 predict token t: shifting is the caller's, and forgetting it gives another number."""
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]))
    tokens = np.array([2, 0, 2])
    shifted = form.token_logprobs(Tensor(logits[:-1]), tokens[1:]).data
    np.testing.assert_allclose(np.exp(shifted), [0.7, 0.8])
    unshifted = form.token_logprobs(Tensor(logits), tokens).data
    np.testing.assert_allclose(np.exp(unshifted), [0.1, 0.1, 1 / 3])


@BOTH_LINEAR
@pytest.mark.equation("linear-layer")
@settings(max_examples=20)
@given(data=st.data(), lead=st.sampled_from([(), (4,), (2, 3), (0,), (2, 0, 1)]), bias=st.booleans())
def test_the_affine_map_is_that_of_torch(form, data, lead, bias):
    args = [data.draw(strategies.ordinary((*lead, 3))), data.draw(strategies.ordinary((2, 3)))]
    args += [data.draw(strategies.ordinary((2,)))] if bias else []
    ours = forms.evaluate(form.linear, args, {})
    agree(ours, torch_oracle.evaluate(torch.nn.functional.linear, args, {}, forms.cotangents_for(ours.values)))


@BOTH_LINEAR
@pytest.mark.equation("linear-layer")
def test_batched_is_the_column_form_one_row_at_a_time(form):
    rng = np.random.default_rng(0)
    X, W, b = rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.normal(size=2)
    rows = [W @ x + b for x in X]
    np.testing.assert_allclose(form.linear(Tensor(X), Tensor(W), Tensor(b)).data, rows, atol=1e-15)


def T(*shape: int) -> Tensor:
    return Tensor(np.ones(shape))


@BOTH
@pytest.mark.parametrize(
    ("logits", "chosen", "error", "text"),
    [
        (T(2, 3), np.array([0, 3]), IndexError, r"token_logprobs: ids must be in \[0, 3\), got 3"),
        (T(2, 3), np.array([0, -1]), IndexError, "got -1"),
        (T(2, 3), np.array([0]), ValueError, r"the choices must be of shape \(2,\), got shape \(1,\)"),
        (T(2, 3), np.array([0.0, 1.0]), TypeError, "the ids must be integers"),
    ],
)
def test_choices_that_do_not_fit_are_refused(form, logits, chosen, error, text):
    with pytest.raises(error, match=text):
        form.token_logprobs(logits, chosen)


@BOTH_LINEAR
@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((T(2, 3), T(3, 4)), r"linear: the last axis of x must be d_in = 4 long.*got shape \(2, 3\)"),
        ((T(2, 3), T(3)), r"linear: the weight must be of shape \(d_out, d_in\)"),
        ((T(2, 3), T(4, 3), T(3)), r"linear: the bias must be of shape \(4,\), got shape \(3,\)"),
    ],
)
def test_widths_that_do_not_fit_are_refused(form, args, text):
    with pytest.raises(ValueError, match=text):
        form.linear(*args)
