"""JAX's splash attention on TPU, with the table of tiles computed on the device from the segments.

Splash attention is FlashAttention-2 (arXiv 2307.08691) with a table of tiles in scalar memory. At
each step of its grid the table says whether a tile is computed (`block_mask`) and which tile is
loaded next (`data_next`). JAX builds that table from a mask that is known at compile time, or from
a boolean L x L array. Here it is built from the segments, as [B * T, T] integers, with T blocks to
a row.

    B = 2 rows of T = 3 blocks are one row of six to the kernel; a query block's line of the table
    lists the key blocks of its own row only:

    query block   block_mask   data_next
    0             1 . .        0 0 0       skipped (.): repeats the nearest block that is computed,
    1             1 1 .        0 1 1       so that nothing is loaded for it
    2             . . 1        2 2 2
    3             1 . .        3 3 3       row 1 begins here: its key blocks are 3 to 5
    4             . 1 .        4 4 4
    5             . 1 1        4 4 5

The rows are concatenated because the table is a scalar-prefetch argument: under `vmap` Pallas would
loop over the rows, with a copy of each. No tile crosses the border of two rows, so rows may repeat
segment numbers. The kernel compares columns and segments inside a tile, and in rows with branches
the ends of trunks and branches, which it gets as one integer per query.

Where a row is split over devices, the queries are a few blocks of its columns and the keys are all
of them: the table has a line for every query block that the device holds.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention.dispatch import LANES
from deltapref_jax.models.attention.masks import Starts, visible_until, whole_rows

_ROW_BITS = 15
MAX_ROW = 1 << _ROW_BITS
"""Rows with windows or branches are at most this long: the kernel gets one integer per query, which
holds two columns."""
_KINDS = 4
"""Windows that a query's integer tells apart beside its branch."""
TILES = (512, 256, LANES)
"""Tile sizes in order of preference; the first that divides the padded row is used. Wide tiles mean
few grid steps; the widest takes half a MiB of a core's memory."""


def splash_tables(
    until: Int[Array, "B L"], tile: int, order: Any, columns: Int[Array, " Q"]
) -> tuple[mask_info.MaskInfo, mask_info.MaskInfo]:
    """Builds the kernel's tables; L = T * `tile`, and Q = t * `tile` queries of a row.

    Returns:
      forward: for the forward pass and the gradient of queries, [1, B * t, T]: entry (i, j) is
        about key block j of query block i's own row.
      backward: for the gradient of keys and values, [1, t, B * T]: entry (i, j) is about query
        block i of key block j's own row.

    Scalar memory pads a line to 128 numbers, so the tables have the narrowest integer types: the
    MiB of a v5e then holds 2,700 query blocks.

    Args:
      until: `masks.visible_until` of the keys.
      tile: a divisor of L and Q.
      order: what the kernel's mask function gets of each query, int32 [B * Q].
      columns: of a row's queries; those of a block follow each other.
    """
    B, T = until.shape[0], until.shape[1] // tile
    ends = jnp.max(until.reshape(B, 1, T, tile), axis=3)
    first_query, last_query = columns[::tile, None], columns[tile - 1 :: tile, None]
    # A key block is computed if it begins at or before the last query, and one of its keys is
    # visible to the first query or beyond. That of the first query's own column always is.
    computed = (jnp.arange(T) * tile <= last_query) & (first_query < ends)

    def table(axis: int) -> mask_info.MaskInfo:
        """Returns the table whose lines are along `axis` of [B, t, T]."""
        # The nearest block before that is computed; in front of the first one, that one.
        n = jax.lax.broadcasted_iota(jnp.int32, computed.shape, axis)
        before = jax.lax.cummax(jnp.where(computed, n, -1), axis=axis)
        first = jnp.argmax(computed, axis=axis, keepdims=True)
        row = jnp.arange(B)[:, None, None] * computed.shape[axis]
        nearest = jnp.where(before < 0, first, before) + row

        numbers: list[Any] = [nearest.astype(jnp.int16), computed.astype(jnp.int8)]
        # Lines of the forward table lie one below the other, of the backward table side by side.
        numbers = [
            x.reshape(1, -1, T) if axis == 2 else jnp.moveaxis(x, 0, 1).reshape(1, -1, B * T)
            for x in numbers
        ]
        return mask_info.MaskInfo(numbers[0], None, numbers[1], None, order)

    return table(2), table(1)


def _window_order(columns: Int[Array, " Q"], window: Array | int) -> Int[Array, " Q"]:
    """One integer per query: its column, and above it the first column that it sees."""
    return (jnp.maximum(columns - window + 1, 0) << _ROW_BITS) | columns


def _sees_within_row(length: int) -> Callable[[Array, Array], Array]:
    """Returns the kernel's mask function where queries hold their first visible column."""

    def sees(query: Array, key: Array) -> Array:
        column = key % length
        return ((query & (MAX_ROW - 1)) >= column) & ((query >> _ROW_BITS) <= column)

    return sees


def _branch_order(
    segments: Int[Array, "B L"], branches: Int[Array, "B L"], kind: Array | int
) -> Int[Array, "B L"]:
    """One integer per token: the end of its trunk, the begin of its branch, and its layer's kind.

    Both columns are 0 for a token of a trunk, which sees what lies before it in its segment. A
    trunk lies in front of its branches.
    """
    column = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)

    def starts(*numbers: Array) -> Array:
        """Whether a token is the first of a run in which all numbers are equal."""
        different = [x[:, 1:] != x[:, :-1] for x in numbers]
        return jnp.pad(
            functools.reduce(jnp.logical_or, different),
            ((0, 0), (1, 0)),
            "constant",
            constant_values=True,
        )

    def newest(condition: Array) -> Array:
        """The last column at or before each token where the condition holds."""
        return jax.lax.cummax(jnp.where(condition, column, 0), axis=1)

    before = jnp.pad(branches[:, :-1], ((0, 0), (1, 0)))
    first_branch = (branches > 0) & (starts(segments) | (before == 0))
    trunk_end, begin = newest(first_branch), newest(starts(segments, branches))
    code = jnp.where(branches > 0, (begin << _ROW_BITS) | trunk_end, 0)
    return code | (jnp.asarray(kind, jnp.int32) << (2 * _ROW_BITS))


def _sees_branches(
    length: int, tile: int, windows: tuple[int, ...], starts: Starts, tiles: int
) -> Callable[[Array, Array], Array]:
    """Returns the kernel's mask function where queries hold their branch (`_branch_order`).

    An integer has no room for a query's own column beside them. The kernel's position in its grid
    gives that: queries are the rows of a tile, [tile, tile], except in the gradient of keys, whose
    tiles are [tile / 2, tile] (`_sizes`). A row's queries are `tiles` tiles from each of `starts`.
    """
    low = MAX_ROW - 1

    def first_column(i: Array) -> Array:
        """The column of the first query in query tile i of a row."""
        first, *others = starts()
        column: Any = first + i * tile
        for n, start in enumerate(others, 1):
            column = jnp.where(i < n * tiles, column, start + (i - n * tiles) * tile)
        return column

    def sees(query: Array, key: Array) -> Array:
        keys_first = key.shape[0] < key.shape[1]
        turn = pl.program_id(2) if keys_first else pl.program_id(1) % (len(starts()) * tiles)
        at = first_column(turn) + jax.lax.broadcasted_iota(jnp.int32, key.shape, int(keys_first))
        column = key % length
        trunk_end, begin = query & low, (query >> _ROW_BITS) & low
        # Positions of a branch continue from its trunk, so a trunk's key is nearer by the columns
        # between the two.
        distance = at - column
        in_trunk, own = column < trunk_end, column >= begin
        if any(windows):
            kind = (query >> (2 * _ROW_BITS)) & (_KINDS - 1)
            window: Any = length
            for i, size in enumerate(windows):
                window = jnp.where(kind == i, size or length, window)
            in_trunk &= distance - (begin - trunk_end) < window
            own &= distance < window
        return (distance >= 0) & (in_trunk | own)

    return sees


def _sizes(tile: int, keys: int) -> kernel.BlockSizes:
    """Tiles of the kernel; `keys` of a tile are computed at a time in the gradient of keys."""
    return kernel.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=keys,
        block_q_dq=tile,
        block_kv_dq=tile,
    )


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    segments: Int[Array, "B L"],
    branches: Int[Array, "B L"] | None = None,
    windows: tuple[int, ...] = (0,),
    kind: Array | int = 0,
    cap: float = 0.0,
    interpret: bool = False,
    sinks: Float[Array, " N"] | None = None,
    starts: Starts = whole_rows,
) -> Float[Array, "B T N H"]:
    """Attention within the segments of rows.

    The output at padding is finite and has no meaning.

    Args:
      q: queries.
      k: keys, before their repetition for groups of query heads.
      v: values.
      segments: 1 upward, a contiguous run per sequence; 0 is padding.
      branches: 0 for the trunk, which comes first in its segment, 1 upward for branches; None
        where there are none.
      windows: positions that a query sees, its own included, in layers of each kind; 0 means all.
        Rows with windows or branches are at most `MAX_ROW` long, and with both there are at most
        four kinds, which no family exceeds.
      kind: the index of the layer's window. It may be traced, so that layers of different windows
        share one program.
      cap: turns the scores s into cap * tanh(s / cap); 0 leaves them.
      interpret: whether to run the kernel's program in XLA, on any device.
      sinks: see `attention.sinks`; None means that there are none.
      starts: of the blocks of columns that the queries are of.
    """
    B, T, N, H = q.shape
    L, size = k.shape[1], T // len(starts())
    lanes = LANES if branches is None else 2 * LANES
    length, block = (n + -n % lanes for n in (L, size))
    tile = next(tile for tile in TILES if length % tile == block % tile == 0)
    columns = (jnp.asarray(starts())[:, None] + jnp.arange(block)).ravel()
    columns = jnp.minimum(columns, length - 1)  # the padding of a row's last block

    def of_queries(x: Array) -> Array:
        """Takes the queries' columns of [B, length]."""
        return x if T == L else x[:, columns]

    ids = jnp.pad(segments, ((0, 0), (0, length - L)))
    until, sizes = visible_until(ids), _sizes(tile, tile)
    sees: Any = jnp.greater_equal
    # Causality: compares the columns of queries and keys, counted over the concatenated rows.
    order = jnp.arange(B)[:, None] * length + columns
    if branches is not None:
        tree = jnp.pad(branches, ((0, 0), (0, length - L)))
        until, order = visible_until(ids, tree), of_queries(_branch_order(ids, tree, kind))
        sees = _sees_branches(length, tile, windows, starts, block // tile)
        sizes = _sizes(tile, tile // 2)
    elif any(windows):
        # A window of a row's length hides nothing, and is a number as the others are.
        window = jnp.asarray([min(w or length, length) for w in windows])[kind]
        until = jnp.minimum(until, jnp.arange(length) + window)
        order = jnp.tile(_window_order(columns, window), B)
        sees = _sees_within_row(length)
    forward, backward = splash_tables(until, tile, order.ravel().astype(jnp.int32), columns)
    run = kernel.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=cap or None,
        # The name lets `decoder.POLICIES` keep the output, so that remat does not run it again.
        residual_checkpoint_name="attention",
        mask_function=sees,
        interpret=interpret,
    )

    def concatenate_rows(x: Array, part: int) -> Array:
        """Pads every `part` columns of [B, L, heads, H] to tiles and returns [heads, tokens, H]."""
        x = x.reshape(-1, part, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, -part % tile), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 1, 0)

    segment_ids = kernel.SegmentIds(of_queries(ids).ravel(), ids.ravel())
    # The kernel does not scale its scores.
    scaled_q = concatenate_rows((q * H**-0.5).astype(q.dtype), size)
    if sinks is not None:
        sinks = sinks.astype(q.dtype)  # the dtype that the kernel's gradient has
    keys, values = concatenate_rows(k, L), concatenate_rows(v, L)
    out: Any = run(scaled_q, keys, values, segment_ids, sinks)
    return jnp.moveaxis(out, 0, 1).reshape(-1, block, N, H)[:, :size].reshape(q.shape)
