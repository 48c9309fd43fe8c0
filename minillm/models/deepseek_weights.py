r"""Weights of DeepSeek-V3 checkpoints in the names of Hugging Face's transformers.

ours (blocks.i of the stack)       theirs (layers.i)
attention.w_down_q, q_norm, w_up_q self_attn.q_a_proj, q_a_layernorm, q_b_proj (q_proj where queries are not compressed)
attention.w_down_kv, kv_norm       self_attn.kv_a_proj_with_mqa, kv_a_layernorm
attention.w_up_kv, w_out           self_attn.kv_b_proj, o_proj
ffn.w_router, bias                 mlp.gate, mlp.gate.e_score_correction_bias
ffn.w_in, [value; gate]            mlp.experts.j.up_proj, gate_proj; in memory gate_up_proj, [gate; value]
ffn.w_down                         mlp.experts.j.down_proj
ffn.shared_in, shared_down         mlp.shared_experts.up_proj and gate_proj, down_proj
ffn.w_in, w_down of a dense block  mlp.up_proj and gate_proj, down_proj
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.checks import require
from minillm.models.config import Config
from minillm.models.llama_rope import read_rope
from minillm.models.weight_maps import Weights

NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ATTENTION = {
    "w_down_kv": "kv_a_proj_with_mqa", "kv_norm.gain": "kv_a_layernorm", "w_up_kv": "kv_b_proj", "w_out": "o_proj"
}  # fmt: skip
COMPRESSED = {"w_down_q": "q_a_proj", "q_norm.gain": "q_a_layernorm", "w_up_q": "q_b_proj"}


def deepseek_config(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    r"""Our configuration for the contents of a DeepSeek-V3 `config.json`; a model for `Transformer`.

    Equation: `mla-deepseek` latent attention, with `mla-decoupled-rope`
    Equation: `moe-bias-balancing` a sigmoid router whose bias takes part in the choice only, with shared experts
    Raises: ValueError for what this model does not have: biases, another activation, weights that are not renormalised,
        stretched positions.
    Source: deepseek (MLA, MoE); DeepSeek-AI 2024 (V3).
    """
    longest: int = context or theirs["max_position_embeddings"]
    base, scaling = read_rope(theirs, longest)
    for what, wanted, received in (
        ("hidden_act", "silu", theirs.get("hidden_act", "silu")),
        ("attention_bias", False, bool(theirs.get("attention_bias"))),
        ("norm_topk_prob", True, bool(theirs.get("norm_topk_prob", True))),
        ("scoring_func", "sigmoid", theirs.get("scoring_func", "sigmoid")),
        ("rms_norm_eps", 1e-6, float(theirs.get("rms_norm_eps", 1e-6))),  # theirs of the latents is always that
        ("the scaling of rotary positions", None, scaling),
    ):
        require(wanted == received, "deepseek_config", what, str(wanted), str(received))
    return Config(
        vocab_size=theirs["vocab_size"],
        d_model=theirs["hidden_size"],
        n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"],
        d_ff=theirs["moe_intermediate_size"],
        context=longest,
        tied=bool(theirs.get("tie_word_embeddings")),
        rope_base=base,
        rope_pairing="interleaved" if theirs.get("rope_interleave", True) else "half",
        norm_eps=1e-6,
        head_width=theirs["qk_nope_head_dim"],
        attention="latent",
        d_latent=theirs["kv_lora_rank"],
        d_latent_q=theirs.get("q_lora_rank"),
        d_rotary=theirs["qk_rope_head_dim"],
        d_value=theirs["v_head_dim"],
        ffn="experts",
        router="sigmoid",
        n_experts=theirs["n_routed_experts"],
        experts_per_token=theirs["num_experts_per_tok"],
        n_shared_experts=theirs.get("n_shared_experts") or 0,
        n_expert_groups=theirs.get("n_group") or 1,
        expert_groups_per_token=theirs.get("topk_group") or 1,
        expert_scale=float(theirs.get("routed_scaling_factor", 1.0)),
        n_dense_layers=min(theirs.get("first_k_dense_replace", 0), theirs["num_hidden_layers"]),
        d_ff_dense=theirs["intermediate_size"],
    )


def from_deepseek(weights: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our `state_dict` from theirs, in the names of memory or of files.

    The blocks that predict further tokens, behind the last of ``n_layers``, are left out, as transformers does.

    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    further = f"model.layers.{config.n_layers}."
    given = Weights("from_deepseek", {k: v for k, v in weights.items() if not k.startswith(further)})
    state = {
        "embedding.weight": given.take("model.embed_tokens.weight"),
        "stack.final_norm.gain": given.take("model.norm.weight"),
    }
    if config.tied:
        given.left.pop("lm_head.weight", None)
    else:
        state["head.weight"] = given.take("lm_head.weight")
    queries = {"w_up_q": "q_proj"} if config.d_latent_q is None else COMPRESSED
    for i in range(config.n_layers):
        ours, theirs = f"stack.blocks.{i}", f"model.layers.{i}"
        for name, their_name in NORMS.items():
            state[f"{ours}.{name}.gain"] = given.take(f"{theirs}.{their_name}.weight")
        for name, their_name in {**queries, **ATTENTION}.items():
            state[f"{ours}.attention.{name}"] = given.take(f"{theirs}.self_attn.{their_name}.weight")
        made = _dense if i < config.n_dense_layers else _experts
        state |= {f"{ours}.ffn.{name}": array for name, array in made(given, f"{theirs}.mlp", config).items()}
    given.done()
    return state


def _gated(given: Weights, where: str) -> tuple[np.ndarray, np.ndarray]:
    """[value; gate] of one network, and its way down."""
    joint = np.concatenate([given.take(f"{where}.{name}_proj.weight") for name in ("up", "gate")])
    return joint, given.take(f"{where}.down_proj.weight")


def _dense(given: Weights, where: str, config: Config) -> dict[str, np.ndarray]:
    w_in, w_down = _gated(given, where)
    return {"w_in": w_in, "w_down": w_down}


def _experts(given: Weights, where: str, config: Config) -> dict[str, np.ndarray]:
    state = {
        "w_router": given.take(f"{where}.gate.weight"),
        "bias": given.take(f"{where}.gate.e_score_correction_bias"),
    }
    if f"{where}.experts.gate_up_proj" in given.left:
        gate, value = np.split(given.take(f"{where}.experts.gate_up_proj"), 2, axis=1)
        state["w_in"] = np.concatenate([value, gate], axis=1)
        state["w_down"] = given.take(f"{where}.experts.down_proj")
    else:
        pairs = [_gated(given, f"{where}.experts.{j}") for j in range(config.n_experts)]
        state["w_in"], state["w_down"] = np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
    if config.n_shared_experts:
        state["shared_in"], state["shared_down"] = _gated(given, f"{where}.shared_experts")
    return state
