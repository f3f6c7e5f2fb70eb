"""Statistics of accuracies and ratings: questions are clusters, and all draws are seeded.

The accuracy of a domain is the mean over its suites of the mean over questions of the mean over
samples (avg@k). The k samples of one question are not independent, so intervals come from
resampling questions within suites (arXiv 2411.00640 on clustered errors of evaluations).
`analysis.effects` has the differences between models.
"""

import functools
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from deltapref_jax.analysis.study import columns

DRAWS = 2000  # of every bootstrap
_Z95 = NormalDist().inv_cdf(0.975)  # half the width of a 95% interval, in standard errors


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


# From rows of `records.Result` and the name of what is read, to answers by suite.
Read = Callable[[pa.Table, str], Mapping[str, Answers]]


def by_question(results: pa.Table, domain: str) -> dict[str, Answers]:
    """Suite → answers in `domain`, from rows of `records.Result`; empty where there are none."""
    suite_of, domain_of = columns(results, "suite", "domain")
    return {
        suite: answers(results, (suite_of == suite) & (domain_of == domain))
        for suite in sorted(set(suite_of[domain_of == domain]))
    }


def answers(results: pa.Table, rows: np.ndarray) -> Answers:
    """The answers in some rows of `records.Result`, by a mask [rows]."""
    prompts, correct = columns(results, "prompt_id", "correct")
    questions, index, k = np.unique(
        prompts[rows].astype(str), return_inverse=True, return_counts=True
    )
    right = np.bincount(index, weights=correct[rows].astype(float))
    return Answers(questions, right / k, k)


def pass_at_k(samples: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Probability that one of k samples is right, without bias: 1 - C(n-c, k) / C(n, k).

    The estimator of arXiv 2107.03374, section 2.1, as its product over the wrong samples.

    Args:
      samples: n of every question, at least k.
      right: c of every question.
      k: samples drawn without replacement.
    """
    none = np.ones(len(samples))
    for i in range(k):
        # The i-th of k draws is wrong too; C(n-c, k) is 0 once they are used up.
        none *= np.maximum(samples - right - i, 0) / (samples - i)
    return 1 - none


def _weights(suites: Mapping[str, Answers], draws: int, seed: int) -> dict[str, np.ndarray]:
    """Bootstrap weight of every question, float [draws, n] per suite."""
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


def accuracy(
    results: pa.Table, domain: str, draws: int = DRAWS, seed: int = 0, read: Read = by_question
) -> Estimate:
    """Accuracy in percent with a cluster-bootstrap interval over questions.

    Raises:
      ValueError: the table has no question in `domain`.
    """
    suites = read(results, domain)
    if not suites:
        raise ValueError(f"No answer is of domain {domain!r}; add a suite of it.")
    weights = _weights(suites, draws, seed)
    # Every suite counts the same, however many questions it has.
    drawn = np.mean([weights[suite] @ a.mean for suite, a in suites.items()], axis=0)
    value = float(np.mean([a.mean.mean() for a in suites.values()]))
    estimate = _estimate(100 * value, 100 * drawn, sum(len(a.questions) for a in suites.values()))
    return Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 100.0))


def suite_accuracy(answers: Answers) -> Estimate:
    """Accuracy in percent of one suite, with the interval that `accuracy` would give it."""
    n = len(answers.questions)
    value = 100 * float(answers.mean.mean())
    estimate = _estimate(value, 100 * (_suite_weights(n) @ answers.mean), n)
    return Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 100.0))


@functools.cache
def _suite_weights(questions: int) -> np.ndarray:
    """Bootstrap weights of a suite's questions, [DRAWS, questions], shared by all of its tables."""
    return np.random.default_rng(0).multinomial(
        questions, [1 / questions] * questions, DRAWS
    ) / float(questions)


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


def partial_spearman(a: ArrayLike, b: ArrayLike, given: ArrayLike) -> float:
    """Rank correlation of a and b with `given` held constant; NaN where one of them is constant."""
    ab, ag, bg = spearman(a, b), spearman(a, given), spearman(b, given)
    # Of perfect correlation with `given`, nothing is left to correlate.
    rest = math.sqrt(max(0.0, (1 - ag**2) * (1 - bg**2))) if not math.isnan(ag * bg) else 0.0
    return (ab - ag * bg) / rest if rest > 1e-6 else math.nan


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


def paired_auc(before: ArrayLike, after: ArrayLike, cluster: ArrayLike) -> Estimate:
    """How often a text is rated above its own corrupted version; ties count half.

    0.5 is chance. The share is a mean over texts of the mean over the versions of each, and its
    interval Wilson's (JASA 1927) with the number of texts, which is conservative: means over
    versions and ties vary less than a coin. All three numbers are NaN without a comparison.

    Args:
      before: rating of the text, [comparisons].
      after: rating of the corrupted version, [comparisons].
      cluster: which text it is, [comparisons].
    """
    above = 0.5 + 0.5 * np.sign(np.asarray(before, float) - np.asarray(after, float))
    _, text, versions = np.unique(np.asarray(cluster), return_inverse=True, return_counts=True)
    n = len(versions)
    if not n:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(np.mean(np.bincount(text, weights=above) / versions))
    z2 = _Z95**2 / n
    centre = (value + z2 / 2) / (1 + z2)
    half = _Z95 * math.sqrt(value * (1 - value) / n + z2 / (4 * n)) / (1 + z2)
    return Estimate(value, max(0.0, centre - half), min(1.0, centre + half))


def mean_correlation(readings: np.ndarray) -> float:
    """Mean correlation between columns of [n, k]: the reliability of one reading of k.

    Readings of one true score with errors that are independent and equally large in standard units
    correlate by the share of a reading's variance that is true (Spearman, American Journal of
    Psychology 1904). Unlike an intraclass correlation it allows every reading its own centre and
    scale, which no ranking of pairs depends on. NaN with fewer than three rows or two columns, or
    where a column is constant.
    """
    n, k = readings.shape
    if n < 3 or k < 2 or (np.ptp(readings, axis=0) < 1e-9).any():
        return math.nan
    correlations = np.corrcoef(readings, rowvar=False)
    return float(correlations[np.triu_indices(k, 1)].mean())


def spearman_brown(reliability: float, readings: int) -> float:
    """Reliability of the mean of several readings, from that of one: k r / (1 + (k - 1) r).

    Spearman and Brown, both in the British Journal of Psychology 1910. NaN where readings correlate
    so negatively that the formula has no value.
    """
    below = 1 + (readings - 1) * reliability
    return readings * reliability / below if below > 0 else math.nan


def top_share(correlation: float, fraction: float) -> float:
    """Expected share of a top `fraction` by a noisy score that is in the top by the true one.

    Both scores are normal with this correlation, and the share is P(X > z, Y > z) / fraction, where
    P(X > z) = fraction. By Plackett (Biometrika 1954) P(X > z, Y > z) is fraction² plus the
    integral of exp(-z² / (1 + sin t)) / 2π over t from 0 to arcsin(correlation). For a reliability
    r the correlation is that of a reading with its true score, √r. NaN where the correlation is.

    Args:
      correlation: above -1, up to 1.
      fraction: above 0, up to 1.
    """
    if math.isnan(correlation) or fraction >= 1:
        return math.nan if math.isnan(correlation) else 1.0
    z = NormalDist().inv_cdf(1 - fraction)
    nodes, weights = np.polynomial.legendre.leggauss(48)
    end = math.asin(min(1.0, correlation))
    t = end * (nodes + 1) / 2
    density = np.exp(-(z**2) / (1 + np.sin(t))) / (2 * math.pi)
    both = fraction**2 + end / 2 * float(weights @ density)
    return min(1.0, max(0.0, both / fraction))


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
