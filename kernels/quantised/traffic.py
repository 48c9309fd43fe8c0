"""Bytes and operations of a product with quantised weights."""

META = 4


def weight_bytes(n: int, k: int, kind: str, block: int = 64, meta_block: int = 256) -> int:
    """Codes and scales of W (n, k), rounded up to whole bytes and blocks."""
    if kind == "int8":
        return n * k + 4 * n
    blocks = -(-n * k // block)
    scales = 4 * blocks if kind == "nf4" else blocks + META * -(-blocks // meta_block)
    return -(-n * k // 2) + scales


def product_bytes(rows: int, n: int, k: int, itemsize: int, kind: str) -> int:
    """Rows in, rows out, weights once; the same in both directions."""
    return rows * (n + k) * itemsize + weight_bytes(n, k, kind)


def product_flops(rows: int, n: int, k: int) -> int:
    """A multiplication and an addition for each row and weight."""
    return 2 * rows * n * k
