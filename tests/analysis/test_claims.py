"""Whether a slope hangs on one rung is said where it does, by the draws of the whole slope."""

import numpy as np
import pytest

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.claims import rung_sentence
from deltapref_jax.analysis.page import Measured
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.summary import _without_rungs
from tests.analysis.test_effects import found

LADDER = {"a0": 0.0, "a1": 10.0, "a2": 20.0, "a3": 30.0}  # points of generator delta


def slope(value, p):
    return Measured(Estimate(value, value - 0.3, value + 0.3), p, p, 9.0)


@pytest.mark.parametrize(
    "whole, without, want",
    [
        (slope(0.5, 0.01), {"a": slope(0.4, 0.02), "b": slope(0.6, 0.01)}, ""),
        (
            slope(0.5, 0.01),
            {"a": slope(0.4, 0.02), "b": slope(-0.1, 0.3)},
            "Whether it is shown hangs on one rung, without b: -0.10 [-0.40, +0.20], not shown "
            "(p = 0.300).",
        ),
        (
            slope(0.1, 0.4),
            {"a": slope(-0.1, 0.5), "b": slope(-0.2, 0.6), "c": slope(0.6, 0.03)},
            "Whether it is shown hangs on one rung, without c: +0.60 [+0.30, +0.90], shown "
            "(p = 0.030). Its sign hangs on single rungs, without a: -0.10 [-0.40, +0.20], not "
            "shown (p = 0.500); without b: -0.20 [-0.50, +0.10], not shown (p = 0.600).",
        ),
        (
            slope(0.1, 0.4),
            dict.fromkeys("abc"),
            "Hangs on every one of its 3 rungs: without one, no slope is left.",
        ),
        (
            slope(0.5, 0.01),
            {"a": slope(0.5, 0.01), "b": None},
            "Whether there is a slope hangs on one rung, without b: no slope is left.",
        ),
    ],
)
def test_a_slope_that_hangs_on_one_rung_says_so(whole, without, want):
    assert rung_sentence(whole, without) == want


def test_a_gain_of_the_last_rung_alone_hangs_on_it():
    rng = np.random.default_rng(0)
    before = (rng.random((200, 2)) < 0.5).astype(int)
    arms = {name: [(rng.random((200, 2)) < 0.5).astype(int)] for name in LADDER}
    arms["a3"] = [(rng.random((200, 2)) < 0.8).astype(int)]
    effects = found(before, **arms)

    def per_10(names):
        return effects.slope({name: LADDER[name] / 10 for name in names})

    table = {0: per_10(LADDER), 1: effects.contrast("a1", "a0")}
    without = _without_rungs(0, table, effects, LADDER)
    for name, measured in without.items():
        rest = per_10([other for other in LADDER if other != name])
        # The table has as many comparisons, and the same draws.
        assert measured == fx.measured({0: rest, 1: table[1]})[0]
    assert fx.measured(table)[0].shown and not without["a3"].shown
    text = rung_sentence(fx.measured(table)[0], without)
    assert text.startswith("Whether it is shown hangs on one rung, without a3: ")
