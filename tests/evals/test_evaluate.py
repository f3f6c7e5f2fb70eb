import dataclasses
import shutil

import jax
import pytest
from deltapref_jax.workspace import Node, Workspace, run
from evals.evaluate import describe, evaluate
from flax import nnx

from deltapref_jax.config import Experiment, Generator, MeshShape, Model, Sampling, Suite
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import export
from deltapref_jax.records import PROMPT, table
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import prompts
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.validation import validate
from evals.suites import reasoning_gym, synthetic

SUITES = (Suite(name="chain", samples=3), Suite(name="logic", domain="out", temperature=0.0))
SAMPLING = Sampling(max_prompt=300, max_tokens=12, slots=8, chunk=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build((question["messages"] for question in prompts(("chain", "logic"), 40, 1, 0)), 300, path)
    text = ChatTokenizer.load(str(path))
    spec = ModelSpec(len(text.tokenizer), 16, 2, 2, 1, 8, 24, max_positions=400)
    state = nnx.state(Decoder(spec, rngs=nnx.Rngs(0)))
    export(jax.tree.map(lambda x: 10 * x, state), spec, text, path)
    return str(path)


def results(tmp_path, folder, trained=False, checker="world"):
    stages = {
        "prompts": lambda job: job.write(
            table(
                PROMPT,
                [{**row, "checker": checker} for row in prompts((job.config["task"],), 4, 1, 5)],
            )
        ),
        "train": lambda job: shutil.copytree(folder, job.dir / "policy"),
        "evaluate": evaluate,
    }
    config, local = describe(SUITES, SAMPLING, 0, MeshShape(), Model(folder), trained)
    inputs = {
        f"suite/{suite.name}": Node("prompts", suite.name, {"task": suite.name, "checker": checker})
        for suite in SUITES
    } | ({"policy": Node("train", "policy", {})} if trained else {})
    wanted, workspace = Node("evaluate", "evaluate", config, inputs, local), Workspace(tmp_path)
    run({"it": wanted}, stages, workspace, show=False)
    return workspace.table(wanted).to_pylist()


def test_results(folder, tmp_path):
    rows = results(tmp_path, folder)
    assert [(row["suite"], row["domain"], row["task"], row["sample"]) for row in rows] == [
        *[("chain", "in", "chain", s) for _ in range(4) for s in range(3)],
        *[("logic", "out", "logic", 0)] * 4,
    ]
    assert all(not row["correct"] for row in rows if row["finish"] == "length")


def test_a_trained_policy_meets_the_same_draws(folder, tmp_path):
    assert results(tmp_path, folder, trained=True) == results(tmp_path, folder)


def test_a_generator_is_measured_in_its_manner(folder):
    def asked(generator=None, suites=SUITES):
        return describe(suites, SAMPLING, 0, MeshShape(), Model(folder), False, generator)[0]

    greedy = tuple(dataclasses.replace(suite, temperature=0.0) for suite in SUITES)
    assert asked(Generator(name="g", temperature=0.0)) == asked(suites=greedy) != asked()
    manner = Generator(
        name="g", system="Think.", prefix="Well, ", top_k=3, top_p=0.5, temperature=0.2
    )
    for suite in asked(manner)["suites"]:
        assert {
            name: suite[name] for name in ("system", "prefix", "top_k", "top_p", "temperature")
        } == {"system": "Think.", "prefix": "Well, ", "top_k": 3, "top_p": 0.5, "temperature": 0.2}


def test_questions_need_a_checker(folder, tmp_path):
    with pytest.raises(ValueError, match="of suite 'chain' has no checker"):
        results(tmp_path, folder, checker="")


def test_ready_made_suites():
    pytest.importorskip("reasoning_gym")
    inside, outside = synthetic("in", 5), synthetic("out", 5)
    assert {suite.name for suite in inside + outside} == set(FAMILIES)
    gym = reasoning_gym(("gsm_symbolic", "lcm"), 5)
    assert [suite.name for suite in gym if suite.domain == "in"] == ["gsm_symbolic", "lcm"]
    for suites in (inside + outside, gym):
        validate(
            Experiment(name="e", student=Model("m"), prompts=(suites[0].prompts,), suites=suites)
        )
