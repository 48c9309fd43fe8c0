"""Sizes and settings of `minillm train` by name, and how options change them.

A setting's name is the option's without dashes; what belongs to the model, to training and to the data is told apart by
the fields of `Config`, `TrainingConfig` and `DataSettings`.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minillm.cli.corpus import DataSettings
from minillm.models import Config
from minillm.models.families import FAMILIES, tiny_settings
from minillm.training.config import TrainingConfig

PRESETS: dict[str, dict[str, Any]] = {
    # About half a minute: to see everything work.
    "tiny": {
        "d_model": 64, "n_layers": 2, "n_heads": 4, "context": 64, "tied": True, "init_std": 0.05,
        "steps": 300, "batch_size": 16, "lr": 4e-3, "warmup_steps": 20, "validate_every": 100,
    },
    # Under ten minutes on two cores. Half a megabyte of text is soon learnt by heart: without the strong decay, or with
    # twice the steps, the held-out text gets worse again.
    "small": {
        "d_model": 128, "n_layers": 4, "n_heads": 4, "context": 256, "tied": True, "init_std": 0.05,
        "steps": 1400, "batch_size": 8, "lr": 3e-3, "warmup_steps": 100, "weight_decay": 1.0,
        "validate_every": 175, "checkpoint_every": 175,
    },
    # A language of known entropy rate, to within 2 % of it in about a minute.
    "synthetic": {
        "data": "synthetic", "d_model": 64, "n_layers": 2, "n_heads": 4, "context": 64, "tied": True, "init_std": 0.05,
        "steps": 600, "batch_size": 16, "lr": 4e-3, "warmup_steps": 20, "validate_every": 100,
    },
}  # fmt: skip

# The other families in the size of "tiny", each learning what its architecture is for.
OF_A_FAMILY = {"steps": 300, "batch_size": 16, "lr": 4e-3, "warmup_steps": 20, "validate_every": 100}
PRESETS |= {family: {**tiny_settings(family), **OF_A_FAMILY} for family in FAMILIES if family != "llama"}

MODEL, TRAINING, DATA = ({f.name for f in fields(c)} for c in (Config, TrainingConfig, DataSettings))


def preset_for(data: str) -> str:
    """The preset that goes with a kind of data when none is named."""
    return "synthetic" if data == "synthetic" else "small"


def settings_from(chosen: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """A preset with the chosen settings over it; the window that is trained on fills the context."""
    settings = {**PRESETS[preset], **chosen}
    if "warmup_steps" not in chosen:
        settings |= shortened(PRESETS[preset], settings["steps"])
    return {**settings, "n_ctx": settings["context"]}


def shortened(settings: Mapping[str, Any], steps: int) -> dict[str, int]:
    """Steps and warm-up of a run that is cut to fewer steps: the warm-up keeps its share of them."""
    share = min(1.0, max(0, steps) / settings["steps"])
    return {"steps": steps, "warmup_steps": math.ceil(settings["warmup_steps"] * share)}


def data_settings(settings: Mapping[str, Any]) -> DataSettings:
    """The part of the settings that says what is read."""
    return DataSettings(**{k: v for k, v in settings.items() if k in DATA})


def training_config(settings: Mapping[str, Any]) -> TrainingConfig:
    """The part of the settings that says how it is learnt."""
    return TrainingConfig(**{k: v for k, v in settings.items() if k in TRAINING})


def model_config(settings: Mapping[str, Any], vocab_size: int) -> Config:
    """The part of the settings that says what learns; an encoder has one more id, the mark that hides a token."""
    vocab_size += settings.get("architecture") == "encoder"
    return Config.from_dict({"vocab_size": vocab_size, **{k: v for k, v in settings.items() if k in MODEL - DATA}})


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved effective configuration, by name."""
    model = {k: v for k, v in config["model"].items() if k != "vocab_size"}
    return {**model, **config["training"], **config["data"]}
