"""Small contracts that a mutation run found without a test: constants, masks over NaN, signs, error bars."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional import advantages as adv
from minillm.functional import likelihood as lik
from minillm.functional import monte_carlo as mc
from minillm.functional.attention import attention_weights
from minillm.functional.clipping import masked_log_ratio
from minillm.functional.critic_losses import clipped_critic_loss, critic_loss
from minillm.functional.masks import causal_mask
from minillm.functional.norms import post_norm_residual, pre_norm_residual, rms_norm
from minillm.functional.policy_losses import grpo_kl_objective
from minillm.functional.policy_monitors import ppo_token_trace
from minillm.functional.policy_variants import cispo_loss, tis_weights
from minillm.functional.ppo_losses import ppo_kl_loss

NAN = np.nan


@pytest.mark.equation("grpo-advantage-std")
def test_the_stabiliser_is_added_to_the_spread():
    rewards = np.array([[0.0, 2.0]])
    np.testing.assert_allclose(adv.grpo_advantage_std(rewards, eps=0.5), [[-1 / 1.5, 1 / 1.5]])


@pytest.mark.equation("grpo-zero-variance")
def test_dead_share_of_groups_of_odd_size():
    assert adv.expected_dead_share(0.2, 3) == pytest.approx(0.008 + 0.512)


@pytest.mark.equation("advantage-whitening")
def test_whitening_ignores_whatever_masked_places_hold():
    a = np.array([[1.0, 3.0, NAN], [5.0, NAN, NAN]])
    white = adv.advantage_whitening(a, np.isfinite(a), eps=0.0)
    np.testing.assert_allclose(white[np.isfinite(a)], (np.array([1, 3, 5]) - 3) / np.std([1, 3, 5]))
    assert not white[~np.isfinite(a)].any()


@pytest.mark.equation("mask-causal")
def test_with_cached_keys_the_last_query_meets_the_last_key():
    np.testing.assert_array_equal(causal_mask(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(causal_mask(3, 1), [[0], [0], [1]])


@pytest.mark.equation("attention-weights")
def test_scores_that_are_all_minus_infinity_give_weights_of_zero():
    weights = attention_weights(Tensor(np.array([[-np.inf, -np.inf], [0.0, -np.inf]]))).data
    np.testing.assert_array_equal(weights, [[0, 0], [1, 0]])


@pytest.mark.equation("importance-ratio")
def test_log_ratios_are_current_minus_old_and_zero_where_masked():
    current, old = np.array([[1.0, 2.0, NAN]]), np.array([[0.25, 4.0, NAN]])
    found = masked_log_ratio(current, old, np.array([[1, 1, 0]])).data
    np.testing.assert_array_equal(found, [[0.75, -2.0, 0.0]])


@pytest.mark.equation("critic-loss", "value-clip")
def test_critics_ignore_whatever_masked_places_hold():
    values, targets, mask = np.array([[1.0, NAN]]), np.array([[3.0, NAN]]), np.array([[1, 0]])
    v = Tensor(values, requires_grad=True)
    for loss in (
        critic_loss(v, targets, mask),
        clipped_critic_loss(v, targets, np.array([[1.0, NAN]]), mask, clip=0.5),
    ):
        assert loss.item() == 4.0
        (gradient,) = grad([loss], [v])
        np.testing.assert_array_equal(gradient.data, [[-4.0, 0.0]])


@pytest.mark.equation("ppo-kl-loss")
def test_the_divergence_ignores_masked_logits():
    rng = np.random.default_rng(0)
    logits, reference = rng.normal(size=(1, 2, 3)), rng.normal(size=(1, 2, 3))
    logprobs, mask = rng.normal(size=(1, 2)), np.array([[1, 0]])
    clean = ppo_kl_loss(Tensor(logprobs), Tensor(logits), logprobs, np.ones((1, 2)), mask, reference, beta=0.3)
    reference[0, 1] = NAN
    found = ppo_kl_loss(Tensor(logprobs), Tensor(logits), logprobs, np.ones((1, 2)), mask, reference, beta=0.3)
    assert np.isfinite(found.item()) and found.item() == pytest.approx(clean.item())


@pytest.mark.equation("grpo-kl-objective")
def test_the_group_objective_is_a_mean_over_responses():
    rng = np.random.default_rng(1)
    logprobs, reference, mask = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), np.ones((3, 2))
    a = np.array([1.0, -0.5, 2.0])
    found = grpo_kl_objective(Tensor(logprobs), logprobs, a, mask, reference, beta=0.1, kl="k1").item()
    assert found == pytest.approx((a - 0.1 * (logprobs - reference).sum(-1)).mean())


@pytest.mark.equation("ppo-per-token")
def test_without_an_advantage_the_clip_takes_no_gradient():
    trace = ppo_token_trace(np.log([3.0, 3.0]), np.zeros(2), np.array([0.0, 1.0]))
    np.testing.assert_array_equal(trace[3], [False, True])


@pytest.mark.equation("cispo")
def test_clipped_shares_count_real_tokens_only():
    mask = np.array([[1, 0]])
    outcome = cispo_loss(
        Tensor(np.array([[0.0, 9.0]])), np.array([[0.0, 0.0]]), np.array([1.0]), mask, clip_low=0.1, clip_high=0.2
    )
    assert outcome.loss.item() == 0.0
    low = cispo_loss(
        Tensor(np.array([[0.0, -9.0]])), np.array([[0.0, 0.0]]), np.array([1.0]), mask, clip_low=0.1, clip_high=0.2
    )
    for found in (outcome, low):
        fractions = [value for name, value in found._asdict().items() if "clip" in name]
        assert fractions and not any(np.any(np.asarray(value)) for value in fractions)


@pytest.mark.equation("tis")
def test_weights_are_trainer_over_sampler_and_zero_outside_the_band():
    old, sampler = np.log([0.2, 0.9, 0.5]), np.log([0.4, 0.3, 0.4])
    np.testing.assert_allclose(tis_weights(old, sampler, cap=2.0), [0.5, 2.0, 1.25])
    np.testing.assert_allclose(tis_weights(old, sampler, band=(0.6, 1.3)), [0.0, 0.0, 1.25])


@pytest.mark.equation("pre-ln", "post-ln")
def test_residual_blocks_add_their_branch():
    rng = np.random.default_rng(2)
    x, g = Tensor(rng.normal(size=(3, 4))), Tensor(rng.normal(size=4))
    norm = rms_norm(x, g, 1e-6).data
    np.testing.assert_allclose(pre_norm_residual(x, lambda t: t * 2.0, g).data, x.data + 2 * norm)
    np.testing.assert_allclose(post_norm_residual(x, lambda t: t * t, g).data, rms_norm(x + x * x, g, 1e-6).data)


@pytest.mark.equation("map-bayes")
def test_mean_and_mode_of_the_posterior():
    posterior = lik.dirichlet_posterior(np.array([5, 3, 2]), 2.0)
    np.testing.assert_allclose(posterior.mean, np.array([7, 5, 4]) / 16)
    np.testing.assert_allclose(posterior.mode, np.array([6, 4, 3]) / 13)
    assert np.isnan(lik.dirichlet_posterior(np.array([1, 0]), 0.5).mode).all()


@pytest.mark.equation("mle-equals-min-kl", "label-smoothing")
def test_ids_below_zero_are_refused():
    for function in (lambda ids: lik.empirical_distribution(ids, 3), lambda ids: lik.smoothed_targets(ids, 3, 0.1)):
        with pytest.raises((ValueError, IndexError), match="-1"):
            function(np.array([0, -1]))


@pytest.mark.equation("self-normalised-is")
def test_large_log_weights_do_not_overflow_and_the_error_is_that_of_the_formula():
    f, log_w = np.array([1.0, 4.0, 2.0]), np.array([0.0, 1.0, 0.5])
    w = np.exp(log_w) / np.exp(log_w).sum()
    for shift in (0.0, 5000.0, -5000.0):
        found = mc.self_normalised_importance_sampling(f, log_w + shift)
        assert found.value == pytest.approx(w @ f)
        assert found.standard_error == pytest.approx(np.sqrt(((w * (f - w @ f)) ** 2).sum()))
