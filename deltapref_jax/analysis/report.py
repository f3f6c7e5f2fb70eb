"""The page: one self-contained HTML file that someone who sees nothing else can understand."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table

from deltapref_jax.analysis import figures
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.study import USELESS_AUC, WANTED_AUC, Study

_PAIRS_SHOWN = 60
DOMAIN_WORDS = {"in": "in domain", "out": "out of domain"}


def points(values: list[float] | Estimate, digits: int = 1) -> str:
    """`+3.2 [+1.0, +5.4]`."""
    value, low, high = values
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _verdict(values: list[float], detectable: float | None) -> str:
    """A sentence's end for an effect in points."""
    if values[1] > 0 or values[2] < 0:
        return f"{points(values)} points"
    would = f"; an effect of {detectable:.1f} points would have been" if detectable else ""
    return f"no effect detected ({points(values)} points{would})"


def findings(s: Mapping[str, Any]) -> list[str]:
    """The page's headline, made from the numbers alone: direction, size, interval, whatever they are."""
    found = []
    for t in s["trends"]:
        per = t["per_10"]
        where = f"Under {t['objective'].upper()}, {DOMAIN_WORDS[t['domain']]}"
        if per[1] > 0 or per[2] < 0:
            found.append(f"{where}: every 10 points of generator delta changed the student's accuracy by "
                         f"{points(per, 2)} points ({t['rungs']} rungs).")
        else:
            found.append(f"{where}: no trend with generator delta was detected ({points(per, 2)} points per 10 points "
                         f"of delta, {t['rungs']} rungs).")
    arms = {a["name"]: a for a in s["arms"]}
    for c in s["contrasts"]:
        a, b = arms[c["a"]], arms[c["b"]]
        other = {"random": "as many pairs at random", "matched": "as many pairs of matched length",
                 "all": f"all {b['pairs']} pairs"}[c["kind"]]
        judge = f" by judge {a['judge']}" if a["judge"] else ""
        effect = c["difference"]
        outcome = f"{points(effect)} points" if effect[1] > 0 or effect[2] < 0 else (
            f"no difference detected ({points(effect)} points)")
        found.append(f"{a['objective'].upper()} on the {a['pairs']} pairs of largest {a['by'].replace('_', ' ')} delta"
                     f"{judge} against {other}, {DOMAIN_WORDS[c['domain']]}: {outcome}.")
    for a in s["arms"]:
        if a["kind"] == "sft":
            for d in s["domains"]:
                found.append(f"Control: SFT on the chosen traces of {a['chosen']} alone, {DOMAIN_WORDS[d]}: "
                             f"{_verdict(a[d]['change'], s['detectable'].get(d))}.")
    falling = [a["name"] for a in s["arms"] if a["falling"]]
    if falling:
        found.append(f"In {len(falling)} of {len(s['arms'])} arms both log-probabilities fell together: "
                     f"{', '.join(falling)}.")
    return found


def judge_sentence(j: Mapping[str, Any], exact: bool) -> str:
    """What this judge may be used for."""
    if "auc" not in j:
        return f"Judge {j['name']} was not audited: there is no known truth for these questions."
    if j["useless"]:
        which = ", ".join(d.replace("_", " ") for d in j["useless"])
        carried = " The exact judge carries it." if exact and j["kind"] != "exact" else ""
        return (f"Judge {j['name']} cannot carry a conclusion on {which}: its AUC against known corruption is below "
                f"{USELESS_AUC}.{carried}")
    low = [d.replace("_", " ") for d, a in j["auc"].items() if a < WANTED_AUC]
    if low:
        return f"Judge {j['name']} is usable but weak (AUC below {WANTED_AUC}) on {', '.join(low)}."
    return f"Judge {j['name']} tells corrupted from clean on every dimension (AUC of at least {WANTED_AUC})."


def _figures(study: Study, s: Mapping[str, Any]) -> dict[str, str]:
    drawn: dict[str, str] = {}
    rungs = [a for a in s["arms"] if a["group"] in ("ladder", "control") and a["generator_delta"] is not None]
    if rungs:
        drawn["ladder"] = figures.by_domain(
            {d: {o.upper(): [(a["generator_delta"], Estimate(*a[d]["change"]), a["chosen"]) for a in rungs
                             if a["objective"] == o] for o in dict.fromkeys(a["objective"] for a in rungs)}
             for d in s["domains"]},
            "generator delta, points of in-domain accuracy")
    chosen = [a for a in s["arms"] if a["group"] == "selection"]
    if chosen:
        pools = {(b["chosen"], b["rejected"], b["objective"]) for b in chosen}
        base = [a for a in s["arms"] if a["keep"] == "all" and a["group"] == "ladder"
                and (a["chosen"], a["rejected"], a["objective"]) in pools]
        lines: dict[str, list[dict]] = {}
        for a in chosen:
            judge = f", judge {a['judge']}" if a["judge"] else ""
            lines.setdefault(f"{a['keep']} ({a['objective'].upper()}{judge})", []).append(a)
        for a in base:
            lines.setdefault(f"all ({a['objective'].upper()})", []).append(a)
        drawn["selection"] = figures.by_domain(
            {d: {name: [(100 * a["fraction"] if a["keep"] != "all" else 100.0, Estimate(*a[d]["change"]), "")
                        for a in members] for name, members in lines.items()} for d in s["domains"]},
            "pairs kept (percent of the pool)", names=False)
    curves = {j["name"]: j["curves"] for j in s["judges"] if "curves" in j}
    if curves:
        drawn["audit"] = figures.degree_curves(curves)
    if s["agreement"] and s["agreement"]["bins"]:
        a = s["agreement"]
        drawn["agreement"] = figures.agreement([tuple(b) for b in a["bins"]], a["first"], a["second"])
    if study.metrics:
        drawn["training"] = figures.training_curves(study.metrics)
    return drawn


def _browser(study: Study) -> list[dict[str, Any]]:
    """Pairs for the page, spread over the arms; plain data, escaped where it is shown."""
    question = {p["prompt_id"]: json.loads(p["messages"])[-1]["content"] for p in study.prompts}
    answer = {p["prompt_id"]: p["answer"] for p in study.prompts}
    text = {t["trace_id"]: t["text"] for rows in study.traces.values() for t in rows}
    rated: dict[str, dict[str, dict[str, float]]] = {}
    for judge, tables in study.ratings.items():
        for rows in tables.values():
            for row in rows:
                rated.setdefault(row["trace_id"], {}).setdefault(judge, {})[row["dimension"]] = round(row["rating"], 2)
    shown: dict[str, dict[str, Any]] = {}
    each = max(1, _PAIRS_SHOWN // max(1, len(study.pairs)))
    for arm, pairs in study.pairs.items():
        for p in pairs[:: max(1, len(pairs) // each)][:each]:
            entry = shown.setdefault(p["pair_id"], {
                "arms": [], "question": question[p["prompt_id"]], "answer": answer[p["prompt_id"]],
                **{side: {"text": text[p[f"{side}_id"]], "model": p[f"{side}_model"], "correct": p[f"{side}_correct"],
                          "ratings": rated.get(p[f"{side}_id"], {})} for side in ("chosen", "rejected")}})
            entry["arms"].append(arm)
    return list(shown.values())


def render(study: Study, summary: Mapping[str, Any]) -> str:
    """The page as text. Everything from traces and configs is escaped; nothing is fetched from anywhere."""
    template = resources.files("deltapref_jax.analysis").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"points": points, "words": lambda name: str(name).replace("_", " ")}
    exact = any(j["kind"] == "exact" for j in summary["judges"])
    versions: dict[str, str] = next((m["versions"] for m in study.manifests.values()), {})
    # inside <script>, JSON must not be able to end the element
    embedded = json.dumps(_browser(study)).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return environment.from_string(template).render(
        s=summary, findings=findings(summary), figures=_figures(study, summary), pairs=embedded,
        judge_sentences=[judge_sentence(j, exact) for j in summary["judges"]], versions=versions,
        domain_words=DOMAIN_WORDS, config=json.dumps(study.experiment, indent=1))


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The short table that a run ends with."""
    table = Table(title=summary["question"], title_justify="left")
    table.add_column("arm")
    table.add_column("pairs", justify="right")
    for d in summary["domains"]:
        table.add_column(f"{DOMAIN_WORDS[d]}, points", justify="right")
    if "student" in summary:
        table.add_row("student before", "", *(f"{summary['student'][d][0]:.1f} %" for d in summary["domains"]))
        table.add_section()
    for a in summary["arms"]:
        table.add_row(a["name"], str(a["pairs"]), *(points(a[d]["change"]) for d in summary["domains"]))
    return table
