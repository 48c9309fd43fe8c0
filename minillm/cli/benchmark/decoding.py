"""The family ``decoding``: tokens a second with a cache, one text or many, and reading a prompt.

Both sides take the most likely token at each step, over a cache that is allocated once, without gradients. PyTorch's
side is the decoder of the training family with `F.scaled_dot_product_attention` over slices of its cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from minillm.autograd import no_grad
from minillm.checks import optional_import
from minillm.cli.benchmark.families import Family
from minillm.decoding.interface import last_logits
from minillm.models import Config, Decoder


@dataclass(frozen=True)
class DecodingCase:
    """One decoder, a cached prompt, and the tokens that follow; no new ones: reading the prompt is what is timed."""

    name: str
    batch: int
    prompt: int
    new: int
    steps: int
    vocab_size: int = 4096
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 4
    d_ff: int = 1376

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def tokens(self) -> int:
        """Tokens that one step reads or writes."""
        return self.batch * (self.new or self.prompt)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that every pass reads: the layers' and the head's."""
        d, kv = self.d_model, self.n_kv_heads * self.d_head
        return 4 * (self.n_layers * (2 * d * d + 2 * d * kv + 3 * d * self.d_ff) + self.vocab_size * d)

    def prompts(self) -> np.ndarray:
        """Ids (B, L)."""
        return np.random.default_rng(1).integers(self.vocab_size, size=(self.batch, self.prompt))


SMALL = {"vocab_size": 65, "d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "d_ff": 344}
CASES = {
    case.name: case
    for case in (
        DecodingCase("small-1", 1, 64, 32, steps=4, **SMALL),
        DecodingCase("small-32", 32, 64, 32, steps=2, **SMALL),
        DecodingCase("large-1", 1, 128, 16, steps=2),
        DecodingCase("large-32", 32, 128, 16, steps=1),
        DecodingCase("small-prefill", 8, 128, 0, steps=6, **SMALL),
        DecodingCase("large-prefill", 1, 512, 0, steps=2),
    )
}


@contextmanager
def ours(case: DecodingCase, threads: int) -> Iterator[Callable[[], float]]:
    """What `generate` runs, without the sampling."""
    config = Config(
        case.vocab_size,
        case.d_model,
        case.n_layers,
        case.n_heads,
        case.n_kv_heads,
        case.d_ff,
        context=case.prompt + case.new,
        rope_pairing="half",
    )
    model, prompts = Decoder(config, np.random.default_rng(0)), case.prompts()
    cache = model.new_cache(case.batch)
    with threadpool_limits(threads), no_grad():
        first = last_logits(model, prompts, cache).argmax(-1)[:, None]

        def step() -> float:
            if case.new == 0:
                cache.rewind(0, 0)
                return float(last_logits(model, prompts, cache)[0, 0])
            cache.rewind(0, case.prompt)
            ids = first
            for _ in range(case.new):
                ids = last_logits(model, ids, cache).argmax(-1)[:, None]
            return float(ids[0, 0])

        yield step


@contextmanager
def torch_peer(case: DecodingCase, threads: int) -> Iterator[Callable[[], float]]:
    """The same in eager PyTorch, inference mode."""
    torch = optional_import("torch", "kernels")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        model = build_decoder(torch, case)
        prompts = torch.from_numpy(case.prompts())
        first = model(prompts, 0).argmax(-1, keepdim=True)

        def step() -> float:
            if case.new == 0:
                return model(prompts, 0)[0, 0].item()
            ids = first
            for i in range(case.new):
                ids = model(ids, case.prompt + i).argmax(-1, keepdim=True)
            return ids[0, 0].item()

        yield step


def build_decoder(torch: Any, case: DecodingCase) -> Any:
    """The decoder in PyTorch's own layers, with a cache of its full length; returns logits of the last position."""
    nn, F = torch.nn, torch.nn.functional
    d, H, H_kv, d_head = case.d_model, case.n_heads, case.n_kv_heads, case.d_head
    length = case.prompt + case.new

    def rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.ffn_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
            self.qkv = nn.Linear(d, (H + 2 * H_kv) * d_head, bias=False)
            self.out = nn.Linear(d, d, bias=False)
            self.value_gate = nn.Linear(d, 2 * case.d_ff, bias=False)
            self.down = nn.Linear(case.d_ff, d, bias=False)
            self.register_buffer("keys", torch.empty(case.batch, H_kv, length, d_head))
            self.register_buffer("values", torch.empty(case.batch, H_kv, length, d_head))

        def forward(self, x, cos, sin, start):
            B, L, _ = x.shape
            q, k, v = self.qkv(self.attention_norm(x)).view(B, L, -1, d_head).transpose(1, 2).split([H, H_kv, H_kv], 1)
            self.keys[:, :, start : start + L] = rotate(k, cos, sin)
            self.values[:, :, start : start + L] = v
            keys, values = self.keys[:, :, : start + L], self.values[:, :, : start + L]
            options = {"is_causal": L > 1, "enable_gqa": H_kv != H}
            context = F.scaled_dot_product_attention(rotate(q, cos, sin), keys, values, **options)
            x = x + self.out(context.transpose(1, 2).reshape(B, L, d))
            value, gate = self.value_gate(self.ffn_norm(x)).chunk(2, dim=-1)
            return x + self.down(value * F.silu(gate))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(case.vocab_size, d)
            self.blocks = nn.ModuleList([Block() for _ in range(case.n_layers)])
            self.final_norm, self.head = nn.RMSNorm(d, eps=1e-5), nn.Linear(d, case.vocab_size, bias=False)
            frequencies = 10_000.0 ** (-2.0 * torch.arange(d_head // 2) / d_head)
            angles = torch.arange(length)[:, None] * frequencies
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, ids, start):
            x, stop = self.embedding(ids), start + ids.shape[1]
            for block in self.blocks:
                x = block(x, self.cos[start:stop], self.sin[start:stop], start)
            return self.head(self.final_norm(x[:, -1]))

    return Model()


def columns(case: DecodingCase, median: dict[str, float]) -> dict[str, Any]:
    """Tokens a second of both sides, and the rate at which our decoding reads the weights."""
    peer = median.get("torch")
    return {
        "ours_tokens_s": case.tokens / median["ours"],
        "peer_tokens_s": case.tokens / peer if peer else None,
        "ours_weights_gb_s": case.weight_bytes * (case.new or 1) / median["ours"] / 1e9,
    }


FAMILY = Family(
    "decoding", "tokens with a cache, and reading prompts", CASES, {"ours": ours, "torch": torch_peer}, columns=columns
)
