"""The language-model loss: which logits score which token, and how many terms there are."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional.language_model import clm_loss, clm_one_hot, mle_objective
from minillm.models import Config, Decoder

V = 7


def draw(seed: int = 0, B: int = 3, L: int = 5):
    rng = np.random.default_rng(seed)
    return Tensor(rng.normal(size=(B, L, V)), requires_grad=True), rng.integers(0, V, size=(B, L))


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.equation("clm-loss")
def test_logits_at_t_score_token_t_plus_one_over_l_minus_one_terms():
    logits, tokens = draw()
    terms = [-log_softmax(logits.data[b, t])[tokens[b, t + 1]] for b in range(3) for t in range(4)]
    assert len(terms) == 3 * 4
    assert clm_loss(logits, tokens).item() == pytest.approx(np.mean(terms))
    assert (grad(clm_loss(logits, tokens), logits).numpy()[:, -1] == 0).all()  # nothing is behind the last token


@pytest.mark.equation("clm-loss", "clm-one-hot")
def test_with_bos_there_are_l_terms_and_the_one_hot_form_is_the_same():
    logits, tokens = draw()
    terms = [-log_softmax(logits.data[b, t])[tokens[b, t]] for b in range(3) for t in range(5)]
    assert clm_loss(logits, tokens, bos=True).item() == pytest.approx(np.mean(terms))
    assert clm_one_hot(logits, tokens).item() == pytest.approx(np.mean(terms))
    difference = grad(clm_one_hot(logits, tokens), logits) - grad(clm_loss(logits, tokens, bos=True), logits)
    np.testing.assert_allclose(difference.numpy(), 0, atol=1e-12)


@pytest.mark.equation("clm-loss")
def test_unshifted_targets_are_learnt_by_copying():
    """Errata 8 and 52: a network that sees x_t and is asked for x_t needs to know nothing of the language."""
    tokens = draw()[1]
    copying = Tensor(100.0 * np.eye(V)[tokens])
    assert clm_loss(copying, tokens, bos=True).item() < 1e-6  # the leak
    assert clm_loss(copying, tokens).item() > 10  # the right loss is not fooled


@pytest.mark.equation("clm-loss")
def test_torch_and_transformers_divide_and_shift_alike():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, tokens = draw()
    theirs = ForCausalLMLoss(torch.from_numpy(logits.data), torch.from_numpy(tokens), V)
    assert clm_loss(logits, tokens).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.equation("mle-objective", "chain-rule-sequence")
def test_minus_the_objective_is_the_log_probability_of_the_data():
    """Over all texts of three tokens after BOS the probabilities sum to 1."""
    model = Decoder(Config(3, 8, 1, 2, context=4), np.random.default_rng(0))
    texts = np.stack(np.meshgrid(*[range(2)] * 3, indexing="ij"), -1).reshape(-1, 3)  # tokens 0, 1; BOS is 2
    inputs = np.concatenate([np.full((8, 1), 2), texts[:, :-1]], 1)
    logits = model(inputs)
    logits = Tensor(np.where(np.arange(3) == 2, -np.inf, logits.data))  # BOS is never a continuation
    each = [np.exp(-mle_objective(Tensor(logits.data[i : i + 1]), texts[i : i + 1], bos=True).item()) for i in range(8)]
    assert sum(each) == pytest.approx(1, rel=1e-5)
    assert mle_objective(logits, texts, bos=True).item() == pytest.approx(-np.log(each).sum(), rel=1e-5)
    mean = clm_loss(logits, texts, bos=True).item()
    assert mle_objective(logits, texts, bos=True).item() == pytest.approx(24 * mean, rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_shapes_that_do_not_fit_are_refused(bos):
    logits, tokens = draw()
    with pytest.raises(ValueError, match=r"the tokens must be of shape \(3, 5\)"):
        clm_loss(logits, tokens[:, :-1], bos=bos)
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        clm_loss(logits, np.where(tokens == tokens[0, 1], V, tokens), bos=bos)


def test_one_token_alone_predicts_nothing():
    logits, tokens = draw(L=1)
    with pytest.raises(ValueError, match="at least 2"):
        clm_loss(logits, tokens)
    assert clm_loss(logits, tokens, bos=True).item() > 0
