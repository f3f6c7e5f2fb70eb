"""Is the answer right? One function for every kind of question.

Checkers that parse what a model wrote run in another process, which is confined in time, memory and
rights (`worker`, `sandbox`).
"""

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.answers import reading
from deltapref_jax.answers.extract import (
    Statement,
    final_answer,
    last_formula,
    statement,
    without_thoughts,
)
from deltapref_jax.answers.worker import Worker
from deltapref_jax.callables import CHECKER, failure, is_callable_name, load_callable
from deltapref_jax.config import CHECKERS, ConfigError, check_choice, need_reasoning_gym
from deltapref_jax.records import Prompt

_MAX_ANSWER = 10_000  # characters that are read of an answer
_worker = Worker()


class Verdict(NamedTuple):
    """What the checker says of one trace."""

    correct: bool | None  # None: the question has no checker, or its own one cannot say
    answer: str  # what was taken for the trace's answer
    note: str  # "", "no answer", "timeout", "the checker died", "refused: …" or the error


def check(prompt: Mapping[str, Any], text: str, where: str = "an answer") -> Verdict:
    """Checks a trace against its prompt, the fields of a `records.Prompt`.

    What the trace says never raises: an answer that the checker refuses, that takes it too long or
    that crashes it is wrong, with a note.

    Args:
      prompt: with its checker.
      text: of the whole trace.
      where: which trace it is, for messages.

    Raises:
      ConfigError: the prompt names an unknown checker, or one whose library is not installed; or
        the user's own checker fails, or returns something else than True, False or None.
    """
    if is_callable_name(prompt["checker"]):
        return _own(prompt, text, where)
    kind = check_choice("checker", prompt["checker"], CHECKERS)
    if kind == "":
        return Verdict(None, "", "")
    if kind in ("math", "exact"):
        return _answered(prompt, text, kind)
    answer = final_answer(text)
    if not answer:
        return Verdict(False, "", "no answer")
    if kind == "world":
        return Verdict(_plain(answer) == _plain(prompt["answer"]), answer, "")
    need_reasoning_gym()
    request = {**json.loads(prompt["meta"]), "kind": kind, "answer": answer}
    correct, note = _worker.grade(request)
    return Verdict(correct, answer, note)


def _own(prompt: Mapping[str, Any], text: str, where: str) -> Verdict:
    """What the user's own checker says of a trace: it gets the whole text."""
    name = prompt["checker"]
    function = load_callable("checker", name, CHECKER)
    try:
        correct = function(Prompt(**prompt), text)
    except Exception as e:  # the user's function may raise any type
        raise failure(name, where, e) from e
    if isinstance(correct, np.bool_):  # what a comparison of arrays gives
        correct = bool(correct)
    if correct is not None and not isinstance(correct, bool):
        raise ConfigError(
            f"{name} returned {str(correct)[:80]!r} for {where}; a checker returns True, False, or "
            "None where it cannot say."
        )
    return Verdict(correct, "", "")


def _answered(prompt: Mapping[str, Any], text: str, kind: str) -> Verdict:
    """Against each reference answer: any of them is right."""
    golds = json.loads(prompt["meta"]).get("answers") or [prompt["answer"]]
    found = statement(text)
    verdict = Verdict(False, "", "no answer")
    for gold in map(_boxed, golds):
        said = _stated(found, text, gold)
        if said:
            verdict = _compare(gold, said, kind)
            if verdict.correct:
                break
    return verdict


def _boxed(gold: str) -> str:
    """The reference answer, or what the box of a worked solution (MATH, NuminaMath) holds."""
    found = statement(gold) if "\\boxed" in gold else None
    return found.text if found and found.how == "box" else gold


def _stated(found: Statement, text: str, gold: str) -> str:
    """What is held against `gold`: the statement, or what stands for one in a trace without any."""
    said = found.text[:_MAX_ANSWER]
    if found.how == "box" and "$" not in said:
        return f"${said}$"  # its full stops and exclamation marks end no sentence
    whole = without_thoughts(text).strip()
    if not found.text and _gold_number(gold) and "\n" not in whole[:_MAX_ANSWER]:
        return whole if len(whole) <= _MAX_ANSWER and reading.number(whole) else ""  # "twenty-five"
    if found.how != "number" or _gold_number(gold):
        return said
    # What is not announced is an answer only where it is all that the trace says.
    alone = len(whole) <= _MAX_ANSWER and "\n" not in whole
    if alone and _compare(gold, whole, "exact").correct:
        return whole
    if reading.gold_letter(gold) or reading.is_words(gold):
        return said
    return last_formula(text) or said


def _compare(gold: str, said: str, kind: str) -> Verdict:
    """One reference answer and a statement, read as the kind of thing that the reference is."""
    if wanted := reading.gold_letter(gold):
        letter = reading.letter(said)
        if letter or gold.strip() == wanted:  # a small letter may be a variable
            return Verdict(letter == wanted, letter or said, "")
    head = reading.formula_reading(said)
    if values := _gold_number(gold):
        if found := reading.number(said):
            product = reading.factorial(said) if kind == "math" else None
            return Verdict(bool(found[0] & values) or product in values, found[1], "")
        if reading.several(said):
            return Verdict(False, said, "")
    else:
        for candidate in [*reading.readings(said), head]:
            if _same_words(candidate, gold) or reading.same_formula(candidate, gold):
                return Verdict(True, candidate.strip("*_ "), "")
    if (
        kind == "exact"
        or reading.is_words(gold)
        or _is_digits(gold)
        or not head
        or _CLOCK.search(head)
    ):
        return Verdict(False, head, "")
    head_formula = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", head)
    request = {"kind": "math", "gold": reading.normalize(gold), "answer": head_formula}
    correct, note = _worker.grade(request)
    return Verdict(correct, head, note)


_CLOCK = re.compile(r"\d:\d\d\s*[ap]\.?m\b", re.IGNORECASE)  # math-verify takes it for a ratio
_TRUTH = {"yes": "true", "no": "false"}


def _same_words(said: str, gold: str) -> bool:
    """Whether both have the same words; yes and no are answers to what is true and false."""
    one, other = reading.words(said), reading.words(gold)
    if re.fullmatch(r"\d{1,2}:\d{2}", other):  # a clock of 24 hours, or of 12 in the morning
        one = re.sub(r"\s*am$", "", one)
    return _TRUTH.get(one, one) == _TRUTH.get(other, other)


def _is_digits(gold: str) -> bool:
    """Whether the reference is a row of digits and no number, such as 0101."""
    return re.fullmatch(r"\s*0\d{3,}\s*", gold) is not None


def _gold_number(gold: str) -> frozenset[Fraction] | None:
    """Values of a reference answer that is a number with or without a unit.

    0101 is none, while the 025 of a contest that asks for three digits is 25.
    """
    if _is_digits(gold):
        return None
    found = reading.number(gold)
    return found[0] if found else None


def _plain(text: str) -> str:
    """Case, spaces and a number's thousands separators and trailing zeros do not matter."""
    text = " ".join(text.lower().split()).rstrip(".")
    if re.fullmatch(r"-?\d[\d,]*\.?\d*", text):
        text = text.replace(",", "")
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text
