"""What `minillm train` reads: real text or a synthetic language, cut into a part to train on and a held-out part."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from minillm.checks import require, require_one_of, require_positive
from minillm.data import (
    BPETokenizer,
    ByteTokenizer,
    HiddenMarkovSource,
    Tokenizer,
    bracket_source,
    load_text,
    python_docs_text,
    split_held_out,
)

TOKENIZERS = ("bytes", "bpe")


@dataclass(frozen=True)
class DataSettings:
    """Which text, how much of it is held out, and how it becomes tokens. What does not apply becomes None."""

    data: str = "python-docs"
    held_out: float = 0.1
    tokenizer: str | None = "bytes"
    vocab_size: int | None = 1024
    synthetic_tokens: int | None = 400_000
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, "DataSettings", "held_out", "between 0 and 1", self.held_out)
        synthetic = self.data == "synthetic"
        for name, applies in (
            ("tokenizer", not synthetic),
            ("vocab_size", not synthetic and self.tokenizer == "bpe"),
            ("synthetic_tokens", synthetic),
        ):
            if not applies:
                object.__setattr__(self, name, None)
            elif name == "tokenizer":
                require_one_of(self.tokenizer, TOKENIZERS, "DataSettings", "tokenizer")
            else:
                require_positive(getattr(self, name), "DataSettings", name, integer=True)

    def to_dict(self) -> dict:
        """The settings as plain data."""
        return asdict(self)


class Corpus(NamedTuple):
    """Ids to train on and held-out ids; the text's tokenizer and bytes, or the synthetic language's source."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer | None = None
    train_bytes: bytes = b""
    held_out_bytes: bytes = b""
    source: HiddenMarkovSource | None = None


def read_corpus(settings: DataSettings) -> Corpus:
    """Read and tokenize the data; a tokenizer that learns sees the training part only.

    Raises: FileNotFoundError or ValueError if there is no text, or too little to cut in two.
    """
    if settings.data == "synthetic":
        source = bracket_source()
        ids = source.sample(np.random.default_rng([settings.seed, 2]), settings.synthetic_tokens or 0)
        return Corpus(*split_held_out(ids, settings.held_out), source.vocab_size, source=source)
    text = python_docs_text() if settings.data == "python-docs" else load_text(settings.data)
    train, held_out = split_held_out(text, settings.held_out)
    learnt = settings.vocab_size
    tokenizer = ByteTokenizer() if learnt is None else BPETokenizer.train(train, learnt, specials=())
    return Corpus(
        tokenizer.encode(train),
        tokenizer.encode(held_out),
        tokenizer.vocab_size,
        tokenizer,
        train.encode("utf-8"),
        held_out.encode("utf-8"),
    )
