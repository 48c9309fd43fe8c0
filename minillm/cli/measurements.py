"""From the folders of runs to the data of figures: what was measured, without timings and paths."""

import math
from pathlib import Path
from typing import Any

from minillm.checks import require
from minillm.data import read_json
from minillm.training.metrics import MetricsLog

THIN = 200  # points of a curve that a figure can show


def from_training_run(folders: list[Path]) -> dict[str, Any]:
    """The loss curve of one `minillm train` run in bits per byte, and what compressors reach."""
    require(len(folders) == 1, "figures", "--runs", "one folder of `minillm train`", [str(f) for f in folders])
    (folder,) = folders
    config, rows = read_json(folder / "config.json", "figures"), read_json(folder / "report.json", "figures")
    lines = MetricsLog(folder / "metrics.jsonl").read()
    losses = [line for line in lines if "loss" in line]
    curve = [
        {"step": line["step"], "train": line["loss"] / math.log(2), "held_out": None}
        for line in losses[:: max(1, len(losses) // THIN)]
    ]
    curve += [
        {"step": line["step"], "train": None, "held_out": line["bits_per_byte"]}
        for line in lines
        if "bits_per_byte" in line
    ]
    values = {row["name"]: row["value"] for row in rows}
    return {
        "config": {
            "model": config["model"],
            "training": {k: v for k, v in config["training"].items() if k != "threads"},
        },
        "final": values.pop("this model"),
        "compressors": values,
        "curve": curve,
    }


def from_grpo_runs(folders: list[Path]) -> dict[str, Any]:
    """Rewards, entropies, dead groups and accuracies of one or more `minillm grpo` runs, a seed each."""
    require(len(folders) > 0, "figures", "--runs", "folders of `minillm grpo`", "none")
    runs = []
    for folder in folders:
        lines = MetricsLog(folder / "metrics.jsonl").read()
        require(bool(lines), "figures", "--runs", "folders with a metrics.jsonl", str(folder))
        run: dict[str, Any] = {}
        for name in ("reward", "entropy", "dead_groups", "greedy", "sampled"):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            run[name] = {"update": [step for step, _ in points], "value": [round(value, 5) for _, value in points]}
        runs.append(run)
    return {"runs": runs}
