"""The tables of the notes against what a graph of the written forms really did; errata 21, 26 and 27."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional.attention import scaled_dot_product_attention
from minillm.functional.attention_cost import (
    SOFTMAX,
    attention_cost,
    graph_cost,
    linear_attention_cost,
    scenario_cost,
)
from minillm.functional.linear_attention import linear_attention, linear_attention_chunked
from minillm.functional.multi_head import multi_head_attention
from minillm.functional.streaming_attention import streaming_attention


def tensor(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(0).normal(size=shape), requires_grad=True)


@pytest.mark.equation("attention-complexity")
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from([(4, 4), (4, 2), (2, 1)]))
def test_the_graph_of_a_block_holds_the_operations_of_the_table(B, L_q, L_k, heads):
    (H, H_kv), d = heads, 8
    d_head = d // H
    weights = tensor(d, d), tensor(H_kv * d_head, d), tensor(H_kv * d_head, d), tensor(d, d)
    z, x = tensor(B, L_q, d), tensor(B, L_k, d)
    counted = graph_cost(multi_head_attention(z, x, *weights, H=H, H_kv=H_kv))
    cost = attention_cost(B, L_q, d, H, H_kv, L_k)
    assert counted.products == cost.projections + cost.scores + cost.mixing + cost.output
    assert SOFTMAX * counted.exponentials == cost.softmax
    assert cost.total == sum(cost)


@pytest.mark.equation("mha-cost-invariance", "attention-complexity")
def test_products_cost_the_same_for_any_number_of_heads_and_the_softmax_does_not():
    """Errata 21 and 26: the counts are of all heads."""
    one, eight = attention_cost(2, 64, 128, 1), attention_cost(2, 64, 128, 8)
    assert one.scores == eight.scores == 2 * 2 * 64**2 * 128 and one.mixing == eight.mixing
    assert eight.softmax == 8 * one.softmax
    assert eight.scores // 8 == 2 * 2 * 64**2 * 16  # one head: O(B L^2 d_head)


@pytest.mark.equation("attention-scenarios")
def test_scenarios_against_the_graph():
    """Erratum 27: no third L in the cross row; the batch belongs into the decoding row."""
    B, H, d, L, L_k = 2, 4, 8, 32, 20
    q, k, v = tensor(B, H, L, d), tensor(B, H, L, d), tensor(B, H, L, d)
    train, dense = scenario_cost("train", B, H, d, L), graph_cost(scaled_dot_product_attention(q, k, v))
    assert (dense.products, dense.largest) == train
    cross = scenario_cost("cross", B, H, d, L, L_k)
    counted = graph_cost(scaled_dot_product_attention(q, k[:, :, :L_k], v[:, :, :L_k]))
    assert (counted.products, counted.largest) == cross
    streaming = graph_cost(streaming_attention(q, k, v, block=8))
    assert streaming.products == scenario_cost("streaming", B, H, d, L).operations == train.operations
    assert streaming.largest == scenario_cost("streaming", B, H, d, L).memory < train.memory
    decode = scenario_cost("decode", B, H, d, L, H_kv=2)
    counted = graph_cost(scaled_dot_product_attention(q[:, :, :1], k[:, :2], v[:, :2]))
    assert counted.products == decode.operations and decode.memory == k[:, :2].size + v[:, :2].size


@pytest.mark.equation("attention-scenarios", "attention-complexity")
@pytest.mark.parametrize("d_model", [256, 1024])
def test_projections_outweigh_a_decoding_step_until_the_cache_is_as_long_as_the_model_is_wide(d_model):
    def attending(t: int) -> int:
        return scenario_cost("decode", 1, 8, d_model // 8, t).operations

    whole = attention_cost(1, 1, d_model, 8, L_k=1)
    assert attending(2 * d_model) == whole.projections + whole.output == 8 * d_model**2
    assert attending(d_model) < whole.projections + whole.output < attending(3 * d_model)


@pytest.mark.equation("linear-attention", "linear-attention-causal")
@pytest.mark.parametrize("chunk", [None, 4, 5])
def test_linear_attention_costs_what_is_said_and_grows_linearly(chunk):
    def counted(L: int) -> int:
        phi_q, phi_k, v = tensor(1, 2, L, 6), tensor(1, 2, L, 6), tensor(1, 2, L, 3)
        if chunk is None:
            return graph_cost(linear_attention(phi_q, phi_k, v)).products + 0
        return graph_cost(*linear_attention_chunked(phi_q, phi_k, v, chunk=chunk)).products

    for L in (20, 40):
        formula = linear_attention_cost(1, 2, L, 6, 3, chunk)
        # keys are summed without a product, which the formula counts as one more column
        assert counted(L) == formula - 2 * 2 * L * 6
    assert counted(80) - counted(40) == 2 * (counted(40) - counted(20))


BAD = {
    "B": (lambda: attention_cost(0, 4, 8, 2), "attention_cost: B must be a positive integer, got 0"),
    "H": (lambda: attention_cost(1, 4, 9, 2), "attention_cost: H must be a divisor of d_model = 9, got 2"),
    "H_kv": (lambda: attention_cost(1, 4, 8, 4, 3), "attention_cost: H_kv must be a divisor of H = 4, got 3"),
    "scenario": (lambda: scenario_cost("nap", 1, 1, 1, 1), "scenario must be one of 'train', 'cross'"),
    "cross": (lambda: scenario_cost("cross", 1, 1, 1, 1), "L_k must be given for cross-attention, got None"),
    "L": (lambda: scenario_cost("train", 1, 1, 1, -2), "scenario_cost: L must be a positive integer"),
    "graph": (lambda: graph_cost(Tensor([1.0])), "outputs must be tensors that operations were recorded for"),
    "d_phi": (lambda: linear_attention_cost(1, 1, 4, 0, 2), "linear_attention_cost: d_phi must be a positive integer"),
    "chunk": (lambda: linear_attention_cost(1, 1, 4, 2, 2, 0), "linear_attention_cost: chunk must be a positive"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
