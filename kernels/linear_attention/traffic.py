"""Bytes and operations of linear attention, as functions: used by the documentation and the benchmark."""

STATISTIC = 4  # bytes of a denominator, and of every number of a state


def forward_bytes(B: int, H: int, L: int, d_phi: int, d_v: int, itemsize: int) -> int:
    """Compulsory bytes of the forward: q, k, v in, o and denominators out, the last state out."""
    tokens, state = B * H * L, B * H * (d_phi * d_v + d_phi)
    return tokens * (2 * d_phi + 2 * d_v) * itemsize + tokens * STATISTIC + state * STATISTIC


def backward_bytes(B: int, H: int, L: int, d_phi: int, d_v: int, itemsize: int) -> int:
    """Compulsory bytes of the backward: q, k, v, o, do and denominators in, dq, dk, dv out, a state's gradient in and out."""
    tokens, state = B * H * L, B * H * (d_phi * d_v + d_phi)
    return tokens * (4 * d_phi + 4 * d_v) * itemsize + tokens * STATISTIC + 2 * state * STATISTIC


def segment_bytes(B: int, H: int, segments: int, d_phi: int, d_v: int) -> int:
    """Bytes of the states between segments: written, walked over (read and written), and read; k and v are read once more."""
    return 4 * B * H * segments * (d_phi * d_v + d_phi) * STATISTIC if segments > 1 else 0


def forward_flops(B: int, H: int, L: int, d_phi: int, d_v: int, chunk: int) -> int:
    """Operations of the forward's products: two with the state, two inside chunks (their triangles counted as full)."""
    return 2 * B * H * L * (2 * d_phi * d_v + chunk * (d_phi + d_v))


def backward_flops(B: int, H: int, L: int, d_phi: int, d_v: int, chunk: int) -> int:
    """Operations of the backward's products: three kernels, each like the forward."""
    return 3 * forward_flops(B, H, L, d_phi, d_v, chunk)
