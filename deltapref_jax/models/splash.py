"""The TPU kernel over packed rows: JAX's splash attention, told on the device which tiles the segments reach.

Splash attention (FlashAttention-2, arXiv 2307.08691, with a table of tiles in scalar memory) asks the table, at each
step of its grid, whether a tile is computed (`block_mask`) and which one is loaded next (`data_next`). JAX makes that
table from a mask that is known at compile time, or from a boolean L x L array. Here it comes from the segments, as
[B·T, T] integers, with T blocks to a row.

    B = 2 rows of T = 3 blocks, one row of six to the kernel; the table lists a row's own key blocks only:

    query block   block_mask   data_next
    0             1 . .        0 0 0         skipped (.): repeats the tile that stands nearest, which is loaded anyway
    1             1 1 .        0 1 1
    2             . . 1        2 2 2
    3             1 . .        3 3 3         row 1 begins: its key blocks are 3 to 5
    4             . 1 .        4 4 4
    5             . 1 1        4 4 5

Rows are laid one after another because the table is prefetched: under `vmap` Pallas would loop over the rows, with a
copy of each. No tile lies across two rows, so segment numbers may repeat. Causality and segments are compared inside a
tile.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as table
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention import last, reach, until

LANES = 128  # of a TPU's vector registers: rows are filled up to a multiple of it
TILES = (
    512,
    256,
    LANES,
)  # the widest that divides the row is taken: few steps, and half a MiB of a core's memory


def tables(segments: Int[Array, "B L"], tile: int) -> tuple[table.MaskInfo, table.MaskInfo]:
    """What the kernel reads about the tiles of whole rows (L a multiple of `tile`).

    Returns:
      forward: for the forward pass and the queries' gradient, [1, B·T, T]: key block j of query block i's own row.
      backward: for the gradient of keys and values, [1, T, B·T]: query block i of key block j's own row.

    Scalar memory pads a line to 128 numbers, so they are the smallest that serve: a v5e's MiB holds 2,700 query blocks.
    """
    B, T = segments.shape[0], segments.shape[1] // tile
    i, row = jnp.arange(T), jnp.arange(B)[:, None, None] * T
    ends = until(segments)
    first, end = reach(ends, jnp.arange(segments.shape[1]).reshape(T, tile)).first, last(ends, tile)
    order: Any = jnp.arange(segments.size, dtype=jnp.int32)

    def info(low: Array, high: Array) -> tuple[Array, Array]:
        visited, near = (low <= i) & (i <= high), row + jnp.clip(i, low, high)
        return near.astype(jnp.int16).reshape(1, B * T, T), visited.astype(jnp.int8).reshape(
            1, B * T, T
        )

    data, mask = info(first[..., None], i[:, None])
    forward = table.MaskInfo(data, None, mask, None, order)
    data, mask = (x.swapaxes(1, 2) for x in info(i[:, None], end[..., None]))
    return forward, table.MaskInfo(data, None, mask, None, order)


def splash(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    segments: Int[Array, "B L"],
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Attention of whole rows; at padding the output is finite and means nothing.

    Args:
      interpret: runs the kernel's program in XLA, on any device.
    """
    B, L, N, H = q.shape
    fill = -L % LANES
    tile = next(tile for tile in TILES if (L + fill) % tile == 0)
    ids = jnp.pad(segments, ((0, 0), (0, fill)))
    forward, backward = tables(ids, tile)
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
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention",
        mask_function=jnp.greater_equal,
        interpret=interpret,
    )

    def flat(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 1, 0)

    one_row = kernel.SegmentIds(ids.ravel(), ids.ravel())
    out: Any = run(flat((q * H**-0.5).astype(q.dtype)), flat(k), flat(v), one_row)
    return jnp.moveaxis(out, 0, 1).reshape(B, L + fill, N, H)[:, :L]
