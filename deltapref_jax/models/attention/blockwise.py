"""Attention over packed rows in tiles, in plain XLA; tiles without a visible pair are not computed.

    key tiles           0 1 2 3        A row of two segments and padding in four tiles. Each query
    query tile 0        x . . .        tile reads only the key tiles marked x (`masks.TileRanges`).
    query tile 1        x x . .        The ranges are computed on the device, so one program serves
    query tile 2        . x x .        all layouts.
    query tile 3        . . . x

The softmax is online and in float32; the backward pass recomputes it from the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691). Nothing of size L x L exists, forward or backward. A padding
token sees itself.

Operations: a tile of C x C costs 4 * C² * N * H forward (two products) and 10 * C² * N * H
backward (five). A segment of ℓ tokens reads at most (ℓ/C + 1)(ℓ/C + 2)/2 + 1 tiles, so the total
grows with Σ ℓ² (+ C * Σ ℓ) and not with L²; a branch reads its trunk and itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention.dense import capped
from deltapref_jax.models.attention.masks import (
    MASKED_SCORE,
    TileRanges,
    Visibility,
    tile_ranges,
)


class TilePlan(NamedTuple):
    """Visibility of keys, and the key tiles that each query tile reads."""

    columns: Any  # column of every query in its row, [Tq, C]
    until: Any  # `masks.visible_until` of the keys, [B, Tk, C]
    ranges: TileRanges  # fields [B, Tq]
    # Where there are branches and a window: positions of queries [B, Tq, C] and of keys
    # [B, Tk, C], and the window.
    positions: Any = None
    key_positions: Any = None
    window: Any = None


def split_into_tiles(x: Array, tile: int, mode: str = "constant") -> Array:
    """Reshapes [B, L, ...] to [B, ceil(L / C), C, ...]; `mode` of `jnp.pad` fills the last tile."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)), mode=mode)
    return x.reshape(x.shape[0], -1, tile, *x.shape[2:])


def plan_tiles(
    visibility: Visibility, tile: int, columns: Int[Array, " T"] | None = None
) -> TilePlan:
    """Computes which key tiles every query tile reads.

    Args:
      visibility: of whole rows.
      tile: C, the number of keys and of queries in a tile.
      columns: columns of the queries in their order, where a row is split over devices; None means
        all columns of the row.
    """
    until, positions, window = visibility
    keys = split_into_tiles(until, tile)
    columns = jnp.arange(until.shape[1]) if columns is None else columns
    queries = split_into_tiles(columns[None], tile, "edge")[0]
    plan = TilePlan(queries, keys, tile_ranges(keys.reshape(keys.shape[0], -1), queries))
    if positions is None:
        return plan
    return plan._replace(
        positions=split_into_tiles(positions[:, columns], tile),
        key_positions=split_into_tiles(positions, tile),
        window=window,
    )


def _tile_mask(columns: Int[Array, " C"], plan: TilePlan, row: Array, j: Array, at: Any) -> Array:
    """Returns which keys of tile j (axis 1) the queries in `columns` (axis 0) see, [C, C].

    The queries' positions `at` are () where the columns say everything.
    """
    keys = j * columns.shape[0] + jnp.arange(columns.shape[0])
    mask = (columns[:, None] >= keys) & (columns[:, None] < plan.until[row, j])
    if plan.window is not None:
        mask &= at[:, None] - plan.key_positions[row, j] < plan.window
    return mask


def _group_heads(x: Float[Array, "B T N H"], groups: int, tile: int) -> Float[Array, "B t K M H"]:
    """Splits into tiles with heads in front of tokens.

    The queries that share a key head form one axis, M = N/K * C, so that one product serves them.
    """
    x = jnp.moveaxis(split_into_tiles(x, tile), 2, 3)
    return x.reshape(*x.shape[:2], groups, -1, x.shape[-1])


def _ungroup_heads(
    x: Float[Array, "B t K M H"], heads: int, length: int
) -> Float[Array, "B T N H"]:
    """Inverts `_group_heads` and removes the padding of the last tile."""
    B, T, _, _, H = x.shape
    x = jnp.moveaxis(x.reshape(B, T, heads, -1, H), 2, 3)
    return x.reshape(B, -1, heads, H)[:, :length]


def _scan_inputs(plan: TilePlan, *arrays: Any) -> tuple[Any, ...]:
    """Merges the axes of rows and query tiles, to be scanned: (row, columns, ranges, *arrays)."""
    B, T = plan.ranges.first.shape
    row, columns = jnp.repeat(jnp.arange(B), T), jnp.tile(plan.columns, (B, 1))
    at = () if plan.positions is None else plan.positions
    merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (at, plan.ranges, *arrays))
    return row, columns, *merged


def _scores(q: Array, k: Array, mask: Array, cap: float) -> Float[Array, "K M C"]:
    s = jnp.einsum("kmh,kch->kmc", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    # The query heads of a group are stacked along M and have the same mask.
    mask = jnp.tile(mask, (q.shape[1] // mask.shape[0], 1))
    return jnp.where(mask, capped(s, cap), MASKED_SCORE)


# A loop whose number of turns is data is a `while`, which JAX cannot differentiate in reverse, so
# the backward pass is written out.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: TilePlan,
    tile: int,
    cap: float = 0.0,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over the tiles of a plan (`plan_tiles` with the same `tile`).

    A cap turns the scores s into cap * tanh(s / cap); for sinks see `attention.sinks`.
    """
    return _forward(q, k, v, plan, tile, cap, sinks)[0]


def _sinks_of_tile(sinks: Float[Array, " N"], groups: int, tile: int) -> Float[Array, "K M"]:
    """The sink of every query of a tile, as `_group_heads` arranges them."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(groups, -1), tile, axis=1)


def _forward(
    q: Array, k: Array, v: Array, plan: TilePlan, tile: int, cap: float, sinks: Array | None = None
) -> tuple[Array, tuple[Any, ...]]:
    K = k.shape[2]
    k_tiles, v_tiles = (_group_heads(x, K, tile) for x in (k, v))
    of_tile = None if sinks is None else _sinks_of_tile(sinks, K, tile)

    def query_tile(_: None, x: tuple[Any, ...]) -> tuple[None, tuple[Array, Array]]:
        row, columns, at, ranges, q_tile = x
        count, tile_index = ranges.tile_indices()

        def key_tile(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = tile_index(turn)
            row_max, row_sum, out = carry
            s = _scores(q_tile, k_tiles[row, j], _tile_mask(columns, plan, row, j, at), cap)
            # Online softmax: sums so far are rescaled to the new maximum.
            new_max = jnp.maximum(row_max, s.max(axis=-1))
            p = jnp.exp(s - new_max[..., None])
            rescale = jnp.exp(row_max - new_max)
            pv = jnp.einsum(
                "kmc,kch->kmh",
                p.astype(v.dtype),
                v_tiles[row, j],
                preferred_element_type=jnp.float32,
            )
            return new_max, row_sum * rescale + p.sum(axis=-1), out * rescale[..., None] + pv

        # With a sink the sum begins with its exponential, which is 1 while it is the maximum.
        init = (
            jnp.full(q_tile.shape[:2], MASKED_SCORE) if of_tile is None else of_tile,
            jnp.zeros(q_tile.shape[:2]) if of_tile is None else jnp.ones(q_tile.shape[:2]),
            jnp.zeros(q_tile.shape, jnp.float32),
        )
        row_max, row_sum, out = jax.lax.fori_loop(0, count, key_tile, init)
        return None, ((out / row_sum[..., None]).astype(q.dtype), row_max + jnp.log(row_sum))

    _, (out, lse) = jax.lax.scan(query_tile, None, _scan_inputs(plan, _group_heads(q, K, tile)))
    out = _ungroup_heads(
        out.reshape(*plan.ranges.first.shape, *out.shape[1:]), q.shape[2], q.shape[1]
    )
    # The names let `decoder.POLICIES` keep both, so that remat does not run attention again.
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, plan, out, lse, sinks)


def _backward(
    tile: int, cap: float, saved: tuple[Any, ...], g: Float[Array, "B T N H"]
) -> tuple[Array, Array, Array, None, Array | None]:
    """Gradients by FlashAttention-2's equations: ds = p * (g·v - Σ g·out), with p recomputed.

    A sink's value is 0, so its gradient is -Σ p * (Σ g·out) over all queries of its head.
    """
    q, k, v, plan, out, lse, sinks = saved
    K, scale = k.shape[2], q.shape[-1] ** -0.5
    k_tiles, v_tiles = (_group_heads(x, K, tile) for x in (k, v))
    # The softmax's backward pass subtracts Σ g * out per query and head.
    delta = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    lse = lse.reshape(*plan.ranges.first.shape, *lse.shape[1:])

    def query_tile(
        carry: tuple[Array, Array], x: tuple[Any, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        row, columns, at, ranges, q_tile, g_tile, delta_tile, lse_tile = x
        count, tile_index = ranges.tile_indices()

        def key_tile(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = tile_index(turn)
            dq, dk, dv = carry
            k_tile, v_tile = k_tiles[row, j], v_tiles[row, j]
            s = _scores(q_tile, k_tile, _tile_mask(columns, plan, row, j, at), cap)
            p = jnp.exp(s - lse_tile[..., None])
            dp = jnp.einsum("kmh,kch->kmc", g_tile, v_tile, preferred_element_type=jnp.float32)
            ds = p * (dp - delta_tile) * scale
            if cap:
                # d tanh = 1 - tanh²; where a key is hidden p is 0, and the factor is kept finite.
                ds *= 1 - jnp.square(jnp.clip(s / cap, -1, 1))
            ds = ds.astype(q.dtype)
            dk_tile, dv_tile = (
                jnp.einsum("kmc,kmh->kch", a, b, preferred_element_type=jnp.float32)
                for a, b in ((ds, q_tile), (p.astype(g.dtype), g_tile))
            )
            dq = dq + jnp.einsum("kmc,kch->kmh", ds, k_tile, preferred_element_type=jnp.float32)
            return dq, dk.at[row, j].add(dk_tile), dv.at[row, j].add(dv_tile)

        init = (jnp.zeros(q_tile.shape, jnp.float32), *carry)
        dq, dk, dv = jax.lax.fori_loop(0, count, key_tile, init)
        return (dk, dv), dq.astype(q.dtype)

    # Keys' gradients add up over the query tiles, so they are the scan's carry, in float32.
    zeros = (jnp.zeros(k_tiles.shape, jnp.float32), jnp.zeros(v_tiles.shape, jnp.float32))
    inputs = _scan_inputs(plan, *(_group_heads(x, K, tile) for x in (q, g, delta)), lse)
    (dk, dv), dq = jax.lax.scan(query_tile, zeros, inputs)
    dsinks = None
    if sinks is not None:
        p = jnp.exp(_sinks_of_tile(sinks, K, tile) - lse)
        of_query = p * _group_heads(delta, K, tile).reshape(p.shape)
        dsinks = -jnp.sum(of_query.reshape(-1, len(sinks), tile), axis=(0, 2)).astype(sinks.dtype)
    dq = _ungroup_heads(dq.reshape(*plan.ranges.first.shape, *dq.shape[1:]), q.shape[2], q.shape[1])
    dk, dv = (_ungroup_heads(x.astype(k.dtype), K, k.shape[1]) for x in (dk, dv))
    return dq, dk, dv, None, dsinks


blockwise_attention.defvjp(_forward, _backward)
