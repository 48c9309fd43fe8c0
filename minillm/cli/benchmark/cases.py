"""The sizes of the benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One decoder and one batch: pre-norm RMSNorm, rotary positions, SwiGLU, a head of its own."""

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    length: int
    batch: int
    steps: int  # timed steps in one round

    def products(self) -> list[tuple[int, int, int, int]]:
        """Matrix products of the forward pass as (how many, m, k, n), attention unmasked."""
        rows, d, d_head = self.batch * self.length, self.d_model, self.d_model // self.n_heads
        heads = self.batch * self.n_heads * self.n_layers
        return [
            (self.n_layers, rows, d, 3 * d),
            (self.n_layers, rows, d, d),
            (self.n_layers, rows, d, 2 * self.d_ff),
            (self.n_layers, rows, self.d_ff, d),
            (1, rows, d, self.vocab_size),
            (heads, self.length, d_head, self.length),
            (heads, self.length, self.length, d_head),
        ]


CASES = {
    case.name: case
    for case in (
        Case("XS", 65, 64, 2, 4, 172, 64, 16, steps=20),
        Case("S", 65, 128, 4, 4, 344, 128, 16, steps=6),
        Case("M", 512, 256, 4, 8, 688, 256, 8, steps=2),
        Case("L", 4096, 384, 6, 6, 1024, 256, 8, steps=1),
    )
}

LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0
