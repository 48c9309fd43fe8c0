"""The comparison of decoding can fail: implementations with one honest mistake each, and a property that must see it."""

import pytest
import torch

from kernels import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

# What the bugs change is written as {name}, with its right form in RIGHT.
SOURCE = """
import torch

def decode_attention(q, k, v, lengths, scale, window, softcap):
    B, H, L, d = q.shape
    H_kv, capacity = k.shape[1], k.shape[2]
    scale = d ** -0.5 if scale is None else scale
    o = torch.zeros(B, H, L, v.shape[3], dtype=q.dtype)
    lse = torch.full((B, H, L), -torch.inf)
    for b in range(B):
        n = capacity if lengths is None else min(int(lengths[b]), capacity)
        for h in range(H):
            g = {group}
            s = q[b, h].float() @ k[b, g, : {read}].float().T * scale
            if softcap is not None:
                s = {cap}
            j, i = torch.arange(s.shape[1]), torch.arange(L)[:, None] + n - L
            keep = {causal}
            if window is not None:
                keep = keep & {window}
            s = torch.where(keep, s, -torch.inf)
            top = torch.nan_to_num(s.amax(1, keepdim=True), neginf=0.0) if s.shape[1] else torch.zeros(L, 1)
            p = torch.exp(s - top)
            total = p.sum(1, keepdim=True)
            o[b, h] = (p @ v[b, g, : {read}].float() / {total}).to(q.dtype)
            lse[b, h] = {lse}
    return o, lse
"""
RIGHT = {
    "group": "h // (H // H_kv)",
    "read": "n",
    "cap": "softcap * torch.tanh(s / softcap)",
    "causal": "j <= i",
    "window": "(j > i - window)",
    "total": "torch.where(total > 0, total, 1.0)",
    "lse": "(top + total.log())[:, 0]",
}
BUGS = {
    "heads of a group taken in turns": ({"group": "h % H_kv"}, {"reference"}),
    "one key too few": ({"read": "max(n - 1, 0)"}, {"reference"}),
    "garbage is multiplied by 0": ({"read": "capacity"}, {"garbage"}),
    "new tokens see one another": ({"causal": "j < n"}, {"reference", "causality"}),
    "the window is one too long": ({"window": "(j >= i - window)"}, {"reference", "causality"}),
    "the cap is forgotten": ({"cap": "s"}, {"reference"}),
    "a row without keys divides by 0": ({"total": "total"}, {"reference", "empty"}),
    "the log-sum-exp lacks its maximum": ({"lse": "total.log()[:, 0]"}, {"reference", "shifted-keys"}),
}  # fmt: skip
MERGE = """
import torch

def merge_attention(o, lse):
    top = lse.amax(0)
    {safe}
    w = torch.exp(lse - top)
    total = w.sum(0)
    {parts}
    merged = (w.unsqueeze(-1) * parts).sum(0) / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    return merged.to(o.dtype), {lse}
"""
MERGE_RIGHT = {
    "safe": "top = torch.where(top == -torch.inf, 0.0, top)",
    "parts": "parts = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, o.float())",
    "lse": "top + total.log()",
}
MERGE_BUGS = {
    "all parts empty: inf - inf": ({"safe": ""}, {"reference"}),
    "0 times the NaN of an empty part": ({"parts": "parts = o.float()"}, {"merge"}),
    "the log-sum-exp of the largest part": ({"lse": "lse.amax(0)"}, {"reference"}),
}


def failures(source, name, expected, tmp_path, examples=40):
    path = tmp_path / "reader.py"
    path.write_text(source)
    subject = compare.reader_subject("decode", f"{path}:{name}")
    return compare.compare("decode", subject, examples=examples, number=0, properties=sorted(expected))


def filled(source, right, wrong):
    for key, text in {**right, **wrong}.items():
        source = source.replace("{" + key + "}", text)
    return source


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_shown_small(bug, tmp_path):
    wrong, expected = BUGS[bug]
    outcomes = failures(filled(SOURCE, RIGHT, wrong), "decode_attention", expected, tmp_path)
    failed = {outcome.property for outcome in outcomes if not outcome.passed}
    assert failed == expected, compare.report(outcomes)
    smallest = next(outcome for outcome in outcomes if not outcome.passed)
    assert smallest.problem is not None and smallest.problem.inputs["q"].size <= 256, smallest.problem


@pytest.mark.parametrize("bug", MERGE_BUGS)
def test_a_planted_bug_of_the_merge_is_caught(bug, tmp_path):
    wrong, expected = MERGE_BUGS[bug]
    outcomes = failures(filled(MERGE, MERGE_RIGHT, wrong), "merge_attention", expected, tmp_path)
    assert {outcome.property for outcome in outcomes if not outcome.passed} == expected, compare.report(outcomes)


def test_right_implementations_pass_everything(tmp_path):
    everything = {prop.name for prop in compare.registry.load("decode").PROPERTIES}
    for source, right, name in ((SOURCE, RIGHT, "decode_attention"), (MERGE, MERGE_RIGHT, "merge_attention")):
        outcomes = failures(filled(source, right, {}), name, everything, tmp_path, examples=8)
        assert len({outcome.property for outcome in outcomes}) > 5
        assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
