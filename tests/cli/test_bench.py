"""The benchmark compares the same model: same weights, same loss, same gradients."""

import json
import subprocess
import sys

import numpy as np
import pytest

from minillm.autograd import grad
from minillm.cli import main
from minillm.cli.bench import check_answers, chosen_cases
from minillm.cli.benchmark import attention, smollm2, threads
from minillm.cli.benchmark.cases import Case
from minillm.cli.benchmark.torch_peer import build_decoder
from minillm.decoding import generate
from minillm.fused.losses import cross_entropy
from minillm.models import Config, Decoder

torch = pytest.importorskip("torch")
SMALL = Case("small", vocab_size=17, d_model=24, n_layers=2, n_heads=3, d_ff=40, length=9, batch=4, steps=1)


def our_twin(peer) -> Decoder:
    """Our decoder with the peer's weights."""
    config = Config(17, 24, 2, 3, d_ff=40, context=9, rope_pairing="half")
    model = Decoder(config, np.random.default_rng(0))
    names = {
        "attention_norm.weight": "attention_norm.gain",
        "ffn_norm.weight": "ffn_norm.gain",
        "qkv.weight": "attention.w_qkv",
        "out.weight": "attention.w_out",
        "value_gate.weight": "ffn.w_value_gate",
        "down.weight": "ffn.w_down",
        "final_norm.weight": "final_norm.gain",
    }
    state = {}
    for name, tensor in peer.state_dict().items():
        for theirs, ours in names.items():
            if name.endswith(theirs):
                name = name.removesuffix(theirs) + ours
                break
        if name not in ("cos", "sin"):
            state[name] = tensor.numpy()
    model.load_state_dict(state)
    return model


def test_both_sides_of_the_benchmark_compute_the_same_loss_and_gradients():
    torch.manual_seed(0)
    peer = build_decoder(torch, SMALL)
    model = our_twin(peer)
    ids = np.random.default_rng(1).integers(17, size=(4, 10))
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    theirs = torch.nn.functional.cross_entropy(
        peer(torch.tensor(ids[:, :-1])).reshape(-1, 17), torch.tensor(ids[:, 1:]).reshape(-1)
    )
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters, grad(loss, list(parameters.values())), strict=True))
    for ours, name in (
        ("embedding.weight", "embedding.weight"),
        ("blocks.1.attention.w_qkv", "blocks.1.qkv.weight"),
        ("head.weight", "head.weight"),
    ):
        expected = dict(peer.named_parameters())[name].grad.numpy()
        np.testing.assert_allclose(gradients[ours].data, expected, rtol=1e-3, atol=1e-6)


def test_the_products_of_a_case_cost_what_the_formula_says():
    """Six FLOPs per weight and token, and attention's two products of all heads, forward and backward."""
    flops = 3 * sum(2 * n * m * k * j for n, m, k, j in SMALL.products())
    tokens, d, L = 4 * 9, 24, 9
    weights = 2 * (4 * d * d + 3 * d * 40) + 17 * d
    assert flops == 6 * tokens * weights + 3 * 2 * (2 * 2 * tokens * L * d)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["ours", "torch", "floor"])
def test_a_worker_answers_with_json(side):
    command = [sys.executable, "-m", "minillm.cli.benchmark.worker", "train", "XS", side, "2"]
    done = subprocess.run(command, input="1\n2\n", capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2 and all(a["seconds"] > 0 for a in answers)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_both_sides_of_attention_compute_the_same_gradient(kind):
    """The number a step returns is an entry of the gradient of the queries."""
    case = attention.AttentionCase(kind, 256)
    with attention.ours(case, 2) as ours, attention.torch_peer(case, 1) as theirs:
        assert ours() == pytest.approx(theirs(), rel=1e-4, abs=1e-6)


def test_cases_are_chosen_by_family_and_by_name():
    assert [name for _, name in chosen_cases(["train"], None)] == ["XS", "S", "M", "L"]
    assert [(f.name, name) for f, name in chosen_cases(["train", "attention"], ["S", "gqa-256"])] == [
        ("train", "S"), ("attention", "gqa-256"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="bench: --case must be one of 'XS', 'S', 'M', 'L', got gqa-256"):
        chosen_cases(["train"], ["gqa-256"])


def test_both_sides_of_the_pretrained_case_write_the_same_tokens(monkeypatch):
    pytest.importorskip("transformers")
    config = Config(61, 24, 2, 6, 2, 36, context=40, tied=True, init_std=0.3, rope_pairing="half")
    model, prompt = Decoder(config, np.random.default_rng(0)), np.random.default_rng(1).integers(61, size=(1, 9))
    monkeypatch.setattr(smollm2, "prepared", lambda case: (model, prompt))
    case = smollm2.GenerationCase("small", 9, 7, 1)
    with smollm2.ours(case, 1) as ours, smollm2.torch_peer(case, 1) as peer:
        assert ours() == peer() == ours() == peer()  # a second step begins where the first did
    made = generate(model, prompt, 8, np.random.default_rng(0), temperature=0).tokens
    assert smollm2.fingerprint(made.T) == smollm2.fingerprint(made.T.copy())
    with smollm2.ours(case, 1) as ours:
        assert ours() == smollm2.fingerprint(made.T)
        made[0, 3] += 1
        assert ours() != smollm2.fingerprint(made.T)


def test_sides_that_did_not_do_the_same_are_not_compared():
    assert smollm2.FAMILY.same_answer
    check_answers("a case", {"ours": 3.0, "torch": 3.0})
    with pytest.raises(RuntimeError, match=r"a case: ours and torch must give the same, got 3\.0 and 4\.0"):
        check_answers("a case", {"ours": 3.0, "torch": 4.0})


@pytest.mark.equation("false-sharing-padding", "parallel-heads")
@pytest.mark.parametrize("name", threads.CASES)
def test_both_sides_of_work_in_threads_give_the_same(name, monkeypatch):
    monkeypatch.setattr(threads, "ROWS", 500)
    with threads.ours(threads.CASES[name], 2) as ours, threads.plain(threads.CASES[name], 2) as plain:
        first, other = ours(), plain()
    assert first == other != 0


@pytest.mark.parametrize(("id_", "parts"), [
    ("mla", ("perceiver-latent-attention", "mla-deepseek")),
    ("dca", ("dca-dual-chunk", "dca-dual-cross-attention")),
])  # fmt: skip
def test_an_id_with_two_meanings_names_both(id_, parts, capsys):
    assert main(["equations", id_]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(part in err for part in parts)
    assert all(main(["equations", part]) == 0 for part in parts)
