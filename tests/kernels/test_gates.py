"""Each gate of `kernels/gates.py` can close: a planted kernel for every one, and a good kernel for which none does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import gates, ir, sass
from kernels.occupancy import occupancy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said():
    """What the gates say of the planted kernels, which are compiled in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("planted_builds.py"))], capture_output=True, text=True, cwd=ROOT,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["good attention", "good product", "descriptors as they are"])
def test_good_kernels_pass(said, name):
    assert said[name] == []


PLANTED = {
    "does not compile": "power of 2",
    "spills": "uses the stack",
    "too much shared memory": "bytes of shared memory",
    "rounded to TF32": "TF32",
    "Ampere's code for Hopper": "has no HGMMA",
    "half the products": "need at least 64",
    "warps not specialised": "the wish was ignored",
    "descriptors without the accelerator": "0 UTMALDG for 2 loads",
    "exponentials twice": "MUFU.EX2, its tiles need",
    "division in the loop": "arith.divf of a tile in a loop",
    "atomics": "atomic",
    "float64": "float64",
    "32-bit offsets": "32-bit offsets",
    "32-bit product": "products of 32 bits",
    "wide integers": "wide multiplications",
    "low intensity": "operations a byte",
    "method_kernel (every size 1)": "does not compile",
    "carried_kernel (64-bit integers)": "does not compile",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_kernel_is_named(said, name):
    assert any(PLANTED[name] in fault for fault in said[name]), said[name]


def test_the_specialisations_that_break_compile_otherwise(said):
    """What gate 11 finds is hidden from an ordinary build of the same kernels."""
    assert said["method_kernel"] == said["carried_kernel"] == said["carried_kernel (every size 1)"] == []


def test_register_operands_are_a_remark_until_the_assembler_is_new_enough(said):
    assert said["register operands"] == 1
    assert said["assembler 13.4"] == []
    assert said["good product: remarks"] == []


@pytest.mark.parametrize(("version", "safe"), [("12.8.93", False), ("13.2.1", False), ("13.3.0", True), ("14.0", True)])
def test_which_assemblers_are_safe(version, safe):
    class Compiled:
        register_a = 1

    assert (gates.remarks(Compiled(), version) == []) == safe


# ---- occupancy, by hand


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "target", "programs"),
    [
        (32, 256, 0, "sm_90", 8),  # 2048 threads
        (255, 256, 0, "sm_90", 1),  # 65,536 / (256 * 256)
        (128, 256, 0, "sm_90", 2),
        (129, 256, 0, "sm_90", 1),  # 136 a thread: handed out in portions of eight
        (64, 128, 100_000, "sm_90", 2),  # 233,472 / 101,024
        (64, 128, 100_000, "sm_80", 1),  # 167,936 / 101,024
        (64, 1024, 0, "sm_90", 1),
        (72, 1024, 0, "sm_90", 0),  # 72 * 1024 > 65,536: cannot be launched
        (256, 32, 0, "sm_90", 0),
        (16, 32, 0, "sm_90", 32),
        (128, 256, 0, "gfx942", 4),  # 4 wavefronts, 131,072 / (128 * 64) = 16 fit
        (512, 256, 0, "gfx942", 1),
        (64, 256, 40_000, "gfx942", 1),
        (64, 256, 0, "gfx942", 8),
    ],
)
def test_occupancy(registers, threads, shared, target, programs):
    assert occupancy(registers, threads, shared, target) == programs


# ---- reading the intermediate language

LOOP = """
  tt.func public @f(%X: !tt.ptr<f16> loc("X"(#loc)), %n: i32 loc("n"(#loc)), %m: i32 {tt.divisibility = 16 : i32}) {
    %a = arith.constant dense<0.0> : tensor<64x64xf16> loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %before = tt.dot %q, %a, %z, inputPrecision = ieee : tensor<64x64xf16> * tensor<64x64xf16> -> tensor<64x64xf32>
    %out:2 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %z, %at = %pid) -> (tensor<64x16xf32>, i32)  : i32 {
      %k = tt.load %p, %m, %o : tensor<64x16x!tt.ptr<f16>> loc(#loc)
      %s = tt.dot %q, %k, %acc, inputPrecision = tf32 : tensor<64x64xf16> * tensor<64x16xf16> -> tensor<64x16xf32>
      %r = "tt.reduce"(%s) <{axis = 1 : i32}> ({
      ^bb0(%x: f32, %y: f32):
        %d = arith.divf %x, %y : f32 loc(#loc)
        tt.reduce.return %d : f32 loc(#loc)
      }) : (tensor<64x16xf32>) -> tensor<64xf32> loc(#loc)
      %e = math.exp2 %s : tensor<64x16xf32> loc(#loc)
      %next = arith.muli %at, %n : i32 loc(#loc)
      scf.yield %s, %next : tensor<64x16xf32>, i32 loc(#loc)
    } {tt.num_stages = 2 : i32} loc(#loc)
    %l = math.log2 %r : tensor<64xf32> loc(#loc)
    %wide = arith.extsi %out#1 : i32 to i64 loc(#loc)
    %there = tt.addptr %X, %wide : !tt.ptr<f16>, i64 loc(#loc)
"""


def test_products_of_a_text():
    before, inside = ir.dots(LOOP)
    assert (before.m, before.n, before.k, before.dtype, before.precision, before.loop) == (64, 64, 64, "f16", "ieee", 0)
    assert (inside.m, inside.n, inside.k, inside.precision, inside.loop) == (64, 16, 64, "tf32", 1)
    assert ir.intensity(LOOP) == 2 * 64 * 16 * 64 / (64 * 16 * 2)  # the product before the loop does not count
    assert ir.exponentials(LOOP) == [(64, 16)]


def test_slow_functions_count_only_inside_the_loop_and_for_tiles():
    assert ir.slow_in_dot_loops(LOOP) == []  # the division is of scalars within a reduction, the logarithm after
    assert ir.slow_in_dot_loops(LOOP.replace("math.exp2", "math.log2")) == ["math.log2"]


def test_a_division_may_belong_to_a_second_exponential():
    soft_cap = "      %t = arith.divf %s, %s : tensor<64x16xf32>\n      %e = math.exp2"
    assert ir.slow_in_dot_loops(LOOP.replace("      %e = math.exp2", soft_cap)) == ["arith.divf"]
    assert ir.slow_in_dot_loops(LOOP.replace("      %e = math.exp2", soft_cap.replace("divf %s", "divf %k"))) == []
    spread = soft_cap.replace("%s, %s", "%s, %one").replace(
        "      %t", "      %one = tt.splat %c1 : f32 -> tensor<64x16xf32>\n      %t"
    )
    assert ir.slow_in_dot_loops(LOOP.replace("      %e = math.exp2", spread)) == []
    written = soft_cap.replace(
        "tensor<64x16xf32>\n", "tensor<64x16xf32>\n      tt.store %p, %t : tensor<64x16x!tt.ptr<f32>>\n"
    )
    assert ir.slow_in_dot_loops(LOOP.replace("      %e = math.exp2", written)) == []
    second = soft_cap.replace("%e =", "%f = math.exp2 %s : tensor<64x16xf32>\n      %e =")
    assert ir.slow_in_dot_loops(LOOP.replace("      %e = math.exp2", second)) == []


def test_a_product_that_goes_round_a_loop_reaches_the_address():
    assert ir.short_products(LOOP) == 1
    product = "arith.muli %at, %n : i32"
    assert ir.short_products(LOOP.replace(product, "arith.muli %at, %at : i32")) == 0  # no argument
    assert ir.short_products(LOOP.replace(product, "arith.muli %m, %n : i32")) == 0  # two arguments: a size
    assert ir.short_products(LOOP.replace(product, "arith.remsi %at, %n : i32")) == 0
    assert ir.short_products(LOOP.replace(product, "arith.muli %at, %n : i64")) == 0
    assert ir.short_products(LOOP.replace("%wide = arith.extsi %out#1", "%wide = arith.extsi %n")) == 0


def test_short_offsets():
    ttir = """
    %c = arith.constant 128 : i32
    %pid = tt.get_program_id x : i32
    %r = tt.make_range {end = 128 : i32, start = 0 : i32} : tensor<128xi32>
    %start = arith.muli %pid, %c : i32
    %s = tt.splat %start : i32 -> tensor<128xi32>
    %at = arith.addi %s, %r : tensor<128xi32>
    %wide = arith.extsi %at : tensor<128xi32> to tensor<128xi64>
    %1 = tt.addptr %x, %at : tensor<128x!tt.ptr<f32>>, tensor<128xi32> loc(#loc1)
    %2 = tt.addptr %y, %start : !tt.ptr<f32>, i32 loc(#loc2)
    %3 = tt.addptr %x, %wide : tensor<128x!tt.ptr<f32>>, tensor<128xi64> loc(#loc3)
    %4 = tt.addptr %x, %r : tensor<128x!tt.ptr<f32>>, tensor<128xi32> loc(#loc3)
    %5 = tt.addptr %y, %pid : !tt.ptr<f32>, i32
    """
    assert ir.short_offsets(ttir) == 2


def test_float64_in_a_text():
    assert ir.doubles("%a = arith.extf %x : f32 to f64 loc(#l)\n%b = arith.mulf %y, %y : tensor<4xf64>") == 2
    assert ir.doubles("%a = arith.addf %x, %y : f32 loc(#l)") == 0


def test_descriptors_and_wishes_of_a_text():
    text = "%d = tt.descriptor_load %x[%a, %b] : !tt.tensordesc<tensor<8x8xf16>> -> tensor<8x8xf16>\n"
    assert ir.descriptor_operations(text) == (1, 0)
    assert not ir.specialised(text)
    assert ir.specialised(text + "} {tt.warp_specialize} loc(#l)")


# ---- loops of a listing

LISTING = """
        /*0000*/                   IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0010*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/                   IMAD.WIDE.U32 R2, R3, 0x4, R4 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   BRA 0x70;
"""


def test_the_busiest_loop_is_innermost():
    loop = sass.busiest_loop(LISTING)
    assert (loop["HMMA"], loop["IMAD.WIDE"], loop["LDG"]) == (1, 1, 0)
    assert sass.busiest_loop(LISTING.replace("HMMA", "FFMA"))["IMAD.WIDE"] == 0


def test_register_operands_of_a_text():
    text = "%a = ttng.warp_group_dot %p, %v, %c {isAsync = true} : {} * !ttg.memdesc<64x64xf16> -> tensor<64x64xf32>"
    assert sass.register_operands(text.replace("{}", "tensor<64x64xf16, #dot>")) == 1
    assert sass.register_operands(text.replace("{}", "!ttg.memdesc<64x64xf16, #smem>")) == 0
