r"""Weights of LLaMA checkpoints in the names of Hugging Face's transformers, and back.

The two sides hold the same matrices, (d_out, d_in), in other groups:

    ours                             theirs
    blocks.i.attention.w_qkv         q_proj, k_proj, v_proj, one above the other
    blocks.i.ffn.w_value_gate        up_proj, gate_proj, one above the other

Their rotary positions turn the two halves of a head against each other: rope_pairing "half". A decoder that turns
neighbours instead is the same function with the rows of its query and key maps in another order (:func:`halves`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.checks import message, require
from minillm.models.config import Config
from minillm.models.decoder import Decoder
from minillm.models.llama_rope import read_rope

PLAIN = {  # within a layer: ours -> theirs, matrix for matrix
    "attention_norm.gain": "input_layernorm.weight",
    "attention.w_out": "self_attn.o_proj.weight",
    "ffn_norm.gain": "post_attention_layernorm.weight",
    "ffn.w_down": "mlp.down_proj.weight",
}
JOINT = {  # within a layer: ours -> theirs, from top to bottom
    "attention.w_qkv": [f"self_attn.{name}_proj.weight" for name in "qkv"],
    "ffn.w_value_gate": ["mlp.up_proj.weight", "mlp.gate_proj.weight"],
}
OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def llama_config(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    r"""Our configuration for the contents of a LLaMA `config.json`.

    Equation: `llama-config` RMSNorm, SwiGLU, RoPE, no biases
    Raises: ValueError for what this decoder does not have: biases, another activation, another kind of scaled rotary
        positions than those of `minillm.models.llama_rope`.
    Source: lecture06 (LLaMA table); Touvron et al. 2023.
    """
    head = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    for what, wanted, received in (
        ("hidden_act", "silu", theirs.get("hidden_act", "silu")),
        ("attention_bias", False, bool(theirs.get("attention_bias"))),
        ("mlp_bias", False, bool(theirs.get("mlp_bias"))),
        ("head_dim * num_attention_heads", theirs["hidden_size"], head * theirs["num_attention_heads"]),
    ):
        require(wanted == received, "llama_config", what, str(wanted), str(received))
    longest: int = context or theirs["max_position_embeddings"]
    base, scaling = read_rope(theirs, longest)
    return Config(
        vocab_size=theirs["vocab_size"],
        d_model=theirs["hidden_size"],
        n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"],
        n_kv_heads=theirs.get("num_key_value_heads"),
        d_ff=theirs["intermediate_size"],
        context=longest,
        tied=bool(theirs.get("tie_word_embeddings")),
        rope_base=base,
        rope_scaling=scaling,
        rope_pairing="half",
        norm_eps=float(theirs.get("rms_norm_eps", 1e-6)),
    )


def neighbours(rows: np.ndarray, d_head: int) -> np.ndarray:
    """Rows of heads from the order of halves, pairs (i, i + d_head / 2), to that of neighbours, (2 i, 2 i + 1)."""
    heads = rows.reshape(-1, 2, d_head // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def halves(rows: np.ndarray, d_head: int) -> np.ndarray:
    """The way back: rows of heads from the order of neighbours to that of halves."""
    heads = rows.reshape(-1, d_head // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _turned(part: str) -> bool:
    return part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def from_llama(weights: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our `state_dict` from theirs.

    Shapes: theirs as in transformers -> joint matrices ((H + 2 H_kv) d_head, d_model) and (2 d_ff, d_model)
    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    left = {name: array for name, array in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        left.pop("lm_head.weight", None)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(message("from_llama", "the weights", f"those of a LLaMA with {name}", "none of that name"))
        return left.pop(name)

    state = {ours: take(theirs) for ours, theirs in OUTSIDE.items() if not (config.tied and ours == "head.weight")}
    for i in range(config.n_layers):
        for ours, theirs in PLAIN.items():
            state[f"blocks.{i}.{ours}"] = take(f"model.layers.{i}.{theirs}")
        for ours, parts in JOINT.items():
            found = {part: take(f"model.layers.{i}.{part}") for part in parts}
            if config.rope_pairing == "interleaved":
                found |= {part: neighbours(rows, config.d_head) for part, rows in found.items() if _turned(part)}
            state[f"blocks.{i}.{ours}"] = np.concatenate(list(found.values()))
    require(not left, "from_llama", "the weights", "those of a plain LLaMA", f"also {', '.join(sorted(left)[:3])}")
    return state


def to_llama(state: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Their names and matrices from our `state_dict` (or from gradients under our names)."""
    d_head, d_ff = config.d_head, config.d_ff or 0
    kv = (config.n_kv_heads or config.n_heads) * d_head
    edges = {"attention.w_qkv": [config.d_model, config.d_model + kv], "ffn.w_value_gate": [d_ff]}
    weights = {theirs: state[ours] for ours, theirs in OUTSIDE.items() if ours in state}
    for i in range(config.n_layers):
        for ours, theirs in PLAIN.items():
            weights[f"model.layers.{i}.{theirs}"] = state[f"blocks.{i}.{ours}"]
        for ours, parts in JOINT.items():
            pieces = np.split(state[f"blocks.{i}.{ours}"], edges[ours])
            for part, piece in zip(parts, pieces, strict=True):
                turned = config.rope_pairing == "interleaved" and _turned(part)
                weights[f"model.layers.{i}.{part}"] = halves(piece, config.d_head) if turned else piece
    return weights


def load_llama(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], context: int | None = None) -> Decoder:
    """A decoder with the weights of a LLaMA checkpoint.

    Raises: ValueError if the configuration or the weights are of something else.
    """
    ours = llama_config(config, context)
    model = Decoder(ours, np.random.default_rng(0))
    model.load_state_dict(from_llama(weights, ours))
    return model
