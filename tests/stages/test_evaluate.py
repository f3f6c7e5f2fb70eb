import copy
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

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
from deltapref_jax.sampling.engine import Completion, Engine
from deltapref_jax.sampling.programs import advance
from deltapref_jax.stages import evaluate
from deltapref_jax.stages.evaluate import ResultTable
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
SAMPLING = Sampling(max_prompt=300, max_tokens=12, slots=8, chunk=4, shard=3)
PROGRAM = pathlib.Path(__file__).with_name("answer.py")


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

    def of(
        suites=SUITES[:2],
        trained=False,
        checker="world",
        generator=None,
        sampling=SAMPLING,
        quantization="",
    ):
        asked = {
            suite.name: bench.given(
                Prompt, [q._replace(checker=checker) for q in prompts((suite.name,), 4, 1, 5)]
            )
            for suite in suites
        }
        e = Experiment(suites=suites, sampling=sampling)
        model = Model(folder, quantization=quantization)
        policy = Trained(label=("policy",), folder=folder) if trained else None
        return result_tables(e, ("evaluate",), asked, model, policy, generator)

    return of


def results(root, wanted):
    workspace = Workspace(root)
    run(list(wanted.values()), workspace, show=False)
    return [row for node in wanted.values() for row in workspace.rows(Result, node)]


def test_results_of_a_quantised_model_say_so(tables, tmp_path):
    for quantization, metadata in (("", None), ("int8", {b"quantization": b"int8"})):
        (wanted,) = tables(SUITES[:1], quantization=quantization).values()
        results(tmp_path, {"s": wanted})
        assert (Workspace(tmp_path).table(wanted).schema.metadata or None) == metadata


@pytest.fixture
def loads(monkeypatch):
    """Paths of the models that evaluation loads: one for every pool of shards."""
    paths = []
    real = evaluate.open_model

    def load(path, **options):
        paths.append(path)
        return real(path, **options)

    monkeypatch.setattr(evaluate, "open_model", load)
    return paths


@pytest.fixture
def passes(monkeypatch):
    """Ids of the questions that engines are asked, one list for every call."""
    asked = []
    real = Engine.generate

    def generate(self, requests, advance):
        asked.append([request.prompt_id for request in requests])
        return real(self, requests, advance)

    monkeypatch.setattr(Engine, "generate", generate)
    return asked


def test_results(tables, tmp_path):
    rows = results(tmp_path, tables())
    assert [(row.suite, row.domain, row.task, row.sample) for row in rows] == [
        *[("chain", "in", "chain", s) for _ in range(4) for s in range(3)],
        *[("logic", "out", "logic", 0)] * 4,
    ]
    assert all(not row.correct for row in rows if row.finish == "length")


def test_rows_keep_the_text_the_answer_and_the_log_probability(tables, tmp_path, monkeypatch):
    """They are those of the engine, and the verdict is that of the text."""
    monkeypatch.setattr(
        Engine,
        "generate",
        lambda self, requests, advance: [
            [
                Completion([5, 6, 7], f"So. Answer: {i}{s}.", ("eos", "length")[s], -1.5 - i - s)
                for s in range(2)
            ]
            for i in range(len(requests))
        ],
    )
    wanted = tables((dataclasses.replace(SUITES[0], samples=2),))
    rows = results(tmp_path, wanted)
    assert [(row.sample, row.text, row.answer, row.logprob, row.tokens) for row in rows] == [
        (s, f"So. Answer: {i}{s}.", "" if s else f"{i}0", -1.5 - i - s, 3)
        for i in (0, 1, 2, 0)
        for s in range(2)
    ]
    asked = Workspace(tmp_path).rows(Prompt, wanted["chain"].questions)
    golds = {prompt.prompt_id: prompt.answer for prompt in asked}
    assert [row.correct for row in rows] == [
        row.finish == "eos" and row.answer == golds[row.prompt_id] for row in rows
    ]


def test_tables_do_not_depend_on_the_size_of_a_shard(tables, tmp_path, loads, passes):
    """Nor are programs compiled for another shard or suite."""
    sampling = dataclasses.replace(SAMPLING, chunk=3)
    compiled, whole = advance._cache_size(), None
    for shard, sizes in (
        (64, [12]),
        (8, [8, 4]),
        (3, [3, 1, 3, 1, 3, 1]),
        (1, [1] * 12),
    ):
        passes.clear()
        wanted = tables(SUITES, sampling=dataclasses.replace(sampling, shard=shard))
        rows = results(tmp_path, wanted)
        assert [len(part) for part in passes] == sizes
        assert len(Workspace(tmp_path).manifest(wanted["logic"]).files) == -(-4 // shard)
        whole = whole or rows
        for a, b in zip(rows, whole, strict=True):
            assert a._replace(logprob=0.0) == b._replace(logprob=0.0)
            assert a.logprob == pytest.approx(b.logprob, rel=1e-4, abs=1e-4)
    assert (len(loads), advance._cache_size()) == (4, compiled + 1)


def test_a_killed_evaluation_makes_the_missing_shards_alone(tables, tmp_path, passes, monkeypatch):
    wanted, uninterrupted = tables(SUITES), tables(SUITES)
    whole = Engine.generate

    def generate(self, requests, advance):
        completions = whole(self, requests, advance)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return completions

    monkeypatch.setattr(Engine, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path / "killed", wanted)
    assert Workspace(tmp_path / "killed").complete(wanted["chain"])  # two shards of each suite
    results(tmp_path / "killed", wanted)
    assert passes[4] == passes[3]
    assert len(passes) == 3 + 1 + 3
    assert len({prompt for part in passes for prompt in part}) == 3 * 4
    results(tmp_path / "whole", uninterrupted)
    for suite in SUITES:
        one, other = (
            Workspace(tmp_path / root).manifest(of[suite.name])
            for root, of in (("killed", wanted), ("whole", uninterrupted))
        )
        assert one.content == other.content
        assert {k: v for k, v in one.stats.items() if "seconds" not in k} == {
            k: v for k, v in other.stats.items() if "seconds" not in k
        }


def test_a_table_of_an_earlier_version_is_made_anew(tables, tmp_path, loads, monkeypatch):
    wanted = tables(SUITES[:1])
    monkeypatch.setattr(ResultTable, "version", ResultTable.version - 1)
    results(tmp_path, wanted)
    monkeypatch.undo()
    before, workspace = Workspace(tmp_path), Workspace(tmp_path)
    assert not before.complete(wanted["chain"])
    run(list(wanted.values()), workspace, show=False)
    assert len(list((tmp_path / "evaluate").iterdir())) == 2


def start(folder, root, *more, **variables):
    """Starts `answer.py` in a process."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), folder, str(root), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(PROGRAM.parents[2]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        | variables,
    )


def ended(process):
    """Number of shards that a process sampled."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return int(out.splitlines()[-1])


@pytest.fixture(scope="module")
def answer():
    """`answer.py` as a module."""
    spec = importlib.util.spec_from_file_location("answer", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(answer, folder, tmp_path_factory):
    """Contents of all tables as one process makes them, by suite."""
    root = tmp_path_factory.mktemp("alone")
    assert ended(start(folder, root)) == 3 * answer.SHARDS
    return contents(answer, folder, root)


def contents(answer, folder, root):
    workspace = Workspace(root)
    assert all(workspace.complete(node, verify=True) for node in answer.tables(folder))
    return {node.suite: workspace.manifest(node).content for node in answer.tables(folder)}


@pytest.mark.slow
def test_a_process_that_is_killed_loses_one_shard(answer, alone, folder, tmp_path):
    killed = start(folder, tmp_path, "5")
    assert killed.wait(timeout=600) == -signal.SIGKILL
    killed.communicate()
    again = start(folder, tmp_path)
    out, err = again.communicate(timeout=600)
    assert (out.splitlines()[-1], again.returncode) == (str(3 * answer.SHARDS - 4), 0), err
    assert "evaluate/logic: starts (1 of 3 shards stand)" in err
    assert contents(answer, folder, tmp_path) == alone


@pytest.mark.slow
def test_two_runners_share_the_questions(answer, alone, folder, tmp_path):
    runners = [start(folder, tmp_path) for _ in range(2)]
    shares = [ended(runner) for runner in runners]
    assert sum(shares) == 3 * answer.SHARDS
    assert contents(answer, folder, tmp_path) == alone


@pytest.mark.slow
def test_two_processes_of_a_job_share_the_questions(answer, alone, folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        start(
            folder,
            tmp_path,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=index,
        )
        for index in "01"
    ]
    shares = [ended(process) for process in processes]
    assert sum(shares) == 3 * answer.SHARDS
    assert min(shares) > 0
    assert contents(answer, folder, tmp_path) == alone


def test_a_trained_policy_meets_the_same_draws(tables, tmp_path):
    trained, plain = tables(trained=True), tables()
    assert results(tmp_path, trained) == results(tmp_path, plain)
    workspace = Workspace(tmp_path)
    assert workspace.path(trained["chain"]) != workspace.path(plain["chain"])


@pytest.mark.parametrize("trained", [False, True])
def test_suites_of_one_pool_give_the_tables_that_they_give_one_by_one(
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
