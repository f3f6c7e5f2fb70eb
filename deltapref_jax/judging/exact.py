"""The exact judge: the world knows the truth of every step, so a program rates, with a settable noise."""

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
    """Ratings by `synthetic.rate` plus normal noise of standard deviation `noise`, kept within 1 to 5.

    Noise depends on (seed, trace, dimension) only. The distribution lies on the two labels around the rating, so that
    its expectation is the rating.
    """
    ratings = np.zeros((len(traces), len(dimensions)))
    for i, (meta, trace, trace_id) in enumerate(zip(metas, traces, trace_ids, strict=True)):
        exact = rate(from_meta(meta), trace)
        draws = np.random.default_rng([seed, int(trace_id, 16)]).normal(0.0, 1.0, len(DIMENSIONS))
        ratings[i] = [
            np.clip(exact[d] + noise * draws[DIMENSIONS.index(d)], 1, 5) for d in dimensions
        ]
    low = np.minimum(np.floor(ratings), 4)
    upper = ratings - low
    distribution = np.zeros((*ratings.shape, 5))
    np.put_along_axis(
        distribution, (low - 1).astype(int)[..., None], (1 - upper)[..., None], axis=-1
    )
    np.put_along_axis(distribution, low.astype(int)[..., None], upper[..., None], axis=-1)
    return Ratings(ratings, np.sqrt(upper * (1 - upper)), np.ones_like(ratings), distribution)
