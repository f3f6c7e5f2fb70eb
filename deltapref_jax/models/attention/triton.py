"""GPU kernels over packed rows: FlashAttention-2 (arXiv 2307.08691) with loops over visible tiles.

JAX's own Triton kernel (`jax.experimental.pallas.ops.gpu.attention`) knows segments, but starts
every loop at the row's first key and knows no branches. Here one integer per key gives its
visibility (`masks.visible_until`), and integers per tile bound the loops (`masks.TileRanges`):

    kernel                                     loops over                            writes
    _forward_kernel  query tile, head n, row   key tiles of the query tile's range   out, lse
    _dq_kernel       query tile, head n, row   the same                              dq
    _dkv_kernel      key tile, key head, row   query tiles j to last[j], for the     dk, dv
                                               N/K heads that read the key head

A row without branches runs the same programs, with empty gaps.

Scores are in base 2 (the GPU's native exponential); sums and the softmax are in float32; the
operands of a product have the inputs' dtype. Nothing of size L x L exists. A key head is read by
its group of query heads and never repeated in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention.masks import (
    MASKED_SCORE,
    TileRanges,
    last_query_tile,
    tile_ranges,
)
from deltapref_jax.models.attention.sinks import join_sinks

_LOG2E = math.log2(math.e)


def _key_blocks(ranges_ref: Any, i: Array, steps: int) -> tuple[Array, Callable[[Array], Array]]:
    """`TileRanges.tile_indices` of query tile i, counted in key blocks, `steps` of them a tile.

    A tile is read in several blocks because registers do not hold the scores of a whole one.
    """
    first, gap, back = (ranges_ref[n, i] * steps for n in range(3))
    return TileRanges(first, gap, back, (i + 1) * steps).tile_indices()


def _columns(block: Array, size: int) -> Array:
    return block * size + jnp.arange(size)


def _scores(a: Array, b: Array, visible: Array, scale: float) -> Array:
    """Returns the scores in base 2 of the tokens in `a` (axis 0) and `b` (axis 1)."""
    return jnp.where(visible, gpu.dot(a, b.T) * (scale * _LOG2E), MASKED_SCORE)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    until_ref: Any,
    ranges_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    step: int,
) -> None:
    i, tile = pl.program_id(0), q_ref.shape[0]
    q, q_columns = q_ref[...], _columns(i, tile)[:, None]
    count, block_index = _key_blocks(ranges_ref, i, tile // step)

    def key_block(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row_max, row_sum, out = carry
        j = block_index(turn)
        block = pl.ds(j * step, step)
        v = v_ref[block, :]
        # A key is visible if it is not later than the query and the query is before the key's end.
        visible = (q_columns >= _columns(j, step)[None, :]) & (
            q_columns < until_ref[block][None, :]
        )
        s = _scores(q, k_ref[block, :], visible, scale)
        # Online softmax: sums so far are rescaled to the new maximum.
        new_max = jnp.maximum(row_max, jnp.max(s, axis=1))
        p, rescale = jnp.exp2(s - new_max[:, None]), jnp.exp2(row_max - new_max)
        return (
            new_max,
            row_sum * rescale + jnp.sum(p, axis=1),
            out * rescale[:, None] + gpu.dot(p.astype(v.dtype), v),
        )

    init = (jnp.full(tile, MASKED_SCORE), jnp.zeros(tile), jnp.zeros(q.shape, jnp.float32))
    row_max, row_sum, out = jax.lax.fori_loop(0, count, key_block, init)
    out_ref[...] = (out / row_sum[:, None]).astype(out_ref.dtype)
    lse_ref[...] = row_max + jnp.log2(row_sum)  # in base 2, as the scores are


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    until_ref: Any,
    ranges_ref: Any,
    dq_ref: Any,
    *,
    scale: float,
    step: int,
) -> None:
    i, tile = pl.program_id(0), q_ref.shape[0]
    q, g, lse, delta = q_ref[...], g_ref[...], lse_ref[...], delta_ref[...]
    q_columns = _columns(i, tile)[:, None]
    count, block_index = _key_blocks(ranges_ref, i, tile // step)

    def key_block(turn: Array, dq: Array) -> Array:
        j = block_index(turn)
        block = pl.ds(j * step, step)
        k = k_ref[block, :]
        visible = (q_columns >= _columns(j, step)[None, :]) & (
            q_columns < until_ref[block][None, :]
        )
        s = _scores(q, k, visible, scale)
        # FlashAttention-2's ds = p * (g·v - Σ g·out); the scale of the scores follows the loop.
        ds = jnp.exp2(s - lse[:, None]) * (gpu.dot(g, v_ref[block, :].T) - delta[:, None])
        return dq + gpu.dot(ds.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, count, key_block, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    until_ref: Any,
    last_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    scale: float,
    step: int,
    group: int,
) -> None:
    j, tile = pl.program_id(0), k_ref.shape[0]
    k, v = k_ref[...], v_ref[...]
    k_columns = _columns(j, tile)[:, None]
    until = until_ref[pl.ds(j * tile, tile)][:, None]

    def query_block(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        # Query heads of the group vary fastest, query blocks begin at the key tile's own.
        i, n = j * (tile // step) + jax.lax.div(turn, group), jax.lax.rem(turn, group)
        block = pl.ds(i * step, step)
        q, g = q_ref[block, n, :], g_ref[block, n, :]
        # Columns count from the block's first and not from the row's: that takes fewer registers.
        column = jnp.arange(step)[None, :]
        visible = (column >= k_columns - i * step) & (column < until - i * step)
        p = jnp.exp2(_scores(k, q, visible, scale) - lse_ref[n, block][None, :])
        ds = p * (gpu.dot(v, g.T) - delta_ref[n, block][None, :])
        return dk + gpu.dot(ds.astype(q.dtype), q), dv + gpu.dot(p.astype(g.dtype), g)

    # Query blocks from the key tile's own to the last one, once for each query head of the group.
    count = (last_ref[j] + 1 - j) * (tile // step) * group
    dk, dv = jax.lax.fori_loop(0, count, query_block, (jnp.zeros(k.shape, jnp.float32),) * 2)
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _tile_size(head_width: int) -> int:
    """Returns the tokens of a program's tile, which shared memory bounds."""
    return 128 if head_width <= 128 else 64


class _Launch:
    """Grid (tiles, heads, rows) and block specs of the kernels.

    The specs cut arrays of [B, L, heads, H], [B, heads, L] (sums) and [B, L].
    """

    def __init__(self, q: Array, k: Array, scale: float, interpret: bool):
        B, L, N, H = q.shape
        tile = _tile_size(H)
        self.grid, self.group = (L // tile, N, B), N // k.shape[2]
        # The block that a loop reads at once is smaller for float32, which takes more registers.
        self.options: dict[str, Any] = {
            "scale": scale,
            "step": tile // 2 if q.dtype.itemsize == 2 else tile // 4,
        }
        self.common: dict[str, Any] = {
            "interpret": interpret,
            "compiler_params": gpu.CompilerParams(num_warps=8, num_stages=2),
        }
        # i, j: tile; n: query head; m: key head; b: row.
        self.tile = pl.BlockSpec((None, tile, None, H), lambda i, n, b: (b, i, n, 0))
        self.tile_sums = pl.BlockSpec((None, None, tile), lambda i, n, b: (b, n, i))
        self.keys = pl.BlockSpec((None, L, None, H), lambda i, n, b: (b, 0, n // self.group, 0))
        self.heads = pl.BlockSpec((None, L, self.group, H), lambda j, m, b: (b, 0, m, 0))
        self.heads_sums = pl.BlockSpec((None, self.group, L), lambda j, m, b: (b, m, 0))
        self.until = pl.BlockSpec((None, L), lambda i, n, b: (b, 0))
        self.ranges = pl.BlockSpec((None, 3, L // tile), lambda i, n, b: (b, 0, 0))
        self.last = pl.BlockSpec((None, L // tile), lambda i, n, b: (b, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    until: Array,
    ranges: Array,
    last: Array,
    scale: float,
    interpret: bool,
    sinks: Array | None = None,
) -> Array:
    return _forward(q, k, v, until, ranges, last, scale, interpret, sinks)[0]


# Under `jax.jit`, because remat drops an unused call of a jitted function, but never a bare
# `pallas_call`.
@functools.partial(jax.jit, static_argnums=(5, 6))
def _call_forward(
    q: Array, k: Array, v: Array, until: Array, ranges: Array, scale: float, interpret: bool
) -> tuple[Array, Array]:
    launch = _Launch(q, k, scale, interpret)
    sums = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, **launch.options),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), sums],
        grid=launch.grid,
        in_specs=[launch.tile, launch.keys, launch.keys, launch.until, launch.ranges],
        out_specs=[launch.tile, launch.tile_sums],
        name="packed_attention",
        **launch.common,
    )(q, k, v, until, ranges)
    return out, lse


def _forward(
    q: Array,
    k: Array,
    v: Array,
    until: Array,
    ranges: Array,
    last: Array,
    scale: float,
    interpret: bool,
    sinks: Array | None = None,
) -> tuple[Array, tuple[Array | None, ...]]:
    out, lse = _call_forward(q, k, v, until, ranges, scale, interpret)
    if sinks is not None:
        # The backward kernels read this log-sum-exp, so that they need not know of the sinks.
        out, lse = join_sinks(out, lse, sinks.astype(jnp.float32) * _LOG2E)
    # The names let `decoder.POLICIES` keep both, so that remat does not run attention again.
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, until, ranges, last, out, lse, sinks)


def _backward(
    scale: float, interpret: bool, saved: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, until, ranges, last, out, lse, sinks = saved
    launch = _Launch(q, k, scale, interpret)
    # The softmax's backward pass subtracts Σ g * out per query and head.
    delta = jnp.einsum("blnh,blnh->bnl", g.astype(jnp.float32), out.astype(jnp.float32))
    (dq,) = pl.pallas_call(
        functools.partial(_dq_kernel, **launch.options),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=launch.grid,
        in_specs=[
            launch.tile,
            launch.keys,
            launch.keys,
            launch.tile,
            launch.tile_sums,
            launch.tile_sums,
            launch.until,
            launch.ranges,
        ],
        out_specs=[launch.tile],
        name="packed_attention_dq",
        **launch.common,
    )(q, k, v, g, lse, delta, until, ranges)
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, **launch.options, group=launch.group),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        # One program per key head, which sums over the query heads of its group without atomics.
        grid=(launch.grid[0], k.shape[2], launch.grid[2]),
        in_specs=[
            launch.heads,
            launch.tile,
            launch.tile,
            launch.heads,
            launch.heads_sums,
            launch.heads_sums,
            launch.until,
            launch.last,
        ],
        out_specs=[launch.tile, launch.tile],
        name="packed_attention_dkv",
        **launch.common,
    )(q, k, v, g, lse, delta, until, last)
    dsinks = None
    if sinks is not None:
        p = jnp.exp2(sinks.astype(jnp.float32)[:, None] * _LOG2E - lse)
        dsinks = -jnp.sum(p * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, None, None, None, dsinks


_attention.defvjp(_forward, _backward)


def triton_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    until: Int[Array, "B L"],
    interpret: bool = False,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B L N H"]:
    """Attention of whole rows; the output at padding is finite and has no meaning.

    Rows are padded to whole tiles and heads to a power of two (16 or more), as Triton's products
    require.

    Args:
      q: queries.
      k: keys, before their repetition for groups of query heads.
      v: values.
      until: `masks.visible_until`.
      interpret: whether to run the kernels' programs in XLA, on any device.
      sinks: see `attention.sinks`; None means that there are none.
    """
    L, H = q.shape[1], q.shape[3]
    width = max(16, pl.next_power_of_2(H))
    tile = _tile_size(width)
    # Added dimensions of a head are 0 and change no product; the scale is that of the true width.
    padding = ((0, 0), (0, -L % tile), (0, 0), (0, width - H))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    # A padding key is visible to the query of its own column alone.
    rest = jnp.broadcast_to(jnp.arange(L, q.shape[1]) + 1, (q.shape[0], q.shape[1] - L))
    until = jnp.concatenate([until, rest], axis=1)
    ranges = tile_ranges(until, jnp.arange(until.shape[1]).reshape(-1, tile))
    bounds = jnp.stack([ranges.first, ranges.gap, ranges.back], axis=1)
    last = last_query_tile(until, tile)
    out = _attention(q, k, v, until, bounds, last, H**-0.5, interpret, sinks)
    return out[:, :L, :, :H]
