"""The synthetic world: problems, worked solutions (clean or careless) and prompt rows.

A solution reads

    Plan: do the operations one after the other.
    1. 14 + 5 = 19
    2. 19 * 2 = 38
    Answer: 38
"""

import dataclasses
import json
import random
from typing import Any

from deltapref_jax.config import ConfigError, check_choice
from deltapref_jax.records import Prompt, digest
from deltapref_jax.synthetic.families import DAYS, FAMILIES, MAX_STEPS, Step, evaluate

SLIPS = {"number": 0.6, "copy": 0.15, "skip": 0.1, "filler": 0.1, "plan": 0.05}
"""What a careless step is, and how often: a wrong value (it propagates), a miscopied given, a step left out, a line
that says nothing, another method's plan."""

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
    """One question of the world; `spec` holds its parameters and rebuilds it."""

    family: str
    spec: dict[str, Any]

    @property
    def question(self) -> str:
        """The question as the user asks it."""
        return FAMILIES[self.family].ask(self.spec)

    @property
    def answer(self) -> str:
        """The right answer."""
        return solve(self)[2]


def problem(family: str, difficulty: int, seed: int, index: int) -> Problem:
    """Question `index` of a family: a pure function of its arguments.

    Raises:
      ConfigError: unknown family; the sentence lists the known ones.
    """
    check_choice("synthetic task", family, FAMILIES)
    rng = random.Random(
        f"{family}|{difficulty}|{seed}|{index}"
    )  # a string seeds by its SHA-512 on every platform
    return Problem(family, FAMILIES[family].draw(rng, difficulty) | {"style": rng.randrange(4)})


def slip(value: str, rng: random.Random) -> str:
    """A wrong value that looks like `value`: a number near it, another day, a flipped bit."""
    if value in DAYS:
        return DAYS[(DAYS.index(value) + rng.randint(1, 6)) % 7]
    if " r " in value:
        quotient, rest = value.split(" r ")
        return (
            f"{slip(quotient, rng)} r {rest}"
            if rng.random() < 0.5
            else f"{quotient} r {slip(rest, rng)}"
        )
    if len(value) == 4 and not set(value) - {"0", "1"}:
        bit = rng.randrange(4)
        return value[:bit] + "10"[int(value[bit])] + value[bit + 1 :]
    number = int(value)
    near = [number + offset for offset in (-10, -2, -1, 1, 2, 10)]
    return str(rng.choice([n for n in near if n >= 0 or number < 0]))


def miscopy(step: Step, rng: random.Random) -> Step:
    """`step` with one of its given operands misread; unchanged if it has none."""
    places = [i for i, given in enumerate(step.given) if given]
    if not places:
        return step
    place = rng.choice(places)
    operands = list(step.operands)
    operands[place] = slip(operands[place], rng)
    return dataclasses.replace(step, operands=tuple(operands))


def solve(
    problem: Problem, wrong: dict[int, str] | None = None, rng: random.Random | None = None
) -> tuple[list[Step], list[str], str]:
    """Steps as written, their values, and the answer.

    Args:
      problem: to solve.
      wrong: step index to "number" (a wrong value), "copy" (a misread given) or "op" (another operation).
      rng: draws the mistakes.
    """
    method = FAMILIES[problem.family].method(problem.spec)
    steps: list[Step] = []
    values: list[str] = []
    step = next(method)
    while True:
        kind = (wrong or {}).get(len(steps), "")
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
        value = evaluate(step.op, step.operands)
        if (
            value is None
        ):  # a wrong value led to an impossible step: write what a careless solver would
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
    """The text of a solution from its plan, its lines (numbered where they are) and its answer."""
    return "\n".join([f"Plan: {plan}", *lines, f"Answer: {answer}"])


def solution(problem: Problem, rng: random.Random | None = None, error_rate: float = 0.0) -> str:
    """A worked solution; every step is careless with probability `error_rate` (kinds and weights: `SLIPS`)."""
    rng = rng or random.Random(0)
    clean = solve(problem)[0]
    slips = {
        i: rng.choices(tuple(SLIPS), tuple(SLIPS.values()))[0]
        for i in range(len(clean))
        if rng.random() < error_rate
    }
    steps, values, answer = solve(problem, slips, rng)
    family = problem.family
    if "plan" in slips.values():
        family = rng.choice([name for name in FAMILIES if name != family])
    lines: list[str] = []
    number = 1
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        if slips.get(i) == "skip":
            continue
        if slips.get(i) == "filler":
            lines.append(rng.choice(FILLERS))
        lines.append(f"{number}. {step.text(value)}")
        number += 1
    return write(FAMILIES[family].plan, lines, answer)


def meta(problem: Problem) -> str:
    """JSON from which `from_meta` rebuilds the problem."""
    return json.dumps(dataclasses.asdict(problem), sort_keys=True)


def from_meta(text: str) -> Problem:
    """The problem that `meta` wrote."""
    return Problem(**json.loads(text))


def prompts(tasks: tuple[str, ...], count: int, difficulty: int, seed: int) -> list[Prompt]:
    """`count` distinct questions, from the families in turn.

    Raises:
      ConfigError: a family is unknown, or has too few distinct questions at this difficulty.
    """
    rows: list[Prompt] = []
    seen: set[str] = set()
    position = dict.fromkeys(tasks, 0)
    while len(rows) < count:
        task = tasks[len(rows) % len(tasks)]
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
