"""The comparison can fail: losses with one honest mistake each, and the property that must see it."""

import pytest
import torch

from kernels import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

HEAD = """
import math, torch, triton
import triton.language as tl

def right_ce(logits, targets, ignore_index, reduction, divisor, label_smoothing, z_loss, keep=None):
    keep = targets != ignore_index if keep is None else keep
    z = torch.where(keep[..., None], logits, torch.zeros_like(logits)).float()
    ids = torch.where(keep, targets, torch.zeros_like(targets))
    log_p, lse = torch.log_softmax(z, -1), torch.logsumexp(z, -1)
    terms = -(1 - label_smoothing) * log_p.gather(-1, ids[..., None])[..., 0] + z_loss * lse**2
    if label_smoothing:
        terms = terms - label_smoothing * log_p.mean(-1)
    total = torch.where(keep, terms, torch.zeros_like(terms)).sum()
    return total if reduction == "sum" else total / (keep.sum().clamp(min=1) if divisor is None else divisor)

def statistics(z, targets, keep):
    z = torch.where(keep[..., None], z.float(), torch.zeros_like(z.float()))
    ids = torch.where(keep, targets, torch.zeros_like(targets))
    log_p, lse = torch.log_softmax(z, -1), torch.logsumexp(z, -1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, log_p, torch.zeros_like(p)), torch.zeros_like(p)).sum(-1)
    zero = torch.zeros_like(lse)
    return [torch.where(keep, x, zero) for x in (log_p.gather(-1, ids[..., None])[..., 0], lse, entropy)]

K3 = lambda logp, ref: torch.exp(ref - logp) - 1 - (ref - logp)

def right_policy(logits, targets, old, advantages, mask, ref, weights, clip_low, clip_high, dual_clip, level, beta, kl,
                 kl_ratio, entropy_coef, reduction, length, divisor, temperature, ignore_index,
                 k3=K3, ratio_of=torch.exp, clip=None, lengths=None):
    keep = mask & (targets != ignore_index)
    logp, lse, entropy = statistics(logits / temperature, targets, keep)
    zero = torch.zeros_like(logp)
    old, a = torch.where(keep, old, zero), advantages[:, None] if advantages.ndim == 1 else advantages
    a = torch.where(keep, a.expand_as(logp), zero)
    tw = torch.ones_like(logp) if weights is None else torch.where(keep, weights, zero)
    n = keep.sum(-1, keepdim=True).clamp(min=1)
    gap = logp - old
    if level != "token":
        gap = gap.sum(-1, keepdim=True) / (n if level == "sequence-mean" else 1)
        gap = gap.expand_as(logp)
    ratio = ratio_of(gap)
    low, high = 1 - clip_low, 1 + (clip_low if clip_high is None else clip_high)
    surrogate = torch.minimum(ratio * a, ratio.clamp(low, high) * a) if clip is None else clip(ratio, a, low, high)
    flag = torch.where((a > 0) & (ratio > high), 1, torch.where((a < 0) & (ratio < low), -1, 0))
    if dual_clip is not None:
        surrogate = torch.where(a < 0, torch.maximum(surrogate, dual_clip * a), surrogate)
        flag = torch.where((a < 0) & (ratio > dual_clip), 2, flag)
    value = -tw * surrogate - entropy_coef * entropy
    ks = [zero, zero, zero]
    if ref is not None:
        ref = torch.where(keep, ref, zero)
        ks = [torch.where(keep, k, zero) for k in (logp - ref, (logp - ref) ** 2 / 2, k3(logp, ref))]
        chosen = {"k1": 0, "k2": 1, "k3": 2}[kl]
        value = value + beta * ks[chosen] * (torch.exp(logp - old) if kl_ratio else 1.0)
    value = torch.where(keep, value, zero)
    own = {"token-mean": float(keep.sum().clamp(min=1)), "sum": 1.0, "constant": len(mask) * (length or 0)}
    value = value / n if reduction == "seq-mean" else value
    loss = value.sum() / (divisor if divisor is not None else own.get(reduction, len(mask)) or 1)
    return loss, logp, lse, entropy, torch.where(keep, ratio, zero), torch.where(keep, flag, 0).to(torch.int8), *ks
"""

CE = "def cross_entropy(logits, targets, ignore_index, reduction, divisor, label_smoothing, z_loss):\n"
PO = (
    "def policy_loss(logits, targets, old, advantages, mask, ref, weights, clip_low, clip_high, dual_clip, level, beta,"
    " kl, kl_ratio, entropy_coef, reduction, length, divisor, temperature, ignore_index):\n    rest = (clip_low, clip_high,"
    " dual_clip, level, beta, kl, kl_ratio, entropy_coef, reduction, length, divisor, temperature, ignore_index)\n"
)

ONLINE = """
@triton.jit
def online(X, LSE, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = -float("inf")
    s = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + cols, {load}).to(tl.float32)
        higher = tl.maximum(m, tl.max(x, axis=0))
        s = {update}
        m = higher
    tl.store(LSE + row, m + tl.log(s))

def token_logprobs(logits, targets, temperature, ignore_index):
    keep = targets != ignore_index
    z = (torch.where(keep[..., None], logits.detach().float(), 0.0) / temperature).contiguous()
    logp, _, entropy = statistics(z, targets, keep)
    lse = torch.zeros(z.shape[:-1])
    online[(z.shape[:-1].numel(),)](z, lse, z.shape[-1], z.shape[-1], BLOCK=16)
    return logp, torch.where(keep, lse, torch.zeros_like(lse)), entropy
"""
MASKED = 'mask=cols < V, other=-float("inf")'
RESCALED = "s * tl.exp(m - higher) + tl.sum(tl.exp(x - higher), axis=0)"

BUGS = {
    "mask of the last block forgotten": (
        ONLINE.format(load="mask=cols < V, other=0.0", update=RESCALED), {"reference", "impossible-appended"},
    ),
    "sum not rescaled when the maximum rises": (
        ONLINE.format(load=MASKED, update="s + tl.sum(tl.exp(x - higher), axis=0)"), {"reference"},
    ),
    "ignored targets count in the mean": (CE + """
    total = right_ce(logits, targets, ignore_index, "sum", None, label_smoothing, z_loss)
    return total if reduction == "sum" else total / (max(targets.numel(), 1) if divisor is None else divisor)
""", {"reference"}),
    "the next id": (CE + """
    return right_ce(logits, (targets + 1) % logits.shape[-1], ignore_index, reduction, divisor, label_smoothing, z_loss,
                    targets != ignore_index)
""", {"reference", "gradient-sums-to-zero"}),
    "no shift by the maximum": ("""
def softmax(logits):
    e = logits.float().exp()
    return (e / e.sum(-1, keepdim=True)).to(logits.dtype)
""", {"reference"}),
    "an ignored row's NaN times 0": (CE + """
    keep = (targets != ignore_index)
    z, ids = logits.float(), torch.where(keep, targets, torch.zeros_like(targets))
    nll = -torch.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0] * keep
    if label_smoothing or z_loss:
        return right_ce(logits, targets, ignore_index, reduction, divisor, label_smoothing, z_loss)
    return nll.sum() / (1 if reduction == "sum" else keep.sum().clamp(min=1) if divisor is None else divisor)
""", {"soiled-rows"}),
    "0 / 0 when nothing counts": (CE + """
    keep = (targets != ignore_index)
    total = right_ce(logits, targets, ignore_index, "sum", None, label_smoothing, z_loss)
    return total if reduction == "sum" else total / (keep.sum() if divisor is None else divisor)
""", {"nothing-counts"}),
    "clipped instead of the smaller of the two": (PO + """
    clip = lambda ratio, a, low, high: ratio.clamp(low, high) * a
    return right_policy(logits, targets, old, advantages, mask, ref, weights, *rest, clip=clip)
""", {"reference"}),
    "k3 upside down": (PO + """
    k3 = lambda logp, ref: torch.exp(logp - ref) - 1 - (logp - ref)
    return right_policy(logits, targets, old, advantages, mask, ref, weights, *rest, k3=k3)
""", {"reference", "estimators"}),
    "a gradient into the old policy's ratio only": (PO + """
    ratio = lambda gap: torch.exp(gap.detach())
    return right_policy(logits, targets, old, advantages, mask, ref, weights, *rest, ratio_of=ratio)
""", {"gradient", "clipped-are-still"}),
    "temperature forgotten in the backward": ("""
def token_logprobs(logits, targets, temperature, ignore_index):
    keep = targets != ignore_index
    z = logits.float()
    tempered = z + (z / temperature - z).detach()
    return tuple(statistics(tempered, targets, keep))
""", {"gradient", "temperature"}),
}  # fmt: skip


LONG = ("clipped instead of the smaller of the two", "k3 upside down")  # shrinking a policy loss takes seconds


@pytest.mark.parametrize("bug", [pytest.param(b, marks=pytest.mark.slow if b in LONG else ()) for b in BUGS])
def test_a_planted_bug_is_caught_and_shown_small(bug, tmp_path):
    source, expected = BUGS[bug]
    path = tmp_path / "reader.py"
    path.write_text(HEAD + source)
    name = source.split("\ndef " if not source.startswith("def ") else "def ")[-1].split("(")[0]
    subject = compare.reader_subject("token_loss", f"{path}:{name}")
    outcomes = compare.compare(
        "token_loss", subject, examples=40, number=0, properties=sorted(expected), dtypes=["float32"]
    )
    failed = {outcome.property for outcome in outcomes if not outcome.passed}
    assert failed == expected, compare.report(outcomes)
    smallest = next(outcome for outcome in outcomes if not outcome.passed)
    assert smallest.problem is not None
    assert next(iter(smallest.problem.inputs.values())).size <= 128, smallest.problem


@pytest.mark.parametrize(("name", "source"), [
    ("cross_entropy", CE + "    return right_ce(logits, targets, ignore_index, reduction, divisor, label_smoothing, z_loss)\n"),
    ("policy_loss", PO + "    return right_policy(logits, targets, old, advantages, mask, ref, weights, *rest)\n"),
])  # fmt: skip
@pytest.mark.slow
def test_a_right_implementation_passes_everything(name, source, tmp_path):
    path = tmp_path / "reader.py"
    path.write_text(HEAD + source)
    subject = compare.reader_subject("token_loss", f"{path}:{name}")
    outcomes = compare.compare("token_loss", subject, examples=6, number=1, dtypes=["float32"])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
    assert "gradient" in {outcome.property for outcome in outcomes}
