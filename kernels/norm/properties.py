r"""What must hold of the norms: agreement with the reference, and relations that need none.

Every check takes the subject and a problem and returns verdicts. Relations inherit their allowances from the
same rule as the comparison itself (`kernels.tolerance`), or ask for equal bits where the arithmetic is exact:
multiplying by a power of two, permuting rows, adding zeros.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.norm import launch, reference
from kernels.norm import problems as p
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect, rounded
from kernels.universal import changed, judged, within

FUNCTIONS = tuple(p.OPERANDS)
PLAIN, FUSED = FUNCTIONS[:2], FUNCTIONS[2:]


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about every output and gradient, in order of `problems.result_names`."""
    return expect(
        getattr(reference, problem.function),
        list(problem.inputs.values()), list(problem.cotangents.values()), problem.dtype,
        p.result_names(problem.function), p.scales(problem),
        cast=(lambda arrays: p.with_rounded_sum(arrays, problem.dtype)) if "r" in problem.inputs else None,
        **problem.parameters,
    )  # fmt: skip


def _no_shift(problem: Problem) -> Problem:
    return changed(problem, b=np.zeros_like(problem.inputs["b"])) if "b" in problem.inputs else problem


def _y(run: Run) -> torch.Tensor:
    return run.outputs[-1]


def _allowed_y(problem: Problem) -> np.ndarray:
    return expectations(problem)[len(p.outputs_of(problem.function)) - 1].allowed


# ---- against the reference, with other launches than ours


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    forward_tile, plan = problem.launch

    def function(*operands):
        named = dict(zip(p.OPERANDS[problem.function], operands))
        x, g = named["x"], named["g"]
        r, b = named.get("r"), named.get("b")
        centred, eps = p.is_centred(problem.function), problem.parameters["eps"]

        class Forced(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *_):
                y, s, ctx.mean, ctx.rho = launch.forward(x, r, g, b, eps, centred, forward_tile)
                ctx.rows = x if s is None else s
                return y if s is None else (s, y)

            @staticmethod
            def backward(ctx, *arriving):
                ds = arriving[0] if r is not None else None
                shift = None if b is None else b.dtype
                dx, dg, db = launch.backward(arriving[-1], ds, ctx.rows, g, ctx.mean, ctx.rho, shift, plan)
                found = {"x": dx, "r": dx, "g": dg, "b": db}
                return tuple(found[key] for key in named)

        return Forced.apply(*operands)

    forced = replace(subject, functions={problem.function: lambda *a: function(*a[:-1])})
    run = execute(forced, problem)
    return judged(run.outputs + run.gradients, expectations(problem))


# ---- relations


def _scaling(subject: Subject, problem: Problem) -> list[Verdict]:
    """f(c x) = f(x) for a power of two c, and f(-c x) = -f(x), bit by bit, with eps = 0."""
    problem = _no_shift(problem)
    plain = _y(execute(subject, problem, gradients=False))
    found = []
    for factor in (2.0, -4.0):
        scaled = _y(execute(subject, changed(problem, x=factor * problem.inputs["x"]), gradients=False))
        found.append((torch.nan_to_num(scaled * np.sign(factor)) + 0.0, torch.nan_to_num(plain) + 0.0))
    return [equal("y", found)]


def _shifting(subject: Subject, problem: Problem) -> list[Verdict]:
    """LayerNorm: f(x + c) = f(x), on multiples of 1/8, which stay exact when shifted."""
    back = changed(problem, x=np.round(8 * problem.inputs["x"]) / 8)
    moved = changed(problem, x=back.inputs["x"] + 3.0)
    a, b = (to_array(_y(execute(subject, q, gradients=False))) for q in (moved, back))
    return [within("y", np.abs(a - b), _allowed_y(moved) + _allowed_y(back))]


def _unit(subject: Subject, problem: Problem) -> list[Verdict]:
    """Without gain and eps the mean square of a row is 1; LayerNorm's mean is 0."""
    problem = _no_shift(changed(problem, g=np.ones_like(problem.inputs["g"])))
    y, allowed = to_array(_y(execute(subject, problem, gradients=False))), _allowed_y(problem)
    top = np.abs(y).max(-1, keepdims=True)
    verdicts = [within("mean square", np.abs((y**2).mean(-1, keepdims=True) - 1), 2 * top * allowed)]
    if p.is_centred(problem.function):
        verdicts.append(within("mean", np.abs(y.mean(-1, keepdims=True)), allowed))
    return verdicts


def _gain(subject: Subject, problem: Problem) -> list[Verdict]:
    """y is linear in the gain, column by column: doubled, cleared, added, factored out."""
    problem = _no_shift(problem)
    g = np.round(problem.inputs["g"])  # sums of integers are exact

    def y(gain: np.ndarray) -> torch.Tensor:
        return _y(execute(subject, changed(problem, g=gain), gradients=False))

    one, cleared, unit = y(g), g.copy(), y(np.ones_like(g))
    column = len(g) // 2
    cleared[column] = 0.0
    other = np.roll(g, 1)
    expected = one.clone()
    expected[..., column] = 0.0
    allowed = sum(_allowed_y(changed(problem, g=gain)) for gain in (g, other, g + other))
    sums = np.abs(to_array(y(g + other)) - to_array(one) - to_array(y(other)))
    normal = one.abs() > 2.0**-12  # below, float16 has lost bits that the doubled value still has
    return [
        equal("y at 2 g", [((y(2 * g) + 0.0)[normal], (2 * one + 0.0)[normal])]),
        equal("y with one gain 0", [(y(cleared) + 0.0, expected + 0.0)]),
        within("y at g + g'", sums, allowed),
        within("y / g", np.abs(to_array(unit) * g - to_array(one)), _allowed_y(problem)
                + np.abs(g) * _allowed_y(changed(problem, g=np.ones_like(g)))),
    ]  # fmt: skip


def _orthogonal(subject: Subject, problem: Problem) -> list[Verdict]:
    """With eps = 0, dx is orthogonal to x (the norm ignores length), and LayerNorm's dx to 1 (it ignores shifts)."""
    dx = to_array(execute(subject, problem).gradients[0])
    x, allowed = problem.inputs["x"], expectations(problem)[1].allowed
    along = np.abs((dx * x).sum(-1, keepdims=True))
    verdicts = [within("dx . x", along, allowed * np.abs(x).sum(-1, keepdims=True))]
    if p.is_centred(problem.function):
        verdicts.append(within("dx . 1", np.abs(dx.sum(-1, keepdims=True)), allowed * x.shape[-1]))
    return verdicts


def _shards(subject: Subject, problem: Problem) -> list[Verdict]:
    """Weights' gradients add over groups of rows."""
    x, dy = problem.inputs["x"], problem.cotangents["y"]
    rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    cut = (len(rows[0]) + 1) // 2
    parts = [changed(problem, {"y": rows[1][part]}, x=rows[0][part]) for part in (slice(cut), slice(cut, None))]
    whole = changed(problem, {"y": rows[1]}, x=rows[0])
    runs = [execute(subject, q).gradients[1:] for q in (whole, *parts)]
    rules = [expectations(q)[2:] for q in (whole, *parts)]
    verdicts = []
    for k, name in enumerate(p.OPERANDS[problem.function][1:]):
        total, first, second = (to_array(run[k]) for run in runs)
        verdicts.append(within("d" + name, np.abs(total - first - second), sum(rule[k].allowed for rule in rules)))
    return verdicts


def _rows_permuted(subject: Subject, problem: Problem) -> list[Verdict]:
    """A permutation of rows permutes y and dx bit by bit and leaves the weights' gradients alone."""
    rows = {"x": problem.inputs["x"], "y": problem.cotangents["y"]}
    flat = {key: a.reshape(-1, a.shape[-1]) for key, a in rows.items()}
    order = np.random.default_rng(1).permutation(len(flat["x"]))
    first = changed(problem, {"y": flat["y"]}, x=flat["x"])
    second = changed(problem, {"y": flat["y"][order]}, x=flat["x"][order])
    a, b = execute(subject, first), execute(subject, second)
    index = torch.from_numpy(order).to(subject.device)
    pairs = [(_y(a)[index], _y(b))]
    if not subject.differentiable:
        return [equal("y", pairs)]
    verdicts = [equal("y, dx", [*pairs, (a.gradients[0][index], b.gradients[0])])]
    for k, rule in enumerate(expectations(first)[2:], start=1):
        difference = np.abs(to_array(a.gradients[k]) - to_array(b.gradients[k]))
        verdicts.append(within(rule.name, difference, 2 * rule.allowed))
    return verdicts


def _columns_permuted(subject: Subject, problem: Problem) -> list[Verdict]:
    """A permutation of columns, weights with them, permutes y, dx and the weights' gradients."""
    order = np.random.default_rng(1).permutation(problem.inputs["x"].shape[-1])
    other = changed(
        problem,
        {"y": problem.cotangents["y"][..., order]},
        **{name: np.ascontiguousarray(a[..., order]) for name, a in problem.inputs.items()},
    )
    run = execute(subject, other)
    back = [None if t is None else t[..., np.argsort(order)] for t in run.outputs + run.gradients]
    return judged(back, expectations(problem))


def _zero_rows(subject: Subject, problem: Problem) -> list[Verdict]:
    """A row of zeros gives y = b (0 for RMSNorm) exactly, and finite gradients everywhere."""
    x = problem.inputs["x"].copy()
    x.reshape(-1, x.shape[-1])[0] = 0.0
    problem = changed(problem, x=x)
    run = execute(subject, problem)
    row = _y(run).reshape(-1, x.shape[-1])[0]
    expected = torch.from_numpy(problem.inputs.get("b", np.zeros(x.shape[-1]))).to(row)
    infinite = sum(int((~torch.isfinite(t)).sum()) for t in run.results)
    return [equal("y", [(row + 0.0, expected + 0.0)]), Verdict("not finite", infinite, 0.0)]


def _fused(subject: Subject, problem: Problem) -> list[Verdict]:
    """s is x + r rounded once; both inputs get the same gradient; y is the norm of the rounded s, bit by bit."""
    run = execute(subject, problem)
    s = torch.from_numpy(rounded(problem.inputs["x"] + problem.inputs["r"], problem.dtype)).to(run.outputs[0])
    verdicts = [equal("s", [(run.outputs[0] + 0.0, s + 0.0)])]
    if run.gradients[0] is not None and run.gradients[1] is not None:
        verdicts.append(equal("dx = dr", [(run.gradients[0], run.gradients[1])]))
    plain = problem.function.removeprefix("add_")
    if plain in subject.functions:
        rest = {name: a for name, a in problem.inputs.items() if name != "r"} | {"x": to_array(s)}
        alone = replace(problem, function=plain, inputs=rest, cotangents={"y": problem.cotangents["y"]})
        verdicts.append(equal("y", [(_y(run), _y(execute(subject, alone, gradients=False)))]))
    return verdicts


def _large(subject: Subject, problem: Problem) -> list[Verdict]:
    """Values whose square is beyond float16 neither overflow nor lose accuracy."""
    run = execute(subject, problem)
    infinite = sum(int((~torch.isfinite(t)).sum()) for t in run.results)
    return [Verdict("not finite", infinite, 0.0), *judged(run.outputs + run.gradients, expectations(problem))]


# ---- what holds of every kernel: `kernels.universal`, and


def _empty(subject: Subject, problem: Problem) -> list[Verdict]:
    """No rows, or rows of no elements: empty results of the right shape, weights' gradients 0."""
    wrong = 0
    for shape in ((0, 5), (3, 0), (2, 0, 5), (0,)):
        empty = changed(
            replace(problem, layouts={}), {name: np.zeros(shape) for name in problem.cotangents},
            **{n: np.zeros(shape if n in ("x", "r") else shape[-1:]) for n in problem.inputs},
        )  # fmt: skip
        run = execute(subject, empty)
        for tensor, like in [*zip(run.outputs, empty.cotangents.values()), *zip(run.gradients, empty.inputs.values())]:
            wrong += tensor is not None and (tuple(tensor.shape) != like.shape or bool((tensor != 0).any()))
    return [Verdict("shapes and zeros", int(wrong), 0.0)]


SMOOTH = ("normal",)


def _draw(**options) -> Callable:
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


def _relation(eps: float | None = None, kinds: tuple[str, ...] = SMOOTH, shortest: int = 1) -> Callable:
    def draw(function: str, dtype: str, gpu: bool):
        long_enough = shortest if p.is_centred(function) else 1
        drawn = p.problems(function, dtype, gpu, kinds=kinds, layouts=False, eps=eps)
        return drawn.filter(lambda problem: problem.inputs["x"].shape[-1] >= long_enough)

    return draw


BY_VALUE = universal.properties(FUNCTIONS, _draw(), expectations)[:2]
THE_REST = universal.properties(FUNCTIONS, _draw(kinds=SMOOTH), expectations)[2:]

PROPERTIES = (
    *BY_VALUE,
    Property("any-launch", FUNCTIONS, _draw(launches=True), _any_launch, ours_only=True, share=0.5),
    *THE_REST,
    Property("scale-invariance", PLAIN, _relation(eps=0.0, shortest=3), _scaling, share=0.25),
    Property("shift-invariance", ("layer_norm",), _relation(), _shifting, share=0.25),
    Property("unit-mean-square", PLAIN, _relation(eps=0.0, shortest=3), _unit, share=0.25),
    Property("linear-in-gain", PLAIN, _relation(), _gain, share=0.25),
    Property("gradient-orthogonal", PLAIN, _relation(eps=0.0, shortest=3), _orthogonal, share=0.25, gradient=True),
    Property("weight-gradients-add", PLAIN, _relation(), _shards, share=0.25, gradient=True),
    Property("rows-permute", PLAIN, _relation(), _rows_permuted, share=0.25),
    Property("columns-permute", PLAIN, _relation(), _columns_permuted, share=0.25),
    Property("zero-rows", PLAIN, _relation(), _zero_rows, share=0.25),
    Property("sum-then-norm", FUSED, _relation(), _fused, share=0.25),
    Property("large-values", PLAIN, _draw(kinds=("large",), layouts=False), _large, share=0.25),
    Property("empty", FUNCTIONS, _relation(), _empty, share=0.0),
)
