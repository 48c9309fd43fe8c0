r"""Device code of the packing: a stable counting sort of assignments by expert, without atomics.

Assignment $a=nk+s$ is the s-th choice of token n. Its place among the rows that the experts work on is

$$\eta(a)=\mathrm{offset}(e_a)+\#\{a'<a:e_{a'}=e_a\},\qquad\mathrm{offset}(e)=\sum_{e'<e}\min(N_{e'},C).$$

Three steps: every program counts the experts of its own chunk of assignments; one program adds the counts up over
chunks (which tells every chunk where its first assignment of each expert lies) and over experts (the offsets); then
every program goes through its chunk again and numbers its assignments, by a running sum of a tile of zeros and ones.
Within an expert the order is that of the tokens, so with a capacity C the first C are served and nobody else.

A number that is not an expert's (-1, say, for a token that is padding) is counted nowhere and served by nobody; the tile
of zeros and ones is as wide as a power of two, so the columns behind E count it, and are not stored.

The products then work on tiles of rows of one expert. `_tiles_kernel` writes the list of tiles, so that no program of
a product has to search for its expert, and the host need not know the loads: it launches as many programs as could be
needed, ceil(A / BLOCK_M) + E, and those without a tile return at once.
"""

# Triton's functions are typed by their stand-ins, some of which never return.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _one_hot(EXPERTS, assignments, n_assignments, cols, k, stride_row, stride_col):
    """Which expert each assignment wants, as zeros and ones (assignments, E), and as a number (-1 behind the last)."""
    mask = assignments < n_assignments
    number = assignments.to(tl.int32)  # there are fewer than 2^31, and a division of 64 bits is a call of a function
    at = (number // k).to(tl.int64) * stride_row + (number % k).to(tl.int64) * stride_col
    expert = tl.load(EXPERTS + at, mask=mask, other=-1).to(tl.int32)
    return (expert[:, None] == cols[None, :]).to(tl.int32), expert


@triton.jit(do_not_specialize=["n_assignments"])
def _count_kernel(
    EXPERTS, COUNTS, ORDER, n_assignments, n_experts, k, chunk, stride_row, stride_col,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """COUNTS (chunks, E): how often each expert is wanted in this program's chunk. ORDER (A,) becomes -1."""
    first = tl.program_id(0).to(tl.int64) * chunk
    cols = tl.arange(0, BLOCK_E)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, chunk, BLOCK_A):
        assignments = first + start + tl.arange(0, BLOCK_A)
        hot, _ = _one_hot(EXPERTS, assignments, n_assignments, cols, k, stride_row, stride_col)
        count += tl.sum(hot, axis=0)
        nobody = tl.full((BLOCK_A,), -1, tl.int32)
        tl.store(ORDER + assignments, nobody, mask=assignments < n_assignments)
    tl.store(COUNTS + tl.program_id(0).to(tl.int64) * n_experts + cols, count, mask=cols < n_experts)


@triton.jit(do_not_specialize=["n_chunks", "capacity"])
def _scan_kernel(
    COUNTS, OFFSETS, n_chunks, n_experts, capacity,
    LIMITED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: COUNTS becomes, for every chunk, how many assignments of each expert come before it; OFFSETS (E + 1,)."""
    cols = tl.arange(0, BLOCK_E)
    there = cols < n_experts
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, n_chunks, BLOCK_C):
        chunks = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask = (chunks < n_chunks)[:, None] & there[None, :]
        at = COUNTS + chunks[:, None] * n_experts + cols[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, tl.cumsum(counts, axis=0) - counts + before[None, :], mask=mask)
        before += tl.sum(counts, axis=0)
    if LIMITED:
        before = tl.minimum(before, capacity)
    tl.store(OFFSETS + cols + 1, tl.cumsum(before, axis=0), mask=there)
    tl.store(OFFSETS, 0)


@triton.jit(do_not_specialize=["n_assignments", "capacity"])
def _place_kernel(
    EXPERTS, COUNTS, OFFSETS, ORDER, PLACES, n_assignments, n_experts, k, chunk, capacity, stride_row, stride_col,
    LIMITED: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Number the assignments of this program's chunk: PLACES (A,) and its inverse ORDER (A,), both int32."""
    first = tl.program_id(0).to(tl.int64) * chunk
    cols = tl.arange(0, BLOCK_E)
    there = cols < n_experts
    before = tl.load(COUNTS + tl.program_id(0).to(tl.int64) * n_experts + cols, mask=there, other=0)
    offset = tl.load(OFFSETS + cols, mask=there, other=0)
    for start in range(0, chunk, BLOCK_A):
        assignments = first + start + tl.arange(0, BLOCK_A)
        hot, expert = _one_hot(EXPERTS, assignments, n_assignments, cols, k, stride_row, stride_col)
        rank = tl.sum(hot * (tl.cumsum(hot, axis=0) - 1 + before[None, :]), axis=1)
        place = rank + tl.sum(hot * offset[None, :], axis=1)
        before += tl.sum(hot, axis=0)
        mask = assignments < n_assignments
        served = mask & (expert >= 0) & (expert < n_experts)
        if LIMITED:
            served = served & (rank < capacity)
        tl.store(PLACES + assignments, tl.where(served, place, -1), mask=mask)
        tl.store(ORDER + place, assignments.to(tl.int32), mask=served)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def _tiles_kernel(
    OFFSETS, TILES, n_rows, n_experts, n_tiles, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """TILES (3, n_tiles): expert, first row and end of the expert's rows, for every tile of BLOCK_M rows.

    Tiles behind those of the experts cover the rows that belong to nobody (expert -1), then nothing (first >= end).
    """
    tiles = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_E)
    there = cols < n_experts
    load = tl.load(OFFSETS + cols + 1, mask=there, other=0) - tl.load(OFFSETS + cols, mask=there, other=0)
    wanted = (load + BLOCK_M - 1) // BLOCK_M
    up_to = tl.cumsum(wanted, axis=0)
    passed = (up_to[None, :] <= tiles[:, None]) & there[None, :]  # experts all of whose tiles come before
    expert = tl.sum(passed.to(tl.int32), axis=1)
    inside = tiles - tl.sum(tl.where(passed, wanted[None, :], 0), axis=1)
    mask = tiles < n_tiles
    at = OFFSETS + expert.to(tl.int64)
    first = tl.load(at, mask=mask, other=0) + inside * BLOCK_M
    end = tl.load(at + 1, mask=mask & (expert < n_experts), other=0)
    nobodys = expert == n_experts
    out = TILES + tiles.to(tl.int64)
    tl.store(out, tl.where(nobodys, -1, expert), mask=mask)
    tl.store(out + n_tiles, first, mask=mask)
    tl.store(out + 2 * tl.cast(n_tiles, tl.int64), tl.where(nobodys, n_rows, end), mask=mask)
