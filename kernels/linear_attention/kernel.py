r"""Device code of causal linear attention: quadratic inside a chunk, a running state between chunks.

Forward, with mapped queries and keys $q,k\in\mathbb R^{d_\phi}$ (the feature map is applied outside, or ELU+1 here) and the
state $S_0,z_0$ of what came before:

$$S_t=S_{t-1}+k_tv_t^\top,\quad z_t=z_{t-1}+k_t,\qquad
  o_t=\frac{q_t^\top S_t}{\delta_t},\quad\delta_t=q_t\cdot z_t+\varepsilon_0 .$$

For a chunk of C tokens with state S before it, $A=\mathrm{tril}(QK^\top)$ gives all rows at once: the numerator is
$AV+QS$, the denominator $A1+Qz+\varepsilon_0$, and then $S\leftarrow S+K^\top V$, $z\leftarrow z+K^\top 1$. The work grows with $L(C+d_\phi)$
instead of $L^2$, all of it in matrix products, and the state is all that a later token needs.

Backward. With $g_t=\bar o_t/\delta_t$ and $c_t=-\bar o_t\cdot o_t/\delta_t$ (what reaches the numerator and the denominator),

$$\bar q_t=S_tg_t+z_tc_t,\qquad \bar k_t=R_tv_t+w_t,\qquad \bar v_t=R_t^\top k_t,$$
$$R_t=\bar S+\sum_{i\ge t}q_ig_i^\top,\qquad w_t=\bar z+\sum_{i\ge t}c_iq_i,$$

so $\bar q$ runs forwards with the same state, $\bar k$ and $\bar v$ run *backwards* with a state of the same kind, and what it has
become at the beginning is the gradient of the initial state. Inside a chunk $\bar A=\mathrm{tril}(GV^\top+c1^\top)$.

**Segments.** A sequence is cut into segments, each of several chunks; one program walks the chunks of one segment of
one head with the state in registers:

    sequence  | chunk chunk chunk | chunk chunk chunk | chunk chunk ch |      one program each
    states    S0 ---------------> S1 ---------------> S2 -------------> S     one walk over all segments

First every segment adds up its own $K^\top V$ (`_sums_kernel`), then the sums become states (`_scan_kernel`), then
every segment computes its outputs. With as many heads as the machine takes, there is one segment, and the first two
steps fall away: q, k and v are read once and o written once, and nothing else moves.

Precision: states, denominators and sums are fp32. 16-bit operands of a product are rounded to the inputs' dtype; tiles
whose size nobody knows (a state grows with the tokens, $g$ shrinks with them) are brought to at most 2 by a power of
two first and the result is multiplied back, exact and without overflow in float16. Lanes outside load 0; the
feature map of 0 is not 0, so those are cleared after it. No atomics: every sum has one order.
"""

import triton
import triton.language as tl

from kernels.device import dot

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def mapped(x, inside, ELU: tl.constexpr):
    """The features of a tile: as they are, or ELU(x) + 1, rounded to the dtype of x, 0 outside."""
    if ELU:
        f = x.to(tl.float32)
        f = tl.where(f > 0, f + 1.0, tl.exp2(tl.minimum(f, 0.0) * LOG2E))
        return tl.where(inside, f, 0.0).to(x.dtype)
    return x


@triton.jit
def through_map(d_phi, x, ELU: tl.constexpr):
    """A gradient of features pulled back to what they were made of."""
    if ELU:
        x = x.to(tl.float32)
        d_phi *= tl.where(x > 0, 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    return d_phi


@triton.jit
def fitted(x, DTYPE: tl.constexpr):
    """A tile of unknown size in DTYPE, and what it has been divided by: for float16 a power of two, else 1."""
    size = 1.0
    if DTYPE == tl.float16:  # noqa: SIM300
        top = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
        size = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        size = tl.where(size > 0.0, size, 1.0)  # a tile of zeros
        x /= size
    return x.to(DTYPE), size


@triton.jit
def product(a, b, acc, size):
    """acc + size a b, where the size of float16 tiles had to be taken out (and is 1 for other dtypes)."""
    if a.dtype == tl.float16:
        return acc + dot(a, b, None) * size
    return dot(a, b, acc)


@triton.jit
def rows_at(X, b, h, start, rows, cols, stride_b, stride_h, stride_row, stride_col, inside):
    """Load rows of head h of sequence b from ``start`` on, 0 outside."""
    X += b * stride_b + h * stride_h + start * stride_row
    return tl.load(X + (rows[:, None] * stride_row + cols[None, :] * stride_col), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["H", "L", "per_segment"])
def _sums_kernel(
    X, Y, DEN, C, SUM, SUM_W, H, L, per_segment,
    stride_x_b, stride_x_h, stride_x_row, stride_x_col, stride_y_b, stride_y_h, stride_y_row, stride_y_col,
    D_PHI: tl.constexpr, D_V: tl.constexpr, ELU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_PHI: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One segment's own sums. Forwards X = k, Y = v: sum of k v^T and of k. Backwards (with DEN) X = q, Y = do: of q g^T and c q.

    SUM (B, H, segments, D_PHI, D_V) and SUM_W (B, H, segments, D_PHI) are contiguous; DEN, C (B, H, L).
    """
    segments = tl.cdiv(tl.cdiv(L, CHUNK), per_segment)
    blocks = tl.cdiv(D_V, BLOCK_V)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    head = (tl.program_id(0) // blocks // segments).to(tl.int64)
    b, h = head // H, head % H
    phi = tl.arange(0, BLOCK_PHI).to(tl.int64)
    dv = block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_PHI, BLOCK_V), tl.float32)
    weights = tl.zeros((BLOCK_PHI,), tl.float32)
    i = tl.arange(0, CHUNK).to(tl.int64)
    first = segment.to(tl.int64) * per_segment * CHUNK
    for start in tl.range(first, tl.minimum(first + per_segment * CHUNK, L), CHUNK, num_stages=STAGES):
        rows = start + i
        present = rows < L
        inside = present[:, None] & (phi < D_PHI)[None, :]
        x = rows_at(X, b, h, start, i, phi, stride_x_b, stride_x_h, stride_x_row, stride_x_col, inside)
        y = rows_at(Y, b, h, start, i, dv, stride_y_b, stride_y_h, stride_y_row, stride_y_col,
                    present[:, None] & (dv < D_V)[None, :])  # fmt: skip
        DTYPE: tl.constexpr = x.dtype
        x = mapped(x, inside, ELU)
        if DEN is not None:
            den = tl.load(DEN + head * L + rows, mask=present, other=1.0)
            c = tl.load(C + head * L + rows, mask=present, other=0.0)
            weights += tl.sum(x.to(tl.float32) * c[:, None], axis=0)
            y, size = fitted(y.to(tl.float32) / den[:, None], DTYPE)
            total = product(tl.trans(x), y, total, size)
        else:
            weights += tl.sum(x.to(tl.float32), axis=0)
            total = dot(tl.trans(x), y, total)
    out = head * segments + segment
    in_phi = phi < D_PHI
    tl.store(SUM + (out * D_PHI + phi[:, None]) * D_V + dv[None, :], total, mask=in_phi[:, None] & (dv < D_V)[None, :])
    if block == 0:
        tl.store(SUM_W + out * D_PHI + phi, weights, mask=in_phi)


@triton.jit(do_not_specialize=["segments", "n"])
def _scan_kernel(STATES, START, END, segments, n, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    """Turn every segment's own sums into the state before it (BACKWARDS: behind it), in place.

    STATES (B H, segments, n), START (B H, n) or None, END (B H, n) gets what the last one leaves, all fp32 and contiguous.
    """
    strips = tl.cdiv(n, BLOCK)
    head = (tl.program_id(0) // strips).to(tl.int64)
    i = (tl.program_id(0) % strips).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    state = tl.zeros((BLOCK,), tl.float32)
    if START is not None:
        state += tl.load(START + head * n + i, mask=inside, other=0.0)
    for step in range(segments):
        segment = step
        if BACKWARDS:
            segment = segments - 1 - step
        at = STATES + (head * segments + segment) * n + i
        own = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state += own
    tl.store(END + head * n + i, state, mask=inside)


@triton.jit(do_not_specialize=["H", "L", "per_segment"])
def _forward_kernel(
    Q, K, V, S, Z, OUT, DEN, S_END, Z_END, H, L, per_segment, eps,
    stride_q_b, stride_q_h, stride_q_row, stride_q_col, stride_k_b, stride_k_h, stride_k_row, stride_k_col,
    stride_v_b, stride_v_h, stride_v_row, stride_v_col,
    D_PHI: tl.constexpr, D_V: tl.constexpr, ELU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_PHI: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The outputs of one segment, for one block of value columns, from the state before it.

    S (B, H, segments, D_PHI, D_V) and Z (B, H, segments, D_PHI) are fp32 and contiguous, None for an empty state. OUT
    (B, H, L, D_V) and DEN (B, H, L) are contiguous. S_END and Z_END, None with several segments, get the last state.
    """
    segments = tl.cdiv(tl.cdiv(L, CHUNK), per_segment)
    blocks = tl.cdiv(D_V, BLOCK_V)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    head = (tl.program_id(0) // blocks // segments).to(tl.int64)
    b, h = head // H, head % H
    phi = tl.arange(0, BLOCK_PHI).to(tl.int64)
    dv = block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_phi, in_v = phi < D_PHI, dv < D_V
    states = (head * segments + segment) * D_PHI + phi
    at_state = states[:, None] * D_V + dv[None, :]
    in_state = in_phi[:, None] & in_v[None, :]
    state = tl.zeros((BLOCK_PHI, BLOCK_V), tl.float32)
    z = tl.zeros((BLOCK_PHI,), tl.float32)
    if S is not None:
        state += tl.load(S + at_state, mask=in_state, other=0.0)
        z += tl.load(Z + states, mask=in_phi, other=0.0)
    i = tl.arange(0, CHUNK).to(tl.int64)
    earlier = i[:, None] >= i[None, :]  # (CHUNK, CHUNK), the own token too

    first = segment.to(tl.int64) * per_segment * CHUNK
    for start in tl.range(first, tl.minimum(first + per_segment * CHUNK, L), CHUNK, num_stages=STAGES):
        rows = start + i
        present = rows < L
        inside = present[:, None] & in_phi[None, :]
        in_rows = present[:, None] & in_v[None, :]
        q = rows_at(Q, b, h, start, i, phi, stride_q_b, stride_q_h, stride_q_row, stride_q_col, inside)
        k = rows_at(K, b, h, start, i, phi, stride_k_b, stride_k_h, stride_k_row, stride_k_col, inside)
        v = rows_at(V, b, h, start, i, dv, stride_v_b, stride_v_h, stride_v_row, stride_v_col, in_rows)
        DTYPE: tl.constexpr = v.dtype
        q, k = mapped(q, inside, ELU), mapped(k, inside, ELU)
        a = tl.where(earlier, dot(q, tl.trans(k), None), 0.0)  # (CHUNK, CHUNK)
        before, size = fitted(state, DTYPE)
        o = dot(q, before, None) * size
        inner, size = fitted(a, DTYPE)
        o = product(inner, v, o, size)  # (CHUNK, BLOCK_V)
        den = tl.sum(a, axis=1) + tl.sum(q.to(tl.float32) * z[None, :], axis=1) + eps
        o /= tl.where(present, den, 1.0)[:, None]
        if block == 0:
            tl.store(DEN + head * L + rows, den, mask=present)
        tl.store(OUT + (head * L + rows)[:, None] * D_V + dv[None, :], o.to(OUT.dtype.element_ty), mask=in_rows)
        state = dot(tl.trans(k), v, state)
        z += tl.sum(k.to(tl.float32), axis=0)
    if S_END is not None:
        tl.store(S_END + at_state, state, mask=in_state)
        if block == 0:
            tl.store(Z_END + states, z, mask=in_phi)


@triton.jit(do_not_specialize=["n_rows"])
def _arriving_kernel(
    DO, OUT, DEN, C, H, L, n_rows, stride_do_b, stride_do_h, stride_do_row, stride_do_col,
    D_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What reaches each denominator: c = -(do . o) / den, one number a row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = rows < n_rows
    head, row = rows // L, rows % L
    at_do = DO + head // H * stride_do_b + head % H * stride_do_h + row * stride_do_row
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in tl.static_range(0, D_V, BLOCK_V):
        dv = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        inside = present[:, None] & (dv < D_V)[None, :]
        do = tl.load(at_do[:, None] + dv[None, :] * stride_do_col, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(OUT + rows[:, None] * D_V + dv[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(do * o, axis=1)
    den = tl.load(DEN + rows, mask=present, other=1.0)
    tl.store(C + rows, -total / den, mask=present)


@triton.jit(do_not_specialize=["H", "L", "per_segment", "heads"])
def _dq_kernel(
    Q, K, V, DO, DEN, C, S, Z, DQ, H, L, per_segment, heads,
    stride_q_b, stride_q_h, stride_q_row, stride_q_col, stride_k_b, stride_k_h, stride_k_row, stride_k_col,
    stride_v_b, stride_v_h, stride_v_row, stride_v_col, stride_do_b, stride_do_h, stride_do_row, stride_do_col,
    D_PHI: tl.constexpr, D_V: tl.constexpr, ELU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_PHI: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of one segment, forwards: S_t g_t + z_t c_t. DQ (blocks of value columns, B, H, L, D_PHI): their shares are added later."""
    segments = tl.cdiv(tl.cdiv(L, CHUNK), per_segment)
    blocks = tl.cdiv(D_V, BLOCK_V)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    head = (tl.program_id(0) // blocks // segments).to(tl.int64)
    b, h = head // H, head % H
    phi = tl.arange(0, BLOCK_PHI).to(tl.int64)
    dv = block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_phi, in_v = phi < D_PHI, dv < D_V
    states = (head * segments + segment) * D_PHI + phi
    state = tl.zeros((BLOCK_PHI, BLOCK_V), tl.float32)
    z = tl.zeros((BLOCK_PHI,), tl.float32)
    if S is not None:
        at_state = states[:, None] * D_V + dv[None, :]
        state += tl.load(S + at_state, mask=in_phi[:, None] & in_v[None, :], other=0.0)
        z += tl.load(Z + states, mask=in_phi, other=0.0)
    i = tl.arange(0, CHUNK).to(tl.int64)
    earlier = i[:, None] >= i[None, :]

    first = segment.to(tl.int64) * per_segment * CHUNK
    for start in tl.range(first, tl.minimum(first + per_segment * CHUNK, L), CHUNK, num_stages=STAGES):
        rows = start + i
        present = rows < L
        inside = present[:, None] & in_phi[None, :]
        in_rows = present[:, None] & in_v[None, :]
        k = rows_at(K, b, h, start, i, phi, stride_k_b, stride_k_h, stride_k_row, stride_k_col, inside)
        v = rows_at(V, b, h, start, i, dv, stride_v_b, stride_v_h, stride_v_row, stride_v_col, in_rows)
        g = rows_at(DO, b, h, start, i, dv, stride_do_b, stride_do_h, stride_do_row, stride_do_col, in_rows)
        DTYPE: tl.constexpr = v.dtype
        k = mapped(k, inside, ELU)
        den = tl.load(DEN + head * L + rows, mask=present, other=1.0)
        g, size = fitted(g.to(tl.float32) / den[:, None], DTYPE)
        da = dot(g, tl.trans(v), None) * size
        before, size_before = fitted(state, DTYPE)
        dq = dot(g, tl.trans(before), None) * (size * size_before)
        if block == 0:
            c = tl.load(C + head * L + rows, mask=present, other=0.0)
            da += c[:, None]
            dq += c[:, None] * z[None, :]
        inner, size = fitted(tl.where(earlier, da, 0.0), DTYPE)
        dq = product(inner, k, dq, size)  # (CHUNK, BLOCK_PHI)
        if ELU:
            q = rows_at(Q, b, h, start, i, phi, stride_q_b, stride_q_h, stride_q_row, stride_q_col, inside)
            dq = through_map(dq, q, ELU)
        out = (block.to(tl.int64) * heads + head) * L + rows
        tl.store(DQ + out[:, None] * D_PHI + phi[None, :], dq.to(DQ.dtype.element_ty), mask=inside)
        state = dot(tl.trans(k), v, state)
        z += tl.sum(k.to(tl.float32), axis=0)


@triton.jit(do_not_specialize=["H", "L", "per_segment", "heads"])
def _dk_kernel(
    Q, K, V, DO, DEN, C, R, W, DK, R_END, W_END, H, L, per_segment, heads,
    stride_q_b, stride_q_h, stride_q_row, stride_q_col, stride_k_b, stride_k_h, stride_k_row, stride_k_col,
    stride_v_b, stride_v_h, stride_v_row, stride_v_col, stride_do_b, stride_do_h, stride_do_row, stride_do_col,
    D_PHI: tl.constexpr, D_V: tl.constexpr, ELU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_PHI: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk of one segment, backwards: R_t v_t + w_t. DK (blocks of value columns, B, H, L, D_PHI) has shares like DQ.

    R (B, H, segments, D_PHI, D_V) and W (B, H, segments, D_PHI) are what has come from behind the segment (None:
    nothing); R_END and W_END, None with several segments, get what arrives at the beginning.
    """
    segments = tl.cdiv(tl.cdiv(L, CHUNK), per_segment)
    blocks = tl.cdiv(D_V, BLOCK_V)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    head = (tl.program_id(0) // blocks // segments).to(tl.int64)
    b, h = head // H, head % H
    phi = tl.arange(0, BLOCK_PHI).to(tl.int64)
    dv = block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_phi, in_v = phi < D_PHI, dv < D_V
    states = (head * segments + segment) * D_PHI + phi
    at_state = states[:, None] * D_V + dv[None, :]
    in_state = in_phi[:, None] & in_v[None, :]
    r = tl.zeros((BLOCK_PHI, BLOCK_V), tl.float32)
    w = tl.zeros((BLOCK_PHI,), tl.float32)
    if R is not None:
        r += tl.load(R + at_state, mask=in_state, other=0.0)
        w += tl.load(W + states, mask=in_phi, other=0.0)
    i = tl.arange(0, CHUNK).to(tl.int64)
    later = i[:, None] <= i[None, :]  # (keys, queries)

    first = segment.to(tl.int64) * per_segment * CHUNK
    chunks = tl.cdiv(tl.minimum(per_segment * CHUNK, L - first), CHUNK)
    for step in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - step) * CHUNK
        rows = start + i
        present = rows < L
        inside = present[:, None] & in_phi[None, :]
        in_rows = present[:, None] & in_v[None, :]
        q = rows_at(Q, b, h, start, i, phi, stride_q_b, stride_q_h, stride_q_row, stride_q_col, inside)
        v = rows_at(V, b, h, start, i, dv, stride_v_b, stride_v_h, stride_v_row, stride_v_col, in_rows)
        g = rows_at(DO, b, h, start, i, dv, stride_do_b, stride_do_h, stride_do_row, stride_do_col, in_rows)
        DTYPE: tl.constexpr = v.dtype
        q = mapped(q, inside, ELU)
        den = tl.load(DEN + head * L + rows, mask=present, other=1.0)
        g, size = fitted(g.to(tl.float32) / den[:, None], DTYPE)
        behind, size_behind = fitted(r, DTYPE)
        da = dot(v, tl.trans(g), None) * size
        dk = dot(v, tl.trans(behind), None) * size_behind
        c = tl.load(C + head * L + rows, mask=present, other=0.0)
        if block == 0:
            da += c[None, :]
            dk += w[None, :]
        inner, size_inner = fitted(tl.where(later, da, 0.0), DTYPE)
        dk = product(inner, q, dk, size_inner)  # (CHUNK, BLOCK_PHI)
        if ELU:
            k = rows_at(K, b, h, start, i, phi, stride_k_b, stride_k_h, stride_k_row, stride_k_col, inside)
            dk = through_map(dk, k, ELU)
        out = (block.to(tl.int64) * heads + head) * L + rows
        tl.store(DK + out[:, None] * D_PHI + phi[None, :], dk.to(DK.dtype.element_ty), mask=inside)
        r = product(tl.trans(q), g, r, size)
        w += tl.sum(q.to(tl.float32) * c[:, None], axis=0)
    if R_END is not None:
        tl.store(R_END + at_state, r, mask=in_state)
        if block == 0:
            tl.store(W_END + states, w, mask=in_phi)


@triton.jit(do_not_specialize=["H", "L", "per_segment"])
def _dv_kernel(
    Q, K, DO, DEN, R, DV, H, L, per_segment,
    stride_q_b, stride_q_h, stride_q_row, stride_q_col, stride_k_b, stride_k_h, stride_k_row, stride_k_col,
    stride_do_b, stride_do_h, stride_do_row, stride_do_col,
    D_PHI: tl.constexpr, D_V: tl.constexpr, ELU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_PHI: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv of one segment, backwards: R_t^T k_t, with R as in the kernel before: no share is needed, columns are independent."""
    segments = tl.cdiv(tl.cdiv(L, CHUNK), per_segment)
    blocks = tl.cdiv(D_V, BLOCK_V)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    head = (tl.program_id(0) // blocks // segments).to(tl.int64)
    b, h = head // H, head % H
    phi = tl.arange(0, BLOCK_PHI).to(tl.int64)
    dv = block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_phi, in_v = phi < D_PHI, dv < D_V
    states = (head * segments + segment) * D_PHI + phi
    at_state = states[:, None] * D_V + dv[None, :]
    in_state = in_phi[:, None] & in_v[None, :]
    r = tl.zeros((BLOCK_PHI, BLOCK_V), tl.float32)
    if R is not None:
        r += tl.load(R + at_state, mask=in_state, other=0.0)
    i = tl.arange(0, CHUNK).to(tl.int64)
    later = i[:, None] <= i[None, :]  # (keys, queries)

    first = segment.to(tl.int64) * per_segment * CHUNK
    chunks = tl.cdiv(tl.minimum(per_segment * CHUNK, L - first), CHUNK)
    for step in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - step) * CHUNK
        rows = start + i
        present = rows < L
        inside = present[:, None] & in_phi[None, :]
        in_rows = present[:, None] & in_v[None, :]
        q = rows_at(Q, b, h, start, i, phi, stride_q_b, stride_q_h, stride_q_row, stride_q_col, inside)
        k = rows_at(K, b, h, start, i, phi, stride_k_b, stride_k_h, stride_k_row, stride_k_col, inside)
        g = rows_at(DO, b, h, start, i, dv, stride_do_b, stride_do_h, stride_do_row, stride_do_col, in_rows)
        DTYPE: tl.constexpr = q.dtype
        q, k = mapped(q, inside, ELU), mapped(k, inside, ELU)
        den = tl.load(DEN + head * L + rows, mask=present, other=1.0)
        g, size = fitted(g.to(tl.float32) / den[:, None], DTYPE)
        behind, size_behind = fitted(r, DTYPE)
        a, size_a = fitted(tl.where(later, dot(k, tl.trans(q), None), 0.0), DTYPE)  # (keys, queries)
        dv_tile = product(a, g, dot(k, behind, None) * size_behind, size_a * size)  # (CHUNK, BLOCK_V)
        at_dv = DV + (head * L + rows)[:, None] * D_V + dv[None, :]
        tl.store(at_dv, dv_tile.to(DV.dtype.element_ty), mask=in_rows)
        r = product(tl.trans(q), g, r, size)
