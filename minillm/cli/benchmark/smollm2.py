"""The family ``pretrained``: a token of SmolLM2 here and in transformers, on the same weights.

Both sides have read the same 200 tokens and write the next 24, the most likely one each time. The floor reads as much
memory as the weights take, once a token, in one product of a matrix with long rows: as fast as this machine can read.

A step returns a number made of all its tokens, which must be the same on both sides.
"""

import importlib.util
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from minillm.autograd import no_grad
from minillm.checks import optional_import
from minillm.cli.benchmark.families import Family
from minillm.data import python_docs_text
from minillm.decoding.interface import last_logits
from minillm.models import Decoder
from minillm.models.llama_weights import to_llama
from minillm.models.pretrained import PACKAGE, load_pretrained

WEIGHTS = 134_515_008  # numbers that a token reads, the embedding once, as the head


@dataclass(frozen=True)
class GenerationCase:
    """How many tokens are read, and how many written in one step."""

    name: str
    prompt: int
    new: int
    steps: int


CASES = {"smollm2": GenerationCase("smollm2", 200, 24, steps=1)}


def missing() -> str | None:
    """What is needed to run this family and not there."""
    found = importlib.util.find_spec(PACKAGE) is not None
    return None if found else "the weights of SmolLM2 are missing: `make smollm2`"


def prepared(case: GenerationCase) -> tuple[Decoder, np.ndarray]:
    """The model and the ids (1, L) of the text that is continued."""
    pretrained = load_pretrained("smollm2", context=case.prompt + case.new)
    assert pretrained.tokenizer is not None and isinstance(pretrained.model, Decoder)
    ids = pretrained.tokenizer.encode(python_docs_text()[20_000:26_000])[: case.prompt]
    return pretrained.model, ids[None]


def fingerprint(tokens: np.ndarray) -> float:
    """One number that stands for a row of tokens: other tokens, another number."""
    return float(zlib.crc32(np.ascontiguousarray(tokens, "<i8").tobytes()))


@contextmanager
def ours(case: GenerationCase, threads: int) -> Iterator[Callable[[], float]]:
    """What `generate` runs, without the sampling; returns `fingerprint` of the tokens."""
    model, prompt = prepared(case)
    cache = model.new_cache(1)
    with threadpool_limits(threads, user_api="blas"), no_grad():
        first = last_logits(model, prompt, cache).argmax(-1)[:, None]

        def step() -> float:
            cache.rewind(0, case.prompt)
            written = [first]
            for _ in range(case.new):
                written.append(last_logits(model, written[-1], cache).argmax(-1)[:, None])
            return fingerprint(np.concatenate(written))

        yield step


@contextmanager
def torch_peer(case: GenerationCase, threads: int) -> Iterator[Callable[[], float]]:
    """The model class of transformers with its own cache, float32, inference mode; returns `fingerprint` of the tokens."""
    torch, transformers = optional_import("torch", "kernels"), optional_import("transformers", "dev")
    torch.set_num_threads(threads)
    ours, prompt = prepared(case)
    with torch.inference_mode():
        model = their_model(torch, transformers, ours)
        ids, cache = torch.from_numpy(prompt), transformers.DynamicCache(config=model.config)
        first = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, True)

        def step() -> float:
            if cache.get_seq_length() > case.prompt:
                cache.crop(case.prompt - cache.get_seq_length())
            written = [first]
            for _ in range(case.new):
                written.append(model(written[-1], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, True))
            return fingerprint(torch.cat(written).numpy())

        yield step


def their_model(torch: Any, transformers: Any, ours: Any) -> Any:
    """transformers' LLaMA with our weights."""
    c = ours.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    weights = to_llama(ours.state_dict(), c)
    weights["lm_head.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()})
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights, so made again
    return model.eval()


@contextmanager
def floor(case: GenerationCase, threads: int) -> Iterator[Callable[[], float]]:
    """The memory of the weights read once a token."""
    width = 4096
    matrix, vector = np.ones((WEIGHTS // width, width), np.float32), np.ones(width, np.float32)
    with threadpool_limits(threads, user_api="blas"):

        def step() -> float:
            return sum(float((matrix @ vector)[0]) for _ in range(case.new))

        yield step


def columns(case: GenerationCase, median: dict[str, float]) -> dict[str, Any]:
    """Tokens a second of both sides, and the floor as a share of our time."""
    peer = median.get("torch")
    return {
        **{key: value for key, value in asdict(case).items() if key in ("prompt", "new")},
        "ours_tokens_s": case.new / median["ours"],
        "peer_tokens_s": case.new / peer if peer else None,
        "read_gb_s": 4e-9 * WEIGHTS * case.new / median["floor"],
        "floor_share": median["floor"] / median["ours"],
    }


SIDES = {"ours": ours, "torch": torch_peer, "floor": floor}
FAMILY = Family(
    "pretrained",
    "a token of SmolLM2",
    CASES,
    SIDES,
    peer="transformers",
    columns=columns,
    same_answer=True,
    missing=missing,
)
