"""Folders in the form of transformers: theirs run in ours, ours run in theirs."""

import json

import numpy as np
import pytest

from minillm.data.pretrained_bpe import PretrainedBPE, byte_alphabet
from minillm.data.tokenizer_json import CUTS, read_tokenizer_json, write_tokenizer_json
from minillm.models import Config, Decoder
from minillm.models.folder import load_folder, read_weights, save_folder
from minillm.models.one_token import lay_out
from minillm.models.pretrained import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V = 61
IDS = np.random.default_rng(3).integers(0, V, size=(2, 20))


def their_model(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.12,
        "attn_implementation": "eager",
        **changes,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


@pytest.mark.equation("llama-config")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_what_transformers_saved_is_the_same_function_here(tmp_path, tied, shards):
    theirs = their_model(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    ours = load_folder(tmp_path)
    np.testing.assert_allclose(ours(IDS).data, their_logits(theirs), atol=1e-5)
    assert ours.config.tied == tied and load_folder(tmp_path, context=16).config.context == 16


@pytest.mark.equation("bf16")
def test_bfloat16_weights_are_read(tmp_path):
    their_model().to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_folder(tmp_path)
    assert ours.embedding.weight.dtype == np.float32
    np.testing.assert_allclose(ours(IDS).data, their_logits(theirs), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_what_we_saved_is_the_same_function_in_transformers(tmp_path, pairing, tied, dtype):
    config = Config(V, 24, 2, 6, 2, 36, context=32, tied=tied, rope_pairing=pairing, init_std=0.2, rope_base=700.0)
    ours = Decoder(config, np.random.default_rng(0))
    lay_out(ours)
    save_folder(ours, tmp_path, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = load_folder(tmp_path)
    expected = again(IDS).data
    np.testing.assert_allclose(their_logits(theirs), expected, atol=1e-5)
    difference = np.abs(expected - ours(IDS).data).max() / np.abs(expected).max()
    assert difference < {"F32": 1e-5, "F16": 5e-3, "BF16": 5e-2}[dtype]


@pytest.mark.parametrize("split", CUTS)
def test_a_tokenizer_goes_to_transformers_and_back(tmp_path, split):
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "Ġ")]
    texts = ["<|end|>", *byte_alphabet(), *("".join(m) for m in merges), "<|turn|>"]
    specials = {"<|end|>": 0, "<|turn|>": len(texts) - 1}
    ours = PretrainedBPE(texts, merges, specials=specials, roles={"eos": 0}, split=split)
    write_tokenizer_json(ours, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = read_tokenizer_json(tmp_path)
    assert again == ours and again.eos_id == theirs.eos_token_id == 0
    for text in ("the 12 theories,\n\n  isn't THE'S é 😀", ""):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text


def test_a_folder_is_a_pretrained_model_with_or_without_a_tokenizer(tmp_path):
    their_model().save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).tokenizer is None
    tokenizer = PretrainedBPE(byte_alphabet(), [], specials={})
    write_tokenizer_json(tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = load_pretrained(tmp_path, context=8)
    assert found.tokenizer == tokenizer and found.template == "{{ messages }}" and found.model.config.context == 8
    with pytest.raises(ValueError, match="chat template must be ChatML"):
        _ = found.system


def broken(folder, how: str):
    """One fault of each kind in a sharded folder."""
    index = folder / "model.safetensors.index.json"
    state = json.loads(index.read_text())
    first = next(iter(state["weight_map"]))
    if how == "no index":
        index.unlink()
    elif how == "outside":
        index.write_text(json.dumps({"weight_map": {first: "../secret.safetensors"}}))
    elif how == "no map":
        index.write_text(json.dumps([1, 2]))
    elif how == "another place":
        others = sorted(set(state["weight_map"].values()) - {state["weight_map"][first]})
        index.write_text(json.dumps({"weight_map": {**state["weight_map"], first: others[0]}}))
    elif how == "a shard cut short":
        shard = folder / state["weight_map"][first]
        shard.write_bytes(shard.read_bytes()[:-7])
    elif how == "another model":
        (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    elif how == "scaled positions":
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 1e4}
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "a size missing":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("no index", FileNotFoundError, "there is neither model.safetensors nor"),
        ("outside", ValueError, "a file of the index must be a name in the folder"),
        ("no map", ValueError, "an index of tensors by file"),
        ("another place", ValueError, "as the index says, got absent"),
        ("a shard cut short", ValueError, "safetensors"),
        ("another model", ValueError, "the model_type in .* must be one of llama, .*, t5, got mamba"),
        ("scaled positions", ValueError, r"rotary positions \(rope_type\) must be one of 'default', .*, got longrope"),
        ("a size missing", ValueError, "one with 'hidden_size'"),
    ],
)
def test_folders_that_are_broken_or_something_else_are_refused(tmp_path, how, error, words):
    their_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(read_weights(tmp_path)) > 10
    broken(tmp_path, how)
    with pytest.raises(error, match=words):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "BPE or WordPiece, got Unigram"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "the normalizer in .* must be BertNormalizer, got none"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True}}, "byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the cut in"),
        ({"normalizer": {"type": "NFC"}}, "the normaliser"),
        ({"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}}, "without gaps"),
        ({"model": []}, "the description of a tokenizer"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(tmp_path, change, words):
    write_tokenizer_json(PretrainedBPE(byte_alphabet(), [], specials={}), tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(ValueError, match=words):
        read_tokenizer_json(tmp_path)
