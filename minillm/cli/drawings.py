"""The figures: each a function from measured data, as read from JSON, to a matplotlib figure."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_figure

GREY = "#777777"


def loss_curve(axes: Axes, text: dict) -> None:
    """Bits per byte over training, with the compressors that a reader knows as landmarks."""
    for key, style in (
        ("train", {"color": BLUE, "alpha": 0.35, "label": "training batches"}),
        ("held_out", {"color": BLUE, "marker": "o", "markersize": 4, "label": "held out, a part"}),
    ):
        points = [(point["step"], point[key]) for point in text["curve"] if point.get(key) is not None]
        axes.plot(*zip(*points, strict=True), **style)
    for i, (bits, names) in enumerate(reversed(_landmarks(text["compressors"]))):
        axes.axhline(bits, color=GREY, linestyle=":", linewidth=1.2)
        axes.text(
            0.01, bits, f"{names}  {bits:.2f}", transform=axes.get_yaxis_transform(), ha="left",
            va="bottom" if i == 0 else "top", fontsize=8.5, color=GREY,
        )  # fmt: skip
    if "final" in text:
        last = max(point["step"] for point in text["curve"])
        label = f"held out, all of it: {text['final']:.2f}"
        axes.plot([last], [text["final"]], "*", color=VERMILION, markersize=13, label=label)
    axes.set(xlabel="step", ylabel="bits per byte", yscale="log")
    ticks = [1.5, 2, 3, 4, 6, 8]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend()


def _landmarks(compressors: dict[str, float]) -> list[tuple[float, str]]:
    """Compressors from the best down; those within two per cent of one another share a line."""
    groups: list[tuple[float, list[str]]] = []
    for name, bits in sorted(compressors.items(), key=lambda item: item[1]):
        if groups and bits / groups[-1][0] < 1.02:
            groups[-1][1].append(name)
        else:
            groups.append((bits, [name]))
    return [(bits, ", ".join(names)) for bits, names in groups]


def reward_curves(axes: Axes, runs: list[dict], keys: dict[str, tuple[str, str]]) -> None:
    """Curves of several seeds: every seed thin, their mean thick."""
    for key, (label, colour) in keys.items():
        curves = [(np.asarray(run[key]["update"]), np.asarray(run[key]["value"])) for run in runs]
        for updates, values in curves:
            axes.plot(updates, values, color=colour, alpha=0.3, linewidth=1)
        shortest = min(len(values) for _, values in curves)
        mean = np.mean([values[:shortest] for _, values in curves], axis=0)
        axes.plot(curves[0][0][:shortest], mean, color=colour, label=label)
    axes.set(xlabel="update")
    axes.legend()


def smooth(values: list[float], width: int) -> np.ndarray:
    """A running mean that keeps the length."""
    kernel = np.ones(width) / width
    return np.convolve(np.pad(values, (width - 1, 0), mode="edge"), kernel, "valid")


def bench(rows: list[dict]) -> Figure:
    """The ratio to PyTorch at every size, with its quartiles, and the matrix products' share of our step."""
    figure, axes = new_figure(height=3.0)
    names = [row["case"].removeprefix("train ") for row in rows]
    place = np.arange(len(rows))
    ratios = np.array([row["ratio"] for row in rows])
    spread = np.array([row["spread"] for row in rows]).T
    axes.bar(place, ratios, width=0.5, color=BLUE, label="ours / PyTorch eager, time of a step")
    axes.errorbar(place, ratios, yerr=np.abs(spread - ratios), fmt="none", color="black", capsize=4, linewidth=1.2)
    floors = np.array([row["floor_s"] / row["peer_s"] for row in rows])
    axes.bar(place, floors, width=0.5, color=SKY, label="of it, matrix products alone")
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1.4)
    for x, ratio in zip(place, ratios, strict=True):
        axes.text(x - 0.23, ratio - 0.02, f"{ratio:.2f}", va="top", color="white", fontsize=10)
    axes.set_xticks(place, names)
    axes.set(ylabel="time, PyTorch = 1", ylim=(0, 1.45), title="A training step on two CPU cores (lower is faster)")
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=2, loc="upper center")
    return figure


def text(data: dict) -> Figure:
    """The loss curve of a longer run on real text."""
    figure, axes = new_figure(height=3.8)
    loss_curve(axes, data)
    axes.set_title("A byte-level decoder learns the Python reference")
    return figure


def grpo(data: dict) -> Figure:
    """Four curves to watch over some seeds: what was asked for first, and what tells how it is going."""
    figure, panels = new_figure(2, 2, width=9, height=5.6)
    runs = data["runs"]
    for panel, curves, title, top in (
        (panels[0, 0], [("greedy", GREEN, "most likely answer"), ("sampled", VERMILION, "sampled answer")],
         "right on held-out problems", 1.03),
        (panels[0, 1], [("reward", BLUE, None)], "reward in training: share of right answers", 1.03),
        (panels[1, 0], [("entropy", PURPLE, None)], "entropy of the policy, nats per token", None),
        (panels[1, 1], [("dead_groups", ORANGE, None)], "dead groups: all answers right, or all wrong", 1.03),
    ):  # fmt: skip
        for key, colour, label in curves:
            _band(panel, [run[key] for run in runs], colour, label, width=1 if label else 5)
        panel.set(title=title, ylim=(0, top), xlim=(0, None))
        panel.set_xscale("symlog", linthresh=10, linscale=0.5)
        panel.set_xticks(*_ticks(max(run["reward"]["update"][-1] for run in runs)))
        panel.minorticks_off()
    panels[0, 0].legend(loc="lower right")
    for panel in panels[1]:
        panel.set_xlabel(f"update; line: mean of {len(runs)} seeds, band: lowest to highest")
    return figure


def _band(axes: Axes, curves: list[dict], colour: str, label: str | None, width: int) -> None:
    """The mean over seeds and the range between the lowest and the highest, as far as all of them go."""
    shortest = min(len(curve["value"]) for curve in curves)
    values = np.array([smooth(curve["value"][:shortest], width) for curve in curves])  # (seeds, points)
    updates = curves[0]["update"][:shortest]
    axes.fill_between(updates, values.min(0), values.max(0), color=colour, alpha=0.25, linewidth=0)
    axes.plot(updates, values.mean(0), color=colour, label=label)


def _ticks(last: int) -> tuple[list[int], list[str]]:
    """Round places on an axis that is linear up to ten and logarithmic from there."""
    places = [0, *(p for p in (10, 30, 100, 300, 1000, 3000) if p < 0.7 * last), last]
    return places, [str(place) for place in places]


def tour(data: dict[str, Any]) -> Figure:
    """The whole idea on one page: gradients checked, a text learnt, a reward followed, a kernel held to its word."""
    figure, panels = new_figure(2, 2, width=10, height=6.4)
    _checks(panels[0, 0], data["gradients"], "gradient checks: error / allowed", "functions")
    loss_curve(panels[0, 1], data["text"])
    panels[0, 1].set_title("pretraining on real text")
    reward_curves(panels[1, 0], [data["reward"]], {"greedy": ("greedy", GREEN), "sampled": ("sampled", VERMILION)})
    panels[1, 0].set(title="GRPO: learning to add from reward alone", ylabel="right answers, held out", ylim=(0, 1.02))
    if data.get("kernels"):
        _checks(panels[1, 1], data["kernels"], "Triton kernel against NumPy: error / allowed", "properties")
    else:
        panels[1, 1].text(0.5, 0.5, "kernels: not run\n(needs torch and triton)", ha="center", va="center", color=GREY)
        panels[1, 1].axis("off")
    return figure


def _checks(axes: Axes, shares: list[float], title: str, what: str) -> None:
    """A histogram of measured over allowed; everything right of 1 would be a failure."""
    floor = 1e-6
    values = np.maximum(np.asarray(shares, dtype=float), floor)
    edges = np.logspace(-6, 1, 29).tolist()
    axes.hist(values, bins=edges, color=BLUE)
    axes.axvline(1, color=VERMILION, linewidth=1.8)
    axes.text(1.15, axes.get_ylim()[1] * 0.93, "fails", color=VERMILION, fontsize=10)
    axes.set(
        xscale="log",
        title=title,
        ylabel=f"number of {what}",
        xlabel=f"{len(values)} checked, {int((values > 1).sum())} failed",
    )
