"""Computes a study's summary, everything that the page and the terminal show, from its tables."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import judges
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.findings import findings, judge_sentence
from deltapref_jax.analysis.page import (
    ArmChange,
    ArmSummary,
    ByDomain,
    Contrast,
    DropCount,
    Evaluation,
    GeneratorSummary,
    StageSummary,
    SuiteSummary,
    Summary,
    Survival,
    SurvivalChange,
    TrainingSummary,
    Trend,
)
from deltapref_jax.analysis.study import ArtifactRecord, Study, columns
from deltapref_jax.config import OBJECTIVE_KINDS, Arm, Experiment, judge_of
from deltapref_jax.records import Prompt, from_table

Changes = Mapping[str, Mapping[str, st.Change]]  # domain → arm → change

_WATERFALL = (
    "prompts",
    "dropped_unfinished",
    "dropped_identical",
    "dropped_tie",
    "dropped_stratum",
    "pool",
    "kept",
)
_DROP_COUNTS = ("empty", "duplicate", "too_long", "truncated", "unfinished")


def summarise(study: Study) -> Summary:
    """All numbers of the page, and its sentences."""
    s = Summary(study.experiment.name, study.experiment.question, study.domains)
    s.left_out, s.uncompared = _left_out(study)
    s.generators = [_generator(study, name) for name in study.traces]
    if study.student is not None:
        s.student = _evaluation(study, study.student)
        s.suites = _suites(study)
        # An arm of few seeds shows the least, so the arm with the fewest sets the plan.
        s.detectable_seeds = min((len(runs) for runs in study.results.values()), default=1)
        s.detectable = st.minimum_detectable(study.student, s.detectable_seeds)
        after = {arm: list(runs.values()) for arm, runs in study.results.items()}
        changes = {d: st.changes(study.student, after, d) for d in study.domains}
        s.arms = _arms(study, changes)
        s.trends = _trends(s.arms, changes)
        s.contrasts = _contrasts(study.experiment, s.arms, changes)
        s.survival = _survival(study, s.arms, changes)
        s.controls = _controls(study.experiment, s.arms, changes)
    s.judges = [judges.describe(study, name) for name in study.rated]
    s.agreement = judges.agreement(study)
    s.stages = _stages(study.distinct_artifacts)
    s.dropped = _dropped(study.distinct_artifacts)
    has_exact = any(j.kind == "exact" for j in s.judges)
    s.judge_sentences = [judge_sentence(j, has_exact) for j in s.judges]
    s.findings = findings(s)
    return s


def summary_json(summary: Summary) -> str:
    """Text of `summary.json`."""
    return json.dumps(plain(summary), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON's types.

    A field marked `page.MERGED` gives its keys to the object that contains it, or none if it is
    None. Numbers that JSON lacks (NaN, infinities) become None.
    """
    if dataclasses.is_dataclass(value):
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            inner = plain(getattr(value, field.name))
            fields |= (inner or {}) if field.metadata.get("merged") else {field.name: inner}
        return fields
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _lengths(table: pa.Table) -> tuple[float, float]:
    """Percent of traces cut at the token limit, and mean length in tokens."""
    finish, tokens = columns(table, "finish", "tokens")
    return 100 * int(np.sum(finish == "length")) / max(len(finish), 1), _mean(tokens)


def _evaluation(study: Study, table: pa.Table) -> Evaluation:
    return Evaluation({d: st.accuracy(table, d) for d in study.domains}, *_lengths(table))


def _generator(study: Study, name: str) -> GeneratorSummary:
    correct = study.correct[study.rows_of(columns(study.traces[name], "trace_id")[0])]
    capability = study.capability.get(name)
    return GeneratorSummary(
        name,
        next((g.about for g in study.experiment.generators if g.name == name), ""),
        study.traces[name].num_rows,
        *_lengths(study.traces[name]),
        100 * _mean(correct[~np.isnan(correct)]),
        None if capability is None else _evaluation(study, capability),
    )


def _suites(study: Study) -> list[SuiteSummary]:
    """Accuracy of the student and of every generator, by suite."""
    tables = {"student": study.student} | dict(study.capability)
    summaries = []
    for d in study.domains:
        by_model = {name: st.by_question(table, d) for name, table in tables.items()}
        for suite, answers in st.by_question(study.student, d).items():
            first = from_table(Prompt, study.suites[suite][:1]) if suite in study.suites else []
            summaries.append(
                SuiteSummary(
                    suite=suite,
                    domain=d,
                    questions=len(answers.questions),
                    example=first[0].question if first else "",
                    samples=int(answers.samples.max()),
                    accuracy={
                        name: 100 * float(suites[suite].mean.mean())
                        for name, suites in by_model.items()
                        if suite in suites
                    },
                )
            )
    return summaries


def _arms(study: Study, changes: Changes) -> list[ArmSummary]:
    """Every arm that was evaluated, its p values adjusted over all of them."""
    by_domain: dict[str, dict[str, ArmChange]] = {}
    for d, of_arms in changes.items():
        p = {name: change.p for name, change in of_arms.items()}
        p_holm, p_bh = st.holm(p), st.benjamini_hochberg(p)
        by_domain[d] = {
            name: ArmChange(change.estimate, change.p, p_holm[name], p_bh[name])
            for name, change in of_arms.items()
        }
    return [
        _arm(study, arm, {d: of_arms[arm.name] for d, of_arms in by_domain.items()})
        for arm in study.experiment.arms
        if arm.name in study.results
    ]


def _arm(study: Study, arm: Arm, changes: dict[str, ArmChange]) -> ArmSummary:
    objective = next(o for o in study.experiment.objectives if o.name == arm.objective)
    runs = study.results[arm.name].values()
    truncated, tokens = zip(*(_lengths(run) for run in runs), strict=True)
    counts = study.pair_counts.get(arm.name, {})
    return ArmSummary(
        arm=arm,
        kind=objective.kind,
        seeds=len(runs),
        pair_judge=_pair_judge(study.experiment, arm),
        generator_delta=_generator_delta(study, arm),
        sample_delta=_sample_delta(study, arm.name),
        pairs=study.pairs[arm.name].num_rows if arm.name in study.pairs else None,
        strata=_strata(study, arm.name),
        waterfall={name: int(counts[name]) for name in _WATERFALL if name in counts},
        chosen_tokens=counts.get("chosen_tokens", math.nan),
        rejected_tokens=counts.get("rejected_tokens", math.nan),
        truncated=_mean(truncated),
        tokens=_mean(tokens),
        training=_training(
            study, arm.name, objective.beta if OBJECTIVE_KINDS[objective.kind].reference else 0.0
        ),
        changes=changes,
    )


def _pair_judge(e: Experiment, arm: Arm) -> str:
    """The judge that labels or ranks the pairs of an arm; "" if none does."""
    shaped = arm.direction != "generator" or arm.keep in ("top", "matched")
    return judge_of(e, arm) if shaped else ""


def _generator_delta(study: Study, arm: Arm) -> ByDomain | None:
    """Accuracy of the chosen traces' generator minus that of the rejected ones', by domain."""
    if not {arm.chosen, arm.rejected} <= study.capability.keys():
        return None
    # A generator against itself has no difference, so no sampling error is shown for it.
    if arm.chosen == arm.rejected:
        return {d: st.Estimate(0.0, 0.0, 0.0) for d in study.domains}
    low, high = study.capability[arm.rejected], study.capability[arm.chosen]
    return {d: st.changes(low, {arm.chosen: [high]}, d)[arm.chosen].estimate for d in study.domains}


def _sample_delta(study: Study, name: str) -> dict[str, float]:
    """Mean gap of an arm's pairs by every judge, in rating points, over the dimensions."""
    if name not in study.pairs:
        return {}
    chosen, rejected = study.pair_rows(name)
    gaps = {
        judge: rated.mean[chosen] - rated.mean[rejected] for judge, rated in study.rated.items()
    }
    return {judge: float(np.nanmean(gap)) for judge, gap in gaps.items() if not np.isnan(gap).all()}


def _strata(study: Study, name: str) -> dict[str, float] | None:
    """Shares of an arm's pairs, in percent, by verified correctness of chosen and rejected."""
    if name not in study.pairs:
        return None
    chosen, rejected = (study.correct[rows] for rows in study.pair_rows(name))
    known = ~np.isnan(chosen) & ~np.isnan(rejected)
    if not known.any():
        return None
    verdicts = {"right": 1, "wrong": 0}
    return {
        f"{a}_{b}": 100 * float(np.mean((chosen[known] == x) & (rejected[known] == y)))
        for a, x in verdicts.items()
        for b, y in verdicts.items()
    }


def _training(study: Study, name: str, beta: float) -> TrainingSummary:
    """Metrics of an arm; `beta` 0 says that its rewards are not beta times a log-ratio."""
    runs = [rows for rows in study.metrics.get(name, {}).values() if rows]
    # The last quarter of every run, where the metrics have settled.
    last = [row for rows in runs for row in rows[-max(1, len(rows) // 4) :]]

    def mean(key: str) -> float:
        return _mean([row[key] for row in last if row.get(key) is not None])

    chosen, rejected = (
        mean(f"rewards/{side}") / beta if beta else math.nan for side in ("chosen", "rejected")
    )
    return TrainingSummary(
        steps=max((int(rows[-1]["step"]) for rows in runs), default=None),
        loss=mean("loss"),
        grad_norm=mean("grad_norm"),
        accuracy=mean("rewards/accuracies"),
        margin=mean("rewards/margins"),
        kl=mean("kl"),
        chosen=chosen,
        rejected=rejected,
        falling=chosen < 0 and rejected < 0,
    )


def _trends(arms: Sequence[ArmSummary], changes: Changes) -> list[Trend]:
    """Slope of change on measured generator delta over each objective's ladder, and its ends."""
    trends = []
    for objective in dict.fromkeys(a.arm.objective for a in arms):
        ladder = [
            (a.delta, a.name)
            for a in arms
            if a.arm.objective == objective and a.arm.group == "ladder" and a.delta is not None
        ]
        ladder.sort(key=lambda rung: rung[0])  # arms of equal delta stay in the config's order
        deltas = [delta for delta, _ in ladder]
        for d, of_arms in changes.items():
            rungs = [of_arms[name] for _, name in ladder]
            slope = st.slope(deltas, rungs)
            if slope is None:
                continue
            values = [change.estimate.value for change in rungs]
            trends.append(
                Trend(
                    objective=objective,
                    domain=d,
                    rungs=len(rungs),
                    low=ladder[0][1],
                    high=ladder[-1][1],
                    per_10=st.Estimate(*(10 * v for v in slope)),
                    ends=st.contrast(rungs[-1], rungs[0]),
                    kendall=st.kendall(deltas, values),
                    centre=(_mean(deltas), _mean(values)),
                )
            )
    return trends


def _data(arm: Arm) -> tuple[str, ...]:
    """What an arm trains on, apart from who labels and who selects its pairs."""
    return arm.chosen, arm.rejected, arm.objective, arm.stratum


def _difference(a: ArmSummary, b: ArmSummary, changes: Changes) -> ByDomain:
    return {d: st.contrast(of_arms[a.name], of_arms[b.name]) for d, of_arms in changes.items()}


def _contrasts(e: Experiment, arms: Sequence[ArmSummary], changes: Changes) -> list[Contrast]:
    """Selected pairs against as many random or length-matched ones, and against all of the pool."""
    return [
        Contrast(a.name, b.name, b.arm.keep, _difference(a, b, changes))
        for a in arms
        for b in arms
        if _selects_from(e, a.arm, b.arm)
    ]


def _selects_from(e: Experiment, a: Arm, b: Arm) -> bool:
    """Whether a keeps the top pairs of the data that b keeps pairs of otherwise."""
    if a.keep != "top" or (*_data(a), a.direction) != (*_data(b), b.direction):
        return False
    if b.keep == "random":
        return b.fraction == a.fraction
    if b.keep == "matched":
        ranked_by = (a.fraction, a.by, _pair_judge(e, a))
        return ranked_by == (b.fraction, b.by, _pair_judge(e, b))
    return b.keep == "all"


def _survival(study: Study, arms: Sequence[ArmSummary], changes: Changes) -> list[Survival]:
    """Arms that differ only in the judge who selected or labelled their pairs."""

    def setup(arm: Arm) -> tuple[object, ...]:
        return *_data(arm), arm.keep, arm.by, arm.fraction

    survival = []
    shaped = [a for a in arms if a.pair_judge]
    for i, a in enumerate(shaped):
        for b in shaped[i + 1 :]:
            if a.pair_judge == b.pair_judge or setup(a.arm) != setup(b.arm):
                continue
            pairs_a, pairs_b = (set(columns(study.pairs[x.name], "pair_id")[0]) for x in (a, b))
            # Relative to the smaller set, so that 100% means that one contains the other.
            smaller = max(1, min(len(pairs_a), len(pairs_b)))
            difference = _difference(a, b, changes)
            survival.append(
                Survival(
                    a=a.name,
                    b=b.name,
                    first=a.pair_judge,
                    second=b.pair_judge,
                    shared=100 * len(pairs_a & pairs_b) / smaller,
                    changes={
                        d: SurvivalChange(a.changes[d].change, b.changes[d].change, difference[d])
                        for d in changes
                    },
                )
            )
    return survival


def _controls(e: Experiment, arms: Sequence[ArmSummary], changes: Changes) -> list[Contrast]:
    """Control arms against the ladder arms of the same two generators.

    Controls are SFT, strata of correctness, and other directions.
    """
    return [
        Contrast(a.name, b.name, b.arm.keep, _difference(a, b, changes))
        for a in arms
        for b in arms
        if _controls_for(e, a.arm, b.arm)
    ]


def _controls_for(e: Experiment, a: Arm, b: Arm) -> bool:
    """Whether a is a control of the ladder arm b."""
    kinds = {o.name: o.kind for o in e.objectives}
    return (
        (a.group, b.group, b.keep) == ("control", "ladder", "all")
        and (a.chosen, a.rejected) == (b.chosen, b.rejected)
        and (a.objective == b.objective or kinds[a.objective] == "sft")
    )


def _left_out(study: Study) -> tuple[list[str], list[str]]:
    """Arms of the config that were not run, and the comparisons of other arms that need them."""
    e = study.experiment
    run = [a for a in e.arms if a.name in study.pairs or a.name in study.results]
    others = [a for a in e.arms if a not in run] if run else []
    uncompared = [
        f"{a.name} minus {b.name}"
        for a in run
        for b in others
        if _selects_from(e, a, b) or _controls_for(e, a, b)
    ]
    return [a.name for a in others], uncompared


def _stages(artifacts: Iterable[ArtifactRecord]) -> list[StageSummary]:
    """Seconds of every stage as shares of the total, with tokens, padding and compile time."""
    by_stage: dict[str, list[ArtifactRecord]] = {}
    for artifact in artifacts:
        by_stage.setdefault(artifact.stage, []).append(artifact)
    seconds = {stage: sum(a.seconds for a in of_stage) for stage, of_stage in by_stage.items()}
    everything = sum(seconds.values()) or 1.0
    summaries = []
    for stage in sorted(by_stage, key=lambda stage: -seconds[stage]):
        tokens, positions, filled, compiling = (
            sum(a.stats.get(name, 0) for a in by_stage[stage])
            for name in ("tokens", "positions", "filled", "compile_seconds")
        )
        summaries.append(
            StageSummary(
                stage=stage,
                artifacts=len(by_stage[stage]),
                seconds=seconds[stage],
                share=100 * seconds[stage] / everything,
                tokens=int(tokens) or None,
                compile_seconds=compiling or None,
                tokens_per_second=tokens / seconds[stage] if tokens and seconds[stage] else None,
                padding=100 * (1 - filled / positions) if positions else None,
            )
        )
    return summaries


def _dropped(artifacts: Iterable[ArtifactRecord]) -> list[DropCount]:
    """Every count of something dropped, cut or skipped that is not 0."""
    return [
        DropCount(artifact.label, name.replace("_", " "), int(count))
        for artifact in artifacts
        for name, count in artifact.stats.items()
        if count and (name.startswith(("dropped_", "overlap_")) or name in _DROP_COUNTS)
    ]
