r"""Predicting more than the next token: targets, the module's input, and the losses."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor, as_tensor, cat
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.frozen import frozen
from minillm.functional.linear import check_ids, linear
from minillm.functional.losses import cross_entropy
from minillm.functional.norms import rms_norm

IGNORED = -100


def future_targets(ids: Any, i: int, ignore_index: int = IGNORED) -> Int[np.ndarray, "B L"]:
    r"""The token i places later at every position; the last i positions have none.

    Equation: `mtp-loss` targets $x_{t+i}$ (parallel head i), $x_{t+i+1}$ (module i); loss mask trimmed
    Shapes: ids (B, L) -> (B, L), ``ignore_index`` where the text has ended
    Raises: TypeError if ids are not integers, ValueError unless they are (B, L) and i is in 1..L-1.
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    """
    ids = frozen(ids)
    require(ids.dtype.kind in "iu", "future_targets", "the ids", "integers", ids, error=TypeError)
    require(ids.ndim == 2, "future_targets", "the ids", "of shape (B, L)", ids)
    L = ids.shape[1]
    fits = isinstance(i, int | np.integer) and 1 <= i < L
    require(fits, "future_targets", "i", f"an integer in 1..{L - 1}, or no position has a target", i)
    targets = np.full(ids.shape, ignore_index, np.int64)
    targets[:, :-i] = ids[:, i:]
    return targets


def _example_heads(rng):
    n, B, L, V = [(1, 2, 4, 3), (2, 1, 3, 5), (3, 2, 4, 4)][rng.integers(3)]
    return (rng.normal(size=(B, n, L, V)), rng.integers(V, size=(B, L))), {}


@written("parallel_heads_loss", example=_example_heads)
def parallel_heads_loss(logits: Float[Tensor, "B n L V"], ids: Int[np.ndarray, "B L"]) -> Float[Tensor, ""]:
    r"""The loss of n heads that read one stream and look 1, ..., n tokens ahead.

    Equation: `mtp-parallel-heads` $-\sum_{i=1}^n\log p(x_{t+i}\mid x_{\le t})$, the mean over the positions that have a target
    Shapes: logits (B, n, L, V), ids (B, L) -> scalar; n = 1 is the ordinary loss
    Raises: IndexError for ids outside [0, V), ValueError if shapes do not match or n >= L.
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    """
    require(logits.ndim == 4, "parallel_heads_loss", "the logits", "of shape (B, n, L, V)", logits)
    ids = check_ids("parallel_heads_loss", ids, logits.shape[-1])
    B, n, L, _ = logits.shape
    require(ids.shape == (B, L), "parallel_heads_loss", "the ids", f"of shape {(B, L)}", ids)
    require(n > 0, "parallel_heads_loss", "the logits", "of at least one head", logits)
    losses = [cross_entropy(logits[:, i - 1], future_targets(ids, i), ignore_index=IGNORED) for i in range(1, n + 1)]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def _example_input(rng):
    B, L, d = [(2, 3, 4), (1, 1, 2)][rng.integers(2)]
    h, e = rng.normal(size=(B, L, d)), rng.normal(size=(B, L, d))
    return (h, e, rng.normal(size=d), rng.normal(size=d), rng.normal(size=(d, 2 * d))), {}


@written("mtp_module_input", example=_example_input)
def mtp_module_input(
    h: Float[Tensor, "B L d"],
    e: Float[Tensor, "B L d"],
    g_h: Float[Tensor, " d"],
    g_e: Float[Tensor, " d"],
    w: Float[Tensor, "d two_d"],
    eps: float = 1e-6,
) -> Float[Tensor, "B L d"]:
    r"""What a module of DeepSeek-V3 reads: the stream so far, and the embedding of the token that comes i later.

    Equation: `mtp-sequential-module` $\mathbf h'^{\,i}_t=\mathbf W_i[\mathrm{RMSNorm}(\mathbf h^{i-1}_t);\mathrm{RMSNorm}(\mathrm{Emb}(x_{t+i}))]$
    Shapes: h, e (B, L - i, d_model), gains (d_model,), w (d_model, 2 d_model) -> (B, L - i, d_model)
    Raises: ValueError if the shapes do not match.
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """
    require(h.shape == e.shape, "mtp_module_input", "the embeddings", f"of the stream's shape {h.shape}", e)
    return linear(cat([rms_norm(h, g_h, eps), rms_norm(e, g_e, eps)], -1), w)


@written(
    "mtp_loss",
    example=lambda rng: ((np.asarray(rng.normal()), rng.normal(size=rng.integers(1, 4))), {"coefficient": 0.3}),
)
def mtp_loss(main: Float[Tensor, ""], depths: Float[Tensor, " D"], coefficient: float = 0.3) -> Float[Tensor, ""]:
    r"""The next token's loss and a share of the mean of the later ones'.

    Equation: `mtp-loss` $\mathcal L=\mathcal L_{\rm main}+\frac{\lambda_{\rm mtp}}D\sum_{i=1}^D\mathcal L^i_{\rm MTP}$
    Shapes: main scalar, depths (D,) -> scalar
    Raises: ValueError for no depth at all or a negative coefficient.
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """
    depths = as_tensor(depths)
    require_positive(coefficient, "mtp_loss", "the coefficient", zero_ok=True)
    require(depths.ndim == 1 and depths.size > 0, "mtp_loss", "the depths' losses", "of shape (D,), D >= 1", depths)
    return as_tensor(main) + depths.mean() * coefficient
