"""`python -m kernels bench`: each kernel beside its peers, as a fraction of the ceilings of the same run.

Rules: one process, the same tensors; contenders take turns in every block, so that a change of clocks hits all;
the second-level cache is flushed before every call (where a case asks for it, as all that memory bounds do), and the
flush is long enough to hide the host's part of the launch; times come from GPU events; the median counts, of fewer calls where time runs out. A ratio is
ours / peer: low is good. ``limit`` is the time that the compulsory bytes of the case take at the measured copy rate,
or its operations at the measured rate of a large bf16 matrix product, whichever is longer, and ``of_limit`` the
share of it reached. ``ours_host_s`` is the time that a call takes on the host.

A GPU is lent for minutes, so nothing may cost a run what it has found: rows are written as each case ends, a peer or
a case that fails is said and left out, every family has its share of the time, and what it leaves unused goes on to
those behind it.
"""

import gc
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from kernels import aot, bench_figure, registry
from kernels.contenders import Case, brief, made, runnable
from kernels.timing import Ceilings, GpuClock, measured_ceilings, take_turns

RESULTS = Path(__file__).parent / "results"
SECONDS = 480.0  # for all families together
SHARES = {"attention": 5, "token_loss": 4, "experts": 3, "norm": 3, "decode": 2}  # of that time; the others take 1


class WrongResults(RuntimeError):
    """A kernel fails its exact witnesses on this machine; timing it would mean nothing."""


def measure(family: str, case: Case, clock: Any, ceilings: Ceilings, device: str,
            blocks: int = 7, repeats: int = 9, seconds: float = float("inf"),
            say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one case: one for every peer, or a single one without a peer; a peer that fails is left out."""
    calls = runnable(case, clock, say)
    contenders = {**calls, "copy": ceilings.copy}
    if case.flops and ceilings.product is not None:
        contenders["product"] = ceilings.product
    medians = take_turns(contenders, clock, blocks, repeats, case.flush, seconds)
    memory = {name: clock.memory(call) for name, call in calls.items()}
    host = {name: clock.host(call) for name, call in calls.items()}
    ours = statistics.median(medians["ours"])
    rate = ceilings.copy_bytes / statistics.median(medians["copy"])
    flop_rate = ceilings.product_flops / statistics.median(medians["product"]) if "product" in medians else None
    limit = max(case.bytes / rate, case.flops / flop_rate if flop_rate else 0.0)
    rows = []
    for peer in [name for name in calls if name != "ours"] or [None]:
        row = {"family": family, "case": case.name, "dtype": case.dtype, "ours_s": ours, "peer": peer,
               "peer_s": None, "ratio": None, "limit": limit, "of_limit": limit / ours, "device": device,
               "bytes": case.bytes, "flops": case.flops, "copy_bytes_per_s": rate,
               "product_flops_per_s": flop_rate, "peer_of_limit": None, "line": case.line, "size": case.size,
               "ours_mib": memory["ours"], "peer_mib": memory[peer] if peer else None,
               "ours_host_s": host["ours"], "peer_host_s": host[peer] if peer else None}  # fmt: skip
        if peer is not None:
            row["peer_s"] = statistics.median(medians[peer])
            row["ratio"] = statistics.median(a / b for a, b in zip(medians["ours"], medians[peer]))
            row["peer_of_limit"] = limit / row["peer_s"]
        rows.append(row)
    return rows


def bench(
    families: Sequence[str], quick: bool = False, out: str | None = None, seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """All cases of some families on this GPU, within ``seconds``: their rows, and what went wrong.

    Rows are written as they come: to ``out``, one file for all, or to a file a family in `RESULTS`.
    """
    finish = time.monotonic() + seconds
    clock, device, ceilings = GpuClock(), torch.cuda.get_device_name(), measured_ceilings("cuda")
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    waiting = sorted(families, key=lambda family: -SHARES.get(family, 1))
    while waiting:
        share = SHARES.get(waiting[0], 1) / sum(SHARES.get(family, 1) for family in waiting)
        family = waiting.pop(0)
        now, about = time.monotonic(), machine()  # asking takes long enough to do it once
        run = FamilyRun(family, clock, ceilings, device, now + share * max(finish - now, 0.0), quick, say)
        try:
            for found in run.cases():
                rows += found
                if out:
                    write(rows, out, about)
                else:
                    write(
                        [row for row in rows if row["family"] == family],
                        RESULTS / f"{family}_{slug(device)}.json",
                        about,
                    )
        except Exception as error:
            run.faults.append(f"{family}: {error if isinstance(error, WrongResults) else brief(error)}")
        faults += run.faults
        draw([row for row in rows if row["family"] == family], f"figures/kernels_{family}_{slug(device)}.png", say)
        if not alive():
            faults.append(f"the GPU no longer answers after {family}; not measured: {', '.join(waiting) or 'nothing'}")
            break
        release()
    return rows, faults


def draw(rows: Sequence[Mapping[str, Any]], path: str, say: Callable[[str], None]) -> None:
    """The figure of a family, if there is anything to draw; without it the rows are still there."""
    try:
        if rows:
            say(f"figure: {bench_figure.draw(rows, path)}")
    except Exception as error:
        say(f"no figure ({brief(error)})")


@dataclass
class FamilyRun:
    """One family's turn, and what went wrong in it."""

    family: str
    clock: Any
    ceilings: Ceilings
    device: str
    until: float
    quick: bool
    say: Callable[[str], None]
    faults: list[str] = field(default_factory=list)

    def cases(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of every case, until there are no more or no time is left. Nothing wrong is timed."""
        witnesses = registry.load_part(self.family, "witness").witnesses("cuda", short=True)
        wrong = {name: count for name, count in witnesses if count}
        if wrong:
            raise WrongResults(f"wrong results on {self.device}, ptxas {aot.assembler_version()}: {wrong}")
        for case in registry.load_part(self.family, "benchmark").cases("cuda", self.quick, self.say):
            left = self.until - time.monotonic()
            if left <= 0:
                self.say(f"{self.family}: no time left for {case.name} and what follows; not measured")
                return
            how = (3, 5) if self.quick else (7, 9)
            try:
                found = measure(self.family, case, self.clock, self.ceilings, self.device, *how, left / 4, self.say)
            except Exception as error:
                self.faults.append(f"{case.name}: not measured ({brief(error)})")
                if not alive():
                    return
                continue
            for row in found:
                self.say(line(row))
            yield found


def release() -> None:
    """Give back the memory of what is no longer used, before the next family needs it."""
    gc.collect()
    torch.cuda.empty_cache()


def alive() -> bool:
    """Whether the GPU still answers: after an illegal access nothing does."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def sweep(family: str, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Times of other launch sizes, best first for every case; sizes that do not fit the machine are left out."""
    clock, rows = GpuClock(), []
    for case in made(registry.load_part(family, "benchmark").sweep_cases("cuda"), f"{family}, another launch size"):
        try:
            medians = take_turns(runnable(case, clock, say), clock, 5, 7)
        except Exception as error:
            say(f"{case.name}: left out ({brief(error)})")
            continue
        found = [
            {"family": family, "case": f"{case.name} {name}", "dtype": case.dtype, "peer": None,
             "ours_s": statistics.median(times), "bytes_per_s": case.bytes / statistics.median(times)}
            for name, times in sorted(medians.items(), key=lambda item: statistics.median(item[1]))
        ]  # fmt: skip
        rows += found
        for row in found[:1]:
            say(line(row))
    return rows


def write(rows: Sequence[Mapping[str, Any]], path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Save rows with the versions of everything that made them (``about``: what `machine` has said already)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps({"machine": about or machine(), "rows": list(rows)}, indent=1) + "\n")
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
    return "\n".join(map(line, rows))
