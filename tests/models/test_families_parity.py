"""Tiny random GPT-2, BERT and T5 of transformers: the same weights give the same logits and gradients."""

import numpy as np
import pytest

from minillm.functional.masked_language import mlm_loss
from minillm.fused.losses import cross_entropy
from minillm.models import EncoderDecoder, Transformer
from minillm.models.bert_weights import bert_config_of, from_bert
from minillm.models.gpt2_weights import from_gpt2, gpt2_config
from minillm.models.heads import MaskedLanguageModel
from minillm.models.t5_weights import from_t5, t5_config_of
from minillm.training.step import loss_and_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, L, S = 37, 12, 9


def randomised(model):
    """Weights of a size that matters, gains and shifts among them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() or ".ln_" in name
            parameter.copy_(
                torch.empty_like(parameter).uniform_(0.5, 1.5)
                if norm and name.endswith("weight")
                else torch.randn_like(parameter) * 0.15
            )
    return model.eval()


def arrays(named):
    return {name: array.detach().numpy() for name, array in named}


def gradients_of(model):
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def check_gradients(ours, loss, expected_loss, expected):
    found_loss, gradients = loss_and_gradients(loss, ours.parameters())
    assert found_loss == pytest.approx(expected_loss, rel=2e-6)
    names = [name for name, _ in ours.named_parameters()]
    assert set(names) == set(expected)
    for name, gradient in zip(names, gradients, strict=True):
        wanted = expected[name]
        scale = max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(gradient, wanted, atol=1e-4 * scale, rtol=0, err_msg=name)


@pytest.mark.equation("gpt-config", "decoder-only-model", "pos-learned", "block-pre-ln")
def test_gpt2():
    theirs = randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=16, n_embd=24, n_layer=2, n_head=3, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)))  # fmt: skip
    config = gpt2_config(theirs.config.to_dict())
    ours = Transformer(config, np.random.default_rng(0))
    ours.load_state_dict(from_gpt2(arrays(theirs.named_parameters()), config))
    tokens = np.random.default_rng(1).integers(0, V, (2, L + 1))
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(ours(ids).data, logits.detach().numpy(), atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).reshape(-1))
    loss.backward()
    expected = from_gpt2(gradients_of(theirs), config)
    check_gradients(ours, cross_entropy(ours(ids), targets), loss.item(), expected)


@pytest.mark.equation("bert-config", "encoder-only-model", "mlm-loss", "block-post-ln", "mask-padding")
def test_bert_with_its_masked_token_head():
    theirs = randomised(transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, attn_implementation="eager")))  # fmt: skip
    config = bert_config_of(theirs.config.to_dict())
    ours = MaskedLanguageModel(config, np.random.default_rng(0))
    ours.load_state_dict(from_bert(arrays(theirs.named_parameters()), config))
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, V, (2, L)), rng.integers(0, V, (2, L))
    real, segments = np.ones((2, L), bool), np.repeat([[0, 1]], 2, 0).repeat(L // 2, 1)
    real[1, -4:] = False
    chosen = (rng.random((2, L)) < 0.3) & real
    given = [torch.from_numpy(a) for a in (ids, real.astype(np.int64), segments)]
    logits = theirs(given[0], attention_mask=given[1], token_type_ids=given[2]).logits
    found = ours(ids, real=real, segments=segments)
    np.testing.assert_allclose(found.data[real], logits.detach().numpy()[real], atol=1e-5)
    labels = torch.from_numpy(np.where(chosen, targets, -100))
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))
    loss.backward()
    expected = from_bert(gradients_of(theirs), config)
    check_gradients(ours, mlm_loss(found, targets, chosen), loss.item(), expected)


@pytest.mark.equation("t5-config", "seq2seq-model", "decoder-block-cross", "pos-relative-bias", "encoder-stack")
def test_t5():
    theirs = randomised(transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=V, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)))  # fmt: skip
    config = t5_config_of(theirs.config.to_dict(), context=16)
    ours = EncoderDecoder(config, np.random.default_rng(0))
    ours.load_state_dict(from_t5(arrays(theirs.named_parameters()), config))
    rng = np.random.default_rng(1)
    source, ids, targets = rng.integers(1, V, (2, S)), rng.integers(1, V, (2, L)), rng.integers(1, V, (2, L))
    real = np.ones((2, S), bool)
    real[1, -3:] = False
    logits = theirs(
        input_ids=torch.from_numpy(source),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        decoder_input_ids=torch.from_numpy(ids),
    ).logits
    found = ours(source, ids, real)
    np.testing.assert_allclose(found.data, logits.detach().numpy(), atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).reshape(-1))
    loss.backward()
    expected = from_t5(gradients_of(theirs), config)
    check_gradients(ours, cross_entropy(found, targets), loss.item(), expected)


@pytest.mark.parametrize("convert", [from_gpt2, from_bert, from_t5])
def test_weights_of_another_architecture_are_refused(convert):
    config = gpt2_config({"vocab_size": V, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8})
    with pytest.raises(ValueError, match=f"{convert.__name__}: the weights must be with .* among them, got none"):
        convert({"other": np.zeros(1)}, config)


def test_a_variant_of_t5_is_refused():
    with pytest.raises(ValueError, match="t5_config_of: the configuration must be that of the first T5"):
        t5_config_of({"feed_forward_proj": "gated-gelu"})
