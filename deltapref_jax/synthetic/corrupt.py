"""Corruptions of a known dimension and degree, for auditing and training judges."""

import random

from deltapref_jax.config import DIMENSIONS, check_choice
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.world import FILLERS, Problem, solve, write

DEGREES = 4
"""The largest degree of corruption; degree 0 leaves a solution as it is."""


def corrupt(problem: Problem, dimension: str, degree: int, rng: random.Random) -> str:
    """Returns the worked solution with `degree` errors in one dimension.

    The errors, of which there are fewer if the solution has fewer steps to corrupt:

    factuality: given values are misread, and calculated with consistently.
    strategy_coherence: the plan of another method, then other operations.
    step_coherence: steps are swapped, left out or repeated.
    numerical_precision: wrong values, which propagate.
    signal_to_noise: lines without content.

    Args:
      problem: to solve.
      dimension: one of `config.DIMENSIONS`.
      degree: 0 to `DEGREES`.
      rng: draws the errors.

    Raises:
      ConfigError: the dimension is unknown.
    """
    check_choice("dimension", dimension, DIMENSIONS)
    count = len(solve(problem)[0])
    plan = FAMILIES[problem.family].plan
    errors: dict[int, str] = {}  # step to kind of error, see `world.solve`
    if dimension == "factuality":
        with_given = [i for i, step in enumerate(solve(problem)[0]) if any(step.given)]
        errors = dict.fromkeys(rng.sample(with_given, min(degree, len(with_given))), "copy")
    elif dimension == "numerical_precision":
        errors = dict.fromkeys(rng.sample(range(count), min(degree, count)), "number")
    elif dimension == "strategy_coherence" and degree:
        # The wrong plan is the first of the errors.
        plan = FAMILIES[rng.choice([name for name in FAMILIES if name != problem.family])].plan
        errors = dict.fromkeys(rng.sample(range(count), min(degree - 1, count)), "op")
    steps, values, answer = solve(problem, errors, rng)
    lines = [step.text(value) for step, value in zip(steps, values, strict=True)]
    if dimension == "step_coherence":
        lines = _disorder(lines, degree, rng)
    lines = [f"{i + 1}. {line}" for i, line in enumerate(lines)]
    if dimension == "signal_to_noise":
        for filler in rng.sample(FILLERS, min(degree, len(FILLERS))):
            lines.insert(rng.randint(0, len(lines)), filler)
    return write(plan, lines, answer)


def _disorder(lines: list[str], degree: int, rng: random.Random) -> list[str]:
    """Swaps two neighbouring lines, leaves one out or repeats one, `degree` times.

    At least one line remains.
    """
    lines = list(lines)
    for _ in range(degree):
        kind = rng.choice(("swap", "omit", "repeat"))
        index = rng.randrange(len(lines))
        if kind == "swap" and len(lines) > 1:
            index = rng.randrange(len(lines) - 1)
            lines[index], lines[index + 1] = lines[index + 1], lines[index]
        elif kind == "omit" and len(lines) > 1:
            del lines[index]
        else:
            lines.insert(rng.randint(index, len(lines)), lines[index])
    return lines
