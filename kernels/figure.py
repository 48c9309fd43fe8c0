"""The picture of a comparison: how near each property came to its limit, and where the worst case errs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernels import registry
from kernels.compare import Outcome
from kernels.problem import to_array
from kernels.subject import Subject, execute
from kernels.tolerance import error_map
from minillm.checks import optional_import

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"  # told apart with any colour vision


def worst_case(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The comparison with the reference that came nearest to its limit, or passed it."""
    direct = [o for o in outcomes if o.property in ("reference", "gradient") and o.problem is not None]
    return max(direct, key=lambda o: (not o.passed, o.verdict.ratio), default=None)


def draw(family: str, subject: Subject, outcomes: Sequence[Outcome], path: str) -> str:
    """Write the picture and say where it is; where there is nothing to draw, say that."""
    worst = worst_case(outcomes)
    if worst is None:
        return "no figure: no comparison with the reference was made"
    optional_import("matplotlib", "kernels").use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1, 1.25), layout="constrained")
    _ratios(left, outcomes)
    try:
        _map(figure, right, family, subject, worst)
    except Exception as error:  # a reader's function may raise on its own worst case
        right.text(0.5, 0.5, f"{type(error).__name__}: {error}"[:80], ha="center", va="center", fontsize=8)
    figure.suptitle(f"{family} on {subject.backend}: error as a share of what the rule allows", fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return f"figure: {path}"


def _ratios(axes, outcomes: Sequence[Outcome]) -> None:
    names = list(dict.fromkeys(o.property for o in outcomes))[::-1]
    for row, name in enumerate(names):
        for outcome in (o for o in outcomes if o.property == name):
            ratio = min(outcome.verdict.ratio, 1e3)
            axes.plot(max(ratio, 1e-3), row, "o" if outcome.passed else "X", ms=6, alpha=0.8,
                      color=BLUE if outcome.passed else ORANGE)  # fmt: skip
    axes.axvline(1.0, color=GREY, lw=1, ls="--")
    axes.set(xscale="log", xlim=(7e-4, 2e3), xlabel="measured / allowed (worst case; 0 drawn at 0.001)")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title("every property, function and dtype", fontsize=9)


def _map(figure, axes, family: str, subject: Subject, worst: Outcome) -> None:
    """|error| / allowed of the worst result, as a matrix of rows and columns."""
    assert worst.problem is not None
    described = registry.load(family)
    run = execute(subject, worst.problem)
    maps = {
        e.name: error_map(to_array(t), e)
        for t, e in zip(run.outputs + run.gradients, described.expectations(worst.problem))
        if t is not None and t.numel()
    }
    named = worst.verdict.name.removesuffix(" (rms)")
    name = named if named in maps else max(maps, key=lambda key: maps[key].max())
    share = np.atleast_2d(maps[name])
    share = share.reshape(-1, share.shape[-1])
    image = axes.imshow(np.minimum(share, 1e3), aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="|error| / allowed")
    axes.set(xlabel="column", ylabel="row")
    axes.set_title(f"worst case: {name} of {worst.problem}"[:110], fontsize=7)
