"""Attention over packed rows in blocks, in plain XLA: tiles that no segment reaches are not computed.

    key blocks          0 1 2 3        a row of two segments and padding, four blocks: for every block of queries
    query block 0       x . . .        only key blocks from the start of its first segment up to the diagonal
    query block 1       x x . .        are visited (x); the bounds are computed on the device, so one program
    query block 2       . x x .        serves all layouts
    query block 3       . . . .

Softmax is online and in float32; the backward pass recomputes it from the saved log-sum-exp (FlashAttention-2,
arXiv 2307.08691). Nothing of size L x L exists, forward or backward.

Operations: a visited tile of C x C costs 4·C²·N·H forward (two products) and 10·C²·N·H backward (five). A segment of ℓ
tokens visits at most (ℓ/C + 1)(ℓ/C + 2)/2 + 1 tiles, so the total grows with Σ ℓ² (+ C·Σ ℓ), not with L².
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

_OUT = -1e30  # score of a key that must not be seen: finite, so that a row without keys gives no NaN


class Tokens(NamedTuple):
    """Integers of one row's tokens: all in the same array order; see `models.attention` for segments and branches."""

    columns: Any  # place in the whole row
    segments: Any  # 0: padding
    branches: Any | None


class Plan(NamedTuple):
    """Which tiles are visited: of query block i of row b, key blocks first[b, i] up to but not including end[b, i]."""

    queries: Tokens  # each [B, Tq, C]
    keys: Tokens  # each [B, Tk, C]
    first: Any  # [B, Tq]
    end: Any


def blocks(x: Array, block: int) -> Array:
    """[B, T, ...] to [B, ceil(T / C), C, ...], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def plan(
    segments: Int[Array, "B L"],
    branches: Int[Array, "B L"] | None,
    block: int,
    columns: Int[Array, " T"] | None = None,
) -> Plan:
    """Reads the reach of every block of queries off the segments.

    Args:
      segments: of the whole rows, one run of equal numbers per sequence; 0 is padding.
      branches: of the whole rows, or None.
      block: C.
      columns: of the queries, in their order (where a row is split over devices); None: all.
    """
    B, L = segments.shape
    places = jnp.broadcast_to(jnp.arange(L), (B, L))
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(new, places, 0), axis=1)  # of the token's segment

    def mine(x: Array) -> Array:
        return blocks(x if columns is None else x[:, columns], block)

    q = Tokens(*(None if x is None else mine(x) for x in (places, segments, branches)))
    k = Tokens(*(None if x is None else blocks(x, block) for x in (places, segments, branches)))
    real = q.segments > 0
    first = jnp.min(jnp.where(real, mine(start), L), axis=2) // block
    end = jnp.max(jnp.where(real, q.columns, -1), axis=2) // block + 1  # 0 where all is padding
    return Plan(q, k, first, end)


def reach(segments: Int[Array, "B L"], block: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The tiles of whole rows as `splash` visits them: those of `plan`, and the diagonal where all is padding.

    The kernel divides by the sum of the weights it saw, so every query needs a key: padding sees the padding of its own
    tiles. Rows are whole tiles (L = T · C).

    Returns:
      first: key blocks first[b, i] to i belong to query block i; it never decreases with i.
      last: query blocks j to last[b, j] belong to key block j: the same tiles, column by column.
    """
    i = jnp.arange(segments.shape[1] // block)
    first = jnp.minimum(plan(segments, None, block).first, i)
    visited = (first[:, :, None] <= i) & (i <= i[:, None])
    return first, jnp.max(jnp.where(visited, i[:, None], 0), axis=1)


def _seen(q: Tokens, k: Tokens) -> Bool[Array, "C C"]:
    """What queries of one block see of another's keys: `attention.packed_mask`, but padding sees nothing."""
    mask = (q.segments[:, None] == k.segments) & (q.columns[:, None] >= k.columns) & (q.segments[:, None] > 0)
    if q.branches is not None:
        mask &= (k.branches == 0) | (q.branches[:, None] == k.branches)
    return mask


def _heads(x: Float[Array, "B T N H"], groups: int, block: int) -> Float[Array, "B t K M H"]:
    """Blocks with heads in front; the queries of one key head lie one after another (M = N/K · C)."""
    x = jnp.moveaxis(blocks(x, block), 2, 3)
    return x.reshape(*x.shape[:2], groups, -1, x.shape[-1])


def _unheads(x: Float[Array, "B t K M H"], heads: int, length: int) -> Float[Array, "B T N H"]:
    B, T, _, _, H = x.shape
    x = jnp.moveaxis(x.reshape(B, T, heads, -1, H), 2, 3)
    return x.reshape(B, -1, heads, H)[:, :length]


def _flat(tree: Any) -> Any:
    """Query blocks of all rows in one sequence, to be scanned."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _rows(p: Plan) -> Int[Array, " n"]:
    return jnp.repeat(jnp.arange(p.first.shape[0]), p.first.shape[1])


def _pick(tree: Any, row: Array, j: Array) -> Any:
    return jax.tree.map(lambda x: x[row, j], tree)


def _scores(q: Array, k: Array, mask: Array) -> Float[Array, "K M C"]:
    s = jnp.einsum("kmh,kch->kmc", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tile(mask, (q.shape[1] // mask.shape[0], 1))
    return jnp.where(mask, s, _OUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], p: Plan, block: int
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over the tiles of a plan; 0 where the query is padding."""
    return _forward(q, k, v, p, block)[0]


def _forward(q: Array, k: Array, v: Array, p: Plan, block: int) -> tuple[Array, tuple[Any, ...]]:
    K = k.shape[2]
    ks, vs = (_heads(x, K, block) for x in (k, v))

    def one(_: None, x: tuple[Any, ...]) -> tuple[None, tuple[Array, Array]]:
        row, qb, tokens, first, end = x

        def tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            s = _scores(qb, ks[row, j], _seen(tokens, _pick(p.keys, row, j)))
            new = jnp.maximum(top, s.max(axis=-1))
            e = jnp.exp(s - new[..., None])
            shrink = jnp.exp(top - new)
            more = jnp.einsum("kmc,kch->kmh", e.astype(v.dtype), vs[row, j], preferred_element_type=jnp.float32)
            return new, total * shrink + e.sum(axis=-1), out * shrink[..., None] + more

        start = (jnp.full(qb.shape[:2], _OUT), jnp.zeros(qb.shape[:2]), jnp.zeros(qb.shape, jnp.float32))
        top, total, out = jax.lax.fori_loop(first, end, tile, start)
        real = jnp.tile(tokens.segments > 0, qb.shape[1] // block)
        total = jnp.where(real, total, 1.0)
        out = jnp.where(real[:, None], out / total[..., None], 0.0)
        return None, (out.astype(q.dtype), jnp.where(real, top + jnp.log(total), 0.0))

    _, (out, lse) = jax.lax.scan(one, None, (_rows(p), *_flat((_heads(q, K, block), p.queries, p.first, p.end))))
    out = _unheads(out.reshape(*p.first.shape, *out.shape[1:]), q.shape[2], q.shape[1])
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, p, out, lse)


def _backward(block: int, saved: tuple[Any, ...], g: Float[Array, "B T N H"]) -> tuple[Array, Array, Array, None]:
    q, k, v, p, out, lse = saved
    K, scale = k.shape[2], q.shape[-1] ** -0.5
    ks, vs = (_heads(x, K, block) for x in (k, v))
    delta = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    stacked = _flat((_heads(q, K, block), _heads(g, K, block), _heads(delta, K, block), p.queries, p.first, p.end))

    def one(carry: tuple[Array, Array], x: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        row, norm, (qb, gb, d, tokens, first, end) = x

        def tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            kb, vb = ks[row, j], vs[row, j]
            w = jnp.exp(_scores(qb, kb, _seen(tokens, _pick(p.keys, row, j))) - norm[..., None])
            dw = jnp.einsum("kmh,kch->kmc", gb, vb, preferred_element_type=jnp.float32)
            ds = (w * (dw - d) * scale).astype(q.dtype)
            more = [jnp.einsum("kmc,kmh->kch", a, b, preferred_element_type=jnp.float32)
                    for a, b in ((ds, qb), (w.astype(g.dtype), gb))]
            dq = dq + jnp.einsum("kmc,kch->kmh", ds, kb, preferred_element_type=jnp.float32)
            return dq, dk.at[row, j].add(more[0]), dv.at[row, j].add(more[1])

        dq, dk, dv = jax.lax.fori_loop(first, end, tile, (jnp.zeros(qb.shape, jnp.float32), *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = (jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(one, zeros, (_rows(p), lse, stacked))
    dq = _unheads(dq.reshape(*p.first.shape, *dq.shape[1:]), q.shape[2], q.shape[1])
    dk, dv = (_unheads(x.astype(k.dtype), K, k.shape[1]) for x in (dk, dv))
    return dq, dk, dv, None


blockwise.defvjp(_forward, _backward)
