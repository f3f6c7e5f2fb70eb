"""Steps of solutions: operations on written values, and what they are worth.

A method is a generator function. It yields the next `Step`, receives the value that was written
for it (correct or not), and returns the answer. So one definition solves a problem, lets an error
propagate, and lets the exact judge follow a trace step by step on the trace's own values.
"""

import dataclasses
from collections.abc import Generator
from typing import Any

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
WORD_OPS = ("xor", "and", "or")
MAX_STEPS = 12
"""Methods end after this many steps, because wrong values can make Euclid's algorithm loop."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on values as they are written.

    `given[i]` says whether operand i comes from the question and not from an earlier step.
    """

    op: str
    operands: tuple[str, ...]
    given: tuple[bool, ...]

    def text(self, value: str) -> str:
        """Returns the step's line in a solution without its number, such as `12 + 7 = 19`."""
        if self.op == "min":
            return f"min {' '.join(self.operands)} = {value}"
        return f"{self.operands[0]} {self.op} {self.operands[1]} = {value}"


Method = Generator[Step, str, str]


def evaluate(op: str, operands: tuple[str, ...]) -> str | None:
    """Returns the correct value of an operation on written operands, or None if it has none.

    Operations are +, -, *, /, %, div (quotient and remainder), min, and, or, xor (on bits); + adds
    days to a weekday too. Operands are a trace's text: any string must give a value or None.
    """
    try:
        if op == "min":
            return min(operands, key=int)
        a, b = operands
        if op in WORD_OPS:
            if len(a) != len(b) or set(a + b) - {"0", "1"}:
                return None
            x, y = int(a, 2), int(b, 2)
            return format({"xor": x ^ y, "and": x & y, "or": x | y}[op], f"0{len(a)}b")
        if a in DAYS:
            return DAYS[(DAYS.index(a) + int(b)) % 7] if op == "+" else None
        x, y = int(a), int(b)
        if op == "div":
            return f"{x // y} r {x % y}"
        if op == "/":
            return str(x // y) if x % y == 0 else None
        if op == "%":
            return str(x % y)
        return str({"+": x + y, "-": x - y, "*": x * y}[op])
    except (ValueError, ZeroDivisionError, KeyError, TypeError):
        return None


def make_step(op: str, *operands: tuple[Any, bool]) -> Step:
    """Returns the step of operands that are given as (value, whether the question gives it)."""
    return Step(
        op, tuple(str(value) for value, _ in operands), tuple(given for _, given in operands)
    )
