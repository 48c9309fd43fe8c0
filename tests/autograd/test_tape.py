"""The tape: order, accumulation, depth, freeing, recording, and what it says when asked for the impossible."""

import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, cat, grad, is_recording, no_grad, ones, registry, where
from minillm.autograd.operation import Derived
from minillm.autograd.tape import count_consumers
from tests import strategies
from tests.oracles import hips

pytestmark = pytest.mark.equation("autograd-engine")


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values if len(values) != 1 else values[0]), requires_grad=True)


# ---------------------------------------------------------------------------- order


def test_x_plus_x():
    x = leaf(3.0)
    (x + x).backward()
    assert x.grad.item() == 2.0


def test_the_diamond():
    """b = a + a, c = b + b: a node may only run when all of its consumers have."""
    a = leaf(1.0)
    b = a + a
    c = b + b
    d = c * b
    d.backward()
    assert a.grad.item() == 16.0  # d = 8 a^2


def test_a_node_waits_for_its_slowest_consumer():
    """One way from the loss to b is short, the other long; a depth-first walk would run b too early."""
    a = leaf(2.0)
    b = a * a
    long_way = b
    for _ in range(10):
        long_way = long_way * 1.0
    (b + long_way).backward()
    assert a.grad.item() == 8.0


def test_shared_subexpressions_are_walked_once():
    """Doubling thirty times has a billion paths and thirty nodes."""
    x = leaf(1.0)
    y = x
    for _ in range(30):
        y = y + y
    y.backward()
    assert x.grad.item() == 2.0**30
    assert len(count_consumers([(x + x).node])) == 1


@settings(max_examples=40)
@given(data=st.data())
def test_random_graphs_have_the_gradients_that_another_engine_finds(data):
    """Programs of random sums, products and tangents over earlier results, run by both engines."""
    steps = data.draw(
        st.lists(st.tuples(st.sampled_from("+*t-"), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12)
    )
    x = data.draw(strategies.ordinary((2,), -1.0, 1.0))
    y = data.draw(strategies.ordinary((2,), -1.0, 1.0))

    def program(tanh):
        kinds = {"+": lambda a, b: a + b, "*": lambda a, b: a * b, "-": lambda a, b: a - b, "t": lambda a, b: tanh(a)}

        def run(x, y):
            known = [x, y]
            for kind, i, j in steps:
                known.append(kinds[kind](known[i % len(known)], known[j % len(known)]))
            return known[-1] + known[len(known) // 2]

        return run

    a, b = Tensor(x, requires_grad=True), Tensor(y, requires_grad=True)
    out = program(lambda t: t.tanh())(a, b)
    found = grad(out, [a, b], np.ones(2), allow_unused=True)
    theirs = hips.evaluate(program(hips.TWINS["tanh"]), (x, y), {}, np.ones(2))
    for ours, wanted in zip(found, theirs.gradients, strict=True):
        np.testing.assert_allclose(0.0 if ours is None else ours.data, wanted, rtol=1e-12, atol=1e-12)


def test_a_hundred_thousand_nodes_deep():
    """Build, backward, and forget with and without backward: nothing recurses."""
    for run_backward in (True, False):
        x = leaf(1.0, 2.0)
        y = x
        for _ in range(100_000):
            y = y * 1.0
        watch = weakref.ref(y.node)
        if run_backward:
            y.sum().backward()
            assert x.grad.tolist() == [1.0, 1.0]
        del y
        assert watch() is None


def test_a_hundred_thousand_inputs_wide():
    x = leaf(1.0)
    cat([x.reshape(1)] * 1000).sum().backward()
    assert x.grad.item() == 1000.0


# ---------------------------------------------------------------------------- accumulation and leaves


def test_gradients_accumulate_over_backwards():
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    first = x.grad
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [5.0, 7.0]
    assert first.tolist() == [2.0, 4.0], "a gradient that somebody kept is not changed in place"


def test_only_leaves_get_a_gradient():
    x = leaf(1.0, 2.0)
    y = x * 2.0
    y.sum().backward()
    assert y.grad is None and x.grad.tolist() == [2.0, 2.0]
    assert x.is_leaf and not y.is_leaf


def test_backward_of_a_leaf_is_its_cotangent():
    x = leaf(5.0)
    x.backward()
    assert x.grad.item() == 1.0
    y = leaf(1.0, 2.0)
    seed = np.array([3.0, 4.0])
    y.backward(seed)
    seed[:] = 0
    assert y.grad.tolist() == [3.0, 4.0], "the gradient owns its memory"


def test_gradients_of_two_leaves_do_not_share_memory():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    (x + y).sum().backward()
    x.grad.data[:] = 99
    assert y.grad.tolist() == [1.0, 1.0]


def test_a_gradient_can_be_written_to():
    """The gradient of a sum is a stretched view; what lands in .grad is not."""
    x = leaf(1.0, 2.0)
    x.sum().backward()
    x.grad.data *= 2.0
    assert x.grad.tolist() == [2.0, 2.0]


def test_constants_get_no_gradient():
    x, c = leaf(1.0, 2.0), Tensor(np.array([3.0, 4.0]))
    (x * c).sum().backward()
    assert c.grad is None and not c.requires_grad


@pytest.mark.parametrize("seed", [np.array([1.0, 2.0]), [1.0, 2.0], Tensor([1.0, 2.0]), np.array([2.0, 1.0])[::-1]])
def test_the_cotangent_may_be_an_array_a_list_or_a_tensor(seed):
    x = leaf(1.0, 1.0)
    (x * 3.0).backward(seed)
    assert x.grad.tolist() == [3.0, 6.0] and x.grad.dtype == np.float64


def test_empty_and_0d():
    x = Tensor(np.zeros((0, 3)), requires_grad=True)
    (x * 2.0).sum().backward()
    assert x.grad.shape == (0, 3)
    (x * 2.0).backward(np.zeros((0, 3)))
    y = leaf(2.0)
    (y * y).backward()
    assert y.grad.shape == () and y.grad.item() == 4.0
    z = Tensor(np.ones((1, 1)), requires_grad=True)
    (z * 2.0).backward()  # one element counts as a scalar, as in torch
    assert z.grad.tolist() == [[2.0]]


# ---------------------------------------------------------------------------- freeing


def test_a_second_backward_says_that_the_graph_is_gone():
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"'sum' was freed by an earlier backward. Pass retain_graph=True"):
        y.backward()
    assert x.grad.tolist() == [2.0, 4.0], "the failed call added nothing"


def test_a_graph_that_shares_a_freed_part_says_so():
    x = leaf(1.0)
    shared = x * x
    (shared * 2.0).backward()
    with pytest.raises(RuntimeError, match="'multiply' was freed"):
        (shared * 3.0).backward()


def test_retain_graph():
    x = leaf(3.0)
    y = x * x
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 12.0
    with pytest.raises(RuntimeError, match="freed"):
        y.backward()


def test_create_graph_retains_too():
    x = leaf(3.0)
    y = x * x * x
    first = grad(y, x, create_graph=True)
    assert grad(first, x, retain_graph=True).item() == 18.0
    assert grad(y, x).item() == 27.0


def test_the_graph_goes_without_the_garbage_collector():
    """No reference cycles: a graph disappears with its last tensor, used or not."""
    gc.collect()
    gc.disable()
    try:
        for use in (
            lambda y, x: None,
            lambda y, x: y.backward(),
            lambda y, x: grad(y, x, create_graph=True),
        ):
            x = leaf(1.0, 2.0)
            hidden = (x * x).exp()
            y = hidden.sum()
            watched = [weakref.ref(t) for t in (y.node, hidden.node, hidden)]
            use(y, x)
            del y, hidden
            assert [w() for w in watched] == [None] * 3
    finally:
        gc.enable()


def test_backward_frees_what_the_nodes_saved_while_the_loss_is_still_held():
    x = leaf(1.0, 2.0)
    hidden = x.exp()
    watch = weakref.ref(hidden)
    loss = (hidden * 2.0).sum()
    del hidden
    assert watch() is not None
    loss.backward()
    assert watch() is None and loss.item() > 0


def test_memory_does_not_grow_with_steps():
    """Once NumPy's and Python's own small caches are full, a step leaves nothing behind."""
    w = Tensor(np.ones((64, 64)), requires_grad=True)
    x = np.ones((32, 64))

    def steps(n):
        for _ in range(n):
            w.grad = None
            ((x @ w).tanh() ** 2).mean().backward()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        grown = -steps(300) + steps(200)
    finally:
        tracemalloc.stop()
    assert grown < 4096, f"{grown} bytes more after 200 steps"


# ---------------------------------------------------------------------------- recording


def test_no_grad_builds_no_graph():
    x = leaf(1.0)
    with no_grad():
        assert not is_recording()
        y = x * 2.0
        with no_grad():
            pass
        assert not is_recording()
    assert is_recording() and y.node is None and not y.requires_grad


def test_no_grad_ends_with_an_exception_and_works_as_a_decorator():
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert is_recording()

    @no_grad()
    def evaluate(x):
        return x * 2.0

    assert not evaluate(leaf(1.0)).requires_grad and is_recording()


def test_backward_works_inside_no_grad():
    x = leaf(2.0)
    y = x * x
    with no_grad():
        y.backward()
    assert x.grad.item() == 4.0 and x.grad.node is None


@pytest.mark.equation("thread-local-isolation")
def test_no_grad_of_one_thread_does_not_concern_another():
    inside, checked = threading.Event(), threading.Event()
    seen = []

    def quiet():
        with no_grad():
            inside.set()
            checked.wait(10)

    thread = threading.Thread(target=quiet)
    thread.start()
    inside.wait(10)
    seen.append((leaf(1.0) * 2.0).requires_grad)
    with no_grad():
        fresh = threading.Thread(target=lambda: seen.append((leaf(1.0) * 2.0).requires_grad))
        fresh.start()
        fresh.join()
    checked.set()
    thread.join()
    assert seen == [True, True]


@pytest.mark.equation("stop-gradient")
def test_detach_keeps_the_value_and_stops_the_gradient():
    x = leaf(3.0)
    y = x * x
    (y.detach() * x).backward()
    assert x.grad.item() == 9.0
    assert y.detach().item() == y.item() and not y.detach().requires_grad
    assert np.shares_memory(y.detach().data, y.data)


# ---------------------------------------------------------------------------- grad()


def test_grad_of_results_and_of_several_outputs():
    x, z = leaf(1.0, 2.0), leaf(5.0, 6.0)
    y = x * x
    out = y * z
    gy, gx, gz = grad(out.sum(), [y, x, z], retain_graph=True)
    assert gy.tolist() == [5.0, 6.0] and gx.tolist() == [10.0, 24.0] and gz.tolist() == [1.0, 4.0]
    both = grad([out, y], x, [np.ones(2), np.ones(2)])
    assert both.tolist() == [12.0, 28.0]
    assert x.grad is None and z.grad is None


def test_grad_of_an_output_by_itself_and_of_an_output_that_feeds_another():
    x = leaf(3.0)
    y = x * x
    assert grad(y, y, retain_graph=True).item() == 1.0
    z = y * 2.0
    assert grad([z, y], [y, x])[0].item() == 3.0


def test_unused_inputs():
    x, other = leaf(1.0), leaf(2.0)
    y = x * 2.0
    with pytest.raises(RuntimeError, match=r"does not take part in the output.*allow_unused=True"):
        grad(y, [x, other], retain_graph=True)
    found = grad(y, [x, other], allow_unused=True)
    assert found[0].item() == 2.0 and found[1] is None


def test_an_unused_branch_of_where_gets_zeros():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    where(np.array([True, True]), x, y).sum().backward()
    assert y.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: (x * 2.0).backward(), RuntimeError, "a gradient is needed for an output of shape (2,)"),
        (lambda x: (x * 2.0).backward(), RuntimeError, "Pass gradient=<array of that shape>, or reduce"),
        (lambda x: (x * 2.0).backward(np.ones(3)), ValueError, "must be of shape (2,), got shape (3,)"),
        (lambda x: grad(x * 2.0, x), RuntimeError, "grad: a gradient is needed"),
        (lambda x: grad([x * 2.0, x], x, [np.ones(2)]), ValueError, "grad_outputs must be one for each of 2 outputs"),
        (lambda x: x.detach().sum().backward(), RuntimeError, "does not depend on any tensor with requires_grad=True"),
        (lambda x: grad(ones(1), x), RuntimeError, "does not depend on any tensor"),
    ],
)
def test_what_cannot_be_differentiated_is_refused_with_what_to_do(call, error, text):
    with pytest.raises(error) as caught:
        call(leaf(1.0, 2.0))
    assert text in str(caught.value)


# ---------------------------------------------------------------------------- derived forms on the tape


def two_products_written(x, y):
    return x * y, x * x


def two_products_arrays(x, y):
    def vjp(da, db):
        dx = (0 if da is None else da * y) + (0 if db is None else 2 * db * x)
        return dx, None if da is None else da * x

    return (x * y, x * x), vjp


two_products = Derived("two_products", two_products_arrays)


@pytest.fixture
def registered(monkeypatch):
    """Give the form of this test its as-written twin, for this test only."""
    row = registry.Row("two_products", written=two_products_written, derived=two_products)
    monkeypatch.setitem(registry._rows, "two_products", row)


def test_a_derived_form_with_two_results_gets_both_cotangents_at_once():
    x, y = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    a, b = two_products(x, y)
    assert a.node is b.node and (a.index, b.index) == (0, 1)
    (a + b * 10.0).sum().backward()
    assert x.grad.tolist() == [24.0, 45.0, 66.0] and y.grad.tolist() == [1.0, 2.0, 3.0]


def test_a_derived_form_of_which_one_result_is_used():
    x, y = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    _, b = two_products(x, y)
    gx, gy = grad(b.sum(), [x, y], allow_unused=True)
    assert gx.tolist() == [2.0, 4.0, 6.0] and gy is None


@pytest.mark.parametrize("form", [two_products_written, two_products])
def test_an_input_given_twice_gets_both_shares_also_in_second_derivatives(form, registered):
    x = leaf(1.0, 2.0, 3.0)
    a, b = form(x, x)
    g = grad((a * b).sum(), x, create_graph=True)  # x^4
    np.testing.assert_allclose(g.data, 4 * x.data**3)
    np.testing.assert_allclose(grad(g.sum(), x).data, 12 * x.data**2)


@pytest.mark.parametrize("form", [two_products_written, two_products])
def test_an_input_made_from_another_input_is_not_counted_twice(form, registered):
    """A residual block: the second argument was computed from the first."""
    x = leaf(1.0, 2.0, 3.0)
    y = x * x
    a, b = form(x, y)
    for create_graph in (False, True):
        g = grad((a + b).sum(), x, create_graph=create_graph, retain_graph=True)  # x^3 + x^2
        np.testing.assert_allclose(g.data, 3 * x.data**2 + 2 * x.data)
    np.testing.assert_allclose(grad(g.sum(), x).data, 6 * x.data + 2)
