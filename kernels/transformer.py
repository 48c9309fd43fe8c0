r"""minillm's decoder as a torch module: every operation but the dense matrix product and the gathering of embeddings is a
kernel of this package.

It has the names and shapes of `minillm.models.Decoder`, so both read and write the same checkpoints, and is laid out like
it: the norm of every branch is fused with the addition that precedes it.

    tokens -> embedding -> N x [ + attention(norm) , + SwiGLU(norm) ] -> norm -> head -> logits or loss

Each kernel is called in one place below (`norm`, `add_norm`, `turn`, `attend`, `gate`, `token_loss`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations.op import swiglu
from kernels.attention.op import attention
from kernels.norm.op import add_rms_norm, rms_norm
from kernels.rope.op import rope, table
from kernels.token_loss.op import cross_entropy
from minillm.checks import require
from minillm.data import IGNORE
from minillm.models import Config
from minillm.models.decoder import rotation, score_scale


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The normalised stream, (B, L, d_model)."""
    return rms_norm(x, gain, eps)


def add_norm(x: Tensor, branch: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The stream with a branch added, and its normalised copy, (B, L, d_model) each."""
    return add_rms_norm(x, branch, gain, eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Queries and keys turned by their positions, (B, heads, L, d_head)."""
    return rope(x, cos, sin, pairing=pairing)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention, (B, H, L, d_head)."""
    return attention(q, k, v, causal=True, scale=scale)


def gate(h: Tensor) -> Tensor:
    """SwiGLU of a joint projection, whose memory the backward takes: nobody else reads it."""
    return swiglu(h, reuse=True)


def token_loss(logits: Tensor, targets: Tensor, divisor: float | None) -> Tensor:
    """Summed negative log-likelihood over a divisor; the gradient takes the place of the logits."""
    return cross_entropy(logits, targets, ignore_index=IGNORE, divisor=divisor, inplace=logits.requires_grad)


class Weights(nn.Module):
    """Parameters under given names; what is done with them is written where they are used."""

    def __init__(self, device, dtype, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            fresh = torch.ones if len(shape) == 1 else torch.zeros
            self.register_parameter(name, nn.Parameter(fresh(shape, device=device, dtype=dtype)))

    def __getattr__(self, name: str) -> Tensor:
        """The parameter of that name."""
        return super().__getattr__(name)  # type: ignore[return-value]


class Block(nn.Module):
    r"""Attention and feed-forward network, each behind its norm.

    Equation: `pre-ln` $\mathbf x\leftarrow\mathbf x+F(\mathrm{RMSNorm}(\mathbf x))$ for attention, then for the FFN
    Equation: `qkv-projection` one joint map for queries, keys and values
    Equation: `mha` $\mathrm{Concat}_h(\ldots)\mathbf W_O$
    """

    def __init__(self, config: Config, device, dtype):
        super().__init__()
        d, f, width = config.d_model, config.d_ff or 0, config.n_heads * config.d_head
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.d_head, self.pairing, self.scale = config.d_head, config.rope_pairing, score_scale(config)
        joint = width + 2 * self.n_kv_heads * self.d_head
        self.attention_norm = Weights(device, dtype, gain=(d,))
        self.attention = Weights(device, dtype, w_qkv=(joint, d), w_out=(d, width))
        self.ffn_norm = Weights(device, dtype, gain=(d,))
        self.ffn = Weights(device, dtype, w_value_gate=(2 * f, d), w_down=(d, f))

    def attention_branch(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model)."""
        B, L, _ = y.shape
        heads = F.linear(y, self.attention.w_qkv).view(B, L, -1, self.d_head).transpose(1, 2)
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        q, k = turn(qk, cos, sin, self.pairing).split([self.n_heads, self.n_kv_heads], dim=1)
        context = attend(q, k, v, self.scale).transpose(1, 2).reshape(B, L, -1)  # (B, L, H d_head)
        return F.linear(context, self.attention.w_out)

    def ffn_branch(self, y: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model)."""
        return F.linear(gate(F.linear(y, self.ffn.w_value_gate)), self.ffn.w_down)


class Decoder(nn.Module):
    r"""The language model on our kernels: logits of the next token at every position, or the loss of given targets.

    Equation: `lm-head` $\mathrm{logits}=\mathbf H\mathbf W_{\rm out}$
    Equation: `weight-tying` tied: $\mathbf W_{\rm out}=\mathbf W_{\rm emb}^\top$
    Equation: `final-ln` $\mathbf h=\mathrm{RMSNorm}(\mathbf x^{(N_{\rm layer})})$ before the head
    Shapes: ids (B, L) -> logits (B, L, V); with targets (B, L): a scalar, the summed loss over ``divisor``
    Raises: ValueError for a configuration that is not a LLaMA's, ids that are not (B, L) or longer than the context.
    Source: bridging §1; Touvron et al. 2023.

    Weights begin at 0: `load_arrays` takes those of the NumPy model, or of a checkpoint's part "model".
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, device=None, dtype: torch.dtype = torch.float32):
        super().__init__()
        hint = "`minillm train` has every choice."
        require(config.is_llama, "Decoder", "the configuration", "that of a LLaMA", "other choices", hint)
        self.config = config
        V, d = config.vocab_size, config.d_model
        self.embedding = Weights(device, dtype, weight=(V, d))
        self.blocks: Any = nn.ModuleList(Block(config, device, dtype) for _ in range(config.n_layers))
        self.final_norm = Weights(device, dtype, gain=(d,))
        self.head = None if config.tied else Weights(device, dtype, weight=(V, d))
        cos, sin = table(rotation(config).angles, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None, divisor: float | None = None) -> Tensor:
        """Logits, or with targets the loss."""
        logits = F.linear(self.hidden(ids), (self.head or self.embedding).weight)  # (B, L, V)
        return logits if targets is None else token_loss(logits, targets, divisor)

    def hidden(self, ids: Tensor) -> Tensor:
        """The normalised stream that the head reads: (B, L) -> (B, L, d_model)."""
        require(ids.ndim == 2 and ids.shape[1] > 0, "Decoder", "the ids", "of shape (B, L) with L >= 1", ids)
        L, context, eps = ids.shape[1], self.config.context, self.config.norm_eps
        require(context >= L, "Decoder", "the text", f"at most {context} tokens long, the model's context", ids)
        cos, sin = self.cos[:L], self.sin[:L]
        gains = [b.attention_norm.gain for b in self.blocks] + [self.final_norm.gain]
        x = F.embedding(ids, self.embedding.weight)  # (B, L, d_model)
        y = norm(x, gains[0], eps)
        for block, following in zip(self.blocks, gains[1:]):
            x, y = add_norm(x, block.attention_branch(y, cos, sin), block.ffn_norm.gain, eps)
            x, y = add_norm(x, block.ffn_branch(y), following, eps)
        return y

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the weights of `minillm.models.Decoder.state_dict`; torch names what is missing or of another shape."""
        self.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights as `minillm.models.Decoder.load_state_dict` takes them, in float32."""
        return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in self.state_dict().items()}
