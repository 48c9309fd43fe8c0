"""BERT with its masked-token head as transformers names it, and ours."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.models.config import Config
from minillm.models.families import bert_config
from minillm.models.weight_maps import Weights

MAPS = {
    "attention.{}_q": "attention.self.query",
    "attention.{}_k": "attention.self.key",
    "attention.{}_v": "attention.self.value",
    "attention.{}_out": "attention.output.dense",
    "ffn.{}_in": "intermediate.dense",
    "ffn.{}_down": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}


def bert_config_of(theirs: Mapping[str, Any]) -> Config:
    """Our configuration from theirs (the contents of a config.json)."""
    return bert_config(
        theirs["vocab_size"],
        d_model=theirs["hidden_size"],
        n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"],
        d_ff=theirs["intermediate_size"],
        context=theirs["max_position_embeddings"],
        n_segments=theirs.get("type_vocab_size", 2),
        norm_eps=float(theirs.get("layer_norm_eps", 1e-12)),
    )


def from_bert(weights: Mapping[str, np.ndarray], config: Config, head: bool = True) -> dict[str, np.ndarray]:
    """Our state_dict from theirs: of `MaskedLanguageModel`, or without ``head`` of the `Transformer` alone.

    Equation: `bert-config` Post-LN, GELU, learned positions, segment ids
    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    plain = {name.removeprefix("bert."): array for name, array in weights.items()}
    ignored = ("position_ids", "predictions.decoder.weight", "predictions.decoder.bias")
    given = Weights("from_bert", {k: v for k, v in plain.items() if not k.startswith("pooler.")}, ignored)
    state = {
        "embedding.weight": given.take("embeddings.word_embeddings.weight"),
        "stack.positions.weight": given.take("embeddings.position_embeddings.weight"),
        "stack.segments.weight": given.take("embeddings.token_type_embeddings.weight"),
        "stack.embedding_norm.gain": given.take("embeddings.LayerNorm.weight"),
        "stack.embedding_norm.shift": given.take("embeddings.LayerNorm.bias"),
    }
    for i in range(config.n_layers):
        ours, theirs = f"stack.blocks.{i}.", f"encoder.layer.{i}."
        for our_norm, their_norm in NORMS.items():
            state[f"{ours}{our_norm}.gain"] = given.take(f"{theirs}{their_norm}.weight")
            state[f"{ours}{our_norm}.shift"] = given.take(f"{theirs}{their_norm}.bias")
        for our_map, their_map in MAPS.items():
            state[ours + our_map.format("w")] = given.take(f"{theirs}{their_map}.weight")
            state[ours + our_map.format("b")] = given.take(f"{theirs}{their_map}.bias")
    if head:
        state = {f"encoder.{name}": array for name, array in state.items()}
        transform = "cls.predictions.transform."
        state["w_transform"] = given.take(f"{transform}dense.weight")
        state["b_transform"] = given.take(f"{transform}dense.bias")
        state["norm.gain"] = given.take(f"{transform}LayerNorm.weight")
        state["norm.shift"] = given.take(f"{transform}LayerNorm.bias")
        state["shift"] = given.take("cls.predictions.bias")
    given.done()
    return state
