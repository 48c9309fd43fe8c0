"""The benchmark's machinery, with a clock that is told what to say; only a GPU can test the rest."""

import json

import pytest
import torch

from kernels import bench, bench_figure, contenders, registry, timing
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

    def host(self, call):
        return call() / 1000

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
    assert (rows[0]["ours_host_s"], rows[0]["peer_host_s"]) == (0.002, 0.004)
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
    roof, share, speed, memory = drawn["axes"]
    assert [label.get_text() for label in share.get_yticklabels()] == ["d float32", "c bfloat16"]
    assert sorted(line.get_xdata()[0] for line in share.lines[:-1]) == pytest.approx([1 / 3, 0.5, 0.5])
    assert len(roof.lines) == 4
    assert not speed.lines and not memory.lines  # cases of one size make no line


def test_the_picture_shows_speed_and_memory_over_size(tmp_path, monkeypatch):
    ceilings = bench.Ceilings(lambda: 10.0, 10_000)
    rows = []
    for size in (4096, 1024, 16_384):
        calls = {"ours": lambda size=size: size / 1024, "torch": lambda size=size: size / 512}
        case = bench.Case(f"L={size}", "bfloat16", size, calls, line="forward", size=size)
        rows += bench.measure("norm", case, ToldClock(), ceilings, "d")
    drawn = {}
    monkeypatch.setattr(bench_figure, "save", lambda figure, path: drawn.update(axes=figure.axes) or path)
    bench_figure.draw(rows, str(tmp_path / "f.png"))
    _, _, speed, memory = drawn["axes"]
    found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in memory.lines}
    assert found["ours: forward"] == ([1024, 4096, 16_384], [16.0, 64.0, 256.0])
    assert found["torch: forward"] == ([1024, 4096, 16_384], [32.0, 128.0, 512.0])
    assert [list(line.get_ydata()) for line in speed.lines] == [pytest.approx([1.024] * 3), pytest.approx([0.512] * 3)]


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


def test_a_peer_that_fails_is_left_out_and_ours_that_fails_is_no_case():
    said = []

    def broken():
        raise RuntimeError("out of memory\nand more")

    case = bench.Case("c", "d", 1, {"ours": lambda: 1.0, "x": broken, "y": lambda: 2.0})
    rows = bench.measure("norm", case, ToldClock(), bench.Ceilings(lambda: 1.0, 1), "d", say=said.append)
    assert [row["peer"] for row in rows] == ["y"]
    assert said == ["x c: left out (RuntimeError: out of memory)"]
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.measure(
            "norm", bench.Case("c", "d", 1, {"ours": broken}), ToldClock(), bench.Ceilings(lambda: 1.0, 1), "d"
        )


def test_a_case_that_cannot_be_made_takes_its_place_and_the_next_shape_follows():
    def shape(names):
        for name in names:
            if name == "bad":
                raise ValueError("no room")
            yield bench.Case(name, "d", 1, {"ours": lambda: 1.0})

    cases = [c for names in (("a", "bad", "b"), ("c",)) for c in contenders.made(shape(names), "a shape")]
    assert [case.name for case in cases] == ["a", "a shape", "c"]
    with pytest.raises(RuntimeError, match="could not be made: ValueError: no room"):
        cases[1].contenders["ours"]()


@pytest.mark.parametrize("scale", [1.0, 1.015, 1.1, float("nan")])
def test_peers_are_held_to_the_size_of_the_results_however_small(scale):
    """Attention over long texts gives small numbers: an absolute bound would let anything through."""
    ours = 1e-3 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert contenders.alike(scale * ours, ours) == (scale < 1.02)
    assert not contenders.alike((ours, ours), ours)
    assert not contenders.alike(ours[:50], ours)


class Family:
    """Stands for a family's witness and benchmark."""

    def __init__(self, names=(), wrong=0):
        self.names, self.wrong, self.made = names, wrong, []

    def witnesses(self, device, short=False):
        assert device == "cuda" and short
        yield "exact", self.wrong

    def cases(self, device, quick, say):
        for name in self.names:
            self.made.append(name)
            call = (lambda: 1.0) if name != "bad" else (lambda: 1 / 0)
            yield bench.Case(name, "d", 1, {"ours": call, "torch": lambda: 2.0})


def run(monkeypatch, tmp_path, families, **options):
    """`bench.bench` over stand-ins, the GPU's part taken out."""
    monkeypatch.setattr(bench, "GpuClock", ToldClock)
    monkeypatch.setattr(bench, "measured_ceilings", lambda device: bench.Ceilings(lambda: 1.0, 1))
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.registry, "load_part", lambda family, part: families[family])
    monkeypatch.setattr(bench.bench_figure, "draw", lambda rows, path: path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(bench, "alive", options.pop("alive", lambda: True))
    said = []
    return *bench.bench(list(families), say=said.append, **options), said


def test_what_fails_costs_nothing_of_the_rest(monkeypatch, tmp_path):
    families = {"rope": Family(("a", "bad", "b")), "norm": Family(("c",)), "adamw": Family(("d",), wrong=3)}
    rows, faults, _ = run(monkeypatch, tmp_path, families)
    assert [(row["family"], row["case"]) for row in rows] == [("norm", "c"), ("rope", "a"), ("rope", "b")]
    assert (
        len(faults) == 2 and "bad: not measured (ZeroDivisionError" in faults[0] and "adamw: wrong results" in faults[1]
    )
    assert families["adamw"].made == []  # nothing wrong is timed
    saved = {path.name: [row["case"] for row in json.loads(path.read_text())["rows"]] for path in tmp_path.iterdir()}
    assert saved == {"norm_gpu.json": ["c"], "rope_gpu.json": ["a", "b"]}
    one = tmp_path / "all.json"
    rows, _, _ = run(monkeypatch, tmp_path, families, out=str(one))
    assert json.loads(one.read_text())["rows"] == rows


def test_rows_are_on_disk_before_the_next_case_is_made(monkeypatch, tmp_path):
    seen = []

    class Watching(Family):
        def cases(self, *arguments):
            for case in super().cases(*arguments):
                seen.append(sorted(path.name for path in tmp_path.iterdir()))
                yield case

    run(monkeypatch, tmp_path, {"rope": Watching(("a", "b"))})
    assert seen == [[], ["rope_gpu.json"]]


def test_time_is_shared_and_a_family_stops_when_its_share_is_over(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])

    class Slow(Family):
        cost = 4.0

        def cases(self, *arguments):
            for case in super().cases(*arguments):
                now[0] += self.cost
                yield case

    families = {"rope": Slow("abcdefgh"), "attention": Slow("abcdefgh"), "adamw": Slow("a")}
    families["attention"].cost = 10.0
    rows, faults, said = run(monkeypatch, tmp_path, families, seconds=70.0)
    # Five sevenths are attention's, which comes first; half of what is left is for rope, and its rest for AdamW.
    assert [row["family"] for row in rows] == ["attention"] * 4 + ["rope"] * 2 + ["adamw"]
    assert not faults and sum("no time left" in text for text in said) == 2


def test_a_gpu_that_no_longer_answers_ends_the_run_with_what_there_is(monkeypatch, tmp_path):
    families = {"norm": Family(("a", "bad", "b")), "rope": Family(("c",))}
    rows, faults, _ = run(monkeypatch, tmp_path, families, alive=lambda: False)
    assert [row["case"] for row in rows] == ["a"]
    assert "not measured: rope" in faults[-1]


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_few_witnesses_come_before_the_timing_and_all_are_of_the_full_list(family, monkeypatch):
    """A first call compiles: the whole list of some families would take longer than all of the measuring."""
    witness = registry.load_part(family, "witness")
    for name in [
        name for name in vars(witness) if name == "wrong" or name.startswith("wrong_") or name.endswith("_wrong")
    ]:
        monkeypatch.setattr(witness, name, lambda *arguments, **named: 0)
    short, full = ([name for name, _ in witness.witnesses("cuda", short=s)] for s in (True, False))
    assert 0 < len(short) <= 16 and set(short) <= set(full)
    assert any("bfloat16" in name for name in short)


@pytest.mark.parametrize(("family", "shapes"), [("decode", "SMALLEST"), ("experts", "SMALLEST_SHAPES"),
                                                ("linear_attention", "SMALLEST_SHAPES")])  # fmt: skip
def test_every_case_of_a_family_runs(family, shapes):
    """On tiny shapes in the interpreter, torch's peers beside ours: what nobody has run fails on the day of a GPU."""
    module, said, rows = registry.load_part(family, "benchmark"), [], []
    ceilings = timing.measured_ceilings("cpu", 1 << 10, 16)
    for case in module.cases("cpu", True, said.append, getattr(module, shapes), compiled=False):
        assert case.bytes > 0
        rows += bench.measure(family, case, timing.WallClock(), ceilings, "cpu", 1, 1, say=said.append)
    assert {row["peer"] for row in rows} & {"sdpa", "torch", "loop", "softmax sdpa"}
    assert not [text for text in said if "ours" in text.split(":")[0]]


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_family_can_be_asked_for_other_launch_sizes(family):
    assert callable(registry.load_part(family, "benchmark").sweep_cases)


def test_the_sweep_of_the_experts_holds_the_shipped_tiles_and_runs():
    module, names = registry.load_part("experts", "benchmark"), []
    for case in module.sweep_cases("cpu", module.SMALLEST_SHAPES):
        assert len(case.contenders) > 5
        first = next(iter(case.contenders.values()))
        first()
        names.append(case.name)
    assert len(names) == 2
