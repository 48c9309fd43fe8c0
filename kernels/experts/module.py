"""The layer as a torch module, with the parameters of `minillm.nn.MixtureOfExperts` so that state dicts fit."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts.op import mixture_of_experts, route
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.balance import updated_bias

ROUTERS = ("softmax", "sigmoid", "switch")
INIT_STD = 0.02


class Routing(NamedTuple):
    """What one pass of a layer routed: the losses to add, and how many tokens wanted each expert."""

    gates: Tensor  # (N, k)
    experts: Tensor  # (N, k)
    loads: Tensor  # (E,)
    aux_loss: Tensor
    z_loss: Tensor
    capacity: int | None

    @property
    def dropped(self) -> Tensor:
        """The share of assignments that found no place."""
        if self.capacity is None:
            return torch.zeros((), device=self.loads.device)
        return (self.loads - self.capacity).clamp(min=0).sum() / max(self.experts.numel(), 1)


class MixtureOfExperts(nn.Module):
    r"""E SwiGLU experts of which every token visits k, and K_s that all visit, on the kernels of this family.

    Routers: ``softmax`` over all experts, renormalised over the chosen; ``sigmoid`` with a bias that takes part in the
    choice only (`update_bias`); ``switch``, one expert weighted by its probability. Parameters have the names and
    shapes of `minillm.nn.MixtureOfExperts`. The router's product is torch's, in the dtype of x.

    Equation: `router-logits` $\mathbf R=\mathbf X\mathbf W_r$
    Equation: `moe-output` $y=\sum_{e\in\mathcal T}g_eE_e(x)$
    Equation: `moe-shared-experts` the K_s shared experts lie side by side in one network of width $K_sd_{\rm ff}$
    Equation: `moe-capacity` with a capacity factor, $C=\lceil c_{\rm cap}kN/E\rceil$
    Shapes: x (..., d_model) -> (..., d_model)
    Raises: ValueError for sizes that do not fit, or a router that has no kernel here.
    Source: notes §8.8; deepseek (MoE).
    """

    bias: nn.Parameter | None

    def __init__(
        self, d_model: int, d_ff: int, n_experts: int, k: int, *, router: str = "softmax", n_shared: int = 0,
        capacity_factor: float | None = None, scale: float = 1.0, std: float = INIT_STD, std_out: float = INIT_STD,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        where = "MixtureOfExperts"
        for value, name in ((d_model, "d_model"), (d_ff, "d_ff"), (n_experts, "n_experts"), (k, "k")):
            require_positive(value, where, name, integer=True)
        require(k <= n_experts, where, "k", f"at most the number of experts, {n_experts}", k)
        require_positive(n_shared, where, "n_shared", integer=True, zero_ok=True)
        require_one_of(router, ROUTERS, where, "router")
        require(router != "switch" or k == 1, where, "k", "1 for the router 'switch'", k)
        require_positive(scale, where, "scale")
        if capacity_factor is not None:
            require_positive(capacity_factor, where, "capacity_factor")
        self.d_model, self.n_experts, self.k, self.router = d_model, n_experts, k, router
        self.capacity_factor, self.scale, self.n_shared = capacity_factor, scale, n_shared

        def normal(size: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, device=device, dtype=dtype) * size)

        self.w_router = normal(std, n_experts, d_model)
        bias = nn.Parameter(torch.zeros(n_experts, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", bias if router == "sigmoid" else None)
        self.w_in = normal(std, n_experts, 2 * d_ff, d_model)
        self.w_down = normal(std_out, n_experts, d_model, d_ff)
        if n_shared:
            self.shared_in = normal(std, n_shared * 2 * d_ff, d_model)
            self.shared_down = normal(std_out, d_model, n_shared * d_ff)

    def forward(self, x: Tensor, record: list[Routing] | None = None) -> Tensor:
        """Route, run, combine; append the routing to ``record`` when a list is given."""
        require(x.shape[-1] == self.d_model, "MixtureOfExperts", "x", f"of shape (..., {self.d_model})", x)
        rows = x.reshape(-1, self.d_model)  # (N, d_model)
        N, C = len(rows), None
        logits = F.linear(rows, self.w_router)  # (N, E)
        scoring = "sigmoid" if self.router == "sigmoid" else "softmax"
        gates, experts, loads, aux, z = route(logits, self.bias, self.k, scoring, self.router != "switch")
        if self.scale != 1.0:
            gates = gates * self.scale
        if self.capacity_factor is not None and N:
            # minillm.functional.capacity.capacity, whose checks a tracer cannot follow
            C = math.ceil(self.capacity_factor * self.k * N / self.n_experts - 1e-9)
        y = mixture_of_experts(rows, gates, self.w_in, self.w_down, experts, C)
        if self.n_shared:  # one expert that everybody visits, with weight 1
            y = y + mixture_of_experts(
                rows, gates.new_ones((N, 1)), self.shared_in[None], self.shared_down[None], experts.new_zeros((N, 1))
            )
        if record is not None:
            record.append(Routing(gates, experts, loads, aux, z, C))
        return y.reshape(x.shape)

    @torch.no_grad()
    def update_bias(self, loads: Tensor, rate: float = 1e-3) -> None:
        """Raise the experts with too few tokens and lower those with too many, for the sigmoid router."""
        require(self.bias is not None, "update_bias", "the router", "'sigmoid', which has a bias", self.router)
        assert self.bias is not None
        moved = updated_bias(self.bias.float().cpu().numpy(), loads.cpu().numpy(), rate)
        self.bias.copy_(torch.from_numpy(moved))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.d_model}, {self.n_experts} experts, k={self.k}, router={self.router!r}, n_shared={self.n_shared}"
