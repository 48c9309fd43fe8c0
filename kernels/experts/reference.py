"""The truth for this family: the equations of `minillm.functional`, in the layout of the kernels.

A choice is a list of k expert numbers a token, `experts` (N, k), where `minillm` has booleans (N, E); gates come in
the same order. A reader's own kernel has these signatures on torch tensors (`--impl`).
"""

import numpy as np

from minillm.autograd import Tensor, cat
from minillm.autograd import primitives as ops
from minillm.functional import balance, capacity, dispatch, routing
from minillm.functional import experts as written


def chosen(routed: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """The choice as booleans, of the shape of ``routed``; numbers that are no expert's choose nothing."""
    N, E = routed.shape
    table = np.zeros((N, E + 1), bool)
    np.put_along_axis(table, _known(experts, E), True, axis=-1)
    return table[:, :E]


def _known(experts: np.ndarray, E: int) -> np.ndarray:
    """Expert numbers as indices, E for those that are no expert's."""
    return np.where((experts >= 0) & (experts < E), experts, E).astype(np.int64)


def route(
    logits: Tensor, bias: np.ndarray | None, k: int, scoring: str, renormalise: bool
) -> tuple[Tensor, np.ndarray, np.ndarray, Tensor, Tensor]:
    """logits (N, E), bias (E,) -> gates (N, k), experts (N, k), loads (E,), auxiliary loss, z-loss.

    The k experts of the largest scores (logits, or with a bias scores plus bias), best first, of equal ones the lower
    number first; gates are softmax or sigmoid scores without the bias, renormalised over the chosen if asked.
    """
    p = scores = routing.gating_softmax(logits)
    if scoring == "sigmoid":
        scores = routing.gating_sigmoid(logits)
        p = scores / scores.sum(-1, keepdims=True)
    order = logits.numpy() if bias is None else scores.numpy() + bias
    experts = np.argsort(-order, axis=-1, kind="stable")[:, :k]
    routed = chosen(order, experts)
    weights = routing.topk_renormalise(scores, routed) if renormalise else scores
    gates = weights.gather(-1, experts)
    some = len(experts) > 0
    aux = balance.aux_loss(p, routed) if some else p.sum()
    z = balance.z_loss(logits) if some else logits.sum()
    return gates, experts.astype(np.int32), routed.sum(0).astype(np.int32), aux, z


def pack(experts: np.ndarray, n_experts: int, capacity: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """experts (N, k) -> order (N k,), places (N, k), offsets (E + 1,): the assignments sorted by expert, stably.

    Assignment n k + s is the s-th choice of token n; `order` lists the assignments, -1 behind the last one served,
    `places` says where each lies, -1 for one that is dropped, and expert e's are offsets[e] to offsets[e + 1].
    """
    N, k = experts.shape
    routed = chosen(np.zeros((N, n_experts), bool), experts)
    packing = dispatch.pack(routed if capacity is None else _within(routed, capacity))
    eta = np.pad(packing.eta, ((0, 0), (0, 1)), constant_values=-1)  # a column for those that are no expert's
    known = _known(experts, n_experts)
    place = eta[np.arange(N)[:, None], known]  # in the expert's own list
    places = np.where(place < 0, -1, packing.offsets[known] + place)
    order = np.full(N * k, -1)
    served = places.reshape(-1) >= 0
    order[places.reshape(-1)[served].astype(np.int64)] = np.flatnonzero(served)
    return order.astype(np.int32), places.astype(np.int32), packing.offsets.astype(np.int32)


def grouped_linear(x: Tensor, w: Tensor, offsets: np.ndarray) -> Tensor:
    """x (A, m), w (E, n, m), offsets (E + 1,) -> (A, n): the rows of every expert times its matrix, transposed.

    Rows outside of every group give zeros.
    """
    bounds = [int(o) for o in offsets]
    pieces = [x[a:b] @ w[e].T for e, (a, b) in enumerate(zip(bounds, bounds[1:])) if b > a]
    rest = x[bounds[-1] :]  # no expert's
    nothing = (rest.sum(-1, keepdims=True) * 0.0) + w[0, :, 0] * 0.0  # (rows, n)
    return cat([*pieces, nothing], 0)


def mixture_of_experts(
    x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor, experts: np.ndarray, capacity: int | None
) -> Tensor:
    """x (N, d), gates (N, k), w_in (E, 2 d_ff, d), w_down (E, d, d_ff), experts (N, k) -> (N, d)."""
    N, E = len(experts), len(w_in)
    routed = chosen(np.zeros((N, E), bool), experts)
    at = (np.arange(N)[:, None] * (E + 1) + _known(experts, E)).reshape(-1)
    table = ops.scatter_add(gates.reshape(-1), shape=(N * (E + 1),), index=at).reshape(N, E + 1)[:, :E]
    served = routed if capacity is None else _within(routed, capacity)
    return written.mixture_of_experts(x, table, served, w_in, w_down, activation="swiglu")


def _within(routed: np.ndarray, limit: int) -> np.ndarray:
    return capacity.drop_overflow(routed, limit)
