"""The exact judge's measurement: five shares of a trace, by following it step by step on its own values.

The family's method is run on the values that the trace wrote, so a slip is charged where it was made and not again
where it propagates. Each rating is 1 + 4 · share, in [1, 5]; a trace without any step rates 1 except for its plan.
"""

import dataclasses
import re
from typing import Any

from deltapref_jax.config import DIMENSIONS
from deltapref_jax.synthetic.families import FAMILIES, MAX_STEPS, Step, evaluate
from deltapref_jax.synthetic.world import Problem

_LINE = re.compile(r"^\s*(?:(\d+)\.)?\s*(.+?)\s*=\s*(.+?)\s*$")
_ANSWER = re.compile(r"^\s*answer:\s*(.*?)\s*\.?\s*$", re.IGNORECASE)
_PLAN = re.compile(r"^\s*plan:\s*(.*?)\s*$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Equation:
    """A parsed line `3. a op b = c`; `number` is 0 where the line has none."""

    number: int
    op: str
    operands: tuple[str, ...]
    value: str

    @property
    def right(self) -> bool:
        """Whether the value follows from the operands as written."""
        return evaluate(self.op, self.operands) == self.value


def parse(text: str) -> tuple[str, list[Equation], str, int, int]:
    """Plan, equations, answer, and the numbers of lines that say something and of lines in all; never raises."""
    plan, answer, equations, useful, lines = "", "", [], 0, 0
    for line in text.splitlines():
        if not line.strip():
            continue
        lines += 1
        if found := _PLAN.match(line):
            useful += not plan
            plan = plan or found[1]
        elif found := _ANSWER.match(line):
            useful += not answer
            answer = answer or found[1]
        elif (found := _LINE.match(line)) and (equation := _equation(found)):
            useful += 1
            equations.append(equation)
    return plan, equations, answer, useful, lines


def _equation(found: re.Match[str]) -> Equation | None:
    words = found[2].split()
    number = int(found[1] or 0)
    if words[:1] == ["min"] and len(words) > 1:
        return Equation(number, "min", tuple(words[1:]), found[3])
    if len(words) == 3:
        return Equation(number, words[1], (words[0], words[2]), found[3])
    return None


def expected(problem: Problem, values: list[str]) -> Step | str:
    """What the method wants next after `values`; the answer (text) once it is done."""
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
    good: float = 0.0
    total: float = 0.0

    def add(self, good: bool) -> None:
        self.good += good
        self.total += 1

    def rating(self) -> float:
        return 1 + 4 * (self.good / self.total if self.total else 0.0)


def rate(problem: Problem, text: str) -> dict[str, float]:
    """Ratings in [1, 5] on every dimension of `config.DIMENSIONS`.

    factuality: given numbers and words copied as the question has them. strategy_coherence: the family's plan, and its
    operations. step_coherence: numbered in order, each step on what earlier ones produced, none missing, the answer
    drawn from them. numerical_precision: values that follow from their operands. signal_to_noise: lines that are
    needed.
    """
    plan, equations, answer, useful, lines = parse(text)
    tally = {dimension: _Tally() for dimension in DIMENSIONS}
    facts, strategy, steps, numbers, signal = tally.values()
    strategy.add(plan == FAMILIES[problem.family].plan)
    strategy.add(plan == FAMILIES[problem.family].plan)
    signal.good, signal.total = useful, max(lines, 1)
    values: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    for place, line in enumerate(equations):
        numbers.add(line.right)
        steps.add(line.number == place + 1)
        content = (line.op, line.operands, line.value)
        want = expected(problem, values)
        if (
            isinstance(want, str)
            or len(values) > MAX_STEPS
            or (content in seen and (line.op, line.operands) != (want.op, want.operands))
        ):
            steps.add(False)  # beyond the end, or a repetition: not needed
            signal.good -= 1
            continue
        seen.add(content)
        if not _fits(line, want) and (skipped := _skip(problem, values, line)):
            values, want = skipped
            steps.add(False)
        strategy.add(line.op == want.op)
        if len(line.operands) == len(want.operands):
            for have, need, given in zip(line.operands, want.operands, want.given, strict=True):
                (facts if given else steps).add(have == need)
        else:
            steps.add(False)
        values.append(line.value)
    while not isinstance(want := expected(problem, values), str) and len(values) <= MAX_STEPS:
        steps.add(False)  # missing at the end
        values.append(evaluate(want.op, want.operands) or want.operands[0])
    steps.add(bool(equations) and answer == want)
    return {dimension: t.rating() for dimension, t in tally.items()}


def _fits(line: Equation, want: Step) -> bool:
    """Whether `line` does `want`, up to one miscopied operand."""
    if line.op != want.op or len(line.operands) != len(want.operands):
        return False
    return (
        sum(a != b for a, b in zip(line.operands, want.operands, strict=True))
        <= len(want.operands) // 2
    )


def _skip(problem: Problem, values: list[str], line: Equation) -> tuple[list[str], Step] | None:
    """The values with one step done silently, and the step after it, if `line` is exactly that step."""
    want = expected(problem, values)
    if isinstance(want, str):
        return None
    ahead = [*values, evaluate(want.op, want.operands) or want.operands[0]]
    after = expected(problem, ahead)
    if isinstance(after, str) or (line.op, line.operands) != (after.op, after.operands):
        return None
    return ahead, after
