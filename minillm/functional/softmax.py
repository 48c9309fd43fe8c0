r"""Softmax and its relatives as written, stable by the shift that leaves them unchanged."""

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.linear import check_ids


def _example(rng):
    shape = [(2, 3), (4,), (2, 1, 5), (3, 1), (0, 4)][rng.integers(5)]
    return (3 * rng.normal(size=shape),), {}


def _shift(z: Tensor) -> np.ndarray:
    """The largest logit of every row, a constant for the gradient; 0 for a row of minus infinities."""
    top = z.data.max(-1, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(top), top, 0).astype(z.dtype)


@written("softmax_unshifted", example=_example)
def softmax_unshifted(z: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    r"""Softmax exactly as the textbook has it: overflows for large logits, which `softmax` does not.

    Equation: `softmax` $\mathrm{softmax}(z)_i=e^{z_i}/\sum_je^{z_j}$
    Shapes: z (..., n) -> (..., n); rows sum to 1
    Source: notes §4.1 (6).
    """
    e = z.exp()
    return e / e.sum(-1, keepdims=True)


@written("softmax", example=_example)
def softmax(z: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    r"""Softmax over the last axis, shifted by the largest logit.

    Equation: `softmax-stable` $e^{z_i-\max z}/\sum_je^{z_j-\max z}$
    Equation: `softmax` the same function
    Shapes: z (..., n) -> (..., n); rows sum to 1
    Source: notes §4.1 (6), (7).
    """
    e = (z - _shift(z)).exp()
    return e / e.sum(-1, keepdims=True)


@written("logsumexp", example=_example)
def logsumexp(z: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    r"""Logarithm of the sum of exponentials over the last axis; its gradient is the softmax.

    Equation: `logsumexp` $\mathrm{LSE}(z)=\max z+\log\sum_je^{z_j-\max z}$
    Shapes: z (..., n) -> (...)
    Source: bridging §1.6; notes §10.9.
    """
    top = _shift(z)
    return (z - top).exp().sum(-1).log() + top[..., 0]


@written("log_softmax", example=_example)
def log_softmax(z: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    r"""Log-probabilities of all choices.

    Equation: `log-softmax` $\log p_i=z_i-\mathrm{LSE}(z)$
    Shapes: z (..., n) -> (..., n)
    Source: bridging §1.6.
    """
    return z - logsumexp(z).unsqueeze(-1)


@written("softmax_jacobian", example=_example)
def softmax_jacobian(p: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n n"]:
    r"""The matrix of derivatives of softmax, from its value.

    Equation: `softmax-jacobian` $\partial p_i/\partial z_j=p_i(\delta_{ij}-p_j)$
    Shapes: p (..., n) -> (..., n, n)
    Source: bridging §1.6.
    """
    identity = np.eye(p.shape[-1], dtype=p.dtype)
    return p.unsqueeze(-1) * (identity - p.unsqueeze(-2))


def _example_chosen(rng):
    return (rng.normal(size=(2, 3, 5)), rng.integers(5, size=(2, 3))), {}


@written("token_logprobs", example=_example_chosen)
def token_logprobs(logits: Float[Tensor, "*B V"], chosen: Int[np.ndarray, "*B"] | Tensor) -> Float[Tensor, "*B"]:
    r"""Log-probability of the chosen token at every position.

    Equation: `gather-logprob` $\ell_t=(\log\mathrm{softmax}(\mathbf o_{t-1}))[y_t]$
    Shapes: logits (..., V), chosen (...) -> (...); the choices are already shifted (erratum 8)
    Raises: IndexError if a choice is not in [0, V), ValueError if the shapes do not match.
    Source: bridging §1.6; notes §10.5.
    """
    ids = check_ids("token_logprobs", chosen, logits.shape[-1])
    require(ids.shape == logits.shape[:-1], "token_logprobs", "the choices", f"of shape {logits.shape[:-1]}", ids)
    return log_softmax(logits).gather(-1, ids[..., None]).squeeze(-1)
