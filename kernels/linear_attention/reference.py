"""The truth for this family: chunked linear attention of `minillm.functional`, with its feature map where that is inside.

All take and return `minillm` tensors; `kernels.evaluate` brings arrays of any dtype to the precision wanted and runs the
engine's gradient. A reader's own kernel has these signatures on torch tensors (`--impl`).
"""

from minillm.autograd import Tensor
from minillm.functional.feature_maps import elu1_features
from minillm.functional.linear_attention import linear_attention_chunked

Results = tuple[Tensor, Tensor, Tensor]


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    normaliser: Tensor | None = None,
    eps: float = 1e-6,
) -> Results:
    """phi_q, phi_k (B, H, L, d_phi), v (B, H, L, d_v), state (B, H, d_phi, d_v), normaliser (B, H, d_phi) -> o (B, H, L, d_v) and both after L."""
    return linear_attention_chunked(phi_q, phi_k, v, state, normaliser, eps=eps)


def elu1_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, normaliser: Tensor | None = None, eps: float = 1e-6
) -> Results:
    """The same of q and k before the feature map, which is ELU + 1."""
    return linear_attention_chunked(elu1_features(q), elu1_features(k), v, state, normaliser, eps=eps)
