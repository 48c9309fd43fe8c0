"""The picture of a benchmark: the roofline, how near each case came to its limit, speed and memory over size."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_figure, save

COLOURS = (ORANGE, GREEN, PURPLE, SKY, VERMILION)  # of peers; ours are blue
TALLEST = 40  # cases in one picture
DASHES = ("-", "--", ":", "-.")  # of the lines over size, the longest first


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> str:
    """Write the picture of one family's rows and say where it is."""
    rows = _first_cases(rows)
    names = list(dict.fromkeys(_name(row) for row in rows))
    height = 6.0 + 0.22 * len(names)
    figure, ((roof, share), (speed, memory)) = new_figure(2, 2, width=16, height=max(height, 9.0))
    peers = list(dict.fromkeys(row["peer"] for row in rows if row["peer"]))
    colours = {peer: COLOURS[k % len(COLOURS)] for k, peer in enumerate(peers)}
    _roofline(roof, rows, colours)
    _by_case(share, rows, names, colours, "of_limit", "peer_of_limit", "share of the limit (1 is the ceiling)")
    share.axvline(1.0, color=VERMILION, lw=1, ls="--")
    _over_size(speed, rows, colours, "of_limit", "peer_of_limit", "share of the limit")
    _over_size(memory, rows, colours, "ours_mib", "peer_mib", "memory needed at the peak, MiB")
    speed.set_ylim(bottom=0)
    memory.set_yscale("symlog")
    speed.set_title("speed over size")
    memory.set_title("memory over size")
    if speed.lines:
        speed.legend(fontsize=7)
    share.legend(fontsize=8)
    share.set_title(f"{rows[0]['family']} on {rows[0]['device']}")
    return str(save(figure, path))


def _first_cases(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept = set(list(dict.fromkeys(_name(row) for row in rows))[:TALLEST])
    return [row for row in rows if _name(row) in kept]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['case']} {row['dtype']}"


def _roofline(axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """What was reached over operations a byte, in operations a second; without operations, bytes stand for them."""
    copy = float(np.median([row["copy_bytes_per_s"] for row in rows]))
    rates = [row["product_flops_per_s"] for row in rows if row["product_flops_per_s"]]
    product = float(np.median(rates)) if rates else None
    intensity = [max(row["flops"], row["bytes"]) / row["bytes"] for row in rows]
    grid = np.geomspace(0.5 * min(intensity), 2 * max([*intensity, product / copy if product else 1.0]), 100)
    axes.plot(grid, np.minimum(grid * copy, product or np.inf) / 1e12, color="black", label="ceilings of this run")
    for row, x in zip(rows, intensity, strict=True):
        work = max(row["flops"], row["bytes"]) / 1e12
        if row["peer"]:
            axes.plot(x, work / row["peer_s"], "x", ms=5, color=colours[row["peer"]])
        axes.plot(x, work / row["ours_s"], "o", ms=5, color=BLUE)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="10^12 operations (or bytes) a second")
    axes.set_title("roofline")


def _over_size(axes, rows, colours: Mapping[str, str], ours: str, theirs: str, label: str) -> None:
    """What grows with what: cases that differ in their size alone, one line for ours and one for each peer."""
    sizes: dict[str, dict[int, None]] = {}
    for row in rows:
        if row["line"]:
            sizes.setdefault(row["line"], {})[row["size"]] = None
    longest = sorted((name for name in sizes if len(sizes[name]) > 1), key=lambda name: -len(sizes[name]))
    for name, dashes in zip(longest, DASHES):
        here = sorted((row for row in rows if row["line"] == name), key=lambda row: row["size"])
        lines: dict[str, dict[int, float]] = {"ours": {row["size"]: row[ours] for row in here}}
        for row in here:
            if row["peer"]:
                lines.setdefault(row["peer"], {})[row["size"]] = row[theirs]
        for contender, found in lines.items():
            points = {size: value for size, value in found.items() if value is not None}
            axes.plot(list(points), list(points.values()), dashes, marker="o", ms=4, color=colours.get(contender, BLUE),
                      label=f"{contender}: {name}")  # fmt: skip
    axes.set(xscale="log", xlabel="size (length, width, rows or vocabulary: see the case)", ylabel=label)


def _by_case(axes, rows, names: Sequence[str], colours: Mapping[str, str], ours: str, theirs: str, label: str) -> None:
    """One line a case, a mark for ours and each peer."""
    place, said = {name: k for k, name in enumerate(reversed(names))}, set()
    for row in rows:
        marks = [(row[ours], BLUE, "o", "ours")]
        if row["peer"]:
            marks.insert(0, (row[theirs], colours[row["peer"]], "x", row["peer"]))
        for value, colour, mark, name in marks:
            if value is not None:
                axes.plot(value, place[_name(row)], mark, ms=5, color=colour, label=None if name in said else name)
                said.add(name)
    axes.set_yticks(range(len(names)), reversed(names), fontsize=7)
    axes.set(xlabel=label)
