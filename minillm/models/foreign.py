"""What a folder in the form of transformers may hold: for every model type, how it becomes a model of ours."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from minillm.checks import message, require_positive
from minillm.models.bert_weights import bert_config_of, bert_names, from_bert, has_masked_head, roberta_config_of
from minillm.models.blank import BLANK
from minillm.models.config import Config
from minillm.models.decoder import Decoder
from minillm.models.deepseek_weights import deepseek_config, from_deepseek
from minillm.models.encoder_decoder import EncoderDecoder
from minillm.models.gpt2_weights import from_gpt2, gpt2_config
from minillm.models.heads import MaskedLanguageModel
from minillm.models.llama_rope import rope_kind
from minillm.models.llama_weights import from_llama, llama_config
from minillm.models.mistral_weights import from_mistral, mistral_class, mistral_config
from minillm.models.mixtral_weights import from_mixtral, mixtral_config
from minillm.models.t5_weights import from_t5, t5_config_of
from minillm.models.transformer import Transformer

Arrays = Mapping[str, np.ndarray]
State = dict[str, np.ndarray]
LoadedModel = Decoder | Transformer | EncoderDecoder | MaskedLanguageModel


class Foreign(NamedTuple):
    """A model type: our configuration, our arrays by name, and the class that takes them.

    ``longest`` names the entry of their configuration that says how long a text may be.
    """

    config: Callable[[Mapping[str, Any], int | None], Config]
    state: Callable[[Arrays, Config], State]
    make: Callable[[Arrays, Config], type]
    longest: str | None


def _shorter(state: State, config: Config) -> State:
    """The rows of learnt positions that a shorter context keeps."""
    name = next((n for n in state if n.endswith("stack.positions.weight")), None)
    return state if name is None else {**state, name: state[name][: config.context]}


def _bert_state(weights: Arrays, config: Config) -> State:
    return _shorter(from_bert(weights, config, head=has_masked_head(weights)), config)


def _bert_class(weights: Arrays, config: Config) -> type:
    return MaskedLanguageModel if has_masked_head(weights) else Transformer


FOREIGN = {
    "llama": Foreign(llama_config, from_llama, lambda *_: Decoder, "max_position_embeddings"),
    "mistral": Foreign(mistral_config, from_mistral, mistral_class, "max_position_embeddings"),
    "mixtral": Foreign(mixtral_config, from_mixtral, lambda *_: Transformer, "max_position_embeddings"),
    "deepseek_v3": Foreign(deepseek_config, from_deepseek, lambda *_: Transformer, "max_position_embeddings"),
    "gpt2": Foreign(gpt2_config, lambda w, c: _shorter(from_gpt2(w, c), c), lambda *_: Transformer, "n_positions"),
    "bert": Foreign(bert_config_of, _bert_state, _bert_class, "max_position_embeddings"),
    "roberta": Foreign(
        roberta_config_of,
        lambda w, c: _bert_state(bert_names(w), c),
        lambda w, c: _bert_class(bert_names(w), c),
        "max_position_embeddings",
    ),
    "t5": Foreign(lambda c, length: t5_config_of(c, length or 512), from_t5, lambda *_: EncoderDecoder, None),
}


def model_type(theirs: Any, where: str) -> str:
    """The type that a `config.json` names, if it is one of ours."""
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    if kind not in FOREIGN:
        raise ValueError(
            message("load_folder", f"the model_type in {where}", "one of " + ", ".join(FOREIGN), str(kind))
        )
    return str(kind)


def our_config(theirs: Mapping[str, Any], where: str, context: int | None = None) -> Config:
    """Our configuration; ``context`` shortens it, and lengthens it only where rotary positions are dynamic."""
    kind = FOREIGN[model_type(theirs, where)]
    if context is not None:
        require_positive(context, "load_folder", "context", integer=True)
    longest = None if kind.longest is None else theirs.get(kind.longest)
    grows = kind.longest is None or rope_kind(theirs) == "dynamic"
    short = context if context is None or grows or not isinstance(longest, int) else min(context, longest)
    try:
        return kind.config(theirs, short)
    except KeyError as error:
        raise ValueError(message("load_folder", f"config.json in {where}", f"one with {error}", "none")) from error
    except TypeError as error:
        wanted = "one with numbers where they belong"
        raise ValueError(message("load_folder", f"config.json in {where}", wanted, f"another ({error})")) from error


def our_model(kind: str, config: Config, weights: Arrays) -> LoadedModel:
    """The model with these weights; they are looked at before memory of the described size is taken."""
    state = FOREIGN[kind].state(weights, config)
    model = FOREIGN[kind].make(weights, config)(config, BLANK)
    model.load_state_dict(state)
    return model
