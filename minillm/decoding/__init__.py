"""Samplers and generation."""

from minillm.decoding.generate import Generation, generate
from minillm.decoding.samplers import greedy, sample

__all__ = ["Generation", "generate", "greedy", "sample"]
