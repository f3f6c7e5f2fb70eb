"""judge: one judge over one generator's traces, every dimension."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import pyarrow as pa

from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import Judge, MeshShape, Scoring
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.judging.rubric import RUBRIC, Rubric, conversation
from deltapref_jax.judging.scorer import Ratings, rate_traces
from deltapref_jax.mesh import make_mesh, rows_of
from deltapref_jax.models.weights import open_model
from deltapref_jax.records import Prompt, Rating, Trace, from_table, schema
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable, asked, marked

# (prompts, ids of the texts, texts) to ratings and counts
Rate = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], tuple[Ratings, Stats]]


class RatingTable(Node, stage="judge", version=5, sharded=True):
    """RATING: every trace on every dimension of the judge.

    A model sees the whole conversation that the traces answer.

    Attributes:
      weights: hash of the judge's weights; "" of the exact judge, which has none.
      system: system message that the generator of the traces was given.
      prefix: what the generator's questions began with.
    """

    prompts: PromptTable
    traces: TraceTable
    judge: Judge
    weights: str
    scoring: Scoring
    system: str = ""
    prefix: str = ""
    mesh: MeshShape = runtime()

    def make(self, job: Job) -> None:
        """Rates one shard of `scoring.shard` traces at a time."""
        traces = job.table(self.traces)
        prompts = {prompt.prompt_id: prompt for prompt in job.rows(Prompt, self.prompts)}
        size, dimensions = self.scoring.shard, self.judge.dimensions
        rate = rater(self.judge, self.scoring, self.mesh, self.system, self.prefix)

        def make(shard: int) -> tuple[pa.Table, Stats]:
            part = from_table(Trace, traces.slice(shard * size, size))
            ids = [trace.trace_id for trace in part]
            texts = [trace.text for trace in part]
            ratings, stats = rate([prompts[trace.prompt_id] for trace in part], ids, texts)
            return rating_table(self.judge, ids, ratings), stats | {"traces": len(part)}

        total = traces.num_rows * len(dimensions)
        job.shards(-(-traces.num_rows // size), make, "ratings", total, together=True)


def rater(
    judge: Judge,
    scoring: Scoring,
    mesh: MeshShape,
    system: str = "",
    prefix: str = "",
    rubric: Rubric = RUBRIC,
    drop_long: bool = False,
) -> Rate:
    """The function that rates texts as `judge` does; its model is loaded with the first of them.

    Args:
      judge: who rates.
      scoring: shape of a model's batches.
      mesh: devices of a model.
      system: system message that the generator of the texts was given.
      prefix: what the generator's questions began with.
      rubric: texts of a model's prompt.
      drop_long: whether texts that are too long for a row of `scoring` get ratings of NaN; if not,
        they are an error.
    """
    if judge.kind == "exact":

        def exactly(
            prompts: Sequence[Prompt], ids: Sequence[str], texts: Sequence[str]
        ) -> tuple[Ratings, Stats]:
            metas = [prompt.meta for prompt in prompts]
            return rate_exactly(
                metas, list(texts), list(ids), judge.dimensions, judge.noise, judge.seed
            ), {}

        return exactly

    dtype, quantization = judge.model.dtype, judge.model.quantization
    model = functools.cache(lambda: open_model(judge.model.place, dtype, dtype, quantization))

    def by_model(
        prompts: Sequence[Prompt], ids: Sequence[str], texts: Sequence[str]
    ) -> tuple[Ratings, Stats]:
        devices = make_mesh(mesh)
        return rate_traces(
            model(),
            [conversation(asked(prompt, system, prefix)) for prompt in prompts],
            texts,
            judge.dimensions,
            dataclasses.replace(scoring, rows=rows_of(scoring.rows, devices.shape)),
            devices,
            dtype,
            rubric,
            drop_long,
        )

    return by_model


def rating_table(judge: Judge, trace_ids: Sequence[str], ratings: Ratings) -> pa.Table:
    """RATING rows, trace by trace, dimension by dimension."""
    d = len(judge.dimensions)
    columns = {
        "trace_id": [trace for trace in trace_ids for _ in range(d)],
        "judge": [judge.name] * (len(trace_ids) * d),
        "dimension": list(judge.dimensions) * len(trace_ids),
        "rating": ratings.expectation.reshape(-1),
        "spread": ratings.spread.reshape(-1),
        "mass": ratings.mass.reshape(-1),
        "distribution": ratings.distribution.reshape(-1, 5).tolist(),
    }
    return marked(pa.table(columns).cast(schema(Rating)), judge.model)
