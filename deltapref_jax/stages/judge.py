"""judge: one judge over one generator's traces, every dimension."""

import json

import pyarrow as pa

from deltapref_jax.config import Judge, MeshShape, Model, Scoring
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.judging.scorer import Ratings, rate_traces
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import LoadedModel, load
from deltapref_jax.records import RATING
from deltapref_jax.workspace import Job, Stats

VERSION = 2


def judge(job: Job) -> None:
    """TRACE and PROMPT to RATING; config: the judge's fields and the batch shape."""
    traces = job.table("sample")
    prompts = {row["prompt_id"]: row for row in job.table("prompts").to_pylist()}
    fields = dict(job.config["judge"])
    who = Judge(
        **fields
        | {"model": Model(**job.local.get("model", {})), "dimensions": tuple(fields["dimensions"])}
    )
    shape = Scoring(**job.config["scoring"])
    loaded: list[LoadedModel] = []

    def rate(rows: list[dict]) -> tuple[Ratings, Stats]:
        asked = [prompts[row["prompt_id"]] for row in rows]
        texts = [row["text"] for row in rows]
        if who.kind == "exact":
            return rate_exactly(
                [p["meta"] for p in asked],
                texts,
                [row["trace_id"] for row in rows],
                who.dimensions,
                who.noise,
                who.seed,
            ), {}
        if not loaded:
            loaded.append(load(who.model.path, who.model.dtype))
        questions = [json.loads(p["messages"])[-1]["content"] for p in asked]
        mesh = make_mesh(MeshShape(**job.local["mesh"]))
        return rate_traces(
            loaded[0], questions, texts, who.dimensions, shape, mesh, who.model.dtype
        )

    def make(shard: int) -> tuple[pa.Table, Stats]:
        rows = traces.slice(shard * shape.shard, shape.shard).to_pylist()
        ratings, stats = rate(rows)
        return rating_table(who, [row["trace_id"] for row in rows], ratings), stats | {
            "traces": len(rows)
        }

    job.shards(
        -(-traces.num_rows // shape.shard),
        make,
        "ratings",
        traces.num_rows * len(who.dimensions),
        together=True,
    )


def rating_table(who: Judge, trace_ids: list[str], ratings: Ratings) -> pa.Table:
    """RATING rows, trace by trace, dimension by dimension."""
    d = len(who.dimensions)
    flat = ratings.distribution.reshape(-1, 5)
    return pa.table(
        {
            "trace_id": [t for t in trace_ids for _ in range(d)],
            "judge": [who.name] * (len(trace_ids) * d),
            "dimension": list(who.dimensions) * len(trace_ids),
            "rating": ratings.expectation.reshape(-1),
            "spread": ratings.spread.reshape(-1),
            "mass": ratings.mass.reshape(-1),
            "distribution": flat.tolist(),
        }
    ).cast(RATING)
