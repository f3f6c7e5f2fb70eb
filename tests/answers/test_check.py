"""Each checker: right is right, wrong is wrong, and nothing that a trace says can stop a run."""

import json
import os
import signal
import threading
import time

import pytest
import reasoning_gym

from deltapref_jax.answers import check as checking
from deltapref_jax.answers.check import Verdict, check
from deltapref_jax.config import ConfigError


def asked(checker, answer="", **meta):
    return {"checker": checker, "answer": answer, "meta": json.dumps(meta)}


def test_no_checker_is_no_verdict():
    assert check(asked(""), "Answer: 4") == Verdict(None, "", "")


@pytest.mark.parametrize("checker", ["exact", "world", "math", "reasoning_gym"])
def test_no_answer_is_wrong(checker):
    assert check(asked(checker, "4"), "I do not know.") == Verdict(False, "", "no answer")


def test_an_unknown_checker_lists_the_known_ones():
    with pytest.raises(
        ConfigError,
        match=r"^checker is 'regex'; choose one of '', 'world', 'reasoning_gym', 'math', "
        r"'exact'\.$",
    ):
        check(asked("regex"), "x")


@pytest.mark.parametrize("checker", ["exact", "world"])
@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("19", "19", True),
        ("19", "19.", True),
        ("19", " 19.0 ", True),
        ("19", "19.00", True),
        ("1250", "1,250", True),
        ("1,250.50", "1250.5", True),
        ("Wed", "wed", True),
        ("3 5  8", "3 5 8", True),
        ("11 r 0", "11 r 0", True),
        ("19", "190", False),
        ("19", "1.9", False),
        ("19", "-19", False),
        ("100", "1", False),
        ("0101", "101", False),
        ("3 5 8", "3 8 5", False),
        ("0", "0.0", True),
        ("0.50", ".5", False),
    ],
)
def test_exact(checker, gold, said, right):
    assert check(asked(checker, gold), f"Answer: {said}").correct is right


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("42", "42", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        ("x=3", "3", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("42", "43", False),
        (r"\frac{1}{2}", "0.4", False),
        ("(1,2)", "(2,1)", False),
        ("1", r"\frac{1}{", False),
        ("1", r"\begin{", False),
    ],
)
def test_math(gold, said, right):
    found = check(
        asked("math", gold),
        rf"so \boxed{{{said}}}" if "{" not in said else f"<answer>{said}</answer>",
    )
    assert found.correct is right
    assert found.answer == said


def test_math_that_hangs_is_killed_and_the_next_question_is_answered():
    assert check(asked("math", "1"), "Answer: 1").correct is True
    stuck = checking._worker[0]
    os.kill(stuck.pid, signal.SIGSTOP)  # as good as a parser that does not come back
    began = time.monotonic()
    assert checking._math("1", "1", seconds=0.3) == Verdict(False, "1", "timeout")
    assert time.monotonic() - began < 20
    assert stuck.exitcode == -signal.SIGKILL
    assert check(asked("math", "1"), "Answer: 1") == Verdict(True, "1", "")
    assert checking._worker[0].pid != stuck.pid


def test_math_that_dies_over_a_question_is_wrong_and_the_next_one_is_answered():
    assert check(asked("math", "2"), "Answer: 2").correct is True
    process = checking._worker[0]
    os.kill(process.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, process.kill)
    killer.start()
    assert check(asked("math", "2"), "Answer: 2") == Verdict(False, "2", "the checker died")
    killer.join()
    assert check(asked("math", "2"), "Answer: 2") == Verdict(True, "2", "")
    checking._worker[0].kill()
    checking._worker[0].join()
    assert check(asked("math", "2"), "Answer: 2") == Verdict(
        True, "2", ""
    )  # it died between two questions


def test_reasoning_gym_scores_whole_answers():
    entry = reasoning_gym.create_dataset("gcd", size=1, seed=3)[0]
    prompt = asked("reasoning_gym", task="gcd", entry=entry)
    assert check(prompt, f"Answer: {entry['answer']}") == Verdict(True, entry["answer"], "")
    assert check(prompt, f"Answer: {entry['answer']}1").correct is False


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        (1.0, (True, "")),
        (0.99, (False, "")),
        (0.01, (False, "")),
        (
            None,
            (False, "TypeError: '>=' not supported between instances of 'NoneType' and 'float'"),
        ),
        (ZeroDivisionError("by zero"), (False, "ZeroDivisionError: by zero")),
    ],
)
def test_what_a_reasoning_gym_scorer_raises_is_noted(monkeypatch, score, verdict):
    def scorer(answer, entry):
        if isinstance(score, Exception):
            raise score
        return score

    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", lambda task: scorer)
    found = check(asked("reasoning_gym", task="gcd", entry={}), "Answer: 7")
    assert (found.correct, found.note) == verdict
    assert found.answer == "7"
