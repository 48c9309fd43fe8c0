r"""Weights of Mistral checkpoints: those of LLaMA, for attention that may see a window of tokens only.

Without a window, and with heads as wide as d_model / H, the model is a LLaMA and becomes a `Decoder`. Otherwise it is a
`Transformer`, which holds the same matrices in other groups:

    Decoder                          Transformer
    blocks.i.attention.w_qkv         stack.blocks.i.attention.w_q, w_k, w_v
    blocks.i.ffn.w_value_gate        stack.blocks.i.ffn.w_in
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minillm.models.config import Config
from minillm.models.decoder import Decoder
from minillm.models.llama_weights import from_llama, llama_config
from minillm.models.transformer import Transformer


def mistral_config(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    r"""Our configuration for the contents of a Mistral `config.json`.

    Equation: `llama-config` with `sparse-attention-window` $i-w<j\le i$ and heads of any width
    Raises: ValueError for what this model does not have, as `llama_config`.
    Source: Jiang et al. 2023.
    """
    plain = theirs["hidden_size"] // theirs["num_attention_heads"]
    width = theirs.get("head_dim") or plain
    base = llama_config({**theirs, "head_dim": plain}, context)
    return replace(base, window=theirs.get("sliding_window"), head_width=None if width == plain else width)


def mistral_class(weights: Mapping[str, np.ndarray], config: Config) -> type:
    """The class that takes this configuration."""
    return Decoder if config.is_llama else Transformer


def from_mistral(weights: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our `state_dict` from theirs, for the class of `mistral_class`.

    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    joint = from_llama(weights, config)
    if config.is_llama:
        return joint
    state = {}
    for name, array in joint.items():
        place = name if name in ("embedding.weight", "head.weight") else f"stack.{name}"
        if name.endswith("w_qkv"):
            queries, kv = config.n_heads * config.d_head, (config.n_kv_heads or config.n_heads) * config.d_head
            parts = np.split(array, [queries, queries + kv])
            state |= {place.replace("w_qkv", f"w_{part}"): rows for part, rows in zip("qkv", parts, strict=True)}
        else:
            state[place.replace("w_value_gate", "w_in")] = array
    return state
