"""Kernels that each break one gate, compiled and judged: prints what the gates said, as JSON.

Run by test_gates.py in a process of its own, for nothing can be compiled where kernels are interpreted.
"""

import json
import sys
from collections import Counter
from dataclasses import replace

import triton
import triton.language as tl

from kernels import gates, inspection
from kernels.aot import Build, attempt, compile_builds, constant, integer, pointer


@triton.jit
def good_kernel(Q, K, V, O, n, stride, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # noqa: E741
    """Attention of one head, as it should be: what every gate lets through."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, D)
    q = tl.load(Q + rows[:, None] * stride + cols[None, :], mask=(rows < n)[:, None], other=0.0)
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    for start in range(0, n, BN):
        keys = (start + tl.arange(0, BN)).to(tl.int64)
        inside = (keys < n)[:, None]
        k = tl.load(K + keys[:, None] * stride + cols[None, :], mask=inside, other=0.0)
        v = tl.load(V + keys[:, None] * stride + cols[None, :], mask=inside, other=0.0)
        s = tl.where((keys < n)[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        rescale = tl.exp2(largest - new)
        total = total * rescale + tl.sum(p, axis=1)
        acc = tl.dot(p.to(V.dtype.element_ty), v, acc * rescale[:, None])
        largest = new
    tl.store(O + rows[:, None] * stride + cols[None, :], (acc / total[:, None]).to(O.dtype.element_ty),
             mask=(rows < n)[:, None])  # fmt: skip


@triton.jit
def product_kernel(
    A, B, C, n, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, EXP: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """A product in a loop, with one thing too many by choice: wide integers, exponentials, a division."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    inner, cols = tl.arange(0, K), tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, n, K):
        k = (start + inner).to(tl.int64)
        a = tl.load(A + rows[:, None] * stride + k[None, :])
        b = tl.load(B + k[:, None] * stride + cols[None, :])
        acc = tl.dot(a, b, acc)
        if WIDE:
            product = (rows[:, None] + start) * (k[None, :N] if N == K else cols[None, :].to(tl.int64) * stride)
            acc += ((product >> 33) & 1).to(tl.float32)
        if EXP:
            acc = tl.exp2(acc)
        if DIVIDE:
            acc = acc / (1.0 + acc * acc)
    tl.store(C + rows[:, None] * stride + cols[None, :], acc.to(C.dtype.element_ty))


@triton.jit
def specialised_kernel(A, B, C, n, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Asks for warps of its own for the loads."""
    pid = tl.program_id(0)
    a_of = tl.make_tensor_descriptor(A, [n, n], [stride, 1], [M, K])
    b_of = tl.make_tensor_descriptor(B, [n, n], [stride, 1], [K, N])
    acc = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, n, K, warp_specialize=True):
        acc = tl.dot(a_of.load([pid * M, start]), b_of.load([start, 0]), acc)
    c_of = tl.make_tensor_descriptor(C, [n, n], [stride, 1], [M, N])
    c_of.store([pid * M, 0], acc.to(C.dtype.element_ty))


@triton.jit
def range_kernel(X, Y, n):
    """A range whose length is no power of two."""
    tl.store(Y + tl.arange(0, 24), tl.load(X + tl.arange(0, 24)))


@triton.jit
def atomic_kernel(X, Y, n, BLOCK: tl.constexpr):
    """Adds in whatever order the programs arrive."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(Y, tl.sum(tl.load(X + at, mask=at < n, other=0.0), axis=0))


@triton.jit
def double_kernel(X, Y, n, BLOCK: tl.constexpr):
    """A factor of 64 bits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    tl.store(Y + at, (x * tl.full((), 0.1, tl.float64)).to(tl.float32), mask=at < n)


@triton.jit
def short_kernel(X, Y, n, BLOCK: tl.constexpr):
    """The number of an element in 32 bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def wrapped_kernel(X, Y, n, stride, BLOCK: tl.constexpr):
    """Widened too late: the product has wrapped already."""
    row = (tl.program_id(0) * stride).to(tl.int64)
    at = row + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at))


@triton.jit
def method_kernel(X, Y, n, BLOCK: tl.constexpr):
    """Right until n is 1: then it is a Python number, which has no method `to`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n.to(tl.int64)
    tl.store(Y + at, tl.load(X + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def carried_kernel(X, Y, n, BLOCK: tl.constexpr):
    """Right until n has 64 bits: then the loop's variable changes its type on the way round."""
    at = tl.full((), 0, tl.int32)
    while at < 128:
        tl.store(Y + at + tl.arange(0, BLOCK), tl.load(X + at + tl.arange(0, BLOCK)))
        at = at + n


def vectors(function, dtype="fp32", **constants) -> Build:
    """A build of a kernel on X, Y and n."""
    arguments = {"X": pointer(dtype), "Y": pointer(dtype), "n": integer(False), "stride": integer(False)}
    named = {name: a for name, a in arguments.items() if name in function.arg_names}
    return Build(function, "", {**named, **{n: constant(v) for n, v in constants.items()}}, 4)


def attention(rows=128, keys=64, warps=8, stages=2) -> Build:
    """A build of the good kernel."""
    data = pointer("bf16")
    arguments = {"Q": data, "K": data, "V": data, "O": data, "n": integer(True), "stride": integer(True),
                 "scale": replace(integer(False), kind="fp32"), "D": constant(128), "BM": constant(rows),
                 "BN": constant(keys)}  # fmt: skip
    return Build(good_kernel, "", arguments, warps, stages=stages)


def product(m=128, n=128, k=64, warps=8, stages=2, dtype="bf16", function=product_kernel, **flags) -> Build:
    """A build of a product."""
    data = pointer(dtype)
    arguments = {"A": data, "B": data, "C": data, "n": integer(True), "stride": integer(True),
                 "M": constant(m), "N": constant(n), "K": constant(k)}  # fmt: skip
    if function is product_kernel:
        arguments |= {name: constant(flags.get(name, False)) for name in ("WIDE", "EXP", "DIVIDE")}
    return Build(function, "", arguments, warps, stages=stages)


PLANTED = {
    "good attention": attention(),
    "good product": product(),
    "does not compile": vectors(range_kernel),
    "spills": attention(128, 128, warps=4),
    "too much shared memory": product(128, 256, 64, stages=6),
    "rounded to TF32": product(dtype="fp32"),
    "warps not specialised": product(function=specialised_kernel, warps=8, n=64),
    "exponentials twice": product(16, 16, 64, warps=8, EXP=True),
    "division in the loop": product(DIVIDE=True),
    "atomics": vectors(atomic_kernel, BLOCK=128),
    "float64": vectors(double_kernel, BLOCK=128),
    "32-bit offsets": vectors(short_kernel, BLOCK=128),
    "32-bit product": vectors(wrapped_kernel, BLOCK=128),
    "wide integers": product(WIDE=True),
    "low intensity": product(64, 16, 64, warps=4),
}


def judge() -> dict[str, object]:
    """What the gates say of each."""
    said = {}
    for name, compiled in zip(PLANTED, attempt(list(PLANTED.values()), "sm_90")):
        row = inspection.row("planted", PLANTED[name], compiled, "sm_90")
        said[name] = row["problems"]
        said[f"{name}: remarks"] = row["remarks"]
    (ampere,) = compile_builds([PLANTED["good product"]], "sm_80")
    said["Ampere's code for Hopper"] = gates.tensor_cores(PLANTED["good product"], ampere, "sm_90")
    half = replace(ampere, tensor_core=ampere.tensor_core // 2)
    said["half the products"] = gates.tensor_cores(PLANTED["good product"], half, "sm_80")
    (described,) = compile_builds([PLANTED["warps not specialised"]], "sm_90")
    said["descriptors as they are"] = gates.descriptors(PLANTED["warps not specialised"], described, "sm_90")
    plain = replace(described, instructions=Counter())
    said["descriptors without the accelerator"] = gates.descriptors(PLANTED["good product"], plain, "sm_90")
    (attended,) = compile_builds([PLANTED["good attention"]], "sm_90")
    said["assembler 13.4"] = gates.remarks(attended, "13.4.59")
    said["register operands"] = attended.register_a
    for function in (method_kernel, carried_kernel):
        builds = [vectors(function, BLOCK=128)]
        for build, compiled in zip(builds * 4, attempt(builds, "sm_90")):
            said[function.fn.__name__] = inspection.row("planted", build, compiled, "sm_90")["problems"]
        derived = list(inspection.specialisations(builds))
        for build, compiled in zip(derived, attempt(derived, "sm_90")):
            row = inspection.row("planted", build, compiled, "sm_90")
            said[f"{function.fn.__name__}{build.config}"] = row["problems"]
    return said


if __name__ == "__main__":
    json.dump(judge(), sys.stdout, indent=1)
