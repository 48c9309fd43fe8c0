r"""What the place of the norm does to a deep stack, measured: the stream's variance, gradients, the need of warm-up.

The stacks are feed-forward blocks of random weights with residual additions; attention changes none of the effects.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, grad
from minillm.checks import require, require_one_of, require_positive
from minillm.fused.losses import cross_entropy
from minillm.nn.module import Module, parameter
from minillm.nn.norms import LayerNorm
from minillm.optim import AdamW

PLACEMENTS = ("pre", "post")


class ResidualStack(Module):
    r"""Feed-forward blocks with the norm before the branch or after the addition, and a linear head.

    Equation: `pre-ln` $\mathbf x\leftarrow\mathbf x+F(\mathrm{LN}(\mathbf x))$
    Equation: `post-ln` $\mathbf x\leftarrow\mathrm{LN}(\mathbf x+F(\mathbf x))$
    Equation: `final-ln` $\mathbf h=\mathrm{LN}(\mathbf x^{(N)})$ with the norm before
    Shapes: x (N, d) -> logits (N, n_classes)
    Raises: ValueError for an unknown placement or sizes that are not positive.
    Source: notes §4.7, §8; topics #21.
    """

    def __init__(self, depth: int, d: int, n_classes: int, placement: str, rng: np.random.Generator):
        require_one_of(placement, PLACEMENTS, "ResidualStack", "placement")
        for name, value in (("depth", depth), ("d", d), ("n_classes", n_classes)):
            require_positive(value, "ResidualStack", name, integer=True)
        self.placement = placement
        self.w_1 = [_Matrix(rng.normal(size=(d, d)) * np.sqrt(2 / d)) for _ in range(depth)]
        self.w_2 = [_Matrix(rng.normal(size=(d, d)) / np.sqrt(d)) for _ in range(depth)]
        self.norms = [LayerNorm(d) for _ in range(depth + (placement == "pre"))]
        self.head = parameter(rng.normal(size=(n_classes, d)) / np.sqrt(d))

    def streams(self, x: Tensor) -> list[Tensor]:
        """The stream before the first block and after each: depth + 1 of (N, d)."""
        found = [x]
        for w_1, w_2, norm in zip(self.w_1, self.w_2, self.norms, strict=False):
            if self.placement == "pre":
                x = x + _branch(norm(x), w_1, w_2)
            else:
                x = norm(x + _branch(x, w_1, w_2))
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = self.streams(x)[-1]
        return (self.norms[-1](x) if self.placement == "pre" else x) @ self.head.T


class _Matrix(Module):
    def __init__(self, weight: np.ndarray):
        self.weight = parameter(weight)


def _branch(x: Tensor, w_1: Any, w_2: Any) -> Tensor:
    return (x @ w_1.weight.T).relu() @ w_2.weight.T


def stream_variance(
    depth: int, placement: str, rng: np.random.Generator, d: int = 128, n: int = 64
) -> Float[np.ndarray, " depth_plus_1"]:
    r"""The variance of the stream before the first block and after each, at initialisation.

    Equation: `pre-ln` the variance grows about linearly with depth
    Equation: `post-ln` it stays 1
    Shapes: -> (depth + 1,)
    Raises: ValueError as `ResidualStack` does.
    Source: notes §4.7; topics #21.
    Differs: with the norm before, the branches are bounded and the stream is not (erratum 13).
    """
    stack = ResidualStack(depth, d, 2, placement, rng)
    x = Tensor(rng.normal(size=(n, d)).astype(np.float32))
    return np.array([float(stream.data.var()) for stream in stack.streams(x)])


def last_layer_gradient(
    depth: int, placement: str, rng: np.random.Generator, d: int = 64, n: int = 64, n_classes: int = 10
) -> float:
    r"""The length of the loss's gradient for the last block's second matrix, at initialisation.

    Equation: `norm-gradient-flow` $O(1/\sqrt{N_{\rm layer}})$ with the norm before, $O(1)$ after
    Shapes: -> a length
    Raises: ValueError as `ResidualStack` does.
    Source: topics #21; notes §4.7; Xiong et al. 2020.
    """
    stack = ResidualStack(depth, d, n_classes, placement, rng)
    x = Tensor(rng.normal(size=(n, d)).astype(np.float32))
    loss = cross_entropy(stack(x), rng.integers(n_classes, size=n))
    (gradient,) = grad([loss], [stack.w_2[-1].weight])
    return float(np.linalg.norm(gradient.data))


class WarmupTrial(NamedTuple):
    """Training losses, one a step, without and with warm-up."""

    without: Float[np.ndarray, " steps"]
    with_warmup: Float[np.ndarray, " steps"]


def warmup_trial(
    placement: str,
    seed: int,
    *,
    depth: int = 12,
    d: int = 32,
    steps: int = 120,
    lr: float = 1e-2,
    warmup: int = 60,
    n: int = 256,
) -> WarmupTrial:
    r"""The same stack on the same task at the same rate, with and without warm-up.

    Equation: `warmup-need` $\eta_t=\eta\min(1,t/t_w)$ against $\eta_t=\eta$
    Equation: `wn-preln-speed` the losses by placement tell how much faster one learns here
    Shapes: -> two of (steps,)
    Raises: ValueError as `ResidualStack` does, or unless warm-up fits into the steps.
    Source: notes §4.7, §8.
    Differs: figures for the speed of convergence depend on the setting; they are reported, not asserted (erratum 14).
    """
    require_positive(steps, "warmup_trial", "steps", integer=True)
    require_positive(warmup, "warmup_trial", "warmup", integer=True)
    require(warmup <= steps, "warmup_trial", "warmup", f"at most steps = {steps}", warmup)
    curves = []
    for ramp in (1, warmup):
        rng = np.random.default_rng(seed)
        stack = ResidualStack(depth, d, 4, placement, rng)
        x = Tensor(rng.normal(size=(n, d)).astype(np.float32))
        labels = np.argmax(np.tanh(x.data @ rng.normal(size=(d, 16))) @ rng.normal(size=(16, 4)), axis=1)
        optimiser = AdamW(stack.parameters(), lr, weight_decay=0.0)
        losses = []
        for t in range(1, steps + 1):
            loss = cross_entropy(stack(x), labels)
            optimiser.lr = lr * min(1.0, t / ramp)
            optimiser.step([[g.data for g in grad([loss], stack.parameters())]])
            losses.append(loss.item())
        curves.append(np.array(losses))
    return WarmupTrial(*curves)
