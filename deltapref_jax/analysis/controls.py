"""Controls that must come out, recognised from the config: what no effect of data can explain.

null       one arm under two seeds                       no difference
random     two random draws of as many pairs             no difference
placebo    pairs turned around by a coin                 no gain over the student
negative   chosen and rejected exchanged                 worse than the pairs as they were

Two seeds of an arm are compared with the noise that other arms of its kind (`components.Kind`)
measured: what they differ by would hide itself in their own, and another kind may have so little
noise that they seem to differ. A control of no difference comes out where none is shown and its
intervals exclude, in every domain, all that are larger than `bound`; one that allows more says
nothing. The verdict names what the widest of them allows. A negative control comes out where its
difference is shown in every domain.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.findings import DOMAIN_WORDS
from deltapref_jax.analysis.page import ControlResult, MeasuredBy
from deltapref_jax.analysis.study import Study
from deltapref_jax.config import (
    SYMMETRIC,
    Arm,
    Claim,
    Experiment,
    Run,
    claims_of,
    differing,
    is_balanced,
    sides_of,
)

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

    @property
    def sides(self) -> list[tuple[str, Sequence[Run]]]:
        """What is compared, as arms and their runs."""
        return [(self.arms[0], self.a), (self.arms[-1], self.b)][: 2 if self.b else 1]

    @property
    def noise(self) -> list[str]:
        """Fields of `Noise` that a control of no difference is compared with."""
        seeds = [{run.seed for run in runs} for runs in (self.a, self.b)]
        # Draws that share their seeds do not differ by them.
        draws = ["draw"] if seeds[0] == seeds[1] else ["draw", "seed"]
        return {"null": ["seed"], "random": draws}.get(self.kind, [])


def controls(study: Study, kinds: Mapping[str, Kind]) -> list[ControlResult]:
    """The controls of the arms that were evaluated, p values adjusted over all of them.

    Args:
      study: with the student's results.
      kinds: of the arms, see `components`.
    """
    assert study.student is not None
    arms = [a for a in study.experiment.arms if a.name in study.results]
    found = [
        control
        for control in (*_within(arms), *_between(study.experiment, arms))
        if all(_of_runs(study, *side) for side in control.sides)
    ]
    # Parts of an arm are arms beside it, which borrow the noise that the study's own arms measure.
    parts: dict[str, Mapping[Run, pa.Table]] = {}
    of_parts = dict(kinds)
    for i, control in enumerate(found):
        for name, (arm, runs) in zip(_names(i, control), control.sides, strict=True):
            parts[name] = _of_runs(study, arm, runs)
            # Two seeds of one draw have their pairs in common.
            of_parts[name] = kinds.get(arm, Kind())
            if control.kind == "null":
                of_parts[name] = of_parts[name]._replace(draw="")
    by_domain = {
        d: fx.effects(
            study.student, {**study.results, **parts}, d, of_parts, measuring=study.results
        )
        for d in study.domains
    }
    of_control = [
        {d: _compared_with(e, control, _names(i, control)) for d, e in by_domain.items()}
        for i, control in enumerate(found)
    ]
    measured = fx.measured(
        {
            (i, d): e.combined(dict(zip(_names(i, control), (1.0, -1.0), strict=False)))
            for i, control in enumerate(found)
            for d, e in of_control[i].items()
        }
    )
    results = []
    for i, control in enumerate(found):
        kind, what, names, _, _ = control
        effects = {d: measured[i, d] for d in by_domain}
        missing = [
            of
            for of in control.noise
            if any(
                getattr(e.noise[e.names.index(name)], of) is None
                for e in of_control[i].values()
                for name in _names(i, control)
            )
        ]
        came_out, reason = judged(kind, effects, missing, bound(study.experiment, control))
        results.append(ControlResult(kind, what, names, effects, _EXPECTED[kind], came_out, reason))
    return results


def bound(e: Experiment, control: _Control) -> float:
    """The largest difference that the interval of a control of no difference may allow, in points.

    The smallest margin m of the claims that compare arms: what a control leaves open must not
    matter to a claim. Of two single seeds it is 4 m. Where a claim is a contrast of two arms of
    three seeds that can be equivalent at m, the half width of a 90% interval is at most m; two
    single seeds then have a 95% interval of ± √3 · 1.96 / 1.645 m = ± 2.06 m, and their difference
    is off by as much again. No other control has so few runs for a reason.
    """
    margins = [claim.margin for claim in claims_of(e) if claim.kind != "slope"]
    single = control.kind == "null" and len(control.a) == len(control.b) == 1
    return (4 if single else 1) * min(margins, default=Claim().margin)


def _names(i: int, control: _Control) -> list[str]:
    return [f"control {i} {side}" for side in range(len(control.sides))]


def _of_runs(study: Study, arm: str, runs: Sequence[Run]) -> dict[Run, pa.Table]:
    """Results of some runs of an arm; a draw of pairs that another one equals has none."""
    return {run: study.results[arm][run] for run in runs if run in study.results[arm]}


def _compared_with(e: fx.Effects, control: _Control, names: Sequence[str]) -> fx.Effects:
    """The effects of a control, with noise of its kind that its own difference is no part of."""
    if not control.noise:
        return e
    return e.of_kind(names, control.arms[0] if len(control.arms) == 1 else "")


def judged(
    kind: str, effects: MeasuredBy, missing: Sequence[str], most: float
) -> tuple[bool | None, str]:
    """Whether a control came out in all domains; None if that is undecided. What that rests on.

    Args:
      kind: of the control.
      effects: by domain.
      missing: of `_Control.noise`, what no other arm of the kind measured.
      most: `bound`.
    """
    gains = [d for d, e in effects.items() if e.shown and e.estimate.value > 0]
    losses = [d for d, e in effects.items() if e.shown and e.estimate.value < 0]
    if kind == "negative":
        rest = [d for d in effects if d not in gains]
        if losses:
            return False, f"the exchanged pairs do better {_in(losses)}"
        if not gains:
            return None, "no difference is shown"
        found = f"a difference is shown {_in(gains)}"
        return (None, f"{found}, none {_in(rest)}") if rest else (True, found)
    if missing:
        return None, f"no other arm of its kind has several {missing[0]}s to compare with"
    # A placebo may be worse than the student.
    placebo = kind == "placebo"
    if wrong := gains if placebo else gains + losses:
        return False, f"a {'gain' if placebo else 'difference'} is shown {_in(wrong)}"
    allowed = max(
        e.estimate.high if placebo else max(-e.estimate.low, e.estimate.high)
        for e in effects.values()
    )
    if allowed > most:
        return None, f"up to {allowed:.1f} points are not excluded, of at most {most:g}"
    return True, f"no gain above {allowed:+.1f}" if placebo else f"to within ±{allowed:.1f}"


def _in(domains: Sequence[str]) -> str:
    return " and ".join(DOMAIN_WORDS[d] for d in domains)


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
        if not differing(e, a, b) and is_balanced(e, a) == is_balanced(e, b):
            if a.draws == b.draws and not set(a.seeds) & set(b.seeds):
                found.append(
                    _Control("null", f"{a.name} minus {b.name}, other seeds", names, *runs)
                )
            elif a.keep == "random" and not set(a.draws) & set(b.draws):
                what = f"{a.name} minus {b.name}, other draws of random pairs"
                found.append(_Control("random", what, names, *runs))
        elif not balanced and _exchanged(e, a, b):
            if (a.group, b.group).count("control") == 1 and a.group == "control":
                a, b = b, a
            what = f"{a.name} minus {b.name}, whose chosen and rejected are exchanged"
            found.append(_Control("negative", what, (a.name, b.name), a.runs, b.runs))
    return found


def _exchanged(e: Experiment, a: Arm, b: Arm) -> bool:
    """Whether b has the pairs of a with chosen and rejected exchanged."""
    sides = {"chosen", "rejected", "chosen_sample", "rejected_sample"}
    return (
        a.chosen != a.rejected
        and sides_of(a) == sides_of(b)[::-1]
        and differing(e, a, b) <= sides
        and (a.keep, a.direction) == ("all", "generator")
        and a.stratum in SYMMETRIC
    )
