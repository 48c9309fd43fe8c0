"""Ahead-of-time compilation: what the compiler makes of a kernel, read without any GPU.

Triton's compiler and its bundled assembler and disassemblers run on any Linux machine. A `Build` says how a
kernel would be launched (types, alignment, constants, warps); `compile_builds` returns what came out.
This module must run in a process without TRITON_INTERPRET: an interpreted function cannot be compiled.
"""

import functools
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels import ir, sass
from kernels.sass import MemoryCounts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARY_NAME = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}  # the disassembler's names
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class Argument:
    """How one parameter of a kernel arrives: its type, whether it is divisible by 16, or its constant value."""

    kind: str
    aligned: bool = False
    value: Any = None


def pointer(dtype: str, aligned: bool = True) -> Argument:
    """A pointer to elements of ``dtype`` (Triton's name: fp32, bf16, ...), at a multiple of 16 bytes or not."""
    return Argument("*" + dtype, aligned)


def integer(aligned: bool, wide: bool = False) -> Argument:
    """A size or stride, divisible by 16 or not, of 32 bits or (``wide``) 64."""
    return Argument("i64" if wide else "i32", aligned)


def real() -> Argument:
    """A float parameter."""
    return Argument("fp32")


def constant(value: Any) -> Argument:
    """A compile-time constant; None for an absent tensor, 1 for a unit stride."""
    return Argument("constexpr", value=value)


@dataclass(frozen=True)
class Build:
    """One kernel at one configuration, and what is expected of the result.

    ``expected_bytes`` is what one program moves in 16-byte pieces, (read, written), as `traffic.py` of the
    family predicts; None where nothing may move in 16-byte pieces (unaligned builds) or where nobody counts.
    ``targets`` limits the build to some architectures (None: all), for tile sizes that differ between them.
    ``expect`` takes what came out and the target, and returns further faults in words: instruction counts
    as closed forms of the tile sizes, say.
    """

    function: Any
    config: str
    arguments: Mapping[str, Argument]
    warps: int
    expected_bytes: tuple[int, int] | None = None
    aligned: bool = True
    stages: int = 1
    targets: Sequence[str] | None = None
    expect: Callable[["Compiled", str], list[str]] | None = None
    shipped: bool = True  # False: only there to see that a specialisation compiles (`inspection`)

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.function.fn.__name__

    def is_for(self, target: str) -> bool:
        """Whether this build is shipped for ``target``."""
        return self.targets is None or target in self.targets


@dataclass(frozen=True)
class Compiled:
    """What the assembler reported and the disassembly shows for one build on one target."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    atomics: int
    doubles: int
    memory: MemoryCounts
    threads: int
    short_offsets: int
    assembly: str = field(repr=False)
    instructions: Counter = field(default_factory=Counter, repr=False)  # by family: HGMMA, MUFU.EX2, UTMALDG, mfma
    ttir: str = field(default="", repr=False)
    ttgir: str = field(default="", repr=False)
    register_a: int = 0  # asynchronous matrix products whose left factor comes from registers

    @property
    def bytes_16(self) -> tuple[int, int]:
        """Bytes that one program reads and writes in 16-byte pieces, every instruction counted once."""
        return self.memory.reads[128] * 16 * self.threads, self.memory.writes[128] * 16 * self.threads


class CompilationFailed(RuntimeError):
    """The compiler refused a build; the message says which and with what words."""


def compile_builds(builds: Sequence[Build], target: str) -> Iterator[Compiled]:
    """Compile builds for one target and read the results, in order. Builds of other targets are left out.

    Raises CompilationFailed where a build does not compile; `attempt` goes on with the others.
    """
    for found in attempt(builds, target):
        if isinstance(found, CompilationFailed):
            raise found
        yield found


def attempt(builds: Sequence[Build], target: str) -> Iterator[Compiled | CompilationFailed]:
    """As `compile_builds`, with the error in the place of what did not compile.

    Starting the disassembler costs more than a compilation, so all kernels of a call go through it at once.
    """
    machine = TARGETS[target]
    results = [_try(build, machine) for build in builds if build.is_for(target)]
    there = [result for result in results if not isinstance(result, CompilationFailed)]
    listings = iter(
        [r.asm["amdgcn"] for r in there]
        if machine.backend == "hip"
        else _disassemble([r.asm["cubin"] for r in there], target)
    )
    for result in results:
        if isinstance(result, CompilationFailed):
            yield result
            continue
        threads = result.metadata.num_warps * machine.warp_size
        if machine.backend == "hip":
            yield _read_amdgcn(next(listings), result, threads)
        else:
            yield _read_cubin(result.asm["cubin"], next(listings), result, threads)


def _try(build: Build, machine: GPUTarget) -> Any:
    if not isinstance(build.function, triton.JITFunction):
        raise RuntimeError(
            "kernels.aot: ahead-of-time compilation needs a process without TRITON_INTERPRET. "
            "Unset it, or use `python -m kernels compile`, which does."
        )
    names = list(build.arguments)
    if names != build.function.arg_names:
        raise ValueError(f"kernels.aot: {build.kernel} takes {build.function.arg_names}, got {names}.")
    try:
        return _compile(build, machine)
    except Exception as error:  # the compiler's own: a refused program, a pass that failed, the assembler
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        return CompilationFailed(f"{build.kernel} {build.config}: {type(error).__name__}: {last[0]}")


def _compile(build: Build, machine: GPUTarget) -> Any:
    source = ASTSource(
        fn=build.function,
        signature={name: argument.kind for name, argument in build.arguments.items()},
        constexprs={name: a.value for name, a in build.arguments.items() if a.kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(build.arguments.values()) if a.aligned},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=machine, options=options)


def _tool(name: str) -> str:
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def assembler_version(target: str = "sm_90") -> str:
    """The version of the assembler that Triton uses for a target (TRITON_PTXAS_PATH overrides the bundled one)."""
    machine = TARGETS[target]
    if machine.backend == "hip":
        return "llvm"
    return sass.version_of(_run(get_ptxas(int(machine.arch)).path, "--version"))


def _disassemble(cubins: Sequence[bytes], target: str) -> list[str]:
    """The listings of several kernels: their machine code laid end to end, disassembled, and cut apart again."""
    codes = [sass.machine_code(cubin) for cubin in cubins]
    if not cubins:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.bin")
        path.write_bytes(b"".join(codes))
        listing = _run(_tool("nvdisasm"), "--binary", BINARY_NAME[target], str(path))
    return sass.cut(listing, [len(code) for code in codes])


def _read_cubin(cubin: bytes, listing: str, result: Any, threads: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = sass.resource_usage(_run(_tool("cuobjdump"), "--dump-resource-usage", str(path)))
    counts = sass.count_cuda(listing)
    used = {"registers": usage["REG"], "stack": usage["STACK"] + usage.get("LOCAL", 0), "spills": counts.spills}
    return _compiled(result, counts, used, threads, listing)


def _read_amdgcn(listing: str, result: Any, threads: int) -> Compiled:
    stack = sass.directive(listing, "private_segment_fixed_size")
    # Scalar registers without a stack went to lanes of vector registers: no memory is touched, so nothing spilled.
    scalar = sass.directive(listing, "sgpr_spill_count") if stack else 0
    used = {
        "registers": sass.directive(listing, "vgpr_count"), "stack": stack,
        "spills": sass.directive(listing, "vgpr_spill_count") + scalar,
    }  # fmt: skip
    return _compiled(result, sass.count_amd(listing), used, threads, listing)


def _compiled(result: Any, counts: sass.Counts, used: Mapping[str, int], threads: int, listing: str) -> Compiled:
    return Compiled(
        **used, shared=result.metadata.shared, tensor_core=counts.tensor_core, atomics=counts.atomics,
        doubles=counts.doubles, memory=counts.memory, threads=threads,
        short_offsets=ir.short_offsets(result.asm["ttir"]), assembly=listing,
        instructions=counts.instructions, ttir=result.asm["ttir"], ttgir=result.asm["ttgir"],
        register_a=sass.register_operands(result.asm["ttgir"]),
    )  # fmt: skip
