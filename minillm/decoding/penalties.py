r"""Laws that depend on what was said before, or on how surprising a token is."""

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import require, require_positive
from minillm.decoding.samplers import keep_first, probabilities


def apply_penalties(
    logits: Float[np.ndarray, "*B V"],
    counts: Int[np.ndarray, "*B V"],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> Float[np.ndarray, "*B V"]:
    r"""Make tokens that were seen before less likely.

    Equation: `sample-penalties` repetition $z_v/\theta$ if $z_v>0$ else $\theta z_v$ for seen $v$; then frequency and presence $z_v-\alpha_fc_v-\alpha_p\mathbf 1\{c_v>0\}$
    Shapes: logits (..., V), counts (..., V) of each token so far -> (..., V)
    Raises: ValueError for counts of another shape or a repetition penalty that is not positive.
    Source: topics #9; Keskar et al. 2019.
    """
    require(counts.shape == logits.shape, "apply_penalties", "the counts", f"of shape {logits.shape}", counts)
    require_positive(repetition, "apply_penalties", "repetition")
    seen = counts > 0
    divided = np.where(logits > 0, logits / repetition, logits * repetition)
    penalised = np.where(seen, divided, logits) - frequency * counts - presence * seen
    return penalised.astype(logits.dtype)


def keep_typical(logits: Float[np.ndarray, "*B V"], mass: float) -> Float[np.ndarray, "*B V"]:
    r"""Exclude all but the tokens whose surprise is nearest to the expected one.

    Equation: `sample-penalties` typical: smallest set in order of $\lvert-\log p_v-\mathcal H(p)\rvert$ with mass $\ge\tau$
    Shapes: (..., V) -> (..., V), minus infinity where excluded; at least one is kept
    Raises: ValueError unless 0 < mass <= 1.
    Source: topics #9; Meister et al. 2023.
    """
    require(0 < mass <= 1, "keep_typical", "mass", "in (0, 1]", mass)
    if mass == 1:
        return logits
    p = probabilities(logits)
    surprise = -np.log(np.where(p > 0, p, 1))
    entropy = (p * surprise).sum(-1, keepdims=True)
    distance = np.where(p > 0, np.abs(surprise - entropy), np.inf)
    order = np.argsort(distance, axis=-1, kind="stable")
    sorted_p = np.take_along_axis(p, order, -1)
    before = sorted_p.cumsum(-1) - sorted_p
    return keep_first(logits, order, before < mass)
