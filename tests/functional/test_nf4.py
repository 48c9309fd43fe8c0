"""NF4: the published levels, bitsandbytes bit for bit, the cost in bits, and what is refused."""

import numpy as np
import pytest
import torch

from minillm.functional import nf4
from minillm.functional.quantisation import dequantise, quantise_int4

PUBLISHED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


@pytest.mark.equation("nf4-levels", "wn-nf4")
def test_the_levels_are_quantiles_and_match_the_published_ones():
    """Erratum 56: nothing is learned; the quantile function gives the published numbers."""
    levels = nf4.nf4_levels()
    np.testing.assert_allclose(levels, [float(n) for n in PUBLISHED.split()], atol=2e-7)
    assert levels.shape == (16,) and levels[7] == 0 and (np.diff(levels) > 0).all()
    assert pytest.approx(0.9677083, abs=5e-8) == nf4.OUTERMOST


@pytest.mark.equation("nf4-quant", "nf4-levels")
@pytest.mark.parametrize("block", [64, 128, 256])
def test_bitsandbytes_gives_the_same_codes_scales_and_numbers(block):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = np.random.default_rng(0).normal(size=(96, 128)).astype(np.float32)
    w[:32] *= 1e-3
    packed, state = functional.quantize_4bit(torch.from_numpy(w), blocksize=block, quant_type="nf4")
    ours = nf4.quantise_nf4(w, block)
    np.testing.assert_array_equal(ours.packed, packed.numpy().reshape(-1))
    np.testing.assert_array_equal(ours.scale, state.absmax.numpy())
    theirs = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(nf4.dequantise_nf4(ours), theirs, rtol=1e-6, atol=0)


@pytest.mark.equation("nf4-quant")
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (3, 50), (2, 3, 64)])
def test_every_number_takes_the_nearest_level(shape):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    q = nf4.quantise_nf4(w)
    back = nf4.dequantise_nf4(q)
    assert back.shape == shape and q.packed.size == (w.size + 1) // 2
    flat, s = w.reshape(-1), np.repeat(q.scale, 64)[: w.size]
    nearest = np.abs(flat[:, None] - s[:, None] * nf4.nf4_levels()).min(-1)
    np.testing.assert_allclose(np.abs(back.reshape(-1) - flat), nearest, rtol=1e-5, atol=1e-7)
    exact = (nf4.nf4_levels() * np.float32(3)).reshape(4, 4)
    np.testing.assert_array_equal(nf4.dequantise_nf4(nf4.quantise_nf4(exact)), exact)
    assert not nf4.dequantise_nf4(nf4.quantise_nf4(np.zeros(shape, np.float32))).any()


@pytest.mark.equation("nf4-quant", "int4-quant")
def test_on_gaussian_weights_quantiles_beat_equal_steps():
    w = np.random.default_rng(2).normal(size=(4096, 64)).astype(np.float32)
    mse_nf4 = np.mean((nf4.dequantise_nf4(nf4.quantise_nf4(w)) - w) ** 2)
    mse_int4 = np.mean((dequantise(quantise_int4(w, -1)) - w) ** 2)
    assert mse_nf4 == pytest.approx(0.0085, abs=2e-4) and mse_int4 == pytest.approx(0.0116, abs=2e-4)


@pytest.mark.equation("double-quant")
@pytest.mark.parametrize("n", [1, 256, 300, 4096])
def test_scales_come_back_to_within_half_a_step(n):
    scale = np.abs(np.random.default_rng(3).normal(2.5, 0.4, n)).astype(np.float32)
    q = nf4.quantise_scales(scale)
    back = nf4.dequantise_scales(q)
    step = np.repeat(q.quantised.scale, 256)[:n]
    assert back.shape == (n,) and (np.abs(back - scale) <= step / 2 * (1 + 1e-4) + 1e-6).all()


@pytest.mark.equation("double-quant")
def test_quantised_scales_cost_almost_nothing_in_error():
    w = np.random.default_rng(4).normal(size=(1024, 64)).astype(np.float32)
    q = nf4.quantise_nf4(w)
    twice = q._replace(scale=nf4.dequantise_scales(nf4.quantise_scales(q.scale)))
    once, double = (np.mean((nf4.dequantise_nf4(part) - w) ** 2) for part in (q, twice))
    assert double == pytest.approx(once, rel=0.02)


@pytest.mark.equation("double-quant", "wn-qlora-4x")
def test_bits_per_weight():
    """Erratum 56: 4.5 or 4.127 bits, so the memory of 16-bit weights falls by 3.56 or 3.877 and not by 4."""
    assert nf4.bits_per_weight(64, None) == 4.5
    assert nf4.bits_per_weight() == pytest.approx(4.127, abs=5e-4)
    assert 16 / nf4.bits_per_weight() == pytest.approx(3.877, abs=5e-4)
    assert 65_285_660_672 * nf4.bits_per_weight() / 8 == pytest.approx(33.7e9, abs=0.05e9)
    w = np.zeros(64 * 256, np.float32)
    q = nf4.quantise_nf4(w)
    scales = nf4.quantise_scales(q.scale).quantised
    assert 8 * (q.packed.nbytes + scales.codes.nbytes + scales.scale.nbytes) / w.size == nf4.bits_per_weight()


def test_bad_input_is_refused():
    w = np.ones(64, np.float32)
    for block in (0, 2.5, -2):
        with pytest.raises(ValueError, match="quantise_nf4: block must be a positive integer"):
            nf4.quantise_nf4(w, block)
    with pytest.raises(ValueError, match="quantise_nf4: block must be even"):
        nf4.quantise_nf4(w, 63)
    with pytest.raises(ValueError, match="quantise_nf4: w must be an array of floating-point numbers, at least one"):
        nf4.quantise_nf4(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="quantise_nf4: w must be finite"):
        nf4.quantise_nf4(w * np.nan)
    with pytest.raises(ValueError, match="dequantise_nf4: the parts must be of 32 bytes and 1 scales"):
        nf4.dequantise_nf4(nf4.quantise_nf4(w)._replace(scale=np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="quantise_scales: scale must be one row of finite numbers"):
        nf4.quantise_scales(w * np.inf)
    with pytest.raises(ValueError, match="quantise_scales: block must be a positive integer"):
        nf4.quantise_scales(w, 0)
    with pytest.raises(ValueError, match="dequantise_scales: n must be at most the 256 codes"):
        nf4.dequantise_scales(nf4.quantise_scales(w)._replace(n=257))
    with pytest.raises(ValueError, match="bits_per_weight: block must be a positive integer"):
        nf4.bits_per_weight(0)
    with pytest.raises(ValueError, match="bits_per_weight: meta_block must be a positive integer"):
        nf4.bits_per_weight(64, 0)
