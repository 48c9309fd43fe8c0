r"""Device code of the router: k experts for every token, their weights, and the losses that keep experts busy.

Mathematics, for the logits $r\in\mathbb R^E$ of one token. Scores $s_e$ are $p_e=e^{r_e}/\sum_je^{r_j}$ or
$\sigma(r_e)$. The chosen $\mathcal T$ are the k largest of $r_e$ (the scores have the same order, and of logits no two
become equal by rounding), or with a bias of $s_e+b_e$; of equal ones the lower number is taken. Gates are
$g_e=s_e/\sum_{j\in\mathcal T}s_j$, or $s_e$ where they are not renormalised: the bias has no part in them.

Over N tokens, with $N_e$ tokens at expert e, $m_e$ the mean of the normalised scores $\hat p$ and
$\mathrm{LSE}_n=\log\sum_ee^{r_{ne}}$:

$$\mathcal L_{\rm aux}=E\sum_e\frac{N_e}{kN}m_e,\qquad\mathcal L_z=\tfrac1N\sum_n\mathrm{LSE}_n^2 .$$

Backward. Renormalised gates depend on the chosen logits alone: with softmax
$\bar r_e=g_e(\bar g_e-\sum_j\bar g_jg_j)$, with the sigmoid the same times $1-s_e$; no quotient that could overflow is
left. What arrives at $\hat p$ from the auxiliary loss is $c_e=\bar{\mathcal L}EN_e/(kN^2)$ and gives
$\hat p_e(c_e-\sum_jc_j\hat p_j)$, times $1-s_e$ for the sigmoid. The counts are constants. z gives
$2\bar{\mathcal L}_z\mathrm{LSE}_n p_e/N$.

Kept for the backward: the logits, which are there anyway, and the chosen numbers. Everything is computed again.
Each program walks blocks of tokens in a fixed order and keeps its sums in registers; a second kernel adds the
programs' shares up. No atomics. Logits that are NaN count as minus infinity in the choice, so that every number is
that of an expert.
"""

# Triton's functions are typed by their stand-ins, some of which never return.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _scores(logits, inside, SIGMOID: tl.constexpr):
    """For a tile of logits (tokens, E): softmax p, log-sum-exp, scores s, and the normalised scores."""
    top = tl.max(logits, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    raised = tl.where(inside, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(raised, axis=1)
    lse = top + tl.log(total)
    p = raised / total[:, None]
    s = p
    normalised = p
    if SIGMOID:
        s = tl.where(inside, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
        normalised = s / tl.sum(s, axis=1)[:, None]
    return p, lse, s, normalised


@triton.jit(do_not_specialize=["n_tokens"])
def _route_kernel(
    LOGITS, BIAS, GATES, EXPERTS, SHARE_P, SHARE_N, SHARE_Z,
    n_tokens, n_experts, k, stride_row, stride_col, stride_bias,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Choose and weigh for blocks of tokens, and add up this program's share of the sums over all tokens.

    BIAS (E,) or None. GATES (N, k) fp32 and EXPERTS (N, k) int32 are contiguous, SHARE_P fp32 and SHARE_N int32
    (programs, E), SHARE_Z (programs,).
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, BLOCK_K)
    there = cols < n_experts
    bias = tl.zeros((BLOCK_E,), tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + cols.to(tl.int64) * stride_bias, mask=there, other=0.0).to(tl.float32)
    sum_p = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    sum_z = tl.zeros((BLOCK_T,), tl.float32)

    for block in range(program, tl.cdiv(n_tokens, BLOCK_T), tl.num_programs(0)):
        tokens = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        present = tokens < n_tokens
        inside = present[:, None] & there[None, :]  # (BLOCK_T, BLOCK_E)
        at = tokens[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
        logits = tl.load(LOGITS + at, mask=inside, other=float("-inf")).to(tl.float32)
        _, lse, s, normalised = _scores(logits, inside, SIGMOID)
        sum_p += tl.sum(tl.where(inside, normalised, 0.0), axis=0)
        sum_z += tl.where(present, lse * lse, 0.0)

        rank_by = logits
        if BIAS is not None:
            rank_by = s + bias[None, :]
        rank_by = tl.where(inside & (rank_by == rank_by), rank_by, float("-inf"))
        free = tl.broadcast_to(there[None, :], (BLOCK_T, BLOCK_E))
        gates = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        experts = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
        for slot in range(k):
            best = tl.max(tl.where(free, rank_by, float("-inf")), axis=1)
            expert = tl.min(tl.where(free & (rank_by == best[:, None]), cols[None, :], BLOCK_E), axis=1)
            this = cols[None, :] == expert[:, None]
            free = free & (cols[None, :] != expert[:, None])
            gate = tl.sum(tl.where(this, s, 0.0), axis=1)
            gates = tl.where(slots[None, :] == slot, gate[:, None], gates)
            experts = tl.where(slots[None, :] == slot, expert[:, None], experts)
        count += tl.sum((inside & (free == 0)).to(tl.int32), axis=0)
        if RENORMALISE:
            gates = gates / tl.sum(gates, axis=1)[:, None]
        out = tokens[:, None] * k + slots[None, :]
        kept = present[:, None] & (slots < k)[None, :]
        tl.store(GATES + out, gates, mask=kept)
        tl.store(EXPERTS + out, experts, mask=kept)

    share = program.to(tl.int64) * n_experts + cols
    tl.store(SHARE_P + share, sum_p, mask=there)
    tl.store(SHARE_N + share, count, mask=there)
    tl.store(SHARE_Z + program, tl.sum(sum_z, axis=0))


@triton.jit(do_not_specialize=["n_tokens", "n_shares"])
def _balance_kernel(
    SHARE_P, SHARE_N, SHARE_Z, LOADS, AUX, Z, n_tokens, n_experts, k, n_shares,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: loads (E,), the auxiliary loss and the z-loss out of the programs' shares."""
    cols = tl.arange(0, BLOCK_E)
    there = cols < n_experts
    p = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    z = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, n_shares, BLOCK_S):
        shares = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask = (shares < n_shares)[:, None] & there[None, :]
        at = shares[:, None] * n_experts + cols[None, :]
        p += tl.sum(tl.load(SHARE_P + at, mask=mask, other=0.0), axis=0)
        count += tl.sum(tl.load(SHARE_N + at, mask=mask, other=0), axis=0)
        z += tl.load(SHARE_Z + shares, mask=shares < n_shares, other=0.0)
    tokens = tl.cast(n_tokens, tl.float32)
    fraction = count.to(tl.float32) / (tokens * tl.cast(k, tl.float32))
    tl.store(LOADS + cols, count, mask=there)
    tl.store(AUX, tl.sum(fraction * p, axis=0) / tokens * tl.cast(n_experts, tl.float32))
    tl.store(Z, tl.sum(z, axis=0) / tokens)


@triton.jit(do_not_specialize=["n_tokens"])
def _route_backward_kernel(
    LOGITS, EXPERTS, LOADS, DGATES, DAUX, DZ, DLOGITS,
    n_tokens, n_experts, k, stride_row, stride_col, stride_dgates_row, stride_dgates_col,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Pull what arrives at gates, auxiliary loss and z-loss (each None where nothing does) back to a block of logits."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_E)
    there = cols < n_experts
    present = tokens < n_tokens
    inside = present[:, None] & there[None, :]  # (BLOCK_T, BLOCK_E)
    at = tokens[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    logits = tl.load(LOGITS + at, mask=inside, other=float("-inf")).to(tl.float32)
    p, lse, s, normalised = _scores(logits, inside, SIGMOID)
    count = tl.cast(n_tokens, tl.float32)
    d = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)

    if DGATES is not None:
        arriving = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        taken = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        for slot in range(k):
            expert = tl.load(EXPERTS + tokens * k + slot, mask=present, other=0)
            dg = DGATES + tokens * stride_dgates_row + tl.cast(slot, tl.int64) * stride_dgates_col
            dg = tl.load(dg, mask=present, other=0.0).to(tl.float32)
            this = cols[None, :] == expert[:, None]
            arriving = tl.where(this, dg[:, None], arriving)
            taken = tl.where(this, 1, taken)
        if RENORMALISE:
            g = tl.where(taken == 1, s, 0.0)
            g = g / tl.sum(g, axis=1)[:, None]
            d = g * (arriving - tl.sum(arriving * g, axis=1)[:, None])
        elif SIGMOID:
            d = s * arriving
        else:
            d = s * (arriving - tl.sum(arriving * s, axis=1)[:, None])
    if DAUX is not None:
        share = tl.load(LOADS + cols, mask=there, other=0).to(tl.float32) / (count * tl.cast(k, tl.float32))
        c = tl.load(DAUX).to(tl.float32) * tl.cast(n_experts, tl.float32) * share[None, :] / count
        d += normalised * (c - tl.sum(c * normalised, axis=1)[:, None])
    if SIGMOID:
        d *= 1.0 - s
    if DZ is not None:
        d += (2.0 * tl.load(DZ).to(tl.float32) / count) * lse[:, None] * p
    out = tokens[:, None] * n_experts + cols[None, :]
    tl.store(DLOGITS + out, d.to(DLOGITS.dtype.element_ty), mask=inside)
