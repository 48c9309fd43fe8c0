"""Multi-token prediction as functions: which target belongs to which position, relations, bad input."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional import multi_token
from minillm.functional.losses import cross_entropy
from minillm.functional.softmax import log_softmax


@pytest.mark.equation("mtp-loss")
def test_targets_are_the_tokens_i_places_on_and_the_end_is_trimmed():
    ids = np.array([[5, 6, 7, 8], [1, 2, 3, 4]])
    np.testing.assert_array_equal(multi_token.future_targets(ids, 1), [[6, 7, 8, -100], [2, 3, 4, -100]])
    np.testing.assert_array_equal(multi_token.future_targets(ids, 3, -1), [[8, -1, -1, -1], [4, -1, -1, -1]])


@pytest.mark.equation("mtp-parallel-heads")
def test_one_head_is_the_ordinary_loss_and_n_heads_add_theirs():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 3, 5, 4)), rng.integers(4, size=(2, 5))
    one = float(multi_token.parallel_heads_loss(Tensor(logits[:, :1]), ids))
    assert one == pytest.approx(float(cross_entropy(Tensor(logits[:, 0, :-1]), ids[:, 1:])))
    logp = log_softmax(Tensor(logits)).data
    wanted = 0.0
    for i in (1, 2, 3):
        wanted -= np.mean([logp[b, i - 1, t, ids[b, t + i]] for b in range(2) for t in range(5 - i)])
    assert float(multi_token.parallel_heads_loss(Tensor(logits), ids)) == pytest.approx(wanted)


@pytest.mark.equation("mtp-parallel-heads", "mtp-loss")
def test_positions_without_a_target_get_no_gradient():
    logits = Tensor(np.random.default_rng(0).normal(size=(1, 2, 5, 4)), requires_grad=True)
    found = grad(multi_token.parallel_heads_loss(logits, np.array([[0, 1, 2, 3, 0]])), logits).data
    assert not found[0, 0, 4:].any() and not found[0, 1, 3:].any()
    assert found[0, 0, 3].any() and found[0, 1, 2].any()


@pytest.mark.equation("mtp-sequential-module")
def test_the_module_reads_directions_only_of_stream_and_token():
    rng = np.random.default_rng(1)
    h, e, ones, w = rng.normal(size=(1, 2, 3)), rng.normal(size=(1, 2, 3)), np.ones(3), rng.normal(size=(3, 6))
    made = multi_token.mtp_module_input(*map(Tensor, (h, e, ones, ones, w)), eps=0.0).data
    scaled = multi_token.mtp_module_input(*map(Tensor, (5 * h, 0.1 * e, ones, ones, w)), eps=0.0).data
    np.testing.assert_allclose(made, scaled)
    unit = [a / np.sqrt((a**2).mean(-1, keepdims=True)) for a in (h, e)]
    np.testing.assert_allclose(made, np.concatenate(unit, -1) @ w.T)


@pytest.mark.equation("mtp-loss")
def test_the_loss_adds_a_share_of_the_mean_over_depths():
    assert float(multi_token.mtp_loss(Tensor(2.0), Tensor([3.0, 5.0]), 0.3)) == pytest.approx(2 + 0.3 * 4)
    assert float(multi_token.mtp_loss(Tensor(2.0), Tensor([3.0]), 0.0)) == 2.0


IDS = np.array([[0, 1, 2]])
BAD = [
    (lambda: multi_token.future_targets(IDS / 2, 1), TypeError, "integers"),
    (lambda: multi_token.future_targets(IDS[0], 1), ValueError, r"of shape \(B, L\)"),
    (lambda: multi_token.future_targets(IDS, 3), ValueError, "no position has a target"),
    (lambda: multi_token.future_targets(IDS, 0), ValueError, "no position has a target"),
    (lambda: multi_token.parallel_heads_loss(Tensor(np.ones((1, 1, 3, 2))), IDS), IndexError, "ids must be in"),
    (lambda: multi_token.parallel_heads_loss(Tensor(np.ones((2, 1, 3, 4))), IDS), ValueError, "the ids must be"),
    (lambda: multi_token.parallel_heads_loss(Tensor(np.ones((1, 0, 3, 4))), IDS), ValueError, "at least one head"),
    (lambda: multi_token.parallel_heads_loss(Tensor(np.ones((1, 3, 3, 4))), IDS), ValueError, "no position"),
    (lambda: multi_token.parallel_heads_loss(Tensor(np.ones((1, 3, 4))), IDS), ValueError, r"of shape \(B, n, L, V\)"),
    (lambda: multi_token.mtp_loss(Tensor(1.0), Tensor(np.ones(0))), ValueError, "the depths' losses"),
    (lambda: multi_token.mtp_loss(Tensor(1.0), Tensor([1.0]), -1.0), ValueError, "the coefficient"),
    (
        lambda: multi_token.mtp_module_input(*(Tensor(np.ones(s)) for s in ((1, 2, 3), (1, 1, 3), 3, 3, (3, 6)))),
        ValueError,
        "the embeddings must be",
    ),
]


@pytest.mark.equation("mtp-loss", "mtp-parallel-heads", "mtp-sequential-module")
@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input_gives_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()
