"""The synthetic world: problems, worked solutions (correct or with errors) and prompts.

A solution reads

    Plan: do the operations one after the other.
    1. 14 + 5 = 19
    2. 19 * 2 = 38
    Answer: 38
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any

from deltapref_jax.config import ConfigError, check_choice
from deltapref_jax.records import Prompt, digest
from deltapref_jax.synthetic.beliefs import applies, believed_method, believed_value
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.steps import DAYS, MAX_STEPS, Step, evaluate

SLIPS = {"number": 0.6, "copy": 0.15, "skip": 0.1, "filler": 0.1, "plan": 0.05}
"""Kinds of errors of a careless step, with their probabilities.

"number" is a wrong value, which propagates; "copy" a miscopied given; "skip" a step left out;
"filler" a line without content; "plan" another method's plan.
"""

FILLERS = (
    "Let me think about this for a moment.",
    "This is an interesting question.",
    "I like numbers a lot.",
    "We should be careful here.",
    "It is good to take it slowly.",
    "So far so good.",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem; `spec` holds the parameters that `Family.draw` drew."""

    family: str
    spec: dict[str, Any]

    @property
    def question(self) -> str:
        """The text of the question."""
        return FAMILIES[self.family].ask(self.spec)

    @property
    def answer(self) -> str:
        """The correct answer."""
        return solve(self)[2]


def problem(family: str, difficulty: int, seed: int, index: int) -> Problem:
    """Returns problem `index` of a family, which is a pure function of the arguments.

    Raises:
      ConfigError: the family is unknown.
    """
    check_choice("synthetic task", family, FAMILIES)
    # A string seeds by its SHA-512, which is the same on every platform.
    rng = random.Random(f"{family}|{difficulty}|{seed}|{index}")
    return Problem(family, FAMILIES[family].draw(rng, difficulty) | {"style": rng.randrange(4)})


def slip(value: str, rng: random.Random) -> str:
    """Returns a wrong value of the same kind: a number near it, another day, a flipped bit."""
    if value in DAYS:
        return DAYS[(DAYS.index(value) + rng.randint(1, 6)) % 7]
    if " r " in value:
        quotient, rest = value.split(" r ")
        if rng.random() < 0.5:
            return f"{slip(quotient, rng)} r {rest}"
        return f"{quotient} r {slip(rest, rng)}"
    if len(value) == 4 and not set(value) - {"0", "1"}:
        bit = rng.randrange(4)
        return value[:bit] + "10"[int(value[bit])] + value[bit + 1 :]
    number = int(value)
    near = [number + offset for offset in (-10, -2, -1, 1, 2, 10)]
    return str(rng.choice([n for n in near if n >= 0 or number < 0]))


def miscopy(step: Step, rng: random.Random) -> Step:
    """Returns the step with one of its given operands misread, or as it is if it has none."""
    given_operands = [i for i, given in enumerate(step.given) if given]
    if not given_operands:
        return step
    i = rng.choice(given_operands)
    operands = list(step.operands)
    operands[i] = slip(operands[i], rng)
    return dataclasses.replace(step, operands=tuple(operands))


def solve(
    problem: Problem,
    errors: dict[int, str] | None = None,
    rng: random.Random | None = None,
    beliefs: Sequence[str] = (),
) -> tuple[list[Step], list[str], str]:
    """Solves a problem; returns the steps as written, their values, and the answer.

    Args:
      problem: the problem.
      errors: step index to "number" (a wrong value), "copy" (a misread given) or "op" (another
        operation); other kinds are ignored.
      rng: draws the errors; without it there are none.
      beliefs: names of `beliefs.BELIEFS`, applied wherever their conditions hold; of two that hold
        at once the first.
    """
    _, method = believed_method(problem.family, problem.spec, beliefs)
    steps: list[Step] = []
    values: list[str] = []
    step = next(method)
    while True:
        kind = (errors or {}).get(len(steps), "")
        if kind and rng:
            if kind == "copy":
                step = miscopy(step, rng)
            elif kind == "op":
                others = [
                    op
                    for op in ("+", "-", "*", "xor", "and", "or")
                    if op != step.op and evaluate(op, step.operands) is not None
                ]
                step = dataclasses.replace(step, op=rng.choice(others)) if others else step
        value = believed_value(step, beliefs)
        # An error can lead to an operation without a value: the solution repeats the operand.
        if value is None:
            value = step.operands[0]
        if kind == "number" and rng:
            value = slip(value, rng)
        steps.append(step)
        values.append(value)
        try:
            step = method.send(value)
        except StopIteration as end:
            return steps, values, end.value
        if len(steps) >= MAX_STEPS:
            return steps, values, value


def write(plan: str, lines: list[str], answer: str) -> str:
    """Returns the text of a solution."""
    return "\n".join([f"Plan: {plan}", *lines, f"Answer: {answer}"])


def solution(
    problem: Problem,
    rng: random.Random | None = None,
    error_rate: float = 0.0,
    beliefs: Sequence[str] = (),
) -> str:
    """Returns a worked solution.

    Args:
      problem: the problem.
      rng: draws the errors.
      error_rate: probability that a step is careless, which is one of `SLIPS`.
      beliefs: names of `beliefs.BELIEFS` that its author holds.
    """
    rng = rng or random.Random(0)
    planned_steps = solve(problem, beliefs=beliefs)[0]
    slips = {
        i: rng.choices(tuple(SLIPS), tuple(SLIPS.values()))[0]
        for i in range(len(planned_steps))
        if rng.random() < error_rate
    }
    steps, values, answer = solve(problem, slips, rng, beliefs)
    # Errors of these kinds change the text of the solution and not its values.
    plan, _ = believed_method(problem.family, problem.spec, beliefs)
    if "plan" in slips.values():
        plan = FAMILIES[rng.choice([name for name in FAMILIES if name != problem.family])].plan
    lines: list[str] = []
    number = 1
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        if slips.get(i) == "skip":
            continue
        if slips.get(i) == "filler":
            lines.append(rng.choice(FILLERS))
        lines.append(f"{number}. {step.text(value)}")
        number += 1
    return write(plan, lines, answer)


def is_lesson(problem: Problem) -> bool:
    """Returns whether models may learn from a problem.

    Lessons of a family outside of the domain show its form, and never a step at which any belief
    about a skill that it shares with the domain could apply (a subtraction that borrows, a sum that
    carries). So a model can only do those steps by what it learnt in the domain.
    """
    shares = FAMILIES[problem.family].shares
    return not any(applies(step, shares) for step in solve(problem)[0])


def meta(problem: Problem) -> str:
    """Returns the JSON from which `from_meta` restores the problem."""
    return json.dumps(dataclasses.asdict(problem), sort_keys=True)


def from_meta(text: str) -> Problem:
    """Returns the problem of a `meta`."""
    return Problem(**json.loads(text))


def prompts(tasks: tuple[str, ...], count: int, difficulty: int, seed: int) -> list[Prompt]:
    """Returns `count` distinct questions, from the families in turn.

    Raises:
      ConfigError: a family is unknown, or has too few distinct questions at this difficulty.
    """
    rows: list[Prompt] = []
    seen: set[str] = set()
    position = dict.fromkeys(tasks, 0)
    while len(rows) < count:
        task = tasks[len(rows) % len(tasks)]
        # The next index whose question is new; a family without one has run out of questions.
        for _ in range(1000):
            p = problem(task, difficulty, seed, position[task])
            position[task] += 1
            if p.question not in seen:
                break
        else:
            raise ConfigError(
                f"Family {task!r} ran out of distinct questions at difficulty {difficulty}, after "
                f"{len(rows)}; lower the count or raise the difficulty."
            )
        seen.add(p.question)
        messages = json.dumps([{"role": "user", "content": p.question}])
        rows.append(Prompt(digest(task, messages), task, messages, p.answer, "world", meta(p)))
    return rows
