"""Judges against known truth, and against each other."""

from typing import Any

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.study import Study

WANTED_AUC, USELESS_AUC = 0.8, 0.65


def describe(study: Study, name: str) -> dict[str, Any]:
    """One judge's numbers: on the generators' traces, and against known corruption where it was audited."""
    rated = study.rated[name]
    has = ~np.isnan(rated.matrix).any(axis=1)
    mean, correct = rated.mean[has], study.correct[has]
    by_generator = {}
    for generator, table in study.traces.items():
        rows = [study.place[i] for i in table["trace_id"].to_pylist()]
        values = rated.mean[rows]
        if not np.isnan(values).all():
            by_generator[generator] = float(np.nanmean(values))
    config = next(j for j in study.experiment["judges"] if j["name"] == name)
    found: dict[str, Any] = {
        "name": name,
        "kind": config["kind"],
        "traces": int(has.sum()),
        "dimensions": list(rated.dimensions),
        "by_generator": by_generator,
        "mass": rated.mass,
        "auc_correct": list(st.auc(mean[correct == 1], mean[correct == 0])),
        "halo": st.halo(rated.matrix[has]),
        "length": st.spearman(mean, study.column("tokens")[has].astype(float)),
    }
    if name in study.audits and study.audits[name].num_rows:
        found |= audit(study.audits[name], rated.dimensions)
    return found


def audit(table: pa.Table, dimensions: tuple[str, ...]) -> dict[str, Any]:
    """AUC of clean against corrupted in the corrupted dimension, and mean ratings by degree of corruption."""
    column = {
        name: table[name].to_numpy(zero_copy_only=False)
        for name in ("target", "degree", "dimension", "rating")
    }
    degrees = sorted(set(column["degree"].tolist()))
    aucs, curves = {}, {}
    for d in dimensions:
        rated = column["dimension"] == d
        clean = rated & (column["degree"] == 0) & np.isin(column["target"], ("", d))
        spoilt = rated & (column["degree"] > 0) & (column["target"] == d)
        if not clean.any() or not spoilt.any():
            continue
        aucs[d] = list(st.auc(column["rating"][clean], column["rating"][spoilt]))
        cells = [
            column["rating"][clean if degree == 0 else spoilt & (column["degree"] == degree)]
            for degree in degrees
        ]
        curves[d] = [float(cell.mean()) if len(cell) else None for cell in cells]
    if not aucs:
        return {}
    return {
        "auc": aucs,
        "auc_mean": float(np.mean([a[0] for a in aucs.values()])),
        "curves": curves,
        "useless": [d for d, a in aucs.items() if a[0] < USELESS_AUC],
    }


def agreement(study: Study) -> list[dict[str, Any]]:
    """Every further judge against the first: on all traces, and on the pairs of the arm that has most of them."""
    if len(study.rated) < 2 or not study.pairs:
        return []
    first, *others = study.rated
    widest = max(study.pairs, key=lambda arm: study.pairs[arm].num_rows)
    chosen, rejected = study.rows(widest)
    found = []
    for other in others:
        a, b = study.rated[first].mean, study.rated[other].mean
        both = ~np.isnan(a) & ~np.isnan(b)
        gap_a, gap_b = a[chosen] - a[rejected], b[chosen] - b[rejected]
        known = ~np.isnan(gap_a) & ~np.isnan(gap_b)
        if not known.any():
            continue
        k = max(1, int(known.sum()) // 4)
        bins = st.agreement_by_gap(gap_a[known], gap_b[known])
        counted = sum(n for _, _, n in bins)
        found.append(
            {
                "first": first,
                "second": other,
                "traces": int(both.sum()),
                "spearman": st.spearman(a[both], b[both]),
                "arm": widest,
                "pairs": int(known.sum()),
                "bins": [list(x) for x in bins],
                "alike": sum(share * n for _, share, n in bins) / counted if counted else None,
                "overlap": st.top_overlap(gap_a[known], gap_b[known], k),
                "overlap_chance": k / int(known.sum()),
            }
        )
    return found
