"""Figures as inline SVG: one palette, text as text, nothing fetched."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from deltapref_jax.analysis.statistics import Estimate  # noqa: E402

COLOURS = {"dpo": "#1f6f8b", "dpo_norm": "#6a4c93", "kto": "#d1495b", "sft": "#8a8a8a", "top": "#1f6f8b",
           "random": "#8a8a8a", "matched": "#e09f3e", "all": "#222222", "chosen": "#1f6f8b", "rejected": "#d1495b"}
DOMAINS = {"in": "in-domain", "out": "out-of-domain"}

plt.rcParams.update({
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#999999", "axes.grid": True, "grid.color": "#eeeeee",
    "axes.axisbelow": True, "legend.frameon": False, "svg.hashsalt": "deltapref"})

Point = tuple[float, Estimate, str]  # x, change in points, label


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg \1class="figure"', text, count=1)


def _points(axes: Axes, series: Mapping[str, Sequence[Point]], names: bool) -> None:
    axes.axhline(0, color="#666666", linewidth=1)
    widest = max((abs(p[0]) for points in series.values() for p in points), default=0)
    for i, (name, points) in enumerate(series.items()):
        ordered = sorted(points, key=lambda p: p[0])
        shift = (i - (len(series) - 1) / 2) * 0.006 * widest  # series at one x stand side by side
        x = [p[0] + shift for p in ordered]
        y = [p[1].value for p in ordered]
        bars = [[p[1].value - p[1].low for p in ordered], [p[1].high - p[1].value for p in ordered]]
        kind = name.split()[0].lower()
        axes.errorbar(x, y, yerr=bars, marker="o", markersize=5, capsize=3, linewidth=1.4, label=name,
                      color=COLOURS.get(kind, "#555555"), linestyle="-" if len(x) > 1 else "none")
        if names:
            for px, (_, e, label) in zip(x, ordered, strict=True):
                axes.annotate(label, (px, e.high), textcoords="offset points", xytext=(0, 4), ha="center", fontsize=8,
                              color="#555555")


def by_domain(series: Mapping[str, Mapping[str, Sequence[Point]]], xlabel: str, names: bool = True) -> str:
    """Changes against x, one panel per domain: domain → series → points."""
    figure, axes = plt.subplots(1, len(series), figsize=(5.2 * len(series), 3.6), squeeze=False, sharey=False)
    for panel, (domain, lines) in zip(axes[0], series.items(), strict=True):
        _points(panel, lines, names)
        panel.set_title(DOMAINS[domain], loc="left", fontweight="bold")
        panel.set_xlabel(xlabel)
        panel.margins(x=0.08, y=0.15)
    axes[0][0].set_ylabel("change in accuracy (points)")
    axes[0][0].legend(loc="best", fontsize=9)
    figure.tight_layout()
    return _svg(figure)


def degree_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Mean rating of the corrupted dimension against degree: judge → dimension → ratings at degrees 0, 1, …"""
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.2), squeeze=False, sharey=True)
    palette = plt.get_cmap("viridis")
    for panel, (judge, dimensions) in zip(axes[0], curves.items(), strict=True):
        for i, (dimension, means) in enumerate(dimensions.items()):
            panel.plot(range(len(means)), means, marker="o", markersize=4, label=dimension.replace("_", " "),
                       color=palette(i / max(len(dimensions) - 1, 1) * 0.9))
        panel.set_title(f"judge: {judge}", loc="left", fontweight="bold")
        panel.set_xlabel("degree of corruption")
        panel.set_xticks(range(max(map(len, dimensions.values()))))
        panel.set_ylim(0.9, 5.1)
    axes[0][0].set_ylabel("mean rating, corrupted dimension")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return _svg(figure)


def agreement(bins: Sequence[tuple[float, float, int]], first: str, second: str) -> str:
    """Agreement of two judges on the order of a pair, by how far apart the first puts it."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle="--")
    axes.plot([b[0] for b in bins], [b[1] for b in bins], marker="o", color=COLOURS["dpo"])
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"|sample delta| by judge {first} (sum of dimensions)")
    axes.set_ylabel(f"share ordered alike by {second}")
    figure.tight_layout()
    return _svg(figure)


def training_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Both log-probabilities, relative to step 1, and the margin: small multiples, one per run."""
    columns = 4
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.3 * rows), squeeze=False)
    for panel in axes.flat[len(runs) :]:
        panel.set_axis_off()
    for panel, (name, metrics) in zip(axes.flat, runs.items(), strict=False):
        for side in ("chosen", "rejected"):
            values = [(row["step"], row[f"logps/{side}"]) for row in metrics if f"logps/{side}" in row]
            if values:
                panel.plot([step for step, _ in values], [v - values[0][1] for _, v in values], label=side,
                           color=COLOURS[side], linewidth=1.3)
        panel.axhline(0, color="#999999", linewidth=0.8)
        panel.set_title(name, fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=8)
    axes[0][0].set_ylabel("log-prob, nats\nsince step 1", fontsize=8)
    figure.tight_layout()
    return _svg(figure)
