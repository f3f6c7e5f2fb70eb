"""Which pairs of a pool an arm keeps: all, or some by sample delta, at random, or by length."""

from collections.abc import Mapping, Sequence

import numpy as np

from deltapref_jax.config import ConfigError
from deltapref_jax.records import Pair

DECIMALS = 5
"""Ratings, their sums and deltas that agree so far are tied.

Ratings are stored in float32: 5 - 4.2 and 4.2 - 3.4 are one gap, and their floats differ by 1e-7.
"""


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


def reference_margin(pairs: Sequence[Pair], logprobs: Mapping[str, float]) -> np.ndarray:
    """Log-probability of the chosen trace minus that of the rejected one, nats, [P].

    It is the part of DPO's implicit reward margin, over -beta, that does not change while a policy
    trains: r(c) - r(r) = beta [(log p(c) - log p(r)) - margin] (arXiv 2305.18290, equation 5).
    Selections by a small implicit reward margin (arXiv 2508.04149) take that of a trained policy,
    which this is not: it says how sure the reference is of the chosen trace. A sum over tokens
    falls with length, so that long chosen traces have small margins.

    Args:
      pairs: whose traces are both scored.
      logprobs: trace id to the sum of its tokens' log-probabilities under the reference.
    """
    return np.array([logprobs[p.chosen_id] - logprobs[p.rejected_id] for p in pairs])


def select(
    pairs: Sequence[Pair],
    keep: str,
    k: int,
    seed: tuple[int, int],
    deltas: np.ndarray | None,
    tokens: Mapping[str, int],
) -> tuple[list[Pair], int]:
    """The pairs that an arm trains on, in the order of `pairs`.

    Args:
      pairs: the pool.
      keep: "all", "top" (largest sample delta), "bottom" (smallest), "middle" (around the median),
        "random", or "matched": random pairs with the lengths of the top pairs and the sample delta
        of the pool, so that what "top" gains over it is not due to length.
      k: pairs kept; ignored by "all".
      seed: of the experiment, and the draw. It draws "random" and "matched", and which of the pairs
        that are tied at the cut are kept.
      deltas: that pairs are ranked by, [P]: of `sample_delta` or of `reference_margin`; None where
        nothing is ranked.
      tokens: trace id to length.

    Returns:
      the pairs, and how many are tied, to five decimals, at a cut that keeps some of them and not
      the others.
    """
    if keep == "all":
        return list(pairs), 0
    # Pairs are ordered by id before the draw, so that it does not depend on their row order.
    by_id = np.array(sorted(range(len(pairs)), key=lambda i: pairs[i].pair_id))
    rng = np.random.default_rng(seed)
    shuffled = by_id[rng.permutation(len(pairs))]
    ties = 0
    if keep == "random":
        kept = shuffled[:k]
    else:
        assert deltas is not None
        deltas = np.round(deltas, DECIMALS)
        # The sort is stable, so that equal deltas stay in the order of the draw.
        ranked = shuffled[np.argsort(-deltas[shuffled], kind="stable")]
        first = {"bottom": len(pairs) - k, "middle": (len(pairs) - k) // 2}.get(keep, 0)
        kept = ranked[first : first + k]
        ties = _ties(deltas[ranked], first, first + k)
        if keep == "matched":
            kept, ties = _matched(pairs, deltas, kept, shuffled, rng, tokens), 0
    return [pairs[i] for i in sorted(kept)], ties


def kept_count(pool: int, number: int, fraction: float) -> int:
    """How many pairs of a pool are kept: `number`, or where it is 0 that share of the pool.

    Raises:
      ConfigError: that keeps none, or more than there are.
    """
    k = number or round(fraction * pool)
    if not 1 <= k <= pool:
        if number:
            raise ConfigError(
                f"An arm keeps {number} pairs and the pool has {pool}; keep fewer, or use more "
                "prompts."
            )
        raise ConfigError(
            f"A fraction of {fraction:g} keeps {k} of {pool} pairs; it must keep at least one and "
            "no more than there are."
        )
    return k


def _ties(ranked: np.ndarray, first: int, last: int) -> int:
    """Pairs that are tied at an end of ranked[first:last] with pairs beyond it."""
    cut = {
        ranked[inside]
        for inside, outside in ((first, first - 1), (last - 1, last))
        if 0 <= outside < len(ranked) and ranked[inside] == ranked[outside]
    }
    return int(np.isin(ranked, list(cut)).sum())


def _matched(
    pairs: Sequence[Pair],
    deltas: np.ndarray,
    top: np.ndarray,
    shuffled: np.ndarray,
    rng: np.random.Generator,
    tokens: Mapping[str, int],
) -> np.ndarray:
    """Pairs of the whole pool with the lengths of the top pairs and the deltas of the pool.

    Every top pair is served by the free pair that is nearest to its two lengths and to a delta
    drawn from the pool, in standard deviations. Deltas weigh more and more, until the mean delta
    is within a twentieth of a standard deviation of the pool's.

    Args:
      pairs: the pool.
      deltas: sample delta of every pair, [P].
      top: indices of the top pairs, [k].
      shuffled: all indices in an order that does not depend on the rows'.
      rng: of the drawn deltas.
      tokens: trace id to length.
    """
    lengths = np.array([(tokens[p.chosen_id], tokens[p.rejected_id]) for p in pairs], float)
    lengths /= np.maximum(lengths.std(axis=0), 1e-9)
    spread = max(float(deltas.std()), 1e-9)
    k = len(top)
    # Quantiles in the middle of k equal shares have the pool's mean with the least noise.
    targets = rng.permutation(np.quantile(deltas, (np.arange(k) + 0.5) / k))
    best, nearest = top, np.inf
    for weight in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        chosen = _nearest(lengths, deltas, top, targets, shuffled, weight / spread)
        apart = abs(float(deltas[chosen].mean() - deltas.mean())) / spread
        if apart < nearest:
            best, nearest = chosen, apart
        if apart < 0.05:
            break
    return best


def _nearest(
    lengths: np.ndarray,
    deltas: np.ndarray,
    top: np.ndarray,
    targets: np.ndarray,
    shuffled: np.ndarray,
    weight: float,
) -> np.ndarray:
    """Nearest neighbours without replacement, in the order of `top`; the draw breaks ties."""
    free, taken = shuffled, []
    for i, target in zip(top, targets, strict=True):
        distance = np.abs(lengths[free] - lengths[i]).sum(axis=1)
        place = int(np.argmin(distance + weight * np.abs(deltas[free] - target)))
        taken.append(free[place])
        free = np.delete(free, place)
    return np.array(taken)
