"""Next-token draws: one uniform variate per row, filters without a sort, a blocked inverse CDF.

A row's uniform is a function of (seed, generator, prompt, sample, position) alone, so a trace does
not depend on slot, batch, order or shard. The filters keep every token at or above a threshold that
bisection finds, without a sort over the vocabulary; inverting the CDF takes one uniform per row
instead of one Gumbel variate per token.

On a mesh, every device draws for its rows from its shard of the vocabulary:

    vocabulary   | device 0 of `tensor` | device 1 of `tensor` |
    blocks       | b0 | b1 | b2 | b3    | b4 | b5 | b6 | b7    |

The sums of all blocks are exchanged, about √V numbers per row, and everything after that is equal
on all devices. Blocks do not depend on the number of devices and no shard cuts one (`block_size`),
so that equal logits give equal bits on any mesh.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from deltapref_jax.models.sharding import ROWS

_SHARDS = 8
"""Blocks divide a shard of the vocabulary for this number of shards and its divisors: a host has at
most eight TPU chips or GPUs, as a rule."""


class Vocabulary(NamedTuple):
    """The part of a vocabulary that a device holds."""

    size: int  # V, of all devices
    axis: str | None = None  # the mesh axis over which it is split; None: this device holds all


def request_keys(
    seed: int, generator: str, prompts: Sequence[str], samples: Sequence[int]
) -> UInt32[np.ndarray, "n 2"]:
    """Returns the raw threefry keys of n traces.

    Args:
      seed: seed of the experiment.
      generator: identity of the generator, hexadecimal (16 digits are used).
      prompts: prompt id of each trace, hexadecimal (16 digits are used).
      samples: index of each trace among those of its prompt.
    """
    # Five words a trace: two of the generator, two of the prompt and the sample's number.
    words = np.array(
        [_words(generator) + _words(p) + (s,) for p, s in zip(prompts, samples, strict=True)],
        np.uint32,
    )
    # Padding to a power of two keeps the number of compiled shapes small.
    padded = np.zeros((1 << max(8, (len(words) - 1).bit_length()), 5), np.uint32)
    # The reshape gives no traces at all the shape [0, 5].
    padded[: len(words)] = words.reshape(-1, 5)
    # The implementation is named, because the draws must not depend on JAX's default generator.
    return np.asarray(_fold(jax.random.key(seed, impl="threefry2x32"), padded))[: len(words)]


def _words(digest: str) -> tuple[int, int]:
    """Returns the first 64 bits of a digest as two 32-bit words."""
    number = int(digest[:16], 16)
    return number >> 32, number & 0xFFFFFFFF


@jax.jit
def _fold(key: Array, words: UInt32[Array, "n 5"]) -> UInt32[Array, "n 2"]:
    """Folds the words of each row into the key, one after another."""

    def fold_row(row: Array) -> Array:
        folded = key
        for word in row:
            # The order of the words is part of the draws and must not change.
            folded = jax.random.fold_in(folded, word)
        return jax.random.key_data(folded)

    return jax.vmap(fold_row)(words)


def uniforms(keys: UInt32[Array, "B 2"], positions: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns a uniform in [0, 1) per row, a multiple of 2^-23.

    Args:
      keys: `request_keys` of the rows' traces.
      positions: index in its trace of the token to draw.
    """

    def uniform(key: Array, position: Array) -> Array:
        # The position is folded in last, so a trace's key serves all of its tokens.
        return jax.random.uniform(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        )

    return jax.vmap(uniform)(keys, positions)


def block_size(vocab: int) -> int:
    """Returns the number of entries of a block, about √V.

    It divides V / 8 where a divisor of about that size exists, so that shards hold whole blocks.
    """
    wanted = 1 << (max(vocab - 1, 1).bit_length() + 1) // 2
    if vocab % _SHARDS:
        return wanted
    shard = vocab // _SHARDS
    near = [n for n in range(-(-wanted // 4), 4 * wanted + 1) if shard % n == 0]
    return min(near, key=lambda n: max(n / wanted, wanted / n), default=wanted)


def draw(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
    top_k: Int[Array, " B"],
    filtered: bool,
    mesh: Mesh | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row by inverting the cumulative distribution over ids in ascending order.

    Args:
      logits: float32.
      uniform: uniform variates in [0, 1).
      temperature: 0 takes the largest logit, and the lowest id among equal ones.
      top_p: nucleus mass after top-k (arXiv 1904.09751); 1 turns the filter off.
      top_k: number of tokens kept; 0 turns the filter off.
      filtered: static; False skips the work of the filters, which must then be off in every row.
      mesh: rows lie over data and fsdp, the vocabulary over tensor if it divides; None means one
        device.

    Returns:
      tokens: the ids drawn.
      logprobs: their log-probabilities in nats, under the unfiltered logits at temperature 1.
    """
    size = logits.shape[-1]
    if mesh is None or mesh.size == 1:
        return _draw(logits, uniform, temperature, top_p, top_k, filtered, Vocabulary(size))
    divides = mesh.shape["tensor"] > 1 and size % mesh.shape["tensor"] == 0
    axis = "tensor" if divides else None
    return jax.shard_map(
        functools.partial(_draw, filtered=filtered, vocabulary=Vocabulary(size, axis)),
        mesh=mesh,
        in_specs=(PartitionSpec(*ROWS, axis), ROWS, ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        check_vma=False,
    )(logits, uniform, temperature, top_p, top_k)


def _draw(
    logits: Array,
    uniform: Array,
    temperature: Array,
    top_p: Array,
    top_k: Array,
    filtered: bool,
    vocabulary: Vocabulary,
) -> tuple[Array, Array]:
    """`draw` of a device's rows from its part of the vocabulary."""
    # Logits are taken relative to the largest, so that no exponential overflows.
    gap = _largest(jnp.max(logits, axis=-1), vocabulary)[:, None] - logits
    greedy = (temperature == 0)[:, None]
    # Greedy rows are the limit of temperature 0: weight 1 at the largest logit, 0 elsewhere. The
    # inner `where` keeps a division by 0 out of them.
    scaled = jnp.where(
        greedy,
        jnp.where(gap == 0, 0.0, jnp.inf),
        gap / jnp.where(greedy, 1.0, temperature[:, None]),
    )
    weights = jnp.exp(-scaled)
    if filtered:
        weights = jnp.where(nucleus(gap, weights, top_p, top_k, vocabulary), weights, 0.0)
    # A uniform of 0 takes the first of equal largest logits.
    token, token_gap = invert(weights, jnp.where(temperature == 0, 0.0, uniform), gap, vocabulary)
    # The log-probability is of the unfiltered logits at temperature 1: logits minus log-sum-exp,
    # both relative to the largest logit.
    return token, -token_gap - jnp.log(_total(jnp.exp(-gap), vocabulary))


def _largest(x: Array, vocabulary: Vocabulary) -> Array:
    return jax.lax.pmax(x, vocabulary.axis) if vocabulary.axis else x


def _smallest(x: Array, vocabulary: Vocabulary) -> Array:
    return jax.lax.pmin(x, vocabulary.axis) if vocabulary.axis else x


def _blocks(x: Float[Array, "B W"], vocabulary: Vocabulary) -> Float[Array, "B n E"]:
    """Returns the entries of a device in blocks, the last one padded with zeros."""
    size = block_size(vocabulary.size)
    return jnp.pad(x, ((0, 0), (0, -x.shape[-1] % size))).reshape(x.shape[0], -1, size)


def _block_sums(blocks: Float[Array, "B n E"], vocabulary: Vocabulary) -> Float[Array, "B N"]:
    """Returns the sums of the blocks of all devices, on every device."""
    # Without the barrier XLA would merge this sum and the one over blocks into one, whose rounding
    # is another.
    sums = jax.lax.optimization_barrier(jnp.sum(blocks, axis=-1))
    if not vocabulary.axis:
        return sums
    return jax.lax.all_gather(sums, vocabulary.axis, axis=1, tiled=True)


def _total(x: Float[Array, "B W"], vocabulary: Vocabulary) -> Float[Array, " B"]:
    """Returns the sum of a row, whose rounding does not depend on the number of devices."""
    return jnp.sum(_block_sums(_blocks(x, vocabulary), vocabulary), axis=-1)


def nucleus(
    gap: Float[Array, "B W"],
    weights: Float[Array, "B W"],
    top_p: Float[Array, " B"],
    top_k: Int[Array, " B"],
    vocabulary: Vocabulary,
) -> Bool[Array, "B W"]:
    """Returns the tokens kept by top-k and then by top-p, over the mass that top-k left.

    Tokens of equal logits are kept or dropped together, so ties at the threshold are all kept. The
    most probable token is always kept.

    Args:
      gap: largest logit minus each logit, ≥ 0; of the tokens that the device holds.
      weights: unnormalised probabilities, not increasing in `gap`.
      top_p: share of the mass that the kept tokens must hold at least.
      top_k: number of tokens kept, more with ties; 0 keeps all.
      vocabulary: the part that the device holds.
    """
    count = jnp.where((top_k <= 0) | (top_k >= vocabulary.size), 0, top_k)  # 0 turns top-k off
    # Top-k is the smallest gap that collects a mass of k where every token weighs 1.
    needed = count.astype(jnp.float32)
    top_k_gap = smallest_gap(gap, jnp.ones_like(gap), needed, count == 0, vocabulary)
    kept = gap <= top_k_gap[:, None]
    # Top-p is a share of the mass that top-k left, so removed tokens weigh 0 from here.
    weights = jnp.where(kept, weights, 0.0)
    needed = top_p * _total(weights, vocabulary)
    return kept & (gap <= smallest_gap(gap, weights, needed, top_p >= 1, vocabulary)[:, None])


def smallest_gap(
    gap: Float[Array, "B W"],
    weights: Float[Array, "B W"],
    need: Float[Array, " B"],
    off: Bool[Array, " B"],
    vocabulary: Vocabulary,
) -> Float[Array, " B"]:
    """Returns the smallest g for which the weights of tokens with gap ≤ g sum to at least `need`.

    It is infinity where `off`. The search bisects the bit patterns of `gap` (for floats ≥ 0 they
    are ordered like the numbers) and moves both ends to values that occur in the row. So it ends at
    the exact value, after about ten rounds and never more than 32.
    """
    bits = jax.lax.bitcast_convert_type(gap, jnp.int32)
    top = _largest(jnp.max(bits, axis=-1), vocabulary)

    def unfinished(ends: tuple[Array, Array]) -> Array:
        return jnp.any(ends[0] < ends[1])

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # both occur in the row, and the answer is between them
        # The midpoint as low + half the distance, because low + high would overflow int32.
        middle = low + (high - low) // 2
        below = bits <= middle[:, None]
        enough = _total(jnp.where(below, weights, 0.0), vocabulary) >= need
        largest_below = _largest(jnp.max(jnp.where(below, bits, 0), axis=-1), vocabulary)
        above = jnp.where(below, jnp.iinfo(jnp.int32).max, bits)
        smallest_above = _smallest(jnp.min(above, axis=-1), vocabulary)
        # Where the mass is not enough, the next value that occurs above is the new lower end.
        new_low = jnp.where(enough, low, jnp.minimum(smallest_above, high))
        new_high = jnp.where(enough, largest_below, high)
        # Rows that are done wait for the others.
        return jnp.where(low < high, new_low, low), jnp.where(low < high, new_high, high)

    # Rows whose filter is off begin with both ends equal, so that they are done at once.
    bottom = jnp.where(off, top, 0)
    _, high = jax.lax.while_loop(unfinished, halve, (bottom, top))
    return jnp.where(off, jnp.inf, jax.lax.bitcast_convert_type(high, jnp.float32))


def invert(
    weights: Float[Array, "B W"],
    uniform: Float[Array, " B"],
    gap: Float[Array, "B W"],
    vocabulary: Vocabulary,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns the first id whose cumulative weight exceeds uniform * total, and its gap.

    It is never an id of weight 0. Two levels of about √V entries each replace a cumulative sum over
    the whole vocabulary.
    """
    blocks = _blocks(weights, vocabulary)
    sums, (_, held, size) = _block_sums(blocks, vocabulary), blocks.shape
    # The target is relative to the sum of the block sums that are searched, not to another
    # summation of the weights, which could round differently.
    target = uniform * jnp.sum(sums, axis=-1)
    block, before = _first_above(sums, target)
    # The block among those of its device, whose shard begins at `first`.
    device, block = block // held, block % held
    first = device * weights.shape[-1]
    entries = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    index = block * size + _first_above(entries, target - before)[0]
    token, token_gap = first + index, jnp.take_along_axis(gap, index[:, None], axis=-1)[:, 0]
    if not vocabulary.axis:
        return token, token_gap
    # One device holds the block of a row; the others searched a block of theirs for nothing.
    mine = device == jax.lax.axis_index(vocabulary.axis)
    return jax.lax.psum(
        (jnp.where(mine, token, 0), jnp.where(mine, token_gap, 0.0)), vocabulary.axis
    )


def _first_above(weights: Float[Array, "B n"], target: Float[Array, " B"]) -> tuple[Array, Array]:
    """Returns the first index whose cumulative weight exceeds `target`, and the weight before it.

    Where rounding leaves no such index, it is the last index of positive weight.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(cumulative <= target[:, None], axis=-1)
    # The last positive weight: padding and filtered tokens must not be drawn.
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(index, last).astype(jnp.int32)
    before = jnp.take_along_axis(jnp.pad(cumulative, ((0, 0), (1, 0))), index[:, None], axis=-1)[
        :, 0
    ]
    return index, before
