r"""Likelihood losses with hand-derived gradients."""

import numpy as np

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.functional.losses import IGNORE, divisor_for, kept_targets
from minillm.fused.softmax import shifted_exp


@derived("cross_entropy")
def cross_entropy(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    ignore_index: int = IGNORE,
    reduction: str = "token-mean",
    divisor: float | None = None,
):
    r"""Mean negative log-likelihood of the target tokens.

    With $p=\mathrm{softmax}(\mathbf o)$, $\partial\ell/\partial\mathbf o=p-\mathrm{onehot}$; ignored rows have gradient 0.

    Equation: `cross-entropy-logits` $-\mathbf o_t[x_{t+1}]+\mathrm{LSE}(\mathbf o_t)$
    Shapes: logits (..., V), targets (...) -> scalar; keeps the exponentials and their sums.
    Raises: ValueError for targets of another shape or an unknown reduction, IndexError for ids outside [0, V).
    Source: bridging §1.6.
    """
    ids, kept = kept_targets(logits, targets, ignore_index)
    scale = 1.0 / divisor_for(reduction, kept, divisor)
    e, total, top = shifted_exp(logits)
    picked = np.take_along_axis(logits, ids[..., None], -1)
    terms = np.where(kept, (np.log(total) + top - picked)[..., 0], 0)

    def vjp(dy):
        weight = (kept * (dy * scale)).astype(e.dtype)[..., None]
        dz = np.multiply(e, weight / total, out=scratch.empty_like(e))
        np.put_along_axis(dz, ids[..., None], np.take_along_axis(dz, ids[..., None], -1) - weight, -1)
        if not kept.all():
            dz[~kept] = 0  # exactly, whatever the ignored logits hold
        return dz

    return np.asarray(terms.sum() * e.dtype.type(scale)), vjp
