"""`python -m kernels compile`: builds of a family on every target, held against what they must be."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from kernels import gates, ir, registry
from kernels.aot import Argument, Build, CompilationFailed, Compiled, assembler_version, attempt, constant
from kernels.occupancy import occupancy

SPECIALISED_ON = "sm_90"  # the specialisations differ before the target matters: one of them is enough


def inspect(
    family: str, targets: Sequence[str], thorough: bool = False, progress: bool = False
) -> list[dict[str, Any]]:
    """One row for every build of a family on every target."""
    builds = registry.load_part(family, "builds").builds(thorough)
    jobs = [(target, _of_target(builds, target, thorough)) for target in targets]
    rows = []
    with tqdm(
        total=sum(len(wanted) for _, wanted in jobs), file=sys.stderr, disable=None if progress else True, leave=False
    ) as bar:
        for target, wanted in jobs:
            bar.set_description(f"{family} {target}")
            for build, compiled in zip(wanted, attempt(wanted, target)):
                rows.append(row(family, build, compiled, target))
                bar.update()
    return rows


def _of_target(builds: Sequence[Build], target: str, thorough: bool) -> list[Build]:
    shipped = [build for build in builds if build.is_for(target)]
    return shipped + (list(specialisations(shipped)) if thorough or target == SPECIALISED_ON else [])


def specialisations(builds: Sequence[Build]) -> Iterator[Build]:
    """Gate 11: what Triton makes of the same kernels when a call's values are awkward, unless it is built already.

    It compiles anew for integers of 64 bits, for integers that are 1 (they become constants) and for values and
    pointers without the alignment that was promised. These builds have to compile and to be right; how many
    registers they need is not held against them.
    """
    for function in dict.fromkeys(build.function for build in builds):
        ours = [build for build in builds if build.function is function]
        first = ours[0]
        fixed = {p.name for p in function.params if p.do_not_specialize}
        scalars = {n for n, a in first.arguments.items() if a.kind in ("i32", "i64")}

        if all(build.aligned for build in ours):
            loose = {n: replace(a, aligned=False) for n, a in first.arguments.items() if a.aligned}
            yield _derived(first, "unaligned", loose)
        if scalars and not any(a.kind == "i64" for build in ours for a in build.arguments.values()):
            yield _derived(first, "64-bit integers", {n: replace(first.arguments[n], kind="i64") for n in scalars})
        if scalars - fixed:
            yield _derived(first, "every size 1", dict.fromkeys(scalars - fixed, constant(1)))


def _derived(build: Build, kind: str, changed: dict[str, Argument]) -> Build:
    return replace(
        build, config=f"{build.config} ({kind})", arguments={**build.arguments, **changed},
        expected_bytes=None, expect=None, shipped=False, aligned=build.aligned and kind != "unaligned",
    )  # fmt: skip


def row(family: str, build: Build, compiled: Compiled | CompilationFailed, target: str) -> dict[str, Any]:
    """The JSON object of one build; without numbers where it did not compile (gate 1)."""
    head = {"family": family, "kernel": build.kernel, "config": build.config, "target": target}
    if isinstance(compiled, CompilationFailed):
        return {**head, "registers": 0, "stack": 0, "spills": 0, "shared": 0, "tensor_core": 0, "occupancy": 0,
                "load_bits": [], "store_bits": [], "shipped": build.shipped, "ok": False,
                "problems": [f"does not compile: {compiled}"], "remarks": []}  # fmt: skip
    found = faults(build, compiled, target)
    read, written = compiled.bytes_16
    return {
        **head,
        "registers": compiled.registers, "stack": compiled.stack, "spills": compiled.spills,
        "shared": compiled.shared, "tensor_core": compiled.tensor_core,
        "occupancy": occupancy(compiled.registers, compiled.threads, compiled.shared, target),
        "load_bits": sorted(compiled.memory.reads), "store_bits": sorted(compiled.memory.writes),
        "bytes_read_16": read, "bytes_written_16": written, "expected_bytes": list(build.expected_bytes or ()),
        "warps": compiled.threads // (64 if target.startswith("gfx") else 32),
        "exponentials": compiled.instructions["MUFU.EX2"], "register_a": compiled.register_a,
        "flops_per_byte": round(min(ir.intensity(compiled.ttir), 1e9), 1), "shipped": build.shipped,
        "ok": not found, "problems": found,
        "remarks": gates.remarks(compiled, assembler_version(target)) if compiled.register_a else [],
    }  # fmt: skip


def faults(build: Build, compiled: Compiled, target: str) -> list[str]:
    """What is wrong with a build, in words; empty when it is as it must be.

    A build that is only there to show that a specialisation compiles is not held to its speed.
    """
    held = gates.GATES if build.shipped else gates.RIGHT
    found = [fault for gate in held for fault in gate(build, compiled, target)]
    if build.expect is not None:
        found += build.expect(compiled, target)
    return found


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table of what was found."""
    lines = [
        f"{'kernel':<28}{'config':<40}{'target':<8}{'regs':>5}{'stack':>6}{'spills':>7}{'shared':>8}{'MMA':>5}{'fit':>4}  load bits"
    ]
    for r in rows:
        bits = ",".join(map(str, r["load_bits"]))
        mark = "" if r["ok"] else "   " + "; ".join(r["problems"])
        lines.append(
            f"{r['kernel']:<28}{r['config']:<40}{r['target']:<8}{r['registers']:>5}{r['stack']:>6}{r['spills']:>7}"
            f"{r['shared']:>8}{r['tensor_core']:>5}{r['occupancy']:>4}  {bits}{mark}"
        )
    return "\n".join(lines)
