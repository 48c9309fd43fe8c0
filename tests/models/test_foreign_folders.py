"""Folders of every model type that we read: what transformers saved computes the same here, and what we save, there."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minillm.autograd import no_grad
from minillm.cli import main
from minillm.data.pretrained_bpe import PretrainedBPE, byte_alphabet
from minillm.data.tokenizer_json import write_tokenizer_json
from minillm.decoding import generate
from minillm.functional.rope_scaling import RopeScaling
from minillm.models import Config, Decoder, EncoderDecoder, Transformer
from minillm.models.families import gpt_config
from minillm.models.folder import load_folder, save_folder
from minillm.models.heads import MaskedLanguageModel
from minillm.models.llama_rope import read_rope, write_rope
from minillm.models.pretrained import load_pretrained
from minillm.training.restore import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, CONTEXT, TRAINED = 61, 48, 16
RNG = np.random.default_rng(3)
IDS, SOURCE = RNG.integers(3, V, size=(2, 20)), RNG.integers(3, V, size=(2, 9))
LLAMA = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": CONTEXT, "attn_implementation": "eager",
}  # fmt: skip
BERT = {
    "vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 34, "attn_implementation": "eager", "pad_token_id": 1, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40,
    "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager",
}  # fmt: skip


def randomised(model):
    """Weights of a size that matters, gains and shifts among them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight")
            parameter.uniform_(0.5, 1.5) if gain else parameter.normal_(0, 0.2)
    return model.eval()


def theirs_of(kind: str):
    make = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        "gpt2 exact": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, activation_function="gelu")),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "bert pretraining": lambda: transformers.BertForPreTraining(transformers.BertConfig(**BERT)),
        "bert encoder": lambda: transformers.BertModel(transformers.BertConfig(**BERT, hidden_act="relu")),
        "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT, type_vocab_size=1)),
        "roberta encoder": lambda: transformers.RobertaModel(transformers.RobertaConfig(**BERT)),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=5)),
        "mistral, wide heads": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**{**LLAMA, "head_dim": 12}, sliding_window=None)
        ),
        "mistral that sees all": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**LLAMA, sliding_window=None)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=7)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=V, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4,
                                  decoder_start_token_id=0, pad_token_id=0)),
    }  # fmt: skip
    return randomised(make[kind]())


def their_output(model, kind: str) -> np.ndarray:
    with torch.no_grad():
        if kind == "t5":
            return model(input_ids=torch.from_numpy(SOURCE), decoder_input_ids=torch.from_numpy(IDS)).logits.numpy()
        found = model(torch.from_numpy(IDS))
        if kind == "bert pretraining":
            return found.prediction_logits.numpy()
        return (found.last_hidden_state if kind.endswith("encoder") else found.logits).float().numpy()


def our_output(model, kind: str) -> np.ndarray:
    with no_grad():
        if kind == "t5":
            return model(SOURCE, IDS).data
        return (model.hidden(IDS) if kind.endswith("encoder") else model(IDS)).data


CLASSES = {
    "gpt2": Transformer, "gpt2 exact": Transformer, "bert": MaskedLanguageModel, "mixtral": Transformer,
    "bert pretraining": MaskedLanguageModel, "bert encoder": Transformer, "roberta": MaskedLanguageModel,
    "roberta encoder": Transformer, "t5": EncoderDecoder,
    "mistral": Transformer, "mistral, wide heads": Transformer, "mistral that sees all": Decoder,
}  # fmt: skip


@pytest.mark.equation("gpt-config", "bert-config", "t5-config", "moe-output")
@pytest.mark.parametrize("kind", CLASSES)
def test_what_transformers_saved_is_the_same_function_here(tmp_path, kind):
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path)
    ours = load_folder(tmp_path)
    assert type(ours) is CLASSES[kind]
    expected, found = their_output(theirs, kind), our_output(ours, kind)
    np.testing.assert_allclose(found, expected, atol=2e-6 * max(1.0, np.abs(expected).max()) * 5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "t5"])
def test_files_of_sixteen_bits(tmp_path, kind, dtype):
    theirs = theirs_of(kind).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    ours = load_folder(tmp_path)
    assert all(p.dtype == np.float32 for p in ours.parameters())
    expected = their_output(theirs.float(), kind)  # the rounded weights, computed with in float32
    np.testing.assert_allclose(our_output(ours, kind), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_the_names_of_the_first_bert_checkpoints(tmp_path):
    from minillm.data.safetensors_files import write_safetensors
    from minillm.models.folder import read_weights

    theirs = theirs_of("bert")
    theirs.save_pretrained(tmp_path)
    new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = read_weights(tmp_path)
    for name, old in new.items():
        weights = {k.replace(name, old): v for k, v in weights.items()}
    write_safetensors(tmp_path / "model.safetensors", weights)
    np.testing.assert_allclose(our_output(load_folder(tmp_path), "bert"), their_output(theirs, "bert"), atol=2e-5)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": TRAINED},
    "yarn, numbers given": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": TRAINED, "attention_factor": 1.3,
        "beta_fast": 6.0, "beta_slow": 0.5, "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": TRAINED, "mscale": 1.4,
        "mscale_all_dim": 0.6,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
        "original_max_position_embeddings": TRAINED,
    },
}  # fmt: skip


def scaled(name: str, **changes):
    # A small base, so that pairs of every speed are among eight
    rope = {**ROPES[name], "rope_theta": 300.0}
    config = transformers.LlamaConfig(**{**LLAMA, **changes}, rope_parameters=rope)
    return randomised(transformers.LlamaForCausalLM(config))


@pytest.mark.equation("pos-rope-scaling")
@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_positions_are_theirs_with_and_without_a_cache(tmp_path, name):
    theirs = scaled(name)
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, V, (2, CONTEXT))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = load_folder(tmp_path)
    with no_grad():
        np.testing.assert_allclose(ours(ids).data, expected, atol=1e-4)
        plain = Decoder(replace(ours.config, rope_scaling=None), np.random.default_rng(0))
        plain.load_state_dict(ours.state_dict())
        changed = np.abs(plain(ids).data - expected).max()
        assert changed < 1e-4 if name == "dynamic" else changed > 1e-2  # dynamic: not before the text is longer
        cache, found = ours.new_cache(2), []
        for start, stop in ((0, 30), (30, 37), *((t, t + 1) for t in range(37, CONTEXT))):
            found.append(ours(ids[:, start:stop], cache).data)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-4)


@pytest.mark.equation("pos-rope-scaling")
def test_dynamic_positions_of_a_text_as_long_as_the_longer_context(tmp_path):
    theirs = scaled("dynamic")
    theirs.save_pretrained(tmp_path)
    longer = 3 * CONTEXT
    ids = np.random.default_rng(0).integers(0, V, (1, longer))
    ours = load_folder(tmp_path, context=longer)
    with torch.no_grad(), no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(ours(ids).data, expected, atol=1e-4)
    assert ours.config.rope_scaling == RopeScaling("ntk", 4.0 * 3 - 3)
    assert load_folder(tmp_path, context=9).config.context == 9


@pytest.mark.equation("pos-rope-scaling")
def test_the_old_names_of_scaled_positions(tmp_path):
    scaled("linear").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    state = json.loads(path.read_text())
    state.pop("rope_parameters")
    path.write_text(json.dumps({**state, "rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 3.0}}))
    config = load_folder(tmp_path).config
    assert config.rope_scaling == RopeScaling("linear", 3.0) and config.rope_base == 300.0


@pytest.mark.equation("pos-rope-scaling")
@pytest.mark.parametrize("name", ROPES)
def test_scaled_positions_are_written_as_they_were_read(tmp_path, name):
    scaled(name).save_pretrained(tmp_path / "theirs")
    ours = load_folder(tmp_path / "theirs", context=2 * CONTEXT)
    save_folder(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad(), no_grad():
        np.testing.assert_allclose(again(torch.from_numpy(IDS)).logits.numpy(), ours(IDS).data, atol=1e-4)


@pytest.mark.equation("pos-rope-scaling")
def test_a_scaled_model_of_the_general_kind_computes_the_same():
    scaling = RopeScaling("yarn", 3.0, TRAINED, 0.5, 6.0, "pairs", 1.3)
    config = Config(V, 32, 2, 2, 1, 48, context=CONTEXT, rope_scaling=scaling, rope_base=300.0)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    rotation = Transformer(config, np.random.default_rng(0)).stack.positions
    decoder = Decoder(config, np.random.default_rng(0))
    np.testing.assert_array_equal(rotation.angles, decoder._angles)
    assert decoder.blocks[0].attention.scale == pytest.approx(rotation.magnitude**2 / 4)


@pytest.mark.equation("gpt-config")
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("ffn", ["gelu", "gelu_tanh"])
def test_what_we_saved_of_a_gpt2_is_the_same_function_there(tmp_path, ffn, dtype):
    config = gpt_config(V, d_model=24, n_layers=2, n_heads=3, d_ff=40, context=32, ffn=ffn, init_std=0.2)
    ours = Transformer(config, np.random.default_rng(0))
    for name, p in ours.named_parameters():
        p.data[...] += np.random.default_rng(1).normal(0, 0.1, p.shape) * name.endswith(
            ("shift", "gain", "b_q", "b_in")
        )
    save_folder(ours, tmp_path, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = load_folder(tmp_path)
    np.testing.assert_allclose(their_output(theirs, "gpt2"), our_output(again, "gpt2"), atol=1e-5)
    if dtype == "F32":
        np.testing.assert_array_equal(our_output(again, "gpt2"), our_output(ours, "gpt2"))


def test_a_gpt2_folder_with_its_tokenizer_writes_text(tmp_path):
    theirs_of("gpt2").save_pretrained(tmp_path)
    state = json.loads((tmp_path / "config.json").read_text())
    assert state["model_type"] == "gpt2"
    tokenizer = PretrainedBPE(byte_alphabet()[:V], [], specials={})
    write_tokenizer_json(tokenizer, tmp_path)
    found = load_pretrained(tmp_path, context=16)
    assert found.tokenizer == tokenizer and found.model.config.context == 16
    made = generate(found.model, IDS[:1, :5], 8, np.random.default_rng(0), temperature=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ends = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(torch.from_numpy(IDS[:1, :5]), attention_mask=torch.ones(1, 5), **ends).numpy()[:, 5:]
    np.testing.assert_array_equal(made.tokens, expected)


@pytest.mark.equation("seq2seq-model", "kv-cache-prefix")
def test_a_t5_folder_answers_from_the_command_line_as_in_transformers(tmp_path, capsys):
    theirs = theirs_of("t5")
    theirs.save_pretrained(tmp_path)
    ends = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(torch.from_numpy(SOURCE[:1]), **ends).numpy()[0, 1:]
    prompt = " ".join(map(str, SOURCE[0]))
    command = ["generate", "--checkpoint", str(tmp_path), "--prompt-ids", prompt, "--temperature", "0", "--json"]
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "7"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == expected.tolist()


def test_an_encoder_folder_writes_nothing(tmp_path, capsys):
    theirs_of("roberta").save_pretrained(tmp_path)
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt-ids", "4 5"]) == 2
    assert "the model must be one that continues a text" in capsys.readouterr().err


def changed(folder, kind: str, **changes):
    theirs_of(kind).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED = {
    "gpt2, another activation": ("gpt2", {"activation_function": "silu"}, "activation_function must be one of .*, got silu"),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
    "gpt2, scores": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx must be False, got True"),
    "bert, a decoder": ("bert", {"is_decoder": True}, "is_decoder must be False, got True"),
    "bert, relative": ("bert", {"position_embedding_type": "relative_key"}, "must be absolute, got relative_key"),
    "roberta, padding": ("roberta", {"pad_token_id": 5}, "pad_token_id must be 1, got 5"),
    "t5, gated": ("t5", {"feed_forward_proj": "gated-gelu"}, "must be that of the first T5"),
    "gpt2, a size missing": ("gpt2", {"n_embd": None}, "d_model must be a positive integer, got None"),
    "gpt2, other sizes": ("gpt2", {"n_inner": 44}, r"load_state_dict: .*w_in must be of shape \(44, 24\)"),
    "gpt2, other weights": ("gpt2", {"model_type": "bert", **{k: v for k, v in BERT.items() if v}}, "from_bert: the weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_variants_that_we_do_not_have_are_refused(tmp_path, case):
    kind, changes, words = REFUSED[case]
    changed(tmp_path, kind, **changes)
    with pytest.raises(ValueError, match=words):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "longrope"}, "must be one of 'default', 'linear', 'dynamic', 'yarn', 'llama3', got longrope"),
        ({"rope_type": "linear"}, "the rotary positions 'linear' must be given with factor, got none"),
        ({"rope_type": "llama3", "factor": 2.0}, "given with low_freq_factor, got none"),
        ({"rope_type": "linear", "factor": 0.0}, "factor must be a positive number, got 0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        (["linear"], "rope_parameters must be names with numbers"),
    ],
)
def test_rotary_positions_that_we_do_not_have_are_refused(rope, words):
    with pytest.raises(ValueError, match=words):
        read_rope({"max_position_embeddings": 64, "rope_parameters": rope}, 64)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the ramp of YaRN must be 'pairs' or 'whole pairs', got turns"):
        write_rope(Config(V, rope_scaling=RopeScaling("yarn", 2.0)))
    with pytest.raises(ValueError, match=r"save_folder: the model must be a Decoder .* got a Transformer with other"):
        save_folder(Transformer(Config(V, norm="layernorm"), np.random.default_rng(0)), tmp_path)
    with pytest.raises(ValueError, match="rope_scaling must be None without rotary positions"):
        Config(V, positions="alibi", rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path)
