r"""SwiGLU and GEGLU on torch tensors: checks, gradients, the custom op for `torch.compile`, and a module.

`swiglu` and `geglu` take one joint projection [value; gate], `swiglu_pair` and `geglu_pair` two tensors. They take
float32, float16 or bfloat16 of any layout on a GPU; in Triton's interpreter float32 and float16. Results are
contiguous and have the dtype of the operands. Gradients are of first order.

``reuse=True`` lets the backward write the gradients over value and gate, which saves the memory of both: the same
numbers, bit for bit. It is right where nobody reads the projection afterwards (a product whose result it is does
not); autograd notices a second backward and refuses it. Operands that are not contiguous are left alone.
"""

import torch
from torch import Tensor, nn

from kernels import launching
from kernels.activations import launch
from kernels.checks import check_floats
from minillm.checks import require


def swiglu(h: Tensor, *, reuse: bool = False) -> Tensor:
    r"""Gated linear unit with SiLU on the gate, on a joint projection [value; gate].

    Equation: `swiglu` $y=v\odot z\,\sigma(z)$
    Equation: `silu` $z\,\sigma(z)$ on the gate
    Equation: `glu-split` value and gate are halves of one tensor, read where they lie
    Shapes: h (..., 2 d_ff) -> (..., d_ff)
    Raises: ValueError for an odd last axis or a device without kernels; TypeError for other dtypes.
    Source: lecture06 (SwiGLU); notes §8.7.
    """
    return _joint("swiglu", h, True, reuse)


def geglu(h: Tensor, *, reuse: bool = False) -> Tensor:
    r"""Gated linear unit with the exact GELU on the gate, on a joint projection [value; gate].

    Equation: `geglu` $y=v\odot z\,\Phi(z)$
    Equation: `gelu` $z\,\Phi(z)$ on the gate
    Shapes: h (..., 2 d_ff) -> (..., d_ff)
    Raises: ValueError for an odd last axis or a device without kernels; TypeError for other dtypes.
    Source: notes §8.7.
    """
    return _joint("geglu", h, False, reuse)


def swiglu_pair(value: Tensor, gate: Tensor, *, reuse: bool = False) -> Tensor:
    r"""Gated linear unit with SiLU on the gate, on two tensors.

    Equation: `swiglu` $y=v\odot z\,\sigma(z)$
    Shapes: value (..., d_ff), gate (..., d_ff) -> (..., d_ff)
    Raises: ValueError for unequal shapes or a device without kernels; TypeError for other or unequal dtypes.
    Source: lecture06 (SwiGLU); notes §8.7.
    """
    return _pair("swiglu_pair", value, gate, True, reuse)


def geglu_pair(value: Tensor, gate: Tensor, *, reuse: bool = False) -> Tensor:
    r"""Gated linear unit with the exact GELU on the gate, on two tensors.

    Equation: `geglu` $y=v\odot z\,\Phi(z)$
    Shapes: value (..., d_ff), gate (..., d_ff) -> (..., d_ff)
    Raises: ValueError for unequal shapes or a device without kernels; TypeError for other or unequal dtypes.
    Source: notes §8.7.
    """
    return _pair("geglu_pair", value, gate, False, reuse)


def _joint(where: str, h: Tensor, silu: bool, reuse: bool) -> Tensor:
    require(
        h.ndim >= 1 and h.shape[-1] % 2 == 0, where, "the last axis", "of even length 2 d_ff: [value; gate]", h
    )  # fmt: skip
    check_floats(where, (("h", h),))
    return _gated(h, None, silu, reuse)


def _pair(where: str, value: Tensor, gate: Tensor, silu: bool, reuse: bool) -> Tensor:
    require(value.ndim >= 1, where, "the value", "of shape (..., d_ff)", value)
    check_floats(where, (("the value", value), ("the gate", gate)))
    require(gate.shape == value.shape, where, "the gate", f"of the value's shape {tuple(value.shape)}", gate)
    require(
        gate.dtype == value.dtype, where, "the gate", f"of the value's dtype {value.dtype}", gate, error=TypeError
    )  # fmt: skip
    return _gated(value, gate, silu, reuse)


def _gated(a: Tensor, b: Tensor | None, silu: bool, reuse: bool) -> Tensor:
    """The short way for plain tensors, the custom op for a tracer's (which never reuses memory)."""
    plain = type(a) is Tensor or type(a) is nn.Parameter
    if plain and not torch.compiler.is_compiling():
        return Gated.apply(a, b, silu, reuse)  # type: ignore[return-value]
    return gated_op(a, b, silu)


def _backward(dy: Tensor, a: Tensor, b: Tensor | None, silu: bool, reuse: bool = False) -> tuple[Tensor, Tensor | None]:
    """The gradient of a joint projection, or of value and gate."""
    value, gate = (a, b) if b is not None else launch.halves(a)
    operands = [t for t in (a, b) if t is not None]
    reuse = reuse and all(t.is_contiguous() for t in operands)
    found = operands if reuse else [launching.empty(t.shape, t.dtype, t.device) for t in operands]
    into = (found[0], found[1]) if b is not None else launch.halves(found[0])
    launch.backward(dy, value, gate, into, silu)
    if reuse:
        torch.autograd.graph.increment_version(found)
    return found[0], found[1] if b is not None else None


class Gated(torch.autograd.Function):
    r"""Forward and hand-derived backward of both units, for eager tensors; b is None for a joint projection.

    Equation: `swiglu` $\bar v=\bar y\,a(z),\ \bar z=\bar y\,v\,a'(z)$, see `kernel.py`
    Equation: `geglu` the same with GELU
    Shapes: as in the functions above.
    """

    @staticmethod
    def forward(ctx, a, b, silu, reuse):
        """Run the kernel and keep value and gate."""
        ctx.save_for_backward(a, b)
        ctx.silu, ctx.reuse = silu, reuse
        return launch.forward(*((a, b) if b is not None else launch.halves(a)), silu)

    @staticmethod
    def backward(ctx, dy):
        """Gradients of value and gate, or of the joint projection."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gated-unit kernels have first derivatives only, so create_graph=True would leave terms out. "
                "Compose the unit of torch operations where you need second derivatives."
            )
        a, b = ctx.saved_tensors
        return *_backward(dy, a, b, ctx.silu, ctx.reuse), None, None


@torch.library.custom_op("minillm::gated", mutates_args=())
def gated_op(a: Tensor, b: Tensor | None, silu: bool) -> Tensor:
    """The unit on value a and gate b, or on the joint projection a."""
    return launch.forward(*((a, b) if b is not None else launch.halves(a)), silu)


@gated_op.register_fake
def _gated_fake(a, b, silu):
    return a.new_empty(a.shape if b is not None else (*a.shape[:-1], a.shape[-1] // 2))


@torch.library.custom_op("minillm::gated_backward", mutates_args=())
def gated_backward_op(dy: Tensor, a: Tensor, b: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of a and of b (empty without b)."""
    da, db = _backward(dy, a, b, silu)
    return da, a.new_empty((0,)) if db is None else db


@gated_backward_op.register_fake
def _gated_backward_fake(dy, a, b, silu):
    return a.new_empty(a.shape), a.new_empty((0,) if b is None else b.shape)


def _setup_context(ctx, inputs, output):
    a, b, ctx.silu = inputs
    ctx.save_for_backward(a, b)


def _gated_op_backward(ctx, dy):
    a, b = ctx.saved_tensors
    da, db = gated_backward_op(dy, a, b, ctx.silu)
    return da, db if b is not None else None, None


gated_op.register_autograd(_gated_op_backward, setup_context=_setup_context)


class SwiGLU(nn.Module):
    """`swiglu` of a joint projection, or of value and gate, as a module without parameters."""

    def forward(self, value: Tensor, gate: Tensor | None = None) -> Tensor:
        """y of [value; gate], or of the two."""
        return swiglu(value) if gate is None else swiglu_pair(value, gate)


class GEGLU(nn.Module):
    """`geglu` of a joint projection, or of value and gate, as a module without parameters."""

    def forward(self, value: Tensor, gate: Tensor | None = None) -> Tensor:
        """y of [value; gate], or of the two."""
        return geglu(value) if gate is None else geglu_pair(value, gate)
