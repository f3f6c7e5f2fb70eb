"""Is the answer right? One function for every kind of question.

math-verify can hang on adversarial LaTeX and raises in threads, so it runs in a process of its own that is killed when
it takes too long; the process is kept for the next question.
"""

import json
import multiprocessing
import multiprocessing.connection
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from deltapref_jax.answers.extract import final_answer
from deltapref_jax.config import CHECKERS, check_choice

MATH_SECONDS = 5.0


class Verdict(NamedTuple):
    """Of one trace."""

    correct: bool | None  # None: the question has no checker
    answer: str  # what was taken for the trace's answer
    note: str  # "", "no answer", "timeout", or the checker's error


def check(prompt: Mapping[str, Any], text: str) -> Verdict:
    """Checks a trace against its prompt (a row of `records.PROMPT`); never raises for what the trace says.

    Raises:
      ConfigError: the prompt names an unknown checker.
    """
    kind = check_choice("checker", prompt["checker"], CHECKERS)
    if kind == "":
        return Verdict(None, "", "")
    answer = final_answer(text)
    if not answer:
        return Verdict(False, "", "no answer")
    if kind == "reasoning_gym":
        return _reasoning_gym(json.loads(prompt["meta"]), answer)
    if kind == "math":
        return _math(prompt["answer"], answer)
    return Verdict(_plain(answer) == _plain(prompt["answer"]), answer, "")


def _plain(text: str) -> str:
    """Case, spaces and a number's thousands separators and trailing zeros do not matter."""
    text = " ".join(text.lower().split()).rstrip(".")
    if re.fullmatch(r"-?\d[\d,]*\.?\d*", text):
        text = text.replace(",", "")
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text


def _reasoning_gym(meta: Mapping[str, Any], answer: str) -> Verdict:
    import reasoning_gym

    try:
        score = reasoning_gym.get_score_answer_fn(meta["task"])(answer=answer, entry=meta["entry"])
        return Verdict(bool(score >= 1.0), answer, "")
    except Exception as e:  # a task's scorer may trip over anything a model writes
        return Verdict(False, answer, f"{type(e).__name__}: {e}")


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # it warns of the timeouts that this process does without

    while True:
        gold, answer = pipe.recv()
        try:
            pipe.send(
                bool(
                    verify(
                        parse(f"${gold}$", parsing_timeout=None),
                        parse(f"${answer}$", parsing_timeout=None),
                        timeout_seconds=None,
                    )
                )
            )
        except Exception as e:  # math-verify's parsers raise many kinds
            pipe.send(f"{type(e).__name__}: {e}")


_worker: tuple[Any, multiprocessing.connection.Connection] | None = None


def _start() -> tuple[Any, multiprocessing.connection.Connection]:
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would copy the threads of JAX's runtime half-way
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ours.send(("1", "1"))  # the first answer takes the import's time with it
    ours.recv()
    return process, ours


def _math(gold: str, answer: str, seconds: float = MATH_SECONDS) -> Verdict:
    global _worker
    if _worker is None or not _worker[0].is_alive():
        _worker = _start()
    process, pipe = _worker
    try:
        pipe.send((gold, answer))
        got = pipe.recv() if pipe.poll(seconds) else "timeout"
    except (
        EOFError,
        OSError,
    ):  # killed by the system, such as for the memory that an answer made it take
        got = "the checker died"
    if got in ("timeout", "the checker died"):
        process.kill()
        process.join()
        pipe.close()
        _worker = None
    return Verdict(got, answer, "") if isinstance(got, bool) else Verdict(False, answer, got)
