"""The exact judge: a program rates traces of synthetic problems, with normal noise added.

The synthetic world knows the right value of every step, so these ratings are the ground truth that
model judges are compared with.
"""

import numpy as np

from deltapref_jax.config import DIMENSIONS
from deltapref_jax.judging.scorer import Ratings
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.world import from_meta


def rate_exactly(
    metas: list[str],
    traces: list[str],
    trace_ids: list[str],
    dimensions: tuple[str, ...],
    noise: float,
    seed: int,
) -> Ratings:
    """Rates by `synthetic.rate` plus normal noise, clipped to 1 to 5.

    The noise is a function of (seed, trace, dimension) alone. The distribution puts its mass on the
    two labels around the rating, so that its expectation is the rating.

    Args:
      metas: `world.meta` of each trace's problem.
      traces: texts to rate.
      trace_ids: id of each trace, hexadecimal.
      dimensions: dimensions of `config.DIMENSIONS`.
      noise: standard deviation of the noise, on the scale of 1 to 5.
      seed: seed of the noise.
    """
    ratings = np.zeros((len(traces), len(dimensions)))
    for i, (meta, trace, trace_id) in enumerate(zip(metas, traces, trace_ids, strict=True)):
        exact = rate(from_meta(meta), trace)
        # Noise for all dimensions is drawn, so that it does not depend on which are asked for.
        draws = np.random.default_rng([seed, int(trace_id, 16)]).normal(0.0, 1.0, len(DIMENSIONS))
        ratings[i] = [
            np.clip(exact[d] + noise * draws[DIMENSIONS.index(d)], 1, 5) for d in dimensions
        ]
    # At most 4, so that a rating of 5 is label 4 with mass 0 and label 5 with mass 1.
    lower = np.minimum(np.floor(ratings), 4)
    upper_share = ratings - lower  # probability of the label lower + 1
    distribution = np.zeros((*ratings.shape, 5))
    lower_index = (lower - 1).astype(int)[..., None]
    np.put_along_axis(distribution, lower_index, (1 - upper_share)[..., None], axis=-1)
    np.put_along_axis(distribution, lower_index + 1, upper_share[..., None], axis=-1)
    # The standard deviation of a distribution on two labels at distance 1.
    spread = np.sqrt(upper_share * (1 - upper_share))
    return Ratings(ratings, spread, np.ones_like(ratings), distribution)
