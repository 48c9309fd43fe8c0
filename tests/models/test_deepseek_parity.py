"""A randomly initialised DeepSeek-V3 of transformers and our layers with its weights: logits, gradients, caches.

The model: latent attention with low-rank queries, then a dense layer first and experts behind it, with a sigmoid
router, a bias in the choice, shared experts and a scale; with groups of experts of which a token may visit few.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from minillm.autograd import Tensor, grad, no_grad
from minillm.cli import main
from minillm.decoding import beam_search, generate, speculative_generate
from minillm.decoding.drafters import LookupDrafter
from minillm.decoding.law import Law
from minillm.fused.linear import linear
from minillm.fused.losses import cross_entropy
from minillm.models.costs import cache_bytes
from minillm.models.counting import count_model
from minillm.models.deepseek_weights import from_deepseek
from minillm.models.folder import load_folder
from minillm.models.transformer import Transformer
from minillm.nn import Embedding, Module, RMSNorm, SwiGLU
from minillm.nn.cache import ModelCache
from minillm.nn.experts import MixtureOfExperts
from minillm.nn.latent_attention import LatentAttention
from minillm.nn.layers import Linear

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.equation("mla-deepseek", "mla-decoupled-rope", "gating-sigmoid", "moe-bias-balancing")

V, D, LAYERS, H, D_HEAD, D_R, D_V, D_C, D_Q, D_FF, D_EXPERT, EXPERTS, K, SHARED = (
    31, 24, 3, 4, 6, 4, 5, 10, 12, 40, 16, 6, 2, 2,
)  # fmt: skip
VARIANTS = {
    "as V3": {},
    "queries not compressed": {"q_lora_rank": None},
    "half pairing": {"rope_interleave": False},
    "tied": {"tie_word_embeddings": True},
    "one of two groups": {"n_group": 2, "topk_group": 1},
    "two of three groups": {"n_group": 3, "topk_group": 2},
    "every group alone": {"n_group": 3, "topk_group": 3},
}


def their_model(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": V, "hidden_size": D, "intermediate_size": D_FF, "moe_intermediate_size": D_EXPERT,
        "num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": H,
        "n_shared_experts": SHARED, "n_routed_experts": EXPERTS, "num_experts_per_tok": K,
        "routed_scaling_factor": 1.7, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": D_C, "q_lora_rank": D_Q, "qk_rope_head_dim": D_R, "qk_nope_head_dim": D_HEAD,
        "v_head_dim": D_V, "max_position_embeddings": 64, "initializer_range": 0.15, "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0, "attn_implementation": "eager", **changes,
    }  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("gate.weight"):
                parameter.normal_(0, 0.5)
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.uniform_(-0.2, 0.2)  # decides some choices, weighs none
    return model


class Block(Module):
    """Pre-norm: attention, then a dense network or experts."""

    def __init__(self, theirs, dense: bool):
        rng, eps = np.random.default_rng(0), theirs.rms_norm_eps
        pairing = "interleaved" if theirs.rope_interleave else "half"
        self.attention_norm, self.ffn_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        sizes = {"d_q": theirs.q_lora_rank, "d_v": D_V, "pairing": pairing}
        self.attention = LatentAttention(D, H, D_HEAD, D_C, D_R, rng, **sizes)
        scale = theirs.routed_scaling_factor
        self.ffn = (
            SwiGLU(D, D_FF, rng)
            if dense
            else MixtureOfExperts(
                D,
                D_EXPERT,
                EXPERTS,
                K,
                rng,
                router="sigmoid",
                n_shared=SHARED,
                scale=scale,
                n_groups=theirs.n_group,
                k_groups=theirs.topk_group,
            )
        )


class OurModel(Module):
    """The layers above in a row, with the interface that decoding asks for."""

    def __init__(self, theirs):
        rng = np.random.default_rng(0)
        self.config = SimpleNamespace(vocab_size=V, context=64)
        self.embedding = Embedding(V, D, rng)
        self.blocks = [Block(theirs, dense=i < theirs.first_k_dense_replace) for i in range(LAYERS)]
        self.final_norm = RMSNorm(D, theirs.rms_norm_eps)
        self.head = None if theirs.tie_word_embeddings else Linear(D, V, rng)

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(self, ids, cache=None) -> Tensor:
        x = self.embedding(ids)
        for i, block in enumerate(self.blocks):
            x = x + block.attention(block.attention_norm(x), cache=None if cache is None else cache.layer(i))
            x = x + block.ffn(block.ffn_norm(x))
        return self.final_norm(x)

    def forward(self, ids, cache=None) -> Tensor:
        return linear(self.hidden(ids, cache), self.output_weight)

    def new_cache(self, batch, capacity=None):
        return ModelCache([block.attention.new_cache(batch, capacity or 64) for block in self.blocks])


def ours_by_theirs(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a state (or gradients) of theirs under our names; gate and value change places."""
    mapped = {}
    for name, array in weights.items():
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        block = stem.replace("model.layers.", "blocks.").replace(".self_attn", ".attention")
        block = block.replace(".mlp.shared_experts", ".ffn").replace(".mlp.experts", ".ffn").replace(".mlp", ".ffn")
        plain = {
            "q_a_proj": "w_down_q", "q_b_proj": "w_up_q", "q_proj": "w_up_q", "q_a_layernorm": "q_norm.gain",
            "kv_a_proj_with_mqa": "w_down_kv", "kv_a_layernorm": "kv_norm.gain", "kv_b_proj": "w_up_kv",
            "o_proj": "w_out", "input_layernorm": "attention_norm.gain", "post_attention_layernorm": "ffn_norm.gain",
            "gate": "w_router",
        }  # fmt: skip
        if last in plain:
            mapped[f"{block}.{plain[last]}"] = array
        elif last == "e_score_correction_bias":
            mapped[block.removesuffix(".gate") + ".bias"] = array
        elif last == "gate_up_proj":
            gate, value = np.split(array, 2, axis=1)
            mapped[f"{block}.w_in"] = np.concatenate([value, gate], axis=1)
        elif last == "up_proj":
            joint = np.concatenate([array, weights[name.replace("up_proj", "gate_proj")]])
            mapped[block + (".shared_in" if "shared" in stem else ".w_value_gate")] = joint
        elif last == "down_proj":
            mapped[block + (".shared_down" if "shared" in stem else ".w_down")] = array
        elif last in ("embed_tokens", "norm", "lm_head"):
            own = {"embed_tokens": "embedding.weight", "norm": "final_norm.gain", "lm_head": "head.weight"}
            mapped[own[last]] = array
    return mapped


def pair(**changes):
    theirs = their_model(**changes)
    ours = OurModel(theirs.config)
    state = ours_by_theirs({name: array.detach().numpy() for name, array in theirs.state_dict().items()})
    if theirs.config.tie_word_embeddings:
        state.pop("head.weight", None)
    ours.load_state_dict(state)
    return theirs, ours


def some_ids(B: int = 3, L: int = 20, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, size=(B, L))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_theirs(variant):
    theirs, ours = pair(**VARIANTS[variant])
    ids = some_ids()
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = ours(inputs)
    wanted = theirs(torch.from_numpy(inputs)).logits
    np.testing.assert_allclose(logits.data, wanted.detach().numpy(), atol=2e-5)

    loss = torch.nn.functional.cross_entropy(wanted.reshape(-1, V), torch.from_numpy(targets).reshape(-1))
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    their_gradients = ours_by_theirs(gradients)
    named = {name: p for name, p in ours.named_parameters() if not name.endswith("ffn.bias")}
    found = grad(cross_entropy(logits, targets), list(named.values()))
    assert set(named) == set(their_gradients)
    for (name, _), gradient in zip(named.items(), found, strict=True):
        reference = their_gradients[name]
        error = np.linalg.norm(gradient.data - reference) / np.linalg.norm(reference)
        assert error < 2e-5, (name, error)


def test_the_bias_decides_choices():
    """Without it other experts are chosen, so the parity above has tested it."""
    _, ours = pair()
    ids = some_ids()
    with no_grad():
        with_bias = ours(ids).data
        for block in ours.blocks[1:]:
            block.ffn.bias.data[...] = 0.0
        assert np.abs(ours(ids).data - with_bias).max() > 1e-2


@pytest.mark.equation("topk-renormalise")
@pytest.mark.parametrize("variant", ["one of two groups", "two of three groups"])
def test_groups_change_choices_and_bound_how_many_are_visited(variant):
    """So the parity above has tested them."""
    _, ours = pair(**VARIANTS[variant])
    moe = ours.blocks[-1].ffn
    x = Tensor(np.random.default_rng(0).normal(size=(200, D)).astype(np.float32))
    record: list = []
    with no_grad():
        moe(x, record)
        G = moe.n_groups
        visited = record[0].routed.reshape(200, G, EXPERTS // G).any(-1).sum(-1)
        assert visited.max() <= moe.k_groups
        moe.n_groups = moe.k_groups = 1
        moe(x, record)
    changed = (record[0].routed != record[1].routed).any(-1).mean()
    assert 0.05 < changed < 1


@pytest.mark.equation("mla-absorb", "kv-cache-mla", "kv-cache")
def test_cached_logits_are_the_uncached_ones_and_the_cache_is_narrow():
    _, ours = pair()
    ids = some_ids(2, 15)
    with no_grad():
        whole, cache, start, found = ours(ids).data, ours.new_cache(2, 15), 0, []
        for n in (4, 1, 1, 6, 3):
            found.append(ours(ids[:, start : start + n], cache).data)
            start += n
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=2e-5)
    assert cache.nbytes == 4 * LAYERS * 2 * 15 * (D_C + D_R)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_transformers_is_the_same_function_here(tmp_path, variant):
    theirs = their_model(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    ours, ids = load_folder(tmp_path), some_ids()
    assert type(ours) is Transformer and ours.config.n_dense_layers == 1
    wanted = theirs(torch.from_numpy(ids)).logits.detach().numpy()
    with no_grad():
        np.testing.assert_allclose(ours(ids).data, wanted, atol=2e-5)
        cache = ours.new_cache(3, 20)
        found = [ours(ids[:, a:b], cache).data for a, b in ((0, 11), (11, 12), (12, 20))]
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, atol=2e-5)
    assert cache.nbytes == cache_bytes(ours.config, 3, 20)
    assert count_model(ours.config).total == ours.count_parameters()
    in_memory = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}
    for name, array in from_deepseek(in_memory, ours.config).items():
        np.testing.assert_array_equal(array, ours.state_dict()[name], err_msg=name)


def test_a_folder_continues_a_text_as_theirs_does(tmp_path, capsys):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    prompt = some_ids(1, 6)
    ends = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(1, 6, dtype=torch.long)
    wanted = theirs.generate(torch.from_numpy(prompt), attention_mask=mask, use_cache=False, **ends).numpy()[0, 6:]
    options = ["--prompt-ids", ",".join(map(str, prompt[0])), "--max-new-tokens", "10", "--temperature", "0", "--json"]
    assert main(["generate", "--checkpoint", str(tmp_path), *options]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == wanted.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob must be True, got False"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06, got 1e-05"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "the scaling of rotary positions must be None"),
        ({"kv_lora_rank": 0}, "d_latent must be a positive integer, got 0"),
        ({"n_routed_experts": 7}, "with model.layers.1.mlp.experts.6.up_proj.weight among them"),
        ({"n_shared_experts": 0}, "those of this architecture, got also model.layers.1.mlp.shared_experts"),
        ({"num_experts_per_tok": 9}, "experts_per_token must be at most 6, got 9"),
    ],
)
def test_folders_of_something_else_are_refused(tmp_path, change, words):
    their_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        load_folder(tmp_path)


@pytest.mark.equation("greedy", "beam-search", "speculative-decoding")
def test_every_way_of_decoding_works_over_latents():
    theirs, ours = pair()
    prompts = some_ids(2, 5)
    ends = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(2, 5, dtype=torch.long)
    wanted = theirs.generate(torch.from_numpy(prompts), attention_mask=mask, use_cache=False, **ends).numpy()[:, 5:]
    greedy = generate(ours, prompts, 12, np.random.default_rng(0), temperature=0)
    np.testing.assert_array_equal(greedy.tokens, wanted)
    np.testing.assert_array_equal(beam_search(ours, prompts, 12, beams=1).tokens[:, 0], wanted)
    fast = speculative_generate(
        ours, LookupDrafter(V, 1), prompts, 12, np.random.default_rng(0), law=Law(temperature=0)
    )
    np.testing.assert_array_equal(fast.generation.tokens, wanted)
