"""Likelihoods of sequences, perplexity, smoothing, priors; and exact sums over all sequences."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import likelihood as lik
from minillm.functional.information import cross_entropy_between, entropy, kl_divergence, kl_token_exact
from minillm.functional.sequences import all_sequences, sequence_kl
from minillm.functional.softmax import log_softmax, softmax
from tests.oracles import tiny_policies as law

seeds = st.integers(0, 2**32 - 1)


def tree(rng, V: int, L: int, ids: np.ndarray) -> np.ndarray:
    """Random next-token logits for every prefix, laid along every sequence: (n, L, V)."""
    tables = [rng.normal(size=(V,) * t + (V,)) for t in range(L)]
    return np.stack([tables[t][tuple(ids[:, :t].T)] * np.ones((len(ids), 1)) for t in range(L)], axis=1)


@pytest.mark.equation("chain-rule-sequence", "policy-sequence", "likelihood")
@pytest.mark.parametrize(("V", "L"), [(2, 4), (3, 3), (1, 2), (4, 1)])
def test_the_chain_rule_gives_a_law_over_sequences(V, L):
    ids = all_sequences(V, L)
    assert len({tuple(row) for row in ids.tolist()}) == V**L
    logits = Tensor(tree(np.random.default_rng(V), V, L, ids))
    taken = log_softmax(logits).gather(-1, ids[..., None]).squeeze(-1)
    whole = lik.sequence_logprob(taken, np.ones(ids.shape))
    assert whole.exp().sum().item() == pytest.approx(1, abs=1e-13)
    assert lik.log_likelihood(taken, np.ones(ids.shape)).item() == pytest.approx(whole.data.sum())


@pytest.mark.equation("chain-rule-sequence", "nll", "perplexity")
def test_masked_tokens_do_not_count_and_the_reductions_are_those_of_erratum_2():
    logprobs = np.array([[-1.0, np.nan, np.nan], [-2.0, -3.0, -1.0]])
    mask = np.array([[1, 0, 0], [1, 1, 1]])
    np.testing.assert_allclose(lik.sequence_logprob(logprobs, mask).data, [-1, -6])
    assert lik.nll_loss(logprobs, mask, "sum").item() == 7
    assert lik.nll_loss(logprobs, mask).item() == 7 / 4
    assert lik.nll_loss(logprobs, mask, "seq-mean").item() == (1 + 2) / 2


@pytest.mark.equation("perplexity")
@given(st.integers(1, 500))
@settings(max_examples=25)
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(V):
    mean = lik.nll_loss(np.full((2, 3), -np.log(V)), np.ones((2, 3)))
    assert lik.perplexity(mean).item() == pytest.approx(V)
    assert lik.bits_per_token(mean).item() == pytest.approx(np.log2(V), abs=1e-12)


@pytest.mark.equation("mle-equals-min-kl")
def test_maximum_likelihood_is_minimum_divergence_from_the_data():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, size=50)
    p_hat = lik.empirical_distribution(ids, 4)
    gaps = []
    for _ in range(5):
        p = softmax(Tensor(rng.normal(size=4), requires_grad=True))
        nll = -p.log()[ids].mean()
        gaps.append(nll.item() - kl_divergence(Tensor(p_hat), p).item())
    assert gaps == pytest.approx([entropy(Tensor(p_hat)).item()] * 5)
    z = Tensor(np.log(p_hat), requires_grad=True)
    np.testing.assert_allclose(grad(-log_softmax(z)[ids].mean(), z).data, 0, atol=1e-15)


@pytest.mark.equation("label-smoothing")
def test_smoothed_targets_sum_to_one_and_no_smoothing_is_the_likelihood():
    ids = np.array([2, 0])
    q = lik.smoothed_targets(ids, 4, 0.1)
    np.testing.assert_allclose(q[0], [0.025, 0.025, 0.925, 0.025])
    np.testing.assert_allclose(q.sum(-1), 1)
    p = law.softmax(np.random.default_rng(0).normal(size=(2, 4)))
    plain = lik.label_smoothing_loss(Tensor(p), ids, smoothing=0.0).data
    np.testing.assert_allclose(plain, -np.log(p[[0, 1], ids]))
    mixed = lik.label_smoothing_loss(Tensor(p), ids, smoothing=0.3).data
    np.testing.assert_allclose(mixed, 0.7 * plain - 0.3 * np.log(p).mean(-1))
    torch = pytest.importorskip("torch")
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(np.log(p)), torch.tensor(ids), label_smoothing=0.3, reduction="none"
    )
    np.testing.assert_allclose(mixed, theirs.numpy(), rtol=1e-12)


@pytest.mark.equation("map-bayes")
def test_conjugate_update_against_a_grid_and_priors_as_penalties():
    heads, tails, alpha = 7, 2, 1.5
    grid = np.linspace(0, 1, 20_001)[1:-1]
    posterior = grid ** (heads + alpha - 1) * (1 - grid) ** (tails + alpha - 1)
    found = lik.dirichlet_posterior(np.array([heads, tails]), alpha)
    assert found.mean[0] == pytest.approx((posterior @ grid) / posterior.sum(), abs=1e-7)
    assert found.mode[0] == pytest.approx(grid[posterior.argmax()], abs=1e-4)
    assert lik.dirichlet_posterior(np.array([0, 5]), 1.0).mode.tolist() == [0, 1]
    assert np.isnan(lik.dirichlet_posterior(np.array([0, 5]), 0.5).mode).all()
    assert np.isnan(lik.dirichlet_posterior(np.array([0, 0]), 1.0).mode).all()  # flat: every point is a mode
    theta = np.array([0.3, -1.0, 2.0])
    for kind, prior in (("gaussian", scipy.stats.norm(0, 0.7)), ("laplace", scipy.stats.laplace(0, 0.7 / np.sqrt(2)))):
        assert prior.std() == pytest.approx(0.7)
        ours = lik.prior_penalty(Tensor(theta), 0.7, kind).item()
        assert ours == pytest.approx(-prior.logpdf(theta).sum() + 3 * prior.logpdf(0))


@pytest.mark.equation("kl-chain-rule")
def test_both_forms_of_the_sequence_divergence_agree_in_value_and_gradient():
    ids = all_sequences(3, 3)
    rng = np.random.default_rng(0)
    logits, ref = tree(rng, 3, 3, ids), tree(rng, 3, 3, ids)
    log_p, log_q = (
        np.take_along_axis(np.log(law.softmax(z)), ids[..., None], -1)[..., 0].sum(1) for z in (logits, ref)
    )
    # One parameter per prefix: sequences that share a prefix share its row of logits.
    flat, places = np.unique(logits.reshape(-1, 3), axis=0, return_inverse=True)
    places = places.reshape(27, 3)
    assert len(flat) == 1 + 3 + 9
    found = []
    for per_token in (False, True):
        live = Tensor(flat, requires_grad=True)
        value = sequence_kl(live[places], Tensor(ref), ids, per_token)
        assert value.item() == pytest.approx(law.kl(np.exp(log_p), np.exp(log_q)), abs=1e-13)
        found.append(grad(value, live).data)
    np.testing.assert_allclose(found[0], found[1], atol=1e-14)
    live = Tensor(flat, requires_grad=True)
    logits_now = live[places]
    prefix_law = Tensor(np.exp(log_p))  # frozen: the second form at fixed prefixes
    partial = (prefix_law * kl_token_exact(logits_now, Tensor(ref)).sum(-1)).sum()
    assert partial.item() == pytest.approx(law.kl(np.exp(log_p), np.exp(log_q)), abs=1e-13)
    assert np.abs(grad(partial, live).data - found[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lik.sequence_logprob(np.ones((2, 3)), np.ones((2, 2))), ValueError, "mask must be of the terms'"),
        (lambda: lik.nll_loss(np.ones((2, 3)), np.ones((2, 3)), "none"), ValueError, "reduction must be one of"),
        (lambda: lik.empirical_distribution(np.array([], int), 3), ValueError, "at least one"),
        (lambda: lik.empirical_distribution(np.array([3]), 3), IndexError, r"in \[0, 3\)"),
        (lambda: lik.smoothed_targets(np.array([3]), 3, 0.1), IndexError, r"in \[0, 3\)"),
        (lambda: lik.smoothed_targets(np.array([0]), 3, 1.5), ValueError, "smoothing must be in"),
        (lambda: lik.dirichlet_posterior(np.array([1]), 0.0), ValueError, "alpha must be a positive"),
        (lambda: lik.prior_penalty(Tensor(np.ones(2)), -1.0), ValueError, "std must be a positive"),
        (lambda: all_sequences(50, 5), ValueError, "at most 1000000, got 312500000"),
        (
            lambda: sequence_kl(Tensor(np.ones((2, 1, 3))), Tensor(np.ones((2, 1, 2))), np.zeros((2, 1), int)),
            ValueError,
            "ref_logits and ids",
        ),
    ],
)
def test_errors_say_what_is_wanted(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.equation("cross-entropy")
def test_a_one_hot_target_makes_cross_entropy_the_negative_log_likelihood():
    p = law.softmax(law.LOGITS_P)
    assert cross_entropy_between(Tensor(np.eye(5)[3]), Tensor(p)).item() == pytest.approx(-np.log(p[3]))
