"""Caches: sizes as the formulas say, nothing lost however the text is cut, going back, and bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, no_grad
from minillm.functional.attention import scaled_dot_product_attention
from minillm.nn.cache import KVCache, LayerCache, ModelCache
from minillm.nn.cross_cache import BlockCache, CrossCache
from minillm.nn.latent_cache import LatentCache
from minillm.nn.quantised_cache import QuantisedCache, quantised_cache_nbytes
from minillm.nn.window_cache import StateCache, WindowCache

B, H, D, CAPACITY, WINDOW = 2, 3, 4, 40, 5

KINDS = {
    "layer": lambda: LayerCache(B, H, CAPACITY, D, D + 1),
    "view of all layers": lambda: KVCache(1, B, H, CAPACITY, D).layer(0),
    "latent": lambda: LatentCache(B, CAPACITY, D, 2),
    "window": lambda: WindowCache(B, H, WINDOW, D, D + 1),
    "state": lambda: StateCache(B, H, D, D + 1),
    "int8": lambda: QuantisedCache(B, H, CAPACITY, D, D + 1, bits=8, group=4),
    "int4": lambda: QuantisedCache(B, H, CAPACITY, D, D + 1, bits=4, group=4),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
DROPS = {"layer", "latent"}  # goes back to any length; the others to their mark


def new_pair(rng: np.random.Generator, kind: str, n: int, batch: int = B) -> tuple[np.ndarray, np.ndarray]:
    if kind == "latent":
        shapes = (batch, n, D), (batch, n, 2)
    else:
        shapes = (batch, H, n, D), (batch, H, n, D if kind == "view of all layers" else D + 1)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)  # pyright: ignore[reportReturnType]


def contents(cache) -> tuple[np.ndarray, ...]:
    """All that a cache would show a later query."""
    if isinstance(cache, StateCache):
        return tuple(a.copy() for a in cache.sums)
    if isinstance(cache, LatentCache):
        return (cache.filled.copy(),)
    if isinstance(cache, QuantisedCache):
        return cache.read()
    if isinstance(cache, WindowCache):
        order = np.arange(max(0, cache.length - WINDOW), cache.length) % WINDOW
        return cache.keys[:, :, order], cache.values[:, :, order]
    n = cache.length
    if isinstance(cache, LayerCache):
        return cache.keys[:, :, :n].copy(), cache.values[:, :, :n].copy()
    return cache.cache.keys[0, :, :, :n].copy(), cache.cache.values[0, :, :, :n].copy()


@pytest.mark.equation("kv-cache", "kv-cache-window", "kv-cache-mla", "kv-cache-quantised")
@EVERY_KIND
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=25)
def test_what_is_kept_does_not_depend_on_how_the_text_was_cut(kind, pieces, seed):
    rng = np.random.default_rng(seed)
    pieces = pieces[:4]
    k, v = new_pair(rng, kind, sum(pieces))
    whole, cut = KINDS[kind](), KINDS[kind]()
    axis, start = k.ndim - 2, 0
    whole.append(k, v)
    for n in pieces:
        new = np.arange(start, start + n)
        cut.append(k.take(new, axis), v.take(new, axis))
        start += n
        assert cut.length == start
    for a, b in zip(contents(whole), contents(cut), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@EVERY_KIND
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=25)
def test_going_back_is_as_if_the_rest_had_never_come(kind, before, kept, after, seed):
    rng = np.random.default_rng(seed)
    cache, other = KINDS[kind](), KINDS[kind]()
    first, second, third = (new_pair(rng, kind, n) for n in (before, kept + after, 3))
    cache.append(*first)
    mark = cache.save() if kind != "view of all layers" else cache.cache.save()
    cache.append(*second)
    (cache if kind != "view of all layers" else cache.cache).rewind(mark, before + kept)
    assert before <= cache.length <= before + kept
    assert cache.length == before + kept or kind not in DROPS
    left = cache.length - before
    other.append(*first)
    axis = second[0].ndim - 2
    if left:
        other.append(*(a.take(np.arange(left), axis) for a in second))
    cache.append(*third)
    other.append(*third)
    for a, b in zip(contents(cache), contents(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@EVERY_KIND
def test_rows_follow_a_selection(kind):
    rng, rows = np.random.default_rng(0), np.array([1, 0, 1, 1])
    cache = KINDS[kind]()
    cache.append(*new_pair(rng, kind, 7))
    before = contents(cache)
    (cache if kind != "view of all layers" else cache.cache).select(rows)
    assert cache.batch == 4 and cache.length == 7
    for a, b in zip(contents(cache), before, strict=True):
        np.testing.assert_array_equal(a, b[rows])
    cache.append(*new_pair(rng, kind, 2, batch=4))


@pytest.mark.equation("kv-cache-window")
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_ring_gives_attention_with_a_window(window, pieces, seed):
    """Not attention on the last w tokens as if they were the text: erratum 43."""
    rng, L = np.random.default_rng(seed), sum(pieces)
    q, k, v = (Tensor(rng.normal(size=(B, H, L, D))) for _ in range(3))
    whole = scaled_dot_product_attention(q, k, v, causal=True, window=window).data
    ring, start = WindowCache(B, H, window, D, dtype=np.float64), 0
    for n in pieces:
        new = slice(start, start + n)
        all_k, all_v = ring.append(k[:, :, new], v[:, :, new])
        distance = np.arange(start, start + n)[:, None] - ring.key_positions
        part = scaled_dot_product_attention(q[:, :, new], all_k, all_v, (distance >= 0) & (distance < window)).data
        np.testing.assert_allclose(part, whole[:, :, new], atol=1e-12)
        start += n
        assert ring.nbytes == 2 * B * H * window * D * 8  # whatever the length


@pytest.mark.equation("kv-cache-size", "kv-cache-mla", "mla-cache-size")
def test_sizes_are_those_of_the_formulas():
    layer = LayerCache(B, H, CAPACITY, D)
    assert layer.nbytes == 4 * 2 * B * CAPACITY * H * D
    for layers in (1, 5):
        assert KVCache(layers, B, H, CAPACITY, D).nbytes == layers * layer.nbytes
        model = ModelCache([LayerCache(B, H, CAPACITY, D) for _ in range(layers)])
        assert model.nbytes == layers * layer.nbytes
    assert LayerCache(B, 1, CAPACITY, D).nbytes * H == layer.nbytes  # multi-query: H times less
    assert LatentCache(B, CAPACITY, 6, 2).nbytes == 4 * B * CAPACITY * (6 + 2)
    assert StateCache(B, H, D, 5).nbytes == 4 * B * H * D * (5 + 1)
    per_token = LatentCache(1, 1, 512, 64, np.float16).nbytes, LayerCache(1, 128, 1, 128, dtype=np.float16).nbytes
    assert per_token == (2 * 576, 2 * 32768) and round(per_token[1] / per_token[0], 1) == 56.9


@pytest.mark.equation("kv-cache-quantised")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("d", [4, 5, 64])
def test_a_quantised_cache_is_as_small_as_it_says(bits, d):
    cache = QuantisedCache(B, H, 128, d, bits=bits, group=32)
    assert cache.nbytes == quantised_cache_nbytes(B, H, 128, d, bits, 32)
    if d == 64:
        long = quantised_cache_nbytes(1, 8, 4096, 128, bits, 32)
        assert long / LayerCache(1, 8, 4096, 128).nbytes < {8: 0.30, 4: 0.17}[bits]  # float32; codes alone 1/4, 1/8


@pytest.mark.equation("kv-cache-quantised")
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_the_error_of_a_quantised_cache_is_at_most_half_a_step(bits, largest):
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(B, H, 36, D)).astype(np.float32), rng.normal(size=(B, H, 36, D)).astype(np.float32)
    k[..., 1] *= 30  # a channel that is large for every token
    cache = QuantisedCache(B, H, 40, D, bits=bits, group=8)
    cache.append(k, v)
    keys, values = cache.read()
    groups = k[:, :, :32].reshape(B, H, 4, 8, D)
    key_step = (np.abs(groups).max(3, keepdims=True) / largest).repeat(8, 3).reshape(B, H, 32, D)
    value_step = np.abs(v[:, :, :32]).max(-1, keepdims=True) / largest
    assert (np.abs(keys - k)[:, :, :32] <= key_step * 0.5001).all()
    assert (np.abs(values - v)[:, :, :32] <= value_step * 0.5001).all()
    np.testing.assert_array_equal(keys[:, :, 32:], k[:, :, 32:])  # the newest wait in full precision
    np.testing.assert_array_equal(values[:, :, 32:], v[:, :, 32:])
    # Per-token scales would lose the small channels of such keys to the large one.
    per_token = np.abs(k[:, :, :32]).max(-1, keepdims=True) / largest
    rounded = np.rint(k[:, :, :32] / per_token) * per_token
    small = [0, 2, 3]
    assert np.abs(rounded - k[:, :, :32])[..., small].mean() > 4 * np.abs(keys - k)[:, :, :32][..., small].mean()


@pytest.mark.equation("kv-cache-quantised")
def test_new_tokens_are_read_as_they_came():
    rng, cache = np.random.default_rng(0), QuantisedCache(B, H, 40, D, bits=4, group=4)
    k, v = new_pair(rng, "view of all layers", 10)
    keys, values = cache.append(k, v)
    np.testing.assert_array_equal(keys, k)
    again, _ = cache.append(k[:, :, :1], v[:, :, :1])
    assert np.abs(again[:, :, :8] - k[:, :, :8]).max() > 0.01  # from now on as stored
    np.testing.assert_array_equal(again[:, :, 8:10], k[:, :, 8:10])


@pytest.mark.equation("kv-cache-prefix")
def test_a_memory_is_stored_once_and_read_often():
    rng, cross = np.random.default_rng(0), CrossCache()
    assert cross.length == 0 and cross.nbytes == 0
    with pytest.raises(RuntimeError, match="nothing stored yet"):
        cross.read()
    k, v = Tensor(rng.normal(size=(B, H, 7, D))), Tensor(rng.normal(size=(B, H, 7, D)))
    cross.store(k, v)
    assert cross.filled and cross.length == 7 and cross.nbytes == k.data.nbytes + v.data.nbytes
    np.testing.assert_array_equal(cross.read()[0].data, k.data)
    with pytest.raises(RuntimeError, match="already filled"):
        cross.store(k, v)
    block = BlockCache(LayerCache(B, H, 9, D), cross)
    block.attention.append(*new_pair(rng, "view of all layers", 3))
    assert (block.length, block.batch, block.capacity) == (3, B, 9)
    assert block.nbytes == cross.nbytes + block.attention.nbytes
    mark = block.save()
    block.attention.append(*new_pair(rng, "view of all layers", 2))
    block.rewind(mark, 4)
    assert block.length == 4 and cross.length == 7
    block.select(np.array([1, 1, 0]))
    np.testing.assert_array_equal(cross.read()[1].data, v.data[[1, 1, 0]])


def test_a_model_goes_back_together():
    rng = np.random.default_rng(0)
    model = ModelCache([LayerCache(B, H, 20, D, D + 1), WindowCache(B, H, WINDOW, D, D + 1)])
    for layer in model.layers:
        layer.append(*new_pair(rng, "layer", 6))
    mark = model.save()
    for layer in model.layers:
        layer.append(*new_pair(rng, "layer", 4))
    assert model.capacity == 20 and model.length == 10
    model.rewind(mark, 8)  # the ring can only go back to its mark, so both do
    assert [layer.length for layer in model.layers] == [6, 6]
    np.testing.assert_array_equal(model.reserve(3), [6, 7, 8])
    model.select(np.array([0]))
    assert model.batch == 1 and all(layer.batch == 1 for layer in model.layers)
    assert ModelCache([WindowCache(B, H, 3, D)]).capacity is None


@pytest.mark.equation("kv-cache")
def test_layers_of_one_array_append_in_order_and_the_last_counts():
    rng, cache = np.random.default_rng(0), KVCache(2, B, H, 9, D)
    for n in (3, 2):
        for i in (0, 1):
            layer, before = cache.layer(i), cache.length
            keys, _ = layer.append(*new_pair(rng, "view of all layers", n))
            assert keys.shape[2] == before + n
            np.testing.assert_array_equal(layer.key_positions, np.arange(before + n))
    assert cache.length == 5 and cache.batch == B
    cache.rewind(0, 2)
    assert cache.length == 2
    with pytest.raises(IndexError, match=r"index must be in \[0, 2\)"):
        cache.layer(2)


@EVERY_KIND
def test_no_gradient_passes_through_a_cache(kind):
    k, v = (Tensor(a, requires_grad=True) for a in new_pair(np.random.default_rng(0), kind, 2))
    with pytest.raises(RuntimeError, match="no gradient"):
        KINDS[kind]().append(k, v)
    with no_grad():
        KINDS[kind]().append(k, v)


@EVERY_KIND
def test_arrays_that_do_not_fit_are_refused(kind):
    k, v = new_pair(np.random.default_rng(0), kind, 2)
    for bad in [(k[:1], v[:1]), (k[..., :1], v), (k, v[..., :1]), (k, v.repeat(2, v.ndim - 2)), (k[0], v[0])]:
        with pytest.raises(ValueError, match="must be of shape"):
            KINDS[kind]().append(*bad)


@pytest.mark.parametrize("kind", ["layer", "view of all layers", "latent", "int8"])
def test_more_than_there_is_room_for_is_refused_and_nothing_is_lost(kind):
    cache, rng = KINDS[kind](), np.random.default_rng(0)
    cache.append(*new_pair(rng, kind, CAPACITY - 1))
    with pytest.raises(ValueError, match="at most 40 tokens long, got 39 cached and 2 new ones"):
        cache.append(*new_pair(rng, kind, 2))
    cache.append(*new_pair(rng, kind, 1))
    assert cache.length == CAPACITY


@EVERY_KIND
def test_nobody_goes_back_behind_the_mark_or_forward(kind):
    cache = KINDS[kind]()
    whole = cache if kind != "view of all layers" else cache.cache
    cache.append(*new_pair(np.random.default_rng(0), kind, 3))
    mark = whole.save()
    for length in (2, 4):
        with pytest.raises(ValueError, match=r"length to go back to must be in 3\.\.3"):
            whole.rewind(mark, length)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LayerCache(0, 1, 1, 1), "LayerCache: batch must be a positive integer"),
        (lambda: LayerCache(1, 1, 0, 1), "capacity must be a positive integer"),
        (lambda: KVCache(1, 1, 1, 0, 1), "capacity must be a positive integer"),
        (lambda: LatentCache(1, 1, 0, 1), "d_c must be a positive integer"),
        (lambda: WindowCache(1, 1, 0, 1), "window must be a positive integer"),
        (lambda: StateCache(1, 1, 0, 1), "d_phi must be a positive integer"),
        (lambda: QuantisedCache(1, 1, 8, 4, bits=3), "bits must be one of 4, 8, got 3"),
        (lambda: QuantisedCache(1, 1, 8, 4, group=0), "group must be a positive integer"),
        (lambda: ModelCache([]), "layers must be at least one"),
        (lambda: ModelCache([LayerCache(1, 1, 3, 1)]).reserve(4), "at most 3 tokens long"),
    ],
)
def test_bad_sizes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
