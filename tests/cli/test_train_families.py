"""`minillm train --preset` for every family: it trains, goes on to the bit, and writes where it can write."""

import json
import shutil

import numpy as np
import pytest

from minillm.autograd import no_grad
from minillm.cli import main, presets
from minillm.decoding import beam_search, generate
from minillm.decoding.conditional import writer
from minillm.models import Config, Decoder, EncoderDecoder, Transformer
from minillm.models.families import FAMILIES
from minillm.models.heads import MaskedLanguageModel
from minillm.models.making import count_made, make_model
from minillm.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from minillm.training.restore import load_model
from tests import typecheck

WORDS = "she sells sea shells by the shore and shells she sells are surely seashells, so if".split()
TEXT = " ".join(np.random.default_rng(0).choice(WORDS, size=200))
SMALL = """
    --layers 1 --d-model 16 --d-ff 24 --heads 4 --context 16 --batch-size 4 --steps 4 --warmup-steps 2 --threads 2
    --checkpoint-every 2 --validate-every 0 --prompt she_sells_sea
""".split()
NAMES = [name for name in FAMILIES if name != "llama"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "shells.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def kind_of(name: str) -> type:
    return {"bert": MaskedLanguageModel, "t5": EncoderDecoder}.get(name, Transformer)


@pytest.mark.equation("training-step", "bert-config", "t5-config", "palm-config", "gpt-config", "prefix-decoder-model")
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_goes_on_to_the_bit_and_writes(name, tmp_path, text, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["train", "--preset", name, "--out", str(whole), "--data", str(text), "--json", *SMALL]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["name"] == "this model" and np.isfinite(rows[0]["value"])
    shutil.copytree(whole, stopped)
    latest_checkpoint(stopped).unlink()  # as if killed after step 2
    with typecheck.suspended():  # annotations have been held to the same calls above
        assert main(["train", "--out", str(stopped), "--resume", "--json"]) == 0
    expected, found = (read_checkpoint(latest_checkpoint(folder)).tensors for folder in (whole, stopped))
    assert expected.keys() == found.keys()
    for tensor, array in expected.items():
        np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)
    first = read_checkpoint(checkpoint_path(whole, 2)).tensors
    assert any((first[tensor] != expected[tensor]).any() for tensor in expected if tensor.startswith("model."))

    restored = load_model(whole)
    assert type(restored.model) is kind_of(name)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 5))
    assert any("sample" in line for line in lines) == (name != "bert")
    capsys.readouterr()
    command = ["generate", "--checkpoint", str(whole), "--prompt", "she sells", "--max-new-tokens", "3"]
    if name == "bert":
        assert main(command) == 2
        assert "the model must be one that continues a text" in capsys.readouterr().err
        return
    assert main([*command, "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["prompt"] == "she sells" and len(made["tokens"]) == 3
    assert main([*command, "--beams", "2"]) == 0


@pytest.mark.equation("training-step", "droppath", "dropout")
def test_what_is_drawn_in_training_is_drawn_again_after_a_stop(tmp_path, text, monkeypatch):
    drops = {"dropout": 0.2, "attention_dropout": 0.1, "droppath": 0.2}
    monkeypatch.setitem(presets.PRESETS, "gpt", {**presets.PRESETS["gpt"], **drops})
    command = ["train", "--preset", "gpt", "--out", str(tmp_path / "whole"), "--data", str(text), "--json"]
    assert main([*command, *SMALL]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    latest_checkpoint(tmp_path / "stopped").unlink()
    assert main(["train", "--out", str(tmp_path / "stopped"), "--resume", "--json"]) == 0
    whole, stopped = (read_checkpoint(latest_checkpoint(tmp_path / name)).tensors for name in ("whole", "stopped"))
    for tensor, array in whole.items():
        np.testing.assert_array_equal(stopped[tensor], array, err_msg=tensor)


@pytest.mark.equation("moe-bias-balancing", "moe-total-loss")
def test_the_biases_of_a_sigmoid_router_move_and_are_saved(tmp_path, text):
    command = ["train", "--preset", "deepseek", "--out", str(tmp_path), "--data", str(text), "--json"]
    assert main([*command, *SMALL]) == 0
    model = load_model(tmp_path).model
    assert isinstance(model, Transformer)
    for block in model.stack.blocks:
        moved = block.ffn.bias.data / 1e-3
        np.testing.assert_allclose(moved, np.round(moved), atol=1e-3)  # four steps of one size each
        assert 0 < np.abs(moved).max() <= 4.01


@pytest.mark.equation("seq2seq-model", "kv-cache-prefix", "greedy", "beam-search")
def test_an_encoder_decoder_writes_with_a_cache_what_it_writes_without():
    model = make_model(Config(**{**presets.tiny_settings("t5"), "vocab_size": 19, "d_model": 16, "init_std": 0.5}), np.random.default_rng(0))  # fmt: skip
    assert isinstance(model, EncoderDecoder)
    source, T = np.random.default_rng(1).integers(0, 19, 9), 8
    conditioned, prompt = writer("test", model, source)
    with no_grad():
        text = prompt
        for _ in range(T):
            text = np.concatenate([text, model(source[None], text).data[:, -1].argmax(-1)[:, None]], 1)
    wanted = text[:, 1:]
    assert len(np.unique(wanted)) > 2
    made = generate(conditioned, prompt, T, np.random.default_rng(0), temperature=0, copies=3)
    np.testing.assert_array_equal(made.tokens, wanted.repeat(3, 0))
    np.testing.assert_array_equal(beam_search(conditioned, prompt, T, beams=1).tokens[:, 0], wanted)
    beams = beam_search(conditioned, prompt, T, beams=3)
    with no_grad():
        whole = np.concatenate([prompt.repeat(3, 0), beams.tokens[0]], 1)
        logits = model(source[None].repeat(3, 0), whole[:, :-1]).data.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = np.take_along_axis(logp, whole[:, 1:, None], -1)[..., 0].sum(-1)
    np.testing.assert_allclose(beams.logprobs[0], total, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_preset_makes_is_as_large_as_counted(name):
    settings = presets.settings_from({"threads": 1}, "tiny" if name == "llama" else name)
    config = presets.model_config(settings, 50)
    model = make_model(config, np.random.default_rng(0))
    assert model.count_parameters() == count_made(config)
    assert isinstance(model, Decoder) == (name == "llama")
    assert config.vocab_size == (51 if name == "bert" else 50)


WRONG = {
    "other numbers": ({"d_ff": 23}, "the numbers in .* must be"),
    "numbers that no memory holds": ({"d_model": 1 << 40}, "the numbers in .* must be"),
    "other places": ({"d_model": 8, "d_ff": 56}, "the numbers|must be of shape"),
    "another family": ({"norm": "rmsnorm"}, "the numbers in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_whose_configuration_is_another_is_refused(tmp_path, case):
    changes, words = WRONG[case]
    config = Config(9, **{**presets.tiny_settings("gpt"), "d_model": 16, "n_layers": 1})
    tensors = {f"model.{name}": p for name, p in make_model(config, np.random.default_rng(0)).state_dict().items()}
    path = checkpoint_path(tmp_path, 1)
    write_checkpoint(path, Checkpoint(tensors, {"config": {"model": config.to_dict()}}))
    assert load_model(path).model.config == config
    write_checkpoint(path, Checkpoint(tensors, {"config": {"model": {**config.to_dict(), **changes}}}))
    with pytest.raises(ValueError, match=words):
        load_model(path)


def test_windows_too_short_to_ask_for_anything_are_refused(tmp_path, text, capsys):
    command = ["train", "--preset", "t5", "--out", str(tmp_path), "--data", str(text), *SMALL, "--context", "1"]
    assert main(command) == 2
    assert "n_ctx must be at least 2 here, got 1" in capsys.readouterr().err
