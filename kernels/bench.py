"""`python -m kernels bench`: each kernel beside its peers, as a fraction of the ceilings of the same run.

Rules: one process, the same tensors; contenders take turns in every block, so that a change of clocks hits all;
the second-level cache is flushed before every call (where a case asks for it, as all that memory bounds do), and the
flush is long enough to hide the host's part of the launch; times come from GPU events; the median counts, of fewer calls where time runs out. A ratio is
ours / peer: low is good. ``limit`` is the time that the compulsory bytes of the case take at the measured copy rate,
or its operations at the measured rate of a large bf16 matrix product, whichever is longer, and ``of_limit`` the
share of it reached.
"""

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from kernels import aot, bench_figure, registry

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 1 << 30
COPY_BYTES = 1 << 30  # read, and as much written
FLUSH_SECONDS = 5e-4  # about what emptying the cache takes
SECONDS = 480  # for all families together
PRODUCT = 8192  # rows and columns of the matrices whose product is the other ceiling


class WrongResults(RuntimeError):
    """A kernel fails its exact witnesses on this machine; timing it would mean nothing."""


@dataclass(frozen=True)
class Case:
    """One thing to time: calls without arguments by contender (``ours`` among them), and what must move or be computed.

    ``flush`` empties the cache before each call: right where memory is the bound, a waste where products are.
    """

    name: str
    dtype: str
    bytes: int
    contenders: Mapping[str, Callable[[], Any]]
    flops: int = 0
    flush: bool = True


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


def measure(family: str, case: Case, clock: Any, ceilings: Ceilings, device: str,
            blocks: int = 7, repeats: int = 9, seconds: float = float("inf")) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one case: one for every peer, or a single one without a peer."""
    contenders = {**case.contenders, "copy": ceilings.copy}
    if case.flops and ceilings.product is not None:
        contenders["product"] = ceilings.product
    medians = take_turns(contenders, clock, blocks, repeats, case.flush, seconds)
    memory = {name: clock.memory(call) for name, call in case.contenders.items()}
    ours = statistics.median(medians["ours"])
    rate = ceilings.copy_bytes / statistics.median(medians["copy"])
    flop_rate = ceilings.product_flops / statistics.median(medians["product"]) if "product" in medians else None
    limit = max(case.bytes / rate, case.flops / flop_rate if flop_rate else 0.0)
    rows = []
    for peer in [name for name in case.contenders if name != "ours"] or [None]:
        row = {"family": family, "case": case.name, "dtype": case.dtype, "ours_s": ours, "peer": peer,
               "peer_s": None, "ratio": None, "limit": limit, "of_limit": limit / ours, "device": device,
               "bytes": case.bytes, "flops": case.flops, "copy_bytes_per_s": rate,
               "product_flops_per_s": flop_rate, "peer_of_limit": None,
               "ours_mib": memory["ours"], "peer_mib": memory[peer] if peer else None}  # fmt: skip
        if peer is not None:
            row["peer_s"] = statistics.median(medians[peer])
            row["ratio"] = statistics.median(a / b for a, b in zip(medians["ours"], medians[peer]))
            row["peer_of_limit"] = limit / row["peer_s"]
        rows.append(row)
    return rows


def measured_ceilings(device: str, copy_bytes: int = COPY_BYTES, size: int = PRODUCT) -> Ceilings:
    """The copy of a large buffer and the product of two large bf16 matrices, to be timed beside every case."""
    source = torch.empty(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(lambda: target.copy_(source), 2 * copy_bytes, lambda: a @ b, 2 * size**3)


def bench(
    family: str, quick: bool = False, out: str | None = None, say: Callable[[str], None] = lambda text: None
) -> tuple[list[dict[str, Any]], Path]:
    """All cases of a family on this GPU; the rows, and the file they were written to."""
    clock, device, ceilings = GpuClock(), torch.cuda.get_device_name(), measured_ceilings("cuda")
    wrong = {name: count for name, count in registry.load_part(family, "witness").witnesses("cuda") if count}
    if wrong:  # nothing wrong is timed
        raise WrongResults(f"{family}: wrong results on {device}, ptxas {aot.assembler_version()}: {wrong}")
    rows, deadline = [], time.monotonic() + SECONDS / len(registry.FAMILIES)
    for case in registry.load_part(family, "benchmark").cases("cuda", quick, say):
        left = max(deadline - time.monotonic(), 0.0)
        found = measure(family, case, clock, ceilings, device, *((3, 5) if quick else (7, 9)), seconds=left / 4)
        rows += found
        say(line(found[0]))
    path = write(rows, out or RESULTS / f"{family}_{slug(device)}.json")
    say(f"figure: {bench_figure.draw(rows, f'figures/kernels_{family}_{slug(device)}.png')}")
    return rows, path


def sweep(family: str) -> list[dict[str, Any]]:
    """Times of other launch sizes, best first for every case."""
    clock, rows = GpuClock(), []
    for case in registry.load_part(family, "benchmark").sweep_cases("cuda"):
        medians = take_turns(case.contenders, clock, 5, 7)
        for name, times in sorted(medians.items(), key=lambda item: statistics.median(item[1])):
            rows.append({"family": family, "case": f"{case.name} {name}", "dtype": case.dtype, "peer": None,
                         "ours_s": statistics.median(times), "bytes_per_s": case.bytes / statistics.median(times)})  # fmt: skip
    return rows


def write(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Save rows with the versions of everything that made them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1) + "\n")
    beside.replace(path)
    return path


def machine() -> dict[str, Any]:
    """Versions and the device, for a reader who wants to compare."""
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        smi = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        smi = "unknown"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__, "triton": triton.__version__, "ptxas": aot.assembler_version(),
        "python": platform.python_version(), query: smi,
    }  # fmt: skip


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def line(row: Mapping[str, Any]) -> str:
    """One row in words."""
    peer = f"  {row['ratio']:.2f} x {row['peer']}" if row.get("peer") else ""
    share = f"  {row['of_limit']:.3f} of the limit" if "of_limit" in row else f"  {row['bytes_per_s'] / 1e12:.2f} TB/s"
    return f"{row['case']:<58}{row['dtype']:<10}{row['ours_s'] * 1e6:>9.1f} us{share}{peer}"


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    return "\n".join(line(row) for row in rows)
