"""minillm: language models built and aligned from scratch, every equation written, derived and checked."""

__version__ = "0.1.0"
