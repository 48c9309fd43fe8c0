"""What must hold of the family: agreement with the reference, what holds of every kernel, and where relations are."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels import universal
from kernels.problem import Problem
from kernels.property import Property
from kernels.subject import Subject, equal, execute, placed_operands
from kernels.token_loss import launch, launch_linear, op, reference, relations, relations_policy
from kernels.token_loss import problems as p
from kernels.token_loss.scales import scales
from kernels.tolerance import Expectation, Verdict, expect
from kernels.universal import judged

FUNCTIONS = p.FUNCTIONS
BY_ROW = ("softmax", "log_softmax", "token_logprobs")
COUNTED = ("token_logprobs", "cross_entropy", "policy_loss", *p.LINEAR)  # with rows that may not count


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about every output and gradient, in order of `problems.result_names`."""
    names = p.result_names(problem.function)
    originals = list(problem.inputs.values())

    def keep_infinities(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.where(np.isneginf(o), o, a) for o, a in zip(originals, arrays)]

    return expect(
        getattr(reference, problem.function), originals, list(problem.cotangents.values()), problem.dtype, names,
        scales(problem), cast=keep_infinities, constants=list(problem.constants.values()),
        dtypes=[problem.dtypes.get(name, problem.dtype) for name in names], **problem.parameters,
    )  # fmt: skip


# ---- any launch


def any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    """Forced small tiles, few splits and narrow strips give the reference's values and gradients."""
    tile = problem.launch
    forced = [
        (launch, "statistics", "tile"), (launch, "gradient", "tile"), (launch, "loss_and_gradient", "tile"),
        (launch, "softmax", "tile"), (launch, "softmax_backward", "tile"), (launch_linear, "statistics", "plan"),
        (launch_linear, "gradient", "plan"),
    ]  # fmt: skip
    originals = [getattr(module, name) for module, name, _ in forced]
    for (module, name, key), original in zip(forced, originals):
        setattr(module, name, lambda *a, _f=original, _k=key, **k: _f(*a, **{**k, _k: tile}))
    try:
        run = execute(subject, problem)
    finally:
        for (module, name, _), original in zip(forced, originals):
            setattr(module, name, original)
    return judged(run.outputs + run.gradients, expectations(problem))


def any_strip(subject: Subject, problem: Problem) -> list[Verdict]:
    """The width of the backward's strip changes not one bit, and neither does the number of splits of the gradients."""
    runs = []
    for chunk in (problem.launch.product.block_n * 2, 64, 128):
        narrow = replace(
            problem,
            launch=replace(
                problem.launch, chunk=chunk // problem.launch.gradient.block_n * problem.launch.gradient.block_n
            ),
        )
        original = launch_linear.plan_for
        launch_linear.plan_for = lambda hidden, weight, plan=narrow.launch: plan
        try:
            runs.append(execute(subject, problem))
        finally:
            launch_linear.plan_for = original
    return [equal("all results", [(a, b) for run in runs[1:] for a, b in zip(runs[0].results, run.results)])]


# ---- in place


def in_place(subject: Subject, problem: Problem) -> list[Verdict]:
    """With inplace=True: the reference's values and gradient, and the gradient lies where the logits were."""
    seen = {}

    def call(logits, *rest):
        seen["logits"] = logits.clone()  # not a leaf, and nobody else's memory
        return getattr(op, problem.function)(seen["logits"], *rest, inplace=True)

    run = execute(replace(subject, functions={problem.function: call}), problem)
    memory = seen["logits"].detach()
    where_the_logits_were = equal("memory of the logits", [(memory, run.gradients[0])])
    return [*judged(run.outputs + run.gradients, expectations(problem)), where_the_logits_were]


def in_place_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    """The same kernel writing elsewhere and over its input: equal bits, for both kernels that write gradients."""
    whole = torch.contiguous_format  # axes in another order are no rows that could be written over
    placed, constants = placed_operands(subject, problem)
    logits = placed[0].tensor
    targets = constants[0].tensor.reshape(-1).contiguous()  # type: ignore[union-attr]
    ignored = problem.parameters["ignore_index"]
    weight = torch.rand(targets.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    policy = launch.PolicyTerms(-weight, weight - 0.5, -2 * weight, beta=0.1, entropy_coef=0.01)
    pairs: list[Any] = []
    for terms in (launch.LikelihoodTerms(0.1, 0.01), policy):
        both = [
            launch.loss_and_gradient(
                logits.clone(memory_format=whole), targets, weight, terms, 1.0, ignored, inplace, problem.launch
            )
            for inplace in (False, True)
        ]
        pairs += [(both[0][k], both[1][k]) for k in (0, 1, 2, 5)]
    found = launch.statistics(logits, targets, 1.0, ignored)
    column = (weight, weight, None, None)
    both = [
        launch.gradient(
            logits.clone(memory_format=whole), targets, found, column, 1.0, ignored, inplace, problem.launch
        )
        for inplace in (False, True)
    ]
    return [equal("loss and gradient", pairs), equal("gradient", [(both[0], both[1])])]


# ---- rows that do not count


def soiled(subject: Subject, problem: Problem) -> list[Verdict]:
    """NaN in rows that do not count, and in the other policies' numbers there, changes no bit of anything."""
    a, b = execute(subject, problem), execute(subject, p.soiled(problem))
    keep = p.keep_of(problem)
    verdicts = [equal("all results", list(zip(a.results, b.results)))]
    if a.gradients[0] is not None:
        dropped = a.gradients[0][torch.from_numpy(np.asarray(~keep)).to(a.gradients[0].device)]
        verdicts.append(Verdict("gradient where nothing counts", int((dropped != 0).sum()), 0.0))
    return verdicts


def nothing_counts(subject: Subject, problem: Problem) -> list[Verdict]:
    """No row counts: loss and gradients are 0, not NaN."""
    ignore = problem.parameters["ignore_index"]
    targets = np.full_like(problem.constants["targets"], ignore)
    run = execute(subject, p.soiled(replace(problem, constants={**problem.constants, "targets": targets})))
    return [Verdict("not 0", sum(int((t != 0).sum()) for t in run.results), 0.0)]


def empty(subject: Subject, problem: Problem) -> list[Verdict]:
    """No rows: empty results, a loss of 0, a head's gradient of 0."""
    name = p.inputs_of(problem.function)[0]
    lead = (0, 3) if problem.function in p.POLICY else (0,)
    width = problem.inputs[name].shape[-1]

    def cut(array):
        if array is None:
            return None
        return np.zeros(lead[:1] if array.ndim == 1 and problem.function in p.POLICY else lead, array.dtype)

    none = replace(
        problem, layouts={}, inputs={**problem.inputs, name: np.zeros((*lead, width))},
        constants={n: cut(a) for n, a in problem.constants.items()},
        cotangents={n: None if c is None else c if n == "loss" else np.zeros((*lead, width) if n == "y" else lead)
                    for n, c in problem.cotangents.items()},
    )  # fmt: skip
    run = execute(subject, none)
    wrong = sum(int((t != 0).sum()) for t in run.results)
    if run.gradients[0] is not None:
        wrong += tuple(run.gradients[0].shape) != (*lead, width)
    return [Verdict("shapes and zeros", int(wrong), 0.0)]


def draw(**options):
    """A strategy with these options of `problems.problems`."""
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


def own_properties() -> tuple[Property, ...]:
    """Everything but the relations of the two kinds of losses."""
    by_value = universal.properties(FUNCTIONS, draw(), expectations)
    in_place_functions = ("cross_entropy", "policy_loss")
    return (
        *by_value,
        Property("any-launch", FUNCTIONS, draw(launches=True), any_launch, ours_only=True, share=0.5),
        Property("any-strip", p.LINEAR, draw(launches=True, layouts=False), any_strip, ours_only=True, share=0.25),
        Property("in-place", in_place_functions, draw(layouts=False), in_place, ours_only=True, gradient=True, share=0.5),
        Property("in-place-launch", ("cross_entropy",), draw(launches=True), in_place_launch, ours_only=True, share=0.25),
        Property("soiled-rows", COUNTED, draw(layouts=False, dirty=False), soiled, share=0.25),
        Property("nothing-counts", COUNTED, draw(layouts=False), nothing_counts, share=0.0),
        Property("empty", FUNCTIONS, draw(layouts=False), empty, share=0.0),
    )  # fmt: skip


PROPERTIES = (*own_properties(), *relations.RELATIONS, *relations_policy.RELATIONS)
