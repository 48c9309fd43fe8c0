"""Samplers, generation, beam search and speculative decoding."""

from minillm.decoding.beam import Beams, beam_search
from minillm.decoding.drafters import LookupDrafter, ModelDrafter
from minillm.decoding.generate import Generation, generate
from minillm.decoding.law import Law
from minillm.decoding.samplers import greedy, sample
from minillm.decoding.speculative import Draft, Drafter, Speculation, speculative_generate

__all__ = [
    "Beams",
    "Draft",
    "Drafter",
    "Generation",
    "Law",
    "LookupDrafter",
    "ModelDrafter",
    "Speculation",
    "beam_search",
    "generate",
    "greedy",
    "sample",
    "speculative_generate",
]
