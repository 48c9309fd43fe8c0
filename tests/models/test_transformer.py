"""Every kind of model: the same function in pieces, who sees what, why there are two kinds of block, bad input."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad, no_grad
from minillm.functional.blocks import shift_right
from minillm.functional.masked_language import corrupt, mlm_loss
from minillm.fused.losses import cross_entropy
from minillm.models import Config, Decoder, EncoderDecoder, Transformer
from minillm.models.families import tiny
from minillm.models.heads import (
    MaskedLanguageModel,
    SequenceHead,
    TokenHead,
    model_type_table,
    pooled,
    retrieval_scores,
)
from minillm.models.latent import LatentTransformer
from minillm.optim import AdamW
from minillm.training.step import loss_and_gradients

SIZES = {"vocab_size": 11, "d_model": 16, "n_layers": 2, "n_heads": 4, "context": 12, "init_std": 0.3}
KINDS = [
    {},
    {"n_kv_heads": 1},
    {"positions": "alibi"},
    {"positions": "t5"},
    {"positions": "learned", "norm": "layernorm", "ffn": "gelu", "bias": True, "tied": True},
    {"attention": "latent"},
    {"attention": "linear", "positions": "none"},
    {"ffn": "experts"},
    {"layout": "parallel"},
    {"layout": "parallel", "branches": "halved"},
    {"branches": "learnt", "norm_place": "post"},
    {"architecture": "prefix"},
    {"window": 3},
    {"window": 3, "positions": "alibi"},
    {"window": 3, "positions": "t5", "n_kv_heads": 2},
    {"positions": "shaw", "shaw_distance": 2},
    {"qk_norm": True, "head_width": 6},
]
IDS = np.random.default_rng(0).integers(0, 11, (2, 9))


def make(seed=0, **changes):
    config = Config(**{**SIZES, **changes})
    kind = EncoderDecoder if config.architecture == "encoder-decoder" else Transformer
    return kind(config, np.random.default_rng(seed))


@pytest.mark.equation("decoder-only-model", "kv-cache", "prefix-decoder-model", "block-parallel", "block-pre-ln")
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_reading_in_pieces_is_reading_at_once(changes):
    model = make(**changes)
    whole = model(IDS, **({"prefix": 4} if "architecture" in changes else {})).data
    with no_grad():
        cache = model.new_cache(2)
        parts = [model(IDS[:, :4], cache).data, *(model(IDS[:, i : i + 1], cache).data for i in range(4, 9))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.equation("llama-config", "decoder-only-model", "block-pre-ln")
def test_the_general_model_and_the_fast_decoder_are_one_function():
    general, fast = make(n_kv_heads=2), Decoder(Config(**SIZES, n_kv_heads=2), np.random.default_rng(1))
    state, theirs = fast.state_dict(), {}
    for name, array in general.state_dict().items():
        plain = name.removeprefix("stack.")
        if ".attention.w_" in plain and not plain.endswith("w_out"):
            at = {"w_q": (0, 16), "w_k": (16, 24), "w_v": (24, 32)}[plain[-3:]]
            theirs[name] = state[plain[:-3] + "w_qkv"][slice(*at)]
        else:
            theirs[name] = state[plain.replace("ffn.w_in", "ffn.w_value_gate")]
        assert theirs[name].shape == array.shape
    general.load_state_dict(theirs)
    np.testing.assert_allclose(general(IDS).data, fast(IDS).data, atol=1e-5)


@pytest.mark.equation("seq2seq-model", "decoder-block-cross", "kv-cache-prefix", "encoder-stack")
@pytest.mark.parametrize("changes", [{}, {"positions": "t5", "ffn": "relu", "scaled_head": True, "tied": True}])
def test_stepwise_is_teacher_forcing(changes):
    model = make(architecture="encoder-decoder", n_encoder_layers=1, **changes)
    source, real = IDS[:, :5], np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    whole = model(source, IDS, real).data
    assert whole.shape == (2, 9, 11) and len(model.encoder.blocks) == 1
    with no_grad():
        memory, cache = model.encode(source, real), model.new_cache(2)
        parts = [model.decode(IDS[:, :2], memory, cache, real).data]
        blank = Tensor(np.full_like(memory.data, np.nan))  # from here on the memory is read from the cache only
        parts += [model.decode(IDS[:, i : i + 1], blank, cache, real).data for i in range(2, 9)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    changed = source.copy()
    changed[1, 3:] = 0
    np.testing.assert_allclose(model(changed, IDS, real).data, whole, atol=1e-6)  # padding is not seen


def reach(model, **options):
    """Which input positions each output depends on, (L, L), by perturbing tokens."""
    L = 6
    ids = np.arange(L)[None] % 11
    base, seen = model(ids, **options).data, np.zeros((L, L), bool)
    for j in range(L):
        changed = ids.copy()
        changed[0, j] = 10
        seen[:, j] = np.abs(model(changed, **options).data - base)[0].max(-1) > 1e-6
    return seen


@pytest.mark.equation("single-type-failure", "encoder-only-model", "decoder-only-model", "prefix-decoder-model")
def test_who_sees_what():
    lower = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(reach(make(positions="learned")), lower)
    np.testing.assert_array_equal(reach(make(architecture="encoder")), np.ones((6, 6), bool))
    wanted = lower.copy()
    wanted[:3, :3] = True
    np.testing.assert_array_equal(reach(make(architecture="prefix"), prefix=3), wanted)
    np.testing.assert_array_equal(reach(make(architecture="prefix"), prefix=np.array([3])), wanted)


def train(model, loss_of, steps, lr=1e-2):
    optimiser, losses = AdamW(model.parameters(), lr=lr), []
    for step in range(steps):
        loss, gradients = loss_and_gradients(loss_of(step), model.parameters())
        optimiser.step([gradients])
        losses.append(loss)
    return losses


@pytest.mark.slow
@pytest.mark.equation("single-type-failure")
def test_an_encoder_that_predicts_the_next_token_copies_it():
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 11, (8, 9)) for _ in range(120)]

    def final(architecture):
        model = make(architecture=architecture, positions="learned", init_std=0.1)
        losses = train(model, lambda i: cross_entropy(model(batches[i][:, :-1]), batches[i][:, 1:]), 120)
        return np.mean(losses[-10:])

    # Random tokens: nothing can be predicted, so whoever is far below log 11 has seen the answer.
    assert final("decoder") > 0.9 * np.log(11) and final("encoder") < 0.7 * np.log(11)


@pytest.mark.equation("gpt-config", "palm-config", "t5-config", "prefix-decoder-model", "bert-config")
@pytest.mark.parametrize("family", ["llama", "gpt", "palm", "prefix", "t5", "bert"])
def test_tiny_models_of_every_family_learn(family):
    config = tiny(family, 11, d_model=16, n_heads=2, d_ff=24, context=12)
    ids = np.tile(np.arange(11), (4, 1))[:, :9]
    rng = np.random.default_rng(0)
    if family == "t5":
        model = EncoderDecoder(config, rng)
        losses = train(model, lambda _: cross_entropy(model(ids, shift_right(ids, 0)), ids), 50)
    elif family == "bert":
        model = MaskedLanguageModel(config, rng)
        read, chosen = corrupt(ids, 10, 11, rng, rate=0.4)
        losses = train(model, lambda _: mlm_loss(model(read), ids, chosen), 25)
    else:
        model = Transformer(config, rng)
        losses = train(model, lambda _: cross_entropy(model(ids[:, :-1]), ids[:, 1:]), 25)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.equation("branch-scales")
def test_branches_of_weight_zero_are_the_identity():
    model = make(branches="learnt", branch_init=0.0, layout="parallel")
    x = Tensor(np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32))
    np.testing.assert_array_equal(model.stack.blocks[0](x).data, x.data)
    (slope,) = grad([(model.stack.blocks[0](x) * x).sum()], [model.stack.blocks[0].ffn_gain])
    assert slope.item() != 0  # and yet they can be learnt


@pytest.mark.equation("droppath")
def test_branches_are_dropped_in_training_only():
    model = make(droppath=0.5)
    np.testing.assert_array_equal(model(IDS).data, model(IDS).data)
    rng = np.random.default_rng(0)
    assert np.abs(model(IDS, rng=rng).data - model(IDS).data).max() > 1e-3


@pytest.mark.equation("dropout", "attention-dropout")
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_entries_are_dropped_in_training_only_and_by_the_generator(rate, architecture):
    model, plain = make(architecture=architecture, **{rate: 0.4}), make(architecture=architecture)
    texts = (IDS, IDS) if architecture == "encoder-decoder" else (IDS,)
    np.testing.assert_array_equal(model(*texts).data, plain(*texts).data)
    first, again, other = (model(*texts, rng=np.random.default_rng(seed)).data for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - plain(*texts).data).max() > 1e-3


@pytest.mark.equation("attention-dropout")
def test_dropped_weights_leave_the_mean_of_a_linear_layer():
    """One layer whose stream is read before the norm: the mean over draws is the output without any."""
    attention = make(attention_dropout=0.3, window=4, positions="alibi").stack.blocks[0].attention
    x, bias = Tensor(np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)), make(positions="alibi")
    given = bias.stack.positions.bias
    rng = np.random.default_rng(3)
    with no_grad():
        draws = np.stack([attention(x, bias=given, rng=rng).data for _ in range(600)])
        wanted = attention(x, bias=given).data
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - wanted) < 6 * error + 1e-6).all()


@pytest.mark.equation("pos-relative-shaw")
def test_shaws_positions_tell_places_apart_up_to_their_distance():
    model = make(positions="shaw", shaw_distance=2, architecture="encoder")
    ids = np.array([[1, 5, 5, 5, 5, 5, 2]])
    H = model.hidden(ids).data[0]
    assert np.abs(H[1] - H[2]).max() > 1e-3  # another distance from the ends
    table = [p for name, p in model.named_parameters() if "relative" in name]
    assert len(table) == 4 and all(p.shape == (5, 4) for p in table)
    for p in table:
        p.data[...] = 0  # none left: an encoder sees a set
    H = model.hidden(ids).data[0]
    np.testing.assert_allclose(H[1], H[4], atol=1e-5)


@pytest.mark.equation("encoder-heads", "cls-pooling", "replaced-token-detection")
def test_heads_on_an_encoder():
    rng, model = np.random.default_rng(0), make(architecture="encoder")
    real = np.arange(9) < np.array([[9], [4]])
    H = model.hidden(IDS, real=real)
    np.testing.assert_array_equal(pooled(H, "cls").data, H.data[:, 0])
    np.testing.assert_allclose(pooled(H, "mean", real).data[1], H.data[1, :4].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(pooled(H, "last", real).data[1], H.data[1, 3])
    assert SequenceHead(16, 3, rng)(H).shape == (2, 3) and TokenHead(16, 1, rng)(H).shape == (2, 9, 1)
    start, end = TokenHead(16, 2, rng).span(H, real)
    assert start.shape == end.shape == (2, 9) and (start.data[1, 4:] < -1e8).all()
    scores = retrieval_scores(model, IDS, IDS, real, real).data
    np.testing.assert_allclose(np.diag(scores), 1, rtol=1e-5)
    assert np.abs(scores).max() <= 1 + 1e-5


@pytest.mark.equation("latent-transformer-block", "vision-text-cross")
def test_latents_read_inputs_of_any_length_and_kind():
    rng = np.random.default_rng(0)
    model = LatentTransformer(16, 2, 4, 3, rng, d_input=5)
    for L in (1, 20):
        x = Tensor(rng.normal(size=(2, L, 5)).astype(np.float32))
        assert model(x).shape == (2, 3, 16)
    np.testing.assert_allclose(model(x[:, ::-1]).data, model(x).data, atol=1e-5)  # a set


@pytest.mark.equation("model-type-table")
def test_the_table_of_model_types():
    lines = model_type_table().splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


BAD = {
    "odd rotary width": (lambda: make(d_model=20), r"Config: d_model / n_heads must be an even integer"),
    "heads": (lambda: make(n_heads=3, positions="none"), "Config: d_model / n_heads must be an integer"),
    "kv heads": (lambda: make(n_kv_heads=3), "Config: n_kv_heads must be a divisor"),
    "positions": (lambda: make(positions="guess"), "Config: positions must be one of"),
    "halved alone": (lambda: make(branches="halved"), "Config: the layout must be 'parallel'"),
    "parallel post": (lambda: make(layout="parallel", norm_place="post"), "Config: norm_place must be 'pre'"),
    "window": (lambda: make(window=2, architecture="encoder"), "Config: the architecture must be 'decoder'"),
    "experts": (lambda: make(ffn="experts", n_experts=1), "Config: experts_per_token must be at most 1"),
    "droppath": (lambda: make(droppath=1.0), r"Config: droppath must be in \[0, 1\)"),
    "dropout": (lambda: make(dropout=-0.1), r"Config: dropout must be in \[0, 1\)"),
    "dropped weights": (lambda: make(attention="latent", attention_dropout=0.1), "attention_dropout must be 0 unless"),
    "shaw, grouped": (lambda: make(positions="shaw", n_kv_heads=2), "Config: positions must be another, or attention"),
    "shaw, distance": (lambda: make(positions="shaw", shaw_distance=0), "shaw_distance must be a positive integer"),
    "groups": (
        lambda: make(ffn="experts", n_expert_groups=4, experts_per_token=3),
        "Config: k must be at most 2, the experts of 1 of 4 groups",
    ),
    "linear": (lambda: make(attention="linear"), "Config: positions must be 'none'"),
    "fast decoder": (lambda: Decoder(Config(5, norm="layernorm"), np.random.default_rng(0)), "that of a LLaMA"),
    "two stacks": (lambda: Transformer(tiny("t5", 5), np.random.default_rng(0)), "Use `EncoderDecoder`"),
    "one stack": (lambda: EncoderDecoder(Config(5), np.random.default_rng(0)), "Use `Transformer`"),
    "no encoder": (lambda: MaskedLanguageModel(Config(5), np.random.default_rng(0)), "must be 'encoder'"),
    "ids": (lambda: make()(IDS[0]), r"Transformer: the ids must be of shape \(B, L\)"),
    "long": (lambda: make(context=4)(IDS), "at most 4 tokens long"),
    "long prefix": (lambda: make(architecture="prefix")(IDS, prefix=10), r"the prefix must be in 0\.\.9"),
    "prefix": (lambda: make()(IDS, prefix=2), "the prefix must be None here"),
    "segments": (lambda: make()(IDS, segments=IDS), "the segments must be None here"),
    "padding": (lambda: make()(IDS, real=np.ones(9, bool)), "the mask of real tokens must be boolean of shape"),
    "capacity": (lambda: make().new_cache(1, 13), "Transformer.new_cache: the capacity must be in 1..12"),
    "pooling": (lambda: SequenceHead(4, 2, np.random.default_rng(0), "max"), "SequenceHead: pooling must be one of"),
    "labels": (lambda: TokenHead(4, 0, np.random.default_rng(0)), "TokenHead: n_labels must be"),
    "latents": (lambda: LatentTransformer(8, 1, 2, 0, np.random.default_rng(0)), "n_latents must be"),
    "memory": (
        lambda: make(architecture="encoder-decoder").decode(IDS, Tensor(np.zeros((3, 2, 16), np.float32))),
        "the batch must be the memory's, 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
