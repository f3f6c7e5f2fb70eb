"""Families of synthetic problems: questions, and the method of each family as a program of steps.

Numbers are small and every step is one operation, so that a decoder of half a million parameters
can learn them.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from deltapref_jax.synthetic.steps import DAYS, MAX_STEPS, WORD_OPS, Method, evaluate, make_step


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of problems that one method solves."""

    name: str
    domain: str  # "in" or "out" of the training domain
    plan: str  # the method in words, the first line of every solution
    draw: Callable[[random.Random, int], dict[str, Any]]  # draws parameters of a difficulty ≥ 1
    ask: Callable[[dict[str, Any]], str]  # maps parameters to the text of the question
    method: Callable[[dict[str, Any]], Method]
    # Skills of the domain that this family needs too: what a model learns about them inside of the
    # domain can be of use here. Lessons leave them out, see `world.is_lesson`.
    shares: tuple[str, ...] = ()


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
        value = ((yield make_step(op, value, (n, True))), False)
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
        "paid": rng.randint(total + 1, 99),
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


def shop(spec: dict[str, Any], change: bool = True) -> Method:
    """Costs, their sum and what is left of the money; without `change` the sum is the answer."""
    costs = []
    for n, _, price in spec["lines"]:
        costs.append((yield make_step("*", (n, True), (price, True))))
    total = costs[0]
    for cost in costs[1:]:
        total = yield make_step("+", (total, False), (cost, False))
    if not change:
        return total
    return (yield make_step("-", (spec["paid"], True), (total, False)))


def _draw_formula(rng: random.Random, difficulty: int) -> dict[str, Any]:
    while True:
        ops = [rng.choice("+-*") for _ in range(difficulty + 1)]
        if "*" not in ops or "**" in "".join(ops):
            continue
        around = [
            "*" in (before, after) for before, after in zip(["", *ops], [*ops, ""], strict=True)
        ]
        numbers = [rng.randint(2, 6) if factor else rng.randint(2, 30) for factor in around]
        spec = {"numbers": numbers, "ops": ops}
        values = [int(v) for v in (*run(formula(spec)), *run(formula(spec, left_to_right=True)))]
        if all(1 <= value <= 99 for value in values):
            return spec


def run(method: Method) -> list[str]:
    """Returns the correct values of a method's steps."""
    values: list[str] = []
    try:
        step = next(method)
        while True:
            values.append(evaluate(step.op, step.operands) or step.operands[0])
            step = method.send(values[-1])
    except StopIteration:
        return values


def _ask_formula(spec: dict[str, Any]) -> str:
    rest = " ".join(f"{op} {n}" for op, n in zip(spec["ops"], spec["numbers"][1:], strict=True))
    return _pick(("Work out {} {}.", "How much is {} {}?"), spec).format(spec["numbers"][0], rest)


def formula(spec: dict[str, Any], left_to_right: bool = False) -> Method:
    """Products come first, then sums and differences; `left_to_right`: as they are written."""
    terms: list[tuple[Any, bool]] = [(n, True) for n in spec["numbers"]]
    ops = list(spec["ops"])
    for kinds in ("+-*",) if left_to_right else ("*", "+-"):
        i = 0
        while i < len(ops):
            if ops[i] not in kinds:
                i += 1
                continue
            value = yield make_step(ops[i], terms[i], terms[i + 1])
            terms[i : i + 2] = [(value, False)]
            del ops[i]
    return str(terms[0][0])


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
        rest = yield make_step("%", a, b)
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
        first, _, rest = (yield make_step("div", quotient, (spec["base"], True))).partition(" r ")
        digits = rest + digits
        if first == "0":
            break
        quotient = (first, False)
    return digits


def _draw_equation(rng: random.Random, difficulty: int) -> dict[str, Any]:
    while True:
        x, right = rng.randint(2, 9 + 3 * difficulty), rng.randint(2, 5)
        gap, low = rng.randint(2, 6), rng.randint(1, 30)
        if low + gap * x <= 99:
            return {"left": right + gap, "right": right, "low": low, "high": low + gap * x}


def _ask_equation(spec: dict[str, Any]) -> str:
    return _pick(
        (
            "Solve {left} x + {low} = {right} x + {high}.",
            "Find x with {left} x + {low} = {right} x + {high}.",
        ),
        spec,
    ).format(**spec)


def _equation(spec: dict[str, Any]) -> Method:
    gap = yield make_step("-", (spec["left"], True), (spec["right"], True))
    rest = yield make_step("-", (spec["high"], True), (spec["low"], True))
    return (yield make_step("/", (rest, False), (gap, False)))


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
        low = yield make_step("min", *((item, not done) for item in rest))
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
    return {"day": rng.choice(DAYS), "spans": [rng.randint(3, 20) for _ in range(difficulty)]}


def _ask_calendar(spec: dict[str, Any]) -> str:
    spans = " and ".join(f"{n} days" for n in spec["spans"])
    return _pick(
        ("Today is {}. What day is it after {}?", "It is {}. Which day comes {} later?"), spec
    ).format(spec["day"], spans)


def _calendar(spec: dict[str, Any]) -> Method:
    total: tuple[Any, bool] = (spec["spans"][0], True)
    for span in spec["spans"][1:]:
        total = ((yield make_step("+", total, (span, True))), False)
    rest = yield make_step("%", total, ("7", True))
    return (yield make_step("+", (spec["day"], True), (rest, False)))


def _draw_ages(rng: random.Random, difficulty: int) -> dict[str, Any]:
    names = rng.sample(NAMES, min(difficulty, len(NAMES) - 1) + 1)
    while True:
        gaps = [rng.choice((rng.randint(2, 29), rng.randint(2, 29), 10)) for _ in names[1:]]
        if sum(gaps) <= 90:
            return {"names": names, "age": rng.randint(sum(gaps) + 1, 99), "gaps": gaps}


def _ask_ages(spec: dict[str, Any]) -> str:
    names = spec["names"]
    rest = " ".join(
        f"{name} is {gap} years younger than {older}."
        for older, name, gap in zip(names[:-1], names[1:], spec["gaps"], strict=True)
    )
    return _pick(
        ("{} is {} years old. {} How old is {}?", "{} is {}. {} What age is {}?"), spec
    ).format(names[0], spec["age"], rest, names[-1])


def _ages(spec: dict[str, Any]) -> Method:
    age: tuple[Any, bool] = (spec["age"], True)
    for gap in spec["gaps"]:
        age = ((yield make_step("-", age, (gap, True))), False)
    return str(age[0])


def _draw_trip(rng: random.Random, difficulty: int) -> dict[str, Any]:
    while True:
        ways = [
            rng.choice((rng.randint(2, 29), rng.randint(2, 29), 10))
            for _ in range(min(difficulty, 4) + 1)
        ]
        if sum(ways) <= 90:
            return {"ways": ways}


def _ask_trip(spec: dict[str, Any]) -> str:
    ways = " km, then ".join(map(str, spec["ways"]))
    return _pick(
        ("A bus goes {} km. How far is that?", "We walk {} km. How long is the whole way?"), spec
    ).format(ways)


def _trip(spec: dict[str, Any]) -> Method:
    total: tuple[Any, bool] = (spec["ways"][0], True)
    for way in spec["ways"][1:]:
        total = ((yield make_step("+", total, (way, True))), False)
    return str(total[0])


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
            shop,
        ),
        Family(
            "formula",
            "in",
            "first the products, then the rest.",
            _draw_formula,
            _ask_formula,
            formula,
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
            shares=("subtraction",),
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
            shares=("addition",),
        ),
        Family(
            "ages",
            "out",
            "go from the oldest to the youngest.",
            _draw_ages,
            _ask_ages,
            _ages,
            shares=("subtraction",),
        ),
        Family(
            "trip",
            "out",
            "join the parts of the way.",
            _draw_trip,
            _ask_trip,
            _trip,
            shares=("addition",),
        ),
    )
}
