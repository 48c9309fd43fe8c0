"""The decoder on the kernels beside the NumPy one: the same logits, gradients, steps, files; either goes on from the other."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import curves, train
from kernels.__main__ import main
from kernels.tolerance import Scale, expect, judge
from kernels.transformer import Decoder
from minillm.data import BatchStream
from minillm.fused.losses import cross_entropy
from minillm.models import Config
from minillm.models import Decoder as NumPyDecoder
from minillm.training.checkpoint import latest_checkpoint, read_checkpoint
from minillm.training.config import TrainingConfig
from minillm.training.loop import HeldOut, Trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")
ROOT = Path(__file__).parents[2]
TINY = Config(vocab_size=19, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, context=12, tied=True)
CONFIGS = [TINY, Config(**{**TINY.to_dict(), "tied": False, "n_kv_heads": 2, "n_layers": 2, "rope_pairing": "half"})]
SETTINGS = {"steps": 4, "batch_size": 3, "n_ctx": 8, "warmup_steps": 1, "validate_every": 0, "checkpoint_every": 2}
TEXT = np.random.default_rng(5).integers(0, TINY.vocab_size, 300)


def trainer(kind, folder=None, **changed):
    """A run of the tiny model, the same for both engines."""
    config = TrainingConfig(**{**SETTINGS, **changed})
    stream = BatchStream(TEXT, config.n_ctx, config.batch_size, np.random.default_rng(1))
    model = NumPyDecoder(TINY, np.random.default_rng(0))
    return kind(model, stream, config, folder=folder, held_out=HeldOut(TEXT[:30]), show_progress=False)


def losses(run):
    return [line["loss"] for line in run.metrics.read() if "loss" in line]


@pytest.mark.equation("lm-head", "final-ln", "mha", "gqa", "pre-ln", "weight-tying")
@pytest.mark.parametrize("config", CONFIGS, ids=["tied, one key head", "untied, halves, two layers"])
def test_logits_and_gradients_are_those_of_the_numpy_model(config):
    """By the rule of `kernels.tolerance`: as far from the float64 model as float32 may be."""
    model, rng = NumPyDecoder(config, np.random.default_rng(0)), np.random.default_rng(1)
    for parameter in model.parameters():  # larger than they begin, so that everything has a say
        parameter.data += rng.normal(0, 0.2, parameter.shape).astype(np.float32)
    ids, targets = (rng.integers(0, config.vocab_size, (2, 7)) for _ in range(2))
    targets[0, 2] = -100
    named = list(model.named_parameters())

    def reference(*weights, ids=ids, targets=targets):
        """The NumPy model with other weights, in whatever precision they have: logits and loss."""
        for (name, _), weight in zip(named, weights):
            where = model
            *path, last = name.split(".")
            for part in path:
                where = where[int(part)] if part.isdigit() else getattr(where, part)
            setattr(where, last, weight)
        logits = model(ids)
        return logits, cross_entropy(logits, targets, divisor=13)

    arrays = [p.data.astype(np.float64) for _, p in named]
    names = ["logits", "loss", *(name for name, _ in named)]
    network = Decoder(config)
    network.load_arrays(model.state_dict())
    found = dict(network.named_parameters())
    network(torch.from_numpy(ids), torch.from_numpy(targets), 13.0).backward()
    with torch.no_grad():
        values = [network(torch.from_numpy(ids)), network(torch.from_numpy(ids), torch.from_numpy(targets), 13.0)]
    ours = [t.double().numpy() for t in (*values, *(found[name].grad for name, _ in named))]
    cotangents = [np.zeros((2, 7, config.vocab_size)), np.ones(())]
    scales = [Scale(np.abs(a).max(), config.d_model, by_row=False) for a in ours]
    for verdict in map(judge, ours, expect(reference, arrays, cotangents, "float32", names, scales)):
        print(f"{verdict.name}: measured/allowed {verdict.ratio:.2f}")
        assert verdict.passed, verdict


@pytest.mark.equation("master-weights")
def test_a_network_of_sixteen_bits_is_saved_in_float32(tmp_path):
    """Its masters are what checkpoints hold: they keep steps that float16 loses, and go on from themselves."""

    def kind(*arguments, **options):
        return train.KernelTrainer(*arguments, precision="float16", **options)

    run = trainer(kind, tmp_path, lr=1e-5, steps=1, checkpoint_every=0)
    before = {name: array.copy() for name, array in run.model.state_dict().items()}
    run.run()
    gain = read_checkpoint(latest_checkpoint(tmp_path)).part("model")["final_norm.gain"]
    assert gain.dtype == np.float32
    assert 0 < np.abs(gain - before["final_norm.gain"]).max() < 2e-5
    assert torch.equal(run.network.final_norm.gain, torch.ones(16, dtype=torch.float16))
    again = trainer(kind, tmp_path, lr=1e-5, steps=1, checkpoint_every=0)
    again.resume(latest_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(run.masters.weights(), again.masters.weights()))


@pytest.mark.equation("training-step")
def test_both_engines_learn_alike_and_go_on_from_each_other(tmp_path):
    """The whole run on either side; half of it on one side and the rest on the other, both ways."""
    runs = {}
    for name, kind in (("numpy", Trainer), ("kernels", train.KernelTrainer)):
        runs[name] = trainer(kind, tmp_path / name)
        runs[name].run()
        for middle in tmp_path.joinpath(name).glob("*-00000002.*"):
            os.link(middle, tmp_path / f"{name}-middle.safetensors")
    curve = losses(runs["numpy"])
    assert curve[-1] != curve[0]
    np.testing.assert_allclose(losses(runs["kernels"]), curve, rtol=2e-5)
    files = [read_checkpoint(latest_checkpoint(tmp_path / name)) for name in runs]
    assert files[0].tensors.keys() == files[1].tensors.keys()
    assert files[0].record.keys() == files[1].record.keys()
    assert files[0].record["config"] == files[1].record["config"]
    for key, array in files[0].tensors.items():
        np.testing.assert_allclose(files[1].tensors[key], array, rtol=1e-3, atol=2e-5, err_msg=key)
    for before, kind in (("numpy", train.KernelTrainer), ("kernels", Trainer)):
        rest = trainer(kind, tmp_path / f"after-{before}")
        with pytest.warns(UserWarning, match="engine"):
            rest.resume(tmp_path / f"{before}-middle.safetensors")
        rest.run()
        np.testing.assert_allclose(losses(rest), curve[2:], rtol=2e-5)
    again = trainer(train.KernelTrainer, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same engine: nothing to warn of
        again.resume(tmp_path / "kernels-middle.safetensors")
    again.run()
    whole, resumed = (read_checkpoint(latest_checkpoint(tmp_path / name)) for name in ("kernels", "again"))
    assert all(np.array_equal(array, resumed.tensors[key]) for key, array in whole.tensors.items())  # to the bit
    assert losses(again) == losses(runs["kernels"])[2:]


def test_micro_batches_add_up_to_the_batch():
    """The same sequences as one batch or as three: `accumulate`."""
    whole, parts = trainer(train.KernelTrainer), trainer(train.KernelTrainer, batch_size=1, accumulate=3)
    batch = whole.stream.next_batch()

    class Dealt:
        """Hands out given batches."""

        def __init__(self, batches):
            self.batches = list(batches)

        def next_batch(self):
            return self.batches.pop(0)

    rows = [type(batch)(batch.inputs[i : i + 1], batch.targets[i : i + 1]) for i in range(3)]
    whole.stream, parts.stream = Dealt([batch]), Dealt(rows)
    assert whole.update() == pytest.approx(parts.update(), rel=1e-5)


def test_a_model_that_is_no_llama_is_refused():
    with pytest.raises(ValueError, match="Decoder: the configuration must be that of a LLaMA"):
        Decoder(Config(vocab_size=9, d_model=8, n_heads=2, norm="layernorm"))
    with pytest.raises(ValueError, match="at most 12 tokens long"):
        Decoder(TINY)(torch.zeros(1, 13, dtype=torch.int64))


SMALLEST = [
    "--data", "synthetic", "--synthetic-tokens", "600", "--d-model", "8", "--layers", "1", "--heads", "2",
    "--context", "8", "--batch-size", "2", "--steps", "2", "--warmup-steps", "1", "--validate-every", "0",
    "--no-samples", "--threads", "1",
]  # fmt: skip


def test_the_command_writes_what_minillm_train_writes(tmp_path, capsys):
    assert main(["train", *SMALLEST, "--out", str(tmp_path), "--json"]) == 0
    done = capsys.readouterr()
    assert "slower" in done.err
    assert json.loads(done.out)[0]["name"] == "this model"
    written = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "checkpoint-00000002.safetensors"} <= written
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} <= lines[1].keys()
    assert main(["train", *SMALLEST, "--out", str(tmp_path)]) == 2  # there is a run in that folder
    assert "Pass --resume" in capsys.readouterr().err


def test_wrong_usage_is_one_line(tmp_path, capsys):
    assert main(["train", *SMALLEST, "--out", str(tmp_path), "--resume"]) == 2
    assert main(["train", "--precision", "float8"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "the folder of a run to resume" in said.err


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """`torchrun` with two processes, each with half of every batch, beside a single process."""
    assert main(["train", *SMALLEST, "--out", str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kernels", "train", *SMALLEST,
         "--out", str(tmp_path / "two")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for folder in ("one", "two"):
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        found.append([value for line in lines for key, value in line.items() if key != "seconds"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_curves_of_two_engines_are_drawn_and_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert curves.main([]) == 0
    assert "not measured" in capsys.readouterr().err
    runs = []
    for name, kind in (("numpy", Trainer), ("kernels", train.KernelTrainer)):
        run = trainer(kind, tmp_path / name, steps=2, checkpoint_every=0)
        run.run()
        runs.append(str(tmp_path / name))
    assert curves.main(["--runs", *runs, "--figure", str(tmp_path / "curves.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest_difference"] < 1e-4
    assert found["engines"][0] == "minillm on NumPy"
    assert "kernels on interpreter" in found["engines"][1]
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_network_is_traced_without_a_graph_break():
    network, ids = Decoder(TINY), torch.arange(14).reshape(2, 7)
    network.load_arrays(NumPyDecoder(TINY, np.random.default_rng(0)).state_dict())
    compiled, found = torch.compile(network, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, network):
        network.zero_grad()
        loss = function(ids, ids, 14.0)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
