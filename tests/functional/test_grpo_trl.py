"""GRPO and its relatives against TRL: value and gradient by every log-prob, given our advantages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional.advantages import grpo_advantage_std, rloo_advantage
from minillm.functional.policy_losses import grpo_loss
from minillm.functional.policy_variants import cispo_loss, gspo_loss, tis_weights

trl_losses = pytest.importorskip("tests.oracles.trl_losses", reason="TRL is not installed", exc_type=ImportError)

# Float64 on both sides: what is left is the order of summation of a hundred terms of size at most e^3.
ALLOWED = 1e-12
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int):
    """Responses with random masks (holes, an all-zero row, a row of one token), and the data around them."""
    rng = np.random.default_rng(seed)
    prompts, G, T = 2, 4, int(rng.integers(1, 9))
    shape = (prompts * G, T)
    mask = rng.random(shape) < 0.7
    mask[0] = False
    mask[1] = np.arange(T) == 0
    logprobs = rng.uniform(-3.0, -0.1, size=shape)
    data = {
        "old_logprobs": logprobs - 0.4 * rng.normal(size=shape),
        "advantages": grpo_advantage_std(rng.integers(0, 3, size=(prompts, G)).astype(float)).reshape(-1),
        "mask": mask,
    }
    return logprobs, data, logprobs + 0.5 * rng.normal(size=shape)


def ours(loss, logprobs, *args, **kwargs):
    current = Tensor(logprobs, requires_grad=True)
    result = loss(current, *args, **kwargs)
    (gradient,) = grad([result.loss], [current], allow_unused=True)
    return result, result.loss.item(), np.zeros_like(logprobs) if gradient is None else gradient.data


def hold_equal(mine, theirs, what: str):
    value_gap = abs(mine[1] - theirs[0])
    gradient_gap = np.abs(mine[2] - theirs[1]).max()
    print(f"{what}: value {value_gap / ALLOWED:.2g}, gradient {gradient_gap / ALLOWED:.2g} of what is allowed")
    assert value_gap <= ALLOWED and gradient_gap <= ALLOWED


AGGREGATIONS = {"grpo": "seq-mean", "bnpo": "token-mean", "dapo": "token-mean", "dr_grpo": "constant"}


@pytest.mark.equation("grpo-loss", "loss-aggregation", "grpo-clip", "kl-estimator-k3")
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@given(seed=seeds, beta=st.sampled_from([0.0, 0.1]))
@settings(max_examples=25)
def test_grpo_equals_trl_under_every_aggregation(loss_type, seed, beta):
    logprobs, data, ref = draw(seed)
    theirs = trl_losses.grpo(logprobs, **data, ref_logprobs=ref, loss_type=loss_type, beta=beta, max_length=11)
    mine = ours(grpo_loss, logprobs, **data, ref_logprobs=ref, beta=beta, reduction=AGGREGATIONS[loss_type], length=11)
    hold_equal(mine, theirs, loss_type)
    metrics, result = theirs[2], mine[0]
    if logprobs.shape[1] == 1:
        return  # TRL takes one column for one number per response and averages its metrics without the mask
    assert result.clip_fraction == pytest.approx(metrics["clip_ratio/region_mean"], abs=1e-6)
    assert result.clip_fraction_low == pytest.approx(metrics["clip_ratio/low_mean"], abs=1e-6)
    if beta:
        assert result.kl == pytest.approx(metrics["kl"], abs=1e-9)


@pytest.mark.equation("grpo-clip-higher")
@given(seed=seeds)
@settings(max_examples=25)
def test_clip_higher_equals_trl(seed):
    logprobs, data, _ = draw(seed)
    theirs = trl_losses.grpo(logprobs, **data, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)
    hold_equal(ours(grpo_loss, logprobs, **data, clip_high=0.28, reduction="token-mean"), theirs, "clip-higher")


@pytest.mark.equation("ppo-dual-clip")
@given(seed=seeds)
@settings(max_examples=25)
def test_dual_clip_equals_trls_two_sided_clip(seed):
    logprobs, data, _ = draw(seed)
    data["old_logprobs"] = data["old_logprobs"] - 0.6  # ratios that reach beyond the bound
    theirs = trl_losses.grpo(logprobs, **data, delta=1.7)
    hold_equal(ours(grpo_loss, logprobs, **data, dual_clip=1.7), theirs, "dual clip")


@pytest.mark.equation("kl-estimator-is")
@given(seed=seeds)
@settings(max_examples=25)
def test_kl_with_the_importance_ratio_equals_trls_bias_correction(seed):
    logprobs, data, ref = draw(seed)
    theirs = trl_losses.grpo(logprobs, **data, ref_logprobs=ref, beta=0.3, bias_correction=True)
    mine = ours(grpo_loss, logprobs, **data, ref_logprobs=ref, beta=0.3, kl_ratio=True)
    hold_equal(mine, theirs, "k3 with ratio")


@pytest.mark.equation("gspo")
@given(seed=seeds, width=st.sampled_from([3e-4, 0.2]))
@settings(max_examples=25)
def test_gspo_equals_trls_sequence_level(seed, width):
    logprobs, data, ref = draw(seed)
    theirs = trl_losses.grpo(
        logprobs, **data, ref_logprobs=ref, beta=0.1, level="sequence", epsilon_low=width, epsilon_high=2 * width
    )
    mine = ours(gspo_loss, logprobs, **data, ref_logprobs=ref, beta=0.1, clip_low=width, clip_high=2 * width)
    hold_equal(mine, theirs, "GSPO")


@pytest.mark.equation("cispo")
@given(seed=seeds)
@settings(max_examples=25)
def test_cispo_equals_trl_whose_epsilon_is_the_cap_itself(seed):
    logprobs, data, ref = draw(seed)
    theirs = trl_losses.grpo(logprobs, **data, ref_logprobs=ref, beta=0.1, loss_type="cispo", epsilon_high=1.3)
    mine = ours(cispo_loss, logprobs, **data, ref_logprobs=ref, beta=0.1, clip_high=0.3)
    hold_equal(mine, theirs, "CISPO")


@pytest.mark.equation("tis")
@given(seed=seeds)
@settings(max_examples=25)
def test_truncated_importance_weights_stand_where_trl_has_them(seed):
    logprobs, data, ref = draw(seed)
    sampler = data["old_logprobs"] + 0.5 * np.random.default_rng(seed).normal(size=logprobs.shape)
    weights = tis_weights(data["old_logprobs"], sampler, cap=1.5)
    theirs = trl_losses.grpo(logprobs, **data, ref_logprobs=ref, beta=0.1, sampler_ratio=weights)
    mine = ours(grpo_loss, logprobs, **data, ref_logprobs=ref, beta=0.1, token_weights=weights)
    hold_equal(mine, theirs, "TIS")


@pytest.mark.equation("entropy-bonus")
@given(seed=seeds)
@settings(max_examples=10)
def test_the_entropy_bonus_equals_trls_when_both_are_token_means(seed):
    logprobs, data, _ = draw(seed)
    entropies = np.random.default_rng(seed).uniform(0, 2, size=logprobs.shape)
    theirs = trl_losses.grpo(logprobs, **data, loss_type="bnpo", entropies=entropies, entropy_coef=0.05)
    mine = ours(grpo_loss, logprobs, **data, entropies=entropies, entropy_coef=0.05, reduction="token-mean")
    hold_equal(mine, theirs, "entropy bonus")
    if logprobs.shape[1] > 1:
        assert mine[0].entropy == pytest.approx(theirs[2]["entropy"], abs=1e-9)


@pytest.mark.equation("rloo", "grpo-ratio-sequence")
@given(seed=seeds)
@settings(max_examples=25)
def test_rloo_with_whole_response_ratios_equals_trls_rloo_trainer(seed):
    logprobs, data, _ = draw(seed)
    data["mask"][:, 0] = True  # TRL counts -A for an empty response, a constant; ours counts 0
    rewards = np.random.default_rng(seed).normal(size=(2, 4))
    data["advantages"] = rloo_advantage(rewards).reshape(-1)
    theirs = trl_losses.rloo(logprobs, **data)
    hold_equal(ours(grpo_loss, logprobs, **data, level="sequence"), theirs, "RLOO")


@pytest.mark.equation("grpo-advantage-std")
def test_advantages_with_trls_settings_equal_its_formula():
    torch = pytest.importorskip("torch")
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    r = torch.tensor(rewards)
    theirs = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(grpo_advantage_std(rewards, ddof=1, eps=1e-4), theirs.numpy(), atol=1e-14)
