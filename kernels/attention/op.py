r"""Flash attention on torch tensors: checks, gradients, and the custom op for `torch.compile`.

Three functions over one kernel family: `attention`, the same with its log-sum-exps, and `packed_attention` for documents
of different lengths laid end to end. They take float32, float16 or bfloat16 tensors of any layout on a GPU; in
Triton's interpreter (TRITON_INTERPRET=1, no GPU) float32 and float16. Head widths go up to 256, those of keys and values
may differ, and H may be any multiple of H_kv.

Contract: a query that sees no key gets 0, its log-sum-exp is -inf, its gradient 0. Keys and values behind a length have
no effect, whatever they hold. Results have the dtype of q, log-sum-exps are float32; they are contiguous, or, where q
is a view of (B, L, H, d) memory, laid out like it. Gradients are of first order; two runs agree in every bit.
"""

import math

import torch
from torch import Tensor

from kernels.attention import launch
from kernels.attention.assembler import require_safe
from kernels.attention.launch import BOTTOM_RIGHT, TOP_LEFT, Pattern
from kernels.checks import check_floats, check_integers
from kernels.launching import INTERPRETED
from minillm.checks import require, require_one_of, require_positive

WIDEST = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, prefix: Tensor | int | None = None,
    causal: bool = False, window: int | None = None, align: str = BOTTOM_RIGHT,
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    r"""Weigh the values by how well the keys answer the queries, in tiles, without a matrix of scores in memory.

    Equation: `flash-attention` $m'=\max(m,\tilde m)$, $\ell'=e^{m-m'}\ell+e^{\tilde m-m'}\tilde\ell$, $o'=e^{m-m'}o+e^{\tilde m-m'}\tilde P\mathbf V$
    Equation: `attention-context` $\mathbf c_t^{(h)}=\sum_s\alpha^{(h)}_{t,s}\mathbf V^{(h)}_s$
    Equation: `gqa` query head h reads key/value head $\lfloor hH_{kv}/H\rfloor$
    Equation: `mqa` the same with $H_{kv}=1$
    Equation: `mask-causal` query i sees keys up to i plus an offset: ``align`` "bottom-right" puts the last query on the
        last key (as with a cache), "top-left" the first on the first
    Equation: `mask-prefix` causal, and all see the first ``prefix`` keys (one number, or one a sequence)
    Equation: `mask-padding` ``key_lengths``: keys of sequence b from there on are hidden (alignment goes by $L_k$)
    Equation: `sparse-attention-window` causal, and only the last ``window`` keys up to the query's own
    Equation: `logit-softcap` scores become $c\tanh(s/c)$ with ``softcap`` c
    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v), key_lengths and prefix (B,) of
        integers -> (B, H, L_q, d_v). ``scale`` is 1/sqrt(d_head) if left out.
    Raises: ValueError for shapes, masks or numbers that do not fit or a device without kernels; TypeError for other
        dtypes; RuntimeError where this machine's assembler is known to get the kernels wrong.
    Source: notes §4.1, §4.4, §4.10; Dao et al. 2022.
    """
    return _checked("attention", q, k, v, key_lengths, prefix, causal, window, align, scale, softcap)[0]


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, prefix: Tensor | int | None = None,
    causal: bool = False, window: int | None = None, align: str = BOTTOM_RIGHT,
    scale: float | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""`attention`, and the log-sum-exp of every query's scores, by which parts of the keys can be merged.

    Equation: `flash-attention` start $m=-\infty$, $\ell=0$, $o=0$; at the end $o/\ell$ and $m+\log\ell$
    Equation: `logsumexp` its gradient is the softmax, and flows
    Shapes: as `attention` -> o (B, H, L_q, d_v), lse (B, H, L_q) in float32
    Raises: as `attention`.
    Source: notes §4.10.
    """
    return _checked("attention_with_lse", q, k, v, key_lengths, prefix, causal, window, align, scale, softcap)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor,
    causal: bool = False, window: int | None = None, align: str = BOTTOM_RIGHT,
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    r"""Attention within documents that lie end to end, of any lengths, some of them perhaps empty.

    Equation: `mask-block-diagonal` $1\{\mathrm{doc}(i)=\mathrm{doc}(j)\}$, and $j\le i$ within the document if causal
    Equation: `flash-attention` tiles hold whatever documents they meet; those hidden from all their rows are skipped
    Shapes: q (T_q, H, d_head), k (T_k, H_kv, d_head), v (T_k, H_kv, d_v), starts_q and starts_k (documents + 1,): where each
        document begins, from 0, and where the last one ends -> (T_q, H, d_v). What lies behind the end gets 0.
    Raises: as `attention`. The starts must not decrease; they are on the GPU and not looked at.
    Source: topics #19; notes §4.10.
    """
    where = "packed_attention"
    require(q.ndim == 3, where, "q", "of shape (T_q, H, d_head)", q)
    require(k.ndim == 3, where, "k", "of shape (T_k, H_kv, d_head)", k)
    require(v.ndim == 3, where, "v", "of shape (T_k, H_kv, d_v)", v)
    check_integers(where, (("starts_q", starts_q), ("starts_k", starts_k)))
    require(starts_q.ndim == 1 and len(starts_q) > 1, where, "starts_q", "of shape (documents + 1,)", starts_q)
    require(starts_k.shape == starts_q.shape, where, "starts_k", f"of shape {tuple(starts_q.shape)}", starts_k)
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in (q, k, v))  # (1, heads, T, width)
    starts = starts_q.contiguous(), starts_k.contiguous()
    o, _ = _checked(where, q, k, v, None, None, causal, window, align, scale, softcap, starts)
    return o.transpose(1, 2)[0]


def _checked(
    where: str, q: Tensor, k: Tensor, v: Tensor, key_lengths, prefix, causal, window, align, scale, softcap, starts=None
) -> tuple[Tensor, Tensor]:
    """Refuse what the kernels cannot take, and call them."""
    require(q.ndim == 4, where, "q", "of shape (B, H, L_q, d_head)", q)
    B, H, _, d = q.shape
    require(k.ndim == 4 and k.shape[0] == B, where, "k", f"of shape (B={B}, H_kv, L_k, d_head)", k)
    require(k.shape[3] == d, where, "the width of k", f"that of q, {d}", k)
    require(v.shape[:-1] == k.shape[:-1], where, "v", f"of shape {(*k.shape[:-1], 'd_v')}", v)
    fits = k.shape[1] > 0 and H > 0 and H % k.shape[1] == 0
    require(fits, where, "H_kv", f"a positive divisor of H = {H}", f"{k.shape[1]}")
    for name, width in (("d_head", d), ("d_v", v.shape[3])):
        require(1 <= width <= WIDEST, where, name, f"in 1..{WIDEST}", f"{width}")
    check_floats(where, (("q", q), ("k", k), ("v", v)))
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, where, name, f"of the dtype of q, {q.dtype}", tensor, error=TypeError)
    require_one_of(align, (BOTTOM_RIGHT, TOP_LEFT), where, "align")
    if window is not None:
        require(causal, where, "window", "left out without causal=True (a window looks back)", window)
        require_positive(window, where, "window", integer=True)
    if prefix is not None:
        require(causal and window is None, where, "prefix", "left out without causal=True, or with a window", prefix)
        if isinstance(prefix, int):
            prefix = torch.full((B,), prefix, dtype=torch.int32, device=q.device)
    for name, numbers in (("key_lengths", key_lengths), ("prefix", prefix)):
        if numbers is not None:
            check_integers(where, (("q", q.new_empty(0, dtype=torch.int64)), (name, numbers)))
            require(numbers.shape == (B,), where, name, f"of shape (B,) = ({B},)", numbers)
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    require(0 < scale < math.inf, where, "scale", "a positive number", scale)
    require(softcap is None or 0 < softcap < math.inf, where, "softcap", "a positive number, or None", softcap)
    if not INTERPRETED:
        require_safe(where, q.device, q.dtype, d, v.shape[3])
    key_lengths, prefix = (None if t is None else t.contiguous() for t in (key_lengths, prefix))
    starts_q, starts_k = starts or (None, None)
    operands = (
        q, k, v, key_lengths, prefix, starts_q, starts_k,
        bool(causal), min(int(window or 0), q.shape[2] + k.shape[2]), align == BOTTOM_RIGHT, float(scale), float(softcap or 0.0),
    )  # fmt: skip
    if type(q) is Tensor and not torch.compiler.is_compiling():
        return Attention.apply(*operands)  # type: ignore[return-value]
    return attention_op(*operands)


def _pattern(key_lengths, prefix, starts_q, starts_k, causal: bool, window: int, bottom_right: bool) -> Pattern:
    starts = None if starts_q is None else (starts_q, starts_k)
    return Pattern(causal, window, BOTTOM_RIGHT if bottom_right else TOP_LEFT, key_lengths, prefix, starts)


class Attention(torch.autograd.Function):
    r"""The forward and the hand-derived backward, for eager tensors; `kernel_backward.py` has the derivation.

    Equation: `flash-attention` $\bar s_{ij}=p_{ij}(\bar p_{ij}-\langle o_i,\bar o_i\rangle+\overline{\rm LSE}_i)$, $p$ made again from the log-sum-exps
    Shapes: as in the functions above.
    Source: notes §4.10; Dao et al. 2022.
    """

    @staticmethod
    def forward(
        ctx, q, k, v, key_lengths, prefix, starts_q, starts_k, causal, window, bottom_right, scale, softcap
    ):  # fmt: skip
        """Run the kernel and keep the operands, the output and the log-sum-exps."""
        pattern = _pattern(key_lengths, prefix, starts_q, starts_k, causal, window, bottom_right)
        o, lse = launch.forward(q, k, v, pattern, scale, softcap or None)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = pattern, scale, softcap or None
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        """Gradients of q, k and v."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the attention kernels have first derivatives only, so create_graph=True would leave terms out. "
                "Compose attention of torch operations where you need second derivatives."
            )
        q, k, v, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        return *launch.backward(do, dlse, q, k, v, o, lse, *ctx.how), *[None] * 9


# ---- the same as custom ops: what a tracer sees


@torch.library.custom_op("minillm::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, prefix: Tensor | None,
    starts_q: Tensor | None, starts_k: Tensor | None,
    causal: bool, window: int, bottom_right: bool, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the log-sum-exps; a window or soft cap of 0 is none."""
    pattern = _pattern(key_lengths, prefix, starts_q, starts_k, causal, window, bottom_right)
    return launch.forward(q, k, v, pattern, scale, softcap or None)


@attention_op.register_fake
def _attention_fake(
    q, k, v, key_lengths, prefix, starts_q, starts_k, causal, window, bottom_right, scale, softcap
):  # fmt: skip
    packed = starts_q is not None
    return launch.like(q, q.shape[2], v.shape[3], packed), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("minillm::attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    key_lengths: Tensor | None, prefix: Tensor | None, starts_q: Tensor | None, starts_k: Tensor | None,
    causal: bool, window: int, bottom_right: bool, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv."""
    pattern = _pattern(key_lengths, prefix, starts_q, starts_k, causal, window, bottom_right)
    return launch.backward(do, dlse, q, k, v, o, lse, pattern, scale, softcap or None)


@attention_backward_op.register_fake
def _attention_backward_fake(
    do, dlse, q, k, v, o, lse, key_lengths, prefix, starts_q, starts_k, causal, window, bottom_right, scale, softcap
):  # fmt: skip
    packed = starts_q is not None
    return tuple(launch.like(t, t.shape[2], t.shape[3], packed) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *tensors = inputs[:7]
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.how = inputs[7:]


def _attention_op_backward(ctx, do, dlse):
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return *attention_backward_op(do, dlse, q, k, v, o, lse, *tensors, *ctx.how), *[None] * 9


attention_op.register_autograd(_attention_op_backward, setup_context=_setup_context)
