"""Folders in the form of transformers: `config.json` with safetensors in one file or in several with an index."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from minillm.checks import message, require
from minillm.data.files import read_json, write_json
from minillm.data.safetensors_files import read_safetensors, write_safetensors
from minillm.models.blank import BLANK
from minillm.models.decoder import Decoder
from minillm.models.llama_weights import from_llama, llama_config, to_llama

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a folder by name, in float32 where they are bfloat16.

    Raises: FileNotFoundError if there are no weights; ValueError for a damaged file, an index that names files outside
        the folder, or tensors that are not where the index says.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE).numpy()
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"read_weights: there is neither {SINGLE} nor {INDEX} in {folder}.")
    index = read_json(folder / INDEX, "read_weights")
    places = index.get("weight_map") if isinstance(index, dict) else None
    sound = isinstance(places, dict) and all(isinstance(name, str) for name in places.values())
    require(sound, "read_weights", f"{folder / INDEX}", "an index of tensors by file", "something else")
    assert isinstance(places, dict)
    weights: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        require(Path(file).name == file, "read_weights", "a file of the index", "a name in the folder", file)
        found = read_safetensors(folder / file)
        for name in (name for name, place in places.items() if place == file):
            if name not in found.tensors:
                raise ValueError(message("read_weights", name, f"in {file}, as the index says", "absent"))
            weights[name] = found.tensors[name].numpy()
    return weights


def load_folder(folder: str | os.PathLike, context: int | None = None) -> Decoder:
    """A decoder from a folder of the LLaMA architecture; ``context`` makes it shorter.

    Raises: FileNotFoundError for a missing file, ValueError for another architecture or damaged weights.
    """
    config = folder_config(folder)
    longest = config.get("max_position_embeddings")
    shorter = context if context is None or not isinstance(longest, int) else min(context, longest)
    try:
        ours = llama_config(config, shorter)
    except KeyError as error:
        raise ValueError(message("load_folder", f"config.json in {folder}", f"one with {error}", "none")) from error
    state = from_llama(read_weights(folder), ours)  # before memory of the described size is taken
    model = Decoder(ours, BLANK)
    model.load_state_dict(state)
    return model


def folder_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of a LLaMA's `config.json`."""
    config = read_json(Path(folder) / "config.json", "load_folder")
    kind = config.get("model_type") if isinstance(config, dict) else None
    require(kind == "llama", "load_folder", f"the model_type in {folder}", "llama", str(kind))
    return config


def save_folder(model: Decoder, folder: str | os.PathLike, *, dtype: str = "F32") -> None:
    """Write a decoder so that `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it.

    Raises: ValueError for another dtype than F32, F16 or BF16.
    """
    require(dtype in ("F32", "F16", "BF16"), "save_folder", "dtype", "F32, F16 or BF16", dtype)
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(array) for name, array in to_llama(model.state_dict(), c).items()}
    if dtype == "F16":
        weights = {name: array.astype(np.float16) for name, array in weights.items()}
    dtypes = dtype if dtype == "BF16" else None
    write_safetensors(folder / SINGLE, weights, dtypes=dtypes, metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": c.vocab_size,
            "hidden_size": c.d_model,
            "intermediate_size": c.d_ff,
            "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_kv_heads,
            "head_dim": c.d_head,
            "max_position_embeddings": c.context,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
            "tie_word_embeddings": c.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        },
    )
