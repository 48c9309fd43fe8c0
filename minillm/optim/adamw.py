r"""AdamW on one flat buffer."""

from collections.abc import Sequence

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive

CHUNK = 1 << 15  # elements: the five streams of an update then stay in the second-level cache


class AdamW:
    r"""Adam with bias correction and decoupled weight decay.

    Equation: `adam` $m\leftarrow\beta_1m+(1-\beta_1)g,\ n\leftarrow\beta_2n+(1-\beta_2)g^2,\ \theta\mathrel{-}=\eta\frac{\hat m}{\sqrt{\hat n}+\varepsilon_0}$
    Equation: `adamw` $\theta\leftarrow\theta-\eta(\frac{\hat m}{\sqrt{\hat n}+\varepsilon_0}+\lambda_{wd}\theta)$
    Equation: `wd-param-groups` vectors (norm gains, biases) are not decayed
    Equation: `grad-clip` $g\leftarrow g\min(1,c/(\lVert g\rVert+\varepsilon_0))$, one norm over all parameters
    Shapes: parameters of any shape; they become views of one flat buffer, as do the moments.
    Raises: ValueError for an empty or mixed-precision list of parameters, or settings out of range; FloatingPointError
        from `step` when the gradient is not finite, before anything is changed.
    Source: topics #6, #22; Loshchilov and Hutter 2019.

    The parameters are laid out one after another, the decayed ones first, so that an update is a few passes
    over contiguous memory, cut into chunks that stay in the cache, instead of a dozen small calls per tensor.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        require(len(parameters) > 0, "AdamW", "the parameters", "at least one tensor", "an empty list")
        dtypes = {p.dtype for p in parameters}
        require(len(dtypes) == 1, "AdamW", "the parameters", "of one precision", ", ".join(sorted(map(str, dtypes))))
        require_positive(lr, "AdamW", "lr", zero_ok=True)
        require_positive(eps, "AdamW", "eps")
        require_positive(weight_decay, "AdamW", "weight_decay", zero_ok=True)
        require(all(0 <= b < 1 for b in betas), "AdamW", "betas", "in [0, 1)", betas)
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.parameters = list(parameters)
        self.t = 0
        self._order = sorted(range(len(parameters)), key=lambda i: parameters[i].ndim < 2)
        self._decayed = sum(p.size for p in parameters if p.ndim >= 2)
        self._flat = self._move_into_one_buffer()
        self._gradient = np.zeros_like(self._flat)
        self._m, self._n = np.zeros_like(self._flat), np.zeros_like(self._flat)

    def _move_into_one_buffer(self) -> np.ndarray:
        flat = np.empty(sum(p.size for p in self.parameters), self.parameters[0].dtype)
        self._slots: list[slice] = [slice(0)] * len(self.parameters)
        start = 0
        for i in self._order:
            p = self.parameters[i]
            slot = self._slots[i] = slice(start, start + p.size)
            flat[slot] = p.data.reshape(-1)
            p.data = flat[slot].reshape(p.shape)
            start += p.size
        return flat

    def step(self, gradients: Sequence[Sequence[np.ndarray]] | None = None, max_norm: float | None = None) -> float:
        r"""Update the parameters once and return the gradient's norm before clipping.

        Equation: `grad-clip` $g\leftarrow g\min(1,c/(\lVert g\rVert+\varepsilon_0))$
        Shapes: gradients: one list per share of the batch (worker or micro-batch), each with one array per parameter;
            shares are added. Without it, ``.grad`` of the parameters is used.
        Raises: FloatingPointError if the norm is not finite; nothing is changed then.
        """
        self._collect(gradients)
        norm = float(np.sqrt(np.dot(self._gradient, self._gradient)))
        if not np.isfinite(norm):
            raise FloatingPointError(
                f"AdamW: the gradient's norm must be finite, got {norm}. The parameters are unchanged; "
                "lower the learning rate or look for a division by zero in the loss."
            )
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        self.t += 1
        for start in range(0, self._flat.size, CHUNK):
            self._update(slice(start, min(start + CHUNK, self._flat.size)), scale)
        return norm

    def _collect(self, gradients: Sequence[Sequence[np.ndarray]] | None) -> None:
        """Add the shares of the gradient into the flat buffer."""
        shares = gradients if gradients is not None else [[_grad_of(p) for p in self.parameters]]
        for i, slot in enumerate(self._slots):
            target = self._gradient[slot]
            if len(shares) == 1:
                target[...] = shares[0][i].reshape(-1)
            else:
                np.add(shares[0][i].reshape(-1), shares[1][i].reshape(-1), out=target)
                for share in shares[2:]:
                    target += share[i].reshape(-1)

    def _update(self, part: slice, scale: float) -> None:
        """The equations for one chunk. Scalars are Python floats, which adopt the arrays' precision."""
        (beta1, beta2), theta = self.betas, self._flat[part]
        g, m, n = self._gradient[part], self._m[part], self._n[part]
        if scale != 1.0:
            g *= scale
        work = g * (1 - beta1)
        m *= beta1
        m += work
        np.multiply(g, g, out=work)
        work *= 1 - beta2
        n *= beta2
        n += work
        np.sqrt(n, out=work)
        work *= 1 / (1 - beta2**self.t) ** 0.5
        work += self.eps
        np.divide(m, work, out=work)
        work *= self.lr / (1 - beta1**self.t)
        decayed = max(0, min(part.stop, self._decayed) - part.start)
        if self.weight_decay and decayed:
            theta[:decayed] *= 1 - self.lr * self.weight_decay
        theta -= work

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """The step count and both moments, per parameter: what a checkpoint needs to go on."""
        state: dict[str, np.ndarray] = {"t": np.asarray(self.t, dtype=np.int64)}
        for i, slot in enumerate(self._slots):
            state[f"m.{i}"] = self._m[slot].reshape(self.parameters[i].shape)
            state[f"n.{i}"] = self._n[slot].reshape(self.parameters[i].shape)
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state_dict` returned, for the same parameters.

        Raises: ValueError if names or shapes differ; nothing is changed then.
        """
        own = self.state_dict()
        require(
            own.keys() == state.keys(),
            "AdamW.load_state_dict",
            "the entries",
            f"{len(own)} named t, m.i, n.i",
            f"{len(state)} others",
        )
        for key, value in own.items():
            require(
                np.shape(state[key]) == value.shape,
                "AdamW.load_state_dict",
                key,
                f"of shape {value.shape}",
                np.asarray(state[key]),
            )
        self.t = int(state["t"])
        for key, value in own.items():
            if key != "t":
                value[...] = state[key]


def _grad_of(p: Tensor) -> np.ndarray:
    return np.zeros(p.shape, p.dtype) if p.grad is None else p.grad.data
