"""A randomly initialised LLaMA of transformers and ours with its weights compute the same function and gradients."""

import numpy as np
import pytest

from minillm.fused.losses import cross_entropy
from minillm.models import Decoder
from minillm.models.llama_weights import from_llama, llama_config, load_llama, to_llama
from minillm.training.step import loss_and_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, CONTEXT = 61, 40
VARIANTS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "grouped and tied, other base and eps": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-3,
    },
}


def their_model(seed: int = 0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.12,  # large enough that attention and gates are far from uniform
        "attn_implementation": "eager",
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def pair_of_models(**changes):
    theirs = their_model(**changes)
    weights = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}
    return theirs, load_llama(theirs.config.to_dict(), weights)


def ids_and_targets(seed: int = 3):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, size=(3, CONTEXT + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.equation("llama-config", "lm-head", "weight-tying", "pre-ln", "gqa", "mha")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_to_1e_5(variant):
    theirs, ours = pair_of_models(**VARIANTS[variant])
    ids, _ = ids_and_targets()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    logits = ours(ids).data
    assert logits.dtype == np.float32 and np.abs(expected).max() > 1
    error = np.abs(logits - expected).max()
    print(f"{variant}: largest |difference of logits| {error:.2e}, largest |logit| {np.abs(expected).max():.2f}")
    assert error <= 1e-5


@pytest.mark.equation("llama-config", "clm-loss", "training-step")
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_all_gradients_agree_to_1e_4(variant):
    theirs, ours = pair_of_models(**VARIANTS[variant])
    ids, targets = ids_and_targets()
    logits = theirs(torch.from_numpy(ids)).logits
    expected_loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).reshape(-1))
    expected_loss.backward()

    loss, gradients = loss_and_gradients(cross_entropy(ours(ids), targets), ours.parameters())
    assert loss == pytest.approx(expected_loss.item(), rel=1e-6)
    names = [name for name, _ in ours.named_parameters()]
    found = to_llama(dict(zip(names, gradients, strict=True)), ours.config)
    their_gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert found.keys() == their_gradients.keys()
    errors = {
        name: np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
        for name, expected in their_gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    print(f"{variant}: worst relative gradient error {errors[worst]:.2e} ({worst})")
    assert errors[worst] <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mapping_there_and_back_is_the_identity(variant):
    theirs, ours = pair_of_models(**VARIANTS[variant])
    back = to_llama(ours.state_dict(), ours.config)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_array_equal(back[name], parameter.detach().numpy())


def test_a_trained_step_of_ours_runs_in_theirs():
    """Export: our weights in transformers give our logits."""
    theirs, ours = pair_of_models(num_key_value_heads=2)
    for parameter in ours.parameters():
        parameter.data *= 0.9
    exported = {
        name: torch.from_numpy(array.copy()) for name, array in to_llama(ours.state_dict(), ours.config).items()
    }
    theirs.load_state_dict(exported)
    ids, _ = ids_and_targets()
    with torch.no_grad():
        np.testing.assert_allclose(ours(ids).data, theirs(torch.from_numpy(ids)).logits.numpy(), atol=1e-5)


@pytest.mark.equation("pos-rope")
def test_the_other_rotary_pairing_is_another_function():
    _, ours = pair_of_models()
    config = {**ours.config.to_dict(), "rope_pairing": "interleaved"}
    other = Decoder(type(ours.config)(**config), np.random.default_rng(0))
    other.load_state_dict(ours.state_dict())
    ids, _ = ids_and_targets()
    assert np.abs(other(ids).data - ours(ids).data).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary positions .* must be one of .*, got longrope"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_configurations_that_ours_does_not_have_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        llama_config({**their_model().config.to_dict(), **change})


def test_missing_and_foreign_weights_are_refused():
    theirs = their_model()
    config = llama_config(theirs.config.to_dict())
    weights = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}
    without = {name: array for name, array in weights.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"a LLaMA with model.layers.1.mlp.up_proj.weight"):
        from_llama(without, config)
    with pytest.raises(ValueError, match=r"also model.layers.0.self_attn.q_proj.bias"):
        from_llama({**weights, "model.layers.0.self_attn.q_proj.bias": np.zeros(32)}, config)
