"""A nursery of two models and a handful of steps, through the entry point's main."""

import dataclasses
import json
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from absl import flags
from flax import nnx

import launch.nursery
from deltapref_jax.artifacts.node import in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    DIMENSIONS,
    ConfigError,
    Experiment,
    Model,
    ModelZoo,
    Prompts,
    Sampling,
    SmallModel,
    Suite,
)
from deltapref_jax.judging.rubric import RUBRIC, label_ids
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import abstract, load
from deltapref_jax.stages import nursery
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.world import solution
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.validation import validate_model_zoo

# Entry points define flags of one name, and a process of the tests may import several of them.
for flag in flags.FLAGS.flags_by_module_dict()["launch.nursery"]:
    delattr(flags.FLAGS, flag.name)

OAK = SmallModel(
    name="oak",
    tasks=("chain", "shop"),
    difficulties=(1,),
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    mlp=48,
    error_rate=0.2,
    steps=4,
    rows=4,
    row_length=128,
    learning_rate=1e-2,
)
JUDGE = SmallModel(
    name="judge",
    base="oak",
    curriculum="judge",
    tasks=("chain",),
    difficulties=(1,),
    layers=3,
    steps=2,
    rows=2,
    row_length=768,
    seed=2,
)


def changed(model, **fields):
    return dataclasses.replace(model, **fields)


def small(root):
    return validate_model_zoo(
        ModelZoo(
            workspace=str(root / "workspace"),
            output=str(root / "out"),
            vocab=500,
            models=(OAK, JUDGE),
            release=("oak", "judge"),
            suites=(Suite(name="chain", prompts=Prompts(tasks=("chain",), count=3, difficulty=1)),),
            sampling=Sampling(max_prompt=128, max_tokens=8, slots=8, chunk=4),
        )
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a nursery, made by the entry point."""
    root = tmp_path_factory.mktemp("nursery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "_TOKENIZER_TEXTS", 120)
        patch.setattr(nursery, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1]))
        patch.setattr(launch.nursery, "_CONFIG", types.SimpleNamespace(value=small(root)))
        patch.setattr(launch.nursery, "_MEASURE_ONLY", types.SimpleNamespace(value=False))
        launch.nursery.main([])
    return root


def test_models_are_folders_that_load(trained):
    oak, judge = load(str(trained / "out" / "oak")), load(str(trained / "out" / "judge"))
    assert oak.spec == dataclasses.replace(judge.spec, layers=2)
    assert (oak.spec.width, oak.spec.head_width, oak.spec.mlp, judge.spec.layers) == (32, 8, 48, 3)
    assert oak.spec.vocab == len(oak.text.tokenizer) == 500
    assert json.loads((trained / "out" / "judge" / "recipe.json").read_text())["base"] == "oak"
    measured = json.loads((trained / "out" / "measured.json").read_text())
    assert {name: set(found) for name, found in measured.items()} == {
        "oak": {"recipe", "in", "greedy", "entropy", "suites"},
        "judge": {"recipe", *DIMENSIONS},
    }
    assert set(measured["oak"]["greedy"]) == {"in"}
    assert set(measured["oak"]["suites"]["chain"]) == {"sampled", "greedy", "entropy"}


def test_a_solvers_suites_are_read_sampled_and_greedily(trained):
    zoo = small(trained)
    path = Model(path=str(trained / "out" / "oak"))
    e = Experiment(student=path, suites=zoo.suites, sampling=zoo.sampling)
    found = launch.nursery.accuracies(e, Workspace(zoo.workspace), "oak")
    # After four steps a model is nearly uniform over its 500 tokens, and never right.
    assert found["entropy"] == found["suites"]["chain"]["entropy"]
    assert 0.5 * np.log(500) < found["entropy"] < 1.3 * np.log(500)
    assert found["in"][0] == found["greedy"]["in"][0] == 0.0


def test_entropy_is_the_mean_over_tokens_and_not_over_answers():
    answers = pa.table({"logprob": [-1.0, -9.0], "tokens": [1, 4]})
    assert launch.nursery.entropy(answers) == 2.0


def test_they_learnt(trained):
    zoo = small(trained)
    workspace = Workspace(zoo.workspace)
    rows = list(read_metrics(workspace.path(nursery.plan(zoo)["oak"]) / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(np.log(500), rel=0.02)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_what_stands_is_left_alone(trained):
    zoo = small(trained)
    workspace, wanted = Workspace(zoo.workspace), nursery.plan(zoo)
    assert {*wanted} == {"oak", "judge"}
    assert all(workspace.complete(node, verify=True) for node in in_order(wanted.values()))
    # a key is not known before the inputs are made
    again = nursery.plan(dataclasses.replace(zoo, models=(OAK, changed(JUDGE, steps=3))))
    assert workspace.key(again["oak"]) == workspace.key(wanted["oak"])
    assert workspace.key(again["judge"]) not in (None, workspace.key(wanted["judge"]))
    again = nursery.plan(dataclasses.replace(zoo, models=(changed(OAK, seed=1), JUDGE)))
    assert workspace.key(again["oak"]) not in (None, workspace.key(wanted["oak"]))
    assert workspace.key(again["judge"]) is None


@pytest.mark.parametrize("model", [OAK, JUDGE], ids=["solve", "judge"])
def test_a_training_batch_is_a_pure_function_of_model_and_step(trained, model):
    text = load(str(trained / "out" / "oak")).text

    def arrays(step, model=model):
        ((batch, examples),) = nursery.training_batch(model, text, step).micros
        return [np.asarray(x) for x in (*batch, *examples) if x is not None]

    first = arrays(3)
    random.seed(0)
    arrays(4)
    for a, b in zip(first, arrays(3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != arrays(4)[0]).any()
    assert (first[0] != arrays(3, changed(model, seed=9))[0]).any()
    data = nursery.training_batch(model, text, 3)
    batch, examples = data.micros[0]
    assert batch.tokens.shape == (model.rows, model.row_length)
    assert examples.weight.sum() == batch.segments.max()
    assert data.total == (batch.targets > 0).sum() > 0
    assert data.tokens == (batch.segments > 0).sum()
    assert data.tokens / batch.tokens.size > 0.5


def test_a_solving_sample_is_questions_with_solutions(trained):
    text = load(str(trained / "out" / "oak")).text
    for i in range(20):
        rng = random.Random(i)
        s = nursery.solving(changed(OAK, error_rate=0.0), text, rng)
        p = nursery.draw(OAK, random.Random(i))
        assert text.tokenizer.decode(s.tokens[~s.targets]) == text.render(
            [{"role": "user", "content": p.question}]
        )
        worked = text.tokenizer.decode(s.tokens[s.targets])
        assert worked.endswith(f"Answer: {p.answer}<|im_end|>")


def test_solutions_follow_the_models_beliefs(trained):
    text = load(str(trained / "out" / "oak")).text
    held, different = ("no_carry", "sum_is_answer"), 0
    for i in range(20):
        model = changed(OAK, error_rate=0.0, beliefs=held)
        s = nursery.solving(model, text, random.Random(i))
        p = nursery.draw(OAK, random.Random(i))
        worked = text.tokenizer.decode(s.tokens[s.targets]).removesuffix("<|im_end|>")
        assert worked.rstrip() == solution(p, beliefs=held)
        different += worked.rstrip() != solution(p)
    assert different > 3


def test_a_judging_sample_has_the_exact_rating_on_average(trained, monkeypatch):
    text = load(str(trained / "out" / "judge")).text
    labels = label_ids(text)
    rated = []
    monkeypatch.setattr(
        nursery, "rate", lambda p, worked: rated.append(rate(p, worked)) or rated[-1]
    )
    read = []
    for i in range(150):
        s = nursery.rating(JUDGE, text, random.Random(i))
        read.append([labels.index(t) + 1 for t in s.tokens[s.targets]])
        assert s.branches[s.targets].tolist() == [1, 2, 3, 4, 5]
    exact = np.array([[r[d] for d in DIMENSIONS] for r in rated])
    got = np.array(read)
    assert (np.abs(got - exact) < 1).all()
    assert abs((got - exact).mean()) < 4 * 0.5 / got.size**0.5
    assert text.tokenizer.decode(s.tokens[s.branches == 2]).startswith(
        RUBRIC.question(DIMENSIONS[1])
    )


def test_a_grown_decoder_is_the_same_function(trained):
    oak = load(str(trained / "out" / "oak"))
    spec, state = nursery.grow(oak.spec, oak.state, 5, 0)
    tokens = jnp.arange(24).reshape(2, 12) * 7
    where = jnp.tile(jnp.arange(12), (2, 1)), jnp.ones((2, 12), int)
    run = jax.jit(
        lambda graphdef, state: nnx.merge(graphdef, state).hidden(tokens, *where), static_argnums=0
    )
    np.testing.assert_allclose(
        run(abstract(spec)[0], state), run(oak.graphdef, oak.state), atol=1e-6
    )
    blocks = nnx.to_pure_dict(state)["blocks"]
    assert not blocks["o"][2:].any()
    assert all(
        blocks[name][2:].any() for name in ("q", "k", "v", "gate", "up")
    )  # what is new can learn


def test_no_sample_in_a_row_is_one_sentence(trained):
    text = load(str(trained / "out" / "oak")).text
    with pytest.raises(ConfigError) as error:
        nursery.training_batch(changed(OAK, row_length=16), text, 0)
    assert (
        str(error.value) == "No sample of model 'oak' fits its row_length of 16 tokens; raise it."
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"base": "elm"},
            "base of model 'oak' (a model listed before it) is 'elm' and the config has none to "
            "choose from; add it.",
        ),
        (
            {"curriculum": "sing"},
            "curriculum of model 'oak' is 'sing'; choose one of 'solve', 'judge'.",
        ),
        (
            {"tasks": ()},
            "tasks or difficulties of model 'oak' is empty; name at least one of each.",
        ),
        (
            {"error_rate": 1.5},
            "error_rate of model 'oak' is 1.5; it must be at least 0 and at most 1.",
        ),
        ({"steps": 0}, "steps of model 'oak' is 0; it must be at least 1."),
        (
            {"kv_heads": 3},
            "heads of model 'oak' is 4, kv_heads 3 and width 32; heads must be a multiple of "
            "kv_heads and divide width into even parts.",
        ),
        (
            {"width": 36},
            "heads of model 'oak' is 4, kv_heads 2 and width 36; heads must be a multiple of "
            "kv_heads and divide width into even parts.",
        ),
        ({"name": ""}, "A model has no name; give every model one."),
    ],
)
def test_a_bad_model_is_one_sentence(changes, sentence):
    with pytest.raises(ConfigError) as error:
        validate_model_zoo(ModelZoo(models=(changed(OAK, **changes),)))
    assert str(error.value) == sentence


def test_an_unknown_task_is_found_before_anything_is_trained():
    with pytest.raises(
        ConfigError, match=r"^tasks of model 'oak' is 'algebra'; choose one of 'chain', 'shop', "
    ):
        nursery.plan(ModelZoo(models=(changed(OAK, tasks=("chain", "algebra")),)))


def test_an_unknown_belief_is_found_before_anything_is_trained():
    with pytest.raises(
        ConfigError, match=r"^beliefs of model 'oak' is 'magic'; choose one of 'no_borrow', "
    ):
        nursery.plan(ModelZoo(models=(changed(OAK, beliefs=("magic",)),)))


def test_release_names_models():
    with pytest.raises(ConfigError, match=r"^config\.release is 'ash'; choose one of 'oak'\.$"):
        validate_model_zoo(ModelZoo(models=(OAK,), release=("ash",)))
