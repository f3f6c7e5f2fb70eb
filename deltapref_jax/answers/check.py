"""Is the answer right? One function for every kind of question.

Checkers that parse what a model wrote run in another process, which is confined in time, memory and
rights (`worker`, `sandbox`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from deltapref_jax.answers.extract import final_answer
from deltapref_jax.answers.worker import Worker
from deltapref_jax.config import CHECKERS, check_choice, need_reasoning_gym

_worker = Worker()


class Verdict(NamedTuple):
    """What the checker says of one trace."""

    correct: bool | None  # None: the question has no checker
    answer: str  # what was taken for the trace's answer
    note: str  # "", "no answer", "timeout", "the checker died", "refused: …" or the error


def check(prompt: Mapping[str, Any], text: str) -> Verdict:
    """Checks a trace against its prompt, a row of `records.PROMPT`.

    What the trace says never raises: an answer that the checker refuses, that takes it too long or
    that crashes it is wrong, with a note.

    Raises:
      ConfigError: the prompt names an unknown checker, or one whose library is not installed.
    """
    kind = check_choice("checker", prompt["checker"], CHECKERS)
    if kind == "":
        return Verdict(None, "", "")
    answer = final_answer(text)
    if not answer:
        return Verdict(False, "", "no answer")
    if kind in ("world", "exact"):
        return Verdict(_plain(answer) == _plain(prompt["answer"]), answer, "")
    if kind == "reasoning_gym":
        need_reasoning_gym()
        asked = json.loads(prompt["meta"])
    else:
        asked = {"gold": prompt["answer"]}
    correct, note = _worker.grade({**asked, "kind": kind, "answer": answer})
    return Verdict(correct, answer, note)


def _plain(text: str) -> str:
    """Case, spaces and a number's thousands separators and trailing zeros do not matter."""
    text = " ".join(text.lower().split()).rstrip(".")
    if re.fullmatch(r"-?\d[\d,]*\.?\d*", text):
        text = text.replace(",", "")
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text
