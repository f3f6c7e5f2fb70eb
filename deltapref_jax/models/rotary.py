"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the half-split layout of Llama."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltapref_jax.models.spec import Rope


def rotary_angles(
    positions: Int[Array, "B L"],
    rope: Rope | None,
    head_width: int,
    lengths: Int[Array, "B L"] | None = None,
) -> tuple[Array, Array]:
    """Returns the cosines and sines of the rotation angles, each [B, L, 1, W/2] in float32.

    W is the number of rotated dimensions of a head. Without rotary embeddings (`rope` None) all
    angles are 0.

    Args:
      positions: position of each token in its own sequence.
      rope: the frequencies.
      head_width: H.
      lengths: tokens of each token's sequence. LongRoPE chooses its factors by them, sequence by
        sequence, so that a sequence's numbers never depend on its neighbours; `transformers`
        chooses by the longest sequence of a batch. None means that `rope` has one list of factors.
    """
    width = (rope.width if rope else 0) or head_width
    if rope is None:
        shape = (*positions.shape, 1, width // 2)
        return jnp.ones(shape), jnp.zeros(shape)
    frequencies = rope.theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if rope.factors:
        frequencies = frequencies * jnp.asarray(rope.factors, jnp.float32)
    # Angles are float32, because bfloat16 holds no odd integer above 256.
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    if rope.long_factors and lengths is not None:
        # The ratio of long to short factors; the plain frequencies are in `angles` already.
        ratio = jnp.asarray(rope.long_factors, jnp.float32) / jnp.asarray(rope.factors, jnp.float32)
        angles = jnp.where((lengths > rope.original)[..., None, None], angles * ratio, angles)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.scale == 1 else (cos * rope.scale, sin * rope.scale)


def segment_lengths(positions: Int[Array, "B L"], segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns, for each token, the length of its sequence: its segment's last position plus 1."""

    def row(positions: Array, segments: Array) -> Array:
        longest = jax.ops.segment_max(positions, segments, num_segments=positions.shape[0] + 1)
        return longest[segments] + 1

    return jax.vmap(row)(positions, segments)


def apply_rotary(
    x: Float[Array, "B L N H"], angles: tuple[Array, Array]
) -> Float[Array, "B L N H"]:
    """Rotates queries or keys by `rotary_angles`, in float32; returns the dtype of `x`.

    Dimension i of the rotated part of a head is paired with dimension i + W/2 (half-split), not
    with its neighbour; the dimensions behind the first W pass as they are.
    """
    cos, sin = angles
    width = 2 * cos.shape[-1]
    rotated, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
        x.dtype
    )
    return out if rest is None else jnp.concatenate([out, rest], axis=-1)
