"""Log-probabilities of packed rows: sums per sequence, and the scoring of a list of sequences."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from deltapref_jax.mesh import place, platform_of, shard
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.program import Program, packed_rows, placed_weights
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import PackedBatch, drop_empty_half, max_segments, pack_sequences
from deltapref_jax.scoring.projection import projection_trips, token_logprobs


def sequence_logprobs(
    model: Decoder, batch: PackedBatch, segments: int, remat: str = "none", mesh: Mesh | None = None
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """`sequence_logprobs_and_totals` without totals."""
    totals: nnx.State = nnx.State({})
    return sequence_logprobs_and_totals(model, batch, segments, remat, mesh, totals)[:2]


def sequence_logprobs_and_totals(
    model: Decoder,
    batch: PackedBatch,
    segments: int,
    remat: str,
    mesh: Mesh | None,
    totals: nnx.State,
) -> tuple[Float[Array, " S"], Float[Array, " S"], nnx.State]:
    """Sum of the target tokens' log-probabilities (nats) and their number, per sequence.

    Index i holds the sequence whose tokens have target i + 1.

    Args:
      model: the decoder.
      batch: packed rows.
      segments: S, static; at least the number of sequences in the batch (`packing.max_segments`).
      remat: see `Decoder.hidden`.
      mesh: over which the batch lies; None: one device.
      totals: see `Decoder.hidden_and_totals`; they are the third result.
    """
    hidden, totals = model.hidden_and_totals(
        batch.tokens, batch.positions, batch.segments, batch.branches, remat, mesh, totals
    )
    # Position i - 1 scores token i, so labels and owners move there; rows are padded to their old
    # length, which divides over the mesh.
    labels, owner = (
        jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (batch.tokens, batch.targets)
    )
    # Only positions whose next token is a target are projected to the vocabulary.
    logprobs = token_logprobs(
        hidden, model.output_rows(), labels, owner > 0, mesh, model.spec.logit_cap
    )
    owner = owner.reshape(-1)
    # Owner 0 stands for tokens that nobody owns; its sum is cut off.
    sums = jax.ops.segment_sum(logprobs.reshape(-1), owner, segments + 1)[1:]
    counts = jax.ops.segment_sum(jnp.ones(owner.shape), owner, segments + 1)[1:]
    return sums, counts, totals


@functools.cache
def logprob_fn(
    spec: ModelSpec, dtype: str, segments: int, mesh: Mesh, adapters: Adapters = NO_ADAPTERS
) -> Callable[..., Any]:
    """The compiled (params, batch) -> (sums [S], counts [S]), one per model and row shape."""
    graphdef, shapes = abstract(spec, jnp.dtype(dtype), adapters)

    def run(params: nnx.State, batch: PackedBatch) -> tuple[Array, Array]:
        return sequence_logprobs(nnx.merge(graphdef, params), batch, segments, mesh=mesh)

    return jax.jit(
        run,
        in_shardings=(shardings(shapes, mesh), NamedSharding(mesh, BATCH)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def score_program(
    spec: ModelSpec, dtype: str, rows: int, length: int, mesh: Mesh, branched: bool = False
) -> Program:
    """The program of `score_sequences` with abstract arguments.

    `branched` says whether rows have branches (`dispatch.shares_prompts`).
    """
    ids = packed_rows(mesh, rows, length)
    batch = PackedBatch(ids, ids, ids, ids, ids if branched else None)
    run = logprob_fn(spec, dtype, max_segments(rows, length), mesh, NO_ADAPTERS)
    params = placed_weights(abstract(spec)[1], spec, mesh, dtype)
    return Program(run, (params, batch), trips=projection_trips(spec, rows, length, mesh))


class Scores(NamedTuple):
    """Log-probabilities of n sequences, and what computing them took."""

    sums: list[float | None]  # of a sequence's targets, nats; None: longer than a row
    positions: int  # computed, with padding
    filled: int  # computed, without padding


def score_sequences(
    spec: ModelSpec,
    params: nnx.State,
    sequences: Sequence[TokenSequence],
    rows: int,
    length: int,
    mesh: Mesh,
    dtype: str,
) -> Scores:
    """Summed log-probability of every sequence's targets, in packed rows.

    A prompt is read once for all sequences of one batch that have it.

    Args:
      spec: of the model.
      params: of the model.
      sequences: prompts and completions, token ids.
      rows: B.
      length: L.
      mesh: rows are spread over data and fsdp.
      dtype: of the computation.
    """
    # all arguments are given, as in training, so that both find one program in the cache
    run = logprob_fn(spec, dtype, max_segments(rows, length), mesh, NO_ADAPTERS)
    # Weights are placed once, before the loop over batches.
    params = place(params, shardings(params, mesh))
    fits = [i for i, sequence in enumerate(sequences) if sequence.length <= length]
    sums: list[float | None] = [None] * len(sequences)
    positions = filled = 0
    row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    # A prompt is shared only where branches do not cost the faster kernel.
    share = shares_prompts(platform_of(mesh), mesh.shape["context"] > 1, length, spec)
    for micro in pack_sequences([sequences[i] for i in fits], rows, length, share):
        # Half a batch is a second compiled shape; it only occurs where the packing leaves rows
        # empty.
        batch = drop_empty_half(micro.batch, row_shards)
        positions += batch.tokens.size
        filled += int(np.count_nonzero(batch.segments))
        # float64 holds float32 exactly, so conversion to Python's float loses nothing.
        logprobs = np.asarray(run(params, shard(batch, mesh, BATCH))[0], np.float64)
        for logprob, j in zip(logprobs, micro.order, strict=False):  # S may be more than there are
            sums[fits[j]] = float(logprob)
    return Scores(sums, positions, filled)
