"""Multi-head attention as written: against torch, per head, its cost, pooled heads, dropout, latents."""

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor
from minillm.functional import multi_head as mh
from minillm.functional.attention import scaled_dot_product_attention
from minillm.functional.masks import causal_mask


def tensors(rng, *shapes):
    return [Tensor(rng.normal(size=shape)) for shape in shapes]


@pytest.mark.equation("mha", "qkv-projection", "cross-attention")
def test_torch_and_the_layout_with_a_matrix_per_head_agree():
    """Erratum 19: one matrix for all heads, or one of (d_model, d_head) for each, are the same map."""
    rng, H, d = np.random.default_rng(0), 3, 6
    z, x, *weights = tensors(rng, (2, 4, d), (2, 5, d), (d, d), (d, d), (d, d), (d, d))
    ours = mh.multi_head_attention(z, x, *weights, H=H).data
    q, k, v, out = (torch.tensor(w.data) for w in weights)
    theirs, _ = torch.nn.functional.multi_head_attention_forward(
        torch.tensor(z.data).transpose(0, 1), torch.tensor(x.data).transpose(0, 1), torch.tensor(x.data).transpose(0, 1),
        d, H, torch.cat([q, k, v]), None, None, None, False, 0.0, out, None,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs.transpose(0, 1).numpy(), atol=1e-13)
    per_head = [
        [w.data.reshape(H, d // H, d)[h].T for w in weights[:3]] for h in range(H)
    ]  # (d_model, d_head) each, as the source writes them
    heads = []
    for w_q, w_k, w_v in per_head:
        scores = (z.data @ w_q) @ (x.data @ w_k).swapaxes(1, 2) / np.sqrt(d // H)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(e / e.sum(-1, keepdims=True) @ (x.data @ w_v))
    np.testing.assert_allclose(ours, np.concatenate(heads, -1) @ weights[3].data.T, atol=1e-13)


@pytest.mark.equation("self-attention", "vision-text-cross")
def test_other_lengths_and_widths_and_the_same_sequence():
    rng = np.random.default_rng(1)
    text, image, *weights = tensors(rng, (2, 4, 6), (2, 9, 5), (6, 6), (6, 5), (6, 5), (6, 6))
    assert mh.multi_head_attention(text, image, *weights, H=2).shape == (2, 4, 6)
    same = tensors(rng, (6, 6), (6, 6), (6, 6), (6, 6))
    masked = mh.multi_head_attention(text, text, *same, H=2, keep=causal_mask(4)).data
    changed = Tensor(np.concatenate([text.data[:, :2], text.data[:, 2:] + 1], axis=1))
    other = mh.multi_head_attention(changed, changed, *same, H=2, keep=causal_mask(4)).data
    np.testing.assert_array_equal(masked[:, :2], other[:, :2])


@pytest.mark.equation("mha-to-gqa")
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_pooling_is_exact_where_the_heads_of_a_group_agree(H_kv):
    rng, H, d_head, d = np.random.default_rng(2), 4, 3, 5
    few = rng.normal(size=(H_kv * d_head, d))
    many = few.reshape(H_kv, 1, d_head, d).repeat(H // H_kv, 1).reshape(H * d_head, d)
    np.testing.assert_allclose(mh.pool_heads(many, H, H_kv), few, rtol=1e-15)
    x, w_q, w_v, w_out = tensors(rng, (2, 4, d), (H * d_head, d), (H * d_head, d), (d, H * d_head))
    wide = Tensor(
        mh.pool_heads(w_v.data, H, H_kv).reshape(H_kv, 1, d_head, d).repeat(H // H_kv, 1).reshape(H * d_head, d)
    )
    full = mh.multi_head_attention(x, x, w_q, Tensor(many), wide, w_out, H=H).data
    pooled = mh.multi_head_attention(
        x, x, w_q, Tensor(few), Tensor(mh.pool_heads(w_v.data, H, H_kv)), w_out, H=H, H_kv=H_kv
    ).data
    np.testing.assert_allclose(pooled, full, atol=1e-12)
    random = rng.normal(size=(H * d_head, d))
    np.testing.assert_allclose(mh.pool_heads(random, H, 1), random.reshape(H, d_head, d).mean(0))


@pytest.mark.equation("mha-cost-invariance")
def test_cost_is_that_of_the_products_counted_one_by_one():
    """Erratum 21: products do not depend on H, the stored probabilities do."""
    for H in (1, 2, 4, 8):
        q = np.zeros((3, H, 5, 16 // H))
        scores = q @ q.swapaxes(-1, -2)
        context = scores @ q
        operations = 2 * scores.size * q.shape[-1] + 2 * context.size * scores.shape[-1]
        assert mh.head_cost(3, 5, 16, H) == (operations, scores.size)
        assert mh.head_cost(3, 5, 16, H).operations == mh.head_cost(3, 5, 16, 1).operations


@pytest.mark.equation("attention-dropout")
def test_dropout_is_off_in_evaluation_and_right_on_average():
    rng = np.random.default_rng(3)
    q, k, v = tensors(rng, (1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    exact = scaled_dot_product_attention(q, k, v).data
    np.testing.assert_allclose(mh.attention_with_dropout(q, k, v, rate=0.4).data, exact, rtol=1e-14)
    draws = [
        mh.attention_with_dropout(q, k, v, rate=0.4, dropped=mh.draw_dropped((1, 2, 3, 5), 0.4, rng)).data
        for _ in range(2000)
    ]
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - exact) < 5 * error).all() and error.max() < 0.1
    nothing = mh.attention_with_dropout(q, k, v, rate=0.4, dropped=np.ones((1, 2, 3, 5), bool)).data
    assert not nothing.any()


@pytest.mark.equation("perceiver-latent-attention")
def test_latents_read_any_length_and_ignore_the_order():
    """Erratum 24: it is the sequence that gets shorter, L to M, not the cache's width."""
    rng = np.random.default_rng(4)
    latents, x, *weights = tensors(rng, (3, 4), (2, 7, 4), (4, 4), (4, 4), (4, 4), (4, 4))
    out = mh.perceiver_attention(latents, x, *weights, H=2)
    assert out.shape == (2, 3, 4)
    shuffled = Tensor(x.data[:, rng.permutation(7)])
    np.testing.assert_allclose(mh.perceiver_attention(latents, shuffled, *weights, H=2).data, out.data, atol=1e-13)
    alone = mh.perceiver_attention(latents, x[:1], *weights, H=2).data
    np.testing.assert_allclose(alone, out.data[:1], atol=1e-14)


w = np.zeros((6, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mh.pool_heads(w, 4, 2), r"pool_heads: w must be of shape \(H d_head, d_model\) with H = 4"),
        (lambda: mh.pool_heads(w, 3, 2), "pool_heads: H_kv must be a divisor of H = 3, got 2"),
        (lambda: mh.pool_heads(w, 0, 2), "pool_heads: H must be a positive integer, got 0"),
        (
            lambda: mh.multi_head_attention(*(Tensor(np.zeros((1, 2, 4))),) * 2, *(Tensor(np.zeros((4, 4))),) * 4, H=2, H_kv=0),
            "H must be a positive integer, got 0",
        ),
        (lambda: mh.head_cost(1, 2, 7, 2), "head_cost: H must be a divisor of d_model = 7, got 2"),
        (lambda: mh.head_cost(1, 0, 8, 2), "head_cost: L must be a positive integer, got 0"),
        (lambda: mh.draw_dropped((2,), 1.0, np.random.default_rng(0)), r"draw_dropped: the rate must be in \[0, 1\), got 1.0"),
        (
            lambda: mh.attention_with_dropout(*(Tensor(np.zeros((1, 1, 2, 2))),) * 3, rate=0.1, dropped=np.zeros((2, 2), bool)),
            r"dropped must be boolean of shape \(1, 1, 2, 2\), got shape \(2, 2\)",
        ),
        (
            lambda: mh.perceiver_attention(*map(Tensor, (np.zeros((3, 5)), np.zeros((1, 2, 4)), *(np.zeros((4, 4)),) * 4)), H=2),
            r"latents must be of shape \(M, d\) with the width of x, 4, got shape \(3, 5\)",
        ),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
