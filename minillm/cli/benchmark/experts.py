"""The family ``experts``: value and gradient of one layer of experts, beside PyTorch's and a dense layer of equal FLOPs.

The dense layer is as wide as the experts that a token visits taken together, so both do the same products for every
token. What the layer of experts adds is the router, two sorts, and E over k times as many weights to read and to make
gradients for; ``of_dense`` is what that costs. PyTorch's side is the loop over experts with `index_add_` that eager
implementations of Mixtral run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd import Tensor, grad
from minillm.checks import optional_import
from minillm.cli.benchmark.families import Family
from minillm.nn.experts import MixtureOfExperts
from minillm.nn.layers import SwiGLU
from minillm.training.step import BatchThreads


@dataclass(frozen=True)
class ExpertsCase:
    """One layer, k of E experts for each of N tokens."""

    name: str
    N: int
    d_model: int
    d_ff: int
    E: int
    k: int
    steps: int

    def arrays(self) -> list[np.ndarray]:
        """Tokens and what arrives at the output, (N, d_model) each."""
        rng = np.random.default_rng(0)
        return [rng.normal(size=(self.N, self.d_model)).astype(np.float32) for _ in range(2)]


CASES = {
    case.name: case
    for case in (
        ExpertsCase("small", 2048, 128, 172, 8, 2, steps=6),
        ExpertsCase("large", 2048, 512, 688, 8, 2, steps=1),
        ExpertsCase("fine", 2048, 256, 86, 32, 8, steps=2),
    )
}


@contextmanager
def _step(layer: Any, case: ExpertsCase, threads: int) -> Iterator[Callable[[], float]]:
    x, g = case.arrays()
    parameters = layer.parameters()

    def share(x: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
        given = Tensor(x, requires_grad=True)
        return [found.data for found in grad([layer(given)], [given, *parameters], [g])]

    with BatchThreads(threads).running() as workers:

        def step() -> float:
            first, *others = workers.map(share, x, g)
            for other in others:  # the threads' gradients of the weights
                for total, part in zip(first[1:], other[1:], strict=True):
                    total += part
            return float(first[1].flat[0])

        yield step


@contextmanager
def ours(case: ExpertsCase, threads: int) -> Iterator[Callable[[], float]]:
    """The fused layer, the tokens shared by threads."""
    layer = MixtureOfExperts(case.d_model, case.d_ff, case.E, case.k, np.random.default_rng(1))
    with _step(layer, case, threads) as step:
        yield step


@contextmanager
def dense(case: ExpertsCase, threads: int) -> Iterator[Callable[[], float]]:
    """The gated layer that does as many products for a token."""
    with _step(SwiGLU(case.d_model, case.k * case.d_ff, np.random.default_rng(1)), case, threads) as step:
        yield step


@contextmanager
def torch_peer(case: ExpertsCase, threads: int) -> Iterator[Callable[[], float]]:
    """The loop over experts in eager PyTorch."""
    torch = optional_import("torch", "kernels")
    torch.set_num_threads(threads)
    layer = MixtureOfExperts(case.d_model, case.d_ff, case.E, case.k, np.random.default_rng(1))
    weights = [torch.from_numpy(w.data.copy()).requires_grad_() for w in (layer.w_router, layer.w_in, layer.w_down)]
    x, g = (torch.from_numpy(a) for a in case.arrays())
    x.requires_grad_()

    def forward() -> Any:
        router, w_in, w_down = weights
        p = torch.nn.functional.linear(x, router).softmax(-1)
        gates, chosen = p.topk(case.k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(case.E):
            tokens, places = torch.where(chosen == e)
            value, gate = torch.nn.functional.linear(x[tokens], w_in[e]).chunk(2, dim=-1)
            y = torch.nn.functional.linear(value * torch.nn.functional.silu(gate), w_down[e])
            out = out.index_add(0, tokens, y * gates[tokens, places, None])
        return out

    def step() -> float:
        return torch.autograd.grad(forward(), (x, *weights), g)[1][0, 0].item()

    yield step


def columns(case: ExpertsCase, median: dict[str, float]) -> dict[str, Any]:
    """How the layer stands beside the dense one."""
    return {"dense_s": median["dense"], "of_dense": median["ours"] / median["dense"]}


FAMILY = Family(
    "experts",
    "a layer of experts beside a dense one of equal FLOPs",
    CASES,
    {"ours": ours, "torch": torch_peer, "dense": dense},
    columns=columns,
)
