r"""The tape: how a computation is remembered, and how gradients flow back through it.

Equation: `autograd-engine` $\bar u=\sum_{v\in\mathrm{succ}(u)}\bar v\,\partial v/\partial u$, nodes taken in reverse topological order.
Source: bridging §1.6 (backpropagation); topics #8.

A tensor that came out of an operation points at a `Node`: which operation it was and what went in.
Backward walks the nodes from the loss to the leaves. Two facts decide the order:

* A node may run only when *every* consumer of its outputs has run, because its incoming gradient
  (the cotangent, written $\bar v$) is a sum over consumers. That is why a topological order is needed:
  in the diamond $b=a+a,\ c=b+b$ an eager depth-first walk would visit $a$ with half of its gradient.
* The walk is a loop over counters, not a recursion, so a graph may be 100,000 nodes deep.

There are two kinds of operation. A `Primitive` knows one VJP per argument, each written with tensor
operations; run under recording they build a graph of their own, which is how second derivatives come.
A derived (fused) form returns, beside its value, a closure that maps cotangent arrays to gradient arrays.
It is fast and opaque: when a graph of the gradient is wanted, the form is replaced by its as-written
twin, which is made of primitives.
"""

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from minillm.checks import message, require


class _Recording(threading.local):
    """Whether this thread records operations; every thread starts with recording on."""

    on = True


_recording = _Recording()


def is_recording() -> bool:
    """Say whether operations on tensors that require gradients are put on the tape (in this thread)."""
    return _recording.on


@contextmanager
def recording(on: bool) -> Iterator[None]:
    """Switch recording on or off for a block of code in this thread, and back afterwards."""
    before, _recording.on = _recording.on, on
    try:
        yield
    finally:
        _recording.on = before


def no_grad():
    """Switch recording off for a block: ``with no_grad(): ...`` builds no graph and saves nothing."""
    return recording(False)


class Variable:
    """What the tape knows of a tensor: an array, its gradient, and the node it came out of.

    `Tensor` adds everything that users see. It is the only subclass, and results of operations are made
    as instances of it through `wrap`; so the operations need not import it, and the arrows of the package
    point one way: tape, operation, primitives, tensor.
    """

    __slots__ = ("data", "grad", "requires_grad", "node", "index", "__weakref__")
    concrete: ClassVar[type] = None  # type: ignore[assignment]

    data: np.ndarray
    grad: Any
    requires_grad: bool
    node: "Node | None"
    index: int

    def __init_subclass__(cls) -> None:
        if Variable.concrete is None:  # a subclass of Tensor does not become what operations return
            Variable.concrete = cls

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype of the elements."""
        return self.data.dtype


def wrap(data: Any) -> Any:
    """Make a tensor around an array that an operation has just produced, without copying or converting."""
    tensor = object.__new__(Variable.concrete)
    tensor.data = data if type(data) is np.ndarray else np.asarray(data)
    tensor.grad, tensor.requires_grad, tensor.node, tensor.index = None, False, None, 0
    return tensor


class Node:
    """One recorded operation: its inputs, the arrays it produced and the way back.

    ``inputs`` holds the tensors that went in (constants as they came). ``output`` holds the produced array
    where the way back needs it, never the output tensor, so that no reference cycle exists and a graph
    disappears as soon as its last tensor does.
    """

    __slots__ = ("operation", "inputs", "params", "output", "vjp", "n_outputs", "freed", "__weakref__")

    def __init__(
        self,
        operation: Any,
        inputs: tuple,
        params: dict,
        output: Any = None,
        vjp: Callable | None = None,
        n_outputs: int = 1,
    ):
        self.operation = operation
        self.inputs = inputs
        self.params = params
        self.output = output
        self.vjp = vjp
        self.n_outputs = n_outputs
        self.freed = False

    def free(self) -> None:
        """Drop what was saved for backward; the node keeps only its name."""
        self.inputs, self.output, self.params, self.vjp, self.freed = (), None, {}, None, True


def count_consumers(roots: Sequence[Node], stops: Container[Node] = ()) -> dict[Node, int]:
    """Count the edges into every node reachable from the roots; look no further than the stops."""
    consumers = dict.fromkeys(roots, 0)
    stack = list(consumers)
    while stack:
        node = stack.pop()
        if node in stops:
            continue
        if node.freed:
            raise RuntimeError(
                f"backward: the graph behind '{node.operation.name}' was freed by an earlier backward. "
                "Pass retain_graph=True to the first call, or run the forward pass again."
            )
        for tensor in node.inputs:
            below = getattr(tensor, "node", None)
            if below is None:
                continue
            if below in consumers:
                consumers[below] += 1
            else:
                consumers[below] = 1
                stack.append(below)
    return consumers


def add_cotangents(total: Any, more: Any) -> Any:
    """Add two cotangents of one value; neither array is changed, since both may be shared."""
    return more if total is None else total + more


def propagate(
    roots: Sequence[Variable],
    seeds: Sequence[Any],
    *,
    retain_graph: bool,
    create_graph: bool,
    taps: Sequence[Variable] = (),
    stop_at_taps: bool = False,
) -> dict[int, Any]:
    r"""Run the tape backwards and return the gradients of the leaves, and of the results asked for.

    Equation: `autograd-engine` $\bar u=\sum_{v\in\mathrm{succ}(u)}\bar v\,\partial v/\partial u$
    Shapes: every cotangent has the shape of the value it belongs to.
    Raises: RuntimeError if a node was already freed.

    ``seeds`` are arrays, or tensors when ``create_graph`` is on, and the gradients are of the same kind:
    a dict from ``id(tensor)`` to gradient for every leaf reached and every tap (a non-leaf of interest). With
    ``stop_at_taps`` the walk ends at the taps and what lies below them is left alone.
    """
    gradients: dict[int, Any] = {}
    cotangents: dict[Node, list[Any]] = {}
    tapped: dict[Node, list[Any]] = {}
    for tensor in taps:
        if tensor.node is not None:
            tapped.setdefault(tensor.node, []).append(tensor)

    def deliver(tensor: Any, cotangent: Any) -> None:
        node = tensor.node
        if node is None:
            gradients[id(tensor)] = add_cotangents(gradients.get(id(tensor)), cotangent)
            return
        slots = cotangents.get(node)
        if slots is None:
            slots = cotangents[node] = [None] * node.n_outputs
        slots[tensor.index] = add_cotangents(slots[tensor.index], cotangent)

    for root, seed in zip(roots, seeds, strict=True):
        deliver(root, seed)
    stops = tapped if stop_at_taps else {}
    waiting = count_consumers([root.node for root in roots if root.node is not None], stops)
    ready = [node for node, consumers in waiting.items() if consumers == 0]
    with recording(create_graph):
        while ready:
            node = ready.pop()
            slots = cotangents.pop(node, None)
            for tensor in tapped.get(node, ()):
                if slots is not None and slots[tensor.index] is not None:
                    gradients[id(tensor)] = slots[tensor.index]
            if node in stops:
                continue
            pulled = (None,) * len(node.inputs) if slots is None else node.operation.pull(node, slots, create_graph)
            for tensor, cotangent in zip(node.inputs, pulled, strict=True):
                if cotangent is not None and tensor.requires_grad:
                    deliver(tensor, cotangent)
                below = getattr(tensor, "node", None)
                if below is not None:
                    waiting[below] -= 1
                    if waiting[below] == 0:
                        ready.append(below)
            if not retain_graph:
                node.free()
    return gradients


def _seed_for(output: Variable, given: Any, where: str, create_graph: bool) -> Any:
    """Turn the caller's ``grad_output`` into a seed, or complain with the shape that is wanted."""
    if not output.requires_grad:
        raise RuntimeError(
            f"{where}: the tensor of shape {output.shape} does not depend on any tensor with requires_grad=True."
        )
    if given is None:
        if output.data.size != 1:
            raise RuntimeError(
                f"{where}: a gradient is needed for an output of shape {output.shape}, since only a scalar has an "
                "implied gradient of 1. Pass gradient=<array of that shape>, or reduce the output with .sum() first."
            )
        array = np.ones(output.shape, output.dtype)
    else:
        array = np.asarray(given.data if isinstance(given, Variable) else given, dtype=output.dtype)
        if array.shape != output.shape:
            raise ValueError(message(where, "the gradient passed in", f"of shape {output.shape}", array))
    if create_graph:
        return given if isinstance(given, Variable) else wrap(array)
    return array


def backward(output: Variable, gradient: Any = None, *, retain_graph: bool | None = None, create_graph: bool = False):
    """Add the gradient of ``output`` to ``.grad`` of every leaf it depends on.

    Equation: `autograd-engine` $\\bar u=\\sum_v\\bar v\\,\\partial v/\\partial u$
    Shapes: gradient has the shape of output (optional for a scalar); leaf.grad has the shape of the leaf.
    Raises: RuntimeError for a non-scalar output without gradient, or a graph that was freed.
    """
    retain = create_graph if retain_graph is None else retain_graph
    seed = _seed_for(output, gradient, "backward", create_graph)
    leaves = {id(leaf): leaf for leaf in leaves_of(output)}
    for key, cotangent in propagate([output], [seed], retain_graph=retain, create_graph=create_graph).items():
        leaf = leaves[key]
        if not create_graph:
            # The gradient must own its array: a cotangent may be a view of somebody else's.
            cotangent = wrap(cotangent if leaf.grad is not None else np.array(cotangent))
        with recording(create_graph):
            leaf.grad = cotangent if leaf.grad is None else leaf.grad + cotangent


def leaves_of(output: Variable) -> list[Variable]:
    """List the leaves (parameters and inputs) that need gradients and that ``output`` depends on."""
    if output.node is None:
        return [output]
    found = {}
    for node in count_consumers([output.node]):
        for tensor in node.inputs:
            if getattr(tensor, "requires_grad", False) and tensor.node is None:
                found[id(tensor)] = tensor
    return list(found.values())


def grad(
    outputs: Variable | Sequence[Variable],
    inputs: Variable | Sequence[Variable],
    grad_outputs: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
):
    """Return the gradients of outputs with respect to inputs, leaving every ``.grad`` untouched.

    Equation: `autograd-engine` $\\bar u=\\sum_v\\bar v\\,\\partial v/\\partial u$
    Shapes: one gradient per input, of its shape; a single input gives a single gradient.
    Raises: RuntimeError if an input is not part of the graph and allow_unused is off.

    Inputs may be leaves or results. With ``create_graph=True`` the gradients are tensors with a graph of
    their own and can be differentiated again.
    """
    single, several = isinstance(inputs, Variable), not isinstance(outputs, Variable)
    wanted: list[Variable] = [inputs] if isinstance(inputs, Variable) else list(inputs)
    roots: list[Variable] = [outputs] if isinstance(outputs, Variable) else list(outputs)
    given = [None] * len(roots) if grad_outputs is None else list(grad_outputs) if several else [grad_outputs]
    wanted_count = f"one for each of {len(roots)} outputs"
    require(len(given) == len(roots), "grad", "grad_outputs", wanted_count, f"{len(given)}")
    seeds = [_seed_for(root, one, "grad", create_graph) for root, one in zip(roots, given, strict=True)]
    retain = create_graph if retain_graph is None else retain_graph

    taps = [tensor for tensor in wanted if tensor.node is not None]
    found = propagate(roots, seeds, retain_graph=retain, create_graph=create_graph, taps=taps)
    results = []
    for tensor in wanted:
        if id(tensor) in found:
            value = found[id(tensor)]
            results.append(value if create_graph else wrap(value))
        elif allow_unused:
            results.append(None)
        else:
            raise RuntimeError(
                f"grad: an input of shape {tensor.shape} does not take part in the output "
                f"(requires_grad={tensor.requires_grad}). Pass allow_unused=True to get None for it."
            )
    return results[0] if single else results
