"""Whole models, each read from top to bottom in one file."""

from minillm.models.config import Config
from minillm.models.decoder import Decoder
from minillm.models.encoder_decoder import EncoderDecoder
from minillm.models.transformer import Transformer

__all__ = ["Config", "Decoder", "EncoderDecoder", "Transformer"]
