"""Families of synthetic problems: questions, and the method of each family as a program of steps.

A method is a generator function. It yields the next `Step`, receives the value that was written
for it (correct or not), and returns the answer. So one definition solves a problem, lets an error
propagate, and lets the exact judge follow a trace step by step on the trace's own values.

Numbers are small and every step is one operation, so that a decoder of half a million parameters
can learn them.
"""

import dataclasses
import random
from collections.abc import Callable, Generator
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


def _step(op: str, *operands: tuple[Any, bool]) -> Step:
    return Step(
        op, tuple(str(value) for value, _ in operands), tuple(given for _, given in operands)
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of problems that one method solves."""

    name: str
    domain: str  # "in" or "out" of the training domain
    plan: str  # the method in words, the first line of every solution
    draw: Callable[[random.Random, int], dict[str, Any]]  # draws parameters of a difficulty ≥ 1
    ask: Callable[[dict[str, Any]], str]  # maps parameters to the text of the question
    method: Callable[[dict[str, Any]], Method]


def _pick(templates: tuple[str, ...], spec: dict[str, Any]) -> str:
    """Chooses the wording of a question by the problem's style."""
    return templates[spec["style"] % len(templates)]


def _draw_chain(rng: random.Random, difficulty: int) -> dict[str, Any]:
    value = rng.randint(2, 20)
    spec: dict[str, Any] = {"start": value, "ops": []}
    while len(spec["ops"]) < difficulty + 2:
        op = rng.choice("+-+-*")
        n = rng.randint(2, 3) if op == "*" else rng.randint(2, 20)
        result = int(evaluate(op, (str(value), str(n))) or 0)
        if 1 <= result <= 99:  # other operations are drawn again
            spec["ops"].append([op, n])
            value = result
    return spec


def _ask_chain(spec: dict[str, Any]) -> str:
    words = {"+": "add {}", "-": "take away {}", "*": "multiply by {}"}
    ops = ", ".join(words[op].format(n) for op, n in spec["ops"])
    return _pick(
        ("Start with {}: {}. What is the result?", "I think of {}, then {}. What do I get?"), spec
    ).format(spec["start"], ops)


def _chain(spec: dict[str, Any]) -> Method:
    value: tuple[Any, bool] = (spec["start"], True)
    for op, n in spec["ops"]:
        value = ((yield _step(op, value, (n, True))), False)
    return value[0]


GOODS = ("pens", "cups", "caps", "nuts", "figs", "keys")
NAMES = ("Ann", "Bob", "Eva", "Sam")


def _draw_shop(rng: random.Random, difficulty: int) -> dict[str, Any]:
    kinds = min(difficulty, 4)
    goods = rng.sample(GOODS, kinds)
    while True:
        lines = [(rng.randint(2, 9), good, rng.randint(2, 9)) for good in goods]
        total = sum(n * price for n, _, price in lines)
        if total <= 95:
            break
    return {
        "name": rng.choice(NAMES),
        "lines": [list(line) for line in lines],
        "paid": rng.randint(total // 10 + 1, 10) * 10,
    }


def _ask_shop(spec: dict[str, Any]) -> str:
    lines = " and ".join(f"{n} {good} at {price}" for n, good, price in spec["lines"])
    return _pick(
        (
            "{0} buys {1} and pays {2}. How much comes back?",
            "{0} has {2} and buys {1}. How much is left?",
        ),
        spec,
    ).format(spec["name"], lines, spec["paid"])


def _shop(spec: dict[str, Any]) -> Method:
    costs = []
    for n, _, price in spec["lines"]:
        costs.append((yield _step("*", (n, True), (price, True))))
    total = costs[0]
    for cost in costs[1:]:
        total = yield _step("+", (total, False), (cost, False))
    return (yield _step("-", (spec["paid"], True), (total, False)))


def _draw_euclid(rng: random.Random, difficulty: int) -> dict[str, Any]:
    top = 60 + 120 * difficulty
    while True:
        factor = rng.randint(2, 12)
        a, b = sorted(
            (factor * rng.randint(2, top // factor), factor * rng.randint(2, top // factor)),
            reverse=True,
        )
        if a > b:
            return {"a": a, "b": b}


def _ask_euclid(spec: dict[str, Any]) -> str:
    return _pick(
        ("What is the greatest common divisor of {a} and {b}?", "Find the gcd of {a} and {b}."),
        spec,
    ).format(**spec)


def _euclid(spec: dict[str, Any]) -> Method:
    a: tuple[Any, bool] = (spec["a"], True)
    b: tuple[Any, bool] = (spec["b"], True)
    for _ in range(MAX_STEPS):
        rest = yield _step("%", a, b)
        if rest == "0":
            break
        a, b = b, (rest, False)
    return str(b[0])


def _draw_bases(rng: random.Random, difficulty: int) -> dict[str, Any]:
    return {"n": rng.randint(10, 100 + 400 * difficulty), "base": rng.randint(3, 9)}


def _ask_bases(spec: dict[str, Any]) -> str:
    return _pick(("Write {n} in base {base}.", "What is {n} in base {base}?"), spec).format(**spec)


def _bases(spec: dict[str, Any]) -> Method:
    quotient: tuple[Any, bool] = (spec["n"], True)
    digits = ""
    for _ in range(MAX_STEPS):
        first, _, rest = (yield _step("div", quotient, (spec["base"], True))).partition(" r ")
        digits = rest + digits
        if first == "0":
            break
        quotient = (first, False)
    return digits


def _draw_equation(rng: random.Random, difficulty: int) -> dict[str, Any]:
    x, right = rng.randint(2, 9 + 3 * difficulty), rng.randint(2, 5)
    gap = rng.randint(2, 6)
    return {
        "left": right + gap,
        "right": right,
        "low": (low := rng.randint(1, 30)),
        "high": low + gap * x,
    }


def _ask_equation(spec: dict[str, Any]) -> str:
    return _pick(
        (
            "Solve {left} x + {low} = {right} x + {high}.",
            "Find x with {left} x + {low} = {right} x + {high}.",
        ),
        spec,
    ).format(**spec)


def _equation(spec: dict[str, Any]) -> Method:
    gap = yield _step("-", (spec["left"], True), (spec["right"], True))
    rest = yield _step("-", (spec["high"], True), (spec["low"], True))
    return (yield _step("/", (rest, False), (gap, False)))


def _draw_sorting(rng: random.Random, difficulty: int) -> dict[str, Any]:
    return {"items": rng.sample(range(10), min(3 + difficulty, 8))}


def _ask_sorting(spec: dict[str, Any]) -> str:
    return _pick(("Sort {} from low to high.", "Put {} in order, lowest first."), spec).format(
        " ".join(map(str, spec["items"]))
    )


def _sorting(spec: dict[str, Any]) -> Method:
    rest = [str(i) for i in spec["items"]]
    done: list[str] = []
    while len(rest) > 1:
        low = yield _step("min", *((item, not done) for item in rest))
        done.append(low)
        # A wrong value that is no item removes the first one, so that the method ends.
        rest = [item for item in rest if item != low] if low in rest else rest[1:]
    return " ".join(done + rest)


def _draw_logic(rng: random.Random, difficulty: int) -> dict[str, Any]:
    def word() -> str:
        return format(rng.randrange(16), "04b")

    return {"start": word(), "ops": [[rng.choice(WORD_OPS), word()] for _ in range(difficulty + 1)]}


def _ask_logic(spec: dict[str, Any]) -> str:
    ops = ", then ".join(f"{op} {word}" for op, word in spec["ops"])
    return _pick(
        ("Take {}, {}. Which bits are left?", "Bits {}: {}. What are they now?"), spec
    ).format(spec["start"], ops)


def _draw_calendar(rng: random.Random, difficulty: int) -> dict[str, Any]:
    return {"day": rng.choice(DAYS), "spans": [rng.randint(5, 49) for _ in range(difficulty)]}


def _ask_calendar(spec: dict[str, Any]) -> str:
    spans = " and ".join(f"{n} days" for n in spec["spans"])
    return _pick(
        ("Today is {}. What day is it after {}?", "It is {}. Which day comes {} later?"), spec
    ).format(spec["day"], spans)


def _calendar(spec: dict[str, Any]) -> Method:
    total: tuple[Any, bool] = (spec["spans"][0], True)
    for span in spec["spans"][1:]:
        total = ((yield _step("+", total, (span, True))), False)
    rest = yield _step("%", total, ("7", True))
    return (yield _step("+", (spec["day"], True), (rest, False)))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "chain", "in", "do the operations one after the other.", _draw_chain, _ask_chain, _chain
        ),
        Family(
            "shop",
            "in",
            "find each cost, add them, take the sum from the money.",
            _draw_shop,
            _ask_shop,
            _shop,
        ),
        Family(
            "euclid",
            "out",
            "divide and keep the rest until it is 0.",
            _draw_euclid,
            _ask_euclid,
            _euclid,
        ),
        Family(
            "bases",
            "out",
            "divide by the base and read the rests backwards.",
            _draw_bases,
            _ask_bases,
            _bases,
        ),
        Family(
            "equation",
            "out",
            "bring x to one side, numbers to the other, divide.",
            _draw_equation,
            _ask_equation,
            _equation,
        ),
        Family(
            "sorting",
            "out",
            "take out the lowest number again and again.",
            _draw_sorting,
            _ask_sorting,
            _sorting,
        ),
        Family("logic", "out", "combine the words bit by bit.", _draw_logic, _ask_logic, _chain),
        Family(
            "calendar",
            "out",
            "count the days and drop whole weeks.",
            _draw_calendar,
            _ask_calendar,
            _calendar,
        ),
    )
}
