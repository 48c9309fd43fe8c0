r"""GELU and gated linear units with hand-derived gradients, computed in row chunks that stay in the cache."""

import numpy as np
import scipy.special

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.functional.activations import split_gate

CHUNK = 1 << 17  # elements: 512 KiB of float32 per operand


def row_chunks(n_rows: int, width: int) -> list[slice]:
    """Slices of rows of about CHUNK elements each."""
    step = max(1, CHUNK // max(width, 1))
    return [slice(i, i + step) for i in range(0, n_rows, step)]


def _sigmoid(z: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The logistic function, 1 / (1 + exp(-z)); an overflow of exp gives its right limit, 0."""
    np.negative(z, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)


@derived("swiglu")
def swiglu(h: np.ndarray):
    r"""Gated linear unit with SiLU on the gate.

    With $\sigma=\sigma(z)$ and $y=v\,z\sigma$: $\bar v=\bar y\,z\sigma$ and
    $\bar z=\bar y\,v\,(\sigma+z\sigma(1-\sigma))$.

    Equation: `swiglu` $y=v\odot z\,\sigma(z)$ on [v; z]
    Shapes: h (..., 2 d_ff) -> (..., d_ff); keeps h and the logistic function of the gate.
    Raises: ValueError for an odd last axis.
    Source: lecture06 (SwiGLU); notes §8.7.
    """
    value, gate = split_gate("swiglu", h.reshape(-1, h.shape[-1]))
    y, sigma = scratch.empty(value.shape, h.dtype), scratch.empty(value.shape, h.dtype)
    chunks = row_chunks(*value.shape)
    for rows in chunks:
        _sigmoid(gate[rows], out=sigma[rows])
        np.multiply(sigma[rows], gate[rows], out=y[rows])
        y[rows] *= value[rows]

    def vjp(dy):
        dy = dy.reshape(value.shape)
        dh = scratch.empty((len(dy), h.shape[-1]), h.dtype)
        dvalue, dgate = dh[:, : value.shape[1]], dh[:, value.shape[1] :]
        for rows in chunks:
            z, v, dv, dz = gate[rows], value[rows], dvalue[rows], dgate[rows]
            act = np.multiply(z, sigma[rows], out=scratch.empty(z.shape, h.dtype))
            np.multiply(dy[rows], act, out=dv)
            # The slope of the activation, sigma + act (1 - sigma), as sigma (1 - act) + act:
            np.subtract(1, act, out=dz)
            dz *= sigma[rows]
            dz += act
            dz *= v
            dz *= dy[rows]
        return dh.reshape(h.shape)

    return y.reshape(*h.shape[:-1], -1) if h.size else np.zeros((*h.shape[:-1], h.shape[-1] // 2), h.dtype), vjp


@derived("geglu")
def geglu(h: np.ndarray):
    r"""Gated linear unit with GELU on the gate.

    With the Gaussian distribution function $\Phi$ and density $\varphi$: $\bar v=\bar y\,z\Phi(z)$ and
    $\bar z=\bar y\,v\,(\Phi(z)+z\varphi(z))$.

    Equation: `geglu` $y=v\odot z\,\Phi(z)$ on [v; z]
    Shapes: h (..., 2 d_ff) -> (..., d_ff); keeps h only.
    Raises: ValueError for an odd last axis.
    Source: notes §8.7.
    """
    value, gate = split_gate("geglu", h)

    def cdf() -> np.ndarray:
        return scipy.special.ndtr(gate)

    def vjp(dy):
        phi = cdf()
        dh = scratch.empty_like(h)
        half = value.shape[-1]
        np.multiply(dy, gate * phi, out=dh[..., :half])
        density = np.exp(gate * gate * h.dtype.type(-0.5)) * h.dtype.type(1 / np.sqrt(2 * np.pi))
        np.multiply(dy * value, phi + gate * density, out=dh[..., half:])
        return dh

    return value * gate * cdf(), vjp


@derived("gelu")
def gelu(x: np.ndarray):
    r"""Input times the Gaussian distribution function.

    With the density $\varphi$: $\bar x=\bar y\,(\Phi(x)+x\varphi(x))$.

    Equation: `gelu` $x\,\Phi(x)$
    Shapes: any -> the same; keeps x and $\Phi(x)$.
    Source: notes §8.6.
    """
    z = x.reshape(-1)
    y, phi = scratch.empty(z.shape, x.dtype), scratch.empty(z.shape, x.dtype)
    chunks = row_chunks(z.size, 1)
    for part in chunks:
        scipy.special.ndtr(z[part], out=phi[part])
        np.multiply(z[part], phi[part], out=y[part])

    def vjp(dy):
        dy, dx = dy.reshape(-1), scratch.empty(z.shape, x.dtype)
        for part in chunks:
            d = np.multiply(z[part], z[part], out=dx[part])
            d *= -0.5
            np.exp(d, out=d)
            d *= 1 / np.sqrt(2 * np.pi).item()
            d *= z[part]
            d += phi[part]
            d *= dy[part]
        return dx.reshape(x.shape)

    return y.reshape(x.shape), vjp


@derived("gelu_tanh")
def gelu_tanh(x: np.ndarray):
    r"""The approximation of GELU by a hyperbolic tangent.

    With $\frac12(1+\tanh u)=\sigma(2u)$, which loses nothing where the two terms cancel, and $u=c(x+ax^3)$:
    $y=x\,\sigma$ and $\bar x=\bar y\,\big(\sigma+x\,\sigma(1-\sigma)\,2c(1+3ax^2)\big)$.

    Equation: `gelu-tanh` $\frac x2\big(1+\tanh(c(x+ax^3))\big)$, $c=\sqrt{2/\pi}$, $a=0.044715$
    Shapes: any -> the same; keeps x and $\sigma(2u)$.
    Source: notes §8.6.
    """
    c, a = 2 * np.sqrt(2 / np.pi).item(), 0.044715
    z = x.reshape(-1)
    y, sigma = scratch.empty(z.shape, x.dtype), scratch.empty(z.shape, x.dtype)
    chunks = row_chunks(z.size, 1)
    for part in chunks:
        u = np.multiply(z[part], z[part], out=y[part])
        u *= a * c
        u += c
        u *= z[part]
        _sigmoid(u, out=sigma[part])
        np.multiply(z[part], sigma[part], out=y[part])

    def vjp(dy):
        dy, dx = dy.reshape(-1), scratch.empty(z.shape, x.dtype)
        for part in chunks:
            d, slope = np.multiply(z[part], z[part], out=dx[part]), np.subtract(1, sigma[part])
            slope *= sigma[part]
            d *= 3 * a * c
            d += c
            d *= slope  # before the third power of x, which would overflow where the slope is 0
            d *= z[part]
            d += sigma[part]
            d *= dy[part]
        return dx.reshape(x.shape)

    return y.reshape(x.shape), vjp
