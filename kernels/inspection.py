"""`python -m kernels compile`: builds of a family on every target, held against what they must be."""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from kernels import registry
from kernels.aot import SHARED_LIMIT, Build, Compiled, compile_builds


def inspect(
    family: str, targets: Sequence[str], thorough: bool = False, progress: bool = False
) -> list[dict[str, Any]]:
    """One row for every build of a family on every target."""
    builds = registry.load_part(family, "builds").builds(thorough)
    rows = []
    with tqdm(
        total=sum(build.is_for(target) for build in builds for target in targets),
        file=sys.stderr,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for target in targets:
            bar.set_description(f"{family} {target}")
            wanted = [build for build in builds if build.is_for(target)]
            for build, compiled in zip(wanted, compile_builds(wanted, target)):
                rows.append(row(family, build, compiled, target))
                bar.update()
    return rows


def row(family: str, build: Build, compiled: Compiled, target: str) -> dict[str, Any]:
    """The JSON object of one build."""
    found = faults(build, compiled, target)
    read, written = compiled.bytes_16
    return {
        "family": family, "kernel": build.kernel, "config": build.config, "target": target,
        "registers": compiled.registers, "stack": compiled.stack, "spills": compiled.spills,
        "shared": compiled.shared, "tensor_core": compiled.tensor_core,
        "load_bits": sorted(compiled.memory.reads), "store_bits": sorted(compiled.memory.writes),
        "bytes_read_16": read, "bytes_written_16": written, "expected_bytes": list(build.expected_bytes or ()),
        "warps": compiled.threads // (64 if target.startswith("gfx") else 32), "ok": not found, "problems": found,
    }  # fmt: skip


def faults(build: Build, compiled: Compiled, target: str) -> list[str]:
    """What is wrong with a build, in words; empty when it is as it must be."""
    found = []
    if compiled.stack or compiled.spills:
        found.append(f"uses the stack ({compiled.stack} bytes, {compiled.spills} spill instructions)")
    if compiled.shared > SHARED_LIMIT[target]:
        found.append(f"needs {compiled.shared} bytes of shared memory, there are {SHARED_LIMIT[target]}")
    if compiled.atomics:
        found.append(f"has {compiled.atomics} atomic instructions, so two runs may differ")
    if compiled.doubles:
        found.append(f"has {compiled.doubles} float64 instructions")
    if compiled.short_offsets:
        found.append(f"adds 32-bit offsets to {compiled.short_offsets} pointers, which wrap past 2^31")
    widest = max([*compiled.memory.reads, *compiled.memory.writes], default=0)
    if not build.aligned and widest >= 128:
        found.append("moves 16 bytes at a time although alignment was not promised")
    if build.aligned and build.expected_bytes is not None:
        # A wavefront of AMD is twice as wide, so a thread's part of a small tile can be less than 16 bytes: the
        # exact count is held on NVIDIA, here only that accesses are wide.
        if target.startswith("gfx"):
            if max(compiled.memory.reads) < 64:
                found.append("has no wide loads")
        elif compiled.bytes_16 != build.expected_bytes:
            found.append(f"moves {compiled.bytes_16} bytes in 16-byte pieces, traffic.py says {build.expected_bytes}")
    if build.expect is not None:
        found += build.expect(compiled, target)
    return found


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table of what was found."""
    lines = [f"{'kernel':<28}{'config':<34}{'target':<8}{'regs':>5}{'stack':>6}{'spills':>7}{'shared':>8}  load bits"]
    for r in rows:
        bits = ",".join(map(str, r["load_bits"]))
        mark = "" if r["ok"] else "   " + "; ".join(r["problems"])
        lines.append(
            f"{r['kernel']:<28}{r['config']:<34}{r['target']:<8}{r['registers']:>5}{r['stack']:>6}{r['spills']:>7}"
            f"{r['shared']:>8}  {bits}{mark}"
        )
    return "\n".join(lines)
