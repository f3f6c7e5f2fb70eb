"""Log-probabilities of packed rows: sums per sequence, and the scoring of a whole list of sequences."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from deltapref_jax.mesh import put
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import PackedBatch, Pieces, capacity, pack_sequences, trimmed
from deltapref_jax.scoring.projection import token_logprobs


def sequence_logprobs(
    model: Decoder, batch: PackedBatch, segments: int, remat: str = "none", mesh: Mesh | None = None
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Sum of the target tokens' log-probabilities (nats) and their number, per sequence; target i + 1 at index i.

    Args:
      model: the decoder.
      batch: packed rows.
      segments: S, static; at least the number of sequences in the batch (`packing.capacity`).
      remat: see `Decoder.hidden`.
      mesh: over which the batch lies; None: one device.
    """
    hidden = model.hidden(
        batch.tokens, batch.positions, batch.segments, batch.branches, remat=remat, mesh=mesh
    )
    # position i - 1 scores token i: labels and owners stand where they are scored; padded to whole rows, which divide
    labels, owner = (
        jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (batch.tokens, batch.targets)
    )
    logprobs = token_logprobs(hidden, model.unembedding(), labels, owner > 0, mesh)
    owner = owner.reshape(-1)
    sums = jax.ops.segment_sum(logprobs.reshape(-1), owner, segments + 1)[1:]
    counts = jax.ops.segment_sum(jnp.ones(owner.shape), owner, segments + 1)[1:]
    return sums, counts


@functools.cache
def scorer(
    spec: ModelSpec, dtype: str, segments: int, mesh: Mesh, adapters: Adapters = NO_ADAPTERS
) -> Callable[..., Any]:
    """The compiled (params, batch) -> (sums [S], counts [S]); one per model and row shape in the process."""
    graphdef, shapes = abstract(spec, jnp.dtype(dtype), adapters)

    def run(params: nnx.State, batch: PackedBatch) -> tuple[Array, Array]:
        return sequence_logprobs(nnx.merge(graphdef, params), batch, segments, mesh=mesh)

    return jax.jit(
        run,
        in_shardings=(shardings(shapes, mesh), NamedSharding(mesh, BATCH)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


class Scores(NamedTuple):
    """Of n sequences."""

    sums: list[
        float | None
    ]  # log-probability of a sequence's targets, nats; None: longer than a row
    positions: int  # computed, real or padding
    filled: int  # of them, real


def score_sequences(
    spec: ModelSpec,
    params: nnx.State,
    sequences: Sequence[Pieces],
    rows: int,
    length: int,
    mesh: Mesh,
    dtype: str,
) -> Scores:
    """Summed log-probability of every completion behind its prompt, in packed rows; one prompt is read once for many.

    Args:
      spec: of the model.
      params: of the model.
      sequences: prompts and completions, token ids.
      rows: B.
      length: L.
      mesh: rows are spread over data and fsdp.
      dtype: of the computation.
    """
    run = scorer(
        spec, dtype, capacity(rows, length), mesh, NO_ADAPTERS
    )  # named: training's key of the cache
    params = jax.device_put(params, shardings(params, mesh))
    fits = [
        i
        for i, (prompt, completion) in enumerate(sequences)
        if len(prompt) + len(completion) <= length
    ]
    sums: list[float | None] = [None] * len(sequences)
    positions, filled, ways = 0, 0, mesh.shape["data"] * mesh.shape["fsdp"]
    for micro in pack_sequences(
        [sequences[i] for i in fits], rows, length, shares_prompts(mesh, length)
    ):
        batch = trimmed(micro.batch, ways)
        positions += batch.tokens.size
        filled += int(np.count_nonzero(batch.segments))
        got = np.asarray(run(params, put(batch, mesh, BATCH))[0], np.float64)
        for place, j in enumerate(micro.order):
            sums[fits[j]] = float(got[place])
    return Scores(sums, positions, filled)
