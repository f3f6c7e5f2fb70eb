"""The GPU kernels over packed rows: FlashAttention-2 (arXiv 2307.08691) whose loops run over reached tiles only.

JAX's own Triton kernel (`jax.experimental.pallas.ops.gpu.attention`) knows segments but starts every loop at the row's
first key, and knows no branches; here one integer per key says who sees it (`attention.until`), and a loop's bounds are
read from integers per tile (`attention.Reach`):

    program                                loops over                                            writes
    _forward  query tile i, head n, row b  keys of tiles first[b, i] to i, but not the gap       out, lse
    _queries  query tile i, head n, row b  the same                                              dq
    _keys     key tile j, key head, row b  queries of tiles j to last[b, j], for its N/K heads   dk, dv

A row without branches runs the same programs, with empty gaps.

Scores are in base 2 (the unit's exponential), sums and the softmax in float32, the two sides of a product in the
inputs' dtype. Nothing of size L x L exists; a key head is read by its group of query heads and never repeated.
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

from deltapref_jax.models.attention import Reach, last, reach

_OUT = -1e30  # score of a key that must not be seen: finite, so that a tile without keys for a query gives no NaN
_LOG2E = math.log2(math.e)


def _visits(bounds_ref: Any, i: Array, steps: int) -> tuple[Array, Callable[[Array], Array]]:
    """`Reach.visits` of query tile i in blocks of keys, `steps` of them a tile."""
    first, gap, back = (bounds_ref[n, i] * steps for n in range(3))
    return Reach(first, gap, back, (i + 1) * steps).visits()


def _columns(block: Array, size: int) -> Array:
    return block * size + jnp.arange(size)


def _scores(a: Array, b: Array, seen: Array, scale: float) -> Array:
    """Scores in base 2 of `a` (axis 0) and `b` (axis 1)."""
    return jnp.where(seen, gpu.dot(a, b.T) * (scale * _LOG2E), _OUT)


def _forward(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    until_ref: Any,
    bounds_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    step: int,
) -> None:
    i, tile = pl.program_id(0), q_ref.shape[0]
    q, at = q_ref[...], _columns(i, tile)[:, None]
    turns, block = _visits(bounds_ref, i, tile // step)

    def visit(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        j = block(turn)
        here = pl.ds(j * step, step)
        v = v_ref[here, :]
        seen = (at >= _columns(j, step)[None, :]) & (at < until_ref[here][None, :])
        s = _scores(q, k_ref[here, :], seen, scale)
        new = jnp.maximum(top, jnp.max(s, axis=1))
        e, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
        return (
            new,
            total * shrink + jnp.sum(e, axis=1),
            out * shrink[:, None] + gpu.dot(e.astype(v.dtype), v),
        )

    start = (jnp.full(tile, _OUT), jnp.zeros(tile), jnp.zeros(q.shape, jnp.float32))
    top, total, out = jax.lax.fori_loop(0, turns, visit, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _queries(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    until_ref: Any,
    bounds_ref: Any,
    dq_ref: Any,
    *,
    scale: float,
    step: int,
) -> None:
    i, tile = pl.program_id(0), q_ref.shape[0]
    q, g, lse, delta, at = (
        q_ref[...],
        g_ref[...],
        lse_ref[...],
        delta_ref[...],
        _columns(i, tile)[:, None],
    )
    turns, block = _visits(bounds_ref, i, tile // step)

    def visit(turn: Array, dq: Array) -> Array:
        j = block(turn)
        here = pl.ds(j * step, step)
        k = k_ref[here, :]
        seen = (at >= _columns(j, step)[None, :]) & (at < until_ref[here][None, :])
        s = _scores(q, k, seen, scale)
        ds = jnp.exp2(s - lse[:, None]) * (gpu.dot(g, v_ref[here, :].T) - delta[:, None])
        return dq + gpu.dot(ds.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, turns, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _keys(
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
    k, v, at, until = (
        k_ref[...],
        v_ref[...],
        _columns(j, tile)[:, None],
        until_ref[pl.ds(j * tile, tile)][:, None],
    )

    def visit(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        i, n = j * (tile // step) + jax.lax.div(turn, group), jax.lax.rem(turn, group)
        here = pl.ds(i * step, step)
        q, g = q_ref[here, n, :], g_ref[here, n, :]
        column = jnp.arange(step)[
            None, :
        ]  # counted from the block's first: fewer registers than from the row's
        seen = (column >= at - i * step) & (column < until - i * step)
        w = jnp.exp2(_scores(k, q, seen, scale) - lse_ref[n, here][None, :])
        ds = w * (gpu.dot(v, g.T) - delta_ref[n, here][None, :])
        return dk + gpu.dot(ds.astype(q.dtype), q), dv + gpu.dot(w.astype(g.dtype), g)

    turns = (last_ref[j] + 1 - j) * (tile // step) * group
    dk, dv = jax.lax.fori_loop(0, turns, visit, (jnp.zeros(k.shape, jnp.float32),) * 2)
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _tile(head: int) -> int:
    """Queries of a program of `_forward` and `_queries`, keys of one of `_keys`: shared memory bounds it."""
    return 128 if head <= 128 else 64


class _Launch:
    """How the three kernels cut [B, L, heads, H], [B, heads, L] and [B, L] arrays: grid (tiles, heads, rows)."""

    def __init__(self, q: Array, k: Array, scale: float, interpret: bool):
        B, L, N, H = q.shape
        tile = _tile(H)
        self.grid, self.group = (L // tile, N, B), N // k.shape[2]
        self.options: dict[str, Any] = {
            "scale": scale,
            "step": tile // 2 if q.dtype.itemsize == 2 else tile // 4,
        }
        self.common: dict[str, Any] = {
            "interpret": interpret,
            "compiler_params": gpu.CompilerParams(num_warps=8, num_stages=2),
        }
        self.tile = pl.BlockSpec((None, tile, None, H), lambda i, n, b: (b, i, n, 0))
        self.tile_sums = pl.BlockSpec((None, None, tile), lambda i, n, b: (b, n, i))
        self.keys = pl.BlockSpec((None, L, None, H), lambda i, n, b: (b, 0, n // self.group, 0))
        self.heads = pl.BlockSpec((None, L, self.group, H), lambda j, m, b: (b, 0, m, 0))
        self.heads_sums = pl.BlockSpec((None, self.group, L), lambda j, m, b: (b, m, 0))
        self.until = pl.BlockSpec((None, L), lambda i, n, b: (b, 0))
        self.bounds = pl.BlockSpec((None, 3, L // tile), lambda i, n, b: (b, 0, 0))
        self.last = pl.BlockSpec((None, L // tile), lambda i, n, b: (b, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    until: Array,
    bounds: Array,
    last: Array,
    scale: float,
    interpret: bool,
) -> Array:
    return _run_forward(q, k, v, until, bounds, last, scale, interpret)[0]


@functools.partial(
    jax.jit, static_argnums=(5, 6)
)  # remat drops an unused call of this, never a bare `pallas_call`
def _call_forward(
    q: Array, k: Array, v: Array, until: Array, bounds: Array, scale: float, interpret: bool
) -> tuple[Array, Array]:
    at = _Launch(q, k, scale, interpret)
    sums = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_forward, **at.options),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), sums],
        grid=at.grid,
        in_specs=[at.tile, at.keys, at.keys, at.until, at.bounds],
        out_specs=[at.tile, at.tile_sums],
        name="packed_attention",
        **at.common,
    )(q, k, v, until, bounds)
    return out, lse


def _run_forward(
    q: Array,
    k: Array,
    v: Array,
    until: Array,
    bounds: Array,
    last: Array,
    scale: float,
    interpret: bool,
) -> tuple[Array, tuple[Array, ...]]:
    out, lse = (
        checkpoint_name(x, "attention")
        for x in _call_forward(q, k, v, until, bounds, scale, interpret)
    )
    return out, (q, k, v, until, bounds, last, out, lse)


def _run_backward(
    scale: float, interpret: bool, saved: tuple[Array, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, until, bounds, last, out, lse = saved
    at = _Launch(q, k, scale, interpret)
    delta = jnp.einsum("blnh,blnh->bnl", g.astype(jnp.float32), out.astype(jnp.float32))
    (dq,) = pl.pallas_call(
        functools.partial(_queries, **at.options),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=at.grid,
        in_specs=[
            at.tile,
            at.keys,
            at.keys,
            at.tile,
            at.tile_sums,
            at.tile_sums,
            at.until,
            at.bounds,
        ],
        out_specs=[at.tile],
        name="packed_attention_queries",
        **at.common,
    )(q, k, v, g, lse, delta, until, bounds)
    dk, dv = pl.pallas_call(
        functools.partial(_keys, **at.options, group=at.group),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        grid=(at.grid[0], k.shape[2], at.grid[2]),
        in_specs=[
            at.heads,
            at.tile,
            at.tile,
            at.heads,
            at.heads_sums,
            at.heads_sums,
            at.until,
            at.last,
        ],
        out_specs=[at.tile, at.tile],
        name="packed_attention_keys",
        **at.common,
    )(q, k, v, g, lse, delta, until, last)
    return dq, dk, dv, None, None, None


_attention.defvjp(_run_forward, _run_backward)


def triton(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    until: Int[Array, "B L"],
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Attention of whole rows; at padding the output is finite and means nothing.

    Rows are filled up to whole tiles, heads to a power of two (16 or more), as Triton's products need it.

    Args:
      until: `attention.until`.
      interpret: runs the kernels' programs in XLA, on any device.
    """
    L, H = q.shape[1], q.shape[3]
    width = max(16, pl.next_power_of_2(H))
    tile = _tile(width)
    fill = ((0, 0), (0, -L % tile), (0, 0), (0, width - H))
    q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
    rest = jnp.broadcast_to(jnp.arange(L, q.shape[1]) + 1, (q.shape[0], q.shape[1] - L))
    until = jnp.concatenate([until, rest], axis=1)
    found = reach(until, jnp.arange(until.shape[1]).reshape(-1, tile))
    bounds = jnp.stack([found.first, found.gap, found.back], axis=1)
    return _attention(q, k, v, until, bounds, last(until, tile), H**-0.5, interpret)[:, :L, :, :H]
