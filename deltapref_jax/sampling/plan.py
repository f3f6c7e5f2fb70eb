"""Shapes and shardings of a sampler: all that is decided before there are weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltapref_jax.config import Sampling
from deltapref_jax.mesh import platform_of
from deltapref_jax.models.attention.dispatch import LIVE_TILE
from deltapref_jax.models.decoder import Cache, empty_cache, unstacked
from deltapref_jax.models.program import Program, array, placed_weights
from deltapref_jax.models.sharding import ROWS
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.sampling.programs import Slots, advance, insert, lengthen, prefill

_END_IDS = 2  # tokens that end a trace; their number is part of a program's shape


def cache_positions(sampling: Sampling, platform: str) -> int:
    """Positions of the longest cache: the longest sequence, on TPU in whole tiles of its kernel."""
    tile = LIVE_TILE if platform == "tpu" else 1
    return -(-sampling.longest // tile) * tile


def prompt_groups(sampling: Sampling, row_shards: int, samples: int) -> tuple[int, int]:
    """The number of prompts of one prefill, and of prefills whose prompts are there at once.

    Args:
      sampling: shapes.
      row_shards: devices along data and fsdp.
      samples: traces of one prompt.
    """
    # About an eighth of the slots, at most 16, in whole shards.
    rows = row_shards * max(1, min(16, sampling.slots // 8) // row_shards)
    # Groups are prefilled until there are traces for all free slots, at first for all of them.
    return rows, -(-sampling.slots // (rows * samples))


class Plan:
    """The shapes of an engine.

    Attributes:
      spec: of the model, as it samples sequences of `length`.
      sampling: shapes and stop strings.
      mesh: slots lie along data and fsdp, weights as `sharding.RULES` says.
      dtype: of weights and cache.
      positions: of the longest cache (`cache_positions`).
      prefill_rows: prompts of one prefill.
      prefill_lengths: to which prompts are padded.
      shortest: positions of the cache at first.
    """

    def __init__(self, spec: ModelSpec, sampling: Sampling, mesh: Mesh, dtype: Any):
        """Checks shapes.

        Raises:
          ValueError: slots do not divide over the mesh, the model has too few positions, or a stop
            string is empty.
        """
        self.sampling, self.mesh, self.dtype = sampling, mesh, jnp.dtype(dtype)
        length = sampling.longest
        # LongRoPE's factors are chosen once, by the longest sequence that may be sampled: keys in a
        # cache cannot change theirs when a trace grows.
        self.spec = spec.within(length)
        if length > spec.max_positions:
            raise ValueError(
                f"config.sampling.max_prompt + max_tokens is {length} and the model has "
                f"{spec.max_positions} positions; lower one of the two."
            )
        if "" in sampling.stop:
            raise ValueError(
                "config.sampling.stop holds an empty string, which every text contains; remove it."
            )
        row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if sampling.slots % row_shards:
            raise ValueError(
                f"config.sampling.slots is {sampling.slots}; it must be a multiple of the "
                f"{row_shards} devices along data and fsdp."
            )
        self.prefill_rows, _ = prompt_groups(sampling, row_shards, 1)
        # Few padded lengths (max_prompt, its half, its quarter), so that few programs are compiled.
        self.prefill_lengths = sorted({-(-sampling.max_prompt // (8 * n)) * 8 for n in (1, 2, 4)})
        self.positions = cache_positions(sampling, platform_of(mesh))
        # A power of two of at least 256, so that doubling meets few lengths and few programs.
        self.shortest = min(self.positions, max(256, 1 << (sampling.max_prompt - 1).bit_length()))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """A layout on the mesh."""
        return NamedSharding(self.mesh, spec)

    @property
    def _heads(self) -> str | None:
        """The mesh axis of the cache's heads; those that do not divide are whole everywhere."""
        return "tensor" if self.spec.kv_heads % self.mesh.shape["tensor"] == 0 else None

    @property
    def cache_sharding(self) -> NamedSharding:
        """Of the slots' keys and values."""
        return self.sharding(PartitionSpec(*ROWS, self._heads))

    @property
    def prompt_sharding(self) -> NamedSharding:
        """Of the keys and values of prompts that wait for a slot."""
        return self.sharding(PartitionSpec(None, self._heads))

    @functools.cached_property
    def abstract_model(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Structure of the decoder with its layers unstacked, and its parameters' shapes."""
        graphdef, params = abstract(self.spec, self.dtype)
        kept = {}

        def split(params: nnx.State) -> nnx.State:
            kept["graphdef"], weights = unstacked(graphdef, params)
            return weights

        weights = jax.eval_shape(split, params)
        return kept["graphdef"], placed_weights(weights, self.spec, self.mesh, str(self.dtype))

    def abstract_cache(self, rows: int, length: int, sharding: NamedSharding) -> Cache:
        """Shapes of keys and values of `rows` sequences of at most `length` tokens."""
        shapes = jax.eval_shape(lambda: empty_cache(self.spec, rows, length, self.dtype, self.mesh))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    def abstract_slots(self) -> Slots:
        """Shapes of the slots' state."""
        B, mesh = self.sampling.slots, self.mesh
        index, number = (array(mesh, ROWS, t, B) for t in (jnp.int32, jnp.float32))
        alive, keys = array(mesh, ROWS, bool, B), array(mesh, ROWS, jnp.uint32, B, 2)
        return Slots(index, index, index, alive, keys, number, number, index)

    def programs(self, filtered: bool = False, samples: int = 1) -> dict[str, Program]:
        """The sampler's programs at their largest shapes.

        Args:
          filtered: whether a request has top-p or top-k.
          samples: traces of one prompt, at least.
        """
        graphdef, weights = self.abstract_model
        s, everywhere = self.sampling, PartitionSpec()
        group = self.prefill_rows, self.prefill_lengths[-1]
        prompts = self.abstract_cache(*group, self.prompt_sharding)
        cache = self.abstract_cache(s.slots, self.positions, self.cache_sharding)
        short = self.abstract_cache(s.slots, self.shortest, self.cache_sharding)
        row_shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        waiting = [prompts] * (prompt_groups(s, row_shards, samples)[1] - 1)
        count = array(self.mesh, everywhere, jnp.int32)
        index = array(self.mesh, everywhere, jnp.int32, s.slots)
        found = {
            "prefill": Program(
                prefill,
                (graphdef, weights, array(self.mesh, everywhere, jnp.int32, *group)),
                beside=(short, waiting),
                kwargs={"sharding": self.prompt_sharding},
            ),
            "insert": Program(
                insert, (cache, prompts, index, index, count), beside=(weights, waiting)
            ),
            "decode": Program(
                advance,
                (graphdef, weights, cache, self.abstract_slots(), self.end_ids, count, count),
                beside=prompts,
                kwargs={
                    "decode_steps": s.chunk,
                    "filtered": filtered,
                    "mesh": self.mesh,
                },
                trips=s.chunk,
            ),
        }
        if self.shortest < self.positions:
            # Arrays grow one after another: beside one lie the others, at most all but one grown.
            half = self.abstract_cache(s.slots, self.positions // 2, self.cache_sharding)
            found["grow"] = Program(
                lengthen,
                (half.v[0],),
                beside=(weights, prompts, cache.k, cache.v[1:]),
                kwargs={"length": self.positions, "axis": 2},
            )
        return found

    @property
    def end_ids(self) -> jax.ShapeDtypeStruct:
        """Shape of the tokens that end a trace."""
        return array(self.mesh, PartitionSpec(), jnp.int32, _END_IDS)
