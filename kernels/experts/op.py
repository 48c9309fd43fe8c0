r"""Routing, packing and running experts on torch tensors: checks, gradients, the custom ops for `torch.compile`.

Four functions. `route` chooses k experts for every token and weighs them; `pack` sorts the assignments by expert;
`grouped_linear` multiplies every expert's rows by its own matrix; `mixture_of_experts` is the whole layer behind the
router. They take float32, float16 or bfloat16 tensors of any layout on a GPU; in Triton's interpreter
(TRITON_INTERPRET=1, no GPU) float32 and float16. Gates, losses and sums are float32.

Called eagerly they go straight to a `torch.autograd.Function`; inside `torch.compile` to custom ops (`custom.py`),
which the tracer treats as opaque. Gradients are of first order. No atomics: two runs agree in every bit.
"""

# What a star unpacks may be of any length to a type checker: it does not count arguments behind one.
# pyright: reportCallIssue=false

import torch
from torch import Tensor, nn

from kernels.checks import check_floats, check_integers
from kernels.experts import custom, launch, launch_routing
from minillm.checks import require, require_one_of

MOST_EXPERTS = 4096  # a row of logits, and the counts of all experts, lie in one tile
MOST_ASSIGNMENTS = 2**31 - 1
SCORINGS = ("softmax", "sigmoid")


def route(
    logits: Tensor, bias: Tensor | None, k: int, scoring: str = "softmax", renormalise: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Choose k experts for every token, weigh them, and say how evenly they are used.

    Equation: `gating-softmax` $\mathbf P=\mathrm{softmax}(\mathbf R)$
    Equation: `gating-sigmoid` $s_e=\sigma(r_e)$
    Equation: `topk-renormalise` $\tilde P_e=P_e/\sum_{j\in\mathcal T_k}P_j$
    Equation: `switch-top1` k = 1 without renormalising
    Equation: `moe-bias-balancing` the bias enters the choice and no weight
    Equation: `moe-aux-loss` $E\sum_ef_em_e$, gradient through $m_e$ alone
    Equation: `moe-z-loss` $\frac1N\sum_n\mathrm{LSE}(r_n)^2$
    Shapes: logits (N, E), bias (E,) -> gates (N, k) float32, experts (N, k) int32 best first, loads (E,) int32, aux and
        z losses float32; of equal scores the expert of the lower number is taken
    Raises: ValueError for shapes, k or a scoring that do not fit; TypeError for other dtypes.
    Source: notes §8.8 (i) to (iii); deepseek (dynamic bias, auxiliary losses).
    """
    require(logits.ndim == 2, "route", "the logits", "of shape (N, E)", logits)
    check_floats("route", (("the logits", logits), ("the bias", bias)))
    E = logits.shape[1]
    require(1 <= E <= MOST_EXPERTS, "route", "the number of experts", f"in 1..{MOST_EXPERTS}", E)
    require(isinstance(k, int) and 1 <= k <= E, "route", "k", f"an integer in 1..{E}, the number of experts", k)
    require_one_of(scoring, SCORINGS, "route", "scoring")
    _check_count("route", len(logits), k)
    if bias is not None:
        require(bias.shape == (E,), "route", "the bias", f"of shape ({E},)", bias)
    sigmoid = scoring == "sigmoid"
    if _plain(logits):
        return Route.apply(logits, bias, k, sigmoid, renormalise)  # type: ignore[return-value]
    return custom.route_op(logits, bias, k, sigmoid, renormalise)


def pack(experts: Tensor, n_experts: int, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sort the assignments by expert, within an expert by token, and keep at most ``capacity`` of each expert's.

    Equation: `moe-dispatch` order is $\pi$: expert e's rows are those of assignments order[offsets[e] : offsets[e + 1]]
    Equation: `moe-drop` the first ``capacity`` tokens of an expert are served; the others have place -1
    Shapes: experts (N, k) -> order (N k,), places (N, k), offsets (E + 1,), all int32; assignment n k + s is token n's s-th
        choice; order is -1 behind the last one served. A number outside 0..E-1 is served by nobody.
    Raises: ValueError for shapes or sizes that do not fit; TypeError unless the experts are integers.
    Source: notes §8.8 (iv).
    """
    require(experts.ndim == 2, "pack", "the experts", "of shape (N, k)", experts)
    check_integers("pack", (("the experts", experts),))
    fits = isinstance(n_experts, int) and 1 <= n_experts <= MOST_EXPERTS
    require(fits, "pack", "n_experts", f"an integer in 1..{MOST_EXPERTS}", n_experts)
    _check_capacity("pack", capacity)
    _check_count("pack", *experts.shape)
    if _plain(experts):
        return launch_routing.pack(experts, n_experts, capacity)
    return custom.pack_op(experts, n_experts, capacity)


def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    r"""Every group of rows times the matrix of its own expert, transposed.

    Equation: `moe-expert` the products of $\mathrm{FFN}_e(\mathbf X_e)$ for all e at once
    Shapes: x (A, m), w (E, n, m), offsets (E + 1,) rising from 0 -> (A, n); rows from offsets[E] on give zeros
    Raises: ValueError for shapes that do not fit; TypeError for other dtypes.
    Source: notes §8.8 (v).
    """
    where = "grouped_linear"
    require(x.ndim == 2, where, "x", "of shape (A, m)", x)
    require(w.ndim == 3 and w.shape[2] == x.shape[1], where, "w", f"of shape (E, n, {x.shape[1]})", w)
    check_floats(where, (("x", x), ("w", w)))
    require(w.dtype == x.dtype, where, "w", f"of the dtype of x, {x.dtype}", w, error=TypeError)
    check_integers(where, (("the offsets", offsets),))
    require(offsets.shape == (len(w) + 1,), where, "the offsets", f"of shape ({len(w) + 1},)", offsets)
    offsets = offsets.contiguous()
    if _plain(x):
        return GroupedLinear.apply(x, w, offsets)  # type: ignore[return-value]
    return custom.grouped_linear_op(x, w, offsets)


def mixture_of_experts(
    x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor, experts: Tensor, capacity: int | None = None
) -> Tensor:
    r"""The chosen experts of every token, SwiGLU networks, weighted by its gates and added up.

    Equation: `moe-output` $y=\sum_{e\in\mathcal T}g_eE_e(x)$
    Equation: `moe-dispatch` the gather is part of the first product's loads
    Equation: `moe-expert` $\mathbf Y_e=\mathrm{FFN}_e(\mathbf X_e)$
    Equation: `moe-combine` $\mathbf Z_n=\sum_sg_{ns}\mathbf Y_{\eta(n,s)}$, collected by every token
    Equation: `moe-drop` an assignment beyond the capacity adds nothing
    Shapes: x (N, d), gates (N, k), w_in (E, 2 d_ff, d) [value; gate], w_down (E, d, d_ff), experts (N, k) different
        numbers in a row, capacity tokens per expert or None -> (N, d)
    Raises: ValueError for shapes that do not fit; TypeError for other dtypes.
    Source: notes §8.8 (iv) to (vi).
    """
    where = "mixture_of_experts"
    require(x.ndim == 2, where, "x", "of shape (N, d)", x, "Flatten batch and sequence first.")
    N, d = x.shape
    fits = experts.ndim == 2 and len(experts) == N
    require(fits, where, "the experts", f"of shape ({N}, k)", experts)
    require(gates.shape == experts.shape, where, "the gates", f"of the experts' shape {tuple(experts.shape)}", gates)
    require(w_in.ndim == 3 and w_in.shape[2] == d, where, "w_in", f"of shape (E, 2 d_ff, {d})", w_in)
    E, f_in, _ = w_in.shape
    require(1 <= E <= MOST_EXPERTS, where, "the number of experts", f"in 1..{MOST_EXPERTS}", E)
    require(f_in % 2 == 0, where, "the second axis of w_in", "even, [value; gate]", w_in)
    require(w_down.shape == (E, d, f_in // 2), where, "w_down", f"of shape ({E}, {d}, {f_in // 2})", w_down)
    check_floats(where, (("x", x), ("the gates", gates), ("w_in", w_in), ("w_down", w_down)))
    for name, w in (("w_in", w_in), ("w_down", w_down)):
        require(w.dtype == x.dtype, where, name, f"of the dtype of x, {x.dtype}", w, error=TypeError)
    check_integers(where, (("the experts", experts),))
    _check_capacity(where, capacity)
    _check_count(where, *experts.shape)
    if _plain(x):
        return Experts.apply(x, gates, w_in, w_down, experts, capacity)  # type: ignore[return-value]
    return custom.experts_op(x, gates, w_in, w_down, experts, capacity)[0]


def _check_capacity(where: str, capacity: int | None) -> None:
    fits = capacity is None or (isinstance(capacity, int) and not isinstance(capacity, bool) and capacity >= 1)
    require(fits, where, "the capacity", "a positive integer or None", capacity)


def _check_count(where: str, N: int, k: int) -> None:
    require(N * k <= MOST_ASSIGNMENTS, where, "N k", f"at most {MOST_ASSIGNMENTS}, what int32 can number", N * k)


def _plain(tensor: Tensor) -> bool:
    return (type(tensor) is Tensor or type(tensor) is nn.Parameter) and not torch.compiler.is_compiling()


def refuse_second_order() -> None:
    """Called in a backward pass: recording there means create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the experts' kernels have first derivatives only, so create_graph=True would leave terms out. "
            "Compose the layer of torch operations where you need second derivatives."
        )


class Route(torch.autograd.Function):
    r"""`route` for eager tensors.

    Equation: `topk-renormalise` $\bar r_e=g_e(\bar g_e-\sum_j\bar g_jg_j)$, see `kernel_routing.py`
    Shapes: as `route`.
    Source: derived there.
    """

    @staticmethod
    def forward(ctx, logits, bias, k, sigmoid, renormalise):
        """Run the kernels; keep logits and choice."""
        gates, experts, loads, aux, z = launch_routing.route(logits, bias, k, sigmoid, renormalise)
        ctx.save_for_backward(logits, experts, loads)
        ctx.flags = sigmoid, renormalise
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(experts, loads)
        return gates, experts, loads, aux, z

    @staticmethod
    def backward(ctx, dgates, _experts, _loads, daux, dz):
        """The gradient of the logits; the bias has none."""
        refuse_second_order()
        if dgates is None and daux is None and dz is None:
            return None, None, None, None, None
        return launch_routing.route_backward(*ctx.saved_tensors, dgates, daux, dz, *ctx.flags), None, None, None, None


class GroupedLinear(torch.autograd.Function):
    r"""`grouped_linear` for eager tensors.

    Equation: `moe-expert` $\bar X_j=\bar Y_jW_e,\ \bar W_e=\sum_{j\in e}\bar Y_j^\top X_j$
    Shapes: as `grouped_linear`.
    Source: derived in `kernel_products.py`.
    """

    @staticmethod
    def forward(ctx, x, w, offsets):
        """Run the kernel; keep both factors."""
        ctx.save_for_backward(x, w, offsets)
        return launch.grouped_linear(x, w, offsets)

    @staticmethod
    def backward(ctx, dy):
        """The gradients of x and w."""
        refuse_second_order()
        return *launch.grouped_linear_backward(dy, *ctx.saved_tensors), None


class Experts(torch.autograd.Function):
    r"""`mixture_of_experts` for eager tensors.

    Equation: `moe-combine` $\bar g_{ns}=\langle\bar Z_n,Y_{\eta(n,s)}\rangle$ without Y, see `kernel_products.py`
    Shapes: as `mixture_of_experts`.
    Source: derived there.
    """

    @staticmethod
    def forward(ctx, x, gates, w_in, w_down, experts, capacity):
        """Run the kernels; keep the operands, the packing and the first product."""
        z, kept = launch.layer(x, gates, w_in, w_down, experts, capacity, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, gates, w_in, w_down, *kept)
        return z

    @staticmethod
    def backward(ctx, dz):
        """The gradients of x, the gates and both weights."""
        refuse_second_order()
        operands, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        return *launch.layer_backward(dz, *operands, kept), None, None
