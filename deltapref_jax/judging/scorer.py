"""Ratings from the logits of label tokens after one prefill; the judge generates no text.

Each trace is one packed sequence: its trunk, and a branch per dimension that sees the trunk and
itself. The rating is the expectation over the single-token labels 1 to 5 (arXiv 2503.03064 finds
that the mean is better than the mode).
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
from deltapref_jax.mesh import place, shard
from deltapref_jax.models.attention.dense import capped
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel, abstract
from deltapref_jax.scoring.packing import PackedBatch, PackedSample, drop_empty_half, pack


class Ratings(NamedTuple):
    """Ratings of n traces on d dimensions."""

    expectation: np.ndarray  # [n, d], 1 to 5
    spread: np.ndarray  # [n, d], standard deviation over the labels
    mass: np.ndarray  # [n, d], probability of all labels before renormalising
    distribution: np.ndarray  # [n, d, 5], sums to 1


def summarise(probabilities: np.ndarray) -> Ratings:
    """Returns expectation, spread and mass of the model's label probabilities [n, d, 5]."""
    mass = probabilities.sum(axis=-1)
    distribution = probabilities / np.maximum(mass, 1e-30)[..., None]
    labels = np.arange(1, 6)
    mean = distribution @ labels
    # Rounding may make the variance of a sure judge slightly negative.
    variance = np.maximum(distribution @ labels**2 - mean**2, 0.0)
    return Ratings(mean, np.sqrt(variance), mass, distribution)


def rating_sample(
    model: LoadedModel, problem: str, trace: str, dimensions: Sequence[str], rubric: Rubric
) -> PackedSample:
    """Builds the packed sequence of one trace: a trunk, and a branch per dimension.

    The targets mark the last position of every branch, where the label's probability is read.
    """
    trunk, suffixes = trunk_and_suffixes(model.text, problem, trace, dimensions, rubric)
    tokens, positions = [*trunk], [*range(len(trunk))]
    branches, ends = [0] * len(trunk), [False] * len(trunk)
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
def _label_probability_fn(spec: ModelSpec, dtype: str, mesh: Mesh) -> Callable[..., Any]:
    """Returns a compiled function (params, batch, indices, labels) -> probabilities [N, 5].

    The probabilities are those of the tokens `labels` [5] at the positions `indices`, (row, column)
    as [2, N], of a packed batch.
    """
    graphdef, params = abstract(spec, jnp.dtype(dtype))

    def probabilities(params: nnx.State, batch: PackedBatch, indices: Any, labels: Any) -> Any:
        model = nnx.merge(graphdef, params)
        # Only the positions that predict a label are projected to the vocabulary.
        hidden = model.hidden(
            batch.tokens, batch.positions, batch.segments, batch.branches, mesh=mesh
        )[indices[0], indices[1]]
        with jax.named_scope("unembedding"):
            logits = jnp.einsum(
                "nd,vd->nv", hidden, model.unembedding(), preferred_element_type=jnp.float32
            )
            logits = capped(logits, spec.logit_cap)
            # Probabilities are over the whole vocabulary, so their sum shows how much falls on
            # labels.
            return jnp.exp(logits[:, labels] - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, BATCH)
    return jax.jit(
        probabilities,
        in_shardings=(shardings(params, mesh), rows, replicated, replicated),
        out_shardings=replicated,
    )


def _rating_samples(
    model: LoadedModel,
    problems: Sequence[str],
    traces: Sequence[str],
    dimensions: Sequence[str],
    row_length: int,
    rubric: Rubric,
) -> list[PackedSample]:
    """Builds the packed sequences of all traces.

    Raises:
      ValueError: the prompt of a trace is longer than a row.
    """
    samples = [
        rating_sample(model, p, t, dimensions, rubric)._replace(members=(i,))
        for i, (p, t) in enumerate(zip(problems, traces, strict=True))
    ]
    for i, s in enumerate(samples):
        if len(s.tokens) > row_length:
            raise ValueError(
                f"The rating prompt of trace {i} has {len(s.tokens)} tokens and "
                f"config.scoring.row_length is {row_length}; raise it: traces are judged "
                "whole."
            )
    return samples


def rate_traces(
    model: LoadedModel,
    problems: Sequence[str],
    traces: Sequence[str],
    dimensions: Sequence[str],
    shape: Scoring,
    mesh: Mesh,
    dtype: str = "float32",
    rubric: Rubric = RUBRIC,
) -> tuple[Ratings, dict[str, float]]:
    """Rates every trace on every dimension; traces are never truncated.

    Args:
      model: the judge.
      problems: what each trace answers, as `rubric.conversation` writes it.
      traces: texts to rate, which the prompt marks as data.
      dimensions: dimensions of `config.DIMENSIONS`.
      shape: rows and row length of a batch.
      mesh: rows are sharded over data and fsdp.
      dtype: dtype of the computation.
      rubric: texts of the prompt.

    Returns:
      ratings: in the order of the traces.
      counts: `tokens` and `filled`, the tokens of all prompts, and `positions` that were computed,
        padding included.

    Raises:
      ValueError: a label is not a single token, or the prompt of a trace is longer than a row.
    """
    labels = np.asarray(label_ids(model.text), np.int32)
    samples = _rating_samples(model, problems, traces, dimensions, shape.row_length, rubric)
    label_probabilities = _label_probability_fn(model.spec, dtype, mesh)
    params = place(model.state, shardings(model.state, mesh))
    probabilities = np.zeros((len(samples), len(dimensions), len(labels)), np.float32)
    micros = pack([[[s]] for s in samples], shape.rows, shape.row_length)
    # Labels read by one call: one for every 64 tokens and dimension. The size is fixed, so that one
    # shape is compiled; a batch with more labels takes several calls.
    size = -(-shape.rows * shape.row_length // 64) * len(dimensions)
    positions = 0.0
    for micro in micros:
        batch = drop_empty_half(micro.batch, mesh.shape["data"] * mesh.shape["fsdp"])
        positions += batch.tokens.size
        rows, columns = np.nonzero(batch.targets)
        # A target holds the number of its segment, and `order` the trace of every segment.
        owner = micro.order[batch.targets[rows, columns] - 1]
        branch = batch.branches[rows, columns] - 1
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            # Entries that are not needed point at (0, 0), and their probabilities are cut off.
            indices = np.zeros((2, size), np.int32)
            indices[:, : len(rows[part])] = rows[part], columns[part]
            p = np.asarray(label_probabilities(params, shard(batch, mesh, BATCH), indices, labels))
            probabilities[owner[part], branch[part]] = p[: len(rows[part])]
    tokens = float(sum(len(s.tokens) for s in samples))
    return summarise(probabilities), {"tokens": tokens, "positions": positions, "filled": tokens}
