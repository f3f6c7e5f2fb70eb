"""Simulated studies without any effect: how often does a page show one?

    python -m tests.analysis.null_studies --studies=1000

prints the table of docs/decisions/0049-noise-as-components.md: a row for each standard deviation of
a training seed's main effect and number of seeds, with false positives at a nominal 5%.
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from unittest import mock

import numpy as np

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.statistics import Answers

# Suites, questions and samples of the quickstart when the rates were first measured.
SUITES = {"in": (90, 90), "out": (45,) * 5}
# Seeds of the arms of a study; ten arms of one seed borrow the noise that four others measure.
ONE_BORROWS, TWO, THREE = (1,) * 10 + (3,) * 4, (2,) * 14, (3,) * 14
LADDER = {"a0": 0.0, "a1": 10.0, "a2": 20.0, "a3": 30.0}  # arm → generator delta


def simulated(
    rng: np.random.Generator, domain: str, seeds: Sequence[int], sd: float
) -> tuple[Mapping[str, Answers], Mapping[str, Mapping[fx.Run, Mapping[str, Answers]]]]:
    """Answers of a student and of arms that training does not change, but for noise of `sd`."""
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

    arms = {
        f"a{i}": {fx.Run(0, s): answers(rng.normal(0, sd)) for s in range(n)}
        for i, n in enumerate(seeds)
    }
    return answers(0.0), arms


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


def null_studies(
    domain: str, seeds: Sequence[int], sd: float, studies: int
) -> Iterator[fx.Effects]:
    """Effects of `studies` studies; inside of `shared_draws`."""
    rng = np.random.default_rng([int(10 * sd), len(seeds), sum(seeds)])
    for i in range(studies):
        before, after = simulated(rng, domain, seeds, sd)
        # The answers stand in for the tables that they would be read from.
        yield fx.effects(before, after, domain, seed=i, read=lambda answers, _: answers)


def false_positives(
    domain: str, seeds: Sequence[int], sd: float, studies: int
) -> tuple[float, float, float]:
    """Shares of arms' changes, of contrasts and of slopes whose p value is below 5%.

    All arms of a study count, which are many looks at its components of variance.
    """
    changes, contrasts, slopes = [], [], []
    for e in null_studies(domain, seeds, sd, studies):
        changes += [e.change(name).p < 0.05 for name in e.names]
        contrasts += [e.contrast(f"a{i + 1}", f"a{i}").p < 0.05 for i in range(0, 10, 2)]
        slope = e.slope(LADDER)
        assert slope is not None
        slopes.append(slope.p < 0.05)
    return float(np.mean(changes)), float(np.mean(contrasts)), float(np.mean(slopes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000, help="studies a cell")
    studies = parser.parse_args().studies
    print("| in / out of domain, % | arm's change | contrast | slope |\n|---|---|---|---|")
    with shared_draws():
        for name, seeds in (
            ("1 seed, borrowing", ONE_BORROWS),
            ("2 seeds", TWO),
            ("3 seeds", THREE),
        ):
            for sd in (0.0, 1.0, 2.0):
                rates = [false_positives(d, seeds, sd, studies) for d in SUITES]
                cells = [f"{100 * i:.1f} / {100 * o:.1f}" for i, o in zip(*rates, strict=True)]
                print(f"| {name}, SD {sd:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
