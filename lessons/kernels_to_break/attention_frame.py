"""What stands around the attention kernels of this folder, and is right: the mask, the heads, the launch.

A kernel here gets q, k, v with as many heads each, contiguous, and a matrix KEEP that says which query sees which
key, so that its own lines are the online softmax and nothing else.
"""

import numpy as np
import torch

from kernels.attention.reference import mask

BLOCK = 16


def launched(kernel, q, k, v, key_lengths, prefix, causal, window, align, scale, softcap):
    """The output (B, H, L_q, d_v) of a kernel of this folder for one call of `attention`."""
    q, k, v = (t.detach() for t in (q, k, v))
    (B, H, L_q, d), (_, H_kv, L_k, d_v) = q.shape, v.shape
    first = None if prefix is None else prefix.cpu().numpy()
    keep = torch.from_numpy(np.array(np.broadcast_to(mask(L_q, L_k, first, causal, window, align), (B, 1, L_q, L_k))))
    if key_lengths is not None:
        there = torch.arange(L_k) < key_lengths.cpu()[:, None, None, None]  # (B, 1, 1, L_k)
        keep &= there
        padded = ~there.mT.to(q.device)  # what stands there may be anything: 0 times it must be 0
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
    keep = keep.expand(B, H, L_q, L_k).to(q.device, torch.int8).contiguous()
    k, v = (t.repeat_interleave(H // H_kv, dim=1).contiguous() for t in (k, v))
    o = torch.empty(B, H, L_q, d_v, dtype=q.dtype, device=q.device)
    if o.numel():
        widths = {"D": max(16, 1 << (d - 1).bit_length()), "DV": max(16, 1 << (d_v - 1).bit_length())}
        kernel[(B * H * -(-L_q // BLOCK),)](
            q.contiguous(), k, v, o, keep, L_q, L_k, d, d_v, d**-0.5 if scale is None else scale, softcap or 1.0,
            CAPPED=softcap is not None, BLOCK=BLOCK, **widths,
        )  # fmt: skip
    return o
