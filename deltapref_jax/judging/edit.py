"""Edits of any trace that make it worse in one dimension, to a known degree.

They need no knowledge of the problem but its text, so that traces of free-form questions can be
edited too. A changed number is carried on: equations of a op b = c behind it, if they were right,
are calculated again, and later mentions of the changed value follow. What an edit does to one
dimension then does little to the others.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, localcontext

from deltapref_jax.config import DIMENSIONS, check_choice

FILLERS = (
    "Now I will go on with the next part.",
    "There are many ways to look at a task like this one.",
    "The words above have been read with attention.",
    "This kind of exercise comes up again and again.",
    "With that in mind, let us continue.",
    "It is nice to see how everything comes together.",
)
"""Lines without content; none of them is in `world.FILLERS`, which shipped judges learnt from."""

_NUMBER = r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d|,\d{3})"
_NUMBERS = re.compile(_NUMBER)
_EQUATION = re.compile(
    rf"({_NUMBER})(\s*)([-+*/×÷−])(\s*\$?)({_NUMBER})(\s*=\s*\$?)({_NUMBER})"  # noqa: RUF001
)
# "3. ", "3) ", "Step 3: ", with the space behind it.
_NUMBERED = re.compile(r"^(\s*(?:[Ss]tep )?)(\d{1,9})([.):]\s+)")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")  # capitalised, and not at the start of a sentence
_OPERATIONS: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_SAME = {"×": "*", "÷": "/", "−": "-"}  # noqa: RUF001
_CHARACTERS = 12
"""Of a number that is calculated with: products of longer ones would be rounded by `decimal`."""


def edit(
    question: str,
    text: str,
    dimension: str,
    degree: int,
    others: Sequence[str],
    rng: random.Random,
) -> str | None:
    """Returns the trace with `degree` errors in one dimension, or fewer if it has fewer places.

    factuality: a number or a name of the question is misread, and calculated with consistently.
    strategy_coherence: the opening of another problem's trace, then other operations.
    step_coherence: neighbouring steps are swapped, or a step is left out or repeated; steps that
      have numbers are numbered in order again.
    numerical_precision: results of equations that were right are wrong, which propagates; in a
      trace without equations, numbers that the question does not have.
    signal_to_noise: lines without content.

    Args:
      question: what the trace answers.
      text: the trace.
      dimension: one of `config.DIMENSIONS`.
      degree: 1 upward.
      others: traces of other problems, whose openings may be taken.
      rng: draws the errors.

    Returns:
      None where the trace has no place for such an error.

    Raises:
      ConfigError: the dimension is unknown.
    """
    check_choice("dimension", dimension, DIMENSIONS)
    units, gap = _units(text)
    made = {
        "factuality": lambda: _misread(question, units, degree, rng),
        "strategy_coherence": lambda: _mislead(units, degree, others, rng),
        "step_coherence": lambda: _disorder(units, degree, rng),
        "numerical_precision": lambda: _miscalculate(question, units, degree, rng),
        "signal_to_noise": lambda: _pad(units, degree, rng),
    }[dimension]
    # Of its own, because the thread's is changed by libraries, such as by tasks of reasoning-gym.
    with localcontext(Context(prec=28)):
        edited = made()
    return None if edited is None or edited == units else gap.join(edited)


def _units(text: str) -> tuple[list[str], str]:
    """Lines that are not blank, or the sentences of a text of fewer than three; what joins them."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) >= 3:
        return lines, "\n"
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s], " "


def _misread(question: str, units: list[str], degree: int, rng: random.Random) -> list[str] | None:
    """Facts of the question, changed wherever the trace uses them."""
    body = "\n".join(map(_body, units))
    results = {_plain(m[7]) for m in _EQUATION.finditer(body)}
    used = _numbers(body)
    # A number that the trace also arrives at can't be told from its result.
    numbers = [n for n in _numbers(question) if n in used and n not in results]
    names = list(dict.fromkeys(_NAME.findall(question)))
    mentioned = [n for n in names if re.search(rf"\b{n}\b", body)] if len(names) > 1 else []
    facts = rng.sample(numbers, min(degree, len(numbers)))
    facts += rng.sample(mentioned, min(degree - len(facts), len(mentioned)))
    if not facts:
        return None
    given = {*numbers, *results}
    changes = {
        fact: _slip(fact, rng, given)
        if fact in numbers
        else rng.choice([n for n in names if n != fact])
        for fact in facts
    }
    return _rewritten(units, changes, rng)


def _miscalculate(
    question: str, units: list[str], degree: int, rng: random.Random
) -> list[str] | None:
    """Wrong results of equations, or without equations wrong numbers."""
    right = [
        _value(match[1], match[3], match[5]) == _decimal(match[7])
        for unit in units
        for match in _EQUATION.finditer(_body(unit))
    ]
    if right:
        places = [i for i, is_right in enumerate(right) if is_right]
        return _rewritten(units, {}, rng, wrong=rng.sample(places, min(degree, len(places))))
    said = _numbers("\n".join(map(_body, units)))
    given = _numbers(question)
    own = [number for number in said if number not in given]
    if not own:
        return None
    chosen = rng.sample(own, min(degree, len(own)))
    return _rewritten(units, {number: _slip(number, rng, {*said}) for number in chosen}, rng)


def _mislead(
    units: list[str], degree: int, others: Sequence[str], rng: random.Random
) -> list[str] | None:
    """Another problem's opening, then other operations; operations alone without an opening."""
    openings = [_units(other)[0][:1] for other in rng.sample(others, len(others))]
    opening = next((o for o in openings if o and o != units[:1]), None) if len(units) > 1 else None
    equations = [match for unit in units for match in _EQUATION.finditer(_body(unit))]
    places = [i for i, m in enumerate(equations) if _other_operations(m[3], m[1], m[5])]
    operations = min(degree - (opening is not None), len(places))
    if opening is None and not operations:
        return None
    edited = _rewritten(units, {}, rng, other=rng.sample(places, operations))
    return [*opening, *edited[1:]] if opening else edited


def _disorder(units: list[str], degree: int, rng: random.Random) -> list[str] | None:
    """Swaps, leaves out or repeats steps: what stands between the opening and the conclusion."""
    steps = units[1:-1]
    if not steps:
        return None
    numbers = [_NUMBERED.match(step) for step in steps]
    numbered = all(numbers)
    bodies = list(map(_body, steps)) if numbered else list(steps)
    before = list(bodies)
    for _ in range(degree):
        kind, i = rng.choice(("swap", "omit", "repeat")), rng.randrange(len(bodies))
        unequal = [k for k in range(len(bodies) - 1) if bodies[k] != bodies[k + 1]]
        if kind == "swap" and unequal:
            i = rng.choice(unequal)
            bodies[i], bodies[i + 1] = bodies[i + 1], bodies[i]
        elif kind == "omit" and len(bodies) > 1:
            del bodies[i]
        else:
            bodies.insert(rng.randint(i, len(bodies)), bodies[i])
    if bodies == before:  # two errors may undo each other
        bodies.append(bodies[-1])
    if numbered and (first := numbers[0]):
        start = int(first[2])
        bodies = [f"{first[1]}{start + k}{first[3]}{body}" for k, body in enumerate(bodies)]
    return [units[0], *bodies, units[-1]]


def _pad(units: list[str], degree: int, rng: random.Random) -> list[str]:
    """Fillers in front of anything but the opening."""
    units = list(units)
    for filler in rng.sample(FILLERS, min(degree, len(FILLERS))):
        units.insert(rng.randint(min(1, len(units)), max(1, len(units) - 1)), filler)
    return units


def _rewritten(
    units: Sequence[str],
    changes: Mapping[str, str],
    rng: random.Random,
    wrong: Sequence[int] = (),
    other: Sequence[int] = (),
) -> list[str]:
    """The trace with values changed, and with what follows from them.

    Args:
      units: of the trace.
      changes: number (without commas) or name, to what stands in its place everywhere.
      rng: draws wrong results and other operations.
      wrong: equations, by index over the whole trace, that get a wrong result.
      other: equations that get another operation, and its result.
    """
    stands = dict(changes)  # of everything that is written, what stands for it from here on
    count, rewritten = 0, []
    for unit in units:
        body, end, parts = _body(unit), 0, [unit[: len(unit) - len(_body(unit))]]
        for match in _EQUATION.finditer(body):
            a, space, sign, more, b, equals, c = match.groups()
            left, right = stands.get(_plain(a), a), stands.get(_plain(b), b)
            shown, value = sign, c
            # What changed before may have left no other operation.
            if count in other and (signs := _other_operations(sign, left, right)):
                shown = rng.choice(signs)
            result = _written(_value(left, shown, right))
            if count in other or _value(a, sign, b) == _decimal(c):
                value = c if result == _plain(c) else result or c
            if count in wrong:
                value = _slip(value, rng, {result})
            parts += [_replaced(body[end : match.start()], stands)]
            parts += [left, space, shown, more, right, equals, value]
            if value != c:
                stands[_plain(c)] = value
            elif _plain(c) not in changes:
                stands.pop(_plain(c), None)
            end, count = match.end(), count + 1
        rewritten.append("".join([*parts, _replaced(body[end:], stands)]))
    return rewritten


def _body(unit: str) -> str:
    """A line without its number."""
    return _NUMBERED.sub("", unit)


def _replaced(text: str, stands: Mapping[str, str]) -> str:
    """The text with every number and name replaced by what stands for it."""
    text = _NUMBERS.sub(lambda match: stands.get(_plain(match[0]), match[0]), text)
    return re.sub(r"\b[A-Z][a-z]+\b", lambda match: stands.get(match[0], match[0]), text)


def _slip(number: str, rng: random.Random, taken: set[str]) -> str:
    """A number near it, of as many decimals, that is not taken."""
    value, digits = _decimal(number), len(number.partition(".")[2])
    if number.startswith("0") and len(number) > 1 and not digits:  # a code, such as 0110
        near = [number[:i] + "10"[c == "1"] + number[i + 1 :] for i, c in enumerate(number)]
    else:
        steps = [Decimal(n).scaleb(-digits) for n in (-10, -2, -1, 1, 2, 10, 3, -3, 5, 7)]
        kept = [value + step for step in steps if value + step >= 0 or value < 0]
        near = [f"{v:.{digits}f}" for v in kept]
    free = [n for n in near if n not in taken and n != number]
    return rng.choice(free[:6] or [f"{value + 11:.{digits}f}"])


def _other_operations(sign: str, a: str, b: str) -> list[str]:
    """Other signs whose results can be written."""
    own = _SAME.get(sign, sign)
    return [s for s in "+-*" if s != own and _written(_value(a, s, b))]


def _numbers(text: str) -> dict[str, None]:
    """The numbers of a text, each once, in order."""
    return dict.fromkeys(_plain(number) for number in _NUMBERS.findall(text))


def _plain(number: str) -> str:
    """A number without the commas of its thousands."""
    return number.replace(",", "")


def _decimal(number: str) -> Decimal:
    return Decimal(_plain(number))


def _value(a: str, sign: str, b: str) -> Decimal | None:
    """The value of an operation; None where it has none, or of too long numbers."""
    if max(len(_plain(a)), len(_plain(b))) > _CHARACTERS:
        return None
    try:
        return _OPERATIONS[_SAME.get(sign, sign)](_decimal(a), _decimal(b))
    except (DivisionByZero, InvalidOperation):
        return None


def _written(value: Decimal | None) -> str:
    """A number as a trace writes it; "" if that takes more than four decimals."""
    if value is None or value != round(value, 4):
        return ""
    return f"{value:f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"
