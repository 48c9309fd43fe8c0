r"""Supervised fine-tuning: the likelihood of demonstrations, prompts left out."""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.functional.frozen import Array
from minillm.functional.likelihood import nll_loss


def _example(rng: np.random.Generator) -> tuple[tuple, dict]:
    shape = [(3, 4), (2, 1), (1, 5)][rng.integers(3)]
    reduction = ["seq-mean", "token-mean", "seq-sum"][rng.integers(3)]
    return (rng.normal(size=shape), rng.random(shape) < 0.7), {"reduction": reduction}


@written("sft_loss", example=_example)
def sft_loss(
    token_logprobs: Float[Array, "B T"], completion_mask: Any, reduction: str = "seq-mean", **options: Any
) -> Float[Tensor, ""]:
    r"""Negative log-likelihood of the completions, given their prompts; to be minimised.

    ``reduction="seq-sum"`` weighs every token alike within one response, so that long responses weigh more;
    ``"seq-mean"`` weighs every response alike; ``"token-mean"`` weighs every token of the batch alike.

    Equation: `sft-loss` $-\frac1{L_y}\sum_t\log p_\theta(y_t\mid y_{<t},\mathbf p)$ (`seq-mean`)
    Equation: `sft-argmin` $\theta_{\rm SFT}=\arg\min\mathbb E[-\log\pi_\theta(y^*\mid x)]$, a sum over tokens (`seq-sum`)
    Shapes: token_logprobs (B, T), completion_mask (B, T), false on prompts and padding -> scalar, in nats
    Raises: ValueError for an unknown reduction or a mask of another shape.
    Source: notes §10.3, §10.5 (stage 1); deepseek (SFT, the fine print).
    Differs: the sources divide by the length of the text, by that of the answer, or by nothing (errata 2 and 53).
    """
    return nll_loss(token_logprobs, completion_mask, reduction, **options)
