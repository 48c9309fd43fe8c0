r"""Products with int8 and NF4 weights on torch tensors: checks, the gradient of x, the custom op, and a module.

x is float32, float16 or bfloat16 of any layout (in Triton's interpreter the first two); codes and scales are what
`minillm.functional` makes, as contiguous tensors. Weights have no gradient: what is trained beside them is (LoRA).
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.checks import check_floats, check_integers, check_places
from kernels.quantised import launch
from kernels.quantised.launch import FORMATS, Weight
from minillm.checks import require, require_one_of
from minillm.functional.nf4 import BLOCK, META_BLOCK, quantise_nf4, quantise_scales
from minillm.functional.quantisation import quantise_int8


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    r"""x W^T with one scale to a row of W.

    Equation: `int8-quant` $\hat W_{nk}=s_nq_{nk}$, dequantised where it is loaded
    Shapes: x (..., k), codes (n, k) int8, scale (n, 1) float32 -> (..., n)
    Raises: ValueError for shapes that do not fit or a device without kernels; TypeError for other dtypes.
    Source: notes §7 Table 4.
    """
    require(codes.ndim == 2, "int8_linear", "codes", "of shape (n, k)", codes)
    return _linear("int8_linear", x, Weight("int8", codes, scale, None, 0.0, codes.shape[0], codes.shape[1]))


def nf4_linear(x: Tensor, packed: Tensor, scale: Tensor, n_out: int, block: int = BLOCK) -> Tensor:
    r"""x W^T with W (n_out, k) in NF4, read row by row.

    Equation: `nf4-quant` $\hat w=s_{\rm blk}\,\mathrm{level}[q]$, dequantised where it is loaded
    Shapes: x (..., k), packed (ceil(n k / 2),) uint8, scale (ceil(n k / block),) float32 -> (..., n)
    Raises: as `int8_linear`.
    Source: notes §10.4; Dettmers et al. 2023.
    """
    require(x.ndim >= 1, "nf4_linear", "x", "of shape (..., k)", x)
    return _linear("nf4_linear", x, Weight("nf4", packed, scale, None, 0.0, n_out, x.shape[-1], block))


def nf4_double_linear(
    x: Tensor, packed: Tensor, scale: Tensor, meta: Tensor, mean: float, n_out: int, block: int = BLOCK
) -> Tensor:
    r"""`nf4_linear` whose scales are bytes with scales of their own.

    Equation: `double-quant` $\hat s=s_{\rm meta}q+\bar s$
    Equation: `nf4-quant` $\hat w=\hat s_{\rm blk}\,\mathrm{level}[q]$
    Shapes: x (..., k), packed (ceil(n k / 2),) uint8, scale (meta blocks, 256) int8, meta (meta blocks, 1) -> (..., n)
    Raises: as `int8_linear`.
    Source: notes §10.4; Dettmers et al. 2023.
    """
    require(x.ndim >= 1, "nf4_double_linear", "x", "of shape (..., k)", x)
    weight = Weight("nf4_double", packed, scale, meta, mean, n_out, x.shape[-1], block)
    return _linear("nf4_double_linear", x, weight)


def _linear(where: str, x: Tensor, weight: Weight) -> Tensor:
    """Refuse what the kernel cannot take; then the short way for plain tensors, the custom op for a tracer's."""
    require(x.ndim >= 1 and x.shape[-1] == weight.k, where, "x", f"of shape (..., {weight.k})", x)
    check_floats(where, (("x", x),))
    _check_weight(where, weight)
    stored = [(name, t) for name, t in (("codes", weight.codes), ("scale", weight.scale), ("meta", weight.meta))]
    check_places(where, [("x", x), *((name, t) for name, t in stored if t is not None)])
    if (type(x) is Tensor or type(x) is nn.Parameter) and not torch.compiler.is_compiling():
        return QuantisedProduct.apply(x, weight)  # type: ignore[return-value]
    return quantised_op(x, *weight)


def _check_weight(where: str, weight: Weight) -> None:
    kind, codes, scale, meta, _, n, k, block = weight
    require(
        n >= 0 and block > 0 and block % 2 == 0, where, "n_out and block", "0 or more, and even", f"{n} and {block}"
    )
    check_integers(where, (("the codes", codes),), (torch.int8 if kind == "int8" else torch.uint8,))
    blocks = -(-n * k // block)
    rows = -(-blocks // META_BLOCK)
    shapes = {"int8": ((n, k), (n, 1)), "nf4": ((-(-n * k // 2),), (blocks,))}
    wanted, scales = shapes.get(kind, ((-(-n * k // 2),), (rows, META_BLOCK)))
    require(tuple(codes.shape) == wanted, where, "the codes", f"of shape {wanted}", codes)
    require(tuple(scale.shape) == scales, where, "the scales", f"of shape {scales}", scale)
    if meta is None:
        check_floats(where, (("the scales", scale),), (torch.float32,))
    else:
        check_integers(where, (("the scales", scale),), (torch.int8,))
        check_floats(where, (("the scales' scales", meta),), (torch.float32,))
        require(meta.numel() == rows, where, "the scales' scales", f"of shape ({rows}, 1)", meta)
    for name, tensor in (("the codes", codes), ("the scales", scale), ("the scales' scales", meta)):
        require(tensor is None or tensor.is_contiguous(), where, name, "contiguous", "a strided tensor")


class QuantisedProduct(torch.autograd.Function):
    r"""Both directions for eager tensors: $\bar x=\bar y\hat W$ by the same kernel.

    Equation: `nf4-quant` see `kernel.py`
    Shapes: x (..., k) -> (..., n)
    """

    @staticmethod
    def forward(ctx, x, weight):
        """Keep the weight, which is nobody's intermediate result."""
        ctx.weight = weight
        return launch.product(x, weight)

    @staticmethod
    def backward(ctx, dy):
        """The gradient of x."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the kernels of quantised weights have first derivatives only, so create_graph=True would leave terms "
                "out. Dequantise the weight and use a plain product where you need second derivatives."
            )
        return launch.product(dy, ctx.weight, backward=True), None


@torch.library.custom_op("minillm::quantised_product", mutates_args=())
def quantised_op(
    a: Tensor, kind: str, codes: Tensor, scale: Tensor, meta: Tensor | None, mean: float, n: int, k: int, block: int,
    backward: bool = False,
) -> Tensor:  # fmt: skip
    """a W^T, or backward a W."""
    return launch.product(a, Weight(kind, codes, scale, meta, mean, n, k, block), backward)


@quantised_op.register_fake
def _quantised_fake(a, kind, codes, scale, meta, mean, n, k, block, backward=False):
    return a.new_empty((*a.shape[:-1], k if backward else n))


def _setup_context(ctx, inputs, output):
    _, ctx.kind, codes, scale, meta, *ctx.rest, ctx.backward = inputs
    ctx.save_for_backward(codes, scale, meta)


def _quantised_backward(ctx, dy):
    codes, scale, meta = ctx.saved_tensors
    da = quantised_op(dy, ctx.kind, codes, scale, meta, *ctx.rest, not ctx.backward)
    return da, *[None] * 9


quantised_op.register_autograd(_quantised_backward, setup_context=_setup_context)


class QuantisedLinear(nn.Module):
    """A frozen linear map whose weight is stored as int8, nf4 or nf4_double, made from one in floating point."""

    def __init__(self, weight: Tensor, kind: str = "nf4_double", block: int = BLOCK):
        super().__init__()
        require_one_of(kind, FORMATS, "QuantisedLinear", "kind")
        require(weight.ndim == 2, "QuantisedLinear", "the weight", "of shape (n, k)", weight)
        self.kind, self.mean, self.block, (self.n, self.k) = kind, 0.0, block, weight.shape
        array: Any = weight.detach().float().cpu().numpy()
        meta = None
        if kind == "int8":
            codes, scale = quantise_int8(array, -1)
        else:
            codes, scale, _, _ = quantise_nf4(array, block)
        if kind == "nf4_double":
            (scale, meta), self.mean, _ = quantise_scales(scale)
        for name, found in (("codes", codes), ("scale", scale), ("meta", meta)):
            self.register_buffer(name, None if found is None else torch.from_numpy(found).to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        parts: Any = (self.codes, self.scale, self.meta, self.mean, self.n, self.k, self.block)
        return _linear("QuantisedLinear", x, Weight(self.kind, *parts))
