"""Statistics against closed forms and brute force."""

import itertools
import math

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


def test_overlap_and_agreement():
    assert st.top_overlap([5, 4, 3, 2], [5, 1, 4, 2], 2) == 0.5
    bins = st.agreement_by_gap([1, -1, 3, -3, 0], [1, 1, 3, -3, 9], bins=2)
    assert bins == [(1.0, 0.5, 2), (3.0, 1.0, 2)]
    assert st.halo(np.array([[1, 1, 3], [2, 2, 2], [3, 3, 1]])) == pytest.approx((1 - 1 - 1) / 3)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                want = np.mean([any(subset) for subset in subsets])
                got = st.pass_at_k(np.array([n, n]), np.array([c, c]), k)
                np.testing.assert_allclose(got, [want, want], atol=1e-12)
    # No overflow where the binomials have hundreds of digits.
    assert st.pass_at_k(np.array([1000]), np.array([10]), 500)[0] == pytest.approx(
        1 - 0.5**10, rel=0.01
    )


def test_a_paired_auc_compares_texts_with_themselves():
    # Texts differ by more than their corruption does, which an unpaired AUC would not see.
    texts = np.arange(40.0)
    paired = st.paired_auc(texts, texts - 0.5, texts)
    assert paired.value == 1 and paired.low == pytest.approx(1 / (1 + 1.959964**2 / 40), abs=1e-6)
    assert st.auc(texts, texts - 0.5).value < 0.55
    # Versions of one text are no further texts: ties count half, and each text once.
    some = st.paired_auc([3, 3, 3, 1], [1, 3, 5, 0], ["a", "a", "a", "b"])
    assert some.value == pytest.approx((0.5 + 1) / 2)
    assert some == st.paired_auc([3, 1], [3, 0], ["a", "b"])
    assert all(math.isnan(x) for x in st.paired_auc([], [], []))


@pytest.mark.parametrize(("correlation", "fraction"), [(0.3, 0.25), (0.8, 0.1), (-0.5, 0.5)])
def test_the_share_of_a_top_that_is_true_is_what_a_simulation_finds(correlation, fraction):
    rng = np.random.default_rng(0)
    true, noise = rng.normal(size=(2, 400_000))
    seen = correlation * true + math.sqrt(1 - correlation**2) * noise
    top = seen >= np.quantile(seen, 1 - fraction)
    found = float((true[top] >= np.quantile(true, 1 - fraction)).mean())
    assert st.top_share(correlation, fraction) == pytest.approx(found, abs=0.006)


def test_the_share_of_a_top_at_its_ends():
    assert st.top_share(0.0, 0.25) == pytest.approx(0.25)
    assert st.top_share(1.0, 0.25) == pytest.approx(1.0, abs=1e-6)
    # Half of all: 1/2 + arcsin(correlation)/π, by Sheppard.
    assert st.top_share(0.6, 0.5) == pytest.approx(0.5 + math.asin(0.6) / math.pi)
    assert st.top_share(0.2, 1.0) == 1 and math.isnan(st.top_share(math.nan, 0.5))


def test_reliability_is_the_share_of_variance_that_is_true():
    rng = np.random.default_rng(1)
    true = rng.normal(size=(20_000, 1))
    # Each reading has its own scale and centre, and half of its variance is noise.
    readings = (true + rng.normal(size=(20_000, 4))) * [1, 2, 0.1, 5] + [0, 3, 1, -2]
    one = st.mean_correlation(readings)
    assert one == pytest.approx(0.5, abs=0.01)
    standard = readings / readings.std(axis=0)
    with_truth = np.corrcoef(standard.mean(axis=1), true[:, 0])[0, 1]
    assert st.spearman_brown(one, 4) == pytest.approx(with_truth**2, abs=0.01)
    assert math.isnan(st.mean_correlation(np.ones((9, 2))))
    assert math.isnan(st.spearman_brown(-0.5, 4))
