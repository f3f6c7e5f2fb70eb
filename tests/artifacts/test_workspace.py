import errno
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import pyarrow as pa
import pytest
from etils import epath

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.lease import Lease, LostLease, remove_claims
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.files import ArtifactError, write_atomic
from deltapref_jax.preemption import Preempted
from deltapref_jax.processes import process_count, process_index

TOY = pathlib.Path(__file__).with_name("toy_study.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TOY.parents[2])}


def load_toy():
    spec = importlib.util.spec_from_file_location("toy_study", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = load_toy()


def program(*args):
    done = subprocess.run(
        [sys.executable, str(TOY), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def results(root):
    """Contents of every file that a manifest names, by artifact, and all counts."""
    found = {}
    root = pathlib.Path(root)
    for manifest in sorted(root.glob("*/*/manifest.json")):
        stated = json.loads(manifest.read_text())
        label = "/".join(stated["label"])
        for name in stated["files"]:
            found[label, name] = (manifest.parent / name).read_bytes()
        found[label, "stats"] = stated["stats"]
        # the index and its links name every artifact that is complete
        assert json.loads((root / "index.json").read_text())["toy"][label] == str(
            manifest.parent.relative_to(root)
        )
        link = root / "by_name" / "toy" / label
        assert link.is_symlink()
        assert link.resolve() == manifest.parent.resolve()
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("once")
    program("once", root)
    found = results(root)
    assert {label for label, _ in found} == {"numbers/a", "numbers/b", "doubled/b", "folder/b"}
    return found


@pytest.mark.slow
def test_killed_at_every_file_system_step_and_continued(tmp_path, uninterrupted):
    points = int(program("everywhere", tmp_path))
    assert points >= 50
    for at in range(points):
        assert results(tmp_path / f"{at:03d}") == uninterrupted, f"event {at}"


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_times_and_continued(tmp_path, uninterrupted, seed):
    assert int(program("randomly", tmp_path, seed)) >= 20
    assert results(tmp_path) == uninterrupted


def test_three_runners_share_the_work(tmp_path, uninterrupted):
    program("together", tmp_path)
    assert results(tmp_path) == uninterrupted
    made = (tmp_path / "made.log").read_text().split("\n")[:-1]
    assert sorted(made) == sorted(
        ["folder/b train"] + [f"numbers/{n} {i}" for n in "ab" for i in range(toy.SHARDS)]
    )


def make(root, names=("a", "c", "d")):
    workspace = Workspace(root)
    wanted = {name: node for name, node in toy.nodes(0.0).items() if name in names}
    run(list(wanted.values()), workspace, show=False)
    return workspace, wanted


def test_changed_config_is_another_artifact_and_what_stands_is_left_alone(tmp_path):
    workspace, wanted = make(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    other = toy.Doubled(label=("again",), source=wanted["c"].source, more=1.0)
    assert workspace.key(other) != workspace.key(wanted["c"])
    run([*wanted.values(), other], workspace, show=False)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    assert {p: t for p, t in after.items() if p in before} == before
    assert len(after) == len(before) + 1


def test_manifest_says_how_the_artifact_came_about(tmp_path):
    workspace, wanted = make(tmp_path)
    said = workspace.manifest(wanted["a"])
    assert (said.stage, said.label, said.version) == ("numbers", ["numbers", "a"], 1)
    assert said.key == workspace.key(wanted["a"]) == workspace.path(wanted["a"]).name
    assert said.stats == {"tokens": 3.0, "rows": toy.SHARDS * toy.ROWS}
    assert said.config == {"label": ["numbers", "a"], "seed": 1, "nap": 0.0}
    assert said.seconds >= 0
    assert said.started <= said.ended
    assert {"python", "pyarrow", "numpy"} <= said.versions.keys()
    source = wanted["c"].source
    assert workspace.manifest(wanted["c"]).inputs == {
        "source": {
            "path": f"numbers/{workspace.key(source)}",
            "content": workspace.manifest(source).content,
        }
    }
    assert set(workspace.manifest(wanted["d"]).files) == {"metrics.jsonl", "policy/weights"}
    assert workspace.table(wanted["a"]).num_rows == toy.SHARDS * toy.ROWS


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def edit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


SHARD = "shard-00002-of-00003.parquet"


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (cut, r"is \d+ bytes long and not \d+ as written"),
        (edit, r"is not what was written \(checksum\)"),
        (pathlib.Path.unlink, "is missing"),
    ],
)
def test_damaged_shard_is_named_and_nothing_else_is_lost(tmp_path, damage, what):
    workspace, wanted = make(tmp_path)
    folder = workspace.path(wanted["a"])
    damage(pathlib.Path(folder / SHARD))
    sentence = (
        re.escape(f"{folder / SHARD} (numbers/a) ")
        + what
        + re.escape(
            f"; delete the directory {folder} and run again: only that artifact is made anew."
        )
    )
    with pytest.raises(ArtifactError, match=f"^{sentence}$"):
        make(tmp_path)
    with pytest.raises(ArtifactError, match=re.escape(SHARD)):
        workspace.table(wanted["a"])
    others = {
        p: p.stat().st_mtime_ns
        for p in tmp_path.rglob("*")
        if p.is_file() and workspace.key(wanted["a"]) not in str(p)
    }
    folder.rmtree()
    make(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in others if p.name != "made.log"} == {
        p: t for p, t in others.items() if p.name != "made.log"
    }


def test_edit_with_the_old_time_and_size_is_found_when_read_or_verified(tmp_path):
    workspace, wanted = make(tmp_path)
    policy = pathlib.Path(workspace.path(wanted["d"])) / "policy" / "weights"
    os.utime(workspace.path(wanted["d"]) / "manifest.json", (2e9, 2e9))
    edit(policy)
    make(tmp_path)
    with pytest.raises(ArtifactError, match="policy/weights .*checksum"):
        run(list(wanted.values()), workspace, show=False, verify=True)
    with pytest.raises(ArtifactError, match="policy/weights .*checksum"):
        Job(wanted["a"], workspace, show=False).local_input(wanted["d"], "policy")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "of another"}'])
def test_damaged_manifest_is_named(tmp_path, text):
    workspace, wanted = make(tmp_path, ("a",))
    (workspace.path(wanted["a"]) / "manifest.json").write_text(text)
    with pytest.raises(
        ArtifactError, match=r"manifest\.json \(numbers/a\) is .*; delete the directory"
    ):
        make(tmp_path, ("a",))


def test_edited_counts_and_a_manifest_of_an_earlier_version_are_noticed(tmp_path):
    workspace, wanted = make(tmp_path, ("a",))
    place = workspace.path(wanted["a"]) / "manifest.json"
    stated = json.loads(place.read_text())
    stated["stats"]["tokens"] += 1
    place.write_text(json.dumps(stated))
    with pytest.raises(
        ArtifactError,
        match=r"manifest\.json \(numbers/a\) is not what was written \(digest\); delete",
    ):
        workspace.complete(wanted["a"])
    del stated["digest"]
    place.write_text(json.dumps(stated))
    with pytest.raises(
        ArtifactError, match=r"manifest\.json \(numbers/a\) is not what was written"
    ):
        workspace.complete(wanted["a"])


@pytest.mark.parametrize("damage", [cut, edit, pathlib.Path.unlink])
def test_shard_damaged_before_the_manifest_is_named_and_only_it_is_made_anew(tmp_path, damage):
    workspace, wanted = make(tmp_path, ("a",))
    folder = pathlib.Path(workspace.path(wanted["a"]))
    (folder / "manifest.json").unlink()
    damage(folder / SHARD)
    side = str(folder / SHARD).replace("parquet", "json")
    with pytest.raises(
        ArtifactError,
        match=re.escape(f"delete {side} and run again: only that shard is made anew."),
    ):
        make(tmp_path, ("a",))
    os.unlink(side)
    (tmp_path / "made.log").unlink()
    make(tmp_path, ("a",))
    assert (tmp_path / "made.log").read_text() == "numbers/a 2\n"


def test_cut_sidecar_is_named(tmp_path):
    workspace, wanted = make(tmp_path, ("a",))
    folder = pathlib.Path(workspace.path(wanted["a"]))
    (folder / "manifest.json").unlink()
    cut(folder / SHARD.replace("parquet", "json"))
    with pytest.raises(
        ArtifactError, match=r"shard-00002-of-00003\.json is unreadable \(numbers/a\); delete"
    ):
        make(tmp_path, ("a",))


def test_full_disk_is_one_sentence_and_the_run_continues(tmp_path, monkeypatch):
    calls = iter(range(100))
    real = os.fsync

    def full(file):
        if next(calls) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError) as e:
        make(tmp_path, ("a",))
    assert re.fullmatch(
        r"\S+shard-00002-of-00003\.parquet cannot be written \(No space left on device\); "
        r"make room or choose another workspace, and run the same command: finished work is kept\.",
        str(e.value),
    )
    monkeypatch.undo()
    assert not list(tmp_path.rglob(".shard*"))
    make(tmp_path, ("a",))
    made = (tmp_path / "made.log").read_text().split("\n")
    assert made.count("numbers/a 2") == 2
    assert len(made) == toy.SHARDS + 2


class Marked(Node, stage="marked", version=1):
    mark: int

    def make(self, job):
        job.write(pa.table({"mark": [self.mark]}))


class Adhoc(Node, stage="x", version=1):
    """Made by a function."""

    function: Callable[[Job], None] = runtime()

    def make(self, job):
        self.function(job)


def adhoc(function=lambda job: None):
    return Adhoc(label=("x",), function=function)


def test_full_disk_inside_a_stage_is_one_sentence(tmp_path):
    def stage(job):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/checkpoint")

    with pytest.raises(ArtifactError, match="^/somewhere/checkpoint cannot be written"):
        run([adhoc(stage)], Workspace(tmp_path), show=False)


def test_workspace_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ArtifactError,
        match=r"^The workspace \S+/file cannot be written \(Not a directory\); choose "
        r"another with --config\.workspace=…$",
    ):
        run([adhoc()], Workspace(tmp_path / "file"), show=False)


def test_empty_table_keeps_its_columns(tmp_path):
    def stage(job):
        job.shards(0, lambda _: (pa.table({"x": pa.array([], pa.int32())}), {}))

    node = adhoc(stage)
    run([node], Workspace(tmp_path), show=False)
    assert Workspace(tmp_path).table(node).schema == pa.schema([("x", pa.int32())])


def test_failed_stage_leaves_no_claim_and_no_manifest(tmp_path):
    def stage(job):
        raise RuntimeError("broken")

    node = adhoc(stage)
    with pytest.raises(RuntimeError, match="broken"):
        run([node], Workspace(tmp_path), show=False)
    assert Lease(Workspace(tmp_path).path(node) / "claims" / "all").take()
    assert not Workspace(tmp_path).complete(node)


def test_lost_artifact_is_not_blessed(tmp_path):
    def stage(job):
        job.write_file("a", b"a")
        job._lease.lost = True

    node = adhoc(stage)
    with pytest.raises(
        ArtifactError, match=r"^Another process took over \S+ \(x\) because this one was silent"
    ):
        run([node], Workspace(tmp_path), show=False)
    assert not Workspace(tmp_path).complete(node)


def test_a_folder_of_an_artifact_that_was_taken_over_is_left_as_it_was(tmp_path):
    """Who slept through its lease ends with the sentence, and what the other wrote stands."""

    def stage(job):
        with job.output_dir("policy") as folder:
            (folder / "weights").write_text("mine")
            theirs = job.dir / "policy"
            theirs.mkdir()
            (theirs / "weights").write_text("theirs")
            claim = job.dir / "claims" / "all"
            claim.write_text(claim.read_text().replace('"id": "', '"id": "theirs'))

    node = adhoc(stage)
    with pytest.raises(LostLease, match=r"^Another process took over \S+ \(x\) because") as e:
        run([node], Workspace(tmp_path), show=False)
    assert e.value.code == 75
    folder = pathlib.Path(Workspace(tmp_path).path(node))
    assert (folder / "policy" / "weights").read_text() == "theirs"
    assert sorted(p.name for p in folder.iterdir()) == ["claims", "policy"]


def test_a_folder_replaces_what_a_killed_run_left(tmp_path):
    def stage(job):
        old = job.dir / "policy" / "old"
        old.parent.mkdir()
        old.touch()
        with job.output_dir("policy") as folder:
            (folder / "new").touch()
        job.files.append("policy/*")

    node, workspace = adhoc(stage), Workspace(tmp_path)
    run([node], workspace, show=False)
    assert list(workspace.manifest(node).files) == ["policy/new"]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_an_hour_off_removes_nothing_that_is_being_written(tmp_path, monkeypatch, hours):
    """Another runner may be writing a shard of an artifact that is not complete."""
    now = time.time

    class Numbers(toy.Numbers, stage="numbers", version=1, sharded=True):
        def make(self, job):
            (job.dir / ".shard.new").touch()
            os.utime(job.dir / ".shard.new", (now() - 1000,) * 2)
            monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
            super().make(job)
            assert (job.dir / ".shard.new").exists()

    node = Numbers(label=("numbers", "a"), seed=1)
    run([node], Workspace(tmp_path), show=False)
    assert not (Workspace(tmp_path).path(node) / ".shard.new").exists()


def test_whoever_claims_an_artifact_removes_what_is_being_written_by_one_who_lost_it(tmp_path):
    """So that one who was suspended between its check and its rename cannot replace a file."""

    def stage(job):
        assert sorted(p.name for p in job.dir.iterdir()) == ["claims"]
        job.write_file("a", b"a")

    node = adhoc(stage)
    folder = pathlib.Path(Workspace(tmp_path).path(node))
    (folder / ".policy.x").mkdir(parents=True)
    (folder / ".a.x").touch()
    run([node], Workspace(tmp_path), show=False)
    assert (folder / "manifest.json").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), ArtifactError("gone")])
def test_the_error_of_a_runner_that_lost_its_lease_is_that_it_lost_it(tmp_path, error):
    def stage(job):
        claim = job.dir / "claims" / "all"
        claim.write_text(claim.read_text().replace('"id": "', '"id": "theirs'))
        raise error

    with pytest.raises(LostLease):
        run([adhoc(stage)], Workspace(tmp_path), show=False)


def test_an_error_does_not_matter_where_another_runner_has_finished_the_artifact(tmp_path):
    """It may have removed the temporary file of a shard that this one was writing."""
    workspace, wanted = make(tmp_path, ("a",))
    manifest = pathlib.Path(workspace.path(wanted["a"]), "manifest.json")
    kept = manifest.read_bytes()
    manifest.unlink()

    def fails(self, job):
        manifest.write_bytes(kept)
        raise ArtifactError("gone")

    class Failing(toy.Numbers, stage="numbers", version=1, sharded=True):
        make = fails

    node = Failing(label=("numbers", "a"), seed=1)
    run([node], Workspace(tmp_path), show=False)
    assert manifest.read_bytes() == kept


def test_a_file_is_not_replaced_by_one_who_lost_the_lease_while_it_wrote(tmp_path):
    def lost():
        assert len(list(tmp_path.iterdir())) == 2  # The temporary file stands.
        raise LostLease("lost")

    path = epath.Path(tmp_path / "a")
    write_atomic(path, b"theirs")
    with pytest.raises(LostLease):
        write_atomic(path, b"mine", lost)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"theirs")]


@pytest.mark.parametrize("e", [KeyboardInterrupt, Preempted("stopped"), OSError(errno.ENOSPC, "")])
def test_a_write_that_does_not_end_leaves_no_file(tmp_path, monkeypatch, e):
    def fails(_):
        raise e

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((KeyboardInterrupt, Preempted, ArtifactError)):
        write_atomic(epath.Path(tmp_path / "a"), b"a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_of_any_library_is_one_sentence(tmp_path, error):
    """Libraries in Rust raise exceptions that are no OSError."""

    def stage(job):
        raise error

    with pytest.raises(ArtifactError) as e:
        run([adhoc(stage)], Workspace(tmp_path), show=False)
    assert str(e.value) == (
        f"{tmp_path} cannot be written (No space left on device); make room or choose another "
        "workspace, and run the same command: finished work is kept."
    )


def test_leftovers_of_killed_processes_are_removed_when_the_study_runs_again(tmp_path):
    nodes = list(toy.nodes(0.0).values())
    run(nodes, Workspace(tmp_path), "toy", show=False)

    def paths():
        return sorted(str(p) for p in tmp_path.rglob("*"))

    before = paths()
    # Neither claims nor their locks stay in the folder of an artifact.
    assert [p for p in before if "claims" in p] == [
        str(tmp_path / "claims"),
        str(tmp_path / "claims" / ".lock"),
    ]
    for folder in {p.parent for p in tmp_path.glob("*/*/manifest.json")}:
        (folder / ".shard.x").touch()
        (folder / ".policy.x").mkdir()
        (folder / ".policy.x" / "weights").touch()
        (folder / "checkpoints.x" / "step_2.orbax-checkpoint-tmp").mkdir(parents=True)
        (folder / "claims").mkdir()
        (folder / "claims" / "all").write_text("{}")
        (folder / "claims" / ".x").touch()
    for name in (".index.json.x", "claims/index", "claims/.x"):
        (tmp_path / name).touch()
    run(nodes, Workspace(tmp_path), "toy", show=False)
    assert paths() == before


def test_a_lease_is_not_taken_while_the_claims_of_a_complete_artifact_are_removed(tmp_path):
    """At any of its steps: the folder is removed before, and while, the claim is written."""
    claims = epath.Path(tmp_path / "claims")
    for step in ("_locked", "_held_by_another", "_write"):
        lease = Lease(claims / "all")
        original = getattr(lease, step)

        def removed_first(original=original):
            shutil.rmtree(claims)
            return original()

        setattr(lease, step, removed_first)
        assert not lease.take()
    lease = Lease(claims / "all")
    assert lease.take()
    remove_claims(claims)
    assert not claims.exists()
    assert not lease.held()
    lease.release()
    assert not claims.exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_workspace_is_checked_without_a_trace(tmp_path, exists):
    root = tmp_path / "a" / "b"
    if exists:
        root.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    Workspace(root).check_writable()
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").touch()
    for place, reason in (
        ("/proc/x", ".*"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / "file", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ArtifactError) as error:
            Workspace(place).check_writable()
        assert re.fullmatch(
            rf"The workspace {place} cannot be written \({reason}\); choose another with "
            "--config.workspace=…",
            str(error.value),
        )


def test_planning_needs_no_jax():
    asked = "import sys, deltapref_jax.artifacts.runner; print('jax' in sys.modules)"
    assert (
        subprocess.check_output([sys.executable, "-c", asked], text=True, env=ENVIRONMENT)
        == "False\n"
    )
    assert (process_index(), process_count()) == (0, 1)


def test_links_by_name_are_one_per_artifact_and_never_lie_in_one(tmp_path):
    """Names that differ in characters no file name takes, names that are folders, and prefixes."""
    workspace = Workspace(tmp_path)
    labels = [
        ("a b",),
        ("a_b",),
        ("a/b",),
        ("..",),
        ("..", ".."),
        ("é",),
        ("e", "s"),
        ("e", "s", "0"),
    ]
    nodes = [Marked(label=label, mark=i) for i, label in enumerate(labels)]
    # The folder of a link that was there first gives way to the link of its own name.
    run(nodes[-1:], workspace, "../my study", show=False)
    assert (tmp_path / "by_name" / "..%2Fmy study" / "e" / "s" / "0").is_symlink()
    run(nodes, workspace, "../my study", show=False)
    links = {path for path in tmp_path.rglob("*") if path.is_symlink()}
    names = {link.relative_to(tmp_path / "by_name").as_posix() for link in links}
    study = "..%2Fmy study"
    assert names == {
        f"{study}/{name}" for name in ("a b", "a_b", "a%2Fb", "%2E%2E", "%C3%A9", "e/s")
    }
    assert (tmp_path / "by_name" / study / "a b").resolve() == pathlib.Path(
        workspace.path(nodes[0])
    )
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index["../my study"]) == len(labels)
    run(nodes[:1], workspace, "../my study", show=False)
    assert [p.name for p in (tmp_path / "by_name" / study).iterdir() if p.is_symlink()] == ["a b"]


def test_a_finished_study_of_a_workspace_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    workspace, wanted = make(tmp_path)

    def refuse(*_: object) -> bool:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Lease, "take", refuse)
    run(list(wanted.values()), workspace, "toy", show=False)
    assert workspace.table(wanted["c"]).num_rows


def test_a_stage_may_claim_what_the_runner_claimed(tmp_path):
    def stage(job):
        job.claim()
        job.write(pa.table({"x": [1]}))

    workspace, node = Workspace(tmp_path), adhoc(stage)
    run([node], workspace, show=False)
    assert workspace.table(node).num_rows == 1
