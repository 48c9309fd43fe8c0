"""Linear attention: its four forms are one, its feature maps are what their flags say; errata 28 and 29."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional import feature_maps as maps
from minillm.functional import linear_attention as forms
from minillm.functional.feature_maps import FEATURE_MAPS, draw_directions, feature_map
from minillm.fused.linear_attention import linear_attention_chunked as fused_chunked

seeds = st.integers(0, 2**32 - 1)
CHUNKED = pytest.mark.parametrize("chunked", [forms.linear_attention_chunked, fused_chunked], ids=["written", "fused"])


def problem(seed: int, L: int, d_phi: int = 4, d_v: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    phi = [np.exp(rng.normal(size=(2, 2, L, d_phi))) for _ in range(2)]
    return Tensor(phi[0]), Tensor(phi[1]), Tensor(rng.normal(size=(2, 2, L, d_v)))


@pytest.mark.equation("linear-attention")
@given(seeds, st.integers(1, 9))
def test_summing_keys_first_equals_the_quadratic_form(seed, L):
    """Erratum 28: with the transposes right, to rounding."""
    phi_q, phi_k, v = problem(seed, L)
    linear = forms.linear_attention(phi_q, phi_k, v).data
    np.testing.assert_allclose(linear, forms.linear_attention_quadratic(phi_q, phi_k, v).data, rtol=1e-12, atol=1e-13)


@pytest.mark.equation("linear-attention")
def test_the_catalogue_writes_the_transposed_state():
    """Erratum 28: S_V is (d_head, d_phi) and acts from the left; the printed row form has no such product."""
    phi_q, phi_k, v = (x.data[0, 0] for x in problem(0, 5))
    S_V = sum(np.outer(v[j], phi_k[j]) for j in range(5))  # (d_v, d_phi)
    S_K = phi_k.sum(0)
    wanted = np.stack([S_V @ q / (S_K @ q + forms.EPS) for q in phi_q])
    found = forms.linear_attention(*problem(0, 5)).data[0, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="matmul"):
        np.matmul(phi_q[:1], S_V)  # (1, d_phi) times (d_v, d_phi)


@CHUNKED
@pytest.mark.equation("linear-attention-causal")
@given(seed=seeds, L=st.integers(1, 12), chunk=st.integers(1, 13))
def test_recurrent_chunked_and_quadratic_forms_agree(chunked, seed, L, chunk):
    phi_q, phi_k, v = problem(seed, L)
    quadratic = forms.linear_attention_quadratic(phi_q, phi_k, v, causal=True).data
    recurrent = forms.linear_attention_recurrent(phi_q, phi_k, v)
    in_chunks = chunked(phi_q, phi_k, v, chunk=chunk)
    np.testing.assert_allclose(recurrent[0].data, quadratic, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(in_chunks[0].data, quadratic, rtol=1e-11, atol=1e-12)
    for a, b in zip(recurrent[1:], in_chunks[1:], strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-11)


@CHUNKED
@pytest.mark.equation("linear-attention-causal")
@given(seed=seeds, cut=st.integers(1, 6))
def test_the_state_carries_everything_from_one_part_to_the_next(chunked, seed, cut):
    phi_q, phi_k, v = problem(seed, 7)
    whole = chunked(phi_q, phi_k, v, chunk=2)[0].data
    first, *state = chunked(phi_q[:, :, :cut], phi_k[:, :, :cut], v[:, :, :cut], chunk=3)
    second = chunked(phi_q[:, :, cut:], phi_k[:, :, cut:], v[:, :, cut:], *state, chunk=3)[0]
    np.testing.assert_allclose(np.concatenate([first.data, second.data], axis=2), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.equation("linear-attention-causal")
def test_no_tokens_leave_the_state_as_it_was():
    nothing = Tensor(np.zeros((2, 3, 0, 4)))
    state, normaliser = Tensor(np.ones((2, 3, 4, 4))), Tensor(np.ones((2, 3, 4)))
    for form in (forms.linear_attention_recurrent, forms.linear_attention_chunked, fused_chunked):
        out, after, total = form(nothing, nothing, nothing, state, normaliser)
        assert out.shape == (2, 3, 0, 4)
        np.testing.assert_array_equal(after.data, state.data)
        np.testing.assert_array_equal(total.data, normaliser.data)
        np.testing.assert_array_equal(form(nothing, nothing, nothing)[1].data, 0.0)


@CHUNKED
@pytest.mark.equation("linear-attention-causal")
def test_the_state_has_the_same_size_for_any_length_and_the_past_does_not_see_the_future(chunked):
    phi_q, phi_k, v = problem(3, 9)
    changed = v.data.copy()
    changed[:, :, 6:] = 100
    np.testing.assert_array_equal(
        chunked(phi_q, phi_k, v, chunk=4)[0].data[:, :, :6],
        chunked(phi_q, phi_k, Tensor(changed), chunk=4)[0].data[:, :, :6],
    )
    shapes = {tuple(s.shape for s in chunked(*problem(0, L), chunk=4)[1:]) for L in (1, 4, 40)}
    assert shapes == {((2, 2, 4, 3), (2, 2, 4))}


@pytest.mark.equation("feature-map-elu1", "feature-map-relu", "feature-map-exp")
def test_elementwise_maps_are_what_they_are_called():
    x = Tensor(np.array([[-2.0, 0.0, 3.0, 1.0]]))
    np.testing.assert_allclose(maps.elu1_features(x).data, [[np.exp(-2), 1, 4, 2]])
    np.testing.assert_allclose(maps.relu_features(x).data, [[0, 0, 3, 1]])
    np.testing.assert_allclose(maps.relu_features(x, power=2).data, [[0, 0, 9, 1]])
    np.testing.assert_allclose(maps.exp_features(x).data, np.exp(x.data / 4**0.25))
    np.testing.assert_allclose(maps.exp_features(x, c=4.0).data, np.exp(x.data / 4))  # the value printed in the source


@pytest.mark.equation("feature-map-relu")
def test_relu_features_may_vanish_and_the_stabiliser_keeps_the_result_finite():
    x = maps.relu_features(Tensor(-np.ones((1, 1, 3, 2))))
    np.testing.assert_array_equal(forms.linear_attention(x, x, Tensor(np.ones((1, 1, 3, 2)))).data, 0)


def features_of(kind: str, x: np.ndarray, m: int = 64, seed: int = 0, orthogonal: bool = False) -> np.ndarray:
    row = feature_map(kind)
    omega = {"omega": draw_directions(m, x.shape[-1], np.random.default_rng(seed), orthogonal)} if row.random else {}
    return row.function(Tensor(x), **omega).data


@pytest.mark.equation("feature-map-rff", "feature-map-favor")
@pytest.mark.parametrize("kind", list(FEATURE_MAPS))
def test_flags_say_which_maps_are_positive_and_which_approximate_the_softmax(kind):
    """Erratum 29: only the random maps have the softmax's kernel as their expectation, and Fourier's is signed."""
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(40, 4)), rng.normal(size=(40, 4))
    few = features_of(kind, q, m=4) @ features_of(kind, k, m=4).T
    assert (few.min() >= 0) == FEATURE_MAPS[kind].positive
    many = features_of(kind, q, m=20_000) @ features_of(kind, k, m=20_000).T
    error = np.abs(np.log(np.abs(many) + 1e-9) - q @ k.T / 2)
    assert (np.median(error) < 0.1) == FEATURE_MAPS[kind].approximates_softmax


@pytest.mark.equation("feature-map-favor", "feature-map-rff")
@pytest.mark.parametrize("kind", ["fourier", "positive"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_features_are_unbiased(kind, orthogonal):
    rng = np.random.default_rng(2)
    q, k = 0.7 * rng.normal(size=(1, 4)), 0.7 * rng.normal(size=(1, 4))
    draws = [
        float((features_of(kind, q, 8, seed, orthogonal) * features_of(kind, k, 8, seed, orthogonal)).sum())
        for seed in range(400)
    ]
    standard_error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - np.exp(float((q * k).sum()) / 2)) < 4 * standard_error
    assert standard_error < 0.15


@pytest.mark.equation("feature-map-exp", "feature-map-elu1")
def test_elementwise_maps_follow_the_scores_loosely_at_best():
    """Erratum 29, simulated: correlation of log kernels with the score, 0.36 for ELU+1 and none for exp(x / d_head)."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(200, 64)), rng.normal(size=(200, 64))
    scores = (q @ k.T / 8).ravel()

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(np.log((a @ b.T).ravel()), scores)[0, 1])

    elu = correlation(features_of("elu1", q), features_of("elu1", k))
    flat = [maps.exp_features(Tensor(x), c=64.0).data for x in (q, k)]
    assert 0.2 < elu < 0.5
    assert abs(correlation(flat[0], flat[1])) < 0.15


@pytest.mark.equation("feature-map-normalised")
def test_orthogonal_directions_are_orthogonal_with_gaussian_lengths_and_lower_variance():
    rng = np.random.default_rng(0)
    omega = draw_directions(5, 3, rng, orthogonal=True)
    gram = omega @ omega.T
    np.testing.assert_allclose(gram[:3, :3] - np.diag(np.diag(gram)[:3]), 0, atol=1e-12)
    lengths = (draw_directions(4000, 4, rng, orthogonal=True) ** 2).sum(1)
    assert lengths.mean() == pytest.approx(4, rel=0.1)
    q, k = 0.3 * rng.normal(size=(30, 8)), 0.3 * rng.normal(size=(30, 8))

    def squared_error(kind: str, orthogonal: bool) -> float:
        draws = [
            (features_of(kind, q, 8, s, orthogonal) * features_of(kind, k, 8, s, orthogonal)).sum(-1)
            for s in range(300)
        ]
        return float(((np.array(draws) / np.exp((q * k).sum(-1) / np.sqrt(8)) - 1) ** 2).mean())

    for kind in ("positive", "fourier"):
        assert squared_error(kind, True) < 0.9 * squared_error(kind, False)


@pytest.mark.equation("feature-map-normalised")
def test_softmax_features_sum_to_one():
    x = features_of("softmax", 50 * np.random.default_rng(0).normal(size=(3, 5)))
    np.testing.assert_allclose(x.sum(-1), 1)


ONE = Tensor(np.ones((1, 2, 3, 4)))
BAD = {
    "power": (lambda: maps.relu_features(ONE, power=3), "relu_features: power must be one of 1, 2, got 3"),
    "c": (lambda: maps.exp_features(ONE, c=0.0), "exp_features: c must be a positive number, got 0.0"),
    "m": (lambda: draw_directions(0, 4, np.random.default_rng(0)), "draw_directions: m must be a positive integer"),
    "omega": (lambda: maps.fourier_features(ONE, omega=np.ones((2, 3))), r"omega must be of shape \(m, d_head=4\)"),
    "omega 2": (lambda: maps.positive_features(ONE, omega=np.ones((2, 3))), r"omega must be of shape \(m, d_head=4\)"),
    "kind": (lambda: feature_map("cosine"), "kind must be one of 'elu1', .*got cosine"),
    "phi_q": (lambda: forms.linear_attention(ONE[0], ONE, ONE), "phi_q must be of shape"),
    "phi_k": (lambda: forms.linear_attention(ONE, ONE[..., :2], ONE), r"phi_k must be of shape \(B=1, H=2, L_k, d_phi=4\)"),
    "v": (lambda: forms.linear_attention_quadratic(ONE, ONE, ONE[:, :, :2]), "v must be of shape"),
    "causal": (
        lambda: forms.linear_attention_recurrent(ONE[:, :, :2], ONE, ONE),
        "the number of keys must be that of queries, 2",
    ),
    "state": (
        lambda: forms.linear_attention_recurrent(ONE, ONE, ONE, ONE, ONE[:, :, 0]),
        r"state must be of shape \(1, 2, 4, 4\)",
    ),
    "one of two": (
        lambda: forms.linear_attention_chunked(ONE, ONE, ONE, Tensor(np.ones((1, 2, 4, 4)))),
        "state and normaliser must be given together",
    ),
    "normaliser": (
        lambda: fused_chunked(ONE, ONE, ONE, Tensor(np.ones((1, 2, 4, 4))), Tensor(np.ones((1, 2, 3)))),
        r"normaliser must be of shape \(1, 2, 4\)",
    ),
    "chunk": (lambda: forms.linear_attention_chunked(ONE, ONE, ONE, chunk=0), "chunk must be a positive integer, got 0"),
    "fused chunk": (lambda: fused_chunked(ONE, ONE, ONE, chunk=-1), "chunk must be a positive integer, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
