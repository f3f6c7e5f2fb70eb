"""Statistics of a study: questions are clusters, differences are paired, everything is seeded.

Accuracy of a domain is the mean over its suites of the mean over questions of the mean over samples (avg@k); the k
samples of one question are not independent, so intervals come from resampling questions within suites, and seeds of an
arm above them (arXiv 2411.00640 on clustered and paired errors of evaluations).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

DRAWS = 2000
_NORMAL = NormalDist()


class Estimate(NamedTuple):
    """A number with its 95% interval, in the unit of the number."""

    value: float
    low: float
    high: float


Suites = dict[str, dict[str, np.ndarray]]


def by_question(results: pa.Table, domain: str) -> Suites:
    """suite → question → correctness [k] of a RESULT table's rows in `domain`."""
    suites: Suites = {}
    lists: dict[str, dict[str, list[bool]]] = {}
    for row in results.to_pylist():
        if row["domain"] == domain:
            lists.setdefault(row["suite"], {}).setdefault(row["prompt_id"], []).append(row["correct"])
    for suite, questions in lists.items():
        suites[suite] = {q: np.asarray(v, float) for q, v in questions.items()}
    return suites


def _resample(sizes: Mapping[str, int], draws: int, seed: int) -> dict[str, np.ndarray]:
    """Question indices [draws, n] per suite; the same for every arm, so that contrasts of arms are paired too."""
    rng = np.random.default_rng(seed)
    return {suite: rng.integers(0, n, (draws, n)) for suite, n in sorted(sizes.items())}


def accuracy(results: pa.Table, domain: str, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Accuracy in percent with a bootstrap interval over questions."""
    suites = by_question(results, domain)
    means = {suite: np.array([v.mean() for v in questions.values()]) for suite, questions in suites.items()}
    picks = _resample({suite: len(m) for suite, m in means.items()}, draws, seed)
    drawn = np.mean([means[suite][picks[suite]].mean(axis=1) for suite in means], axis=0)
    value = float(np.mean([m.mean() for m in means.values()]))
    return _estimate(100 * value, 100 * drawn)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


class Change(NamedTuple):
    """Difference of an arm to the student before training, in points."""

    estimate: Estimate
    draws: np.ndarray  # [draws], bootstrap; draws of all arms share their questions
    p: float  # two-sided, normal approximation with the bootstrap's standard error


def changes(
    before: pa.Table, after: Mapping[str, Sequence[pa.Table]], domain: str, draws: int = DRAWS, seed: int = 0
) -> dict[str, Change]:
    """Paired change of every arm; of several seeds, seeds are resampled above questions (hierarchical bootstrap).

    Args:
      before: RESULT of the student before training.
      after: arm to RESULT tables, one per seed, on the same questions.
      domain: "in" or "out".
      draws: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: an arm was evaluated on other questions than the student.
    """
    base = by_question(before, domain)
    picks = _resample({suite: len(q) for suite, q in base.items()}, draws, seed)
    found = {}
    for place, (arm, tables) in enumerate(after.items()):
        gaps: dict[str, list[list[float]]] = {suite: [] for suite in base}
        for results in tables:
            suites = by_question(results, domain)
            for suite, questions in base.items():
                if suites.get(suite, {}).keys() != questions.keys():
                    raise ValueError(f"Arm {arm!r} and the student answered different questions of suite {suite!r}; "
                                     "evaluate both with the same config.")
                gaps[suite].append([suites[suite][q].mean() - v.mean() for q, v in questions.items()])
        arrays = {suite: np.asarray(g) for suite, g in gaps.items()}  # [seeds, n]
        count = len(tables)
        runs = np.random.default_rng([seed, place]).integers(0, count, (draws, count)) if count > 1 else np.zeros(
            (draws, 1), int)
        drawn = np.mean([a[runs[:, :, None], picks[suite][:, None, :]].mean(axis=(1, 2))
                         for suite, a in arrays.items()], axis=0) * 100
        value = float(np.mean([a.mean() for a in arrays.values()])) * 100
        found[arm] = Change(_estimate(value, drawn), drawn, two_sided(value, float(drawn.std(ddof=1))))
    return found


def two_sided(value: float, error: float) -> float:
    """p of a value under a normal null of that standard error; 1 where both are 0."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return 2 * (1 - _NORMAL.cdf(abs(value) / error))


def minimum_detectable(before: pa.Table, power: float = 0.8, level: float = 0.05) -> dict[str, float]:
    """Smallest true change, in points, that one arm and seed would show with `power` at a two-sided `level`, by domain.

    Assumes that training shifts every question alike, so that the error of a paired difference is sampling alone: twice
    the within-question variance over k, estimated from the student's own k samples (with k = 1: p(1 - p), its largest
    value). Questions that react differently make the true number larger.
    """
    factor = _NORMAL.inv_cdf(1 - level / 2) + _NORMAL.inv_cdf(power)
    found = {}
    for domain in ("in", "out"):
        suites = by_question(before, domain)
        if not suites:
            continue
        variance = 0.0
        for questions in suites.values():
            within = [v.var(ddof=1) / len(v) if len(v) > 1 else v.mean() * (1 - v.mean()) for v in questions.values()]
            if all(len(v) == 1 for v in questions.values()):
                p = float(np.mean([v.mean() for v in questions.values()]))
                within = [p * (1 - p)]
            variance += 2 * float(np.mean(within)) / len(questions)
        found[domain] = 100 * factor * math.sqrt(variance) / len(suites)
    return found


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: p values that hold for the whole family of tests."""
    ordered = sorted(p, key=lambda name: p[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, p[name] * (len(ordered) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def slope(x: Sequence[float], y: Sequence[Change]) -> Estimate | None:
    """Least-squares slope of changes on x (points per unit), interval from the joint bootstrap; None below 3 arms.

    The test for "a larger delta helps more".
    """
    centred = np.asarray(x, float) - np.mean(x)
    if len(x) < 3 or not centred.any():
        return None
    weights = centred / (centred @ centred)
    return _estimate(float(weights @ [c.estimate.value for c in y]), weights @ np.stack([c.draws for c in y]))


def contrast(a: Change, b: Change) -> Estimate:
    """a minus b, in points; paired by the shared questions."""
    return _estimate(a.estimate.value - b.estimate.value, a.draws - b.draws)


def ranks(x: ArrayLike) -> np.ndarray:
    """Ranks from 1, ties share their mean."""
    _, inverse, counts = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; NaN where one side is constant."""
    x, y = ranks(a), ranks(b)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Probability that a draw of `higher` exceeds one of `lower`, ties half (Mann–Whitney); NaN if one is empty."""
    if not len(higher) or not len(lower):
        return float("nan")
    r = ranks(np.concatenate([np.asarray(higher, float), np.asarray(lower, float)]))[: len(higher)]
    return float((r.sum() - len(higher) * (len(higher) + 1) / 2) / (len(higher) * len(lower)))


def agreement_by_gap(a: Sequence[float], b: Sequence[float], bins: int = 4) -> list[tuple[float, float, int]]:
    """Share of pairs that judge b orders as judge a does, by quantile of |gap of a|: (mean |gap|, share, pairs).

    Pairs that a rates equal are left out; a tie of b counts half.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    x, y = x[x != 0], y[x != 0]
    if not len(x):
        return []
    order = np.argsort(np.abs(x), kind="stable")
    agree = np.where(y == 0, 0.5, np.sign(x) == np.sign(y))
    return [(float(np.abs(x[part]).mean()), float(agree[part].mean()), len(part))
            for part in np.array_split(order, min(bins, len(x)))]
