r"""Entropy and divergences of distributions, summed exactly over the last axis.

Two kinds of arguments occur: probabilities (``p``, ``q``), as the definitions have them, and logits or
log-probabilities, which is what a model gives and what stays accurate. The convention $0\log0=0$ holds
throughout.
"""

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.softmax import log_softmax, softmax


def check_distribution(where_: str, what: str, p: Tensor) -> None:
    """Refuse a last axis that is not a distribution: negative, NaN, or with a sum away from 1."""
    good = p.ndim >= 1 and bool(np.all(p.data >= 0)) and bool(np.all(np.abs(p.data.sum(-1) - 1) < 1e-3))
    require(good, where_, what, "non-negative with sum 1 along the last axis", p, "Apply softmax to logits first.")


def _distribution(rng, *shape: int) -> np.ndarray:
    weights = rng.uniform(0.2, 1.0, size=shape)
    return weights / weights.sum(-1, keepdims=True)


def _example_one(rng):
    shape = [(2, 3), (4,), (2, 1, 5), (3, 1), (0, 4)][rng.integers(5)]
    return (_distribution(rng, *shape),), {}


def _example_two(rng):
    (p,), _ = _example_one(rng)
    return (p, _distribution(rng, *p.shape)), {}


def _example_logits(rng):
    shape = [(2, 3), (4,), (2, 1, 5), (3, 1), (0, 4)][rng.integers(5)]
    return (rng.normal(size=shape),), {}


def _example_two_logits(rng):
    (z,), _ = _example_logits(rng)
    return (z, rng.normal(size=z.shape)), {"direction": ["reverse", "forward"][rng.integers(2)]}


def _example_directional(rng):
    return _example_two(rng)[0], {"direction": ["reverse", "forward"][rng.integers(2)]}


@written("entropy", example=_example_one)
def entropy(p: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    r"""How uncertain a distribution is, in nats.

    Equation: `entropy` $\mathcal H(p)=-\sum_ap(a)\log p(a)$, with $0\log0=0$
    Shapes: p (..., n) -> (...); between 0 and log n
    Raises: ValueError if p is not a distribution.
    Source: notes §10.5 and §10.6; lecture06 (PPO cost); topics #3.
    """
    check_distribution("entropy", "p", p)
    possible = p.data > 0
    return where(possible, -p * where(possible, p, 1.0).log(), 0.0).sum(-1)


@written("entropy_from_logits", example=_example_logits)
def entropy_from_logits(z: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    r"""The entropy of softmax(z), without going through small probabilities; logits of minus infinity are
    allowed.

    Equation: `entropy` $\mathcal H=-\sum_ap(a)\log p(a),\ \log p=\mathrm{logsoftmax}(z)$
    Shapes: z (..., n) -> (...)
    Source: notes §10.5; lecture06 (PPO cost).
    """
    log_p = log_softmax(z)
    possible = z.data > -np.inf
    log_p = where(possible, log_p, 0.0)
    return where(possible, -log_p.exp() * log_p, 0.0).sum(-1)


def _example_temperature(rng):
    return _example_logits(rng)[0], {"temperature": [0.5, 1.0, 3.0][rng.integers(3)]}


@written("tempered_softmax", example=_example_temperature)
def tempered_softmax(z: Float[Tensor, "*B n"], temperature: float) -> Float[Tensor, "*B n"]:
    r"""Softmax of z / T for any temperature, its two limits included.

    Equation: `softmax-temperature-limit` $T\to0$: the largest logits share the mass; $T\to\infty$: uniform;
        $\mathcal H$ never falls with $T$
    Shapes: z (..., n) -> (..., n); the limits are constants, without gradient
    Raises: ValueError if the temperature is negative.
    Source: notes §10.5; topics #9.
    """
    require(temperature >= 0, "tempered_softmax", "the temperature", "at least 0 (infinity allowed)", temperature)
    if temperature == 0:
        largest = z.data == z.data.max(-1, keepdims=True, initial=-np.inf)
        return Tensor((largest / largest.sum(-1, keepdims=True)).astype(z.dtype))
    if temperature == np.inf:
        return Tensor(np.full(z.shape, 1.0 / z.shape[-1], z.dtype))
    return softmax(z * (1.0 / temperature))


@written("cross_entropy_between", example=_example_two)
def cross_entropy_between(p: Float[Tensor, "*B n"], q: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    r"""Mean code length of draws from p under a code built for q.

    Equation: `cross-entropy` $\mathcal H(p,q)=-\sum_ap(a)\log q(a)=\mathcal H(p)+D_{\rm KL}(p\Vert q)$
    Shapes: p (..., n), q (..., n) -> (...); plus infinity where q(a) = 0 < p(a)
    Raises: ValueError if p or q is not a distribution.
    Source: notes §10.1; topics #3.
    """
    return _expected_log_ratio("cross_entropy_between", p, q, of_p=False)


@written("kl_divergence", example=_example_two)
def kl_divergence(p: Float[Tensor, "*B n"], q: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    r"""Kullback-Leibler divergence; the first argument is the one that is averaged over.

    Equation: `kl-divergence` $D_{\rm KL}(P\Vert Q)=\sum_aP(a)\log\frac{P(a)}{Q(a)}$
    Shapes: p (..., n), q (..., n) -> (...); at least 0, plus infinity where q(a) = 0 < p(a)
    Raises: ValueError if p or q is not a distribution.
    Source: deepseek (KL divergence); notes §10.5; topics #3.
    Differs: the trained model is the first argument when it is what samples (erratum 3).
    """
    return _expected_log_ratio("kl_divergence", p, q, of_p=True)


def _expected_log_ratio(name: str, p: Tensor, q: Tensor, of_p: bool) -> Tensor:
    """The sum of p log(p/q), or of p log(1/q)."""
    check_distribution(name, "p", p)
    check_distribution(name, "q", q)
    require(p.shape == q.shape, name, "q", f"of the shape {p.shape} of p", q)
    possible = p.data > 0
    impossible_for_q = possible & (q.data == 0)
    log_q = where(possible & ~impossible_for_q, q, 1.0).log()
    log_p = where(possible, p, 1.0).log() if of_p else 0.0
    terms = where(possible, p * (log_p - log_q), 0.0)
    return where(impossible_for_q, np.inf, terms).sum(-1)


DIRECTIONS = ("reverse", "forward")


@written("kl_directional", example=_example_directional)
def kl_directional(
    policy: Float[Tensor, "*B n"], reference: Float[Tensor, "*B n"], direction: str = "reverse"
) -> Float[Tensor, "*B"]:
    r"""The divergence between a trained policy and a reference, in the direction asked for.

    Equation: `kl-forward-reverse` `reverse` $D_{\rm KL}(\pi_\theta\Vert\pi_{\rm ref})$ seeks modes, `forward`
        $D_{\rm KL}(\pi_{\rm ref}\Vert\pi_\theta)$ covers mass
    Shapes: policy (..., n), reference (..., n) -> (...)
    Raises: ValueError for another direction or if an argument is not a distribution.
    Source: lecture06 (PPO and GRPO slides); notes §10.6.
    Differs: the documents disagree on the direction; the default is reverse (errata 3 and 4).
    """
    require_one_of(direction, DIRECTIONS, "kl_directional", "direction")
    return kl_divergence(policy, reference) if direction == "reverse" else kl_divergence(reference, policy)


@written("kl_token_exact", example=_example_two_logits)
def kl_token_exact(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], direction: str = "reverse"
) -> Float[Tensor, "*B"]:
    r"""The divergence of two next-token laws at every position, over the whole vocabulary, from logits.

    Equation: `kl-token-exact` $\sum_a\pi_\theta(a\mid s_t)\log\frac{\pi_\theta(a\mid s_t)}{\pi_{\rm
        ref}(a\mid s_t)}$
    Shapes: logits (B, L, V), ref_logits (B, L, V) -> (B, L). Log-probs are logits too.
    Raises: ValueError for another direction, or if the shapes differ.
    Source: notes §10.5.
    """
    require_one_of(direction, DIRECTIONS, "kl_token_exact", "direction")
    require(
        logits.shape == ref_logits.shape,
        "kl_token_exact",
        "ref_logits",
        f"of shape {logits.shape}",
        ref_logits,
    )
    first, second = (logits, ref_logits) if direction == "reverse" else (ref_logits, logits)
    possible, possible_for_q = first.data > -np.inf, second.data > -np.inf
    log_p = where(possible, log_softmax(first), 0.0)
    log_q = where(possible_for_q, log_softmax(second), 0.0)
    terms = where(possible, log_p.exp() * (log_p - log_q), 0.0)
    return where(possible & ~possible_for_q, np.inf, terms).sum(-1)


@written("chi2_divergence", example=_example_two)
def chi2_divergence(p: Float[Tensor, "*B n"], q: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    r"""Chi-square divergence: the variance of the importance weight p/q under q.

    Equation: `chi2-divergence` $\chi^2(P\Vert Q)=\sum_aP(a)^2/Q(a)-1$
    Shapes: p (..., n), q (..., n) -> (...); plus infinity where q(a) = 0 < p(a)
    Raises: ValueError if p or q is not a distribution.
    Source: needed by erratum 6.
    """
    check_distribution("chi2_divergence", "p", p)
    check_distribution("chi2_divergence", "q", q)
    require(p.shape == q.shape, "chi2_divergence", "q", f"of the shape {p.shape} of p", q)
    terms = p * p / where(q.data > 0, q, 1.0)
    return where((q.data == 0) & (p.data > 0), np.inf, terms).sum(-1) - 1.0


def _example_gaussian(rng):
    return (rng.normal(size=3), rng.uniform(0.5, 2, 3), rng.normal(size=3), rng.uniform(0.5, 2, 3)), {}


@written("kl_gaussian", example=_example_gaussian)
def kl_gaussian(
    mean_p: Float[Tensor, "*B"],
    std_p: Float[Tensor, "*B"],
    mean_q: Float[Tensor, "*B"],
    std_q: Float[Tensor, "*B"],
) -> Float[Tensor, "*B"]:
    r"""Divergence of two normal laws, in closed form.

    Equation: `kl-bernoulli-gaussian` $\log\frac{s_2}{s_1}+\frac{s_1^2+(\mu_1-\mu_2)^2}{2s_2^2}-\frac12$
    Shapes: four of one shape (...) -> (...)
    Raises: ValueError if a standard deviation is not positive.
    Source: topics #3.
    """
    positive = bool(np.all(std_p.data > 0) and np.all(std_q.data > 0))
    require(positive, "kl_gaussian", "standard deviations", "positive", f"{std_p.tolist()} and {std_q.tolist()}")
    gap = mean_p - mean_q
    return (std_q / std_p).log() + (std_p * std_p + gap * gap) / (std_q * std_q * 2.0) - 0.5


def _example_bernoulli(rng):
    return (rng.uniform(0.1, 0.9, 3), rng.uniform(0.1, 0.9, 3)), {}


@written("kl_bernoulli", example=_example_bernoulli)
def kl_bernoulli(p: Float[Tensor, "*B"], q: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    r"""Divergence of two coins with success probabilities p and q.

    Equation: `kl-bernoulli-gaussian` $p\log\frac pq+(1-p)\log\frac{1-p}{1-q}$
    Shapes: p (...), q (...) -> (...)
    Raises: ValueError for probabilities outside [0, 1].
    Source: topics #3.
    """
    both = [p.unsqueeze(-1), q.unsqueeze(-1)]
    coins = [where(np.array([True, False]), heads, 1.0 - heads) for heads in both]  # (..., 2)
    return kl_divergence(*coins)
