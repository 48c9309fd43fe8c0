"""The benchmark's machinery, with a clock that is told what to say; only a GPU can test the rest."""

import json

import pytest
import torch

from kernels import bench, bench_figure
from kernels.norm import benchmark

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")


class ToldClock:
    """A call takes as long as it returns; every block is slower than the last, for all alike."""

    def __init__(self):
        self.order = []

    def times(self, call, repeats, flush=True):
        self.order.append(call)
        slowness = 1 + len(self.order) // 1000
        return [call() * slowness] * repeats

    def memory(self, call):
        return 16 * call()


def test_contenders_take_turns_and_the_first_changes():
    calls = {"a": lambda: 1.0, "b": lambda: 2.0}
    clock = ToldClock()
    medians = bench.take_turns(calls, clock, blocks=4, repeats=3)
    assert medians == {"a": [1.0] * 4, "b": [2.0] * 4}
    a, b = calls.values()
    assert clock.order[2:] == [a, b, b, a, a, b, b, a]  # after one warm-up each


def test_rows_say_ratio_and_share_of_the_copy_rate():
    case = bench.Case(
        "c", "bfloat16", bytes=1000, contenders={"ours": lambda: 2.0, "torch": lambda: 4.0, "x": lambda: 1.0}
    )
    rows = bench.measure("norm", case, ToldClock(), bench.Ceilings(lambda: 10.0, 10_000), device="d")
    assert [row["peer"] for row in rows] == ["torch", "x"]
    assert [row["ratio"] for row in rows] == [0.5, 2.0]
    assert rows[0]["limit"] == 1.0  # 1000 bytes at 1000 bytes a second
    assert rows[0]["of_limit"] == 0.5
    assert {"family", "case", "dtype", "ours_s", "peer", "peer_s", "ratio", "limit", "of_limit", "device"} <= rows[
        0
    ].keys()
    (alone,) = bench.measure(
        "norm", bench.Case("c", "d", 1, {"ours": lambda: 1.0}), ToldClock(), bench.Ceilings(lambda: 1.0, 1), "d"
    )
    assert alone["peer"] is None
    assert alone["ratio"] is None
    assert bench.report(rows)


def test_the_longer_of_memory_and_arithmetic_is_the_limit():
    """1000 bytes take 1 s at the copy rate; 600 operations take 3 s at the rate of the product."""
    ceilings = bench.Ceilings(lambda: 10.0, 10_000, lambda: 5.0, 1_000)
    case = bench.Case("c", "bfloat16", bytes=1000, contenders={"ours": lambda: 6.0}, flops=600, flush=False)
    (row,) = bench.measure("norm", case, ToldClock(), ceilings, "d")
    assert (row["limit"], row["of_limit"], row["product_flops_per_s"]) == (3.0, 0.5, 200.0)


def test_fewer_repeats_where_time_runs_out():
    clock = ToldClock()
    asked = []
    clock.times = lambda call, repeats, flush=True: asked.append(repeats) or [call()] * repeats
    bench.take_turns({"a": lambda: 1.0, "b": lambda: 2.0}, clock, blocks=3, repeats=9, flush=False, seconds=36.0)
    assert asked == [2, 2] + [4] * 6  # three blocks of 3 s four times are 36 s
    bench.take_turns({"a": lambda: 1.0}, clock, blocks=3, repeats=9, seconds=0.0)
    assert asked[-3:] == [1] * 3


def test_the_picture_shows_every_case_and_contender(tmp_path, monkeypatch):
    ceilings = bench.Ceilings(lambda: 10.0, 10_000, lambda: 5.0, 1_000)
    case = bench.Case("c", "bfloat16", bytes=1000, contenders={"ours": lambda: 6.0, "torch": lambda: 9.0}, flops=600)
    plain = bench.Case("d", "float32", bytes=1000, contenders={"ours": lambda: 2.0})
    rows = [row for one in (case, plain) for row in bench.measure("norm", one, ToldClock(), ceilings, "d")]
    assert [(row["ours_mib"], row["peer_mib"]) for row in rows] == [(96.0, 144.0), (32.0, None)]
    drawn = {}
    monkeypatch.setattr(bench_figure, "save", lambda figure, path: drawn.update(axes=figure.axes) or path)
    assert bench_figure.draw(rows, str(tmp_path / "f.png")).endswith("f.png")
    roof, share, memory = drawn["axes"]
    assert [label.get_text() for label in share.get_yticklabels()] == ["d float32", "c bfloat16"]
    assert sorted(line.get_xdata()[0] for line in share.lines[:-1]) == pytest.approx([1 / 3, 0.5, 0.5])
    assert sorted(line.get_xdata()[0] for line in memory.lines) == [32.0, 96.0, 144.0]
    assert len(roof.lines) == 4


def test_results_are_written_with_what_made_them(tmp_path):
    path = bench.write([{"case": "c"}], tmp_path / "deep" / "r.json")
    saved = json.loads(path.read_text())
    assert saved["rows"] == [{"case": "c"}]
    assert {"device", "torch", "triton", "ptxas", "python"} <= saved["machine"].keys()
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
    assert bench.slug("NVIDIA H200") == "nvidia_h200"


def test_every_case_runs():
    """On tiny shapes in the interpreter: forward and backward of all four functions, torch beside three of them."""
    names = set()
    for case in benchmark.cases("cpu", True, lambda text: None, benchmark.SMALLEST_SHAPES, compiled=False):
        assert set(case.contenders) >= {"ours", "torch"}, case.name
        assert case.bytes > 0
        for call in case.contenders.values():
            call()
        names.add(case.name)
    assert len(names) == 8


def test_a_peer_that_computes_something_else_is_left_out():
    said = []
    operands = benchmark._operands("rms_norm", 4, 8, torch.float32, "cpu")
    original = benchmark._torch
    try:
        benchmark._torch = lambda name: lambda x, g, eps: 2 * original(name)(x, g, eps)
        assert benchmark._peers("rms_norm", operands, False, said.append) == {}
    finally:
        benchmark._torch = original
    assert "differ" in said[0]


def test_sweeps_hold_the_shipped_sizes():
    cases = list(benchmark.sweep_cases("cpu", ((2, 64),)))
    assert len(cases) == 4
    assert all(len(case.contenders) > 1 for case in cases)
