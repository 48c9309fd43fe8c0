"""GPT-2 as transformers names it, and ours."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.models.config import Config
from minillm.models.families import gpt_config
from minillm.models.weight_maps import Weights

NORMS = {"attention_norm": "ln_1", "ffn_norm": "ln_2"}


def gpt2_config(theirs: Mapping[str, Any]) -> Config:
    """Our configuration from theirs (the contents of a config.json)."""
    return gpt_config(
        theirs["vocab_size"],
        d_model=theirs["n_embd"],
        n_layers=theirs["n_layer"],
        n_heads=theirs["n_head"],
        d_ff=theirs.get("n_inner") or 4 * theirs["n_embd"],
        context=theirs["n_positions"],
        norm_eps=float(theirs.get("layer_norm_epsilon", 1e-5)),
    )


def from_gpt2(weights: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our `Transformer.state_dict` from theirs; their maps are stored (d_in, d_out), ours (d_out, d_in).

    Equation: `gpt-config` LayerNorm pre-norm, learned positions, GELU, tied head
    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    plain = {name.removeprefix("transformer."): array for name, array in weights.items()}
    given = Weights("from_gpt2", plain, (".attn.bias", ".attn.masked_bias", "lm_head.weight"))
    state = {"embedding.weight": given.take("wte.weight"), "stack.positions.weight": given.take("wpe.weight")}
    for i in range(config.n_layers):
        ours, theirs = f"stack.blocks.{i}.", f"h.{i}."
        for our_norm, their_norm in NORMS.items():
            state[f"{ours}{our_norm}.gain"] = given.take(f"{theirs}{their_norm}.weight")
            state[f"{ours}{our_norm}.shift"] = given.take(f"{theirs}{their_norm}.bias")
        joint = (
            np.split(given.take(f"{theirs}attn.c_attn.weight").T, 3),
            np.split(given.take(f"{theirs}attn.c_attn.bias"), 3),
        )
        for name, weight, shift in zip("qkv", *joint, strict=True):
            state[f"{ours}attention.w_{name}"], state[f"{ours}attention.b_{name}"] = weight, shift
        for name, their_name in (
            ("attention.{}_out", "attn.c_proj"),
            ("ffn.{}_in", "mlp.c_fc"),
            ("ffn.{}_down", "mlp.c_proj"),
        ):
            state[ours + name.format("w")] = given.take(f"{theirs}{their_name}.weight").T
            state[ours + name.format("b")] = given.take(f"{theirs}{their_name}.bias")
    state["stack.final_norm.gain"], state["stack.final_norm.shift"] = given.take("ln_f.weight"), given.take("ln_f.bias")
    given.done()
    return state
