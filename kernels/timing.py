"""Clocks, turns and ceilings: how a benchmark's calls are timed, and what nothing on the machine goes beyond."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 1 << 30
COPY_BYTES = 1 << 30  # read, and as much written
FLUSH_SECONDS = 5e-4  # about what emptying the cache takes
HOST_CALLS = 10
PRODUCT = 8192  # rows and columns of the matrices whose product is the other ceiling


@dataclass(frozen=True)
class Ceilings:
    """What nothing on this machine goes beyond: calls that copy and multiply, with their bytes and operations."""

    copy: Callable[[], Any]
    copy_bytes: int
    product: Callable[[], Any] | None = None
    product_flops: int = 0


class GpuClock:
    """Times calls on the GPU, with the cache flushed before each."""

    def __init__(self, device: str = "cuda"):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def times(self, call: Callable[[], Any], repeats: int, flush: bool = True) -> list[float]:
        """Seconds of each of ``repeats`` calls."""
        events = []
        for _ in range(repeats):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if flush:
                self.flush.zero_()
            start.record()
            call()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) * 1e-3 for start, stop in events]

    def host(self, call: Callable[[], Any]) -> float:
        """Seconds until a call returns while the GPU may still be busy with it: what a wrapper costs, at its best."""
        found = []
        for _ in range(HOST_CALLS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return min(found)

    def memory(self, call: Callable[[], Any]) -> float:
        """MiB that a call needs at its peak beyond what was there before it, its results included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = call()  # noqa: F841 (alive until the peak is read)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class WallClock:
    """Times calls on the host: for trying the machinery out where there is no GPU."""

    def host(self, call: Callable[[], Any]) -> None:
        """Not apart from the rest here."""

    def memory(self, call: Callable[[], Any]) -> None:
        """Not known on the host."""

    def times(self, call: Callable[[], Any], repeats: int, flush: bool = True) -> list[float]:
        """Seconds of each of ``repeats`` calls; there is no cache to flush."""
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], clock: Any, blocks: int, repeats: int, flush: bool = True,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:  # fmt: skip
    """The median of every block for every contender; who goes first changes from block to block.

    Fewer repeats than asked for are made where the blocks would take longer than ``seconds``.
    """
    names = list(contenders)
    once = sum(clock.times(call, 2)[-1] for call in contenders.values())  # compilation and first touches
    round_seconds = blocks * (once + FLUSH_SECONDS * len(names) * flush)
    repeats = max(1, int(min(repeats, seconds / round_seconds)))
    medians: dict[str, list[float]] = {name: [] for name in names}
    for block in range(blocks):
        for name in names[block % len(names) :] + names[: block % len(names)]:
            medians[name].append(statistics.median(clock.times(contenders[name], repeats, flush)))
    return medians


def measured_ceilings(device: str, copy_bytes: int = COPY_BYTES, size: int = PRODUCT) -> Ceilings:
    """The copy of a large buffer and the product of two large bf16 matrices, to be timed beside every case."""
    source = torch.empty(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(lambda: target.copy_(source), 2 * copy_bytes, lambda: a @ b, 2 * size**3)
