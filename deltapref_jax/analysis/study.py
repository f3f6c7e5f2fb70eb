"""A study's tables to its numbers: everything that the page and the terminal show, as one JSON-able summary."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import statistics as st

WANTED_AUC, USELESS_AUC = 0.8, 0.65


@dataclasses.dataclass
class Study:
    """What a report is made from; every mapping is by the planner's labels without their first part."""

    experiment: dict[str, Any]  # the config as plain data
    prompts: list[dict]
    traces: Mapping[str, list[dict]]  # generator → TRACE
    verdicts: Mapping[str, list[dict]]  # generator → VERDICT
    ratings: Mapping[str, Mapping[str, list[dict]]]  # judge → generator → RATING
    audits: Mapping[str, list[dict]]  # judge → AUDIT
    pairs: Mapping[str, list[dict]]  # arm → PAIR
    results: Mapping[str, Mapping[str, pa.Table]]  # arm → seed → RESULT
    student: pa.Table | None
    capability: Mapping[str, pa.Table]  # generator → RESULT
    metrics: Mapping[str, list[dict]]  # "arm/seed" → rows of metrics.jsonl
    manifests: Mapping[str, dict]  # label → manifest


def _shape(table: pa.Table) -> dict[str, float]:
    """Truncation rate in percent and mean length in tokens: what stands beside every accuracy."""
    finish = table["finish"].to_pylist()
    return {"truncated": 100 * finish.count("length") / max(len(finish), 1),
            "tokens": float(np.mean(table["tokens"].to_numpy()))}


def _domains(study: Study) -> list[str]:
    return [d for d in ("in", "out") if any(s["domain"] == d for s in study.experiment["suites"])]


def summarise(study: Study) -> dict[str, Any]:
    """All numbers of the page."""
    summary: dict[str, Any] = {"name": study.experiment["name"], "question": study.experiment["question"],
                               "domains": _domains(study)}
    summary["generators"] = [_generator(study, name) for name in study.traces]
    if study.student is not None:
        before = {d: list(st.accuracy(study.student, d)) for d in summary["domains"]}
        summary["student"] = before | _shape(study.student)
        summary["suites"] = _suites(study)
        summary["detectable"] = st.minimum_detectable(study.student)
        changes = _changes(study, summary["domains"])
        summary["arms"] = [_arm(study, summary, changes, arm) for arm in study.experiment["arms"]
                           if arm["name"] in study.results]
        summary["trends"] = _trends(summary, changes)
        summary["contrasts"] = _contrasts(summary, changes)
    else:
        summary |= {"arms": [], "trends": [], "contrasts": [], "detectable": {}}
    summary["judges"] = [_judge(study, name) for name in study.ratings]
    summary["agreement"] = _agreement(study)
    summary["stages"] = _stages(study)
    summary["dropped"] = _dropped(study)
    return summary


def _generator(study: Study, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    traces = study.traces[name]
    found["traces"] = len(traces)
    found["train_truncated"] = 100 * sum(t["finish"] == "length" for t in traces) / max(len(traces), 1)
    found["train_tokens"] = float(np.mean([t["tokens"] for t in traces]))
    checked = [v["correct"] for v in study.verdicts.get(name, ()) if v["correct"] is not None]
    found["train_correct"] = 100 * float(np.mean(checked)) if checked else None
    if name in study.capability:
        table = study.capability[name]
        found |= {d: list(st.accuracy(table, d)) for d in _domains(study)} | _shape(table)
    return found


def _suites(study: Study) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in study.student.to_pylist():  # type: ignore[union-attr]
        rows[row["domain"], row["suite"]].append(row["correct"])
    return [{"suite": suite, "domain": domain, "student": 100 * float(np.mean(v)), "answers": len(v)}
            for (domain, suite), v in rows.items()]


def _changes(study: Study, domains: list[str]) -> dict[str, dict[str, st.Change]]:
    after = {arm: list(seeds.values()) for arm, seeds in study.results.items()}
    return {d: st.changes(study.student, after, d) for d in domains}


def _arm(study: Study, summary: dict, changes: dict, arm: dict) -> dict[str, Any]:
    name = arm["name"]
    capability = {g["name"]: g["in"][0] for g in summary["generators"] if "in" in g}
    delta = (capability[arm["chosen"]] - capability[arm["rejected"]]
             if {arm["chosen"], arm["rejected"]} <= capability.keys() else None)
    shapes = [_shape(t) for t in study.results[name].values()]
    stats = study.manifests.get(f"pair/{name}", {}).get("stats", {})
    trained = [study.manifests[label]["stats"] for label in study.manifests if label.startswith(f"train/{name}/")]
    kinds = {o["name"]: o["kind"] for o in study.experiment["objectives"]}
    found = {key: arm[key] for key in ("name", "chosen", "rejected", "direction", "keep", "by", "judge", "fraction",
                                       "stratum", "objective", "group")}
    found |= {"kind": kinds[arm["objective"]], "pairs": len(study.pairs[name]), "seeds": len(study.results[name]),
              "generator_delta": delta, "sample_delta": stats.get("sample_delta"),
              "truncated": float(np.mean([s["truncated"] for s in shapes])),
              "tokens": float(np.mean([s["tokens"] for s in shapes])),
              "steps": float(np.mean([t["steps"] for t in trained])) if trained else None}
    for d, of_arms in changes.items():
        adjusted = st.holm({a: c.p for a, c in of_arms.items()})
        found[d] = {"change": list(of_arms[name].estimate), "p": of_arms[name].p, "p_holm": adjusted[name]}
    found["falling"] = _both_fall(study, name)
    return found


def _both_fall(study: Study, name: str) -> bool:
    """Whether chosen and rejected log-probabilities both end below where they began, in every seed."""
    runs = [rows for label, rows in study.metrics.items() if label.rsplit("/", 1)[0] == name and rows]
    sides = ("logps/chosen", "logps/rejected")
    runs = [rows for rows in runs if all(side in rows[0] for side in sides)]
    return bool(runs) and all(all(np.mean([r[s] for r in rows[-3:]]) < rows[0][s] for s in sides) for rows in runs)


def _trends(summary: dict, changes: dict) -> list[dict[str, Any]]:
    """Slope of change on measured generator delta over the rungs of each objective's ladder."""
    found = []
    for objective in dict.fromkeys(a["objective"] for a in summary["arms"]):
        rungs = [a for a in summary["arms"] if a["objective"] == objective and a["group"] == "ladder"
                 and a["generator_delta"] is not None]
        for d in summary["domains"]:
            slope = st.slope([a["generator_delta"] for a in rungs], [changes[d][a["name"]] for a in rungs])
            if slope:
                found.append({"objective": objective, "domain": d, "rungs": len(rungs),
                              "per_10": [10 * v for v in slope]})
    return found


def _contrasts(summary: dict, changes: dict) -> list[dict[str, Any]]:
    """Selected pairs against as many random or length-matched ones, and against all."""
    found = []
    arms = summary["arms"]
    for a in arms:
        if a["keep"] != "top":
            continue
        for b in arms:
            same = all(a[k] == b[k] for k in ("chosen", "rejected", "objective", "stratum"))
            other = b["keep"] in ("random", "matched") and b["fraction"] == a["fraction"] or (
                b["keep"] == "all" and b["group"] == "ladder")
            if same and other:
                for d in summary["domains"]:
                    found.append({"a": a["name"], "b": b["name"], "domain": d, "kind": b["keep"],
                                  "difference": list(st.contrast(changes[d][a["name"]], changes[d][b["name"]]))})
    return found


def _sums(study: Study, judge: str) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for rows in study.ratings[judge].values():
        for row in rows:
            totals[row["trace_id"]] += row["rating"]
    return totals


def _judge(study: Study, name: str) -> dict[str, Any]:
    rows = [row for table in study.ratings[name].values() for row in table]
    by_trace: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        by_trace[row["trace_id"]][row["dimension"]] = row["rating"]
    dimensions = list(dict.fromkeys(row["dimension"] for row in rows))
    matrix = np.array([[r[d] for d in dimensions] for r in by_trace.values()])
    correct = {v["trace_id"]: v["correct"] for table in study.verdicts.values() for v in table}
    length = {t["trace_id"]: t["tokens"] for table in study.traces.values() for t in table}
    totals = _sums(study, name)
    right = [totals[t] for t in totals if correct.get(t) is True]
    wrong = [totals[t] for t in totals if correct.get(t) is False]
    halo = [st.spearman(matrix[:, i], matrix[:, j]) for i in range(len(dimensions)) for j in range(i)]
    config = next(j for j in study.experiment["judges"] if j["name"] == name)
    found: dict[str, Any] = {
        "name": name, "kind": config["kind"], "traces": len(by_trace), "dimensions": dimensions,
        "mean": {d: float(matrix[:, i].mean()) for i, d in enumerate(dimensions)},
        "mass": float(np.mean([row["mass"] for row in rows])),
        "auc_correct": st.auc(right, wrong),
        "halo": float(np.nanmean(halo)) if halo and not np.all(np.isnan(halo)) else None,
        "length": st.spearman(list(totals.values()), [length[t] for t in totals]),
    }
    if name in study.audits:
        found |= _audit(study.audits[name], dimensions)
    return found


def _audit(rows: list[dict], dimensions: list[str]) -> dict[str, Any]:
    """AUC of clean against corrupted in the corrupted dimension, and mean ratings by degree."""
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["target"] in ("", row["dimension"]):
            cells[row["dimension"], row["degree"]].append(row["rating"])
    top = max(degree for _, degree in cells)
    aucs = {d: st.auc(cells[d, 0], [v for g in range(1, top + 1) for v in cells[d, g]]) for d in dimensions}
    mean = float(np.mean(list(aucs.values())))
    return {"auc": aucs, "auc_mean": mean, "useless": [d for d, a in aucs.items() if a < USELESS_AUC],
            "curves": {d: [float(np.mean(cells[d, g])) for g in range(top + 1)] for d in dimensions}}


def _agreement(study: Study) -> dict[str, Any] | None:
    """The second judge against the first, on traces and on the pairs of the largest arm."""
    if len(study.ratings) < 2 or not study.pairs:
        return None
    first, second = list(study.ratings)[:2]
    a, b = _sums(study, first), _sums(study, second)
    shared = [t for t in a if t in b]
    pairs = max(study.pairs.values(), key=len)
    pairs = [p for p in pairs if all(p[s] in a and p[s] in b for s in ("chosen_id", "rejected_id"))]
    gap_a = [a[p["chosen_id"]] - a[p["rejected_id"]] for p in pairs]
    gap_b = [b[p["chosen_id"]] - b[p["rejected_id"]] for p in pairs]
    k = max(1, len(pairs) // 4)
    tops = [set(np.argsort([-g for g in gaps], kind="stable")[:k].tolist()) for gaps in (gap_a, gap_b)]
    return {"first": first, "second": second, "traces": len(shared),
            "spearman": st.spearman([a[t] for t in shared], [b[t] for t in shared]),
            "bins": [list(x) for x in st.agreement_by_gap(gap_a, gap_b)], "pairs": len(pairs),
            "overlap": len(tops[0] & tops[1]) / k, "overlap_chance": k / max(len(pairs), 1)}


def _stages(study: Study) -> list[dict[str, Any]]:
    """Seconds of every stage as shares of the total, tokens per second and padding where they are counted."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for manifest in {m["key"]: m for m in study.manifests.values()}.values():
        stage, stats = totals[manifest["stage"]], manifest["stats"]
        stage["artifacts"] += 1
        stage["seconds"] += manifest["seconds"]
        for name in ("tokens", "positions"):
            stage[name] += stats.get(name, 0)
    everything = sum(s["seconds"] for s in totals.values()) or 1.0
    return [{"stage": name, "artifacts": int(s["artifacts"]), "seconds": s["seconds"],
             "share": 100 * s["seconds"] / everything,
             "tokens_per_second": s["tokens"] / s["seconds"] if s["tokens"] and s["seconds"] else None,
             "padding": 100 * (1 - s["tokens"] / s["positions"]) if s["positions"] else None}
            for name, s in totals.items()]


def _dropped(study: Study) -> list[dict[str, Any]]:
    """Every count of something dropped, cut or skipped that is not 0, with where."""
    found = []
    for label, manifest in study.manifests.items():
        for name, count in manifest["stats"].items():
            if count and (name.startswith(("dropped_", "overlap_")) or name in ("empty", "duplicate", "too_long",
                                                                                "truncated", "unfinished")):
                found.append({"where": label, "what": name.replace("_", " "), "count": int(count)})
    return found
