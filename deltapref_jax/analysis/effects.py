"""Effects of arms on one domain: paired changes, with the noise of questions and of training.

The change of an arm is the mean over suites of the mean over questions of the accuracy after
training minus the accuracy before. Two things make it uncertain:

- Questions: another draw of questions, or of answers to them, would have given another mean. The
  questions of every suite are resampled with the gaps of an arm averaged over its runs, so that the
  noise of sampled answers is counted once, and falls with the runs.
- Training: another seed, or another draw of the pairs, would have given another policy. The
  variance of a run's main effect (what shifts all questions of a run alike) is a component
  (`analysis.components`): the variance of the runs' means, minus the share of it that the
  interaction of runs and questions explains. It is pooled over the arms of one kind that have
  several runs, and the other arms borrow it.

All effects of a domain share the draws of questions, so the draws of every linear combination of
arms (a contrast, a slope) are the combination of their draws. A variance that few runs have
measured is uncertain itself: the draws of a combination are widened as Student's t is against the
normal distribution, with the degrees of freedom of its whole variance (Satterthwaite 1946).
"""

import dataclasses
import hashlib
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from scipy import optimize, special

from deltapref_jax.analysis.components import Component, Kind, Noise, measured_by, pooled
from deltapref_jax.analysis.page import Measured
from deltapref_jax.analysis.statistics import Answers, Estimate, Read, by_question
from deltapref_jax.config import Run

Key = TypeVar("Key", bound=Hashable)

DRAWS = 4000
_BLOCK = 500  # draws made at a time, which bounds the memory
_FEW = 10  # questions that differ from most below which the exact interval is the bootstrap's
_ROUNDING = 1e-9  # points below which a difference is one of floating point
_Z95 = float(special.ndtri(0.975))


class Effect(NamedTuple):
    """A linear combination of changes, in points."""

    estimate: Estimate
    p: float  # two-sided; below 0.05 where the interval excludes 0
    bound: float  # the effect is equivalent to 0 at every margin from here (TOST at 5%)
    draws: np.ndarray  # [DRAWS], around the estimate; joint with all others of the domain
    questions: int


@dataclasses.dataclass(frozen=True)
class Effects:
    """Changes of all arms in one domain."""

    names: tuple[str, ...]
    gaps: np.ndarray  # [arms, n] in points: a row's sum is the arm's change
    by_question: np.ndarray  # [arms, DRAWS] deviations by the draw of questions
    by_run: np.ndarray  # [arms, DRAWS] deviations by seeds and draws of pairs
    shares: np.ndarray  # [arms, 2] of a seed's and of a draw's variance that an arm's mean has
    noise: tuple[Noise, ...]  # of every arm
    chance: np.ndarray  # [DRAWS] from 0 to 1: how far the estimated variance is off
    sizes: tuple[int, ...]  # questions of every suite
    own: Mapping[str, Noise] = dataclasses.field(default_factory=dict)  # what each arm measures
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)  # by arm
    seed: int = 0  # of the draws of training
    students: tuple[int, ...] = ()  # whose change each arm's is, where there are several

    def change(self, arm: str) -> Effect:
        """Accuracy after training minus before."""
        return self.combined({arm: 1.0})

    def contrast(self, a: str, b: str) -> Effect:
        """Change of a minus change of b, paired by the questions that they share."""
        return self.combined({a: 1.0, b: -1.0} if a != b else {})

    def slope(self, x: Mapping[str, float]) -> Effect | None:
        """Least-squares slope of changes on x by arm; None below 3 arms or at one x.

        It tests "a larger delta helps more". The error of x is not in the interval.
        """
        weights = slope_weights(x)
        return None if weights is None else self.combined(weights)

    def of_kind(self, names: Sequence[str], without: str = "") -> "Effects":
        """The effects of some arms, with the noise of training that arms of their kind measured.

        A difference between runs of the arm `without` is compared with noise that it is no part of,
        and none is borrowed from another kind, which may have far less.
        """
        rows = [self.names.index(name) for name in names]
        others = {name: own for name, own in self.own.items() if name != without}
        noise = pooled(names, others, self.kinds, borrow=False)
        shares = self.shares[rows]
        return dataclasses.replace(
            self,
            names=tuple(names),
            gaps=self.gaps[rows],
            by_question=self.by_question[rows],
            by_run=_by_run(names, shares, noise, self.seed),
            shares=shares,
            noise=noise,
        )

    def combined(self, weights: Mapping[str, float]) -> Effect:
        """The sum of the arms' changes times their weights."""
        w = self._vector(weights)
        gaps, by_run, by_question = (
            _weighted(w, x) for x in (self.gaps, self.by_run, self.by_question)
        )
        value, n = float(gaps.sum()), self.gaps.shape[1]
        freedom = self.freedom(weights)
        # A normal draw over the root of chi-squared / freedom has Student's t distribution.
        widened = np.sqrt(freedom / special.chdtri(freedom, self.chance))
        by_run = by_run * widened
        draws = value + by_question * widened + by_run
        rare = self._rare(w)
        if rare is not None:
            estimate = _exact(value, rare, self._largest(w, rare), by_run)
            toward_0 = value - estimate.low if value > 0 else estimate.high - value
            p = float(2 * special.ndtr(-_Z95 * abs(value) / toward_0)) if value else 1.0
            # The limits of 95% are farther out than those of the two one-sided tests.
            bound = max(abs(estimate.low), abs(estimate.high))
        else:
            estimate = Estimate(value, *(float(v) for v in np.percentile(draws, [2.5, 97.5])))
            beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
            p = min(1.0, 2 * (1 + beyond) / (1 + len(draws)))
            bound = float(np.abs(np.percentile(draws, [5, 95])).max())
        limit = self._limit(w)
        low, high = max(estimate.low, -limit), min(estimate.high, limit)
        return Effect(Estimate(value, low, high), p, min(bound, limit), draws, n)

    def _vector(self, weights: Mapping[str, float]) -> np.ndarray:
        w = np.zeros(len(self.names))
        for name, weight in weights.items():
            w[self.names.index(name)] += weight
        return w

    def few_differ(self, weights: Mapping[str, float]) -> bool:
        """Whether so few questions differ from most in a combination that the exact interval holds.

        Most have no change, or one change in common, as where all questions of a suite are won.
        """
        return self._rare(self._vector(weights)) is not None

    def _rare(self, w: np.ndarray) -> np.ndarray | None:
        """How far every question is from most, [n] in points; None where more than few differ.

        Questions that count differently are as many as equal ones of the same relative error, with
        one more that may differ unseen: 15 of a suite of 300 are few beside a suite of 10.
        """
        gaps = _weighted(w, self.gaps)
        for deviations in (gaps, gaps - _common(gaps, self.sizes)):
            size, largest = np.abs(deviations), self._largest(w, deviations)
            if not largest or (size.sum() + largest) ** 2 < (_FEW + 1) * (size @ size + largest**2):
                return deviations
        return None

    def _largest(self, w: np.ndarray, gaps: np.ndarray) -> float:
        """The most points that one more question would add, if it differed as far as any did.

        Where none differs, it is what a question adds that goes from wrong to right.
        """
        counts = [1 / (len(self.sizes) * n) for n in self.sizes]  # of a question in the mean
        seen = float((np.abs(gaps) / np.repeat(counts, self.sizes)).max(initial=0))
        return (seen if seen > _ROUNDING else self._limit(w)) * max(counts, default=0.0)

    def _limit(self, w: np.ndarray) -> float:
        """The largest combination that there can be, since accuracies are from 0 to 100 points.

        With the accuracies a of the arms and a₀ of the student it is Σ w a - (Σ w) a₀.
        """
        of_students = np.array(self.students or (0,) * len(w))
        parts = [w[of_students == student] for student in set(of_students.tolist())]
        return 100.0 * sum(float(max(v[v > 0].sum(), -v[v < 0].sum())) for v in parts)

    def error(self, weights: Mapping[str, float]) -> float:
        """Standard error of a combination, in points, by its components."""
        w = self._vector(weights)
        return math.sqrt(
            float(_weighted(w, self.by_question).var() + _weighted(w, self.by_run).var())
        )

    def freedom(self, weights: Mapping[str, float]) -> float:
        """Degrees of freedom of the variance of a combination, which is a sum of mean squares.

        By Satterthwaite, and no fewer than its components have: the formula falls below them where
        the variance of a component is estimated as 0 and its mean square is not.
        """
        w, variance = self._vector(weights), self.error(weights) ** 2
        if not variance:
            return float(self.gaps.shape[1])
        suites = np.split(_weighted(w, self.gaps), np.cumsum(_strata(self.sizes))[:-1])
        of_suites = [(len(s) * float(s.var(ddof=1)), len(s) - 1) for s in suites if len(s) > 1]
        freedoms = [max(1.0, _satterthwaite(of_suites))]
        squared = float(_weighted(w, self.by_question).var()) ** 2 / freedoms[0]
        shares: dict[Component, float] = {}  # arms of one kind share one measurement
        for row in np.flatnonzero(w):
            for share, component in zip(self.shares[row], self.noise[row], strict=True):
                if component and share:
                    shares[component] = shares.get(component, 0.0) + w[row] ** 2 * share
        for component, share in shares.items():
            squared += float(share * component.mean_square) ** 2 / component.freedom
            freedoms.append(component.freedom)
        return max(variance**2 / squared, min(freedoms)) if squared else float(min(freedoms))


def _weighted(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Σ w x over the arms that count: most combinations are of a few among hundreds."""
    rows = np.flatnonzero(w)
    return w[rows] @ x[rows]


def _common(gaps: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The change that most questions of every suite have in common, [n]; 0 where there is none."""
    common = np.zeros_like(gaps)
    ends = np.cumsum(_strata(sizes))
    for start, end in zip(np.r_[0, ends[:-1]], ends, strict=True):
        median = np.median(gaps[start:end])
        if 2 * np.count_nonzero(np.abs(gaps[start:end] - median) < _ROUNDING) > end - start:
            common[start:end] = median
    return common


def _strata(sizes: Sequence[int]) -> list[int]:
    """Questions that are resampled together: those of a suite, and all that are alone in theirs.

    One question can't say how another of its suite would differ, so they say it for each other
    (collapsed strata: Cochran, Sampling Techniques, 1977, section 5A.12), or a single one with the
    suite before it. `_gaps` has them last.
    """
    strata = [n for n in sizes if n > 1]
    alone = len(sizes) - len(strata)
    if alone == 1 and strata:
        strata[-1] += 1
    elif alone:
        strata.append(alone)
    return strata


def _satterthwaite(variances: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of estimated variances, from those of each."""
    squared = sum(variance**2 / freedom for variance, freedom in variances)
    fewest = min((freedom for _, freedom in variances), default=0.0)
    return sum(variance for variance, _ in variances) ** 2 / squared if squared else fewest


def slope_weights(x: Mapping[str, float]) -> dict[str, float] | None:
    """What every arm's change counts in their slope on x; None below 3 arms or at one x."""
    values = np.array(list(x.values()), float)
    centred = values - values.mean() if len(values) else values
    if len(values) < 3 or not centred.any():
        return None
    # The slope Σ (x - x̄) y / Σ (x - x̄)² is linear in y.
    return dict(zip(x, (centred / (centred @ centred)).tolist(), strict=True))


def joint(of_students: Mapping[str, Effects], seed: int = 0) -> Effects:
    """Effects of several students as one, whose arms are named `student/arm`.

    The students answered the same questions and share the draws of them, so that what questions do
    to both cancels in a difference. Their trainings are taken as independent, and every student
    keeps the components that its own runs measured.

    Args:
      of_students: by student, in one domain.
      seed: of the draws of training.

    Raises:
      ValueError: the students answered different numbers of questions.
    """
    found = list(of_students.values())
    if len({e.gaps.shape[1] for e in found}) > 1:
        raise ValueError(
            f"The students {', '.join(of_students)} answered different numbers of questions; "
            "evaluate all with the same suites."
        )
    names = tuple(f"{student}/{arm}" for student, e in of_students.items() for arm in e.names)
    shares = np.concatenate([e.shares for e in found])
    noise = tuple(of_arm for e in found for of_arm in e.noise)
    return Effects(
        names,
        np.concatenate([e.gaps for e in found]),
        np.concatenate([e.by_question for e in found]),
        _by_run(names, shares, noise, seed),
        shares,
        noise,
        found[0].chance,
        found[0].sizes,
        seed=seed,
        students=tuple(i for i, e in enumerate(found) for _ in e.names),
    )


def effects(
    before: pa.Table,
    after: Mapping[str, Mapping[Run, pa.Table]],
    domain: str,
    kinds: Mapping[str, Kind] = MappingProxyType({}),
    seed: int = 0,
    read: Read = by_question,
    measuring: Collection[str] | None = None,
) -> Effects:
    """Paired changes of all arms.

    Two runs of `after` are two policies: where draws of pairs give equal pairs, one is left out.

    Args:
      before: rows of `records.Result`, of the student before training.
      after: arm to run to rows of `records.Result`, on the same questions.
      domain: "in" or "out".
      kinds: of the arms, see `components`; an arm without one is of `Kind()`, which no draw moves.
      seed: of the draws.
      read: gives the answers of a table in the domain.
      measuring: arms whose runs measure the noise of training; None: all of them.

    Raises:
      ValueError: an arm was evaluated on other questions than the student.
    """
    # Suites of one question are last, see `_strata`.
    base = dict(sorted(read(before, domain).items(), key=lambda s: len(s[1].questions) == 1))
    gaps = {
        arm: _gaps(arm, base, {r: read(t, domain) for r, t in runs.items()})
        for arm, runs in after.items()
    }
    sizes = [len(a.questions) for a in base.values()]
    strata = _strata(sizes)
    own = {
        arm: measured_by(runs, keys, strata)
        for arm, (runs, keys) in gaps.items()
        if measuring is None or arm in measuring
    }
    noise = pooled(tuple(gaps), own, kinds)
    means = np.array([runs.mean(axis=0) for runs, _ in gaps.values()]).reshape(-1, sum(sizes))
    shares = np.array(
        [
            (
                1 / len({key.seed for key in keys}),
                bool(kinds.get(arm, Kind()).draw) / len({key.draw for key in keys}),
            )
            for arm, (_, keys) in gaps.items()
        ]
    ).reshape(-1, 2)
    return Effects(
        tuple(gaps),
        means,
        _resampled(means, strata, seed),
        _by_run(tuple(gaps), shares, noise, seed),
        shares,
        noise,
        np.random.default_rng([seed, 1]).random(DRAWS),
        tuple(sizes),
        own,
        kinds,
        seed,
    )


def _gaps(
    arm: str, base: Mapping[str, Answers], runs: Mapping[Run, Mapping[str, Answers]]
) -> tuple[np.ndarray, list[Run]]:
    """What every question adds to the change of every run, [runs, n] in points, and the runs."""
    for suite, a in base.items():
        for run in runs.values():
            if suite not in run or not np.array_equal(run[suite].questions, a.questions):
                raise ValueError(
                    f"Arm {arm!r} and the student answered different questions of suite {suite!r}; "
                    "evaluate both with the same config."
                )
    by_suite = [
        # Every suite counts the same, however many questions it has.
        [100 * (run[suite].mean - a.mean) / (len(base) * len(a.questions)) for run in runs.values()]
        for suite, a in base.items()
    ]
    return np.concatenate(by_suite, axis=1), list(runs)


def _resampled(gaps: np.ndarray, sizes: Sequence[int], seed: int) -> np.ndarray:
    """Deviations of every arm's change under resampled questions, [arms, DRAWS].

    All arms share the draws.
    """
    blocks = [gaps @ weights.T for weights in _weights(tuple(sizes), seed)]
    return np.concatenate(blocks, axis=1)


def _weights(sizes: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Weights of resampled questions minus 1, [_BLOCK, n], until there are DRAWS of them.

    The variance of n draws from n questions is (n - 1) / n of what it estimates, which the factor
    sqrt(n / (n - 1)) makes up for.
    """
    rng = np.random.default_rng([seed, 0])
    for _ in range(DRAWS // _BLOCK):
        yield np.concatenate(
            [
                (rng.multinomial(n, [1 / n] * n, _BLOCK) - 1.0) * math.sqrt(n / max(n - 1, 1))
                for n in sizes
            ],
            axis=1,
        )


def _by_run(
    names: Sequence[str], shares: np.ndarray, noise: Sequence[Noise], seed: int
) -> np.ndarray:
    """Deviations of every arm's change by seeds and draws of pairs, [arms, DRAWS]."""
    normal = np.array([_of_name(name, seed).standard_normal(DRAWS) for name in names])
    variances = np.array([[c.variance if c else 0.0 for c in of_arm] for of_arm in noise])
    errors = np.sqrt((shares * variances.reshape(-1, 2)).sum(axis=1))
    return errors[:, None] * normal.reshape(-1, DRAWS)


def _of_name(arm: str, seed: int) -> np.random.Generator:
    """A generator that hangs on an arm's name, so that other arms do not move its interval."""
    digest = hashlib.sha256(arm.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def _exact(value: float, deviations: np.ndarray, largest: float, by_run: np.ndarray) -> Estimate:
    """The interval where few questions differ from most, which resampling makes too short.

    Gains and losses are sums of rare events: each has the limits of `_rare_limits`, and the limits
    of their difference follow from those of both (Zou & Donner, Statistics in Medicine 2008).
    Where all questions count the same it excludes 0 from five gains without a loss on, as the mid-p
    sign test does. The noise of training widens both sides.

    Args:
      value: of the combination, in points.
      deviations: of the questions from what most do, [n] in points.
      largest: points that a question adds which differs unseen.
      by_run: deviations by training, [DRAWS].
    """
    (gain_low, gain_high), (loss_low, loss_high) = (
        _rare_limits(side[side > _ROUNDING], largest) for side in (deviations, -deviations)
    )
    gains, losses = (float(side[side > _ROUNDING].sum()) for side in (deviations, -deviations))
    training = np.diff(np.percentile(by_run, [2.5, 97.5]))[0] / 2
    below = math.hypot(gains - gain_low, loss_high - losses, training)
    above = math.hypot(gain_high - gains, losses - loss_low, training)
    return Estimate(value, value - below, value + above)


def _rare_limits(sizes: np.ndarray, largest: float) -> tuple[float, float]:
    """95% mid-p limits of the expected sum of rare events, whose sizes may differ.

    Gamma distributions with the mean and variance of the sum, and of the sum with one more event of
    the largest size, bound it (Fay & Feuer, Statistics in Medicine 1997), with equal weights (Fay &
    Kim, Biometrical Journal 2017). Where all sizes are equal these are the mid-p limits of a
    Poisson mean: without an event 3.0, the rule of three.

    Args:
      sizes: of the events seen, [events].
      largest: size that an event may have.
    """
    if not largest:
        return 0.0, 0.0
    total, square = float(sizes.sum()), float(sizes @ sizes)
    more, more_square = total + largest, square + largest**2

    def excess(mean: float, tail: float) -> float:
        of_seen = special.gammainc(total**2 / square, mean * total / square) if total else 1.0
        of_more = special.gammainc(more**2 / more_square, mean * more / more_square)
        return float(of_seen + of_more) / 2 - tail

    low = optimize.brentq(excess, 0.0, more, args=(0.025,)) if total else 0.0
    return low, optimize.brentq(excess, 0.0, more + 10 * math.sqrt(more_square), args=(0.975,))


def measured(found: Mapping[Key, Effect]) -> dict[Key, Measured]:
    """The effects of one table, their p values adjusted over all of it."""
    adjusted = max_t(found)
    return {
        key: Measured(effect.estimate, effect.p, adjusted[key], effect.bound)
        for key, effect in found.items()
    }


def furthest(found: Collection[Effect]) -> float:
    """How far from 0 an effect must be to be shown among all of them, by max-T.

    In standard deviations of the effect's draws, which Student's t has widened.
    """
    return float(np.quantile(_largest(found), 0.95)) if found else math.nan


def _largest(found: Collection[Effect]) -> np.ndarray:
    """The largest of all deviations in every draw, each over its standard deviation, [DRAWS]."""
    draws = np.stack([e.draws - e.estimate.value for e in found])
    errors = draws.std(axis=1, keepdims=True)
    # An effect whose questions all changed alike has no spread, and can't be the largest.
    return np.abs(draws / np.where(errors > _ROUNDING, errors, np.inf)).max(axis=0)


def max_t(found: Mapping[Key, Effect]) -> dict[Key, float]:
    """P values that hold for all of the effects together (max-T; Westfall & Young 1993).

    A p value is the share of joint draws in which any of the effects, centred and divided by its
    standard error, is as far from 0 as this one; their correlation is in the draws.
    """
    if not found:
        return {}
    largest = _largest(found.values())
    adjusted = {}
    for name, effect in found.items():
        # The distance of the effect's own p value, so that an exact one stays exact.
        error = float(effect.draws.std())
        if error > _ROUNDING:
            own = np.abs(effect.draws - effect.estimate.value) / error
            observed = float(np.quantile(own, 1 - effect.p))
            # The smallest p value that draws can give says only that it is beyond all of them.
            if effect.p <= 2 / (1 + own.size):
                observed = max(observed, abs(effect.estimate.value) / error)
        else:
            observed = -float(special.ndtri(effect.p / 2))
        adjusted[name] = max(
            effect.p, (1 + np.count_nonzero(largest >= observed)) / (1 + largest.size)
        )
    return adjusted
