"""Simulated studies whose truth is known: false positives, coverage and power of the intervals.

    python -m tests.analysis.null_studies --studies=250

prints the tables of docs/decisions/0049-noise-as-components.md: a row for each standard deviation
of a training seed's main effect and number of seeds.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import numpy as np

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import noise
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.statistics import Answers
from deltapref_jax.config import Run

# Suites, questions and samples of the quickstart when the rates were first measured.
SUITES = {"in": (90, 90), "out": (45,) * 5, "unequal": (300, 30)}
# Seeds of the arms of a study; ten arms of one seed borrow the noise that four others measure.
ONE_BORROWS, TWO, THREE = (1,) * 10 + (3,) * 4, (2,) * 14, (3,) * 14
# Arm → generator delta of three ladders without an arm in common.
LADDERS = [{f"a{i + rung}": 10.0 * rung for rung in range(4)} for i in (0, 4, 8)]
# Selection → arms of one seed, and the SD in points of a draw of their pairs, as many and as unlike
# as in `configs/delta_grid.py`: the top's draws differ in ties alone, and where nothing is tied
# ("same") all draws are one policy.
DRAWN = {"top": (12, 0.3), "random": (3, 6.0), "same": (12, 0.0)}
LADDER = (3,) * 5  # seeds of the arms beside them
SHIFT = 4.0  # points that training adds to a question's share of right answers, for coverage


class Rate(NamedTuple):
    """A share of all comparisons, with its Monte-Carlo error, in percent."""

    rate: float
    error: float  # standard error over studies, whose comparisons are not independent

    def __str__(self) -> str:
        return f"{self.rate:.1f} ± {self.error:.1f}"


def rate(by_study: Sequence[Sequence[bool]]) -> Rate:
    """The mean over studies of [studies, comparisons]."""
    of_studies = 100 * np.mean(by_study, axis=1)
    return Rate(float(of_studies.mean()), float(of_studies.std(ddof=1) / len(of_studies) ** 0.5))


def simulated(
    rng: np.random.Generator,
    domain: str,
    seeds: Sequence[int],
    sd: float,
    shift: float = 0.0,
    drawn: Mapping[str, tuple[int, float]] = MappingProxyType({}),
    common: float = 0.0,
) -> tuple[Mapping[str, Answers], dict[str, Mapping[Run, Mapping[str, Answers]]]]:
    """Answers of a student and of arms that training changes by `shift`, with noise of `sd`.

    The arms of `drawn` have three draws each, and a share `common` of the variance of a seed is
    the same for all arms.
    """
    # Shares of right answers that spread over questions as the quickstart's do (ICC about 0.5).
    shares = [rng.beta(0.8, 1.2, n) for n in SUITES[domain]]

    def answers(shift: float) -> dict[str, Answers]:
        return {
            f"s{i}": Answers(
                np.arange(len(p)),
                rng.binomial(2, np.clip(p + shift / 100, 0, 1)) / 2,
                np.full(len(p), 2),
            )
            for i, p in enumerate(shares)
        }

    of_seed = rng.normal(0, sd * common**0.5, max(seeds)) if common else np.zeros(max(seeds))

    def trained(seed: int) -> float:
        return float(of_seed[seed] + rng.normal(shift, sd * (1 - common) ** 0.5))

    arms = {
        f"a{i}": {Run(0, s): answers(trained(s)) for s in range(n)} for i, n in enumerate(seeds)
    }
    for name, (count, draw_sd) in drawn.items():
        for i in range(count):
            seed = trained(0)
            arms[f"{name}{i}"] = {
                Run(draw, 0): answers(seed + rng.normal(0, draw_sd))
                for draw in range(3 if draw_sd else 1)
            }
    return answers(0.0), arms


@functools.cache
def truth(sd: float) -> float:
    """The expected change of an arm that training shifts by SHIFT, in points."""
    rng = np.random.default_rng(0)
    share = rng.beta(0.8, 1.2, 4_000_000)
    after = np.clip(share + rng.normal(SHIFT, sd, share.shape) / 100, 0, 1)
    return 100 * float((after - share).mean())


@contextlib.contextmanager
def shared_draws() -> Iterator[None]:
    """All studies share the draws of questions, which take most of the time."""
    weights: dict[tuple[int, ...], list[np.ndarray]] = {}
    multinomial = fx._weights

    def once(sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
        if sizes not in weights:
            weights[sizes] = list(multinomial(sizes, seed))
        return weights[sizes]

    with mock.patch.object(fx, "_weights", once):
        yield


def simulated_effects(
    domain: str,
    seeds: Sequence[int],
    sd: float,
    studies: int,
    shift: float = 0.0,
    drawn: Mapping[str, tuple[int, float]] = MappingProxyType({}),
    common: float = 0.0,
) -> Iterator[fx.Effects]:
    """Effects of `studies` studies; inside of `shared_draws`."""
    rng = np.random.default_rng([int(10 * sd), len(seeds), sum(seeds), int(shift)])
    kinds = {
        f"{name}{i}": Kind(draw=name if draw_sd else "")
        for name, (count, draw_sd) in drawn.items()
        for i in range(count)
    }
    for i in range(studies):
        before, after = simulated(rng, domain, seeds, sd, shift, drawn, common)
        # The answers stand in for the tables that they would be read from.
        yield fx.effects(before, after, domain, kinds, seed=i, read=lambda answers, _: answers)


def false_positives(
    domain: str, seeds: Sequence[int], sd: float, studies: int, common: float = 0.0
) -> tuple[Rate, Rate, Rate]:
    """Shares of arms' changes, of contrasts and of slopes whose p value is below 5%.

    All arms of a study count, which are many looks at its components of variance.
    """
    changes, contrasts, slopes = [], [], []
    for e in simulated_effects(domain, seeds, sd, studies, common=common):
        changes.append([e.change(name).p < 0.05 for name in e.names])
        contrasts.append([e.contrast(f"a{i + 1}", f"a{i}").p < 0.05 for i in range(0, 14, 2)])
        found = [e.slope(ladder) for ladder in LADDERS]
        slopes.append([slope is not None and slope.p < 0.05 for slope in found])
    return rate(changes), rate(contrasts), rate(slopes)


def false_positives_of_draws(domain: str, sd: float, studies: int) -> dict[str, Rate]:
    """Shares of p values below 5%, of the changes of every selection and of its contrasts."""
    below: dict[str, list[list[bool]]] = {}
    for e in simulated_effects(domain, LADDER, sd, studies, drawn=DRAWN):
        for name, (count, _) in DRAWN.items():
            arms = [f"{name}{i}" for i in range(count)]
            below.setdefault(name, []).append([e.change(arm).p < 0.05 for arm in arms])
            if name != "random":  # of which there are few
                of_all = [e.contrast(f"{name}{i}", f"random{i}").p < 0.05 for i in range(3)]
                below.setdefault(f"{name} - random", []).append(of_all)
                of_kind = [
                    e.contrast(a, b).p < 0.05 for a, b in zip(arms[::2], arms[1::2], strict=True)
                ]
                below.setdefault(f"{name} - {name}", []).append(of_kind)
    return {name: rate(found) for name, found in below.items()}


def coverage(domain: str, seeds: Sequence[int], sd: float, studies: int) -> Rate:
    """Share of arms whose interval has the true change in it, where training changes something."""
    covered = []
    for e in simulated_effects(domain, seeds, sd, studies, SHIFT):
        estimates = [e.change(name).estimate for name in e.names]
        covered.append([low <= truth(sd) <= high for _, low, high in estimates])
    return rate(covered)


def power(domain: str, seeds: Sequence[int], sd: float, studies: int) -> tuple[float, Rate]:
    """The change that studies say their first arm would show with 80% power, and how often it is.

    It is the mean over the studies of what each says.
    """
    found = list(simulated_effects(domain, seeds, sd, studies))
    first = {"a0": 1.0}
    size = float(np.mean([noise.detectable(e.error(first), e.freedom(first)) for e in found]))
    shown = []
    for e in found:
        gaps = e.gaps.copy()
        gaps[0] += size / gaps.shape[1]
        shown.append([dataclasses.replace(e, gaps=gaps).change("a0").p < 0.05])
    return size, rate(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=250, help="studies a cell")
    studies = parser.parse_args().studies
    print("| in / out of domain, % | change | contrast | slope | coverage of a change |")
    print("|---|---|---|---|---|")
    with shared_draws():
        for sd in (0.0, 1.0, 2.0):
            for name, seeds in (
                ("1 seed, borrowing", ONE_BORROWS),
                ("2 seeds", TWO),
                ("3 seeds", THREE),
            ):
                cells = [
                    (*false_positives(d, seeds, sd, studies), coverage(d, seeds, sd, studies))
                    for d in SUITES
                ]
                words = [" / ".join(map(str, cell)) for cell in zip(*cells, strict=True)]
                print(f"| {name}, SD {sd:.0f} | {' | '.join(words)} |", flush=True)


if __name__ == "__main__":
    main()
