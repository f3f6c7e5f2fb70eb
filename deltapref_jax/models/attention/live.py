"""TPU kernel for decoding: one token a row attends to a cache, of which live tiles alone are read.

A cache has as many positions as the longest row needs, and rows are of all lengths. XLA's products
read all of it; here a loop over the tiles that some token sees copies them one by one from the
device's memory (HBM), a few at a time, while those before are computed:

    row 0, at position 300   tiles 0 1 2      a window of 128 begins at tile 1
    row 1, at position 70    tile  0          copied: 0 1 2 | 0 | 0 1, and nothing behind them
    row 2, at position 200   tiles 0 1

Several tiles are computed at a time, a chunk, because a turn of the loop takes hundreds of cycles
however few keys it is given. The chunks of all rows of a block are one sequence, so that a row's
first chunk is copied while the row before is computed. The softmax is online and in float32
(FlashAttention, arXiv 2205.14135).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention.dense import capped
from deltapref_jax.models.attention.dispatch import LIVE_TILE as TILE
from deltapref_jax.models.attention.masks import MASKED_SCORE

_CHUNK_BYTES = 1 << 20  # of keys and values that are computed at a time; one tile is always
_AHEAD_BYTES = 4 << 20  # of the chunks in memory; two are always
_GROUP = 16  # positions of one write: the rows of a register's tile in bfloat16, two in float32
_BLOCK_BYTES = 1 << 18  # of the queries that are held at a time


def live_tiles(positions: Array, window: int) -> tuple[Array, Array]:
    """Returns the first and the last tile that holds a key which a token at a position sees."""
    first = jnp.maximum(positions - window + 1, 0) if window else jnp.zeros_like(positions)
    return jax.lax.div(first, TILE), jax.lax.div(positions, TILE)


class _Scratch(NamedTuple):
    """Memory of a core; keys are at index 0 and values at 1 of the first axis, where there is one.

    `chunks` are on their way from the cache, `groups` on their way back.
    """

    chunks: Any  # [2, depth, K, chunk * TILE, W]
    groups: Any  # [2, depth, K, _GROUP, W]
    row_max: Any  # [K, N/K, 1]
    row_sum: Any  # [K, N/K, 1]
    read: Any  # semaphores [2, depth]
    written: Any  # semaphores [2, depth]


def _kernel(
    positions_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    sinks_ref: Any,
    _k_in: Any,
    _v_in: Any,
    out_ref: Any,
    k_cache: Any,
    v_cache: Any,
    *scratch: Any,
    window: int,
    cap: float,
    sinks: bool,
    scale: float,
) -> None:
    # The cache that comes in is the one that goes out.
    rows = q_ref.shape[0]
    first_row, caches, memory = pl.program_id(0) * rows, (k_cache, v_cache), _Scratch(*scratch)
    depth, chunk = memory.chunks.shape[1], memory.chunks.shape[3] // TILE

    def position(row: Array) -> Array:
        # The row behind the last is asked for by the cursors that end there.
        return positions_ref[first_row + jnp.minimum(row, rows - 1)]

    def live_chunks(row: Array) -> tuple[Array, Array]:
        first, last = live_tiles(position(row), window)
        return jax.lax.div(first, chunk), jax.lax.div(last, chunk)

    def following(row: Array, here: Array) -> tuple[Array, Array]:
        ends = here == live_chunks(row)[1]
        next_first = live_chunks(row + 1)[0]
        return row + ends.astype(jnp.int32), jnp.where(ends, next_first, here + 1)

    def read(row: Array, here: Array, turn: Array, act: Callable[[Any], None]) -> None:
        """Starts the copies of a chunk's live tiles, or waits for them; none behind the last row.

        They lie beside each other, and are copied in as few pieces as their number has bits.
        """
        n, begin = jax.lax.rem(turn, depth), here * chunk
        first, last = live_tiles(position(row), window)
        first, last = jnp.maximum(first - begin, 0), jnp.minimum(last - begin, chunk - 1)
        live = jnp.where(row < rows, last - first + 1, 0)
        for bit in range(chunk.bit_length()):
            size = 1 << bit

            @pl.when(live & size != 0)
            def _(size: int = size) -> None:
                tile = first + (live & (size - 1))
                at = first_row + row, slice(None), pl.ds((begin + tile) * TILE, size * TILE)
                to = n, slice(None), pl.ds(tile * TILE, size * TILE)
                for i, cache in enumerate(caches):
                    target = memory.chunks.at[(i, *to)]
                    act(pltpu.make_async_copy(cache.at[at], target, memory.read.at[i, n]))

    def writes(row: Array) -> list[Any]:
        group = position(row) // _GROUP * _GROUP
        at = first_row + row, slice(None), pl.ds(pl.multiple_of(group, _GROUP), _GROUP)
        n = jax.lax.rem(row, depth)
        return [
            pltpu.make_async_copy(memory.groups.at[i, n], cache.at[at], memory.written.at[i, n])
            for i, cache in enumerate(caches)
        ]

    def send(row: Array, here: Array, turn: Array) -> tuple[Array, Array]:
        """Starts to copy a chunk, where there is one more; returns the next one."""
        read(row, here, turn, lambda copy: copy.start())
        next_row, next_here = following(row, here)
        return jnp.where(row < rows, next_row, row), next_here

    def append(row: Array, n: Array) -> None:
        """Puts a row's new key and value into its last chunk, and sends their group back."""
        at = position(row)
        start = pl.multiple_of(jax.lax.rem(at, chunk * TILE) // _GROUP * _GROUP, _GROUP)

        @pl.when(row >= depth)
        def _() -> None:
            for copy in writes(row - depth):
                copy.wait()

        for i, new in enumerate((k_ref, v_ref)):
            of_group = (i, n, slice(None), pl.ds(start, _GROUP))
            old = memory.chunks[of_group]
            column = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
            group = jnp.where(column == jax.lax.rem(at, _GROUP), new[row], old)
            memory.chunks[of_group] = group
            memory.groups[i, jax.lax.rem(row, depth)] = group
        for copy in writes(row):
            copy.start()

    def compute(row: Array, here: Array, turn: Array) -> None:
        at, n = position(row), jax.lax.rem(turn, depth)
        first, last = live_chunks(row)

        @pl.when(here == first)
        def _() -> None:
            # With a sink the sum begins with its exponential, which is 1 while it is the maximum.
            memory.row_max[...] = sinks_ref[...]
            memory.row_sum[...] = jnp.full(memory.row_sum.shape, float(sinks))
            out_ref[row] = jnp.zeros(out_ref.shape[1:], jnp.float32)

        read(row, here, turn, lambda copy: copy.wait())
        pl.when(here == last)(lambda: append(row, n))
        k, v = memory.chunks[0, n], memory.chunks[1, n]
        s = jnp.einsum("kgh,kth->kgt", q_ref[row], k, preferred_element_type=jnp.float32)
        s = capped(s * scale, cap)
        column = here * (chunk * TILE) + jax.lax.broadcasted_iota(jnp.int32, s.shape, 2)
        visible = column <= at
        if window:
            visible &= at - column < window
        s = jnp.where(visible, s, MASKED_SCORE)
        row_max = memory.row_max[...]
        new_max = jnp.maximum(row_max, s.max(axis=-1, keepdims=True))
        p, rescale = jnp.exp(s - new_max), jnp.exp(row_max - new_max)
        memory.row_max[...] = new_max
        memory.row_sum[...] = memory.row_sum[...] * rescale + p.sum(axis=-1, keepdims=True)
        pv = jnp.einsum("kgt,kth->kgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out_ref[row] = out_ref[row] * rescale + pv

        @pl.when(here == last)
        def _() -> None:
            out_ref[row] /= memory.row_sum[...]

    def turn(state: Any) -> Any:
        n, row, here, ahead_row, ahead_here = state
        ahead = send(ahead_row, ahead_here, n + depth - 1)
        compute(row, here, n)
        return n + 1, *following(row, here), *ahead

    # A weight of 0 meets the values of a chunk's dead tiles, which must be numbers.
    memory.chunks[1] = jnp.zeros_like(memory.chunks[1])
    zero = jnp.int32(0)
    ahead = begin = zero, live_chunks(zero)[0]
    for n in range(depth - 1):
        ahead = send(*ahead, jnp.int32(n))
    jax.lax.while_loop(lambda state: state[1] < rows, turn, (zero, *begin, *ahead))
    for row in range(max(0, rows - depth), rows):
        for copy in writes(jnp.int32(row)):
            copy.wait()


def live_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K W"],
    v: Float[Array, "B K W"],
    k_cache: Float[Array, "B K S W"],
    v_cache: Float[Array, "B K S W"],
    positions: Int[Array, " B"],
    sinks: Float[Array, " N"] | None = None,
    window: int = 0,
    cap: float = 0.0,
    interpret: Any = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K S W"], Float[Array, "B K S W"]]:
    """Writes a row's token into its cache at positions[b], and attends to the cache up to there.

    The kernel writes too, because XLA would keep the cache in another layout for its own writes and
    copy all of it for the kernel. Where key heads are narrower than the lanes, several lie beside
    each other, W = P * H, and a query has zeros beside itself for those that it does not read.

    Args:
      q: queries.
      k: keys, which are written.
      v: values, which are written.
      k_cache: keys; S is a multiple of `TILE`; donated to the result.
      v_cache: values; donated to the result.
      positions: below S.
      sinks: see `attention.sinks`; None means that there are none.
      window: positions that a query sees, its own included; 0 means all.
      cap: turns the scores s into cap * tanh(s / cap); 0 leaves them.
      interpret: as of `pallas_call`, for machines without a TPU.

    Returns:
      What the queries read, and the caches.
    """
    (B, N, H), (_, K, W) = q.shape, k.shape
    of_row, beside = (K, N // K, W), (B, K, W // H, -1, H)
    own = jnp.eye(W // H, dtype=bool)[:, None, :, None]
    wide = jnp.where(own, q.reshape(beside)[..., None, :], 0).reshape(B, *of_row)
    # Two blocks, where there are two rows, for chips of two cores.
    most = max(1, min(_BLOCK_BYTES // (N * W * q.dtype.itemsize), B // 2))
    rows = next(n for n in range(min(B, most), 0, -1) if B % n == 0)
    starts = jnp.full(N, MASKED_SCORE) if sinks is None else sinks.astype(jnp.float32)

    tile_bytes = 2 * K * TILE * W * k_cache.dtype.itemsize
    chunk = max(1, min(_CHUNK_BYTES // tile_bytes, k_cache.shape[2] // TILE))
    depth = max(2, _AHEAD_BYTES // (chunk * tile_bytes))

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, *shape), lambda i, _: (i, 0, 0, 0))

    everywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    dtype = k_cache.dtype
    if not interpret:
        # XLA would move a cache that fits there to fast memory before the kernel, and back.
        k_cache, v_cache = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_cache, v_cache)
        )
    out, k_cache, v_cache = pl.pallas_call(
        functools.partial(_kernel, window=window, cap=cap, sinks=sinks is not None, scale=H**-0.5),
        out_shape=[
            jax.ShapeDtypeStruct((B, *of_row), jnp.float32),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cache, v_cache)),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B // rows,),
            in_specs=[
                block(*of_row),
                block(K, 1, W),
                block(K, 1, W),
                pl.BlockSpec((*of_row[:2], 1), lambda i, _: (0, 0, 0)),
                everywhere,
                everywhere,
            ],
            out_specs=[block(*of_row), everywhere, everywhere],
            scratch_shapes=_Scratch(
                chunks=pltpu.VMEM((2, depth, K, chunk * TILE, W), dtype),
                groups=pltpu.VMEM((2, depth, K, _GROUP, W), dtype),
                row_max=pltpu.VMEM((*of_row[:2], 1), jnp.float32),
                row_sum=pltpu.VMEM((*of_row[:2], 1), jnp.float32),
                read=pltpu.SemaphoreType.DMA((2, depth)),
                written=pltpu.SemaphoreType.DMA((2, depth)),
            ),
        ),
        # At most, for XLA's order of what runs beside the kernel.
        cost_estimate=pl.CostEstimate(
            flops=4 * wide.size * k_cache.shape[2],
            transcendentals=B * N * k_cache.shape[2],
            bytes_accessed=k_cache.nbytes + v_cache.nbytes,
        ),
        # Arguments 5 and 6, the positions counted, are results 1 and 2.
        input_output_aliases={5: 1, 6: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            # They take more cycles than all else that a copy needs; positions are below S.
            disable_bounds_checks=True,
        ),
        name="live_attention",
        interpret=interpret,
    )(
        positions,
        wide,
        k.astype(dtype)[:, :, None],
        v.astype(dtype)[:, :, None],
        starts.reshape(*of_row[:2], 1),
        k_cache,
        v_cache,
    )
    # What a query reads of the heads beside its own is dropped.
    out = jnp.diagonal(out.reshape(B, K, W // H, -1, W // H, H), axis1=2, axis2=4)
    out = jnp.moveaxis(out, -1, 2).reshape(B, N, H).astype(q.dtype)
    return out, k_cache, v_cache
