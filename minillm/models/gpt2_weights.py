"""GPT-2 as transformers names it, and ours."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.checks import require, require_one_of
from minillm.models.config import Config
from minillm.models.families import gpt_config
from minillm.models.weight_maps import Weights

NORMS = {"attention_norm": "ln_1", "ffn_norm": "ln_2"}
MAPS = {"attention.{}_out": "attn.c_proj", "ffn.{}_in": "mlp.c_fc", "ffn.{}_down": "mlp.c_proj"}


ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
WANTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def gpt2_config(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    """Our configuration from theirs (the contents of a config.json); ``context`` makes it shorter.

    Raises: ValueError for what this model does not have: a head of its own, scores scaled otherwise, cross-attention.
    """
    activation = theirs.get("activation_function", "gelu_new")
    require_one_of(activation, ACTIVATIONS, "gpt2_config", "activation_function")
    for name, wanted in WANTED.items():
        require(theirs.get(name, wanted) == wanted, "gpt2_config", name, str(wanted), str(theirs.get(name)))
    return gpt_config(
        theirs["vocab_size"],
        d_model=theirs["n_embd"],
        n_layers=theirs["n_layer"],
        n_heads=theirs["n_head"],
        d_ff=theirs.get("n_inner") or 4 * theirs["n_embd"],
        context=context or theirs["n_positions"],
        norm_eps=float(theirs.get("layer_norm_epsilon", 1e-5)),
        ffn=ACTIVATIONS[activation],
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
        for name, their_name in MAPS.items():
            state[ours + name.format("w")] = given.take(f"{theirs}{their_name}.weight").T
            state[ours + name.format("b")] = given.take(f"{theirs}{their_name}.bias")
    state["stack.final_norm.gain"], state["stack.final_norm.shift"] = given.take("ln_f.weight"), given.take("ln_f.bias")
    given.done()
    return state


def is_gpt2(config: Config) -> bool:
    """Whether `to_gpt2` can write a model of this configuration."""
    sizes = {name: getattr(config, name) for name in ("d_model", "n_layers", "n_heads", "context", "d_ff", "norm_eps")}
    kinds = {"init_std": config.init_std, "ffn": config.ffn}
    return config.ffn in ACTIVATIONS.values() and config == gpt_config(config.vocab_size, **sizes, **kinds)


def to_gpt2(state: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Their names and matrices from our `Transformer.state_dict`."""
    weights = {"transformer.wte.weight": state["embedding.weight"]}
    weights["transformer.wpe.weight"] = state["stack.positions.weight"]
    for i in range(config.n_layers):
        ours, theirs = f"stack.blocks.{i}.", f"transformer.h.{i}."
        for our_norm, their_norm in NORMS.items():
            weights[f"{theirs}{their_norm}.weight"] = state[f"{ours}{our_norm}.gain"]
            weights[f"{theirs}{their_norm}.bias"] = state[f"{ours}{our_norm}.shift"]
        joint = {kind: [state[f"{ours}attention.{kind}_{name}"] for name in "qkv"] for kind in "wb"}
        weights[f"{theirs}attn.c_attn.weight"] = np.concatenate(joint["w"]).T
        weights[f"{theirs}attn.c_attn.bias"] = np.concatenate(joint["b"])
        for name, their_name in MAPS.items():
            weights[f"{theirs}{their_name}.weight"] = state[ours + name.format("w")].T
            weights[f"{theirs}{their_name}.bias"] = state[ours + name.format("b")]
    weights["transformer.ln_f.weight"] = state["stack.final_norm.gain"]
    weights["transformer.ln_f.bias"] = state["stack.final_norm.shift"]
    return weights


def to_gpt2_config(config: Config) -> dict[str, Any]:
    """The contents of a config.json for them."""
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.ffn)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.context,
        "activation_function": activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
