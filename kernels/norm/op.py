r"""The norms on torch tensors: checks, gradients, the custom op for `torch.compile`, and modules.

Four functions over one kernel family: `rms_norm`, `layer_norm`, and both fused with the residual addition.
They take float32, float16 or bfloat16 tensors of any layout on a GPU; in Triton's interpreter
(TRITON_INTERPRET=1, no GPU) float32 and float16.

Called eagerly they go straight to a `torch.autograd.Function`; inside `torch.compile` (and under fake
tensors) to the custom ops `minillm::norm` and `minillm::norm_backward`, which the tracer treats as opaque.
Gradients are of first order. Results are contiguous and have the dtype of x; gradients of weights have theirs.
"""

import torch
from torch import Tensor, nn

from kernels.checks import check_floats
from kernels.norm import launch
from minillm.checks import require


def rms_norm(x: Tensor, g: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Divide by the root mean square of the last axis and multiply by a gain.

    Equation: `rmsnorm` $\mathbf g\odot\mathbf x\,/\sqrt{\frac1d\sum_i x_i^2+\varepsilon_0}$
    Shapes: x (..., d), g (d,) -> (..., d)
    Raises: ValueError for shapes that do not fit or a device without kernels; TypeError for other dtypes.
    Source: lecture06 (RMSNorm); notes §5.2.
    """
    _check("rms_norm", x, None, g, None, eps)
    return _norm(x, None, g, None, eps, False)[0]


def layer_norm(x: Tensor, g: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    r"""Centre the last axis, divide by its standard deviation, then scale and (unless b is None) shift.

    Equation: `layernorm` $\mathbf g\odot\frac{\mathbf x-\mu}{\sqrt{s^2+\varepsilon_0}}+\mathbf b$
    Equation: `rmsnorm-layernorm-relation` $\mathrm{LN}(\mathbf x)=\mathrm{RMSNorm}(\mathbf C\mathbf x)$: one kernel serves both
    Shapes: x (..., d), g (d,), b (d,) -> (..., d)
    Raises: ValueError for shapes that do not fit or a device without kernels; TypeError for other dtypes.
    Source: bridging §1.4; notes §4.7.
    """
    _check("layer_norm", x, None, g, b, eps)
    return _norm(x, None, g, b, eps, True)[0]


def add_rms_norm(x: Tensor, r: Tensor, g: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and RMS-normalise the sum, in one pass over memory.

    Equation: `pre-ln` $s=\mathbf x+\mathbf r,\ y=\mathrm{RMSNorm}(s)$
    Shapes: x (..., d), r (..., d), g (d,) -> s (..., d), y (..., d)
    Raises: ValueError for shapes that do not fit or a device without kernels; TypeError for other dtypes.
    Source: notes §4.7 and §8.
    """
    _check("add_rms_norm", x, r, g, None, eps)
    y, s = _norm(x, r, g, None, eps, False)
    return s, y  # type: ignore[return-value] (there is a branch, so there is a sum)


def add_layer_norm(x: Tensor, r: Tensor, g: Tensor, b: Tensor | None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and layer-normalise the sum, in one pass over memory.

    Equation: `pre-ln` $s=\mathbf x+\mathbf r,\ y=\mathrm{LN}(s)$
    Shapes: x (..., d), r (..., d), g (d,), b (d,) -> s (..., d), y (..., d)
    Raises: ValueError for shapes that do not fit or a device without kernels; TypeError for other dtypes.
    Source: notes §4.7 and §8.
    """
    _check("add_layer_norm", x, r, g, b, eps)
    y, s = _norm(x, r, g, b, eps, True)
    return s, y  # type: ignore[return-value] (there is a branch, so there is a sum)


def _check(where: str, x: Tensor, r: Tensor | None, g: Tensor, b: Tensor | None, eps: float) -> None:
    """Refuse what the kernels cannot take, before anything is launched."""
    require(x.ndim >= 1, where, "x", "of shape (..., d)", x)
    check_floats(where, (("x", x), ("the branch r", r), ("the gain g", g), ("the shift b", b)))
    d = x.shape[-1]
    if r is not None:
        require(r.shape == x.shape, where, "the branch r", f"of the stream's shape {tuple(x.shape)}", r)
        require(r.dtype == x.dtype, where, "the branch r", f"of the stream's dtype {x.dtype}", r, error=TypeError)
    for name, weight in (("the gain g", g), ("the shift b", b)):
        if weight is not None:
            require(weight.shape == (d,), where, name, f"of shape ({d},)", weight)
    require(eps >= 0, where, "eps", "a number of at least 0", eps)


def _norm(
    x: Tensor, r: Tensor | None, g: Tensor, b: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and s where there is a branch: the short way for plain tensors, the custom op for a tracer's."""
    plain = type(x) is Tensor or type(x) is nn.Parameter
    if plain and not torch.compiler.is_compiling():
        return Norm.apply(x, r, g, b, eps, centred)  # type: ignore[return-value]
    y, s, _, _ = norm_op(x, r, g, b, eps, centred)
    return y, None if r is None else s


class Norm(torch.autograd.Function):
    r"""The forward and the hand-derived backward of the whole family, for eager tensors.

    Equation: `layernorm-backward` $\bar x=\rho(\hat g-\overline{\hat g}-\hat x\,\overline{\hat g\odot\hat x})$, see `kernel.py`
    Equation: `rmsnorm` the same without $\overline{\hat g}$
    Shapes: as in the functions above.
    Source: topics #21.
    """

    @staticmethod
    def forward(ctx, x, r, g, b, eps, centred):
        """Run the kernel and keep the normalised rows and their statistics."""
        y, s, mean, rho = launch.forward(x, r, g, b, eps, centred)
        ctx.save_for_backward(x if r is None else s, g, mean, rho)
        ctx.shift_dtype = None if b is None else b.dtype
        ctx.residual = r is not None
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        """Gradients of x, r, g, b; where only s was used, what arrives there passes through."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the norm kernels have first derivatives only, so create_graph=True would leave terms out. "
                "Compose the norm of torch operations where you need second derivatives."
            )
        x, g, mean, rho = ctx.saved_tensors
        if dy is None:
            return ds, ds if ctx.residual else None, None, None, None, None
        dx, dg, db = launch.backward(dy, ds, x, g, mean, rho, ctx.shift_dtype)
        return dx, dx if ctx.residual else None, dg, db, None, None


# ---- the same as custom ops: what a tracer sees. An op may not return None, nor an input: absent is empty.


@torch.library.custom_op("minillm::norm", mutates_args=())
def norm_op(
    x: Tensor, r: Tensor | None, g: Tensor, b: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty without r), mean (empty for RMSNorm) and rho."""
    y, s, mean, rho = launch.forward(x, r, g, b, eps, centred)
    return y, _or_empty(s, x), _or_empty(mean, rho), rho


@norm_op.register_fake
def _norm_fake(x, r, g, b, eps, centred):
    n_rows = x.shape[:-1].numel()
    s = x.new_empty(x.shape if r is not None else (0,))
    mean = x.new_empty((n_rows if centred else 0,), dtype=torch.float32)
    return x.new_empty(x.shape), s, mean, x.new_empty((n_rows,), dtype=torch.float32)


@torch.library.custom_op("minillm::norm_backward", mutates_args=())
def norm_backward_op(
    dy: Tensor, ds: Tensor | None, x: Tensor, g: Tensor, b: Tensor | None, mean: Tensor, rho: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dg and db (empty without b)."""
    shift_dtype = None if b is None else b.dtype
    dx, dg, db = launch.backward(dy, ds, x, g, mean if centred else None, rho, shift_dtype)
    return dx, dg, _or_empty(db, g)


@norm_backward_op.register_fake
def _norm_backward_fake(dy, ds, x, g, b, mean, rho, centred):
    return x.new_empty(x.shape), g.new_empty(g.shape), b.new_empty(b.shape) if b is not None else g.new_empty((0,))


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0,)) if tensor is None else tensor


def _setup_context(ctx, inputs, output):
    x, r, g, b, _, ctx.centred = inputs
    _, s, mean, rho = output
    ctx.residual, ctx.shifted = r is not None, b is not None
    ctx.save_for_backward(s if ctx.residual else x, g, b, mean, rho)


def _norm_op_backward(ctx, dy, ds, *_):
    x, g, b, mean, rho = ctx.saved_tensors
    dx, dg, db = norm_backward_op(dy, ds if ctx.residual else None, x, g, b, mean, rho, ctx.centred)
    return dx, dx if ctx.residual else None, dg, db if ctx.shifted else None, None, None


norm_op.register_autograd(_norm_op_backward, setup_context=_setup_context)


# ---- modules, with torch's parameter names so that state dicts fit


class RMSNorm(nn.Module):
    """`rms_norm` with its gain; called with a residual branch it returns (s, y)."""

    def __init__(self, d: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """Normalise x, or add the branch to x first and return the sum as well."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """`layer_norm` with its gain and shift; called with a residual branch it returns (s, y)."""

    bias: nn.Parameter | None

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros(d, device=device, dtype=dtype)) if bias else None)

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """Normalise x, or add the branch to x first and return the sum as well."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"
