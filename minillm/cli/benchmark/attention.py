"""The family ``attention``: value and gradient of attention alone, by kind and length, beside PyTorch's own.

Ours is what the models run: the batch shared by threads, each with one matrix-library thread. PyTorch's side is
`F.scaled_dot_product_attention` with the arguments its documentation gives for the kind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd import Tensor, grad
from minillm.checks import optional_import
from minillm.cli.benchmark.families import Family
from minillm.fused.attention import scaled_dot_product_attention
from minillm.training.step import BatchThreads

B, H, D_HEAD = 2, 8, 64
LENGTHS = (256, 1024, 4096)
KINDS = {
    "full": "every query sees every key",
    "causal": "a decoder's",
    "gqa": "a decoder's, eight query heads over two key heads",
    "window": "a decoder's, the last 128 keys",
    "padding": "an encoder's, a quarter of the keys padding",
    "bias": "a decoder's with a bias for each head and distance (ALiBi)",
}
WINDOW, GROUPED_HEADS, REAL = 128, 2, 0.75


@dataclass(frozen=True)
class AttentionCase:
    """One kind of attention at one length."""

    kind: str
    length: int

    @property
    def name(self) -> str:
        """As it is called on the command line."""
        return f"{self.kind}-{self.length}"

    @property
    def steps(self) -> int:
        """Timed steps of one turn."""
        return max(1, 2048 // self.length)

    def arrays(self) -> list[np.ndarray]:
        """Queries, keys, values and what arrives at the output."""
        rng, L = np.random.default_rng(0), self.length
        H_kv = GROUPED_HEADS if self.kind == "gqa" else H
        shapes = [(B, heads, L, D_HEAD) for heads in (H, H_kv, H_kv, H)]
        return [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def pattern(self) -> dict[str, Any]:
        """The arguments of our function, without keep and bias."""
        causal = {} if self.kind in ("full", "padding") else {"causal": True}
        return causal | ({"window": WINDOW} if self.kind == "window" else {})

    def keep(self) -> np.ndarray | None:
        """The mask of padding (1, 1, 1, L)."""
        return (np.arange(self.length) < REAL * self.length)[None, None, None] if self.kind == "padding" else None

    def bias(self) -> np.ndarray | None:
        """Linear biases (H, L, L)."""
        if self.kind != "bias":
            return None
        slopes = 2.0 ** -np.arange(1, H + 1)
        distance = np.arange(self.length) - np.arange(self.length)[:, None]  # key - query
        return (slopes[:, None, None] * distance).astype(np.float32)


@contextmanager
def ours(case: AttentionCase, threads: int) -> Iterator[Callable[[], float]]:
    """Value and gradient by the fused form."""
    q, k, v, g = case.arrays()
    keep, bias, pattern = case.keep(), case.bias(), case.pattern()

    def share(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray) -> float:
        inputs = [Tensor(a, requires_grad=True) for a in (q, k, v)]
        out = scaled_dot_product_attention(*inputs, keep, bias, **pattern)
        return float(grad([out], inputs, [g])[0].data[0, 0, 0, 0])

    with BatchThreads(threads).running() as workers:
        yield lambda: workers.map(share, q, k, v, g)[0]


@contextmanager
def torch_peer(case: AttentionCase, threads: int) -> Iterator[Callable[[], float]]:
    """Value and gradient by `F.scaled_dot_product_attention`."""
    torch = optional_import("torch", "kernels")
    torch.set_num_threads(threads)
    q, k, v, g = (torch.from_numpy(a) for a in case.arrays())
    for x in (q, k, v):
        x.requires_grad_()
    mask, L = None, case.length
    if case.kind == "padding":
        mask = torch.from_numpy(case.keep()).expand(B, 1, L, L)
    elif case.kind == "window":
        distance = torch.arange(L)[:, None] - torch.arange(L)
        mask = (distance >= 0) & (distance < WINDOW)
    elif case.kind == "bias":
        mask = torch.from_numpy(case.bias()).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    options = {"attn_mask": mask, "is_causal": case.kind in ("causal", "gqa"), "enable_gqa": case.kind == "gqa"}

    def step() -> float:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return torch.autograd.grad(out, (q, k, v), g)[0][0, 0, 0, 0].item()

    yield step


CASES = {case.name: case for kind in KINDS for case in (AttentionCase(kind, length) for length in LENGTHS)}
FAMILY = Family("attention", "attention by kind and length", CASES, {"ours": ours, "torch": torch_peer})
