r"""Causal linear attention on torch tensors: checks, gradients, the custom op for `torch.compile`, and a module.

Two functions over one set of kernels: of mapped queries and keys (any feature map, applied before), and with the map ELU+1
inside, which saves writing the features. float32, float16 or bfloat16 tensors of any layout on a GPU; in Triton's
interpreter (TRITON_INTERPRET=1, no GPU) float32 and float16. Triton 3.7.1 cannot compile the
float16 kernels for Blackwell. States and normalisers are float32 whatever the dtype: they are sums over all tokens. Gradients are of first order and reach the initial state too. Results are contiguous.
"""

import torch
from torch import Tensor, nn

from kernels.checks import check_floats, check_places
from kernels.linear_attention import launch
from kernels.linear_attention.config import WIDEST
from minillm.checks import require

Results = tuple[Tensor, Tensor, Tensor]


def linear_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, state: Tensor | None = None, normaliser: Tensor | None = None,
    eps: float = 1e-6,
) -> Results:  # fmt: skip
    r"""Causal linear attention of mapped queries and keys, in chunks, from a state and to a state.

    Equation: `linear-attention-causal` $\mathbf S_V^{(t)}=\mathbf S_V^{(t-1)}+\mathbf v_t\phi(\mathbf k_t)^\top$, read with $\phi(\mathbf q_t)$
    Equation: `linear-attention` $\mathrm{attn}_i=\frac{\mathbf S_V\phi(\mathbf q_i)}{\mathbf S_K\phi(\mathbf q_i)+\varepsilon_0}$ with the sums up to i
    Shapes: phi_q, phi_k (B, H, L, d_phi), v (B, H, L, d_v), state (B, H, d_phi, d_v), normaliser (B, H, d_phi) or None
        for nothing before -> o (B, H, L, d_v), and the state and normaliser after the last token, float32
    Raises: ValueError for shapes that do not fit, one of state and normaliser without the other, widths beyond 256, or a
        device without kernels; TypeError for other dtypes.
    Source: notes §4.10; Katharopoulos et al. 2020.
    """
    _check("linear_attention", phi_q, phi_k, v, state, normaliser, eps)
    return _attend(phi_q, phi_k, v, state, normaliser, eps, False)


def elu1_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, normaliser: Tensor | None = None, eps: float = 1e-6
) -> Results:
    r"""The same with the feature map ELU + 1 inside: q and k come as they are projected.

    Equation: `feature-map-elu1` $\phi(x)=\mathrm{ELU}(x)+1$
    Equation: `linear-attention-causal` of $\phi(\mathbf q_t)$ and $\phi(\mathbf k_t)$
    Shapes: q, k (B, H, L, d), the rest as in `linear_attention` with d_phi = d
    Raises: as `linear_attention`.
    Source: notes §4.10; Katharopoulos et al. 2020.
    """
    _check("elu1_linear_attention", q, k, v, state, normaliser, eps)
    return _attend(q, k, v, state, normaliser, eps, True)


def _check(
    where: str, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, normaliser: Tensor | None, eps: float
) -> None:
    """Refuse what the kernels cannot take, before anything is launched."""
    require(q.ndim == 4, where, "the queries", "of shape (B, H, L, d_phi)", q)
    check_floats(where, (("the queries", q), ("the keys", k), ("v", v)))
    require(k.shape == q.shape, where, "the keys", f"of the queries' shape {tuple(q.shape)}", k)
    require(v.ndim == 4 and v.shape[:3] == q.shape[:3], where, "v", f"of shape {(*q.shape[:3], 'd_v')}", v)
    for name, other in (("the keys", k), ("v", v)):
        require(other.dtype == q.dtype, where, name, f"of the queries' dtype {q.dtype}", other, error=TypeError)
    B, H, _, d_phi = q.shape
    d_v = v.shape[3]
    within = 0 < d_phi <= WIDEST and d_v > 0
    require(within, where, "the widths", f"positive, d_phi at most {WIDEST}", (d_phi, d_v))
    require((state is None) == (normaliser is None), where, "state and normaliser", "given together", "one of them")
    require(eps >= 0, where, "eps", "a number of at least 0", eps)
    if state is None or normaliser is None:
        return
    check_floats(where, (("the state", state), ("the normaliser", normaliser)), (torch.float32,))
    check_places(where, [("the queries", q), ("the state", state), ("the normaliser", normaliser)])
    require(state.shape == (B, H, d_phi, d_v), where, "the state", f"of shape {(B, H, d_phi, d_v)}", state)
    require(normaliser.shape == (B, H, d_phi), where, "the normaliser", f"of shape {(B, H, d_phi)}", normaliser)


def _attend(q, k, v, state, normaliser, eps, elu) -> Results:
    """The short way for plain tensors, the custom op for a tracer's."""
    plain = type(q) is Tensor or type(q) is nn.Parameter
    if plain and not torch.compiler.is_compiling():
        return LinearAttentionFunction.apply(q, k, v, state, normaliser, eps, elu)  # type: ignore[return-value]
    return linear_attention_op(q, k, v, state, normaliser, eps, elu)[:3]


class LinearAttentionFunction(torch.autograd.Function):
    r"""The forward and the hand-derived backward, for eager tensors.

    Equation: `linear-attention-causal` backward: $\bar q_t=S_tg_t+z_tc_t,\ \bar k_t=R_tv_t+w_t,\ \bar v_t=R_t^\top k_t$, see `kernel.py`
    Shapes: as in the functions above.
    Source: derived in `kernel.py`.
    """

    @staticmethod
    def forward(ctx, q, k, v, state, normaliser, eps, elu):
        """Run the kernels; keep inputs, outputs, denominators and the states between segments."""
        o, last, last_z, den, states, normalisers = launch.forward(q, k, v, state, normaliser, eps, elu)
        ctx.save_for_backward(q, k, v, o, den, states, normalisers)
        ctx.elu, ctx.continued = elu, state is not None
        ctx.set_materialize_grads(False)
        return o, last, last_z

    @staticmethod
    def backward(ctx, do, d_state, d_normaliser):
        """Gradients of q, k, v and of the initial state and normaliser."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the linear-attention kernels have first derivatives only, so create_graph=True would leave terms out. "
                "Compose linear attention of torch operations where you need second derivatives."
            )
        q, k, v, o, den, states, normalisers = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        dq, dk, dv, first, first_z = launch.backward(
            do, d_state, d_normaliser, q, k, v, o, den, states, normalisers, ctx.elu
        )
        return dq, dk, dv, first if ctx.continued else None, first_z if ctx.continued else None, None, None


# ---- the same as custom ops: what a tracer sees. An op may not return None: absent is empty.


@torch.library.custom_op("minillm::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, normaliser: Tensor | None, eps: float, elu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state and normaliser, and the denominators."""
    return launch.forward(q, k, v, state, normaliser, eps, elu)[:4]


@linear_attention_op.register_fake
def _linear_attention_fake(q, k, v, state, normaliser, eps, elu):
    B, H, L, d_phi = q.shape
    single = {"dtype": torch.float32}
    return (
        v.new_empty(v.shape), v.new_empty((B, H, d_phi, v.shape[3]), **single), v.new_empty((B, H, d_phi), **single),
        v.new_empty((B, H, L), **single),
    )  # fmt: skip


@torch.library.custom_op("minillm::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    do: Tensor, d_state: Tensor | None, d_normaliser: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    den: Tensor, state: Tensor | None, normaliser: Tensor | None, eps: float, elu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and the gradients of the initial state and normaliser. The states between segments are made again."""
    states, normalisers = launch.forward(q, k, v, state, normaliser, eps, elu)[4:]
    return launch.backward(do, d_state, d_normaliser, q, k, v, o, den, states, normalisers, elu)


@linear_attention_backward_op.register_fake
def _linear_attention_backward_fake(do, d_state, d_normaliser, q, k, v, o, den, state, normaliser, eps, elu):
    B, H, _, d_phi = q.shape
    single = {"dtype": torch.float32}
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
        v.new_empty((B, H, d_phi, v.shape[3]), **single), v.new_empty((B, H, d_phi), **single),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    q, k, v, state, normaliser, ctx.eps, ctx.elu = inputs
    o, _, _, den = output
    ctx.continued = state is not None
    ctx.save_for_backward(q, k, v, o, den, state, normaliser)


def _op_backward(ctx, do, d_state, d_normaliser, _):
    q, k, v, o, den, state, normaliser = ctx.saved_tensors
    found = linear_attention_backward_op(
        do, d_state, d_normaliser, q, k, v, o, den, state, normaliser, ctx.eps, ctx.elu
    )
    return *found[:3], found[3] if ctx.continued else None, found[4] if ctx.continued else None, None, None


linear_attention_op.register_autograd(_op_backward, setup_context=_setup_context)


class LinearAttention(nn.Module):
    """Causal linear attention with the map ELU + 1 (``features="elu1"``) or of features made outside (``None``).

    Called with a state it goes on from there; it returns the outputs and the new state, (state, normaliser).
    """

    def __init__(self, features: str | None = "elu1", eps: float = 1e-6):
        super().__init__()
        require(features in (None, "elu1"), "LinearAttention", "features", "'elu1' or None", features)
        self.features, self.eps = features, eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor] | None = None):
        """q, k (B, H, L, d), v (B, H, L, d_v) -> o (B, H, L, d_v), (state, normaliser)."""
        function = linear_attention if self.features is None else elu1_linear_attention
        o, last, last_z = function(q, k, v, *(state or (None, None)), self.eps)
        return o, (last, last_z)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"features={self.features!r}, eps={self.eps}"
