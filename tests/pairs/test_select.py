"""Top, random and matched: as many pairs as asked for, whatever the order of the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.config import ConfigError
from deltapref_jax.pairs.select import sample_delta, select
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


def ids(rows):
    return [row.pair_id for row in rows]


POOL = pairs(np.random.default_rng(0).permutation(np.arange(80)).reshape(40, 2) / 10)
TOKENS = lengths(40)


def test_sample_delta_of_a_dimension_and_of_the_sum():
    rows = pairs([[1.0, -0.5], [0.0, 2.0]])
    np.testing.assert_allclose(sample_delta(rows, 0), [1.0, 0.0])
    np.testing.assert_allclose(sample_delta(rows, 1), [-0.5, 2.0])
    np.testing.assert_allclose(sample_delta(rows, None), [0.5, 2.0])


@pytest.mark.parametrize("dimension", [0, 1, None])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 1.0])
def test_top_is_the_widest_by_dimension_or_sum_in_the_order_of_the_rows(dimension, fraction):
    got = select(POOL, "top", fraction, 0, dimension, TOKENS)
    deltas = sample_delta(POOL, dimension)
    widest = set(np.argsort(-deltas, kind="stable")[: round(fraction * 40)])
    assert ids(got) == [p.pair_id for i, p in enumerate(POOL) if i in widest]


def test_equal_gaps_are_ordered_by_id():
    rows = pairs([[1.0, 0.0]] * 12)
    assert sorted(ids(select(rows, "top", 0.5, 0, None, {}))) == sorted(ids(rows))[:6]


def test_random_is_seeded_and_fair():
    assert select(POOL, "random", 0.25, 3, 0, TOKENS) == select(POOL, "random", 0.25, 3, 1, {})
    drawn = [set(ids(select(POOL, "random", 0.25, s, None, TOKENS))) for s in range(400)]
    assert {len(d) for d in drawn} == {10}
    share = np.array([sum(p.pair_id in d for d in drawn) / 400 for p in POOL])
    assert abs(share - 0.25).max() < 4.5 * (0.25 * 0.75 / 400) ** 0.5


def test_matched_has_the_lengths_of_the_top_without_its_pairs():
    rows = pairs([[4.0, 0]] * 5 + [[0.0, 0]] * 35)
    tokens = {f"{side}{i}": 10 * (i % 5) + (side == "c") for i in range(40) for side in "cr"}
    got = select(rows, "matched", 5 / 40, 0, 0, tokens)
    assert not set(ids(got)) & set(ids(rows[:5]))
    assert sorted(tokens[p.chosen_id] for p in got) == [1, 11, 21, 31, 41]


def test_matched_takes_top_pairs_only_once_the_others_are_used_up():
    top = set(ids(select(POOL, "top", 0.75, 0, 0, TOKENS)))
    got = set(ids(select(POOL, "matched", 0.75, 0, 0, TOKENS)))
    assert len(got) == 30
    assert len(got - top) == 10
    assert ids(select(POOL, "matched", 1.0, 0, 0, TOKENS)) == ids(POOL)


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
    st.sampled_from(["all", "top", "random", "matched"]),
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
