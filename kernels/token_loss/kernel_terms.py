"""Device code from statistics to losses, token by token: next to nothing beside the logits, but every switch is here.

`_token_terms_kernel` serves likelihood losses and token ratios, `_sequence_terms_kernel` the ratios of whole
responses, where every token's derivative depends on all tokens of its response. Tokens whose target is IGNORED
give 0 everywhere, whatever the other arrays hold there.
"""

# Calls between device functions and tl.range are unknown to a type checker.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.token_loss.kernel_tiles import clip_flag, likelihood_terms, penalty, policy_terms, surrogate


@triton.jit(do_not_specialize=["n_rows"])
def _token_terms_kernel(
    LOGP, LSE, ENTROPY, MEAN, TARGET, WEIGHT, OLD, REF, ADVANTAGE, IMPORTANCE,
    VALUE, A, B, C, D, RATIO, FLAG, K1, K2, K3,
    n_rows, ignored, smoothing, z_loss, low, high, dual, beta, entropy_coef,
    POLICY: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values and derivatives of the terms of BLOCK tokens, each for itself."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = rows < n_rows
    keep = present & (tl.load(TARGET + rows, mask=present, other=ignored) != ignored)
    logp = tl.load(LOGP + rows, mask=keep, other=0.0)
    weight = tl.load(WEIGHT + rows, mask=keep, other=0.0)
    if POLICY:
        old = tl.load(OLD + rows, mask=keep, other=0.0)
        advantage = tl.load(ADVANTAGE + rows, mask=keep, other=0.0)
        entropy = tl.load(ENTROPY + rows, mask=keep, other=0.0)
        ref = logp
        if REF is not None:
            ref = tl.load(REF + rows, mask=keep, other=0.0)
        importance = weight * 0.0 + 1.0
        if IMPORTANCE is not None:
            importance = tl.load(IMPORTANCE + rows, mask=keep, other=0.0)
        value, a, b, ratio, flag, k1, k2, k3 = policy_terms(
            logp, entropy, old, ref, advantage, weight, importance, low, high, dual, beta, entropy_coef,
            REF is not None, KL, KL_RATIO,
        )  # fmt: skip
        if B is not None:
            tl.store(B + rows, tl.where(keep, b, 0.0), mask=present)
        tl.store(RATIO + rows, tl.where(keep, ratio, 0.0), mask=present)
        tl.store(FLAG + rows, tl.where(keep, flag, 0).to(tl.int8), mask=present)
        tl.store(K1 + rows, tl.where(keep, k1, 0.0), mask=present)
        tl.store(K2 + rows, tl.where(keep, k2, 0.0), mask=present)
        tl.store(K3 + rows, tl.where(keep, k3, 0.0), mask=present)
    else:
        lse = tl.load(LSE + rows, mask=keep, other=0.0)
        mean = lse
        if MEAN is not None:
            mean = tl.load(MEAN + rows, mask=keep, other=0.0)
        value, a, c, d = likelihood_terms(logp, lse, mean, weight, smoothing, z_loss)
        if C is not None:
            tl.store(C + rows, tl.where(keep, c, 0.0), mask=present)
        if D is not None:
            tl.store(D + rows, tl.where(keep, d, 0.0), mask=present)
    tl.store(VALUE + rows, tl.where(keep, value, 0.0), mask=present)
    tl.store(A + rows, tl.where(keep, a, 0.0), mask=present)


@triton.jit(do_not_specialize=["T"])
def _sequence_terms_kernel(
    LOGP, ENTROPY, TARGET, WEIGHT, OLD, REF, ADVANTAGE, IMPORTANCE,
    VALUE, A, B, RATIO, FLAG, K1, K2, K3,
    T, ignored, low, high, dual, beta, entropy_coef,
    KL: tl.constexpr, KL_RATIO: tl.constexpr, PER_LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r"""The same for one response with one ratio, exp of the sum (PER_LENGTH: the mean) of its log-ratios.

    With $s$ the ratio, $\partial s/\partial\log p_t=s$ (or $s/\lvert y\rvert$) for every token, so each token's
    derivative is that of the whole response: $-\sum_tw_tA_t$ over the tokens that are not clipped, times $s$.
    """
    first = tl.program_id(0).to(tl.int64) * T
    log_ratio = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, T, BLOCK):
        tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)
        at = first + tokens
        keep = (tokens < T) & (tl.load(TARGET + at, mask=tokens < T, other=ignored) != ignored)
        log_ratio += tl.load(LOGP + at, mask=keep, other=0.0) - tl.load(OLD + at, mask=keep, other=0.0)
        count += tl.where(keep, 1.0, 0.0)
    exponent = tl.sum(log_ratio, axis=0)
    share = 1.0
    if PER_LENGTH:
        share = 1.0 / tl.maximum(tl.sum(count, axis=0), 1.0)
    ratio = tl.exp(exponent * share) + tl.zeros((BLOCK,), tl.float32)

    pull = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, T, BLOCK):
        tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)
        at = first + tokens
        keep = (tokens < T) & (tl.load(TARGET + at, mask=tokens < T, other=ignored) != ignored)
        advantage = tl.load(ADVANTAGE + at, mask=keep, other=0.0)
        weight = tl.load(WEIGHT + at, mask=keep, other=0.0)
        if IMPORTANCE is not None:
            weight *= tl.load(IMPORTANCE + at, mask=keep, other=0.0)
        pull += tl.where(clip_flag(ratio, advantage, low, high, dual) == 0, -weight * advantage, 0.0)
    pulled = tl.sum(pull, axis=0) + tl.zeros((BLOCK,), tl.float32)
    a_response = tl.where(pulled == 0, 0.0, pulled * ratio * share)

    for start in range(0, T, BLOCK):
        tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)
        at = first + tokens
        present = tokens < T
        keep = present & (tl.load(TARGET + at, mask=present, other=ignored) != ignored)
        logp = tl.load(LOGP + at, mask=keep, other=0.0)
        old = tl.load(OLD + at, mask=keep, other=0.0)
        advantage = tl.load(ADVANTAGE + at, mask=keep, other=0.0)
        entropy = tl.load(ENTROPY + at, mask=keep, other=0.0)
        weight = tl.load(WEIGHT + at, mask=keep, other=0.0)
        importance = weight * 0.0 + 1.0
        if IMPORTANCE is not None:
            importance = tl.load(IMPORTANCE + at, mask=keep, other=0.0)
        value = -weight * importance * surrogate(ratio, advantage, low, high, dual) - weight * entropy_coef * entropy
        a = tl.where(keep, a_response, 0.0)
        k1, k2, k3 = weight * 0.0, weight * 0.0, weight * 0.0
        if REF is not None:
            ref = tl.load(REF + at, mask=keep, other=0.0)
            estimate, slope, k1, k2, k3 = penalty(logp, old, ref, KL, KL_RATIO)
            value += weight * beta * estimate
            a += weight * beta * slope
        if B is not None:
            tl.store(B + at, -weight * entropy_coef, mask=present)
        flag = clip_flag(ratio, advantage, low, high, dual)
        tl.store(VALUE + at, tl.where(keep, value, 0.0), mask=present)
        tl.store(A + at, tl.where(keep, a, 0.0), mask=present)
        tl.store(RATIO + at, tl.where(keep, ratio, 0.0), mask=present)
        tl.store(FLAG + at, tl.where(keep, flag, 0).to(tl.int8), mask=present)
        tl.store(K1 + at, tl.where(keep, k1, 0.0), mask=present)
        tl.store(K2 + at, tl.where(keep, k2, 0.0), mask=present)
        tl.store(K3 + at, tl.where(keep, k3, 0.0), mask=present)
