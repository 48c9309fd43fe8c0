"""Bytes and operations of the experts, as functions: used by the documentation, the compile check and the benchmark.

*Compulsory* bytes are what any implementation must move: each input read once, each output written once. A of them
are the assignments, N k without drops.
"""

from kernels.experts.config import Tile

NUMBER = 4  # bytes of a gate, of a place, of an offset


def product_flops(n_rows: int, n_in: int, n_out: int) -> int:
    """Operations of one grouped product: a multiplication and an addition for every term, whatever the experts."""
    return 2 * n_rows * n_in * n_out


def layer_flops(n_rows: int, d: int, d_ff: int, backward: bool = False) -> int:
    """Products of the layer: three of d x d_ff forward (value, gate, down), twice as many backward."""
    return 3 * product_flops(n_rows, d, d_ff) * (2 if backward else 1)


def product_bytes(n_rows: int, n_in: int, n_out: int, n_experts: int, itemsize: int) -> int:
    """Rows in, rows out, every expert's matrix once."""
    return itemsize * (n_rows * (n_in + n_out) + n_experts * n_in * n_out)


def layer_bytes(N: int, k: int, E: int, d: int, d_ff: int, itemsize: int) -> int:
    """Tokens in, tokens out, all weights, gates and numbers: what the layer moves if nothing in between did."""
    return itemsize * (2 * N * d + 3 * E * d * d_ff) + 2 * NUMBER * N * k


def route_bytes(N: int, k: int, E: int, itemsize: int) -> int:
    """Logits in; gates and numbers out."""
    return itemsize * N * E + 2 * NUMBER * N * k


def pack_bytes(N: int, k: int, E: int) -> int:
    """Numbers in (twice: to count and to place them), places and order out, offsets out."""
    return NUMBER * (4 * N * k + E + 1)


def combine_bytes(N: int, k: int, d: int, itemsize: int) -> int:
    """Every assignment's row in, every token's row out, gates and places in."""
    return itemsize * (N * k * d + N * d) + 2 * NUMBER * N * k


def kept_bytes(N: int, k: int, d_ff: int, itemsize: int) -> int:
    """What the layer keeps for its backward beside its operands: h, order and places."""
    return N * k * (2 * d_ff * itemsize + 2 * NUMBER)


def tiles_of(loads: list[int], block_m: int) -> int:
    """Row tiles that experts of these loads need: each rounds up for itself."""
    return sum(-(-load // block_m) for load in loads)


def padding_waste(loads: list[int], block_m: int) -> float:
    """The share of computed rows that belong to nobody, because an expert's last tile is not full."""
    rows = tiles_of(loads, block_m) * block_m
    return 1 - sum(loads) / rows if rows else 0.0


def products_a_step(tile: Tile, target: str) -> int:
    """Tensor-core instructions of one warp for one step of the loop, block_m x block_n x block_k.

    HMMA multiplies 16x16 by 16x8; HGMMA 64x16 by 16xN, N up to 256, for four warps together; UTCHMMA 128x16 by 16xN for
    the whole program; mfma 32x8 by 8x32 or 16x16 by 16x16, the same work twice or once.
    """
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    if target == "sm_90":
        return max(m // 64 // (tile.warps // 4), 1) * -(-n // 256) * k // 16
    if target == "sm_100":
        return -(-m // 128) * -(-n // 256) * k // 16
    if target == "sm_80":
        return m * n * k // (16 * 8 * 16 * tile.warps)
    return m * n * k // (32 * 32 * 8 * tile.warps)
