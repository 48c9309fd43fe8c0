"""T5 as transformers names it, and ours."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm.checks import require
from minillm.models.config import Config
from minillm.models.families import t5_config
from minillm.models.weight_maps import Weights


def t5_config_of(theirs: Mapping[str, Any], context: int = 512) -> Config:
    """Our configuration from theirs (the contents of a config.json), which knows no longest text.

    Raises: ValueError for a variant with gates, another head, or other buckets.
    """
    plain = theirs.get("feed_forward_proj", "relu") == "relu" and theirs.get("tie_word_embeddings", True)
    buckets = (theirs.get("relative_attention_num_buckets", 32), theirs.get("relative_attention_max_distance", 128))
    fits = plain and buckets == (32, 128)
    require(fits, "t5_config_of", "the configuration", "that of the first T5", "a variant")
    return t5_config(
        theirs["vocab_size"],
        d_model=theirs["d_model"],
        n_layers=theirs.get("num_decoder_layers") or theirs["num_layers"],
        n_encoder_layers=theirs["num_layers"],
        n_heads=theirs["num_heads"],
        head_width=theirs["d_kv"],
        d_ff=theirs["d_ff"],
        context=context,
        norm_eps=float(theirs.get("layer_norm_epsilon", 1e-6)),
    )


def from_t5(weights: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our `EncoderDecoder.state_dict` from theirs.

    Equation: `t5-config` RMSNorm pre-norm, relative bias in both stacks, ReLU, no biases, tied head
    Raises: ValueError for a missing name, or one that this architecture does not have.
    """
    given = Weights("from_t5", weights, ("embed_tokens.weight", "lm_head.weight"))
    state = {"embedding.weight": given.take("shared.weight")}
    n_encoder = config.n_encoder_layers or config.n_layers
    for side, n_layers in (("encoder", n_encoder), ("decoder", config.n_layers)):
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        state[f"{side}.positions.table"] = given.take(table).T
        state[f"{side}.final_norm.gain"] = given.take(f"{side}.final_layer_norm.weight")
        for i in range(n_layers):
            ours, theirs = f"{side}.blocks.{i}.", f"{side}.block.{i}.layer."
            parts = [("attention", "SelfAttention")] + ([("cross", "EncDecAttention")] if side == "decoder" else [])
            for place, (name, their_name) in enumerate(parts):
                state[f"{ours}{name}_norm.gain"] = given.take(f"{theirs}{place}.layer_norm.weight")
                for letter, our_map in zip("qkvo", ("q", "k", "v", "out"), strict=True):
                    state[f"{ours}{name}.w_{our_map}"] = given.take(f"{theirs}{place}.{their_name}.{letter}.weight")
            last = f"{theirs}{len(parts)}."
            state[f"{ours}ffn_norm.gain"] = given.take(f"{last}layer_norm.weight")
            state[f"{ours}ffn.w_in"] = given.take(f"{last}DenseReluDense.wi.weight")
            state[f"{ours}ffn.w_down"] = given.take(f"{last}DenseReluDense.wo.weight")
    given.done()
    return state
