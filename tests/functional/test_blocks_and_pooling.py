"""Blocks as written beside the models' own, the variance of parallel branches, pooling, and objectives of encoders."""

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor
from minillm.functional import blocks, pooling
from minillm.functional.masked_language import corrupt, mlm_loss, replaced_token_loss
from minillm.models import Config
from minillm.models.blocks import TransformerBlock
from minillm.nn.positions import NoPositions

CONFIG = {"vocab_size": 5, "d_model": 8, "n_heads": 2, "positions": "none", "init_std": 0.4}


def stream(seed=0):
    return Tensor(np.random.default_rng(seed).normal(size=(2, 5, 8)).astype(np.float32))


FORMS = {
    "block-pre-ln": ({}, blocks.pre_ln_block),
    "block-post-ln": ({"norm_place": "post"}, blocks.post_ln_block),
    "block-parallel": ({"layout": "parallel"}, blocks.parallel_block),
    "block-parallel-scaled": ({"layout": "parallel", "branches": "halved"}, blocks.parallel_block_scaled),
    "branch-scales": ({"layout": "parallel", "branches": "learnt"}, blocks.parallel_block_gains),
}


@pytest.mark.equation("block-pre-ln", "block-post-ln", "block-parallel", "block-parallel-scaled", "branch-scales")
@pytest.mark.parametrize("name", FORMS)
def test_the_models_block_is_the_equation(name):
    changes, written = FORMS[name]
    block = TransformerBlock(Config(**CONFIG, **changes), NoPositions(), np.random.default_rng(0), causal=True)
    x = stream()
    gains = [block.attention_norm.gain] + ([] if block.ffn_norm is None else [block.ffn_norm.gain])
    weights = [g[0] for g in (block.attention_gain, block.ffn_gain) if g is not None]
    expected = written(x, block.attention, block.ffn, *gains, *weights, eps=1e-5)
    np.testing.assert_allclose(block(x).data, expected.data, atol=2e-6)


@pytest.mark.equation("decoder-block-cross")
def test_the_block_with_cross_attention_is_the_equation():
    block = TransformerBlock(Config(**CONFIG), NoPositions(), np.random.default_rng(0), causal=True, cross=True)
    x, memory = stream(), stream(1)

    def cross(y, m):
        return block.cross(y, memory=m)

    gains = block.attention_norm.gain, block.cross_norm.gain, block.ffn_norm.gain
    expected = blocks.decoder_block_cross(x, memory, block.attention, cross, block.ffn, *gains, eps=1e-5)
    np.testing.assert_allclose(block(x, memory=memory).data, expected.data, atol=2e-6)


@pytest.mark.equation("wn-parallel-scale", "block-parallel-scaled")
@pytest.mark.parametrize(("correlation", "variance"), [(0.0, 1.0), (0.5, 1.5), (-0.5, 0.5)])
def test_the_root_of_two_keeps_the_variance_of_independent_branches_only(correlation, variance):
    rng = np.random.default_rng(0)
    n = 200_000
    a, b = rng.normal(size=(2, n))
    f = correlation * a + np.sqrt(1 - correlation**2) * b
    zero = Tensor(np.zeros((1, n, 1)))
    branch = [lambda _: Tensor(a.reshape(1, n, 1)), lambda _: Tensor(f.reshape(1, n, 1))]
    out = blocks.parallel_block_scaled(zero, *branch, Tensor(np.ones(1)))
    assert out.data.var() == pytest.approx(variance, abs=6 * variance * np.sqrt(2 / n))  # erratum 33


@pytest.mark.equation("shift-right")
def test_a_decoder_reads_its_target_one_place_to_the_right():
    np.testing.assert_array_equal(blocks.shift_right(np.array([[5, 6, 7], [8, 9, 1]]), 0), [[0, 5, 6], [0, 8, 9]])
    for bad in (np.array([1, 2]), np.array([[1.5]]), np.zeros((2, 0), int)):
        with pytest.raises(ValueError, match="shift_right: the targets must be integers"):
            blocks.shift_right(bad, 0)


@pytest.mark.equation("mlm-loss")
def test_what_is_hidden_from_a_masked_model():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 100, (400, 500))
    special = ids == 7
    read, chosen = corrupt(ids, 3, 100, rng, special=special)
    assert abs(chosen[~special].mean() - 0.15) < 0.005 and not chosen[special].any()
    np.testing.assert_array_equal(read[~chosen], ids[~chosen])
    assert abs((read[chosen] == 3).mean() - 0.801) < 0.01  # 0.8, and a random token may be the mask
    assert abs((read[chosen] == ids[chosen]).mean() - 0.101) < 0.01


@pytest.mark.equation("mlm-loss", "replaced-token-detection")
def test_both_losses_are_torch_s():
    rng = np.random.default_rng(0)
    logits, ids, chosen = rng.normal(size=(2, 4, 7)), rng.integers(0, 7, (2, 4)), rng.random((2, 4)) < 0.5
    labels = torch.from_numpy(np.where(chosen, ids, -100)).reshape(-1)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).reshape(-1, 7), labels)
    assert mlm_loss(Tensor(logits), ids, chosen).item() == pytest.approx(expected.item(), rel=1e-12)
    z, replaced = rng.normal(size=(2, 4)), rng.random((2, 4)) < 0.5
    original = torch.from_numpy((~replaced).astype(float))
    for reduction in ("mean", "sum"):
        bce = torch.nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(z), original, reduction=reduction)
        found = replaced_token_loss(Tensor(z), replaced, reduction=reduction).item()
        assert found == pytest.approx(bce.item(), rel=1e-12)


X, NO = Tensor(np.zeros((2, 3, 4))), np.zeros((2, 3), bool)
BAD = {
    "cls": (lambda: pooling.cls_pooling(X[0]), "cls_pooling: H must be"),
    "padding only": (lambda: pooling.mean_pooling(X, NO), "mean_pooling: every sequence must be at least one"),
    "last": (lambda: pooling.last_pooling(X, NO[:1]), "last_pooling: the mask of real tokens must be"),
    "span": (lambda: pooling.span_logits(X, Tensor(np.zeros((3, 4)))), "span_logits: the weight must be"),
    "cosine": (lambda: pooling.cosine_scores(X[0], X[0, :, :2]), "cosine_scores: the documents must be"),
    "rate": (lambda: corrupt(np.zeros((1, 2), int), 0, 5, np.random.default_rng(0), rate=2), "corrupt: rate must be"),
    "mlm shape": (lambda: mlm_loss(X, NO[:1].astype(int), NO), "mlm_loss: the ids must be of shape"),
    "reduction": (lambda: replaced_token_loss(X[..., 0], NO, reduction="no"), "reduction must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_mask_token_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match=r"corrupt: mask_id must be in \[0, 5\)"):
        corrupt(np.zeros((1, 2), int), 5, 5, np.random.default_rng(0))


@pytest.mark.equation("mlm-loss", "replaced-token-detection")
def test_nothing_chosen_costs_nothing():
    assert mlm_loss(X, NO.astype(int), NO).item() == 0.0
    assert replaced_token_loss(X[..., 0], NO, NO).item() == 0.0
