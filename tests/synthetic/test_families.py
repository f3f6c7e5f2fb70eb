"""Every family: questions state their problem, solutions are correct, both are pure functions."""

import math
import random
import re

import pytest

from deltapref_jax.config import ConfigError
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.steps import DAYS, MAX_STEPS, evaluate
from deltapref_jax.synthetic.world import from_meta, meta, problem, prompts, solution, solve


def numbers(question):
    return [int(n) for n in re.findall(r"-?\d+", question)]


def chain(question):
    value, operations = (
        numbers(question)[0],
        re.findall(r"(add|take away|multiply by) (\d+)", question),
    )
    assert len(operations) == len(numbers(question)) - 1
    for word, n in operations:
        value = {"add": value + int(n), "take away": value - int(n), "multiply by": value * int(n)}[
            word
        ]
    return str(value)


def shop(question):
    bought = [(int(n), int(price)) for n, price in re.findall(r"(\d+) [a-z]+ at (\d+)", question)]
    paid = int(re.search(r"(?:pays|has) (\d+)", question)[1])
    return str(paid - sum(n * price for n, price in bought))


def bases(question):
    n, base = numbers(question)
    digits = []
    while n:
        digits.append(str(n % base))
        n //= base
    return "".join(reversed(digits))


def equation(question):
    left, low, right, high = numbers(question)
    (x,) = [x for x in range(-200, 200) if left * x + low == right * x + high]
    return str(x)


def logic(question):
    words = re.findall(r"[01]{4}", question)
    operations = re.findall(r"(xor|and|or) [01]{4}", question)
    assert len(words) == len(operations) + 1
    value = words[0]
    for op, word in zip(operations, words[1:], strict=True):
        rule = {
            "xor": lambda a, b: a != b,
            "and": lambda a, b: a == b == "1",
            "or": lambda a, b: "1" in a + b,
        }[op]
        value = "".join(str(int(rule(a, b))) for a, b in zip(value, word, strict=True))
    return value


def calendar(question):
    day = next(d for d in DAYS if d in question)
    for _ in range(sum(numbers(question))):
        day = DAYS[DAYS.index(day) - 6]
    return day


def formula(question):
    return str(eval(re.search(r"[\d+*\- ]+\d", question)[0]))  # Python knows what comes first


def ages(question):
    first, *gaps = numbers(question)
    return str(first - sum(gaps))


CHECKS = {
    "formula": formula,
    "ages": ages,
    "trip": lambda q: str(sum(numbers(q))),
    "chain": chain,
    "shop": shop,
    "euclid": lambda q: str(math.gcd(*numbers(q))),
    "bases": bases,
    "equation": equation,
    "sorting": lambda q: " ".join(map(str, sorted(numbers(q)))),
    "logic": logic,
    "calendar": calendar,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_the_solution_is_correct_by_another_computation(family, difficulty):
    for i in range(60):
        p = problem(family, difficulty, 11, i)
        steps, values, answer = solve(p)
        assert answer == p.answer == CHECKS[family](p.question), p.question
        assert all(
            evaluate(step.op, step.operands) == value
            for step, value in zip(steps, values, strict=True)
        )
        assert 1 <= len(steps) <= MAX_STEPS
        text = solution(p)
        assert text.splitlines()[0] == f"Plan: {FAMILIES[family].plan}"
        assert text.splitlines()[-1] == f"Answer: {answer}"
        assert len(text.splitlines()) == len(steps) + 2
        assert from_meta(meta(p)) == p


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_stands_on_the_question_and_on_earlier_values(family):
    for i in range(40):
        p = problem(family, 3, 5, i)
        steps, values, _ = solve(p)
        for n, step in enumerate(steps):
            for operand, given in zip(step.operands, step.given, strict=True):
                pool = (
                    " ".join(values[:n]).replace(" r ", " ").split()
                    if not given
                    else re.findall(r"\w+", p.question) + ["7"]
                )
                assert operand in pool or (family == "sorting" and operand in p.question), (
                    p.question,
                    step,
                )


def test_harder_questions_take_more_steps():
    for family in FAMILIES:
        steps = [sum(len(solve(problem(family, d, 0, i))[0]) for i in range(60)) for d in (1, 4)]
        # In `equation` the numbers grow, and the steps are always three.
        assert steps[0] < steps[1] or family == "equation", family


def test_prompts_are_distinct_even_and_a_pure_function_of_their_arguments():
    tasks = tuple(FAMILIES)
    rows = prompts(tasks, 83, 2, 5)
    assert rows == prompts(tasks, 83, 2, 5)
    assert len({row.messages for row in rows}) == len({row.prompt_id for row in rows}) == 83
    counts = [sum(row.task == t for row in rows) for t in tasks]
    assert max(counts) - min(counts) == 1
    assert rows[:40] == prompts(tasks, 40, 2, 5)  # a larger count adds and changes nothing
    for row in rows:
        p = from_meta(row.meta)
        assert row.chat() == [{"role": "user", "content": p.question}]
        assert (row.answer, row.checker) == (p.answer, "world")
    for other in (prompts(tasks, 83, 2, 6), prompts(tasks, 83, 3, 5)):
        assert len({row.prompt_id for row in rows} & {row.prompt_id for row in other}) < 15
    assert random.random() != random.random()  # the global state is not seeded


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_thousand_questions_for_a_study(family):
    assert len(prompts((family,), 1000, 2, 0)) == 1000


def test_a_family_that_runs_dry_is_one_sentence(monkeypatch):
    import dataclasses

    few = dataclasses.replace(
        FAMILIES["bases"], draw=lambda rng, d: {"n": rng.randint(10, 11), "base": 3}
    )
    monkeypatch.setitem(FAMILIES, "bases", few)
    with pytest.raises(ConfigError) as error:
        prompts(("bases",), 9, 2, 0)
    assert str(error.value) == (
        "Family 'bases' ran out of distinct questions at difficulty 2, after 4; lower the "
        "count or raise the difficulty."
    )


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(
        ConfigError,
        match=r"^synthetic task is 'algebra'; choose one of 'chain', 'shop', 'formula', .*",
    ):
        problem("algebra", 1, 0, 0)


@pytest.mark.parametrize(
    ("op", "operands", "value"),
    [
        ("+", ("2", "3"), "5"),
        ("-", ("2", "3"), "-1"),
        ("*", ("4", "5"), "20"),
        ("%", ("17", "5"), "2"),
        ("/", ("12", "4"), "3"),
        ("/", ("13", "4"), None),
        ("div", ("17", "5"), "3 r 2"),
        ("min", ("5", "3", "9"), "3"),
        ("xor", ("0110", "0101"), "0011"),
        ("and", ("0110", "0101"), "0100"),
        ("or", ("0110", "0101"), "0111"),
        ("xor", ("0110", "01"), None),
        ("xor", ("0120", "0101"), None),
        ("+", ("Sat", "3"), "Tue"),
        ("-", ("Sat", "3"), None),
        ("%", ("5", "0"), None),
        ("/", ("5", "0"), None),
        ("div", ("5", "0"), None),
        ("+", ("5", "0"), "5"),
        ("^", ("5", "0"), None),
        ("+", ("a", "1"), None),
        ("min", ("a",), None),
        ("+", ("1", "2", "3"), None),
        ("", (), None),
        ("*", ("9" * 5000, "2"), None),
        ("*", ("9" * 4000,) * 2, None),
    ],
)
def test_evaluate(op, operands, value):
    assert evaluate(op, operands) == value
