"""What is timed for the losses: over existing logits and from hidden states, beside torch, torch.compile and Liger.

Goals on an H200 (not measured): loss and gradient in one launch at 0.90 of the copy rate at V = 128k counting one read and
one write (0.95 counting two reads as the first step), statistics at the copy rate, fused linear forward at 0.80 of the
matrix-product rate with at most 256 MiB beside its operands, forward and backward at 0.70 (four products counted), at
least three times as fast as Liger's cross-entropy.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contenders import Case, brief, made
from kernels.token_loss import launch, launch_linear, op, traffic
from kernels.token_loss.config import RowTile, loss_tile, row_tile
from minillm.checks import MissingPackageError, optional_import

# rows, V; the most important first: a run may have no time for the last
SHAPES = ((8192, 128_256), (16_384, 32_000), (4096, 151_936), (8192, 50_257), (65_536, 4096))
LINEAR_SHAPES = ((8192, 4096, 128_256), (16_384, 2048, 32_000))  # rows, d, V
QUICK_SHAPES, QUICK_LINEAR = ((8192, 128_256),), ((8192, 4096, 128_256),)
SMALLEST_SHAPES, SMALLEST_LINEAR = ((4, 64),), ((4, 16, 64),)  # for trying the machinery out
Calls = dict[str, Callable[[], Any]]


def _liger(module: str, name: str) -> Any:
    """A function of Liger's, or None where it is not installed or has none of that name."""
    try:
        return getattr(optional_import(f"liger_kernel.{module}", "dev"), name)
    except (MissingPackageError, AttributeError):
        return None


def _normal(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(len(shape))
    values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(scale)
    return values.to(dtype).requires_grad_()


def _with_gradient(loss: Callable[..., Tensor], operands: tuple[Tensor, ...], *rest: Any) -> Callable[[], Any]:
    def call():
        return torch.autograd.grad(loss(*operands, *rest), operands)

    return call


def _kept(
    peers: dict[str, Callable | None], make: Callable, ours: Tensor, say: Callable[[str], None], what: str
) -> Calls:
    """The peers that run here and give our loss; the others are said to be left out."""
    found = {}
    for name, function in peers.items():
        if function is None:
            continue
        try:
            call, value = make(function)
            value = value.detach()
        except Exception as error:  # a peer that does not run on this machine
            say(f"{name} {what}: left out ({brief(error)})")
            continue
        if abs(float(value) - float(ours)) <= 2e-2 * max(abs(float(ours)), 1.0):
            found[name] = call
        else:
            say(f"{name} {what}: left out, its loss {float(value):.4f} differs from ours {float(ours):.4f}")
    return found


def _torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def torch_policy_loss(logits: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """GRPO's loss (token mean, clip 0.2, k3 at 0.04) of torch operations: what `torch.compile` is given."""
    logp = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
    ratio = (logp - old).exp()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    d = ref - logp
    return (-surrogate + 0.04 * (d.exp() - 1 - d)).mean()


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, linear=None, compiled: bool = True) -> Iterator[Case]:  # fmt: skip
    """Statistics, cross-entropy and policy loss with their gradients, softmax, and the losses from hidden states."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    products = list(linear or (QUICK_LINEAR if quick else LINEAR_SHAPES))
    for n_rows, V in shapes or (QUICK_SHAPES if quick else SHAPES):
        logits = _normal(n_rows, V, dtype=dtype, device=device)
        targets = torch.randint(0, V, (n_rows,), device=device)
        of_rows = (_likelihood(logits, targets, say, compiled), _policy(logits, targets, say, compiled),
                   _statistics(logits, targets), _softmax(logits))  # fmt: skip
        for found in of_rows:
            yield from made(found, f"losses of {n_rows}x{V}")
        del logits
        if products:
            yield from _products(device, [products.pop(0)], dtype, say, compiled)
    yield from _products(device, products, dtype, say, compiled)


def _products(device, sizes, dtype, say, compiled) -> Iterator[Case]:
    for n_rows, d, V in sizes:
        found = _linear(device, n_rows, d, V, dtype, say, compiled)
        yield from made(found, f"linear_cross_entropy {n_rows}x{d}x{V}")


def _about(logits: Tensor) -> tuple[str, str, int, int, int]:
    kind = str(logits.dtype).removeprefix("torch.")
    n_rows, V = logits.shape
    return f"{n_rows}x{V}", kind, n_rows, V, logits.element_size()


def _statistics(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    shape, kind, n_rows, V, size = _about(logits)
    z = logits.detach()

    def plain():
        log_p = torch.log_softmax(z, -1)
        return log_p.gather(-1, targets[:, None]), torch.logsumexp(z, -1), -(log_p.exp() * log_p).sum(-1)

    calls: Calls = {"ours": lambda: op.token_logprobs(z, targets), "torch": plain}
    moved = traffic.statistics_bytes(n_rows, V, size)
    yield Case(f"token_logprobs {shape}", kind, moved, calls, line="token_logprobs", size=V)


def _likelihood(logits: Tensor, targets: Tensor, say: Callable, compiled: bool) -> Iterator[Case]:
    shape, kind, n_rows, V, size = _about(logits)
    ours = op.cross_entropy(logits, targets).detach()
    peers: dict[str, Callable | None] = {"torch": _torch_cross_entropy}
    if compiled:
        torch._dynamo.reset()
        peers["torch.compile"] = torch.compile(_torch_cross_entropy, dynamic=False)
    liger = _liger("ops.cross_entropy", "LigerCrossEntropyFunction")
    peers["liger"] = liger and (lambda z, t: liger.apply(z.clone(), t, None)[0])  # it overwrites its logits

    def make(function: Callable):
        return _with_gradient(function, (logits,), targets), function(logits, targets)

    calls = _kept(peers, make, ours, say, f"cross_entropy {shape}")
    ignored = partial(launch.loss_and_gradient, inplace=False)
    weight = torch.full((n_rows,), 1.0 / n_rows, device=logits.device)
    once = lambda: ignored(logits.detach(), targets, weight, launch.LikelihoodTerms(), 1.0, -100)  # noqa: E731
    bytes_ = traffic.loss_bytes(n_rows, V, size, policy=False)
    yield Case(f"cross_entropy forward+backward one launch {shape}", kind, bytes_, {"ours": once, **calls},
               line="cross_entropy one launch", size=V)  # fmt: skip
    split = traffic.split_loss_bytes(n_rows, V, size, policy=False)
    two = _with_gradient(op.cross_entropy, (logits,), targets)
    yield Case(f"cross_entropy forward+backward two launches {shape}", kind, split, {"ours": two},
               line="cross_entropy two launches", size=V)  # fmt: skip


def _policy(logits: Tensor, targets: Tensor, say: Callable, compiled: bool) -> Iterator[Case]:
    shape, kind, n_rows, V, size = _about(logits)
    B = 8 if n_rows % 8 == 0 else 1
    z, t = logits.view(B, -1, V), targets.view(B, -1)
    old = op.token_logprobs(logits.detach(), targets)[0].view(B, -1)
    ref, advantages = old - 0.1, torch.linspace(-1, 1, B, device=logits.device)
    mask = torch.ones_like(t, dtype=torch.bool)

    def mine(inplace: bool, z: Tensor) -> Tensor:
        return op.policy_loss(z, t, old, advantages, mask, ref, beta=0.04, reduction="token-mean", inplace=inplace).loss

    peers: dict[str, Callable | None] = {"torch": lambda z: torch_policy_loss(z, t, old, ref, advantages)}
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(torch_policy_loss, dynamic=False)
        peers["torch.compile"] = lambda z: fast(z, t, old, ref, advantages)
    liger = _liger("transformers.grpo_loss", "triton_grpo_loss")
    if liger is not None:  # it wants one more position than it scores
        longer = torch.cat([z.detach(), z.detach()[:, :1]], 1)
        peers["liger"] = lambda z: liger(
            longer.requires_grad_(), old, ref, t, advantages, mask.int(), temperature=1.0, beta=0.04,
            eps_low=0.2, eps_high=0.2, inplace=False, loss_type="bnpo",
        )[0].mean()  # fmt: skip

    def make(function: Callable):
        return _with_gradient(function, (z,)), function(z)

    ours = mine(False, z).detach()
    calls = _kept(peers, make, ours, say, f"policy_loss {shape}")
    # In place the logits would be gone after the first call, so the launch is timed that writes elsewhere: the same bytes.
    flat = [x.reshape(-1).contiguous() for x in (old, advantages[:, None].expand_as(old), ref)]
    terms = launch.PolicyTerms(flat[0], flat[1], flat[2], beta=0.04)
    weight = torch.full((n_rows,), 1.0 / n_rows, device=logits.device)
    once = lambda: launch.loss_and_gradient(logits.detach(), targets, weight, terms, 1.0, -100, inplace=False)  # noqa: E731
    bytes_ = traffic.loss_bytes(n_rows, V, size, policy=True)
    yield Case(f"policy_loss forward+backward one launch {shape}", kind, bytes_, {"ours": once, **calls},
               line="policy_loss one launch", size=V)  # fmt: skip
    split = traffic.split_loss_bytes(n_rows, V, size, policy=True)
    two = _with_gradient(partial(mine, False), (z,))
    yield Case(f"policy_loss forward+backward two launches {shape}", kind, split, {"ours": two},
               line="policy_loss two launches", size=V)  # fmt: skip


def _softmax(logits: Tensor) -> Iterator[Case]:
    shape, kind, n_rows, V, size = _about(logits)
    z = logits.detach()
    for name in ("softmax", "log_softmax"):
        calls: Calls = {"ours": partial(getattr(op, name), z), "torch": partial(getattr(torch, name), z, -1)}
        yield Case(f"{name} forward {shape}", kind, traffic.softmax_bytes(n_rows, V, size), calls,
                   line=f"{name} forward", size=V)  # fmt: skip


def _linear(device, n_rows, d, V, dtype, say, compiled) -> Iterator[Case]:
    kind, size = str(dtype).removeprefix("torch."), dtype.itemsize
    hidden = _normal(n_rows, d, dtype=dtype, device=device)
    weight = _normal(V, d, dtype=dtype, device=device, scale=d**-0.5)
    targets = torch.randint(0, V, (n_rows,), device=device)
    shape = f"{n_rows}x{d}x{V}"

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), targets)

    def no_grad(function: Callable) -> Callable[[], Any]:
        def call():
            with torch.no_grad():
                return function(hidden, weight)

        return call

    ours = partial(_ours_linear, targets)
    peers: dict[str, Callable | None] = {"torch": plain}
    if compiled:
        torch._dynamo.reset()
        peers["torch.compile"] = torch.compile(plain, dynamic=False)
    chunked = getattr(F, "linear_cross_entropy", None)  # torch 2.13 and later
    peers["torch chunked"] = chunked and (lambda h, w: chunked(h, w, targets))
    liger = _liger("ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    peers["liger"] = liger and (lambda h, w: liger.apply(h, w, targets)[0])
    value = ours(hidden, weight).detach()
    both = _kept(
        peers, lambda f: (_with_gradient(f, (hidden, weight)), f(hidden, weight)), value, say, f"linear {shape}"
    )
    forward = {name: no_grad(peers[name]) for name in both if peers[name] is not None and name != "liger"}  # type: ignore[arg-type]
    for backward, name, calls in (
        (False, "forward", {"ours": no_grad(ours), **forward}),
        (True, "forward+backward", {"ours": _with_gradient(ours, (hidden, weight)), **both}),
    ):
        yield Case(
            f"linear_cross_entropy {name} {shape}", kind, traffic.linear_bytes(n_rows, d, V, size, backward=backward), calls,
            flops=traffic.linear_flops(n_rows, d, V, backward=backward), flush=False,
            line=f"linear_cross_entropy {name}", size=V,
        )  # fmt: skip


def _ours_linear(targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return op.linear_cross_entropy(hidden, weight, targets)


def sweep_cases(device: str, shapes=SHAPES, linear=LINEAR_SHAPES) -> Iterator[Case]:
    """Neighbours of every launch size: statistics, loss and gradient, and the splits and strips of the fused loss."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for n_rows, V in shapes:
        logits = _normal(n_rows, V, dtype=dtype, device=device).detach()
        targets = torch.randint(0, V, (n_rows,), device=device)
        shape, kind, _, _, size = _about(logits)
        weight = torch.full((n_rows,), 1.0 / n_rows, device=device)
        terms = launch.LikelihoodTerms()
        calls = {
            str(t): partial(launch.statistics, logits, targets, 1.0, -100, tile=t) for t in _around(row_tile(V, size))
        }
        yield Case(f"statistics {shape}", kind, traffic.statistics_bytes(n_rows, V, size), calls)
        calls = {
            str(t): partial(launch.loss_and_gradient, logits, targets, weight, terms, 1.0, -100, False, tile=t)
            for t in _around(loss_tile(V, size))
        }
        yield Case(f"loss and gradient {shape}", kind, traffic.loss_bytes(n_rows, V, size, policy=False), calls)
    for n_rows, d, V in linear:
        yield _linear_sweep(device, n_rows, d, V, dtype)


def _around(tile: RowTile) -> list[RowTile]:
    """Half and double the warps and the columns, one to three stages."""
    found = {}
    for warps in (tile.warps // 2, tile.warps, tile.warps * 2):
        for block_v in (tile.block_v // 2, tile.block_v, tile.block_v * 2):
            for stages in (1, 2, 3):
                if 1 <= warps <= 32 and 16 <= block_v <= 32_768:
                    other = RowTile(tile.block_rows, block_v, warps, stages)
                    found[str(other)] = other
    return list(found.values())


def _linear_sweep(device, n_rows, d, V, dtype) -> Case:
    hidden = _normal(n_rows, d, dtype=dtype, device=device).detach()
    weight = _normal(V, d, dtype=dtype, device=device, scale=d**-0.5).detach()
    targets = torch.randint(0, V, (n_rows,), device=device)
    plan = launch_linear.plan_for(hidden, weight)
    plans = {}
    for splits in (max(plan.splits // 2, 1), plan.splits, plan.splits * 2):
        for group in (4, 8, 16):
            for stages in (2, 3, 4):
                tile = replace(plan.forward, group=group, stages=stages)
                plans[f"splits={splits} {tile}"] = replace(plan, splits=splits, forward=tile)
    calls = {
        name: partial(launch_linear.statistics, hidden, weight, targets, 1.0, -100, plan=other)
        for name, other in plans.items()
    }
    return Case(
        f"linear statistics {n_rows}x{d}x{V}", str(dtype).removeprefix("torch."),
        traffic.linear_bytes(n_rows, d, V, dtype.itemsize, backward=False), calls,
        flops=traffic.linear_flops(n_rows, d, V, backward=False), flush=False,
    )  # fmt: skip
