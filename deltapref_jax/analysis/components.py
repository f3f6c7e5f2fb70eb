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
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from deltapref_jax.config import Run


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


def pooled(arms: Iterable[Noise]) -> Noise:
    """The components of several arms, weighted by their degrees of freedom."""
    found = list(arms)
    return Noise(
        _average([arm.seed for arm in found if arm.seed]),
        _average([arm.draw for arm in found if arm.draw]),
    )


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
