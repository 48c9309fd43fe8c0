r"""Affine maps and table look-ups with hand-derived gradients."""

import numpy as np

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.functional.linear import check_ids, check_linear


@derived("linear")
def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None):
    r"""Affine map of the last axis.

    From $y_{ni}=\sum_jx_{nj}W_{ij}+b_i$: $\bar x=\bar y\,W$, $\bar W=\bar y^\top x$, $\bar b=\sum_n\bar y_n$.

    Equation: `linear-layer` $\mathbf X\mathbf W^\top+\mathbf b$
    Shapes: x (..., d_in), w (d_out, d_in), b (d_out,) -> (..., d_out); keeps x.
    Raises: ValueError if the widths do not match.
    Source: bridging §1.3.
    """
    check_linear(x, w, b)
    rows = x.reshape(-1, x.shape[-1])
    y = np.matmul(rows, w.T, out=scratch.empty((len(rows), len(w)), x.dtype))
    if b is not None:
        y += b

    def vjp(dy):
        dy = dy.reshape(-1, len(w))
        dx = np.matmul(dy, w, out=scratch.empty(rows.shape, x.dtype)).reshape(x.shape)
        dw = np.matmul(dy.T, rows, out=scratch.empty(w.shape, x.dtype))
        return (dx, dw) if b is None else (dx, dw, np.ones(len(dy), x.dtype) @ dy)

    return y.reshape(*x.shape[:-1], len(w)), vjp


@derived("embedding")
def embedding(ids: np.ndarray, w: np.ndarray):
    r"""Look up the rows of a table.

    $\bar W_v=\sum_{n:\,\mathrm{ids}_n=v}\bar y_n$: a scatter-add. Sorting the ids brings equal ones together, so that
    one segmented sum does it, which is several times faster than adding row by row.

    Equation: `token-embedding` $\mathbf X=\mathbf W_{\rm emb}[\mathrm{ids}]$
    Shapes: ids (...), w (V, d_model) -> (..., d_model); keeps the ids.
    Raises: TypeError if ids are not integers, IndexError if one is out of range.
    Source: lecture06 (Embeddings).
    """
    ids = check_ids("embedding", ids, len(w))
    if w.flags.c_contiguous:
        y = np.take(w, ids, axis=0, out=scratch.empty((*ids.shape, w.shape[1]), w.dtype), mode="clip")
    else:  # a table laid out for generation, of which `take` would make a whole copy
        y = w[ids]

    def vjp(dy):
        dw = np.zeros_like(w)
        if ids.size:
            order = np.argsort(ids, axis=None, kind="stable")
            ranked = ids.reshape(-1)[order]
            starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
            dw[ranked[starts]] = np.add.reduceat(dy.reshape(-1, w.shape[1])[order], starts, axis=0)
        return None, dw

    return y, vjp
