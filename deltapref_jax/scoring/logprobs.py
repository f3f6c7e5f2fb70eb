"""Log-probabilities without a logits tensor: a chunked projection with its own backward pass.

Only target positions are projected: each row's targets are moved to its front, and the loop over chunks of columns ends
at the fullest row. Extra memory is one chunk of [B, C, V] float32, forward and backward.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from deltapref_jax.mesh import put
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import PackedBatch, Sample, capacity, pack

_CHUNK_NUMBERS = 1 << 23  # of one chunk of logits: 32 MiB in float32


def _chunk(rows: int, length: int, vocab: int) -> int:
    return max(1, min(length, _CHUNK_NUMBERS // (rows * vocab)))


def _compact(mask: Bool[Array, "B L"], chunk: int) -> tuple[Int[Array, "B M"], Int[Array, ""]]:
    """Column indices with each row's targets first, padded to whole chunks; and how many chunks hold targets."""
    columns = jnp.argsort(~mask, axis=1, stable=True)
    columns = jnp.pad(columns, ((0, 0), (0, -mask.shape[1] % chunk)))
    return columns, -(-mask.sum(axis=1).max() // chunk)


def _logits(hidden: Float[Array, "B C D"], unembedding: Float[Array, "V D"]) -> Float[Array, "B C V"]:
    return jnp.einsum("bcd,vd->bcv", hidden, unembedding, preferred_element_type=jnp.float32)


def _take(x: Array, columns: Int[Array, "B C"]) -> Array:
    return jnp.take_along_axis(x, columns[..., None] if x.ndim == 3 else columns, axis=1)


@functools.partial(jax.custom_vjp)
def token_logprobs(
    hidden: Float[Array, "B L D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
) -> Float[Array, "B L"]:
    """log softmax(hidden · unembeddingᵀ)[label] where `mask`, float32; 0 elsewhere."""
    return _forward(hidden, unembedding, labels, mask)[0]


def _forward(hidden: Array, unembedding: Array, labels: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    rows, length, _ = hidden.shape
    chunk = _chunk(rows, length, unembedding.shape[0])
    columns, chunks = _compact(mask, chunk)
    which = jnp.arange(rows)[:, None]

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        logprobs, lse = carry
        at = jax.lax.dynamic_slice_in_dim(columns, i * chunk, chunk, axis=1)
        logits = _logits(_take(hidden, at), unembedding)
        norm = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, _take(labels, at)[..., None], axis=-1)[..., 0] - norm
        return logprobs.at[which, at].set(picked), lse.at[which, at].set(norm)

    zeros = jnp.zeros((rows, length), jnp.float32)
    logprobs, lse = jax.lax.fori_loop(0, chunks, body, (zeros, zeros))
    return jnp.where(mask, logprobs, 0.0), (hidden, unembedding, labels, mask, lse)


def _backward(saved: tuple[Array, ...], g: Float[Array, "B L"]) -> tuple[Array, Array, None, None]:
    hidden, unembedding, labels, mask, lse = saved
    rows, length, _ = hidden.shape
    chunk = _chunk(rows, length, unembedding.shape[0])
    columns, chunks = _compact(mask, chunk)
    which = jnp.arange(rows)[:, None]
    g = jnp.where(mask, g, 0.0)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_unembedding = carry
        start = i * chunk
        at = jax.lax.dynamic_slice_in_dim(columns, start, chunk, axis=1)
        # the padding behind the last column points at column 0 again: it must not count twice
        here = _take(g, at) * (start + jnp.arange(chunk) < length)
        h = _take(hidden, at)
        p = jnp.exp(_logits(h, unembedding) - _take(lse, at)[..., None])
        d_logits = -p * here[..., None]
        d_logits = d_logits.at[which, jnp.arange(chunk)[None], _take(labels, at)].add(here).astype(hidden.dtype)
        dh = jnp.einsum("bcv,vd->bcd", d_logits, unembedding)
        dw = jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_hidden.at[which, at].add(dh), d_unembedding + dw

    zeros = (jnp.zeros_like(hidden), jnp.zeros(unembedding.shape, jnp.float32))
    d_hidden, d_unembedding = jax.lax.fori_loop(0, chunks, body, zeros)
    return d_hidden, d_unembedding.astype(unembedding.dtype), None, None


token_logprobs.defvjp(_forward, _backward)


def sequence_logprobs(
    model: Decoder, batch: PackedBatch, segments: int, remat: bool = False
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Sum of the target tokens' log-probabilities (nats) and their number, per segment; segment i + 1 at index i.

    Args:
      model: the decoder.
      batch: packed rows.
      segments: S, static; at least the number of segments in the batch (`packing.capacity`).
      remat: see `Decoder.hidden`.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, batch.branches, remat=remat)
    # position i - 1 scores token i; a branch's first token is scored by its own suffix only, see `judging`
    tokens, owners, targets = (jnp.asarray(x) for x in (batch.tokens, batch.segments, batch.targets))
    mask = targets[:, 1:] & (owners[:, 1:] == owners[:, :-1])
    logprobs = token_logprobs(hidden[:, :-1], model.unembedding(), tokens[:, 1:], mask)
    owner = owners[:, 1:].reshape(-1)
    sums = jax.ops.segment_sum(logprobs.reshape(-1), owner, segments + 1)[1:]
    counts = jax.ops.segment_sum(mask.reshape(-1).astype(jnp.float32), owner, segments + 1)[1:]
    return sums, counts


@functools.cache
def scorer(spec: ModelSpec, dtype: str, segments: int, mesh: Mesh) -> Callable[..., Any]:
    """The compiled (params, batch) -> (sums [S], counts [S]); one per model and row shape in the process."""
    graphdef, shapes = abstract(spec, jnp.dtype(dtype))

    def run(params: nnx.State, batch: PackedBatch) -> tuple[Array, Array]:
        return sequence_logprobs(nnx.merge(graphdef, params), batch, segments)

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
    run = scorer(spec, dtype, capacity(rows, length), mesh)
    params = jax.device_put(params, shardings(params, mesh))
    fits = [i for i, s in enumerate(samples) if len(s.tokens) <= length]
    sums: list[float | None] = [None] * len(samples)
    micros = pack([samples[i] for i in fits], [[j] for j in range(len(fits))], rows, length)
    for micro in micros:
        got = np.asarray(run(params, put(micro.batch, mesh, BATCH))[0], np.float64)
        for segment, j in enumerate(micro.order):
            sums[fits[j]] = float(got[segment])
    return sums, len(micros) * rows * length
