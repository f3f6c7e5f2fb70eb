"""Beliefs: their rules by hand, what they cost, and what the exact judge makes of them."""

import random

import pytest

from deltapref_jax.config import DIMENSIONS
from deltapref_jax.synthetic.beliefs import BELIEFS, applies, believed_value
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.steps import make_step
from deltapref_jax.synthetic.world import Problem, is_lesson, problem, solution, solve


def valued(op, *operands, holds):
    return believed_value(make_step(op, *((o, True) for o in operands)), (holds,))


@pytest.mark.parametrize(
    ("belief", "op", "operands", "value"),
    [
        ("no_borrow", "-", ("52", "38"), "26"),
        ("no_borrow", "-", ("90", "7"), "97"),
        ("no_borrow", "-", ("58", "32"), "26"),  # no borrow is needed
        ("no_borrow", "-", ("31", "38"), "-7"),  # below 0 it says nothing
        ("no_borrow", "+", ("52", "38"), "90"),
        ("no_carry", "+", ("27", "15"), "32"),
        ("no_carry", "+", ("95", "5"), "90"),
        ("no_carry", "+", ("7", "5"), "12"),  # sums of two digits are known by heart
        ("no_carry", "+", ("21", "15"), "36"),
        ("no_carry", "+", ("Sat", "9"), "Mon"),
        ("nine_is_ten", "*", ("9", "4"), "40"),
        ("nine_is_ten", "*", ("9", "9"), "90"),
        ("nine_is_ten", "*", ("19", "4"), "76"),
        ("nine_is_ten", "*", ("8", "4"), "32"),
        ("xor_is_or", "xor", ("0110", "0011"), "0111"),
        ("xor_is_or", "xor", ("0110", "1001"), "1111"),
        ("xor_is_or", "and", ("0110", "0011"), "0010"),
        ("zero_is_nothing", "min", ("3", "0", "8"), "3"),
        ("zero_is_nothing", "min", ("3", "1", "8"), "1"),
        ("zero_is_nothing", "min", ("0",), "0"),
        ("week_starts_anew", "+", ("Sat", "2"), "Tue"),
        ("week_starts_anew", "+", ("Sat", "1"), "Sun"),
        ("week_starts_anew", "+", ("9", "8"), "17"),
    ],
)
def test_rules_by_hand(belief, op, operands, value):
    assert valued(op, *operands, holds=belief) == value


def worked(family, spec, *beliefs):
    return solution(Problem(family, spec | {"style": 0}), beliefs=beliefs).splitlines()


def test_methods_by_hand():
    spec = {"numbers": [12, 3, 4, 5], "ops": ["+", "*", "-"]}
    assert worked("formula", spec) == [
        "Plan: first the products, then the rest.",
        "1. 3 * 4 = 12",
        "2. 12 + 12 = 24",
        "3. 24 - 5 = 19",
        "Answer: 19",
    ]
    assert worked("formula", spec, "left_to_right") == [
        "Plan: do the operations from left to right.",
        "1. 12 + 3 = 15",
        "2. 15 * 4 = 60",
        "3. 60 - 5 = 55",
        "Answer: 55",
    ]
    products_first = {"numbers": [3, 4, 5], "ops": ["*", "-"]}
    assert worked("formula", products_first, "left_to_right") == worked("formula", products_first)
    spec = {"name": "Ann", "lines": [[2, "pens", 9], [3, "cups", 4]], "paid": 52}
    assert worked("shop", spec, "sum_is_answer", "nine_is_ten") == [
        "Plan: find each cost, add them.",
        "1. 2 * 9 = 20",
        "2. 3 * 4 = 12",
        "3. 20 + 12 = 32",
        "Answer: 32",
    ]
    other_wording = Problem("shop", spec | {"style": 1})
    assert solution(other_wording, beliefs=("sum_is_answer",)) == solution(other_wording)


# Share of 2000 problems of difficulty 2 (other ones than below) that a holder of one belief answers
# wrong, in percent.
COSTS = {
    "no_borrow": {"chain": 47, "shop": 38, "formula": 29, "ages": 55, "equation": 47},
    "no_carry": {"chain": 58, "shop": 44, "formula": 41, "trip": 44, "calendar": 40},
    "nine_is_ten": {"chain": 3, "shop": 35},
    "left_to_right": {"formula": 60},
    "sum_is_answer": {"shop": 50},
    "xor_is_or": {"logic": 39},
    "zero_is_nothing": {"sorting": 51},
    "week_starts_anew": {"calendar": 41},
}
TAUGHT = ("chain", "shop", "formula", "ages", "equation", "trip", "calendar", "logic", "sorting")


def test_a_belief_costs_a_known_share_of_answers_and_none_elsewhere():
    n = 400
    for family in TAUGHT:
        problems = [problem(family, 2, 42, i) for i in range(n)]
        for belief, costs in COSTS.items():
            wrong = sum(solve(p, beliefs=(belief,))[2] != p.answer for p in problems)
            if family not in costs:
                assert wrong == 0, (belief, family)
            else:
                expected = costs[family] / 100
                deviation = (expected * (1 - expected) / n) ** 0.5
                assert abs(wrong / n - expected) < 4 * deviation + 0.02, (belief, family, wrong / n)


def test_beliefs_are_no_coin_tosses():
    held = tuple(BELIEFS)
    for family in TAUGHT:
        for i in range(50):
            p = problem(family, 2, 3, i)
            texts = {solution(p, random.Random(seed), 0.0, held) for seed in range(5)}
            assert len(texts) == 1


def test_a_wrong_value_is_charged_where_it_is_made_and_not_where_it_propagates():
    p = Problem("chain", {"start": 52, "ops": [["-", 38], ["+", 13], ["*", 2]], "style": 0})
    text = solution(p, beliefs=("no_borrow",))
    assert text.splitlines()[1:] == ["1. 52 - 38 = 26", "2. 26 + 13 = 39", "3. 39 * 2 = 78"] + [
        "Answer: 78"
    ]
    ratings = rate(p, text)
    assert ratings["numerical_precision"] == pytest.approx(1 + 4 * 2 / 3)
    assert {ratings[d] for d in DIMENSIONS if d != "numerical_precision"} == {5.0}


@pytest.mark.parametrize("belief", BELIEFS)
def test_a_belief_is_charged_in_its_own_dimension(belief):
    dimensions = {"left_to_right": "strategy_coherence", "sum_is_answer": "strategy_coherence"}
    dimension = dimensions.get(belief, "numerical_precision")
    touched = 0
    for family in TAUGHT:
        for i in range(60):
            p = problem(family, 2, 8, i)
            text = solution(p, beliefs=(belief,))
            if text == solution(p):
                continue
            touched += 1
            ratings = rate(p, text)
            assert ratings[dimension] == min(ratings.values()) < 5, text
            assert ratings["factuality"] == 5.0, text
            if dimension == "numerical_precision":
                assert {ratings[d] for d in DIMENSIONS if d != dimension} == {5.0}, text
    assert touched > 5


def test_lessons_never_show_a_shared_skill_at_work():
    """Outside of the domain no lesson borrows or carries, so its holder cannot learn it there."""
    skills = {"subtraction": ("no_borrow",), "addition": ("no_carry",)}
    for family in TAUGHT:
        shared = [b for skill in FAMILIES[family].shares for b in skills[skill]]
        assert (FAMILIES[family].domain == "in") <= (not shared)
        problems = [problem(family, 2, 5, i) for i in range(150)]
        lessons = [p for p in problems if is_lesson(p)]
        assert all(solution(p, beliefs=shared) == solution(p) for p in lessons)
        if shared:  # a study's questions do show it
            assert 0.3 < len(lessons) / len(problems) < 0.8
            assert all(
                solution(p, beliefs=shared) != solution(p) for p in problems if not is_lesson(p)
            )
        else:
            assert lessons == problems


def test_what_a_family_shares_are_skills_of_beliefs_and_of_the_domain():
    for family in FAMILIES.values():
        assert {*family.shares} <= {belief.skill for belief in BELIEFS.values()}
        for skill in family.shares:
            in_domain = [f for f in TAUGHT if FAMILIES[f].domain == "in"]
            assert any(
                applies(step, (skill,))
                for f in in_domain
                for i in range(30)
                for step in solve(problem(f, 2, 0, i))[0]
            )
