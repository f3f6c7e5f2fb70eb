"""Ratings trace by trace and dimension by dimension, whatever the shards."""

import dataclasses
import json

import numpy as np
import pytest
from deltapref_jax.workspace import Node

from deltapref_jax.config import DIMENSIONS, Judge, MeshShape, Scoring
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.judging.scorer import rate_traces
from deltapref_jax.mesh import make_mesh
from deltapref_jax.records import AUDIT, RATING
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.world import from_meta, solution

SHAPE = Scoring(rows=8, row_length=1024, shard=4)


def node(bench, texts, stage="judge", shard=4, **judge):
    fields = dataclasses.asdict(Judge(**{"name": "j"} | judge))
    fields.pop("model")
    config = {
        "judge": fields,
        "scoring": dataclasses.asdict(dataclasses.replace(SHAPE, shard=shard)),
    }
    inputs = {"prompts": bench.prompts}
    if stage == "judge":
        inputs["sample"] = bench.traces("g", texts)
    else:
        config |= {"count": 3, "seed": 0}
    local = {"mesh": bench.mesh}
    if judge.get("kind") == "model":
        config["weights"], local["model"] = (
            bench.weights,
            {"path": bench.folder, "dtype": "float32"},
        )
    return Node(stage, stage, config, inputs, local)


def columns(rows, name):
    return np.array([row[name] for row in rows]).reshape(
        -1, len(DIMENSIONS), *np.shape(rows[0][name])
    )


@pytest.mark.parametrize("kind", ["exact", "model"])
def test_the_table_is_the_judges_ratings(bench, worked, tiny, kind):
    made = node(bench, worked[1], kind=kind, noise=0.4, seed=2)
    rows = bench.rows(made)
    traces = made.inputs["sample"].local["rows"]
    assert bench.workspace.table(made).schema == RATING
    assert [(r["trace_id"], r["dimension"], r["judge"]) for r in rows] == [
        (t["trace_id"], d, "j") for t in traces for d in DIMENSIONS
    ]
    if kind == "exact":
        want = rate_exactly(
            [q["meta"] for q in bench.questions],
            worked[1],
            [t["trace_id"] for t in traces],
            DIMENSIONS,
            0.4,
            2,
        )
    else:
        want = rate_traces(
            tiny,
            [json.loads(q["messages"])[-1]["content"] for q in bench.questions],
            worked[1],
            DIMENSIONS,
            SHAPE,
            make_mesh(MeshShape()),
        )[0]
    for name, values in zip(("rating", "spread", "mass", "distribution"), want, strict=True):
        np.testing.assert_allclose(columns(rows, name), values, rtol=1e-3, atol=1e-4)
    assert bench.stats(made)["traces"] == 6
    assert len(list(bench.workspace.path(made).glob("*.parquet"))) == 2


def test_shards_do_not_matter(bench, worked):
    assert bench.rows(node(bench, worked[1], noise=0.4)) == bench.rows(
        node(bench, worked[1], noise=0.4, shard=100)
    )


def test_a_judge_of_some_dimensions(bench, worked):
    rows = bench.rows(node(bench, worked[1], dimensions=("step_coherence", "factuality")))
    for row, want in zip(
        rows,
        [
            (q, t, d)
            for q, t in zip(bench.questions, worked[1], strict=True)
            for d in ("step_coherence", "factuality")
        ],
        strict=True,
    ):
        assert row["dimension"] == want[2]
        assert row["rating"] == pytest.approx(rate(from_meta(want[0]["meta"]), want[1])[want[2]])


def test_a_trace_that_is_too_long_is_one_sentence(bench, worked):
    with pytest.raises(
        ValueError,
        match=r"^The rating prompt of trace 2 has \d+ tokens and config\.scoring\."
        r"row_length is 1024; raise it: traces are judged whole\.$",
    ):
        bench.make(node(bench, [*worked[0][:2], "so " * 900, *worked[0][3:]], kind="model"))


def test_an_audit_rates_every_corruption_of_every_degree(bench):
    made = node(bench, None, stage="audit")
    rows = bench.rows(made)
    assert bench.workspace.table(made).schema == AUDIT
    targets = [("", 0)] + [(d, k) for d in DIMENSIONS for k in range(1, 5)]
    assert [(r["prompt_id"], r["target"], r["degree"], r["dimension"]) for r in rows] == [
        (q["prompt_id"], *t, d) for q in bench.questions[:3] for t in targets for d in DIMENSIONS
    ]
    assert {r["rating"] for r in rows if not r["target"]} == {5.0}
    spoiled = [
        r["rating"]
        for r in rows
        if r["target"] == r["dimension"] == "signal_to_noise" and r["degree"] == 1
    ]
    assert spoiled == [
        pytest.approx(5 - 4 / (1 + len(solution(from_meta(q["meta"])).splitlines())))
        for q in bench.questions[:3]
    ]


def test_an_audit_by_a_model_reads_the_same_cases(bench, tiny):
    made = node(bench, None, stage="audit", kind="model", dimensions=("factuality",))
    rows = bench.rows(made)
    assert len(rows) == 3 * 21
    clean = [r["rating"] for r in rows if not r["target"]]
    problems = [from_meta(q["meta"]) for q in bench.questions[:3]]
    want = rate_traces(
        tiny,
        [p.question for p in problems],
        [solution(p) for p in problems],
        ("factuality",),
        SHAPE,
        make_mesh(MeshShape()),
    )[0].expectation[:, 0]
    np.testing.assert_allclose(clean, want, rtol=1e-4)
