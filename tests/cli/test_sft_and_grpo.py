"""`minillm sft` and `minillm grpo`, from the command line to the files and back; one clear error for each misuse."""

import json

import numpy as np
import pytest

from minillm.alignment import GRPOConfig
from minillm.cli import build_parser, main
from minillm.cli.grpo import PRESETS
from minillm.cli.stage_run import fresh_config
from minillm.training.checkpoint import Checkpoint, checkpoints_in, latest_checkpoint, read_checkpoint, write_checkpoint
from minillm.training.restore import load_model

TINY = """
    --digits 1 --d-model 16 --layers 1 --heads 2 --d-ff 32 --batch 8 --updates 5 --evaluate-every 2 --threads 1
""".split()
SHORT = "--prompts 3 --group 3 --updates 4 --evaluate-every 2 --threads 1".split()


def sft(folder, *options) -> int:
    return main(["sft", "--out", str(folder), *TINY, *map(str, options)])


def grpo(folder, policy, *options) -> int:
    return main(["grpo", "--out", str(folder), "--policy", str(policy), *SHORT, *map(str, options)])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    assert sft(folder, "--save-every", 2) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    assert grpo(folder, start, "--beta", 0.1) == 0
    return folder


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(folder) -> dict[str, np.ndarray]:
    return read_checkpoint(latest_checkpoint(folder)).tensors


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(start, run):
    for folder, stage, updates in ((start, "sft", 5), (run, "grpo", 4)):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config[stage]["updates"] == updates and config["task"] == {"digits": 1}
        assert config == read_checkpoint(latest_checkpoint(folder)).record["config"]
        lines = lines_of(folder)
        assert [line["step"] for line in lines] == list(range(updates + 1))
        assert all(line["seconds"] >= 0 for line in lines)
        assert [line["step"] for line in lines if "sampled" in line] == sorted({0, 2, 4, updates})
    assert [path.name[11:19] for path in checkpoints_in(start)] == ["00000004", "00000005"]
    wanted = {
        "reward",
        "entropy",
        "dead_groups",
        "clip_fraction",
        "kl_old",
        "kl_reference",
        "gradient_norm",
        "loss",
        "lr",
    }
    assert wanted <= lines_of(run)[1].keys()


def test_grpo_starts_from_the_policy_and_keeps_it_as_its_reference(start, run):
    policy, tensors = load_model(start).model.state_dict(), weights_of(run)
    for name, array in policy.items():
        np.testing.assert_array_equal(tensors[f"reference.{name}"], array)


def test_configuration_and_result_are_printed(tmp_path, start, capsys):
    assert grpo(tmp_path / "run", start) == 0
    out, err = capsys.readouterr()
    assert "grpo: updates=4, " in out and "model: vocab_size=15, " in out and "parameters; writing to" in out
    assert out.splitlines()[-2].split()[:3] == ["stage", "updates", "seconds"]
    assert "grpo:" in err and "4/4" in err, "progress goes to standard error"


def test_json_is_one_array_and_nothing_else(tmp_path, start, capsys):
    assert grpo(tmp_path / "run", start, "--json", "--evaluate-every", 0) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["stage"] == "grpo" and row["updates"] == 4
    assert 0 <= row["sampled"] <= 1 and row["sampled before"] is None


def test_a_run_that_ran_out_of_time_goes_on_to_the_same_end(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sft(whole) == 0
    assert sft(parts, "--seconds", 1e-9) == 0
    assert "stopped after 0 s; --resume goes on" in capsys.readouterr().err
    assert len(lines_of(parts)) == 1
    for _ in range(2):  # a third call finds nothing left to do
        assert main(["sft", "--out", str(parts), "--resume"]) == 0
    assert weights_of(whole).keys() == weights_of(parts).keys()
    for name, array in weights_of(whole).items():
        np.testing.assert_array_equal(weights_of(parts)[name], array, err_msg=name)
    without_time = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(f)] for f in (whole, parts)]
    assert without_time[0] == without_time[1]


def test_metrics_written_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    folder = tmp_path / "run"
    assert sft(folder, "--save-every", 2) == 0
    expected, weights = lines_of(folder), weights_of(folder)
    latest_checkpoint(folder).unlink()
    assert main(["sft", "--out", str(folder), "--resume"]) == 0
    assert [line["step"] for line in lines_of(folder)] == [line["step"] for line in expected]
    for name, array in weights.items():
        np.testing.assert_array_equal(weights_of(folder)[name], array)


def test_presets_are_shorter_and_options_win():
    parser = build_parser("grpo")
    for options, updates in (([], 800), (["--preset", "quick"], 200), (["--preset", "quick", "--updates", "7"], 7)):
        args = parser.parse_args(["grpo", "--out", "nowhere", *options])
        assert fresh_config(args, GRPOConfig, PRESETS[args.preset]).updates == updates


def error_of(capsys, *argv) -> str:
    """The one line on standard error of a command that must fail with exit code 2 and print nothing else."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "", "wrong usage must leave standard output empty"
    lines = [line for line in err.strip().splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, err
    return lines[0]


def test_misuse_is_one_line_and_leaves_nothing(tmp_path, start, run, capsys):
    new = tmp_path / "new"
    stranger = tmp_path / "stranger.safetensors"
    saved = read_checkpoint(latest_checkpoint(start))
    write_checkpoint(stranger, Checkpoint(saved.tensors, {**saved.record, "tokenizer": None}))
    for argv, wanted in (
        (["sft", "--out", start], "--out must be a folder without a run, got"),
        (["sft", "--out", new, "--resume"], "must be a checkpoint, or the folder of a run that has saved one"),
        (
            ["sft", "--out", run, "--resume"],
            "--out must be the folder of a run of `minillm sft`, got one of the stage grpo",
        ),
        (["sft", "--out", start, "--resume", "--lr", 0.5], "--lr must be 0.005, as in the run to resume, got 0.5"),
        (["sft", "--out", new, "--noise", 2], "SFTConfig: noise must be a share in [0, 1], got 2.0"),
        (["sft", "--out", new, "--digits", 9], "AdditionTask: digits must be 1, 2 or 3, got 9"),
        (["sft", "--out", new, "--d-model", 17], "d_model / n_heads must be an even integer"),
        (["sft", "--out", new, "--seconds", -1, *TINY], "--seconds must be a positive number, got -1.0"),
        (["sft", "--out", new, "--save-every", 0, *TINY], "--save-every must be a positive integer, got 0"),
        (["sft", "--out", new, "--updates", "many"], "argument --updates: invalid int value: 'many'"),
        (["grpo", "--out", new, "--policy", tmp_path / "no"], "which does not exist. `minillm sft` makes one."),
        (["grpo", "--out", new, "--policy", stranger], "--policy must be one for sums, with the tokenizer of the task"),
        (["grpo", "--out", new, "--policy", start / "config.json"], "read_checkpoint: the file"),
        (["grpo", "--out", new, "--policy", start, "--group", 1], "GRPOConfig: group must be at least 2"),
        (["grpo", "--out", new, "--kl", "k9"], "argument --kl: invalid choice: 'k9'"),
    ):
        assert wanted in error_of(capsys, *argv), argv
        assert not new.exists()
