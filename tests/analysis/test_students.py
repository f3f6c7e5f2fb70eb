"""Differences between students against closed forms, and what is said of them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.page import Measured
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.students import (
    Difference,
    StudentsSummary,
    _unmeasured,
    claim_sentence,
    difference_verdict,
    hanging,
)
from deltapref_jax.config import Claim
from tests.analysis.test_effects import Z95, found
from tests.analysis.test_statistics import draws

CLAIM = Claim(kind="change", a="arm", margin=2.0)


def test_a_difference_is_paired_by_question():
    """Half of the questions change alike in both students, which their difference does not see."""
    before = np.zeros((200, 2), int)
    a, b = draws(p=0.5, seed=1), draws(p=0.3, seed=2)
    b[:100] = a[:100]
    both = fx.joint({"a": found(before, arm=[a]), "b": found(before, arm=[b])})
    between = both.combined({"a/arm": 1.0, "b/arm": -1.0})
    gaps = (a - b).mean(axis=1)
    error = 100 * gaps.std(ddof=1) / math.sqrt(200)
    assert between.estimate.value == pytest.approx(100 * gaps.mean())
    assert (between.estimate.high - between.estimate.low) / 2 == pytest.approx(
        Z95 * error, rel=0.06
    )
    apart = math.hypot(*(100 * x.mean(axis=1).std(ddof=1) / math.sqrt(200) for x in (a, b)))
    assert error < 0.8 * apart


def test_trainings_of_two_students_are_independent_and_each_has_its_noise():
    """The variance of the difference is that of the questions and of both students' seeds."""
    rng = np.random.default_rng(3)
    before = draws(300, 2, 0.5, 3)

    def of(spread):
        shifts = rng.normal(0, spread, (4, 4))
        arms = {
            f"arm{i}": [(rng.random(before.shape) < 0.5 + s / 100).astype(int) for s in of_arm]
            for i, of_arm in enumerate(shifts)
        }
        return found(before, **arms)

    of_a, of_b = of(12), of(5)
    both = fx.joint({"a": of_a, "b": of_b})
    # One arm name is one draw in each student alone, and two draws in both together.
    assert np.corrcoef(of_a.by_run[0], of_b.by_run[0])[0, 1] == pytest.approx(1)
    own, other = both.names.index("a/arm0"), both.names.index("b/arm0")
    assert abs(np.corrcoef(both.by_run[own], both.by_run[other])[0, 1]) < 0.06
    seeds = of_a.noise[0].seed.variance / 4 + of_b.noise[0].seed.variance / 4
    assert of_a.noise[0].seed.variance > 2 * of_b.noise[0].seed.variance
    between = (both.by_run[own] - both.by_run[other]).var()
    assert between == pytest.approx(seeds, rel=0.1)
    questions = (both.by_question[own] - both.by_question[other]).var()
    whole = both.combined({"a/arm0": 1.0, "b/arm0": -1.0}).draws.var()
    assert whole == pytest.approx(seeds + questions, rel=0.35)  # widened as Student's t is
    assert whole > seeds + questions
    # Alone, an arm of the two is what it is in its own student.
    assert both.combined({"a/arm1": 1.0}).estimate.value == of_a.change("arm1").estimate.value
    assert np.array_equal(both.by_question[own], of_a.by_question[0])


def test_students_that_answered_other_questions_are_not_compared():
    a, b = found(draws(50), arm=[draws(50)]), found(draws(60), arm=[draws(60)])
    with pytest.raises(ValueError, match="The students a, b answered different numbers of quest"):
        fx.joint({"a": a, "b": b})


def effect(value, half=1.0, p=0.5, bound=9.0):
    return Measured(Estimate(value, value - half, value + half), p, p, bound)


def difference(value, p=0.5, bound=9.0, a="a", b="b"):
    m = effect(value, p=p, bound=bound)
    return Difference(a, b, m, difference_verdict(m, CLAIM.margin))


@pytest.mark.parametrize(
    "effects, between, sentence",
    [
        (
            {"a": effect(3.0, p=0.01), "b": effect(1.0)},
            [difference(2.0)],
            "a gain is shown in a (+3.0 [+2.0, +4.0]), none in b (+1.0 [+0.0, +2.0]); "
            "between them, a minus b is +2.0 [+1.0, +3.0]: whether they differ is undecided.",
        ),
        (
            {"a": effect(3.0, p=0.01), "b": effect(2.9, p=0.01)},
            [difference(0.1, bound=1.5)],
            "a gain is shown in all students, a (+3.0 [+2.0, +4.0]) and b (+2.9 [+1.9, +3.9]); "
            "between them, a minus b is +0.1 [-0.9, +1.1]: the same within ±2.",
        ),
        (
            {"a": effect(3.0, p=0.01), "b": effect(-3.0, p=0.01), "c": effect(0.0)},
            [difference(6.0, p=0.001), difference(3.0, b="c"), difference(-3.0, a="b", b="c")],
            "a gain is shown in a (+3.0 [+2.0, +4.0]), a loss is shown in b (-3.0 [-4.0, -2.0]), "
            "none in c (+0.0 [-1.0, +1.0]); widest apart, a minus b is "
            "+6.0 [+5.0, +7.0]: they differ (1 of 3 pairs of students differ).",
        ),
        (
            {"a": effect(0.5), "b": effect(0.2)},
            [difference(0.3)],
            "neither a gain nor a loss is shown in a (+0.5 [-0.5, +1.5]) and b (+0.2 [-0.8, "
            "+1.2]); between them, a minus b is +0.3 [-0.7, +1.3]: whether they differ is "
            "undecided.",
        ),
        ({}, [], "not measured: an arm of it is missing."),
    ],
)
def test_the_difference_decides_and_not_who_is_shown(effects, between, sentence):
    assert claim_sentence(CLAIM, effects, between) == sentence


def test_a_difference_that_is_shown_and_small_is_both():
    assert difference_verdict(effect(0.5, p=0.01, bound=1.0), 2.0) == "they differ, by less than 2"


def test_draws_of_one_seed_are_not_called_questions_alone():
    s = StudentsSummary("n", "q", ["in"], ["a", "b"], {}, {}, {}, {}, {})
    draw = fx.Component(4.0, 1.0, 2)

    def first(a, b):
        noise = {"a": (fx.Noise(*a),), "b": (fx.Noise(*b),)}
        return _unmeasured(s, {"in": {k: SimpleNamespace(noise=n) for k, n in noise.items()}})[0]

    measured = (draw, None)
    assert first((None, None), measured) == (
        "The noise of training of a: no arm has several seeds, so the intervals are of questions "
        "alone and too short."
    )
    assert first((None, draw), measured) == (
        "The noise of training of a: no arm has several seeds, so the intervals are of questions "
        "and, where several were made, of draws of pairs, but too short."
    )
    assert first(measured, measured).startswith("Any other student")


def test_a_claim_has_what_each_students_page_says_of_its_rungs():
    def of(*sentences):
        return {"claims": [{"hangs_on": text} for text in sentences]}

    summaries = {"a": of("", "Its sign hangs."), "b": of("", ""), "c": of("", "It is shown.")}
    assert hanging(summaries, 0) == {}
    assert hanging(summaries, 1) == {"a": "Its sign hangs.", "c": "It is shown."}
