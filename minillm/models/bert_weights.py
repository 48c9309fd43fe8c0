"""BERT with its masked-token head as transformers names it, and ours."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.checks import require, require_one_of
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


ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
WANTED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
}
ROBERTA_HEAD = {"dense": "transform.dense", "layer_norm": "transform.LayerNorm"}
PADDING_ROWS = 2  # of RoBERTa's table of positions, which begins behind its padding id, 1


def bert_config_of(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    """Our configuration from theirs (the contents of a config.json); ``context`` makes it shorter.

    Raises: ValueError for what this model does not have: a decoder, a head of its own, relative positions.
    """
    activation = theirs.get("hidden_act", "gelu")
    require_one_of(activation, ACTIVATIONS, "bert_config_of", "hidden_act")
    for name, wanted in WANTED.items():
        require(theirs.get(name, wanted) == wanted, "bert_config_of", name, str(wanted), str(theirs.get(name)))
    return bert_config(
        theirs["vocab_size"],
        d_model=theirs["hidden_size"],
        n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"],
        d_ff=theirs["intermediate_size"],
        context=context or theirs["max_position_embeddings"],
        n_segments=theirs.get("type_vocab_size", 2),
        norm_eps=float(theirs.get("layer_norm_eps", 1e-12)),
        ffn=ACTIVATIONS[activation],
    )


def roberta_config_of(theirs: Mapping[str, Any], context: int | None = None) -> Config:
    """The same for RoBERTa: BERT, but for two rows of its table of positions that no token uses."""
    padding = theirs.get("pad_token_id", 1)
    require(padding == PADDING_ROWS - 1, "roberta_config_of", "pad_token_id", str(PADDING_ROWS - 1), str(padding))
    longest = theirs["max_position_embeddings"] - PADDING_ROWS
    return bert_config_of(theirs, longest if context is None else min(context, longest))


def bert_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """RoBERTa's weights under BERT's names, without the rows of padding."""
    renamed = {}
    for name, array in weights.items():
        name = name.removeprefix("roberta.")
        if name.startswith("lm_head."):
            part, _, last = name.removeprefix("lm_head.").rpartition(".")
            name = "cls.predictions." + ".".join(filter(None, (ROBERTA_HEAD.get(part, part), last)))
        renamed[name] = array[PADDING_ROWS:] if name == "embeddings.position_embeddings.weight" else array
    return renamed


def has_masked_head(weights: Mapping[str, np.ndarray]) -> bool:
    """Whether the head that names hidden tokens is among the weights."""
    return "cls.predictions.bias" in weights


def from_bert(weights: Mapping[str, np.ndarray], config: Config, head: bool = True) -> dict[str, np.ndarray]:
    """Our state_dict from theirs: of `MaskedLanguageModel`, or without ``head`` of the `Transformer` alone.

    Equation: `bert-config` Post-LN, GELU, learned positions, segment ids
    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    plain = {name.removeprefix("bert."): array for name, array in weights.items()}
    newer = {".gamma": ".weight", ".beta": ".bias"}  # what the norms of the first checkpoints are called
    for old, new in newer.items():
        plain = {k.removesuffix(old) + new if k.endswith(old) else k: v for k, v in plain.items()}
    ignored = ("position_ids", "predictions.decoder.weight", "predictions.decoder.bias")
    other = ("pooler.", "cls.seq_relationship.")  # heads of another task
    given = Weights("from_bert", {k: v for k, v in plain.items() if not k.startswith(other)}, ignored)
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
