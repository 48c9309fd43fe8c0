"""`minillm train` and `minillm generate`, from the command line to the files and back; one clear error for each misuse."""

import argparse
import json
import math
import re

import numpy as np
import pytest

from minillm.cli import main, presets
from minillm.cli.generate import add_parser
from minillm.training.checkpoint import checkpoints_in, latest_checkpoint, read_checkpoint
from minillm.training.restore import load_model

WORDS = "she sells sea shells by the shore and shells she sells are surely seashells, so if".split()
TEXT = " ".join(np.random.default_rng(0).choice(WORDS, size=450))
SMALL = """
    --d-model 16 --layers 1 --heads 2 --context 16 --batch-size 4 --steps 12 --warmup-steps 2 --threads 1
    --checkpoint-every 5 --validate-every 6
""".split()


def train(folder, *options) -> int:
    return main(["train", "--out", str(folder), *SMALL, *map(str, options)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "shells.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("run") / "run"
    assert train(path, "--data", text) == 0
    return path


def error_of(capsys, *argv) -> str:
    """The one line on standard error of a command that must fail with exit code 2 and print nothing else."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "", "wrong usage must leave standard output empty"
    lines = [line for line in err.strip().splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, err
    return lines[0]


def test_a_run_leaves_its_configuration_metrics_checkpoints_and_report(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model"]["d_model"] == 16 and config["training"]["steps"] == 12
    assert config == read_checkpoint(latest_checkpoint(folder)).record["config"]
    assert [path.name for path in checkpoints_in(folder)] == [
        "checkpoint-00000010.safetensors",
        "checkpoint-00000012.safetensors",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [0, 6, 12]
    samples = [line["sample"] for line in lines if "sample" in line]
    assert len(samples) == 3 and all(sample.startswith("The ") for sample in samples)


@pytest.mark.equation("perplexity")
def test_the_report_holds_the_model_against_compressors(folder, text):
    import bz2
    import gzip
    import lzma

    rows = {row["name"]: row["value"] for row in json.loads((folder / "report.json").read_text(encoding="utf-8"))}
    content = text.read_bytes()
    n = round(len(content) * 0.1)
    train_part, held_out = content[:-n], content[-n:]
    assert rows["gzip -9"] == pytest.approx(8 * len(gzip.compress(held_out, 9)) / n)
    assert rows["bzip2 -9"] == pytest.approx(8 * len(bz2.compress(held_out, 9)) / n)
    assert rows["xz -9"] == pytest.approx(8 * len(lzma.compress(held_out, preset=9)) / n)
    primed = len(lzma.compress(content, preset=9)) - len(lzma.compress(train_part, preset=9))
    assert rows["xz -9 after the training part"] == pytest.approx(8 * primed / n)
    assert 0 < rows["this model"] < 8.1


def test_text_that_a_primed_compressor_gets_for_nothing_has_no_ratio(tmp_path, capsys):
    (tmp_path / "text").write_text("to be or not to be " * 99, encoding="utf-8")
    assert train(tmp_path / "run", "--data", tmp_path / "text", "--json") == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert row["value"] == 0 and row["difference"] is None


def test_the_effective_configuration_and_the_report_are_printed(tmp_path, text, capsys):
    assert train(tmp_path / "run", "--data", text, "--no-samples") == 0
    out = capsys.readouterr().out
    assert "model: vocab_size=256, d_model=16" in out and "training: steps=12" in out and f"data={text}" in out
    assert re.search(r"gzip -9 +[\d.]+ +bits per byte, held out +[+-][\d.]+ %", out)


def test_json_is_the_report_and_nothing_else(tmp_path, text, capsys):
    assert train(tmp_path / "run", "--data", text, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["name"] == "this model" and {"name", "value", "unit", "difference"} == rows[0].keys()


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, folder, text):
    stopped = tmp_path / "run"
    assert train(stopped, "--data", text) == 0
    latest_checkpoint(stopped).unlink()  # as if killed after step 10
    assert main(["train", "--out", str(stopped), "--resume"]) == 0
    expected, found = (read_checkpoint(latest_checkpoint(path)).tensors for path in (folder, stopped))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_minutes_become_a_number_of_steps_that_is_written_down(tmp_path, text):
    options = [option for option in SMALL if option not in ("--steps", "12")]
    assert main(["train", "--out", str(tmp_path / "run"), *options, "--data", str(text), "--minutes", "0.005"]) == 0
    steps = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["training"]["steps"]
    assert steps >= 1 and read_checkpoint(latest_checkpoint(tmp_path / "run")).record["step"] == steps


def test_more_minutes_than_the_steps_need_change_nothing(tmp_path, text):
    options = ["--preset", "tiny", "--d-model", 8, "--layers", 1, "--heads", 1, "--context", 8, "--batch-size", 2]
    assert main(["train", "--out", str(tmp_path), *map(str, options), "--data", str(text), "--minutes", "60"]) == 0
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["training"]["steps"] == 300


def test_a_run_cut_short_warms_up_for_the_same_share_of_it(tmp_path, text):
    """`--steps 4` alone must work: the preset's warm-up is for the preset's number of steps."""
    short = " ".join(SMALL).replace("--steps 12 --warmup-steps 2", "").split()
    run = ["train", "--data", str(text), *short, "--preset", "tiny"]  # 300 steps, of which 20 to warm up

    def settings(folder):
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]

    assert main([*run, "--out", str(tmp_path / "cut"), "--steps", "4"]) == 0
    assert (settings(tmp_path / "cut")["steps"], settings(tmp_path / "cut")["warmup_steps"]) == (4, 1)
    assert presets.settings_from({"steps": 150}, "tiny")["warmup_steps"] == 10
    assert presets.settings_from({"steps": 3000}, "tiny")["warmup_steps"] == 20
    assert presets.settings_from({"steps": 150, "warmup_steps": 20}, "tiny")["warmup_steps"] == 20
    assert main([*run, "--out", str(tmp_path / "timed"), "--minutes", "0.005"]) == 0
    timed = settings(tmp_path / "timed")
    assert timed["warmup_steps"] == -(-20 * timed["steps"] // 300)


def test_a_learnt_tokenizer_is_saved_with_the_model(tmp_path, text):
    assert train(tmp_path / "run", "--data", text, "--tokenizer", "bpe", "--vocab-size", 270) == 0
    restored = load_model(tmp_path / "run")
    assert restored.tokenizer is not None and restored.tokenizer.vocab_size == restored.model.config.vocab_size == 270
    assert len(restored.tokenizer.encode(TEXT)) < len(TEXT)


def test_the_synthetic_language_is_held_against_its_entropy_rate(tmp_path, capsys):
    assert train(tmp_path / "run", "--data", "synthetic", "--synthetic-tokens", 3000, "--json") == 0
    rows = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert rows["uniform guessing"] == pytest.approx(math.log(12))
    assert rows["entropy rate of the source"] == pytest.approx(1.74096, abs=1e-4)
    assert rows["the source itself on this text"] == pytest.approx(1.74, abs=0.15)  # 300 symbols
    assert rows["this model"] > rows["the source itself on this text"]
    assert (
        main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt-ids", "4, 5", "--max-new-tokens", "3"]) == 0
    )
    assert re.fullmatch(r"4 5( \d+){3}\n", capsys.readouterr().out)


# -- generate ----------------------------------------------------------------------------------------------------------


def generated(capsys, folder, *options) -> str:
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(folder), *map(str, options)]) == 0
    return capsys.readouterr().out


def test_the_prompt_is_continued_and_the_seed_decides_how(folder, capsys):
    first, again, other = (generated(capsys, folder, "--prompt", "sea ", "--seed", seed) for seed in (1, 1, 2))
    assert first.startswith("sea ") and first == again != other


def test_json_holds_tokens_and_log_probability(folder, capsys):
    rows = json.loads(generated(capsys, folder, "--prompt", "sea", "--samples", 3, "--max-new-tokens", 5, "--json"))
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"] == "sea" and len(row["tokens"]) == 5 and row["logprob"] < 0 and row["terminated"] is False
    printed = generated(capsys, folder, "--prompt", "sea", "--samples", 3, "--max-new-tokens", 5)
    assert printed.count("\n---\n") == 2 and printed.startswith("sea" + rows[0]["text"])


@pytest.mark.equation("greedy")
def test_temperature_zero_needs_no_seed_and_streams_what_json_says(folder, capsys):
    options = ["--prompt", "sea", "--temperature", 0, "--max-new-tokens", 8]
    streamed = [generated(capsys, folder, *options, "--seed", seed) for seed in (1, 2)]
    assert streamed[0] == streamed[1]
    row = json.loads(generated(capsys, folder, *options, "--json"))[0]
    assert streamed[0] == "sea" + row["text"] + "\n"


@pytest.mark.equation("beam-search")
def test_beams_are_printed_best_first_and_one_beam_is_greedy(folder, capsys):
    options = ["--prompt", "sea", "--max-new-tokens", 8]
    greedy = generated(capsys, folder, *options, "--temperature", 0)
    assert generated(capsys, folder, *options, "--beams", 1) == greedy
    rows = json.loads(generated(capsys, folder, *options, "--beams", 4, "--samples", 3, "--json"))
    found = [row["logprob"] for row in rows]
    assert len(rows) == 3 and found == sorted(found, reverse=True) and len({row["text"] for row in rows}) == 3


@pytest.mark.equation("stop-conditions", "sample-penalties")
def test_stops_and_penalties_reach_the_generation(folder, capsys):
    options = ["--prompt", "sea", "--temperature", 0, "--max-new-tokens", 12, "--json"]
    plain = json.loads(generated(capsys, folder, *options))[0]
    stop = plain["text"][1:3]
    ended = json.loads(generated(capsys, folder, *options, "--stop", stop))[0]
    assert ended["terminated"] and ended["text"] == plain["text"][: plain["text"].index(stop) + len(stop)]
    varied = json.loads(generated(capsys, folder, *options, "--no-repeat-ngram", 1, "--presence", 1))[0]
    assert len(set(varied["tokens"])) == len(varied["tokens"])


@pytest.mark.equation("wn-topp-range")
def test_the_defaults_lie_in_the_range_of_the_notes():
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["generate"])
    assert 0.7 <= args.temperature <= 1.0 and 0.9 <= args.top_p <= 0.95


def test_a_checkpoint_file_may_be_named_itself(folder, capsys):
    assert generated(capsys, latest_checkpoint(folder), "--prompt", "sea").startswith("sea")


GENERATE_ERRORS = {
    "empty text": (["--prompt", ""], "the prompt must be at least one token, got an empty text"),
    "no ids": (["--prompt-ids", " "], "the prompt must be at least one token"),
    "ids out of range": (["--prompt-ids", "3 256"], r"256"),
    "negative id": (["--prompt-ids", "3,-1"], "-1"),
    "ids that are words": (["--prompt-ids", "three"], "--prompt-ids must be whole numbers"),
    "prompt longer than the context": (["--prompt", "x" * 40], "at most 17 together .* context is 16"),
    "more tokens than the context": (["--prompt", "sea", "--max-new-tokens", 15], "at most 17 together"),
    "no new tokens": (["--max-new-tokens", 0], "max_new_tokens must be a positive integer"),
    "no samples": (["--samples", 0], "--samples must be a positive integer"),
    "negative temperature": (["--temperature", -1], "the temperature must be a non-negative number"),
    "top-k of nothing": (["--top-k", 0], "k must be a positive integer"),
    "top-p above one": (["--top-p", 1.5], r"p must be in \(0, 1\]"),
    "repetition of zero": (["--repetition", 0], "repetition must be a positive number"),
    "n-grams of less than nothing": (["--no-repeat-ngram", -1], "no_repeat_ngram must be a non-negative integer"),
    "no beams": (["--beams", 0], "--beams must be a positive integer, got 0"),
    "more samples than beams": (["--beams", 2, "--samples", 3], "--samples must be at most the number of beams, 2"),
    "beams that rank by nothing": (["--beams", 2, "--length-penalty", "nan"], "length_penalty must be a finite number"),
    "an empty stop": (["--stop", ""], "a stop sequence must be at least one token long"),
    "unknown option": (["--colour", "blue"], "unrecognized arguments: --colour blue"),
    "two prompts": (["--prompt", "a", "--prompt-ids", "1"], "not allowed with"),
}


@pytest.mark.parametrize("kind", GENERATE_ERRORS)
def test_generate_says_in_one_line_what_is_wrong(folder, capsys, kind):
    options, words = GENERATE_ERRORS[kind]
    assert re.search(words, error_of(capsys, "generate", "--checkpoint", folder, *options))


def test_a_model_without_a_tokenizer_wants_ids(tmp_path, capsys):
    assert train(tmp_path / "run", "--data", "synthetic", "--synthetic-tokens", 3000) == 0
    assert "Pass --prompt-ids" in error_of(capsys, "generate", "--checkpoint", tmp_path / "run", "--prompt", "a")


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "missing"])
def test_damaged_checkpoints_are_one_line_too(folder, tmp_path, capsys, damage):
    content = bytearray(latest_checkpoint(folder).read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path = tmp_path / "checkpoint-00000012.safetensors"
    if damage != "missing":
        path.write_bytes({"cut": content[:-100], "foreign": b"GIF89a" + bytes(50)}.get(damage, content))
    words = {"missing": "does not exist", "flipped": "checksum is wrong"}.get(damage, "complete minillm checkpoint")
    assert re.search(words, error_of(capsys, "generate", "--checkpoint", path))


# -- wrong usage of train ----------------------------------------------------------------------------------------------

TRAIN_ERRORS = {
    "missing file": (["--data", "nowhere.txt"], "path must be an existing file or folder, got nowhere.txt"),
    "unknown option": (["--learning-speed", 3], "unrecognized arguments"),
    "unknown preset": (["--preset", "huge"], "invalid choice: 'huge'"),
    "unknown tokenizer": (["--tokenizer", "words"], "invalid choice: 'words'"),
    "no number": (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    "negative rate": (["--lr", -1], "lr must be a positive number, got -1.0"),
    "no steps": (["--steps", 0], "steps must be a positive integer, got 0"),
    "heads that do not divide": (["--heads", 3], r"d_model / n_heads must be an even integer"),
    "warm-up longer than the run": (["--warmup-steps", 13], "warmup_steps must be at most steps = 12, got 13"),
    "context longer than the text": (["--context", 5000], "tokens must be more than n_ctx = 5000"),
    "everything held out": (["--held-out", 1.0], "held_out must be between 0 and 1"),
    "vocabulary under the bytes": (["--tokenizer", "bpe", "--vocab-size", 100], "vocab_size must be at least 256"),
    "both lengths": (["--minutes", 1], "not allowed with argument"),
    "empty prompt": (["--prompt", ""], "--prompt must be a text, got an empty one"),
    "no threads": (["--threads", 0], "threads must be a positive integer"),
}


@pytest.mark.parametrize("kind", TRAIN_ERRORS)
def test_train_says_in_one_line_what_is_wrong_and_writes_nothing(tmp_path, text, capsys, kind):
    options, words = TRAIN_ERRORS[kind]
    data = [] if "--data" in options else ["--data", text]
    assert re.search(words, error_of(capsys, "train", "--out", tmp_path / "run", *SMALL, *data, *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"  \n", b"\x00\x01\x02abc", b"\xff\xfe\xfa" * 9])
def test_files_without_text_are_refused(tmp_path, capsys, content):
    (tmp_path / "file").write_bytes(content)
    message = error_of(capsys, "train", "--out", tmp_path / "run", *SMALL, "--data", tmp_path / "file")
    assert "must be text" in message and not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(folder, text, capsys):
    before = latest_checkpoint(folder).read_bytes()
    message = error_of(capsys, "train", "--out", folder, *SMALL, "--data", text)
    assert "Pass --resume to go on with it, or another --out" in message
    assert latest_checkpoint(folder).read_bytes() == before


def test_resuming_with_other_settings_or_without_a_run_is_refused(folder, tmp_path, capsys):
    assert "--lr must be 0.003, as in the run to resume, got 1.0" in error_of(
        capsys, "train", "--out", folder, "--resume", "--lr", 1
    )
    assert "the folder of a run to resume" in error_of(capsys, "train", "--out", tmp_path / "none", "--resume")
    (tmp_path / "config.json").write_text('{"colour": "blue"}')
    assert "the configuration of a run" in error_of(capsys, "train", "--out", tmp_path, "--resume")


def test_resuming_on_changed_text_is_refused(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert train(tmp_path / "run", "--data", path) == 0
    path.write_text(TEXT.upper(), encoding="utf-8")
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "Resume with the data and the sizes of the first run" in capsys.readouterr().err


def test_resuming_from_a_damaged_checkpoint_names_the_good_one_before(tmp_path, text, capsys):
    assert train(tmp_path / "run", "--data", text) == 0
    last = latest_checkpoint(tmp_path / "run")
    last.write_bytes(last.read_bytes()[:-9])
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert re.search(r"damaged one.*The one before it is .*checkpoint-00000010", capsys.readouterr().err)


def test_divergence_ends_with_one_line_and_exit_code_1(tmp_path, text, capsys):
    with np.errstate(all="ignore"):
        assert train(tmp_path / "run", "--data", text, "--lr", 1e25, "--warmup-steps", 0, "--no-samples") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "must be finite" in last and "at step 2" in last and "The last good checkpoint is" in last


@pytest.mark.slow
def test_on_the_synthetic_language_the_preset_comes_within_two_per_cent_of_the_entropy_rate(tmp_path, capsys):
    assert main(["train", "--data", "synthetic", "--out", str(tmp_path / "run"), "--json"]) == 0
    rows = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert rows["this model"] < 1.02 * rows["entropy rate of the source"]
    assert rows["this model"] > 0.99 * rows["the source itself on this text"]
