"""Judges against known truth, and against each other."""

import math

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.page import Agreement, JudgeAudit, JudgeSummary
from deltapref_jax.analysis.study import Study, columns

# A judge below USELESS_AUC carries no conclusion; between the two it is called weak.
WANTED_AUC, USELESS_AUC = 0.8, 0.65


def describe(study: Study, name: str) -> JudgeSummary:
    """One judge's numbers on the generators' traces, and on corrupted ones if it was audited."""
    rated = study.rated[name]
    has = ~np.isnan(rated.matrix).any(axis=1)
    mean, correct = rated.mean[has], study.correct[has]
    by_generator = {}
    for generator, table in study.traces.items():
        values = rated.mean[study.rows_of(columns(table, "trace_id")[0])]
        if not np.isnan(values).all():
            by_generator[generator] = float(np.nanmean(values))
    return JudgeSummary(
        name=name,
        kind=next(j.kind for j in study.experiment.judges if j.name == name),
        traces=int(has.sum()),
        dimensions=rated.dimensions,
        by_generator=by_generator,
        mass=rated.mass,
        auc_correct=st.auc(mean[correct == 1], mean[correct == 0]),
        halo=st.halo(rated.matrix[has]),
        length=st.spearman(mean, study.trace_column("tokens")[has]),
        audit=audit(study.audits[name], rated.dimensions) if name in study.audits else None,
    )


def audit(table: pa.Table, dimensions: tuple[str, ...]) -> JudgeAudit | None:
    """AUC of clean against corrupted in the corrupted dimension, and mean ratings by degree.

    Args:
      table: rows of `records.Audit`.
      dimensions: of the judge; those without both clean and corrupted solutions are left out.

    Returns:
      None if no dimension is left.
    """
    target, degree, dimension, rating = columns(table, "target", "degree", "dimension", "rating")
    degrees = np.unique(degree)
    aucs, curves = {}, {}
    for d in dimensions:
        rated = dimension == d
        clean = rated & (degree == 0) & np.isin(target, ("", d))
        corrupted = rated & (degree > 0) & (target == d)
        if not clean.any() or not corrupted.any():
            continue
        aucs[d] = st.auc(rating[clean], rating[corrupted])
        by_degree = [rating[clean if g == 0 else corrupted & (degree == g)] for g in degrees]
        curves[d] = [float(r.mean()) if len(r) else math.nan for r in by_degree]
    if not aucs:
        return None
    useless = [d for d, auc in aucs.items() if auc.value < USELESS_AUC]
    return JudgeAudit(aucs, float(np.mean([a.value for a in aucs.values()])), curves, useless)


def agreement(study: Study) -> list[Agreement]:
    """Every further judge against the first: on all traces, and on the arm with most pairs."""
    if len(study.rated) < 2 or not study.pairs:
        return []
    first, *others = study.rated
    widest = max(study.pairs, key=lambda arm: study.pairs[arm].num_rows)
    chosen, rejected = study.pair_rows(widest)
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
