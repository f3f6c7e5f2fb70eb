"""Top, random and matched: as many pairs as asked for, whatever the order of the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.config import ConfigError
from deltapref_jax.pairs.select import kept_count, reference_margin, sample_delta
from deltapref_jax.pairs.select import select as select_pairs
from deltapref_jax.records import Pair, digest


def pairs(deltas, base=(3.0, 3.0)):
    """Pairs with chosen - rejected ratings `deltas`, a row of [n, dimensions]."""
    return [
        Pair(
            pair_id=digest("pair", i),
            prompt_id=f"p{i}",
            chosen_id=f"c{i}",
            rejected_id=f"r{i}",
            chosen_model="strong",
            rejected_model="weak",
            chosen_rating=[b + d for b, d in zip(base, row, strict=True)],
            rejected_rating=list(base),
            chosen_correct=None,
            rejected_correct=None,
        )
        for i, row in enumerate(deltas)
    ]


def lengths(n, seed=0):
    r = np.random.default_rng(seed)
    return {f"{side}{i}": int(r.integers(5, 60)) for i in range(n) for side in "cr"}


def select(rows, keep, fraction, seed, dimension, tokens):
    """The pairs that a share of the pool leaves."""
    k = kept_count(len(rows), 0, 1.0 if keep == "all" else fraction)
    deltas = None if keep in ("all", "random") else sample_delta(rows, dimension)
    return select_pairs(rows, keep, k, (seed, 0), deltas, tokens)[0]


def ids(rows):
    return [row.pair_id for row in rows]


POOL = pairs(np.random.default_rng(0).permutation(np.arange(80)).reshape(40, 2) / 10)
TOKENS = lengths(40)


def test_sample_delta_of_a_dimension_and_of_the_sum():
    rows = pairs([[1.0, -0.5], [0.0, 2.0]])
    np.testing.assert_allclose(sample_delta(rows, 0), [1.0, 0.0])
    np.testing.assert_allclose(sample_delta(rows, 1), [-0.5, 2.0])
    np.testing.assert_allclose(sample_delta(rows, None), [0.5, 2.0])


def test_the_smallest_reference_margins_are_the_bottom():
    logprobs = {
        f"{side}{i}": -float((7 * i + 3 * (side == "r")) % 40) for i in range(40) for side in "cr"
    }
    margins = reference_margin(POOL, logprobs)
    np.testing.assert_array_equal(
        margins, [logprobs[f"c{i}"] - logprobs[f"r{i}"] for i in range(40)]
    )
    got, _ = select_pairs(POOL, "bottom", 10, (0, 0), margins, TOKENS)
    assert max(margins[POOL.index(p)] for p in got) <= min(
        margins[i] for i, p in enumerate(POOL) if p not in got
    )


@pytest.mark.parametrize("dimension", [0, 1, None])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 1.0])
def test_top_is_the_widest_by_dimension_or_sum_in_the_order_of_the_rows(dimension, fraction):
    got = select(POOL, "top", fraction, 0, dimension, TOKENS)
    deltas = sample_delta(POOL, dimension)
    widest = set(np.argsort(-deltas, kind="stable")[: round(fraction * 40)])
    assert ids(got) == [p.pair_id for i, p in enumerate(POOL) if i in widest]


@pytest.mark.parametrize("dimension", [0, 1])
def test_bottom_and_middle_are_the_narrowest_and_those_around_the_median(dimension):
    ranked = np.argsort(-sample_delta(POOL, dimension), kind="stable")
    for keep, want in (("bottom", ranked[30:]), ("middle", ranked[15:25])):
        got = set(ids(select(POOL, keep, 0.25, 0, dimension, TOKENS)))
        assert got == {POOL[i].pair_id for i in want}


def test_ties_at_the_cut_are_counted_and_drawn():
    rows = pairs([[2.0, 0.0]] * 3 + [[1.0, 0.0]] * 12 + [[0.0, 0.0]] * 5)
    drawn, deltas = [], sample_delta(rows, None)
    for draw in range(300):
        got, ties = select_pairs(rows, "top", 9, (0, draw), deltas, {})
        assert ties == 12 and set(ids(rows[:3])) < set(ids(got)) <= set(ids(rows[:15]))
        drawn.append(set(ids(got)))
    share = np.array([sum(p.pair_id in d for d in drawn) / 300 for p in rows[3:15]])
    assert abs(share - 0.5).max() < 4.5 * (0.25 / 300) ** 0.5
    assert select_pairs(rows, "top", 3, (0, 0), deltas, {})[1] == 0
    assert select_pairs(rows, "bottom", 7, (0, 0), deltas, {})[1] == 12
    # Both ends of the middle fall into one group of ties, which is counted once.
    assert select_pairs(rows, "middle", 2, (0, 0), deltas, {})[1] == 12
    assert select_pairs(rows, "middle", 16, (0, 0), deltas, {})[1] == 3 + 5
    assert select_pairs(rows, "random", 3, (0, 0), None, {})[1] == 0


def test_gaps_that_only_rounding_tells_apart_are_tied():
    # 5 - 4.2 and 4.2 - 3.4 are one gap, and in float32 they are two.
    high, middle, low = (float(np.float32(r)) for r in (5.0, 4.2, 3.4))
    rows, deltas = pairs([[0.0, 0.0]] * 20), np.array([high - middle, middle - low] * 10)
    assert len(set(deltas)) == 2
    drawn = [select_pairs(rows, "top", 10, (0, draw), deltas, {}) for draw in range(30)]
    assert {ties for _, ties in drawn} == {20}
    assert len({tuple(ids(kept)) for kept, _ in drawn}) == 30


def test_random_is_seeded_and_fair():
    assert select(POOL, "random", 0.25, 3, 0, TOKENS) == select(POOL, "random", 0.25, 3, 1, {})
    drawn = [set(ids(select(POOL, "random", 0.25, s, None, TOKENS))) for s in range(400)]
    assert {len(d) for d in drawn} == {10}
    share = np.array([sum(p.pair_id in d for d in drawn) / 400 for p in POOL])
    assert abs(share - 0.25).max() < 4.5 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.8])
def test_matched_has_the_lengths_of_top_and_the_gap_of_the_pool(fraction, correlation):
    """Also where long traces have wide gaps, as judges like to have it."""
    r = np.random.default_rng(3)
    long = r.standard_normal((600, 2))
    noise = r.standard_normal(600)
    gaps = correlation * long.sum(axis=1) / 2**0.5 + (1 - correlation**2) ** 0.5 * noise
    rows = pairs(gaps[:, None], base=(3.0,))
    tokens = {f"{s}{i}": int(200 + 40 * long[i, j]) for i in range(600) for j, s in enumerate("cr")}
    deltas = {p.pair_id: d for p, d in zip(rows, gaps, strict=True)}

    def mean(kept, of):
        return np.mean([of(p) for p in kept], axis=0)

    def lengths_of(p):
        return np.array([tokens[p.chosen_id], tokens[p.rejected_id]], float)

    top, matched, random = (
        select(rows, keep, fraction, 0, 0, tokens) for keep in ("top", "matched", "random")
    )
    gap = mean(matched, lambda p: deltas[p.pair_id]) - gaps.mean()
    assert abs(gap) < 0.1 * gaps.std()
    apart = [np.abs(mean(x, lengths_of) - mean(top, lengths_of)).sum() for x in (matched, random)]
    if correlation:  # else random pairs have the lengths of top by themselves
        assert apart[0] < 0.6 * apart[1]
    assert len(matched) == len(set(ids(matched))) == len(top)


def test_matched_keeps_the_whole_pool_where_all_are_asked_for():
    assert ids(select(POOL, "matched", 1.0, 0, 0, TOKENS)) == ids(POOL)


def test_a_number_of_pairs_replaces_the_share():
    assert kept_count(40, 7, 1.0) == 7
    with pytest.raises(ConfigError, match="keeps 41 pairs and the pool has 40; keep fewer"):
        kept_count(40, 41, 1.0)


def test_all_keeps_all_and_needs_no_ratings():
    rows = [p._replace(chosen_rating=None) for p in POOL]
    assert select(rows, "all", 0.1, 0, 0, {}) == rows
    assert len(select(rows, "random", 0.1, 0, 0, {})) == 4


@pytest.mark.parametrize("selection", ["top", "random", "matched"])
@pytest.mark.parametrize(("fraction", "kept"), [(0.01, 0), (1.2, 48)])
def test_a_fraction_that_keeps_none_or_more_than_there_are_is_refused(selection, fraction, kept):
    with pytest.raises(ConfigError) as error:
        select(POOL, selection, fraction, 0, None, TOKENS)
    assert str(error.value) == (
        f"A fraction of {fraction:g} keeps {kept} of 40 pairs; it must keep at least one and "
        "no more than there are."
    )


@pytest.mark.parametrize("selection", ["top", "matched"])
def test_pairs_without_ratings_are_refused(selection):
    with pytest.raises(
        ConfigError,
        match=r"^A pair has no ratings to select by; name a judge that rated both of its "
        r"generators\.$",
    ):
        select([*POOL[:5], POOL[6]._replace(rejected_rating=None)], selection, 0.5, 0, None, TOKENS)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=20),
    st.sampled_from(["all", "top", "bottom", "middle", "random", "matched"]),
    st.floats(0.05, 1.0),
    st.integers(0, 5),
    st.sampled_from([0, 1, None]),
    st.randoms(),
)
def test_rows_in_any_order_give_the_same_pairs(
    deltas, selection, fraction, seed, dimension, random
):
    rows, tokens = pairs(deltas), lengths(len(deltas), 1)
    k = len(rows) if selection == "all" else round(fraction * len(rows))
    if k == 0:
        return
    got = select(rows, selection, fraction, seed, dimension, tokens)
    assert len(got) == len(set(ids(got))) == k
    assert ids(got) == [i for i in ids(rows) if i in set(ids(got))]  # in the order of the rows
    shuffled = random.sample(rows, len(rows))
    assert set(ids(select(shuffled, selection, fraction, seed, dimension, tokens))) == set(ids(got))
