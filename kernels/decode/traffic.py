"""Bytes and operations of decoding, as functions: used by the documentation, the compile check and the benchmark."""

from collections.abc import Sequence

from kernels.decode.config import Plan, Widths

STATISTIC = 4  # bytes of a log-sum-exp


def decode_bytes(
    lengths: Sequence[int], H: int, H_kv: int, L_q: int, d: int, d_v: int, itemsize: int,
    window: int | None = None, latent: bool = False,
) -> int:  # fmt: skip
    """Compulsory bytes: every key and value that some query sees once, queries in, outputs and log-sum-exps out."""
    seen = sum(n if window is None else min(n, window + L_q - 1) for n in lengths)
    rows = len(lengths) * H * L_q
    return seen * H_kv * (d + (0 if latent else d_v)) * itemsize + rows * ((d + d_v) * itemsize + STATISTIC)


def decode_flops(lengths: Sequence[int], H: int, L_q: int, d: int, d_v: int, window: int | None = None) -> int:
    """Multiplications and additions of both products (the triangle among the new tokens counted as full)."""
    return sum(2 * (n if window is None else min(n, window + L_q - 1)) * H * L_q * (d + d_v) for n in lengths)


def part_bytes(B: int, H: int, L_q: int, d_v: int, splits: int) -> int:
    """Bytes of the parts, written once and read once: nothing beside the keys as long as these are many."""
    return 2 * splits * B * H * L_q * (d_v * 4 + STATISTIC) if splits > 1 else 0


def issued(plan: Plan, w: Widths, itemsize: int, latent: bool = False) -> int:
    """Bytes of keys and values that one program asks for in one turn of its loop."""
    return plan.block_n * (w.block + w.rest + (0 if latent else w.block_v)) * itemsize


def products(plan: Plan, w: Widths, m: int, n: int, k: int) -> int:
    """Matrix instructions of shape m x n x k that one warp issues in one turn: scores (both parts of a key) and outputs.

    Where there are fewer tiles of a result than warps, several warps compute the same one.
    """

    def of(rows: int, columns: int, depth: int) -> int:
        return -(-rows // m * (columns // n) // plan.warps) * (depth // k)

    scores = of(plan.block_m, plan.block_n, w.block) + (of(plan.block_m, plan.block_n, w.rest) if w.rest else 0)
    return scores + of(plan.block_m, w.block_v, plan.block_n)
