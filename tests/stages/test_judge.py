"""Ratings trace by trace and dimension by dimension, whatever the shards."""

import dataclasses

import numpy as np
import pytest

from deltapref_jax.config import DIMENSIONS, Generator, Judge, MeshShape, Scoring
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.judging.rubric import PARAPHRASES
from deltapref_jax.judging.scorer import rate_traces
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import load
from deltapref_jax.records import Audit, Rating, Retest, digest, schema
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.judge_mean import MeanRatingTable
from deltapref_jax.stages.retest import RetestTable
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


def test_a_quantised_judge_is_another_artifact_and_says_so(bench, worked, tiny):
    plain = ratings(bench, worked[1], kind="model")
    judge = dataclasses.replace(
        plain.judge, model=dataclasses.replace(plain.judge.model, quantization="int8")
    )
    made = dataclasses.replace(plain, judge=judge)
    assert made.config() != plain.config()
    rows, others = bench.rows(Rating, made), bench.rows(Rating, plain)
    shift = np.abs(np.subtract([r.rating for r in rows], [r.rating for r in others]))
    assert 0 < shift.max() < 0.2
    model = load(judge.model.place, quantization="int8")
    expected, _ = rate_traces(
        model,
        [q.question for q in bench.questions],
        worked[1],
        DIMENSIONS,
        SHAPE,
        make_mesh(bench.mesh),
    )
    np.testing.assert_allclose([r.rating for r in rows], expected.expectation.ravel(), atol=1e-4)
    assert bench.workspace.table(made).schema.metadata == {b"quantization": b"int8"}
    assert not bench.workspace.table(plain).schema.metadata
    manifest = bench.workspace.manifest(made)
    assert manifest.config["judge"]["model"]["quantization"] == "int8"


def columns(rows, name):
    values = [getattr(row, name) for row in rows]
    return np.array(values).reshape(-1, len(DIMENSIONS), *np.shape(values[0]))


def given_ratings(bench, generator, judge, values):
    """`values`: [traces, dimensions] on the first two dimensions."""
    ids = [row.trace_id for row in bench.traces(generator, ["x"] * 6).rows]
    return bench.given(
        Rating,
        [
            Rating(trace, judge, dimension, value, 0.0, 1.0, [0.2] * 5)
            for trace, row in zip(ids, values, strict=True)
            for dimension, value in zip(DIMENSIONS, row, strict=False)
        ],
    )


def test_a_mean_weighs_judges_of_different_spread_alike(bench):
    rng = np.random.default_rng(0)
    a = {g: rng.uniform(1, 5, (6, 2)).astype(np.float32) for g in ("strong", "weak")}
    b = {g: rng.uniform(1, 5, (6, 2)).astype(np.float32) for g in ("strong", "weak")}
    narrow = {g: (3 + (values - 3) / 20).astype(np.float32) for g, values in b.items()}

    def mean(**judges):
        node = MeanRatingTable(
            label=("judge", "both", "weak"),
            ratings={
                name: {g: given_ratings(bench, g, name, v) for g, v in values.items()}
                for name, values in judges.items()
            },
            generator="weak",
            judge=Judge(name="both", kind="mean", of=tuple(judges), dimensions=DIMENSIONS[:2]),
        )
        rows = bench.rows(Rating, node)
        assert [(r.trace_id, r.dimension, r.judge) for r in rows] == [
            (digest(q.prompt_id, "weak"), d, "both")
            for q in bench.questions
            for d in DIMENSIONS[:2]
        ]
        return np.array([(r.rating, r.spread) for r in rows]).reshape(6, 2, 2)

    wide, shrunk = mean(a=a, b=b), mean(a=a, b=narrow)
    z = [
        (x["weak"] - np.concatenate(list(x.values())).mean(axis=0))
        / np.concatenate(list(x.values())).std(axis=0)
        for x in (a, b)
    ]
    for found, other in ((wide, b), (shrunk, narrow)):
        both = [np.concatenate(list(x.values())) for x in (a, other)]
        centre, scale = (np.mean([f(x, axis=0) for x in both], axis=0) for f in (np.mean, np.std))
        np.testing.assert_allclose(found[..., 0], centre + scale * (z[0] + z[1]) / 2, rtol=1e-5)
        np.testing.assert_allclose(found[..., 1], scale * abs(z[0] - z[1]) / 2, rtol=1e-4)
    # The order of the traces is the same however narrow one of the judges is.
    np.testing.assert_array_equal(wide[..., 0].argsort(axis=0), shrunk[..., 0].argsort(axis=0))
    # A judge that rates all alike leaves the other's order.
    silent = {g: np.full((6, 2), 4.0, np.float32) for g in a}
    np.testing.assert_array_equal(
        mean(a=a, b=silent)[..., 0].argsort(axis=0), a["weak"].argsort(axis=0)
    )


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


def sampled(bench, **texts):
    """Traces of generators, as tables that know who wrote them."""
    return {
        name: dataclasses.replace(
            bench.traces(name, of_generator), generator=Generator(name=name, prefix="Now: ")
        )
        for name, of_generator in texts.items()
    }


def test_an_audit_edits_the_traces_of_generators(bench, worked):
    texts = [*worked[1][:5], "Hm."]
    made = audit(bench)
    edited = dataclasses.replace(
        made, traces=sampled(bench, g=texts), finishes=("eos",), count=9, label=("audit", "j", "t")
    )
    rows = bench.rows(Audit, edited)
    assert bench.workspace.key(edited) != bench.workspace.key(made)
    clean = {r.prompt_id: r for r in rows if not r.target and r.dimension == DIMENSIONS[0]}
    of = {q.prompt_id: (q, text) for q, text in zip(bench.questions, texts, strict=True)}
    assert clean.keys() == of.keys()
    for prompt, r in clean.items():
        question, text = of[prompt]
        assert r.rating == pytest.approx(rate(from_meta(question.meta), text)[DIMENSIONS[0]])
        assert (r.degree, r.characters) == (0, len(text))
        assert r.correct == text.endswith(f"Answer: {question.answer}")
    targets = [(r.prompt_id, r.target) for r in rows if r.target and r.dimension == DIMENSIONS[0]]
    assert len(set(targets)) == len(targets) and {r.degree for r in rows if r.target} <= {
        1,
        2,
        3,
        4,
    }
    # A text of one word has room for a filler alone; what could not be edited is counted.
    short = [target for prompt, target in targets if of[prompt][1] == "Hm."]
    assert short == ["signal_to_noise"]
    assert bench.stats(edited)["uneditable"] == 6 * 5 - len(targets) > 0


def test_a_retest_rates_both_traces_under_every_wording(bench, worked, tiny):
    made = RetestTable(
        label=("retest", "j"),
        prompts=bench.prompts,
        traces=sampled(bench, a=worked[0], b=worked[1]),
        generators=(("a", "b"),),
        finishes=("eos",),
        scoring=SHAPE,
        count=4,
        mesh=bench.mesh,
        **judge_of(bench, kind="model", dimensions=DIMENSIONS[:2]),
    )
    rows = bench.rows(Retest, made)
    assert bench.schema(made) == schema(Retest) and len(rows) == 4 * len(PARAPHRASES) * 2
    drawn = sorted(bench.questions, key=lambda q: q.prompt_id)[:4]
    texts = {
        digest(q.prompt_id, g): t
        for g, of in (("a", worked[0]), ("b", worked[1]))
        for q, t in zip(bench.questions, of, strict=True)
    }
    for wording, rubric in enumerate(PARAPHRASES):
        of_wording = [r for r in rows if r.wording == wording]
        ids = [(digest(q.prompt_id, "a"), digest(q.prompt_id, "b")) for q in drawn]
        assert [(r.chosen_id, r.rejected_id) for r in of_wording[::2]] == ids
        want = rate_traces(
            tiny,
            [f"Now: {q.question}" for q in drawn],
            [texts[chosen] for chosen, _ in ids],
            DIMENSIONS[:2],
            SHAPE,
            make_mesh(bench.mesh),
            rubric=rubric,
        )[0].expectation
        found = np.array([r.chosen for r in of_wording]).reshape(4, 2)
        np.testing.assert_allclose(found, want, atol=1e-4)
    # Of rows too short for any prompt, all pairs are left out and counted, once per wording.
    small = dataclasses.replace(made, scoring=dataclasses.replace(SHAPE, row_length=16))
    assert bench.rows(Retest, small) == []
    assert bench.stats(small)["too_long"] == 4 * len(PARAPHRASES)
