"""A tiny LLaMA of transformers, written to a GGUF file in the order of that format, is the same function in ours."""

import numpy as np
import pytest

from minillm.data.gguf import parse_gguf, read_gguf
from minillm.models.gguf_weights import decoder_from_gguf, dequantise, gguf_config
from minillm.models.llama_weights import to_llama
from tests.oracles.gguf_files import gguf_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

D, HEADS, KV, FF, V, LAYERS = 64, 4, 2, 96, 50, 2
ENTRIES = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": D,
    "llama.feed_forward_length": FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV,
    "llama.rope.freq_base": 5000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def their_model(tied: bool):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def neighbours(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from the order of halves (i, i + d/2) to that of neighbours (2 i, 2 i + 1), as the format wants."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return halves.transpose(0, 2, 1, 3).reshape(matrix.shape)


def as_gguf(theirs, entries=ENTRIES, **replaced) -> bytes:
    tensors = {}
    for name, parameter in theirs.named_parameters():
        array = parameter.detach().numpy()
        stem = name.removesuffix(".weight")
        if stem in OUTER:
            stem = OUTER[stem]
        else:
            _, _, layer, stem = stem.split(".", 3)
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):
                array = neighbours(array, HEADS if "q_proj" in stem else KV)
            stem = f"blk.{layer}.{INNER[stem]}"
        tensors[f"{stem}.weight"] = (array.shape, 0, np.ascontiguousarray(array, "<f4").tobytes())
    tensors.update(replaced.get("tensors", {}))
    return gguf_bytes(entries, {name: value for name, value in tensors.items() if value is not None})


@pytest.mark.equation("llama-config", "pos-rope", "weight-tying")
@pytest.mark.parametrize("tied", [True, False])
def test_logits_agree_with_the_model_it_was_written_from(tmp_path, tied):
    theirs = their_model(tied)
    (tmp_path / "tiny.gguf").write_bytes(as_gguf(theirs))
    ours = decoder_from_gguf(read_gguf(tmp_path / "tiny.gguf"))
    ids = np.random.default_rng(0).integers(0, V, size=(2, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours(ids).data, expected, atol=2e-5)
    assert ours.config.tied == tied and ours.config.rope_pairing == "interleaved"


@pytest.mark.equation("pos-rope")
def test_on_the_way_to_transformers_the_rows_go_back_to_the_order_of_halves(tmp_path):
    theirs = their_model(tied=True)
    ours = decoder_from_gguf(parse_gguf(as_gguf(theirs), tmp_path))
    back = to_llama(ours.state_dict(), ours.config)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_array_equal(back[name], parameter.detach().numpy(), err_msg=name)


@pytest.mark.filterwarnings("ignore:invalid value")  # random scales: some are not a number
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_every_kind_is_dequantised_as_the_reference_library_does(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    code = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    numbers, nbytes = gguf.constants.GGML_QUANT_SIZES[code]
    raw = rng.integers(0, 256, size=(6, 512 // numbers * nbytes), dtype=np.uint8)
    if kind[0] in "FB":
        values = rng.normal(size=(6, 512)).astype(np.float64 if kind == "F64" else np.float32)
        raw = (
            values.view(np.uint8) if kind == "F64" else np.atleast_2d(gguf.quants.quantize(values, code)).view(np.uint8)
        )
    file = parse_gguf(gguf_bytes({}, {"m": ((6, 512), int(code), raw.tobytes())}), tmp_path)
    if kind == "F64":
        expected = raw.view("<f8").astype(np.float32)
    else:
        expected = gguf.quants.dequantize(
            raw.view(np.float16) if kind == "F16" else raw.view(np.float32) if kind == "F32" else raw, code
        )
    found = dequantise(file.tensors["m"])
    assert found.dtype == np.float32 and found.shape == (6, 512)
    np.testing.assert_array_equal(found, expected.reshape(6, 512))


def test_a_kind_without_code_is_refused(tmp_path):
    file = parse_gguf(gguf_bytes({}, {"m": ((1, 256), 10, bytes(84))}), tmp_path)
    with pytest.raises(ValueError, match=r"the kind of m must be one of F32, .* got Q2_K"):
        dequantise(file.tensors["m"])


GAIN = ((D,), 0, bytes(4 * D))


@pytest.mark.parametrize(
    ("entries", "tensors", "words"),
    [
        ({"general.architecture": "gpt2"}, {}, "architecture of .* must be llama, got gpt2"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "rotary positions must be unscaled, got yarn"),
        ({}, {"rope_freqs.weight": GAIN}, "rotary positions must be unscaled, got scaled by a tensor"),
        ({"llama.rope.dimension_count": 8}, {}, "rotated width times the heads"),
        ({"llama.block_count": 10**9}, {}, "the layers must be 1000000000, as the metadata say, got 2"),
        ({"llama.feed_forward_length": 10**9}, {}, r"blk.0.ffn_up.weight must be of shape \(1000000000, 64\)"),
        ({"llama.attention.head_count": 0}, {}, "n_heads|heads"),
        ({"llama.attention.head_count": "4"}, {}, "the entry llama.attention.head_count .* must be a int"),
        ({}, {"output_norm.weight": None}, "output_norm.weight among them"),
        ({}, {"blk.1.attn_v.weight": None}, r"blk.1.attn_v.weight must be of shape \(32, 64\), got none"),
        ({}, {"blk.0.attn_q.bias": GAIN}, "a plain LLaMA, got also blk.0.attn_q.bias"),
        ({}, {"token_embd.weight": None}, "token_embd.weight among them"),
        ({}, {"token_embd.weight": ((V, 32), 0, bytes(4 * V * 32))}, "embedding"),
    ],
)
def test_files_of_something_else_are_refused_before_memory_is_taken(tmp_path, entries, tensors, words):
    data = as_gguf(their_model(tied=True), {**ENTRIES, **entries}, tensors=tensors)
    with pytest.raises(ValueError, match=words):
        decoder_from_gguf(parse_gguf(data, tmp_path))


def test_a_shorter_context_is_taken_and_a_longer_one_is_not(tmp_path):
    file = parse_gguf(as_gguf(their_model(tied=True)), tmp_path)
    assert gguf_config(file, 16).context == 16 and gguf_config(file, 10_000).context == 64
