"""Counts by formula are what models hold and do, and the figures of the slides come out."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import no_grad, scratch
from minillm.fused import attention_blocks
from minillm.fused.losses import cross_entropy
from minillm.models import Config, Decoder, EncoderDecoder, Transformer, costs, counting
from minillm.models.families import FAMILIES, LLAMA, bert_config, gpt_config, tiny
from minillm.nn.latent_attention import LatentAttention
from minillm.training.step import loss_and_gradients

TOTALS = {
    "LLaMA 7B": (6_738_415_616, 64.2, 148),
    "LLaMA 13B": (13_015_864_320, 65.3, 77),
    "LLaMA 33B": (32_528_943_616, 66.0, 43),
    "LLaMA 65B": (65_285_660_672, 66.3, 21),
    "LLaMA-2 7B": (6_738_415_616, 64.2, 297),
    "LLaMA-2 13B": (13_015_864_320, 65.3, 154),
    "LLaMA-2 34B": (33_743_970_304, 77.0, 59),
    "LLaMA-2 70B": (68_976_648_192, 81.7, 29),
    "LLaMA-3 8B": (8_030_261_248, 70.2, 1868),
    "LLaMA-3 70B": (70_553_706_496, 79.9, 213),
}


@pytest.mark.equation(
    "wn-llama-table", "wn-llama-totals", "wn-tokens", "llama-config", "count-model", "compute-optimal"
)
@pytest.mark.parametrize("name", TOTALS)
def test_the_llama_table(name):
    config, tokens = LLAMA[name]
    total, share, per_parameter = TOTALS[name]
    assert counting.count_model(config).total == total and config.d_head == 128
    assert round(100 * costs.ffn_share(config), 1) == share
    assert round(costs.tokens_per_parameter(total, tokens)) == per_parameter


@pytest.mark.equation(
    "wn-embedding-13b", "wn-untied-head", "wn-heads-13b", "wn-qkv-13b", "wn-out-proj-13b", "wn-rmsnorm-13b"
)
@pytest.mark.equation("wn-swiglu-13b", "wn-logits-shape", "count-embedding", "count-attention", "count-ffn", "count-norm", "count-lm-head")  # fmt: skip
def test_the_slides_on_13b():
    c = LLAMA["LLaMA 13B"].config
    assert counting.count_embedding(32_000, 5120) == 163_840_000
    assert counting.count_embedding(32_000, 5120, untied=True) == 327_680_000
    assert c.n_heads * c.d_head == 40 * 128 == 5120
    assert counting.count_attention(5120, 40) == 78_643_200 + 26_214_400 == 104_857_600
    assert counting.count_norm(5120) == 5120 and counting.count_norm(5120, "layernorm") == 10_240
    plain = counting.count_ffn(5120, 13_824, gated=True)
    assert plain == 212_336_640
    assert counting.count_ffn(5120, 13_824, gated=True, bias=True) - plain == 32_768  # erratum 7
    assert counting.count_lm_head(5120, 32_000) == 163_840_000
    assert counting.count_lm_head(5120, 32_000, bias=True) == 163_872_000
    assert counting.count_attention(5120, 40, bias=True) - counting.count_attention(5120, 40) == 4 * 5120


@pytest.mark.equation("count-model", "gpt-config", "bert-config")
def test_gpt2_and_bert_in_full():
    V, d, n, N = 50_257, 768, 1024, 12
    assert counting.count_model(gpt_config()).total == V * d + n * d + N * (12 * d * d + 13 * d) + 2 * d == 124_439_808
    assert counting.count_model(bert_config()).total == 108_891_648  # bert-base without its pooler


def make(config):
    return (EncoderDecoder if config.architecture == "encoder-decoder" else Transformer)(
        config, np.random.default_rng(0)
    )


@st.composite
def configs(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    kv = draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0]))
    settings = {
        "d_model": 4 * heads * draw(st.integers(1, 3)),
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": heads,
        "n_kv_heads": kv,
        "d_ff": draw(st.integers(1, 20)),
        "context": draw(st.integers(1, 9)),
        "tied": draw(st.booleans()),
        "architecture": draw(st.sampled_from(["decoder", "encoder", "prefix", "encoder-decoder"])),
        "positions": draw(st.sampled_from(["none", "sinusoidal", "learned", "rope", "alibi", "t5", "shaw"])),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_place": draw(st.sampled_from(["pre", "post"])),
        "branches": draw(st.sampled_from(["plain", "learnt"])),
        "ffn": draw(st.sampled_from(["swiglu", "geglu", "gelu", "relu", "experts"])),
        "router": draw(st.sampled_from(["softmax", "sigmoid", "noisy"])),
        "n_shared_experts": draw(st.integers(0, 2)),
        "bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "embedding_norm": draw(st.booleans()),
        "n_segments": draw(st.integers(0, 2)),
    }
    if settings["architecture"] == "decoder" and draw(st.booleans()):
        settings |= {"attention": "latent", "d_latent_q": draw(st.sampled_from([None, 6])), "n_kv_heads": heads}
    elif settings["architecture"] != "encoder-decoder" and draw(st.booleans()):
        settings |= {"layout": "parallel", "norm_place": "pre"}
    if settings["positions"] == "shaw":
        settings |= {"attention": "heads", "n_kv_heads": heads, "shaw_distance": draw(st.integers(1, 4))}
    return Config(draw(st.integers(2, 30)), **settings)


@pytest.mark.equation("count-model", "count-moe", "count-mla", "count-attention", "count-ffn", "count-norm")
@settings(max_examples=50)
@given(configs())
def test_the_formula_is_the_sum_over_live_tensors(config):
    assert counting.count_model(config).total == make(config).count_parameters()


@pytest.mark.equation("count-model", "llama-config", "palm-config", "t5-config")
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_of_every_family(family):
    config = tiny(family, 31)
    assert counting.count_model(config).total == make(config).count_parameters()


@pytest.mark.equation("count-mla")
def test_latent_attention_of_deepseek_v3():
    assert counting.count_mla(7168, 128, 128, 512, 64, 1536) == 187_105_280
    assert counting.count_mla(7168, 128, 128, 512, 64, 1536, latent_norm=True) == 187_105_280 + 512 + 1536
    live = LatentAttention(16, 2, 4, 6, 2, np.random.default_rng(0), d_q=5, latent_norm=False)
    assert live.count_parameters() == counting.count_mla(16, 2, 4, 6, 2, 5)


@pytest.mark.equation("count-moe")
def test_active_parameters_of_experts():
    config = Config(11, 8, 3, 2, d_ff=5, ffn="experts", n_experts=6, experts_per_token=2, n_shared_experts=1)
    idle = 3 * 4 * 3 * 8 * 5  # layers, experts that rest, three matrices of 8 x 5
    assert counting.count_active(config) == make(config).count_parameters() - idle
    assert costs.active_share(Config(11)) == 1.0


@pytest.mark.equation("count-encdec-vs-prefix")
def test_attention_blocks_of_two_models_for_two_texts():
    assert counting.attention_blocks(6, 6) == 18
    assert counting.attention_blocks(6, 6, prefix=True) == 12 and counting.attention_blocks(0, 6, prefix=True) == 6
    assert 2 * counting.attention_blocks(0, 1, prefix=True) == counting.attention_blocks(0, 1)  # erratum 35
    model = make(Config(5, 8, 2, 2, architecture="encoder-decoder", n_encoder_layers=3))
    live = len(model.encoder.blocks) + sum(1 + (block.cross is not None) for block in model.decoder.blocks)
    assert live == counting.attention_blocks(3, 2)


@pytest.mark.equation("count-peft")
def test_adapters_and_low_rank_updates():
    assert counting.count_peft(2, 100, 8) == 3200
    assert counting.count_peft(lora=((10, 20), (5, 5)), r=4) == 4 * 30 + 4 * 10


@pytest.mark.equation("flops-block")
@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 8), st.sampled_from(["swiglu", "gelu"]), st.sampled_from([1, 2, 4]))
def test_operations_are_those_on_the_tape(B, L, ffn, kv):
    config = Config(13, 16, 2, 4, kv, d_ff=10, context=8, ffn=ffn)
    ids = np.zeros((B, L), int)
    wanted = costs.forward_flops(config, B, L, causal=False)  # the tape counts hidden pairs too
    assert sum(costs.measured_products(make(config)(ids)).values()) == wanted
    if config.is_llama:
        assert sum(costs.measured_products(Decoder(config, np.random.default_rng(0))(ids)).values()) == wanted
    assert costs.training_flops(config, B, L) == 3 * costs.forward_flops(config, B, L)
    hidden_pairs = 4 * 16 * 2 * B * L * (L - 1) / 2
    assert wanted - costs.forward_flops(config, B, L) == pytest.approx(hidden_pairs)


@pytest.mark.equation("flops-block", "moe-params-active")
@pytest.mark.parametrize(
    "more",
    [{}, {"n_shared_experts": 2, "n_dense_layers": 1, "d_ff_dense": 14}, {"experts_per_token": 1, "router": "sigmoid"}],
)
def test_operations_of_experts_are_those_on_the_tape(more):
    """Only the experts that a token visits, and the shared ones."""
    config = Config(13, 16, 2, 4, 2, d_ff=10, context=8, ffn="experts", n_experts=5, **more)
    done = costs.measured_products(make(config)(np.arange(14).reshape(2, 7) % 13))
    assert sum(done.values()) == costs.forward_flops(config, 2, 7, causal=False)
    layers = config.n_layers - config.n_dense_layers
    assert done["mixture_of_experts"] == layers * 2 * 14 * config.experts_per_token * 3 * 16 * 10


@pytest.mark.equation("flops-6nd", "flops-block")
def test_six_operations_a_parameter_and_token():
    config, tokens = LLAMA["LLaMA 7B"]
    P = counting.count_model(config).total
    exact = costs.training_flops(config, 1, 2048) / 2048 * tokens
    assert 1.0 < exact / costs.flops_6nd(P, tokens) < 1.1  # attention's share, less the look-up


@pytest.mark.equation("memory-training", "kv-cache-size")
def test_memory():
    P = 1e9
    per = {m: costs.training_memory(P, m, added=P / 100) / P for m in costs.METHODS}
    assert (per["sft"], per["ppo"], per["grpo"], per["grpo-rule"]) == (16, 36, 20, 18)  # erratum 83
    assert 1 - per["grpo"] / per["ppo"] == pytest.approx(0.444, abs=1e-3)
    assert per["lora"] == pytest.approx(2.16) and per["qlora"] == pytest.approx(0.516 + 0.16, abs=1e-3)
    assert costs.cache_bytes(LLAMA["LLaMA 13B"].config, 1, 1, 2) == 819_200


@pytest.mark.equation("kv-cache-size", "memory-training")
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"attention": "latent"}, {"window": 3}])
def test_cache_and_activations_are_as_large_as_counted(changes):
    config = Config(11, 16, 3, 4, context=12, **changes)
    with no_grad():
        cache = make(config).new_cache(2, 7)
    assert cache.nbytes == costs.cache_bytes(config, 2, 7)
    if config.attention == "heads":
        more = costs.activation_numbers(config, 2, 8, flash=False) - costs.activation_numbers(config, 2, 8)
        assert more == 3 * 2 * 4 * 8 * 8


def measured_step(config: Config, B: int, L: int) -> tuple[int, int]:
    """Bytes held after the forward pass of a training step, and the most that was held until its end."""
    model = Decoder(config, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (B, L + 1))
    gc.collect()
    scratch.arena().clear()
    tracemalloc.start()
    try:
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        scratch.arena().clear()  # what is not held, but kept for the next request
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        loss_and_gradients(loss, model.parameters())
        return held, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.equation("memory-training")
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "d_ff": 96}])
@pytest.mark.parametrize("kept", [True, False])
def test_activations_of_a_real_step_are_as_many_as_counted(changes, kept, monkeypatch):
    """What one more block adds to the memory of a step, in bytes of float32; the rest of the model cancels."""
    if not kept:
        monkeypatch.setattr(attention_blocks, "KEPT_BYTES", 0)
    sizes = {"d_model": 64, "n_heads": 4, "d_ff": 172, "context": 128, **changes}
    B, L = 8, 128
    few, more = (measured_step(Config(50, n_layers=n, **sizes), B, L) for n in (1, 4))
    per_block = (more[0] - few[0]) / 3 / 4
    one = Config(50, n_layers=1, **sizes)
    step = attention_blocks.block_size(L, causal=True)
    seen = sum(min(step, L - start) * min(start + step, L) for start in range(0, L, step))
    wanted = costs.held_numbers(one, B, L, B * 4 * seen if kept else 0)
    angles = L * one.d_head * (1 + 4 + (one.n_kv_heads or 0))
    print(f"a block holds {per_block:,.0f} numbers, counted {wanted:,}; needed {costs.activation_numbers(one, B, L):,}")
    assert wanted <= per_block < 1.02 * wanted + angles
    needed = costs.activation_numbers(one, B, L, flash=not kept)
    assert 1 < per_block / needed < 1.75  # what the tape holds without need
    backward = (more[1] - few[1]) / 3 / 4  # with gradients of the block's parameters, and less held as it goes back
    assert per_block * 0.9 < backward < per_block + 2 * sum(counting.count_model(one)[1:3])


BAD = {
    "held": (lambda: costs.held_numbers(Config(5, norm="layernorm"), 1, 1), "the configuration must be that of a"),
    "heads": (lambda: counting.count_attention(10, 3), "count_attention: H must be a divisor"),
    "kv heads": (lambda: counting.count_attention(12, 4, 3), "count_attention: H_kv must be a divisor"),
    "negative": (lambda: counting.count_ffn(0, 3), "count_ffn: d_model must be a positive integer"),
    "embedding": (lambda: counting.count_embedding(-1, 3), "count_embedding: V must be"),
    "head": (lambda: counting.count_lm_head(2.5, 3), "count_lm_head: d_model must be"),
    "norm": (lambda: counting.count_norm(3, "batch"), "count_norm: kind must be"),
    "experts": (lambda: counting.count_experts(4, 4, 0), "count_experts: E must be"),
    "mla": (lambda: counting.count_mla(4, 1, 4, 0, 2), "count_mla: d_c must be"),
    "peft": (lambda: counting.count_peft(r=0), "count_peft: r must be"),
    "layers": (lambda: counting.attention_blocks(-1, 2), "attention_blocks: n_encoder must be"),
    "method": (lambda: costs.training_memory(1, "dpo"), "training_memory: method must be one of"),
    "lora": (lambda: costs.training_memory(1, "lora"), "training_memory: added must be"),
    "tokens": (lambda: costs.flops_6nd(1, 0), "flops_6nd: tokens must be"),
    "parameters": (lambda: costs.tokens_per_parameter(0, 1), "tokens_per_parameter: P must be"),
    "length": (lambda: costs.block_flops(8, 2, 8, 0), "block_flops: L_k must be"),
    "batch": (lambda: costs.forward_flops(Config(3), 0, 2), "forward_flops: B must be"),
    "dense": (
        lambda: Config(3, n_dense_layers=1),
        "n_dense_layers must be at most 0 without experts in one stack, got 1",
    ),
    "all dense": (lambda: Config(3, ffn="experts", n_dense_layers=5), "n_dense_layers must be at most 4, got 5"),
    "scale": (lambda: Config(3, ffn="experts", expert_scale=0), "expert_scale must be a positive number, got 0"),
    "shaw": (lambda: costs.forward_flops(Config(3, positions="shaw"), 1, 2), "forward_flops: the configuration"),
    "uncounted": (
        lambda: costs.measured_products(
            make(Config(3, 8, 1, 2, attention="linear", positions="none"))(np.zeros((1, 2), int))
        ),
        "measured_products: the graph must be operations whose products are counted, got linear_attention_chunked",
    ),
    "activations": (
        lambda: costs.activation_numbers(Config(3, ffn="experts"), 1, 2),
        "activation_numbers: the configuration must be pre-norm blocks",
    ),
    "latent": (lambda: costs.forward_flops(Config(3, attention="latent"), 1, 2), "forward_flops: the configuration"),
    "no cache": (
        lambda: costs.cache_bytes(Config(3, attention="linear", positions="none"), 1, 2),
        "cache_bytes: the att",
    ),
    "family": (lambda: tiny("gpt5", 3), "tiny: family must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
