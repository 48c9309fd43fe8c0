"""From a configuration to the model that has its choices."""

import numpy as np

from minillm.models.config import Config
from minillm.models.counting import count_masked_head, count_model
from minillm.models.decoder import Decoder
from minillm.models.encoder_decoder import EncoderDecoder
from minillm.models.heads import MaskedLanguageModel
from minillm.models.transformer import Transformer

AnyModel = Decoder | Transformer | EncoderDecoder | MaskedLanguageModel


def make_model(config: Config, rng: np.random.Generator) -> AnyModel:
    """The fast `Decoder` where it has every choice, an `EncoderDecoder`, a `MaskedLanguageModel` for an encoder (it can
    be trained on text), or the general `Transformer`."""
    if config.is_llama:
        return Decoder(config, rng)
    if config.architecture == "encoder-decoder":
        return EncoderDecoder(config, rng)
    return MaskedLanguageModel(config, rng) if config.architecture == "encoder" else Transformer(config, rng)


def count_made(config: Config) -> int:
    """How many numbers the model of `make_model` holds, without making it."""
    head = count_masked_head(config.d_model, config.vocab_size) if config.architecture == "encoder" else 0
    return count_model(config).total + head
