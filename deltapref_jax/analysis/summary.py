"""A study's tables to its numbers: everything that the page and the terminal show, as one JSON-able summary."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import judges
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.findings import findings, judge_sentence
from deltapref_jax.analysis.study import Study
from deltapref_jax.config import OBJECTIVE_KINDS

_ARM_FIELDS = (
    "name",
    "chosen",
    "rejected",
    "direction",
    "keep",
    "by",
    "judge",
    "fraction",
    "stratum",
    "objective",
    "group",
)
Changes = Mapping[str, Mapping[str, st.Change]]  # domain → arm → change


def summarise(study: Study) -> dict[str, Any]:
    """All numbers of the page, and its sentences. What a study lacks is an empty list, or None."""
    e = study.experiment
    s: dict[str, Any] = {
        "name": e["name"],
        "question": e["question"],
        "domains": study.domains,
        "student": None,
        "suites": [],
        "detectable": {},
        "arms": [],
        "trends": [],
        "contrasts": [],
        "survival": [],
        "controls": [],
    }
    s["generators"] = [_generator(study, name) for name in study.traces]
    if study.student is not None:
        seeds = min((len(runs) for runs in study.results.values()), default=1)
        s["student"] = {d: list(st.accuracy(study.student, d)) for d in study.domains} | _shape(
            study.student
        )
        s["suites"] = _suites(study)
        s["detectable"] = st.minimum_detectable(study.student, seeds)
        s["detectable_seeds"] = seeds
        after = {arm: list(runs.values()) for arm, runs in study.results.items()}
        changes = {d: st.changes(study.student, after, d) for d in study.domains}
        s["arms"] = [_arm(study, changes, arm) for arm in e["arms"] if arm["name"] in study.results]
        s["trends"] = _trends(s, changes)
        s["contrasts"] = _contrasts(s, changes)
        s["survival"] = _survival(study, s, changes)
        s["controls"] = _controls(s, changes)
    s["judges"] = [judges.describe(study, name) for name in study.rated]
    s["agreement"] = judges.agreement(study)
    s["stages"] = _stages(study)
    s["dropped"] = _dropped(study)
    exact = any(j["kind"] == "exact" for j in s["judges"])
    s["judge_sentences"] = [judge_sentence(j, exact) for j in s["judges"]]
    s["findings"] = findings(s)
    return _plain(s)


def _plain(value: Any) -> Any:
    """JSON has no NaN: an undefined number is null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shape(table: pa.Table) -> dict[str, float]:
    """Truncation rate in percent and mean length in tokens: what stands beside every accuracy."""
    finish = table["finish"].to_pylist()
    return {
        "truncated": 100 * finish.count("length") / max(len(finish), 1),
        "tokens": float(np.mean(table["tokens"].to_numpy())) if finish else math.nan,
    }


def _generator(study: Study, name: str) -> dict[str, Any]:
    shape = _shape(study.traces[name])
    verdicts = study.verdicts[name]["correct"].to_pylist() if name in study.verdicts else []
    correct = [c for c in verdicts if c is not None]
    about = next((g["about"] for g in study.experiment["generators"] if g["name"] == name), "")
    found: dict[str, Any] = {
        "name": name,
        "about": about,
        "traces": study.traces[name].num_rows,
        "train_truncated": shape["truncated"],
        "train_tokens": shape["tokens"],
        "train_correct": 100 * float(np.mean(correct)) if correct else None,
    }
    if name in study.capability:
        table = study.capability[name]
        found |= {d: list(st.accuracy(table, d)) for d in study.domains} | _shape(table)
    return found


def _suites(study: Study) -> list[dict[str, Any]]:
    """Accuracy in percent of the student and of every generator, by suite."""
    assert study.student is not None
    tables = {"student": study.student} | dict(study.capability)
    found = []
    for d in study.domains:
        by_model = {name: st.by_question(table, d) for name, table in tables.items()}
        for suite, answers in by_model["student"].items():
            asked = study.suites[suite]["messages"] if suite in study.suites else []
            example = json.loads(asked[0].as_py())[-1]["content"] if len(asked) else ""
            found.append(
                {
                    "suite": suite,
                    "domain": d,
                    "questions": len(answers.questions),
                    "example": example,
                    "samples": int(answers.samples.max()),
                    "accuracy": {
                        name: 100 * float(of[suite].mean.mean())
                        for name, of in by_model.items()
                        if suite in of
                    },
                }
            )
    return found


def _arm(study: Study, changes: Changes, arm: dict) -> dict[str, Any]:
    name = arm["name"]
    objective = next(o for o in study.experiment["objectives"] if o["name"] == arm["objective"])
    shapes = [_shape(t) for t in study.results[name].values()]
    stats = study.stats(f"pair/{name}")
    found = {key: arm[key] for key in _ARM_FIELDS}
    found |= {
        "kind": objective["kind"],
        "seeds": len(study.results[name]),
        "rater": _rater(study, arm),
        "generator_delta": _generator_delta(study, arm),
        "sample_delta": _sample_delta(study, name),
        "pairs": study.pairs[name].num_rows if name in study.pairs else None,
        "strata": _strata(study, name),
        "waterfall": {
            k: int(stats[k])
            for k in (
                "prompts",
                "dropped_unfinished",
                "dropped_identical",
                "dropped_tie",
                "dropped_stratum",
                "pool",
                "kept",
            )
            if k in stats
        },
        "chosen_tokens": stats.get("chosen_tokens"),
        "rejected_tokens": stats.get("rejected_tokens"),
        "truncated": float(np.mean([s["truncated"] for s in shapes])),
        "tokens": float(np.mean([s["tokens"] for s in shapes])),
        "training": _training(
            study, name, objective["beta"] if OBJECTIVE_KINDS[objective["kind"]].reference else 0.0
        ),
    }
    for d, of_arms in changes.items():
        p = {a: c.p for a, c in of_arms.items()}
        found[d] = {
            "change": list(of_arms[name].estimate),
            "p": p[name],
            "p_holm": st.holm(p)[name],
            "p_bh": st.benjamini_hochberg(p)[name],
        }
    return found


def _rater(study: Study, arm: dict) -> str:
    """The judge whose ratings shaped the arm's pairs; "" if none did."""
    if arm["direction"] != "generator":
        return arm["direction"]
    if arm["keep"] in ("top", "matched"):
        return arm["judge"] or next((j["name"] for j in study.experiment["judges"]), "")
    return ""


def _generator_delta(study: Study, arm: dict) -> dict[str, list[float]] | None:
    """Measured accuracy of the chosen traces' author minus that of the rejected ones', by domain, with interval."""
    chosen, rejected = arm["chosen"], arm["rejected"]
    if not {chosen, rejected} <= study.capability.keys():
        return None
    if chosen == rejected:
        return {d: [0.0, 0.0, 0.0] for d in study.domains}
    return {
        d: list(
            st.changes(study.capability[rejected], {chosen: [study.capability[chosen]]}, d)[
                chosen
            ].estimate
        )
        for d in study.domains
    }


def _sample_delta(study: Study, name: str) -> dict[str, float]:
    """Mean gap of an arm's pairs by every judge, in rating points, over the dimensions."""
    if name not in study.pairs:
        return {}
    chosen, rejected = study.rows(name)
    gaps = {
        judge: rated.mean[chosen] - rated.mean[rejected] for judge, rated in study.rated.items()
    }
    return {judge: float(np.nanmean(gap)) for judge, gap in gaps.items() if not np.isnan(gap).all()}


def _strata(study: Study, name: str) -> dict[str, float] | None:
    """Shares of an arm's pairs, in percent, by verified correctness of chosen and rejected."""
    if name not in study.pairs:
        return None
    c, r = (study.correct[rows] for rows in study.rows(name))
    known = ~np.isnan(c) & ~np.isnan(r)
    if not known.any():
        return None
    return {
        f"{a}_{b}": 100
        * float(np.mean((c[known] == (a == "right")) & (r[known] == (b == "right"))))
        for a in ("right", "wrong")
        for b in ("right", "wrong")
    }


def _training(study: Study, name: str, beta: float) -> dict[str, Any]:
    """Means over the last quarter of the steps of all seeds; shifts are log-probabilities minus reference, in nats."""
    runs = [
        rows for label, rows in study.metrics.items() if label.rsplit("/", 1)[0] == name and rows
    ]
    last = [row for rows in runs for row in rows[-max(1, len(rows) // 4) :]]

    def mean(key: str) -> float | None:
        values = [row[key] for row in last if row.get(key) is not None]
        return float(np.mean(values)) if values else None

    shift = {
        side: None if (v := mean(f"rewards/{side}")) is None or not beta else v / beta
        for side in ("chosen", "rejected")
    }
    fell = [v is not None and v < 0 for v in shift.values()]
    return {
        "steps": max((rows[-1]["step"] for rows in runs), default=None),
        "loss": mean("loss"),
        "grad_norm": mean("grad_norm"),
        "accuracy": mean("rewards/accuracies"),
        "margin": mean("rewards/margins"),
        "kl": mean("kl"),
        **shift,
        "falling": all(fell),
    }


def _trends(s: dict, changes: Changes) -> list[dict[str, Any]]:
    """Slope of change on measured generator delta over the rungs of each objective's ladder, and its two ends."""
    found = []
    for objective in dict.fromkeys(a["objective"] for a in s["arms"]):
        rungs = sorted(
            (
                a
                for a in s["arms"]
                if a["objective"] == objective
                and a["group"] == "ladder"
                and a["generator_delta"]
                and "in" in a["generator_delta"]
            ),
            key=lambda a: a["generator_delta"]["in"][0],
        )
        for d in s["domains"]:
            deltas = [a["generator_delta"]["in"][0] for a in rungs]
            slope = st.slope(deltas, [changes[d][a["name"]] for a in rungs])
            if slope:
                values = [changes[d][a["name"]].estimate.value for a in rungs]
                ends = st.contrast(changes[d][rungs[-1]["name"]], changes[d][rungs[0]["name"]])
                found.append(
                    {
                        "objective": objective,
                        "domain": d,
                        "rungs": len(rungs),
                        "low": rungs[0]["name"],
                        "high": rungs[-1]["name"],
                        "per_10": [10 * v for v in slope],
                        "ends": list(ends),
                        "kendall": st.kendall(deltas, values),
                        "centre": [float(np.mean(deltas)), float(np.mean(values))],
                    }
                )
    return found


def _alike(a: dict, b: dict, *but: str) -> bool:
    keys = {
        "chosen",
        "rejected",
        "objective",
        "stratum",
        "direction",
        "keep",
        "by",
        "fraction",
    } - set(but)
    return all(a[k] == b[k] for k in keys)


def _contrasts(s: dict, changes: Changes) -> list[dict[str, Any]]:
    """Selected pairs against as many random or length-matched ones, and against all of the pool."""
    found = []
    for a in s["arms"]:
        for b in s["arms"]:
            if a["keep"] != "top" or not _alike(a, b, "keep", "by", "fraction"):
                continue
            if b["keep"] == "random":
                fits = b["fraction"] == a["fraction"]
            elif b["keep"] == "matched":
                fits = (
                    b["fraction"] == a["fraction"]
                    and b["by"] == a["by"]
                    and b["rater"] == a["rater"]
                )
            else:
                fits = b["keep"] == "all"
            if fits:
                found.append(
                    {"a": a["name"], "b": b["name"], "kind": b["keep"]}
                    | {
                        d: list(st.contrast(changes[d][a["name"]], changes[d][b["name"]]))
                        for d in s["domains"]
                    }
                )
    return found


def _survival(study: Study, s: dict, changes: Changes) -> list[dict[str, Any]]:
    """Arms that differ only in the judge who selected or directed their pairs."""
    found = []
    shaped = [a for a in s["arms"] if a["rater"]]
    for i, a in enumerate(shaped):
        for b in shaped[i + 1 :]:
            if a["rater"] == b["rater"] or not _alike(a, b, "direction"):
                continue
            sets = [set(study.pairs[x["name"]]["pair_id"].to_pylist()) for x in (a, b)]
            found.append(
                {
                    "a": a["name"],
                    "b": b["name"],
                    "first": a["rater"],
                    "second": b["rater"],
                    "shared": 100 * len(sets[0] & sets[1]) / max(1, min(len(x) for x in sets)),
                }
                | {
                    d: {
                        "a": a[d]["change"],
                        "b": b[d]["change"],
                        "difference": list(
                            st.contrast(changes[d][a["name"]], changes[d][b["name"]])
                        ),
                    }
                    for d in s["domains"]
                }
            )
    return found


def _controls(s: dict, changes: Changes) -> list[dict[str, Any]]:
    """Control arms against the ladder arms of the same two generators: SFT, strata of correctness, other directions."""
    found = []
    for a in s["arms"]:
        for b in s["arms"]:
            same = a["chosen"] == b["chosen"] and a["rejected"] == b["rejected"]
            if (
                a["group"] == "control"
                and b["group"] == "ladder"
                and b["keep"] == "all"
                and same
                and (a["objective"] == b["objective"] or a["kind"] == "sft")
            ):
                found.append(
                    {"a": a["name"], "b": b["name"]}
                    | {
                        d: list(st.contrast(changes[d][a["name"]], changes[d][b["name"]]))
                        for d in s["domains"]
                    }
                )
    return found


def _stages(study: Study) -> list[dict[str, Any]]:
    """Seconds of every stage as shares of the total; tokens per second, padding and compile time where counted."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for manifest in {m["key"]: m for m in study.manifests.values()}.values():
        stage, stats = totals[manifest["stage"]], manifest["stats"]
        stage["artifacts"] += 1
        stage["seconds"] += manifest["seconds"]
        for name in ("tokens", "positions", "filled", "compile_seconds"):
            stage[name] += stats.get(name, 0)
    everything = sum(stage["seconds"] for stage in totals.values()) or 1.0
    return [
        {
            "stage": name,
            "artifacts": int(t["artifacts"]),
            "seconds": t["seconds"],
            "share": 100 * t["seconds"] / everything,
            "tokens": int(t["tokens"]) or None,
            "compile_seconds": t["compile_seconds"] or None,
            "tokens_per_second": t["tokens"] / t["seconds"]
            if t["tokens"] and t["seconds"]
            else None,
            "padding": 100 * (1 - t["filled"] / t["positions"]) if t["positions"] else None,
        }
        for name, t in sorted(totals.items(), key=lambda item: -item[1]["seconds"])
    ]


def _dropped(study: Study) -> list[dict[str, Any]]:
    """Every count of something dropped, cut or skipped that is not 0, with where; an artifact once."""
    found, seen = [], set()
    for label, manifest in study.manifests.items():
        for name, count in manifest["stats"].items():
            named = name.startswith(("dropped_", "overlap_")) or name in (
                "empty",
                "duplicate",
                "too_long",
                "truncated",
                "unfinished",
            )
            if count and named and (manifest["key"], name) not in seen:
                seen.add((manifest["key"], name))
                found.append({"where": label, "what": name.replace("_", " "), "count": int(count)})
    return found
