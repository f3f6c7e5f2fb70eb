"""Components of training's noise: what a seed, and what a draw of pairs, does to all questions.

The runs of an arm are its draws of pairs crossed with its seeds. Another seed is another order of
the data and other first adapters; the same seed under another draw is the same order of places and
the same adapters, with other pairs in these places. How much of a seed's effect stays under another
draw is not known where an arm has one seed, so all of it is taken to stay (draws and seeds as
crossed random effects, without an interaction: Searle, Casella & McCulloch, Variance Components,
1992, chapter 4):

    mean of a run = arm + draw + seed + questions

A mean over runs then has a seed's variance divided by the arm's seeds, and a draw's by its draws.
What an interaction of both adds is in both mean squares, so that intervals are too wide where there
is one, and never too narrow.

Arms measure a variance together where they are of one kind (`Kind`), since unlike ones differ by
far more than chance: a tie at the cut exchanges few pairs and another random draw nearly all, and
KTO's seeds differ more than DPO's. An arm of a kind that nobody measures borrows what all others
measured.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deltapref_jax.analysis.study import Study, columns
from deltapref_jax.config import KEEPS, Arm, Run, draws_pairs, is_balanced


class Component(NamedTuple):
    """An estimated variance of training, in squared points of a domain's accuracy."""

    mean_square: float  # observed variance of means
    rest: float  # the share of it that the interaction of runs and questions explains
    freedom: int  # degrees of freedom of `mean_square`

    @property
    def variance(self) -> float:
        """The component: what the rest does not explain, at least 0."""
        return max(0.0, self.mean_square - self.rest)


class Noise(NamedTuple):
    """The components of training's variance; None where no arm measures one."""

    seed: Component | None
    draw: Component | None


class Kind(NamedTuple):
    """What arms have alike whose runs measure one variance."""

    seed: str = ""  # objective
    draw: str = ""  # see `redrawn`; "" where another draw gives the same pairs


def kinds_of(study: Study) -> dict[str, Kind]:
    """The kind of every arm, by name."""
    return {a.name: Kind(a.objective, redrawn(study, a)) for a in study.experiment.arms}


def redrawn(study: Study, arm: Arm) -> str:
    """How another draw gives an arm other pairs, its objective and its budget; "" if it does not.

    Whether it does is measured: several draws of the arm have different pairs, or the only one has
    pairs left out of a random selection, or ties. Before pairs are made, the config tells.
    """
    if not draws_pairs(study.experiment, arm):
        return ""
    if arm.direction == "coin":
        selection = "coin"
    elif (
        is_balanced(study.experiment, arm)
        or arm.keep in ("random", "matched")
        or arm.keep not in KEEPS
    ):
        selection = "random pairs"
    else:
        selection = "ties"
    tables = [
        columns(table, "chosen_id", "rejected_id")
        for table in study.pairs.get(arm.name, {}).values()
    ]
    counts = next(iter(study.pair_counts.get(arm.name, {}).values()), {})
    if len(tables) > 1:
        differ = len({frozenset(zip(*table, strict=True)) for table in tables}) > 1
    elif selection == "ties" and counts:
        differ = counts.get("tied_at_cut", 1) + counts.get("tied_samples", 0) > 0
    elif selection == "random pairs" and counts:
        differ = counts.get("kept", 0) < counts["pool"] + counts.get("dropped_balance", 0)
    else:
        differ = True
    budget = ", its own budget" if arm.steps or arm.epochs else ""
    return f"{selection}, {arm.objective}{budget}" if differ else ""


def measured_by(runs: np.ndarray, keys: Sequence[Run], sizes: Sequence[int]) -> Noise:
    """What the runs of one arm say of the components.

    Args:
      runs: what every question adds to the change of every run, [runs, n] in points.
      keys: of the runs.
      sizes: questions of every suite.
    """
    of_draws = [
        runs[[key.draw == draw for key in keys]] for draw in dict.fromkeys(k.draw for k in keys)
    ]
    several = [_mean_square(group, sizes) for group in of_draws if len(group) > 1]
    seed = _average(several)
    if seed:
        # The same seeds under another draw of pairs are no further seeds.
        seed = seed._replace(freedom=max(c.freedom for c in several))
    if len(of_draws) < 2:
        return Noise(seed, None)
    return Noise(seed, _mean_square(np.stack([g.mean(axis=0) for g in of_draws]), sizes))


def pooled(
    names: Sequence[str],
    own: Mapping[str, Noise],
    kinds: Mapping[str, Kind],
    borrow: bool = True,
) -> tuple[Noise, ...]:
    """The components of arms: what the arms of their kind measured, else what all did.

    Args:
      names: of the arms.
      own: what every arm that measures has measured.
      kinds: of both; an arm without one is of the kind `Kind()`.
      borrow: whether a kind that nobody measures has what all did; else it has none.
    """
    by_seed: dict[str, list[Component]] = {}
    by_draw: dict[str, list[Component]] = {}
    for arm, noise in own.items():
        kind = kinds.get(arm, Kind())
        if noise.seed:
            by_seed.setdefault(kind.seed, []).append(noise.seed)
        if noise.draw and kind.draw:
            by_draw.setdefault(kind.draw, []).append(noise.draw)
    wanted = [kinds.get(name, Kind()) for name in names]
    seeds = {kind: _of_kind(by_seed, kind, borrow) for kind in {k.seed for k in wanted}}
    draws = {kind: _of_kind(by_draw, kind, borrow) for kind in {k.draw for k in wanted} if kind}
    return tuple(Noise(seeds[kind.seed], draws.get(kind.draw)) for kind in wanted)


def _of_kind(
    measured: Mapping[str, Sequence[Component]], kind: str, borrow: bool
) -> Component | None:
    of_all = [c for several in measured.values() for c in several] if borrow else []
    return _average(measured.get(kind) or of_all)


def _average(components: Sequence[Component]) -> Component | None:
    """Components weighted by their degrees of freedom; None where there is none."""
    if not components:
        return None
    freedom = [c.freedom for c in components]
    return Component(
        float(np.average([c.mean_square for c in components], weights=freedom)),
        float(np.average([c.rest for c in components], weights=freedom)),
        sum(freedom),
    )


def _mean_square(runs: np.ndarray, sizes: Sequence[int]) -> Component:
    """The variance of the means of runs, [runs, n], and the interaction's share of it."""
    freedom = len(runs) - 1
    rest = 0.0
    for suite in np.split(runs, np.cumsum(sizes)[:-1], axis=1):
        n = suite.shape[1]
        if n > 1:
            residual = suite - suite.mean(axis=0) - suite.mean(axis=1, keepdims=True) + suite.mean()
            # A sum of n questions has n times the variance of one.
            rest += n * float((residual**2).sum()) / (freedom * (n - 1))
    return Component(float(runs.sum(axis=1).var(ddof=1)), rest, freedom)
