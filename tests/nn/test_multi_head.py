"""Multi-head attention as a module: torch's own, cross, grouped, in pieces through every cache, and bad input."""

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor, grad, no_grad
from minillm.functional.positions import rope, rotation_angles
from minillm.nn.cross_cache import CrossCache
from minillm.nn.multi_head import MultiHeadAttention


def stream(rng, *shape):
    return Tensor(rng.normal(size=shape).astype(np.float32))


def turn(heads, positions):
    return rope(heads, angles=rotation_angles(positions, heads.shape[-1]))


@pytest.mark.equation("mha", "cross-attention", "self-attention", "vision-text-cross")
@pytest.mark.parametrize("d_memory", [None, 12, 20])
def test_torch_agrees_in_value_and_gradient(d_memory):
    """With the memory the stream itself, of the same width, or of another modality and width."""
    rng = np.random.default_rng(0)
    ours = MultiHeadAttention(12, 3, rng, d_memory=d_memory, bias=True, std=0.3)
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=d_memory, vdim=d_memory, batch_first=True)
    shifts = [b for b in (ours.b_q, ours.b_k, ours.b_v, ours.b_out) if b is not None]
    for b in shifts:
        b.data[...] = rng.normal(size=b.shape)
    with torch.no_grad():
        weights = [torch.tensor(w.data) for w in (ours.w_q, ours.w_k, ours.w_v)]
        if theirs.in_proj_weight is not None:
            theirs.in_proj_weight.copy_(torch.cat(weights))
        else:
            theirs.q_proj_weight.copy_(weights[0])
            theirs.k_proj_weight.copy_(weights[1])
            theirs.v_proj_weight.copy_(weights[2])
        theirs.in_proj_bias.copy_(torch.cat([torch.tensor(b.data) for b in shifts[:3]]))
        theirs.out_proj.weight.copy_(torch.tensor(ours.w_out.data))
        theirs.out_proj.bias.copy_(torch.tensor(shifts[3].data))
    x = Tensor(rng.normal(size=(2, 5, 12)).astype(np.float32), requires_grad=True)
    memory = None if d_memory is None else stream(rng, 2, 7, d_memory)
    y = ours(x, memory=memory)
    x_torch = torch.tensor(x.data, requires_grad=True)
    other = x_torch if memory is None else torch.tensor(memory.data)
    y_torch, _ = theirs(x_torch, other, other)
    np.testing.assert_allclose(y.data, y_torch.detach().numpy(), atol=2e-6)
    g = rng.normal(size=y.shape).astype(np.float32)
    (wanted,) = torch.autograd.grad(y_torch, x_torch, torch.tensor(g))
    (found,) = grad([y], [x], [g])
    np.testing.assert_allclose(found.data, wanted.numpy(), atol=1e-5)


@pytest.mark.equation("self-attention")
def test_self_attention_is_cross_attention_to_the_same_sequence():
    rng = np.random.default_rng(1)
    mixer, x = MultiHeadAttention(8, 2, rng, std=0.5), stream(rng, 2, 4, 8)
    np.testing.assert_array_equal(mixer(x).data, mixer(x, memory=x).data)


@pytest.mark.equation("kv-cache", "gqa", "sparse-attention-window", "kv-cache-window")
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
def test_pieces_through_the_cache_are_the_whole(window, pieces):
    rng = np.random.default_rng(2)
    mixer = MultiHeadAttention(
        16, 4, rng, n_kv_heads=2, causal=True, window=window, turn=turn, qk_norm=True, std=0.5, bias=True
    )
    x = stream(rng, 2, 9, 16)
    whole = mixer(x).data
    cache, start = mixer.new_cache(2, 9), 0
    with no_grad():
        for piece in pieces:
            part = mixer(x[:, start : start + piece], cache=cache).data
            np.testing.assert_allclose(part, whole[:, start : start + piece], atol=1e-5)
            start += piece


@pytest.mark.equation("kv-cache-prefix", "cross-attention")
def test_the_memory_is_projected_once():
    rng = np.random.default_rng(3)
    mixer, cache = MultiHeadAttention(8, 2, rng, d_memory=6, std=0.5), CrossCache()
    x, memory = stream(rng, 2, 3, 8), stream(rng, 2, 5, 6)
    whole = mixer(x, memory=memory).data
    with no_grad():
        for t in range(3):
            part = mixer(x[:, t : t + 1], memory=memory, cache=cache).data
            np.testing.assert_allclose(part, whole[:, t : t + 1], atol=1e-6)
            memory = Tensor(np.full((2, 5, 6), np.nan, np.float32))  # nobody looks at it again
    assert cache.length == 5


@pytest.mark.equation("mask-padding")
def test_what_is_masked_has_no_effect():
    rng = np.random.default_rng(4)
    mixer, x = MultiHeadAttention(8, 2, rng, std=0.5), rng.normal(size=(2, 5, 8)).astype(np.float32)
    keep = np.array([1, 1, 1, 0, 0], bool)
    changed = x.copy()
    changed[:, 3:] = 9
    one, two = (mixer(Tensor(a), keep=keep).data[:, :3] for a in (x, changed))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_heads": 3}, "n_heads must be a divisor of d_model = 8, got 3"),
        ({"n_kv_heads": 3}, "n_kv_heads must be a divisor of n_heads = 4, got 3"),
        ({"n_heads": 0}, "n_heads must be a positive integer, got 0"),
        ({"d_head": -1}, "d_head must be a positive integer, got -1"),
        ({"window": 2}, "window must be left out without causal=True, got 2"),
    ],
)
def test_impossible_heads_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"MultiHeadAttention: {message}"):
        MultiHeadAttention(8, rng=np.random.default_rng(0), **{"n_heads": 4, **arguments})


def test_inputs_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    mixer = MultiHeadAttention(8, 2, rng, d_memory=6)
    with pytest.raises(ValueError, match=r"x must be of shape \(B, L, 8\), got shape \(2, 8\)"):
        mixer(stream(rng, 2, 8))
    with pytest.raises(ValueError, match=r"memory must be of shape \(B=2, S, 6\), got shape \(1, 3, 6\)"):
        mixer(stream(rng, 2, 3, 8), memory=stream(rng, 1, 3, 6))
    with pytest.raises(ValueError, match=r"the mask must be broadcastable to \(B, H, L_q, L_k\) = \(2, 2, 3, 4\)"):
        mixer(stream(rng, 2, 3, 8), memory=stream(rng, 2, 4, 6), keep=np.ones((3, 3), bool))
