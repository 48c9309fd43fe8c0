r"""From a checkpoint back to a model and a tokenizer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillm.checks import message, require
from minillm.data import Tokenizer, tokenizer_from_dict
from minillm.models import Config
from minillm.models.making import AnyModel, count_made, make_model
from minillm.training.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint

LONGEST_CONTEXT = 1 << 24


class Restored(NamedTuple):
    """A model as it was saved, its tokenizer if it has one, and the whole checkpoint."""

    model: AnyModel
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint
    path: Path


def load_model(path: str | os.PathLike) -> Restored:
    """Read a model from a checkpoint file, or from the newest one of a run's folder.

    Raises: FileNotFoundError if there is none; ValueError if the file is damaged or its tensors are not those of the
        model that it describes.
    """
    path = latest_checkpoint(path)
    checkpoint = read_checkpoint(path)
    config = model_config(checkpoint.record, path)
    weights = checkpoint.part("model")
    check_shapes(weights, config, path)  # before a model of that size is made
    model = make_model(config, np.random.default_rng(0))
    model.load_state_dict(weights)
    saved = checkpoint.record.get("tokenizer")
    return Restored(model, None if saved is None else tokenizer_from_dict(saved), checkpoint, path)


def model_config(record: Mapping[str, Any], path: str | os.PathLike) -> Config:
    """The model's configuration from a checkpoint's record."""
    try:
        config = Config.from_dict(record["config"]["model"])
    except (KeyError, TypeError) as error:
        received = f"one that does not describe its model ({error})"
        raise ValueError(message("load_model", f"the file {path}", "a checkpoint with its model", received)) from error
    require(
        config.context <= LONGEST_CONTEXT, "load_model", "the context", f"at most {LONGEST_CONTEXT}", config.context
    )
    return config


def check_shapes(weights: Mapping[str, np.ndarray], config: Config, path: str | os.PathLike) -> None:
    """Raise ValueError unless the arrays may be those of a model of this configuration: array by array for a `Decoder`,
    by how many numbers there are for others, whose names and shapes `load_state_dict` then compares."""
    if not config.is_llama:
        received, wanted = sum(array.size for array in weights.values()), count_made(config)
        what = f"the numbers in {path}"
        require(received == wanted, "load_model", what, f"{wanted}, as its configuration says", str(received))
        return
    blocks = sum(name.endswith("attention.w_qkv") for name in weights)
    require(blocks == config.n_layers, "load_model", f"the layers in {path}", str(config.n_layers), str(blocks))
    wanted = decoder_shapes(config)
    for name in sorted(wanted.keys() | weights.keys()):
        received = str(weights[name].shape) if name in weights else "none"
        expected = str(wanted[name]) if name in wanted else "absent"
        what = f"{name} in {path}"
        require(received == expected, "load_model", what, f"of shape {expected}, as its configuration says", received)


def decoder_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder's parameters, without making it."""
    d, f, V = config.d_model, config.d_ff or 0, config.vocab_size
    width = (config.n_heads + 2 * (config.n_kv_heads or config.n_heads)) * config.d_head
    block = {
        "attention_norm.gain": (d,),
        "attention.w_qkv": (width, d),
        "attention.w_out": (d, d),
        "ffn_norm.gain": (d,),
        "ffn.w_value_gate": (2 * f, d),
        "ffn.w_down": (d, f),
    }
    blocks = {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()}
    outside = {"embedding.weight": (V, d), "final_norm.gain": (d,), **({} if config.tied else {"head.weight": (V, d)})}
    return {**outside, **blocks}
