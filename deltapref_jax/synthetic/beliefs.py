"""Beliefs: systematic misconceptions, by which models differ in what they know.

A belief is a wrong rule for an operation, or a wrong method for a family. It is applied wherever
its condition holds, and nowhere else, so a solution is a deterministic function of its problem and
of the beliefs held: whoever learnt from such solutions is wrong at every temperature, greedy
decoding included. (Careless steps, `world.SLIPS`, are coin tosses, which greedy decoding removes.)
The rules are of the kind that is known of pupils ("buggy" procedures: Brown & Burton 1978,
"Diagnostic models for procedural bugs in basic mathematical skills", Cognitive Science 2).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from deltapref_jax.synthetic.families import FAMILIES, formula, shop
from deltapref_jax.synthetic.steps import DAYS, Method, Step, evaluate


@dataclasses.dataclass(frozen=True)
class Belief:
    """One misconception.

    Attributes:
      name: what configs call it.
      skill: the operation or method that it is about; `Family.shares` names skills.
      about: the rule in words.
      wrong: of a step's operation and operands, the value that the belief gives; None where its
        condition does not hold. None for a belief about a method.
      family: whose method it replaces; "" for a belief about an operation.
      plan: that method in words.
      method: of a problem's parameters, the wrong method; None where the condition does not hold.
    """

    name: str
    skill: str
    about: str
    wrong: Callable[[str, tuple[str, ...]], str | None] | None = None
    family: str = ""
    plan: str = ""
    method: Callable[[dict[str, Any]], Method | None] | None = None


def _naturals(operands: tuple[str, ...]) -> tuple[int, int] | None:
    """Returns two operands as integers from 0 to 999, or None."""
    if len(operands) == 2 and all(o.isascii() and o.isdigit() and len(o) < 4 for o in operands):
        return int(operands[0]), int(operands[1])
    return None


def _no_borrow(op: str, operands: tuple[str, ...]) -> str | None:
    numbers = _naturals(operands)
    if op != "-" or not numbers:
        return None
    a, b = numbers
    if a < b or a % 10 >= b % 10:
        return None
    return str((a // 10 - b // 10) * 10 + b % 10 - a % 10)


def _no_carry(op: str, operands: tuple[str, ...]) -> str | None:
    numbers = _naturals(operands)
    if op != "+" or not numbers:
        return None
    a, b = numbers
    if max(a, b) < 10 or a % 10 + b % 10 < 10:
        return None
    return str(a + b - 10)


def _nine_is_ten(op: str, operands: tuple[str, ...]) -> str | None:
    numbers = _naturals(operands)
    if op != "*" or not numbers or 9 not in numbers or max(numbers) > 9:
        return None
    return str(10 * (sum(numbers) - 9))


def _xor_is_or(op: str, operands: tuple[str, ...]) -> str | None:
    either = evaluate("or", operands) if op == "xor" else None
    return None if either == evaluate(op, operands) else either


def _zero_is_nothing(op: str, operands: tuple[str, ...]) -> str | None:
    rest = tuple(o for o in operands if o != "0")
    return evaluate(op, rest) if op == "min" and "0" in operands and rest else None


def _week_starts_anew(op: str, operands: tuple[str, ...]) -> str | None:
    if op != "+" or len(operands) != 2 or operands[0] not in DAYS or not operands[1].isdigit():
        return None
    day = DAYS.index(operands[0]) + int(operands[1])
    return DAYS[(day + 1) % 7] if day >= 7 else None


def _left_to_right(spec: dict[str, Any]) -> Method | None:
    # The order does not matter where all products stand in front.
    products_first = "*" not in "".join(spec["ops"]).lstrip("*")
    return None if products_first else formula(spec, left_to_right=True)


def _sum_is_answer(spec: dict[str, Any]) -> Method | None:
    return None if spec["style"] % 2 else shop(spec, change=False)


BELIEFS = {
    belief.name: belief
    for belief in (
        Belief(
            "no_borrow",
            "subtraction",
            "the smaller digit is always taken from the larger one: 52 - 38 = 26",
            _no_borrow,
        ),
        Belief(
            "no_carry",
            "addition",
            "the carry of the units is forgotten: 27 + 15 = 32",
            _no_carry,
        ),
        Belief(
            "nine_is_ten",
            "multiplication",
            "a factor 9 is rounded up to 10, and nothing taken back: 9 * 4 = 40",
            _nine_is_ten,
        ),
        Belief(
            "left_to_right",
            "precedence",
            "operations are done as they are written: 2 + 3 * 4 = 20",
            family="formula",
            plan="do the operations from left to right.",
            method=_left_to_right,
        ),
        Belief(
            "sum_is_answer",
            "change",
            "what comes back is what was bought: the last step is missing",
            family="shop",
            plan="find each cost, add them.",
            method=_sum_is_answer,
        ),
        Belief("xor_is_or", "bits", "xor is read as or: 0110 xor 0011 = 0111", _xor_is_or),
        Belief(
            "zero_is_nothing",
            "order",
            "0 is no number and comes last: min 3 0 8 = 3",
            _zero_is_nothing,
        ),
        Belief(
            "week_starts_anew",
            "weekdays",
            "beyond Sunday the count starts after Monday: Sat + 2 = Tue",
            _week_starts_anew,
        ),
    )
}
"""Every belief by name."""


def believed_value(step: Step, beliefs: Sequence[str]) -> str | None:
    """Returns the value that a holder of `beliefs` writes for a step, or None if it has none."""
    for name in beliefs:
        wrong = BELIEFS[name].wrong
        value = wrong(step.op, step.operands) if wrong else None
        if value is not None:
            return value
    return evaluate(step.op, step.operands)


def believed_method(
    family: str, spec: dict[str, Any], beliefs: Sequence[str]
) -> tuple[str, Method]:
    """Returns plan and method by which a holder of `beliefs` solves a problem of a family."""
    for name in beliefs:
        belief = BELIEFS[name]
        method = belief.method(spec) if belief.method and belief.family == family else None
        if method is not None:
            return belief.plan, method
    return FAMILIES[family].plan, FAMILIES[family].method(spec)


def applies(step: Step, skills: Sequence[str]) -> bool:
    """Returns whether the condition of any belief about one of `skills` holds at a step."""
    return any(
        belief.wrong is not None and belief.wrong(step.op, step.operands) is not None
        for belief in BELIEFS.values()
        if belief.skill in skills
    )
