"""Figures: every drawing draws from data of the form that its measurement gives, and complains in one line otherwise."""

import json
from pathlib import Path

import pytest

from minillm.cli import drawings, main, measurements
from minillm.cli.figures import DRAWINGS

FIGURES = Path(__file__).parents[2] / "figures"


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_committed_figures_can_be_drawn_from_the_committed_data(name, tmp_path):
    data = FIGURES / "data" / f"{name}.json"
    assert data.is_file(), f"measure it: {DRAWINGS[name].measured_by}"
    figure = DRAWINGS[name].draw(json.loads(data.read_text()))
    figure.savefig(tmp_path / "figure.png")
    assert (FIGURES / f"{name}.png").is_file()


def run_folder(path: Path) -> Path:
    path.mkdir()
    lines = [
        {"step": 0, "validation_loss": 5.5, "bits_per_byte": 8.0},
        {"step": 1, "loss": 5.5},
        {"step": 2, "loss": 2.0, "reward": 0.5},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(json.dumps({"model": {"d_model": 8}, "training": {"lr": 1, "threads": 2}}))
    (path / "report.json").write_text(
        json.dumps([{"name": "this model", "value": 2.5}, {"name": "gzip -9", "value": 2.1}])
    )
    return path


def test_a_training_run_becomes_a_curve_in_bits_per_byte(tmp_path):
    data = measurements.from_training_run([run_folder(tmp_path / "run")])
    assert data["final"] == 2.5 and data["compressors"] == {"gzip -9": 2.1}
    assert data["curve"][1]["train"] == pytest.approx(2.0 / 0.6931, rel=1e-3)
    assert data["curve"][-1] == {"step": 0, "train": None, "held_out": 8.0}
    assert "seconds" not in json.dumps(data) and "threads" not in json.dumps(data)
    drawings.text(data)


def test_grpo_runs_become_curves_by_name(tmp_path):
    data = measurements.from_grpo_runs([run_folder(tmp_path / "a"), run_folder(tmp_path / "b")])
    assert [run["reward"] for run in data["runs"]] == [{"update": [2], "value": [0.5]}] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["figures", "nonsense"], "each name must be one of 'tour', 'bench', 'text', 'grpo'"),
        (["figures", "bench", "--runs", "x"], "--runs goes with one of the figures text and grpo"),
        (["figures", "text", "--runs", "no/such/run"], "no/such/run"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1


def test_a_figure_without_data_names_the_command_that_measures_it(tmp_path, capsys):
    assert main(["figures", "bench", "--folder", str(tmp_path)]) == 1
    assert "minillm bench --json" in capsys.readouterr().err
