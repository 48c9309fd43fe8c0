"""Bytes and operations of the losses, as functions: used by the documentation, the compile check and the benchmark.

*Compulsory* bytes are what any implementation must move: each logit read once, each gradient written once. With 128k
logits of two bytes a row the columns of per-token results are nothing, but they are counted. *Issued* bytes are what
one program of our kernels asks for in 16-byte pieces; the compile check counts the same number in the machine code.
"""

from kernels.token_loss.config import LinearPlan, RowTile

COLUMN = 4  # bytes of a per-row result in fp32


def statistics_bytes(n_rows: int, V: int, itemsize: int) -> int:
    """Logits and targets in; log-prob, log-sum-exp, entropy and the two numbers for the backward out."""
    return n_rows * (V * itemsize + 8 + 5 * COLUMN)


def loss_bytes(n_rows: int, V: int, itemsize: int, *, policy: bool) -> int:
    """Loss and gradient: every logit read once and its gradient written once, beside the columns of the loss."""
    columns = 8 + (13 if policy else 4) * COLUMN
    return n_rows * (2 * V * itemsize + columns)


def split_loss_bytes(n_rows: int, V: int, itemsize: int, *, policy: bool) -> int:
    """The same as two launches: the logits are read twice."""
    return loss_bytes(n_rows, V, itemsize, policy=policy) + n_rows * V * itemsize


def softmax_bytes(n_rows: int, V: int, itemsize: int) -> int:
    """Forward: logits in, probabilities out."""
    return 2 * n_rows * V * itemsize


def softmax_backward_bytes(n_rows: int, V: int, itemsize: int) -> int:
    """Backward: what arrives and the logits in, the gradient out."""
    return 3 * n_rows * V * itemsize


def linear_flops(n_rows: int, d: int, V: int, *, backward: bool) -> int:
    """One matrix product forward; three more backward (the logits again, and one for each factor's gradient)."""
    return 2 * n_rows * d * V * (4 if backward else 1)


def linear_bytes(n_rows: int, d: int, V: int, itemsize: int, *, backward: bool) -> int:
    """Both factors in, and backward their gradients out."""
    return (n_rows + V) * d * itemsize * (2 if backward else 1)


def linear_forward_extra_bytes(n_rows: int, splits: int, *, mean: bool = False) -> int:
    r"""Memory that the fused forward needs beside its operands: never a multiple of the vocabulary.

    Four columns (largest logit, sum, weighted sum, chosen logit; five with the mean) of every share, and five (six) results:
    $4N\,(4S+5)$ bytes for $N$ rows and $S$ shares.
    """
    return n_rows * COLUMN * (splits * (4 + mean) + 5 + mean)


def linear_backward_extra_bytes(n_rows: int, d: int, V: int, itemsize: int, chunk: int) -> int:
    r"""Memory that the fused backward needs beside the two gradients: one strip, and an fp32 sum for 16-bit hidden states.

    $N\,C\,b+4Nd$ bytes for strips of $C$ columns and operands of $b<4$ bytes; the second term falls away for fp32 and where one
    strip holds the whole vocabulary.
    """
    carry = n_rows * d * 4 if itemsize < 4 and chunk < V else 0
    return n_rows * chunk * itemsize + carry


def _rows(tile: RowTile, itemsize: int) -> int:
    return tile.block_rows * tile.block_v * itemsize


def issued_statistics(tile: RowTile, itemsize: int) -> tuple[int, int]:
    """Bytes (read, written) in 16-byte pieces by one program that reads rows; an instruction in a loop counts once.

    Tiles loaded ahead (stages >= 2) repeat the loads before the loop, once for every tile ahead.
    """
    return _rows(tile, itemsize) * max(tile.stages, 1), 0


def issued_gradient(tile: RowTile, itemsize: int) -> tuple[int, int]:
    """The same of one that reads rows and writes their gradient."""
    return _rows(tile, itemsize) * max(tile.stages, 1), _rows(tile, itemsize)


def issued_loss(tile: RowTile, itemsize: int, *, whole: bool) -> tuple[int, int]:
    """The same of one that does both: a row that fits is read once, a longer one by two loops."""
    return _rows(tile, itemsize) * (1 if whole else 2 * max(tile.stages, 1)), _rows(tile, itemsize)


def issued_softmax(tile: RowTile, itemsize: int) -> tuple[int, int]:
    """Two loops over the row and one store."""
    return issued_loss(tile, itemsize, whole=False)


def extra_bytes_of_plan(n_rows: int, d: int, V: int, itemsize: int, plan: LinearPlan) -> tuple[int, int]:
    """(forward, backward) memory of a configuration beside operands and gradients."""
    tiles = -(-V // plan.forward.block_n)
    splits = -(-tiles // -(-tiles // plan.splits))
    return (
        linear_forward_extra_bytes(n_rows, splits),
        linear_backward_extra_bytes(n_rows, d, V, itemsize, plan.chunk),
    )
