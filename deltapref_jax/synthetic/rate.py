"""Exact ratings of a trace on five dimensions, by following it step by step on its own values.

The family's method runs on the values that the trace wrote, so an error is charged where it was
made and not again where it propagates. Each rating is 1 + 4 * share in [1, 5], where the share is
that of the checks which the trace passes; a trace without steps rates 1 except for its plan.
"""

import dataclasses
import re
from typing import Any

from deltapref_jax.config import DIMENSIONS
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.steps import MAX_STEPS, Step, evaluate
from deltapref_jax.synthetic.world import Problem

_LINE = re.compile(r"^\s*(?:(\d+)\.)?\s*(.+?)\s*=\s*(.+?)\s*$")
_ANSWER = re.compile(r"^\s*answer:\s*(.*?)\s*\.?\s*$", re.IGNORECASE)
_PLAN = re.compile(r"^\s*plan:\s*(.*?)\s*$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Equation:
    """A parsed line `3. a op b = c`; `number` is 0 if the line has none."""

    number: int
    op: str
    operands: tuple[str, ...]
    value: str

    @property
    def correct(self) -> bool:
        """Whether the value is that of the operation on the operands as written."""
        return evaluate(self.op, self.operands) == self.value


def parse(text: str) -> tuple[str, list[Equation], str, int, int]:
    """Parses a trace; any text can be parsed.

    Returns:
      plan: "" if there is none.
      equations: in the order of the trace.
      answer: "" if there is none.
      useful: number of lines that are a plan, an equation or an answer; a second plan or answer
        does not count.
      lines: number of all lines that are not blank.
    """
    plan, answer, equations, useful, lines = "", "", [], 0, 0
    for line in text.splitlines():
        if not line.strip():
            continue
        lines += 1
        if match := _PLAN.match(line):
            useful += not plan
            plan = plan or match[1]
        elif match := _ANSWER.match(line):
            useful += not answer
            answer = answer or match[1]
        elif (match := _LINE.match(line)) and (equation := _equation(match)):
            useful += 1
            equations.append(equation)
    return plan, equations, answer, useful, lines


def _equation(match: re.Match[str]) -> Equation | None:
    words = match[2].split()
    number = int(match[1] or 0)
    if words[:1] == ["min"] and len(words) > 1:
        return Equation(number, "min", tuple(words[1:]), match[3])
    if len(words) == 3:
        return Equation(number, words[1], (words[0], words[2]), match[3])
    return None


def expected(problem: Problem, values: list[str]) -> Step | str:
    """Returns the method's next step after `values`, or its answer (text) if there is none."""
    method = FAMILIES[problem.family].method(problem.spec)
    try:
        step = next(method)
        for value in values:
            step = method.send(value)
    except StopIteration as end:
        return end.value
    return step


@dataclasses.dataclass
class _Tally:
    """Counts of the checks of one dimension."""

    passed: float = 0.0
    total: float = 0.0

    def add(self, passed: bool) -> None:
        self.passed += passed
        self.total += 1

    def rating(self) -> float:
        return 1 + 4 * (self.passed / self.total if self.total else 0.0)


def rate(problem: Problem, text: str) -> dict[str, float]:
    """Rates a trace on every dimension of `config.DIMENSIONS`, each in [1, 5].

    factuality: given numbers and words are copied as the question has them.
    strategy_coherence: the plan and the operations are those of the family.
    step_coherence: steps are numbered in order, use the values of earlier steps, none is missing,
      and the answer follows from them.
    numerical_precision: values are those of their operations.
    signal_to_noise: lines are needed.

    Args:
      problem: the problem that the trace answers.
      text: the trace; any text has ratings.
    """
    plan, equations, answer, useful, lines = parse(text)
    tally = {dimension: _Tally() for dimension in DIMENSIONS}
    facts, strategy, steps, numbers, signal = tally.values()
    # The plan weighs as much as two operations.
    strategy.add(plan == FAMILIES[problem.family].plan)
    strategy.add(plan == FAMILIES[problem.family].plan)
    signal.passed, signal.total = useful, max(lines, 1)
    values: list[str] = []
    known = set(re.findall(r"\w+", problem.question))
    seen: set[tuple[Any, ...]] = set()
    for i, line in enumerate(equations):
        numbers.add(line.correct)
        steps.add(line.number == i + 1)
        content = (line.op, line.operands, line.value)
        step = expected(problem, values)
        if (
            isinstance(step, str)
            or len(values) > MAX_STEPS
            or (content in seen and (line.op, line.operands) != (step.op, step.operands))
        ):
            # The line is not needed: it comes after the last step, or it is a repetition.
            steps.add(False)
            signal.passed -= 1
            continue
        seen.add(content)
        # A step left out is charged once, and the line is compared with the step that it is.
        if not _matches(line, step) and (skipped := _skip_step(problem, values, line)):
            values, step = skipped
            steps.add(False)
        strategy.add(line.op == step.op)
        if _matches(line, step):
            for operand, right, given in zip(line.operands, step.operands, step.given, strict=True):
                (facts if given else steps).add(operand == right)
        else:
            # Another operation than the method's: its operands must still come from somewhere.
            for operand in line.operands:
                in_question = operand in known
                (facts if in_question else steps).add(in_question or operand in values)
        # The trace's own value, so that an error is not charged where it propagates.
        values.append(line.value)
    # Steps that are missing at the end are done here, so that the answer can be compared.
    while not isinstance(step := expected(problem, values), str) and len(values) <= MAX_STEPS:
        steps.add(False)
        values.append(evaluate(step.op, step.operands) or step.operands[0])
    steps.add(bool(equations) and answer == step)
    return {dimension: t.rating() for dimension, t in tally.items()}


def _matches(line: Equation, step: Step) -> bool:
    """Returns whether `line` is `step`, with at most half of the operands miscopied."""
    if line.op != step.op or len(line.operands) != len(step.operands):
        return False
    miscopied = sum(a != b for a, b in zip(line.operands, step.operands, strict=True))
    return miscopied <= len(step.operands) // 2


def _skip_step(
    problem: Problem, values: list[str], line: Equation
) -> tuple[list[str], Step] | None:
    """Handles a trace that left out one step.

    If `line` is exactly the step after the next one, returns the values with that of the next step
    and the step that `line` is; otherwise None.
    """
    step = expected(problem, values)
    if isinstance(step, str):
        return None
    values_after = [*values, evaluate(step.op, step.operands) or step.operands[0]]
    following = expected(problem, values_after)
    if isinstance(following, str) or (line.op, line.operands) != (following.op, following.operands):
        return None
    return values_after, following
