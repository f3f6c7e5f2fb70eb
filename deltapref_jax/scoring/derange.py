"""Mismatched partners for KTO's baseline: every completion once more, behind another prompt."""

from collections.abc import Sequence

import numpy as np

from deltapref_jax.config import ConfigError


def derange(prompt_ids: Sequence[str], seed: int) -> list[int]:
    """For every trace a trace of another prompt, each used once; a pure function of its arguments.

    Traces are put in seeded order with equal prompts next to each other, and shifted by the size of
    the largest group: no trace can meet its own prompt.

    Raises:
      ConfigError: more than half of the traces belong to one prompt, so that no arrangement exists.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompt_ids):
        groups.setdefault(prompt, []).append(i)
    # Whole groups are shuffled, so that equal prompts stay next to each other.
    names = list(groups)
    np.random.default_rng(seed).shuffle(names)
    order = [i for name in names for i in groups[name]]
    shift = max(map(len, groups.values()))
    # A shift of the largest group wraps around into that group itself if it is more than half.
    if 2 * shift > len(order):
        raise ConfigError(
            f"{shift} of {len(order)} traces belong to one prompt, so KTO's baseline cannot pair "
            "every trace with another prompt; use more prompts."
        )
    # A cyclic shift uses every trace once.
    partner = [0] * len(order)
    for place, i in enumerate(order):
        partner[i] = order[(place + shift) % len(order)]
    return partner
