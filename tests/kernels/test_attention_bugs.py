"""The comparison can fail: attentions with one honest mistake each, and the property that must see it."""

import pytest
import torch

from kernels import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

TILES = '''
import torch

def keys_seen(i, L_q, L_k, key_lengths, prefix, causal, window, align):
    """(B, 1, rows, L_k)"""
    j = torch.arange(L_k)
    place = (i + (L_k - L_q if align == "bottom-right" else 0))[:, None]
    keep = (j <= place) if causal else torch.ones(len(i), L_k, dtype=torch.bool)
    if window is not None:
        keep = keep & (j > place - window)
    keep = keep[None, None]
    if prefix is not None:
        keep = keep | (j < prefix[:, None, None, None])
    if key_lengths is not None:
        keep = keep & (j < key_lengths[:, None, None, None])
    return keep

def attention(q, k, v, key_lengths, prefix, causal, window, align, scale, softcap, block=16):
    """Flash attention written with torch, a block of keys at a time; torch differentiates it."""
    group = q.shape[1] // k.shape[1]
    Q, K, V = q.float(), k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    L_q, L_k = Q.shape[2], K.shape[2]
    keep = keys_seen(torch.arange(L_q), L_q, L_k, key_lengths, prefix, causal, window, align)
    keep = keep.expand(len(Q), Q.shape[1], L_q, L_k)
    top = torch.full(Q.shape[:3], float("-inf"))
    total = torch.zeros(Q.shape[:3])
    out = torch.zeros(*Q.shape[:3], V.shape[-1])
    for start in range(0, L_k, block):
        cols = slice(start, start + block)
        s = Q @ K[:, :, cols].transpose(-1, -2) * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        s = s.masked_fill(~keep[..., cols], float("-inf"))
        new = torch.maximum(top, s.amax(-1)).detach()
        shift = torch.where(new == float("-inf"), 0.0, new)
        p = torch.exp(s - shift[..., None])
        old = torch.exp(top - shift)
        total = total * old + p.sum(-1)
        out = out * old[..., None] + p @ V[:, :, cols]
        top = new
    some = total > 0
    return (out / torch.where(some, total, 1.0)[..., None]).to(q.dtype)
'''

BUGS = {  # what is written instead of what, and the properties that must see it
    "missing rescale of the output": ("out = out * old[..., None] + p @ V", "out = out + p @ V", {"reference"}),
    "missing rescale of the sum": ("total = total * old + p.sum(-1)", "total = total + p.sum(-1)", {"reference"}),
    "mask dropped in the last block": ("s.masked_fill(~keep[..., cols]", "s.masked_fill(~keep[..., cols] & (start + block < L_k)", {"reference", "hidden"}),
    "causal mask off by one": ("(j <= place)", "(j <= place + 1)", {"reference", "hidden"}),
    "window one key too long": ("(j > place - window)", "(j >= place - window)", {"reference"}),
    "the wrong corner": ('align == "bottom-right"', 'align == "top-left"', {"reference"}),
    "heads grouped the other way": ("repeat_interleave(group, 1)", "repeat(1, group, 1, 1)", {"reference", "grouped"}),
    "scale of the model's width": ("q.shape[-1] ** -0.5", "(q.shape[-1] * q.shape[1]) ** -0.5", {"reference"}),
    "soft cap not scaled back": ("softcap * torch.tanh(s / softcap)", "torch.tanh(s / softcap)", {"reference"}),
    "padding only from the next key on": ("(j < key_lengths", "(j <= key_lengths", {"reference", "padding"}),
    "a hidden row becomes NaN": ("torch.where(some, total, 1.0)", "total", {"reference", "nothing-seen"}),
    "no gradient through the scores' last block": ("p @ V[:, :, cols]\n", "(p.detach() if start + block >= L_k and start else p) @ V[:, :, cols]\n", {"gradient"}),
    "last keys left out": ("range(0, L_k, block)", "range(0, max(L_k - L_k % block, block), block)", {"reference"}),
}  # fmt: skip


FEW = (
    "missing rescale of the output",
    "mask dropped in the last block",
    "causal mask off by one",
    "last keys left out",
)
FAST = [pytest.param(bug, marks=() if bug in FEW else pytest.mark.slow) for bug in BUGS]


@pytest.mark.parametrize("bug", FAST)
def test_a_planted_bug_is_caught_and_shown_small(bug, tmp_path):
    right, wrong, expected = BUGS[bug]
    assert right in TILES
    path = tmp_path / "reader.py"
    path.write_text(TILES.replace(right, wrong))
    subject = compare.reader_subject("attention", f"{path}:attention")
    outcomes = compare.compare(
        "attention", subject, examples=60, number=0, properties=sorted(expected), dtypes=["float32"]
    )
    failed = {outcome.property for outcome in outcomes if not outcome.passed}
    assert failed == expected, compare.report(outcomes)
    smallest = next(outcome for outcome in outcomes if not outcome.passed)
    assert smallest.problem is not None
    assert smallest.problem.inputs["k"].size <= 1000, smallest.problem  # shrinking found a case to look at


@pytest.mark.slow
def test_a_right_implementation_passes_everything(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text(TILES.replace(", block=16", "").replace("block", "16"))
    subject = compare.reader_subject("attention", f"{path}:attention")
    outcomes = compare.compare("attention", subject, examples=8, number=1)
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
    assert "gradient" in {outcome.property for outcome in outcomes}
