"""The page: one self-contained HTML file that a reader who sees nothing else can understand."""

import dataclasses
import functools
import json
import math
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from rich.table import Table

from deltapref_jax.analysis import figures
from deltapref_jax.analysis.arm_words import (
    data_words,
    measure_words,
    objective_words,
    share_words,
    step_words,
    training_words,
)
from deltapref_jax.analysis.claims import RUNG_RULE
from deltapref_jax.analysis.figures import Drawn, Line, Point
from deltapref_jax.analysis.findings import (
    DOMAIN_WORDS,
    MARK,
    excluded,
    interval_words,
    mark_names,
    points,
    rung_words,
    words,
)
from deltapref_jax.analysis.judges import USELESS_AUC, USELESS_RELIABILITY
from deltapref_jax.analysis.page import ArmSummary, Summary
from deltapref_jax.analysis.pair_browser import browser, script_json
from deltapref_jax.analysis.study import Study
from deltapref_jax.analysis.suites import RULE
from deltapref_jax.analysis.summary import TWIN_BUDGETS, plain
from deltapref_jax.config import KEEPS, OBJECTIVE_KINDS, RANKED, Experiment
from deltapref_jax.display import xml_text

_CURVES_SHOWN = 32
_LINES_SHOWN = 6  # in one panel, before its judges have panels of their own

Curve = list[tuple[float, float]]  # step, nats


def _claims(s: Summary) -> Drawn | None:
    """Claims that were measured, with the band of their margins."""
    rows = [
        figures.Row(c.what, {"": c.effect.estimate}, c.claim.margin) for c in s.claims if c.effect
    ]
    return figures.forest(rows, "points; shaded: within the margin") if rows else None


def _ladder(s: Summary) -> Drawn | None:
    """Change against measured generator delta; a line per objective, SFT as single points.

    Arms beside the rungs, which no trend counts, are lines of their own where their generators
    chose all of their pairs, as controls do.
    """
    rungs = {name for ladder in s.ladders.values() for name in ladder.rungs}
    drawn = [
        (a.delta, a)
        for a in s.arms
        if a.delta is not None
        and (
            a.name in rungs
            or (a.arm.keep, a.arm.stratum, a.arm.direction) == ("all", "any", "generator")
        )
    ]
    if not drawn:
        return None
    trends = {(t.objective, t.domain): (*t.centre, t.per_10.estimate.value / 10) for t in s.trends}
    colours = figures.colours({a.arm.objective: a.kind for _, a in drawn})
    rejected = drawn[0][1].arm.rejected
    lines: dict[str, dict[tuple[str, ...], list[Point]]] = {d: {} for d in s.domains}
    for delta, a in drawn:
        differs = []
        if a.name not in rungs:
            beside = "control" if a.arm.group == "control" else "no rung"
            differs = [beside] * (a.arm.objective in s.ladders) + _way_words(a)
        over = "" if a.arm.rejected == rejected else f" over {a.arm.rejected}"
        label = a.arm.chosen + over + _mark(a)
        for d in s.domains:
            point = Point(delta, a.changes[d].estimate, label, _columns(a))
            lines[d].setdefault((a.arm.objective, *differs), []).append(point)

    def line(of: tuple[str, ...], domain: str) -> Line:
        objective, *differs = of
        alike = [other for other in lines[domain] if other[0] == objective]
        style = alike.index(of)
        return Line(
            ", ".join([objective.upper(), *differs]),
            colours[objective],
            lines[domain][of],
            None if differs else trends.get((objective, domain)),
            style,
        )

    panels = {d: [line(of, d) for of in lines[d]] for d in s.domains}
    return figures.panels({"": panels}, "generator delta, points of in-domain accuracy")


def _way_words(a: ArmSummary) -> list[str]:
    """What else than its generators, objective and selection tells how an arm is trained."""
    return [*data_words(a.arm), *step_words(a.arm), *[a.budget] * bool(a.budget)]


def _columns(a: ArmSummary) -> dict[str, object]:
    """What an arm is, for the numbers under a figure: what tells its line from others, and size."""
    return {
        "arm": a.name + _mark(a),
        "objective": a.arm.objective,
        "chosen": a.arm.chosen,
        "rejected": a.arm.rejected,
        "data": "; ".join([*data_words(a.arm), *step_words(a.arm)]),
        "keep": a.arm.keep,
        "ranked by": a.arm.by if _ranks(a) else "",
        "judge": a.pair_judge,
        "budget": a.budget,
        "pairs": "" if a.pairs is None else a.pairs,
        "seeds": a.seeds,
        "draws": a.draws,
    }


class _Panel(NamedTuple):
    """What the arms of a panel of the selection figure have in common, as words."""

    objective: str
    generators: str
    data: str
    measure: str  # what pairs are ranked by; "" where none are ranked
    judge: str  # "" where its judges are lines of one panel
    budget: str


def _selection(s: Summary) -> Drawn | None:
    """Change against the share of pairs kept: a line per selection and judge.

    What pairs are ranked by, budgets, objectives and data have panels of their own. Arms that keep
    random pairs or all pairs of the same data stand in each of them.
    """
    selected = [a for a in s.arms if a.arm.group == "selection"]
    if not selected:
        return None
    whole = [a for a in s.arms if a.arm.keep == "all" and a not in selected and not a.balanced]
    panels = _with_ranked([_panel(a) for a in selected])
    held: dict[_Panel, list[ArmSummary]] = {}
    for panel in panels:
        arms = [a for a in [*selected, *whole] if _belongs(a, panel)]
        if len({(a.arm.keep, a.pair_judge) for a in arms}) <= _LINES_SHOWN:
            held[panel] = arms
            continue
        for judge in dict.fromkeys(a.pair_judge for a in arms if _ranks(a)):
            own = [a for a in arms if not _ranks(a) or a.pair_judge == judge]
            held[panel._replace(judge=judge and f"judge {judge}")] = own
    judges = [j.name for j in s.judges]
    drawn = [a for arms in held.values() for a in arms]
    colours = figures.colours({a.arm.keep: a.arm.keep for a in drawn})
    differ = [len(set(words)) > 1 for words in zip(*held, strict=True)]
    rows = {
        ", ".join(
            text
            for field, text, differs in zip(_Panel._fields, panel, differ, strict=True)
            if text and (differs or field in ("objective", "measure"))
        ): {d: _kept_lines(arms, d, colours, judges) for d in s.domains}
        for panel, arms in held.items()
    }
    return figures.panels(rows, "pairs kept, percent of the pool")


def _ranks(a: ArmSummary) -> bool:
    """Whether the arm's selection depends on what it ranks pairs by; a function is given gaps."""
    return a.arm.keep in RANKED or a.arm.keep not in KEEPS


def _panel(a: ArmSummary) -> _Panel:
    return _Panel(
        a.arm.objective.upper(),
        f"{a.arm.chosen} over {a.arm.rejected}",
        ", ".join([*data_words(a.arm), *step_words(a.arm)]),
        measure_words(a.arm.by) if _ranks(a) else "",
        "",
        a.budget,
    )


def _with_ranked(panels: Sequence[_Panel]) -> list[_Panel]:
    """Panels, each once; one without ranked pairs only where no other shows its arms."""
    ranked = {panel._replace(measure="") for panel in panels if panel.measure}
    return [panel for panel in dict.fromkeys(panels) if panel.measure or panel not in ranked]


def _belongs(a: ArmSummary, panel: _Panel) -> bool:
    """Whether a panel shows an arm."""
    own = _panel(a)
    if not own.measure:
        own = own._replace(measure=panel.measure)
    # All pairs of a pool are seen as often, and as many steps long, as the twins of its arms.
    if a.arm.keep == "all" and not own.budget and panel.budget in TWIN_BUDGETS:
        own = own._replace(budget=panel.budget)
    return own == panel


def _kept_lines(
    arms: Sequence[ArmSummary], domain: str, colours: Mapping[str, str], judges: Sequence[str]
) -> list[Line]:
    """The lines of a panel of the selection figure, by selection and judge."""
    lines = []
    for keep, judge in dict.fromkeys((a.arm.keep, a.pair_judge) for a in arms):
        own = [a for a in arms if (a.arm.keep, a.pair_judge) == (keep, judge)]
        doubted = MARK if any(a.doubt for a in own) else ""
        judged = f", judge {judge}" if judge and len(judges) > 1 else ""
        lines.append(
            Line(
                f"{'all pairs' if keep == 'all' else keep}{judged}{doubted}",
                colours[keep],
                [Point(_share(a), a.changes[domain].estimate, "", _columns(a)) for a in own],
                style=judges.index(judge) if judge in judges else 0,
            )
        )
    return lines


def _share(a: ArmSummary) -> float:
    """Percent of the pool that an arm keeps; what a function kept is counted."""
    pool = a.waterfall.get("pool", 0)
    if a.arm.keep not in KEEPS and a.pairs is not None and pool:
        return 100 * a.pairs / pool
    if a.arm.pairs:
        return 100 * a.arm.pairs / max(a.arm.pairs, pool)
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
    e = study.experiment
    arms = [a.arm for a in summary.arms] or e.arms
    smallest = min((a.pairs for a in summary.arms if a.pairs is not None), default=None)
    chosen = {r.objective: r.chosen for r in summary.rates}
    return render_template(
        "report.html.jinja",
        drawn,
        {a.name: a.doubt for a in summary.arms if a.doubt},
        s=summary,
        shown=shown,
        pairs=script_json(shown),
        suite_rule=RULE,
        rung_rule=RUNG_RULE,
        rungs=rung_words(summary),
        training=training_words(e, arms, smallest),
        objectives=objective_words(e, arms, chosen),
        versions=study.versions,
        useless=USELESS_AUC,
        useless_reliability=USELESS_RELIABILITY,
        rubric=rubric,
        hidden_curves=max(0, len(summary.arms) - _CURVES_SHOWN),
        experiment=e,
        config=_config(e),
    )


def doubt_caption(doubted: Collection[str]) -> str:
    """What the mark says, if an arm has it."""
    return f"; {MARK}: the judge is below the bar or not measured, see the page" if doubted else ""


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
