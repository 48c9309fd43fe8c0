r"""What encoders learn from: tokens that were hidden, and tokens that were replaced."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import Tensor
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.softmax import log_softmax


class Corrupted(NamedTuple):
    """What the model reads, and which tokens it is asked for."""

    ids: Int[np.ndarray, "B L"]
    chosen: Bool[np.ndarray, "B L"]


def corrupt(
    ids: Int[np.ndarray, "B L"],
    mask_id: int,
    V: int,
    rng: np.random.Generator,
    *,
    rate: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
    special: Bool[np.ndarray, "B L"] | None = None,
) -> Corrupted:
    r"""Choose tokens to be predicted; most become [MASK], some any token, some stay.

    Equation: `mlm-loss` 15 % are chosen; of these 80 % become [MASK], 10 % a random token, 10 % stay
    Shapes: ids (B, L), special (B, L) or None -> ids (B, L), chosen (B, L)
    Raises: ValueError for shares outside [0, 1] or above 1 together, or ids that are not (B, L);
        IndexError for a mask token outside [0, V).
    Source: notes §8.1; Devlin et al. 2019.
    """
    ids = np.asarray(ids)
    fits = ids.ndim == 2 and np.issubdtype(ids.dtype, np.integer)
    require(fits, "corrupt", "the ids", "integers of shape (B, L)", ids)
    for what, share in (("rate", rate), ("masked", masked), ("replaced", replaced), ("the sum", masked + replaced)):
        require(0 <= share <= 1, "corrupt", what, "in [0, 1]", share)
    require(0 <= mask_id < V, "corrupt", "mask_id", f"in [0, {V})", mask_id, error=IndexError)
    fits = special is None or np.shape(special) == ids.shape
    require(fits, "corrupt", "special", f"of shape {ids.shape}", special)
    chosen = rng.random(ids.shape) < rate
    if special is not None:
        chosen &= ~np.asarray(special, bool)
    fate = rng.random(ids.shape)
    read = np.where(chosen & (fate < masked), mask_id, ids)
    other = chosen & (fate >= masked) & (fate < masked + replaced)
    return Corrupted(np.where(other, rng.integers(0, V, ids.shape), read), chosen)


def _example_mlm(rng):
    B, L, V = [(2, 3, 4), (1, 1, 2), (2, 1, 5)][rng.integers(3)]
    chosen = rng.random((B, L)) < 0.5
    chosen[0, 0] = True
    return (rng.normal(size=(B, L, V)), rng.integers(0, V, (B, L)), chosen), {}


@written("mlm_loss", example=_example_mlm)
def mlm_loss(
    logits: Float[Tensor, "B L V"], ids: Int[np.ndarray, "B L"], chosen: Bool[np.ndarray, "B L"]
) -> Float[Tensor, ""]:
    r"""Mean negative log-likelihood of the original tokens at the chosen places, and nowhere else.

    Equation: `mlm-loss` $-\frac1{|\mathcal M|}\sum_{t\in\mathcal M}\log p_\theta(x_t\mid\tilde{\mathbf x})$
    Shapes: logits (B, L, V), ids (B, L), chosen (B, L) -> ()
    Raises: ValueError for shapes that do not match. Nothing chosen gives 0.
    Source: notes §8.1; Devlin et al. 2019, Liu et al. 2019.
    """
    ids, chosen = np.asarray(ids), np.asarray(chosen)
    for what, given in (("the ids", ids), ("chosen", chosen)):
        require(given.shape == logits.shape[:2], "mlm_loss", what, f"of shape {logits.shape[:2]}", given)
    logp = log_softmax(logits).gather(-1, ids[..., None])[..., 0]  # (B, L)
    return -(logp * chosen.astype(logp.dtype)).sum() / float(max(1, chosen.sum()))


def _example_rtd(rng):
    shape = [(2, 3), (1, 1), (2, 1)][rng.integers(3)]
    real = rng.random(shape) < 0.7
    real[0, 0] = True
    kwargs: dict[str, Any] = {"real": real, "reduction": ["sum", "mean"][rng.integers(2)]}
    return (rng.normal(size=shape), rng.random(shape) < 0.3), kwargs


@written("replaced_token_loss", example=_example_rtd)
def replaced_token_loss(
    z: Float[Tensor, "B L"],
    replaced: Bool[np.ndarray, "B L"],
    real: Bool[np.ndarray, "B L"] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    r"""For every real token: was it there from the start? z is the logit of yes.

    Equation: `replaced-token-detection` $-\sum_t[\mathbf 1_{\rm orig}\log\sigma(z_t)+\mathbf 1_{\rm repl}\log(1-\sigma(z_t))]$
    Shapes: z (B, L), replaced (B, L), real (B, L) -> ()
    Raises: ValueError for shapes that do not match or an unknown reduction. No real token gives 0.
    Source: notes §8.1; Clark et al. 2020.
    Differs: the mean over real tokens by default; ``reduction="sum"`` is the formula as it stands.
    """
    require_one_of(reduction, ("mean", "sum"), "replaced_token_loss", "reduction")
    real = np.ones(z.shape, bool) if real is None else np.asarray(real)
    for what, given in (("replaced", np.asarray(replaced)), ("real", real)):
        require(given.shape == z.shape, "replaced_token_loss", what, f"of shape {z.shape}", given)
    sign = np.where(replaced, 1.0, -1.0).astype(z.dtype)
    losses = ops.logaddexp(z * sign, 0.0)  # -log sigma(z) = softplus(-z); -log(1 - sigma(z)) = softplus(z)
    total = (losses * real.astype(z.dtype)).sum()
    return total / float(max(1, real.sum())) if reduction == "mean" else total
