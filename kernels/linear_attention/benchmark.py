"""What is timed for linear attention, beside flash-linear-attention where importable and torch's softmax attention.

Softmax attention computes something else; it stands there because it is what linear attention replaces. Nothing here has
been measured in this repository unless `kernels/results` holds a file of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contenders import Case, alike, brief, made, prepared
from kernels.linear_attention import launch, op, traffic
from kernels.linear_attention.config import plan_for
from minillm.checks import MissingPackageError, optional_import

SHAPES = ((8, 16, 4096, 64), (1, 16, 65_536, 64), (8, 16, 4096, 128), (32, 16, 1024, 64))  # B, H, L, width
QUICK_SHAPES = SHAPES[:1]
SMALLEST_SHAPES = ((1, 1, 20, 16),)  # for trying the machinery out


def _fla() -> Callable[..., Tensor] | None:
    """flash-linear-attention's chunked kernel with its normaliser, which wants (B, L, H, d)."""
    try:
        function = optional_import("fla.ops.linear_attn", "dev").chunk_linear_attn
    except (MissingPackageError, AttributeError):
        return None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = (F.elu(t.transpose(1, 2)) + 1 for t in (q, k))
        return function(phi_q, phi_k, v.transpose(1, 2), scale=1.0, normalize=True)[0].transpose(1, 2)

    return call


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return op.elu1_linear_attention(q, k, v)[0]


def _operands(shape: tuple[int, ...], device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(3)]


def _peers(operands: list[Tensor], say: Callable[[str], None]) -> dict[str, Callable]:
    found: dict[str, Callable] = {"softmax sdpa": _softmax}
    fla = _fla()
    if fla is None:
        return found
    try:
        with torch.no_grad():
            same = alike(fla(*operands), _ours(*operands))
    except Exception as error:  # a peer that does not run on this machine is left out, and said to be
        say(f"fla: left out ({brief(error)})")
        return found
    if not same:
        say("fla: left out, its results differ from ours")
        return found
    return {"fla": fla, **found}


def _forward_call(function: Callable, operands: list[Tensor]) -> Any:
    with torch.no_grad():
        return function(*operands)


def _backward_call(function: Callable, operands: list[Tensor]) -> Callable[[], Any]:
    output = function(*operands)
    seed = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, operands, seed, retain_graph=True)


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Forward and backward with the map inside, at every shape."""
    for B, H, L, d in shapes or (QUICK_SHAPES if quick else SHAPES):
        yield from made(_of_shape(B, H, L, d, device, say), f"{B}x{H}x{L}x{d}")


def _of_shape(B: int, H: int, L: int, d: int, device: str, say: Callable[[str], None]) -> Iterator[Case]:
    operands = _operands((B, H, L, d), device)
    functions = {"ours": _ours, **_peers(operands, say)}
    size, kind = operands[0].element_size(), str(operands[0].dtype).removeprefix("torch.")
    chunk = plan_for(B * H, L, d, d, size, launch.multiprocessors(operands[0].device)).chunk
    yield Case(
        f"forward {B}x{H}x{L}x{d}", kind, traffic.forward_bytes(B, H, L, d, d, size),
        {peer: partial(_forward_call, function, operands) for peer, function in functions.items()},
        traffic.forward_flops(B, H, L, d, d, chunk), line=f"forward d={d}", size=L,
    )  # fmt: skip
    makers = {peer: partial(_backward_call, function, operands) for peer, function in functions.items()}
    yield Case(
        f"backward {B}x{H}x{L}x{d}", kind, traffic.backward_bytes(B, H, L, d, d, size),
        prepared(makers, say, f"backward {B}x{H}x{L}x{d}"),
        traffic.backward_flops(B, H, L, d, d, chunk), line=f"backward d={d}", size=L,
    )  # fmt: skip


def sweep_cases(device: str, shapes=SHAPES) -> Iterator[Case]:
    """The forward with half and double the segments, other chunks, warps and chunks under way."""
    for B, H, L, d in shapes:
        q, k, v = (t.detach() for t in _operands((B, H, L, d), device))
        own = plan_for(B * H, L, d, d, q.element_size(), launch.multiprocessors(q.device))
        plans = {}
        for chunk in (32, 64):
            for per_segment in {max(own.per_segment // 2, 1), own.per_segment, 2 * own.per_segment}:
                for warps in (4, 8):
                    for stages in (1, 2):
                        plan = replace(own, chunk=chunk, per_segment=per_segment, warps=warps, stages=stages)
                        plans[str(plan)] = plan
        kind = str(q.dtype).removeprefix("torch.")
        yield Case(
            f"forward {B}x{H}x{L}x{d}", kind, traffic.forward_bytes(B, H, L, d, d, q.element_size()),
            {key: partial(launch.forward, q, k, v, None, None, 1e-6, True, plan) for key, plan in plans.items()},
        )  # fmt: skip
