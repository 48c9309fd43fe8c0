"""The kernels command as others call it: JSON, exit codes, and a reader's wrong kernel that is caught."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

RIGHT = """
import torch
def rms_norm(x, g, eps=1e-6):
    h = x.float()
    return (g.float() * h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)).to(x.dtype)
"""
WRONG = {
    "eps outside the root": "(torch.rsqrt((h * h).mean(-1, keepdim=True)) + eps)",
    "one column too few": "torch.rsqrt((h * h).sum(-1, keepdim=True) / max(h.shape[-1] - 1, 1) + eps)",
    "last block forgotten": "torch.rsqrt((h * h)[..., : max(1, h.shape[-1] // 16 * 16)].mean(-1, keepdim=True) + eps)",
}


def kernels(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "kernels", *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.mark.equation("rmsnorm", "layernorm", "layernorm-backward", "rmsnorm-layernorm-relation", "pre-ln")
def test_compare_passes_every_property_and_prints_one_array():
    done = kernels("compare", "norm", "--examples", "3", "--seed", "1", "--json", "--no-figure")
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and len(rows) > 50
    fields = {"family", "property", "dtype", "backend", "measured", "allowed", "passed"}
    assert all(fields <= row.keys() and row["passed"] and row["measured"] <= row["allowed"] for row in rows)
    assert {row["dtype"] for row in rows} >= {"float32", "float16"}


@pytest.mark.parametrize("bug", WRONG)
def test_a_readers_wrong_kernel_is_caught_and_a_right_one_is_not(bug, tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT.replace("torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)", WRONG[bug]))
    done = kernels("compare", "norm", "--impl", f"{tmp_path}/mine.py:rms_norm", "--seed", "0", "--json", "--no-figure")
    rows = json.loads(done.stdout)
    assert done.returncode == 1 and any(not row["passed"] for row in rows), bug


@pytest.mark.slow
def test_a_readers_right_kernel_passes(tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    done = kernels("compare", "norm", "--impl", f"{tmp_path}/mine.py:rms_norm", "--seed", "0", "--json", "--no-figure")
    assert done.returncode == 0, done.stderr[-2000:]


def test_compile_finds_no_stack_no_spills_and_the_bytes_of_the_formula():
    done = kernels("compile", "norm", "--target", "sm_90", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and rows
    for row in rows:
        assert row["ok"] and row["stack"] == 0 and row["spills"] == 0 and row["tensor_core"] == 0, row
        assert row["load_bits"] == sorted(row["load_bits"]) and row["registers"] <= 255
    assert any(max(row["load_bits"]) == 128 for row in rows)


def test_bench_without_a_gpu_says_so_and_prints_an_empty_array():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = kernels("bench", "norm", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == [] and "not measured" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "norms"], "norms"),
        (["compare", "norm", "--impl", "nowhere.py:f"], "nowhere.py"),
        (["compile", "norm", "--target", "sm_1"], "sm_1"),
        (["compare", "norm", "--examples", "0"], "examples"),
    ],
)
def test_wrong_usage_is_named_with_exit_code_2_and_nothing_on_standard_output(arguments, words):
    done = kernels(*arguments)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
