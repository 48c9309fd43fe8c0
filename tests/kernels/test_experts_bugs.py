"""The comparison can fail: routers, packings and layers with one honest mistake each, and the property that sees it."""

import pytest
import torch

from kernels import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

HEAD = """
import torch
import torch.nn.functional as F

def right_route(logits, bias, k, scoring, renormalise, descending=True, weights_with_bias=False, over_all=False):
    r = logits.float()
    N, E = r.shape
    p = s = torch.softmax(r, -1)
    if scoring == "sigmoid":
        s = torch.sigmoid(r)
        p = s / s.sum(-1, keepdim=True)
    score = r if bias is None else s + bias
    experts = torch.argsort(score.detach() if descending else score.detach().flip(-1), dim=-1, descending=True, stable=True)[:, :k]
    experts = experts if descending else E - 1 - experts
    weights = s + bias if weights_with_bias and bias is not None else s
    gates = weights.gather(1, experts)
    if renormalise:
        gates = gates / (s.sum(-1, keepdim=True) if over_all else gates.sum(-1, keepdim=True))
    loads = torch.bincount(experts.reshape(-1), minlength=E)
    aux = E * (loads / max(N * k, 1) * p.sum(0)).sum() / max(N, 1)
    z = torch.logsumexp(r, -1).square().sum() / max(N, 1)
    return gates, experts.int(), loads.int(), aux, z

def right_pack(experts, n_experts, capacity, shift=0, stable=True, limit=0):
    flat = experts.reshape(-1).long()
    known = (flat >= 0) & (flat < n_experts)
    hot = F.one_hot(torch.where(known, flat, n_experts), n_experts + 1)[:, :n_experts]
    rank = ((hot.cumsum(0) - 1) * hot).sum(1)
    loads = hot.sum(0)
    if not stable:
        rank = torch.where(known, loads[flat.clamp(0, n_experts - 1)] - 1 - rank, rank)
    if capacity is not None:
        loads = loads.clamp(max=capacity + limit)
    offsets = F.pad(loads.cumsum(0), (1, 0))
    at = flat.clamp(0, n_experts - 1)
    served = known & (rank < loads[at])
    places = torch.where(served, offsets[at + shift] + rank, -1)
    order = torch.full((flat.numel() + n_experts,), -1)
    order[places[served].clamp(max=len(order) - 1)] = torch.nonzero(served)[:, 0]
    return order[: flat.numel()].int(), places.reshape(experts.shape).int(), offsets.int()

def right_layer(x, gates, w_in, w_down, experts, capacity, swapped=False, plain=False, stop=False, rows=None):
    y = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(len(w_in)):
        token, slot = torch.nonzero(experts == e, as_tuple=True)
        if capacity is not None:
            token, slot = token[:capacity], slot[:capacity]
        token, slot = token[:rows], slot[:rows]
        h = x[token].float() @ w_in[e].float().T
        value, gate = h.chunk(2, -1)
        value, gate = (gate, value) if swapped else (value, gate)
        out = (value * F.silu(gate)).to(x.dtype).float() @ w_down[e].float().T
        g = gates[token, slot, None]
        y = y.index_add(0, token, out * (1.0 if plain else g.detach() if stop else g))
    return y.to(x.dtype)
"""

ROUTE = "\ndef route(logits, bias, k, scoring, renormalise):\n    "
PACK = "\ndef pack(experts, n_experts, capacity):\n    "
LAYER = "\ndef mixture_of_experts(x, gates, w_in, w_down, experts, capacity):\n    "
CALL_ROUTE = "return right_route(logits, bias, k, scoring, renormalise, {})\n"
CALL_PACK = "return right_pack(experts, n_experts, capacity, {})\n"
CALL_LAYER = "return right_layer(x, gates, w_in, w_down, experts, capacity, {})\n"

BUGS = {
    "ties go to the higher number": (ROUTE + CALL_ROUTE.format("descending=False"), {"reference", "k-largest"}),
    "the bias weighs": (ROUTE + CALL_ROUTE.format("weights_with_bias=True"), {"reference", "bias-chooses-only"}),
    "renormalised over all experts": (ROUTE + CALL_ROUTE.format("over_all=True"), {"reference", "gates-sum"}),
    "gates without a gradient": (
        ROUTE + "found = right_route(logits, bias, k, scoring, renormalise)\n    return found[0].detach() + 0 * found[3], *found[1:]\n",
        {"gradient"},
    ),
    "a gradient through nothing but the gates": (
        ROUTE + "found = right_route(logits, bias, k, scoring, renormalise)\n    return *found[:3], found[3].detach() + 0 * found[4], found[4]\n",
        {"gradient"},
    ),
    "offsets one expert too far": (PACK + CALL_PACK.format("shift=1"), {"reference", "conservation"}),
    "backwards within an expert": (PACK + CALL_PACK.format("stable=False"), {"reference", "stable"}),
    "one more than the capacity": (PACK + CALL_PACK.format("limit=1"), {"reference", "conservation"}),
    "value and gate exchanged": (LAYER + CALL_LAYER.format("swapped=True"), {"reference", "gradient"}),
    "gates forgotten": (LAYER + CALL_LAYER.format("plain=True"), {"reference", "linear-in-gates"}),
    "gates' gradient lost": (LAYER + CALL_LAYER.format("stop=True"), {"gradient", "gate-gradient"}),
    "rows behind the first tile of an expert lost": (LAYER + CALL_LAYER.format("rows=16"), {"reference"}),
    "capacity ignored": (
        LAYER + "return right_layer(x, gates, w_in, w_down, experts, None)\n", {"reference", "capacity"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_shown_small(bug, tmp_path):
    source, expected = BUGS[bug]
    path = tmp_path / "reader.py"
    path.write_text(HEAD + source)
    name = source.split("\ndef ")[-1].split("(")[0]
    subject = compare.reader_subject("experts", f"{path}:{name}")
    outcomes = compare.compare(
        "experts", subject, examples=30, number=0, properties=sorted(expected), dtypes=("float32",)
    )
    failed = {outcome.property for outcome in outcomes if not outcome.passed}
    assert failed == expected, compare.report(outcomes)
    smallest = next(outcome for outcome in outcomes if not outcome.passed)
    assert smallest.problem is not None
    assert smallest.problem.function in compare.report(outcomes)


@pytest.mark.parametrize("name", ["route", "pack", "mixture_of_experts"])
def test_a_right_implementation_passes_everything(name, tmp_path):
    head, call = {"route": (ROUTE, CALL_ROUTE), "pack": (PACK, CALL_PACK), "mixture_of_experts": (LAYER, CALL_LAYER)}[
        name
    ]
    path = tmp_path / "reader.py"
    path.write_text(HEAD + head + call.format(""))
    subject = compare.reader_subject("experts", f"{path}:{name}")
    outcomes = compare.compare("experts", subject, examples=6, number=1)
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
