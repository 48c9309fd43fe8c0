"""The picture of a comparison: how near each property came to its limit, and where the worst case errs."""

from collections.abc import Sequence

import numpy as np

from kernels import registry
from kernels.compare import Outcome
from kernels.problem import to_array
from kernels.subject import Subject, execute
from kernels.tolerance import error_map
from minillm.plotting import BLUE, VERMILION, new_figure, save

NOTHING, EVERYTHING = 1e-3, 1e3  # where ratios of 0 and beyond the axis are drawn


def worst_case(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The comparison with the reference that came nearest to its limit, or went beyond it."""
    direct = [o for o in outcomes if o.property in ("reference", "gradient") and o.problem is not None]
    return max(direct, key=lambda o: (not o.passed, o.verdict.ratio), default=None)


def draw(family: str, subject: Subject, outcomes: Sequence[Outcome], path: str) -> str:
    """Write the picture and say where it is; where there is nothing to draw, say that."""
    worst = worst_case(outcomes)
    if worst is None:
        return "no figure: no comparison with the reference was made"
    figure, (left, right) = new_figure(1, 2, width=11.5, height=4.8)
    _ratios(left, outcomes)
    try:
        _map(figure, right, family, subject, worst)
    except Exception as error:  # a reader's function may raise on its own worst case
        right.text(0.5, 0.5, f"{type(error).__name__}: {error}"[:80], ha="center", va="center", fontsize=8)
        right.axis("off")
    return f"figure: {save(figure, path)}"


def _ratios(axes, outcomes: Sequence[Outcome]) -> None:
    """One mark for every property, function and dtype."""
    names = list(dict.fromkeys(o.property for o in outcomes))[::-1]
    for row, name in enumerate(names):
        for outcome in (o for o in outcomes if o.property == name):
            ratio = min(max(outcome.verdict.ratio, NOTHING), EVERYTHING)
            colour, mark = (BLUE, "o") if outcome.passed else (VERMILION, "X")
            axes.plot(ratio, row, mark, ms=6, alpha=0.7, color=colour, clip_on=False)
    axes.axvline(1.0, color=VERMILION, lw=1, ls="--")
    axes.set(xscale="log", xlim=(NOTHING, EVERYTHING), xlabel="measured / allowed (0 drawn at 0.001; limit 1)")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_title(f"{outcomes[0].family} on {outcomes[0].backend}: every property")


def _map(figure, axes, family: str, subject: Subject, worst: Outcome) -> None:
    """|error| / allowed of the worst result, as a matrix of rows and columns."""
    assert worst.problem is not None
    run = execute(subject, worst.problem)
    maps = {
        e.name: error_map(to_array(t), e)
        for t, e in zip(run.outputs + run.gradients, registry.load(family).expectations(worst.problem))
        if t is not None and t.numel()
    }
    named = worst.verdict.name.removesuffix(" (rms)")
    name = named if named in maps else max(maps, key=lambda key: maps[key].max())
    share = np.atleast_2d(maps[name])
    share = share.reshape(-1, share.shape[-1])
    image = axes.imshow(np.minimum(share, EVERYTHING), aspect="auto", interpolation="nearest", vmin=0)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="|error| / allowed")
    axes.set(xlabel="column", ylabel="row")
    axes.set_title(f"the worst case, {name}:\n{worst.problem}"[:150], fontsize=8, wrap=True)
