"""Corruptions of a known dimension and degree: what an audit holds a judge against, and what a judge learns from."""

import random

from deltapref_jax.config import DIMENSIONS, check_choice
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.world import FILLERS, Problem, solve, write

DEGREES = 4
"""The largest degree; 0 leaves the solution clean."""


def corrupt(problem: Problem, dimension: str, degree: int, rng: random.Random) -> str:
    """The worked solution with `degree` places spoiled in `dimension` (fewer where it has fewer places).

    factuality: misread givens, calculated with consistently. strategy_coherence: another method's plan, then other
    operations. step_coherence: steps swapped, left out or repeated. numerical_precision: wrong values, which propagate.
    signal_to_noise: lines that say nothing.

    Raises:
      ConfigError: unknown dimension.
    """
    check_choice("dimension", dimension, DIMENSIONS)
    count = len(solve(problem)[0])
    plan = FAMILIES[problem.family].plan
    wrong: dict[int, str] = {}
    if dimension == "factuality":
        places = [i for i, step in enumerate(solve(problem)[0]) if any(step.given)]
        wrong = dict.fromkeys(rng.sample(places, min(degree, len(places))), "copy")
    elif dimension == "numerical_precision":
        wrong = dict.fromkeys(rng.sample(range(count), min(degree, count)), "number")
    elif dimension == "strategy_coherence" and degree:
        plan = FAMILIES[rng.choice([name for name in FAMILIES if name != problem.family])].plan
        wrong = dict.fromkeys(rng.sample(range(count), min(degree - 1, count)), "op")
    steps, values, answer = solve(problem, wrong, rng)
    lines = [step.text(value) for step, value in zip(steps, values, strict=True)]
    if dimension == "step_coherence":
        lines = _shuffle(lines, degree, rng)
    lines = [f"{i + 1}. {line}" for i, line in enumerate(lines)]
    if dimension == "signal_to_noise":
        for filler in rng.sample(FILLERS, min(degree, len(FILLERS))):
            lines.insert(rng.randint(0, len(lines)), filler)
    return write(plan, lines, answer)


def _shuffle(lines: list[str], degree: int, rng: random.Random) -> list[str]:
    """`degree` times: swap two neighbours, leave a line out, or repeat one; never empties the solution."""
    lines = list(lines)
    for _ in range(degree):
        kind = rng.choice(("swap", "omit", "repeat"))
        place = rng.randrange(len(lines))
        if kind == "swap" and len(lines) > 1:
            place = rng.randrange(len(lines) - 1)
            lines[place], lines[place + 1] = lines[place + 1], lines[place]
        elif kind == "omit" and len(lines) > 1:
            del lines[place]
        else:
            lines.insert(rng.randint(place, len(lines)), lines[place])
    return lines
