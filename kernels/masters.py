"""The optimiser of a network on the device: float32 weights and moments behind parameters of any precision.

It steps by `kernels.adamw` and gives and takes the state of `minillm.optim.AdamW`, so that checkpoints fit both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minillm.optim import AdamW


class Masters:
    r"""AdamW on a network's parameters, with float32 masters where the parameters have 16 bits.

    Equation: `adamw` $\theta\leftarrow\theta-\eta(\frac{\hat m}{\sqrt{\hat n}+\varepsilon_0}+\lambda_{wd}\theta)$
    Equation: `master-weights` the float32 copy is updated, the parameter is its rounding
    Equation: `grad-clip` $g\leftarrow g\min(1,c/(\lVert g\rVert+\varepsilon_0))$
    Equation: `wd-param-groups` vectors are not decayed
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: AdamW):
        self.parameters, self.settings, self.t = list(parameters), settings, 0
        self.low = parameters[0].dtype != torch.float32
        self.weights = [p.detach().float() if self.low else p.detach() for p in parameters]
        self.m, self.n = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> float:
        """Update once from the parameters' gradients; their norm. Nothing changes where it is not finite."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
        if not torch.isfinite(norm):
            return float(norm)
        self.t += 1
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        (beta1, beta2), s = self.settings.betas, self.settings
        for p, w, g, m, n in zip(self.parameters, self.weights, gradients, self.m, self.n):
            g = g.float() * scale
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            n.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if w.ndim >= 2:
                w.mul_(1 - lr * s.weight_decay)
            w.sub_(m * (lr / (1 - beta1**self.t)) / (n.sqrt() / (1 - beta2**self.t) ** 0.5 + s.eps))
            if self.low:
                p.copy_(w)
        return float(norm)

    @torch.no_grad()
    def load(self, weights: Sequence[np.ndarray], state: Mapping[str, Any]) -> None:
        """Take weights and the state of `minillm.optim.AdamW`."""
        self.t = int(state["t"])
        for i, weight in enumerate(weights):
            self.weights[i].copy_(_tensor(weight))
            self.m[i].copy_(_tensor(state[f"m.{i}"]))
            self.n[i].copy_(_tensor(state[f"n.{i}"]))
            if self.low:
                self.parameters[i].copy_(self.weights[i])

    def arrays(self) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Weights, and the state as `minillm.optim.AdamW` takes it."""
        state = {"t": np.asarray(self.t, np.int64)}
        for i, (m, n) in enumerate(zip(self.m, self.n)):
            state |= {f"m.{i}": _array(m), f"n.{i}": _array(n)}
        return [_array(w) for w in self.weights], state


def optimizer(parameters: Sequence[nn.Parameter], settings: AdamW) -> Masters:
    """The optimiser of a network with the settings of the NumPy side's."""
    return Masters(parameters, settings)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32).reshape(np.shape(array)))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
