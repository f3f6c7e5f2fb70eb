"""The sampler's compiled programs: prefill prompts, insert them into slots, advance all slots.

Weights are an argument and everything static is hashable, so models of one shape share their
compiled programs, also across engines.

    prefill:  computes keys and values of G prompts, padded to one of a few lengths
    insert:   copies those of a prompt into every slot that takes one of its n traces; the first
              decoding step feeds the last prompt token again, and draws the trace's first token
    advance:  samples up to `decode_steps` tokens in every slot (the cache is donated); returns
              early when too many slots are idle
    lengthen: copies one array of the cache into a longer one (`grow` does so with all of them)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from deltapref_jax.models.attention.dense import capped
from deltapref_jax.models.decoder import Cache
from deltapref_jax.sampling.draw import draw, uniforms

_COMPILE_SECONDS = [0.0]


def _add_compile_seconds(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILE_SECONDS[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add_compile_seconds)


def compile_seconds() -> float:
    """Returns the seconds that this process has spent in XLA's compiler, for all programs."""
    return _COMPILE_SECONDS[0]


class Slots(NamedTuple):
    """The state of all slots; the host keeps it and sends it with every call of `advance`."""

    token: Int[Any, " B"]  # the token that is fed next
    position: Int[Any, " B"]  # the position of that token in its sequence
    generated: Int[Any, " B"]  # tokens of the trace so far
    alive: Bool[Any, " B"]  # False for a slot that is free
    keys: UInt32[Any, "B 2"]  # `draw.request_keys` of the traces
    temperature: Float[Any, " B"]
    top_p: Float[Any, " B"]
    top_k: Int[Any, " B"]


class Chunk(NamedTuple):
    """The result of `advance`.

    The first n entries of a slot's `tokens` and `logprobs` are valid, where n is the increase of
    its position.
    """

    steps: Int[Any, ""]  # decoding steps that ran
    tokens: Int[Any, "decode_steps B"]
    logprobs: Float[Any, "decode_steps B"]
    token: Int[Any, " B"]  # this and the next two as in `Slots`
    position: Int[Any, " B"]
    alive: Bool[Any, " B"]


@functools.partial(jax.jit, static_argnames=("graphdef", "sharding"))
def prefill(
    graphdef: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "G T"], sharding: NamedSharding
) -> Cache:
    """Returns keys and values of G prompts, which are padded on the right to T tokens.

    `sharding` is that of every array of the result, [G, K, T, H].
    """
    cache = nnx.merge(graphdef, weights).prefill(tokens, sharding.mesh)
    return jax.lax.with_sharding_constraint(cache, sharding)


@functools.partial(jax.jit, donate_argnames=("cache",))
def insert(
    cache: Cache,
    prompts: Cache,
    slots: Int[Array, " B"],
    rows: Int[Array, " B"],
    count: Int[Array, ""],
) -> Cache:
    """Copies row rows[i] of `prompts` into slot slots[i] of the cache, for i < count."""

    def insert_row(i: Array, cache: Cache) -> Cache:
        def copy(target: Array, source: Array) -> Array:
            # The slice keeps the prompt's row as an axis of length 1, which is the slot's axis in
            # the cache.
            row = jax.lax.dynamic_slice_in_dim(source, rows[i], 1)
            return jax.lax.dynamic_update_slice(target, row, (slots[i], 0, 0, 0))

        return jax.tree.map(copy, cache, prompts)

    # The number of rows is an argument of the loop and not a shape, so one program serves any
    # count.
    return jax.lax.fori_loop(0, count, insert_row, cache)


@functools.partial(jax.jit, static_argnames=("length", "axis"))
def lengthen(array: Float[Array, "B K *n"], length: int, axis: int) -> Float[Array, "B K *m"]:
    """Returns an array of the cache, padded to `length` positions along `axis`."""
    more = length - array.shape[axis]
    return jnp.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])


def grow(cache: Cache, length: int) -> Cache:
    """Returns the cache, padded to `length` positions; the given one is deleted.

    Arrays are copied one after another, and each is deleted before the next is copied: there is
    never a second cache, but one array of it.
    """

    def replaced(array: Array, axis: int) -> Array:
        # Waiting keeps the host from allocating the next array before this one is free.
        longer = jax.block_until_ready(lengthen(array, length, axis))
        array.delete()
        return longer

    return cache.map(replaced)


def _empty_chunk(slots: Slots, decode_steps: int) -> Chunk:
    """Returns the chunk of no steps, with room for `decode_steps` of them."""
    rows = (decode_steps, slots.token.shape[0])
    return Chunk(
        steps=jnp.int32(0),
        tokens=jnp.zeros(rows, jnp.int32),
        logprobs=jnp.zeros(rows, jnp.float32),
        token=jnp.asarray(slots.token),
        position=jnp.asarray(slots.position),
        alive=jnp.asarray(slots.alive),
    )


def _next_tokens(
    hidden: Float[Array, "B D"],
    unembedding: Float[Array, "V D"],
    uniform: Float[Array, "decode_steps B"],
    step: Int[Array, ""],
    slots: Slots,
    filtered: bool,
    cap: float,
    mesh: Mesh | None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns the tokens drawn from the last hidden states, and their log-probabilities."""
    with jax.named_scope("unembedding"):
        logits = jnp.einsum("bd,vd->bv", hidden, unembedding, preferred_element_type=jnp.float32)
        logits = capped(logits, cap)
    with jax.named_scope("draw"):
        return draw(
            logits, uniform[step], slots.temperature, slots.top_p, slots.top_k, filtered, mesh
        )


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "decode_steps", "filtered", "mesh"),
    donate_argnames=("cache",),
)
def advance(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    cache: Cache,
    slots: Slots,
    end_ids: Int[Array, " E"],
    max_new_tokens: Int[Array, ""],
    max_idle_slots: Int[Array, ""],
    *,
    decode_steps: int,
    filtered: bool,
    mesh: Mesh | None = None,
) -> tuple[Cache, Chunk]:
    """Samples up to `decode_steps` tokens in every live slot.

    Args:
      graphdef: structure of a decoder whose layers are unstacked (`decoder.unstacked`).
      weights: its parameters.
      cache: keys and values of all slots, with room for every position that `decode_steps` steps
        can reach; donated.
      slots: state of the slots.
      end_ids: tokens that end a trace.
      max_new_tokens: a trace ends after this many tokens.
      max_idle_slots: with more idle slots than this the loop ends early, so that the host can
        refill them.
      decode_steps: the largest number of steps; static.
      filtered: whether any slot uses top-p or top-k; static.
      mesh: the mesh over which the slots lie; static; None means one device.
    """
    model = nnx.merge(graphdef, weights)
    unembedding = model.unembedding()
    # All uniforms are drawn before the loop: their cost does not recur at every step.
    uniform = jax.vmap(lambda t: uniforms(slots.keys, slots.generated + t))(
        jnp.arange(decode_steps)
    )

    def unfinished(state: tuple[Cache, Chunk]) -> Array:
        out = state[1]
        return (out.steps < decode_steps) & (jnp.sum(~out.alive) <= max_idle_slots)

    def step(state: tuple[Cache, Chunk]) -> tuple[Cache, Chunk]:
        cache, out = state
        # A free slot sees one position, so that it reads no more of the cache.
        position = jnp.where(out.alive, out.position, 0)
        hidden, cache = model.decode(out.token[:, None], position[:, None], cache, mesh)
        token, logprob = _next_tokens(
            hidden[:, 0],
            unembedding,
            uniform,
            out.steps,
            slots,
            filtered,
            model.spec.logit_cap,
            mesh,
        )
        # The host's `generated` is that of the chunk's start, so the steps of this chunk are added.
        ended = jnp.any(token[:, None] == end_ids, axis=-1) | (
            slots.generated + out.steps + 1 >= max_new_tokens
        )
        # Free slots are computed too, but their tokens and positions stay as they are.
        return cache, Chunk(
            steps=out.steps + 1,
            tokens=out.tokens.at[out.steps].set(token),
            logprobs=out.logprobs.at[out.steps].set(logprob),
            token=jnp.where(out.alive, token, out.token),
            position=out.position + out.alive,
            alive=out.alive & ~ended,
        )

    return jax.lax.while_loop(unfinished, step, (cache, _empty_chunk(slots, decode_steps)))
