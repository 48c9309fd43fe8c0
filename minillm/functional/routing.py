r"""Which experts a token goes to, and with what weight: routers as written.

A choice of experts is a boolean array (..., E), true where the token goes to the expert. It is a constant for the
gradient: what is learnt is the weight of the chosen, not the choosing. Ties go to the expert of the lower number.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.activations import silu
from minillm.functional.frozen import frozen
from minillm.functional.linear import linear
from minillm.functional.softmax import softmax

Mask = Bool[np.ndarray, "*B E"]


def check_k(where: str, k: Any, E: int) -> None:
    """Refuse a number of experts per token that is no integer in 1..E."""
    fits = isinstance(k, int | np.integer) and not isinstance(k, bool) and bool(1 <= k <= E)
    require(fits, where, "k", f"an integer in 1..{E}, the number of experts", k)


def check_routed(where: str, routed: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Refuse a choice that is not a boolean array of the shape of the scores."""
    routed = frozen(routed)
    fits = routed.dtype == bool and routed.shape == tuple(shape)
    require(fits, where, "the choice", f"booleans of shape {tuple(shape)}", routed)
    return routed


def top_k(scores: Any, k: int) -> Mask:
    r"""Choose the k largest scores of every token.

    Equation: `topk-renormalise` $\mathcal T_k$: the indices of the k largest
    Shapes: scores (..., E) -> booleans (..., E), k true in every row; of equal scores the first is taken
    Raises: ValueError unless 1 <= k <= E.
    Source: notes §8.8 (iii).
    """
    scores = frozen(scores)
    require(scores.ndim >= 1, "top_k", "the scores", "of at least one axis", scores)
    check_k("top_k", k, scores.shape[-1])
    order = np.argsort(-scores, axis=-1, kind="stable")
    routed = np.zeros(scores.shape, bool)
    np.put_along_axis(routed, order[..., :k], True, axis=-1)
    return routed


def check_groups(where: str, E: int, n_groups: int, k_groups: int, k: int = 1) -> None:
    """Refuse groups of unequal size, more of them than there are, or too few experts in them."""
    require_positive(n_groups, where, "n_groups", integer=True)
    require(E % n_groups == 0, where, "n_groups", f"a divisor of the number of experts, {E}", n_groups)
    fits = isinstance(k_groups, int | np.integer) and 1 <= k_groups <= n_groups
    require(bool(fits), where, "k_groups", f"an integer in 1..{n_groups}, the number of groups", k_groups)
    room = k_groups * (E // n_groups)
    require(k <= room, where, "k", f"at most {room}, the experts of {k_groups} of {n_groups} groups", k)


def within_groups(scores: Any, n_groups: int, k_groups: int, best: int = 2) -> Float[np.ndarray, "*B E"]:
    r"""Scores of the experts in the groups that a token may visit; minus infinity in the others.

    A group is judged by the sum of its ``best`` largest scores (2 in DeepSeek-V3, 1 in V2), so that a token's experts
    lie on few machines. Neighbouring experts are one group.

    Equation: `topk-renormalise` $\mathcal T_k$ from the $k_{\rm groups}$ groups with the largest sums
    Equation: `moe-bias-balancing` the bias takes part in the choice of groups too
    Shapes: scores (..., E) -> (..., E)
    Raises: ValueError for groups of unequal size, or more groups than there are.
    Source: deepseek (the slide on what is hidden names the bias only); DeepSeek-V3 2024, section 2.1.2.
    """
    scores = frozen(scores)
    E = scores.shape[-1] if scores.ndim else 0
    check_groups("within_groups", max(E, 1), n_groups, k_groups)
    require_positive(best, "within_groups", "best", integer=True)
    if k_groups == n_groups:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], n_groups, E // n_groups)
    of_group = np.sort(grouped, axis=-1)[..., -min(best, E // n_groups) :].sum(-1)  # (..., n_groups)
    return np.where(top_k(of_group, k_groups)[..., None], grouped, -np.inf).reshape(scores.shape)


def spread_scores(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random scores of which no two of a token are close, so that a small step changes no choice."""
    ranks = rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)
    return 0.5 * (ranks - shape[-1] / 2) + rng.uniform(-0.1, 0.1, size=shape)


def _example_choice(rng):
    shape = [(2, 3, 4), (5, 3), (4,), (2, 1), (0, 3)][rng.integers(5)]
    p = rng.uniform(0.1, 1.0, size=shape)
    return (p, top_k(p, int(rng.integers(1, shape[-1] + 1)))), {}


def _example_logits(rng):
    x = rng.normal(size=[(2, 3, 4), (5, 4), (0, 4)][rng.integers(3)])
    bias = (rng.normal(size=3),) if rng.integers(2) else ()
    return (x, rng.normal(size=(3, 4)), *bias), {}


@written("router_logits", example=_example_logits)
def router_logits(
    x: Float[Tensor, "*B d"], w: Float[Tensor, "E d"], b: Float[Tensor, " E"] | None = None
) -> Float[Tensor, "*B E"]:
    r"""One score per token and expert, by a linear map.

    Equation: `router-logits` $\mathbf R=\mathbf X\mathbf W_r+\mathbf 1b_r^\top$
    Shapes: x (..., d_model), w (E, d_model), b (E,) -> (..., E)
    Raises: ValueError if the widths do not match.
    Source: notes §8.8 (i).
    """
    return linear(x, w, b)


@written(
    "router_mlp",
    example=lambda rng: ((rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=(3, 5))), {}),
)
def router_mlp(
    x: Float[Tensor, "*B d"], w_hidden: Float[Tensor, "h d"], w_out: Float[Tensor, "E h"]
) -> Float[Tensor, "*B E"]:
    r"""One score per token and expert, by a network with one hidden layer.

    Equation: `router-mlp` $\mathbf R=\phi_{\rm act}(\mathbf X\mathbf W_1)\mathbf W_2$, then the softmax, with SiLU
    Shapes: x (..., d_model), w_hidden (h, d_model), w_out (E, h) -> (..., E)
    Raises: ValueError if the widths do not match.
    Source: deepseek (MoE for transformers).
    Differs: an option; the documents disagree, and one linear map is usual (erratum 36).
    """
    return linear(silu(linear(x, w_hidden)), w_out)


@written("gating_softmax", example=lambda rng: ((rng.normal(size=[(2, 3, 4), (5, 1), (0, 3)][rng.integers(3)]),), {}))
def gating_softmax(r: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
    r"""Gate probabilities: experts compete for the token.

    Equation: `gating-softmax` $\mathbf P=\mathrm{softmax}(\mathbf R)$
    Shapes: r (..., E) -> (..., E); rows sum to 1
    Source: notes §8.8 (ii); lecture06 (MoE).
    """
    return softmax(r)


@written("gating_sigmoid", example=lambda rng: ((rng.normal(size=[(2, 3, 4), (5, 1), (0, 3)][rng.integers(3)]),), {}))
def gating_sigmoid(r: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
    r"""Affinities: every expert is judged by itself; `topk_renormalise` makes weights of the chosen.

    Equation: `gating-sigmoid` $s_e=\sigma(x^\top c_e)$, normalised over the chosen
    Shapes: r (..., E) -> (..., E); each in (0, 1)
    Source: deepseek (the slide on biases); DeepSeek-V3 2024.
    """
    return r.sigmoid()


@written("topk_renormalise", example=_example_choice)
def topk_renormalise(p: Float[Tensor, "*B E"], routed: Mask) -> Float[Tensor, "*B E"]:
    r"""Weights of the chosen experts in proportion to their scores; 0 for the others.

    Equation: `topk-renormalise` $\tilde P_e=P_e/\sum_{j\in\mathcal T_k}P_j$ for $e\in\mathcal T_k$, else 0
    Shapes: p (..., E), routed booleans (..., E) -> (..., E); rows with a chosen expert sum to 1
    Raises: ValueError for a choice of another shape or type.
    Source: notes §8.8 (iii).
    Differs: the sum is over the chosen experts, not over the first k of all (erratum 38).
    """
    routed = check_routed("topk_renormalise", routed, p.shape)
    kept = where(routed, p, 0.0)
    total = kept.sum(-1, keepdims=True)
    return kept / where(routed.any(-1, keepdims=True), total, 1.0)


@written(
    "keep_topk",
    example=lambda rng: ((spread_scores(rng, *[(2, 3, 4), (3, 5)][rng.integers(2)]), int(rng.integers(1, 5))), {}),
)
def keep_topk(h: Float[Tensor, "*B E"], k: int) -> Float[Tensor, "*B E"]:
    r"""Softmax over the k largest logits alone.

    Equation: `keep-topk` $\mathrm{softmax}(\mathrm{KeepTopK}(H,k))$, dropped entries $-\infty$
    Shapes: h (..., E) -> (..., E); k entries of a row above 0, sum 1
    Raises: ValueError unless 1 <= k <= E.
    Source: lecture06 (noisy top-k gating); Shazeer et al. 2017.
    """
    return softmax(where(top_k(h, k), h, -np.inf))


def _example_noisy(rng):
    return (
        rng.normal(size=(2, 3, 4)),
        rng.normal(size=(5, 4)),
        rng.normal(size=(5, 4)),
        rng.normal(size=(2, 3, 5)),
    ), {}


@written("noisy_logits", example=_example_noisy)
def noisy_logits(
    x: Float[Tensor, "*B d"],
    w_gate: Float[Tensor, "E d"],
    w_noise: Float[Tensor, "E d"],
    noise: Any = None,
) -> Float[Tensor, "*B E"]:
    r"""Router logits with noise of learnt size, so that training tries other experts too.

    Equation: `noisy-topk-gating` $H_i=(xW_g)_i+\epsilon_i\,\mathrm{softplus}((xW_{\rm noise})_i)$, then `keep_topk`
    Shapes: x (..., d_model), weights (E, d_model), noise (..., E) standard normal or None in evaluation -> (..., E)
    Raises: ValueError if a width or the noise does not match.
    Source: lecture06 (noisy top-k gating); Shazeer et al. 2017.
    """
    clean = linear(x, w_gate)
    if noise is None:
        return clean
    noise = as_tensor(noise)
    require(noise.shape == clean.shape, "noisy_logits", "the noise", f"of shape {clean.shape}", noise)
    return clean + noise * ops.logaddexp(linear(x, w_noise), 0.0)


@written("switch_top1", example=lambda rng: ((spread_scores(rng, *[(2, 3, 4), (5, 2)][rng.integers(2)]) + 9,), {}))
def switch_top1(p: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
    r"""One expert a token, weighted by its probability, which is how the router learns at k = 1.

    Equation: `switch-top1` $k=1$, output scaled by the gate value
    Shapes: p (..., E) -> (..., E), one entry of a row above 0
    Source: lecture06 (the figure of the Switch encoder block); Fedus et al. 2021.
    """
    return where(top_k(p, 1), p, 0.0)


def _example_gshard(rng):
    p = spread_scores(rng, *[(2, 3, 4), (5, 2)][rng.integers(2)]) + 9
    return (p, rng.integers(2, size=(*p.shape[:-1],)).astype(int) if rng.integers(2) else None), {}


@written("gshard_top2", example=_example_gshard)
def gshard_top2(p: Float[Tensor, "*B E"], uniforms: Any = None) -> Float[Tensor, "*B E"]:
    r"""Two experts a token; in training a weak second one is often skipped.

    Equation: `moe-gshard-top2` gates renormalised over the two; the second kept with probability $\min(1,2\tilde P_2)$
    Shapes: p (..., E), uniforms (...) in [0, 1) or None to keep always (evaluation) -> (..., E)
    Raises: ValueError for fewer than two experts, or for uniforms of another shape.
    Source: notes §8.8 (named there); Lepikhin et al. 2020 (GShard).
    """
    check_k("gshard_top2", 2, p.shape[-1])
    both = top_k(p, 2)
    gates = topk_renormalise(p, both)
    if uniforms is None:
        return gates
    uniforms = frozen(uniforms)
    require(uniforms.shape == p.shape[:-1], "gshard_top2", "the uniforms", f"of shape {p.shape[:-1]}", uniforms)
    second = both & ~top_k(p, 1)
    skipped = second & (uniforms[..., None] >= 2 * gates.data)
    return gates.masked_fill(skipped, 0.0)


def expert_choice(p: Any, C: int) -> Bool[np.ndarray, "N E"]:
    r"""Turned round: every expert takes the C tokens that want it most.

    Equation: `moe-expert-choice` each expert takes its $C=c_{\rm cap}kBL/E$ tokens of highest $P_{t,e}$
    Shapes: p (N, E) over all tokens -> booleans (N, E), C true in every column; a token may get no or many experts
    Raises: ValueError unless 1 <= C <= N.
    Source: topics #18 (named there); Zhou et al. 2022. A token's experts depend on later tokens: not causal.
    """
    p = frozen(p)
    require(p.ndim == 2, "expert_choice", "the probabilities", "of shape (N, E)", p)
    fits = isinstance(C, int | np.integer) and bool(1 <= C <= len(p))
    require(fits, "expert_choice", "the capacity C", f"an integer in 1..{len(p)}, the number of tokens", C)
    return np.ascontiguousarray(top_k(p.T, C).T)
