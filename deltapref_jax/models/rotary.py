"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the half-split layout of Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(
    positions: Int[Array, "B L"], head_width: int, theta: float
) -> tuple[Array, Array]:
    """Returns the cosines and sines of the rotation angles, each [B, L, 1, H/2] in float32.

    Dimension pair i of a head turns by position * theta^(-2i / H).
    """
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    # Angles are float32, because bfloat16 holds no odd integer above 256.
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "B L N H"], angles: tuple[Array, Array]
) -> Float[Array, "B L N H"]:
    """Rotates queries or keys by `rotary_angles`, in float32; returns the dtype of `x`.

    Dimension i of a head is paired with dimension i + H/2 (half-split), not with its neighbour.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
