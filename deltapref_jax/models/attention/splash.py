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
segment numbers. The kernel compares columns and segments inside a tile.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention.masks import last_query_tile, tile_ranges, visible_until

LANES = 128
"""Lanes of a TPU's vector registers: rows are padded to a multiple of them."""
_ROW_BITS = 15
MAX_WINDOW_ROW = 1 << _ROW_BITS
"""Rows with a window are at most this long: the kernel gets one integer per query, which holds the
query's column and the first column that it sees."""
TILES = (512, 256, LANES)
"""Tile sizes in order of preference; the first that divides the padded row is used. Wide tiles mean
few grid steps; the widest takes half a MiB of a core's memory."""


def splash_tables(
    segments: Int[Array, "B L"], tile: int, window: Array | int | None = None
) -> tuple[mask_info.MaskInfo, mask_info.MaskInfo]:
    """Builds the kernel's tables for whole rows (L is a multiple of `tile`).

    Returns:
      forward: for the forward pass and the gradient of queries, [1, B * T, T]: entry (i, j) is
        about key block j of query block i's own row.
      backward: for the gradient of keys and values, [1, T, B * T]: entry (i, j) is about query
        block i of key block j's own row.

    Scalar memory pads a line to 128 numbers, so the tables have the narrowest integer types: the
    MiB of a v5e then holds 2,700 query blocks.

    Args:
      segments: 1 upward, a contiguous run per sequence; 0 is padding.
      tile: a divisor of L.
      window: positions that a query sees, its own included; None means all.
    """
    B, T = segments.shape[0], segments.shape[1] // tile
    i, row = jnp.arange(T), jnp.arange(B)[:, None, None] * T
    until, column = visible_until(segments), jnp.arange(segments.shape[1])
    order: Any = jnp.arange(segments.size, dtype=jnp.int32)
    if window is not None:
        until = jnp.minimum(until, column + window)
        first_seen = jnp.maximum(column - window + 1, 0)
        order = jnp.tile((first_seen << _ROW_BITS) | column, B).astype(jnp.int32)
    first = tile_ranges(until, column.reshape(T, tile)).first
    last = last_query_tile(until, tile)

    def table(low: Array, high: Array) -> tuple[Array, Array]:
        """Returns (data_next, block_mask) of blocks that read blocks `low` to `high`."""
        computed, nearest = (low <= i) & (i <= high), row + jnp.clip(i, low, high)
        return (
            nearest.astype(jnp.int16).reshape(1, B * T, T),
            computed.astype(jnp.int8).reshape(1, B * T, T),
        )

    data_next, block_mask = table(first[..., None], i[:, None])
    forward = mask_info.MaskInfo(data_next, None, block_mask, None, order)
    data_next, block_mask = (x.swapaxes(1, 2) for x in table(i[:, None], last[..., None]))
    return forward, mask_info.MaskInfo(data_next, None, block_mask, None, order)


def _sees_within_row(length: int) -> Callable[[Array, Array], Array]:
    """Returns the kernel's mask function where queries hold their first visible column."""

    def sees(query: Array, key: Array) -> Array:
        column = key % length
        return ((query & (MAX_WINDOW_ROW - 1)) >= column) & ((query >> _ROW_BITS) <= column)

    return sees


def splash_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    segments: Int[Array, "B L"],
    window: Array | int | None = None,
    cap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Attention within the segments of whole rows.

    The output at padding is finite and has no meaning.

    Args:
      q: queries.
      k: keys, before their repetition for groups of query heads.
      v: values.
      segments: 1 upward, a contiguous run per sequence; 0 is padding.
      window: positions that a query sees, its own included; None means all. It may be traced, so
        that layers of different windows share one program; rows are then at most `MAX_WINDOW_ROW`
        long.
      cap: turns the scores s into cap * tanh(s / cap); 0 leaves them.
      interpret: whether to run the kernel's program in XLA, on any device.
    """
    B, L, N, H = q.shape
    padding = -L % LANES
    tile = next(tile for tile in TILES if (L + padding) % tile == 0)
    ids = jnp.pad(segments, ((0, 0), (0, padding)))
    forward, backward = splash_tables(ids, tile, window)
    sizes = kernel.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
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
        # Causality: compares the columns of queries and keys, counted over the concatenated rows.
        mask_function=jnp.greater_equal if window is None else _sees_within_row(L + padding),
        interpret=interpret,
    )

    def concatenate_rows(x: Array) -> Array:
        """[B, L, heads, H] to [heads, B * (L + padding), H]."""
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 1, 0)

    segment_ids = kernel.SegmentIds(ids.ravel(), ids.ravel())
    # The kernel does not scale its scores.
    scaled_q = concatenate_rows((q * H**-0.5).astype(q.dtype))
    out: Any = run(scaled_q, concatenate_rows(k), concatenate_rows(v), segment_ids)
    return jnp.moveaxis(out, 0, 1).reshape(B, L + padding, N, H)[:, :L]
