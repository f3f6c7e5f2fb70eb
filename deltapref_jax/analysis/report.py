"""The page: one self-contained HTML file that a reader who sees nothing else can understand."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table

from deltapref_jax.analysis import figures
from deltapref_jax.analysis.figures import Line, Point
from deltapref_jax.analysis.findings import DOMAIN_WORDS, points, words
from deltapref_jax.analysis.judges import USELESS_AUC
from deltapref_jax.analysis.page import ArmSummary, Summary
from deltapref_jax.analysis.study import Study
from deltapref_jax.analysis.summary import plain
from deltapref_jax.config import OBJECTIVE_KINDS, Experiment
from deltapref_jax.display import xml_text
from deltapref_jax.records import Pair, Prompt, from_table

_PAIRS_SHOWN = 120
_CURVES_SHOWN = 32

Curve = list[tuple[float, float]]  # step, nats


def _ladder(s: Summary) -> str | None:
    """Change against measured generator delta; a line per objective, SFT as single points."""
    rungs = [
        (a.delta, a)
        for a in s.arms
        if a.delta is not None
        and (a.arm.keep, a.arm.stratum, a.arm.direction) == ("all", "any", "generator")
    ]
    if not rungs:
        return None
    trends = {(t.objective, t.domain): (*t.centre, t.per_10.value / 10) for t in s.trends}
    objectives = dict.fromkeys((a.arm.objective, a.kind) for _, a in rungs)

    def line(objective: str, kind: str, domain: str) -> Line:
        arms = [
            Point(delta, a.changes[domain].change, a.arm.chosen)
            for delta, a in rungs
            if a.arm.objective == objective
        ]
        return Line(objective.upper(), kind, arms, trends.get((objective, domain)))

    panels = {d: [line(objective, kind, d) for objective, kind in objectives] for d in s.domains}
    return figures.panels({"": panels}, "generator delta, points of in-domain accuracy")


def _selection(s: Summary) -> str | None:
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
        ]
        selections = dict.fromkeys((a.arm.keep, a.pair_judge) for a in arms)
        rows[objective.upper()] = {
            d: [_kept_line(*selection, d, arms, everything, judges) for selection in selections]
            for d in s.domains
        }
    return figures.panels(rows, "pairs kept, percent of the pool")


def _kept_line(
    keep: str,
    judge: str,
    domain: str,
    arms: Sequence[ArmSummary],
    everything: Sequence[ArmSummary],
    judges: Sequence[str],
) -> Line:
    """Arms of one selection by one judge, with those that keep all pairs."""
    selected = [a for a in arms if (a.arm.keep, a.pair_judge) == (keep, judge)]
    shares = [(100 * a.arm.fraction, a) for a in selected] + [(100.0, a) for a in everything]
    return Line(
        f"{keep}, judge {judge}" if judge and len(judges) > 1 else keep,
        keep,
        [Point(share, a.changes[domain].change) for share, a in shares],
        dashed=bool(judge) and judge != judges[0],
    )


def _curves(study: Study, s: Summary) -> str | None:
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
            runs[a.name] = shown
    return figures.training_curves(runs) if runs else None


def _curve(metrics: Sequence[Mapping[str, float]], side: str, beta: float | None) -> Curve:
    def series(name: str) -> Curve:
        return [(row["step"], row[name]) for row in metrics if row.get(name) is not None]

    # A reward is beta times the log-probability minus the reference's.
    if beta is not None and (rewards := series(f"rewards/{side}")):
        return [(step, reward / beta) for step, reward in rewards]
    logps = series(f"logps/{side}")
    return [(step, logp - logps[0][1]) for step, logp in logps]


def draw(study: Study, s: Summary) -> dict[str, str]:
    """The page's figures as SVG, by name; those that the study has data for."""
    curves = {j.name: j.audit.curves for j in s.judges if j.audit}
    drawn = {
        "ladder": _ladder(s),
        "selection": _selection(s),
        "training": _curves(study, s),
        "audit": figures.degree_curves(curves) if curves else None,
    }
    drawn |= {
        f"agreement-{a.second}": figures.agreement(a.bins, a.first, a.second)
        for a in s.agreement
        if a.bins
    }
    return {name: svg for name, svg in drawn.items() if svg}


@dataclasses.dataclass
class _ShownTrace:
    text: str
    model: str  # generator
    correct: bool | None
    ratings: dict[str, dict[str, float]]  # judge → dimension → rating


@dataclasses.dataclass
class _ShownPair:
    """A pair for the page's script, which reads these names."""

    arms: list[str]
    question: str
    answer: str
    chosen: _ShownTrace
    rejected: _ShownTrace


def _shown_pairs(study: Study) -> list[_ShownPair]:
    """Pairs for the page, spread evenly over the arms; the script escapes what it shows."""
    prompts = {p.prompt_id: p for p in from_table(Prompt, study.prompts)}
    text = study.trace_column("text")

    def side(trace_id: str, model: str) -> _ShownTrace:
        row = study.row_of[trace_id]
        correct = study.correct[row]
        ratings = {
            judge: {
                d: round(float(r), 2)
                for d, r in zip(rated.dimensions, rated.matrix[row], strict=True)
            }
            for judge, rated in study.rated.items()
        }
        return _ShownTrace(
            text[row], model, None if math.isnan(correct) else bool(correct), ratings
        )

    shown: dict[str, _ShownPair] = {}
    per_arm = max(2, _PAIRS_SHOWN // max(1, len(study.pairs)))
    for arm, table in study.pairs.items():
        rows = range(0, table.num_rows, max(1, table.num_rows // per_arm))[:per_arm]
        for p in from_table(Pair, table.take(list(rows))):
            if p.pair_id not in shown:
                shown[p.pair_id] = _ShownPair(
                    [],
                    prompts[p.prompt_id].question,
                    prompts[p.prompt_id].answer,
                    side(p.chosen_id, p.chosen_model),
                    side(p.rejected_id, p.rejected_model),
                )
            shown[p.pair_id].arms.append(arm)
    return list(shown.values())


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


def render(
    study: Study, summary: Summary, drawn: Mapping[str, str], rubric: Mapping[str, str]
) -> str:
    """The page as text; text of traces and configs is escaped, and the page fetches nothing.

    Args:
      study: tables.
      summary: of `summary.summarise`.
      drawn: figures of `draw`.
      rubric: dimension to the question that judges answer.
    """
    template = (
        resources.files("deltapref_jax.analysis")
        .joinpath("report.html.jinja")
        .read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": points, "words": words, "number": _number}
    # Inside <script>, JSON must not be able to end the element.
    pairs = json.dumps(plain(_shown_pairs(study)))
    for character in "<>&":
        pairs = pairs.replace(character, f"\\u{ord(character):04x}")
    return environment.from_string(template).render(
        s=summary,
        figures=drawn,
        pairs=pairs,
        versions=study.versions,
        domain_words=DOMAIN_WORDS,
        useless=USELESS_AUC,
        rubric=rubric,
        hidden_curves=max(0, len(summary.arms) - _CURVES_SHOWN),
        experiment=study.experiment,
        config=_config(study.experiment),
    )


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The short table that a run ends with.

    Args:
      summary: content of `summary.json`.
    """
    domains = summary["domains"]
    table = Table(
        title=summary["question"],
        title_justify="left",
        caption="points of accuracy against the student before training, 95% intervals",
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
        table.add_row(arm["name"], str(arm["pairs"]), *(points(arm[d]["change"]) for d in domains))
    return table
