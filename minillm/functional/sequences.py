r"""Exact sums over all sequences of a tiny vocabulary: what sampling estimates."""

import itertools

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.information import kl_token_exact
from minillm.functional.softmax import log_softmax

MOST_SEQUENCES = 1_000_000


def all_sequences(vocabulary: int, length: int) -> Int[np.ndarray, "n L"]:
    r"""Every sequence of a fixed length, in lexicographic order.

    Equation: `chain-rule-sequence` $\sum_{\mathbf x}\prod_tp_\theta(x_t\mid x_{<t})=1$ over these
    Shapes: -> (V^L, L)
    Raises: ValueError if there are more than a million.
    Source: bridging §1.
    """
    require_positive(vocabulary, "all_sequences", "vocabulary", integer=True)
    require_positive(length, "all_sequences", "length", integer=True, zero_ok=True)
    fits = vocabulary**length <= MOST_SEQUENCES
    require(fits, "all_sequences", "V^L", f"at most {MOST_SEQUENCES}", vocabulary**length, "Sample instead.")
    rows = list(itertools.product(range(vocabulary), repeat=length))
    return np.array(rows, dtype=np.int64).reshape(len(rows), length)


def _example(rng):
    ids = all_sequences(2, 2)
    first, second = rng.normal(size=2), rng.normal(size=(2, 2))
    log_p = np.stack([np.broadcast_to(first, (4, 2)), second[ids[:, 0]]], axis=1)  # (4, 2, 2)
    return (log_p, rng.normal(size=log_p.shape), ids), {"per_token": bool(rng.integers(2))}


@written("sequence_kl", example=_example)
def sequence_kl(
    logits: Float[Tensor, "n L V"],
    ref_logits: Float[Tensor, "n L V"],
    ids: Int[np.ndarray, "n L"],
    per_token: bool = False,
) -> Float[Tensor, ""]:
    r"""Divergence of two laws over sequences, from their next-token logits along every sequence.

    The sampled form averages summed log-ratios of the tokens taken; ``per_token`` averages summed exact
    divergences of the next-token laws. The values are equal. So are the gradients, as long as the prefix law
    is differentiated too, as it is here.

    Equation: `kl-chain-rule` $\mathbb E_{y\sim\pi_\theta}\big[\sum_t\log\frac{\pi_\theta(y_t\mid
        s_t)}{\pi_{\rm ref}(y_t\mid s_t)}\big]=\mathbb E_{y\sim\pi_\theta}\big[\sum_tD_{\rm
        KL}(\pi_\theta(\cdot\mid s_t)\Vert\pi_{\rm ref}(\cdot\mid s_t))\big]$
    Shapes: logits (n, L, V) for all n sequences, ids (n, L) -> scalar
    Raises: ValueError if the shapes do not match.
    Source: notes §10.5.
    """
    fits = logits.shape == ref_logits.shape and ids.shape == logits.shape[:2]
    require(
        fits,
        "sequence_kl",
        "ref_logits and ids",
        f"of shapes {logits.shape} and {logits.shape[:2]}",
        ref_logits,
    )
    taken = log_softmax(logits).gather(-1, ids[..., None]).squeeze(-1)  # (n, L)
    taken_ref = log_softmax(ref_logits).gather(-1, ids[..., None]).squeeze(-1)
    per_sequence = kl_token_exact(logits, ref_logits).sum(-1) if per_token else (taken - taken_ref).sum(-1)  # (n,)
    return (taken.sum(-1).exp() * per_sequence).sum()
