"""Look-ups, the output head and the token loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import linear as written_linear
from minillm.functional import losses as written_losses
from minillm.functional.softmax import softmax
from minillm.fused import linear as fused_linear
from minillm.fused import losses as fused_losses
from minillm.models import Config, Decoder

seeds = st.integers(0, 2**32 - 1)
LOOKUPS = pytest.mark.parametrize("form", [written_linear, fused_linear], ids=["written", "derived"])
LOSSES = pytest.mark.parametrize("form", [written_losses, fused_losses], ids=["written", "derived"])


@LOOKUPS
@pytest.mark.equation("token-embedding", "embedding-as-onehot-matmul")
@given(seeds)
def test_a_look_up_is_a_product_with_one_hot_rows(form, seed):
    rng = np.random.default_rng(seed)
    ids, w = rng.integers(6, size=(3, 5)), Tensor(rng.normal(size=(6, 4)), requires_grad=True)
    onehot = Tensor(np.eye(6)[ids])
    looked_up, product = form.embedding(ids, w), written_linear.embedding_by_product(onehot, w)
    np.testing.assert_array_equal(looked_up.data, product.data)
    cotangent = rng.normal(size=looked_up.shape)
    np.testing.assert_allclose(grad(looked_up, w, cotangent).data, grad(product, w, cotangent).data, atol=1e-12)


@LOOKUPS
@pytest.mark.equation("token-embedding")
def test_repeated_ids_add_their_gradients_and_absent_ones_get_none(form):
    w = Tensor(np.ones((4, 2)), requires_grad=True)
    d = grad(form.embedding(np.array([1, 1, 3, 1]), w).sum(), w).data
    np.testing.assert_array_equal(d[:, 0], [0, 3, 0, 1])


@LOOKUPS
@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_out_of_range_are_named(form, bad):
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 4\), got {bad}"):
        form.embedding(np.array([0, bad]), Tensor(np.ones((4, 2))))
    with pytest.raises(TypeError, match="must be integers"):
        form.embedding(np.array([0.0]), Tensor(np.ones((4, 2))))


@pytest.mark.equation("weight-tying", "lm-head")
def test_tying_saves_a_matrix_and_adds_the_gradients():
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 12, "context": 6}
    untied, tied = Decoder(Config(**sizes), rng), Decoder(Config(**sizes, tied=True), rng)
    assert untied.count_parameters() - tied.count_parameters() == 11 * 8
    state = {k: v for k, v in untied.state_dict().items() if k != "head.weight"}
    tied.load_state_dict(state)
    untied.head.weight.data[...] = untied.embedding.weight.data
    ids = rng.integers(11, size=(2, 6))
    np.testing.assert_array_equal(tied(ids).data, untied(ids).data)
    assert tied(ids).shape == (2, 6, 11)
    both = grad(untied(ids).sum(), [untied.embedding.weight, untied.head.weight])
    np.testing.assert_allclose(
        grad(tied(ids).sum(), tied.embedding.weight).data, both[0].data + both[1].data, rtol=1e-5, atol=1e-5
    )


@pytest.mark.equation("next-token-distribution")
def test_the_next_token_distribution_sums_to_one_and_scores_the_token_after():
    """Erratum 8: the logits at position t see token t, so they can only score token t + 1."""
    rng = np.random.default_rng(1)
    model = Decoder(Config(7, d_model=8, n_layers=1, n_heads=2, context=5), rng)
    ids = rng.integers(7, size=(1, 5))
    p = softmax(model(ids)).data
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    changed = ids.copy()
    changed[0, 3] = (ids[0, 3] + 1) % 7
    q = softmax(model(changed)).data
    np.testing.assert_allclose(p[0, :3], q[0, :3], atol=1e-6)
    assert np.abs(p[0, 3] - q[0, 3]).max() > 1e-6


@pytest.mark.equation("final-ln", "glu-ffn")
def test_the_head_reads_a_normalised_stream_and_the_ffn_returns_to_its_width():
    rng = np.random.default_rng(2)
    model = Decoder(Config(7, d_model=8, n_layers=2, n_heads=2, d_ff=20, context=5, init_std=0.5), rng)
    h = model.hidden(rng.integers(7, size=(3, 5)))
    np.testing.assert_allclose(np.sqrt((h.data**2).mean(-1)), 1, rtol=1e-3)
    ffn = model.blocks[0].ffn
    x = Tensor(rng.normal(size=(3, 5, 8)).astype(np.float32))
    value, gate = np.split(x.data @ ffn.w_value_gate.data.T, 2, axis=-1)
    expected = (value * gate / (1 + np.exp(-gate))) @ ffn.w_down.data.T
    assert ffn(x).shape == x.shape
    np.testing.assert_allclose(ffn(x).data, expected, rtol=1e-4, atol=1e-5)


@LOSSES
@pytest.mark.equation("cross-entropy-logits")
@given(seeds, st.sampled_from(["token-mean", "sum"]))
def test_torch_agrees_on_cross_entropy_with_ignored_targets(form, seed, reduction):
    rng = np.random.default_rng(seed)
    z, targets = 5 * rng.normal(size=(4, 6)), rng.integers(6, size=4)
    targets[0] = -100
    x, t = Tensor(z, requires_grad=True), torch.tensor(z, requires_grad=True)
    ours = form.cross_entropy(x, targets, reduction=reduction)
    theirs = torch.nn.functional.cross_entropy(
        t, torch.tensor(targets), reduction="mean" if reduction == "token-mean" else "sum"
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    np.testing.assert_allclose(grad(ours, x).data, torch.autograd.grad(theirs, t)[0].numpy(), rtol=1e-8, atol=1e-12)


@LOSSES
@pytest.mark.equation("cross-entropy-logits")
def test_ignored_rows_have_no_effect_even_when_they_hold_nan(form):
    z = np.random.default_rng(0).normal(size=(3, 4))
    z[1] = np.nan
    x = Tensor(z, requires_grad=True)
    loss = form.cross_entropy(x, np.array([2, -100, 0]))
    d = grad(loss, x).data
    assert np.isfinite(loss.item()) and np.isfinite(d).all() and not d[1].any()


@LOSSES
@pytest.mark.equation("cross-entropy-logits")
def test_nothing_kept_gives_zero_and_shares_add_up(form):
    z = Tensor(np.random.default_rng(0).normal(size=(4, 3)), requires_grad=True)
    nothing = form.cross_entropy(z, np.full(4, -100))
    assert nothing.item() == 0 and not grad(nothing, z).data.any()
    targets = np.array([0, -100, 2, 1])
    whole = form.cross_entropy(z, targets).item()
    halves = [form.cross_entropy(z[s], targets[s], divisor=3).item() for s in (np.s_[:1], np.s_[1:])]
    assert sum(halves) == pytest.approx(whole, rel=1e-12)


@LOSSES
def test_bad_targets_are_refused(form):
    z = Tensor(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"the targets must be of shape \(2,\)"):
        form.cross_entropy(z, np.zeros((2, 1), int))
    with pytest.raises(IndexError, match=r"in \[0, 3\), got 3"):
        form.cross_entropy(z, np.array([0, 3]))
    with pytest.raises(ValueError, match="reduction must be one of"):
        form.cross_entropy(z, np.array([0, 1]), reduction="mean")
