r"""Rotary positions on torch tensors: checks, gradients, the custom op for `torch.compile`, and a module.

The angles arrive as a table of cosines and sines in float32, one row for each position (`table` makes it in float64
and rounds once). A row's position is ``start`` plus its place in the text, or plus what ``positions`` says: one row of
them for all texts, or one for each (packed documents, padding on the left). x may be float32, float16 or bfloat16 of
any layout on a GPU; in Triton's interpreter float32 and float16. Results are contiguous, or laid out (B, L, H, d_head) in
memory where x is. Gradients are of first order.
"""

import numpy as np
import torch
from torch import Tensor, nn

from kernels.checks import check_floats, check_integers
from kernels.rope import launch
from minillm.checks import require, require_one_of
from minillm.functional.positions import PAIRINGS, rotation_angles


def table(angles: np.ndarray, magnitude: float = 1.0, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles (n, d_head / 2) as float32 tensors, times a magnitude (YaRN has one)."""
    return tuple(  # type: ignore[return-value]
        torch.from_numpy((magnitude * f(np.asarray(angles, np.float64))).astype(np.float32)).to(device)
        for f in (np.cos, np.sin)
    )


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, start: int = 0, pairing: str = "interleaved"
) -> Tensor:
    r"""Turn pairs of coordinates by an angle that grows with the position.

    Equation: `pos-rope` $R(p\,\theta_i)$ on each pair; its gradient is turned by $-p\,\theta_i$
    Shapes: x (..., L, d_head), cos and sin (n, d_head / 2), positions None, (L,) or (B, L) with x (B, ..., L, d_head)
        -> (..., L, d_head)
    Raises: ValueError for shapes that do not fit, an unknown pairing, a start beyond the table or a device without
        kernels; TypeError for other dtypes. What ``positions`` holds is not looked at: it would stop the GPU.
    Source: notes §6; Su et al. 2021.
    """
    _check("rope", x, cos, sin, positions, start, pairing)
    plain = type(x) is Tensor or type(x) is nn.Parameter
    if plain and not torch.compiler.is_compiling():
        return Rope.apply(x, cos, sin, positions, start, pairing)  # type: ignore[return-value]
    return rope_op(x, cos, sin, positions, start, pairing, False)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, start: int = 0,
    pairing: str = "interleaved",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Turn queries and keys, which may have different numbers of heads.

    Equation: `pos-rope` $\langle R_mq,R_nk\rangle$ depends on $m-n$ only
    Shapes: q (B, H, L, d_head), k (B, H_kv, L, d_head) -> the same
    """
    return rope(q, cos, sin, positions, start, pairing), rope(k, cos, sin, positions, start, pairing)


@torch.no_grad()
def rope_(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, start: int = 0, pairing: str = "interleaved"
) -> Tensor:
    """`rope` in the place of x, bit for bit the same: for decoding, without gradients. Refuses x that shares elements."""
    _check("rope_", x, cos, sin, positions, start, pairing)
    shared = any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape))
    viewable = x.ndim <= 4 or x.is_contiguous()
    require(not shared and viewable, "rope_", "x", "of up to 4 axes without repeated elements", x)
    launch.turn(x.detach(), cos, sin, positions, start, pairing, out=x.detach())
    torch.autograd.graph.increment_version(x)
    return x


def _check(
    where: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, start: int, pairing: str
) -> None:  # fmt: skip
    require_one_of(pairing, PAIRINGS, where, "pairing")
    require(x.ndim >= 2 and x.shape[-1] % 2 == 0, where, "x", "(..., L, d_head) with an even d_head", x)
    check_floats(where, (("x", x),))
    check_floats(where, (("cos", cos), ("sin", sin)), (torch.float32,))
    require(cos.ndim == 2 and cos.shape[1] == x.shape[-1] // 2, where, "cos", f"(n, {x.shape[-1] // 2})", cos)
    require(
        sin.shape == cos.shape and sin.stride() == cos.stride() and (cos.stride(1) == 1 or cos.shape[1] == 1),
        where, "cos and sin", "of one shape and layout, contiguous along the last axis", sin,
    )  # fmt: skip
    require(cos.device == x.device, where, "cos", f"on the device of x, {x.device}", f"a tensor on {cos.device}")
    length = x.shape[-2]
    if positions is None:
        room = len(cos) - length
        require(0 <= start <= room or x.numel() == 0, where, "start", f"in 0..{room}, where the table ends", start)
        return
    check_integers(where, (("positions", positions),))
    wanted = [(length,), *([(x.shape[0], length)] if x.ndim > 2 else [])]
    said = " or ".join(map(str, wanted))
    require(tuple(positions.shape) in wanted, where, "positions", f"of shape {said}", positions)
    require(positions.device == x.device, where, "positions", f"on the device of x, {x.device}", positions)


class Rope(torch.autograd.Function):
    r"""The rotation and the one backwards, for eager tensors.

    Equation: `pos-rope` $\bar x=R(-p\,\theta_i)\,\bar y$
    Shapes: as in `rope`.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, positions, start, pairing):
        """Turn x; of the arguments only the table and the positions are kept."""
        ctx.save_for_backward(cos, sin, positions)
        ctx.start, ctx.pairing = start, pairing
        return launch.turn(x, cos, sin, positions, start, pairing)

    @staticmethod
    def backward(ctx, dy):
        """Turn what arrives back."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the rotary kernel has first derivatives only, so create_graph=True would leave terms out. "
                "Compose the rotation of torch operations where you need second derivatives."
            )
        cos, sin, positions = ctx.saved_tensors
        dx = launch.turn(dy, cos, sin, positions, ctx.start, ctx.pairing, backward=True)
        return dx, None, None, None, None, None


@torch.library.custom_op("minillm::rope", mutates_args=())
def rope_op(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, start: int, pairing: str, backward: bool
) -> Tensor:
    """x turned, or turned back."""
    return launch.turn(x, cos, sin, positions, start, pairing, backward)


@rope_op.register_fake
def _rope_fake(x, cos, sin, positions, start, pairing, backward):
    return launch.like(x)


def _setup_context(ctx, inputs, output):
    _, cos, sin, positions, ctx.start, ctx.pairing, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rope_op_backward(ctx, dy):
    cos, sin, positions = ctx.saved_tensors
    return rope_op(dy, cos, sin, positions, ctx.start, ctx.pairing, not ctx.back), None, None, None, None, None, None


rope_op.register_autograd(_rope_op_backward, setup_context=_setup_context)


class RotaryPositions(nn.Module):
    """`rope_qk` with its table for a context of ``n_positions``, which is no parameter and in no checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, n_positions: int, d_head: int, base: float = 10_000.0, pairing: str = "interleaved", device=None
    ):  # fmt: skip
        super().__init__()
        require_one_of(pairing, PAIRINGS, "RotaryPositions", "pairing")
        self.pairing = pairing
        cos, sin = table(rotation_angles(np.arange(n_positions), d_head, base), device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned."""
        return rope_qk(q, k, self.cos, self.sin, positions, start, self.pairing)
