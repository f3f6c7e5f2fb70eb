"""The page: one self-contained HTML file that a reader who sees nothing else can understand."""

import dataclasses
import functools
import json
import math
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table

from deltapref_jax.analysis import figures
from deltapref_jax.analysis.arm_words import measure_words, share_words
from deltapref_jax.analysis.claims import RUNG_RULE
from deltapref_jax.analysis.figures import Drawn, Line, Point
from deltapref_jax.analysis.findings import (
    DOMAIN_WORDS,
    MARK,
    excluded,
    interval_words,
    mark_names,
    points,
    words,
)
from deltapref_jax.analysis.judges import USELESS_AUC, USELESS_RELIABILITY
from deltapref_jax.analysis.page import ArmSummary, Summary
from deltapref_jax.analysis.pair_browser import browser, script_json
from deltapref_jax.analysis.study import Study
from deltapref_jax.analysis.suites import RULE
from deltapref_jax.analysis.summary import plain
from deltapref_jax.config import OBJECTIVE_KINDS, RANKED, REFERENCE_MARGIN, Experiment
from deltapref_jax.display import xml_text

_CURVES_SHOWN = 32

Curve = list[tuple[float, float]]  # step, nats


def _claims(s: Summary) -> Drawn | None:
    """Claims that were measured, with the band of their margins."""
    rows = [
        figures.Row(c.what, {"": c.effect.estimate}, c.claim.margin) for c in s.claims if c.effect
    ]
    return figures.forest(rows, "points; shaded: within the margin") if rows else None


def _ladder(s: Summary) -> Drawn | None:
    """Change against measured generator delta; a line per objective, SFT as single points."""
    rungs = [
        (a.delta, a)
        for a in s.arms
        if a.delta is not None
        and (a.arm.keep, a.arm.stratum, a.arm.direction) == ("all", "any", "generator")
    ]
    if not rungs:
        return None
    trends = {(t.objective, t.domain): (*t.centre, t.per_10.estimate.value / 10) for t in s.trends}
    objectives = dict.fromkeys((a.arm.objective, a.kind) for _, a in rungs)

    def line(objective: str, kind: str, domain: str) -> Line:
        arms = [
            Point(delta, a.changes[domain].estimate, a.arm.chosen + _mark(a))
            for delta, a in rungs
            if a.arm.objective == objective
        ]
        return Line(objective.upper(), kind, arms, trends.get((objective, domain)))

    panels = {d: [line(objective, kind, d) for objective, kind in objectives] for d in s.domains}
    return figures.panels({"": panels}, "generator delta, points of in-domain accuracy")


def _selection(s: Summary) -> Drawn | None:
    """Change against the share of pairs kept: a row of panels per objective, a line per selection.

    Arms that keep all pairs of the same generators are the points at 100%.
    """
    selected = [a for a in s.arms if a.arm.group == "selection"]
    if not selected:
        return None
    judges = [j.name for j in s.judges]
    rows = {}
    for objective in dict.fromkeys(a.arm.objective for a in selected):
        arms = [a for a in selected if a.arm.objective == objective]
        generators = {(a.arm.chosen, a.arm.rejected) for a in arms}
        everything = [
            a
            for a in s.arms
            if (a.arm.keep, a.arm.group, a.arm.objective) == ("all", "ladder", objective)
            and (a.arm.chosen, a.arm.rejected) in generators
            and not a.balanced
        ]
        selections = dict.fromkeys(map(_selection_of, arms))
        rows[objective.upper()] = {
            d: [_kept_line(selection, d, arms, everything, judges) for selection in selections]
            for d in s.domains
        }
    return figures.panels(rows, "pairs kept, percent of the pool")


def _selection_of(a: ArmSummary) -> tuple[str, str, str, str]:
    """How an arm keeps pairs: its `keep`, judge, measure where no judge ranks them, and budget."""
    by_margin = a.arm.keep in RANKED and a.arm.by == REFERENCE_MARGIN
    return a.arm.keep, a.pair_judge, measure_words(a.arm.by) if by_margin else "", a.budget


def _kept_line(
    selection: tuple[str, str, str, str],
    domain: str,
    arms: Sequence[ArmSummary],
    everything: Sequence[ArmSummary],
    judges: Sequence[str],
) -> Line:
    """Arms of one selection (`_selection_of`), with those that keep all pairs."""
    keep, judge, measure, budget = selection
    selected = [a for a in arms if _selection_of(a) == selection]
    shares = [(_share(a), a) for a in selected] + [(100.0, a) for a in everything]
    judged = f"judge {judge}" if judge and len(judges) > 1 else ""
    doubted = MARK if any(a.doubt for a in selected) else ""
    return Line(
        ", ".join(text for text in (keep, measure, judged, budget) if text) + doubted,
        keep,
        [Point(share, a.changes[domain].estimate) for share, a in shares],
        dashed=bool(judge) and judge != judges[0],
    )


def _share(a: ArmSummary) -> float:
    """Percent of the pool that an arm keeps."""
    if a.arm.pairs:
        return 100 * a.arm.pairs / max(a.arm.pairs, a.waterfall.get("pool", 0))
    return 100 * a.arm.fraction


def _curves(study: Study, s: Summary) -> Drawn | None:
    """Log-probabilities of chosen and rejected traces while the first seed of every arm trains.

    They are relative to the reference's; without one (SFT, SimPO), to those at the first step.
    """
    betas = {
        o.name: o.beta for o in study.experiment.objectives if OBJECTIVE_KINDS[o.kind].reference
    }
    runs = {}
    for a in s.arms[:_CURVES_SHOWN]:
        metrics = next(iter(study.metrics.get(a.name, {}).values()), [])
        sides = {
            side: _curve(metrics, side, betas.get(a.arm.objective))
            for side in ("chosen", "rejected")
        }
        if shown := {side: curve for side, curve in sides.items() if curve}:
            runs[a.name + _mark(a)] = shown
    return figures.training_curves(runs) if runs else None


def _curve(metrics: Sequence[Mapping[str, float]], side: str, beta: float | None) -> Curve:
    def series(name: str) -> Curve:
        return [(row["step"], row[name]) for row in metrics if row.get(name) is not None]

    # A reward is beta times the log-probability minus the reference's.
    if beta is not None and (rewards := series(f"rewards/{side}")):
        return [(step, reward / beta) for step, reward in rewards]
    logps = series(f"logps/{side}")
    return [(step, logp - logps[0][1]) for step, logp in logps]


def _mark(arm: ArmSummary) -> str:
    return MARK if arm.doubt else ""


def draw(study: Study, s: Summary) -> dict[str, Drawn]:
    """The page's figures, by name; those that the study has data for."""
    curves = {j.name: j.audit.curves for j in s.judges if j.audit}
    edited = {j.name: j.edited.curves for j in s.judges if j.edited}
    drawn = {
        "claims": _claims(s),
        "ladder": _ladder(s),
        "selection": _selection(s),
        "training": _curves(study, s),
        "audit": figures.degree_curves(curves) if curves else None,
        "audit-traces": figures.degree_curves(edited) if edited else None,
    }
    drawn |= {
        f"agreement-{a.second}": figures.agreement(a.bins, a.first, a.second)
        for a in s.agreement
        if a.bins
    }
    return {name: figure for name, figure in drawn.items() if figure}


def _template(name: str) -> str:
    """Text of a template of this package."""
    return resources.files("deltapref_jax.analysis").joinpath(name).read_text(encoding="utf-8")


def _csv_link(text: str) -> str:
    """A CSV file inside of a link, so that the page stays one file."""
    return "data:text/csv;charset=utf-8," + urllib.parse.quote(text)


def _number(value: float | None, form: str) -> str:
    """A template filter: a number formatted, "" where it is None or NaN."""
    return "" if value is None or math.isnan(value) else format(value, form)


def _shown(value: Any) -> Any:
    """What stands for a value on the page: text without what HTML and XML do not allow."""
    return type(value)(xml_text(value)) if isinstance(value, str) else value


def _config(experiment: Experiment) -> str:
    """The config as JSON, without where the run kept its files and who was shown its metrics."""
    hashed = [f.name for f in dataclasses.fields(experiment) if f.metadata.get("hashed", True)]
    return json.dumps({name: plain(getattr(experiment, name)) for name in hashed}, indent=1)


def render_template(
    name: str, drawn: Mapping[str, Drawn], doubts: Mapping[str, str], **shown: Any
) -> str:
    """A page of this package as text.

    Args:
      name: of its template.
      drawn: figures, by name.
      doubts: by arm that its filter `marked` marks, why; templates read it as reason → arms.
      **shown: what the template reads besides.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": points, "words": words, "number": _number}
    environment.filters |= {"excluded": excluded, "interval_words": interval_words}
    environment.filters["share"] = share_words
    environment.filters["marked"] = functools.partial(mark_names, doubted=doubts)
    by_reason: dict[str, list[str]] = {}
    for arm, why in doubts.items():
        by_reason.setdefault(why, []).append(arm)
    return environment.get_template(name).render(
        figures=drawn,
        csv_links={name: _csv_link(figure.csv) for name, figure in drawn.items()},
        domain_words=DOMAIN_WORDS,
        doubts=by_reason,
        **shown,
    )


def render(
    study: Study, summary: Summary, drawn: Mapping[str, Drawn], rubric: Mapping[str, str]
) -> str:
    """The page as text; text of traces and configs is escaped, and the page fetches nothing.

    Args:
      study: tables.
      summary: of `summary.summarise`.
      drawn: figures of `draw`.
      rubric: dimension to the question that judges answer.
    """
    shown = browser(study, {a.name: a.name + _mark(a) for a in summary.arms})
    return render_template(
        "report.html.jinja",
        drawn,
        {a.name: a.doubt for a in summary.arms if a.doubt},
        s=summary,
        shown=shown,
        pairs=script_json(shown),
        suite_rule=RULE,
        rung_rule=RUNG_RULE,
        versions=study.versions,
        useless=USELESS_AUC,
        useless_reliability=USELESS_RELIABILITY,
        rubric=rubric,
        hidden_curves=max(0, len(summary.arms) - _CURVES_SHOWN),
        experiment=study.experiment,
        config=_config(study.experiment),
    )


def doubt_caption(doubted: Collection[str]) -> str:
    """What the mark says, if an arm has it."""
    return f"; {MARK}: the judge is below the bar, see the page" if doubted else ""


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The short table that a run ends with.

    Args:
      summary: content of `summary.json`.
    """
    domains = summary["domains"]
    doubted = [arm["name"] for arm in summary["arms"] if arm["doubt"]]
    table = Table(
        title=summary["question"],
        title_justify="left",
        caption="points of accuracy against the student before training, 95% intervals"
        + doubt_caption(doubted),
        caption_justify="left",
    )
    table.add_column("arm", overflow="fold")
    table.add_column("pairs", justify="right")
    for d in domains:
        table.add_column(DOMAIN_WORDS[d], justify="right", no_wrap=True)
    if student := summary["student"]:
        table.add_row("student before", "", *(f"{student[d][0]:.1f}%" for d in domains))
        table.add_section()
    for arm in summary["arms"]:
        table.add_row(
            mark_names(arm["name"], doubted),
            str(arm["pairs"]),
            *(points(arm[d]["estimate"]) for d in domains),
        )
    return table
