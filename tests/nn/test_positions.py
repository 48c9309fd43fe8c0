"""Kinds of positions by name: what each one adds, turns and biases, and bad input."""

from typing import Any

import numpy as np
import pytest

from minillm.autograd import Tensor
from minillm.nn.positions import KINDS, make_positions

SIZES: dict[str, Any] = {"context": 16, "d_model": 8, "n_heads": 2, "d_head": 4}


def stream(rng, *shape):
    return Tensor(rng.normal(size=shape).astype(np.float32))


@pytest.mark.equation("pos-sinusoidal", "pos-learned", "pos-rope", "pos-alibi", "pos-relative-bias", "pos-nope")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_works_in_its_own_place(kind):
    rng = np.random.default_rng(0)
    made = make_positions(kind, rng, **SIZES)
    x, heads, at = stream(rng, 2, 5, 8), stream(rng, 2, 2, 5, 4), np.arange(5)
    changed = {
        "add": not np.array_equal(made.add(x, at).data, x.data),
        "turn": not np.array_equal(made.turn(heads, at).data, heads.data),
        "bias": made.bias(at, at) is not None,
    }
    wanted = {"sinusoidal": "add", "learned": "add", "rope": "turn", "alibi": "bias", "t5": "bias"}.get(kind)
    assert changed == {place: place == wanted for place in changed}
    assert made.turns == (kind == "rope")


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rope"])
def test_a_slice_of_positions_is_a_slice_of_the_result(kind):
    rng = np.random.default_rng(1)
    made = make_positions(kind, rng, **SIZES)
    x, heads, at = stream(rng, 2, 6, 8), stream(rng, 2, 2, 6, 4), np.arange(3, 9)
    np.testing.assert_allclose(made.add(x, at)[:, 2:].data, made.add(x[:, 2:], at[2:]).data)
    np.testing.assert_allclose(made.turn(heads, at)[:, :, 2:].data, made.turn(heads[:, :, 2:], at[2:]).data)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rope"])
def test_positions_outside_the_context_are_refused(kind):
    rng = np.random.default_rng(2)
    made = make_positions(kind, rng, **SIZES)
    with pytest.raises(IndexError, match=r"positions must be in \[0, 16\), got 14..16"):
        at = np.arange(14, 17)
        made.turn(stream(rng, 1, 2, 3, 4), at) if made.turns else made.add(stream(rng, 1, 3, 8), at)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="make_positions: positions must be one of 'none', 'sinusoidal'"):
        make_positions("compass", np.random.default_rng(0), **SIZES)
