"""What a compiled kernel must be: twelve gates, each of which reads the compiler's output and names what is wrong.

 1  it compiles (`inspection`)                     7  exponentials not computed twice; no slow ones in dot loops
 2  registers, stack, shared memory                8  no atomics, no float64, addresses of 64 bits
 3  matrix products on tensor cores                9  register operands of WGMMA need an assembler that knows them
 4  warp specialisation took effect               10  at least one program fits on a multiprocessor
 5  descriptors became the memory accelerator     11  every way Triton specialises a call compiles (`inspection`)
 6  bytes and widths of memory accesses           12  what a loop loads is enough for what it computes

A gate is a function of the build, of what came out, and of the target. Gate 9 is a remark and no fault: the code
is right, the assembler may not be, and only a run on a GPU can tell (`witness.py` of a family has exact answers).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from kernels import ir, sass
from kernels.aot import SHARED_LIMIT, Build, Compiled
from kernels.occupancy import MULTIPROCESSORS, REGISTER_LIMIT, occupancy

SAFE_ASSEMBLER = (13, 3)  # from this version on, registers that an asynchronous product reads are left alone
RATE_OF_MACHINE = 183  # operations a byte of an H200: 788e12 / 4.3e12, both measured
SIXTEEN_BITS = ("bf16", "f16")
Gate = Callable[[Build, Compiled, str], list[str]]


def resources(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 2: everything stays in registers, and there is as much shared memory as is asked for.

    Tensors without alignment need many registers for addresses: what they spill stands in the table and is no fault.
    """
    found = []
    if build.aligned and (compiled.stack or compiled.spills):
        found.append(f"uses the stack ({compiled.stack} bytes, {compiled.spills} spill instructions)")
    if compiled.registers > REGISTER_LIMIT[target]:
        found.append(f"needs {compiled.registers} registers, a thread has {REGISTER_LIMIT[target]}")
    if compiled.shared > SHARED_LIMIT[target]:
        found.append(f"needs {compiled.shared} bytes of shared memory, there are {SHARED_LIMIT[target]}")
    return found


# ---- matrix products


def is_large(dot: ir.Dot, warps: int, target: str) -> bool:
    """Whether a product is big enough for the instructions that a whole group of warps issues together."""
    if dot.dtype not in SIXTEEN_BITS or dot.batched:
        return False
    if target == "sm_90":
        return dot.m % 64 == 0 and dot.n % 8 == 0 and dot.k >= 16 and warps % 4 == 0
    return target == "sm_100" and dot.m % 64 == 0 and dot.n % 16 == 0 and dot.k >= 16 and warps in (4, 8)


def least_products(dots: Sequence[ir.Dot], warps: int, target: str) -> int:
    """The fewest tensor-core instructions that these products of 16-bit numbers can be made of, for one warp.

    One HMMA multiplies 16x16 by 16x8, one HGMMA 64x16 by 16xN with N up to 256 for a group of four warps, one
    UTCHMMA 128x16 by 16xN for a whole program, one mfma 32x8 by 8x32 (or the same work in another shape).
    """
    total = 0
    for dot in (d for d in dots if d.dtype in SIXTEEN_BITS):
        work = dot.m * dot.n * dot.k
        if target == "gfx942":
            total += work // (32 * 32 * 8 * warps)
        elif not is_large(dot, warps, target):
            total += work // (16 * 8 * 16 * warps)
        elif target == "sm_90":
            groups_along_n = max(warps // max(dot.m // 16, 1), 1)
            widest = max(n for n in range(8, 257, 8) if dot.n % n == 0 and n <= max(dot.n // groups_along_n, 8))
            total += work // (64 * widest * 16 * (warps // 4))
        else:
            total += math.ceil(dot.m / 128) * math.ceil(dot.n / 256) * dot.k // 16
    return total


def tensor_cores(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 3: products of 16-bit numbers on the best tensor-core instruction that their size allows, none dropped."""
    dots = ir.dots(compiled.ttir)
    found = [
        f"rounds the factors of a {d.m}x{d.k} by {d.k}x{d.n} product of fp32 to TF32"
        for d in dots
        if d.dtype == "f32" and d.precision == "tf32"
    ]
    short = [d for d in dots if d.dtype in SIXTEEN_BITS]
    if not short:
        return found
    large = [is_large(d, build.warps, target) for d in short]
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}[target]
    if target in ("sm_90", "sm_100"):
        if any(large) and not compiled.instructions[wanted]:
            found.append(f"has no {wanted} although a product is large enough for it")
        if all(large) and compiled.instructions["HMMA"]:
            found.append(f"has {compiled.instructions['HMMA']} HMMA where every product is large enough for {wanted}")
    elif not compiled.instructions[wanted]:
        found.append(f"has no {wanted}: its products are not on tensor cores")
    least = least_products(short, build.warps, target)
    if compiled.tensor_core < least:
        found.append(f"has {compiled.tensor_core} tensor-core instructions, its products need at least {least}")
    return found


def warp_specialisation(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 4: a loop that asks for warps of its own for loads got them (the compiler may ignore the wish silently)."""
    if not ir.specialised(compiled.ttir) or target not in ("sm_90", "sm_100"):
        return []
    found = []
    if compiled.threads // 32 <= build.warps:
        found.append(f"asks for warp specialisation and still has {build.warps} warps: the wish was ignored")
    if target == "sm_90" and not compiled.instructions["USETMAXREG"]:
        found.append("asks for warp specialisation, but no register moves between warps (no USETMAXREG)")
    return found


def descriptors(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 5: loads and stores through descriptors go through the memory accelerator where there is one."""
    if target not in ("sm_90", "sm_100"):
        return []
    loads, stores = ir.descriptor_operations(compiled.ttir)
    found = []
    if compiled.instructions["UTMALDG"] < loads:
        found.append(f"has {compiled.instructions['UTMALDG']} UTMALDG for {loads} loads through descriptors")
    if compiled.instructions["UTMASTG"] < stores:
        found.append(f"has {compiled.instructions['UTMASTG']} UTMASTG for {stores} stores through descriptors")
    return found


def memory_accesses(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 6: 16 bytes at a time exactly where that is promised, and as many bytes as `traffic.py` says."""
    found = []
    widest = max([*compiled.memory.reads, *compiled.memory.writes], default=0)
    if not build.aligned and widest >= 128 and not target.startswith("gfx"):  # AMD's wide loads take any address
        found.append("moves 16 bytes at a time although alignment was not promised")
    if build.aligned and build.expected_bytes is not None:
        # A wavefront of AMD is twice as wide, so a thread's part of a small tile can be less than 16 bytes: the
        # exact count is held on NVIDIA, here only that accesses are wide.
        if target.startswith("gfx"):
            if max(compiled.memory.reads, default=0) < 64:
                found.append("has no wide loads")
        elif compiled.bytes_16 != build.expected_bytes:
            found.append(f"moves {compiled.bytes_16} bytes in 16-byte pieces, traffic.py says {build.expected_bytes}")
    return found


def exponentials(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 7: each exponential of a tile is computed by one thread; no logarithm or division in a loop of products.

    Twice as many instructions as elements a thread are allowed, for a loop whose first round the compiler peels
    off. A row statistic may be held by every thread that holds a part of the row.
    """
    found = []
    each = [_share(shape, compiled, target) for shape in ir.exponentials(compiled.ttir)]
    if compiled.instructions["MUFU.EX2"] > 2 * sum(each):
        found.append(f"has {compiled.instructions['MUFU.EX2']} MUFU.EX2, its tiles need {sum(each)} a thread")
    slow = ir.slow_in_dot_loops(compiled.ttir)
    if slow:
        found.append(f"has {', '.join(sorted(set(slow)))} of a tile in a loop of matrix products")
    return found


def _share(shape: tuple[int, ...], compiled: Compiled, target: str) -> int:
    """Elements of a tile that a thread has to hold: with products, a warp's part is at least sixteen whole rows."""
    size = math.prod(shape)
    threads = compiled.threads
    if len(shape) < 2:
        return max(math.ceil(size / threads), min(size, 32))
    if ir.dots(compiled.ttir):
        threads = min(threads, max(shape[-2] // 16, 1) * MULTIPROCESSORS[target].warp)
    return math.ceil(size / threads)


def determinism_and_addresses(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 8: no atomics, no 64-bit floats, no 32-bit product in an address, little address arithmetic in dot loops."""
    found = []
    atomics = compiled.atomics
    if "tt.make_tensor_descriptor" in compiled.ttir:  # a descriptor made on the device is published by an exchange
        atomics -= compiled.assembly.count("ATOMG.E.EXCH")
    if atomics:
        found.append(f"has {atomics} atomic instructions, so two runs may differ")
    if compiled.doubles or ir.doubles(compiled.ttir):
        found.append(f"has {compiled.doubles or ir.doubles(compiled.ttir)} float64 instructions")
    if compiled.short_offsets:
        found.append(f"adds 32-bit offsets to {compiled.short_offsets} pointers, which wrap past 2^31")
    products = ir.short_products(compiled.ttir)
    if products:
        found.append(f"makes {products} products of 32 bits for addresses, which wrap past 2^31")
    loop = sass.busiest_loop(compiled.assembly)
    memory = loop["LDG"] + loop["LDGSTS"] + loop["STG"] + loop["UTMALDG"]
    if loop["IMAD.WIDE"] > 2 * memory + 8:
        found.append(f"has {loop['IMAD.WIDE']} wide multiplications for {memory} accesses in its busiest loop")
    return found


def fits(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 10: a program can be launched at all; how many fit side by side is in the table of builds."""
    if resources(build, replace(compiled, stack=0, spills=0), target):
        return []  # said already
    programs = occupancy(compiled.registers, compiled.threads, compiled.shared, target)
    return [] if programs else ["does not fit on a multiprocessor: it cannot be launched"]


def roofline(build: Build, compiled: Compiled, target: str) -> list[str]:
    """Gate 12: a loop of large products computes enough for each byte that it loads.

    The machine does 183 operations in the time of a byte from memory; a loop's loads mostly come from the cache,
    which is several times faster, so an eighth is asked of products that are large enough for a group of warps.
    """
    dots = ir.dots(compiled.ttir)
    if target != "sm_90" or not dots or not all(is_large(d, build.warps, target) for d in dots):
        return []
    reached = ir.intensity(compiled.ttir)
    if 0 < reached < RATE_OF_MACHINE / 8:
        return [f"computes {reached:.0f} operations a byte loaded in its loop; {RATE_OF_MACHINE / 8:.0f} are wanted"]
    return []


GATES: tuple[Gate, ...] = (
    resources, tensor_cores, warp_specialisation, descriptors, memory_accesses, exponentials,
    determinism_and_addresses, fits, roofline,
)  # fmt: skip


RIGHT: tuple[Gate, ...] = (determinism_and_addresses, fits)  # of builds whose speed does not count


def remarks(compiled: Compiled, assembler: str) -> list[str]:
    """Gate 9: what is no fault of the kernel but has to be known before its numbers are believed on a GPU."""
    if compiled.register_a and _version(assembler) < SAFE_ASSEMBLER:
        return [
            f"{compiled.register_a} asynchronous products read registers, which assembler {assembler} may overwrite "
            "too early (13.3 does not): run the witnesses on the GPU, or name another with TRITON_PTXAS_PATH"
        ]
    return []


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
