"""Every way of decoding over every kind of cache: the same text as without a cache."""

from types import SimpleNamespace

import numpy as np
import pytest

from minillm.autograd import Tensor, no_grad
from minillm.decoding import Law, LookupDrafter, ModelDrafter, beam_search, generate, speculative_generate
from minillm.functional.positions import rope, rotation_angles
from minillm.fused.linear import linear
from minillm.models import Config, Decoder
from minillm.models.transformer import Transformer
from minillm.nn import Embedding, Module, RMSNorm, SwiGLU
from minillm.nn.cache import ModelCache
from minillm.nn.latent_attention import LatentAttention
from minillm.nn.linear_attention import LinearAttention
from minillm.nn.multi_head import MultiHeadAttention
from minillm.nn.quantised_cache import QuantisedCache
from tests import typecheck

V, D, H, CONTEXT = 13, 16, 4, 40


def turn(heads: Tensor, positions: np.ndarray) -> Tensor:
    return rope(heads, angles=rotation_angles(positions, heads.shape[-1], 100.0))


class QuantisedHeads(MultiHeadAttention):
    """Eight bits: texts are the same as long as no choice hangs on the last per cent."""

    def new_cache(self, batch, capacity, dtype=np.float32):
        return QuantisedCache(batch, self.n_kv_heads, capacity, self.d_head, bits=8, group=4, dtype=dtype)


HEADS = {"causal": True, "turn": turn, "std": 0.4}
MIXERS = {
    "multi-head": lambda rng: MultiHeadAttention(D, H, rng, **HEADS),
    "grouped": lambda rng: MultiHeadAttention(D, H, rng, n_kv_heads=2, **HEADS),
    "multi-query": lambda rng: MultiHeadAttention(D, H, rng, n_kv_heads=1, **HEADS),
    "window": lambda rng: MultiHeadAttention(D, H, rng, window=5, **HEADS),
    "latent": lambda rng: LatentAttention(D, H, 4, 8, 2, rng, d_q=8, std=0.6, std_out=0.6),
    "linear": lambda rng: LinearAttention(D, H, rng, std=0.4),
    "int8": lambda rng: QuantisedHeads(D, H, rng, **HEADS),
}
KINDS = [*MIXERS, "mixed"]


class Model(Module):
    """Pre-norm blocks around any mixers, with the interface of decoding."""

    def __init__(self, kind: str, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.config = SimpleNamespace(vocab_size=V, context=CONTEXT)
        self.embedding = Embedding(V, D, rng, 1.0)
        kinds = ["window", "linear", "latent"] if kind == "mixed" else [kind] * 2
        self.mixers = [MIXERS[k](rng) for k in kinds]
        self.ffns = [SwiGLU(D, 24, rng, 0.4, 0.4) for _ in kinds]
        self.norms = [RMSNorm(D) for _ in range(2 * len(kinds) + 1)]
        self.head = Tensor(rng.normal(0, 0.7, (V, D)).astype(np.float32))

    @property
    def output_weight(self) -> Tensor:
        return self.head

    def hidden(self, ids, cache=None) -> Tensor:
        x = self.embedding(ids)
        for i, (mixer, ffn) in enumerate(zip(self.mixers, self.ffns, strict=True)):
            x = x + mixer(self.norms[2 * i](x), cache=None if cache is None else cache.layer(i))
            x = x + ffn(self.norms[2 * i + 1](x))
        return self.norms[-1](x)

    def forward(self, ids) -> Tensor:
        return linear(self.hidden(ids), self.head)

    def new_cache(self, batch, capacity=None):
        return ModelCache([mixer.new_cache(batch, capacity or CONTEXT) for mixer in self.mixers])


def greedy_without_cache(model: Model | Transformer, prompts: np.ndarray, T: int) -> np.ndarray:
    text = prompts
    with no_grad():
        for _ in range(T):
            text = np.concatenate([text, model(text).data[:, -1].argmax(-1)[:, None]], 1)
    return text[:, prompts.shape[1] :]


@pytest.fixture
def unchecked():
    """Annotations are held to what beams and sampling do here over every kind of cache; that is enough."""
    with typecheck.suspended():
        yield


PROMPTS = np.random.default_rng(1).integers(0, V, size=(2, 7))


@pytest.mark.equation(
    "kv-cache", "kv-cache-window", "kv-cache-mla", "kv-cache-quantised", "linear-attention-causal", "greedy"
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unchecked")
def test_greedy_speculative_and_one_beam_write_the_text_of_no_cache(kind):
    model, T = Model(kind), 10
    wanted = greedy_without_cache(model, PROMPTS, T)
    assert len(np.unique(wanted)) > 2  # not one token for ever
    rng, law = np.random.default_rng(0), Law(temperature=0)
    np.testing.assert_array_equal(generate(model, PROMPTS, T, rng, temperature=0).tokens, wanted)
    np.testing.assert_array_equal(beam_search(model, PROMPTS, T, beams=1).tokens[:, 0], wanted)
    small = Decoder(Config(V, d_model=8, n_layers=1, n_heads=2, context=CONTEXT), np.random.default_rng(3))
    for row, drafter in enumerate((ModelDrafter(small, law), LookupDrafter(V, 1))):  # rows are generated one by one
        fast = speculative_generate(model, drafter, PROMPTS[row : row + 1], T, rng, count=3, law=law)
        np.testing.assert_array_equal(fast.generation.tokens, wanted[row : row + 1])


@pytest.mark.equation("beam-search", "kv-cache")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
def test_beams_have_the_log_probability_that_the_model_gives_them_without_a_cache(kind):
    model, T = Model(kind), 8
    found = beam_search(model, PROMPTS, T, beams=3)
    text = np.concatenate([PROMPTS.repeat(3, 0), found.tokens.reshape(6, T)], 1)
    with no_grad():
        logits = model(text[:, :-1]).data[:, 6:].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = np.take_along_axis(logp, text[:, 7:, None], -1)[..., 0].sum(-1)
    np.testing.assert_allclose(found.logprobs.ravel(), total, atol=1e-3)


@pytest.mark.equation("sample-behaviour-logprob", "kv-cache")
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_copies_has_the_law_of_no_cache(kind):
    model, T = Model(kind), 9
    nucleus = 1.0 if kind == "int8" else 0.9  # rounding may move a token across the edge of a nucleus
    made = generate(model, PROMPTS, T, np.random.default_rng(0), temperature=0.8, top_p=nucleus, copies=2)
    text = np.concatenate([PROMPTS.repeat(2, 0), made.tokens], 1)
    with no_grad():
        logits = model(text[:, :-1]).data[:, 6:]
    law = Law(temperature=0.8, top_p=nucleus)
    p = np.stack([law.probabilities(logits[:, t], text) for t in range(T)], 1)
    wanted = np.take_along_axis(p, made.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(made.logprobs), wanted, atol=0.05 if kind == "int8" else 2e-4)


@pytest.mark.equation("speculative-decoding", "kv-cache")
@pytest.mark.parametrize("kind", ["linear", "window", "mixed"])
@pytest.mark.usefixtures("unchecked")
def test_a_cache_that_cannot_drop_tokens_is_not_read_again_from_the_beginning(kind):
    """The work after a rejection is bounded: at most the accepted tokens are read once more."""
    model, read = Model(kind), []
    hidden = model.hidden

    def counted(ids, cache=None):
        read.append(ids.shape[1])
        return hidden(ids, cache)

    model.hidden = counted
    small = Decoder(Config(V, d_model=8, n_layers=1, n_heads=2, context=CONTEXT), np.random.default_rng(3))
    run = speculative_generate(model, ModelDrafter(small), PROMPTS[:1], 30, np.random.default_rng(0), count=3)
    assert run.accepted[0] < run.proposed[0]  # some were rejected
    assert max(read[1:]) <= 1 + 3
    assert sum(read[1:]) <= 2 * (1 + 3) * run.passes[0]


@pytest.mark.equation("mla-deepseek", "kv-cache-mla", "kv-cache")
@pytest.mark.parametrize(
    "choice",
    [{"attention": "latent", "d_latent_q": 8}, {"attention": "linear", "positions": "none"}, {"window": 4}],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_the_general_transformer_decodes_with_the_cache_of_its_kind(choice):
    config = Config(V, d_model=D, n_layers=2, n_heads=H, d_ff=24, context=CONTEXT, init_std=0.5, **choice)
    model, T = Transformer(config, np.random.default_rng(0)), 8
    wanted = greedy_without_cache(model, PROMPTS, T)
    rng, law = np.random.default_rng(0), Law(temperature=0)
    np.testing.assert_array_equal(generate(model, PROMPTS, T, rng, temperature=0).tokens, wanted)
    np.testing.assert_array_equal(beam_search(model, PROMPTS, T, beams=1).tokens[:, 0], wanted)
    fast = speculative_generate(model, LookupDrafter(V, 1), PROMPTS[:1], T, rng, law=law)
    np.testing.assert_array_equal(fast.generation.tokens, wanted[:1])


@pytest.mark.equation("mla-deepseek")
def test_mla_alone_is_refused_because_it_means_two_things():
    with pytest.raises(ValueError, match=r"attention must be 'latent' for DeepSeek.*, got 'mla', which means both"):
        Config(V, attention="mla")
