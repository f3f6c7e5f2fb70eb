"""Statistics against closed forms and brute force."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pytest

from deltapref_jax.analysis import statistics as st
from deltapref_jax.records import Result, to_table


def results(right, suite="s", domain="in"):
    """Results from [questions, samples] of 0 and 1."""
    return to_table(
        Result,
        [
            Result(suite, domain, suite, f"{suite}{q:04d}", s, "", "", bool(c), "eos", -1.0, 5)
            for q, line in enumerate(right)
            for s, c in enumerate(line)
        ],
    )


def draws(questions=200, samples=2, p=0.4, seed=0):
    return (np.random.default_rng(seed).random((questions, samples)) < p).astype(int)


def test_accuracy_is_a_mean_over_suites_of_questions_with_clusters():
    one, two = draws(100, 4, 0.2), draws(50, 4, 0.8, 1)
    table = pa.concat_tables([results(one, "a"), results(two, "b")])
    found = st.accuracy(table, "in")
    assert found.value == pytest.approx(100 * (one.mean() + two.mean()) / 2)
    error = 100 / 2 * math.sqrt(one.mean(axis=1).var() / 100 + two.mean(axis=1).var() / 50)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    once = st.accuracy(results(draws(100, 1)), "in")
    copies = st.accuracy(results(np.repeat(draws(100, 1), 4, axis=1)), "in")
    assert tuple(copies) == pytest.approx(tuple(once), rel=1e-9)  # copies are no new samples
    with pytest.raises(ValueError, match="No answer is of domain 'out'"):
        st.accuracy(table, "out")


def test_changes_are_paired():
    before, after = draws(seed=1), draws(p=0.6, seed=2)
    found = st.changes(results(before), {"arm": [results(after)], "none": [results(before)]}, "in")
    gaps = (after - before).mean(axis=1)
    assert found["arm"].estimate.value == pytest.approx(100 * gaps.mean())
    assert found["arm"].draws.std() == pytest.approx(
        100 * gaps.std() / math.sqrt(len(gaps)), rel=0.1
    )
    # Nothing changed, so the interval is the rule of three's.
    assert tuple(found["none"].estimate) == pytest.approx((0, -1.5, 1.5))
    assert st.contrast(found["arm"], found["arm"]).value == 0
    with pytest.raises(
        ValueError, match="Arm 'x' and the student answered different questions of suite 's'"
    ):
        st.changes(results(before), {"x": [results(after[:-1])]}, "in")


def test_seeds_widen_the_interval_by_their_variance():
    before = draws(400, 2, 0.5, 3)
    seeds = [
        np.clip(before + np.random.default_rng(s).integers(0, 2, before.shape) * (s % 2), 0, 1)
        for s in range(4)
    ]
    found = st.changes(results(before), {"arm": [results(s) for s in seeds]}, "in")["arm"]
    means = np.array([(s - before).mean() for s in seeds]) * 100
    assert found.draws.std() > 0.8 * means.std(ddof=1) / 2


def test_an_effect_of_the_detectable_size_is_found_with_the_promised_power():
    before = results(draws(300, 2, 0.5, 5))
    size = st.minimum_detectable(before)["in"]
    within = np.mean(draws(300, 2, 0.5, 5).mean(axis=1) * (1 - draws(300, 2, 0.5, 5).mean(axis=1)))
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    assert size == pytest.approx(100 * z * math.sqrt(2 * within / 300))
    assert st.minimum_detectable(before, seeds=4)["in"] < size
    assert st.minimum_detectable(results(np.zeros((50, 1), int)))["in"] > 0


def test_holm_and_benjamini_hochberg_by_hand():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert st.holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert st.benjamini_hochberg(p) == pytest.approx({"a": 0.02, "b": 0.04, "c": 0.04, "d": 0.02})


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40), rng.integers(0, 5, 30)
    want = np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.product(x, y)])
    found = st.auc(x, y)
    assert found.value == pytest.approx(want)
    assert found.low < want < found.high
    assert math.isnan(st.auc([], y).value)


def test_rank_correlations():
    a, b = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert st.spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert st.kendall(a, b) == pytest.approx((8 - 2) / 10)
    assert st.spearman(a, [-v for v in a]) == pytest.approx(-1)
    assert math.isnan(st.spearman(a, [1] * 5))
    assert st.ranks([3, 1, 3]).tolist() == [2.5, 1.0, 2.5]


def test_slope_is_least_squares_with_the_joint_draws():
    x = [0.0, 10.0, 20.0, 40.0]
    noise = np.random.default_rng(0).normal(0, 1, (4, 500))
    changes = [
        st.Change(st.Estimate(3 + 0.2 * v, 0, 0), 3 + 0.2 * v + e, 0.5, 100)
        for v, e in zip(x, noise, strict=True)
    ]
    found = st.slope(x, changes)
    assert found.value == pytest.approx(0.2)
    spread = 1 / np.sqrt(np.sum((np.array(x) - np.mean(x)) ** 2))
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.15)
    assert st.slope(x[:2], changes[:2]) is None


def test_overlap_and_agreement():
    assert st.top_overlap([5, 4, 3, 2], [5, 1, 4, 2], 2) == 0.5
    bins = st.agreement_by_gap([1, -1, 3, -3, 0], [1, 1, 3, -3, 9], bins=2)
    assert bins == [(1.0, 0.5, 2), (3.0, 1.0, 2)]
    assert st.halo(np.array([[1, 1, 3], [2, 2, 2], [3, 3, 1]])) == pytest.approx((1 - 1 - 1) / 3)
