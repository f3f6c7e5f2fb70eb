"""Computes a study's summary, everything that the page and the terminal show, from its tables."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import judges, noise, suites
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.arm_words import budget_words
from deltapref_jax.analysis.claims import (
    WithoutRung,
    claim_about,
    claim_verdict,
    claim_words,
    rung_sentence,
)
from deltapref_jax.analysis.components import Kind, kinds_of
from deltapref_jax.analysis.controls import controls
from deltapref_jax.analysis.findings import (
    findings,
    judge_sentence,
    mark_names,
    unmeasured,
    words,
)
from deltapref_jax.analysis.page import (
    ArmSummary,
    ByDomain,
    ClaimResult,
    Contrast,
    DropCount,
    Evaluation,
    GeneratorSummary,
    Ladder,
    MeasuredBy,
    RateChoice,
    StageSummary,
    Summary,
    Survival,
    SurvivalChange,
    TrainingSummary,
    Trend,
)
from deltapref_jax.analysis.readouts import readouts
from deltapref_jax.analysis.study import ArtifactRecord, Study, columns
from deltapref_jax.config import (
    KEEPS,
    OBJECTIVE_KINDS,
    RANKED,
    TUNING,
    UNJUDGED,
    Arm,
    Claim,
    Experiment,
    Objective,
    Run,
    as_many_at_random,
    budget_twin,
    claims_of,
    differing,
    differing_rungs,
    is_balanced,
    is_tuned,
    judge_of,
    ladder_of,
    objective_of,
    quantised_sentence,
    training_of,
    unread_ratings,
    uses_ratings,
)
from deltapref_jax.display import COUNTS
from deltapref_jax.records import RateTrial, from_table

EffectsBy = Mapping[str, fx.Effects]  # by domain
_WATERFALL = (
    "prompts",
    "dropped_unfinished",
    "dropped_sample",
    "dropped_unshared",
    "dropped_identical",
    "dropped_tie",
    "dropped_stratum",
    "dropped_unscored",
    "pool",
    "dropped_balance",
    "kept",
)
TWIN_BUDGETS = ("equal epochs", "equal steps")
"""Budgets of `config.budget_twin` in words: an arm that keeps all pairs has both."""
_TRAINED_ON = ("read", "groups")  # of a file: what was not dropped


def summarise(study: Study) -> Summary:
    """All numbers of the page, and its sentences."""
    s = Summary(study.experiment.name, study.experiment.question, study.domains)
    s.left_out, s.uncompared = _left_out(study)
    s.quantised = quantised_sentence(study.experiment)
    s.generators = [_generator(study, name) for name in study.traces]
    if study.student is not None:
        s.student = _evaluation(study, study.student)
        s.suites = suites.summaries(study)
        kinds = kinds_of(study)
        effects = {d: fx.effects(study.student, study.results, d, kinds) for d in study.domains}
        s.arms = _arms(study, effects, kinds)
        by_suite = fx.measured(suites.changes(study, s.suites, kinds))
        for suite in s.suites:
            suite.changes = {a.name: by_suite[suite.suite, a.name] for a in s.arms}
        s.limits, s.lessons = suites.limit_sentences(s.suites), suites.lessons_sentence(study)
        s.ladders = _ladders(study, s.arms)
        s.claims = _claims(study.experiment, s.ladders, effects)
        s.control_results = controls(study, kinds)
        s.noise = noise.budgets(effects, {arm: list(runs) for arm, runs in study.results.items()})
        s.trends = _trends(s.arms, s.ladders, effects)
        s.contrasts = _contrasts(study.experiment, s.arms, effects)
        s.survival = _survival(study, s.arms, effects)
        s.controls = _controls(study.experiment, s.arms, effects)
        s.readouts = readouts(study, kinds)
        s.rates = [
            _rate_choice(study, o) for o in study.experiment.objectives if o.name in study.rates
        ]
        s.budgets = _budgets(study.experiment, s.arms, effects)
    s.judges = [judges.describe(study, name) for name in study.rated]
    s.agreement = judges.agreement(study)
    s.trivial = judges.trivial(study)
    for a in s.arms:
        a.doubt = judges.doubt(study.experiment, a.arm, s.judges)
    s.stages = _stages(study.distinct_artifacts)
    s.dropped = _dropped(study.distinct_artifacts)
    s.judge_sentences = [judge_sentence(j, s.judges) for j in s.judges]
    s.findings = findings(s)
    s.unmeasured = unmeasured(s)
    _mark(s)
    return s


def _mark(s: Summary) -> None:
    """Marks every arm that a sentence names and whose judge can't carry a conclusion."""
    doubted = [a.name for a in s.arms if a.doubt]
    s.uncompared, s.unmeasured = (
        [mark_names(text, doubted) for text in texts] for texts in (s.uncompared, s.unmeasured)
    )
    for finding in s.findings:
        finding.text = mark_names(finding.text, doubted)
    for claim in s.claims:
        claim.what, claim.about, claim.hangs_on = (
            mark_names(t, doubted) for t in (claim.what, claim.about, claim.hangs_on)
        )
    for control in s.control_results:
        control.what = mark_names(control.what, doubted)


def summary_json(summary: Any) -> str:
    """Text of `summary.json`, of the dataclass that a page shows."""
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


def _surprise(results: pa.Table) -> float:
    """Mean of -log p over the sampled tokens, in nats, under the model at temperature 1.

    Where that is how they were sampled, without a filter, it estimates the mean entropy of the
    next token without bias.
    """
    logprob, tokens = columns(results, "logprob", "tokens")
    return -float(logprob.sum() / tokens.sum()) if tokens.sum() else math.nan


def _evaluation(study: Study, table: pa.Table) -> Evaluation:
    shown = _averaged(table)
    accuracy = {d: st.accuracy(table, d) for d in study.domains}
    return Evaluation(accuracy, *_lengths(shown), _surprise(shown))


def _averaged(table: pa.Table) -> pa.Table:
    """Rows of `records.Result` of the suites that a domain averages."""
    return table.filter(columns(table, "domain")[0] != "")


def _generator(study: Study, name: str) -> GeneratorSummary:
    correct = study.correct[study.rows_of(columns(study.traces[name], "trace_id")[0])]
    capability = study.capability.get(name)
    return GeneratorSummary(
        name,
        *next(
            (
                (g.about, g.model.quantization)
                for g in study.experiment.generators
                if g.name == name
            ),
            ("", ""),
        ),
        study.traces[name].num_rows,
        *_lengths(study.traces[name]),
        100 * _mean(correct[~np.isnan(correct)]),
        None if capability is None else _evaluation(study, capability),
    )


def _arms(study: Study, effects: EffectsBy, kinds: Mapping[str, Kind]) -> list[ArmSummary]:
    """Every arm that was evaluated, its p values adjusted over all of them and both domains."""
    changes = fx.measured(
        {
            (d, name): of_arms.change(name)
            for d, of_arms in effects.items()
            for name in of_arms.names
        }
    )
    return [
        _arm(study, arm, {d: changes[d, arm.name] for d in effects}, kinds[arm.name].draw)
        for arm in study.experiment.arms
        if arm.name in study.results
    ]


def _arm(study: Study, arm: Arm, changes: MeasuredBy, redrawn: str) -> ArmSummary:
    objective = objective_of(study.experiment, arm)
    runs = [_averaged(run) for run in study.results[arm.name].values()]
    truncated, tokens = zip(*map(_lengths, runs), strict=True)
    # What draws differ in, such as lengths, is averaged; what they have in common stays.
    drawn = list(study.pair_counts.get(arm.name, {}).values())
    counts = {name: _mean([c[name] for c in drawn if name in c]) for name in next(iter(drawn), {})}
    return ArmSummary(
        arm=arm,
        kind=objective.kind,
        seeds=len({run.seed for run in study.results[arm.name]}),
        draws=len({run.draw for run in study.results[arm.name]}),
        balanced=is_balanced(study.experiment, arm),
        redrawn=redrawn,
        budget=_budget_words(study.experiment, arm),
        pair_judge=_pair_judge(study.experiment, arm),
        generator_delta=generator_delta(study, arm),
        sample_delta=_sample_delta(study, arm.name),
        pairs=next(iter(study.pairs[arm.name].values())).num_rows
        if arm.name in study.pairs
        else None,
        strata=strata(study, arm.name),
        waterfall={name: int(counts[name]) for name in _WATERFALL if name in counts},
        chosen_tokens=counts.get("chosen_tokens", math.nan),
        rejected_tokens=counts.get("rejected_tokens", math.nan),
        truncated=_mean(truncated),
        tokens=_mean(tokens),
        surprise=_mean([_surprise(run) for run in runs]),
        training=_training(study, arm, objective),
        changes=changes,
    )


def _pair_judge(e: Experiment, arm: Arm) -> str:
    """The judge that labels or ranks the pairs of an arm, or chooses samples; "" if none does."""
    return judge_of(e, arm) if uses_ratings(arm) else ""


def generator_delta(study: Study, arm: Arm) -> ByDomain | None:
    """Accuracy of the chosen traces' generator minus that of the rejected ones', by domain."""
    if not {arm.chosen, arm.rejected} <= study.capability.keys():
        return None
    # A generator against itself has no difference, so no sampling error is shown for it.
    if arm.chosen == arm.rejected:
        return {d: st.Estimate(0.0, 0.0, 0.0) for d in study.domains}
    low, high = study.capability[arm.rejected], study.capability[arm.chosen]
    return {
        d: fx.effects(low, {arm.chosen: {Run(0, 0): high}}, d).change(arm.chosen).estimate
        for d in study.domains
    }


def _sample_delta(study: Study, name: str) -> dict[str, float]:
    """Mean gap of an arm's pairs by every judge, in rating points, over the dimensions."""
    if name not in study.pairs:
        return {}
    chosen, rejected = study.pair_rows(study.pairs_of(name))
    gaps = {
        judge: rated.mean[chosen] - rated.mean[rejected] for judge, rated in study.rated.items()
    }
    return {judge: float(np.nanmean(gap)) for judge, gap in gaps.items() if not np.isnan(gap).all()}


def strata(study: Study, name: str) -> dict[str, float] | None:
    """Shares of an arm's pairs, in percent, by verified correctness of chosen and rejected."""
    if name not in study.pairs:
        return None
    chosen, rejected = (study.correct[rows] for rows in study.pair_rows(study.pairs_of(name)))
    known = ~np.isnan(chosen) & ~np.isnan(rejected)
    if not known.any():
        return None
    verdicts = {"right": 1, "wrong": 0}
    return {
        f"{a}_{b}": 100 * float(np.mean((chosen[known] == x) & (rejected[known] == y)))
        for a, x in verdicts.items()
        for b, y in verdicts.items()
    }


def _training(study: Study, arm: Arm, objective: Objective) -> TrainingSummary:
    """Budget and metrics of an arm."""
    # Without a reference, rewards are not beta times a log-ratio.
    beta = objective.beta if OBJECTIVE_KINDS[objective.kind].reference else 0.0
    runs = [rows for rows in study.metrics.get(arm.name, {}).values() if rows]
    # The last quarter of every run, where the metrics have settled.
    last = [row for rows in runs for row in rows[-max(1, len(rows) // 4) :]]

    def mean(key: str) -> float:
        return _mean([row[key] for row in last if row.get(key) is not None])

    chosen, rejected = (
        mean(f"rewards/{side}") / beta if beta else math.nan for side in ("chosen", "rejected")
    )
    return TrainingSummary(
        steps=max((int(rows[-1]["step"]) for rows in runs), default=None),
        epochs=_mean([rows[-1]["epoch"] for rows in runs if rows[-1].get("epoch") is not None]),
        pairs_per_step=training_of(study.experiment.training, arm).pairs_per_step,
        learning_rate=_chosen(study, arm) or objective.learning_rate,
        loss=mean("loss"),
        grad_norm=mean("grad_norm"),
        accuracy=mean("rewards/accuracies"),
        margin=mean("rewards/margins"),
        kl=mean("kl"),
        chosen=chosen,
        rejected=rejected,
        falling=chosen < 0 and rejected < 0,
    )


def _chosen(study: Study, arm: Arm) -> float | None:
    """The learning rate that was chosen for an arm; None where it was given."""
    if not is_tuned(study.experiment, arm):
        return None
    trials = from_table(RateTrial, study.rates[arm.objective])
    return next(trial.learning_rate for trial in trials if trial.chosen)


def _rate_choice(study: Study, objective: Objective) -> RateChoice:
    trials = from_table(RateTrial, study.rates[objective.name])
    (best,) = [i for i, trial in enumerate(trials) if trial.chosen]
    chosen = f"{trials[best].learning_rate:g}"
    answers = dict(study.trials.get(objective.name, {}))
    leads = {}
    if chosen in answers:
        # No domain averages a tuning suite, so the domain of its results is "".
        highest = {"": {Run(0, 0): answers.pop(chosen)}}
        leads = {rate: fx.effects(other, highest, "").change("") for rate, other in answers.items()}
    return RateChoice(
        objective=objective.name,
        arm=objective.tuned_by,
        suites=[suite.name for suite in study.experiment.suites if suite.readout == TUNING],
        questions=trials[best].questions,
        tried={f"{t.learning_rate:g}": st.Estimate(t.accuracy, t.low, t.high) for t in trials},
        chosen=chosen,
        edge={0: "lowest", len(trials) - 1: "highest"}.get(best, ""),
        leads=fx.measured(leads),
    )


def _ladders(study: Study, arms: Sequence[ArmSummary]) -> dict[str, Ladder]:
    """The ladder of every objective that has arms in the group, of those that were evaluated."""
    ladders = {}
    for objective in dict.fromkeys(a.arm.objective for a in arms if a.arm.group == "ladder"):
        of_config = ladder_of(study.experiment, objective)
        rungs, left_out = [], {}
        for a in arms:
            if (a.arm.group, a.arm.objective) != ("ladder", objective):
                continue
            if a.arm not in of_config:
                left_out[a.name] = _no_rung(study.experiment, a.arm, of_config)
            elif a.delta is None:
                left_out[a.name] = (
                    "its generators were not evaluated"
                    if a.generator_delta is None
                    else "the generator delta is measured in domain, where no suite is averaged"
                )
            else:
                rungs.append((a.delta, a.arm))
        rungs.sort(key=lambda rung: rung[0])  # arms of equal delta stay in the config's order
        asked = [
            set(zip(*columns(study.pairs_of(arm.name), "prompt_id", "rejected_id"), strict=True))
            for _, arm in rungs
            if arm.name in study.pairs
        ]
        ladders[objective] = Ladder(
            {arm.name: delta for delta, arm in rungs},
            left_out,
            list(dict.fromkeys(arm.rejected for _, arm in rungs)),
            len(set.intersection(*asked)) if asked else 0,
            len(set().union(*asked)),
        )
    return ladders


def _no_rung(e: Experiment, arm: Arm, rungs: Sequence[Arm]) -> str:
    """Why an arm of a ladder's group is none of its rungs."""
    if arm.direction != "generator":
        return f"its pairs are directed by {arm.direction}"
    differ = sorted(differing_rungs(e, arm, rungs[0]))
    values = dataclasses.asdict(arm) | {"judge": judge_of(e, arm)}
    return f"it has {', '.join(f'{words(name)} {values[name]}' for name in differ)}"


def _slope(effects: fx.Effects, ladder: Mapping[str, float]) -> fx.Effect | None:
    """Points of change per 10 points of generator delta."""
    return effects.slope({name: delta / 10 for name, delta in ladder.items()})


def _trends(
    arms: Sequence[ArmSummary], ladders: Mapping[str, Ladder], effects: EffectsBy
) -> list[Trend]:
    """Slope of change on measured generator delta over each objective's ladder, and its ends."""
    found: dict[tuple[str, str, str], fx.Effect] = {}
    for objective, ladder in ladders.items():
        for d, of_arms in effects.items():
            slope = _slope(of_arms, ladder.rungs)
            if slope is None:
                continue
            low, *_, high = ladder.rungs
            found[objective, d, "slope"] = slope
            found[objective, d, "ends"] = of_arms.contrast(high, low)
    measured = fx.measured(found)
    changes = {a.name: a.changes for a in arms}
    trends = []
    for objective, d in dict.fromkeys(key[:2] for key in found):
        rungs = ladders[objective].rungs
        deltas = list(rungs.values())
        values = [changes[name][d].estimate.value for name in rungs]
        trends.append(
            Trend(
                objective=objective,
                domain=d,
                rungs=len(rungs),
                low=list(rungs)[0],
                high=list(rungs)[-1],
                per_10=measured[objective, d, "slope"],
                ends=measured[objective, d, "ends"],
                kendall=st.kendall(deltas, values),
                centre=(_mean(deltas), _mean(values)),
            )
        )
    return trends


def _claims(e: Experiment, ladders: Mapping[str, Ladder], effects: EffectsBy) -> list[ClaimResult]:
    """What was claimed before the run, adjusted over all of its claims."""
    claims = claims_of(e)
    rungs = {objective: ladder.rungs for objective, ladder in ladders.items()}
    found: dict[int, fx.Effect] = {}
    for i, claim in enumerate(claims):
        of_arms = effects.get(claim.domain)
        if of_arms is None:
            continue
        weights = claim_weights(claim, of_arms.names, rungs.get(claim.objective, {}))
        if weights is not None:
            found[i] = of_arms.combined(weights)
    measured = fx.measured(found)
    return [
        ClaimResult(
            claim,
            claim_words(claim),
            claim_about(claim, e, rungs.get(claim.objective, {})),
            measured.get(i),
            "points per 10 points of generator delta" if claim.kind == "slope" else "points",
            claim_verdict(claim, measured.get(i)),
            rung_sentence(
                measured[i].estimate,
                without_rungs(effects[claim.domain], rungs[claim.objective]),
            )
            if claim.kind == "slope" and i in measured
            else "",
        )
        for i, claim in enumerate(claims)
    ]


def without_rungs(of_arms: fx.Effects, rungs: Mapping[str, float]) -> dict[str, WithoutRung | None]:
    """By rung, the slope over the others; None where they have none.

    Args:
      of_arms: effects of one domain.
      rungs: measured generator deltas by arm, of a ladder that has a slope.
    """
    whole = fx.slope_weights({name: delta / 10 for name, delta in rungs.items()}) or {}
    slopes, differences = {}, {}
    for left_out in rungs:
        rest = fx.slope_weights({n: x / 10 for n, x in rungs.items() if n != left_out})
        if rest is not None:
            slopes[left_out] = of_arms.combined(rest).estimate
            apart = {name: weight - rest.get(name, 0.0) for name, weight in whole.items()}
            differences[left_out] = of_arms.combined(apart)
    shown = fx.measured(differences)
    return {n: WithoutRung(slopes[n], shown[n]) if n in shown else None for n in rungs}


def claim_weights(
    claim: Claim, arms: Collection[str], ladder: Mapping[str, float]
) -> dict[str, float] | None:
    """What the change of every arm counts in a claim; None where an arm of it is missing.

    Args:
      claim: of the config.
      arms: that were evaluated.
      ladder: of its objective, measured generator deltas by arm.
    """
    if claim.kind == "slope":
        return fx.slope_weights({name: delta / 10 for name, delta in ladder.items()})
    weights = {claim.a: 1.0} | ({claim.b: -1.0} if claim.kind == "contrast" else {})
    return weights if weights.keys() <= set(arms) else None


def _budget_words(e: Experiment, arm: Arm) -> str:
    """The steps or epochs of an arm that has its own."""
    if _is_twin(e, arm):
        return TWIN_BUDGETS[not arm.steps]
    return budget_words(arm)


def _is_twin(e: Experiment, arm: Arm) -> bool:
    """Whether an arm has the budget of `config.budget_twin` instead of that of all arms."""
    if not (arm.steps or arm.epochs) or arm.pairs or arm.fraction == 1:
        return False
    twin = budget_twin(dataclasses.replace(arm, steps=0, epochs=0.0), e.training)
    return (arm.steps, arm.epochs) == (twin.steps, twin.epochs)


def _differences(compared: Sequence[tuple[str, str, str]], effects: EffectsBy) -> list[Contrast]:
    """Arm a minus arm b for every (a, b, kind), adjusted over all of them and both domains."""
    measured = fx.measured(
        {(a, b, d): e.contrast(a, b) for a, b, _ in compared for d, e in effects.items()}
    )
    return [
        Contrast(a, b, kind, {d: measured[a, b, d] for d in effects}) for a, b, kind in compared
    ]


def _contrasts(e: Experiment, arms: Sequence[ArmSummary], effects: EffectsBy) -> list[Contrast]:
    """Selected pairs against as many random or length-matched ones, and against all of the pool."""
    compared = [
        (a.name, b.name, kind)
        for a in arms
        for b in arms
        if (kind := _selects_from(e, a.arm, b.arm))
    ]
    return _differences(compared, effects)


def _selects_from(e: Experiment, a: Arm, b: Arm) -> str:
    """How b keeps pairs of the data that a keeps the top pairs of; "" where it does not."""
    if a.keep != "top" or b.keep == "top" or b.keep not in KEEPS:
        return ""
    if b.keep == "random":
        return b.keep if as_many_at_random(e, a, b) else ""
    apart = differing(e, a, b)
    if b.keep in RANKED:
        return b.keep if apart == {"keep"} else ""
    if is_balanced(e, b):
        return ""  # it does not keep all pairs
    apart -= unread_ratings(b)  # who ranks pairs does not matter where all are kept
    if apart <= {"keep", "fraction", "pairs"}:
        return b.keep
    twins = _is_twin(e, a) and not (b.steps or b.epochs)
    if twins and apart <= {"keep", "fraction", "steps", "epochs"}:
        return "all_epochs" if a.steps else "all_steps"
    return ""


def _budgets(e: Experiment, arms: Sequence[ArmSummary], effects: EffectsBy) -> list[Contrast]:
    """Arms with a budget of their own minus arms that differ from them in nothing else."""
    compared = [
        (a.name, b.name, "budget")
        for a in arms
        for b in arms
        if a.budget and not b.budget and differing(e, a.arm, b.arm) <= {"steps", "epochs"}
    ]
    return _differences(compared, effects)


def _survival(study: Study, arms: Sequence[ArmSummary], effects: EffectsBy) -> list[Survival]:
    """Arms that differ only in the judge who selected or labelled their pairs."""

    shaped = [a for a in arms if a.pair_judge]
    compared = [
        (a, b)
        for i, a in enumerate(shaped)
        for b in shaped[i + 1 :]
        if a.pair_judge != b.pair_judge
        and differing(study.experiment, a.arm, b.arm) <= {"judge", "direction"}
        # A judge who directs pairs does more than one who ranks them.
        and (a.arm.direction in UNJUDGED) == (b.arm.direction in UNJUDGED)
    ]
    differences = _differences([(a.name, b.name, "") for a, b in compared], effects)
    survival = []
    for (a, b), difference in zip(compared, differences, strict=True):
        pairs_a, pairs_b = (set(columns(study.pairs_of(x.name), "pair_id")[0]) for x in (a, b))
        # Relative to the smaller set, so that 100% means that one contains the other.
        smaller = max(1, min(len(pairs_a), len(pairs_b)))
        survival.append(
            Survival(
                a=a.name,
                b=b.name,
                first=a.pair_judge,
                second=b.pair_judge,
                shared=100 * len(pairs_a & pairs_b) / smaller,
                changes={
                    d: SurvivalChange(
                        a.changes[d].estimate, b.changes[d].estimate, difference.difference[d]
                    )
                    for d in effects
                },
            )
        )
    return survival


def _controls(e: Experiment, arms: Sequence[ArmSummary], effects: EffectsBy) -> list[Contrast]:
    """Control arms against the ladder arms of the same two generators.

    Controls are SFT, strata of correctness, and other directions.
    """
    compared = [
        (a.name, b.name, b.arm.keep) for a in arms for b in arms if _controls_for(e, a.arm, b.arm)
    ]
    return _differences(compared, effects)


def _controls_for(e: Experiment, a: Arm, b: Arm) -> bool:
    """Whether a is a control of the ladder arm b."""
    kinds = {o.name: o.kind for o in e.objectives}
    return (
        (a.group, b.group, b.keep) == ("control", "ladder", "all")
        and (a.chosen, a.rejected) == (b.chosen, b.rejected)
        and (a.objective == b.objective or kinds[a.objective] == "sft")
        and not differing(e, a, b) & {"steps", "epochs", "pairs_per_step"}
        and not is_balanced(e, b)
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
        DropCount(artifact.label, words, int(artifact.stats[name]))
        for artifact in artifacts
        for name, words in COUNTS.get(artifact.stage, {}).items()
        if artifact.stats.get(name) and name not in _TRAINED_ON
    ]
