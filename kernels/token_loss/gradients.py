"""The family's gradients for torch: autograd functions for plain tensors, custom ops for a tracer's.

Three pieces make every loss: statistics of logits (existing ones, or those of hidden states and a head that are never
stored), terms of the tokens, and, where the gradient may replace the logits, both at once. All have first derivatives
only. What a tracer gets instead is in `custom_ops.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.token_loss import launch, launch_linear
from kernels.token_loss.custom_ops import terms_op
from kernels.token_loss.launch import LikelihoodTerms, Loss, PolicyTerms, Statistics, Terms, as_column


def refuse_second_order() -> None:
    """Called in every backward: a graph through it would be wrong, not only missing."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the token_loss kernels have first derivatives only, so create_graph=True would leave terms out. "
            "Compose the loss of torch operations where you need second derivatives."
        )


def traced(*tensors: Tensor | None) -> bool:
    """Whether a tracer or a tensor subclass is at work, for which the custom ops are there."""
    plain = all(t is None or type(t) is Tensor or type(t) is nn.Parameter for t in tensors)
    return not plain or torch.compiler.is_compiling()


# ---- softmax and its logarithm


class Softmax(torch.autograd.Function):
    r"""Softmax or log-softmax of the last axis, with the gradient of either.

    Equation: `softmax-jacobian` $\bar z=p\odot(\bar p-\sum_j\bar p_jp_j)$; of the logarithm $\bar y-p\sum_j\bar y_j$
    Shapes: (..., V) -> (..., V)
    Source: bridging §1.6.
    """

    @staticmethod
    def forward(ctx, x, log):
        """Run the kernel and keep the logits and two numbers a row."""
        y, top, log_sum = launch.softmax(x, log)
        ctx.save_for_backward(x, top, log_sum)
        ctx.log = log
        return y

    @staticmethod
    def backward(ctx, dy):
        """The gradient of the logits."""
        refuse_second_order()
        x, top, log_sum = ctx.saved_tensors
        return launch.softmax_backward(dy, x, top, log_sum, ctx.log), None


# ---- statistics of existing logits


class TokenStatistics(torch.autograd.Function):
    r"""Log-prob of the target, log-sum-exp, entropy and mean logit of every row, in one pass.

    Equation: `gather-logprob` $\ell_t=z_y/\tau-\mathrm{LSE}$; backward $\bar z=\bar\ell(\mathrm{onehot}-p)/\tau$
    Equation: `logsumexp` backward $\overline{\mathrm{LSE}}\,p$
    Equation: `entropy` backward $-\bar{\mathcal H}\,p\odot(\log p+\mathcal H)$
    Shapes: logits (..., V), targets (n_rows,) -> four of (n_rows,), None where not wanted.
    Source: bridging §1.6; notes §10.5.
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature, ignored, entropy, mean):
        """One pass; what the backward needs beside the logits is two or three numbers a row."""
        found = launch.statistics(logits, targets, temperature, ignored, entropy, mean)
        ctx.save_for_backward(logits, targets)
        ctx.found, ctx.settings = found, (temperature, ignored)
        ctx.set_materialize_grads(False)
        return found.logp, found.lse, found.entropy, found.mean

    @staticmethod
    def backward(ctx, a, c, b, d):
        """The gradient of the logits from whatever arrives at the four."""
        refuse_second_order()
        logits, targets = ctx.saved_tensors
        temperature, ignored = ctx.settings
        coefficients = tuple(as_column(x) for x in (a, b, c, d))
        dx = launch.gradient(logits, targets, ctx.found, coefficients, temperature, ignored)
        return dx, None, None, None, None, None


# ---- statistics of logits that are never stored


class LinearStatistics(torch.autograd.Function):
    r"""The same four numbers of the logits hidden @ weight.T, and the gradients of both factors.

    Equation: `lm-head` $\mathbf o_t=\mathbf W\mathbf h_t$, a tile at a time
    Shapes: hidden (..., d), weight (V, d), targets (n_rows,) -> four of (n_rows,), None where not wanted.
    Source: notes §3.1.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, ignored, entropy, mean):
        """By tiles over the vocabulary."""
        found = launch_linear.statistics(hidden, weight, targets, temperature, ignored, entropy, mean)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.found, ctx.settings = found, (temperature, ignored)
        ctx.set_materialize_grads(False)
        return found.logp, found.lse, found.entropy, found.mean

    @staticmethod
    def backward(ctx, a, c, b, d):
        """By strips of the vocabulary."""
        refuse_second_order()
        hidden, weight, targets = ctx.saved_tensors
        found = launch_linear.gradient(
            hidden, weight, targets, ctx.found, tuple(as_column(x) for x in (a, b, c, d)), *ctx.settings,
            wanted=(ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
        )  # fmt: skip
        return *found, None, None, None, None, None


# ---- terms of the tokens, added up


class TokenTerms(torch.autograd.Function):
    r"""The loss from the statistics: every token's term, its derivatives, and the sum.

    Equation: `ppo-clip` $\min(\rho A,\mathrm{clip}(\rho)A)$
    Equation: `ppo-gradient-region` derivative by $\log\pi$: $A\rho$ where the clip does not take it, else 0
    Equation: `ppo-dual-clip` for $A<0$ not below $cA$
    Equation: `kl-estimator-k1` derivative 1
    Equation: `kl-estimator-k2` derivative $-d$
    Equation: `kl-estimator-k3` derivative $1-e^d$
    Equation: `kl-estimator-is` times the ratio, product rule
    Shapes: statistics (n_rows,) -> scalar, then what to watch, each (n_rows,).
    Source: notes §10.5 and §10.6; deepseek (GRPO).
    """

    @staticmethod
    def forward(ctx, logp, lse, entropy, mean, targets, weight, terms, ignored):
        """All switches are in ``terms``; the weights carry mask and reduction."""
        found = Statistics(logp, lse, entropy, mean, logp, logp)
        made = launch.token_terms(found, targets, weight, terms, ignored)
        ctx.made = made
        if made.watched:
            ctx.mark_non_differentiable(*made.watched)
        return made.value.sum(), *made.watched

    @staticmethod
    def backward(ctx, dloss, *_):
        """What arrives at the sum, times the derivatives by log-prob, log-sum-exp, entropy and mean."""
        refuse_second_order()
        made: Terms = ctx.made
        a, c, b, d = (None if x is None else x * dloss for x in (made.a, made.c, made.b, made.d))
        return a, c, b, d, None, None, None, None


def loss_of(
    statistics: tuple[Tensor | None, ...], targets: Tensor, weight: Tensor, terms: Loss, ignored: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of the tokens' terms, and what to watch."""
    logp, lse, entropy, mean = statistics
    if not traced(logp, weight, targets):
        loss, *watched = TokenTerms.apply(logp, lse, entropy, mean, targets, weight, terms, ignored)  # type: ignore[misc]
        return loss, tuple(watched)
    mean = None if mean is None or mean.numel() != targets.numel() else mean
    if isinstance(terms, LikelihoodTerms):
        data: tuple[Any, ...] = (None,) * 4
        numbers = [terms.smoothing, terms.z_loss, 0.0, math.inf, math.inf, 0.0, 0.0]
        switches: tuple[Any, ...] = ("k3", False, "token", 1)
    else:
        data = terms.old, terms.ref, terms.advantage, terms.importance
        numbers = [0.0, 0.0, terms.low, terms.high, terms.dual, terms.beta, terms.entropy_coef]
        switches = terms.kl, terms.kl_ratio, terms.level, terms.length
    value, _, _, _, _, *watched = terms_op(
        logp, lse, entropy, mean, targets, weight, *data, numbers, *switches, ignored
    )
    return value.sum(), tuple(watched) if data[0] is not None else ()


# ---- both at once, where the gradient may replace the logits


class InPlaceLoss(torch.autograd.Function):
    """Loss and gradient in the forward call: the logits' memory holds their gradient when it returns.

    The backward hands that memory out, multiplied by what arrives (a launch that touches nothing when that is 1), and can do so once.
    """

    @staticmethod
    def forward(ctx, logits, targets, weight, terms, temperature, ignored):
        """One read and one write of the logits; sequence ratios need a second read."""
        if isinstance(terms, PolicyTerms) and terms.level != "token":
            found = launch.statistics(logits, targets, temperature, ignored)
            made = launch.token_terms(found, targets, weight, terms, ignored)
            coefficients = (made.a, made.b, made.c, made.d)
            launch.gradient(logits, targets, found, coefficients, temperature, ignored, inplace=True)
            value, logp, lse, entropy, watched = made.value, found.logp, found.lse, found.entropy, made.watched
        else:
            value, logp, lse, entropy, watched, _ = launch.loss_and_gradient(
                logits, targets, weight, terms, temperature, ignored
            )
        torch.autograd.graph.increment_version(logits)  # whoever else kept the logits for a backward is told
        ctx.gradient = logits.detach()
        ctx.mark_non_differentiable(*(t for t in (logp, lse, entropy, *watched) if t is not None))
        return value.sum(), logp, lse, entropy, *watched

    @staticmethod
    def backward(ctx, dloss, *_):
        """The gradient that is already there, scaled."""
        refuse_second_order()
        if ctx.gradient is None:
            raise RuntimeError(
                "token_loss: with inplace=True the gradient replaces the logits and is handed out once. "
                "Call the loss again, or without inplace, to go through backward twice."
            )
        dx, ctx.gradient = ctx.gradient, None
        launch.scale(dx, dloss)
        return dx, None, None, None, None, None
