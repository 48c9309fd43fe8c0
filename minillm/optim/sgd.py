r"""Gradient descent, plain and with momentum."""

from collections.abc import Sequence

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.optim.optimizer import Optimizer


class SGD(Optimizer):
    r"""Gradient descent; stochastic when the gradient is that of a random batch.

    Equation: `gd-sgd` $\theta\leftarrow\theta-\eta g$
    Raises: ValueError without parameters or for a negative learning rate.
    Source: deepseek (common algorithm); topics #6.
    """

    def update(self, theta: np.ndarray, g: np.ndarray, *slots: np.ndarray) -> None:
        theta -= self.lr * g


class Momentum(Optimizer):
    r"""Gradient descent with a running sum of gradients, heavy ball or Nesterov's look ahead.

    Equation: `momentum` $v\leftarrow\mu v+g$; heavy ball $\theta\leftarrow\theta-\eta v$, Nesterov $\theta\leftarrow\theta-\eta(g+\mu v)$
    Raises: ValueError unless 0 <= mu < 1.
    Source: topics #6; Polyak 1964; Nesterov 1983.
    """

    slots = ("v",)

    def __init__(self, parameters: Sequence[Tensor], lr: float, mu: float = 0.9, nesterov: bool = False):
        super().__init__(parameters, lr)
        require(0 <= mu < 1, "Momentum", "mu", "in [0, 1)", mu)
        self.mu, self.nesterov = mu, nesterov

    def update(self, theta: np.ndarray, g: np.ndarray, *slots: np.ndarray) -> None:
        (v,) = slots
        v *= self.mu
        v += g
        theta -= self.lr * (g + self.mu * v if self.nesterov else v)
