"""Statistics of a study: questions are clusters, differences are paired, and all draws are seeded.

The accuracy of a domain is the mean over its suites of the mean over questions of the mean over
samples (avg@k). The k samples of one question are not independent, so intervals come from
resampling questions within suites, and the seeds of an arm above them (arXiv 2411.00640 on
clustered and paired errors of evaluations). All of it is NumPy.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from deltapref_jax.analysis.study import columns

DRAWS = 2000  # of every bootstrap
_NORMAL = NormalDist()
_Z95 = _NORMAL.inv_cdf(0.975)  # half the width of a 95% interval, in standard errors


class Estimate(NamedTuple):
    """A number with its 95% interval, in the unit of the number."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class Answers(NamedTuple):
    """One suite's answers, by question."""

    questions: np.ndarray  # [n] prompt ids, sorted
    mean: np.ndarray  # [n] share of right samples
    samples: np.ndarray  # [n] k


def by_question(results: pa.Table, domain: str) -> dict[str, Answers]:
    """Suite → answers in `domain`, from rows of `records.Result`; empty where there are none."""
    suite_of, domain_of, prompts, correct = columns(
        results, "suite", "domain", "prompt_id", "correct"
    )
    suites = {}
    for suite in sorted(set(suite_of[domain_of == domain])):
        rows = (suite_of == suite) & (domain_of == domain)
        questions, index, k = np.unique(
            prompts[rows].astype(str), return_inverse=True, return_counts=True
        )
        right = np.bincount(index, weights=correct[rows].astype(float))
        suites[suite] = Answers(questions, right / k, k)
    return suites


def _weights(suites: Mapping[str, Answers], draws: int, seed: int) -> dict[str, np.ndarray]:
    """Bootstrap weight of every question, float [draws, n] per suite.

    All arms use the same weights, so that their contrasts are paired.
    """
    rng = np.random.default_rng(seed)
    # Counts of n draws with replacement, divided by n, are the weights of a resampled mean.
    return {
        suite: rng.multinomial(len(a.questions), [1 / len(a.questions)] * len(a.questions), draws)
        / len(a.questions)
        for suite, a in suites.items()
    }


def _estimate(value: float, drawn: np.ndarray, questions: int) -> Estimate:
    """Percentile interval of bootstrap draws in points.

    Where all draws are equal (because no question changed, say), the rule of three replaces it:
    with 95% confidence at most 3/n of all questions differ from the n seen (Hanley &
    Lippman-Hand, JAMA 1983).
    """
    low, high = np.percentile(drawn, [2.5, 97.5])
    if high - low < 1e-9:  # equal draws, up to rounding
        low, high = value - 300 / questions, value + 300 / questions
    return Estimate(float(value), max(float(low), -100.0), min(float(high), 100.0))


def accuracy(results: pa.Table, domain: str, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Accuracy in percent with a cluster-bootstrap interval over questions.

    Raises:
      ValueError: the table has no question in `domain`.
    """
    suites = by_question(results, domain)
    if not suites:
        raise ValueError(f"No answer is of domain {domain!r}; add a suite of it.")
    weights = _weights(suites, draws, seed)
    # Every suite counts the same, however many questions it has.
    drawn = np.mean([weights[suite] @ a.mean for suite, a in suites.items()], axis=0)
    value = float(np.mean([a.mean.mean() for a in suites.values()]))
    estimate = _estimate(100 * value, 100 * drawn, sum(len(a.questions) for a in suites.values()))
    return Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 100.0))


class Change(NamedTuple):
    """Difference between an arm and the student before training, in points."""

    estimate: Estimate
    draws: np.ndarray  # [draws] of the bootstrap; a draw has the same questions in all arms
    p: float  # two-sided, normal approximation with the bootstrap's standard error
    questions: int


def changes(
    before: pa.Table,
    after: Mapping[str, Sequence[pa.Table]],
    domain: str,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Change]:
    """Paired change of every arm; several seeds of an arm are resampled above the questions.

    Of S seeds S - 1 are drawn, which makes the bootstrap's variance over seeds unbiased (Rao & Wu,
    JASA 1988); drawing S would understate it by a half where S = 2. Seeds and questions are
    crossed, and resampling both is slightly conservative (Owen, Annals of Applied Statistics 2007).

    Args:
      before: rows of `records.Result`, of the student before training.
      after: arm to tables of `records.Result`, one per seed, on the same questions.
      domain: "in" or "out".
      draws: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: an arm was evaluated on other questions than the student.
    """
    base = by_question(before, domain)
    weights = _weights(base, draws, seed)
    count = sum(len(a.questions) for a in base.values())
    changed = {}
    for index, (arm, tables) in enumerate(after.items()):
        gaps = _gaps(arm, base, [by_question(results, domain) for results in tables])
        runs = len(tables)
        picked = max(runs - 1, 1)
        # Runs of different arms are independent, so every arm draws its own seeds.
        share = (
            np.random.default_rng([seed, index]).multinomial(picked, [1 / runs] * runs, draws)
            / picked
        )
        # A draw weights the seeds by `share` and the questions by those weights that all arms
        # share.
        drawn = 100 * np.mean(
            [np.sum((share @ g) * weights[suite], axis=1) for suite, g in gaps.items()], axis=0
        )
        value = 100 * float(np.mean([g.mean() for g in gaps.values()]))
        estimate = _estimate(value, drawn, count)
        # Equal draws have no spread; the rule of three's interval gives the error then.
        error = float(drawn.std(ddof=1)) or (estimate.high - estimate.low) / (2 * _Z95)
        changed[arm] = Change(estimate, drawn, two_sided(value, error), count)
    return changed


def _gaps(
    arm: str, base: Mapping[str, Answers], runs: Sequence[Mapping[str, Answers]]
) -> dict[str, np.ndarray]:
    """Accuracy after minus before of every question, float [seeds, n] per suite."""
    for suite, a in base.items():
        for run in runs:
            if suite not in run or not np.array_equal(run[suite].questions, a.questions):
                raise ValueError(
                    f"Arm {arm!r} and the student answered different questions of suite {suite!r}; "
                    "evaluate both with the same config."
                )
    return {
        suite: np.stack([run[suite].mean - a.mean for run in runs]) for suite, a in base.items()
    }


def two_sided(value: float, error: float) -> float:
    """P value of `value` under a normal null with standard error `error`; 1 where both are 0."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return 2 * (1 - _NORMAL.cdf(abs(value) / error))


def minimum_detectable(
    before: pa.Table, seeds: int = 1, power: float = 0.8, level: float = 0.05
) -> dict[str, float]:
    """Smallest true change in points that one arm would show, by domain.

    This assumes that training shifts all questions and all seeds equally, so that the error of a
    paired difference is sampling alone: the within-question variance over k of the student, plus
    that of the arm, which shrinks with the seeds. The variance is estimated from the student's own
    k samples. Where k = 1, or where no question has both right and wrong samples (greedy decoding),
    its largest value p(1 - p) replaces it, with p pulled away from 0 and 1 by two right and two
    wrong answers (Agresti & Coull 1998). Questions or seeds that react differently make the true
    number larger; that policies share their draws makes it smaller.

    Args:
      before: rows of `records.Result`, of the student; the arm is assumed to be evaluated on as
        many questions and samples.
      seeds: of the arm.
      power: chance of finding a change of the returned size.
      level: chance of finding a change where there is none, two-sided.
    """
    # A two-sided normal test has this power at an effect of z(1 - level / 2) + z(power) errors.
    factor = _NORMAL.inv_cdf(1 - level / 2) + _NORMAL.inv_cdf(power)
    smallest = {}
    for domain in ("in", "out"):
        suites = by_question(before, domain)
        variance = 0.0
        for a in suites.values():
            n = len(a.questions)
            # Unbiased variance of a question's mean: p(1 - p) / (k - 1).
            within = float(np.mean(a.mean * (1 - a.mean) / np.maximum(a.samples - 1, 1)))
            if a.samples.min() == 1 or within == 0:
                p = (float(a.mean.sum()) + 2) / (n + 4)
                within = p * (1 - p)
            # The student's error is there once, and the arm's is divided by its seeds.
            variance += (1 + 1 / seeds) * within / n
        if suites:
            # The mean over suites has the root of the summed variances, divided by their number.
            smallest[domain] = 100 * factor * math.sqrt(variance) / len(suites)
    return smallest


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """P values that hold for the whole family of tests, by Holm's step-down method (1979)."""
    ordered = sorted(p, key=lambda name: p[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        # The running maximum keeps the order: no p value may pass a smaller one.
        largest = max(largest, min(1.0, p[name] * (len(ordered) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def benjamini_hochberg(p: Mapping[str, float]) -> dict[str, float]:
    """P values that bound the share of false discoveries (Benjamini & Hochberg 1995)."""
    ordered = sorted(p, key=lambda name: p[name], reverse=True)
    adjusted, smallest = {}, 1.0
    for larger, name in enumerate(ordered):  # so many p values are larger
        # The running minimum keeps the order, from the largest p value down.
        smallest = min(smallest, p[name] * len(ordered) / (len(ordered) - larger))
        adjusted[name] = smallest
    return {name: adjusted[name] for name in p}


def slope(x: Sequence[float], y: Sequence[Change]) -> Estimate | None:
    """Least-squares slope of changes on x, in points per unit; None below 3 arms or at one x.

    It tests "a larger delta helps more". The arms' errors are correlated (they share questions and
    student), which the interval respects because it comes from the arms' joint bootstrap draws. The
    error of x is not in the interval.
    """
    centred = np.asarray(x, float) - np.mean(x) if len(x) else np.zeros(0)
    if len(x) < 3 or not centred.any():
        return None
    # The slope Σ (x - x̄) y / Σ (x - x̄)² is linear in y, so it is taken of every draw at once.
    weights = centred / (centred @ centred)
    low, high = np.percentile(weights @ np.stack([c.draws for c in y]), [2.5, 97.5])
    return Estimate(float(weights @ [c.estimate.value for c in y]), float(low), float(high))


def contrast(a: Change, b: Change) -> Estimate:
    """Change a minus change b in points, paired by the shared questions."""
    return _estimate(a.estimate.value - b.estimate.value, a.draws - b.draws, a.questions)


def ranks(x: ArrayLike) -> np.ndarray:
    """Ranks from 1; ties share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    # The last rank of every group of equal values, from which their mean rank follows.
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; NaN where one side is constant."""
    x, y = ranks(a), ranks(b)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b; NaN where one side is constant. It compares all pairs of items: O(n²)."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    upper = np.triu_indices(len(x), 1)
    s, t = (np.sign(v[:, None] - v[None, :])[upper] for v in (x, y))
    # Tau-b divides by the pairs that are not tied, on either side, instead of all pairs.
    scale = math.sqrt(np.count_nonzero(s) * np.count_nonzero(t))
    return float(s @ t) / scale if scale else math.nan


def auc(higher: ArrayLike, lower: ArrayLike) -> Estimate:
    """Probability that a draw of `higher` exceeds one of `lower`; ties count half (Mann–Whitney).

    The interval is DeLong's (Biometrics 1988), computed from midranks; it takes the two samples as
    independent. All three numbers are NaN if a sample is empty.
    """
    x, y = np.asarray(higher, float), np.asarray(lower, float)
    m, n = len(x), len(y)
    if not m or not n:
        return Estimate(math.nan, math.nan, math.nan)
    r = ranks(np.concatenate([x, y]))
    above = (r[:m] - ranks(x)) / n  # share of `lower` below each of `higher`
    below = 1 - (r[m:] - ranks(y)) / m
    value = float(above.mean())
    # DeLong's variance is that of the shares on both sides, each over its own sample size.
    error = math.sqrt(
        (above.var(ddof=1) / m if m > 1 else 0.0) + (below.var(ddof=1) / n if n > 1 else 0.0)
    )
    return Estimate(value, max(0.0, value - _Z95 * error), min(1.0, value + _Z95 * error))


def halo(ratings: np.ndarray) -> float:
    """Mean rank correlation between the dimensions of ratings [traces, dimensions].

    Near 1, the judge has one opinion and not several (halo effect). NaN if no correlation is
    defined.
    """
    pairs = [
        spearman(ratings[:, i], ratings[:, j]) for i in range(ratings.shape[1]) for j in range(i)
    ]
    defined = [v for v in pairs if not math.isnan(v)]
    return float(np.mean(defined)) if defined else math.nan


def top_overlap(a: ArrayLike, b: ArrayLike, k: int) -> float:
    """Share of the k largest of `a` that are among the k largest of `b`; earlier items win ties."""
    tops = [set(np.argsort(-np.asarray(v, float), kind="stable")[:k].tolist()) for v in (a, b)]
    return len(tops[0] & tops[1]) / k


class GapBin(NamedTuple):
    """Pairs that one judge puts about equally far apart."""

    gap: float  # mean |gap| by the first judge
    share: float  # ordered alike by the second judge, 0 to 1
    pairs: int


def agreement_by_gap(a: ArrayLike, b: ArrayLike, bins: int = 4) -> list[GapBin]:
    """Share of pairs that judge b orders as judge a does, by quantile of a's absolute gap.

    Args:
      a: gaps by the first judge, [P]; pairs of gap 0 are left out.
      b: gaps by the second judge, [P]; gaps of 0 count half.
      bins: quantiles; fewer where there are fewer pairs.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    x, y = x[x != 0], y[x != 0]
    if not len(x):
        return []
    order = np.argsort(np.abs(x), kind="stable")
    agree = np.where(y == 0, 0.5, np.sign(x) == np.sign(y))
    return [
        GapBin(float(np.abs(x[part]).mean()), float(agree[part].mean()), len(part))
        for part in np.array_split(order, min(bins, len(x)))
    ]
