"""Reading assembly, on small listings written by hand."""

import struct

import pytest

from kernels import aot, inspection, sass
from kernels.aot import Argument, Build, Compiled
from kernels.sass import MemoryCounts

CUDA = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64], P0 ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0040*/             @P1   LDG.E R8, desc[UR4][R2.64] ;
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/                   LDL R4, [R1] ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0090*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*00a0*/                   DFMA R4, R4, R6, R8 ;
        /*00b0*/                   EXIT ;
"""

AMD = """
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_load_dword v5, v6, s[0:3], 0 offen
\tglobal_load_ushort v7, v8, s[0:1]
\tglobal_store_dwordx2 v4, v[0:1], s[2:3]
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tglobal_atomic_add_f32 v0, v1, s[0:1]
\tv_fma_f64 v[0:1], v[2:3], v[4:5], v[6:7]
    .vgpr_count:     24
    .vgpr_spill_count: 3
"""


def test_cuda_instructions():
    counts = sass.count_cuda(CUDA)
    assert counts.memory.reads == {128: 2, 16: 1, 32: 1}
    assert counts.memory.writes == {64: 1}
    assert (counts.spills, counts.tensor_core, counts.atomics, counts.doubles) == (2, 1, 1, 1)


def test_amd_instructions():
    counts = sass.count_amd(AMD)
    assert counts.memory.reads == {128: 1, 32: 1, 16: 1}
    assert counts.memory.writes == {64: 1}
    assert (counts.tensor_core, counts.atomics, counts.doubles) == (1, 1, 1)
    assert sass.directive(AMD, "vgpr_count") == 24
    assert sass.directive(AMD, "vgpr_spill_count") == 3
    assert sass.directive(AMD, "private_segment_fixed_size") == 0


def test_resources_and_versions():
    assert sass.resource_usage(" Function f:\n  REG:47 STACK:8 SHARED:32 LOCAL:0 CONSTANT[0]:560 TEXTURE:0") == {
        "REG": 47, "STACK": 8, "SHARED": 32, "LOCAL": 0, "TEXTURE": 0
    }  # fmt: skip
    assert sass.version_of("Cuda compilation tools, release 12.8, V12.8.93") == "12.8.93"
    assert sass.version_of("what?") == "unknown"


def test_a_long_listing_is_cut_where_its_parts_end():
    first, second = sass.cut(CUDA, [0x40, 0x80])
    assert sass.count_cuda(first).memory.reads == {128: 2, 16: 1}
    assert sass.count_cuda(second).memory.reads == {32: 1}
    assert sass.count_cuda(second).doubles == 1


def elf(code):
    """The least that the reader of sections needs: a header, two sections, their names."""
    names = b"\0.text.kernel\0.shstrtab\0"
    code_at, names_at = 64, 64 + len(code)
    table = names_at + len(names)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 1)

    def section(name, offset, size):
        return struct.pack("<IIQQQQ", name, 1, 0, 0, offset, size).ljust(64, b"\0")

    return bytes(header) + code + names + section(1, code_at, len(code)) + section(14, names_at, len(names))


def test_machine_code_of_a_cubin():
    assert sass.machine_code(elf(b"0123456789abcdef")) == b"0123456789abcdef"
    with pytest.raises(ValueError, match=r"no \.text section"):
        sass.machine_code(elf(b"0123").replace(b".text.", b".data."))


# ---- the verdict on a build


class Function:
    class fn:
        __name__ = "some_kernel"


def build(**changes):
    given = {"function": Function, "config": "c", "arguments": {"X": Argument("*fp32")}, "warps": 4,
             "expected_bytes": (4096, 2048), "aligned": True}  # fmt: skip
    return Build(**{**given, **changes})


def compiled(**changes):
    given = {"registers": 32, "stack": 0, "spills": 0, "shared": 0, "tensor_core": 0, "atomics": 0, "doubles": 0,
             "memory": MemoryCounts({128: 2, 32: 1}, {128: 1}), "threads": 128, "short_offsets": 0, "assembly": ""}  # fmt: skip
    return Compiled(**{**given, **changes})


def test_a_good_build_has_no_faults():
    assert inspection.faults(build(), compiled(), "sm_90") == []
    row = inspection.row("norm", build(), compiled(), "sm_90")
    fields = {
        "family",
        "kernel",
        "config",
        "target",
        "registers",
        "stack",
        "spills",
        "shared",
        "tensor_core",
        "load_bits",
        "ok",
    }
    assert fields <= row.keys()
    assert row["ok"]
    assert row["load_bits"] == [32, 128]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "stack"),
        ({"spills": 2}, "spill"),
        ({"shared": 10**6}, "shared memory"),
        ({"atomics": 1}, "atomic"),
        ({"doubles": 1}, "float64"),
        ({"short_offsets": 1}, "32-bit offsets"),
        ({"memory": MemoryCounts({128: 3}, {128: 1})}, "traffic.py says"),
    ],
)
def test_each_fault_is_named(changes, words):
    (fault,) = inspection.faults(build(), compiled(**changes), "sm_90")
    assert words in fault


def test_wide_accesses_without_promised_alignment_are_a_fault():
    (fault,) = inspection.faults(build(aligned=False), compiled(), "sm_90")
    assert "alignment was not promised" in fault


def test_narrow_accesses_on_amd_are_a_fault():
    assert inspection.faults(build(), compiled(memory=MemoryCounts({64: 1}, {64: 1})), "gfx942") == []
    assert inspection.faults(build(), compiled(memory=MemoryCounts({16: 8}, {16: 8})), "gfx942")


def test_an_interpreted_function_is_refused():
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        list(aot.compile_builds([build()], "sm_90"))
