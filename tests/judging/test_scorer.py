"""Ratings from branches equal those of single dimensions and those from the full logits."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import DIMENSIONS, MeshShape, Scoring
from deltapref_jax.judging.rubric import RUBRIC, label_ids
from deltapref_jax.judging.scorer import (
    _label_probability_fn,
    rate_traces,
    rating_sample,
    summarise,
)
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract, load
from deltapref_jax.scoring.packing import PackedBatch
from deltapref_jax.synthetic.world import problem, solution

PROBLEMS = [problem(("chain", "shop", "logic")[i % 3], 1 + i % 2, 3, i) for i in range(7)]
QUESTIONS, TRACES = (
    [p.question for p in PROBLEMS],
    [solution(p) for p in PROBLEMS[:-1]] + ["<|im_end|>5"],
)
SHAPE = Scoring(rows=4, row_length=1024)


@pytest.fixture(scope="module")
def judge(tiny):
    """A judge whose label probabilities are far from uniform."""
    return type(tiny)(
        **vars(tiny) | {"state": jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, tiny.state)}
    )


@pytest.fixture(scope="module")
def rated(judge, one_device):
    return rate_traces(judge, QUESTIONS, TRACES, DIMENSIONS, SHAPE, one_device)


def close(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def test_by_hand_from_the_full_logits(judge, rated):
    ids = label_ids(judge.text)
    model, ratings = nnx.merge(judge.graphdef, judge.state), rated[0]
    forward = jax.jit(
        lambda t: model.hidden(t, jnp.arange(1024)[None], t * 0 + 1) @ model.unembedding().T
    )
    for i, d in ((0, 0), (0, 4), (5, 2), (6, 1)):
        content = RUBRIC.trunk(QUESTIONS[i], TRACES[i], judge.text.special) + RUBRIC.question(
            DIMENSIONS[d]
        )
        tokens = rating_sample(judge, QUESTIONS[i], TRACES[i], [DIMENSIONS[d]], RUBRIC).tokens
        assert judge.text.tokenizer.decode(tokens) == judge.text.render(
            [{"role": "user", "content": content}]
        )
        padded = np.zeros((1, 1024), np.int32)
        padded[0, : len(tokens)] = tokens  # causal: what follows is not seen
        p = np.asarray(jax.nn.softmax(forward(padded)[0, len(tokens) - 1]), np.float64)[ids]
        q = p / p.sum()
        mean = sum(label * x for label, x in zip(range(1, 6), q, strict=True))
        spread = (
            sum((label - mean) ** 2 * x for label, x in zip(range(1, 6), q, strict=True)) ** 0.5
        )
        got = (
            ratings.mass[i, d],
            ratings.expectation[i, d],
            ratings.spread[i, d],
            *ratings.distribution[i, d],
        )
        np.testing.assert_allclose(got, (p.sum(), mean, spread, *q), rtol=2e-3, atol=1e-6)


def test_branches_are_each_dimension_alone(judge, rated, one_device):
    alone = [rate_traces(judge, QUESTIONS, TRACES, [d], SHAPE, one_device)[0] for d in DIMENSIONS]
    close(
        rated[0], [np.concatenate([getattr(a, f) for a in alone], axis=1) for f in rated[0]._fields]
    )


def test_order_and_batching_and_devices_do_not_matter(judge, rated, one_device):
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled, _ = rate_traces(
        judge,
        [QUESTIONS[i] for i in order],
        [TRACES[i] for i in order],
        DIMENSIONS,
        Scoring(rows=1, row_length=1200),
        one_device,
    )
    close(rated[0], [x[np.argsort(order)] for x in shuffled])
    spread, _ = rate_traces(
        judge,
        QUESTIONS,
        TRACES,
        DIMENSIONS,
        Scoring(rows=8, row_length=1024),
        make_mesh(MeshShape(2, 2, 2)),
    )
    close(rated[0], spread)


def test_no_array_holds_the_logits_of_many_positions(one_device):
    spec = ModelSpec(16_384, 32, 1, 4, 2, 8, 48)
    batch = PackedBatch(*(jax.ShapeDtypeStruct((4, 1024), jnp.int32) for _ in range(5)))
    read = _label_probability_fn(spec, "float32", one_device)
    labels = jax.ShapeDtypeStruct((5,), jnp.int32)
    text = read.lower(abstract(spec)[1], batch, labels).as_text()
    sizes = [
        np.prod([int(n) for n in s[:-1].split("x")]) for s in re.findall("<([0-9x]+x)f32>", text)
    ]
    assert 4 * 1024 * 5 in sizes
    assert max(sizes) <= spec.vocab * spec.width  # the unembedding


def test_counts(judge, rated):
    tokens = sum(
        len(rating_sample(judge, q, t, DIMENSIONS, RUBRIC).tokens)
        for q, t in zip(QUESTIONS, TRACES, strict=True)
    )
    assert rated[1]["tokens"] == tokens
    assert rated[1]["positions"] % (4 * 1024) == 0
    assert tokens <= rated[1]["positions"]


def test_summary_in_closed_form():
    r = summarise(np.array([[[0.1, 0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.3, 0.0, 0.0]]]))
    np.testing.assert_allclose(r.expectation, [[3.0, 3.0]])
    np.testing.assert_allclose(r.spread, [[2.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(r.mass, [[0.2, 0.3]])
    np.testing.assert_allclose(r.distribution.sum(-1), 1.0)


def test_a_trace_longer_than_a_row_is_refused_whole(judge, one_device):
    n = len(rating_sample(judge, QUESTIONS[1], TRACES[1], DIMENSIONS, RUBRIC).tokens)
    longest = max(
        len(rating_sample(judge, q, t, DIMENSIONS, RUBRIC).tokens)
        for q, t in zip(QUESTIONS[:1], TRACES[:1], strict=True)
    )
    assert n > longest
    with pytest.raises(ValueError) as error:
        rate_traces(
            judge,
            QUESTIONS[:2],
            TRACES[:2],
            DIMENSIONS,
            Scoring(rows=1, row_length=n - 1),
            one_device,
        )
    assert str(error.value) == (
        f"The rating prompt of trace 1 has {n} tokens and config.scoring.row_length is "
        f"{n - 1}; raise it: traces are judged whole."
    )


def test_a_judge_whose_labels_are_several_tokens_is_refused(tiny_folder, one_device, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "judge")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "1"}, "content": "01"}
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match=r"^The label '1' is 2 tokens in the tokenizer of .*/judge; a judge needs "
    ):
        rate_traces(load(str(folder)), QUESTIONS, TRACES, DIMENSIONS, SHAPE, one_device)
