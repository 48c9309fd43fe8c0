"""Properties of the GRPO loss and its relatives that hold for any batch of responses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional.kl_estimators import kl_estimate
from minillm.functional.policy_gradient import pg_surrogate_loss
from minillm.functional.policy_losses import grpo_clip_objective, grpo_kl_objective, grpo_loss
from minillm.functional.policy_variants import cispo_loss, gspo_loss, tis_weights
from minillm.functional.reductions import REDUCTIONS, aggregate, aggregation_divisor, aggregation_weights

seeds = st.integers(0, 2**32 - 1)
LOSSES = {"grpo": grpo_loss, "gspo": gspo_loss, "cispo": cispo_loss}
ALL = pytest.mark.parametrize("name", LOSSES)


def draw(seed: int, B: int = 4):
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 7))
    mask = np.arange(T) < rng.integers(0, T + 1, size=(B, 1))
    mask[0], mask[1] = False, True
    new = rng.uniform(-3, -0.1, size=(B, T))
    return new, new + 0.5 * rng.normal(size=(B, T)), rng.normal(size=B), mask, new + 0.5 * rng.normal(size=(B, T))


def run(loss, new, *args, **options):
    """Loss, its gradient by the log-probs, and the whole result."""
    live = Tensor(new, requires_grad=True)
    result = loss(live, *args, **options)
    return result.loss.item(), grad(result.loss, live).data, result


@ALL
@pytest.mark.equation("grpo-loss", "gspo", "cispo", "ppo-degenerate", "grpo-vanilla-pg")
@given(seed=seeds, reduction=st.sampled_from(REDUCTIONS))
@settings(max_examples=25)
def test_with_the_old_policy_itself_it_is_plain_policy_gradient(name, seed, reduction):
    new, _, a, mask, _ = draw(seed)
    how = {"reduction": reduction, "length": 9}
    value, gradient, result = run(LOSSES[name], new, new, a, mask, new, beta=0.3, **how)
    live = Tensor(new, requires_grad=True)
    vanilla = grad(pg_surrogate_loss(live, a, mask, **how), live).data
    if name == "gspo" and reduction not in ("seq-mean",):
        lengths = np.maximum(mask.sum(-1, keepdims=True), 1)  # a response's gradient is spread over its tokens
        vanilla = np.where(mask, vanilla.sum(-1, keepdims=True) / lengths, 0)
    np.testing.assert_allclose(gradient, vanilla, atol=1e-14)
    if name != "cispo":
        assert value == pytest.approx(-aggregate(a[:, None] * np.ones(new.shape), mask, **how).item(), abs=1e-13)
    assert result.clip_fraction == 0 and result.old_kl == 0 and result.kl == 0
    assert result.mean_ratio == (1 if mask.any() else 0)


@ALL
@pytest.mark.equation("grpo-loss", "gspo", "cispo", "ppo-masked-mean")
@given(seed=seeds)
@settings(max_examples=25)
def test_masked_tokens_have_no_effect_even_as_nan_and_padding_changes_nothing(name, seed):
    new, old, a, mask, ref = draw(seed)
    weights, entropies = np.abs(new), np.abs(old)
    more = {"beta": 0.2, "entropy_coef": 0.1}
    value, gradient, result = run(
        LOSSES[name], new, old, a, mask, ref, token_weights=weights, entropies=entropies, **more
    )

    def spoil(x):
        return np.pad(np.where(mask, x, np.nan), ((0, 0), (0, 2)), constant_values=np.nan)

    wide = np.pad(mask, ((0, 0), (0, 2)))
    spoilt = run(
        LOSSES[name],
        spoil(new),
        spoil(old),
        a,
        wide,
        spoil(ref),
        token_weights=spoil(weights),
        entropies=spoil(entropies),
        **more,
    )
    assert spoilt[0] == pytest.approx(value, abs=1e-13)
    np.testing.assert_allclose(spoilt[1][:, : new.shape[1]], gradient, atol=1e-14)
    assert (spoilt[1][~wide] == 0).all() and (gradient[0] == 0).all()
    assert spoilt[2][1:] == pytest.approx(result[1:], abs=1e-12)


@ALL
@given(seed=seeds)
@settings(max_examples=15)
def test_order_of_responses_and_shape_of_advantages_do_not_matter(name, seed):
    new, old, a, mask, ref = draw(seed)
    value, gradient, _ = run(LOSSES[name], new, old, a, mask, ref, beta=0.2)
    order = np.random.default_rng(seed).permutation(len(a))
    moved = run(LOSSES[name], new[order], old[order], a[order], mask[order], ref[order], beta=0.2)
    assert moved[0] == pytest.approx(value, abs=1e-13)
    np.testing.assert_allclose(moved[1], gradient[order], atol=1e-14)
    full = run(LOSSES[name], new, old, a[:, None] * np.ones(new.shape), mask, ref, beta=0.2)
    assert full[0] == value and (full[1] == gradient).all()


@ALL
@pytest.mark.equation("loss-aggregation")
@given(seed=seeds, reduction=st.sampled_from(["token-mean", "seq-mean", "seq-sum", "constant"]))
@settings(max_examples=25)
def test_micro_batches_accumulate_to_the_whole_batch(name, seed, reduction):
    new, old, a, mask, ref = draw(seed, B=6)
    how = {"reduction": reduction, "length": 9, "beta": 0.2}
    value, gradient, _ = run(LOSSES[name], new, old, a, mask, ref, **how)
    how["divisor"] = aggregation_divisor(mask, reduction, length=9)
    parts = [run(LOSSES[name], new[p], old[p], a[p], mask[p], ref[p], **how) for p in (slice(0, 2), slice(2, 6))]
    assert sum(p[0] for p in parts) == pytest.approx(value, abs=1e-13)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), gradient, atol=1e-14)


@pytest.mark.equation("grpo-clip", "grpo-loss", "ppo-clip")
@given(seed=seeds)
@settings(max_examples=25)
def test_the_clip_is_pessimistic_and_the_loss_is_minus_the_objective_plus_the_penalty(seed):
    new, old, a, mask, ref = draw(seed)
    clipped, _, result = run(grpo_loss, new, old, a, mask, ref, beta=0.2)
    open_loss, _, _ = run(grpo_loss, new, old, a, mask, clip_low=1.0, clip_high=1e9)
    objective = grpo_clip_objective(new, old, a, mask).item()
    penalty = aggregate(kl_estimate(new, ref, "k3"), mask, "seq-mean").item()
    assert result.policy_loss == pytest.approx(-objective, abs=1e-14) and -objective >= open_loss - 1e-12
    assert clipped == pytest.approx(-objective + 0.2 * penalty, abs=1e-13)
    free, _, _ = run(grpo_loss, new, old, 3 * a, mask)
    assert free == pytest.approx(-3 * objective, abs=1e-12)


@pytest.mark.equation("grpo-loss", "kl-estimator-k1", "kl-estimator-k2", "kl-estimator-k3", "grpo-zero-variance")
@pytest.mark.parametrize(
    ("kind", "slope"), [("k1", lambda d: 1 + 0 * d), ("k2", lambda d: -d), ("k3", lambda d: 1 - np.exp(d))]
)
def test_without_advantages_only_the_kl_term_pulls(kind, slope):
    new, old, a, mask, ref = draw(7)
    _, gradient, result = run(grpo_loss, new, old, 0 * a, mask, ref, beta=0.3, kl=kind, reduction="sum")
    np.testing.assert_allclose(gradient, np.where(mask, 0.3 * slope(ref - new), 0), atol=1e-14)
    assert result.policy_loss == 0 and result.clip_fraction == 0
    _, dead, _ = run(grpo_loss, new, old, 0 * a, mask)
    assert (dead == 0).all()


@pytest.mark.equation("grpo-loss")
def test_the_sign_a_step_down_the_loss_makes_good_responses_likelier():
    """Erratum 71: what is minimised is the negative objective."""
    new, _, _, _, _ = draw(3)
    mask, a = np.ones(new.shape), np.array([1.0, -1.0, 2.0, -0.5])
    for loss in LOSSES.values():
        _, gradient, _ = run(loss, new, new, a, mask)
        assert (np.sign(-gradient) == np.sign(a)[:, None]).all()


@pytest.mark.equation("grpo-clip")
def test_clipped_tokens_get_exactly_no_gradient_and_are_counted_by_side():
    old = np.full((2, 2), -2.0)
    new = old + np.log([[1.5, 0.5], [1.5, 0.5]])
    _, gradient, result = run(grpo_loss, new, old, np.array([1.0, -1.0]), np.ones((2, 2)))
    assert (gradient == 0).tolist() == [[True, False], [False, True]]
    assert (result.clip_fraction_low, result.clip_fraction_high, result.clip_fraction) == (0.25, 0.25, 0.5)
    assert result.mean_ratio == pytest.approx(1.0) and result.old_kl > 0


@ALL
@pytest.mark.equation("importance-ratio")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_ratios_stay_finite(name, dtype):
    new = np.array([[-80.0, -0.1], [-0.1, -80.0]], dtype)
    old, ref = new[::-1].copy(), np.zeros_like(new)
    for a in (np.array([1.0, -1.0], dtype), np.array([-1.0, 1.0], dtype)):
        value, gradient, result = run(LOSSES[name], new, old, a, np.ones((2, 2)), ref, beta=0.1)
        assert np.isfinite(value) and np.isfinite(gradient).all() and gradient.dtype == dtype
        assert np.isfinite(result[1:7]).all()


@pytest.mark.equation("gspo")
def test_all_tokens_of_a_response_clip_together_in_gspo():
    old = np.full((2, 3), -2.0)
    new = old + np.array([[0.4, 0.3, -0.1], [0.01, -0.02, 0.01]])
    _, gradient, result = run(gspo_loss, new, old, np.ones(2), np.ones((2, 3)), clip_low=0.1, clip_high=0.1)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).all() and result.clip_fraction_high == 0.5
    narrow = run(gspo_loss, new, old, np.ones(2), np.ones((2, 3)))[2]
    wide = run(gspo_loss, new, old, np.ones(2), np.ones((2, 3)), clip_low=0.2, clip_high=0.25)[2]
    assert narrow.clip_fraction == 0.5 and wide.clip_fraction == 0  # with the token's widths it hardly ever clips


@pytest.mark.equation("cispo")
def test_no_token_loses_its_gradient_in_cispo():
    new, old, a, mask, _ = draw(11)
    _, gradient, _ = run(cispo_loss, new, old - 3.0, a, mask, clip_high=0.2)
    assert (gradient[mask] != 0).all()
    np.testing.assert_allclose(gradient, np.where(mask, -1.2 * a[:, None] / mask.sum(), 0), atol=1e-15)
    _, low, _ = run(cispo_loss, new, new + 3.0, a, mask, clip_low=0.2)
    np.testing.assert_allclose(low, np.where(mask, -0.8 * a[:, None] / mask.sum(), 0), atol=1e-15)


@pytest.mark.equation("tis")
def test_truncated_weights_restore_the_trainers_law():
    """Erratum 45: a tempered sampler biases the mean advantage; the weights take the bias away, a finite cap leaves some."""
    from tests.oracles import tiny_policies as law

    p, sampler = law.softmax(law.LOGITS_P), law.softmax(law.LOGITS_P / 0.7)
    advantages = law.REWARDS - p @ law.REWARDS
    assert sampler @ advantages == pytest.approx(0.0895, abs=5e-5)
    weights = tis_weights(np.log(p), np.log(sampler), cap=np.inf)
    assert sampler @ (weights * advantages) == pytest.approx(0, abs=1e-15)
    scores = np.eye(5) - p
    true = p @ (advantages[:, None] * scores)
    tempered = sampler @ (advantages[:, None] * scores)
    assert tempered[:2] == pytest.approx([0.163, -0.047], abs=5e-4)
    assert true[:2] == pytest.approx([0.180, -0.069], abs=5e-4)
    np.testing.assert_allclose(sampler @ ((weights * advantages)[:, None] * scores), true, atol=1e-15)
    capped = tis_weights(np.log(p), np.log(sampler), cap=1.5)
    assert capped.max() == pytest.approx(1.5) and abs(sampler @ (capped * advantages)) > 1e-3
    assert (tis_weights(np.log(p), np.log(p)) == 1).all()
    banded = tis_weights(np.log(p), np.log(sampler), band=(0.5, 2.0))
    assert ((banded == 0) == ((weights < 0.5) | (weights > 2))).all() and 0 < (banded == 0).sum() < 5


@pytest.mark.equation("tis", "grpo-loss")
def test_token_weights_scale_the_policy_term_and_not_the_penalty():
    new, old, a, mask, ref = draw(5)
    plain = run(grpo_loss, new, old, a, mask, ref, beta=0.2)
    doubled = run(grpo_loss, new, old, a, mask, ref, beta=0.2, token_weights=np.full(new.shape, 2.0))
    assert doubled[2].policy_loss == pytest.approx(2 * plain[2].policy_loss) and doubled[2].kl == plain[2].kl
    assert doubled[0] - plain[0] == pytest.approx(plain[2].policy_loss)


@pytest.mark.equation("kl-estimator-is", "entropy-bonus", "grpo-loss")
def test_the_penalty_with_its_ratio_and_the_bonus_stand_in_the_loss_with_their_signs():
    new, old, a, mask, ref = draw(8)
    plain = run(grpo_loss, new, old, a, mask)
    weighted = run(grpo_loss, new, old, a, mask, ref, beta=0.2, kl_ratio=True)
    d, ratio = ref - new, np.exp(new - old)
    terms = ratio * (np.expm1(d) - d)
    assert weighted[2].kl == pytest.approx(terms[mask].mean())
    assert weighted[0] - plain[0] == pytest.approx(0.2 * aggregate(terms, mask, "seq-mean").item())
    slope = aggregation_weights(mask, "seq-mean") * (terms - ratio * np.expm1(d))
    np.testing.assert_allclose(weighted[1] - plain[1], 0.2 * slope, atol=1e-14)
    entropies = Tensor(np.abs(old), requires_grad=True)
    bonus = grpo_loss(new, old, a, mask, entropies=entropies, entropy_coef=0.1)
    assert bonus.loss.item() - plain[0] == pytest.approx(-0.1 * aggregate(entropies, mask, "seq-mean").item())
    np.testing.assert_allclose(
        grad(bonus.loss, entropies).data, -0.1 * aggregation_weights(mask, "seq-mean"), atol=1e-15
    )
    assert plain[2].sampled_entropy == pytest.approx(-(ratio * new)[mask].mean())
    assert plain[2].mean_ratio == pytest.approx(ratio[mask].mean())
    assert plain[2].old_kl == pytest.approx((ratio - 1 - (new - old))[mask].mean())


@pytest.mark.equation("grpo-loss")
def test_diagnostics_without_reference_or_entropies_say_so():
    new, old, a, mask, ref = draw(2)
    result = run(grpo_loss, new, old, a, mask)[2]
    assert np.isnan(result.kl) and np.isnan(result.entropy) and np.isfinite(result.sampled_entropy)
    watched = run(grpo_loss, new, old, a, mask, ref, entropies=np.ones(new.shape))
    assert np.isfinite(watched[2].kl) and watched[2].entropy == pytest.approx(1)
    assert watched[0] == run(grpo_loss, new, old, a, mask)[0]  # watched, not paid for


NEW, OLD, A, MASK, REF = draw(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprobs": OLD[:, :0]}, "grpo_loss: old_logprobs must be of shape"),
        ({"advantages": A[:2]}, "grpo_loss: advantages must be of shape"),
        ({"mask": MASK[:2]}, "mask must be of the terms' shape"),
        ({"beta": 0.1}, "ref_logprobs must be given when beta is not 0"),
        ({"ref_logprobs": REF[:2]}, "ref_logprobs must be of shape"),
        ({"entropy_coef": 0.1}, "entropies must be given"),
        ({"kl": "k4"}, "kl must be one of"),
        ({"level": "word"}, "level must be one of"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"clip_low": -0.1}, "clip widths"),
    ],
)
def test_errors_say_what_is_wanted(change, message):
    arguments = {"logprobs": NEW, "old_logprobs": OLD, "advantages": A, "mask": MASK, **change}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)


def test_errors_of_the_relatives():
    with pytest.raises(ValueError, match="cap must be positive"):
        tis_weights(NEW, OLD, cap=0.0)
    with pytest.raises(ValueError, match="sampler_logprobs must be of shape"):
        tis_weights(NEW, OLD[:1])
    with pytest.raises(ValueError, match="advantages must be of shape"):
        grpo_kl_objective(NEW, OLD, A[:2], MASK, REF, beta=0.1)
    with pytest.raises(ValueError, match="cispo_loss: advantages"):
        cispo_loss(NEW, OLD, A[:2], MASK)
