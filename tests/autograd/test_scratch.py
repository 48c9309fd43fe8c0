"""The scratch arena: reuse without harm, within a thread and between threads."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad, no_grad, scratch
from minillm.autograd.scratch import SMALLEST, Arena
from minillm.functional.positions import rotation_angles
from minillm.fused.activations import swiglu
from minillm.fused.attention import rotary_attention
from minillm.fused.linear import linear
from minillm.fused.losses import cross_entropy
from minillm.fused.norms import add_rms_norm, rms_norm
from minillm.fused.softmax import log_softmax

pytestmark = pytest.mark.equation("scratch-buffer")

F32 = np.dtype(np.float32)
BIG = (SMALLEST // 4,)  # float32 elements of the smallest array that the arena manages


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


# ---------------------------------------------------------------------------- one thread


def test_a_dropped_buffer_is_handed_out_again_and_a_held_one_is_not():
    arena = Arena()
    first = arena.empty(BIG, F32)
    place = address(first)
    second = arena.empty(BIG, F32)
    assert address(second) != place
    del first
    third = arena.empty((2, BIG[0] // 2), F32)  # the same number of bytes in another shape
    assert address(third) == place and third.shape == (2, BIG[0] // 2)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[1:],
        lambda a: a[::-2],
        lambda a: a.reshape(2, -1).T,
        lambda a: a.view(np.int32),
        lambda a: np.broadcast_to(a, (3, *a.shape)),
        lambda a: memoryview(a),
        lambda a: Tensor(a),
        lambda a: [a],
        lambda a: (Tensor(a, requires_grad=True) * 2.0).node,
    ],
)
def test_whatever_refers_to_a_buffer_keeps_it(view):
    arena = Arena()
    array = arena.empty(BIG, F32)
    place = address(array)
    held = view(array)
    del array
    assert address(arena.empty(BIG, F32)) != place
    del held
    gc.collect()
    assert place in [address(arena.empty(BIG, F32)), address(arena.empty(BIG, F32))]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "view"]), st.integers(0, 3)), max_size=40))
def test_what_is_held_is_never_overwritten(actions):
    """Any order of taking, dropping and viewing: everything held keeps the number that was written to it."""
    arena, held = Arena(), []
    for number, (action, which) in enumerate(actions):
        if action == "take":
            array = arena.empty((BIG[0] * (1 + which % 2),), F32)
            array[:] = number
            held.append((number, array))
            del array
        elif held and action == "drop":
            held.pop(which % len(held))
        elif held:
            number, array = held[which % len(held)]
            held[which % len(held)] = (number, array[which:])
            del array
    assert all(np.all(array == number) for number, array in held)


def test_small_arrays_are_left_to_the_ordinary_allocator():
    arena = Arena()
    arena.empty((10,), F32)
    arena.empty((0, 1000), F32)
    assert arena.nbytes == 0
    assert arena.empty((), F32).shape == ()


def test_dtype_shape_and_order():
    like = np.zeros((64, 128), np.float64).T
    array = scratch.empty_like(like)
    assert array.shape == like.shape and array.dtype == like.dtype and array.flags.c_contiguous
    assert scratch.empty(BIG, np.dtype(np.int64)).dtype == np.int64


def test_clear_forgets_and_what_is_in_use_lives_on():
    arena = Arena()
    array = arena.empty(BIG, F32)
    array[:] = 5
    arena.clear()
    other = arena.empty(BIG, F32)
    other[:] = 7
    assert np.all(array == 5)


def test_lengths_that_change_do_not_pile_up():
    """Buffers of lengths that are no longer asked for are given back: at most twice the largest need is held."""
    arena = Arena()
    for n in range(1, 400):
        live = [arena.empty((n, BIG[0]), F32) for _ in range(3)]
        del live
        assert arena.nbytes <= 2 * 3 * n * BIG[0] * 4
    everything = 3 * sum(range(400)) * BIG[0] * 4
    assert arena.nbytes < everything / 50


# ---------------------------------------------------------------------------- a training step


class Step:
    """A decoder block in float32, large enough that the fused forms use the arena."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        V, d, self.H, L = 96, 32, 2, 48
        self.ids = rng.integers(V, size=(4, L))
        self.x = rng.normal(size=(4, L, d)).astype(np.float32)
        self.angles = rotation_angles(np.arange(L), d // self.H)
        shapes = [(d,), (3 * d, d), (d, d), (d,), (4 * d, d), (d, 2 * d), (V, d)]
        self.weights = [Tensor((rng.normal(size=s) * 0.3).astype(np.float32), requires_grad=True) for s in shapes]

    def run(self) -> list[bytes]:
        """One forward and backward pass; loss and gradients as bytes."""
        g1, w_qkv, w_o, g2, w_in, w_out, head = self.weights
        x = Tensor(self.x)
        attended = rotary_attention(linear(rms_norm(x, g1), w_qkv), angles=self.angles, H=self.H, H_kv=self.H)
        x, y = add_rms_norm(x, linear(attended, w_o), g2)
        x = x + linear(swiglu(linear(y, w_in)), w_out)
        loss = cross_entropy(linear(x, head), self.ids)
        return [loss.data.tobytes()] + [g.data.tobytes() for g in grad(loss, self.weights)]


def test_nothing_is_allocated_after_the_first_steps_and_results_do_not_change():
    step = Step(0)
    first = step.run()
    step.run()
    held = scratch.arena().nbytes
    blocks = {id(b) for blocks in scratch.arena().blocks.values() for b in blocks}
    assert held > 0, "the step must be large enough to use the arena"
    for _ in range(3):
        assert step.run() == first
    assert scratch.arena().nbytes == held
    assert {id(b) for blocks in scratch.arena().blocks.values() for b in blocks} == blocks


def test_results_are_the_same_without_an_arena(monkeypatch):
    with_arena = Step(1).run()
    monkeypatch.setattr(scratch, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    monkeypatch.setattr(scratch, "empty_like", lambda a: np.full(a.shape, np.nan, a.dtype))
    assert Step(1).run() == with_arena


def test_a_kept_result_survives_later_steps():
    with no_grad():
        x = Tensor(np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32))
        kept = log_softmax(x)
        before = kept.data.copy()
        for _ in range(5):
            log_softmax(x * 2.0)
    np.testing.assert_array_equal(kept.data, before)


# ---------------------------------------------------------------------------- several threads


@pytest.mark.equation("thread-local-isolation")
def test_threads_give_to_the_bit_what_a_serial_run_gives():
    steps = [Step(seed) for seed in range(4)]
    serial = [[step.run() for _ in range(3)] for step in steps]
    start = threading.Barrier(4)

    def concurrently(step: Step):
        start.wait(30)
        return [step.run() for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(concurrently, steps)) == serial


@pytest.mark.equation("thread-local-isolation")
def test_every_thread_has_an_arena_of_its_own():
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(scratch.arena).result()
    assert other is not scratch.arena() and scratch.arena() is scratch.arena()


@pytest.mark.equation("thread-local-isolation")
def test_a_result_handed_to_another_thread_is_not_reused_by_its_maker():
    with ThreadPoolExecutor(1) as pool:

        def make():
            array = scratch.empty(BIG, F32)
            array[:] = 1
            return array

        received = pool.submit(make).result()
        for _ in range(5):
            pool.submit(lambda: scratch.empty(BIG, F32).fill(9)).result()
        assert np.all(received == 1)
    assert np.all(received == 1), "and it outlives the thread"
