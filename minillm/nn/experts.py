r"""A feed-forward layer of experts: router, choice, capacity, experts, and a record of what was routed where."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import Tensor
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.balance import aux_loss, biased_choice, updated_bias, z_loss
from minillm.functional.capacity import capacity, drop_overflow, drop_rate, reroute_overflow, rerouted_gates
from minillm.functional.experts import ACTIVATIONS, GATED
from minillm.functional.routing import (
    check_groups,
    gshard_top2,
    noisy_logits,
    router_mlp,
    switch_top1,
    top_k,
    topk_renormalise,
    within_groups,
)
from minillm.fused.activations import geglu, swiglu
from minillm.fused.experts import mixture_of_experts
from minillm.fused.linear import linear
from minillm.fused.softmax import softmax
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter

ROUTERS = ("softmax", "sigmoid", "noisy", "switch", "gshard")
OVERFLOWS = ("drop", "reroute")


class Routing(NamedTuple):
    """What one pass of a layer routed: (N, E) router logits, scores with sum 1, wanted and served assignments."""

    logits: Float[Tensor, "N E"]
    p: Float[Tensor, "N E"]
    routed: Bool[np.ndarray, "N E"]
    served: Bool[np.ndarray, "N E"]

    @property
    def aux_loss(self) -> Tensor:
        """The load-balancing loss, 1 when even; see `minillm.functional.balance`."""
        return aux_loss(self.p, self.routed)

    @property
    def z_loss(self) -> Tensor:
        """The mean squared log-partition of the router."""
        return z_loss(self.logits)

    @property
    def loads(self) -> Int[np.ndarray, " E"]:
        """How many tokens wanted each expert."""
        return self.routed.sum(0)

    @property
    def dropped(self) -> float:
        """The share of assignments that found no place."""
        return drop_rate(self.routed, self.served)


class MixtureOfExperts(Module):
    r"""E experts of which every token visits k, and K_s that all visit.

    Routers: ``softmax`` over all experts, renormalised over the chosen; ``sigmoid`` with a bias that takes part in the
    choice only (`update_bias`); ``noisy`` top-k; ``switch``, one expert weighted by its probability; ``gshard``, two of
    which a weak second is skipped at random. Noise and skipping need ``rng`` and happen only where it is given.
    With ``n_groups`` the experts of a token come from the ``k_groups`` best groups: judged by their two largest scores
    with the bias (``sigmoid``, DeepSeek-V3), or by the largest (``softmax``, V2). ``router_hidden`` puts a hidden layer of
    that width in front of the scores; by default they are one linear map.

    Equation: `router-logits` $\mathbf R=\mathbf X\mathbf W_r$
    Equation: `router-mlp` with ``router_hidden``
    Equation: `gating-softmax` $\mathbf P=\mathrm{softmax}(\mathbf R)$, or `gating-sigmoid`
    Equation: `moe-output` $y=\sum_{e\in\mathcal T}g_eE_e(x)$, and `moe-shared-experts` with shared ones added
    Equation: `moe-shared-experts` the K_s shared experts lie side by side in one network of width $K_sd_{\rm ff}$
    Equation: `moe-bias-balancing` the bias enters the choice and no weight
    Shapes: x (..., d_model) -> (..., d_model)
    Raises: ValueError for k > E or more than the allowed groups hold, sizes that are not positive, groups of unequal
        size, or an unknown router, overflow or activation; a hidden layer in front of the noisy router.
    Source: notes §8.8; deepseek (MoE); lecture06 (MoE).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        k: int,
        rng: np.random.Generator,
        *,
        router: str = "softmax",
        router_hidden: int | None = None,
        n_shared: int = 0,
        n_groups: int = 1,
        k_groups: int = 1,
        capacity_factor: float | None = None,
        overflow: str = "drop",
        activation: str = "swiglu",
        scale: float = 1.0,
        std: float = INIT_STD,
        std_out: float = INIT_STD,
    ):
        where = "MixtureOfExperts"
        for value, name in ((d_model, "d_model"), (d_ff, "d_ff"), (n_experts, "n_experts"), (k, "k")):
            require_positive(value, where, name, integer=True)
        require(k <= n_experts, where, "k", f"at most the number of experts, {n_experts}", k)
        require_positive(n_shared, where, "n_shared", integer=True, zero_ok=True)
        require_one_of(router, ROUTERS, where, "router")
        check_groups(where, n_experts, n_groups, k_groups, k)
        grouping = router in ("sigmoid", "softmax") or n_groups == 1
        require(grouping, where, "n_groups", f"1 for the router '{router}'", n_groups)
        require_one_of(overflow, OVERFLOWS, where, "overflow")
        require_one_of(activation, ACTIVATIONS, where, "activation")
        require_positive(scale, where, "scale")
        if capacity_factor is not None:
            require_positive(capacity_factor, where, "capacity_factor")
        if router_hidden is not None:
            require_positive(router_hidden, where, "router_hidden", integer=True)
            require(router != "noisy", where, "router_hidden", "None for the router 'noisy'", router_hidden)
        fixed_k = {"switch": 1, "gshard": 2}.get(router, k)
        require(k == fixed_k, where, "k", f"{fixed_k} for the router '{router}'", k)

        self.d_model, self.n_experts, self.k, self.router = d_model, n_experts, k, router
        self.n_groups, self.k_groups = n_groups, k_groups
        self.capacity_factor, self.overflow, self.activation, self.scale = capacity_factor, overflow, activation, scale
        f_in = d_ff * (2 if activation in GATED else 1)
        hidden = router_hidden
        self.w_router_hidden = None if hidden is None else parameter(rng.normal(0.0, std, size=(hidden, d_model)))
        self.w_router = parameter(rng.normal(0.0, std, size=(n_experts, d_model if hidden is None else hidden)))
        self.w_noise = parameter(np.zeros((n_experts, d_model))) if router == "noisy" else None
        # A parameter so that it is saved with the others; no gradient reaches it, `update_bias` moves it.
        self.bias = parameter(np.zeros(n_experts)) if router == "sigmoid" else None
        self.w_in = parameter(rng.normal(0.0, std, size=(n_experts, f_in, d_model)))
        self.w_down = parameter(rng.normal(0.0, std_out, size=(n_experts, d_model, d_ff)))
        if n_shared:
            self.shared_in = parameter(rng.normal(0.0, std, size=(n_shared * f_in, d_model)))
            self.shared_down = parameter(rng.normal(0.0, std_out, size=(d_model, n_shared * d_ff)))
        self.n_shared = n_shared

    def forward(self, x: Tensor, record: list[Routing] | None = None, rng: np.random.Generator | None = None) -> Tensor:
        """Route, run, combine; append the routing to ``record`` when a list is given."""
        require(x.shape[-1] == self.d_model, "MixtureOfExperts", "x", f"of shape (..., {self.d_model})", x)
        rows = x.reshape(-1, self.d_model)  # (N, d_model)
        logits, p, gates, routed = self._route(rows, rng)
        served = self._within_capacity(p, routed)
        if self.overflow == "reroute" and served is not routed:
            gates = p if self.router == "switch" else rerouted_gates(p, routed, served) * self.scale
        y = mixture_of_experts(rows, gates, served, self.w_in, self.w_down, activation=self.activation)
        if self.n_shared:
            act = {"swiglu": swiglu, "geglu": geglu}.get(self.activation, ACTIVATIONS[self.activation])
            y = y + linear(act(linear(rows, self.shared_in)), self.shared_down)
        if record is not None:
            record.append(Routing(logits, p, routed, served))
        return y.reshape(x.shape)

    def _route(self, rows: Tensor, rng: np.random.Generator | None) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """Logits, scores, weights and the choice, each (N, E)."""
        if self.w_noise is not None:
            noise = None if rng is None else rng.normal(size=(len(rows), self.n_experts)).astype(rows.dtype)
            logits = noisy_logits(rows, self.w_router, self.w_noise, noise)
        elif self.w_router_hidden is not None:
            logits = router_mlp(rows, self.w_router_hidden, self.w_router)
        else:
            logits = linear(rows, self.w_router)
        if self.bias is not None:
            s = logits.sigmoid()
            routed = biased_choice(s, self.bias, self.k, self.n_groups, self.k_groups)
            return logits, s / s.sum(-1, keepdims=True), topk_renormalise(s, routed) * self.scale, routed
        p = softmax(logits)
        routed = top_k(within_groups(p, self.n_groups, self.k_groups, best=1), self.k)
        if self.router == "switch":
            gates = switch_top1(p)
        elif self.router == "gshard":
            gates = gshard_top2(p, None if rng is None else rng.random(len(rows)))
            routed = gates.data > 0
        else:
            gates = topk_renormalise(p, routed)
        return logits, p, gates * self.scale if self.scale != 1.0 else gates, routed

    def _within_capacity(self, p: Tensor, routed: np.ndarray) -> np.ndarray:
        if self.capacity_factor is None or not len(routed):
            return routed
        C = capacity(self.capacity_factor, len(routed), self.n_experts, self.k)
        return drop_overflow(routed, C) if self.overflow == "drop" else reroute_overflow(p, routed, C)

    def update_bias(self, loads: Any, rate: float = 1e-3) -> None:
        """Raise the experts with too few tokens and lower those with too many, for the sigmoid router."""
        require(self.bias is not None, "update_bias", "the router", "'sigmoid', which has a bias", self.router)
        assert self.bias is not None
        self.bias.data[...] = updated_bias(self.bias, loads, rate)
