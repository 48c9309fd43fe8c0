r"""AdamW on torch tensors: one step as a function, its custom op for `torch.compile`, and the optimiser.

`adamw` and `adamw_master` change their tensors in place and return them; they have no gradient of their own.
Parameters and gradients are float32, float16 or bfloat16 (in Triton's interpreter the first two), moments and masters
float32. Gradients may have any layout; what is written must have no gaps between its elements.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import launch
from kernels.adamw.launch import Batch, Settings
from kernels.checks import check_floats, check_places
from minillm.checks import require, require_positive

Triple = tuple[Tensor, Tensor, Tensor]


def adamw(
    theta: Tensor, g: Tensor, m: Tensor, n: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, t: int, scale: float = 1.0,
) -> Triple:  # fmt: skip
    r"""Step t (from 1) of one tensor, in place, with the gradient times scale.

    Equation: `adam` $m\leftarrow\beta_1m+(1-\beta_1)g,\ n\leftarrow\beta_2n+(1-\beta_2)g^2$
    Equation: `adamw` $\theta\leftarrow\theta-\eta(\frac{\hat m}{\sqrt{\hat n}+\varepsilon_0}+\lambda_{wd}\theta)$
    Shapes: theta, g, m, n (*S) -> theta, m, n (*S), the tensors given
    Raises: ValueError for shapes, layouts or settings that do not fit; TypeError for other dtypes.
    Source: topics #6, #22; Loshchilov and Hutter 2019.
    """
    settings = Settings(lr, beta1, beta2, eps, weight_decay, t)
    _step("adamw", theta, g, m, n, None, settings, scale)
    return theta, m, n


def adamw_master(
    theta: Tensor, master: Tensor, g: Tensor, m: Tensor, n: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, t: int, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r"""`adamw` of a float32 master, of which the parameter becomes the rounding.

    Equation: `master-weights` $\theta=\mathrm{round}_{16}(\theta_{32})$, and $\theta_{32}$ takes the step
    Shapes: theta, master, g, m, n (*S) -> theta, master, m, n (*S), the tensors given; theta is not read
    Raises: as `adamw`.
    Source: notes §7; Micikevicius et al. 2018.
    """
    settings = Settings(lr, beta1, beta2, eps, weight_decay, t)
    _step("adamw_master", theta, g, m, n, master, settings, scale)
    return theta, master, m, n


def _step(where: str, theta: Tensor, g: Tensor, m: Tensor, n: Tensor, master: Tensor | None, settings: Settings,
          scale: float) -> None:  # fmt: skip
    check_floats(where, (("theta", theta), ("the gradient g", g)))
    fp32 = (("m", m), ("n", n), ("the master", master))
    check_floats(where, fp32, (torch.float32,))
    check_places(
        where, [("theta", theta), ("m", m), ("n", n), *([("the master", master)] if master is not None else [])]
    )
    require(g.shape == theta.shape, where, "the gradient g", f"of theta's shape {tuple(theta.shape)}", g)
    require(_dense(theta), where, "theta", "without gaps between its elements", f"strides {theta.stride()}")
    for name, tensor in fp32:
        fits = tensor is None or (tensor.shape == theta.shape and _same_strides(tensor, theta))
        require(fits, where, name, f"of theta's shape {tuple(theta.shape)} and strides {theta.stride()}", tensor)
    _check_settings(where, settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay)
    require_positive(settings.t, where, "t", integer=True)
    require(math.isfinite(scale), where, "scale", "finite", scale)
    s = settings
    with torch.no_grad():
        adamw_op(theta, g, m, n, master, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, int(s.t), scale)


def _check_settings(where: str, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> None:
    require_positive(lr, where, "lr", zero_ok=True)
    require(len(betas) == 2 and all(0 <= b < 1 for b in betas), where, "betas", "two numbers in [0, 1)", betas)
    require_positive(eps, where, "eps")
    require_positive(weight_decay, where, "weight_decay", zero_ok=True)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(s == t for s, t, length in zip(a.stride(), b.stride(), a.shape) if length > 1)


def _dense(tensor: Tensor) -> bool:
    """Whether a new tensor of the same layout has the same strides, so that its memory can be walked in order."""
    return tensor.numel() == 0 or _same_strides(tensor, torch.empty_like(tensor, device="meta"))


def _like(g: Tensor, theta: Tensor) -> Tensor:
    """The gradient in the layout of its parameter: itself wherever autograd made it."""
    return g if _same_strides(g, theta) else torch.empty_like(theta, dtype=g.dtype).copy_(g)


@torch.library.custom_op("minillm::adamw", mutates_args=("theta", "m", "n", "master"))
def adamw_op(
    theta: Tensor, g: Tensor, m: Tensor, n: Tensor, master: Tensor | None, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, t: int, scale: float,
) -> None:  # fmt: skip
    """One step of one tensor, in place."""
    batch = Batch([theta], [m], [n], [] if master is None else [master], [True])
    batch.read([_like(g, theta)])
    factor = torch.full((1,), scale, dtype=torch.float32, device=theta.device)
    launch.step(batch, factor, Settings(lr, beta1, beta2, eps, weight_decay, t))


@adamw_op.register_fake
def _adamw_fake(theta, g, m, n, master, lr, beta1, beta2, eps, weight_decay, t, scale):
    return None


class AdamW:
    r"""AdamW over all parameters of a model, with the settings, the decay and the state of `minillm.optim.AdamW`.

    Equation: `adamw` $\theta\leftarrow\theta-\eta(\frac{\hat m}{\sqrt{\hat n}+\varepsilon_0}+\lambda_{wd}\theta)$
    Equation: `wd-param-groups` vectors (norm gains, biases) are not decayed
    Equation: `grad-clip` $g\leftarrow g\min(1,c/(\lVert g\rVert+\varepsilon_0))$, one norm over all parameters
    Equation: `master-weights` 16-bit parameters have masters in float32
    Shapes: parameters of any shape without gaps in memory, on one device
    Raises: ValueError for no parameters, or settings out of range; FloatingPointError from `step` when the gradient's
        norm is not finite, and nothing is changed then.
    Source: topics #6, #22; Loshchilov and Hutter 2019.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, weight_decay: float = 0.1,
    ):  # fmt: skip
        self.parameters = list(parameters)
        require(len(self.parameters) > 0, "AdamW", "the parameters", "at least one tensor", "an empty list")
        check_floats("AdamW", [(f"parameter {i}", p) for i, p in enumerate(self.parameters)])
        for i, p in enumerate(self.parameters):
            require(_dense(p), "AdamW", f"parameter {i}", "without gaps between its elements", f"strides {p.stride()}")
        _check_settings("AdamW", lr, tuple(betas), eps, weight_decay)
        self.lr, self.betas, self.eps, self.weight_decay, self.t = lr, (betas[0], betas[1]), eps, weight_decay, 0
        self._m, self._n = ([torch.zeros_like(p, dtype=torch.float32) for p in self.parameters] for _ in range(2))
        self._master = {
            i: p.detach().float() for i, p in enumerate(self.parameters) if p.dtype != torch.float32
        }  # fmt: skip
        dtypes = {p.dtype: None for p in self.parameters}
        self._groups = [[i for i, p in enumerate(self.parameters) if p.dtype == dtype] for dtype in dtypes]
        self._batches = [self._batch(group) for group in self._groups]

    def _batch(self, group: list[int]) -> Batch:
        def of(tensors: Any) -> list[Tensor]:
            return [tensors[i].detach() for i in group]

        master = of(self._master) if group[0] in self._master else []
        return Batch(
            of(self.parameters), of(self._m), of(self._n), master, [self.parameters[i].ndim >= 2 for i in group]
        )

    def step(self, max_norm: float | None = None) -> float:
        r"""Update all parameters by their ``.grad`` (zeros where there is none); return the norm before clipping.

        Equation: `grad-clip` $g\leftarrow g\min(1,c/(\lVert g\rVert+\varepsilon_0))$
        Raises: FloatingPointError if the norm is not finite; nothing is changed then.
        """
        if max_norm is not None:
            require_positive(max_norm, "AdamW.step", "max_norm")
        _check_settings("AdamW.step", self.lr, self.betas, self.eps, self.weight_decay)  # the rate may have been set
        for group, batch in zip(self._groups, self._batches):
            batch.read([self._gradient(i) for i in group])
        norm, scale = launch.norm_and_scale(self._batches, math.inf if max_norm is None else max_norm)
        settings = Settings(self.lr, *self.betas, self.eps, self.weight_decay, self.t + 1)
        for batch in self._batches:
            launch.step(batch, scale, settings)
        torch.autograd.graph.increment_version(self.parameters)
        value = norm.item()  # read when everything is under way: the kernels have seen for themselves
        if not math.isfinite(value):
            raise FloatingPointError(
                f"AdamW: the gradient's norm must be finite, got {value}. The parameters are unchanged; "
                "lower the learning rate or look for a division by zero in the loss."
            )
        self.t += 1
        return value

    def _gradient(self, i: int) -> Tensor:
        p = self.parameters[i]
        if p.grad is None:
            return torch.zeros_like(p)
        require(p.grad.dtype == p.dtype, "AdamW.step", f"gradient {i}", f"of its parameter's {p.dtype}", p.grad,
                error=TypeError)  # fmt: skip
        return _like(p.grad, p)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self.parameters:
            p.grad = None

    def weights(self) -> list[Tensor]:
        """The parameters in float32, masters where there are some: what a checkpoint holds as the model."""
        return [self._master.get(i, p.detach()) for i, p in enumerate(self.parameters)]

    def state_dict(self) -> dict[str, Tensor]:
        """The step count ``t`` and the moments ``m.0``, ``n.0`` ... as `minillm.optim.AdamW` names them in checkpoints,
        and ``master.0`` ... of 16-bit parameters."""
        state = {"t": torch.tensor(self.t)}
        for i, (m, n) in enumerate(zip(self._m, self._n)):
            state |= {f"m.{i}": m, f"n.{i}": n}
        return state | {f"master.{i}": master for i, master in self._master.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or that of `minillm.optim.AdamW` (arrays are taken too, and without
        masters those become the parameters' present values).

        Raises: ValueError if names or shapes differ; nothing is changed then.
        """
        where = "AdamW.load_state_dict"
        own = {name: tensor for name, tensor in self.state_dict().items() if name != "t"}
        masters = {name for name in own if name.startswith("master.")}
        complete = own.keys() - masters <= state.keys() - {"t"} <= own.keys() and "t" in state
        require(complete, where, "the entries", f"{len(own) + 1} named t, m.i, n.i", f"{len(state)} others")
        given = {name: torch.as_tensor(state[name]) for name in own if name in state}
        for name, tensor in given.items():
            require(tensor.shape == own[name].shape, where, name, f"of shape {tuple(own[name].shape)}", tensor)
        self.t = int(state["t"])
        for name, tensor in own.items():
            index = int(name.split(".")[1])
            tensor.copy_(given[name] if name in given else self.parameters[index].detach())
            if name in masters:
                self.parameters[index].detach().copy_(tensor)
