import copy
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
from deltapref_jax.models.export import export
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.records import Prompt, Result
from deltapref_jax.stages import evaluate
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


@pytest.fixture
def loads(monkeypatch):
    """Paths of the models that evaluation loads: one for every pass."""
    paths = []
    real = evaluate.load

    def load(path, **options):
        paths.append(path)
        return real(path, **options)

    monkeypatch.setattr(evaluate, "load", load)
    return paths


@pytest.mark.parametrize("trained", [False, True])
def test_suites_in_one_pass_give_the_tables_that_they_give_one_by_one(
    tables, tmp_path, loads, trained
):
    wanted = tables(SUITES, trained=trained)
    together, apart = Workspace(tmp_path / "together"), Workspace(tmp_path / "apart")
    run(list(wanted.values()), together, show=False)
    assert len(loads) == 1
    for node in wanted.values():
        run([node], apart, show=False)
    assert len(loads) == 1 + len(SUITES)
    for suite in SUITES:
        node = wanted[suite.name]
        rows = together.rows(Result, node)
        assert {row.suite for row in rows} == {suite.name}
        assert len(rows) == 4 * suite.samples
        assert together.table(node) == apart.table(node)
        assert together.manifest(node).content == apart.manifest(node).content
        assert together.key(node) == apart.key(node)
        # the counts of the pass are shared out by tokens
        stats = together.manifest(node).stats
        assert stats["tokens"] == pytest.approx(sum(row.tokens for row in rows))


def test_one_more_suite_is_the_only_one_that_is_evaluated(tables, tmp_path, loads):
    workspace = Workspace(tmp_path)
    run(list(tables(SUITES[:2]).values()), workspace, show=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    wanted = tables(SUITES)
    run(list(wanted.values()), workspace, show=False)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    leases = {p for p in after if "claims" in p.parts}
    assert {p: t for p, t in after.items() if p in before and p not in leases} == {
        p: t for p, t in before.items() if p not in leases
    }
    added = {p.parent for p in after if p not in before and p not in leases}
    assert len(loads) == 2
    euclid = workspace.path(wanted["euclid"])
    questions = workspace.path(wanted["euclid"].questions)
    assert {str(folder) for folder in added} == {str(euclid), str(questions)}


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
            Experiment(
                name="e", student=Model("m"), prompts=(copy.copy(suites[0].prompts),), suites=suites
            )
        )
