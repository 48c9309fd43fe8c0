r"""Softmax and its relatives with hand-derived gradients."""

import numpy as np

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.checks import require
from minillm.functional.linear import check_ids


def shifted_exp(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """e^{z - max z} in a fresh buffer, its row sums and the row maxima (0 for a row of minus infinities)."""
    top = z.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, z.dtype.type(0))
    e = np.subtract(z, top, out=scratch.empty_like(z))
    np.exp(e, out=e)
    return e, (e @ np.ones(z.shape[-1], z.dtype))[..., None], top


@derived("softmax")
def softmax(z: np.ndarray):
    r"""Softmax over the last axis.

    The Jacobian $p_i(\delta_{ij}-p_j)$ applied from the left: $\bar z=p\odot(\bar p-\sum_j\bar p_jp_j)$.

    Equation: `softmax-stable` $p_i=e^{z_i-\max z}/\sum_je^{z_j-\max z}$
    Shapes: z (..., n) -> (..., n); keeps p.
    Source: notes §4.1 (7).
    """
    p, total, _ = shifted_exp(z)
    p /= total

    def vjp(dp):
        dz = np.multiply(dp, p, out=scratch.empty_like(p))
        dz -= p * dz.sum(-1, keepdims=True)
        return dz

    return p, vjp


@derived("logsumexp")
def logsumexp(z: np.ndarray):
    r"""Logarithm of the sum of exponentials: $\bar z=\bar y\,\mathrm{softmax}(z)$.

    Equation: `logsumexp` $\max z+\log\sum_je^{z_j-\max z}$
    Shapes: z (..., n) -> (...); keeps the exponentials.
    Source: bridging §1.6.
    """
    e, total, top = shifted_exp(z)

    def vjp(dy):
        return e * (dy[..., None] / total)

    return (np.log(total) + top)[..., 0], vjp


@derived("log_softmax")
def log_softmax(z: np.ndarray):
    r"""Log-probabilities: $\bar z=\bar y-p\sum_j\bar y_j$.

    Equation: `log-softmax` $\log p_i=z_i-\mathrm{LSE}(z)$
    Shapes: z (..., n) -> (..., n); keeps the exponentials.
    Source: bridging §1.6.
    """
    e, total, top = shifted_exp(z)

    def vjp(dy):
        return dy - e * (dy.sum(-1, keepdims=True) / total)

    return z - (np.log(total) + top), vjp


@derived("token_logprobs")
def token_logprobs(logits: np.ndarray, chosen: np.ndarray):
    r"""Log-probability of the chosen token: $\bar z=\bar y\,(\mathrm{onehot}-p)$.

    Equation: `gather-logprob` $\ell_t=(\log\mathrm{softmax}(\mathbf o_{t-1}))[y_t]$
    Shapes: logits (..., V), chosen (...) -> (...); keeps the exponentials.
    Raises: IndexError if a choice is not in [0, V), ValueError if the shapes do not match.
    Source: bridging §1.6; notes §10.5.
    """
    ids = check_ids("token_logprobs", chosen, logits.shape[-1])[..., None]
    require(
        ids.shape[:-1] == logits.shape[:-1], "token_logprobs", "the choices", f"of shape {logits.shape[:-1]}", chosen
    )
    e, total, top = shifted_exp(logits)

    def vjp(dy):
        dz = np.multiply(e, -dy[..., None] / total, out=scratch.empty_like(e))
        np.put_along_axis(dz, ids, np.take_along_axis(dz, ids, -1) + dy[..., None], -1)
        return dz

    return (np.take_along_axis(logits, ids, -1) - top - np.log(total))[..., 0], vjp
