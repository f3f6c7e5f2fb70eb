"""Edits of traces: worse in the dimension that is meant, and in little else."""

import decimal
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltapref_jax.config import DIMENSIONS
from deltapref_jax.judging.edit import FILLERS, edit
from deltapref_jax.synthetic import world
from deltapref_jax.synthetic.rate import rate

FAMILIES = ("chain", "shop", "formula", "ages", "trip")
OTHERS = [world.solution(world.problem(family, 2, 6, 1)) for family in FAMILIES]
QUESTION = (
    "Tom has 12 apples and gives Anna 5. Then Ben buys 1,200 more at $3 each. What do they cost?"
)
PROSE = (
    "First we look at what Anna got. Tom has 12 apples, so 12 - 5 = 7. Ben buys 1,200 more, so "
    "7 + 1,200 = 1,207. The cost is 1,200 × $3 = $3,600. The answer is 3600."  # noqa: RUF001
)


def edited(question, text, dimension, degree=1, seed=0):
    return edit(question, text, dimension, degree, OTHERS, random.Random(seed))


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_an_exact_judge_sees_the_edit_in_its_dimension(dimension):
    problems = [world.problem(family, 2, 5, i) for family in FAMILIES for i in range(12)]
    rated = {d: [] for d in DIMENSIONS}
    for i, p in enumerate(problems):
        text = edited(p.question, world.solution(p), dimension, 1 + i % 4, i)
        for d, rating in rate(p, text).items():
            rated[d].append(rating)
    fell = {d: sum(r < 5 for r in ratings) for d, ratings in rated.items()}
    assert fell[dimension] >= 0.9 * len(problems)
    # Steps left out, repeated or swapped are other operations, or lines that are not needed; a line
    # both of whose operands are misread is for the exact judge a step out of nowhere.
    others = {
        "step_coherence": {"strategy_coherence", "signal_to_noise"},
        "factuality": {"step_coherence"},
    }
    apart = set(DIMENSIONS) - {dimension} - others.get(dimension, set())
    assert all(fell[d] <= 0.05 * len(problems) for d in apart)


def test_what_follows_from_a_change_is_calculated_again():
    wrong = edited(QUESTION, PROSE, "numerical_precision", 3, 2)
    assert wrong != PROSE
    assert wrong.startswith("First we look at what Anna got. Tom has 12 apples, so 12 - 5 = ")
    assert "1,200 × $3 = $3,600" not in wrong and "3600" not in wrong  # noqa: RUF001
    misread = {edited(QUESTION, PROSE, "factuality", 1, seed) for seed in range(20)}
    assert any("12 - 4 = 8" in text and "8 + 1,200 = 1208" in text for text in misread)
    assert all("So" not in text for text in misread)
    # A name stands for another of the question's.
    assert any("what Ben got" in edited(QUESTION, PROSE, "factuality", 9, s) for s in range(9))


def test_steps_keep_numbers_in_order_and_fillers_were_not_lessons():
    p = world.problem("chain", 2, 5, 3)
    for seed in range(20):
        lines = edited(p.question, world.solution(p), "step_coherence", 2, seed).splitlines()
        numbers = [int(line.split(".")[0]) for line in lines[1:-1]]
        assert numbers == list(range(1, len(numbers) + 1))
    assert not {*FILLERS} & {*world.FILLERS}
    noisy = edited(p.question, world.solution(p), "signal_to_noise", 3).splitlines()
    assert [line for line in noisy if line not in FILLERS] == world.solution(p).splitlines()


def test_a_trace_without_a_place_is_told():
    assert edited("What is red?", "Blood", "factuality") is None
    assert edited("What is red?", "Blood", "step_coherence") is None
    assert edited("What is red?", "Blood", "numerical_precision") is None
    assert edit("What is red?", "Blood", "strategy_coherence", 1, [], random.Random(0)) is None
    # An equation that is wrong already can't be made wrong.
    assert edited("Add 1 and 1.", "It is simple. 1 + 1 = 3", "numerical_precision") is None


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_edits_do_not_depend_on_the_precision_of_the_thread(dimension):
    question, text = (
        "Add 0 and 100000000.",
        "1. 0 + 100000000 = 100000000\n2. 3 * 7 = 21\n3. So 21.",
    )
    want = edit(question, text, dimension, 2, ["It is so.\n1 + 1 = 2"], random.Random(3))
    with decimal.localcontext(decimal.Context(prec=6)):
        got = edit(question, text, dimension, 2, ["It is so.\n1 + 1 = 2"], random.Random(3))
    assert got == want is not None


NUMBERS = st.one_of(
    st.sampled_from(["0", "007", "-0", "0.333333", "1,000", "9999999999999", "9" * 40, "٣"]),
    st.from_regex(r"-?[0-9]{1,14}(\.[0-9]{1,9})?", fullmatch=True),
)
EQUATIONS = st.builds(
    "{} {} {} = {}".format,
    NUMBERS,
    st.sampled_from("+-*/×÷"),  # noqa: RUF001
    NUMBERS,
    NUMBERS,
)
LINES = st.one_of(
    st.text(max_size=30),
    st.builds("{}. {}".format, st.sampled_from(["1", "22", "9" * 5000]), EQUATIONS),
    st.builds("We get ${}$, then {}.".format, EQUATIONS, EQUATIONS),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LINES, max_size=6).map("\n".join), st.sampled_from(DIMENSIONS), st.data())
def test_whatever_a_model_wrote_is_edited_or_has_no_place(text, dimension, data):
    degree, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    question = "Tom has 0.333333 and Ann 9999999999999 of 1,000?"
    found = edited(question, text, dimension, degree, seed)
    assert found is None or found != text


def test_an_equation_that_no_other_operation_fits_is_no_place():
    # The sum and the difference of the first have six decimals; the second's product is too long.
    for text in ("We divide. 0.333333 * 3 = 1", "So. 9999999999999 * 9999999999999 = 1 is large."):
        assert edit("What?", text, "strategy_coherence", 2, [], random.Random(0)) is None
    both = "We. 0.333333 * 3 = 1. Then 2 * 3 = 6."
    found = edit("What?", both, "strategy_coherence", 2, [], random.Random(0))
    assert "0.333333 * 3 = 1" in found and "2 * 3 = 6" not in found
