"""Visibility in packed rows: the boolean mask, its one-integer-per-key form, and tile ranges.

A packed row holds several segments. A segment may hold a trunk (branch 0) and branches, which see
the trunk and themselves but not each other:

    tokens     p p p t t t | q q t t a a b b | .
    segments   1 1 1 1 1 1 | 2 2 2 2 2 2 2 2 | 0      (0: padding)
    branches   0 0 0 0 0 0 | 0 0 0 0 1 1 2 2 | 0
    positions  0 1 2 3 4 5 | 0 1 2 3 4 5 4 5 | 0

The tokens of a segment are contiguous, and so are the tokens of a branch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MASKED_SCORE = -1e30
"""Score of a key that a query must not see. It is finite because an online softmax subtracts the
running maximum, and -inf minus -inf is NaN in a tile that holds no visible key for a query."""


def packed_mask(
    segments: Int[Array, "B L"],
    branches: Int[Array, "B L"] | None = None,
    window: int = 0,
    positions: Int[Array, "B L"] | None = None,
) -> Bool[Array, "B L L"]:
    """Returns the mask that is True where a query (axis 1) may see a key (axis 2).

    The key must lie in the query's segment, not later than the query, in the trunk or in the
    query's own branch, and at most window - 1 positions before it.

    Args:
      segments: 1 upward; 0 is padding.
      branches: 0 for the trunk; None where there are none.
      window: positions that a query sees, its own included; 0 means all.
      positions: position of each token in its own sequence; None means that segments have no
        branches, so that a distance in columns is one in positions.
    """
    length = segments.shape[1]
    # The lower triangle is causality: segments are contiguous, so later columns are later tokens.
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(
        jnp.ones((length, length), bool)
    )
    if branches is not None:
        mask &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    if window:
        at = jnp.arange(length)[None] if positions is None else positions
        mask &= at[:, :, None] - at[:, None, :] < window
    return mask


def visible_until(
    segments: Int[Array, "B L"], branches: Int[Array, "B L"] | None = None, window: int = 0
) -> Int[Array, "B L"]:
    """Expresses `packed_mask` as one integer per key: query i sees key j if j <= i < result[j].

    The result is the end of the key's segment or, for a key in a branch, the end of the branch, and
    in rows without branches at most `window` columns away. This is FlashMask's column-wise mask
    (arXiv 2410.01359). Unlike in `packed_mask`, a padding token sees itself alone, so that every
    query has a key. Where there are branches, several queries of one position see a key of the
    trunk from different columns, so that a window needs their positions too (`Visibility`).

    Args:
      segments: one contiguous run per number; 0 is padding.
      branches: one contiguous run per number within a segment, except for the trunk (0), which
        may lie anywhere; None where there are no branches.
      window: positions that a query sees, its own included; 0 means all.
    """
    column = jnp.arange(segments.shape[1])

    def run_end(x: Array) -> Array:
        """Returns, for every token, the end of its run of equal numbers."""
        is_last = jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        # The nearest run end at or after each token: a cumulative minimum from the right.
        return jax.lax.cummin(
            jnp.where(is_last, column + 1, segments.shape[1]), axis=1, reverse=True
        )

    ends = run_end(segments)
    if branches is not None:
        ends = jnp.where(branches > 0, jnp.minimum(ends, run_end(branches)), ends)
    elif window:
        ends = jnp.minimum(ends, column + window)
    return jnp.where(segments > 0, ends, column + 1)


class Visibility(NamedTuple):
    """Which keys the queries of packed rows see, for kernels that work in tiles."""

    until: Any  # `visible_until` of the keys, [B, L]
    positions: Any = None  # of the tokens, [B, L], where there are branches and a window
    window: Any = None  # beside `positions`: the window, []


Starts = Callable[[], Sequence[Any]]
"""Returns the first columns of the blocks of queries that a device computes, all of one length. It
is a function because kernels call it too, which can't read the values of the program around them.
"""


def whole_rows() -> tuple[int]:
    """The `Starts` of a device that computes all columns."""
    return (0,)


class TileRanges(NamedTuple):
    """The key tiles that each query tile i reads: first[i] to end[i] - 1 without a gap.

    The gap, tiles gap[i] to back[i] - 1, holds other branches of the segment.

    tiles of a segment               p p a a b b     trunk p, branches a and b
    read by queries of the last      x x . . x x     first 0, gap 2, back 4, end 6
    """

    first: Any
    gap: Any
    back: Any
    end: Any

    def tile_indices(self) -> tuple[Any, Callable[[Any], Any]]:
        """Returns the number of key tiles to read, and a map from loop index to key tile."""
        gap_size = self.back - self.gap
        return (
            self.end - self.first - gap_size,
            lambda turn: self.first + turn + jnp.where(self.first + turn >= self.gap, gap_size, 0),
        )


def tile_ranges(until: Int[Array, "B L"], columns: Int[Array, "t C"]) -> TileRanges:
    """Returns the key tiles that hold a key visible to a query of each query tile.

    The ranges are exact where `columns` are contiguous; otherwise they may hold a tile too many.

    Args:
      until: `visible_until` of the keys, in tiles of C (L = T * C); 0 hides a key from all.
      columns: the column of every query in its row, tile by tile.

    Returns:
      Ranges whose fields are [B, t]; without branches gap = back = end.
    """
    tile = columns.shape[1]
    low, high = columns.min(axis=1)[:, None], columns.max(axis=1)[:, None]
    # A key tile is visible to a query tile if it begins at or before the last query, and one of its
    # keys is visible to the first query or beyond.
    ends = jnp.max(until.reshape(until.shape[0], 1, -1, tile), axis=3)
    j = jnp.arange(ends.shape[2])
    visible, end = (j * tile <= high) & (low < ends), high // tile + 1

    def first_where(condition: Array) -> Array:
        return jnp.min(jnp.where(condition, j, end), axis=2)

    # Where nothing is found, the result is `end`, so a range without a gap is [first, end).
    first = first_where(visible)
    gap = first_where(~visible & (j > first[..., None]))
    back = first_where(visible & (j >= gap[..., None]))
    return TileRanges(first, gap, back, jnp.broadcast_to(end[:, 0], first.shape))


def last_query_tile(until: Int[Array, "B L"], tile: int) -> Int[Array, "B T"]:
    """Returns, for each key tile j of whole rows, the last query tile that sees one of its keys.

    The backward pass over keys reads query tiles j to result[j].
    """
    return (jnp.max(until.reshape(until.shape[0], -1, tile), axis=2) - 1) // tile
