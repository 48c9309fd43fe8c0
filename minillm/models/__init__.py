"""Whole models, each read from top to bottom in one file."""

from minillm.models.config import Config
from minillm.models.decoder import Decoder

__all__ = ["Config", "Decoder"]
