"""Whole models, each read from top to bottom in one file."""

from minillm.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
