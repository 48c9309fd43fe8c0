r"""One vector for a whole sequence, and what encoders are asked: a class, a number, a label per token, a span, a match."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.linear import linear


def _real(where: str, H: Tensor, real: Any) -> np.ndarray:
    """The mask of real tokens, (B, L), with at least one in each row."""
    require(H.ndim == 3, where, "H", "of shape (B, L, d)", H)
    if real is None:
        return np.ones(H.shape[:2], bool)
    real = np.asarray(real)
    fits = real.dtype == bool and real.shape == H.shape[:2]
    require(fits, where, "the mask of real tokens", f"boolean of shape {H.shape[:2]}", real)
    require(bool(real.any(1).all()), where, "every sequence", "at least one real token long", "one of padding only")
    return real


def _example(rng):
    shape = [(2, 3, 4), (1, 1, 2), (3, 2, 1)][rng.integers(3)]
    real = rng.random(shape[:2]) < 0.6
    real[:, 0] = True
    return (rng.normal(size=shape),), {"real": real}


@written("cls_pooling", example=lambda rng: (_example(rng)[0], {}))
def cls_pooling(H: Float[Tensor, "B L d"]) -> Float[Tensor, "B d"]:
    r"""The vector of the first token, [CLS].

    Equation: `cls-pooling` $h=\mathbf H[:,0]$
    Shapes: H (B, L, d) -> (B, d)
    Raises: ValueError unless H is (B, L, d) with L >= 1.
    Source: notes §8.1, footnote 7.
    """
    require(H.ndim == 3 and H.shape[1] > 0, "cls_pooling", "H", "of shape (B, L, d) with L >= 1", H)
    return H[:, 0]


@written("mean_pooling", example=_example)
def mean_pooling(H: Float[Tensor, "B L d"], real: Bool[np.ndarray, "B L"] | None = None) -> Float[Tensor, "B d"]:
    r"""The mean of the real tokens' vectors.

    Equation: `encoder-heads` retrieval: $h=\frac1{\sum_tm_t}\sum_tm_t\mathbf H[:,t]$
    Shapes: H (B, L, d), real (B, L) -> (B, d)
    Raises: ValueError for a mask of another shape, or a sequence without a real token.
    Source: notes §8.1.
    """
    real = _real("mean_pooling", H, real)
    share = (real / real.sum(1, keepdims=True))[..., None].astype(H.dtype)  # (B, L, 1)
    return (H * share).sum(1)


@written("last_pooling", example=_example)
def last_pooling(H: Float[Tensor, "B L d"], real: Bool[np.ndarray, "B L"] | None = None) -> Float[Tensor, "B d"]:
    r"""The vector of the last real token, the only one that has seen everything in a causal model.

    Equation: `encoder-heads` $h=\mathbf H[:,\max\{t:m_t=1\}]$
    Shapes: H (B, L, d), real (B, L) -> (B, d)
    Raises: ValueError for a mask of another shape, or a sequence without a real token.
    Source: notes §8.1.
    """
    real = _real("last_pooling", H, real)
    last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
    chosen = np.broadcast_to(last[:, None, None], (H.shape[0], 1, H.shape[2]))
    return H.gather(1, chosen)[:, 0]


def _example_span(rng):
    (H,), _ = _example(rng)  # without padding: beside a score of -1e9 a finite difference has no digits left
    return (H, rng.normal(size=(2, H.shape[2])), rng.normal(size=2)), {}


@written("span_logits", example=_example_span)
def span_logits(
    H: Float[Tensor, "B L d"],
    w: Float[Tensor, "2 d"],
    b: Float[Tensor, " 2"] | None = None,
    real: Bool[np.ndarray, "B L"] | None = None,
) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    r"""Scores of every token for being the first and the last of an answer; padding is out of the question.

    Equation: `encoder-heads` span: start and end are softmaxes over the positions of $\mathbf H\mathbf W^\top$
    Shapes: H (B, L, d), w (2, d), b (2,), real (B, L) -> start (B, L), end (B, L)
    Raises: ValueError for a weight that is not (2, d), or a mask of another shape.
    Source: notes §8.1; Devlin et al. 2019.
    """
    require(w.shape == (2, H.shape[-1]), "span_logits", "the weight", f"of shape (2, {H.shape[-1]})", w)
    hidden = ~_real("span_logits", H, real)
    both = linear(H, w, b)  # (B, L, 2)
    return both[..., 0].masked_fill(hidden, -1e9), both[..., 1].masked_fill(hidden, -1e9)


@written(
    "cosine_scores",
    example=lambda rng: ((rng.normal(size=(3, 4)), rng.normal(size=([1, 2, 5][rng.integers(3)], 4))), {}),
)
def cosine_scores(q: Float[Tensor, "N d"], documents: Float[Tensor, "M d"], eps: float = 1e-12) -> Float[Tensor, "N M"]:
    r"""How alike each query and each document point.

    Equation: `encoder-heads` retrieval: $\cos(q,d)=\frac{q^\top d}{\lVert q\rVert\lVert d\rVert}$
    Shapes: q (N, d), documents (M, d) -> (N, M)
    Raises: ValueError if the widths differ.
    Source: notes §8.1.
    """
    fits = q.ndim == documents.ndim == 2 and q.shape[1] == documents.shape[1]
    require(fits, "cosine_scores", "the documents", f"of shape (M, {q.shape[-1]})", documents)

    def unit(x: Tensor) -> Tensor:
        return x / ((x * x).sum(-1, keepdims=True) + eps).sqrt()

    return unit(q) @ unit(documents).T
