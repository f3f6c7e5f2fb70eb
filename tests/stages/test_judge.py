"""Ratings trace by trace and dimension by dimension, whatever the shards."""

import dataclasses

import numpy as np
import pytest

from deltapref_jax.config import DIMENSIONS, Judge, MeshShape, Scoring
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.judging.scorer import rate_traces
from deltapref_jax.mesh import make_mesh
from deltapref_jax.records import Audit, Rating, schema
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.world import from_meta, solution

SHAPE = Scoring(rows=8, row_length=1024, shard=4)


def judge_of(bench, **fields):
    """A judge with the hash of its weights."""
    by_model = fields.get("kind") == "model"
    model = {"model": bench.model} if by_model else {}
    judge = Judge(**{"name": "j"} | fields | model)
    return {"judge": judge, "weights": bench.weights if by_model else ""}


def ratings(bench, texts, shard=4, **fields):
    return RatingTable(
        label=("judge", "j"),
        prompts=bench.prompts,
        traces=bench.traces("g", texts),
        scoring=Scoring(rows=8, row_length=1024, shard=shard),
        mesh=bench.mesh,
        **judge_of(bench, **fields),
    )


def audit(bench, **fields):
    return AuditTable(
        label=("audit", "j"),
        prompts=bench.prompts,
        scoring=SHAPE,
        count=3,
        seed=0,
        mesh=bench.mesh,
        **judge_of(bench, **fields),
    )


def columns(rows, name):
    values = [getattr(row, name) for row in rows]
    return np.array(values).reshape(-1, len(DIMENSIONS), *np.shape(values[0]))


@pytest.mark.parametrize("kind", ["exact", "model"])
def test_the_table_is_the_judges_ratings(bench, worked, tiny, kind):
    made = ratings(bench, worked[1], kind=kind, noise=0.4, seed=2)
    rows = bench.rows(Rating, made)
    traces = made.traces.rows
    assert bench.schema(made) == schema(Rating)
    assert [(r.trace_id, r.dimension, r.judge) for r in rows] == [
        (t.trace_id, d, "j") for t in traces for d in DIMENSIONS
    ]
    if kind == "exact":
        want = rate_exactly(
            [q.meta for q in bench.questions],
            worked[1],
            [t.trace_id for t in traces],
            DIMENSIONS,
            0.4,
            2,
        )
    else:
        want = rate_traces(
            tiny,
            [q.question for q in bench.questions],
            worked[1],
            DIMENSIONS,
            SHAPE,
            make_mesh(MeshShape()),
        )[0]
    for name, values in zip(("rating", "spread", "mass", "distribution"), want, strict=True):
        np.testing.assert_allclose(columns(rows, name), values, rtol=1e-3, atol=1e-4)
    assert bench.stats(made)["traces"] == 6
    assert len(list(bench.workspace.path(made).glob("*.parquet"))) == 2


def test_a_model_judges_with_what_the_generator_was_asked_in_view(bench, worked, tiny):
    plain = ratings(bench, worked[1], kind="model")
    asked = dataclasses.replace(plain, system="Be brief.", prefix="Now: ")
    want = rate_traces(
        tiny,
        [f"System: Be brief.\nUser: Now: {q.question}" for q in bench.questions],
        worked[1],
        DIMENSIONS,
        SHAPE,
        make_mesh(MeshShape()),
    )[0].expectation
    made = columns(bench.rows(Rating, asked), "rating")
    np.testing.assert_allclose(made, want, atol=3e-5)
    assert np.abs(made - columns(bench.rows(Rating, plain), "rating")).max() > 3e-4


def test_shards_do_not_matter(bench, worked):
    few, one = (ratings(bench, worked[1], noise=0.4, shard=shard) for shard in (4, 100))
    assert bench.rows(Rating, few) == bench.rows(Rating, one)
    assert bench.workspace.key(few) != bench.workspace.key(one)


def test_a_judge_of_some_dimensions(bench, worked):
    dimensions = ("step_coherence", "factuality")
    rows = bench.rows(Rating, ratings(bench, worked[1], dimensions=dimensions))
    wanted = [
        (q, t, d) for q, t in zip(bench.questions, worked[1], strict=True) for d in dimensions
    ]
    for row, (question, text, dimension) in zip(rows, wanted, strict=True):
        assert row.dimension == dimension
        assert row.rating == pytest.approx(rate(from_meta(question.meta), text)[dimension])


def test_a_trace_that_is_too_long_is_one_sentence(bench, worked):
    texts = [*worked[0][:2], "so " * 900, *worked[0][3:]]
    with pytest.raises(
        ValueError,
        match=r"^The rating prompt of trace 2 has \d+ tokens and config\.scoring\."
        r"row_length is 1024; raise it: traces are judged whole\.$",
    ):
        bench.make(ratings(bench, texts, kind="model"))


def test_an_audit_rates_every_corruption_of_every_degree(bench):
    made = audit(bench)
    rows = bench.rows(Audit, made)
    assert bench.schema(made) == schema(Audit)
    targets = [("", 0)] + [(d, k) for d in DIMENSIONS for k in range(1, 5)]
    assert [(r.prompt_id, r.target, r.degree, r.dimension) for r in rows] == [
        (q.prompt_id, *t, d) for q in bench.questions[:3] for t in targets for d in DIMENSIONS
    ]
    assert {r.rating for r in rows if not r.target} == {5.0}
    spoiled = [
        r.rating for r in rows if r.target == r.dimension == "signal_to_noise" and r.degree == 1
    ]
    assert spoiled == [
        pytest.approx(5 - 4 / (1 + len(solution(from_meta(q.meta)).splitlines())))
        for q in bench.questions[:3]
    ]


def test_an_audit_by_a_model_reads_the_same_cases(bench, tiny):
    rows = bench.rows(Audit, audit(bench, kind="model", dimensions=("factuality",)))
    assert len(rows) == 3 * 21
    clean = [r.rating for r in rows if not r.target]
    problems = [from_meta(q.meta) for q in bench.questions[:3]]
    want = rate_traces(
        tiny,
        [p.question for p in problems],
        [solution(p) for p in problems],
        ("factuality",),
        SHAPE,
        make_mesh(MeshShape()),
    )[0].expectation[:, 0]
    np.testing.assert_allclose(clean, want, rtol=1e-4)
