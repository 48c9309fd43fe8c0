r"""What attention costs: the table of the notes with its constants, and a count of what a graph really did.

A multiplication and an addition are two operations. The softmax is counted as four for each score (maximum, subtract,
exponential and sum go over it, and the division of the output is left out); memory is counted in numbers, not bytes.
"""

from collections import Counter
from typing import Any, NamedTuple

from minillm.autograd import Tensor
from minillm.checks import require, require_one_of, require_positive

SOFTMAX = 4  # operations a score


class BlockCost(NamedTuple):
    """Operations of one attention block, step by step."""

    projections: int
    scores: int
    softmax: int
    mixing: int
    output: int

    @property
    def total(self) -> int:
        """All steps."""
        return sum(self)


def _check(name: str, sizes: dict[str, int]) -> None:
    for what, value in sizes.items():
        require_positive(value, name, what, integer=True)


def attention_cost(
    B: int, L_q: int, d_model: int, H: int, H_kv: int | None = None, L_k: int | None = None, d_head: int | None = None
) -> BlockCost:
    r"""Operations of a block of attention, all heads together.

    Equation: `attention-complexity` projections $O(BLd^2)$; scores $O(BHL^2d_{\rm head})$; softmax $O(BHL^2)$; mixing; output
    Equation: `mha-cost-invariance` scores and mixing $4BL^2d_{\rm model}$ for any $H$; softmax grows with $H$
    Shapes: sizes -> five counts. Keys and values are projected from the L_k positions attended to.
    Raises: ValueError unless sizes are positive integers, H_kv divides H, and H divides d_model if d_head is not given.
    Source: notes §4.1, §4.10 (table 1).
    Differs: the counts are of all heads; one head costs $2BL^2d_{\rm head}$ for its scores (erratum 26). Equal cost for
        any number of heads holds for the products only (erratum 21).
    """
    H_kv, L_k = H if H_kv is None else H_kv, L_q if L_k is None else L_k
    _check("attention_cost", {"B": B, "L_q": L_q, "L_k": L_k, "d_model": d_model, "H": H, "H_kv": H_kv})
    require(H % H_kv == 0, "attention_cost", "H_kv", f"a divisor of H = {H}", H_kv)
    if d_head is None:
        require(d_model % H == 0, "attention_cost", "H", f"a divisor of d_model = {d_model}", H)
        d_head = d_model // H
    pairs = B * H * L_q * L_k
    return BlockCost(
        projections=2 * B * d_model * d_head * (L_q * H + 2 * L_k * H_kv),
        scores=2 * pairs * d_head,
        softmax=SOFTMAX * pairs,
        mixing=2 * pairs * d_head,
        output=2 * B * L_q * H * d_head * d_model,
    )


SCENARIOS = ("train", "cross", "streaming", "decode")


class ScenarioCost(NamedTuple):
    """Leading terms of one layer: operations, and numbers held in memory."""

    operations: int
    memory: int


def scenario_cost(
    scenario: str, B: int, H: int, d_head: int, L: int, L_k: int | None = None, H_kv: int | None = None
) -> ScenarioCost:
    r"""Leading terms of time and memory in the four situations of the notes' second table.

    Equation: `attention-scenarios` train $BHL^2d_{\rm head}$, $BHL^2$; cross $BHL_qL_kd_{\rm head}$, $BHL_qL_k$; streaming the same time, memory $BLd$; decode step t: $BHtd_{\rm head}$
    Shapes: sizes -> operations (scores and mixing, two per multiply-add) and numbers in memory (scores; outputs when
        streaming; the cache when decoding, where L is the number t of positions held)
    Raises: ValueError for an unknown scenario or sizes that are not positive integers; for cross without L_k.
    Source: notes §4.10 (table 2).
    Differs: one L too many dropped in the cross row; the batch in the decoding row, and its cache
        $2H_{kv}d_{\rm head}$ a token (erratum 27). The projections, $d_{\rm model}^2$, outweigh a decoding step while
        $t<d_{\rm model}$; `attention_cost` has them.
    """
    require_one_of(scenario, SCENARIOS, "scenario_cost", "scenario")
    require(scenario != "cross" or L_k is not None, "scenario_cost", "L_k", "given for cross-attention", L_k)
    H_kv = H if H_kv is None else H_kv
    L_q, L_k = (1, L) if scenario == "decode" else (L, L if L_k is None else L_k)
    _check("scenario_cost", {"B": B, "H": H, "H_kv": H_kv, "d_head": d_head, "L": L, "L_k": L_k})
    operations, scores = 4 * B * H * L_q * L_k * d_head, B * H * L_q * L_k
    memory = {
        "train": scores,
        "cross": scores,
        "streaming": B * L_q * H * d_head,
        "decode": 2 * B * L_k * H_kv * d_head,
    }
    return ScenarioCost(operations, memory[scenario])


class GraphCost(NamedTuple):
    """What the graph behind a tensor computed and holds, by the name of the operation."""

    products: int  # operations of matrix products
    exponentials: int
    largest: int  # the most numbers in one recorded result
    calls: Counter


def graph_cost(*outputs: Tensor) -> GraphCost:
    r"""Count the operations in the graph behind some tensors, from the shapes recorded on the tape.

    Equation: `attention-complexity` the leading terms, counted instead of derived
    Shapes: tensors with a graph of primitives -> counts; fused forms are one call and hide what they do
    Raises: ValueError if no operation was recorded.
    Source: notes §4.10.
    """
    nodes: list[Any] = [t.node for t in outputs if t.node is not None]
    require(
        len(nodes) > 0, "graph_cost", "outputs", "tensors that operations were recorded for", f"{len(outputs)} without"
    )
    seen: set[int] = set()
    calls: Counter = Counter()
    products, exponentials, largest = 0, 0, 0
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        name, out = node.operation.name, node.output
        calls[name] += 1
        size = 0 if out is None else out.size
        largest = max(largest, size)
        if name == "matmul":
            products += 2 * size * node.inputs[0].shape[-1]
        exponentials += size if name == "exp" else 0
        nodes.extend(getattr(given, "node", None) for given in node.inputs)
    return GraphCost(products, exponentials, largest, calls)


def linear_attention_cost(B: int, H: int, L: int, d_phi: int, d_v: int, chunk: int | None = None) -> int:
    r"""Operations of the products of linear attention; linear in L.

    Equation: `linear-attention` $\mathbf S_V$ once and read L times: $4BHLd_\phi(d_v+1)$
    Equation: `linear-attention-causal` in chunks of C also $2BHLC(d_\phi+d_v)$ inside them
    Shapes: sizes -> count, of all keys at once without ``chunk``
    Raises: ValueError unless sizes are positive integers.
    Source: notes §4.10.
    """
    _check("linear_attention_cost", {"B": B, "H": H, "L": L, "d_phi": d_phi, "d_v": d_v})
    state = 4 * B * H * L * d_phi * (d_v + 1)
    if chunk is None:
        return state
    require_positive(chunk, "linear_attention_cost", "chunk", integer=True)
    full, rest = divmod(L, chunk)
    return state + 2 * B * H * (full * chunk**2 + rest**2) * (d_phi + d_v)
