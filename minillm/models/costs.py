r"""Operations and memory of training and generation, by formula, beside what a recorded graph really did."""

from collections import Counter
from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.feed_forward import GATES
from minillm.models.config import Config
from minillm.models.counting import count_active, count_attention, count_ffn, count_model, dense_layers


def block_flops(
    d_model: int, H: int, d_ff: int, L_k: float, H_kv: int | None = None, d_head: int | None = None, gated: bool = True
) -> float:
    r"""Operations of one block for one token that attends to L_k others (itself among them).

    Equation: `flops-block` $2\cdot(\text{matmul weights})+4L_kd_{\rm model}$ per token and layer
    Shapes: sizes -> operations; full attention $L_k=L$, causal in the mean $\frac{L+1}2$
    Raises: ValueError for sizes that are not positive.
    Source: notes §4.10.
    """
    require_positive(L_k, "block_flops", "L_k")
    weights = count_attention(d_model, H, H_kv, d_head) + count_ffn(d_model, d_ff, gated)
    return 2 * weights + 4 * L_k * H * (d_model // H if d_head is None else d_head)


def forward_flops(config: Config, B: int, L: int, causal: bool | None = None) -> float:
    r"""Operations of the matrix products of one forward pass over (B, L) tokens, the head included.

    Equation: `flops-block` $BL\,[N_{\rm layer}(2W+4L_kd)+2dV]$; none for the look-up in the embedding
    Shapes: sizes -> operations. ``causal`` counts only pairs that may look at each other, $L_k=\frac{L+1}2$.
    Raises: ValueError for an encoder-decoder, other attention than by heads (or Shaw's), or sizes that are not positive.
    Source: notes §4.10.
    """
    require_positive(B, "forward_flops", "B", integer=True)
    require_positive(L, "forward_flops", "L", integer=True)
    plain = config.architecture != "encoder-decoder" and config.attention == "heads" and config.window is None
    plain = plain and config.positions != "shaw"
    require(plain, "forward_flops", "the configuration", "one stack with full attention by heads", "another")
    c, d = config, config.d_model
    causal = c.architecture == "decoder" if causal is None else causal
    L_k = (L + 1) / 2 if causal else L
    if c.ffn == "experts":
        per_token = 2 * ((c.experts_per_token + c.n_shared_experts) * count_ffn(d, c.d_ff or 0, True) + d * c.n_experts)
        block = 2 * count_attention(d, c.n_heads, c.n_kv_heads, c.d_head) + 4 * L_k * c.n_heads * c.d_head
        return (
            B
            * L
            * (
                c.n_layers * block
                + (c.n_layers - c.n_dense_layers) * per_token
                + 2 * dense_layers(c)
                + 2 * d * c.vocab_size
            )
        )
    else:
        block = block_flops(d, c.n_heads, c.d_ff or 0, L_k, c.n_kv_heads, c.d_head, c.ffn in GATES)
    return B * L * (c.n_layers * block + 2 * d * c.vocab_size)


def training_flops(config: Config, B: int, L: int, causal: bool | None = None) -> float:
    r"""Forward and backward: every product is followed by two of its size, for its two inputs.

    Equation: `flops-block` three times the forward pass
    Shapes: sizes -> operations
    Source: notes §4.10.
    """
    return 3 * forward_flops(config, B, L, causal)


def flops_6nd(P: float, tokens: float) -> float:
    r"""Operations of a whole training run.

    Equation: `flops-6nd` $\approx6PN_{\rm tok}$
    Raises: ValueError for numbers that are not positive.
    Source: lecture06 (training tokens); Kaplan et al. 2020.
    """
    require_positive(P, "flops_6nd", "P")
    require_positive(tokens, "flops_6nd", "tokens")
    return 6 * P * tokens


def tokens_per_parameter(P: float, tokens: float) -> float:
    r"""How many tokens a model was shown for each parameter; about 20 where a budget of operations is spent best.

    Equation: `compute-optimal` Chinchilla: $N_{\rm tok}\approx20P$
    Raises: ValueError for numbers that are not positive.
    Source: lecture06 (Phi-3); Hoffmann et al. 2022.
    """
    require_positive(P, "tokens_per_parameter", "P")
    require_positive(tokens, "tokens_per_parameter", "tokens")
    return tokens / P


TRAINED, FROZEN, FOUR_BIT = 16.0, 2.0, 4.127 / 8  # bytes a parameter: Adam with a master copy; half; NF4
METHODS = ("sft", "ppo", "grpo", "grpo-rule", "lora", "qlora")


def training_memory(P: float, method: str = "sft", added: float = 0.0, activations: float = 0.0) -> float:
    r"""Bytes that training holds: weights, gradients, Adam's moments, frozen models, activations.

    Trained parameters: 2 (weight) + 2 (gradient) + 4 (master copy) + 8 (moments) bytes. PPO trains a critic as large
    as the policy and holds a reference and a reward model; GRPO has no critic, ``grpo-rule`` no reward model either.

    Equation: `memory-training` $16P$ + activations; PPO $36P$, GRPO $20P$ or $18P$; LoRA $2P+16P_{\rm added}$; QLoRA $0.516P+16P_{\rm added}$
    Raises: ValueError for an unknown method or negative sizes; for LoRA without added parameters.
    Source: lecture06 (GRPO); notes §10.4.
    Differs: GRPO saves 44 to 50 % of the memory, and no operations by itself (erratum 83).
    """
    require_one_of(method, METHODS, "training_memory", "method")
    require_positive(P, "training_memory", "P")
    for name, value in (("added", added), ("activations", activations)):
        require_positive(value, "training_memory", name, zero_ok=True)
    low_rank = method in ("lora", "qlora")
    require(not low_rank or added > 0, "training_memory", "added", "the number of added parameters", added)
    per_parameter = {
        "sft": TRAINED,
        "ppo": 2 * TRAINED + 2 * FROZEN,
        "grpo": TRAINED + 2 * FROZEN,
        "grpo-rule": TRAINED + FROZEN,
        "lora": FROZEN,
        "qlora": FOUR_BIT,
    }[method]
    return per_parameter * P + (TRAINED * added if low_rank else 0.0) + activations


def cache_bytes(config: Config, B: int, capacity: int, itemsize: int = 4) -> int:
    r"""Bytes of the key/value cache of a whole model; what `new_cache` really makes.

    Equation: `kv-cache-size` $2N_{\rm layer}BLH_{kv}d_{\rm head}$ elements; latent: $N_{\rm layer}BL(d_c+d_R)$
    Raises: ValueError for linear attention (running sums), or sizes that are not positive.
    Source: notes §4.2.
    """
    c = config
    require(c.attention != "linear", "cache_bytes", "the attention", "by heads or latent", c.attention)
    for name, value in (("B", B), ("capacity", capacity), ("itemsize", itemsize)):
        require_positive(value, "cache_bytes", name, integer=True)
    kept = capacity if c.window is None else c.window
    width = 2 * (c.n_kv_heads or c.n_heads) * c.d_head
    if c.attention == "latent":
        width = (c.d_latent or max(1, c.d_model // 2)) + (c.d_rotary or 2 * max(1, c.d_head // 4))
    return c.n_layers * B * kept * width * itemsize


def activation_numbers(config: Config, B: int, L: int, flash: bool = True) -> int:
    r"""Numbers that the backward pass of a stack of plain pre-norm blocks needs from the forward pass.

    A block keeps its two norms' inputs and outputs (4 d), queries, keys, values and their context, and the inner
    layer before and after the activation; without blockwise attention also the scores' softmax, $H L$.

    Equation: `memory-training` activations: $N_{\rm layer}BL\,[4d+2d(1+H_{kv}/H)+c\,d_{\rm ff}(+HL)]$, c = 3 gated, 2 plain
    Raises: ValueError for sizes that are not positive, or blocks of another kind.
    Source: notes §10.4; Korthikanti et al. 2022.
    """
    plain = config.attention == "heads" and config.ffn != "experts" and config.norm_place == "pre"
    plain = plain and config.layout == "sequential" and config.positions != "shaw"
    wanted = "pre-norm blocks with attention by heads and one feed-forward network"
    require(plain, "activation_numbers", "the configuration", wanted, "another")
    require_positive(B, "activation_numbers", "B", integer=True)
    require_positive(L, "activation_numbers", "L", integer=True)
    c, d_kv = config, (config.n_kv_heads or config.n_heads) * config.d_head
    inner = (3 if c.ffn in GATES else 2) * (c.d_ff or 0)
    per_token = 4 * c.d_model + 2 * c.n_heads * c.d_head + 2 * d_kv + inner
    return c.n_layers * B * L * (per_token + (0 if flash else c.n_heads * L))


def held_numbers(config: Config, B: int, L: int, kept_scores: int = 0) -> int:
    r"""Numbers that this engine holds between the forward and the backward pass of the blocks of a `Decoder`.

    More than `activation_numbers` counts: the tape holds every tensor that an operation has read or made, so the branches
    before their addition (2 d), queries and keys before and after they turn, and the logistic function of the gate
    ($d_{\rm ff}$) come on top; and per token a number for each norm and each head (the log-normaliser). Attention keeps
    its probabilities where they are few: ``kept_scores`` of them in a block, of all sequences.

    Equation: `memory-training` activations: $N_{\rm layer}\big(BL\,[7d+d_{\rm head}(2H+3H_{kv})+4d_{\rm ff}+H+2]+N_P\big)$
    Shapes: sizes -> numbers; the angles of the positions, $Ld_{\rm head}(1+H+H_{kv})$ a block at most, are left out
    Raises: ValueError for another model than a `Decoder`, or sizes that are not positive.
    Source: notes §10.4; measured, see the test.
    """
    require(config.is_llama, "held_numbers", "the configuration", "that of a `Decoder`", "other choices")
    for name, value in (("B", B), ("L", L)):
        require_positive(value, "held_numbers", name, integer=True)
    require_positive(kept_scores, "held_numbers", "kept_scores", integer=True, zero_ok=True)
    c, H, H_kv = config, config.n_heads, config.n_kv_heads or config.n_heads
    per_token = 7 * c.d_model + c.d_head * (2 * H + 3 * H_kv) + 4 * (c.d_ff or 0) + H + 2
    return c.n_layers * (B * L * per_token + kept_scores)


def measured_products(*outputs: Tensor) -> Counter:
    r"""Operations of the matrix products in the recorded graph behind some tensors, by the name of the operation.

    Equation: `flops-block` counted from the shapes on the tape instead of derived
    Shapes: tensors with a graph -> operations by name. Attention counts all pairs, also those that a mask hides; experts
        count the tokens that they served.
    Raises: ValueError if no operation was recorded, or one whose products are not counted here.
    Source: notes §4.10.
    """
    nodes: list[Any] = [t.node for t in outputs if t.node is not None]
    require(len(nodes) > 0, "measured_products", "outputs", "tensors that operations were recorded for", "none")
    seen: set[int] = set()
    done: Counter = Counter()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        name, given = node.operation.name, node.inputs
        if name == "linear":
            done[name] += 2 * given[0].size * given[1].shape[0]
        elif name == "matmul":
            done[name] += 2 * node.output.size * given[0].shape[-1]
        elif name == "scaled_dot_product_attention":
            q, k, v = given[:3]
            done[name] += 2 * q.size // q.shape[-1] * k.shape[2] * (q.shape[-1] + v.shape[-1])
        elif name == "rotary_attention":
            B, L, width = given[0].shape
            d = width * node.params["H"] // (node.params["H"] + 2 * node.params["H_kv"])
            done[name] += 4 * B * L * L * d
        elif name == "mixture_of_experts":
            routed, w_in, w_down = given[2:5]
            done[name] += 2 * int(np.count_nonzero(routed)) * (w_in.size + w_down.size) // len(w_in)
        elif name == "linear_attention_chunked":
            wanted, hint = "operations whose products are counted", "Build the graph from its written form."
            require(False, "measured_products", "the graph", wanted, name, hint)
        nodes.extend(getattr(x, "node", None) for x in given)
    return done


def ffn_share(config: Config) -> float:
    """The share of a model's parameters that its feed-forward networks hold."""
    parts = count_model(config)
    return parts.ffn / parts.total


def active_share(config: Config) -> float:
    """The share of a model's parameters that one token uses."""
    return count_active(config) / count_model(config).total
