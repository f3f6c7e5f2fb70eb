"""The page: one self-contained HTML file that someone who sees nothing else can understand."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table

from deltapref_jax.analysis import figures
from deltapref_jax.analysis.figures import Line, Point
from deltapref_jax.analysis.findings import DOMAIN_WORDS, points, words
from deltapref_jax.analysis.judges import USELESS_AUC
from deltapref_jax.analysis.study import Study
from deltapref_jax.config import OBJECTIVE_KINDS

_PAIRS_SHOWN = 120
_CURVES_SHOWN = 32


def _ladder(s: Mapping[str, Any]) -> str | None:
    """Change against measured generator delta; a line per objective, SFT as single points."""
    rungs = [
        a
        for a in s["arms"]
        if a["generator_delta"]
        and "in" in a["generator_delta"]
        and a["keep"] == "all"
        and a["stratum"] == "any"
        and a["direction"] == "generator"
    ]
    if not rungs:
        return None
    trend = {
        (t["objective"], t["domain"]): (*t["centre"], t["per_10"][0] / 10) for t in s["trends"]
    }
    return figures.panels(
        {
            "": {
                d: [
                    Line(
                        objective.upper(),
                        kind,
                        [
                            Point(a["generator_delta"]["in"][0], a[d]["change"], a["chosen"])
                            for a in rungs
                            if a["objective"] == objective
                        ],
                        trend.get((objective, d)),
                    )
                    for objective, kind in dict.fromkeys((a["objective"], a["kind"]) for a in rungs)
                ]
                for d in s["domains"]
            }
        },
        "generator delta, points of in-domain accuracy",
    )


def _selection(s: Mapping[str, Any]) -> str | None:
    """Change against the fraction kept; a row per objective, a line per way of keeping, all pairs at 100%."""
    chosen = [a for a in s["arms"] if a["group"] == "selection"]
    if not chosen:
        return None
    rows: dict[str, dict[str, list[Line]]] = {}
    judges = [j["name"] for j in s["judges"]]
    for objective in dict.fromkeys(a["objective"] for a in chosen):
        here = [a for a in chosen if a["objective"] == objective]
        everything = [
            a
            for a in s["arms"]
            if a["keep"] == "all"
            and a["group"] == "ladder"
            and any(all(a[k] == b[k] for k in ("chosen", "rejected", "objective")) for b in here)
        ]
        ways = dict.fromkeys((a["keep"], a["rater"]) for a in here)
        rows[objective.upper()] = {
            d: [
                Line(
                    f"{keep}, judge {rater}" if rater and len(judges) > 1 else keep,
                    keep,
                    [
                        Point(100 * a["fraction"], a[d]["change"])
                        for a in here
                        if (a["keep"], a["rater"]) == (keep, rater)
                    ]
                    + [Point(100, a[d]["change"]) for a in everything],
                    dashed=bool(rater) and rater != judges[0],
                )
                for keep, rater in ways
            ]
            for d in s["domains"]
        }
    return figures.panels(rows, "pairs kept, percent of the pool")


def _curves(study: Study, s: Mapping[str, Any]) -> str | None:
    """First seeds: log-probabilities minus the reference's; where there is none, since the first step (SFT, SimPO)."""
    runs: dict[str, dict[str, list[tuple[int, float]]]] = {}
    betas = {
        o["name"]: o["beta"]
        for o in study.experiment["objectives"]
        if OBJECTIVE_KINDS[o["kind"]].reference
    }
    for a in s["arms"][:_CURVES_SHOWN]:
        metrics = next(
            (rows for label, rows in study.metrics.items() if label.rsplit("/", 1)[0] == a["name"]),
            [],
        )
        sides: dict[str, list[tuple[int, float]]] = {}
        for side in ("chosen", "rejected"):
            values = [
                (row["step"], row[f"rewards/{side}"] / betas[a["objective"]])
                for row in metrics
                if a["objective"] in betas and row.get(f"rewards/{side}") is not None
            ]
            raw = [
                (row["step"], row[f"logps/{side}"])
                for row in metrics
                if row.get(f"logps/{side}") is not None
            ]
            if values := values or [(step, v - raw[0][1]) for step, v in raw]:
                sides[side] = values
        if sides:
            runs[a["name"]] = sides
    return figures.training_curves(runs) if runs else None


def draw(study: Study, s: Mapping[str, Any]) -> dict[str, str]:
    """The page's figures as SVG, by name; those that the study has data for."""
    curves = {j["name"]: j["curves"] for j in s["judges"] if "curves" in j}
    drawn = {
        "ladder": _ladder(s),
        "selection": _selection(s),
        "training": _curves(study, s),
        "audit": figures.degree_curves(curves) if curves else None,
    }
    drawn |= {
        f"agreement-{a['second']}": figures.agreement(a["bins"], a["first"], a["second"])
        for a in s["agreement"]
        if a["bins"]
    }
    return {name: svg for name, svg in drawn.items() if svg}


def _browser(study: Study) -> list[dict[str, Any]]:
    """Pairs for the page, spread over the arms; plain data, escaped where it is shown."""
    asked = {
        p["prompt_id"]: (json.loads(p["messages"])[-1]["content"], p["answer"])
        for p in study.prompts.select(["prompt_id", "messages", "answer"]).to_pylist()
    }
    text = study.column("text")

    def side(trace_id: str, model: str) -> dict[str, Any]:
        row = study.place[trace_id]
        correct = study.correct[row]
        rated = {
            judge: {
                d: None if r != r else round(float(r), 2)
                for d, r in zip(of.dimensions, of.matrix[row], strict=True)
            }
            for judge, of in study.rated.items()
        }
        return {
            "text": text[row],
            "model": model,
            "correct": None if correct != correct else bool(correct),
            "ratings": rated,
        }

    shown: dict[str, dict[str, Any]] = {}
    each = max(2, _PAIRS_SHOWN // max(1, len(study.pairs)))
    for arm, pairs in study.pairs.items():
        for p in pairs.to_pylist()[:: max(1, pairs.num_rows // each)][:each]:
            question, answer = asked[p["prompt_id"]]
            entry = shown.setdefault(
                p["pair_id"],
                {
                    "arms": [],
                    "question": question,
                    "answer": answer,
                    "chosen": side(p["chosen_id"], p["chosen_model"]),
                    "rejected": side(p["rejected_id"], p["rejected_model"]),
                },
            )
            entry["arms"].append(arm)
    return list(shown.values())


def render(
    study: Study, summary: Mapping[str, Any], drawn: Mapping[str, str], rubric: Mapping[str, str]
) -> str:
    """The page as text; what traces and configs say is escaped, and nothing is fetched.

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
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": points, "words": words}
    versions: dict[str, str] = {}
    for manifest in study.manifests.values():
        versions |= manifest["versions"]
    # inside <script>, JSON must not be able to end the element
    embedded = (
        json.dumps(_browser(study))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )
    return environment.from_string(template).render(
        s=summary,
        figures=drawn,
        pairs=embedded,
        versions=versions,
        domain_words=DOMAIN_WORDS,
        useless=USELESS_AUC,
        rubric=rubric,
        hidden_curves=max(0, len(summary["arms"]) - _CURVES_SHOWN),
        experiment=study.experiment,
        config=json.dumps(study.experiment, indent=1),
    )


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The short table that a run ends with."""
    table = Table(
        title=summary["question"],
        title_justify="left",
        caption="points of accuracy against the student before training, 95% intervals",
        caption_justify="left",
    )
    table.add_column("arm", overflow="fold")
    table.add_column("pairs", justify="right")
    for d in summary["domains"]:
        table.add_column(DOMAIN_WORDS[d], justify="right", no_wrap=True)
    if summary["student"]:
        table.add_row(
            "student before", "", *(f"{summary['student'][d][0]:.1f}%" for d in summary["domains"])
        )
        table.add_section()
    for a in summary["arms"]:
        table.add_row(
            a["name"], str(a["pairs"]), *(points(a[d]["change"]) for d in summary["domains"])
        )
    return table
