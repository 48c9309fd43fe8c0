r"""Normalisation with hand-derived gradients."""

import numpy as np

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.checks import require
from minillm.functional.norms import check_gain


def _row_sums(a: np.ndarray) -> np.ndarray:
    """Sums over the last axis of a matrix, as a product with ones: several times faster than ``sum(-1)``."""
    return a @ np.ones(a.shape[-1], a.dtype)


@derived("rms_norm")
def rms_norm(x: np.ndarray, g: np.ndarray, eps: float = 1e-6):
    r"""Divide by the root mean square of the last axis and multiply by a gain.

    With $\rho=1/\sqrt{\frac1d\sum_jx_j^2+\varepsilon_0}$ and $\hat x=\rho x$, $y=g\odot\hat x$.
    Since $\partial\rho/\partial x_j=-\rho^3x_j/d$, a cotangent $\bar y$ with $\hat g=g\odot\bar y$ gives
    $\bar x=\rho\,(\hat g-\hat x\,\frac1d\sum_j\hat g_j\hat x_j)$ and $\bar g=\sum_{\rm rows}\bar y\odot\hat x$.

    Equation: `rmsnorm` $\mathbf g\odot\mathbf x\,/\sqrt{\frac1d\sum_i x_i^2+\varepsilon_0}$
    Shapes: x (..., d), g (d,) -> (..., d); keeps x and $\rho$ (..., 1).
    Raises: ValueError if g is not (d,).
    Source: lecture06 (RMSNorm); notes §5.2.
    """
    check_gain("rms_norm", x, g)
    y, rho = _normalise(x.reshape(-1, x.shape[-1]), g, eps)

    def vjp(dy):
        rows = x.reshape(-1, x.shape[-1])
        dx, dg = _pull_normalise(dy.reshape(rows.shape), rows, rho, g)
        return dx.reshape(x.shape), dg

    return y.reshape(x.shape), vjp


@derived("add_rms_norm")
def add_rms_norm(x: np.ndarray, r: np.ndarray, g: np.ndarray, eps: float = 1e-6):
    r"""Add a branch to the residual stream and normalise the sum: $s=x+r$, $y=\mathrm{RMSNorm}(s)$.

    Both results are used, so $\bar s$ receives two shares: $\bar x=\bar r=\bar s+\bar s_{\rm norm}$, the
    second as in `rms_norm`.

    Equation: `pre-ln` $s=\mathbf x+\mathbf r,\ y=\mathrm{RMSNorm}(s)$
    Shapes: x (..., d), r (..., d), g (d,) -> s (..., d), y (..., d); keeps s and $\rho$.
    Raises: ValueError if x and r differ in shape or g is not (d,).
    Source: notes §4.7 and §8.
    """
    require(x.shape == r.shape, "add_rms_norm", "the branch r", f"of the stream's shape {x.shape}", r)
    check_gain("add_rms_norm", x, g)
    s = np.add(x, r, out=scratch.empty_like(x))
    rows = s.reshape(-1, s.shape[-1])
    y, rho = _normalise(rows, g, eps)

    def vjp(ds, dy):
        if dy is None:
            return ds, ds, np.zeros_like(g)
        total, dg = _pull_normalise(dy.reshape(rows.shape), rows, rho, g)
        if ds is not None:
            total += ds.reshape(rows.shape)
        total = total.reshape(x.shape)
        return total, total, dg

    return (s, y.reshape(x.shape)), vjp


def _normalise(rows: np.ndarray, g: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """y = g x rho and rho = 1 / rms for a matrix of rows."""
    y = np.multiply(rows, rows, out=scratch.empty_like(rows))
    rho = 1.0 / np.sqrt(_row_sums(y) / rows.dtype.type(rows.shape[-1]) + rows.dtype.type(eps))  # (N,)
    np.multiply(rows, rho[:, None], out=y)
    y *= g
    return y, rho


def _pull_normalise(dy: np.ndarray, rows: np.ndarray, rho: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The VJP of `_normalise`; returns a fresh dx that the caller may write to, and dg."""
    d = rows.dtype.type(rows.shape[-1])
    x_hat = np.multiply(rows, rho[:, None], out=scratch.empty_like(rows))
    dx = np.multiply(dy, x_hat, out=scratch.empty_like(rows))
    dg = np.ones(len(rows), rows.dtype) @ dx  # (d,)
    projection = dx @ g / d  # (N,): the mean of g dy x_hat
    x_hat *= projection[:, None]
    np.multiply(dy, g, out=dx)
    dx -= x_hat
    dx *= rho[:, None]
    return dx, dg


@derived("layer_norm")
def layer_norm(x: np.ndarray, g: np.ndarray, b: np.ndarray, eps: float = 1e-5):
    r"""Centre the last axis, divide by its standard deviation, then scale and shift.

    With $\hat x=(x-\mu)/\sqrt{s^2+\varepsilon_0}$ and $\hat g=g\odot\bar y$, both $\mu$ and $s$ depend on every $x_j$;
    collecting the three paths gives the formula below. Bars over a vector are means over the last axis.

    Equation: `layernorm` $\mathbf g\odot\hat x+\mathbf b$
    Equation: `layernorm-backward` $\bar x=\frac1{\sqrt{s^2+\varepsilon_0}}(\hat g-\overline{\hat g}-\hat x\,\overline{\hat g\odot\hat x})$
    Shapes: x (..., d), g (d,), b (d,) -> (..., d); keeps $\hat x$ and $1/\sqrt{s^2+\varepsilon_0}$.
    Raises: ValueError if g or b is not (d,).
    Source: bridging §1.4; topics #21.
    """
    check_gain("layer_norm", x, g)
    check_gain("layer_norm", x, b, "the shift b")
    d = x.dtype.type(x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    x_hat = np.subtract(rows, (_row_sums(rows) / d)[:, None], out=scratch.empty_like(rows))
    y = np.multiply(x_hat, x_hat, out=scratch.empty_like(rows))
    inverse = 1.0 / np.sqrt(_row_sums(y) / d + x.dtype.type(eps))  # (N,)
    x_hat *= inverse[:, None]
    np.multiply(x_hat, g, out=y)
    y += b

    def vjp(dy):
        dy = dy.reshape(rows.shape)
        dx = np.multiply(dy, x_hat, out=scratch.empty_like(rows))
        ones = np.ones(len(rows), rows.dtype)
        dg, db = ones @ dx, ones @ dy  # (d,)
        projection = dx @ g / d  # (N,)
        np.multiply(dy, g, out=dx)
        mean = _row_sums(dx) / d  # (N,)
        dx -= mean[:, None]
        dx -= x_hat * projection[:, None]
        dx *= inverse[:, None]
        return dx.reshape(x.shape), dg, db

    return y.reshape(x.shape), vjp
