"""Verdicts on labelled traces: cases.jsonl comes from make_cases.py, handwritten.jsonl does not.

A wrong answer that passes and a right one that does not are both listed; the lists may only shrink.
"""

import collections
import json
import pathlib
import re

import pytest

from deltapref_jax.answers.check import check
from tests.marks import mostly

HERE = pathlib.Path(__file__).parent
MISSED = {  # right answers that are taken for wrong ones
    "There are 12 apples in total, and the answer is correct.",
    r"The answer is \boxed{}. So 5.",
    "The answer is $x<2$ or $x>3$.",
    "Result: 5 (after 12 steps)",
    "The result is 5, after 12 steps.",
    "The solution is x = 5, found in 12 steps.",
    "The answer turns out to be 12 after 15 steps.",
    "The solution is x = 2, y = 3.",
    "x = 5 or x = -3",
    "정답: 12 (13은 아님)",
    "The answer is Rs. 12.",
}


def rows(name):
    return [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]


def by_label(cases, checker):
    """How many cases of a checker are right, and how many wrong."""
    labels = [row["right"] for row in cases if checker in row["checkers"]]
    return sum(labels), len(labels) - sum(labels)


def faults(cases, checker):
    """Traces whose verdict is not their label: wrong answers that pass, right ones that do not."""
    passed, missed = set(), set()
    for row in cases:
        if checker in row["checkers"]:
            prompt = {"checker": checker, "answer": row["gold"], "meta": "{}"}
            found = check(prompt, row["trace"]).correct
            if found is not row["right"]:
                (passed if found else missed).add(row["trace"])
    return passed, missed


@pytest.mark.parametrize("checker", mostly(pytest.mark.exhaustive, ["math", "exact"], 1))
def test_constructed_cases(checker):
    cases = rows("cases.jsonl")
    kinds = collections.Counter(row["kind"] for row in cases)
    assert kinds == dict.fromkeys(("number", "expression", "letter", "text"), 500)
    assert faults(cases, checker) == (set(), set())


@pytest.mark.parametrize("checker", ["math", "exact"])
def test_handwritten_cases(checker):
    passed, missed = faults(rows("handwritten.jsonl"), checker)
    assert passed == set()
    assert missed <= MISSED


@pytest.mark.slow
def test_the_error_rates_in_the_docs_are_these():
    """Run this file as a program for the lines of the table."""
    page = (HERE.parent.parent / "docs" / "answers.md").read_text()
    assert [line for line in page.splitlines() if re.match(r"\| \S.* \| \d+/\d+", line)] == table()


def table():
    """The rows of the table of error rates: missed and passed, by "exact" and by "math"."""
    kinds = collections.defaultdict(list)
    for row in rows("cases.jsonl") + rows("handwritten.jsonl"):
        kinds[row["kind"]].append(row)
    lines = []
    for kind, cases in kinds.items():
        cells = []
        for checker in ("exact", "math"):
            passed, missed = faults(cases, checker)
            right, wrong = by_label(cases, checker)
            cells += [f"{len(missed)}/{right}", f"{len(passed)}/{wrong}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def test_any_of_several_reference_answers_is_right():
    meta = json.dumps({"answers": ["Monday", "Mon", "the first day"]})
    for checker in ("math", "exact"):
        prompt = {"checker": checker, "answer": "Monday", "meta": meta}
        for said, right in [("Monday", True), ("mon.", True), ("first day", True), ("Tue", False)]:
            assert check(prompt, f"Answer: {said}").correct is right


if __name__ == "__main__":
    print(*table(), sep="\n")
