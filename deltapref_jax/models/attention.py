"""Who sees whom, which tiles of a row that reaches, and rotary positions.

A packed row holds several segments; a segment may hold a trunk (branch 0) and branches that share it but not each
other:

    tokens     p p p t t t | q q t t a a b b | .
    segments   1 1 1 1 1 1 | 2 2 2 2 2 2 2 2 | 0      (0: padding)
    branches   0 0 0 0 0 0 | 0 0 0 0 1 1 2 2 | 0
    positions  0 1 2 3 4 5 | 0 1 2 3 4 5 4 5 | 0

A branch is one run of tokens, as a segment is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_mask(
    segments: Int[Array, "B L"], branches: Int[Array, "B L"] | None = None
) -> Bool[Array, "B L L"]:
    """True where query (axis 1) may see key (axis 2): same segment, not later, and in the trunk or the same branch."""
    length = segments.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(
        jnp.ones((length, length), bool)
    )
    if branches is not None:
        mask &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return mask


def until(
    segments: Int[Array, "B L"], branches: Int[Array, "B L"] | None = None
) -> Int[Array, "B L"]:
    """`packed_mask` as one integer per key: query i sees key j where j <= i < until[j].

    The end of the key's segment, in a branch that of the branch: FlashMask's column-wise mask (arXiv 2410.01359). Here
    padding sees itself, so that every query has a key.

    Args:
      segments: one run each; 0 is padding.
      branches: one run each within a segment; the trunk may lie anywhere. None where there are none.
    """
    column = jnp.arange(segments.shape[1])

    def end(x: Array) -> Array:  # of the token's run of equal numbers
        last = jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        return jax.lax.cummin(jnp.where(last, column + 1, segments.shape[1]), axis=1, reverse=True)

    found = end(segments)
    if branches is not None:
        found = jnp.where(branches > 0, jnp.minimum(found, end(branches)), found)
    return jnp.where(segments > 0, found, column + 1)


class Reach(NamedTuple):
    """Query tile i meets keys of tiles first[i] up to but not including end[i], but none of gap[i] to back[i] - 1.

    tiles of a segment               p p a a b b     its trunk and two branches
    visited by queries of the last   x x . . x x     first 0, gap 2, back 4, end 6
    """

    first: Any
    gap: Any
    back: Any
    end: Any

    def visits(self) -> tuple[Any, Callable[[Any], Any]]:
        """How many tiles of keys these are, and which one comes at a turn."""
        hole = self.back - self.gap
        return (
            self.end - self.first - hole,
            lambda turn: self.first + turn + jnp.where(self.first + turn >= self.gap, hole, 0),
        )


def reach(until: Int[Array, "B L"], columns: Int[Array, "t C"]) -> Reach:
    """The tiles that hold a key and a query who see each other (exactly these, where `columns` are runs).

    Args:
      until: of the keys, in tiles of C (L = T · C); 0: seen by nobody.
      columns: of the queries, tile by tile.

    Returns:
      Each [B, t]; without branches gap = back = end.
    """
    tile = columns.shape[1]
    low, high = columns.min(axis=1)[:, None], columns.max(axis=1)[:, None]
    ends = jnp.max(until.reshape(until.shape[0], 1, -1, tile), axis=3)
    j = jnp.arange(ends.shape[2])
    seen, end = (j * tile <= high) & (low < ends), high // tile + 1

    def least(among: Array) -> Array:
        return jnp.min(jnp.where(among, j, end), axis=2)

    first = least(seen)
    gap = least(~seen & (j > first[..., None]))
    return Reach(
        first, gap, least(seen & (j >= gap[..., None])), jnp.broadcast_to(end[:, 0], first.shape)
    )


def last(until: Int[Array, "B L"], tile: int) -> Int[Array, "B T"]:
    """Keys of tile j of whole rows are seen by queries of tiles j to last[j]."""
    return (jnp.max(until.reshape(until.shape[0], -1, tile), axis=2) - 1) // tile


def rotation(positions: Int[Array, "B L"], head_width: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines [B, L, 1, H/2], float32 (RoFormer, arXiv 2104.09864; half-split layout of Llama)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L N H"], rotations: tuple[Array, Array]) -> Float[Array, "B L N H"]:
    """Applies `rotation` to queries or keys; computes in float32, returns the dtype of `x`."""
    cos, sin = rotations
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, the portable path: softmax in float32, memory B·N·T·S."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def attend_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """`attend` over a cache whose keys and values already lie as the two products read them: nothing is transposed."""
    B, T, N, H = q.shape
    K = k.shape[1]
    q = jnp.moveaxis(q.reshape(B, T, K, -1, H), 1, 2).reshape(B, K, -1, H)  # m = T · N/K
    scores = jnp.einsum("bkmh,bkhs->bkms", q, k, preferred_element_type=jnp.float32) * H**-0.5
    mask = jnp.repeat(mask, N // K, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(q.dtype)
    attended = jnp.einsum("bkms,bksh->bkmh", weights, v).reshape(B, K, T, -1, H)
    return jnp.moveaxis(attended, 2, 1).reshape(B, T, N, H)
