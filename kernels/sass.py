"""Reading assembly: what instructions a compiled kernel holds, counted from text. Pure functions, no tools."""

import bisect
import itertools
import re
import struct
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MemoryCounts:
    """How many global-memory instructions there are, by width in bits."""

    reads: Counter = field(default_factory=Counter)
    writes: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Counts:
    """Instructions of interest in one listing."""

    memory: MemoryCounts
    spills: int
    tensor_core: int
    atomics: int
    doubles: int
    instructions: Counter = field(default_factory=Counter)


TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
_CUDA_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+\S")
_JUMP = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)


def _cuda_width(opcode: str) -> int:
    """Bits per thread of a load or store: 32 unless the opcode says otherwise."""
    for part in opcode.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


def _cuda_family(opcode: str) -> str:
    """An instruction's name without its details; a special function (MUFU) keeps which one it is."""
    first, *rest = opcode.split(".")
    return f"MUFU.{rest[0]}" if first == "MUFU" and rest else first


def count_cuda(listing: str) -> Counts:
    """Count a listing of nvdisasm.

    LDGSTS copies global memory straight to shared memory (asynchronously) and counts as a read. STL and LDL
    are spills: local memory is used for nothing else in these kernels.
    """
    opcodes = _CUDA_INSTRUCTION.findall(listing)
    base = [opcode.split(".")[0] for opcode in opcodes]
    reads = Counter(_cuda_width(o) for o, b in zip(opcodes, base, strict=True) if b in ("LDG", "LDGSTS"))
    writes = Counter(_cuda_width(o) for o, b in zip(opcodes, base, strict=True) if b == "STG")
    return Counts(
        MemoryCounts(reads, writes),
        spills=sum(b in ("STL", "LDL") for b in base),
        tensor_core=sum(b in TENSOR_CORE for b in base),
        atomics=sum(b in ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG") for b in base),
        doubles=sum(
            b in ("DADD", "DMUL", "DFMA", "DSETP", "DMMA") or "F64" in o.split(".") for o, b in zip(opcodes, base)
        ),
        instructions=Counter(_cuda_family(opcode) for opcode in opcodes),
    )


_AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8}


def _amd_width(opcode: str) -> int:
    parts = opcode.split("_")
    return next((bits for name, bits in _AMD_WIDTHS.items() if name in parts), 16)


_AMD_SPECIAL = {"v_exp_f32": "MUFU.EX2", "v_log_f32": "MUFU.LG2", "v_rcp_f32": "MUFU.RCP",
                "v_rsq_f32": "MUFU.RSQ", "v_sqrt_f32": "MUFU.SQRT"}  # fmt: skip


def _amd_family(opcode: str) -> str:
    """An instruction's name; the special functions by NVIDIA's names, so that one closed form serves all targets."""
    if opcode.startswith(("v_mfma", "v_smfmac")):
        return "mfma"
    return _AMD_SPECIAL.get(opcode.removesuffix("_e32").removesuffix("_e64"), opcode)


def count_amd(listing: str) -> Counts:
    """Count an amdgcn listing; spills come from its directives instead (see `directive`)."""
    opcodes = _AMD_INSTRUCTION.findall(listing)
    memory = [o for o in opcodes if o.startswith(("global_", "buffer_")) and ("load" in o or "store" in o)]
    return Counts(
        MemoryCounts(
            Counter(_amd_width(o) for o in memory if "load" in o),
            Counter(_amd_width(o) for o in memory if "store" in o),
        ),
        spills=0,
        tensor_core=sum(o.startswith(("v_mfma", "v_smfmac")) for o in opcodes),
        atomics=sum("atomic" in o for o in opcodes),
        doubles=sum(o.startswith("v_") and "_f64" in o and "_f64_i" not in o for o in opcodes),
        instructions=Counter(_amd_family(opcode) for opcode in opcodes),
    )


def directive(listing: str, name: str) -> int:
    """The number an amdgcn listing states in its metadata, as `.vgpr_count: 24`; 0 where it is silent."""
    found = re.search(rf"^\s*\.{name}:\s*(\d+)", listing, re.MULTILINE)
    return int(found.group(1)) if found else 0


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin: the section of the ELF file whose name starts with .text."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", names + name):
            return cubin[offset : offset + length]
    raise ValueError("sass.machine_code: the cubin holds no .text section.")


def cut(listing: str, lengths: list[int]) -> list[str]:
    """Cut the listing of code laid end to end into the listings of its parts, by address."""
    ends = list(itertools.accumulate(lengths))
    parts: list[list[str]] = [[] for _ in lengths]
    for line in listing.splitlines():
        address = _ADDRESS.match(line)
        if address:
            parts[bisect.bisect_right(ends, int(address.group(1), 16))].append(line)
    return ["\n".join(part) for part in parts]


def busiest_loop(listing: str) -> Counter:
    """Instructions by family, IMAD.WIDE apart, of the innermost loop with the most tensor-core instructions.

    A loop is what lies between a jump backwards and its goal. Empty where no loop has such an instruction.
    """
    lines = [(int(found.group(1), 16), line) for line in listing.splitlines() if (found := _ADDRESS.match(line))]
    best: Counter = Counter()
    for address, line in lines:
        jump = _JUMP.search(line)
        if jump and int(jump.group(1), 16) < address:
            inside = "\n".join(text for at, text in lines if int(jump.group(1), 16) <= at <= address)
            if any(_is_jump_back(text) for text in inside.splitlines()[:-1]):
                continue  # not innermost
            counts = count_cuda(inside)
            if counts.tensor_core > sum(best[name] for name in TENSOR_CORE):
                best = counts.instructions
                best["IMAD.WIDE"] = inside.count("IMAD.WIDE")
    return best


def _is_jump_back(line: str) -> bool:
    address, jump = _ADDRESS.match(line), _JUMP.search(line)
    return bool(address and jump and int(jump.group(1), 16) < int(address.group(1), 16))


def register_operands(ttgir: str) -> int:
    """How many asynchronous matrix products (WGMMA) take their left factor from registers.

    Assemblers before 13.3 may reuse those registers before they have been read.
    """
    return len(re.findall(r"ttng\.warp_group_dot [^\n]*? : tensor<", ttgir))


def resource_usage(text: str) -> dict[str, int]:
    """The fields of `cuobjdump --dump-resource-usage`: REG, STACK, SHARED, LOCAL, ..."""
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def version_of(text: str) -> str:
    """The version in the text of `ptxas --version`."""
    found = re.search(r"V(\d+\.\d+\.\d+)", text) or re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else "unknown"
