r"""Heads on a stack of blocks: what it is asked for besides the next token."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import Tensor
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.activation_family import activation
from minillm.functional.pooling import cls_pooling, cosine_scores, last_pooling, mean_pooling, span_logits
from minillm.fused.linear import linear
from minillm.models.config import Config
from minillm.models.transformer import Transformer
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter
from minillm.nn.norms import LayerNorm

POOLINGS = ("cls", "mean", "last")


def pooled(H: Tensor, pooling: str, real: Any = None) -> Tensor:
    """One vector a sequence, by the name of the way.

    Raises: ValueError for an unknown way, or a mask of another shape.
    """
    require_one_of(pooling, POOLINGS, "pooled", "pooling")
    if pooling == "cls":
        return cls_pooling(H)
    return mean_pooling(H, real) if pooling == "mean" else last_pooling(H, real)


class SequenceHead(Module):
    r"""Scores of classes, or a number, for a whole sequence.

    Equation: `encoder-heads` classification: $\mathbf W\,\mathrm{pool}(\mathbf H)+\mathbf b$; regression with one output
    Equation: `cls-pooling` ``pooling="cls"``
    Shapes: H (B, L, d) -> (B, n_outputs)
    Raises: ValueError for sizes that are not positive or an unknown pooling.
    Source: notes §8.1.
    """

    def __init__(self, d_model: int, n_outputs: int, rng: np.random.Generator, pooling: str = "cls"):
        require_positive(d_model, "SequenceHead", "d_model", integer=True)
        require_positive(n_outputs, "SequenceHead", "n_outputs", integer=True)
        require_one_of(pooling, POOLINGS, "SequenceHead", "pooling")
        self.pooling = pooling
        self.weight = parameter(rng.normal(0.0, INIT_STD, size=(n_outputs, d_model)))
        self.shift = parameter(np.zeros(n_outputs))

    def forward(self, H: Tensor, real: Any = None) -> Tensor:
        return linear(pooled(H, self.pooling, real), self.weight, self.shift)


class TokenHead(Module):
    r"""Scores of labels for every token; with two of them, the start and the end of a span.

    Equation: `encoder-heads` token labelling: $\mathbf H\mathbf W^\top+\mathbf b$; span start and end
    Equation: `replaced-token-detection` with one label, the logit of being an original token
    Shapes: H (B, L, d) -> (B, L, n_labels)
    Raises: ValueError for sizes that are not positive.
    Source: notes §8.1.
    """

    def __init__(self, d_model: int, n_labels: int, rng: np.random.Generator):
        require_positive(d_model, "TokenHead", "d_model", integer=True)
        require_positive(n_labels, "TokenHead", "n_labels", integer=True)
        self.weight = parameter(rng.normal(0.0, INIT_STD, size=(n_labels, d_model)))
        self.shift = parameter(np.zeros(n_labels))

    def forward(self, H: Tensor) -> Tensor:
        return linear(H, self.weight, self.shift)

    def span(self, H: Tensor, real: Any = None) -> tuple[Tensor, Tensor]:
        """Scores of start and end, each (B, L)."""
        return span_logits(H, self.weight, self.shift, real)


class MaskedLanguageModel(Module):
    r"""An encoder that names the tokens that were hidden from it.

    Equation: `mlm-loss` its logits are $\mathrm{LN}(\phi(\mathbf H\mathbf W+\mathbf b))\,\mathbf W_{\rm emb}^\top+\mathbf b_V$
    Equation: `bert-config` the head of BERT
    Shapes: ids (B, L) -> logits (B, L, V)
    Raises: ValueError for a configuration that is not of an encoder.
    Source: notes §8.1; Devlin et al. 2019.
    """

    def __init__(self, config: Config, rng: np.random.Generator):
        fits, where = config.architecture == "encoder", "MaskedLanguageModel"
        require(fits, where, "the architecture", "'encoder'", config.architecture)
        d = config.d_model
        self.config = config
        self.encoder = Transformer(config, rng)
        self.w_transform = parameter(rng.normal(0.0, config.init_std, size=(d, d)))
        self.b_transform = parameter(np.zeros(d))
        self.norm = LayerNorm(d, config.norm_eps)
        self.shift = parameter(np.zeros(config.vocab_size))

    def forward(self, ids: Int[np.ndarray, "B L"], **options: Any) -> Float[Tensor, "B L V"]:
        """Logits at every position; the options are those of `Transformer.hidden`."""
        H = self.encoder.hidden(ids, **options)
        h = self.norm(activation("gelu")(linear(H, self.w_transform, self.b_transform)))
        return linear(h, self.encoder.output_weight, self.shift)


def retrieval_scores(
    model: Transformer,
    queries: Int[np.ndarray, "N L"],
    documents: Int[np.ndarray, "M S"],
    real_queries: Bool[np.ndarray, "N L"] | None = None,
    real_documents: Bool[np.ndarray, "M S"] | None = None,
) -> Float[Tensor, "N M"]:
    r"""How well each document answers each query: the cosine of mean-pooled vectors.

    Equation: `encoder-heads` retrieval: mean-pooled, cosine
    Shapes: queries (N, L), documents (M, S) -> (N, M)
    Source: notes §8.1.
    """
    q = mean_pooling(model.hidden(queries, real=real_queries), real_queries)
    return cosine_scores(q, mean_pooling(model.hidden(documents, real=real_documents), real_documents))


class ModelType(NamedTuple):
    """A row of the comparison of model types."""

    name: str
    mask: str
    good_for: str
    weakness: str
    examples: str


#: Equation: `model-type-table` encoder-only, decoder-only, encoder-decoder and prefix decoder (notes §8.5, table 5)
MODEL_TYPES = (
    ModelType("encoder only", "full", "classes, labels, spans, search", "writes no text; learns from 15 % of its tokens", "BERT"),
    ModelType("decoder only", "causal", "writing; any task put as text", "a token knows nothing of what follows it", "GPT, LLaMA"),
    ModelType("encoder-decoder", "full, causal, cross", "one text into another", "two stacks; cross-attention to cache", "T5, BART"),
    ModelType("prefix decoder", "full on the prefix, then causal", "both in one stack", "loss on the generated part only", "GLM, U-PaLM"),
)  # fmt: skip


def model_type_table() -> str:
    """The types of model side by side, as Markdown.

    Equation: `model-type-table` encoder-only, decoder-only, encoder-decoder: what for, and at what price
    Source: notes §8.5 (table 5).
    """
    head = "| model | mask | good for | weakness | examples |\n|---|---|---|---|---|"
    return "\n".join([head, *("| " + " | ".join(row) + " |" for row in MODEL_TYPES)])
