"""One table of bad input for the transformer family: whatever door it comes through, one clear error of one form.

By kinds: wrong heads, rotary widths that are odd, masks of another shape, more experts than there are, no capacity,
prefixes longer than the text, full caches, unknown names and precisions, sizes that are none. Files of single packages
have tables of their own; this one holds the same mistake against every function that it can be made with.
"""

import re

import numpy as np
import pytest

from minillm.autograd import Tensor, no_grad
from minillm.data import float_formats
from minillm.functional import (
    absolute_positions,
    attention,
    attention_cost,
    balance,
    block_formats,
    capacity,
    dispatch,
    experts,
    feature_maps,
    fp8_gemm,
    latent_attention,
    linear_algebra,
    linear_attention,
    loss_scaling,
    masks,
    multi_head,
    nf4,
    positions,
    quantisation,
    relative_positions,
    rope_scaling,
    routing,
    sparse_attention,
    sparse_masks,
    streaming_attention,
)
from minillm.fused import attention as fused_attention
from minillm.models import Config, Decoder, EncoderDecoder, Transformer, counting
from minillm.models.families import tiny
from minillm.nn import CausalSelfAttention, Embedding, Linear, RMSNorm, SwiGLU
from minillm.nn.cache import KVCache, LayerCache
from minillm.nn.experts import MixtureOfExperts
from minillm.nn.latent_attention import LatentAttention
from minillm.nn.latent_cache import LatentCache
from minillm.nn.linear_attention import LinearAttention
from minillm.nn.multi_head import MultiHeadAttention
from minillm.nn.perceiver import InducedSetAttention, LatentBlock, SetAttention
from minillm.nn.positions import RotaryPositions, SinusoidalPositions, make_positions
from minillm.nn.quantised_cache import QuantisedCache
from minillm.nn.shaw_attention import ShawAttention
from minillm.nn.window_cache import StateCache, WindowCache
from tests import typecheck

FORM = re.compile(r"^[\w. ]+: .+ must be .+, got .+\.( .+)?$", re.DOTALL)


def rng():
    return np.random.default_rng(0)


def ones(*shape: int) -> Tensor:
    return Tensor(np.ones(shape, np.float32))


def true(*shape: int) -> np.ndarray:
    return np.ones(shape, bool)


def model(**changes):
    config = Config(**{"vocab_size": 9, "d_model": 8, "n_layers": 1, "n_heads": 2, "context": 6, **changes})
    return (EncoderDecoder if config.architecture == "encoder-decoder" else Transformer)(config, rng())


def filled(cache, *arrays):
    """A cache that has taken what it has room for."""
    cache.append(*arrays)
    return cache


IDS, Q, K = np.zeros((1, 4), int), ones(1, 4, 3, 2), ones(1, 2, 3, 2)
SEEN, X, EXPERTS = true(3, 4), ones(3, 5), (ones(4, 12, 5), ones(4, 5, 6))
HEADS = {
    "split_heads": lambda: linear_algebra.split_heads(ones(1, 3, 5), 2),
    "scaled_dot_product_attention": lambda: attention.scaled_dot_product_attention(Q, ones(1, 3, 3, 2), ones(1, 3, 3, 2)),
    "fused attention": lambda: fused_attention.scaled_dot_product_attention(Q, ones(1, 3, 3, 2), ones(1, 3, 3, 2)),
    "rotary_attention": lambda: attention.rotary_attention(ones(1, 3, 10), np.zeros((3, 1)), H=2, H_kv=2),
    "fused rotary": lambda: fused_attention.rotary_attention(ones(1, 3, 10), angles=np.zeros((3, 1)), H=2, H_kv=2),
    "streaming_attention": lambda: streaming_attention.streaming_attention(Q, ones(1, 3, 3, 2), ones(1, 3, 3, 2)),
    "attention_with_dropout": lambda: multi_head.attention_with_dropout(Q, ones(1, 3, 3, 2), ones(1, 3, 3, 2), rate=0.1),
    "topk_attention": lambda: sparse_attention.topk_attention(Q, ones(1, 3, 3, 2), ones(1, 3, 3, 2), 1),
    "shaw_attention": lambda: relative_positions.shaw_attention(Q, K, K, ones(3, 2), ones(3, 2)),
    "pool_heads": lambda: multi_head.pool_heads(np.ones((8, 4)), 4, 3),
    "head_cost": lambda: multi_head.head_cost(1, 2, 10, 3),
    "attention_cost": lambda: attention_cost.attention_cost(0, 1, 4, 2, 2),
    "alibi": lambda: relative_positions.alibi_slopes(0),
    "count_attention": lambda: counting.count_attention(12, 4, 3),
    "Config": lambda: Config(5, d_model=10, n_heads=3, positions="none"),
    "Config, groups": lambda: Config(5, n_heads=4, n_kv_heads=3),
    "CausalSelfAttention": lambda: CausalSelfAttention(10, 3, 3, "half", rng()),
    "CausalSelfAttention, groups": lambda: CausalSelfAttention(16, 4, 3, "half", rng()),
    "MultiHeadAttention": lambda: MultiHeadAttention(10, 3, rng()),
    "MultiHeadAttention, groups": lambda: MultiHeadAttention(8, 4, rng(), n_kv_heads=3),
    "LinearAttention": lambda: LinearAttention(10, 3, rng()),
    "ShawAttention": lambda: ShawAttention(8, 4, rng(), n_kv_heads=2),
    "LatentAttention": lambda: LatentAttention(8, 0, 2, 4, 2, rng()),
    "LatentBlock": lambda: LatentBlock(10, 3, 8, rng()),
    "SetAttention": lambda: SetAttention(10, 3, 8, rng()),
    "InducedSetAttention": lambda: InducedSetAttention(10, 3, 8, 2, rng()),
}  # fmt: skip
ODD = {
    "rotation_angles": lambda: positions.rotation_angles(np.arange(3), 5),
    "scaled_rotation": lambda: rope_scaling.scaled_rotation(np.arange(3), 5, 100.0, rope_scaling.RopeScaling("linear", 2.0)),
    "rope": lambda: positions.rope(ones(1, 3, 5), np.zeros((3, 2))),
    "rope, angles": lambda: positions.rope(ones(1, 3, 4), np.zeros((2, 2))),
    "RotaryPositions": lambda: RotaryPositions(4, 3),
    "SinusoidalPositions": lambda: SinusoidalPositions(4, 3),
    "sinusoidal_positions": lambda: absolute_positions.sinusoidal_positions(np.arange(3), 5),
    "LatentAttention": lambda: LatentAttention(8, 2, 4, 4, 3, rng()),
    "CausalSelfAttention": lambda: CausalSelfAttention(6, 2, 2, "half", rng()),
    "Config": lambda: Config(5, d_model=6, n_heads=2),
    "Config, head_width": lambda: Config(5, head_width=7),
}  # fmt: skip
MASKS = {
    "attention_weights": lambda: attention.attention_weights(ones(1, 2, 3, 3), true(2, 3)),
    "scaled_dot_product_attention": lambda: attention.scaled_dot_product_attention(Q, K, K, true(2, 3)),
    "fused attention": lambda: fused_attention.scaled_dot_product_attention(Q, K, K, true(2, 3)),
    "fused attention, numbers": lambda: fused_attention.scaled_dot_product_attention(Q, K, K, np.ones((3, 3))),
    "fused attention, bias": lambda: fused_attention.scaled_dot_product_attention(Q, K, K, None, np.ones((3, 3, 3), np.float32)),
    "streaming_attention, for a block": lambda: streaming_attention.streaming_attention(Q, K, K, true(2, 3)),
    "padding_mask": lambda: masks.padding_mask(true(3)),
    "padding_mask, numbers": lambda: masks.padding_mask(np.ones((2, 3))),
    "cross_mask": lambda: masks.cross_mask(true(1, 2, 3)),
    "document_mask": lambda: masks.document_mask(np.zeros(3)),
    "combine_masks": lambda: masks.combine_masks(true(2, 3), true(4, 3)),
    "additive_mask": lambda: masks.additive_mask(np.ones((2, 2))),
    "causal_mask": lambda: masks.causal_mask(-1),
    "window_mask": lambda: sparse_masks.window_mask(3, 0),
    "LinearAttention": lambda: LinearAttention(4, 2, rng())(ones(1, 3, 4), keep=true(3, 3)),
    "Transformer, real": lambda: model()(IDS, real=true(4)),
    "EncoderDecoder, real": lambda: model(architecture="encoder-decoder", n_heads=2)(IDS, IDS, true(1, 3)),
    "moe choice": lambda: experts.moe_output(X, ones(3, 4), true(3, 3), *EXPERTS),
}  # fmt: skip
K_ABOVE_E = {
    "top_k": lambda: routing.top_k(np.ones((3, 4)), 5),
    "top_k, none": lambda: routing.top_k(np.ones((3, 4)), 0),
    "keep_topk": lambda: routing.keep_topk(ones(3, 4), 5),
    "gshard_top2": lambda: routing.gshard_top2(ones(3, 1)),
    "biased_choice": lambda: balance.biased_choice(np.ones((3, 4)), np.zeros(4), 5),
    "chosen_probability": lambda: balance.chosen_probability(X, X, X, 5),
    "topk_attention": lambda: sparse_attention.topk_attention(Q, K, K, 0),
    "capacity": lambda: capacity.capacity(1.0, 8, 4, 5),
    "MixtureOfExperts": lambda: MixtureOfExperts(4, 4, 2, 3, rng()),
    "MixtureOfExperts, groups": lambda: MixtureOfExperts(4, 4, 6, 3, rng(), n_groups=3),
    "Config": lambda: Config(5, ffn="experts", n_experts=2, experts_per_token=3),
    "count_experts": lambda: counting.count_experts(4, 4, 0),
}  # fmt: skip
CAPACITY = {
    "capacity": lambda: capacity.capacity(0.0, 8, 4, 2),
    "drop_overflow": lambda: capacity.drop_overflow(SEEN, 0),
    "reroute_overflow": lambda: capacity.reroute_overflow(np.ones((3, 4)), SEEN, 0),
    "pad_to_capacity": lambda: dispatch.pad_to_capacity(ones(12, 5), dispatch.pack(SEEN), 0),
    "expert_choice": lambda: routing.expert_choice(np.ones((3, 4)), 0),
    "MixtureOfExperts": lambda: MixtureOfExperts(4, 4, 2, 1, rng(), capacity_factor=0.0),
    "Config": lambda: Config(5, ffn="experts", capacity_factor=0.0),
    "LayerCache": lambda: LayerCache(1, 2, 0, 4),
    "KVCache": lambda: KVCache(1, 1, 1, 0, 4),
    "LatentCache": lambda: LatentCache(1, 0, 4, 2),
    "QuantisedCache": lambda: QuantisedCache(1, 1, 0, 4, bits=8, group=4),
    "WindowCache": lambda: WindowCache(1, 1, 0, 4),
    "StateCache": lambda: StateCache(0, 1, 4, 4),
    "Decoder.new_cache": lambda: Decoder(Config(5, context=6), rng()).new_cache(1, 0),
    "Transformer.new_cache": lambda: model().new_cache(1, 0),
    "Decoder.new_cache, batch": lambda: Decoder(Config(5, context=6), rng()).new_cache(0),
}  # fmt: skip
LONG = {
    "prefix_mask": lambda: masks.prefix_mask(3, 4),
    "prefix_mask, rows": lambda: masks.prefix_mask(3, np.array([1, 4])),
    "Transformer, prefix": lambda: model(architecture="prefix")(IDS, prefix=5),
    "Transformer, negative": lambda: model(architecture="prefix")(IDS, prefix=-1),
    "loss_mask": lambda: masks.loss_mask(np.array([5]), np.array([3]), 4),
    "Transformer": lambda: model()(np.zeros((1, 7), int)),
    "Decoder": lambda: Decoder(Config(5, context=6), rng())(np.zeros((1, 7), int)),
    "EncoderDecoder, source": lambda: model(architecture="encoder-decoder")(np.zeros((1, 7), int), IDS),
    "EncoderDecoder, target": lambda: model(architecture="encoder-decoder")(IDS, np.zeros((1, 7), int)),
    "Decoder, cache": lambda: overflow(Decoder(Config(5, context=6), rng())),
    "Transformer, cache": lambda: overflow(model()),
    "LayerCache": lambda: LayerCache(1, 1, 2, 4).append(np.ones((1, 1, 3, 4)), np.ones((1, 1, 3, 4))),
    "LatentCache": lambda: LatentCache(1, 2, 4, 2).append(np.ones((1, 3, 4)), np.ones((1, 3, 2))),
    "QuantisedCache": lambda: QuantisedCache(1, 1, 2, 4, bits=8, group=4).append(*(np.ones((1, 1, 3, 4), np.float32),) * 2),
    "KVCache": lambda: KVCache(1, 1, 1, 2, 4).reserve(3),
    "LayerCache, rewind": lambda: LayerCache(1, 1, 2, 4).rewind(0, 1),
    "unpack_int4": lambda: quantisation.unpack_int4(np.zeros((1, 2), np.uint8), 5),
}  # fmt: skip
NAMES = {
    "float_format": lambda: float_formats.float_format("fp9"),
    "encode_float": lambda: float_formats.encode_float(np.ones(2), "half"),
    "decode_float": lambda: float_formats.decode_float(np.zeros(2, np.uint8), "double"),
    "round_float": lambda: float_formats.round_float(np.ones(2), "fp7"),
    "ulp": lambda: float_formats.ulp(1.0, "fp7"),
    "fp8_scale": lambda: fp8_gemm.fp8_scale(np.ones(2), "fp9"),
    "cast_fp8": lambda: fp8_gemm.cast_fp8(np.ones(2), "fp9"),
    "fp8_format_of": lambda: fp8_gemm.fp8_format_of("sideways"),
    "dequantise_blocks": lambda: block_formats.dequantise_blocks(np.zeros(34, np.uint8), "Q3_X"),
    "precision_of": lambda: loss_scaling.precision_of("division"),
    "low_precision_matmul": lambda: loss_scaling.low_precision_matmul(np.ones((2, 2)), np.ones((2, 2)), "fp9"),
    "quantise_asymmetric": lambda: quantisation.quantise_asymmetric(np.ones(2), bits=0),
    "quantise_int8": lambda: quantisation.quantise_int8(np.array([np.nan])),
    "quantise_nf4": lambda: nf4.quantise_nf4(np.ones(4), block=0),
    "QuantisedCache": lambda: QuantisedCache(1, 1, 4, 4, bits=3, group=4),
    "rope": lambda: positions.rope(ones(1, 3, 4), np.zeros((3, 2)), "crossed"),
    "RopeScaling": lambda: rope_scaling.RopeScaling("stretched"),
    "RopeScaling, ramp": lambda: rope_scaling.RopeScaling("yarn", ramp="steep"),
    "feature_map": lambda: feature_maps.feature_map("tanh"),
    "make_positions": lambda: make_positions("far", rng(), context=4, d_model=4, n_heads=1, d_head=4),
    "CausalSelfAttention": lambda: CausalSelfAttention(8, 2, 2, "crossed", rng()),
    "MixtureOfExperts": lambda: MixtureOfExperts(4, 4, 2, 1, rng(), router="dice"),
    "tiny": lambda: tiny("gru", 5),
    **{f"Config, {name}": (lambda name=name: Config(5, **{name: "other"})) for name in (
        "positions", "attention", "ffn", "norm", "norm_place", "layout", "branches", "architecture", "rope_pairing")},
    "Config, router": lambda: Config(5, ffn="experts", router="dice"),
}  # fmt: skip
SIZES = {
    "Linear": lambda: Linear(0, 3, rng()),
    "Embedding": lambda: Embedding(0, 3, rng()),
    "RMSNorm": lambda: RMSNorm(0),
    "SwiGLU": lambda: SwiGLU(4, 0, rng()),
    "Config": lambda: Config(0),
    "Config, window": lambda: Config(5, window=0),
    "Config, rate": lambda: Config(5, dropout=1.0),
    "linear_attention": lambda: linear_attention.linear_attention(ones(1, 1, 2, 3), ones(1, 1, 2, 4), ones(1, 1, 2, 2)),
    "latents": lambda: latent_attention.latent_cache_width(0, 2, 2, 2),
    "decoder ids": lambda: Decoder(Config(5, context=6), rng())(np.zeros(3, int)),
    "other memory": lambda: MultiHeadAttention(8, 2, rng())(ones(1, 3, 8), memory=ones(2, 3, 8)),
}  # fmt: skip
KINDS = {"heads": HEADS, "odd widths": ODD, "masks": MASKS, "k above E": K_ABOVE_E, "capacity": CAPACITY,
         "too long": LONG, "names and precisions": NAMES, "sizes": SIZES}  # fmt: skip
CASES = [(kind, name) for kind, table in KINDS.items() for name in table]


def overflow(model) -> None:
    """Read more than a cache holds."""
    with no_grad():
        cache = model.new_cache(1, 3)
        model.hidden(IDS[:, :2], cache)
        model.hidden(IDS[:, :2], cache)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_bad_input_gives_one_clear_error(kind, name):
    with typecheck.suspended(), pytest.raises((ValueError, TypeError, IndexError)) as found:
        KINDS[kind][name]()
    assert FORM.match(str(found.value)), f"not in the form of the house: {found.value}"
    assert found.value.__cause__ is None or str(found.value.__cause__)
