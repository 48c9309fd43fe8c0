"""Rotation whose offset reaches only the first block of positions.

    python -m kernels compare rope --impl lessons/kernels_to_break/rope_offset_of_one_block.py:rope

With a cache the new tokens begin at position `start`. The kernel adds it for the first sixteen tokens and forgets it
after them. A prompt begins at 0, where nothing is wrong, and decoding adds fewer than sixteen tokens at a time.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(X, COS, SIN, PLACES, OUT, L, half, start, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr):
    """BLOCK positions of one head: X, OUT (heads, L, 2 half), COS and SIN (n, half), PLACES (heads, L), contiguous."""
    blocks = tl.cdiv(L, BLOCK)
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    rows, pair = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, W)
    there = (rows < L)[:, None] & (pair < half)[None, :]
    place = tl.load(PLACES + head * L + rows, mask=rows < L, other=0)
    if block == 0:  # the bug: the offset belongs to every block
        place += start
    c = tl.load(COS + place[:, None] * half + pair[None, :], mask=there, other=0.0).to(tl.float32)
    s = tl.load(SIN + place[:, None] * half + pair[None, :], mask=there, other=0.0).to(tl.float32)
    at = (head * L + rows)[:, None] * 2 * half + (2 * pair if INTERLEAVED else pair)[None, :]
    other = at + (1 if INTERLEAVED else half)
    a = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(X + other, mask=there, other=0.0).to(tl.float32)
    tl.store(OUT + at, (a * c - b * s).to(OUT.dtype.element_ty), mask=there)
    tl.store(OUT + other, (a * s + b * c).to(OUT.dtype.element_ty), mask=there)


def rope(x, cos, sin, positions=None, start=0, pairing="interleaved"):
    """Held against the reference of the same name."""
    x = x.detach().contiguous()
    *lead, L, d = x.shape
    places = torch.arange(L, device=x.device) if positions is None else positions.to(torch.int64)
    if places.ndim == 2:  # (B, L) beside x (B, ..., L, d)
        places = places.reshape(places.shape[0], *[1] * (len(lead) - 1), L)
    places = places.expand(*lead, L).contiguous()
    out = torch.empty_like(x)
    if out.numel():
        half = d // 2
        _kernel[(places[..., 0].numel() * -(-L // 16),)](
            x, cos.contiguous(), sin.contiguous(), places, out, L, half, start,
            INTERLEAVED=pairing == "interleaved", BLOCK=16, W=max(16, 1 << (half - 1).bit_length()),
        )  # fmt: skip
    return out
