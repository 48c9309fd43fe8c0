"""The family's pieces as custom ops: what a tracer sees. An op may not return None nor an input: absent is an empty tensor."""

import torch
from torch import Tensor

from kernels.token_loss import launch, launch_linear
from kernels.token_loss.launch import LikelihoodTerms, Loss, PolicyTerms, Statistics, as_column

# ---- softmax


@torch.library.custom_op("minillm::softmax", mutates_args=())
def softmax_op(x: Tensor, log: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax or its logarithm, the largest entry and log2 of the sum of every row."""
    return launch.softmax(x, log)


@softmax_op.register_fake
def _softmax_fake(x, log):
    column = x.new_empty((x.shape[:-1].numel(),), dtype=torch.float32)
    return x.new_empty(x.shape), column, torch.empty_like(column)


@torch.library.custom_op("minillm::softmax_backward", mutates_args=())
def softmax_backward_op(dy: Tensor, x: Tensor, top: Tensor, log_sum: Tensor, log: bool) -> Tensor:
    """The gradient of the logits."""
    return launch.softmax_backward(dy, x, top, log_sum, log)


@softmax_backward_op.register_fake
def _softmax_backward_fake(dy, x, top, log_sum, log):
    return x.new_empty(x.shape)


def _softmax_context(ctx, inputs, output):
    x, ctx.log = inputs
    ctx.save_for_backward(x, output[1], output[2])


softmax_op.register_autograd(
    lambda ctx, dy, *_: (softmax_backward_op(dy, *ctx.saved_tensors, ctx.log), None), setup_context=_softmax_context
)


# ---- statistics of existing logits


@torch.library.custom_op("minillm::token_statistics", mutates_args=())
def statistics_op(
    logits: Tensor, targets: Tensor, temperature: float, ignored: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy, mean (empty unless asked for), and the two numbers that the backward needs."""
    return _as_tuple(launch.statistics(logits, targets, temperature, ignored, True, mean))  # type: ignore[return-value]


@statistics_op.register_fake
def _statistics_fake(logits, targets, temperature, ignored, mean):
    return _fake_columns(targets, mean)


@torch.library.custom_op("minillm::token_statistics_backward", mutates_args=())
def statistics_backward_op(
    logits: Tensor, targets: Tensor, entropy: Tensor, top: Tensor, log_sum: Tensor,
    a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, temperature: float, ignored: int,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    found = Statistics(top, top, entropy, None, top, log_sum)
    coefficients = tuple(as_column(x) for x in (a, b, c, d))
    return launch.gradient(logits, targets, found, coefficients, temperature, ignored)


@statistics_backward_op.register_fake
def _statistics_backward_fake(logits, targets, entropy, top, log_sum, a, b, c, d, temperature, ignored):
    return logits.new_empty(logits.shape)


def _statistics_context(ctx, inputs, output):
    logits, targets, ctx.temperature, ctx.ignored, ctx.mean = inputs
    ctx.save_for_backward(logits, targets, output[2], output[4], output[5])


def _statistics_op_backward(ctx, a, c, b, d, *_):
    dx = statistics_backward_op(*ctx.saved_tensors, a, b, c, d if ctx.mean else None, ctx.temperature, ctx.ignored)
    return dx, None, None, None, None


statistics_op.register_autograd(_statistics_op_backward, setup_context=_statistics_context)


def _as_tuple(found: Statistics) -> tuple[Tensor, ...]:
    mean = found.logp.new_empty((0,)) if found.mean is None else found.mean
    return found.logp, found.lse, found.entropy, mean, found.top, found.log_sum  # type: ignore[return-value]


def _fake_columns(targets: Tensor, mean: bool) -> tuple[Tensor, ...]:
    def column(wanted: bool = True) -> Tensor:
        return targets.new_empty((targets.numel() if wanted else 0,), dtype=torch.float32)

    return column(), column(), column(), column(mean), column(), column()


# ---- statistics of logits that are never stored


@torch.library.custom_op("minillm::linear_token_statistics", mutates_args=())
def linear_statistics_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ignored: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `minillm::token_statistics`, from hidden states and head."""
    return _as_tuple(launch_linear.statistics(hidden, weight, targets, temperature, ignored, True, mean))  # type: ignore[return-value]


@linear_statistics_op.register_fake
def _linear_statistics_fake(hidden, weight, targets, temperature, ignored, mean):
    return _fake_columns(targets, mean)


@torch.library.custom_op("minillm::linear_token_statistics_backward", mutates_args=())
def linear_statistics_backward_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropy: Tensor, top: Tensor, log_sum: Tensor,
    a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, temperature: float, ignored: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden states and head."""
    found = Statistics(top, top, entropy, None, top, log_sum)
    coefficients = tuple(as_column(x) for x in (a, b, c, d))
    return launch_linear.gradient(hidden, weight, targets, found, coefficients, temperature, ignored)  # type: ignore[return-value]


@linear_statistics_backward_op.register_fake
def _linear_backward_fake(hidden, weight, targets, entropy, top, log_sum, a, b, c, d, temperature, ignored):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _linear_context(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.ignored, ctx.mean = inputs
    ctx.save_for_backward(hidden, weight, targets, output[2], output[4], output[5])


def _linear_op_backward(ctx, a, c, b, d, *_):
    found = linear_statistics_backward_op(
        *ctx.saved_tensors, a, b, c, d if ctx.mean else None, ctx.temperature, ctx.ignored
    )
    return *found, None, None, None, None


linear_statistics_op.register_autograd(_linear_op_backward, setup_context=_linear_context)


# ---- terms of the tokens


@torch.library.custom_op("minillm::token_terms", mutates_args=())
def terms_op(
    logp: Tensor, lse: Tensor, entropy: Tensor, mean: Tensor | None, targets: Tensor, weight: Tensor,
    old: Tensor | None, ref: Tensor | None, advantage: Tensor | None, importance: Tensor | None,
    numbers: list[float], kl: str, kl_ratio: bool, level: str, length: int, ignored: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """value, a, b, c, d, ratio, flag, k1, k2, k3 (empty where there is none). ``old`` None: a likelihood loss."""
    terms = _loss(old, ref, advantage, importance, numbers, kl, kl_ratio, level, length)
    made = launch.token_terms(Statistics(logp, lse, entropy, mean, logp, logp), targets, weight, terms, ignored)
    empty = logp.new_empty
    a, b, c, d = (empty((0,)) if x is None else x for x in (made.a, made.b, made.c, made.d))
    watched = made.watched or tuple(empty((0,), dtype=torch.int8 if i == 1 else torch.float32) for i in range(5))
    return made.value, a, b, c, d, *watched  # type: ignore[return-value]


def _loss(old, ref, advantage, importance, numbers, kl, kl_ratio, level, length) -> Loss:
    smoothing, z_loss, low, high, dual, beta, entropy_coef = numbers
    if old is None:
        return LikelihoodTerms(smoothing, z_loss)
    return PolicyTerms(
        old, advantage, ref, importance, low, high, dual, beta, kl, kl_ratio, entropy_coef, level, length
    )


@terms_op.register_fake
def _terms_fake(
    logp, lse, entropy, mean, targets, weight, old, ref, advantage, importance,
    numbers, kl, kl_ratio, level, length, ignored,
):  # fmt: skip
    policy, (smoothing, z_loss, *_, entropy_coef) = old is not None, numbers

    def column(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return logp.new_empty((logp.numel() if wanted else 0,), dtype=dtype)

    b, c, d = (
        policy and entropy_coef != 0,
        not policy and (smoothing != 0 or z_loss != 0),
        not policy and smoothing != 0,
    )
    watched = [column(policy, torch.int8 if i == 1 else torch.float32) for i in range(5)]
    return column(), column(), column(b), column(c), column(d), *watched


def _terms_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:5])
    ctx.set_materialize_grads(False)


def _terms_backward(ctx, dvalue, *_):
    a, b, c, d = (x * dvalue if x.numel() and dvalue is not None else None for x in ctx.saved_tensors)
    return a, c, b, d, *(None,) * 12


terms_op.register_autograd(_terms_backward, setup_context=_terms_context)
