"""Run with the interpreter of an environment that has the core dependencies only: train a little, generate a little."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

import minillm
from minillm.data.tokenizers import ByteTokenizer
from minillm.decoding import generate
from minillm.fused.losses import cross_entropy
from minillm.models import Decoder, DecoderConfig
from minillm.optim import AdamW
from minillm.training.step import loss_and_gradients

TEXT = "the quick brown fox jumps over the lazy dog. "
STEPS, LENGTH = 150, 32

assert Path(minillm.__file__).is_relative_to(sys.prefix), f"{minillm.__file__} is not the installed wheel"
for name in ("torch", "triton", "pytest", "hypothesis"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this is not the core alone"

rng = np.random.default_rng(0)
tokenizer = ByteTokenizer()
ids = np.array(tokenizer.encode(TEXT * 20))
model = Decoder(DecoderConfig(tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, d_ff=64, context=128), rng)
optimiser = AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(STEPS):
    starts = rng.integers(len(ids) - LENGTH, size=8)
    chunk = ids[starts[:, None] + np.arange(LENGTH + 1)[None, :]]  # (B, L + 1)
    loss, gradients = loss_and_gradients(cross_entropy(model(chunk[:, :-1]), chunk[:, 1:]), model.parameters())
    optimiser.step([gradients], max_norm=1.0)
    losses.append(loss)
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {STEPS} steps")
assert losses[-1] < 0.2 * losses[0]

prompt, rest = TEXT[:20], (TEXT * 2)[20 : 20 + len(TEXT)]
made = generate(model, np.array([tokenizer.encode(prompt)]), len(rest), rng, temperature=0.0)
said = tokenizer.decode(made.tokens[0])
print(f"{prompt!r} goes on: {said!r}")
assert said == rest
