"""The truth for this family: one step of `minillm.optim.AdamW`, on one tensor that decays."""

import numpy as np

from minillm import optim
from minillm.autograd import Tensor

Arrays = tuple[np.ndarray, ...]


def adamw(
    theta: Tensor, g: Tensor, m: Tensor, n: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, t: int, scale: float,
) -> Arrays:  # fmt: skip
    """theta, g, m, n (*S) -> theta, m, n (*S) after step t, with the gradient shortened by scale."""
    matrix = Tensor(theta.numpy().reshape(1, -1).copy())  # vectors would not decay
    optimizer = optim.AdamW([matrix], lr, (beta1, beta2), eps, weight_decay)
    optimizer.load_state_dict(
        {"t": np.asarray(t - 1), "m.0": m.numpy().reshape(1, -1), "n.0": n.numpy().reshape(1, -1)}
    )  # fmt: skip
    optimizer.step([[g.numpy() * scale]])
    state = optimizer.state_dict()
    return tuple(a.reshape(theta.shape) for a in (matrix.numpy(), state["m.0"], state["n.0"]))


def adamw_master(
    theta: Tensor, master: Tensor, g: Tensor, m: Tensor, n: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, t: int, scale: float,
) -> Arrays:  # fmt: skip
    """All (*S) -> theta, master, m, n (*S): the master is updated, theta is its rounding and is not read."""
    weight, m, n = adamw(master, g, m, n, lr, beta1, beta2, eps, weight_decay, t, scale)  # type: ignore[assignment]
    return weight, weight, m, n  # type: ignore[return-value]
