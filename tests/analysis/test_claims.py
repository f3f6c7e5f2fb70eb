"""A slope that hangs on one rung says so, by the difference that the rung makes."""

import numpy as np
import pytest

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.claims import WithoutRung, rung_sentence
from deltapref_jax.analysis.findings import points
from deltapref_jax.analysis.page import Measured
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.summary import without_rungs
from tests.analysis.test_effects import found

LADDER = {"a0": 0.0, "a1": 10.0, "a2": 20.0, "a3": 30.0}  # points of generator delta


def around(value):
    return Estimate(value, value - 0.3, value + 0.3)


def without(value, difference, p):
    return WithoutRung(around(value), Measured(around(difference), p, p, 9.0))


@pytest.mark.parametrize(
    "whole, rest, want",
    [
        # The slope may be shown with a rung and not without it: that is no difference. A small
        # difference may be shown: the slope is about the same.
        (around(0.32), {"a": without(0.28, 0.04, 0.8), "b": without(0.2, 0.12, 0.01)}, ""),
        (
            around(0.5),
            {"a": without(0.4, 0.1, 0.6), "b": without(0.15, 0.35, 0.01)},
            "Hangs on one rung: without b it is +0.15 [-0.15, +0.45] (the slope of all "
            "minus that of the others: +0.35 [+0.05, +0.65], shown, p = 0.010).",
        ),
        (
            around(0.1),
            {"a": without(-0.25, 0.35, 0.2), "b": without(0.1, 0.0, 1.0), "c": None},
            "Hangs on single rungs: without a it is -0.25 [-0.55, +0.05] (the slope of all "
            "minus that of the others: +0.35 [+0.05, +0.65], not shown, p = 0.200); "
            "without c no slope is left.",
        ),
        (
            around(0.1),
            dict.fromkeys("abc"),
            "Hangs on every one of its 3 rungs: without one, no slope is left.",
        ),
    ],
)
def test_a_slope_that_hangs_on_one_rung_says_so(whole, rest, want):
    assert rung_sentence(whole, rest) == want


def test_a_gain_of_the_last_rung_alone_hangs_on_it():
    rng = np.random.default_rng(0)
    before = (rng.random((200, 2)) < 0.5).astype(int)
    arms = {name: [(rng.random((200, 2)) < 0.5).astype(int)] for name in LADDER}
    arms["a3"] = [(rng.random((200, 2)) < 0.8).astype(int)]
    effects = found(before, **arms)
    changes = {name: effects.change(name).estimate.value for name in LADDER}

    def fitted(names):
        x, y = [LADDER[n] / 10 for n in names], [changes[n] for n in names]
        return np.polyfit(x, y, 1)[0]

    rests = without_rungs(effects, LADDER)
    deviations = {name: effects.change(name).draws - changes[name] for name in LADDER}
    for name, rest in rests.items():
        others = [other for other in LADDER if other != name]
        assert rest.slope.value == pytest.approx(fitted(others))
        difference = rest.difference.estimate
        assert difference.value == pytest.approx(fitted(LADDER) - fitted(others))
        # Both slopes share the draws of the rungs, so that their difference is of joint draws.
        weights = {
            arm: np.polyfit([x / 10 for x in LADDER.values()], np.eye(4)[i], 1)[0]
            for i, arm in enumerate(LADDER)
        }
        for i, arm in enumerate(others):
            weights[arm] -= np.polyfit([LADDER[n] / 10 for n in others], np.eye(3)[i], 1)[0]
        joint = difference.value + sum(w * deviations[arm] for arm, w in weights.items())
        assert difference[1:] == pytest.approx(np.percentile(joint, [2.5, 97.5]), abs=0.02)
    slope = effects.slope({name: x / 10 for name, x in LADDER.items()})
    text = rung_sentence(slope.estimate, rests)
    words = "the slope of all minus that of the others"
    assert f"without a3 it is {points(rests['a3'].slope, 2)} ({words}: +9.0" in text
    # Without the first rung the slope is steeper, which is as large a difference.
    assert rests["a0"].difference.shown and "without a0" in text
    assert fx.measured({0: slope})[0].shown


def test_a_slope_of_three_rungs_has_none_without_one():
    effects = found(np.zeros((9, 1), int), **{n: [np.ones((9, 1), int)] for n in ("a", "b", "c")})
    assert without_rungs(effects, {"a": 0.0, "b": 1.0, "c": 2.0}) == dict.fromkeys("abc")
