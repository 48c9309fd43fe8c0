"""PyTorch's side of the benchmark: idiomatic eager code for the same decoder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minillm.checks import optional_import
from minillm.cli.benchmark.cases import BETAS, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, Case


@contextmanager
def make_step(case: Case, threads: int) -> Iterator[Callable[[], float]]:
    """A training step on one fixed random batch."""
    torch = optional_import("torch", "kernels")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_decoder(torch, case)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    ids = torch.randint(case.vocab_size, (case.batch, case.length + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)

    def step() -> float:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs).view(-1, case.vocab_size), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimiser.step()
        return loss.item()

    yield step


def build_decoder(torch: Any, case: Case) -> Any:
    """The decoder in PyTorch's own layers: nn.RMSNorm, F.scaled_dot_product_attention, joint projections."""
    nn, F = torch.nn, torch.nn.functional
    d, H, d_head = case.d_model, case.n_heads, case.d_model // case.n_heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.ffn_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.value_gate = nn.Linear(d, 2 * case.d_ff, bias=False)
            self.down = nn.Linear(case.d_ff, d, bias=False)

        def forward(self, x, cos, sin):
            B, L, _ = x.shape
            q, k, v = self.qkv(self.attention_norm(x)).view(B, L, 3, H, d_head).permute(2, 0, 3, 1, 4)
            context = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
            x = x + self.out(context.transpose(1, 2).reshape(B, L, d))
            value, gate = self.value_gate(self.ffn_norm(x)).chunk(2, dim=-1)
            return x + self.down(value * F.silu(gate))

    def rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(case.vocab_size, d)
            self.blocks = nn.ModuleList([Block() for _ in range(case.n_layers)])
            self.final_norm = nn.RMSNorm(d, eps=1e-5)
            self.head = nn.Linear(d, case.vocab_size, bias=False)
            frequencies = 10_000.0 ** (-2.0 * torch.arange(d_head // 2) / d_head)
            angles = torch.arange(case.length)[:, None] * frequencies
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, ids):
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return self.head(self.final_norm(x))

    return Decoder()
