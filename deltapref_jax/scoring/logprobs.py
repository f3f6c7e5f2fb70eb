"""Log-probabilities without a logits tensor: a chunked projection with its own backward pass.

Only target positions are projected: each row's targets are moved to its front, and the loop over chunks of columns ends
at the fullest row. Extra memory is that of one chunk [B, C, V] per device, however many targets there are: up to three
float32 buffers (logits, their exponentials, their gradient).
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

from deltapref_jax.mesh import platform_of, put
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import PackedBatch, Sample, capacity, pack

_CHUNK_NUMBERS = 1 << 23  # of one device's chunk of logits: 32 MiB in float32
_ACCELERATOR = 16  # times that off the CPU, where a chunk must outweigh a pass over the unembedding and its gradient


def _chunk(rows: int, length: int, vocab: int, numbers: int) -> int:
    return max(1, min(length, numbers // (rows * vocab)))


def _compact(mask: Bool[Array, "B L"], chunk: int) -> tuple[Int[Array, "B M"], Int[Array, ""]]:
    """Column indices with each row's targets first, padded to whole chunks; and how many chunks hold targets."""
    columns = jnp.argsort(~mask, axis=1, stable=True)
    columns = jnp.pad(columns, ((0, 0), (0, -mask.shape[1] % chunk)))
    return columns, -(-mask.sum(axis=1).max() // chunk)


def _logits(hidden: Float[Array, "B C D"], unembedding: Float[Array, "V D"]) -> Float[Array, "B C V"]:
    return jnp.einsum("bcd,vd->bcv", hidden, unembedding, preferred_element_type=jnp.float32)


def _take(x: Array, columns: Int[Array, "B C"]) -> Array:
    return jnp.take_along_axis(x, columns[..., None] if x.ndim == 3 else columns, axis=1)


def _is_label(labels: Int[Array, "B C"], vocab: int, axis: str | None) -> Bool[Array, "B C V"]:
    """One-hot rows of this device's share of the vocabulary; compared, not scattered, so that it fuses."""
    first = jax.lax.axis_index(axis) * vocab if axis else 0
    return jnp.arange(vocab) == (labels - first)[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_logprobs(hidden: Array, unembedding: Array, labels: Array, mask: Array, axis: str | None,
                    numbers: int) -> Array:
    """`token_logprobs` on one device; `axis`: the mesh axis that `unembedding` is one share of, or None."""
    return _forward(hidden, unembedding, labels, mask, axis, numbers)[0]


def _forward(hidden: Array, unembedding: Array, labels: Array, mask: Array, axis: str | None,
             numbers: int) -> tuple[Array, tuple[Array, ...]]:
    rows, length, _ = hidden.shape
    vocab = unembedding.shape[0]
    chunk = _chunk(rows, length, vocab, numbers)
    columns, chunks = _compact(mask, chunk)
    which = jnp.arange(rows)[:, None]

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        picked, lse = carry
        at = jax.lax.dynamic_slice_in_dim(columns, i * chunk, chunk, axis=1)
        logits = _logits(_take(hidden, at), unembedding)
        label = jnp.where(_is_label(_take(labels, at), vocab, axis), logits, 0.0).sum(axis=-1)
        return picked.at[which, at].set(label), lse.at[which, at].set(jax.nn.logsumexp(logits, axis=-1))

    zeros = jnp.zeros((rows, length), jnp.float32)
    picked, lse = jax.lax.fori_loop(0, chunks, body, (zeros, zeros))
    if axis:
        top = jax.lax.pmax(lse, axis)
        lse = top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis))
        picked = jax.lax.psum(picked, axis)
    return jnp.where(mask, picked - lse, 0.0), (hidden, unembedding, labels, mask, lse)


def _backward(axis: str | None, numbers: int, saved: tuple[Array, ...],
              g: Float[Array, "B L"]) -> tuple[Array, Array, None, None]:
    hidden, unembedding, labels, mask, lse = saved
    rows, length, _ = hidden.shape
    vocab = unembedding.shape[0]
    chunk = _chunk(rows, length, vocab, numbers)
    columns, chunks = _compact(mask, chunk)
    which = jnp.arange(rows)[:, None]
    # a shard_map hands each of the devices with the same output its share of the gradient, and adds up what they return
    g = jnp.where(mask, jax.lax.psum(g, axis) if axis else g, 0.0)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_unembedding = carry
        start = i * chunk
        at = jax.lax.dynamic_slice_in_dim(columns, start, chunk, axis=1)
        # the padding behind the last column points at column 0 again: it must not count twice
        here = (_take(g, at) * (start + jnp.arange(chunk) < length))[..., None]
        h = _take(hidden, at)
        p = jnp.exp(_logits(h, unembedding) - _take(lse, at)[..., None])
        d_logits = (jnp.where(_is_label(_take(labels, at), vocab, axis), 1 - p, -p) * here).astype(hidden.dtype)
        dh = jnp.einsum("bcv,vd->bcd", d_logits, unembedding)
        dw = jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_hidden.at[which, at].add(dh), d_unembedding + dw

    zeros = (jnp.zeros_like(hidden), jnp.zeros(unembedding.shape, jnp.float32))
    d_hidden, d_unembedding = jax.lax.fori_loop(0, chunks, body, zeros)
    return d_hidden, d_unembedding.astype(unembedding.dtype), None, None


_token_logprobs.defvjp(_forward, _backward)


def token_logprobs(
    hidden: Float[Array, "B L D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    mesh: Mesh | None = None,
) -> Float[Array, "B L"]:
    """log softmax(hidden · unembeddingᵀ)[label] where `mask`, float32 nats; 0 elsewhere.

    On a mesh every device projects its own rows and columns (data, fsdp, context) on its share of the vocabulary
    (tensor); the log-sum-exps of the shares are joined once, and gradients of the unembedding are added up once, both
    behind the loop over chunks.
    """
    numbers = _CHUNK_NUMBERS * (1 if platform_of(mesh) == "cpu" else _ACCELERATOR)
    if mesh is None or mesh.size == 1:
        return _token_logprobs(hidden, unembedding, labels, mask, None, numbers)
    axis = "tensor" if mesh.shape["tensor"] > 1 and unembedding.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.shard_map(
        lambda *local: _token_logprobs(*local, axis, numbers), mesh=mesh,
        in_specs=(PartitionSpec(*BATCH, None), PartitionSpec(axis, None), BATCH, BATCH), out_specs=BATCH,
        check_vma=False)(hidden, unembedding, labels, mask)


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
def scorer(spec: ModelSpec, dtype: str, segments: int, mesh: Mesh) -> Callable[..., Any]:
    """The compiled (params, batch) -> (sums [S], counts [S]); one per model and row shape in the process."""
    graphdef, shapes = abstract(spec, jnp.dtype(dtype))

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
