"""What `minillm train` says at the end: the model beside general-purpose compressors, or beside the true source."""

import math
from typing import Any

import numpy as np

from minillm.cli.corpus import Corpus
from minillm.data import compressed_bits_per_byte, next_token_chunks
from minillm.training.loop import Trainer

COLUMNS = ["name", "value", "unit", "difference"]
OVERLAP = 4  # a token is scored with at least three quarters of the context before it


def report(trainer: Trainer, corpus: Corpus) -> list[dict[str, Any]]:
    """Rows of the report: `name`, `value`, `unit`, and how far the model is above (+) or below (-) this opponent."""
    with trainer.threads.running():
        n_ctx = trainer.config.n_ctx
        result = trainer.evaluate(corpus.held_out, stride=max(1, n_ctx // OVERLAP))
    if trainer.model.config.architecture != "decoder":
        return _against_frequencies(result.mean_nll, trainer.objective.unit, corpus)
    if corpus.source is not None:
        return _against_the_source(result.mean_nll, corpus, n_ctx)
    n_bytes = len(corpus.held_out_bytes)
    return _against_compressors(result.bits_per_byte(n_bytes, corpus.vocab_size), corpus)


def _against_frequencies(ours: float, unit: str, corpus: Corpus) -> list[dict[str, Any]]:
    """A model that is asked for some tokens only, beside guessing without looking at the text around them."""
    counts = np.bincount(corpus.train, minlength=corpus.vocab_size) + 1.0
    logp = np.log(counts / counts.sum())
    opponents = {
        "how often tokens are": float(-logp[corpus.held_out].mean()),
        "uniform guessing": math.log(corpus.vocab_size),
    }
    return _rows(f"nats per {unit}, held out", ours, opponents)


def _against_compressors(ours: float, corpus: Corpus) -> list[dict[str, Any]]:
    opponents = {
        "gzip -9": compressed_bits_per_byte(corpus.held_out_bytes, "gzip"),
        "bzip2 -9": compressed_bits_per_byte(corpus.held_out_bytes, "bzip2"),
        "xz -9": compressed_bits_per_byte(corpus.held_out_bytes, "xz"),
        "xz -9 after the training part": compressed_bits_per_byte(corpus.held_out_bytes, "xz", corpus.train_bytes),
    }
    return _rows("bits per byte, held out", ours, opponents)


def _against_the_source(ours: float, corpus: Corpus, n_ctx: int) -> list[dict[str, Any]]:
    assert corpus.source is not None
    windows = next_token_chunks(corpus.held_out, n_ctx).inputs
    opponents = {
        "entropy rate of the source": corpus.source.entropy_rate(),
        "the source itself on this text": float(corpus.source.optimal_nll(windows.reshape(1, -1)).mean()),
        "uniform guessing": math.log(corpus.vocab_size),
    }
    return _rows("nats per symbol, held out", ours, opponents)


def _rows(unit: str, ours: float, opponents: dict[str, float]) -> list[dict[str, Any]]:
    model = {"name": "this model", "value": ours, "unit": unit, "difference": None}
    others = [
        {"name": name, "value": value, "unit": unit, "difference": _difference(ours, value)}
        for name, value in opponents.items()
    ]
    return [model, *others]


def _difference(ours: float, value: float) -> str | None:
    """How far we are above or below, where the other side is not 0: a primed compressor may need nothing more."""
    return f"{100 * (ours / value - 1):+.1f} %" if value > 0 else None
