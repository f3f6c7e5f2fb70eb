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
    "bottom": "#d1495b",
    "middle": "#6a4c93",
    "random": "#8a8a8a",
    "matched": "#e09f3e",
    "all": "#1c2430",
    "chosen": "#1f6f8b",
    "rejected": "#d1495b",
}
# In turn, of what has no colour of its own.
_SEVERAL = ("#1f6f8b", "#d1495b", "#e09f3e", "#6a4c93", "#2a7d46", "#8a8a8a", "#b5651d", "#d16ba5")
_MARKERS = "oDsv^P"
_DASHES = ("-", "--", ":", "-.")
_ACROSS = 4  # parts of a figure beside each other, in its file
_TITLE = 62  # characters of a panel's title in one line
_LEGEND = 56  # likewise of its legend, whose every entry has a sample of eight more

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
    columns: Mapping[str, object] = {}  # what the arm is, for the CSV; alike in all of a figure


class Line(NamedTuple):
    """Arms that belong together."""

    name: str
    colour: str  # of `colours`
    points: Sequence[Point]
    # x and y of the trend's centre, and its slope; without a trend the points are joined.
    trend: tuple[float, float, float] | None = None
    style: int = 0  # marker and dashes of lines of one colour


def colours(wanted: Mapping[str, str]) -> dict[str, str]:
    """A colour for every name: that of its key in `COLOURS` if it is free, or another.

    Args:
      wanted: name → what may be a key of `COLOURS`.
    """
    found: dict[str, str] = {}
    for name, key in wanted.items():
        if key in COLOURS and COLOURS[key] not in found.values():
            found[name] = COLOURS[key]
    for i, name in enumerate(name for name in wanted if name not in found):
        free = [colour for colour in _SEVERAL if colour not in found.values()]
        found[name] = free[0] if free else _SEVERAL[i % len(_SEVERAL)]
    return found


class Drawn(NamedTuple):
    """A figure, and the numbers in it."""

    parts: Sequence[str]  # <svg> elements, which a page sets beside or below each other as they fit
    csv: str  # a header and a row per drawn point

    @property
    def svg(self) -> str:
        """One <svg> element, with the parts beside each other."""
        if len(self.parts) == 1:
            return self.parts[0]
        placed, across, top = [], 0.0, 0.0
        for i in range(0, len(self.parts), _ACROSS):
            left, height = 0.0, 0.0
            for part in self.parts[i : i + _ACROSS]:
                w, h = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', part)[0])
                at = f'<svg x="{left:.6g}" y="{top:.6g}" width="{w:.6g}" height="{h:.6g}" '
                placed.append(part.replace("<svg ", at, 1))
                left, height = left + w, max(height, h)
            across, top = max(across, left), top + height
        inside = "\n".join(placed)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:.6g} {top:.6g}">'
        return f"{head}\n{inside}</svg>\n"


def _drawn(
    figures: Sequence[Figure], header: Sequence[str], rows: Iterable[Sequence[object]]
) -> Drawn:
    """The figures, as parts of one, with their numbers; closes them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return Drawn([_svg(figure) for figure in figures], xml_text(text.getvalue()))


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
    # A page makes it smaller by a third before it sets it below another, and never larger.
    width = float(re.findall(r'<svg [^>]*?width="([^"]*)pt"', text)[0])
    style = f'class="figure" style="max-width:{width:.4g}pt;flex-basis:{width / 1.5:.4g}pt"'
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf"<svg \1{style}", text, count=1)


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
        joined = line.trend is None and len(points) > 1
        axes.errorbar(
            x,
            y,
            yerr=bars,
            marker=_MARKERS[line.style % len(_MARKERS)],
            markersize=5,
            capsize=3,
            linewidth=1.4,
            label=line.name,
            color=line.colour,
            linestyle=_DASHES[line.style % len(_DASHES)] if joined else "none",
        )
        if line.trend:
            centre, height, slope = line.trend
            ends = (min(xs), max(xs))
            axes.plot(
                ends,
                [height + slope * (end - centre) for end in ends],
                color=line.colour,
                linewidth=1.2,
                alpha=0.5,
            )
    everything = [p for line in lines for p in line.points]
    for label, at in dict.fromkeys((p.label, p.x) for p in everything if p.label):
        axes.annotate(
            label,
            (at, max(p.y.high for p in everything if (p.label, p.x) == (label, at))),
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
        [figure],
        ("claim", *["student"] * several, "estimate", "low", "high", "margin"),
        (
            (row.name, *[student] * several, *e, row.margin)
            for row in rows
            for student, e in row.estimates.items()
        ),
    )


def panels(rows: Mapping[str, Mapping[str, Sequence[Line]]], xlabel: str) -> Drawn:
    """Changes against x: a part per domain, in which every key of `rows` has a panel.

    The panels of a part have one scale, so that what is drawn in several can be compared.
    """
    figures = []
    for domain in next(iter(rows.values())):
        height = 3.5 if len(rows) == 1 else 2.9 * len(rows)
        figure, grid = plt.subplots(
            len(rows), figsize=(5.4, height), squeeze=False, sharex=True, sharey=True
        )
        for (axes,), (name, domains) in zip(grid, rows.items(), strict=True):
            lines = domains[domain]
            _lines(axes, lines)
            longest = max(len(line.name) for line in lines)
            legend = axes.legend(
                fontsize=9,
                loc="lower left",
                bbox_to_anchor=(0.0, 1.0),
                ncols=max(1, _LEGEND // (longest + 8)),
                borderaxespad=0.2,
                borderpad=0.0,
                columnspacing=1.2,
                handletextpad=0.5,
            )
            # The title stands above the legend, however many lines that has.
            above = legend.get_window_extent().height * 72 / figure.dpi + 6
            title = f"{name}, {DOMAIN_WORDS[domain]}" if name else DOMAIN_WORDS[domain]
            axes.set_title(
                textwrap.fill(xml_text(title), _TITLE),
                loc="left",
                fontweight="bold",
                pad=above,
            )
            axes.margins(x=0.08, y=0.15)
            axes.tick_params(labelbottom=True)
            axes.set_ylabel("change in accuracy (points)")
        grid[-1][0].set_xlabel(xlabel)
        figures.append(figure)
    drawn = [
        (name, domain, line.name, p)
        for name, domains in rows.items()
        for domain, lines in domains.items()
        for line in lines
        for p in line.points
    ]
    columns = next((tuple(p.columns) for *_, p in drawn), ())
    return _drawn(
        figures,
        ("panel", "domain", "line", *columns, xlabel, "change in points", "low", "high"),
        ((*where, *p.columns.values(), p.x, *p.y) for *where, p in drawn),
    )


def degree_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Drawn:
    """Mean rating of the corrupted dimension against the degree of corruption, a part per judge.

    Args:
      curves: judge → dimension → ratings at degrees 0, 1, …; points of NaN are left out.
    """
    figures = []
    palette = plt.get_cmap("viridis")
    # A dimension has one colour, also where another judge rates fewer of them.
    every = list(dict.fromkeys(d for dimensions in curves.values() for d in dimensions))
    for judge, dimensions in curves.items():
        figure, axes = plt.subplots(figsize=(4.6, 3.2))
        for dimension, means in dimensions.items():
            shown = [(degree, mean) for degree, mean in enumerate(means) if not math.isnan(mean)]
            axes.plot(
                *zip(*shown, strict=True),
                marker="o",
                markersize=4,
                label=dimension.replace("_", " "),
                color=palette(every.index(dimension) / max(len(every) - 1, 1) * 0.9),
            )
        axes.set_title(f"judge: {judge}", loc="left", fontweight="bold")
        axes.set_xlabel("degree of corruption")
        axes.set_xticks(range(max(map(len, dimensions.values()))))
        axes.set_ylim(0.9, 5.1)
        axes.set_ylabel("mean rating, corrupted dimension")
        axes.legend(fontsize=8, loc="lower left")
        figures.append(figure)
    return _drawn(
        figures,
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
    return _drawn([figure], (f"gap by {first}", f"share alike by {second}", "pairs"), bins)


def training_curves(runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Drawn:
    """Log-probabilities by step: run → side → (step, nats); small multiples, a part per run."""
    figures = []
    for name, sides in runs.items():
        figure, axes = plt.subplots(figsize=(3.1, 2.2))
        for side, values in sides.items():
            axes.plot(*zip(*values, strict=True), label=side, color=COLOURS[side], linewidth=1.3)
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_title(textwrap.fill(xml_text(name), 38), fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.set_ylabel("nats", fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        figures.append(figure)
    figures[0].axes[0].legend(fontsize=8)
    return _drawn(
        figures,
        ("arm", "side", "step", "nats"),
        (
            (name, side, *point)
            for name, sides in runs.items()
            for side, values in sides.items()
            for point in values
        ),
    )
