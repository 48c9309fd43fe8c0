r"""Families of models as configurations: LLaMA by its table, GPT-2, BERT, T5, PaLM; full sizes and tiny ones to train.

The full sizes are for counting (`minillm.models.counting`), not for making.
"""

from typing import Any, NamedTuple

from minillm.checks import require_one_of
from minillm.models.config import Config


class Released(NamedTuple):
    """A row of the table: the model, and how many tokens it was trained on."""

    config: Config
    tokens: float


def _llama(d: int, heads: int, layers: int, kv: int, d_ff: int, vocab: int, context: int, eps: float = 1e-5) -> Config:
    return Config(vocab, d, layers, heads, kv, d_ff, context, rope_pairing="half", norm_eps=eps)


#: The ten columns of the table. Of LLaMA-2 34B the source gives tokens and GQA only; the rest is from the literature.
LLAMA = {
    "LLaMA 7B": Released(_llama(4096, 32, 32, 32, 11008, 32_000, 2048, 1e-6), 1e12),
    "LLaMA 13B": Released(_llama(5120, 40, 40, 40, 13824, 32_000, 2048, 1e-6), 1e12),
    "LLaMA 33B": Released(_llama(6656, 52, 60, 52, 17920, 32_000, 2048, 1e-6), 1.4e12),
    "LLaMA 65B": Released(_llama(8192, 64, 80, 64, 22016, 32_000, 2048, 1e-6), 1.4e12),
    "LLaMA-2 7B": Released(_llama(4096, 32, 32, 32, 11008, 32_000, 4096), 2e12),
    "LLaMA-2 13B": Released(_llama(5120, 40, 40, 40, 13824, 32_000, 4096), 2e12),
    "LLaMA-2 34B": Released(_llama(8192, 64, 48, 8, 22016, 32_000, 4096), 2e12),
    "LLaMA-2 70B": Released(_llama(8192, 64, 80, 8, 28672, 32_000, 4096), 2e12),
    "LLaMA-3 8B": Released(_llama(4096, 32, 32, 8, 14336, 128_256, 8192), 15e12),
    "LLaMA-3 70B": Released(_llama(8192, 64, 80, 8, 28672, 128_256, 8192), 15e12),
}


#: What makes each family what it is, beside its sizes.
CHOICES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {"norm": "layernorm", "positions": "learned", "ffn": "gelu_tanh", "bias": True, "tied": True},
    "bert": {
        "norm": "layernorm", "norm_place": "post", "positions": "learned", "ffn": "gelu", "bias": True, "tied": True,
        "architecture": "encoder", "n_segments": 2, "embedding_norm": True, "norm_eps": 1e-12,
    },
    "t5": {
        "positions": "t5", "ffn": "relu", "divide_scores": False, "scaled_head": True, "tied": True,
        "architecture": "encoder-decoder", "norm_eps": 1e-6,
    },
    "palm": {"layout": "parallel", "n_kv_heads": 1, "norm": "layernorm", "tied": True},
    "prefix": {"architecture": "prefix"},
    "mixtral": {"ffn": "experts", "n_experts": 8, "experts_per_token": 2},
    "deepseek": {
        "attention": "latent", "ffn": "experts", "router": "sigmoid", "n_experts": 8, "experts_per_token": 2,
        "n_shared_experts": 1, "n_expert_groups": 4, "expert_groups_per_token": 2,
    },
    "mistral": {"window": 16, "n_kv_heads": 2},
    "linear": {"attention": "linear", "positions": "learned"},
    "alibi": {"positions": "alibi"},
    "shaw": {"positions": "shaw", "shaw_distance": 8},
}  # fmt: skip


def gpt_config(vocab_size: int = 50_257, **sizes: Any) -> Config:
    r"""A GPT-2 decoder, 124 million parameters unless sizes are given.

    Equation: `gpt-config` LayerNorm pre-norm, learned positions, GELU (tanh), biases, tied head
    Source: notes §4.7, §8.6; Radford et al. 2019.
    """
    full = {"d_model": 768, "n_layers": 12, "n_heads": 12, "context": 1024}
    return Config(vocab_size, **{**full, **CHOICES["gpt"], **sizes})


def bert_config(vocab_size: int = 30_522, **sizes: Any) -> Config:
    r"""A BERT encoder, base unless sizes are given.

    Equation: `bert-config` Post-LN, GELU, learned positions, segment ids, a norm behind the embedding
    Source: notes §8.1; Devlin et al. 2019.
    """
    full = {"d_model": 768, "n_layers": 12, "n_heads": 12, "context": 512}
    return Config(vocab_size, **{**full, **CHOICES["bert"], **sizes})


def t5_config(vocab_size: int = 32_128, **sizes: Any) -> Config:
    r"""A T5 encoder-decoder, small unless sizes are given.

    Equation: `t5-config` RMSNorm pre-norm, relative bias, scores not divided, ReLU, no biases, tied head on $d_{\rm model}^{-1/2}\mathbf h$
    Source: notes §4.5, §4.7; Raffel et al. 2020.
    """
    full = {"d_model": 512, "n_layers": 6, "n_heads": 8, "d_ff": 2048, "context": 512}
    return Config(vocab_size, **{**full, **CHOICES["t5"], **sizes})


def palm_config(vocab_size: int = 256_000, **sizes: Any) -> Config:
    r"""A PaLM decoder, 8 billion parameters unless sizes are given.

    Equation: `palm-config` parallel block, MQA, SwiGLU, RoPE, no biases, tied head
    Source: notes §4.2, §8.9; Chowdhery et al. 2022.
    """
    full = {"d_model": 4096, "n_layers": 32, "n_heads": 16, "d_ff": 16_384, "context": 2048}
    return Config(vocab_size, **{**full, **CHOICES["palm"], **sizes})


#: Sizes of a model that trains in seconds; gated networks and experts are narrower, to have as many parameters.
TINY: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "context": 64, "init_std": 0.05}
WIDTHS = {"gpt": 256, "bert": 256, "t5": 256, "mixtral": 64, "deepseek": 64}
FAMILIES = tuple(CHOICES)


def tiny_settings(family: str) -> dict[str, Any]:
    """The sizes and choices of a tiny model of a family, by name.

    Raises: ValueError for an unknown family.
    """
    require_one_of(family, FAMILIES, "tiny", "family")
    return {**TINY, "d_ff": WIDTHS.get(family, 172), **CHOICES[family]}


def tiny(family: str, vocab_size: int, **changes: Any) -> Config:
    """A model of a family that trains in seconds.

    Raises: ValueError for an unknown family.
    """
    return Config(vocab_size, **{**tiny_settings(family), **changes})
