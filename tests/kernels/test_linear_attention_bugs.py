"""The comparison of linear attention can fail: implementations with one honest mistake each."""

import pytest
import torch

from kernels import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

SOURCE = """
import torch

def linear_attention(phi_q, phi_k, v, state, normaliser, eps):
    C, L = 16, phi_q.shape[2]
    S, z, found = state.float(), normaliser.float(), []
    for start in range(0, {length}, C):
        q, k, x = (t[:, :, start : start + C].float() for t in (phi_q, phi_k, v))
        a = (q @ k.mT).tril({diagonal})
        den = a.sum(-1, keepdim=True) + {before} + {eps}
        found.append((a @ x + q @ {state}) / den)
        S, z = S + k.mT @ x, {normaliser}
    o = torch.cat(found, 2) if found else v.float()
    return o.to(v.dtype), S, z
"""
RIGHT = {
    "length": "L", "diagonal": "0", "before": "q @ z.unsqueeze(-1)", "eps": "eps", "state": "S",
    "normaliser": "z + k.sum(2)",
}  # fmt: skip
BUGS = {
    "a token does not see itself": ({"diagonal": "-1"}, {"reference", "forms"}),
    "the stabiliser is forgotten": ({"eps": "0.0"}, {"reference"}),
    "the denominator forgets earlier chunks": ({"before": "q @ normaliser.unsqueeze(-1)"}, {"reference"}),
    "the numerator forgets earlier chunks": ({"state": "state.float()"}, {"reference"}),
    "the normaliser counts tokens": ({"normaliser": "z + k.shape[2]"}, {"reference", "state-passes"}),
    "no gradient through the state": ({"state": "S.detach()"}, {"gradient"}),
    "no gradient through the denominator": ({"before": "(q @ z.unsqueeze(-1)).detach()"}, {"gradient"}),
    "values of float16 sums": ({"normaliser": "(z + k.sum(2)).half().float()"}, {"reference"}),
}


def filled(wrong):
    source = SOURCE
    for key, text in {**RIGHT, **wrong}.items():
        source = source.replace("{" + key + "}", text)
    return source


def outcomes_of(source, names, tmp_path, examples=10):
    path = tmp_path / "reader.py"
    path.write_text(source)
    subject = compare.reader_subject("linear_attention", f"{path}:linear_attention")
    return compare.compare("linear_attention", subject, examples=examples, number=0, properties=sorted(names))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_shown_small(bug, tmp_path):
    wrong, expected = BUGS[bug]
    outcomes = outcomes_of(filled(wrong), expected, tmp_path)
    assert {outcome.property for outcome in outcomes if not outcome.passed} == expected, compare.report(outcomes)
    smallest = next(outcome for outcome in outcomes if not outcome.passed)
    assert smallest.problem is not None and smallest.problem.inputs["q"].size <= 600, smallest.problem


def test_a_right_implementation_passes(tmp_path):
    everything = {prop.name for prop in compare.registry.load("linear_attention").PROPERTIES} - {"empty"}
    outcomes = outcomes_of(filled({}), everything, tmp_path, examples=5)
    assert "gradient" in {outcome.property for outcome in outcomes}
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
