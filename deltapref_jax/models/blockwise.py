"""Attention over packed rows in tiles, in plain XLA: tiles whose queries see none of the keys are not computed.

    key tiles           0 1 2 3        a row of two segments and padding, four tiles: for every tile of queries only
    query tile 0        x . . .        key tiles that it reaches (x, see `attention.Reach`) are visited; the bounds
    query tile 1        x x . .        are computed on the device, so one program serves all layouts
    query tile 2        . x x .
    query tile 3        . . . x

Softmax is online and in float32; the backward pass recomputes it from the saved log-sum-exp (FlashAttention-2,
arXiv 2307.08691). Nothing of size L x L exists, forward or backward. Padding sees itself.

Operations: a visited tile of C x C costs 4·C²·N·H forward (two products) and 10·C²·N·H backward (five). A segment of ℓ
tokens visits at most (ℓ/C + 1)(ℓ/C + 2)/2 + 1 tiles, so the total grows with Σ ℓ² (+ C·Σ ℓ), not with L²; a branch
visits its trunk and itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from deltapref_jax.models.attention import Reach, reach

_OUT = -1e30  # score of a key that must not be seen: finite, so that a tile without keys for a query gives no NaN


class Plan(NamedTuple):
    """Who sees whom, and which tiles are visited."""

    columns: Any  # of the queries [Tq, C]
    until: Any  # of the keys [B, Tk, C]
    reach: Reach  # each [B, Tq]


def blocks(x: Array, block: int, mode: str = "constant") -> Array:
    """[B, L, ...] to [B, ceil(L / C), C, ...], filled up with zeros, or what `mode` of `jnp.pad` says."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)), mode=mode)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def plan(until: Int[Array, "B L"], block: int, columns: Int[Array, " T"] | None = None) -> Plan:
    """Reads off the keys which of their tiles a tile of queries visits.

    Args:
      until: of the whole rows, see `attention.until`.
      block: C.
      columns: of the queries, in their order (where a row is split over devices); None: all.
    """
    keys = blocks(until, block)
    queries = blocks(
        (jnp.arange(until.shape[1]) if columns is None else columns)[None], block, "edge"
    )[0]
    return Plan(queries, keys, reach(keys.reshape(keys.shape[0], -1), queries))


def _seen(
    columns: Int[Array, " C"], until: Int[Array, "B T C"], row: Array, j: Array
) -> Bool[Array, "C C"]:
    """What the queries in `columns` see of key tile j."""
    keys = j * columns.shape[0] + jnp.arange(columns.shape[0])
    return (columns[:, None] >= keys) & (columns[:, None] < until[row, j])


def _heads(x: Float[Array, "B T N H"], groups: int, block: int) -> Float[Array, "B t K M H"]:
    """Blocks with heads in front; the queries of one key head lie one after another (M = N/K · C)."""
    x = jnp.moveaxis(blocks(x, block), 2, 3)
    return x.reshape(*x.shape[:2], groups, -1, x.shape[-1])


def _unheads(x: Float[Array, "B t K M H"], heads: int, length: int) -> Float[Array, "B T N H"]:
    B, T, _, _, H = x.shape
    x = jnp.moveaxis(x.reshape(B, T, heads, -1, H), 2, 3)
    return x.reshape(B, -1, heads, H)[:, :length]


def _flat(p: Plan, *arrays: Any) -> tuple[Any, ...]:
    """Query tiles of all rows in one sequence, to be scanned: row, columns, reach, and theirs of `arrays`."""
    B, T = p.reach.first.shape
    row, columns = jnp.repeat(jnp.arange(B), T), jnp.tile(p.columns, (B, 1))
    return row, columns, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (p.reach, *arrays))


def _scores(q: Array, k: Array, mask: Array) -> Float[Array, "K M C"]:
    s = jnp.einsum("kmh,kch->kmc", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tile(mask, (q.shape[1] // mask.shape[0], 1))
    return jnp.where(mask, s, _OUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    p: Plan,
    block: int,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over the tiles of a plan."""
    return _forward(q, k, v, p, block)[0]


def _forward(q: Array, k: Array, v: Array, p: Plan, block: int) -> tuple[Array, tuple[Any, ...]]:
    K = k.shape[2]
    ks, vs = (_heads(x, K, block) for x in (k, v))

    def one(_: None, x: tuple[Any, ...]) -> tuple[None, tuple[Array, Array]]:
        row, columns, bounds, qb = x
        turns, at = bounds.visits()

        def tile(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = at(turn)
            top, total, out = carry
            s = _scores(qb, ks[row, j], _seen(columns, p.until, row, j))
            new = jnp.maximum(top, s.max(axis=-1))
            e = jnp.exp(s - new[..., None])
            shrink = jnp.exp(top - new)
            more = jnp.einsum(
                "kmc,kch->kmh", e.astype(v.dtype), vs[row, j], preferred_element_type=jnp.float32
            )
            return new, total * shrink + e.sum(axis=-1), out * shrink[..., None] + more

        start = (
            jnp.full(qb.shape[:2], _OUT),
            jnp.zeros(qb.shape[:2]),
            jnp.zeros(qb.shape, jnp.float32),
        )
        top, total, out = jax.lax.fori_loop(0, turns, tile, start)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(one, None, _flat(p, _heads(q, K, block)))
    out = _unheads(out.reshape(*p.reach.first.shape, *out.shape[1:]), q.shape[2], q.shape[1])
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, p, out, lse)


def _backward(
    block: int, saved: tuple[Any, ...], g: Float[Array, "B T N H"]
) -> tuple[Array, Array, Array, None]:
    q, k, v, p, out, lse = saved
    K, scale = k.shape[2], q.shape[-1] ** -0.5
    ks, vs = (_heads(x, K, block) for x in (k, v))
    delta = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    lse = lse.reshape(*p.reach.first.shape, *lse.shape[1:])

    def one(carry: tuple[Array, Array], x: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        row, columns, bounds, qb, gb, d, norm = x
        turns, at = bounds.visits()

        def tile(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = at(turn)
            dq, dk, dv = carry
            kb, vb = ks[row, j], vs[row, j]
            w = jnp.exp(_scores(qb, kb, _seen(columns, p.until, row, j)) - norm[..., None])
            dw = jnp.einsum("kmh,kch->kmc", gb, vb, preferred_element_type=jnp.float32)
            ds = (w * (dw - d) * scale).astype(q.dtype)
            more = [
                jnp.einsum("kmc,kmh->kch", a, b, preferred_element_type=jnp.float32)
                for a, b in ((ds, qb), (w.astype(g.dtype), gb))
            ]
            dq = dq + jnp.einsum("kmc,kch->kmh", ds, kb, preferred_element_type=jnp.float32)
            return dq, dk.at[row, j].add(more[0]), dv.at[row, j].add(more[1])

        dq, dk, dv = jax.lax.fori_loop(0, turns, tile, (jnp.zeros(qb.shape, jnp.float32), *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = (jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(
        one, zeros, _flat(p, *(_heads(x, K, block) for x in (q, g, delta)), lse)
    )
    dq = _unheads(dq.reshape(*p.reach.first.shape, *dq.shape[1:]), q.shape[2], q.shape[1])
    dk, dv = (_unheads(x.astype(k.dtype), K, k.shape[1]) for x in (dk, dv))
    return dq, dk, dv, None


blockwise.defvjp(_forward, _backward)
