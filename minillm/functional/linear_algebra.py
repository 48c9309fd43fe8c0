r"""Matrices taken apart and put together: the identities that the rest of the course leans on."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive


def _example_matrix(rng):
    return (rng.normal(size=[(3, 2), (2, 4), (1, 1), (1, 3), (0, 2)][rng.integers(5)]),), {}


@written("column_decomposition", example=_example_matrix)
def column_decomposition(A: Float[Tensor, "m n"]) -> Float[Tensor, "n m n"]:
    r"""Take a matrix apart into its columns, each put back in its place by a unit row.

    Equation: `column-decomposition` $\mathbf A=\sum_{j=1}^n\mathbf A_{:j}e_j^\top$
    Shapes: A (m, n) -> (n, m, n), the terms; their sum over the first axis is A exactly
    Raises: ValueError if A is not a matrix.
    Source: notes §1.1.
    Differs: a sum of n terms of rank at most 1, which the source calls a rank 1 decomposition (erratum 1).
    """
    require(A.ndim == 2, "column_decomposition", "A", "a matrix", A)
    basis = np.eye(A.shape[1], dtype=A.dtype)  # (n, n), row j is the unit vector j
    return A.T.unsqueeze(-1) * basis[:, None, :]  # (n, m, n)


@written("row_decomposition", example=_example_matrix)
def row_decomposition(A: Float[Tensor, "m n"]) -> Float[Tensor, "m m n"]:
    r"""Take a matrix apart into its rows, each put back in its place by a unit column.

    Equation: `row-decomposition` $\mathbf A=\sum_{i=1}^me_i\mathbf A_{i:}$, the rows $\mathbf A_{i:}$ as rows
    Shapes: A (m, n) -> (m, m, n), the terms; their sum over the first axis is A exactly
    Raises: ValueError if A is not a matrix.
    Source: notes §1.2.
    Differs: no transpose, since a row is a row already (erratum 1).
    """
    require(A.ndim == 2, "row_decomposition", "A", "a matrix", A)
    basis = np.eye(A.shape[0], dtype=A.dtype)  # (m, m), column i is the unit vector i
    return A.unsqueeze(1) * basis[:, :, None]  # (m, m, n)


def _example_gemm(rng):
    m, p, n = [(2, 3, 2), (1, 2, 3), (3, 1, 1)][rng.integers(3)]
    args = (rng.normal(size=(m, p)), rng.normal(size=(p, n)), rng.normal(size=(m, n)))
    return args, {"alpha": float(rng.normal()), "beta": [0.0, 0.5][rng.integers(2)]}


@written("gemm", example=_example_gemm)
def gemm(
    A: Float[Tensor, "m p"],
    B: Float[Tensor, "p n"],
    C: Float[Tensor, "m n"] | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Float[Tensor, "m n"]:
    r"""General matrix product: scaled product plus scaled matrix.

    Equation: `gemm` $\mathbf D=\alpha\,\mathbf A\mathbf B+\beta\,\mathbf C$
    Shapes: A (m, p), B (p, n), C (m, n) -> (m, n); with beta 0 C is not read, as in BLAS
    Raises: ValueError if the shapes do not match.
    Source: notes §7.
    """
    fits = A.ndim == 2 and B.ndim == 2 and A.shape[1] == B.shape[0]
    require(fits, "gemm", "A and B", "of shapes (m, p) and (p, n)", f"shapes {A.shape} and {B.shape}")
    product = (A @ B) * alpha
    if C is None or beta == 0:
        return product
    require(C.shape == product.shape, "gemm", "C", f"of shape {product.shape}", C)
    return product + C * beta


def _example_projection(rng):
    B, L = [(2, 3), (1, 4), (3, 1), (0, 2)][rng.integers(4)]
    return (rng.normal(size=(B, L, 4)), rng.normal(size=(4, 3))), {}


@written("project_batch", example=_example_projection)
def project_batch(X: Float[Tensor, "B L d_in"], W: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "B L d_out"]:
    r"""Project every position of every sequence by one shared matrix, in one product.

    Equation: `batched-matmul` $\mathbf Q_b=\mathbf X_b\mathbf W_q\ \forall b\in[B]$
    Shapes: X (B, L, d_in), W (d_in, d_out) -> (B, L, d_out)
    Raises: ValueError if the widths do not match.
    Source: notes §4.1.
    """
    fits = X.ndim == 3 and W.ndim == 2 and X.shape[-1] == W.shape[0]
    shapes = f"shapes {X.shape} and {W.shape}"
    require(fits, "project_batch", "X and W", "of shapes (B, L, d_in) and (d_in, d_out)", shapes)
    B, L, d_in = X.shape
    return (X.reshape(B * L, d_in) @ W).reshape(B, L, W.shape[1])


def _example_split(rng):
    H, d_head = [(2, 3), (1, 2), (4, 1)][rng.integers(3)]
    return (rng.normal(size=([2, 0][rng.integers(2)], 3, H * d_head)),), {"H": H}


@written("split_heads", example=_example_split)
def split_heads(X: Float[Tensor, "B L width"], H: int) -> Float[Tensor, "B H L d_head"]:
    r"""Give every head its slice of the width, with the head in front of the position.

    Equation: `head-split-merge` $(B,L,Hd_{\rm head})\to(B,L,H,d_{\rm head})\to(B,H,L,d_{\rm head})$
    Shapes: X (B, L, H d_head) -> (B, H, L, d_head); head h reads the columns from h d_head to (h+1) d_head
    Raises: ValueError if the width is not a multiple of H.
    Source: notes §4.1.
    """
    require_positive(H, "split_heads", "H", integer=True)
    require(X.ndim == 3 and X.shape[-1] % H == 0, "split_heads", "X", f"(B, L, H d_head) with H = {H}", X)
    B, L, width = X.shape
    return X.reshape(B, L, H, width // H).transpose(1, 2)  # (B, H, L, d_head)


@written("merge_heads", example=lambda rng: ((rng.normal(size=(2, 2, 3, 4)),), {}))
def merge_heads(X: Float[Tensor, "B H L d_head"]) -> Float[Tensor, "B L width"]:
    r"""Put the heads side by side again: the exact inverse of `split_heads`.

    Equation: `head-split-merge` $(B,H,L,d_{\rm head})\to(B,L,H,d_{\rm head})\to(B,L,Hd_{\rm head})$
    Shapes: X (B, H, L, d_head) -> (B, L, H d_head)
    Raises: ValueError if X does not have four axes.
    Source: notes §4.1.
    """
    require(X.ndim == 4, "merge_heads", "X", "of shape (B, H, L, d_head)", X)
    B, H, L, d_head = X.shape
    return X.transpose(1, 2).reshape(B, L, H * d_head)


class AffineMap(NamedTuple):
    """A weight (d_out, d_in) and a bias (d_out,)."""

    W: Tensor
    b: Tensor


def _example_collapse(rng):
    d_in, d_mid, d_out = [(3, 2, 4), (2, 3, 1), (1, 1, 2)][rng.integers(3)]
    shapes = [(d_out, d_mid), (d_out,), (d_mid, d_in), (d_mid,)]
    return tuple(rng.normal(size=shape) for shape in shapes), {}


@written("linear_collapse", example=_example_collapse)
def linear_collapse(
    W_2: Float[Tensor, "d_out d_mid"],
    b_2: Float[Tensor, " d_out"],
    W_1: Float[Tensor, "d_mid d_in"],
    b_1: Float[Tensor, " d_mid"],
) -> AffineMap:
    r"""The one affine map that two of them in a row amount to, which is why networks need activations.

    Equation: `linear-collapse` $\mathbf W_2(\mathbf W_1\mathbf x+\mathbf b_1)+\mathbf b_2=(\mathbf W_2\mathbf W_1)\mathbf x+(\mathbf W_2\mathbf b_1+\mathbf b_2)$
    Shapes: W_2 (d_out, d_mid), b_2 (d_out,), W_1 (d_mid, d_in), b_1 (d_mid,) -> (d_out, d_in) and (d_out,);
        the rank of the product is at most min(d_out, d_mid, d_in)
    Raises: ValueError if the maps do not fit together.
    Source: topics #4; notes §8.6.
    """
    fits = W_1.ndim == 2 and W_2.ndim == 2 and W_2.shape[1] == W_1.shape[0]
    shapes = f"shapes {W_2.shape} and {W_1.shape}"
    require(fits, "linear_collapse", "W_2 and W_1", "of shapes (d_out, d_mid) and (d_mid, d_in)", shapes)
    require(b_1.shape == W_1.shape[:1], "linear_collapse", "b_1", f"of shape {W_1.shape[:1]}", b_1)
    require(b_2.shape == W_2.shape[:1], "linear_collapse", "b_2", f"of shape {W_2.shape[:1]}", b_2)
    return AffineMap(W_2 @ W_1, W_2 @ b_1 + b_2)
