"""The three compiled programs of the sampler: prefill prompts, insert them into slots, advance all slots by a chunk.

Weights are an argument and everything static is hashable, so models of one shape share the compilation, also across
engines.

    prefill:  G prompts, padded to one of a few lengths  ──▶  their keys and values
    insert:   those of one prompt into each slot that takes one of its n traces (the last prompt token is fed again
              by the first decoding step, which draws the trace's first token)
    advance:  up to `chunk` tokens in every slot, cache donated; returns early when too many slots stand idle
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from deltapref_jax.models.decoder import Cache, empty_cache
from deltapref_jax.sampling.draw import draw, uniforms

_COMPILED = [0.0]


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds that this process has spent in compilation so far, of whatever."""
    return _COMPILED[0]


class Slots(NamedTuple):
    """What the device must know of every slot; the host keeps it and sends it with each chunk."""

    token: Int[Any, " B"]  # fed next
    position: Int[Any, " B"]  # of that token in its sequence
    produced: Int[Any, " B"]  # tokens of the trace so far
    alive: Bool[Any, " B"]
    keys: UInt32[Any, "B 2"]
    temperature: Float[Any, " B"]
    top_p: Float[Any, " B"]
    top_k: Int[Any, " B"]


class Chunk(NamedTuple):
    """What one `advance` did; entries of `tokens` and `logprobs` count up to a slot's newly produced."""

    steps: Int[Any, ""]
    tokens: Int[Any, "chunk B"]
    logprobs: Float[Any, "chunk B"]
    token: Int[Any, " B"]
    position: Int[Any, " B"]
    alive: Bool[Any, " B"]


@functools.partial(jax.jit, static_argnames=("graphdef", "sharding"))
def prefill(
    graphdef: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "G T"], sharding: NamedSharding
) -> Cache:
    """Keys and values of G prompts, padded on the right to T tokens."""
    model = nnx.merge(graphdef, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    _, cache = model.decode(
        tokens, positions, empty_cache(model.spec, tokens.shape[0], tokens.shape[1], model.dtype)
    )
    return jax.lax.with_sharding_constraint(cache, sharding)


@functools.partial(jax.jit, donate_argnames=("cache",))
def insert(
    cache: Cache,
    prompts: Cache,
    slots: Int[Array, " B"],
    rows: Int[Array, " B"],
    count: Int[Array, ""],
) -> Cache:
    """Copies prompt rows[i] into slot slots[i] for i < count."""

    def one(i: Array, cache: Cache) -> Cache:
        def copy(into: Array, source: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(source, rows[i], 1)
            return jax.lax.dynamic_update_slice(into, row, (slots[i], 0, 0, 0))

        return jax.tree.map(copy, cache, prompts)

    return jax.lax.fori_loop(0, count, one, cache)


@functools.partial(jax.jit, static_argnames=("length",))
def grow(cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` positions."""
    more = length - cache.v[0].shape[2]
    return Cache(
        tuple(jnp.pad(k, ((0, 0),) * 3 + ((0, more),)) for k in cache.k),
        tuple(jnp.pad(v, ((0, 0),) * 2 + ((0, more), (0, 0))) for v in cache.v),
    )


@functools.partial(
    jax.jit, static_argnames=("graphdef", "chunk", "filtered"), donate_argnames=("cache",)
)
def advance(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    cache: Cache,
    slots: Slots,
    end_ids: Int[Array, " E"],
    budget: Int[Array, ""],
    patience: Int[Array, ""],
    *,
    chunk: int,
    filtered: bool,
) -> tuple[Cache, Chunk]:
    """Samples up to `chunk` tokens in every living slot.

    Args:
      graphdef: of an unstacked decoder.
      weights: its parameters.
      cache: of all slots, with room for every position that the chunk can reach; donated.
      slots: their state.
      end_ids: tokens that end a trace.
      budget: tokens after which a trace ends anyway.
      patience: idle slots tolerated; with more of them the chunk ends early, so that they can be refilled.
      chunk: static; steps at most.
      filtered: static; whether any slot uses top-p or top-k.
    """
    model = nnx.merge(graphdef, weights)
    unembedding = model.unembedding()
    uniform = jax.vmap(lambda t: uniforms(slots.keys, slots.produced + t))(jnp.arange(chunk))

    def going(state: tuple[Cache, Chunk]) -> Array:
        out = state[1]
        return (out.steps < chunk) & (jnp.sum(~out.alive) <= patience)

    def step(state: tuple[Cache, Chunk]) -> tuple[Cache, Chunk]:
        cache, out = state
        hidden, cache = model.decode(out.token[:, None], out.position[:, None], cache)
        logits = jnp.einsum(
            "bd,vd->bv", hidden[:, 0], unembedding, preferred_element_type=jnp.float32
        )
        token, logprob = draw(
            logits, uniform[out.steps], slots.temperature, slots.top_p, slots.top_k, filtered
        )
        ended = jnp.any(token[:, None] == end_ids, axis=-1) | (
            slots.produced + out.steps + 1 >= budget
        )
        return cache, Chunk(
            steps=out.steps + 1,
            tokens=out.tokens.at[out.steps].set(token),
            logprobs=out.logprobs.at[out.steps].set(logprob),
            token=jnp.where(out.alive, token, out.token),
            position=out.position + out.alive,
            alive=out.alive & ~ended,
        )

    rows = (chunk, slots.token.shape[0])
    start = Chunk(
        jnp.int32(0),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.float32),
        jnp.asarray(slots.token),
        jnp.asarray(slots.position),
        jnp.asarray(slots.alive),
    )
    return jax.lax.while_loop(going, step, (cache, start))
