"""Tiles, operations and bytes of attention, as functions: used by the lesson, the benchmark and the documentation.

Operations count the pairs of a query and a key that it sees, and nothing that a mask hides: a kernel that computes
hidden tiles is slower by this count, not faster. *Compulsory* bytes are each operand and result once.
"""

import numpy as np

STATISTIC = 4  # bytes of a log-sum-exp or a delta
SKIPPED, CLEAR, EDGE = 0, 1, 2


def intervals(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first key that each query of a mask (L_q, L_k) sees, and one past the last.

    A query that sees none has an empty interval where its predecessors' ended, so that neither end goes down.
    """
    some = keep.any(1)
    last = np.maximum.accumulate(np.where(some, keep.shape[1] - keep[:, ::-1].argmax(1), 0))
    return np.where(some, keep.argmax(1), last), last


def tiles(first: np.ndarray, last: np.ndarray, L_k: int, block_m: int, block_n: int) -> np.ndarray:
    """What the forward does with each tile: SKIPPED, CLEAR (no mask needed) or EDGE, (blocks of queries, of keys).

    The bounds of the loop are those of the device code: the first row's first key and the last row's last one.
    """
    found = np.zeros((-(-len(first) // block_m), -(-L_k // block_n)), dtype=int)
    for row in range(len(found)):
        rows = slice(row * block_m, (row + 1) * block_m)
        begin, stop = first[rows][0] // block_n, -(-last[rows][-1] // block_n)
        clear, clear_end = -(-first[rows][-1] // block_n), last[rows][0] // block_n
        found[row, begin:stop] = EDGE
        found[row, max(clear, begin) : min(clear_end, stop)] = CLEAR
    return found


def pairs(L_q: int, L_k: int, causal: bool = False, window: int | None = None) -> int:
    """How many pairs of a query and a key that it sees, aligned at the bottom right."""
    if not causal:
        return L_q * L_k
    last = np.clip(np.arange(L_q) + L_k - L_q + 1, 0, L_k)
    return int((last if window is None else np.minimum(last, window)).sum())


def forward_flops(n_pairs: int, d: int, d_v: int) -> int:
    """Operations of the two products of the forward, for ``n_pairs`` of all heads together."""
    return 2 * n_pairs * (d + d_v)


def backward_flops(n_pairs: int, d: int, d_v: int) -> int:
    """Operations of the five products that a backward needs: scores again, dP, dV, dQ, dK (2.5 x the forward at d = d_v)."""
    return 2 * n_pairs * (3 * d + 2 * d_v)


def issued_backward_flops(n_pairs: int, d: int, d_v: int) -> int:
    """Operations of the seven products that our two passes make: scores and dP in both."""
    return 2 * n_pairs * (4 * d + 3 * d_v)


def forward_bytes(B: int, H: int, H_kv: int, L_q: int, L_k: int, d: int, d_v: int, itemsize: int) -> int:
    """Compulsory bytes of the forward: q, k and v in, the output and the log-sum-exps out."""
    return B * (H * L_q * (d + d_v) + H_kv * L_k * (d + d_v)) * itemsize + B * H * L_q * STATISTIC


def backward_bytes(B: int, H: int, H_kv: int, L_q: int, L_k: int, d: int, d_v: int, itemsize: int) -> int:
    """Compulsory bytes of the backward: q, k, v, o, dO and the log-sum-exps in, dq, dk and dv out."""
    queries, keys = B * H * L_q, B * H_kv * L_k
    return (queries * (2 * d + 2 * d_v) + keys * 2 * (d + d_v)) * itemsize + queries * STATISTIC


def extra_bytes(B: int, H: int, L_q: int) -> int:
    """Memory beyond operands and results: a log-sum-exp and a delta a query. A matrix of scores would be B H L_q L_k."""
    return 2 * B * H * L_q * STATISTIC
