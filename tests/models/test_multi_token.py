"""Multi-token prediction on a decoder: causality, gradients, a short real training, and drafting for itself."""

import functools

import numpy as np
import pytest

from minillm.autograd import no_grad
from minillm.decoding import Law, generate, speculative_generate
from minillm.decoding.multi_token_drafters import ParallelDrafter, SequentialDrafter
from minillm.fused.linear import linear
from minillm.models import Config, Decoder, Transformer
from minillm.models.multi_token import ParallelPrediction, SequentialPrediction
from minillm.optim import AdamW
from minillm.training.step import loss_and_gradients
from tests import typecheck

V, CONTEXT = 12, 48
GENERAL = {
    "gpt": {"norm": "layernorm", "positions": "learned", "ffn": "gelu", "bias": True},
    "t5 positions": {"positions": "t5", "ffn": "relu"},
    "alibi, parallel": {"positions": "alibi", "layout": "parallel"},
    "latent, experts": {"attention": "latent", "ffn": "experts", "n_experts": 4, "router": "sigmoid"},
    "linear": {"attention": "linear", "positions": "none"},
    "window": {"window": 4},
    "post": {"norm_place": "post", "scaled_head": True, "positions": "shaw"},
}
KINDS = {"sequential": (SequentialPrediction, SequentialDrafter), "parallel": (ParallelPrediction, ParallelDrafter)}
BOTH = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, reach: int = 2, seed: int = 0, general: str | None = None):
    """A trunk and what predicts ``reach`` tokens beyond the next."""
    rng = np.random.default_rng(seed)
    sizes = {"context": CONTEXT, "tied": True, "init_std": 0.15}
    if general is None:
        trunk = Decoder(Config(V, 32, 2, 4, n_kv_heads=2, **sizes), rng)
    else:
        trunk = Transformer(Config(V, 32, 2, 4, d_ff=24, **{**sizes, **GENERAL[general]}), rng)
    model_class, drafter_class = KINDS[kind]
    model = model_class(trunk, reach if kind == "sequential" else reach + 1, rng)
    return model, drafter_class


def text(rng: np.random.Generator, B: int, L: int) -> np.ndarray:
    """Counting upwards by a step that the first two tokens show: the future is known after them."""
    start, step = rng.integers(V, size=(B, 1)), rng.integers(1, 4, size=(B, 1))
    return (start + step * np.arange(L)) % V


def train(model, steps: int, seed: int = 1) -> list[tuple[float, np.ndarray]]:
    rng = np.random.default_rng(seed)
    parameters = model.parameters()
    optimiser = AdamW(parameters, 6e-3, (0.9, 0.95), weight_decay=0.0)
    history = []
    for _ in range(steps):
        losses = model.losses(text(rng, 8, 20))
        history.append((float(losses.main.data), losses.depths.data.copy()))
        _, gradients = loss_and_gradients(losses.total(0.5), parameters)
        optimiser.step([gradients], 1.0)
    return history


@functools.cache
def trained(kind: str):
    """A model after a short training, shared by the tests, and how its losses went."""
    model, drafter_class = build(kind)
    return model, drafter_class, train(model, 50)


@BOTH
@pytest.mark.equation("mtp-sequential-module", "mtp-parallel-heads", "mtp-loss")
def test_untrained_losses_are_near_the_log_of_the_vocabulary_and_reach_every_parameter(kind):
    model, _ = build(kind)
    losses = model.losses(text(np.random.default_rng(0), 3, 10))
    assert losses.depths.shape == (2,)
    assert abs(float(losses.main.data) - np.log(V)) < 2 and (np.abs(losses.depths.data - np.log(V)) < 2).all()
    _, gradients = loss_and_gradients(losses.depths.sum(), model.parameters())
    without = [n for (n, _), g in zip(model.named_parameters(), gradients, strict=True) if not np.abs(g).max() > 0]
    assert without == []


@BOTH
@pytest.mark.equation("mtp-loss")
def test_shares_of_a_batch_add_up(kind):
    model, _ = build(kind)
    ids = text(np.random.default_rng(0), 4, 10)
    whole, parts = model.losses(ids), [model.losses(ids[i : i + 2], 4) for i in (0, 2)]
    assert float(whole.main.data) == pytest.approx(sum(float(p.main.data) for p in parts), rel=1e-5)
    np.testing.assert_allclose(whole.depths.data, sum(p.depths.data for p in parts), rtol=1e-5)


@pytest.mark.equation("mtp-sequential-module")
def test_the_chain_is_causal_and_the_depth_shifts_the_target():
    model, _ = build("sequential")
    ids = text(np.random.default_rng(0), 1, 12)
    changed = ids.copy()
    changed[0, -1] = (changed[0, -1] + 1) % V  # only the last position of each depth may see it
    for a, b in zip(_module_streams(model, ids), _module_streams(model, changed), strict=True):
        np.testing.assert_array_equal(a.data[:, :-1], b.data[:, :-1])
        assert np.abs(a.data[:, -1] - b.data[:, -1]).max() > 0
    L = ids.shape[1] - 1
    streams = _module_streams(model, ids[:, :-1])
    weight = model.trunk.output_weight.data
    for i, h in enumerate(streams, start=1):
        z = model.modules[i - 1].norm(h).data @ weight.T
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        wanted = -np.mean([logp[0, t, ids[0, t + i + 1]] for t in range(L - i)])
        assert float(model.losses(ids).depths.data[i - 1]) == pytest.approx(wanted, rel=1e-5)


def _module_streams(model, ids):
    """Every module's stream on a whole text, without caches."""
    L = ids.shape[1]
    h, streams = model.trunk.hidden(ids), []
    for i, module in enumerate(model.modules, start=1):
        h = module(h[:, :-1], model.trunk.embedding(ids[:, i:L]))
        streams.append(h)
    return streams


@BOTH
@pytest.mark.equation("mtp-loss", "mtp-sequential-module", "mtp-parallel-heads")
def test_a_short_training_lowers_the_loss_at_every_depth(kind):
    _, _, history = trained(kind)
    early, late = (np.array([[m, *d] for m, d in part]).mean(0) for part in (history[:5], history[-5:]))
    assert (late < 0.5 * early).all(), (early, late)


@BOTH
@pytest.mark.equation("mtp-sequential-module", "mtp-parallel-heads", "speculative-decoding")
def test_the_drafts_with_caches_are_those_of_the_whole_text(kind):
    """Whatever was accepted or rejected before, a proposal's laws are what a pass without caches gives."""
    model, drafter_class = build(kind, reach=3)
    drafter, rng = drafter_class(model), np.random.default_rng(4)
    ids = rng.integers(V, size=20)
    drafter.begin(ids)
    for T in (4, 5, 8, 9, 10, 14):
        with no_grad():
            stream = model.trunk.hidden(ids[None, : T - 1]).data[0]
            draft = drafter.propose(ids[:T], stream, 3 if T != 8 else 1, rng)
            assert len(draft.tokens) == (3 if T != 8 else 1)
            written = np.append(ids[:T], draft.tokens)
            h = model.trunk.hidden(written[None, : T - 1])
            for i in range(1, len(draft.tokens) + 1):
                if kind == "sequential":
                    module = model.modules[i - 1]
                    h = module(h, model.trunk.embedding(written[None, i : T - 1 + i]))
                    out = module.norm(h)
                else:
                    out = model.heads[i - 1].norm(model.heads[i - 1](h))
                z = linear(out[:, -1:], model.trunk.output_weight).data[0, 0].astype(np.float64)
                law = np.exp(z - z.max())
                np.testing.assert_allclose(draft.laws[i - 1], law / law.sum(), rtol=2e-4, atol=1e-6)


@BOTH
@pytest.mark.equation("mtp-loss", "mtp-sequential-module", "mtp-parallel-heads")
@pytest.mark.parametrize("general", GENERAL)
def test_a_general_trunk_looks_ahead_without_seeing_it(kind, general):
    model, _ = build(kind, general=general)
    ids = text(np.random.default_rng(0), 2, 12)
    losses, again = model.losses(ids), ids.copy()
    _, gradients = loss_and_gradients(losses.total(0.5), model.parameters())
    names = [name for name, _ in model.named_parameters()]
    without = {n for n, g in zip(names, gradients, strict=True) if not np.abs(g).max() > 0}
    assert all(name.endswith(("ffn.bias", "b_k")) for name in without)  # of a choice, and of all keys alike
    again[:, -1] = (again[:, -1] + 1) % V
    with no_grad():
        for i in range(2):
            first, second = (stream_of(kind, model, x, i) for x in (ids, again))
            np.testing.assert_allclose(first[:, :-1], second[:, :-1], atol=1e-6)
            assert np.abs(first[:, -1] - second[:, -1]).max() > 1e-4


def stream_of(kind, model, ids, i):
    """What the i-th head makes of a text: module i has read i + 1 tokens beyond its position, a head none."""
    if kind == "sequential":
        return _module_streams(model, ids)[i].data
    return model.heads[i](model.trunk.hidden(ids)).data


@BOTH
@pytest.mark.equation("speculative-decoding", "mtp-sequential-module", "mtp-parallel-heads")
@pytest.mark.parametrize("general", [name for name in GENERAL if name not in ("linear", "window")])
def test_a_general_trunk_drafts_for_itself(kind, general):
    with typecheck.suspended():  # the whole-text test above holds the annotations to every kind of trunk
        check_drafts(*build(kind, general=general))


def check_drafts(model, drafter_class):
    """The text of a trunk that drafts for itself is its own; what was rejected before leaves no trace."""
    prompts, law = text(np.random.default_rng(9), 2, 4), Law(temperature=0.0)
    plain = generate(model.trunk, prompts, 12, np.random.default_rng(0), temperature=0.0)
    drafter = drafter_class(model, law)
    fast = speculative_generate(model.trunk, drafter, prompts, 12, np.random.default_rng(0), count=2, law=law)
    np.testing.assert_array_equal(fast.generation.tokens, plain.tokens)
    ids = np.random.default_rng(4).integers(V, size=12)
    drafter.begin(ids)
    for T in (4, 5, 9):  # with what was rejected before forgotten
        with no_grad():
            found = drafter.propose(
                ids[:T], model.trunk.hidden(ids[None, : T - 1]).data[0], 2, np.random.default_rng(0)
            )
        fresh = drafter_class(model, law)
        fresh.begin(ids)
        with no_grad():
            wanted = fresh.propose(ids[:T], model.trunk.hidden(ids[None, : T - 1]).data[0], 2, np.random.default_rng(0))
        np.testing.assert_allclose(found.laws, wanted.laws, atol=1e-5)


@BOTH
@pytest.mark.equation("speculative-decoding")
@pytest.mark.parametrize("general", ["linear", "window"])
def test_drafting_over_caches_that_cannot_forget_is_refused(kind, general):
    model, drafter_class = build(kind, general=general)
    with pytest.raises(ValueError, match="the trunk must be one whose caches can drop tokens"):
        drafter_class(model)


@BOTH
@pytest.mark.equation("speculative-decoding", "mtp-sequential-module", "mtp-parallel-heads")
def test_self_speculation_gives_the_greedy_text_in_fewer_passes(kind):
    model, drafter_class, _ = trained(kind)
    prompts = text(np.random.default_rng(9), 3, 4)
    law = Law(temperature=0.0)
    plain = generate(model.trunk, prompts, 24, np.random.default_rng(0), temperature=0.0)
    fast = speculative_generate(
        model.trunk, drafter_class(model, law), prompts, 24, np.random.default_rng(0), count=2, law=law
    )
    np.testing.assert_array_equal(fast.generation.tokens, plain.tokens)
    assert fast.accepted.sum() > 0.5 * fast.proposed.sum()
    assert fast.passes.max() < 18  # 24 one by one


def other(architecture: str):
    return Transformer(Config(V, 16, 1, 2, architecture=architecture), np.random.default_rng(0))


BAD = [
    (lambda: SequentialPrediction(other("prefix"), 1, np.random.default_rng(0)), "the trunk must be a decoder .* 'prefix'"),
    (lambda: ParallelPrediction(other("encoder"), 2, np.random.default_rng(0)), "the trunk must be a decoder .* 'encoder'"),
    (lambda: SequentialPrediction(build("sequential")[0].trunk, 0, np.random.default_rng(0)), "depth must be a positive"),
    (lambda: ParallelPrediction(build("parallel")[0].trunk, 1, np.random.default_rng(0)), "n must be an integer of at least 2"),
    (lambda: build("sequential")[0].losses(np.zeros((1, 3), int)), "the ids must be of shape"),
    (lambda: build("parallel")[0].losses(np.zeros(9, int)), "the ids must be of shape"),
]  # fmt: skip


@pytest.mark.equation("mtp-sequential-module", "mtp-parallel-heads")
@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_gives_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@BOTH
@pytest.mark.equation("speculative-decoding")
def test_a_drafter_refuses_a_stream_of_another_text_and_proposes_nothing_without_one(kind):
    model, drafter_class = build(kind)
    drafter = drafter_class(model)
    drafter.begin(np.zeros(3, int))
    with pytest.raises(ValueError, match=r"the stream must be of shape \(2, 32\)"):
        drafter.propose(np.zeros(3, int), np.zeros((3, 32), np.float32), 2, np.random.default_rng(0))
    assert (
        len(drafter.propose(np.zeros(1, int), np.zeros((0, 32), np.float32), 2, np.random.default_rng(0)).tokens) == 0
    )
