r"""Optimisers with a step size per coordinate, in the words of their equations.

`Adam` here is the textbook form. `minillm.optim.AdamW` is the one that training runs: the same equation on one flat
buffer, with decoupled decay. They are held against each other by a test.
"""

from collections.abc import Sequence

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.optim.optimizer import Optimizer


class AdaGrad(Optimizer):
    r"""Steps divided by the root of all squared gradients so far.

    Equation: `adagrad` $n\leftarrow n+g^2,\ \theta\leftarrow\theta-\eta g/(\sqrt n+\varepsilon_0)$
    Raises: ValueError unless eps is positive.
    Source: topics #6; Duchi, Hazan and Singer 2011.
    """

    slots = ("n",)

    def __init__(self, parameters: Sequence[Tensor], lr: float, eps: float = 1e-10):
        super().__init__(parameters, lr)
        require_positive(eps, "AdaGrad", "eps")
        self.eps = eps

    def update(self, theta: np.ndarray, g: np.ndarray, *slots: np.ndarray) -> None:
        (n,) = slots
        n += g * g
        theta -= self.lr * g / (np.sqrt(n) + self.eps)


class RMSProp(Optimizer):
    r"""Steps divided by the root of a running mean of squared gradients.

    Equation: `rmsprop` $n\leftarrow\beta_2n+(1-\beta_2)g^2,\ \theta\leftarrow\theta-\eta g/(\sqrt n+\varepsilon_0)$
    Raises: ValueError unless 0 <= beta2 < 1 and eps is positive.
    Source: topics #6; Hinton's lecture 6e, 2012.
    """

    slots = ("n",)

    def __init__(self, parameters: Sequence[Tensor], lr: float, beta2: float = 0.99, eps: float = 1e-8):
        super().__init__(parameters, lr)
        require(0 <= beta2 < 1, "RMSProp", "beta2", "in [0, 1)", beta2)
        require_positive(eps, "RMSProp", "eps")
        self.beta2, self.eps = beta2, eps

    def update(self, theta: np.ndarray, g: np.ndarray, *slots: np.ndarray) -> None:
        (n,) = slots
        n *= self.beta2
        n += (1 - self.beta2) * g * g
        theta -= self.lr * g / (np.sqrt(n) + self.eps)


class Adam(Optimizer):
    r"""Running means of gradient and squared gradient, corrected for having started at 0.

    Equation: `adam` $m\leftarrow\beta_1m+(1-\beta_1)g,\ n\leftarrow\beta_2n+(1-\beta_2)g^2,\ \hat m=\frac m{1-\beta_1^t},\ \hat n=\frac n{1-\beta_2^t},\ \theta\leftarrow\theta-\eta\frac{\hat m}{\sqrt{\hat n}+\varepsilon_0}$
    Equation: `adam-beta2` the mean of squares remembers about $1/(1-\beta_2)$ steps
    Raises: ValueError for settings out of range.
    Source: topics #6, #22; Kingma and Ba 2015.

    ``l2`` adds $\lambda\theta$ to the gradient, the classical penalty, which the division then rescales; AdamW does not.
    """

    slots = ("m", "n")

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
    ):
        super().__init__(parameters, lr)
        require(all(0 <= b < 1 for b in betas), "Adam", "betas", "in [0, 1)", betas)
        require_positive(eps, "Adam", "eps")
        require_positive(l2, "Adam", "l2", zero_ok=True)
        self.betas, self.eps, self.l2 = betas, eps, l2

    def update(self, theta: np.ndarray, g: np.ndarray, *slots: np.ndarray) -> None:
        (m, n), (beta1, beta2) = slots, self.betas
        g = g + self.l2 * theta
        m *= beta1
        m += (1 - beta1) * g
        n *= beta2
        n += (1 - beta2) * g * g
        m_hat, n_hat = m / (1 - beta1**self.t), n / (1 - beta2**self.t)
        theta -= self.lr * m_hat / (np.sqrt(n_hat) + self.eps)
