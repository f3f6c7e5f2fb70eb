"""Selections by a function of the user's own, which is named in the config."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltapref_jax.callables import SELECTION, failure, load_callable
from deltapref_jax.config import ConfigError
from deltapref_jax.records import Pair, Prompt, Trace


class Candidate(NamedTuple):
    """A pair of the pool, as a selection sees it. Texts are data, which a model wrote."""

    pair_id: str
    task: str  # of the prompt
    question: str  # text of the prompt's last message
    chosen: str  # texts of the traces
    rejected: str
    chosen_tokens: int
    rejected_tokens: int
    chosen_correct: bool | None
    rejected_correct: bool | None
    chosen_rating: dict[str, float]  # by dimension, of the arm's judge
    rejected_rating: dict[str, float]

    @property
    def gaps(self) -> dict[str, float]:
        """Chosen minus rejected rating by dimension."""
        return {d: r - self.rejected_rating[d] for d, r in self.chosen_rating.items()}


def candidates(
    pairs: Sequence[Pair],
    prompts: Sequence[Prompt],
    traces: Sequence[Trace],
    dimensions: Sequence[str],
) -> list[Candidate]:
    """A candidate for every pair, in their order.

    Args:
      pairs: the pool, with ratings.
      prompts: at least those of the pairs.
      traces: at least those of the pairs.
      dimensions: of the ratings.
    """
    asked = {prompt.prompt_id: prompt for prompt in prompts}
    by_id = {trace.trace_id: trace for trace in traces}

    def rating(values: Sequence[float] | None) -> dict[str, float]:
        return dict(zip(dimensions, values or [], strict=True))

    return [
        Candidate(
            p.pair_id,
            asked[p.prompt_id].task,
            asked[p.prompt_id].question,
            by_id[p.chosen_id].text,
            by_id[p.rejected_id].text,
            by_id[p.chosen_id].tokens,
            by_id[p.rejected_id].tokens,
            p.chosen_correct,
            p.rejected_correct,
            rating(p.chosen_rating),
            rating(p.rejected_rating),
        )
        for p in pairs
    ]


def select_by_function(
    name: str,
    pairs: Sequence[Pair],
    given: Sequence[Candidate],
    k: int,
    wanted: int | None,
    seed: tuple[int, int],
) -> list[Pair]:
    """The pairs that the user's function keeps, in the order of the pool.

    Args:
      name: `module:function`, called with the candidates, k and the seed.
      pairs: the pool, [P].
      given: a candidate of each.
      k: pairs that the arm's fraction or number asks for.
      wanted: how many it must keep; None: as many as it likes, and at least one.
      seed: of the experiment, and the draw.

    Raises:
      ConfigError: the function fails, or returns something else than different indices of the pool,
        or another number of them.
    """
    function = load_callable("keep", name, SELECTION)
    try:
        returned = list(function(list(given), k, seed))
    except Exception as e:  # the user's function may raise any type
        raise failure(name, f"a pool of {len(pairs)} pairs", e) from e
    # Flags of a mask would be read as the indices 0 and 1.
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in returned):
        raise ConfigError(
            f"{name} returned {str(returned[:3])[:80]} …; a selection returns the indices of the "
            "pairs to keep, whole numbers from 0."
        )
    kept = [int(i) for i in returned]
    outside = [i for i in kept if not 0 <= i < len(pairs)]
    if outside or len(set(kept)) < len(kept):
        what = f"the index {outside[0]}" if outside else "an index twice"
        raise ConfigError(
            f"{name} returned {what} for a pool of {len(pairs)} pairs; a selection returns "
            f"different indices from 0 to {len(pairs) - 1}."
        )
    if not kept or (wanted is not None and len(kept) != wanted):
        number = "at least one" if wanted is None else f"{wanted}, by the arm's fraction or pairs,"
        raise ConfigError(
            f"{name} keeps {len(kept)} of {len(pairs)} pairs, and {number} must be kept; return so "
            "many."
        )
    return [pairs[i] for i in sorted(kept)]
