"""Bytes of the rotation: what any implementation must move, and what one of our programs asks for."""

from kernels.rope.config import Tile

TABLE = 4  # bytes of a cosine or sine


def turn_bytes(batch: int, heads: int, length: int, d_head: int, itemsize: int) -> int:
    """x in and out, and the table once; the backward is the same."""
    return 2 * batch * heads * length * d_head * itemsize + length * d_head * TABLE


def issued(tile: Tile, itemsize: int) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one program: a tile of x, and cosines and sines of its rows."""
    x = tile.block_rows * 2 * tile.block_half * itemsize
    return x + tile.block_rows * 2 * tile.block_half * TABLE, x
