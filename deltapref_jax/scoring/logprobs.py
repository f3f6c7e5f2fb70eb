"""Log-probabilities of packed rows: sums per sequence, and the scoring of a whole list of sequences."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from deltapref_jax.mesh import put
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import PackedBatch, Sample, capacity, pack, trimmed
from deltapref_jax.scoring.projection import token_logprobs


def sequence_logprobs(
    model: Decoder, batch: PackedBatch, segments: int, remat: str = "none", mesh: Mesh | None = None
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Sum of the target tokens' log-probabilities (nats) and their number, per segment; segment i + 1 at index i.

    Args:
      model: the decoder.
      batch: packed rows.
      segments: S, static; at least the number of segments in the batch (`packing.capacity`).
      remat: see `Decoder.hidden`.
      mesh: over which the batch lies; None: one device.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, batch.branches, remat=remat, mesh=mesh)
    # position i - 1 scores token i; a branch's first token is scored by its own suffix only, see `judging`
    tokens, owners, targets = (jnp.asarray(x) for x in (batch.tokens, batch.segments, batch.targets))
    mask = targets[:, 1:] & (owners[:, 1:] == owners[:, :-1])
    labels, mask = (jnp.pad(x, ((0, 0), (0, 1))) for x in (tokens[:, 1:], mask))  # keeps whole rows: they divide
    logprobs = token_logprobs(hidden, model.unembedding(), labels, mask, mesh)
    owner = owners.reshape(-1)
    sums = jax.ops.segment_sum(logprobs.reshape(-1), owner, segments + 1)[1:]
    counts = jax.ops.segment_sum(mask.reshape(-1).astype(jnp.float32), owner, segments + 1)[1:]
    return sums, counts


@functools.cache
def scorer(spec: ModelSpec, dtype: str, segments: int, mesh: Mesh,
           adapters: Adapters = NO_ADAPTERS) -> Callable[..., Any]:
    """The compiled (params, batch) -> (sums [S], counts [S]); one per model and row shape in the process."""
    graphdef, shapes = abstract(spec, jnp.dtype(dtype), adapters)

    def run(params: nnx.State, batch: PackedBatch) -> tuple[Array, Array]:
        return sequence_logprobs(nnx.merge(graphdef, params), batch, segments, mesh=mesh)

    return jax.jit(run, in_shardings=(shardings(shapes, mesh), NamedSharding(mesh, BATCH)),
                   out_shardings=NamedSharding(mesh, PartitionSpec()))


def score_samples(spec: ModelSpec, params: nnx.State, samples: Sequence[Sample], rows: int, length: int, mesh: Mesh,
                  dtype: str) -> tuple[list[float | None], int]:
    """Summed log-probability of every sequence's targets (nats), in packed rows; and how many positions that took.

    Args:
      spec: of the model.
      params: of the model.
      samples: sequences; one that is longer than a row gets None.
      rows: B.
      length: L.
      mesh: rows are spread over data and fsdp.
      dtype: of the computation.
    """
    run = scorer(spec, dtype, capacity(rows, length), mesh, NO_ADAPTERS)  # named: training's key of the cache
    params = jax.device_put(params, shardings(params, mesh))
    fits = [i for i, s in enumerate(samples) if len(s.tokens) <= length]
    sums: list[float | None] = [None] * len(samples)
    micros = pack([samples[i] for i in fits], [[j] for j in range(len(fits))], rows, length)
    positions, ways = 0, mesh.shape["data"] * mesh.shape["fsdp"]
    for micro in micros:
        batch = trimmed(micro.batch, ways)
        positions += batch.tokens.size
        got = np.asarray(run(params, put(batch, mesh, BATCH))[0], np.float64)
        for segment, j in enumerate(micro.order):
            sums[fits[j]] = float(got[segment])
    return sums, positions
