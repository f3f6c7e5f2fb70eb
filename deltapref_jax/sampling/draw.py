"""Next-token draws: one uniform per row, sort-free filters, a blocked inverse-CDF.

A row's uniform comes from (seed, generator, prompt, sample, position) and from nothing else, so a trace does not depend
on slot, batch, order or shard. Filters keep every token at or above a threshold found by bisection: no sort over the
vocabulary, and one uniform per row instead of one Gumbel variate per token.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32


def request_keys(
    seed: int, generator: str, prompts: Sequence[str], samples: Sequence[int]
) -> UInt32[np.ndarray, "n 2"]:
    """Raw threefry keys of n traces.

    Args:
      seed: of the experiment.
      generator: identity of the generator, hexadecimal (16 digits are used).
      prompts: prompt ids, hexadecimal (16 digits are used).
      samples: index of each trace among those of its prompt.
    """
    words = np.array(
        [_words(generator) + _words(p) + (s,) for p, s in zip(prompts, samples, strict=True)],
        np.uint32,
    )
    padded = np.zeros(
        (1 << max(8, (len(words) - 1).bit_length()), 5), np.uint32
    )  # few compiled shapes
    padded[: len(words)] = words.reshape(-1, 5)
    return np.asarray(_fold(jax.random.key(seed, impl="threefry2x32"), padded))[: len(words)]


def _words(digest: str) -> tuple[int, int]:
    number = int(digest[:16], 16)
    return number >> 32, number & 0xFFFFFFFF


@jax.jit
def _fold(key: Array, words: UInt32[Array, "n 5"]) -> UInt32[Array, "n 2"]:
    def one(row: Array) -> Array:
        folded = key
        for word in row:
            folded = jax.random.fold_in(folded, word)
        return jax.random.key_data(folded)

    return jax.vmap(one)(words)


def uniforms(keys: UInt32[Array, "B 2"], positions: Int[Array, " B"]) -> Float[Array, " B"]:
    """One uniform in [0, 1) per row (multiples of 2^-23), for the token at `positions` of each row's trace."""

    def one(key: Array, position: Array) -> Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        )

    return jax.vmap(one)(keys, positions)


def draw(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
    top_k: Int[Array, " B"],
    filtered: bool,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row by inverting the cumulative distribution over ids in ascending order.

    Args:
      logits: float32.
      uniform: in [0, 1).
      temperature: 0 takes the largest logit, the lowest id among equals.
      top_p: nucleus mass after top-k (arXiv 1904.09751); 1 is off.
      top_k: tokens kept; 0 is off.
      filtered: static; False promises that top-p and top-k are off in every row, and skips their work.

    Returns:
      ids, and the log-probabilities of these ids under `logits` unfiltered at temperature 1, in nats.
    """
    gap = jnp.max(logits, axis=-1, keepdims=True) - logits
    greedy = (temperature == 0)[:, None]
    scaled = jnp.where(
        greedy,
        jnp.where(gap == 0, 0.0, jnp.inf),
        gap / jnp.where(greedy, 1.0, temperature[:, None]),
    )
    weights = jnp.exp(-scaled)
    if filtered:
        weights = jnp.where(nucleus(gap, weights, top_p, top_k), weights, 0.0)
    token = invert(weights, jnp.where(temperature == 0, 0.0, uniform))
    chosen = jnp.take_along_axis(gap, token[:, None], axis=-1)[:, 0]
    return token, -chosen - jnp.log(jnp.sum(jnp.exp(-gap), axis=-1))


def nucleus(
    gap: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    top_p: Float[Array, " B"],
    top_k: Int[Array, " B"],
) -> Bool[Array, "B V"]:
    """Tokens kept by top-k and then by top-p over what top-k left.

    Tokens of equal logit stand or fall together, so ties at the border are all kept. The most probable stays always.

    Args:
      gap: largest logit minus each logit, ≥ 0.
      weights: unnormalised probabilities, not increasing in `gap`.
      top_p: smallest share of the mass that the kept tokens hold together.
      top_k: number of tokens kept, more with ties; 0 keeps all.
    """
    vocab = gap.shape[-1]
    wanted = jnp.where((top_k <= 0) | (top_k >= vocab), 0, top_k)  # 0: off
    kept = (
        gap
        <= smallest_enough(gap, jnp.ones_like(gap), wanted.astype(jnp.float32), wanted == 0)[
            :, None
        ]
    )
    weights = jnp.where(kept, weights, 0.0)
    return kept & (
        gap <= smallest_enough(gap, weights, top_p * jnp.sum(weights, axis=-1), top_p >= 1)[:, None]
    )


def smallest_enough(
    gap: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    need: Float[Array, " B"],
    off: Bool[Array, " B"],
) -> Float[Array, " B"]:
    """The smallest g for which the weights of tokens with gap ≤ g sum to `need` or more; infinity where `off`.

    Bisects over the bits of `gap` (for floats ≥ 0 their order is the order of the numbers) and snaps both ends to
    numbers that occur, so it ends at the exact number, after about ten rounds and never more than 32.
    """
    bits = jax.lax.bitcast_convert_type(gap, jnp.int32)
    top = jnp.max(bits, axis=-1)

    def unfinished(ends: tuple[Array, Array]) -> Array:
        return jnp.any(ends[0] < ends[1])

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # both occur in the row; the answer is between them
        middle = low + (high - low) // 2
        below = bits <= middle[:, None]
        enough = jnp.sum(jnp.where(below, weights, 0.0), axis=-1) >= need
        largest_below = jnp.max(jnp.where(below, bits, 0), axis=-1)
        smallest_above = jnp.min(jnp.where(below, jnp.iinfo(jnp.int32).max, bits), axis=-1)
        moved = (
            jnp.where(enough, low, jnp.minimum(smallest_above, high)),
            jnp.where(enough, largest_below, high),
        )
        return jnp.where(low < high, moved[0], low), jnp.where(low < high, moved[1], high)

    start = jnp.where(off, top, 0)
    _, high = jax.lax.while_loop(unfinished, halve, (start, top))
    return jnp.where(off, jnp.inf, jax.lax.bitcast_convert_type(high, jnp.float32))


def invert(weights: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first id whose cumulative weight exceeds uniform · total; never one of weight 0.

    Two levels of about √V entries each stand in for a cumulative sum over the whole vocabulary.
    """
    vocab = weights.shape[-1]
    block = 1 << (max(vocab - 1, 1).bit_length() + 1) // 2
    padded = jnp.pad(weights, ((0, 0), (0, -vocab % block))).reshape(weights.shape[0], -1, block)
    sums = jnp.sum(padded, axis=-1)
    target = uniform * jnp.sum(sums, axis=-1)
    chosen, before = _first_above(sums, target)
    inside = jnp.take_along_axis(padded, chosen[:, None, None], axis=1)[:, 0]
    return chosen * block + _first_above(inside, target - before)[0]


def _first_above(weights: Float[Array, "B n"], target: Float[Array, " B"]) -> tuple[Array, Array]:
    """First index whose cumulative weight exceeds `target`, and the cumulative weight before it.

    Where rounding leaves no such index, the last one of positive weight.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(cumulative <= target[:, None], axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(index, last).astype(jnp.int32)
    before = jnp.take_along_axis(jnp.pad(cumulative, ((0, 0), (1, 0))), index[:, None], axis=-1)[
        :, 0
    ]
    return index, before
