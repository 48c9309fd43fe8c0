"""Bytes of AdamW: what any implementation must move, and what one of our programs asks for."""

FP32 = 4


def bytes_an_element(itemsize: int, has_master: bool) -> tuple[int, int]:
    """Read: gradient, both moments, and the master or the parameter. Written: all but the gradient."""
    kept = 2 * FP32 + (FP32 if has_master else itemsize)
    return itemsize + kept, kept + (itemsize if has_master else 0)


def step_bytes(n: int, itemsize: int, has_master: bool) -> int:
    """One step of n parameters."""
    return n * sum(bytes_an_element(itemsize, has_master))


def issued(block: int, itemsize: int, has_master: bool) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one program with a whole tile."""
    read, written = bytes_an_element(itemsize, has_master)
    return block * read, block * written
