r"""What a model is asked for, by its architecture: the next token, hidden tokens, or the rest of a text.

All of them read windows of one stream of ids and end in a cross-entropy over some places, so that one loop trains them
all. What is drawn at random (which tokens are hidden, where a prefix ends) comes from the trainer's generator.
"""

from typing import Any, NamedTuple

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.data import IGNORE, Batch
from minillm.functional.masked_language import corrupt
from minillm.models import Config


class Question(NamedTuple):
    """Arrays (B, ...) that a model reads, and the ids (B, L) it should answer, IGNORE where it is not asked."""

    reads: tuple[np.ndarray, ...]
    targets: np.ndarray


class NextToken:
    r"""A decoder: every token from those before it.

    Equation: `clm-loss` $-\sum_t\log p_\theta(x_t\mid x_{<t})$
    Source: notes §10.1 (CLM).
    """

    unit = "token"
    least = 1  # the shortest window that asks for something

    def __init__(self, config: Config):
        self.config = config

    def ask(self, batch: Batch, rng: np.random.Generator) -> Question:
        """What is read, and what should be answered."""
        return Question((batch.inputs,), batch.targets)

    def answer(self, model: Any, *reads: np.ndarray, **options: Any) -> Tensor:
        """Logits (B, L, V) of the model; the options are those of its forward pass."""
        return model(*reads, **options)


class RestOfText(NextToken):
    r"""A prefix decoder: what follows a prefix of random length, the prefix seen whole.

    Equation: `prefix-decoder-model` loss on what follows the prefix
    Source: notes §8.4.
    """

    unit = "token behind a prefix"
    least = 2

    def ask(self, batch: Batch, rng: np.random.Generator) -> Question:
        """A prefix of 1 to L - 1 tokens for each text; its last token predicts the first that is asked for."""
        B, L = batch.inputs.shape
        prefix = rng.integers(1, L, size=B)
        asked = np.arange(L) >= prefix[:, None] - 1
        return Question((batch.inputs, prefix), np.where(asked, batch.targets, IGNORE))

    def answer(self, model: Any, *reads: np.ndarray, **options: Any) -> Tensor:
        ids, prefix = reads
        return model(ids, prefix=prefix, **options)


class HiddenTokens(NextToken):
    r"""An encoder: tokens that were hidden from it. The last id of its vocabulary is the mark that hides.

    Equation: `mlm-loss` $-\sum_{t\in\mathcal M}\log p_\theta(x_t\mid\tilde{\mathbf x})$
    Source: notes §8.1; Devlin et al. 2019.
    """

    unit = "hidden token"

    def ask(self, batch: Batch, rng: np.random.Generator) -> Question:
        """Texts with 15 % of their tokens hidden or changed."""
        V = self.config.vocab_size
        read, chosen = corrupt(batch.inputs, V - 1, V, rng)
        return Question((read,), np.where(chosen, batch.inputs, IGNORE))


class SecondHalf(NextToken):
    r"""An encoder-decoder: the second half of a text from the first.

    Equation: `seq2seq-model` $-\sum_t\log p_\theta(y_t\mid y_{<t},\mathbf x)$
    Source: notes §8.3.

    The decoder begins with the last token of the source, so that no mark of a beginning is needed.
    """

    unit = "token of the second half"
    least = 2

    def ask(self, batch: Batch, rng: np.random.Generator) -> Question:
        """Source and target, cut in the middle of each window."""
        tokens = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
        half = batch.inputs.shape[1] // 2
        return Question((tokens[:, :half], tokens[:, half - 1 : -1]), tokens[:, half:])


OBJECTIVES = {"decoder": NextToken, "prefix": RestOfText, "encoder": HiddenTokens, "encoder-decoder": SecondHalf}


def objective_for(config: Config, n_ctx: int) -> NextToken:
    """What a model of this configuration learns from windows of n_ctx tokens.

    Raises: ValueError for windows that are too short to ask for anything.
    """
    objective = OBJECTIVES[config.architecture](config)
    require(n_ctx >= objective.least, "objective_for", "n_ctx", f"at least {objective.least} here", n_ctx)
    return objective


def draws_in_training(config: Config) -> bool:
    """Whether a forward pass in training needs random numbers."""
    drops = config.dropout or config.attention_dropout or config.droppath
    return bool(drops) or (config.ffn == "experts" and config.router in ("noisy", "gshard"))
