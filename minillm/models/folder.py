"""Folders in the form of transformers: `config.json` with safetensors in one file or in several with an index."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from minillm.checks import message, require
from minillm.data.files import read_json, write_json
from minillm.data.safetensors_files import read_safetensors, write_safetensors
from minillm.models.config import Config
from minillm.models.decoder import Decoder
from minillm.models.foreign import LoadedModel, model_type, our_config, our_model
from minillm.models.gpt2_weights import is_gpt2, to_gpt2, to_gpt2_config
from minillm.models.llama_rope import write_rope
from minillm.models.llama_weights import to_llama
from minillm.models.transformer import Transformer

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


def load_folder(folder: str | os.PathLike, context: int | None = None) -> LoadedModel:
    """A model from a folder: LLaMA, Mistral, Mixtral, DeepSeek-V3, GPT-2, BERT, RoBERTa or T5.

    What is made depends on the model type: a `Decoder` for LLaMA and for a Mistral that sees every token; a `Transformer`
    for other Mistrals, Mixtral, DeepSeek-V3 and GPT-2, and for an encoder without its masked-token head; a
    `MaskedLanguageModel` for one with it; an `EncoderDecoder` for T5. ``context`` makes a model shorter; only dynamic
    rotary positions and T5 can be made longer than their configuration says.

    Raises: FileNotFoundError for a missing file, ValueError for another architecture, a variant of one that we do not
        have, or damaged weights.
    """
    theirs = folder_config(folder)
    config = our_config(theirs, str(folder), context)
    return our_model(theirs["model_type"], config, read_weights(folder))


def folder_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of a folder's `config.json`, of a model type that we have."""
    theirs = read_json(Path(folder) / "config.json", "load_folder")
    model_type(theirs, str(folder))
    return theirs


def save_folder(model: Decoder | Transformer, folder: str | os.PathLike, *, dtype: str = "F32") -> None:
    """Write a LLaMA or a GPT-2 so that `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it.

    Raises: ValueError for another dtype than F32, F16 or BF16, another family, or positions that they cannot turn.
    """
    require(dtype in ("F32", "F16", "BF16"), "save_folder", "dtype", "F32, F16 or BF16", dtype)
    c = model.config
    gpt2 = isinstance(model, Transformer) and is_gpt2(c)
    wanted, hint = "a Decoder (LLaMA) or a Transformer with the choices of GPT-2", "Others have no exporter."
    received = f"a {type(model).__name__} with other choices"
    require(gpt2 or isinstance(model, Decoder), "save_folder", "the model", wanted, received, hint)
    theirs = to_gpt2_config(c) if gpt2 else to_llama_config(c)
    state = to_gpt2(model.state_dict(), c) if gpt2 else to_llama(model.state_dict(), c)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(array) for name, array in state.items()}
    if dtype == "F16":
        weights = {name: array.astype(np.float16) for name, array in weights.items()}
    dtypes = dtype if dtype == "BF16" else None
    write_safetensors(folder / SINGLE, weights, dtypes=dtypes, metadata={"format": "pt"})
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    write_json(folder / "config.json", {**theirs, "torch_dtype": names[dtype]})


def to_llama_config(c: Config) -> dict[str, Any]:
    """The contents of a `config.json` for a decoder of ours."""
    return {
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
        "rope_parameters": write_rope(c),
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
