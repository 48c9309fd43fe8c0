r"""Affine maps and table look-ups as written."""

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require


def check_linear(x, w, b=None) -> None:
    """Refuse a weight or bias that does not fit the last axis of x."""
    require(w.ndim == 2, "linear", "the weight", "of shape (d_out, d_in)", w)
    require(
        x.ndim >= 1 and x.shape[-1] == w.shape[1],
        "linear",
        "the last axis of x",
        f"d_in = {w.shape[1]} long, as the weight {tuple(w.shape)} wants",
        x,
        "Weights are stored (d_out, d_in).",
    )
    if b is not None:
        require(b.shape == (w.shape[0],), "linear", "the bias", f"of shape ({w.shape[0]},)", b)


def check_ids(where: str, ids, rows: int) -> np.ndarray:
    """Refuse token ids that are not integers in [0, rows), naming the offender; return them as an array."""
    ids = ids.data if isinstance(ids, Tensor) else np.asarray(ids)
    require(ids.dtype.kind in "iu", where, "the ids", "integers", ids, error=TypeError)
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        bad = ids[(ids < 0) | (ids >= rows)].flat[0]
        raise IndexError(
            f"{where}: ids must be in [0, {rows}), got {bad}. Was the text encoded with another tokenizer?"
        )
    return ids


def _example(rng):
    shape = [(2, 3, 4), (5, 4), (4,), (0, 4)][rng.integers(4)]
    bias = (rng.normal(size=3),) if rng.integers(2) else ()
    return (rng.normal(size=shape), rng.normal(size=(3, 4)), *bias), {}


@written("linear", example=_example)
def linear(
    x: Float[Tensor, "*B d_in"], w: Float[Tensor, "d_out d_in"], b: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*B d_out"]:
    r"""Affine map of the last axis.

    Equation: `linear-layer` $\mathrm{Linear}(\mathbf x)=\mathbf W\mathbf x+\mathbf b$, batched $\mathbf X\mathbf W^\top+\mathbf b$
    Shapes: x (..., d_in), w (d_out, d_in), b (d_out,) -> (..., d_out)
    Raises: ValueError if the widths do not match.
    Source: bridging §1.3.
    """
    check_linear(x, w, b)
    y = x @ w.T
    return y if b is None else y + b


@written("embedding", example=lambda rng: ((rng.integers(5, size=(2, 3)), rng.normal(size=(5, 4))), {}))
def embedding(ids: Int[np.ndarray, "*B"] | Tensor, w: Float[Tensor, "V d"]) -> Float[Tensor, "*B d"]:
    r"""Look up the rows of a table; the gradient adds up over repeated ids.

    Equation: `token-embedding` $\mathbf X=\mathbf W_{\rm emb}[\mathrm{ids}]$
    Shapes: ids (...) of integers in [0, V), w (V, d_model) -> (..., d_model)
    Raises: TypeError if ids are not integers, IndexError if one is out of range.
    Source: lecture06 (Embeddings).
    """
    return w[check_ids("embedding", ids, w.shape[0])]


@written(
    "embedding_by_product", example=lambda rng: ((np.eye(5)[rng.integers(5, size=(2, 3))], rng.normal(size=(5, 4))), {})
)
def embedding_by_product(onehot: Float[Tensor, "*B V"], w: Float[Tensor, "V d"]) -> Float[Tensor, "*B d"]:
    r"""The look-up seen as a matrix product: a one-hot row picks a row.

    Equation: `embedding-as-onehot-matmul` $e_x^\top\mathbf W_{\rm emb}$
    Shapes: onehot (..., V), w (V, d_model) -> (..., d_model)
    Source: lecture06 (Embeddings); notes §1.2.
    """
    return onehot @ w
