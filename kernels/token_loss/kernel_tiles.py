r"""What every kernel of this family does with a tile of logits, and the terms of the losses: device functions only.

One row $z\in\mathbb R^V$ of logits with temperature $\tau$ is read tile by tile. Three numbers a row are carried
from tile to tile, with $m$ the largest logit so far:

$$s=\sum_j e^{(z_j-m)/\tau},\qquad u=\sum_j e^{(z_j-m)/\tau}\,(z_j-m)/\tau .$$

When a tile raises the maximum to $m'$, with $g=(m-m')/\tau$ and $r=e^{g}$: $s\gets r s$ and $u\gets r\,(u+g\,s)$.
(The pair is a commutative, associative merge with the identity $(m,s,u)=(-\infty,0,0)$, which is why rows can be cut
anywhere and why the fused linear loss can merge parts computed by different programs.) At the end

$$\mathrm{LSE}=m/\tau+\log s,\qquad \mathcal H=\log s-u/s,\qquad \log p_y=(z_y-m)/\tau-\log s .$$

Every lane of a tile carries its own three numbers (`absorb`), so threads exchange nothing until the row is done
(`merge_lanes`). The entropy costs one multiplication and one addition an element and no second pass. Exponentials are taken as
`exp2` with $\log_2e/\tau$ folded into one factor, after the maximum has been subtracted (logits of 10^4 lose
nothing that way): exactly one a element in each pass.

Backward, with $a,b,c,d$ the derivatives of the loss by $\log p_y$, $\mathcal H$, LSE and the mean tempered logit:

$$\bar z_j=\tfrac1\tau\big[p_j\,(c-a-b\,(\log p_j+\mathcal H))+a\,\mathbf 1\{j=y\}+d/V\big].$$

Every loss of this family is one choice of $(a,b,c,d)$: cross-entropy $a=-w$; its smoothed form
$a=-w(1-\epsilon),c=w\epsilon,d=-w\epsilon$; the penalty on LSE adds $2\zeta w\,$LSE to $c$; the policy losses
$a=w\,\partial_{\log p}(\cdot)$ and $b=-w\,c_e$ (`policy_terms`).

Masked lanes hold $-\infty$, whose exponential is 0; where $0\cdot\infty$ could arise the factor is set to 0 first.
NaN in a row that counts stays NaN.
"""

import triton
import triton.language as tl

LOG2 = tl.constexpr(0.6931471805599453)


@triton.jit
def absorb(x, top, total, weighted, scale, ENTROPY: tl.constexpr):
    """Merge a tile (rows, lanes, elements of a lane) into the running statistics of every lane, (rows, lanes).

    ``scale`` is log2(e) / temperature. One exponential an element and one a lane; a lane is the 16 bytes that one
    thread loads at once, so nothing is exchanged between threads before `merge_lanes`.
    """
    higher = tl.maximum(top, tl.max(x, axis=2))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a lane of -inf so far
    gap = tl.where(top == float("-inf"), 0.0, (top - base) * scale)
    shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(gap))
    depth = (x - base[:, :, None]) * scale
    e = tl.exp2(depth)
    if ENTROPY:
        finite = tl.where(depth == float("-inf"), 0.0, depth)
        weighted = shrink * (weighted + gap * total) + tl.sum(e * finite, axis=2)
    return higher, shrink * total + tl.sum(e, axis=2), weighted


@triton.jit
def merge_lanes(top, total, weighted, scale):
    """The statistics of whole rows from those of their lanes: largest logit (0 for a row of -inf), s and u."""
    highest = tl.max(top, axis=1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    gap = tl.where(top == float("-inf"), 0.0, (top - base[:, None]) * scale)
    shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(gap))
    return base, tl.sum(shrink * total, axis=1), tl.sum(shrink * (weighted + gap * total), axis=1)


@triton.jit
def gradient_tile(
    x, cols, target, top, log_sum, scale, at_p, at_plogp, at_target, everywhere,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits from the four per-row factors that `gradient_factors` makes."""
    depth = (x - top[:, None]) * scale - log_sum[:, None]  # log2 p
    p = tl.exp2(depth)
    if ENTROPY:
        finite = tl.where(depth == float("-inf"), 0.0, depth)
        dx = p * (at_p[:, None] - at_plogp[:, None] * finite)
    else:
        dx = p * at_p[:, None]
    if MEAN:
        dx += everywhere[:, None]
    return dx + tl.where(cols[None, :] == target[:, None], at_target[:, None], 0.0)


@triton.jit
def gradient_factors(a, b, c, d, entropy, V, inverse_temperature):
    """Factors at p, at p log2 p, at the target and everywhere, from the derivatives by log p_y, H, LSE and mean."""
    at_p = (c - a - b * entropy) * inverse_temperature
    return at_p, b * LOG2 * inverse_temperature, a * inverse_temperature, d * inverse_temperature / V


@triton.jit
def k3_of(d):
    """e^d - 1 - d without cancellation: the series where |d| is small."""
    series = 1.0 / 362880.0 * d + 1.0 / 40320.0
    series = series * d + 1.0 / 5040.0
    series = series * d + 1.0 / 720.0
    series = series * d + 1.0 / 120.0
    series = series * d + 1.0 / 24.0
    series = series * d + 1.0 / 6.0
    series = series * d + 0.5
    return tl.where(tl.abs(d) < 0.5, series * d * d, tl.exp(d) - 1.0 - d)


@triton.jit
def clip_flag(ratio, advantage, low, high, dual):
    """-1 below and 1 above the clip range where it takes the gradient, 2 beyond the dual clip, else 0."""
    flag = tl.where((advantage > 0) & (ratio > high), 1, 0)
    flag = tl.where((advantage < 0) & (ratio < low), -1, flag)
    return tl.where((advantage < 0) & (ratio > dual), 2, flag)


@triton.jit
def surrogate(ratio, advantage, low, high, dual):
    """min(ratio A, clip(ratio) A), and for A < 0 not below dual A: to be maximised."""
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    term = tl.minimum(ratio * advantage, clipped * advantage)
    return tl.where(advantage < 0, tl.maximum(term, dual * advantage), term)


@triton.jit
def penalty(logp, old, ref, KL: tl.constexpr, KL_RATIO: tl.constexpr):
    """The divergence estimate of a token and its derivative by log p: k1, k2 or k3, times the ratio if asked for."""
    d = ref - logp
    k3 = k3_of(d)
    if KL == 1:
        value = -d
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif KL == 2:
        value = 0.5 * d * d
        slope = -d
    else:
        value = k3
        slope = -(d + k3)
    if KL_RATIO:
        ratio = tl.exp(logp - old)
        slope = ratio * (slope + value)
        value = ratio * value
    return value, slope, -d, 0.5 * d * d, k3


@triton.jit
def policy_terms(
    logp, entropy, old, ref, advantage, weight, importance, low, high, dual, beta, entropy_coef,
    REF: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr,
):  # fmt: skip
    """One token's share of the loss with token ratios: value, derivatives by log p and entropy, and what to watch."""
    ratio = tl.exp(logp - old)
    flag = clip_flag(ratio, advantage, low, high, dual)
    value = -weight * importance * surrogate(ratio, advantage, low, high, dual)
    a = tl.where(flag == 0, -weight * importance * advantage * ratio, 0.0)
    k1, k2, k3 = ratio * 0.0, ratio * 0.0, ratio * 0.0
    if REF:
        estimate, slope, k1, k2, k3 = penalty(logp, old, ref, KL, KL_RATIO)
        value += weight * beta * estimate
        a += weight * beta * slope
    value -= weight * entropy_coef * entropy
    return value, a, -weight * entropy_coef, ratio, flag, k1, k2, k3


@triton.jit
def likelihood_terms(logp, lse, mean, weight, smoothing, z_loss):
    """One token's share of the (smoothed, penalised) cross-entropy: value, derivatives by log p, LSE and mean."""
    value = -weight * ((1.0 - smoothing) * logp - smoothing * (lse - mean) - z_loss * lse * lse)
    return value, -weight * (1.0 - smoothing), weight * (smoothing + 2.0 * z_loss * lse), -weight * smoothing
