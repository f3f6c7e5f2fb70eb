import dataclasses
import shutil

import jax
import pytest
from flax import nnx

from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Experiment, Generator, Model, Sampling, Suite
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import export
from deltapref_jax.records import Prompt, Result
from deltapref_jax.stages.study import result_tables
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import prompts
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.validation import validate
from evals.suites import reasoning_gym, synthetic

SUITES = (
    Suite(name="chain", samples=3),
    Suite(name="logic", domain="out", temperature=0.0),
    Suite(name="euclid", domain="out", samples=2),
)
SAMPLING = Sampling(max_prompt=300, max_tokens=12, slots=8, chunk=4)


class Trained(Node, stage="trained", version=1):
    """A policy that was not trained here."""

    folder: str = runtime()

    def make(self, job):
        shutil.copytree(self.folder, job.dir / "policy")
        job.files.append("policy/*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build((question.messages for question in prompts(("chain", "logic"), 40, 1, 0)), 300, path)
    text = ChatTokenizer.load(str(path))
    spec = ModelSpec(len(text.tokenizer), 16, 2, 2, 1, 8, 24, max_positions=400)
    state = nnx.state(Decoder(spec, rngs=nnx.Rngs(0)))
    export(jax.tree.map(lambda x: 10 * x, state), spec, text, path)
    return str(path)


@pytest.fixture
def tables(bench, folder):
    """The function of suites to their tables of results, for one model or policy."""

    def of(suites=SUITES[:2], trained=False, checker="world", generator=None):
        asked = {
            suite.name: bench.given(
                Prompt, [q._replace(checker=checker) for q in prompts((suite.name,), 4, 1, 5)]
            )
            for suite in suites
        }
        e = Experiment(suites=suites, sampling=SAMPLING)
        policy = Trained(label=("policy",), folder=folder) if trained else None
        return result_tables(e, ("evaluate",), asked, Model(folder), policy, generator)

    return of


def results(root, wanted):
    workspace = Workspace(root)
    run(list(wanted.values()), workspace, show=False)
    return [row for node in wanted.values() for row in workspace.rows(Result, node)]


def test_results(tables, tmp_path):
    rows = results(tmp_path, tables())
    assert [(row.suite, row.domain, row.task, row.sample) for row in rows] == [
        *[("chain", "in", "chain", s) for _ in range(4) for s in range(3)],
        *[("logic", "out", "logic", 0)] * 4,
    ]
    assert all(not row.correct for row in rows if row.finish == "length")


def test_a_trained_policy_meets_the_same_draws(tables, tmp_path):
    trained, plain = tables(trained=True), tables()
    assert results(tmp_path, trained) == results(tmp_path, plain)
    workspace = Workspace(tmp_path)
    assert workspace.path(trained["chain"]) != workspace.path(plain["chain"])


def test_a_generator_is_measured_in_its_manner(tables):
    def asked(**options):
        return {name: node.config() for name, node in tables(**options).items()}

    greedy = tuple(dataclasses.replace(suite, temperature=0.0) for suite in SUITES[:2])
    of_generator = asked(generator=Generator(name="g", temperature=0.0))
    assert of_generator == asked(suites=greedy) != asked()
    manner = {"system": "Think.", "prefix": "Well, ", "top_k": 3, "top_p": 0.5, "temperature": 0.2}
    for config in asked(generator=Generator(name="g", **manner)).values():
        assert {name: config[name] for name in manner} == manner


def test_questions_need_a_checker(tables, tmp_path):
    with pytest.raises(ValueError, match="of suite 'chain' has no checker"):
        results(tmp_path, tables(checker=""))


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
