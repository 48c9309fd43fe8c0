r"""Device code of the masks: which keys a query sees, and which queries see a key, as two intervals.

Every mask of this family lets query $i$ see the keys of one interval, $lo_i\le j<hi_i$, and neither end ever goes
down as $i$ goes up:

| mask | $lo_i$ | $hi_i$ |
|---|---|---|
| full | 0 | $L_k$ |
| causal, aligned by an offset $o$ (0 top-left, $L_k-L_q$ bottom-right) | 0 | $i+o+1$ |
| prefix of $P$ keys | 0 | $\max(i+o+1,P)$ |
| sliding window of $w$ keys | $i+o+1-w$ | $i+o+1$ |
| padding behind $n$ keys | as above | $\min(\cdot,n)$ |
| packed documents | first key of the document | its last, or as above within it |

So for a block of queries the first row's $lo$ and the last row's $hi$ bound the loop over keys (what is hidden from
all is never loaded), and between the last row's $lo$ and the first row's $hi$ no mask is needed at all. Read the other
way, the queries that see key $j$ are an interval too, with the same monotony: that is what dK and dV loop over.
"""

import triton
import triton.language as tl


@triton.jit
def keys_of(
    i, n_keys, offset, window, prefix, LO, HI,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, L_q,
):  # fmt: skip
    """The first key that query i sees and one past the last; i is a number or a vector of positions."""
    if PACKED:
        inside = i < L_q
        lo = tl.load(LO + i.to(tl.int64), mask=inside, other=0)
        hi = tl.load(HI + i.to(tl.int64), mask=inside, other=0)
    else:
        lo = i * 0
        hi = lo + n_keys
        if CAUSAL:
            hi = tl.minimum(hi, tl.maximum(i + offset + 1, prefix))
        if WINDOWED:
            lo = tl.maximum(i + offset + 1 - window, 0)
    return lo, hi


@triton.jit
def queries_of(
    j, n_keys, offset, window, prefix, FIRST, LAST,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, L_q, L_k,
):  # fmt: skip
    """The first query that sees key j and one past the last; j is a number or a vector of positions."""
    if PACKED:
        inside = j < L_k
        first = tl.load(FIRST + j.to(tl.int64), mask=inside, other=0)
        last = tl.load(LAST + j.to(tl.int64), mask=inside, other=0)
    else:
        first = j * 0
        last = first + L_q
        if CAUSAL:
            first = tl.where(j < prefix, 0, tl.maximum(j - offset, 0))
        if WINDOWED:
            last = tl.minimum(last, j - offset + window)
        last = tl.where(j < n_keys, last, 0)
    return first, last


@triton.jit
def _document(STARTS, i, n_documents, STEPS: tl.constexpr):
    """The last document that starts at or before i, by bisection: empty documents before it are passed over."""
    low = i * 0
    high = low + tl.cast(n_documents, tl.int32)
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        start = tl.load(STARTS + middle.to(tl.int64))  # starts has n_documents + 1 entries, so this is inside
        up = start.to(tl.int32) <= i
        low = tl.where(up, middle, low)
        high = tl.where(up, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["n", "n_other", "n_documents", "window"])
def _bounds_kernel(
    STARTS, OTHER, FROM, TO, n, n_other, n_documents, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, QUERIES: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The intervals of packed sequences: for each query the keys it sees or (not QUERIES) for each key its queries.

    STARTS (n_documents + 1,) holds where the documents begin among the positions asked about and where the last
    ends, OTHER the same on the other side. What lies behind the last document sees nothing.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    document = _document(STARTS, i, n_documents, STEPS)
    packed = document < n_documents
    document = tl.minimum(document, n_documents - 1).to(tl.int64)
    start = tl.load(STARTS + document).to(tl.int32)
    length = tl.load(STARTS + document + 1).to(tl.int32) - start
    other = tl.load(OTHER + document).to(tl.int32)
    n_here = tl.load(OTHER + document + 1).to(tl.int32) - other
    place = i - start
    low = place * 0
    high = low + n_here
    if CAUSAL:
        offset = low
        if BOTTOM_RIGHT:
            offset = n_here - length
        if QUERIES:
            high = place + offset + 1
            if WINDOWED:
                low = high - tl.cast(window, tl.int32)
        else:
            if BOTTOM_RIGHT:
                offset = length - n_here  # the roles are exchanged, and so is the offset
            low = place - offset
            if WINDOWED:
                high = low + tl.cast(window, tl.int32)
    low = tl.minimum(tl.maximum(low, 0), n_here)
    high = tl.minimum(tl.maximum(high, 0), n_here)
    end = tl.load(OTHER + tl.cast(n_documents, tl.int64)).to(tl.int32)
    inside = i < n
    first = tl.minimum(tl.where(packed, other + low, end), n_other)
    last = tl.minimum(tl.where(packed, other + high, end), n_other)
    tl.store(FROM + i.to(tl.int64), first, mask=inside)
    tl.store(TO + i.to(tl.int64), last, mask=inside)
