"""Blocks of model files: bit for bit what the format's own package makes of them, random bytes included."""

import numpy as np
import pytest

from minillm.functional.block_formats import DEQUANTISE, dequantise_blocks

gguf = pytest.importorskip("gguf")
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144, "Q6_K": 210}
NUMBERS = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}
kinds = pytest.mark.parametrize("kind", DEQUANTISE)


def oracle(raw, kind):
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@kinds
@pytest.mark.equation("scale-granularity", "double-quant")
def test_random_bytes_give_what_the_package_gives(kind):
    raw = np.random.default_rng(0).integers(0, 256, (200, 3 * BYTES[kind]), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are NaN or infinite now and then
        np.testing.assert_array_equal(dequantise_blocks(raw, kind), oracle(raw, kind))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.equation("scale-granularity")
def test_numbers_come_back_to_within_a_step(kind):
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    back = dequantise_blocks(raw, kind)
    reach = np.abs(x.reshape(5, 2, 32)).max(-1, keepdims=True)
    step = {"Q4_0": 1 / 8, "Q4_1": 2 / 15, "Q8_0": 1 / 127}[kind] * reach
    assert back.dtype == np.float32
    assert (np.abs(back - x).reshape(5, 2, 32) <= step * 1.01).all()


@kinds
def test_shapes(kind):
    for head in [(), (1,), (3, 2)]:
        assert dequantise_blocks(np.zeros((*head, 2 * BYTES[kind]), np.uint8), kind).shape == (*head, 2 * NUMBERS[kind])
    assert dequantise_blocks(np.zeros((4, 0), np.uint8), kind).shape == (4, 0)
    strided = np.zeros((4, 2 * BYTES[kind]), np.uint8)[::2]
    assert dequantise_blocks(strided, kind).shape == (2, 2 * NUMBERS[kind])


@kinds
def test_bytes_that_are_not_blocks_are_refused(kind):
    name = f"dequantise_{kind.lower()}: the blocks must be a uint8 array with a multiple of {BYTES[kind]}"
    for wrong in [np.zeros(BYTES[kind] + 1, np.uint8), np.zeros(BYTES[kind], np.int8), np.zeros((), np.uint8)]:
        with pytest.raises(ValueError, match=name):
            dequantise_blocks(wrong, kind)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"dequantise_blocks: kind must be one of 'Q4_0'.*got Q9"):
        dequantise_blocks(np.zeros(18, np.uint8), "Q9")
