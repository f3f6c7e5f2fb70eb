"""Every rung keeps as many pairs of every cell, drawn fairly, whatever the order of its rows."""

from collections import Counter

import numpy as np
import pytest

from deltapref_jax.pairs.balance import BINS, balanced
from deltapref_jax.records import Pair, digest

RNG = np.random.default_rng(0)


def rung(name, n, p):
    """`n` pairs whose chosen trace is right with probability `p`."""
    return [
        Pair(
            digest(name, i),
            f"p{i}",
            f"{name}{i}",
            f"r{i}",
            name,
            "weak",
            None,
            None,
            bool(RNG.random() < p),
            bool(RNG.random() < 0.3),
        )
        for i in range(n)
    ]


RUNGS = [rung("weak", 300, 0.3), rung("mid", 200, 0.5), rung("strong", 250, 0.9)]
TOKENS = {
    pair.chosen_id: int(RNG.normal(60 + 20 * i, 15))
    for i, pool in enumerate(RUNGS)
    for pair in pool
}


def verdicts(pairs):
    return Counter((p.chosen_correct, p.rejected_correct) for p in pairs)


def test_rungs_have_the_same_joint_distribution_of_verdicts():
    kept = [balanced(i, RUNGS, "correctness", (0, 0), TOKENS) for i in range(3)]
    least = {cell: min(verdicts(pool)[cell] for pool in RUNGS) for cell in verdicts(RUNGS[0])}
    assert [verdicts(pairs) for pairs, _ in kept] == [least] * 3
    assert (
        kept[0][1]
        == kept[1][1]
        == {
            f"{'right' if c else 'wrong'}_{'right' if r else 'wrong'}": n
            for (c, r), n in least.items()
        }
    )
    assert {p.chosen_correct for pairs, _ in kept for p in pairs} == {True, False}


def test_rungs_have_the_same_distribution_of_lengths():
    lengths = [[TOKENS[p.chosen_id] for p in pool] for pool in RUNGS]
    edges = np.quantile(np.concatenate(lengths), np.arange(1, BINS) / BINS)
    kept = [balanced(i, RUNGS, "chosen_length", (0, 0), TOKENS)[0] for i in range(3)]
    histograms = [
        np.bincount(
            np.searchsorted(edges, [TOKENS[p.chosen_id] for p in pairs], "right"), None, BINS
        )
        for pairs in kept
    ]
    assert (histograms[0] == histograms[1]).all() and (histograms[0] == histograms[2]).all()
    means = [np.mean([TOKENS[p.chosen_id] for p in pairs]) for pairs in kept]
    assert np.ptp(means) < np.ptp([np.mean(x) for x in lengths]) / 4


@pytest.mark.parametrize("by", ["correctness", "chosen_length"])
def test_the_draw_is_fair_and_row_order_does_not_matter(by):
    pairs, cells = balanced(0, RUNGS, by, (0, 0), TOKENS)
    assert pairs == [p for p in RUNGS[0] if p in pairs]  # in the order of the pool
    turned = [pool[::-1] for pool in RUNGS]
    assert balanced(0, turned, by, (0, 0), TOKENS) == (pairs[::-1], cells)
    drawn = Counter(
        p.pair_id for draw in range(200) for p in balanced(0, RUNGS, by, (0, draw), TOKENS)[0]
    )
    groups = {}  # how often each pair of a cell was drawn
    for p in RUNGS[0]:
        cell = (p.chosen_correct, p.rejected_correct)
        if by == "correctness":
            groups.setdefault(cell, []).append(drawn[p.pair_id] / 200)
    for (chosen, rejected), shares in groups.items():
        name = f"{'right' if chosen else 'wrong'}_{'right' if rejected else 'wrong'}"
        expected = cells[name] / len(shares)
        assert abs(np.array(shares) - expected).max() < 5 * (0.25 / 200) ** 0.5
