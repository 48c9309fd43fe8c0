"""Bytes and operations of the norms, as functions: used by the documentation, the compile check and the benchmark.

*Compulsory* bytes are what any implementation must move: each input read once, each output written once.
*Issued* bytes are what one program of our kernels asks for in 16-byte pieces; the compile check counts the
same number in the machine code. Where a row fits in a tile, the two differ only by the weights, which every
program asks for and the cache delivers.
"""

from kernels.norm.config import Tile

STATISTIC = 4  # bytes of a saved fp32 row statistic


def forward_bytes(
    n_rows: int, d: int, itemsize: int, weight_itemsize: int, *, centred: bool, residual: bool, shift: bool
) -> int:
    """Compulsory bytes of the forward: x in, y out, the weights once, the statistics that backward needs.

    With a residual branch, r comes in and s goes out as well.
    """
    tensors = 4 if residual else 2
    weights = 2 if shift else 1
    statistics = 2 if centred else 1
    return n_rows * d * itemsize * tensors + d * weight_itemsize * weights + n_rows * STATISTIC * statistics


def backward_bytes(
    n_rows: int, d: int, itemsize: int, weight_itemsize: int, *, centred: bool, residual: bool, shift: bool
) -> int:
    """Compulsory bytes of the backward: dy and x in, dx out, g in, the weights' gradients out, the statistics in.

    With a residual branch, ds comes in as well; dr is dx.
    """
    tensors = 4 if residual else 3
    weights = 3 if shift else 2
    statistics = 2 if centred else 1
    return n_rows * d * itemsize * tensors + d * weight_itemsize * weights + n_rows * STATISTIC * statistics


def share_bytes(programs: int, d: int, *, shift: bool) -> int:
    """Bytes of the programs' shares of the weights' gradients, written once and read once (mostly in cache)."""
    return 2 * programs * d * 4 * (2 if shift else 1)


def forward_flops(n_rows: int, d: int, *, centred: bool, residual: bool, shift: bool) -> int:
    """Floating-point operations of the forward: square, sum, two products, and the additions that are asked for."""
    return n_rows * d * (4 + 3 * centred + residual + shift)


def backward_flops(n_rows: int, d: int, *, centred: bool, residual: bool, shift: bool) -> int:
    """Floating-point operations of the backward, counted from the formula in `kernel.py`."""
    return n_rows * d * (9 + 3 * centred + residual + shift)


def _weights(elements: int, itemsize: int, threads: int) -> int:
    """Bytes of a vector of weights that all threads share, loaded in 16-byte pieces.

    A vector with a piece for every thread is loaded once, a shorter one in narrower pieces, and one with fewer
    elements than threads by every row's threads for themselves.
    """
    if elements < threads:
        return 16 * threads
    return _in_pieces(elements, itemsize, threads)


def _in_pieces(elements: int, itemsize: int, threads: int) -> int:
    return elements * itemsize if elements * itemsize >= 16 * threads else 0


def issued_forward(
    tile: Tile, threads: int, itemsize: int, weight_itemsize: int, *, residual: bool, shift: bool, long: bool
) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one forward program, each instruction once.

    A long row is a loop over tiles in each of two passes; an instruction in a loop counts once.
    """
    tile_bytes = tile.block_rows * tile.block_d * itemsize
    weights = _weights(tile.block_d, weight_itemsize, threads) * (2 if shift else 1)
    reads = (2 if residual else 1) + long
    return reads * tile_bytes + weights, (2 if residual else 1) * tile_bytes


def issued_backward(
    tile: Tile, threads: int, itemsize: int, weight_itemsize: int, *, residual: bool, shift: bool
) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one backward program, each instruction once.

    Loading tiles ahead (stages >= 2) repeats the loads once before the loop for every tile ahead.
    """
    tile_bytes = tile.block_rows * tile.block_d * itemsize
    reads = (3 if residual else 2) * tile_bytes * max(tile.stages, 1)
    shares = _in_pieces(tile.block_d, 4, threads) * (2 if shift else 1)
    return reads + _weights(tile.block_d, weight_itemsize, threads), tile_bytes + shares


def issued_means(tile: Tile, threads: int, itemsize: int, weight_itemsize: int) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one program of the first long backward kernel."""
    return 2 * tile.block_d * itemsize + _in_pieces(tile.block_d, weight_itemsize, threads), 0


def issued_sum(tile: Tile, *, shift: bool) -> tuple[int, int]:
    """Bytes read in 16-byte pieces by one program that adds shares up; what it writes is too little to matter."""
    return tile.block_rows * tile.block_d * 4 * (2 if shift else 1), 0
