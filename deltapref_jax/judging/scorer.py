"""Ratings from score tokens, read off logits after one prefill: no text is generated.

Each trace is one packed sequence: its trunk once, and a branch per dimension that sees the trunk and itself. The rating
is the expectation over the single-token labels 1 to 5 (arXiv 2503.03064: the mean beats the mode).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltapref_jax.config import Scoring
from deltapref_jax.judging.rubric import RUBRIC, Rubric, label_ids, trunk_and_suffixes
from deltapref_jax.mesh import shard
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import Loaded, abstract
from deltapref_jax.scoring.packing import PackedBatch, PackedSample, drop_empty_half, pack


class Ratings(NamedTuple):
    """Of n traces on d dimensions."""

    expectation: np.ndarray  # [n, d], 1 to 5
    spread: np.ndarray  # [n, d], standard deviation over the labels
    mass: np.ndarray  # [n, d], probability on the labels before renormalising
    distribution: np.ndarray  # [n, d, 5], sums to 1


def summarise(probabilities: np.ndarray) -> Ratings:
    """Expectation, spread and mass of label probabilities [n, d, 5] as the model gives them."""
    mass = probabilities.sum(axis=-1)
    distribution = probabilities / np.maximum(mass, 1e-30)[..., None]
    labels = np.arange(1, 6)
    mean = distribution @ labels
    variance = np.maximum(distribution @ labels**2 - mean**2, 0.0)
    return Ratings(mean, np.sqrt(variance), mass, distribution)


def rating_sample(
    model: Loaded, problem: str, trace: str, dimensions: Sequence[str], rubric: Rubric
) -> PackedSample:
    """Trunk and branches of one trace; the targets mark the last position of every branch, where the label is read."""
    trunk, suffixes = trunk_and_suffixes(model.text, problem, trace, dimensions, rubric)
    tokens, positions, branches, ends = (
        [*trunk],
        [*range(len(trunk))],
        [0] * len(trunk),
        [False] * len(trunk),
    )
    for b, suffix in enumerate(suffixes):
        tokens += suffix
        positions += range(len(trunk), len(trunk) + len(suffix))
        branches += [b + 1] * len(suffix)
        ends += [False] * (len(suffix) - 1) + [True]
    return PackedSample(
        np.asarray(tokens, np.int32),
        np.asarray(ends),
        np.asarray(positions, np.int32),
        np.asarray(branches, np.int32),
    )


@functools.cache
def _reader(spec: ModelSpec, dtype: str, mesh: Mesh) -> Callable[..., Any]:
    """Label probabilities [N, 5] at positions (row, column) [N] of a packed batch."""
    graphdef, params = abstract(spec, jnp.dtype(dtype))

    def read(params: nnx.State, batch: PackedBatch, at: Any, labels: Any) -> Any:
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(
            batch.tokens, batch.positions, batch.segments, batch.branches, mesh=mesh
        )[at[0], at[1]]
        logits = jnp.einsum(
            "nd,vd->nv", hidden, model.unembedding(), preferred_element_type=jnp.float32
        )
        return jnp.exp(logits[:, labels] - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        read,
        in_shardings=(shardings(params, mesh), NamedSharding(mesh, BATCH), everywhere, everywhere),
        out_shardings=everywhere,
    )


def rate_traces(
    model: Loaded,
    problems: Sequence[str],
    traces: Sequence[str],
    dimensions: Sequence[str],
    shape: Scoring,
    mesh: Mesh,
    dtype: str = "float32",
    rubric: Rubric = RUBRIC,
) -> tuple[Ratings, dict[str, float]]:
    """Rates every trace whole on every dimension.

    Args:
      model: the judge.
      problems: question of each trace.
      traces: texts to rate; data, never instructions.
      dimensions: of `config.DIMENSIONS`.
      shape: rows and row length of a batch.
      mesh: rows are spread over data and fsdp.
      dtype: of the computation.
      rubric: words of the prompt.

    Returns:
      ratings in the order of the traces, and counts (tokens, positions).

    Raises:
      ValueError: a label is not a single token, or a trace's prompt is longer than a row (a trace is never cut).
    """
    labels = np.asarray(label_ids(model.text), np.int32)
    samples = [
        rating_sample(model, p, t, dimensions, rubric)._replace(members=(i,))
        for i, (p, t) in enumerate(zip(problems, traces, strict=True))
    ]
    for i, s in enumerate(samples):
        if len(s.tokens) > shape.row_length:
            raise ValueError(
                f"The rating prompt of trace {i} has {len(s.tokens)} tokens and config.scoring.row_length "
                f"is {shape.row_length}; raise it: traces are judged whole."
            )
    read = _reader(model.spec, dtype, mesh)
    params = jax.device_put(model.state, shardings(model.state, mesh))
    found = np.zeros((len(samples), len(dimensions), len(labels)), np.float32)
    micros = pack([[[s]] for s in samples], shape.rows, shape.row_length)
    most = -(-shape.rows * shape.row_length // 64) * len(
        dimensions
    )  # labels read per batch: one compiled shape
    positions = 0.0
    for micro in micros:
        batch = drop_empty_half(micro.batch, mesh.shape["data"] * mesh.shape["fsdp"])
        positions += batch.tokens.size
        rows, columns = np.nonzero(batch.targets)
        owner = micro.order[batch.targets[rows, columns] - 1]
        branch = batch.branches[rows, columns] - 1
        for start in range(0, len(rows), most):
            part = slice(start, start + most)
            at = np.zeros((2, most), np.int32)
            at[:, : len(rows[part])] = rows[part], columns[part]
            p = np.asarray(read(params, shard(batch, mesh, BATCH), at, labels))
            found[owner[part], branch[part]] = p[: len(rows[part])]
    tokens = float(sum(len(s.tokens) for s in samples))
    return summarise(found), {"tokens": tokens, "positions": positions, "filled": tokens}
