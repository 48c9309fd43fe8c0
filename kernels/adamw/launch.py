"""Launching AdamW on lists of tensors that `op.py` has checked."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from kernels import launching
from kernels.adamw import kernel as device_code
from kernels.adamw.config import BLOCK, SUM_BLOCK, WARPS
from kernels.launching import FUSED_MULTIPLY_ADD, on

kernel: Any = device_code  # what triton.jit returns, no type checker follows
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
GRADIENT, COLUMNS = kernel.GRADIENT.value, kernel.COLUMNS.value


@dataclass(frozen=True)
class Settings:
    """One step's numbers; t counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    t: int

    def arguments(self) -> dict[str, float]:
        """What the kernel takes, computed in float64."""
        return {
            "beta1": float(self.beta1), "rest1": 1.0 - self.beta1, "beta2": float(self.beta2), "rest2": 1.0 - self.beta2,
            "eps": float(self.eps), "keep": 1.0 - self.lr * self.weight_decay,
            "rate": self.lr / (1.0 - self.beta1**self.t), "root": 1.0 / math.sqrt(1.0 - self.beta2**self.t),
        }  # fmt: skip


class Batch:
    """The tables for tensors of one dtype on one device, of which only the gradients' addresses change.

    Shapes: theta, m, n, master: lists of tensors of equal shapes and strides, each without gaps; master may be empty
    """

    def __init__(
        self, theta: Sequence[Tensor], m: Sequence[Tensor], n: Sequence[Tensor], master: Sequence[Tensor] = (),
        decayed: Sequence[bool] = (), block: int = BLOCK,
    ):  # fmt: skip
        self.theta, self.written = theta, [*theta, *m, *n, *master]
        self.has_master, self.block = bool(master), block
        sizes = np.array([t.numel() for t in theta], np.int64)
        programs = -(-sizes // block)
        table = np.zeros((len(theta), COLUMNS), np.int64)
        for column, part in (
            (kernel.THETA, theta), (kernel.FIRST_MOMENT, m), (kernel.SECOND_MOMENT, n), (kernel.MASTER, master)
        ):  # fmt: skip
            table[: len(part), column.value] = [t.data_ptr() for t in part]
        table[:, kernel.SIZE.value] = sizes
        table[:, kernel.FIRST.value] = np.cumsum(programs) - programs
        table[:, kernel.DECAYED.value] = decayed
        self.host, self.programs = table, int(programs.sum())
        self.owner = torch.from_numpy(np.repeat(np.arange(len(theta), dtype=np.int32), programs)).to(theta[0].device)
        self.table, self.g_type = self.owner, tl.float32  # until there are gradients

    def read(self, gradients: Sequence[Tensor]) -> None:
        """Point the table at these gradients; it is sent again only where an address has changed."""
        addresses = [g.data_ptr() for g in gradients]
        self.gradients, self.g_type = gradients, TYPES[gradients[0].dtype]
        if self.table is self.owner or addresses != self.host[:, GRADIENT].tolist():
            self.host[:, GRADIENT] = addresses
            self.table = torch.from_numpy(self.host.copy()).to(self.theta[0].device)
            self.aligned = not (self.host[:, : kernel.SIZE.value] % 16).any()

    def options(self) -> dict[str, Any]:
        """What both kernels over tiles are told at compile time."""
        return {"G_TYPE": self.g_type, "ALIGNED": self.aligned, "BLOCK": self.block, "num_warps": WARPS,
                **FUSED_MULTIPLY_ADD}  # fmt: skip


def step(batch: Batch, scale: Tensor, settings: Settings) -> None:
    """Update every tensor of the batch once; a scale of NaN changes nothing. Shapes: scale (1,) fp32."""
    if not batch.programs:
        return
    with on(batch.theta[0]):
        kernel._step_kernel[(batch.programs,)](
            batch.table, batch.owner, scale, **settings.arguments(), THETA_TYPE=TYPES[batch.theta[0].dtype],
            HAS_MASTER=batch.has_master, **batch.options(),
        )  # fmt: skip


def norm_and_scale(batches: Sequence[Batch], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of all gradients and the factor min(1, max_norm / (norm + 1e-6)). Shapes: -> (1,), (1,) fp32"""
    first = batches[0].theta[0]
    parts = launching.empty((sum(b.programs for b in batches),), torch.float32, first.device)
    norm, scale = (launching.empty((1,), torch.float32, first.device) for _ in range(2))
    with on(first):
        start = 0
        for batch in (b for b in batches if b.programs):
            here = parts[start : start + batch.programs]
            kernel._squares_kernel[(batch.programs,)](batch.table, batch.owner, here, **batch.options())
            start += batch.programs
        kernel._clip_kernel[(1,)](parts, norm, scale, len(parts), float(max_norm), BLOCK=SUM_BLOCK, num_warps=WARPS)
    return norm, scale
