"""Figures as inline SVG with one palette; text stays text, and nothing is fetched."""

import io
import math
import re
from collections.abc import Mapping, Sequence
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


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element that fits its container's width; closes the figure."""
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
    for i, line in enumerate(lines):
        # Arms of several lines at one x stand side by side.
        shift = (i - (len(lines) - 1) / 2) * 0.012 * (width or 1.0)
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


def panels(rows: Mapping[str, Mapping[str, Sequence[Line]]], xlabel: str) -> str:
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
    return _svg(figure)


def degree_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
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
    return _svg(figure)


def agreement(bins: Sequence[GapBin], first: str, second: str) -> str:
    """Share of pairs that `second` orders as `first` does, by how far apart `first` puts them."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle="--")
    axes.plot([b.gap for b in bins], [b.share for b in bins], marker="o", color=COLOURS["dpo"])
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"|sample delta| by judge {first} (mean of dimensions)")
    axes.set_ylabel(f"share ordered alike by {second}")
    return _svg(figure)


def training_curves(runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
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
    return _svg(figure)
