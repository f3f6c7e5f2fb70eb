"""Which pairs of a pool an arm keeps: all, those of the largest sample delta, or as many others."""

from collections.abc import Mapping, Sequence

import numpy as np

from deltapref_jax.config import ConfigError
from deltapref_jax.records import Pair


def sample_delta(pairs: Sequence[Pair], dimension: int | None) -> np.ndarray:
    """Chosen minus rejected rating of every pair, float [P].

    Args:
      pairs: with ratings.
      dimension: index into the ratings; None is their sum.

    Raises:
      ConfigError: a pair has no ratings.
    """

    def value(ratings: Sequence[float] | None) -> float:
        if ratings is None:
            raise ConfigError(
                "A pair has no ratings to select by; name a judge that rated both of its "
                "generators."
            )
        return float(sum(ratings)) if dimension is None else float(ratings[dimension])

    return np.array([value(p.chosen_rating) - value(p.rejected_rating) for p in pairs])


def select(
    pairs: Sequence[Pair],
    selection: str,
    fraction: float,
    seed: int,
    dimension: int | None,
    tokens: Mapping[str, int],
) -> list[Pair]:
    """The pairs that an arm trains on, in the order of `pairs`.

    Args:
      pairs: the pool.
      selection: "all", "top" (largest sample delta), "random", or "matched": as many pairs as
        "top", drawn among the others where possible, each the nearest in (chosen tokens, rejected
        tokens) to one of the top pairs. It has the lengths of the top pairs without their ratings,
        so what "top" gains over it is not due to length.
      fraction: of the pool that is kept; ignored by "all".
      seed: of "random", and of the order in which "matched" serves the top pairs.
      dimension: that "top" and "matched" rank by; None is the sum.
      tokens: trace id to length.

    Raises:
      ConfigError: the fraction keeps nothing, or ratings are missing.
    """
    if selection == "all":
        return list(pairs)
    k = _count(pairs, fraction)
    if selection == "random":
        # Pairs are ordered by id before the draw, so that it does not depend on their row order.
        by_id = sorted(range(len(pairs)), key=lambda i: pairs[i].pair_id)
        kept = {by_id[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:k]}
    else:
        kept = _top(pairs, sample_delta(pairs, dimension), k)
        if selection == "matched":
            kept = _matched(pairs, kept, seed, tokens)
    return [pairs[i] for i in sorted(kept)]


def _count(pairs: Sequence[Pair], fraction: float) -> int:
    k = round(fraction * len(pairs))
    if not 1 <= k <= len(pairs):
        raise ConfigError(
            f"A fraction of {fraction:g} keeps {k} of {len(pairs)} pairs; it must keep at least "
            "one and no more than there are."
        )
    return k


def _top(pairs: Sequence[Pair], deltas: np.ndarray, k: int) -> set[int]:
    """Indices of the k largest deltas; pair ids break ties, so that row order does not matter."""
    return set(sorted(range(len(pairs)), key=lambda i: (-deltas[i], pairs[i].pair_id))[:k])


def _matched(
    pairs: Sequence[Pair], top: set[int], seed: int, tokens: Mapping[str, int]
) -> set[int]:
    """Nearest neighbours of the top pairs in length, without replacement.

    Top pairs themselves are taken only once all others are used up.
    """
    lengths = np.array([(tokens[p.chosen_id], tokens[p.rejected_id]) for p in pairs], float)
    ids = np.array([p.pair_id for p in pairs])
    free = np.ones(len(pairs), bool)
    free[list(top)] = False
    # The queue is ordered by id before it is shuffled, for the same draw in any row order.
    queue = np.array(sorted(top, key=lambda i: ids[i]))
    taken: set[int] = set()
    for i in queue[np.random.default_rng(seed).permutation(len(queue))]:
        if not free.any():
            free[[j for j in top if j not in taken]] = True
        candidates = np.flatnonzero(free)
        # The distance is the sum of both differences in tokens.
        distance = np.abs(lengths[candidates] - lengths[i]).sum(axis=1)
        nearest = candidates[distance == distance.min()]
        best = int(nearest[np.argmin(ids[nearest])])  # pair ids break ties
        taken.add(best)
        free[best] = False
    return taken
