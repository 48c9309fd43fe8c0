"""A randomly initialised Mixtral of transformers and ours with its weights: same logits, gradients and balance loss."""

import numpy as np
import pytest

from minillm.autograd import cat
from minillm.functional.balance import aux_loss
from minillm.fused.losses import cross_entropy
from minillm.models.mixtral_weights import from_mixtral, mixtral_config, to_mixtral
from minillm.models.transformer import Transformer
from minillm.training.step import loss_and_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, L = 61, 24
VARIANTS = {
    "two of four": {},
    "three of five, tied, multi-query": {
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "one expert alone": {"num_local_experts": 1, "num_experts_per_tok": 1},
}


def pair_of_models(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": L,
        "initializer_range": 0.15,  # large enough that routers are far from undecided
        "attn_implementation": "eager",
        **changes,
    }
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)).eval()
    weights = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}
    config = mixtral_config(theirs.config.to_dict())
    ours = Transformer(config, np.random.default_rng(0))
    ours.load_state_dict(from_mixtral(weights, config))
    return theirs, ours, weights


def ids_and_targets():
    tokens = np.random.default_rng(3).integers(0, V, size=(3, L + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.equation("moe-output", "topk-renormalise", "moe-combine", "llama-config")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_agree(variant):
    theirs, ours, _ = pair_of_models(**VARIANTS[variant])
    ids, targets = ids_and_targets()
    logits = theirs(torch.from_numpy(ids)).logits
    expected = logits.detach().numpy()
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).reshape(-1))
    loss.backward()
    mine = ours(ids)
    assert mine.dtype == np.float32 and np.abs(expected).max() > 1
    error = np.abs(mine.data - expected).max()
    value, gradients = loss_and_gradients(cross_entropy(mine, targets), ours.parameters())
    names = [name for name, _ in ours.named_parameters()]
    found = to_mixtral(dict(zip(names, gradients, strict=True)), ours.config)
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert found.keys() == wanted.keys()
    worst = max(np.abs(found[n] - wanted[n]).max() / max(np.abs(wanted[n]).max(), 1e-3) for n in wanted)
    print(
        f"{variant}: logits off by {error:.1e} of {np.abs(expected).max():.1f}, gradients by {worst:.1e} of the largest"
    )
    assert error <= 2e-5 and abs(value - loss.item()) < 1e-5 and worst < 1e-4


@pytest.mark.equation("moe-aux-loss", "moe-total-loss")
def test_the_balance_loss_is_theirs_in_the_source_s_normalisation():
    theirs, ours, _ = pair_of_models(output_router_logits=True, router_aux_loss_coef=0.1)
    ids, _ = ids_and_targets()
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).aux_loss.item()
    record = []
    ours(ids, record=record)
    assert len(record) == 2
    p, routed = cat([r.p for r in record], 0), np.concatenate([r.routed for r in record])
    assert float(aux_loss(p, routed, normalise_by_k=False).data) == pytest.approx(wanted, rel=1e-5)


def test_names_of_files_and_back():
    _, ours, weights = pair_of_models()
    config, state = ours.config, ours.state_dict()
    filed = {}
    for name, array in weights.items():
        if name.endswith("mlp.gate.weight"):
            filed[name.replace("mlp", "block_sparse_moe")] = array
        elif "mlp.experts" in name:
            for j, own in enumerate(array):
                base = name.split("mlp")[0] + f"block_sparse_moe.experts.{j}"
                if name.endswith("gate_up_proj"):
                    filed[f"{base}.w1.weight"], filed[f"{base}.w3.weight"] = np.split(own, 2)
                else:
                    filed[f"{base}.w2.weight"] = own
        else:
            filed[name] = array
    for name, array in from_mixtral(filed, config).items():
        np.testing.assert_array_equal(array, state[name])
    for name, array in to_mixtral(state, config).items():
        np.testing.assert_array_equal(array, weights[name])
    broken = {name: array for name, array in filed.items() if "experts.3.w2" not in name}
    with pytest.raises(ValueError, match="the experts' weights must be complete"):
        from_mixtral(broken, config)
    with pytest.raises(ValueError, match=r"those of a Mixtral with model\.norm\.weight"):
        from_mixtral({n: a for n, a in weights.items() if n != "model.norm.weight"}, config)
    with pytest.raises(ValueError, match="also extra"):
        from_mixtral(weights | {"extra": np.ones(1)}, config)
