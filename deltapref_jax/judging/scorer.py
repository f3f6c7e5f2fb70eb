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
from deltapref_jax.models.program import Program, array, packed_rows, placed_weights
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel, abstract
from deltapref_jax.scoring.packing import PackedBatch, PackedSample, drop_empty_half, pack
from deltapref_jax.scoring.projection import token_logprobs


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
    """Returns a compiled function (params, batch, labels) -> probabilities [B, L, 5].

    The probabilities are those of the tokens `labels` [5] after each target of a packed batch, and
    0 at other positions.
    """
    graphdef, params = abstract(spec, jnp.dtype(dtype))

    def probabilities(params: nnx.State, batch: PackedBatch, labels: Any) -> Any:
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(
            batch.tokens, batch.positions, batch.segments, batch.branches, mesh=mesh
        )
        mask, rows = batch.targets > 0, model.output_rows()
        # Probabilities are over the whole vocabulary, so their sum shows how much falls on labels.
        # That of the first label is read in tiles of the vocabulary, at targets alone; the others
        # follow from it by the differences of the labels' logits.
        first = jnp.broadcast_to(labels[0], mask.shape)
        logprob = token_logprobs(hidden, rows, first, mask, mesh, spec.logit_cap)
        with jax.named_scope("unembedding"):
            label_rows = rows[labels].astype(hidden.dtype)
            logits = jnp.einsum(
                "bld,cd->blc", hidden, label_rows, preferred_element_type=jnp.float32
            )
            logits = capped(logits, spec.logit_cap)
            logprobs = logprob[..., None] + logits - logits[..., :1]
            return jnp.where(mask[..., None], jnp.exp(logprobs), 0.0)

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, BATCH)
    return jax.jit(
        probabilities,
        in_shardings=(shardings(params, mesh), rows, replicated),
        out_shardings=replicated,
    )


def label_program(spec: ModelSpec, dtype: str, shape: Scoring, mesh: Mesh) -> Program:
    """The program of `rate_traces` with abstract arguments."""
    ids = packed_rows(mesh, shape.rows, shape.row_length)
    return Program(
        _label_probability_fn(spec, dtype, mesh),
        (
            placed_weights(abstract(spec)[1], spec, mesh, dtype),
            PackedBatch(ids, ids, ids, ids, ids),
            array(mesh, PartitionSpec(), jnp.int32, 5),
        ),
    )


def _rating_samples(
    model: LoadedModel,
    problems: Sequence[str],
    traces: Sequence[str],
    dimensions: Sequence[str],
    row_length: int,
    rubric: Rubric,
    drop_long: bool,
) -> list[PackedSample]:
    """Builds the packed sequences of all traces, or of those that fit a row.

    Raises:
      ValueError: the prompt of a trace is longer than a row, and such traces are not dropped.
    """
    samples = [
        rating_sample(model, p, t, dimensions, rubric)._replace(members=(i,))
        for i, (p, t) in enumerate(zip(problems, traces, strict=True))
    ]
    if drop_long:
        return [s for s in samples if len(s.tokens) <= row_length]
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
    drop_long: bool = False,
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
      drop_long: whether a trace whose prompt is longer than a row gets ratings of NaN.

    Returns:
      ratings: in the order of the traces.
      counts: `tokens` and `filled`, the tokens of all prompts, and `positions` that were computed,
        padding included.

    Raises:
      ValueError: a label is not a single token, or the prompt of a trace is longer than a row
        and `drop_long` is false.
    """
    labels = np.asarray(label_ids(model.text), np.int32)
    samples = _rating_samples(
        model, problems, traces, dimensions, shape.row_length, rubric, drop_long
    )
    label_probabilities = _label_probability_fn(model.spec, dtype, mesh)
    params = place(model.state, shardings(model.state, mesh))
    probabilities = np.full((len(traces), len(dimensions), len(labels)), np.nan, np.float32)
    micros = pack([[[s]] for s in samples], shape.rows, shape.row_length)
    positions = 0.0
    for micro in micros:
        batch = drop_empty_half(micro.batch, mesh.shape["data"] * mesh.shape["fsdp"])
        positions += batch.tokens.size
        rows, columns = np.nonzero(batch.targets)
        # A target holds the number of its segment, and `order` the trace of every segment.
        owner = micro.order[batch.targets[rows, columns] - 1]
        branch = batch.branches[rows, columns] - 1
        p = np.asarray(label_probabilities(params, shard(batch, mesh, BATCH), labels))
        probabilities[owner, branch] = p[rows, columns]
    tokens = float(sum(len(s.tokens) for s in samples))
    return summarise(probabilities), {"tokens": tokens, "positions": positions, "filled": tokens}
