"""The benchmark's layer of experts: PyTorch's side computes the same, and the dense layer does as many products."""

import pytest

from minillm.cli.benchmark.experts import CASES, FAMILY, ExpertsCase, columns, dense, ours, torch_peer
from minillm.functional.load_figures import Arrangement, moe_parameters

TINY = ExpertsCase("tiny", 64, 16, 12, 4, 2, steps=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_both_sides_return_the_same_gradient(threads):
    pytest.importorskip("torch")
    with ours(TINY, threads) as mine, torch_peer(TINY, threads) as theirs:
        assert mine() == pytest.approx(theirs(), rel=1e-4, abs=1e-6)
        assert mine() == pytest.approx(mine())  # a second step is like the first


def test_the_dense_layer_does_as_many_products_for_a_token():
    with dense(TINY, 1) as step:
        assert isinstance(step(), float)
    for case in CASES.values():
        active = moe_parameters(Arrangement(case.E, case.k, case.d_ff), case.d_model).active - case.E * case.d_model
        assert active == 3 * case.d_model * case.k * case.d_ff
    assert columns(TINY, {"ours": 3.0, "dense": 2.0}) == {"dense_s": 2.0, "of_dense": 1.5}
    assert set(FAMILY.sides) == {"ours", "torch", "dense"}
