"""Which pairs of a pool an arm keeps: all, the widest by rating, as many at random, or as many of matched length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltapref_jax.config import ConfigError

Row = dict[str, Any]


def sample_delta(pairs: Sequence[Row], dimension: int | None) -> np.ndarray:
    """Chosen minus rejected rating of every pair, [P]; `dimension` is an index into the ratings, None their sum."""

    def value(ratings: Sequence[float] | None) -> float:
        if ratings is None:
            raise ConfigError(
                "A pair has no ratings to select by; name a judge that rated both of its generators."
            )
        return float(sum(ratings)) if dimension is None else float(ratings[dimension])

    return np.array([value(p["chosen_rating"]) - value(p["rejected_rating"]) for p in pairs])


def _kept(pairs: Sequence[Row], fraction: float) -> int:
    k = round(fraction * len(pairs))
    if not 1 <= k <= len(pairs):
        raise ConfigError(
            f"A fraction of {fraction:g} keeps {k} of {len(pairs)} pairs; it must keep at least one and "
            "no more than there are."
        )
    return k


def top(pairs: Sequence[Row], deltas: np.ndarray, k: int) -> list[int]:
    """Indices of the k widest; equal gaps are ordered by pair id, so that row order does not matter."""
    return sorted(sorted(range(len(pairs)), key=lambda i: (-deltas[i], pairs[i]["pair_id"]))[:k])


def select(
    pairs: Sequence[Row],
    keep: str,
    fraction: float,
    seed: int,
    dimension: int | None,
    tokens: Mapping[str, int],
) -> list[Row]:
    """The pairs that an arm trains on, in the order of `pairs`.

    Args:
      pairs: rows of `records.PAIR`.
      keep: "all", "top" (widest sample delta), "random", or "matched": as many pairs as "top", drawn among the others
        where possible, each the nearest in (chosen tokens, rejected tokens) to one of the top pairs. It has the top
        set's lengths without its ratings: what "top" gains over it is not due to length.
      fraction: of the pool that is kept; ignored by "all".
      seed: of "random", and of the order in which "matched" serves the top pairs.
      dimension: that "top" and "matched" rank by; None is the sum.
      tokens: trace id to length.

    Raises:
      ConfigError: the fraction keeps nothing, or ratings are missing.
    """
    if keep == "all":
        return list(pairs)
    k = _kept(pairs, fraction)
    if keep == "random":
        by_id = sorted(range(len(pairs)), key=lambda i: pairs[i]["pair_id"])
        chosen = {by_id[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:k]}
        return [p for i, p in enumerate(pairs) if i in chosen]
    widest = top(pairs, sample_delta(pairs, dimension), k)
    if keep == "top":
        return [pairs[i] for i in widest]
    return [pairs[i] for i in sorted(_matched(pairs, widest, seed, tokens))]


def _matched(
    pairs: Sequence[Row], widest: Sequence[int], seed: int, tokens: Mapping[str, int]
) -> set[int]:
    """Nearest neighbours in length, without replacement; top pairs themselves only once the others are used up."""
    lengths = np.array([(tokens[p["chosen_id"]], tokens[p["rejected_id"]]) for p in pairs], float)
    ids = np.array([p["pair_id"] for p in pairs])
    free = np.ones(len(pairs), bool)
    free[list(widest)] = False
    rest = sorted(widest, key=lambda i: ids[i])
    taken: set[int] = set()
    for i in np.array(rest)[np.random.default_rng(seed).permutation(len(rest))]:
        if not free.any():
            free[[j for j in widest if j not in taken]] = True
        candidates = np.flatnonzero(free)
        distance = np.abs(lengths[candidates] - lengths[i]).sum(axis=1)
        nearest = candidates[distance == distance.min()]
        best = int(nearest[np.argmin(ids[nearest])])
        taken.add(best)
        free[best] = False
    return taken
