r"""Keeping all experts busy: losses on the router, and DeepSeek's bias that needs no loss."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.frozen import frozen
from minillm.functional.routing import check_groups, check_k, check_routed, spread_scores, top_k, within_groups
from minillm.functional.softmax import logsumexp, softmax


def load_fractions(routed: Any, *, normalise_by_k: bool = True) -> Float[np.ndarray, " E"]:
    r"""The share of assignments that each expert has.

    Equation: `moe-aux-loss` $f_e=\frac{N_e}{kBL}$, or $\frac{N_e}{BL}$ with ``normalise_by_k=False``
    Shapes: routed booleans (..., E) -> (E,); sums to 1 (or to k), zeros without a token
    Raises: ValueError unless routed is boolean and chooses something.
    Source: notes §8.8.
    Differs: divided by k too, so that the shares sum to 1 (erratum 40).
    """
    routed = frozen(routed)
    require(routed.dtype == bool and routed.ndim >= 1, "load_fractions", "the choice", "booleans (..., E)", routed)
    require(not routed.size or bool(routed.any()), "load_fractions", "the choice", "of at least one expert", routed)
    rows = routed.reshape(-1, routed.shape[-1])
    return rows.sum(0) / max(int(rows.sum()) if normalise_by_k else len(rows), 1)


def _example_gates(rng):
    shape = [(2, 3, 4), (5, 3), (1, 2, 1)][rng.integers(3)]
    p = softmax(Tensor(spread_scores(rng, *shape))).data
    return p, top_k(p, int(rng.integers(1, shape[-1] + 1)))


@written("aux_loss", example=lambda rng: (_example_gates(rng), {"normalise_by_k": bool(rng.integers(2))}))
def aux_loss(
    p: Float[Tensor, "*B E"], routed: Bool[np.ndarray, "*B E"], *, normalise_by_k: bool = True
) -> Float[Tensor, ""]:
    r"""Load balancing: experts that are used much are made less probable.

    Equation: `moe-aux-loss` $\mathcal L_{\rm aux}=E\sum_ef_em_e,\ m_e=\frac1{BL}\sum_{b,l}P$; gradient only through $m_e$
    Shapes: p (..., E), routed booleans (..., E) -> scalar; 1 when even (k with ``normalise_by_k=False``)
    Raises: ValueError for a choice of another shape or type, or one that chooses nothing.
    Source: notes §8.8 (from GShard and Switch).
    Differs: even routing gives 1 and is not the least value; it is when f and m are in the same order (erratum 40).
    """
    routed = check_routed("aux_loss", routed, p.shape)
    E = p.shape[-1]
    f = load_fractions(routed, normalise_by_k=normalise_by_k)
    m = p.reshape(-1, E).sum(0) * (1.0 / max(p.size // E, 1))
    return (m * f).sum() * float(E)


@written(
    "moe_total_loss", example=lambda rng: ((np.asarray(rng.normal()), np.asarray(rng.normal())), {"coefficient": 0.3})
)
def moe_total_loss(task: Float[Tensor, ""], aux: Float[Tensor, ""], coefficient: float = 0.01) -> Float[Tensor, ""]:
    r"""What is minimised in all.

    Equation: `moe-total-loss` $\mathcal L=\mathcal L_{\rm task}+\lambda_{\rm aux}\mathcal L_{\rm aux}$
    Shapes: scalars -> scalar
    Raises: ValueError for a negative coefficient.
    Source: notes §8.8.
    """
    require_positive(coefficient, "moe_total_loss", "the coefficient", zero_ok=True)
    return as_tensor(task) + as_tensor(aux) * coefficient


def _squared_variation(total: Tensor, weight: float, ddof: int) -> Tensor:
    """w CV^2; 0 where everything is 0, which is even too."""
    mean = total.mean()
    mean = where(mean.data == 0, 1.0, mean)
    return total.var(ddof=ddof) / (mean * mean) * weight


@written("importance_loss", example=lambda rng: ((rng.uniform(0.1, 1, size=[(4, 3), (2, 2, 5)][rng.integers(2)]),), {}))
def importance_loss(gates: Float[Tensor, "*B E"], weight: float = 0.1, *, ddof: int = 0) -> Float[Tensor, ""]:
    r"""How unevenly the gates add up over a batch: the squared coefficient of variation.

    Equation: `moe-importance-loss` $w\,\mathrm{CV}(\sum_xG(x))^2$, $\mathrm{CV}=\mathrm{std}/\mathrm{mean}$ over experts
    Shapes: gates (..., E) -> scalar, 0 when even
    Raises: ValueError for one expert with ddof=1, or a negative weight.
    Source: lecture06 (noisy top-k gating); Shazeer et al. 2017.
    """
    require_positive(weight, "importance_loss", "the weight", zero_ok=True)
    E = gates.shape[-1]
    require(ddof < E, "importance_loss", "the number of experts", f"above ddof = {ddof}", f"{E}")
    return _squared_variation(gates.reshape(-1, E).sum(0), weight, ddof)


def _example_load(rng):
    shape = [(4, 3), (2, 2, 5)][rng.integers(2)]
    k = int(rng.integers(1, shape[-1]))
    return (rng.normal(size=shape), spread_scores(rng, *shape), rng.uniform(0.5, 1, size=shape), k), {}


@written("chosen_probability", example=_example_load)
def chosen_probability(
    clean: Float[Tensor, "*B E"], noisy: Float[Tensor, "*B E"], scale: Float[Tensor, "*B E"], k: int
) -> Float[Tensor, "*B E"]:
    r"""How likely fresh noise would choose each expert, the other experts' noise held.

    Equation: `moe-importance-loss` $p(x)_i=\Phi\Big(\frac{(xW_g)_i-\mathrm{kth}_{j\ne i}(H(x)_j)}{\mathrm{softplus}((xW_{\rm noise})_i)}\Big)$
    Shapes: clean $xW_g$, noisy $H$, scale the softplus, all (..., E) -> (..., E)
    Raises: ValueError unless the shapes agree and 1 <= k < E (the k-th largest of the others must exist).
    Source: lecture06 (noisy top-k gating); Shazeer et al. 2017.
    """
    E = clean.shape[-1]
    for given, name in ((noisy, "the noisy logits"), (scale, "the scale")):
        require(given.shape == clean.shape, "chosen_probability", name, f"of shape {clean.shape}", given)
    check_k("chosen_probability", k, E - 1)
    order = np.argsort(-noisy.data, axis=-1, kind="stable")
    chosen = top_k(noisy, k)
    others_kth = np.where(chosen, order[..., k : k + 1], order[..., k - 1 : k])  # (..., E)
    z = (clean - noisy.gather(-1, others_kth)) / scale
    return (ops.erf(z * float(np.sqrt(0.5))) + 1.0) * 0.5


@written("load_loss", example=_example_load)
def load_loss(
    clean: Float[Tensor, "*B E"],
    noisy: Float[Tensor, "*B E"],
    scale: Float[Tensor, "*B E"],
    k: int,
    weight: float = 0.1,
    *,
    ddof: int = 0,
) -> Float[Tensor, ""]:
    r"""How unevenly tokens will be shared out, in a form that has a gradient.

    Equation: `moe-importance-loss` $w\,\mathrm{CV}(\sum_xp(x))^2$
    Shapes: as `chosen_probability` -> scalar
    Raises: ValueError as `chosen_probability`, or for a negative weight.
    Source: lecture06 (noisy top-k gating); Shazeer et al. 2017.
    """
    require_positive(weight, "load_loss", "the weight", zero_ok=True)
    p = chosen_probability(clean, noisy, scale, k)
    return _squared_variation(p.reshape(-1, p.shape[-1]).sum(0), weight, ddof)


@written("z_loss", example=lambda rng: ((rng.normal(size=[(2, 3, 4), (5, 1)][rng.integers(2)]),), {}))
def z_loss(r: Float[Tensor, "*B E"]) -> Float[Tensor, ""]:
    r"""Keeps router logits small, where rounding does not change the choice.

    Equation: `moe-z-loss` $\frac1{BL}\sum\mathrm{LSE}(\mathbf R)^2$
    Shapes: r (..., E) -> scalar
    Source: deepseek (auxiliary losses); Zoph et al. 2022 (ST-MoE).
    """
    lse = logsumexp(r)
    return (lse * lse).sum() * (1.0 / max(lse.size, 1))


@written("sequence_balance_loss", example=lambda rng: (_three_axes(rng), {"coefficient": 0.5}))
def sequence_balance_loss(
    s: Float[Tensor, "B L E"], routed: Bool[np.ndarray, "B L E"], coefficient: float = 1e-4
) -> Float[Tensor, ""]:
    r"""Balance within every sequence, so that one long prompt does not sit on one expert.

    Equation: `moe-sequence-balance` $\lambda_{\rm seq}\sum_ef_em_e$, $f_e=\frac E{kL}\sum_l\mathbf 1\{e\in\mathcal T_k(l)\}$, $m_e=\frac1L\sum_l\frac{s_{l,e}}{\sum_js_{l,j}}$, mean over B
    Shapes: s positive (B, L, E), routed booleans (B, L, E) -> scalar
    Raises: ValueError for a choice of another shape or type, one that chooses nothing in a sequence, or a negative
        coefficient.
    Source: deepseek (the slide on what is hidden); DeepSeek-V3 2024.
    """
    require_positive(coefficient, "sequence_balance_loss", "the coefficient", zero_ok=True)
    routed = check_routed("sequence_balance_loss", routed, s.shape)
    chosen = routed.sum((1, 2))
    require(bool((chosen > 0).all()), "sequence_balance_loss", "every sequence", "with a chosen expert", routed)
    f = s.shape[-1] * routed.sum(1) / chosen[:, None]  # (B, E)
    m = (s / s.sum(-1, keepdims=True)).mean(1)  # (B, E)
    return (m * f).sum() * (coefficient / max(len(routed), 1))


def _three_axes(rng):
    s = rng.uniform(0.1, 1, size=[(2, 3, 4), (1, 1, 2)][rng.integers(2)])
    return s, top_k(s, int(rng.integers(1, 3)))


def biased_choice(s: Any, bias: Any, k: int, n_groups: int = 1, k_groups: int = 1) -> Bool[np.ndarray, "*B E"]:
    r"""Choose by score and bias; the weights are then made of the scores alone.

    Equation: `moe-bias-balancing` choose $\mathrm{TopK}(s_e+b_e)$, weight with $s_e$ only
    Shapes: s (..., E), bias (E,) -> booleans (..., E)
    Raises: ValueError unless bias is (E,) and 1 <= k <= E, or for groups that do not fit (`within_groups`).
    Source: deepseek (dynamic bias); Wang et al. 2024; DeepSeek-V3 2024.
    """
    s, bias = frozen(s), frozen(bias)
    require(bias.shape == s.shape[-1:], "biased_choice", "the bias", f"of shape {s.shape[-1:]}", bias)
    check_groups("biased_choice", s.shape[-1], n_groups, k_groups)
    return top_k(within_groups(s + bias, n_groups, k_groups), k)


def updated_bias(bias: Any, loads: Any, rate: float = 1e-3) -> Float[np.ndarray, " E"]:
    r"""After a step: experts with too few tokens are raised, those with too many lowered, all by the same amount.

    Equation: `moe-bias-balancing` $b_e\leftarrow b_e+u\,\mathrm{sign}(\bar N-N_e)$
    Shapes: bias (E,), loads (E,) -> (E,)
    Raises: ValueError unless both are (E,) and the rate is not negative.
    Source: deepseek (dynamic bias); Wang et al. 2024.
    """
    bias, loads = frozen(bias), frozen(loads)
    require(bias.ndim == 1 and loads.shape == bias.shape, "updated_bias", "the loads", f"of shape {bias.shape}", loads)
    require_positive(rate, "updated_bias", "the rate", zero_ok=True)
    return bias + (rate * np.sign(loads.mean() - loads)).astype(bias.dtype)
