"""Bytes of the gated units: what any implementation must move, and what one of our programs asks for."""

from kernels.activations.config import Tile


def forward_bytes(n_rows: int, d: int, itemsize: int) -> int:
    """Value and gate in, y out."""
    return 3 * n_rows * d * itemsize


def backward_bytes(n_rows: int, d: int, itemsize: int) -> int:
    """dy, value and gate in, two gradients out."""
    return 5 * n_rows * d * itemsize


def issued(tile: Tile, itemsize: int, backward: bool) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one program."""
    tile_bytes = tile.block_rows * tile.block_d * itemsize
    return (3 * tile_bytes, 2 * tile_bytes) if backward else (2 * tile_bytes, tile_bytes)
