"""Several runners on one workspace: each takes what is ready, and everything is made once."""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pyarrow as pa
import pytest

from deltapref_jax.artifacts import lease as lease_module
from deltapref_jax.artifacts.lease import Lease
from deltapref_jax.artifacts.node import Node, in_order
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.shards import Made, Shards, make_shards
from deltapref_jax.artifacts.workspace import Workspace

TOY = pathlib.Path(__file__).with_name("toy_study.py")


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_study", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stamps(root):
    """(process, start, end) of every artifact by name, from the log."""
    began, spans = {}, {}
    for line in (root / "made.log").read_text().splitlines():
        name, what, process, stamp = line.split()
        if what == "start":
            assert name not in began, "made twice"
            began[name] = process, float(stamp)
        else:
            assert began[name][0] == process
            spans[name] = (*began[name], float(stamp))
    assert began.keys() == spans.keys()
    return spans


@pytest.mark.parametrize("runners", [2, 3])
def test_runners_take_what_is_ready_and_do_not_wait_in_order(toy, tmp_path, runners):
    """The first artifact of a runner ends only when every runner has begun one (or after 20 s)."""
    subprocess.run(
        [sys.executable, str(TOY), "independent", str(tmp_path), str(runners)],
        env=os.environ | {"PYTHONPATH": str(TOY.parents[2])},
        check=True,
        timeout=120,
    )
    spans = stamps(tmp_path)
    assert spans.keys() == {f"meeting/{i}" for i in range(toy.INDEPENDENT)}
    assert len({process for process, *_ in spans.values()}) == runners
    first = {}
    for process, start, end in sorted(spans.values(), key=lambda span: span[1]):
        first.setdefault(process, (start, end))
    for one, other in itertools.combinations(first.values(), 2):
        assert max(one[0], other[0]) < min(one[1], other[1]), "one waited for the other"
    workspace = Workspace(tmp_path)
    for node in toy.independent(runners):
        assert workspace.complete(node)
        assert (workspace.path(node) / "number").read_text() == str(node.number)
        assert not list((workspace.path(node) / "claims").glob("all"))


def contents(root):
    """Contents of every file that a manifest names, by artifact; and all counts."""
    found = {}
    for path in sorted(root.glob("*/*/manifest.json")):
        stated = json.loads(path.read_text())
        label = "/".join(stated["label"])
        found[label, "stats"] = stated["stats"]
        found |= {(label, name): (path.parent / name).read_bytes() for name in stated["files"]}
    return found


def test_two_runners_end_with_the_tables_of_one_and_make_everything_once(toy, tmp_path):
    for runners in (1, 2):
        subprocess.run(
            [sys.executable, str(TOY), "answers", str(tmp_path / str(runners)), str(runners)],
            env=os.environ | {"PYTHONPATH": str(TOY.parents[2])},
            check=True,
            timeout=120,
        )
    alone, together = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert together == alone
    nodes = in_order(toy.answers())
    assert {label for label, _ in together} == {node.name for node in nodes}
    made = (tmp_path / "2" / "made.log").read_text().splitlines()
    assert sorted(made) == sorted((tmp_path / "1" / "made.log").read_text().splitlines())
    assert len(made) == len(set(made)) == 3 * (toy.SHARDS + 1 + 4 * toy.SHARDS)
    workspaces = [Workspace(tmp_path / str(runners)) for runners in (1, 2)]
    assert all(workspace.complete(node, verify=True) for workspace in workspaces for node in nodes)
    index = json.loads((tmp_path / "2" / "index.json").read_text())
    assert set(index[toy.STUDY]) == {node.name for node in nodes}


class Noted(Node, stage="noted", version=1):
    """Claims, and writes its name into a list."""

    name_: str

    def make(self, job):
        MADE.append(self.name_)
        job.write_file("a", b"a")


class Batched(Noted, stage="batched", version=1, sharded=True):
    """Artifacts of one letter have one pool of shards, two each, three in a pass."""

    def batch(self):
        return self.name_[0]

    @classmethod
    def make_batch(cls, work):
        names = {Shards(job, [1, 1], 2): node.name_ for node, job in work}

        def make(chosen, advance):
            PASSES.append([f"{names[shards]}/{i}" for shards, i in chosen])
            Batched.interrupt(PASSES)
            made = []
            for shards, i in chosen:
                advance(1)
                MADE.append(f"{names[shards]}/{i}")
                table = pa.table({"name": [names[shards]], "shard": [i]})
                made.append(Made(table, {"shards": 1.0}, 1 / len(chosen)))
            return made

        make_shards(list(names), make, 3)

    @staticmethod
    def interrupt(passes):
        pass


MADE, PASSES = [], []


@pytest.fixture
def made():
    MADE.clear()
    PASSES.clear()
    return MADE


def held(workspace, node, what="all"):
    """The claim of another runner on a node, or on one of its shards."""
    folder = workspace.path(node)
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(folder / "claims" / what)
    assert lease.take()
    return lease


def test_what_another_runner_holds_is_skipped_and_asked_for_again(tmp_path, made, monkeypatch):
    workspace = Workspace(tmp_path)
    nodes = [Noted(label=(name,), name_=name) for name in ("a1", "b1", "c1")]
    lease = held(workspace, nodes[0])
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        assert made == ["b1", "c1"]
        if len(slept) == 2:
            lease.release()

    monkeypatch.setattr("deltapref_jax.artifacts.runner.time.sleep", sleep)
    run(nodes, workspace, show=False)
    assert made == ["b1", "c1", "a1"]
    assert len(slept) == 2


def of_batch(*names):
    return [Batched(label=(name,), name_=name) for name in names]


def test_a_pool_is_made_in_passes_without_what_another_holds_and_what_stands(
    tmp_path, made, monkeypatch
):
    """A pass has three shards, of whatever artifacts; what is complete is finished."""
    workspace = Workspace(tmp_path)
    nodes = of_batch("a1", "b1", "a2", "a3", "b2")
    run([nodes[2]], workspace, show=False)
    lease = held(workspace, nodes[3], "shard-00001-of-00002")
    complete = []

    def sleep(_):
        complete[:] = [node.name_ for node in nodes if workspace.complete(node)]
        lease.release()

    monkeypatch.setattr("deltapref_jax.artifacts.runner.time.sleep", sleep)
    run(nodes, workspace, show=False)
    assert complete == ["a1", "b1", "a2", "b2"]
    assert PASSES == [
        ["a2/0", "a2/1"],
        ["a1/0", "a1/1", "a3/0"],
        ["b1/0", "b1/1", "b2/0"],
        ["b2/1"],
        ["a3/1"],
    ]
    for node in nodes:
        assert workspace.complete(node, verify=True)
        assert workspace.table(node).to_pylist() == [
            {"name": node.name_, "shard": shard} for shard in range(2)
        ]
        assert workspace.manifest(node).stats == {"rows": 2, "shards": 2}
        assert not list((workspace.path(node) / "claims").glob("shard*"))


def test_a_pool_that_is_killed_keeps_what_stands(tmp_path, made, monkeypatch):
    nodes = of_batch("a1", "a2", "a3")

    def interrupt(passes):
        if len(passes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Batched, "interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(nodes, Workspace(tmp_path), show=False)
    first, killed = [["a1/0", "a1/1", "a2/0"], ["a2/1", "a3/0", "a3/1"]]
    assert [first, killed] == PASSES
    assert made == first
    assert [Workspace(tmp_path).complete(node) for node in nodes] == [True, False, False]
    run(nodes, Workspace(tmp_path), show=False)
    assert [first, killed, killed] == PASSES
    assert made == first + killed


def test_seconds_of_a_pass_are_shared_out(tmp_path, made, monkeypatch):
    nodes = of_batch("a1", "a2")
    clock = itertools.count(0, 9.0)
    monkeypatch.setattr("deltapref_jax.artifacts.shards.time.time", lambda: next(clock))
    run(nodes, Workspace(tmp_path), show=False)
    assert PASSES == [["a1/0", "a1/1", "a2/0"], ["a2/1"]]
    assert [Workspace(tmp_path).manifest(node).seconds for node in nodes] == [6.0, 3.0 + 9.0]


def test_processes_leave_each_other_their_part_of_a_pool(tmp_path, made, monkeypatch):
    monkeypatch.setattr("deltapref_jax.artifacts.shards.process_count", lambda: 3)
    run(of_batch("a1", "a2", "a3"), Workspace(tmp_path), show=False)
    assert [len(part) for part in PASSES] == [2, 2, 1, 1]


def test_a_late_process_leaves_the_shards_that_another_has_made(tmp_path, made, monkeypatch):
    """It was suspended past its lease: the table of the other stands."""
    (node,) = of_batch("a1")
    times = []

    def written():
        return {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    def interrupt(passes):
        if len(passes) == 1:
            for lease in list(lease_module._held):
                lease.release()
            run(of_batch("a1"), Workspace(tmp_path), show=False)
            times.append(written())

    monkeypatch.setattr(Batched, "interrupt", interrupt)
    run([node], Workspace(tmp_path), show=False)
    assert PASSES == [["a1/0", "a1/1"]] * 2
    assert "manifest.json" in times[0]
    assert {name: t for name, t in written().items() if name in times[0]} == times[0]
    assert Workspace(tmp_path).complete(node, verify=True)
