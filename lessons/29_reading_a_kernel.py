# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 29 · Reading a kernel: what the compiler made of it
#
# A kernel is fast or slow for reasons that stand in its machine code: how many bytes it moves and in what pieces, how many
# registers a thread needs, which instructions multiply. Triton's compiler and NVIDIA's assembler run on any Linux machine, so
# all of this can be read **without a GPU**. What cannot be read is time; for that there is `python -m kernels bench`.
#
# Equations: `rmsnorm`, `flash-attention`, `flops-block`.
#
# After it you can
# - say from bytes and operations what limits a kernel, and how fast it can be at best,
# - follow one line of Python down to `LDG.E.128`, and see what breaks that,
# - count tensor-core instructions and exponentials of an attention kernel and know which of them it waits for,
# - find spills, lost occupancy and wrapped addresses before anything has run.

# %%
import os

os.environ["TRITON_INTERPRET"] = "0"  # here kernels are compiled, not interpreted; before triton is imported

import inspect
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import triton
import triton.language as tl

from kernels import gates, ir
from kernels.aot import Build, compile_builds, constant, integer, pointer
from kernels.attention import builds as attention_builds
from kernels.attention import traffic as attention_traffic
from kernels.attention.config import Tile
from kernels.decode import traffic as decode_traffic
from kernels.norm import builds as norm_builds
from kernels.norm import traffic as norm_traffic
from kernels.occupancy import occupancy
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, use_style

use_style()

# %% [markdown]
# ## 1. The roof
#
# A machine has two rates: $M$ operations a second and $C$ bytes a second. A kernel that does $F$ operations on $B$ bytes takes
# at least
#
# $$t\ge\max\!\left(\frac{F}{M},\;\frac{B}{C}\right),\qquad\text{so it reaches at most}\quad \min\!\left(M,\;C\,\frac FB\right)$$
#
# operations a second. $F/B$ is its *intensity*. On an H200 we measured $M$ = 788 TFLOP/s (a large bf16 matrix product) and
# $C$ = 4.3 TB/s (a copy): the corner of the roof is at $M/C$ = 183 operations a byte. Left of it more operations cost nothing,
# right of it more bytes cost nothing.
#
# The operations and bytes of our kernels are functions in each family's `traffic.py`; the bytes are those that *must* move.

# %%
M, C = 788e12, 4.3e12
print(f"corner of the roof: {M / C:.0f} operations a byte\n")
print(inspect.getsource(norm_traffic.forward_bytes))


def attention_intensity(L, d=128, heads=16):
    """Operations a byte of the attention of L queries over L keys, in bf16."""
    flops = attention_traffic.forward_flops(heads * attention_traffic.pairs(L, L), d, d)
    return flops / attention_traffic.forward_bytes(1, heads, heads, L, L, d, d, 2)


def decoding_intensity(L=4096, d=128, group=8):
    """The same of one new token that looks back at L keys, with `group` query heads a key head."""
    flops = decode_traffic.decode_flops([L], group, 1, d, d)
    return flops / (2 * L * d * 2)


n, d = 4096, 4096
cases = {
    "RMSNorm": norm_traffic.forward_flops(n, d, centred=False, residual=False, shift=False)
    / norm_traffic.forward_bytes(n, d, 2, 2, centred=False, residual=False, shift=False),
    "decoding, 8 heads a key": decoding_intensity(),
    "attention, L = 128": attention_intensity(128),
    "attention, L = 1024": attention_intensity(1024),
    "attention, L = 8192": attention_intensity(8192),
    "matrix product 4096": 2 * 4096**3 / (3 * 4096**2 * 2),
}
for name, value in cases.items():
    bound = "memory" if value < M / C else "arithmetic"
    print(f"{name:24} {value:8.1f} operations a byte: {bound} limits it, at most {min(M, C * value) / 1e12:5.1f} TFLOP/s")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6))
x = np.logspace(-0.5, 4, 200)
axes.loglog(x, np.minimum(M, C * x) / 1e12, color="black")
for (name, value), colour in zip(cases.items(), (BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE)):
    axes.plot(value, min(M, C * value) / 1e12, "o", ms=9, color=colour, label=name)
axes.axvline(M / C, color="grey", lw=0.8, ls=":")
axes.set(xlabel="operations a byte", ylabel="TFLOP/s at most", title="The roof of an H200, and where kernels stand under it")
axes.legend(loc="lower right", fontsize=9)
plt.show()

# %% [markdown]
# A norm can use half a percent of the machine's arithmetic and nobody can change that: all that counts is to move each byte
# once. Attention crosses the corner between a few hundred and a thousand keys, *if* its scores never go to memory
# (`flash-attention`): written out, they would add $2L^2$ numbers to the bytes.
#
# ### Exercise 1: what a matrix of scores costs
#
# Return the intensity of attention that writes its $H\,L\times L$ scores in bf16 to memory and reads them back for the softmax,
# writes and reads the probabilities too, and otherwise moves the same bytes.


# %%
def my_written_intensity(L, d=128, heads=16):
    """Operations a byte with scores and probabilities in memory."""
    ### BEGIN SOLUTION
    flops = attention_traffic.forward_flops(heads * L * L, d, d)
    return flops / (attention_traffic.forward_bytes(1, heads, heads, L, L, d, d, 2) + 4 * heads * L * L * 2)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: what a matrix of scores costs
for L in (128, 1024, 65536):
    moved = 4 * 16 * L * 128 * 2 + 16 * L * 4  # q, k, v, o and the log-sum-exps
    assert math.isclose(my_written_intensity(L), 4 * 16 * L * L * 128 / (moved + 4 * 16 * L * L * 2), rel_tol=0.01)
assert my_written_intensity(10**6) < M / C, "it stays under the corner however long the sequence"
print(f"right: never more than {my_written_intensity(10**7):.0f} operations a byte, for the corner is at {M / C:.0f}")

# %% [markdown]
# ## 2. From Python to machine code
#
# Six lines: a program scales one piece of a vector. Four texts follow from them.


# %%
@triton.jit
def scale_kernel(X, G, Y, n, BLOCK: tl.constexpr):
    """Y = G X, element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    g = tl.load(G + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * g).to(Y.dtype.element_ty), mask=at < n)


def scaling(dtype="bf16", aligned=True, block=1024, warps=4):
    """How the kernel would be launched: types, what is divisible by 16, constants, warps."""
    data = pointer(dtype, aligned)
    arguments = {"X": data, "G": data, "Y": data, "n": integer(aligned), "BLOCK": constant(block)}
    return Build(scale_kernel, f"{dtype} {'aligned' if aligned else 'unaligned'}", arguments, warps, aligned=aligned)


(compiled,) = compile_builds([scaling()], "sm_90")
without_places = re.sub(r" loc\([^\n]*", "", compiled.ttir)
print("\n".join(line for line in without_places.splitlines() if line.startswith("    ")))

# %% [markdown]
# **TTIR** is the source again, one operation a line, and no machine in it yet: tensors of 1024 elements. Look for the product
# of the program's number: `arith.muli ... : i64`. Without the `.to(tl.int64)` it would be `i32` and wrap silently for a vector
# of more than $2^{31}$ elements; `kernels/ir.py` follows such products until they reach an address.
#
# **TTGIR** says which thread owns which elements. That is one line, the *layout*:

# %%
layout = next(line for line in compiled.ttgir.splitlines() if "blocked" in line)
print(layout.split(" loc")[0])

# %% [markdown]
# `sizePerThread = [8]`: each thread owns eight neighbouring elements, 16 bytes of bf16, which is the most that one instruction
# can load. 32 threads a warp and 4 warps own the 1024 elements in one round. Had the compiler no promise that the address is a
# multiple of 16 bytes, it could not do that.

# %%
(loose,) = compile_builds([scaling(aligned=False)], "sm_90")
print(next(line for line in loose.ttgir.splitlines() if "blocked" in line).split(" loc")[0])
figure, panels = plt.subplots(2, 1, figsize=(9, 2.9), sharex=True)
for axes, found, title in zip(panels, (compiled, loose), ("alignment promised", "not promised")):
    each = int(re.search(r"sizePerThread = \[(\d+)\]", found.ttgir).group(1))
    owner = np.arange(64) // each
    axes.imshow((owner % 8)[None, :], aspect="auto", cmap="tab10", vmin=0, vmax=9)
    for first in range(0, 64, max(each, 4)):
        axes.text(first + (each - 1) / 2, 0, f"t{first // each}", ha="center", va="center", color="white", fontsize=7)
    axes.set(yticks=[], title=f"{title}: {each} element{'s' if each > 1 else ''} a thread")
    axes.grid(False)
panels[1].set_xlabel("element of the tile (the first 64 of 1024)")
figure.tight_layout()
plt.show()

# %% [markdown]
# **SASS** is what the machine runs. `LDG` loads from global memory, `STG` stores; `.128` is the width in bits.

# %%
print("\n".join(re.sub(r"\s+", " ", line).strip() for line in compiled.assembly.splitlines() if re.search(r"LDG|STG|FMUL", line)))
table = [("", "instructions that load", "registers")]
for dtype in ("bf16", "fp32"):
    for aligned in (True, False):
        (found,) = compile_builds([scaling(dtype, aligned)], "sm_90")
        widths = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(found.memory.reads.items()))
        table.append((f"{dtype}, {'aligned' if aligned else 'not aligned'}", widths, found.registers))
for row in table:
    print(f"{row[0]:22}{row[1]:26}{row[2]}")

# %% [markdown]
# The same Python, eight times as many load instructions. Every instruction occupies the load unit, whatever its width, so this
# kernel would wait for the unit and not for the memory. Strides count too: a row length that is not a multiple of 16 takes the
# promise away from every row but the first.
#
# ### Exercise 2: how many loads
#
# A program of `warps` warps loads a tile of `block` elements of `size` bytes once, aligned. How many 16-byte loads does **each
# thread** issue? (A thread loads at least one piece; threads without a piece of their own repeat one.)


# %%
def my_loads(block, size, warps):
    """16-byte loads a thread."""
    ### BEGIN SOLUTION
    return max(block * size // (16 * 32 * warps), 1)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: how many loads
sizes = [(1024, 4, "bf16", 2), (4096, 4, "bf16", 2), (8192, 8, "fp32", 4), (2048, 4, "fp32", 4)]
results = compile_builds([scaling(dtype, block=block, warps=warps) for block, warps, dtype, _ in sizes], "sm_90")
for (block, warps, dtype, size), found in zip(sizes, results):
    counted = found.memory.reads[128]
    assert 2 * my_loads(block, size, warps) == counted, f"{block} {dtype}, {warps} warps: {counted} loads for two tiles"
print("right: as many as stand in the machine code")

# %% [markdown]
# That is a proof about memory traffic, made without a memory: instructions × threads × 16 bytes is what a program moves. Our
# norms are held to it at every shipped size; the numbers come from `traffic.py` and from the machine code, and must be equal.

# %%
chosen = [norm_builds.forward("rms", "bf16", d) for d in (128, 4096, 16384)]
for build, found in zip(chosen, compile_builds(chosen, "sm_90")):
    print(f"{build.config:18} machine code {found.bytes_16}   formula {build.expected_bytes}   {found.registers} registers")
    assert found.bytes_16 == build.expected_bytes

# %% [markdown]
# ## 3. Registers, and how many programs fit
#
# A multiprocessor of an H200 has 65,536 registers, 227 KB of shared memory, and keeps track of 2048 threads. While a program
# waits for memory another computes, if it fits beside it. How many fit is arithmetic:

# %%
print(inspect.getsource(occupancy))

# %% [markdown]
# ### Exercise 3: occupancy by hand
#
# On an H200 (`sm_90`): registers of a thread are handed out in portions of 8, at most 255; each program takes its shared memory
# and 1024 bytes more of 233,472; at most 2048 threads and 32 programs. Return how many programs fit.


# %%
def my_occupancy(registers, threads, shared):
    """Programs on one multiprocessor."""
    ### BEGIN SOLUTION
    if registers > 255:
        return 0
    rounded = math.ceil(registers / 8) * 8
    return min(65_536 // (rounded * threads), 233_472 // (shared + 1024), 2048 // threads, 32)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: occupancy by hand
rng = np.random.default_rng(0)
for _ in range(500):
    case = int(rng.integers(16, 257)), 32 * 2 ** int(rng.integers(0, 6)), int(rng.integers(0, 230_000))
    assert my_occupancy(*case) == occupancy(*case, "sm_90"), f"registers, threads, shared memory = {case}"
print("right for 500 programs")

# %% [markdown]
# Now an experiment. A tile of flash attention keeps $128\times128$ sums of fp32 in registers: 16,384 of them. Four warps have
# $128\times255$ = 32,640 registers, eight have twice as many. Does the smaller team do? Write down your guess before you run
# the cell: which of the four will *spill* (write registers to memory and read them back)?

# %%
tiles = {
    "128 x 64, 4 warps": Tile(128, 64, 4), "128 x 128, 4 warps": Tile(128, 128, 4),
    "128 x 64, 8 warps": Tile(128, 64, 8), "128 x 128, 8 warps": Tile(128, 128, 8),
}
shapes = [attention_builds.forward("sm_90", "full", "bf16", 128, 128, tile) for tile in tiles.values()]
teams = dict(zip(tiles, compile_builds(shapes, "sm_90")))
for name, found in teams.items():
    fit = occupancy(found.registers, found.threads, found.shared, "sm_90")
    spills = "spills" if found.spills > 20 else "no spills" if found.spills == 0 else "a few spills"
    about = "more than 240" if found.registers > 240 else "fewer than 200" if found.registers < 200 else "200 to 240"
    print(f"{name:20} {about} registers, {found.shared // 1024:3} KB shared, {spills:12} {fit} program(s) fit")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
names = list(teams)
axes[0].barh(names, [found.registers for found in teams.values()], color=BLUE)
axes[0].axvline(255, color=VERMILION, ls="--", lw=1)
axes[0].set(title="registers a thread (limit 255)", xlim=(0, 290))
axes[1].barh(names, [found.spills for found in teams.values()], color=VERMILION)
axes[1].set(title="instructions that spill", yticklabels=[])
for axis in axes:
    axis.invert_yaxis()
figure.tight_layout()
plt.show()

# %% [markdown]
# The kernel with four warps on the large tile would still be *right*: nothing but the machine code shows that every round of its
# loop goes to memory and back. That is why `python -m kernels compile` fails for a build with a single spill, and why the tiles
# in `config.py` were chosen by compiling their neighbours.
#
# ## 4. The instructions that multiply
#
# The same source, four machines. `HMMA` multiplies 16×16 by 16×8 for one warp; `HGMMA` 64×16 by 16×N for four warps at once,
# straight from shared memory; `UTCHMMA` a whole tile, issued by a single thread; `mfma` is AMD's. Their numbers follow from the
# tile: a product of $m\times k$ by $k\times n$ on $w$ warps needs $mnk/(16\cdot8\cdot16\,w)$ `HMMA` a warp.

# %%
names = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
for target, instruction in names.items():
    tile = Tile(128, 64, 8, 2) if target != "gfx942" else Tile(128, 64, 8, 1)
    build = attention_builds.forward(target, "full", "bf16", 128, 128, tile)
    (found,) = compile_builds([build], target)
    least = gates.least_products(ir.dots(found.ttir), build.warps, target)
    print(f"{target:8}{found.instructions[instruction]:4} {instruction:8} at least {least:3} follow from the tile")
for dot in ir.dots(found.ttir):
    print(f"   a product of {dot.m} x {dot.k} by {dot.k} x {dot.n}, {dot.dtype}, in loop {dot.loop}")

# %% [markdown]
# Where the count is larger than the tile demands, the compiler wrote the loop's body twice (it takes the first round out of the
# loop so that loads can run ahead), or several warps do the same work.
#
# ### What attention waits for
#
# Between its two products attention takes one exponential for each score. An H200's multiprocessor does about 4096 operations of
# matrix products a cycle, but only 16 exponentials (`MUFU.EX2`). Count both in the machine code's loop.

# %%
rates = {"products": 4096, "exponentials": 16}  # of one multiprocessor, a cycle
costs = {}
for width in (64, 128):
    tile = Tile(128, 64, 8, 2)
    (found,) = compile_builds([attention_builds.forward("sm_90", "full", "bf16", width, width, tile)], "sm_90")
    work = sum(dot.flops for dot in ir.dots(found.ttir) if dot.loop == 1)
    exponentials = sum(math.prod(shape) for shape in ir.exponentials(found.ttir) if len(shape) == 2)
    costs[width] = work / rates["products"], exponentials / rates["exponentials"]
    print(
        f"d_head {width:3}: {work / 2**20:.1f} Mi operations are {costs[width][0]:.0f} cycles, "
        f"{exponentials} exponentials {costs[width][1]:.0f} cycles a tile"
    )

# %%
figure, axes = plt.subplots(figsize=(7.5, 2.2))
for row, (product, exponential) in enumerate(costs.values()):
    axes.barh([row + 0.2, row - 0.2], [product, exponential], height=0.36, color=[BLUE, ORANGE])
axes.set_yticks(range(len(costs)), [f"d_head {width}" for width in costs])
axes.set(xlabel="cycles of one multiprocessor for a tile of 128 x 64 scores", title="Products (blue) and exponentials (orange)")
plt.show()

# %% [markdown]
# With 64 columns a head both take the same time: unless they overlap, half the machine stands still. This is why the fastest
# kernels let two groups of warps take turns, one at the products while the other is at its exponentials, and why heads of 64
# reach a smaller part of the roof for everybody. The two products of a tile cannot be made cheaper; a second exponential, a
# logarithm or a division in that loop would be paid in full. A gate looks for them.
#
# ## 5. Twelve gates
#
# Everything so far, asked of every kernel and shipped configuration on four machines each time the tests run:

# %%
print(inspect.getdoc(gates))

# %% [markdown]
# A table beside the tests keeps registers, shared memory, tensor-core instructions, spills and occupancy of every build; a
# change that costs more shows in review as a changed line. Gates 1 and 11 are the least expected: Triton compiles a function
# anew for a size of 1, for a size past $2^{31}$ and for an odd stride, and a kernel may be wrong in only one of these.
#
# ### Exercise 4: find what is wrong and mend it
#
# This kernel passes every test on small tensors. Compile it, let the gates speak, and return a mended one.


# %%
@triton.jit
def rows_kernel(X, Y, stride, n, BLOCK: tl.constexpr):
    """Y = 0.1 X, a row a program; rows lie `stride` elements apart."""
    row = tl.program_id(0) * stride
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + (row + cols).to(tl.int64), mask=cols < n, other=0.0)
    tl.store(Y + (row + cols).to(tl.int64), (x * tl.full((), 0.1, tl.float64)).to(tl.float32), mask=cols < n)


def rows(function):
    """How a kernel with these parameters would be launched."""
    arguments = {"X": pointer("fp32"), "Y": pointer("fp32"), "stride": integer(True), "n": integer(True)}
    return Build(function, "", {**arguments, "BLOCK": constant(512)}, 4)


def complaints(build, target="sm_90"):
    """What the gates say."""
    (found,) = compile_builds([build], target)
    return [fault for gate in gates.GATES for fault in gate(build, found, target)]


for fault in complaints(rows(rows_kernel)):
    print("-", re.sub(r"has \d+ float64", "has float64", fault))


# %%
@triton.jit
def my_rows_kernel(X, Y, stride, n, BLOCK: tl.constexpr):
    """The same, mended."""
    ### BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64) * stride
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + row + cols, mask=cols < n, other=0.0)
    tl.store(Y + row + cols, x * 0.1, mask=cols < n)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 4: find what is wrong and mend it
mended = rows(my_rows_kernel)
assert complaints(mended) == [], complaints(mended)
(found,) = compile_builds([mended], "sm_90")
assert found.memory.reads[128] == 1 and found.memory.writes[128] == 1, "it should load and store 16 bytes at a time"
print(f"right, and {found.registers} registers")

# %% [markdown]
# ## 6. What a remark is for
#
# One thing on the list is no fault of ours. On Hopper the second product of attention takes its left factor (the probabilities)
# from registers and runs asynchronously. Assemblers before 13.3 may give those registers to somebody else before they have been
# read. The intermediate text shows whether a kernel is exposed:

# %%
exposed = teams["128 x 128, 8 warps"]
print("asynchronous products that read registers:", exposed.register_a)
for version in ("12.8.93", "13.4.59"):
    print(f"assembler {version}: {'take care' if gates.remarks(exposed, version) else 'nothing to say'}")

# %% [markdown]
# No reading finds out whether that assembler did it *here*. For that every family has `witness.py`: inputs of small integers whose
# results are exact, so that a GPU's answer is right to the last bit or wrong, and `bench` runs them before it times anything.
#
# ## Exercises
#
# 1. to 4. above.
# 5. `python -m kernels compile attention --target sm_90` prints the whole table. Change a tile in `kernels/attention/config.py`
#    and say before you run it which column will complain.
# 6. Write attention yourself. `lessons/kernels_to_break/attention_right.py` is a start: write a file of your own and let
#    `python -m kernels compare attention --impl my_file.py:attention` tell you. Then take one of the kernels beside it that are
#    almost right, and find its mistake from the picture alone.
# 7. In section 2, replace `BLOCK` by 100. Which gate speaks, and at which stage of the compiler?
#
# **Takeaways.** Intensity says what can limit a kernel; bytes in 16-byte pieces, registers, spills and counts of instructions
# say whether its machine code is in the way. All of that is text, and a test can read it. Only the time needs the machine.
