"""Judges against known truth, against themselves, and against each other."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.page import (
    Agreement,
    JudgeAudit,
    JudgeOnPairs,
    JudgeSummary,
    Reliability,
)
from deltapref_jax.analysis.study import RatingMatrix, Study, columns
from deltapref_jax.config import (
    KEEPS,
    RANKED,
    REFERENCE_MARGIN,
    UNJUDGED,
    Arm,
    Experiment,
    differing,
    is_balanced,
    judge_of,
    samples_of,
    unread_ratings,
)

WANTED_AUC, USELESS_AUC = 0.8, 0.65
"""A judge below the second in a dimension carries no conclusion there; between the two it is weak.

At 0.65 a third of its comparisons of a text with the same text made worse are wrong: the two are as
far apart as a difference of half a standard deviation makes two normal scores, which the literature
calls medium (Cohen 1988: d = 0.54).
"""
USELESS_RELIABILITY = 0.4
"""Gaps that correlate less with themselves, when the rubric is worded otherwise, carry nothing.

Less is called poor (Cicchetti, Psychological Assessment 1994); and at 0.4 only 56% of a top quarter
(`statistics.top_share`) are expected to be the top by the judge's own stable opinion.
"""
CORRECTNESS = "correctness"  # whose gaps stand for the truth where no judge is exact
TRIVIAL = ("correctness", "length")
"""Judges that read nothing: the verdict, and "shorter is better"."""
_UNKNOWN = st.Estimate(math.nan, math.nan, math.nan)


def describe(study: Study, name: str) -> JudgeSummary:
    """One judge's numbers: on the generators' traces, on corrupted texts, on pairs of arms."""
    judge = next(j for j in study.experiment.judges if j.name == name)
    summary = _described(study, name, judge.kind, study.rated[name])
    summary.quantization = judge.model.quantization
    summary.audit = _audited(study, name, study.audits)
    summary.edited = _audited(study, name, study.trace_audits)
    summary.reliability = _reliability(study, name)
    arms = [a for a in study.experiment.arms if judge_of(study.experiment, a) == name]
    summary.on_pairs = list(_on_pairs(study, name, study.rated[name], arms, summary.reliability))
    return summary


def trivial(study: Study) -> list[JudgeSummary]:
    """Verdict and length as if they were judges that rate every dimension alike.

    They stand beside the judges on the same texts and the same pairs: what a judge has over them is
    what it sees. Their audits are of the texts of the first judge that was audited.
    """
    if not study.rated:
        return []
    dimensions = next(iter(study.rated.values())).dimensions
    values = {"correctness": study.correct, "length": -study.trace_column("tokens").astype(float)}
    found = []
    for name in TRIVIAL:
        matrix = np.repeat(values[name][:, None], len(dimensions), axis=1)
        rated = RatingMatrix(dimensions, matrix, math.nan)
        summary = _described(study, name, "trivial", rated)
        for field, tables in (("audit", study.audits), ("edited", study.trace_audits)):
            table = next(iter(tables.values()), None)
            if table is not None:
                setattr(summary, field, audit(_trivially_rated(table, name), dimensions))
        exact = any(j.kind == "exact" for j in study.experiment.judges)
        if exact or name != "correctness":  # which is not compared with itself
            summary.on_pairs = list(_on_pairs(study, name, rated, study.experiment.arms, {}))
        found.append(summary)
    return found


def _described(study: Study, name: str, kind: str, rated: RatingMatrix) -> JudgeSummary:
    """What is known of a judge by its ratings of the generators' traces."""
    has = ~np.isnan(rated.matrix).any(axis=1)
    mean, correct = rated.mean[has], study.correct[has]
    by_generator = {}
    for generator, table in study.traces.items():
        values = rated.mean[study.rows_of(columns(table, "trace_id")[0])]
        if not np.isnan(values).all():
            by_generator[generator] = float(np.nanmean(values))
    tokens = study.trace_column("tokens")[has].astype(float)
    checked = ~np.isnan(correct)
    return JudgeSummary(
        name=name,
        kind=kind,
        quantization="",
        traces=int(has.sum()),
        dimensions=rated.dimensions,
        by_generator=by_generator,
        mass=rated.mass,
        auc_correct=st.auc(mean[correct == 1], mean[correct == 0]),
        halo=st.halo(rated.matrix[has]),
        length=st.spearman(mean, tokens),
        audit=None,
        correct=st.spearman(mean[checked], correct[checked]),
        correct_given_length=st.partial_spearman(mean[checked], correct[checked], tokens[checked]),
    )


def shaped_by(arm: Arm, dimensions: Sequence[str]) -> list[str]:
    """What ratings shape the pairs of an arm by: "sum" and dimensions, each once; [] if none do.

    Args:
      arm: of the config.
      dimensions: of its judge.
    """
    found = ["sum"] * (arm.direction not in UNJUDGED)
    if {"best", "worst"} & set(samples_of(arm)):  # a margin of the reference rates no single trace
        found.append("sum" if arm.by == REFERENCE_MARGIN else arm.by)
    if _ranks(arm):
        found.append(arm.by)
    if arm.keep not in KEEPS:  # a function is given all ratings, and may read any
        found += dimensions
    return list(dict.fromkeys(found))


def _ranks(arm: Arm) -> bool:
    """Whether the gaps of a judge rank the pairs of an arm, by `Arm.by`."""
    return arm.keep in RANKED and arm.by != REFERENCE_MARGIN


def _on_pairs(
    study: Study,
    name: str,
    rated: RatingMatrix,
    arms: Sequence[Arm],
    reliability: Mapping[str, Reliability],
) -> Iterator[JudgeOnPairs]:
    """Gaps of a judge on the pairs of the widest arm, and of those of `arms` that ratings shaped.

    They are compared with the gaps of an exact judge or, without one, with those in correctness.
    """
    if not study.pairs:
        return
    widest = widest_arm(study)
    shaped = {a.name: a for a in arms if shaped_by(a, rated.dimensions) and a.name in study.pairs}
    truth, against = _truth(study, name, rated.dimensions)
    tokens = study.trace_column("tokens").astype(float)
    for arm in dict.fromkeys([widest, *shaped]):
        chosen, rejected = study.pair_rows(study.first_draw(arm))
        gaps, true = (m.matrix[chosen] - m.matrix[rejected] for m in (rated, truth))
        longer = tokens[chosen] - tokens[rejected]
        correlations, partial = {}, {}
        for d in (*rated.dimensions, "sum"):
            if d != "sum" and d not in truth.dimensions:
                continue
            x, y = _gap(gaps, rated, d), _gap(true, truth, d)
            known = ~np.isnan(x) & ~np.isnan(y)
            if known.any():
                correlations[d] = st.spearman(x[known], y[known])
                partial[d] = st.partial_spearman(x[known], y[known], longer[known])
        if not correlations:
            continue
        counts = list(study.pair_counts.get(arm, {}).values())
        cut = arm in shaped and _ranks(shaped[arm])
        found = JudgeOnPairs(
            arm=arm,
            by=shaped_by(shaped[arm], rated.dimensions) if arm in shaped else [],
            pairs=len(chosen),
            against=against,
            dimensions=correlations,
            given_length=partial,
            tied=int(max((c.get("tied_at_cut", 0) for c in counts), default=0)) if cut else None,
            expected_top=math.nan,
            true_top=math.nan,
            chance_top=math.nan,
        )
        if cut and shaped[arm].keep in ("top", "bottom"):
            _top(study, found, shaped[arm], truth, reliability)
        yield found


def _top(
    study: Study,
    found: JudgeOnPairs,
    arm: Arm,
    truth: RatingMatrix,
    reliability: Mapping[str, Reliability],
) -> None:
    """Fills in how many of the pairs that were kept as the top ones are that."""
    counts = next(iter(study.pair_counts.get(arm.name, {}).values()), {})
    pool, kept = counts.get("pool", 0), counts.get("kept", 0)
    found.chance_top = kept / pool if pool and kept else arm.fraction
    if by_itself := reliability.get(arm.by):
        correlation = math.sqrt(max(0.0, by_itself.one))
        found.expected_top = st.top_share(correlation, found.chance_top)
    whole = _pool(study, arm)
    # Most pairs are tied in correctness, which so has no top of its own.
    exact = found.against != CORRECTNESS
    if not whole or not exact or not (arm.by == "sum" or arm.by in truth.dimensions):
        return
    pool_pairs, own_pairs = study.first_draw(whole), study.first_draw(arm.name)
    chosen, rejected = study.pair_rows(pool_pairs)
    gap = _gap(truth.matrix[chosen] - truth.matrix[rejected], truth, arm.by)
    if np.isnan(gap).any():
        return
    ids, own = (columns(pairs, "pair_id")[0] for pairs in (pool_pairs, own_pairs))
    inside = dict(zip(ids, _in_top(gap if arm.keep == "top" else -gap, int(kept)), strict=True))
    if set(own) <= inside.keys():
        found.true_top = float(np.mean([inside[i] for i in own]))


def _pool(study: Study, arm: Arm) -> str:
    """An arm of the study that keeps all of the pairs that `arm` selects from; "" if none does."""
    e = study.experiment
    of_pairs = {"chosen", "rejected", "direction", "stratum", "chosen_sample", "rejected_sample"}
    return next(
        (
            b.name
            for b in e.arms
            if b.keep == "all"
            and b.name in study.pairs
            and not is_balanced(e, b)
            and not differing(e, arm, b) & (of_pairs | {"judge", "by"} - unread_ratings(b))
        ),
        "",
    )


def _in_top(values: np.ndarray, k: int) -> np.ndarray:
    """Probability of every item to be among the k largest, [n]; those tied at the cut share it."""
    cut = np.sort(values)[::-1][max(k, 1) - 1]
    above, tied = values > cut, values == cut
    return np.where(above, 1.0, np.where(tied, (k - above.sum()) / tied.sum(), 0.0))


def _gap(gaps: np.ndarray, rated: RatingMatrix, dimension: str) -> np.ndarray:
    """One dimension of gaps [P, dimensions], or their mean, which is ranked as their sum is.

    They are rounded, because ratings are float32: gaps that only rounding tells apart are tied.
    """
    if dimension == "sum":
        return np.round(gaps.mean(axis=1), 5)
    return np.round(gaps[:, rated.dimensions.index(dimension)], 5)


def _truth(study: Study, name: str, dimensions: tuple[str, ...]) -> tuple[RatingMatrix, str]:
    """What a judge is compared with: another judge that is exact, or the verdicts."""
    for j in study.experiment.judges:
        if j.kind == "exact" and j.name != name and j.name in study.rated:
            return study.rated[j.name], f"judge {j.name}"
    verdicts = np.repeat(study.correct[:, None], len(dimensions), axis=1)
    return RatingMatrix(dimensions, verdicts, math.nan), CORRECTNESS


def failings(judge: JudgeSummary, by: str) -> dict[str, float]:
    """What is below the bar where a judge ranked by `by`, with its value; empty if nothing is.

    The AUC is that on edited traces of the generators, and without them that on solutions by
    program, which a judge may have been trained on.
    """
    found = {}
    for source, texts in ((judge.edited, "edited traces"), (judge.audit, "corrupted solutions")):
        if (auc := _auc(source, by)) is not None:
            if auc < USELESS_AUC:
                found[f"its AUC on {texts} is below {USELESS_AUC}"] = auc
            break
    if by in judge.reliability and judge.reliability[by].one < USELESS_RELIABILITY:
        wording = "how its rubric is worded changes its gaps (correlation between wordings below "
        found[f"{wording}{USELESS_RELIABILITY})"] = judge.reliability[by].one
    return found


def _auc(audit: JudgeAudit | None, by: str) -> float | None:
    """AUC in a dimension or of the sum of all; None where none was measured."""
    measured = audit and (audit.auc_sum if by == "sum" else audit.auc.get(by))
    return None if not measured or math.isnan(measured.value) else measured.value


def is_measured(judge: JudgeSummary, by: str) -> bool:
    """Whether it was measured, against corruption or itself, where a judge ranked by `by`."""
    audited = any(_auc(source, by) is not None for source in (judge.edited, judge.audit))
    return audited or (by in judge.reliability and not math.isnan(judge.reliability[by].one))


def doubt(e: Experiment, arm: Arm, judges: Sequence[JudgeSummary]) -> str:
    """Why the judge that shaped the pairs of an arm can't carry a conclusion; "" if it can.

    That it was not measured is a reason too.
    """
    judge = next((j for j in judges if j.name == judge_of(e, arm)), None)
    if judge is None:
        return ""
    clauses = []
    for by in shaped_by(arm, judge.dimensions):
        reasons = [f"{why}: {value:.2f}" for why, value in failings(judge, by).items()]
        if not is_measured(judge, by):
            reasons.append("it was measured neither against known corruption nor against itself")
        if reasons:
            clauses.append(f"by {by.replace('_', ' ')}, where {' and '.join(reasons)}")
    return f"judge {judge.name} shaped its pairs {', and '.join(clauses)}" if clauses else ""


def widest_arm(study: Study) -> str:
    """The arm with most pairs in one draw; those directed by a coin come last, whatever they have.

    A coin turns gaps around at random, and with them what two judges have in common.
    """
    coins = {a.name for a in study.experiment.arms if a.direction == "coin"}
    return max(study.pairs, key=lambda arm: (arm not in coins, study.first_draw(arm).num_rows))


def _mean_of(
    study: Study, name: str, tables: Mapping[str, pa.Table], values: Sequence[str]
) -> pa.Table | None:
    """A judge's rows of the dimensions that it rates; None if it, or a judge of its mean, has none.

    Those of a mean judge are made of its judges' as its ratings are (`stages.judge_mean`): each
    judge's `values` get the mean and the standard deviation that the judges' ratings of all traces
    have on average. A row stays if every judge has it; rows are told apart by all columns
    but `judge` and `values`.
    """
    named = next(j for j in study.experiment.judges if j.name == name)
    judges = named.of if named.kind == "mean" else (name,)
    if not all(j in tables and j in study.rated for j in judges):
        return None
    dimensions = study.rated[name].dimensions
    own = {
        j: tables[j].filter(pc.is_in(tables[j]["dimension"], pa.array(dimensions))) for j in judges
    }
    if judges == (name,):
        return own[name]
    moments = {j: _moments(study.rated[j]) for j in judges}
    mean, spread = (
        {d: np.mean([moments[j][d][i] for j in judges]) for d in dimensions} for i in (0, 1)
    )
    rows: dict[tuple[object, ...], list[list[float]]] = {}
    keys = [c for c in own[judges[0]].column_names if c not in (*values, "judge")]
    for judge in judges:
        for row in own[judge].to_pylist():
            d = row["dimension"]
            centre, scale = moments[judge][d]
            rows.setdefault(tuple(row[key] for key in keys), []).append(
                [mean[d] + spread[d] * (row[value] - centre) / (scale or 1.0) for value in values]
            )
    whole = {
        key: np.mean(found, axis=0) for key, found in rows.items() if len(found) == len(judges)
    }
    of_keys = {key: [row[i] for row in whole] for i, key in enumerate(keys)}
    return pa.table(
        of_keys | {value: [float(v[i]) for v in whole.values()] for i, value in enumerate(values)}
    )


def _moments(rated: RatingMatrix) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of a judge's ratings of all traces, by dimension."""
    rows = rated.matrix[~np.isnan(rated.matrix).any(axis=1)]
    return {
        d: (float(r.mean()), float(r.std())) for d, r in zip(rated.dimensions, rows.T, strict=True)
    }


def _audited(study: Study, name: str, tables: Mapping[str, pa.Table]) -> JudgeAudit | None:
    table = _mean_of(study, name, tables, ("rating",))
    return None if table is None else audit(table, study.rated[name].dimensions)


def audit(table: pa.Table, dimensions: tuple[str, ...]) -> JudgeAudit | None:
    """AUC of texts against their corrupted versions, and mean ratings by degree.

    Both are of the corrupted dimension, and a text is compared with itself: the difference between
    one text and another, which no judge should be blamed for, is not in it.

    Args:
      table: rows of `records.Audit`.
      dimensions: of the judge; those without a text in both forms are left out.

    Returns:
      None if no dimension is left.
    """
    names = ("prompt_id", "target", "degree", "dimension", "rating")
    prompt, target, degree, dimension, rating = columns(table, *names)
    degrees = np.unique(degree)
    aucs, curves, texts = {}, {}, {}
    for d in dimensions:
        rated = dimension == d
        clean = rated & (degree == 0) & np.isin(target, ("", d))
        before = dict(zip(prompt[clean], rating[clean], strict=True))
        known = np.array([p in before for p in prompt], bool)
        corrupted = rated & (degree > 0) & (target == d) & known
        if not corrupted.any():
            continue
        of_text = [before[p] for p in prompt[corrupted]]
        aucs[d] = st.paired_auc(of_text, rating[corrupted], prompt[corrupted].astype(str))
        by_degree = [rating[clean if g == 0 else corrupted & (degree == g)] for g in degrees]
        curves[d] = [float(r.mean()) if len(r) else math.nan for r in by_degree]
        texts[d] = len(set(prompt[corrupted]))
    if not aucs:
        return None
    return JudgeAudit(aucs, _auc_of_sum(table, dimensions), curves, texts)


def _auc_of_sum(table: pa.Table, dimensions: tuple[str, ...]) -> st.Estimate:
    """AUC of the sum of all ratings, of texts against versions corrupted in any dimension.

    As where pairs are ranked, sums that only rounding tells apart are tied. A text that lacks a
    rating is left out.
    """
    names = ("prompt_id", "target", "degree", "dimension", "rating")
    ratings: dict[tuple[str, str, int], dict[str, float]] = {}
    for prompt, target, degree, d, rating in zip(*columns(table, *names), strict=True):
        if d in dimensions:
            ratings.setdefault((prompt, target, int(degree)), {})[d] = float(rating)
    sums = {
        text: round(sum(of.values()), 5)
        for text, of in ratings.items()
        if len(of) == len(dimensions)
    }
    unknown = math.nan
    whole = {t: sums.get((*t[:2], 0), sums.get((t[0], "", 0), unknown)) for t in sums}
    worse = [t for t in sums if t[2] and t[1] in dimensions and not math.isnan(whole[t])]
    return st.paired_auc([whole[t] for t in worse], [sums[t] for t in worse], [t[0] for t in worse])


def _trivially_rated(table: pa.Table, name: str) -> pa.Table:
    """An audit whose ratings are verdicts, or minus the length; rows without a verdict are gone."""
    correct, characters = columns(table, "correct", "characters")
    values = correct.astype(float) if name == "correctness" else -characters.astype(float)
    at = table.column_names.index("rating")
    rated = table.set_column(at, "rating", pa.array(values, pa.float64()))
    return rated.filter(pa.array(~np.isnan(values)))


def _reliability(study: Study, name: str) -> dict[str, Reliability]:
    """Agreement of a judge's gaps over its own wording of the rubric and all others.

    Within the pairs of two generators, whose mean gap is no merit of a judge, and which is taken
    out: an arm ranks such pairs among themselves.
    """
    table = _mean_of(study, name, study.retests, ("chosen", "rejected"))
    if table is None:
        return {}
    rated = study.rated[name]
    names = ("chosen_id", "rejected_id", "wording", "dimension", "chosen", "rejected")
    chosen_id, rejected_id, wording, dimension, chosen, rejected = columns(table, *names)
    wordings = [*np.unique(wording)]
    pairs = list(dict.fromkeys(zip(chosen_id, rejected_id, strict=True)))
    place = {pair: i for i, pair in enumerate(pairs)}
    gaps = np.full((len(pairs), 1 + len(wordings), len(rated.dimensions)), np.nan)
    rows = [study.rows_of(np.array([p[side] for p in pairs])) for side in (0, 1)]
    gaps[:, 0] = rated.matrix[rows[0]] - rated.matrix[rows[1]]
    for i in range(len(chosen)):
        at = place[chosen_id[i], rejected_id[i]]
        column = rated.dimensions.index(dimension[i])
        gaps[at, 1 + wordings.index(wording[i]), column] = chosen[i] - rejected[i]
    complete = ~np.isnan(gaps).any(axis=(1, 2))
    gaps = gaps[complete]
    generators = study.trace_column("generator")
    kinds = np.array([f"{a}\n{b}" for a, b in zip(*(generators[r] for r in rows), strict=True)])
    for kind in np.unique(kinds[complete]):
        of_kind = kinds[complete] == kind
        gaps[of_kind] -= gaps[of_kind].mean(axis=0)
    found: dict[str, Reliability] = {}
    for d in (*rated.dimensions, "sum"):
        readings = gaps.mean(axis=2) if d == "sum" else gaps[:, :, rated.dimensions.index(d)]
        one = st.mean_correlation(readings)
        count = readings.shape[1]
        found[d] = Reliability(one, st.spearman_brown(one, count), count, len(readings))
    return found


def agreement(study: Study) -> list[Agreement]:
    """Every further judge against the first: on all traces, and on the arm with most pairs."""
    if len(study.rated) < 2 or not study.pairs:
        return []
    first, *others = study.rated
    widest = widest_arm(study)
    chosen, rejected = study.pair_rows(study.first_draw(widest))
    agreements = []
    for other in others:
        a, b = study.rated[first].mean, study.rated[other].mean
        both = ~np.isnan(a) & ~np.isnan(b)
        gap_a, gap_b = a[chosen] - a[rejected], b[chosen] - b[rejected]
        known = ~np.isnan(gap_a) & ~np.isnan(gap_b)
        pairs = int(known.sum())
        if not pairs:
            continue
        quarter = max(1, pairs // 4)
        bins = st.agreement_by_gap(gap_a[known], gap_b[known])
        ordered = sum(part.pairs for part in bins)
        agreements.append(
            Agreement(
                first=first,
                second=other,
                traces=int(both.sum()),
                spearman=st.spearman(a[both], b[both]),
                arm=widest,
                pairs=pairs,
                bins=bins,
                alike=sum(part.share * part.pairs for part in bins) / ordered
                if ordered
                else math.nan,
                overlap=st.top_overlap(gap_a[known], gap_b[known], quarter),
                overlap_chance=quarter / pairs,
            )
        )
    return agreements
