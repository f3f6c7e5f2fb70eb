"""Pairs of a ladder's rungs that differ in their generators and in no other count."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from deltapref_jax.records import Pair

BINS = 5  # of chosen lengths, equally full over all rungs together
_WORDS = {True: "right", False: "wrong", None: "unchecked"}


def balanced(
    own: int,
    rungs: Sequence[Sequence[Pair]],
    by: str,
    seed: tuple[int, int],
    tokens: Mapping[str, int],
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of one rung that have the counts of every rung.

    Pairs fall into cells, and every rung keeps as many pairs of a cell as the rung that has the
    fewest of it, drawn at random. So all rungs keep as many pairs, in the same joint distribution.

    Args:
      own: index of the rung whose pairs are wanted.
      rungs: the pools of all rungs.
      by: "correctness" (a cell for every pair of verdicts of chosen and rejected) or
        "chosen_length" (a cell for every fifth of the chosen traces' lengths, over all rungs).
      seed: of the experiment, and the draw.
      tokens: trace id to length.

    Returns:
      the pairs in the order of their pool, and how many each cell keeps.
    """
    cells = _cells(rungs, by, tokens)
    counts = [Counter(of_rung) for of_rung in cells]
    kept = {cell: min(c[cell] for c in counts) for cell in sorted(set().union(*counts))}
    pool, left, chosen = rungs[own], dict(kept), set()
    # Pairs are ordered by id before the draw, so that it does not depend on their row order.
    by_id = np.array(sorted(range(len(pool)), key=lambda i: pool[i].pair_id), int)
    for i in by_id[np.random.default_rng(seed).permutation(len(pool))]:
        if left[cells[own][i]]:
            left[cells[own][i]] -= 1
            chosen.add(int(i))
    return [pair for i, pair in enumerate(pool) if i in chosen], kept


def _cells(rungs: Sequence[Sequence[Pair]], by: str, tokens: Mapping[str, int]) -> list[list[str]]:
    """The cell of every pair of every rung."""
    if by == "correctness":
        return [
            [f"{_WORDS[p.chosen_correct]}_{_WORDS[p.rejected_correct]}" for p in pool]
            for pool in rungs
        ]
    lengths = [[tokens[p.chosen_id] for p in pool] for pool in rungs]
    together = [length for of_rung in lengths for length in of_rung]
    edges = np.quantile(together or [0], np.arange(1, BINS) / BINS)
    return [[f"length_{b + 1}" for b in np.searchsorted(edges, x, "right")] for x in lengths]
