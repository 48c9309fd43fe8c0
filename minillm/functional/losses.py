r"""Likelihood losses on logits, as written."""

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.linear import check_ids
from minillm.functional.softmax import token_logprobs

IGNORE = -100


def kept_targets(logits, targets, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Check targets against logits; return them with ignored places set to 0, and the mask of kept places."""
    targets = targets.data if isinstance(targets, Tensor) else np.asarray(targets)
    require(
        targets.shape == logits.shape[:-1],
        "cross_entropy",
        "the targets",
        f"of shape {tuple(logits.shape[:-1])}, one class id for every row of logits {tuple(logits.shape)}",
        targets,
    )
    kept = np.asarray(targets != ignore_index)  # an array also for a single target
    return check_ids("cross_entropy", np.where(kept, targets, 0), logits.shape[-1]), kept


def divisor_for(reduction: str, kept: np.ndarray, divisor: float | None) -> float:
    """The number that the summed loss is divided by; at least 1, so that an empty selection gives 0."""
    require_one_of(reduction, ("token-mean", "sum"), "cross_entropy", "reduction")
    if reduction == "sum":
        return 1.0
    return float(max(int(kept.sum()), 1)) if divisor is None else float(divisor)


def _example(rng):
    targets = rng.integers(5, size=(2, 3))
    targets[0, rng.integers(3)] = IGNORE
    return (2 * rng.normal(size=(2, 3, 5)), targets), {"reduction": ["token-mean", "sum"][rng.integers(2)]}


@written("cross_entropy", example=_example)
def cross_entropy(
    logits: Float[Tensor, "*B V"],
    targets: Int[np.ndarray, "*B"] | Tensor,
    *,
    ignore_index: int = IGNORE,
    reduction: str = "token-mean",
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    r"""Mean negative log-likelihood of the target tokens.

    Equation: `cross-entropy-logits` $-\log p_\theta(x_{t+1}\mid x_{\le t})=-\mathbf o_t[x_{t+1}]+\mathrm{LSE}(\mathbf o_t)$
    Shapes: logits (..., V), targets (...) of ids or ignore_index -> scalar, in nats
    Raises: ValueError for targets of another shape or an unknown reduction, IndexError for ids outside [0, V).
    Source: bridging §1.6.
    Differs: targets are already shifted (erratum 8); ``token-mean`` divides by the number of kept targets, or by
        ``divisor``, which is that number over the whole optimiser batch when this is one micro-batch of it.
    """
    ids, kept = kept_targets(logits, targets, ignore_index)
    safe = where(kept[..., None], logits, 0.0)  # what an ignored row holds, NaN included, has no effect
    terms = where(kept, -token_logprobs(safe, ids), 0.0)
    return terms.sum() * (1.0 / divisor_for(reduction, kept, divisor))
