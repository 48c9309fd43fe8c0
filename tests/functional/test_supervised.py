"""The loss of supervised fine-tuning: only completions count, and the divisor is a choice."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional.supervised import sft_loss


@pytest.mark.equation("sft-loss")
def test_it_is_the_mean_negative_log_prob_of_the_completion_and_never_negative():
    logprobs = np.log([[0.5, 0.25, 0.5, 0.125]])
    mask = np.array([[False, False, True, True]])
    assert sft_loss(logprobs, mask).item() == pytest.approx(0.5 * (np.log(2) + np.log(8)))


@pytest.mark.equation("sft-loss", "sft-argmin")
def test_four_divisors_of_responses_of_one_and_nine_tokens():
    """Negative log-likelihoods 1 and 18 over 1 and 9 tokens: 19 in all, 1.9 a token, 1.5 a sequence (erratum 2)."""
    logprobs = np.array([[-1.0] + [-99.0] * 8, [-2.0] * 9])
    mask = np.arange(9) < np.array([[1], [9]])
    values = {r: sft_loss(logprobs, mask, r).item() for r in ("sum", "token-mean", "seq-mean", "seq-sum")}
    assert values == pytest.approx({"sum": 19.0, "token-mean": 1.9, "seq-mean": 1.5, "seq-sum": 9.5})


@pytest.mark.equation("sft-loss")
@pytest.mark.parametrize("reduction", ["seq-mean", "token-mean", "seq-sum"])
def test_prompts_receive_no_gradient(reduction):
    logprobs = Tensor(-np.ones((2, 3)), requires_grad=True)
    mask = np.array([[False, True, True], [False, False, True]])
    gradient = grad(sft_loss(logprobs, mask, reduction), logprobs).data
    assert (gradient[mask] < 0).all() and (gradient[~mask] == 0).all()


@pytest.mark.equation("sft-argmin")
def test_the_minimiser_of_the_summed_loss_samples_as_the_demonstrations_do():
    """Over one prompt with one-token answers shown 4, 2 and 2 times, gradient descent finds 1/2, 1/4, 1/4."""
    shown = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    logits = np.zeros(3)
    for _ in range(500):
        z = Tensor(logits, requires_grad=True)
        logprobs = z - z.exp().sum().log()
        loss = sft_loss(logprobs[shown].reshape(-1, 1), np.ones((8, 1), bool), "seq-sum")
        logits = logits - grad(loss, z).data
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), [0.5, 0.25, 0.25], atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "reduction", "complaint"),
    [
        (np.ones((2, 2), bool), "seq-mean", "the mask must be of the terms' shape"),
        (np.full((1, 3), 2), "seq-mean", "the mask must be of booleans, zeros and ones"),
        (np.ones((1, 3), bool), "mean", "reduction must be one of"),
    ],
)
def test_wrong_masks_and_reductions_are_refused(mask, reduction, complaint):
    with pytest.raises(ValueError, match=complaint):
        sft_loss(-np.ones((1, 3)), mask, reduction)
