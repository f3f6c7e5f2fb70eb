"""Figures as inline SVG with one palette; text stays text, and nothing is fetched.

Every figure comes with the numbers that it shows, as CSV.
"""

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from deltapref_jax.analysis.findings import DOMAIN_WORDS  # noqa: E402
from deltapref_jax.analysis.statistics import Estimate, GapBin  # noqa: E402
from deltapref_jax.display import xml_text  # noqa: E402

COLOURS = {  # by objective, selection, or side of a pair
    "dpo": "#1f6f8b",
    "dpo_norm": "#6a4c93",
    "kto": "#d1495b",
    "sft": "#8a8a8a",
    "top": "#1f6f8b",
    "random": "#8a8a8a",
    "matched": "#e09f3e",
    "chosen": "#1f6f8b",
    "rejected": "#d1495b",
}
_SEVERAL = ("#1f6f8b", "#d1495b", "#e09f3e", "#6a4c93", "#2a7d46", "#8a8a8a")  # students in turn
_MARKERS = "oDsv^P"

plt.rcParams.update(
    {
        "text.parse_math": False,  # a name may hold dollar signs
        "svg.fonttype": "none",  # text as <text>, not as outlines
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.grid": True,
        "grid.color": "#eeeeee",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.hashsalt": "deltapref",  # equal figures are equal bytes
    }
)


class Point(NamedTuple):
    """One arm in a figure."""

    x: float
    y: Estimate  # change in points
    label: str = ""


class Line(NamedTuple):
    """Arms that belong together."""

    name: str
    colour: str  # key of COLOURS
    points: Sequence[Point]
    # x and y of the trend's centre, and its slope; without a trend the points are joined.
    trend: tuple[float, float, float] | None = None
    dashed: bool = False


class Drawn(NamedTuple):
    """A figure, and the numbers in it."""

    svg: str  # one <svg> element that fits its container's width
    csv: str  # a header and a row per drawn point


def _drawn(figure: Figure, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Drawn:
    """The figure with its numbers; closes the figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return Drawn(_svg(figure), xml_text(text.getvalue()))


def _svg(figure: Figure) -> str:
    for label in figure.findobj(Text):
        label.set_text(xml_text(label.get_text()))
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg \1class="figure"', text, count=1
    )


def _lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Points with 95% intervals, trends, and a label above the points of each chosen generator."""
    axes.axhline(0, color="#666666", linewidth=1)
    xs = [p.x for line in lines for p in line.points]
    width = max(xs) - min(xs) if xs else 0.0
    if xs and not width:  # one x has no scale of its own
        axes.set_xlim(xs[0] - 1, xs[0] + 1)
    for i, line in enumerate(lines):
        # Arms of several lines at one x stand side by side.
        shift = (i - (len(lines) - 1) / 2) * 0.012 * (width or 2.0)
        points = sorted(line.points, key=lambda p: p.x)
        x = [p.x + shift for p in points]
        y = [p.y.value for p in points]
        bars = [[p.y.value - p.y.low for p in points], [p.y.high - p.y.value for p in points]]
        colour = COLOURS.get(line.colour, "#555555")
        joined = line.trend is None and len(points) > 1
        axes.errorbar(
            x,
            y,
            yerr=bars,
            marker="D" if line.dashed else "o",
            markersize=5,
            capsize=3,
            linewidth=1.4,
            label=line.name,
            color=colour,
            linestyle=("--" if line.dashed else "-") if joined else "none",
        )
        if line.trend:
            centre, height, slope = line.trend
            ends = (min(xs), max(xs))
            axes.plot(
                ends,
                [height + slope * (end - centre) for end in ends],
                color=colour,
                linewidth=1.2,
                alpha=0.5,
            )
    for label in dict.fromkeys(p.label for line in lines for p in line.points):
        named = [p for line in lines for p in line.points if p.label == label]
        axes.annotate(
            label,
            (named[0].x, max(p.y.high for p in named)),
            textcoords="offset points",
            xytext=(0, 4),
            ha="center",
            fontsize=8,
            color="#555555",
        )


class Row(NamedTuple):
    """A claim in a forest plot."""

    name: str
    estimates: Mapping[str, Estimate]  # by student; by "" of the only one
    margin: float  # on both sides of 0


def forest(rows: Sequence[Row], xlabel: str) -> Drawn:
    """Estimates with 95% intervals one under another, and a band of what counts as no effect.

    Args:
      rows: from top to bottom; the students of a row stand below each other in colours of theirs.
      xlabel: the unit.
    """
    students = list(dict.fromkeys(student for row in rows for student in row.estimates))
    several = students != [""]
    height = 0.62 if len(students) < 3 else 0.31 * len(students)
    figure, axes = plt.subplots(figsize=(6.6, 0.7 + height * len(rows)))
    axes.axvline(0, color="#666666", linewidth=1)
    for i, row in enumerate(rows):
        axes.fill_betweenx([i - 0.36, i + 0.36], -row.margin, row.margin, color="#e8eef2", zorder=0)
    for s, student in enumerate(students):
        shown = [
            (i, row.estimates[student]) for i, row in enumerate(rows) if student in row.estimates
        ]
        axes.errorbar(
            [e.value for _, e in shown],
            [i + 0.56 * ((s + 0.5) / len(students) - 0.5) for i, _ in shown],
            xerr=[[e.value - e.low for _, e in shown], [e.high - e.value for _, e in shown]],
            marker=_MARKERS[s % len(_MARKERS)],
            markersize=6,
            capsize=4,
            linewidth=1.8,
            linestyle="none",
            color=_SEVERAL[s % len(_SEVERAL)],
            label=xml_text(student),
        )
    if several:
        axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    # Labels of ticks are made anew whenever the figure is laid out, so they must be clean before.
    labels = ["\n".join(textwrap.wrap(xml_text(row.name), 34)) for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    return _drawn(
        figure,
        ("claim", *["student"] * several, "estimate", "low", "high", "margin"),
        (
            (row.name, *[student] * several, *e, row.margin)
            for row in rows
            for student, e in row.estimates.items()
        ),
    )


def panels(rows: Mapping[str, Mapping[str, Sequence[Line]]], xlabel: str) -> Drawn:
    """Changes against x: one row of panels per key of `rows`, one panel per domain."""
    columns = max(map(len, rows.values()))
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(5.4 * columns, 3.5 * len(rows)), squeeze=False
    )
    for row, (cells, (name, domains)) in enumerate(zip(grid, rows.items(), strict=True)):
        for axes, (domain, lines) in zip(cells, domains.items(), strict=True):
            _lines(axes, lines)
            axes.set_title(
                f"{name}, {DOMAIN_WORDS[domain]}" if name else DOMAIN_WORDS[domain],
                loc="left",
                fontweight="bold",
            )
            axes.margins(x=0.08, y=0.15)
            if row == len(rows) - 1:
                axes.set_xlabel(xlabel)
        cells[0].set_ylabel("change in accuracy (points)")
    grid[0][-1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _drawn(
        figure,
        ("panel", "domain", "line", "label", xlabel, "change in points", "low", "high"),
        (
            (name, domain, line.name, p.label, p.x, *p.y)
            for name, domains in rows.items()
            for domain, lines in domains.items()
            for line in lines
            for p in line.points
        ),
    )


def degree_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Drawn:
    """Mean rating of the corrupted dimension against the degree of corruption, a panel per judge.

    Args:
      curves: judge → dimension → ratings at degrees 0, 1, …; points of NaN are left out.
    """
    figure, axes = plt.subplots(
        1, len(curves), figsize=(4.6 * len(curves), 3.2), squeeze=False, sharey=True
    )
    palette = plt.get_cmap("viridis")
    for panel, (judge, dimensions) in zip(axes[0], curves.items(), strict=True):
        for i, (dimension, means) in enumerate(dimensions.items()):
            shown = [(degree, mean) for degree, mean in enumerate(means) if not math.isnan(mean)]
            panel.plot(
                *zip(*shown, strict=True),
                marker="o",
                markersize=4,
                label=dimension.replace("_", " "),
                color=palette(i / max(len(dimensions) - 1, 1) * 0.9),
            )
        panel.set_title(f"judge: {judge}", loc="left", fontweight="bold")
        panel.set_xlabel("degree of corruption")
        panel.set_xticks(range(max(map(len, dimensions.values()))))
        panel.set_ylim(0.9, 5.1)
    axes[0][0].set_ylabel("mean rating, corrupted dimension")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _drawn(
        figure,
        ("judge", "dimension", "degree of corruption", "mean rating"),
        (
            (judge, dimension, degree, mean)
            for judge, dimensions in curves.items()
            for dimension, means in dimensions.items()
            for degree, mean in enumerate(means)
            if not math.isnan(mean)
        ),
    )


def agreement(bins: Sequence[GapBin], first: str, second: str) -> Drawn:
    """Share of pairs that `second` orders as `first` does, by how far apart `first` puts them."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle="--")
    axes.plot([b.gap for b in bins], [b.share for b in bins], marker="o", color=COLOURS["dpo"])
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"|sample delta| by judge {first} (mean of dimensions)")
    axes.set_ylabel(f"share ordered alike by {second}")
    return _drawn(figure, (f"gap by {first}", f"share alike by {second}", "pairs"), bins)


def training_curves(runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Drawn:
    """Log-probabilities by step: run → side → (step, nats); small multiples, one per run."""
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.2 * rows), squeeze=False)
    for panel in axes.flat[len(runs) :]:
        panel.set_axis_off()
    for panel, (name, sides) in zip(axes.flat, runs.items(), strict=False):
        for side, values in sides.items():
            panel.plot(*zip(*values, strict=True), label=side, color=COLOURS[side], linewidth=1.3)
        panel.axhline(0, color="#999999", linewidth=0.8)
        panel.set_title(name, fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("nats", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("step", fontsize=8)
    return _drawn(
        figure,
        ("arm", "side", "step", "nats"),
        (
            (name, side, *point)
            for name, sides in runs.items()
            for side, values in sides.items()
            for point in values
        ),
    )
