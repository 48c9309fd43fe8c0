r"""Likelihood of sequences, from the log-probs of their tokens."""

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.frozen import Array, frozen, kept_positions
from minillm.functional.information import cross_entropy_between
from minillm.functional.reductions import aggregate


def _example(rng):
    shape = [(3, 4), (2, 1), (1, 5)][rng.integers(3)]
    return (rng.normal(size=shape), rng.random(shape) < 0.7), {}


def _example_nll(rng):
    return _example(rng)[0], {"reduction": ["sum", "token-mean", "seq-mean"][rng.integers(3)]}


@written("sequence_logprob", example=_example)
def sequence_logprob(token_logprobs: Float[Array, "B L"], mask: Any) -> Float[Tensor, " B"]:
    r"""Log-probability of whole sequences: the sum over their tokens.

    Equation: `chain-rule-sequence` $p_\theta(\mathbf x)=\prod_{t=1}^Lp_\theta(x_t\mid x_{<t})$
    Equation: `policy-sequence` $\pi(y\mid x)=\prod_t\pi(y_t\mid x,y_{<t})$
    Shapes: token_logprobs (B, L), mask (B, L) -> (B,)
    Raises: ValueError for a mask of another shape.
    Source: bridging §1 and §1.6; notes §10.1 and §10.5.
    """
    terms = as_tensor(token_logprobs)
    return where(kept_positions(mask, terms.shape, "sequence_logprob"), terms, 0.0).sum(-1)


@written("log_likelihood", example=_example)
def log_likelihood(token_logprobs: Float[Array, "B L"], mask: Any) -> Float[Tensor, ""]:
    r"""Log-likelihood of a data set as a function of the parameters; to be maximised.

    Equation: `likelihood` $\mathcal L(\theta;\mathcal D)=\prod_{\mathbf x}p_\theta(\mathbf x),\
        \ell=\sum_{\mathbf x}\log p_\theta(\mathbf x)$
    Shapes: token_logprobs (B, L), mask (B, L) -> scalar
    Raises: ValueError for a mask of another shape.
    Source: topics #3 and #9.
    """
    return sequence_logprob(token_logprobs, mask).sum()


@written("nll_loss", example=_example_nll)
def nll_loss(
    token_logprobs: Float[Array, "B L"], mask: Any, reduction: str = "token-mean", **options: Any
) -> Float[Tensor, ""]:
    r"""Negative log-likelihood of the kept tokens; to be minimised.

    Equation: `nll` $-\sum_{\mathbf x\in\mathcal D}\sum_t\log p_\theta(x_t\mid x_{<t})$
    Shapes: token_logprobs (B, L), mask (B, L) -> scalar, in nats; further options go to `aggregate`
    Raises: ValueError for an unknown reduction or a mask of another shape.
    Source: bridging §1.6 and §5; notes §10.3 and §10.5; deepseek (SFT).
    Differs: four documents, four divisors: a switch, with the token mean by default (erratum 2).
    """
    return aggregate(-as_tensor(token_logprobs), mask, reduction, **options)


def _example_scalar(rng):
    return (rng.uniform(0.1, 3.0, size=[(), (3,)][rng.integers(2)]),), {}


@written("perplexity", example=_example_scalar)
def perplexity(mean_nll: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""The size of the uniform vocabulary that would be as surprising.

    Equation: `perplexity` $\mathrm{PPL}=\exp(\text{mean NLL})$
    Shapes: mean NLL per token in nats, any shape -> the same
    Source: topics #3.
    """
    return as_tensor(mean_nll).exp()


@written("bits_per_token", example=_example_scalar)
def bits_per_token(mean_nll: Float[Array, "*B"]) -> Float[Tensor, "*B"]:
    r"""Mean negative log-likelihood in bits.

    Equation: `perplexity` bits per token $=\text{mean NLL}/\log2$
    Shapes: mean NLL per token in nats, any shape -> the same
    Source: topics #3.
    """
    return as_tensor(mean_nll) * (1.0 / float(np.log(2.0)))


def empirical_distribution(ids: Int[Array, " n"], vocabulary: int) -> Float[np.ndarray, " V"]:
    r"""Relative frequencies; maximising likelihood is minimising the divergence from them.

    Equation: `mle-equals-min-kl` $\arg\max_\theta\mathbb E_{\hat p}\log p_\theta=\arg\min_\theta D_{\rm
        KL}(\hat p\Vert p_\theta)$
    Shapes: ids (n,) in [0, V) -> (V,)
    Raises: ValueError for no ids, IndexError for an id outside the vocabulary.
    Source: topics #3 and #7; bridging §5.
    """
    array = frozen(ids)
    require(array.size > 0, "empirical_distribution", "ids", "at least one", array)
    inside = bool(np.all((array >= 0) & (array < vocabulary)))
    require(inside, "empirical_distribution", "ids", f"in [0, {vocabulary})", array.tolist(), error=IndexError)
    return np.bincount(array, minlength=vocabulary) / array.size


def smoothed_targets(ids: Int[Array, "*B"], vocabulary: int, smoothing: float) -> Float[np.ndarray, "*B V"]:
    r"""One-hot targets with a share of their mass spread evenly.

    Equation: `label-smoothing` $q_v=(1-\epsilon_{ls})\mathbf1\{v=y\}+\epsilon_{ls}/V$
    Shapes: ids (...) -> (..., V); rows sum to 1
    Raises: ValueError for smoothing outside [0, 1], IndexError for an id outside the vocabulary.
    Source: topics #5.
    """
    array = frozen(ids)
    require(0 <= smoothing <= 1, "smoothed_targets", "smoothing", "in [0, 1]", smoothing)
    inside = bool(np.all((array >= 0) & (array < vocabulary)))
    require(inside, "smoothed_targets", "ids", f"in [0, {vocabulary})", array.tolist(), error=IndexError)
    return (1 - smoothing) * np.eye(vocabulary)[array] + smoothing / vocabulary


def _example_smoothing(rng):
    p = rng.uniform(0.2, 1.0, size=(2, 4))
    return (p / p.sum(-1, keepdims=True), rng.integers(4, size=2)), {"smoothing": 0.1}


@written("label_smoothing_loss", example=_example_smoothing)
def label_smoothing_loss(
    probs: Float[Tensor, "*B V"], ids: Int[Array, "*B"], smoothing: float = 0.1
) -> Float[Tensor, "*B"]:
    r"""Cross-entropy of smoothed targets against predicted probabilities.

    Equation: `label-smoothing` $-\sum_vq_v\log p_v$; the negative log-likelihood at $\epsilon_{ls}=0$
    Shapes: probs (..., V), ids (...) -> (...)
    Raises: ValueError for smoothing outside [0, 1], IndexError for an id outside the vocabulary.
    Source: topics #5.
    """
    targets = smoothed_targets(ids, probs.shape[-1], smoothing).astype(probs.dtype)
    return cross_entropy_between(Tensor(targets), probs)


class DirichletPosterior(NamedTuple):
    """Posterior of a categorical law under a symmetric Dirichlet prior."""

    mean: np.ndarray
    mode: np.ndarray


def dirichlet_posterior(counts: Int[np.ndarray, " V"], alpha: float) -> DirichletPosterior:
    r"""What counts say about a categorical law, from a symmetric Dirichlet prior: mean, and mode (MAP).

    Equation: `map-bayes` $p(\theta\mid\mathcal D)\propto p(\mathcal D\mid\theta)\,p(\theta)$, mean
        $\frac{n_v+\alpha}{n+V\alpha}$, mode $\frac{n_v+\alpha-1}{n+V(\alpha-1)}$
    Shapes: counts (V,) -> two of (V,)
    Raises: ValueError if alpha is not positive; the mode is NaN where alpha is under 1 and a count is 0.
    Source: topics #9.
    """
    require_positive(alpha, "dirichlet_posterior", "alpha")
    weights = counts + alpha
    inside = bool(np.all(weights >= 1)) and float((weights - 1).sum()) > 0
    mode = (weights - 1) / (weights - 1).sum() if inside else np.full(len(counts), np.nan)
    return DirichletPosterior(weights / weights.sum(), mode)


def _example_prior(rng):
    return (rng.normal(size=(2, 3)),), {"std": 0.7, "kind": ["gaussian", "laplace"][rng.integers(2)]}


@written("prior_penalty", example=_example_prior)
def prior_penalty(
    theta: Float[Tensor, "..."], std: float, kind: Literal["gaussian", "laplace"] = "gaussian"
) -> Float[Tensor, ""]:
    r"""Minus the log of a prior, up to a constant: what MAP adds to the negative log-likelihood.

    Equation: `map-bayes` Gaussian prior $\Rightarrow\frac1{2s^2}\lVert\theta\rVert_2^2$; Laplace prior
        $\Rightarrow\frac{\sqrt2}{s}\lVert\theta\rVert_1$
    Shapes: theta any -> scalar; std is the prior's standard deviation
    Raises: ValueError for another prior or a standard deviation that is not positive.
    Source: topics #9.
    """
    require_one_of(kind, ("gaussian", "laplace"), "prior_penalty", "kind")
    require_positive(std, "prior_penalty", "std")
    if kind == "gaussian":
        return (theta * theta).sum() * (0.5 / std**2)
    return theta.abs().sum() * (float(np.sqrt(2.0)) / std)
