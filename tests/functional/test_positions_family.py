"""Positions of every kind and the size of logits: formulas, relations, transformers' own, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional import absolute_positions as absolute
from minillm.functional import output_head as head
from minillm.functional import relative_positions as relative
from minillm.functional.attention import scaled_dot_product_attention
from minillm.functional.masks import causal_mask
from minillm.functional.norms import rms_norm
from minillm.functional.positions import rotation_angles
from minillm.functional.rope_scaling import RopeScaling, scaled_rotation


@pytest.mark.equation("pos-sinusoidal")
@given(st.integers(0, 500), st.integers(0, 50), st.sampled_from([2, 4, 10]))
def test_sinusoids_are_the_formula_and_a_shift_is_a_rotation(p, delta, d):
    pe = absolute.sinusoidal_positions(np.array([p, p + delta]), d)
    for i in range(d // 2):
        theta = 10_000.0 ** (-2 * i / d)
        assert pe[0, 2 * i] == pytest.approx(np.sin(p * theta), abs=1e-12)
        assert pe[0, 2 * i + 1] == pytest.approx(np.cos(p * theta), abs=1e-12)
        c, s = np.cos(delta * theta), np.sin(delta * theta)
        np.testing.assert_allclose(
            np.array([[c, s], [-s, c]]) @ pe[0, 2 * i : 2 * i + 2], pe[1, 2 * i : 2 * i + 2], atol=1e-12
        )


@pytest.mark.equation("pos-learned")
def test_learned_positions_are_rows_of_a_table():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 4)), rng.normal(size=(6, 4))
    np.testing.assert_array_equal(absolute.add_learned_positions(Tensor(x), Tensor(w), np.arange(3)).data, x + w[:3])
    mixed = np.array([[0, 1, 2], [5, 0, 0]])
    np.testing.assert_array_equal(absolute.add_learned_positions(Tensor(x), Tensor(w), mixed).data, x + w[mixed])


def angles_of_transformers(config_of, positions, d_head, base, L_train):
    """What the library rotates by: (angles, magnitude)."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4 * d_head, num_attention_heads=4, max_position_embeddings=L_train,
        rope_parameters={"rope_theta": base, **config_of},
    )  # fmt: skip
    inverse, magnitude = rope_utils.ROPE_INIT_FUNCTIONS[config_of["rope_type"]](config, torch.device("cpu"))
    return positions[:, None] * inverse.double().numpy(), magnitude


@pytest.mark.equation("pos-rope-scaling")
@pytest.mark.parametrize("d_head", [8, 64])
@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (RopeScaling("yarn", 4.0, 512), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False}),
        (
            RopeScaling("llama3", 8.0, 512, 1.0, 4.0),
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
        ),
    ],
)  # fmt: skip
def test_transformers_agrees_on_stretched_rotations(scaling, theirs, d_head):
    """Yarn differs by design: the library blends linearly in the pair's index, the paper in its number of turns."""
    positions = np.arange(0, 3000, 97)
    ours = scaled_rotation(positions, d_head, 10_000.0, scaling)
    angles, magnitude = angles_of_transformers(theirs, positions, d_head, 10_000.0, 2048)
    assert ours.magnitude == pytest.approx(magnitude)
    if scaling.kind == "yarn":
        plain = rotation_angles(positions, d_head)
        assert (ours.angles <= plain + 1e-9).all() and (ours.angles >= plain / scaling.factor - 1e-9).all()
        np.testing.assert_allclose(ours.angles[:, [0, -1]], angles[:, [0, -1]], rtol=1e-5)
    else:
        np.testing.assert_allclose(ours.angles, angles, rtol=1e-5)


@pytest.mark.equation("pos-rope-scaling")
@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn", "llama3"])
def test_factor_one_is_plain_rotation(kind):
    plain = rotation_angles(np.arange(20), 8)
    scaled = scaled_rotation(np.arange(20), 8, scaling=RopeScaling(kind, 1.0, 16))
    np.testing.assert_allclose(scaled.angles, plain, rtol=1e-12)
    assert scaled.magnitude == 1.0


@pytest.mark.equation("pos-rope-scaling")
def test_ntk_stretches_the_slowest_pair_fully_and_the_fastest_not_at_all():
    s, d = 4.0, 16
    plain, scaled = (
        rotation_angles(np.ones(1), d)[0],
        scaled_rotation(np.ones(1), d, scaling=RopeScaling("ntk", s)).angles[0],
    )
    assert scaled[0] == plain[0] and scaled[-1] == pytest.approx(plain[-1] / s)


@pytest.mark.equation("pos-alibi")
def test_alibi_slopes_and_biases():
    np.testing.assert_array_equal(relative.alibi_slopes(8), [2.0**-h for h in range(1, 9)])
    slopes = relative.alibi_slopes(12)
    np.testing.assert_allclose(slopes[:8], relative.alibi_slopes(8))
    np.testing.assert_allclose(slopes[8:], relative.alibi_slopes(16)[[0, 2, 4, 6]])
    bias = relative.alibi_bias(np.array([3]), np.arange(5), 2)
    np.testing.assert_allclose(bias[:, 0], -np.array([[1 / 16], [1 / 256]]) * [3, 2, 1, 0, 1])


@pytest.mark.equation("pos-relative-bias")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_transformers_agrees_on_every_bucket(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-300, 301)
    for n_buckets, D_max in ((32, 128), (8, 20)):
        theirs = t5.T5Attention._relative_position_bucket(
            torch.tensor(-distance), bidirectional, n_buckets, D_max
        ).numpy()
        ours = relative.relative_bucket(distance, n_buckets, D_max, bidirectional=bidirectional)
        # At the very borders of a bucket, float32 there and float64 here may round to different sides.
        assert (ours != theirs).mean() < 0.01
        assert ours.min() >= 0 and ours.max() == n_buckets - 1
        near = np.abs(distance) < n_buckets // (4 if bidirectional else 2)
        np.testing.assert_array_equal(ours[near], theirs[near])


@pytest.mark.equation("pos-relative-bias")
def test_the_bias_depends_on_the_distance_only():
    table = Tensor(np.random.default_rng(0).normal(size=(3, 8)))
    one = relative.relative_bias(table, np.arange(4), np.arange(6), D_max=10).data
    two = relative.relative_bias(table, np.arange(7, 11), np.arange(7, 13), D_max=10).data
    np.testing.assert_array_equal(one, two)
    assert one.shape == (3, 4, 6) and len(np.unique(one[0])) <= 8


@pytest.mark.equation("pos-relative-shaw")
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 3))
def test_relative_vectors_entry_by_entry(seed, L, c):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(1, 2, L, 3)) for _ in range(3))
    w_k, w_v = rng.normal(size=(2 * c + 1, 3)), rng.normal(size=(2 * c + 1, 3))
    ours = relative.shaw_attention(*map(Tensor, (q, k, v, w_k, w_v)), causal_mask(L)).data
    for h in range(2):
        for i in range(L):
            a = [min(max(j - i, -c), c) + c for j in range(i + 1)]
            s = np.array([q[0, h, i] @ (k[0, h, j] + w_k[a[j]]) for j in range(i + 1)]) / np.sqrt(3)
            p = np.exp(s - s.max())
            p /= p.sum()
            np.testing.assert_allclose(
                ours[0, h, i], sum(p[j] * (v[0, h, j] + w_v[a[j]]) for j in range(i + 1)), atol=1e-12
            )
    nothing = relative.shaw_attention(*map(Tensor, (q, k, v, 0 * w_k, 0 * w_v))).data
    np.testing.assert_allclose(nothing, scaled_dot_product_attention(*map(Tensor, (q, k, v))).data, atol=1e-13)


@pytest.mark.equation("pos-nope")
def test_without_positions_an_encoder_sees_a_set_and_a_decoder_does_not():
    rng = np.random.default_rng(1)
    x, order = rng.normal(size=(1, 1, 6, 4)), np.array([3, 1, 0, 5, 4, 2])
    for causal, same in ((False, True), (True, False)):
        plain = scaled_dot_product_attention(*(Tensor(x),) * 3, causal=causal).data
        moved = scaled_dot_product_attention(*(Tensor(x[:, :, order]),) * 3, causal=causal).data
        assert np.allclose(moved, plain[:, :, order]) == same


@pytest.mark.equation("logit-variance")
def test_logits_of_a_normalised_vector_have_the_predicted_spread():
    """Erratum 9: for any direction of the vector; 32 at width 1024 with weights of spread 1 (simulated 31.87)."""
    rng = np.random.default_rng(2)
    for x in (rng.normal(size=1024), np.eye(1024)[0], np.ones(1024)):
        unit = rms_norm(Tensor(x), Tensor(np.ones(1024)), 0.0).data
        logits = rng.normal(size=(4000, 1024)) @ unit
        assert logits.std() == pytest.approx(head.logit_std(1024, 1.0), rel=0.05)
    assert head.logit_std(1024, 1.0) == 32.0


@pytest.mark.equation("logit-scaling")
def test_scaling_is_right_for_the_spread_it_is_made_for():
    """Erratum 9: the root undoes weights of spread 1; with spread d^-1/2 it makes logits too small."""
    rng, d = np.random.default_rng(3), 256
    x = rms_norm(Tensor(rng.normal(size=d)), Tensor(np.ones(d)), 0.0).data
    for s_w, mode, wanted in (
        (1.0, "sqrt", 1.0),
        (d**-0.5, "none", 1.0),
        (d**-0.5, "sqrt", d**-0.5),
        (1.0, "mup", d**-0.5),
    ):
        logits = head.scale_logits(Tensor(rng.normal(size=(20_000, d)) @ x * s_w), d, mode).data
        assert logits.std() == pytest.approx(wanted, rel=0.03)


@pytest.mark.equation("logit-softcap")
def test_capped_logits_are_bounded_and_unchanged_near_zero():
    o = np.array([-1e4, -1.0, 0.0, 1e-3, 1e4])
    capped = head.softcap(Tensor(o), 30.0).data
    np.testing.assert_allclose(capped[[0, -1]], [-30, 30])
    np.testing.assert_allclose(capped[2:4], o[2:4], rtol=1e-8)
    assert (np.diff(capped) > 0).all()


bad = [
    (lambda: absolute.sinusoidal_positions(np.arange(3), 5), ValueError, r"sinusoidal_positions: d must be an even number .* got 5"),
    (lambda: absolute.sinusoidal_positions(np.arange(3), 4, 1.0), ValueError, "the base must be above 1, got 1.0"),
    (lambda: absolute.add_learned_positions(Tensor(np.ones((1, 3, 4))), Tensor(np.ones((2, 4))), np.arange(3)), IndexError, r"positions must be in \[0, 2\), got 0..2"),
    (lambda: absolute.add_learned_positions(Tensor(np.ones((1, 3, 4))), Tensor(np.ones((5, 4))), np.arange(2)), ValueError, r"integers of shape \(L,\) or \(B, L\) with L = 3"),
    (lambda: absolute.add_learned_positions(Tensor(np.ones((1, 3, 4))), Tensor(np.ones((5, 3))), np.arange(3)), ValueError, r"w_pos must be of shape \(L_max, 4\)"),
    (lambda: RopeScaling("longer"), ValueError, "RopeScaling: kind must be one of"),
    (lambda: RopeScaling("linear", 0.5), ValueError, "the factor must be at least 1, got 0.5"),
    (lambda: RopeScaling("yarn", 2.0, 0), ValueError, "L_train must be a positive number of tokens, got 0"),
    (lambda: RopeScaling("yarn", 2.0, 10, 4, 4), ValueError, "low and high must be ordered"),
    (lambda: scaled_rotation(np.arange(3), 2, scaling=RopeScaling("ntk", 2.0)), ValueError, "d_head must be above 2"),
    (lambda: scaled_rotation(np.arange(3), 3), ValueError, "d_head must be a positive even number"),
    (lambda: relative.alibi_slopes(0), ValueError, "alibi_slopes: H must be a positive integer, got 0"),
    (lambda: relative.relative_bucket(np.arange(3), 7), ValueError, "n_buckets must be a multiple of 2, got 7"),
    (lambda: relative.relative_bucket(np.arange(3), 6, bidirectional=True), ValueError, "n_buckets must be a multiple of 4, got 6"),
    (lambda: relative.relative_bucket(np.arange(3), 32, 16), ValueError, "D_max must be above 16"),
    (lambda: relative.shaw_attention(*map(Tensor, (np.ones((1, 1, 2, 3)),) * 3), Tensor(np.ones((4, 3))), Tensor(np.ones((4, 3)))), ValueError, r"w_k must be of shape \(2c \+ 1, 3\)"),
    (lambda: relative.shaw_attention(Tensor(np.ones((1, 2, 2, 3))), *map(Tensor, (np.ones((1, 1, 2, 3)),) * 2), *map(Tensor, (np.ones((3, 3)),) * 2)), ValueError, "H_kv must be H = 2, got 1"),
    (lambda: head.logit_std(0, 1.0), ValueError, "logit_std: d_model must be a positive integer, got 0"),
    (lambda: head.scale_logits(Tensor(np.ones(3)), 4, "root"), ValueError, "scale_logits: mode must be one of 'none', 'sqrt', 'mup'"),
    (lambda: head.softcap(Tensor(np.ones(3)), 0.0), ValueError, "softcap: the cap must be a positive number, got 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), bad)
def test_what_makes_no_sense_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
