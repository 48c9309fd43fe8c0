"""kill -9 at random moments of a training run loses nothing and resumes to bit-identical weights."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minillm.training.checkpoint import checkpoints_in, latest_checkpoint, read_checkpoint

STEPS, EVERY = 600, 7
SETTINGS = f"""
    --d-model 16 --layers 1 --heads 2 --context 16 --batch-size 4 --steps {STEPS} --warmup-steps 10 --threads 2
    --checkpoint-every {EVERY} --validate-every 50 --no-samples
""".split()
TOO_LONG = 120  # seconds without progress: something hangs


def command(folder: Path, text: Path) -> list[str]:
    base = [sys.executable, "-m", "minillm", "train", "--out", str(folder)]
    return [*base, "--resume"] if (folder / "config.json").exists() else [*base, "--data", str(text), *SETTINGS]


def start(folder: Path, text: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder, text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )


def lines_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after_some_steps(process: subprocess.Popen, folder: Path, rng: random.Random) -> bool:
    """Let the run write a random number of metrics, wait a moment shorter than a step or so, and kill it."""
    before, wanted = lines_written(folder), rng.randrange(1, 20)
    since = time.monotonic()
    while process.poll() is None and lines_written(folder) < before + wanted:
        assert time.monotonic() - since < TOO_LONG
        # The log shrinks when a resumed run drops what came after its checkpoint.
        before = min(before, lines_written(folder))
        time.sleep(0.001)
    time.sleep(rng.random() * 0.01)
    killed = process.poll() is None
    process.kill()
    process.wait()
    return killed


def check_kills(tmp_path: Path, kills: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question: " * 40, encoding="utf-8")
    whole, victim = tmp_path / "whole", tmp_path / "victim"
    assert start(whole, text).wait(TOO_LONG * 5) == 0

    rng, reached, done = random.Random(kills), [0], 0
    while done < kills:
        done += kill_after_some_steps(start(victim, text), victim, rng)
        for path in checkpoints_in(victim):  # whatever has the name of a checkpoint is a whole one
            reached.append(read_checkpoint(path).record["step"])
        assert reached[-1] == max(reached)
    assert reached[-1] < STEPS, "the run ended before it was killed often enough"
    assert start(victim, text).wait(TOO_LONG * 5) == 0

    expected, found = (read_checkpoint(latest_checkpoint(folder)) for folder in (whole, victim))
    assert expected.record["step"] == found.record["step"] == STEPS
    assert expected.record["data"] == found.record["data"]  # the generator and the place in the data
    assert expected.tensors.keys() == found.tensors.keys()
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array, err_msg=name)
    curves = [losses(folder) for folder in (whole, victim)]
    assert curves[0] == curves[1]  # every step once, none lost, none twice
    assert [step for step, _ in curves[0]] == list(range(1, STEPS + 1))
    assert not list(victim.glob(".*")), "leftovers of killed writers"


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_two_kills_lose_nothing(tmp_path):
    check_kills(tmp_path, 2)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    check_kills(tmp_path, 20)
