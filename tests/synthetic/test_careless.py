"""Errors have their probabilities, and the exact ratings find the corruptions that were made."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.answers.check import check
from deltapref_jax.config import DIMENSIONS, ConfigError
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.rate import parse, rate
from deltapref_jax.synthetic.world import SLIPS, meta, problem, slip, solution, solve

PROBLEMS = [problem(family, 1 + i % 3, 21, i) for family in FAMILIES for i in range(25)]


def correct(p, text):
    return check({"checker": "world", "answer": p.answer, "meta": meta(p)}, text).correct


@pytest.mark.parametrize("rate_", [0.0, 0.1, 0.3, 1.0])
def test_a_step_is_careless_with_the_given_probability(rate_):
    """In `chain` every error shows, so a solution is correct with probability (1 - q)^steps."""
    rng, n = random.Random(0), 600
    problems = [problem("chain", 2, 1, i) for i in range(n)]
    clean = sum(solution(p, rng, rate_) == solution(p) for p in problems)
    probability = np.array([(1 - rate_) ** len(solve(p)[0]) for p in problems])
    deviation = (probability * (1 - probability)).sum() ** 0.5
    assert abs(clean - probability.sum()) <= 4 * deviation


def test_kinds_of_slips_come_with_their_weights():
    rng, counts = random.Random(1), dict.fromkeys(SLIPS, 0)
    for i in range(1500):
        p = problem("chain", 1, 2, i)
        text = solution(p, rng, 0.08)
        plan, equations, _, useful, lines = parse(text)
        counts["plan"] += plan != FAMILIES["chain"].plan
        counts["skip"] += len(equations) < len(solve(p)[0])
        counts["filler"] += lines > useful
        counts["number"] += any(not e.correct for e in equations)
    steps = 0.08 * sum(len(solve(problem("chain", 1, 2, i))[0]) for i in range(1500))
    for kind in ("plan", "skip", "filler", "number"):
        assert abs(counts[kind] - SLIPS[kind] * steps) < 5 * (SLIPS[kind] * steps) ** 0.5, kind


def test_more_careless_is_more_often_wrong():
    share = [
        np.mean([correct(p, solution(p, random.Random(i), q)) for i, p in enumerate(PROBLEMS)])
        for q in (0.0, 0.1, 0.3, 0.8)
    ]
    assert share[0] == 1.0
    assert all(a > b + 0.05 for a, b in zip(share[:-1], share[1:], strict=True))


@pytest.mark.parametrize("value", ["0", "5", "-4", "120", "Sun", "0110", "12 r 0", "0 r 3"])
def test_a_slip_is_another_value_of_the_same_kind(value):
    for seed in range(50):
        other = slip(value, random.Random(seed))
        assert other != value
        assert (other in {"Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}) == (value == "Sun")
        assert (" r " in other) == (" r " in value)
        if value == "0110":
            assert len(other) == 4
            assert not set(other) - {"0", "1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_solution_is_flawless_in_every_dimension(family):
    for i in range(100):
        p = problem(family, 1 + i % 4, 33, i)
        assert rate(p, solution(p)) == dict.fromkeys(DIMENSIONS, 5.0), solution(p)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_corruption_lowers_its_dimension_in_order_of_degree_and_most_of_all(dimension):
    means = []
    for degree in range(DEGREES + 1):
        texts = [
            corrupt(p, dimension, degree, random.Random(f"{i}|{degree}"))
            for i, p in enumerate(PROBLEMS)
        ]
        ratings = [rate(p, text) for p, text in zip(PROBLEMS, texts, strict=True)]
        means.append({d: np.mean([r[d] for r in ratings]) for d in DIMENSIONS})
    assert means[0] == dict.fromkeys(DIMENSIONS, 5.0)
    target = [m[dimension] for m in means]
    assert all(a > b for a, b in zip(target[:-1], target[1:], strict=True)), target
    for m in means[1:]:
        assert m[dimension] == min(m.values()), m


def test_degree_zero_is_the_clean_solution():
    for p in PROBLEMS[::10]:
        for dimension in DIMENSIONS:
            assert corrupt(p, dimension, 0, random.Random(0)) == solution(p)


def test_an_unknown_dimension_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"^dimension is 'style'; choose one of 'factuality', .*"):
        corrupt(PROBLEMS[0], "style", 1, random.Random(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", ["number", "copy", "op"])
def test_a_wrong_value_never_stops_a_solver(family, wrong):
    for i in range(150):
        p = problem(family, 1 + i % 3, 3, i)
        steps, values, answer = solve(p, dict.fromkeys(range(i % 4, 12), wrong), random.Random(i))
        assert len(steps) == len(values) >= 1
        assert "None" not in [*values, answer]


def test_what_is_charged_by_hand():
    p = problem("chain", 1, 0, 0)
    lines = solution(p).splitlines()
    assert len(lines) == 5  # plan, three steps, answer

    def rated(*lines):
        return rate(p, "\n".join(lines))

    assert rated(*lines, "So it is.")["signal_to_noise"] == pytest.approx(1 + 4 * 5 / 6)
    assert rated("Plan: guess.", *lines[1:])["strategy_coherence"] == pytest.approx(1 + 4 * 3 / 5)
    assert rated(*lines[:-1], "Answer: 0")["step_coherence"] == pytest.approx(1 + 4 * 5 / 6)
    assert rate(p, "") == {
        "factuality": 1.0,
        "strategy_coherence": 1.0,
        "step_coherence": 1.0,
        "numerical_precision": 1.0,
        "signal_to_noise": 1.0,
    }


def test_a_slip_is_charged_once_and_not_where_it_propagates():
    p = problem("chain", 3, 0, 1)
    steps, _, _ = solve(p)
    text = corrupt(p, "numerical_precision", 1, random.Random(0))
    assert rate(p, text)["numerical_precision"] == pytest.approx(
        1 + 4 * (len(steps) - 1) / len(steps)
    )
    assert {rate(p, text)[d] for d in DIMENSIONS if d != "numerical_precision"} == {5.0}


WORDS = st.one_of(
    st.text(max_size=4),
    st.sampled_from(
        [
            "Plan: ",
            "Answer: ",
            "1.",
            "2. ",
            " = ",
            " + ",
            " % ",
            " div ",
            "min ",
            "0",
            "7",
            "12",
            "Mon",
            "0101",
            " r ",
            "\n",
            "=",
            "xor",
            "None",
            "-1",
            "9" * 30,
        ]
    ),
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(WORDS, max_size=25).map("".join), st.sampled_from(PROBLEMS))
def test_any_text_has_five_ratings(text, p):
    ratings = rate(p, text)
    assert tuple(ratings) == DIMENSIONS
    assert all(1 <= r <= 5 for r in ratings.values()), ratings


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.sampled_from(PROBLEMS), st.randoms(use_true_random=False), st.data())
def test_lines_of_solutions_in_any_order_have_five_ratings(p, rng, data):
    lines = (
        solution(p, rng, 0.5).splitlines() + corrupt(p, "strategy_coherence", 4, rng).splitlines()
    )
    lines = data.draw(st.lists(st.sampled_from(lines), max_size=15))
    assert all(1 <= r <= 5 for r in rate(p, "\n".join(lines)).values())
