r"""What a model of some configuration holds and does: parameters and operations, by formula, without making it.

A multiplication and an addition are two operations. Only matrix products count; norms, activations and the softmax
are small beside them and do no products.
"""

from typing import NamedTuple

from minillm.checks import require, require_positive
from minillm.functional.feed_forward import GATES
from minillm.models.config import Config


def count_embedding(V: int, d_model: int, untied: bool = False) -> int:
    r"""Parameters of the token table, twice if the head has a matrix of its own.

    Equation: `count-embedding` $Vd_{\rm model}$, twice if untied
    Raises: ValueError for sizes that are not positive integers.
    Source: lecture06 (Embeddings); notes §9.
    """
    _check("count_embedding", V=V, d_model=d_model)
    return V * d_model * (2 if untied else 1)


def count_attention(
    d_model: int, H: int, H_kv: int | None = None, d_head: int | None = None, bias: bool = False
) -> int:
    r"""Parameters of the four maps of attention.

    Equation: `count-attention` $2d_{\rm model}^2+2d_{\rm model}H_{kv}d_{\rm head}$, and the four shifts with biases
    Raises: ValueError for sizes that are not positive integers, or heads that do not divide.
    Source: lecture06 (Attention); notes §9.
    """
    H_kv = H if H_kv is None else H_kv
    _check("count_attention", d_model=d_model, H=H, H_kv=H_kv)
    require(H % H_kv == 0, "count_attention", "H_kv", f"a divisor of H = {H}", H_kv)
    if d_head is None:
        require(d_model % H == 0, "count_attention", "H", f"a divisor of d_model = {d_model}", H)
        d_head = d_model // H
    d_q, d_kv = H * d_head, H_kv * d_head
    return 2 * d_model * (d_q + d_kv) + (d_q + 2 * d_kv + d_model if bias else 0)


def count_ffn(d_model: int, d_ff: int, gated: bool = False, bias: bool = False) -> int:
    r"""Parameters of a feed-forward network.

    Equation: `count-ffn` $2d\,d_{\rm ff}$ (+ $d_{\rm ff}+d$ with biases); gated $3d\,d_{\rm ff}$ (+ $2d_{\rm ff}+d$)
    Raises: ValueError for sizes that are not positive integers.
    Source: lecture06 (SwiGLU); notes §9.
    Differs: LLaMA has no biases (erratum 7).
    """
    _check("count_ffn", d_model=d_model, d_ff=d_ff)
    up = 2 if gated else 1
    return (up + 1) * d_model * d_ff + (up * d_ff + d_model if bias else 0)


def count_norm(d: int, kind: str = "rmsnorm") -> int:
    r"""Parameters of a norm.

    Equation: `count-norm` RMSNorm $d$, LayerNorm $2d$
    Raises: ValueError for a width that is not a positive integer, or an unknown kind.
    Source: lecture06 (RMSNorm).
    """
    _check("count_norm", d=d)
    require(kind in ("rmsnorm", "layernorm"), "count_norm", "kind", "'rmsnorm' or 'layernorm'", kind)
    return 2 * d if kind == "layernorm" else d


def count_lm_head(d_model: int, V: int, bias: bool = False) -> int:
    r"""Parameters of a head of its own.

    Equation: `count-lm-head` $d_{\rm model}V(+V)$
    Raises: ValueError for sizes that are not positive integers.
    Source: lecture06 (Classification layer).
    """
    _check("count_lm_head", d_model=d_model, V=V)
    return d_model * V + (V if bias else 0)


def count_masked_head(d_model: int, V: int) -> int:
    r"""Parameters of BERT's head for hidden tokens, whose output matrix is the embedding.

    Equation: `mlm-loss` a map with a shift, a LayerNorm, and a shift of the logits: $d^2+3d+V$
    Raises: ValueError for sizes that are not positive integers.
    Source: notes §8.1; Devlin et al. 2019.
    """
    _check("count_masked_head", d_model=d_model, V=V)
    return d_model * d_model + 3 * d_model + V


def count_experts(d_model: int, d_ff: int, E: int, K_s: int = 0, gated: bool = True, router: str = "softmax") -> int:
    r"""Parameters of a layer of experts with its router.

    Equation: `count-moe` $(E+K_s)P_e+P_r$, $P_r=dE$, $+E$ for a bias, twice for a noisy router
    Raises: ValueError for sizes that are not positive integers.
    Source: notes §8.8, §8.9.
    """
    _check("count_experts", E=E)
    require_positive(K_s, "count_experts", "K_s", integer=True, zero_ok=True)
    P_r = d_model * E * (2 if router == "noisy" else 1) + (E if router == "sigmoid" else 0)
    return (E + K_s) * count_ffn(d_model, d_ff, gated) + P_r


def count_mla(
    d: int,
    H: int,
    d_head: int,
    d_c: int,
    d_R: int,
    d_q: int | None = None,
    latent_norm: bool = False,
    d_v: int | None = None,
) -> int:
    r"""Parameters of DeepSeek's latent attention; ``d_q`` is $d_c'$, None where queries are not compressed.

    ``d_v`` is the width of a head's values where it is not that of its keys.

    Equation: `count-mla` $dd_c+2d_cHd_{\rm head}+dd_c'+d_c'H(d_{\rm head}+d_R)+dd_R+Hd_{\rm head}d$ (+ $d_c+d_c'$ with latent norms)
    Raises: ValueError for sizes that are not positive integers.
    Source: deepseek.
    """
    d_v = d_head if d_v is None else d_v
    _check("count_mla", d=d, H=H, d_head=d_head, d_c=d_c, d_R=d_R, d_v=d_v)
    queries = (d if d_q is None else d_q) * H * (d_head + d_R) + (0 if d_q is None else d * d_q)
    norms = d_c + (d_q or 0) if latent_norm else 0
    return d * d_c + d_c * H * (d_head + d_v) + queries + d * d_R + H * d_v * d + norms


def count_peft(
    n_adapters: int = 0, d: int = 1, d_down: int = 1, lora: tuple[tuple[int, int], ...] = (), r: int = 8
) -> int:
    r"""Parameters that fine-tuning adds: adapters, and low-rank updates of matrices (d_in, d_out).

    Equation: `count-peft` $2d\,d_{\rm down}$ per adapter; $r(d_{\rm in}+d_{\rm out})$ per LoRA matrix
    Raises: ValueError for sizes that are not positive integers.
    Source: notes §10.4.
    """
    _check("count_peft", d=d, d_down=d_down, r=r)
    require_positive(n_adapters, "count_peft", "n_adapters", integer=True, zero_ok=True)
    for d_in, d_out in lora:
        _check("count_peft", d_in=d_in, d_out=d_out)
    return n_adapters * 2 * d * d_down + sum(r * (d_in + d_out) for d_in, d_out in lora)


def attention_blocks(n_encoder: int, n_decoder: int, *, prefix: bool = False) -> int:
    r"""How many blocks of attention a model for two sequences has.

    Equation: `count-encdec-vs-prefix` encoder-decoder $N_{\rm enc}+2N_{\rm dec}$; prefix decoder N
    Raises: ValueError for negative numbers of layers.
    Source: notes §8.4.
    Differs: half holds for a decoder block, 2 to 1; for 6 + 6 layers it is 18 to 12 or 6 (erratum 35).
    """
    for name, n in (("n_encoder", n_encoder), ("n_decoder", n_decoder)):
        require_positive(n, "attention_blocks", name, integer=True, zero_ok=True)
    return n_encoder + n_decoder if prefix else n_encoder + 2 * n_decoder


class Parameters(NamedTuple):
    """Parameters by what they belong to."""

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def count_model(config: Config) -> Parameters:
    r"""Parameters of a whole model; the same number that a model of this configuration holds.

    Equation: `count-model` LLaMA: $2Vd+N_{\rm layer}(P_{\rm attn}+3d\,d_{\rm ff}+2d)+d$; GPT-2: $Vd+n_{ctx}d+N_{\rm layer}(12d^2+13d)+2d$
    Shapes: a configuration -> parameters by part
    Source: notes §9; lecture06 (LLaMA table).
    """
    c, d = config, config.d_model
    two_sided = c.architecture == "encoder-decoder"
    n_encoder = (c.n_encoder_layers or c.n_layers) if two_sided else 0
    layers, stacks = c.n_layers + n_encoder, 2 if two_sided else 1
    crossed = c.n_layers if two_sided else 0
    heads = _heads(c)
    norm = count_norm(d, c.norm)
    outside = stacks * ((c.norm_place == "pre") + c.embedding_norm)
    places = {"learned": c.context * d, "t5": 32 * c.n_heads}.get(c.positions, 0) + c.n_segments * d
    gains = (2 * layers + crossed) if c.branches == "learnt" else 0
    return Parameters(
        embedding=count_embedding(c.vocab_size, d),
        attention=layers * _mixer(c) + crossed * heads,
        ffn=(layers - c.n_dense_layers) * _feed_forward(c) + dense_layers(c),
        norms=norm * (layers * (1 if c.layout == "parallel" else 2) + crossed + outside),
        head=0 if c.tied else count_lm_head(d, c.vocab_size),
        other=stacks * places + gains,
    )


def _mixer(c: Config) -> int:
    d_c, d_R = c.d_latent or max(1, c.d_model // 2), c.d_rotary or 2 * max(1, c.d_head // 4)
    if c.attention == "latent":
        return count_mla(c.d_model, c.n_heads, c.d_head, d_c, d_R, c.d_latent_q, latent_norm=True, d_v=c.d_value)
    if c.attention == "linear":
        return count_attention(c.d_model, c.n_heads)
    by_distance = 2 * (2 * c.shaw_distance + 1) * c.d_head if c.positions == "shaw" else 0
    return _heads(c) + by_distance


def _heads(c: Config) -> int:
    return count_attention(c.d_model, c.n_heads, c.n_kv_heads, c.d_head, c.bias) + (2 * c.d_head if c.qk_norm else 0)


def dense_layers(c: Config) -> int:
    """Parameters of the networks that stand in front of the blocks with experts."""
    return c.n_dense_layers * count_ffn(c.d_model, c.d_ff_dense or c.d_ff or 0, gated=True)


def _feed_forward(c: Config) -> int:
    if c.ffn == "experts":
        return count_experts(c.d_model, c.d_ff or 0, c.n_experts, c.n_shared_experts, router=c.router)
    return count_ffn(c.d_model, c.d_ff or 0, c.ffn in GATES, c.bias)


def count_active(config: Config) -> int:
    r"""Parameters that take part in the computation of one token.

    Equation: `count-moe` active: $(k+K_s)P_e+P_r$ in place of $(E+K_s)P_e+P_r$
    Shapes: a configuration -> count; that of the whole model where there are no experts
    Source: notes §8.8, §8.9.
    """
    total = count_model(config).total
    if config.ffn != "experts":
        return total
    layers = config.n_layers + (
        (config.n_encoder_layers or config.n_layers) if config.architecture == "encoder-decoder" else 0
    )
    idle = config.n_experts - config.experts_per_token
    return total - (layers - config.n_dense_layers) * idle * count_ffn(config.d_model, config.d_ff or 0, gated=True)


def _check(where: str, **sizes: int) -> None:
    for name, value in sizes.items():
        require_positive(value, where, name, integer=True)
