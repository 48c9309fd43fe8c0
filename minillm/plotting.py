"""One style for every figure: colour-blind safe, legible on a slide and in print.

The colours are those of Okabe and Ito (2008). Give a quantity the same colour wherever it appears.
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "image.cmap": "cividis",
    "svg.hashsalt": "minillm",
}


def use_style() -> None:
    """Make the house style the default of this process (lessons call it once, at the top)."""
    for name, value in STYLE.items():
        matplotlib.rcParams[name] = value  # type: ignore[index]
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=list(CYCLE))  # type: ignore[attr-defined]


def new_figure(n_rows: int = 1, n_columns: int = 1, width: float = 8.0, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure without a window and its axes (an array of them for more than one), in the house style."""
    use_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG without a date in it, so that the same data give the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path
