"""The picture of a comparison: how near each property came to its limit, and where the worst case errs.

Where something failed there are two cases: the smallest that fails, with its numbers, and a larger one,
where a pattern can be seen (the last block, one column, everything after the first block).
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from kernels import registry
from kernels.compare import Outcome, larger_failure
from kernels.problem import Problem, to_array
from kernels.subject import Subject, execute
from kernels.tolerance import Expectation, error_map
from minillm.plotting import BLUE, VERMILION, new_figure, save

NOTHING, EVERYTHING = 1e-3, 1e3  # where ratios of 0 and beyond the axis are drawn
NUMBERS = 48  # entries of a result that are written out


def worst_case(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The comparison with the reference that came nearest to its limit; of those that failed, the smallest case."""
    direct = [o for o in outcomes if o.property in ("reference", "gradient") and o.problem is not None]
    failed = [o for o in direct if not o.passed]
    if failed:
        return min(failed, key=lambda o: (bool(o.error), o.dtype != "float32", len(o.problem or ())))
    return max(direct, key=lambda o: o.verdict.ratio, default=None)


def draw(family: str, subject: Subject, outcomes: Sequence[Outcome], path: str) -> str:
    """Write the picture and say where it is; where there is nothing to draw, say that."""
    worst = worst_case(outcomes)
    if worst is None:
        return "no figure: no comparison with the reference was made"
    cases = [("the worst case", worst.problem)]
    if not worst.passed and not worst.error:
        cases = [("smallest failing case", worst.problem)]
        larger = larger_failure(worst, subject)
        if larger and len(larger) > len(worst.problem or ()):
            cases.append(("a larger one", larger))
    figure, (left, *right) = new_figure(1, 1 + len(cases), width=6 + 5.2 * len(cases), height=4.8)
    _ratios(left, outcomes)
    for axes, (title, problem) in zip(right, cases):
        assert problem is not None
        try:
            _map(figure, axes, family, subject, problem, worst.verdict.name.removesuffix(" (rms)"), title)
        except Exception as error:  # a reader's function may raise on its own worst case
            axes.text(0.5, 0.5, f"{type(error).__name__}: {error}"[:80], ha="center", va="center", fontsize=8)
            axes.axis("off")
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


def _map(figure, axes, family: str, subject: Subject, problem: Problem, named: str, title: str) -> None:
    """|error| / allowed of one result as a matrix of rows and columns: blue is allowed, red is not."""
    run = execute(subject, problem)
    results = {
        e.name: (to_array(t), e)
        for t, e in zip(run.outputs + run.gradients, registry.load(family).expectations(problem))
        if t is not None and t.numel()
    }
    shares = {name: error_map(*result) for name, result in results.items()}
    name = named if named in results else max(shares, key=lambda key: shares[key].max())
    share = _matrix(np.clip(np.nan_to_num(shares[name], nan=EVERYTHING), NOTHING, EVERYTHING))
    image = axes.imshow(share, aspect="auto", interpolation="nearest", norm=LogNorm(NOTHING, EVERYTHING), cmap="RdBu_r")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="|error| / allowed (white: the limit)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="column", ylabel="row")
    if share.size <= NUMBERS:
        _write_numbers(axes, *results[name], share)
    axes.set_title(_wrapped(f"{title}, {name}: {problem}"), fontsize=8)


def _write_numbers(axes, actual: np.ndarray, expected: Expectation, share: np.ndarray) -> None:
    """What came out of each entry, and below it what should have."""
    got, wanted = _matrix(actual), _matrix(np.broadcast_to(expected.truth, actual.shape))
    size, gap = (9, " ") if share.shape[1] <= 5 else (7, "\n")
    for (row, column), ratio in np.ndenumerate(share):
        text = f"{got[row, column]:.3g}" + ("" if ratio <= 1 else f"\nnot{gap}{wanted[row, column]:.3g}")
        dark = ratio > EVERYTHING / 30 or ratio < NOTHING * 30
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")


def _matrix(array: np.ndarray) -> np.ndarray:
    """All axes but the last as rows."""
    array = np.atleast_2d(array)
    return array.reshape(-1, array.shape[-1])


def _wrapped(text: str, width: int = 72, lines: int = 4) -> str:
    """Broken between words, and cut where it is still too long."""
    found = [""]
    for word in text.split(" "):
        if len(found[-1]) + len(word) >= width:
            found.append("")
        found[-1] += ("" if not found[-1] else " ") + word
    return "\n".join(found[:lines]) + (" ..." if len(found) > lines else "")
