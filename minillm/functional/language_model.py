r"""The training objective of a causal language model, from its logits and the text itself."""

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.losses import cross_entropy
from minillm.functional.softmax import log_softmax


def _example(rng):
    return (2 * rng.normal(size=(2, 4, 5)), rng.integers(5, size=(2, 4))), {"bos": bool(rng.integers(2))}


@written("clm_loss", example=_example)
def clm_loss(
    logits: Float[Tensor, "B L V"], tokens: Int[np.ndarray, "B L"], *, bos: bool = False, reduction: str = "token-mean"
) -> Float[Tensor, ""]:
    r"""Mean negative log-likelihood of every token given those before it; to be minimised.

    Equation: `clm-loss` $-\frac1{L-1}\sum_{t=2}^L\log p_\theta(x_t\mid x_{<t})$, or $L$ terms with a BOS
    Shapes: logits (B, L, V), tokens (B, L) -> scalar, in nats
    Raises: ValueError if the shapes do not match or there is nothing to predict, IndexError for ids outside [0, V).
    Source: notes §10.1 (CLM); bridging §1.6.
    Differs: logits at position t score token t + 1, which leaves L - 1 terms (erratum 52).

    Without BOS the logits are those of the tokens. With ``bos`` they are those of the text that starts with BOS and
    lacks the last token, so that the first token is predicted too.
    """
    fits = logits.shape[:2] == tokens.shape and tokens.shape[1] >= (1 if bos else 2)
    wanted = f"of shape {logits.shape[:2]}, with at least {1 if bos else 2} along the last axis"
    require(fits, "clm_loss", "the tokens", wanted, tokens)
    if bos:
        return cross_entropy(logits, tokens, reduction=reduction)
    return cross_entropy(logits[:, :-1], tokens[:, 1:], reduction=reduction)


@written("clm_one_hot", example=lambda rng: (_example(rng)[0], {}))
def clm_one_hot(logits: Float[Tensor, "B L V"], tokens: Int[np.ndarray, "B L"]) -> Float[Tensor, ""]:
    r"""The same loss with a BOS, as cross-entropy between one-hot targets and predictions.

    Equation: `clm-one-hot` $-\frac1L\sum_t\sum_v(\mathbf x'_t)_v\log p_\theta(v\mid x_{<t})$
    Shapes: logits (B, L, V), tokens (B, L) -> scalar, in nats
    Source: notes §10.1.
    """
    one_hot = np.eye(logits.shape[-1], dtype=logits.dtype)[tokens]  # (B, L, V)
    return -(one_hot * log_softmax(logits)).sum() * (1.0 / max(tokens.size, 1))


@written("mle_objective", example=_example)
def mle_objective(
    logits: Float[Tensor, "B L V"], tokens: Int[np.ndarray, "B L"], *, bos: bool = False
) -> Float[Tensor, ""]:
    r"""Negative log-likelihood of all sequences together; to be minimised.

    Equation: `mle-objective` $\min_\theta-\sum_{\mathbf x\in\mathcal D}\log p_\theta(\mathbf x)$
    Shapes: logits (B, L, V), tokens (B, L) -> scalar, in nats
    Raises: ValueError if the shapes do not match, IndexError for ids outside [0, V).
    Source: bridging §5.
    """
    return clm_loss(logits, tokens, bos=bos, reduction="sum")
