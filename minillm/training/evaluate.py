r"""How well a model predicts a text that it was not trained on."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from minillm.autograd import no_grad
from minillm.checks import require, require_positive
from minillm.data import IGNORE, next_token_chunks
from minillm.fused.losses import cross_entropy
from minillm.models.making import AnyModel
from minillm.training.objectives import objective_for
from minillm.training.step import BatchThreads


class Evaluation(NamedTuple):
    """The summed negative log-likelihood of a text in nats, and over how many predicted tokens."""

    nll: float
    n_targets: int

    @property
    def mean_nll(self) -> float:
        """Nats per predicted token."""
        return self.nll / self.n_targets

    def bits_per_byte(self, n_bytes: int, vocab_size: int) -> float:
        r"""Bits that the model needs for a byte of the text, as a compressor would be charged.

        Equation: `perplexity` bits $=\text{NLL}/\log2$
        Source: topics #3.

        The first token, which nothing predicts, costs the logarithm of the vocabulary.
        """
        return (self.nll + math.log(vocab_size)) / math.log(2) / n_bytes


def evaluate(
    model: AnyModel,
    tokens: Int[np.ndarray, " N"],
    *,
    n_ctx: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    threads: BatchThreads | None = None,
) -> Evaluation:
    r"""Score every token of a text but the first, given what fits into the context before it.

    Equation: `clm-loss` $-\sum_{t=2}^N\log p_\theta(x_t\mid x_{<t})$, with at most n_ctx tokens of the past
    Shapes: tokens (N,) -> summed nats and N - 1 targets
    Raises: ValueError for fewer than two tokens, or a stride that is not in 1..n_ctx.
    Source: notes §10.1 (CLM).

    Windows of n_ctx tokens start every ``stride`` tokens. A window scores what the one before it did not reach, so a
    smaller stride gives tokens a longer past, at a price: n_ctx / stride times the work.

    A model of another architecture than a decoder is asked what it is trained on, `minillm.training.objectives`, about
    consecutive windows; which tokens that takes is drawn from a generator of fixed seed, the same every time.
    """
    n_ctx = model.config.context if n_ctx is None else n_ctx
    stride = n_ctx if stride is None else stride
    require(tokens.ndim == 1 and len(tokens) >= 2, "evaluate", "the tokens", "one stream of at least two", tokens)
    require_positive(batch_size, "evaluate", "batch_size", integer=True)
    require(1 <= stride <= n_ctx, "evaluate", "the stride", f"in 1..{n_ctx}, the context", stride)
    if model.config.architecture != "decoder":
        return _evaluate_questions(model, tokens, n_ctx, batch_size, threads)
    inputs, targets = windows(tokens.astype(np.int64), min(n_ctx, len(tokens) - 1), stride)
    threads = BatchThreads(1) if threads is None else threads

    def summed_loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        with no_grad():
            return cross_entropy(model(inputs), targets, reduction="sum").item()

    nll = 0.0
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        nll += sum(threads.map(summed_loss, inputs[rows], targets[rows]))
    return Evaluation(nll, len(tokens) - 1)


def _evaluate_questions(
    model: AnyModel, tokens: np.ndarray, n_ctx: int, batch_size: int, threads: BatchThreads | None
) -> Evaluation:
    n_ctx = min(n_ctx, len(tokens) - 1)
    objective, rng = objective_for(model.config, n_ctx), np.random.default_rng(0)
    reads, targets = objective.ask(next_token_chunks(tokens.astype(np.int64), n_ctx), rng)
    threads = BatchThreads(1) if threads is None else threads

    def summed_loss(targets: np.ndarray, *reads: np.ndarray) -> float:
        with no_grad():
            return cross_entropy(objective.answer(model, *reads), targets, reduction="sum").item()

    nll = 0.0
    for start in range(0, len(targets), batch_size):
        rows = slice(start, start + batch_size)
        nll += sum(threads.map(summed_loss, targets[rows], *(array[rows] for array in reads)))
    return Evaluation(nll, max(1, int((targets != IGNORE).sum())))


def windows(tokens: np.ndarray, n_ctx: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, n_ctx) of a text's windows; every target of the stream is kept in exactly one row."""
    last = len(tokens) - 1 - n_ctx
    starts = np.append(np.arange(0, last, stride), last)[:, None]  # (B, 1)
    places = starts + np.arange(n_ctx)  # (B, n_ctx): the inputs' places; a target is one further on
    reached = np.append(-1, places[:-1, -1])[:, None]  # the last place that an earlier row has scored
    return tokens[places], np.where(places > reached, tokens[places + 1], IGNORE)
