r"""The work of attention in blocks of queries, with no $L\times L$ memory where that is much.

How it is cut. A task is a group of sequences and heads and a block of queries $[i_0,i_1)$; it sees a range of keys
and no others, so most of what a causal mask or a window hides is never computed. Scores are kept transposed,
$S^\top=\mathbf K\mathbf Q^\top$ with keys on rows: maxima and sums over keys then run along rows of queries, where
NumPy adds whole vectors. Only the edges of the range need a mask.

What is kept. The output and one number per query and head, the logarithm of the normaliser, from which the backward
pass makes the probabilities again: $P=\exp(S-\mathrm{LSE})$. A query that sees nothing has $\mathrm{LSE}=+\infty$,
and so no probability anywhere. Making them again costs a matrix product and an exponential, a quarter of the whole; so
where all of $P$ is small (`KEPT_BYTES`), as in the training steps of small models, it is kept instead.

The gradient. With $O=PV$: $\bar V=P^\top\bar O$ and $\bar P=\bar OV^\top$. The softmax gives
$\bar S=P\odot(\bar P-\delta)$ with $\delta_i=\sum_j\bar P_{ij}P_{ij}=\sum_d\bar O_{id}O_{id}$. Then
$\bar Q=\bar SK$ and $\bar K=\bar S^\top Q$; what was added to the scores receives $\bar S$ itself.

Arrays here are five-dimensional views: queries (b, H_kv, H / H_kv, L_q, d), keys and values (b, H_kv, 1, L_k, d),
scores (b, H_kv, H / H_kv, keys, queries).

Source: notes §4.1, §4.10; the recomputation in the backward pass is that of FlashAttention (Dao et al. 2022).
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from minillm.autograd import scratch
from minillm.autograd.parallel import library_threads, parallel_map

QUERY_BLOCK = 64  # narrow blocks skip more of what a causal mask hides; where little or nothing is, they are widened
GROUP_BYTES = 1 << 20  # scores of one task: they should stay in the second-level cache
THREADED_SCORES = 1 << 17  # from here on, threads gain more than it costs to wake them
KEPT_BYTES = 1 << 26  # of probabilities kept for the backward pass by one call; if there were more, none is

Block = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """Some sequences, some key/value heads, and a block of queries."""

    rows: slice
    heads: slice
    block: Block
    first: bool  # the first of its sequences and heads: it may set what the others add to

    def of(self, array: np.ndarray) -> np.ndarray:
        """The part of a five-dimensional array that belongs to this task, all positions of it."""
        return array[self.rows, self.heads]

    def scores(self, q: np.ndarray, keys: Block) -> int:
        """How many scores the task has over a range of keys."""
        return self.of(q)[..., 0, 0].size * (self.block[1] - self.block[0]) * (keys[1] - keys[0])


def block_size(L_q: int, causal: bool) -> int:
    """How many queries go together: measured to be fastest, with and without a mask, short and long."""
    block = QUERY_BLOCK * (4 if not causal else 2 if L_q > 8 * QUERY_BLOCK else 1)
    return block if L_q > block * 3 // 2 else max(L_q, 1)


def tasks(B: int, H_kv: int, times: int, L_q: int, L_k: int, itemsize: int, causal: bool) -> list[Task]:
    """All tasks; of each group of sequences and heads the latest block comes first."""
    block = block_size(L_q, causal)
    head_bytes = max(times * L_k * block * itemsize, 1)
    group = max(1, GROUP_BYTES // (H_kv * head_bytes))  # sequences
    heads = H_kv if group > 1 else max(1, min(H_kv, GROUP_BYTES // head_bytes))
    starts = list(reversed(range(0, L_q, block)))
    return [
        Task(slice(b, b + group), slice(h, h + heads), (i, min(i + block, L_q)), first=i == starts[0])
        for b in range(0, B, group)
        for h in range(0, H_kv, heads)
        for i in starts
    ]


@dataclass(frozen=True)
class Pattern:
    """What a query may see: all keys, those up to its own position, or the last so many of these; and more besides.

    ``keep`` and ``bias`` are five-dimensional and have 1 where they are the same for all; the bias is added.
    """

    L_q: int
    L_k: int
    causal: bool = False
    window: int | None = None
    keep: np.ndarray | None = None
    bias: np.ndarray | None = None
    own: int = field(init=False)  # query i is at the position of key i + own

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", self.L_k - self.L_q)

    def keys(self, block: Block) -> Block:
        """The range of keys that any query of the block sees."""
        if not self.causal:
            return 0, self.L_k
        low = 0 if self.window is None else max(0, block[0] + self.own - self.window + 1)
        high = max(block[1] + self.own, 0)
        return min(low, high), high

    def covers_all_keys(self, block: Block) -> bool:
        """Whether the block's range is all keys."""
        return self.keys(block) == (0, self.L_k)

    def apply(self, s: np.ndarray, task: Task, keys: Block) -> None:
        """Add the bias to the scores and hide what must not be seen."""
        start, stop = task.block
        if self.bias is not None:
            s += part(self.bias, task, keys).swapaxes(-1, -2)
        if self.causal:
            low = max(keys[0], start + self.own)  # from here on, later queries see more than earlier ones
            s[..., low - keys[0] :, :] += _later(keys[1] - low, stop - start, start + self.own - low, s.dtype)
            if self.window is not None:
                high = min(keys[1], stop + self.own - self.window)
                if high > keys[0]:
                    shift = start + self.own - self.window + 1 - keys[0]
                    s[..., : high - keys[0], :] += _earlier(high - keys[0], stop - start, shift, s.dtype)
        if self.keep is not None:
            np.copyto(s, -np.inf, where=~part(self.keep, task, keys).swapaxes(-1, -2))


def part(array: np.ndarray, task: Task, keys: Block) -> np.ndarray:
    """The part of a mask or bias (1 or b, 1 or H_kv, 1 or times, 1 or L_q, 1 or L_k) that meets a task's scores."""
    wanted = (task.rows, task.heads, slice(None), slice(*task.block), slice(*keys))
    return array[tuple(w if n > 1 else slice(None) for w, n in zip(wanted, array.shape, strict=True))]


@lru_cache(maxsize=64)
def _later(n_keys: int, n_queries: int, shift: int, dtype: np.dtype) -> np.ndarray:
    """Minus infinity where key > query + shift, both counted from 0."""
    return _frozen(np.arange(n_keys)[:, None] > np.arange(n_queries) + shift, dtype)


@lru_cache(maxsize=64)
def _earlier(n_keys: int, n_queries: int, shift: int, dtype: np.dtype) -> np.ndarray:
    """Minus infinity where key < query + shift."""
    return _frozen(np.arange(n_keys)[:, None] < np.arange(n_queries) + shift, dtype)


def _frozen(hidden: np.ndarray, dtype: np.dtype) -> np.ndarray:
    mask = np.where(hidden, -np.inf, 0).astype(dtype)
    mask.flags.writeable = False
    return mask


def _scores(q: np.ndarray, k: np.ndarray, pattern: Pattern, task: Task, keys: Block) -> np.ndarray:
    """Masked, transposed scores of one task: (b, H_kv, H / H_kv, keys, queries)."""
    start, stop = task.block
    s = scratch.empty((*q.shape[:3], keys[1] - keys[0], stop - start), q.dtype)
    np.matmul(k[..., slice(*keys), :], q[..., start:stop, :].swapaxes(-1, -2), out=s)
    pattern.apply(s, task, keys)
    return s


Kept = list[np.ndarray | None]  # the probabilities of each task, None where they have to be made again


def forward(q, k, v, o, lse, pattern: Pattern, work: list[Task], keep: bool = False) -> Kept:
    """Fill the output o and the log-normalisers lse (b, H_kv, H / H_kv, 1, L_q); queries come scaled.

    Returns the probabilities of every task, if they are to be kept and are few enough. No two tasks write to the same
    place, so where there is much to do the threads that the matrix library would use take a task each.
    """
    may_be_empty = pattern.keep is not None or (pattern.causal and pattern.own < 0)
    scores = sum(task.scores(q, pattern.keys(task.block)) for task in work)
    keep = keep and q.itemsize * scores <= KEPT_BYTES

    def run(task: Task) -> np.ndarray | None:
        mine = task.of
        return _forward_block(mine(q), mine(k), mine(v), mine(o), mine(lse), pattern, task, may_be_empty, keep)

    return parallel_map(run, work, threads=library_threads() if scores >= THREADED_SCORES else 1)


def _forward_block(q, k, v, o, lse, pattern: Pattern, task: Task, may_be_empty: bool, keep: bool) -> np.ndarray | None:
    """One task's part of the output and the log-normalisers; its probabilities if they are to be kept."""
    start, stop = task.block
    keys = pattern.keys(task.block)
    out = o[..., start:stop, :]
    if keys[0] == keys[1]:
        out[...], lse[..., start:stop] = 0, np.inf
        return None
    s = _scores(q, k, pattern, task, keys)
    top = s.max(-2, keepdims=True)  # (b, H_kv, H / H_kv, 1, queries)
    if may_be_empty:
        top[top == -np.inf] = 0
    s -= top
    np.exp(s, out=s)
    total = np.ones((1, keys[1] - keys[0]), s.dtype) @ s
    if may_be_empty:
        total[total == 0] = np.inf  # 0 / inf is 0, and the logarithm is the infinity wanted
    np.add(np.log(total), top, out=lse[..., start:stop])
    if keep:
        s *= 1 / total
        np.matmul(s.swapaxes(-1, -2), v[..., slice(*keys), :], out=out)
        return s
    np.matmul(s.swapaxes(-1, -2), v[..., slice(*keys), :], out=out)
    out /= total.swapaxes(-1, -2)
    return None


def backward(q, k, v, lse, delta, do, dq, dk, dv, dbias, pattern: Pattern, work: list[Task], kept: Kept) -> None:
    """Fill dq, dk and dv, and add to dbias, if it is not None, what arrives at the bias."""
    for task, p in zip(work, kept, strict=True):
        if task.first and not pattern.covers_all_keys(task.block):
            task.of(dk)[...] = 0
            task.of(dv)[...] = 0
        mine = task.of
        _backward_block(
            mine(q), mine(k), mine(v), mine(lse), mine(delta), mine(do), mine(dq), mine(dk), mine(dv),
            dbias, pattern, task, p,
        )  # fmt: skip


def _backward_block(q, k, v, lse, delta, do, dq, dk, dv, dbias, pattern: Pattern, task: Task, p) -> None:
    start, stop = task.block
    low, high = pattern.keys(task.block)
    queries, keys = np.s_[..., start:stop, :], np.s_[..., low:high, :]
    if low == high:
        dq[queries] = 0
        return
    first = task.first and pattern.covers_all_keys(task.block)
    if p is None:
        p = _scores(q, k, pattern, task, (low, high))
        p -= lse[..., start:stop]
        np.exp(p, out=p)
    ds = np.matmul(v[keys], do[queries].swapaxes(-1, -2), out=scratch.empty(p.shape, p.dtype))
    _accumulate(dv, p, do[queries], keys, first)
    ds -= delta[..., start:stop]
    ds *= p
    np.matmul(ds.swapaxes(-1, -2), k[keys], out=dq[queries])
    _accumulate(dk, ds, q[queries], keys, first)
    if dbias is not None:
        target = part(dbias, task, (low, high))
        shared = tuple(axis for axis, n in enumerate(target.shape) if n == 1)
        target += ds.swapaxes(-1, -2).sum(shared, keepdims=True) if shared else ds.swapaxes(-1, -2)


def _accumulate(target, weights, rows, keys, first: bool) -> None:
    """target[keys] (+)= weights rows, summed over the query heads that share a key head."""
    part = np.matmul(weights, rows)
    part = part.sum(2, keepdims=True) if part.shape[2] > 1 else part
    if first:
        target[...] = part
    else:
        target[keys] += part


def by_kv_head(array: np.ndarray, H_kv: int) -> np.ndarray:
    """A (B, H, L, d) array as (B, H_kv, H / H_kv, L, d)."""
    B, H, L, d = array.shape
    return array.reshape(B, H_kv, H // H_kv, L, d)


def in_five_axes(array: np.ndarray | None, H_kv: int) -> np.ndarray | None:
    """A mask or bias that broadcasts to (B, H, L_q, L_k) with its heads in two axes."""
    if array is None:
        return None
    b, h, q, k = (1,) * (4 - array.ndim) + array.shape
    return array.reshape((b, 1, 1, q, k) if h == 1 else (b, H_kv, h // H_kv, q, k))
