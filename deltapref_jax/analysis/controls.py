"""Controls that must come out, recognised from the config: what no effect of data can explain.

null       one arm under two seeds                       no difference
random     two random draws of as many pairs             no difference
placebo    pairs turned around by a coin                 no gain over the student
negative   chosen and rejected exchanged                 worse than the pairs as they were
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.page import ControlResult, MeasuredBy
from deltapref_jax.analysis.study import Study
from deltapref_jax.config import Arm, Experiment, Run, differing, is_balanced, samples_of

_SYMMETRIC = ("any", "both_right", "both_wrong")  # strata that an exchange of the sides keeps
_EXPECTED = {
    "null": "no difference",
    "random": "no difference",
    "placebo": "no gain over the student",
    "negative": "the pairs as they were do better",
}


class _Control(NamedTuple):
    """`a` minus `b`, or the change of `a` where there is no `b`; of both the runs."""

    kind: str
    what: str
    arms: tuple[str, ...]
    a: Sequence[Run]
    b: Sequence[Run]


def controls(study: Study, redrawn: Sequence[str]) -> list[ControlResult]:
    """The controls of the arms that were evaluated, p values adjusted over all of them.

    Args:
      study: with the student's results.
      redrawn: arms whose pairs depend on the draw of pairs.
    """
    assert study.student is not None
    arms = [a for a in study.experiment.arms if a.name in study.results]
    found = [*_within(arms), *_between(study.experiment, arms)]
    # Parts of an arm are arms beside it, so that they borrow the noise of training it measures.
    parts: dict[str, Mapping[Run, pa.Table]] = {}
    drawn = list(redrawn)
    for i, control in enumerate(found):
        sides = (control.arms[0], control.a), (control.arms[-1], control.b)
        for side, (arm, runs) in enumerate(sides):
            of_arm = {run: study.results[arm][run] for run in runs if run in study.results[arm]}
            if of_arm:
                name = f"control {i} {side}"
                parts[name] = of_arm
                # Two seeds of one draw have their pairs in common.
                drawn += [name] * (arm in redrawn and control.kind != "null")
    effects = {
        d: fx.effects(study.student, {**study.results, **parts}, d, drawn) for d in study.domains
    }
    complete = [
        i
        for i, control in enumerate(found)
        if f"control {i} 0" in parts and (not control.b or f"control {i} 1" in parts)
    ]
    measured = fx.measured(
        {
            (i, d): e.contrast(f"control {i} 0", f"control {i} 1")
            if found[i].b
            else e.change(f"control {i} 0")
            for i in complete
            for d, e in effects.items()
        }
    )
    results = []
    for i in complete:
        kind, what, names, _, _ = found[i]
        by_domain = {d: measured[i, d] for d in effects}
        came_out = _came_out(kind, by_domain)
        results.append(ControlResult(kind, what, names, by_domain, _EXPECTED[kind], came_out))
    return results


def _came_out(kind: str, effects: MeasuredBy) -> bool | None:
    """Whether the effects are as expected in all domains; None: a negative control is undecided."""
    gains = [e.estimate.value > 0 for e in effects.values() if e.shown]
    if kind == "placebo":
        return not any(gains)
    if kind == "negative":
        return all(gains) if gains else None
    return not gains


def _within(arms: Sequence[Arm]) -> list[_Control]:
    """An arm's first two seeds, the first two draws of random pairs, and coins."""
    found = []
    for a in arms:
        if len(a.seeds) > 1:
            first, second = (Run(a.draws[0], seed) for seed in a.seeds[:2])
            what = f"{a.name}, seed {first.seed} minus seed {second.seed}"
            found.append(_Control("null", what, (a.name,), [first], [second]))
        if a.keep == "random" and len(a.draws) > 1:
            one, other = ([Run(draw, seed) for seed in a.seeds] for draw in a.draws[:2])
            what = f"{a.name}, draw {a.draws[0]} minus draw {a.draws[1]} of random pairs"
            found.append(_Control("random", what, (a.name,), one, other))
        if a.direction == "coin":
            what = f"{a.name}, directed by a coin, against the student"
            found.append(_Control("placebo", what, (a.name,), a.runs, ()))
    return found


def _between(e: Experiment, arms: Sequence[Arm]) -> list[_Control]:
    """Two arms that differ only in seeds or draws, and an arm whose twin has exchanged sides."""
    found = []
    for a, b in itertools.combinations(arms, 2):
        names, runs = (a.name, b.name), (a.runs, b.runs)
        balanced = is_balanced(e, a) or is_balanced(e, b)
        if not differing(a, b) and is_balanced(e, a) == is_balanced(e, b):
            if a.draws == b.draws and not set(a.seeds) & set(b.seeds):
                found.append(
                    _Control("null", f"{a.name} minus {b.name}, other seeds", names, *runs)
                )
            elif a.keep == "random" and not set(a.draws) & set(b.draws):
                what = f"{a.name} minus {b.name}, other draws of random pairs"
                found.append(_Control("random", what, names, *runs))
        elif not balanced and _exchanged(a, b):
            if (a.group, b.group).count("control") == 1 and a.group == "control":
                a, b = b, a
            what = f"{a.name} minus {b.name}, whose chosen and rejected are exchanged"
            found.append(_Control("negative", what, (a.name, b.name), a.runs, b.runs))
    return found


def _exchanged(a: Arm, b: Arm) -> bool:
    """Whether b has the pairs of a with chosen and rejected exchanged."""
    sides = {"chosen", "rejected", "chosen_sample", "rejected_sample"}
    return (
        a.chosen != a.rejected
        and (a.chosen, a.rejected) == (b.rejected, b.chosen)
        and samples_of(a) == samples_of(b)[::-1]
        and differing(a, b) <= sides
        and (a.keep, a.direction) == ("all", "generator")
        and a.stratum in _SYMMETRIC
    )
