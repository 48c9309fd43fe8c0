"""Slots on cache lines of their own, and work in threads that equals work in turn."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from minillm.autograd import Tensor, grad
from minillm.autograd.parallel import CACHE_LINE, PaddedSlots, library_threads, parallel_map
from minillm.functional.experts import expert
from minillm.fused.attention import scaled_dot_product_attention


@pytest.mark.equation("false-sharing-padding")
@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=3), st.sampled_from([np.float32, np.float64, np.int8]))
def test_no_two_slots_touch_one_cache_line(n, shape, dtype):
    slots = PaddedSlots(n, tuple(shape), dtype)
    lines = []
    for i in range(n):
        slot = slots[i]
        assert slot.shape == tuple(shape) and slot.dtype == dtype and not slot.any()
        start = slots._memory.ctypes.data + i * slots.stride
        assert start % CACHE_LINE == 0 and (slot.size == 0 or slot.ctypes.data == start)
        lines.append(set(range(start // CACHE_LINE, (start + max(slot.nbytes, 1) - 1) // CACHE_LINE + 1)))
        slot[...] = i + 1
    assert sum(map(len, lines)) == len(set().union(*lines))
    np.testing.assert_array_equal(slots.sum(), np.full(shape, n * (n + 1) // 2, dtype))


@pytest.mark.equation("false-sharing-padding")
def test_threads_that_count_in_their_slots_lose_nothing():
    slots = PaddedSlots(4, (3,), np.int64)

    def count(i):
        for _ in range(2000):
            slots[i][...] += 1

    threads = [threading.Thread(target=count, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(slots.sum(), 8000)


@pytest.mark.equation("parallel-heads", "thread-local-isolation")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_heads_in_threads_equal_heads_in_turn_bit_for_bit(threads):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(5, 1, 1, 70, 8)).astype(np.float32) for _ in range(4))

    def one_head(q, k, v, g):
        inputs = [Tensor(a, requires_grad=True) for a in (q, k, v)]
        out = scaled_dot_product_attention(*inputs, causal=True)
        return [out.data.copy(), *(x.data.copy() for x in grad([out], inputs, [g]))]

    in_turn = [one_head(*piece) for piece in zip(q, k, v, g, strict=True)]
    for ours, wanted in zip(parallel_map(one_head, q, k, v, g, threads=threads), in_turn, strict=True):
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.equation("parallel-heads")
def test_experts_in_threads_equal_experts_in_turn():
    rng = np.random.default_rng(1)
    x, w_in, w_down = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 12, 5)), rng.normal(size=(3, 5, 6))

    def run(x, w_in, w_down):
        return expert(Tensor(x), Tensor(w_in), Tensor(w_down), activation="swiglu").data

    for a, b in zip(parallel_map(run, x, w_in, w_down, threads=2), map(run, x, w_in, w_down), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_makes_no_sense_is_refused_and_errors_come_through():
    with pytest.raises(ValueError, match="PaddedSlots: n_slots must be a positive integer, got 0"):
        PaddedSlots(0, (3,))
    with pytest.raises(IndexError, match=r"PaddedSlots: the slot must be in \[0, 2\), got 2"):
        PaddedSlots(2, (3,))[2]
    with pytest.raises(ValueError, match=r"the arguments must be sequences of one length, got lengths \[1, 2\]"):
        parallel_map(max, [1, 2], [1], threads=2)
    with pytest.raises(ValueError, match="parallel_map: threads must be a positive integer, got 0"):
        parallel_map(abs, [1], threads=0)
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda x: 1 / x, [1, 0], threads=2)


@pytest.mark.equation("parallel-heads")
def test_a_piece_that_maps_in_its_turn_does_so_in_its_own_thread():
    """The threads are few; pieces that waited for pieces of their own would wait for ever."""

    def inner(_):
        return threading.get_ident()

    def outer(_):
        return threading.get_ident(), library_threads(), set(parallel_map(inner, range(5), threads=2))

    for thread, library, inside in parallel_map(outer, range(4), threads=2):
        assert inside == {thread} and library == 1


@pytest.mark.equation("parallel-heads")
def test_the_matrix_library_has_its_threads_again_afterwards():
    with threadpool_limits(2, "blas"):
        before = library_threads()
        assert parallel_map(lambda _: library_threads(), range(3), threads=2) == [1, 1, 1]
        assert library_threads() == before
    with threadpool_limits(1, "blas"):
        assert library_threads() == 1
