r"""Device code of decoding: few queries, many keys, so the keys are split over programs and the parts merged.

A decoding step reads the whole cache and does two multiply-adds for every number of it and every query: it is bound by
memory, and everything here serves one aim, to read keys and values once, with all multiprocessors busy.

**One tile for a group.** The query heads that share a key/value head (GQA, MQA, all heads of MLA), times the new
tokens, are the rows of one tile:

    rows of the tile   head 0 token 0 | head 0 token 1 | head 1 token 0 | ...   (group x L_q, padded to 16 at least)
    keys               |<-- split 0 -->|<-- split 1 -->|<-- split 2 -->|.......garbage.......|
                       0                                               length                capacity

so a key is loaded once and meets every query that may look at it. Without this a group of 8 would read it 8 times.

**Split over keys.** Each program takes a stretch of the keys and leaves a normalised part and its log-sum-exp,
$(o_s,\mathrm{LSE}_s)$. Two parts are merged like two tiles of the online softmax, in any order and number:

$$m=\max_s\mathrm{LSE}_s,\quad w_s=e^{\mathrm{LSE}_s-m},\quad o=\frac{\sum_sw_so_s}{\sum_sw_s},\quad
  \mathrm{LSE}=m+\log\textstyle\sum_sw_s .$$

An empty part is $(\cdot,-\infty)$ and weighs exactly 0. There are two traps: if all parts are empty, $m=-\infty$ and
$-\infty+\infty$ is NaN, so $m$ is replaced by 0 there and an empty sum by 1; and $0\cdot$NaN is NaN, so the $o_s$
of an empty part is not even loaded. The result of no key at all is 0 with LSE $-\infty$.

**Widths.** The columns of a key are cut into a main part (a power of two, or for MLA the latent, which is the value as
well) and a rest: 576 = 512 + 64 and 192 = 128 + 64 instead of tiles padded to 1024 and 256. In latent form the main part
is loaded once and serves as key and as value.

Positions: of a sequence with ``length`` keys the new tokens are the last, so row i stands at length - L_q + i and
sees the keys up to its own place, with a window only the last so many of them. Nothing behind ``length`` is loaded.

Rounding: scores, probabilities' sums and outputs are fp32; probabilities are rounded to the dtype of the values
before they meet them; a result is rounded once, when it is stored. Parts are stored in fp32. Exponentials are powers of two.
No atomics: what is added in which order depends on shapes alone.
"""

import triton
import triton.language as tl

from kernels.device import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(s, cap):
    """c tanh(s / c) by one power of two of a number that is never positive, so it cannot overflow."""
    e = tl.exp2(tl.abs(s) * (-2.0 * LOG2E / cap))
    t = cap * (1.0 - e) / (1.0 + e)
    return tl.where(s < 0, -t, t)


@triton.jit
def tokens_of(keys, present, TABLE, stride_page, stride_token, PAGE: tl.constexpr):
    """Where the keys of these positions lie: in order, or (paged) wherever the table says their page is."""
    keys = keys.to(tl.int64)
    if TABLE is not None:
        page = tl.load(TABLE + keys // PAGE, mask=present, other=0).to(tl.int64)
        return page * stride_page + (keys % PAGE) * stride_token
    return keys * stride_token


@triton.jit(do_not_specialize=["H_kv", "group", "L_q", "capacity", "window", "splits"])
def _decode_kernel(
    Q, K, V, LENGTHS, TABLE, OUT, LSE,
    H_kv, group, L_q, capacity, window, splits, scale, cap,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_table,
    MAIN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LATENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One stretch of keys for one block of rows of one key/value head: its part of the output and its log-sum-exp.

    K, V (B, H_kv, capacity, d), or with TABLE (B, pages of a sequence) of shape (pages, H_kv, PAGE, d). LATENT: V is the
    main part of K. LENGTHS (B,) may be None (all ``capacity`` keys are there). OUT (splits, B, H, L_q, DV) and
    LSE (splits, B, H, L_q) are contiguous. ``scale`` is in units of log 2 unless CAPPED.
    """
    n_rows = group * L_q
    blocks = tl.cdiv(n_rows, BLOCK_M)
    program = tl.program_id(0)
    block = program % blocks  # neighbours read the same keys
    split = (program // blocks) % splits
    head = program // blocks // splits  # over batch and key/value heads
    b, h_kv = (head // H_kv).to(tl.int64), (head % H_kv).to(tl.int64)

    length = capacity
    if LENGTHS is not None:
        length = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), capacity).to(tl.int32)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows % L_q
    q_head = h_kv * group + rows // L_q
    present = rows < n_rows
    position = length - L_q + token  # (BLOCK_M,)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - L_q - window + 1, 0) // BLOCK_N * BLOCK_N
    stretch = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits) * BLOCK_N
    start = first + split * stretch
    stop = tl.minimum(start + stretch, length)

    d, dv = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_DV).to(tl.int64)
    at_q = Q + b * stride_q_batch + q_head[:, None] * stride_q_head + token.to(tl.int64)[:, None] * stride_q_row
    q = tl.load(at_q + d[None, :] * stride_q_col, mask=present[:, None] & (d < MAIN)[None, :], other=0.0)
    if BLOCK_REST:
        r = MAIN + tl.arange(0, BLOCK_REST).to(tl.int64)
        q_rest = tl.load(at_q + r[None, :] * stride_q_col, mask=present[:, None] & (r < D)[None, :], other=0.0)
    if TABLE is not None:
        TABLE += b * stride_table
        K += h_kv * stride_k_head
        V += h_kv * stride_v_head
    else:
        K += b * stride_k_batch + h_kv * stride_k_head
        V += b * stride_v_batch + h_kv * stride_v_head

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        keys = n + tl.arange(0, BLOCK_N)
        inside = keys < stop
        at_k = K + tokens_of(keys, inside, TABLE, stride_k_batch, stride_k_row, PAGE)[:, None]
        k = tl.load(at_k + d[None, :] * stride_k_col, mask=inside[:, None] & (d < MAIN)[None, :], other=0.0)
        s = dot(q, tl.trans(k), None)  # (BLOCK_M, BLOCK_N)
        if BLOCK_REST:
            k_rest = tl.load(at_k + r[None, :] * stride_k_col, mask=inside[:, None] & (r < D)[None, :], other=0.0)
            s = dot(q_rest, tl.trans(k_rest), s)
        s *= scale
        if CAPPED:
            s = capped(s, cap) * LOG2E
        seen = (keys[None, :] <= position[:, None]) & inside[None, :]
        if WINDOWED:
            seen = seen & (keys[None, :] > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))

        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: no inf - inf
        p = tl.exp2(s - shift[:, None])
        old = tl.exp2(top - shift)
        if LATENT:
            v = k
        else:
            at_v = V + tokens_of(keys, inside, TABLE, stride_v_batch, stride_v_row, PAGE)[:, None]
            v = tl.load(at_v + dv[None, :] * stride_v_col, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        total = total * old + tl.sum(p, axis=1)
        o = dot(p.to(v.dtype), v, o * old[:, None])
        top = new_top

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    o = o / total[:, None]
    n_heads = tl.num_programs(0) // (blocks * splits)  # B H_kv
    out = (split.to(tl.int64) * n_heads * n_rows) + head.to(tl.int64) * n_rows + rows  # (split, b, head, token)
    tl.store(LSE + out, lse, mask=present)
    tl.store(
        OUT + out[:, None] * DV + dv[None, :], o.to(OUT.dtype.element_ty), mask=present[:, None] & (dv < DV)[None, :]
    )


@triton.jit(do_not_specialize=["parts", "n_rows"])
def _merge_kernel(
    PARTS, PARTS_LSE, OUT, LSE,
    parts, n_rows, stride_o_part, stride_o_row, stride_o_col, stride_lse_part, stride_lse_row,
    DV: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row: PARTS (parts, n_rows, DV), PARTS_LSE (parts, n_rows) -> OUT (n_rows, DV), LSE (n_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    in_width = dv < DV
    top = tl.max(tl.full((BLOCK_PARTS,), float("-inf"), tl.float32), axis=0)
    total = tl.sum(tl.zeros((BLOCK_PARTS,), tl.float32), axis=0)
    o = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        index = (start + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        at = PARTS_LSE + index * stride_lse_part + row * stride_lse_row
        lse = tl.load(at, mask=index < parts, other=float("-inf"))
        some = lse > float("-inf")
        at = PARTS + index[:, None] * stride_o_part + row * stride_o_row + dv[None, :] * stride_o_col
        part = tl.load(at, mask=some[:, None] & in_width[None, :], other=0.0).to(tl.float32)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2((lse - shift) * LOG2E)
        old = tl.exp2((top - shift) * LOG2E)
        total = total * old + tl.sum(weight, axis=0)
        o = o * old + tl.sum(part * weight[:, None], axis=0)
        top = new_top
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    tl.store(LSE + row, tl.where(some, top + tl.log2(total) * LN2, float("-inf")))
    tl.store(OUT + row * DV + dv, (o / total).to(OUT.dtype.element_ty), mask=in_width)
