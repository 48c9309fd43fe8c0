"""The step of generation computes what the whole model computes."""

import numpy as np
import pytest

from minillm.autograd import no_grad
from minillm.models import Config, Decoder
from minillm.models.one_token import lay_out

V, LENGTH = 31, 12


def model_of(dtype=np.float32, **changes) -> Decoder:
    rng = np.random.default_rng(0)
    settings = {
        "d_model": 24,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "context": LENGTH,
        "init_std": 0.3,
        **changes,
    }
    model = Decoder(Config(V, **settings), rng)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.astype(dtype)
        if name.endswith("gain"):
            parameter.data[...] = rng.uniform(0.5, 1.5, parameter.shape)
    return model


@pytest.mark.equation("kv-cache", "pre-ln", "gqa", "pos-rope")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_pairing": "half"},
        {"n_kv_heads": 6},
        {"n_kv_heads": 1, "tied": True},
        {"norm_eps": 0.3, "rope_base": 50.0},
    ],
)
def test_token_by_token_is_the_whole_text_at_once(changes, B, dtype):
    model = model_of(dtype, **changes)
    ids = np.random.default_rng(1).integers(0, V, size=(B, LENGTH))
    expected = model(ids).data
    with no_grad():
        cache = model.new_cache(B)
        found = [model(ids[:, :4], cache).data]
        found += [model(ids[:, t : t + 1], cache).data for t in range(4, LENGTH)]
    assert cache.length == LENGTH and found[1].shape == (B, 1, V)
    assert {part.dtype for part in found} == {np.dtype(dtype)}
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=tolerance * np.abs(expected).max())


def test_weights_are_left_as_they_are():
    model = model_of()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    with no_grad():
        cache = model.new_cache(2)
        for _ in range(3):
            model(np.array([[1], [2]]), cache)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_gate_far_below_zero_is_closed_without_a_warning():
    model = model_of(n_layers=1)
    block = model.blocks[0]
    block.ffn.w_value_gate.data[block.ffn.w_down.shape[1] :] *= 1e6
    with no_grad():
        assert np.isfinite(model(np.array([[1]]), model.new_cache(1)).data).all()


def test_a_full_cache_and_ids_outside_the_vocabulary_are_refused():
    model = model_of()
    with no_grad():
        cache = model.new_cache(1, 2)
        model(np.array([[1]]), cache)
        for bad in (-1, V):
            with pytest.raises(IndexError, match=rf"ids must be in \[0, {V}\), got {bad}"):
                model(np.array([[bad]]), cache)
        with pytest.raises(TypeError, match="integers"):
            model(np.array([[0.5]]), cache)
        assert cache.length == 1
        model(np.array([[1]]), cache)
        with pytest.raises(ValueError, match="the context must be at most 2 tokens long"):
            model(np.array([[1]]), cache)


@pytest.mark.parametrize("tied", [True, False])
def test_another_layout_is_the_same_model(tied):
    model, ids = model_of(tied=tied), np.random.default_rng(1).integers(0, V, size=(2, LENGTH))
    before, weights = model(ids).data, {name: array.copy() for name, array in model.state_dict().items()}
    lay_out(model)
    assert model.output_weight.data.flags.f_contiguous
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, weights[name])
    np.testing.assert_allclose(model(ids).data, before, atol=1e-5)
    with no_grad():
        cache = model.new_cache(2)
        found = [model(ids[:, t : t + 1], cache).data for t in range(LENGTH)]
    np.testing.assert_allclose(np.concatenate(found, axis=1), before, atol=1e-5 * np.abs(before).max())
