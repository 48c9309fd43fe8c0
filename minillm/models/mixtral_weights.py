r"""Weights of Mixtral checkpoints in the names of Hugging Face's transformers, and back.

ours (blocks.i of the stack)     theirs (layers.i), in memory             in files
attention.w_q, w_k, w_v, w_out   self_attn.q_proj, k_proj, v_proj, o_proj the same
ffn.w_router                     mlp.gate                                 block_sparse_moe.gate
ffn.w_in, [value; gate]          mlp.experts.gate_up_proj, [gate; value]  block_sparse_moe.experts.j.w3, .w1
ffn.w_down                       mlp.experts.down_proj                    block_sparse_moe.experts.j.w2
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minillm.checks import message, require
from minillm.models.config import Config
from minillm.models.llama_weights import llama_config

OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "stack.final_norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
INSIDE = {
    "attention_norm.gain": "input_layernorm.weight",
    "attention.w_q": "self_attn.q_proj.weight",
    "attention.w_k": "self_attn.k_proj.weight",
    "attention.w_v": "self_attn.v_proj.weight",
    "attention.w_out": "self_attn.o_proj.weight",
    "ffn_norm.gain": "post_attention_layernorm.weight",
    "ffn.w_router": "mlp.gate.weight",
    "ffn.w_in": "mlp.experts.gate_up_proj",
    "ffn.w_down": "mlp.experts.down_proj",
}


def mixtral_config(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    r"""Our configuration for the contents of a Mixtral `config.json`; a model for `Transformer`.

    Equation: `llama-config` with `moe-output` in place of the feed-forward network
    Raises: ValueError for what this model does not have, as `llama_config`.
    Source: lecture06 (MoE); Jiang et al. 2024.
    """
    base = llama_config(theirs, context)
    experts = {"n_experts": theirs["num_local_experts"], "experts_per_token": theirs["num_experts_per_tok"]}
    return replace(base, ffn="experts", window=theirs.get("sliding_window"), **experts)


def _swapped(w_in: np.ndarray) -> np.ndarray:
    """[value; gate] from [gate; value] of every expert, and back: (E, 2 d_ff, d_model)."""
    return np.concatenate(np.split(w_in, 2, axis=1)[::-1], axis=1)


def _stacked(weights: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The names in memory from those in files, one array for all experts of a layer."""
    for i in range(config.n_layers):
        old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        if f"{old}.gate.weight" not in weights:
            continue
        weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")
        names = [f"{old}.experts.{j}" for j in range(config.n_experts)]
        missing = [f"{n}.{w}.weight" for n in names for w in ("w1", "w2", "w3") if f"{n}.{w}.weight" not in weights]
        require(not missing, "from_mixtral", "the experts' weights", "complete", f"none called {missing[:1]}")
        w1, w2, w3 = ([weights.pop(f"{n}.{w}.weight") for n in names] for w in ("w1", "w2", "w3"))
        weights[f"{new}.experts.gate_up_proj"] = np.concatenate([np.stack(w1), np.stack(w3)], axis=1)
        weights[f"{new}.experts.down_proj"] = np.stack(w2)
    return weights


def from_mixtral(weights: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our `state_dict` from theirs, in the names of memory or of files.

    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    left = _stacked(dict(weights), config)
    if config.tied:
        left.pop("lm_head.weight", None)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(message("from_mixtral", "the weights", f"those of a Mixtral with {name}", "none so named"))
        return left.pop(name)

    state = {ours: take(theirs) for ours, theirs in OUTSIDE.items() if not (config.tied and ours == "head.weight")}
    for i in range(config.n_layers):
        for ours, theirs in INSIDE.items():
            array = take(f"model.layers.{i}.{theirs}")
            state[f"stack.blocks.{i}.{ours}"] = _swapped(array) if ours == "ffn.w_in" else array
    require(not left, "from_mixtral", "the weights", "those of a plain Mixtral", f"also {', '.join(sorted(left)[:3])}")
    return state


def to_mixtral(state: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Their names in memory and matrices from our `state_dict` (or from gradients under our names)."""
    weights = {theirs: state[ours] for ours, theirs in OUTSIDE.items() if ours in state}
    for i in range(config.n_layers):
        for ours, theirs in INSIDE.items():
            array = state[f"stack.blocks.{i}.{ours}"]
            weights[f"model.layers.{i}.{theirs}"] = _swapped(array) if ours == "ffn.w_in" else array
    return weights
