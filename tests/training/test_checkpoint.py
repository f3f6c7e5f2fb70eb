"""A run that is killed or preempted, or whose disk is full, or whose checkpoint is damaged."""

import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from absl import logging
from etils import epath

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.lease import LostLease
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import MeshShape
from deltapref_jax.files import ArtifactError
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.export import export
from deltapref_jax.preemption import Preempted
from deltapref_jax.training.checkpoint import (
    Checkpoints,
    Metrics,
    checksum,
    own_folder,
    read_metrics,
)
from deltapref_jax.training.state import Optimizer, init_state

# Orbax leaves unfinished coroutines of a failed save or restore to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = pathlib.Path(__file__).parents[2]
COUNTS = {"tokens": 7.0}


def same(a, b, tolerance=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_run_killed_at_random_points_is_the_uninterrupted_one_bit_for_bit(spawn, tmp_path):
    kills = 12
    process = spawn("kill", tmp_path, kills, kills)
    out, err = process.communicate()
    assert process.returncode == 0, err
    done, runs = map(int, out.split())
    assert done == kills
    for folder in ["again", *(f"cut-{i}" for i in range(runs))]:
        for file in ("metrics.jsonl", "params.npz"):
            assert (tmp_path / folder / file).read_bytes() == (
                tmp_path / "whole" / file
            ).read_bytes(), folder
    assert len(list(read_metrics(tmp_path / "whole" / "metrics.jsonl"))) == 12


@pytest.mark.slow
def test_resumed_on_another_mesh_is_the_same_within_noise(program, tmp_path, one_device):
    whole, counts = program.tiny(tmp_path / "whole", steps=4)
    program.tiny(tmp_path / "moved", steps=2, mesh=make_mesh(MeshShape(2, 2, 2)))
    moved, resumed = program.tiny(tmp_path / "moved", steps=4, mesh=one_device)
    same(whole, moved, 1e-5)
    rows, again = (
        list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "moved")
    )
    for row, other in zip(rows, again, strict=True):
        assert row == pytest.approx(other, rel=2e-4, abs=2e-5)
    for name in ("tokens", "positions"):  # Counts continue too.
        assert resumed[name] == counts[name]
    assert rows[-1]["num_tokens"] == counts["tokens"]


def test_sigterm_saves_the_step_and_exits(program, tmp_path):
    source = program.data("dpo", 32)

    def interrupting(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return source(step)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        Preempted,
        match=rf"^Stopped by SIGTERM after step 2 of 4, which is saved in "
        rf"{tmp_path}/cut\. Run the same command to continue\.$",
    ):
        program.tiny(tmp_path / "cut", steps=4, source=interrupting)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").glob("step_*")] == ["step_2"]
    params, _ = program.tiny(tmp_path / "cut", steps=4)
    whole, _ = program.tiny(tmp_path / "whole", steps=4)
    same(params, whole)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


def test_sigterm_at_the_last_step_is_not_lost(program, tmp_path):
    source = program.data("dpo", 32)

    def interrupting(step):
        os.kill(os.getpid(), signal.SIGTERM)
        return source(step)

    with pytest.raises(Preempted, match="after step 1 of 1, which is saved"):
        program.tiny(tmp_path, steps=1, source=interrupting)
    params, counts = program.tiny(tmp_path, steps=1, source=None)
    assert counts["tokens"] == source(0).tokens
    assert params is not None


@pytest.fixture
def state(program, one_device):
    spec = program.SPEC
    return init_state(
        program.nnx.state(program.Decoder(spec, rngs=program.nnx.Rngs(0))), Optimizer(), one_device
    )


@pytest.fixture(autouse=True)
def quiet():
    """Logs as in `launch`; pytest would keep the tracebacks that Orbax logs, and their objects."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def limited():
    """Limits the size of files in bytes, which is a full disk to Orbax's C++."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for_writers(folder):
    """Waits for writers that Orbax abandoned, which would not exist in a later process."""

    def files():
        return sorted(
            (path.name, path.stat().st_mtime) for path in folder.rglob("*") if path.exists()
        )

    before, now = None, files()
    while before != now:
        time.sleep(0.5)
        before, now = now, files()


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_untouched(tmp_path, state, limited):
    saved = jax.device_get(state)
    moved = jax.tree.map(lambda x: x + 1, state)
    with Checkpoints(tmp_path / "c", 1) as checkpoints:
        checkpoints.save(1, state, COUNTS)
        checkpoints.wait()
        limited(9000)
        with pytest.raises(ArtifactError) as error:
            checkpoints.save(2, moved, COUNTS)
            checkpoints.wait()
    assert str(error.value) == (
        f"The checkpoint {tmp_path}/c/step_2 cannot be written (File too large); make room or "
        "choose another workspace, and run the same command: the checkpoint of step 1 is "
        "untouched."
    )
    limited(resource.RLIM_INFINITY)
    wait_for_writers(tmp_path)
    with Checkpoints(tmp_path / "c", 1) as checkpoints:
        assert checkpoints.newest() == 1
        restored, counts = checkpoints.restore(moved)
        checkpoints.save(2, restored, COUNTS)
    # Nothing is left of the failed save.
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_2"]
    same(saved, jax.device_get(restored))
    assert counts["tokens"] == 7.0


def test_a_full_disk_ends_training_with_the_sentence(program, tmp_path, limited):
    source = program.data("dpo", 32)

    def filling(step):
        if step == 3:
            while not list(tmp_path.glob("checkpoints.*/step_2")):
                time.sleep(0.01)
            limited(9000)
        return source(step)

    with pytest.raises(
        ArtifactError,
        match=r"/checkpoints/step_4 cannot be written \(File too large\); .*: the "
        r"checkpoint of step 2 is untouched\.$",
    ):
        program.tiny(tmp_path, steps=6, every=2, source=filling)
    limited(resource.RLIM_INFINITY)
    wait_for_writers(tmp_path)
    params, _ = program.tiny(tmp_path, steps=6, every=2)
    same(params, program.tiny(tmp_path / "whole", steps=6)[0])


class Made(Node, stage="made", version=1):
    """Claims, and is made by a function."""

    function: Callable[[Job], None] = runtime()

    def make(self, job):
        self.function(job)


def test_a_run_that_slept_through_its_lease_leaves_the_folder_alone(program, tmp_path):
    """The lease is taken over while step 5 is prepared, as if the process had been suspended."""
    source, at_waking = program.data("dpo", 32), []

    def train(job):
        def sleeping(step):
            if step == 4:
                while not list(job.dir.glob("checkpoints.*/step_4")):
                    time.sleep(0.01)
                claim = job.dir / "claims" / "all"
                claim.write_text(claim.read_text().replace('"id": "', '"id": "theirs'))
                at_waking.append((job.dir / "metrics.jsonl").read_bytes())
            return source(step)

        program.tiny(job.dir, steps=8, every=2, source=sleeping, check_lease=job.check_lease)

    node, workspace = Made(label=("x",), function=train), Workspace(tmp_path)
    with pytest.raises(LostLease, match=r"^Another process took over \S+ \(x\) because this one "):
        run([node], workspace, show=False)
    folder = pathlib.Path(workspace.path(node))
    assert (folder / "metrics.jsonl").read_bytes() == at_waking[0]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [path.name for path in folder.glob("checkpoints*/*")] == ["step_4"]
    assert "theirs" in (folder / "claims" / "all").read_text()


def test_a_lease_that_is_lost_while_a_save_is_waited_for_ends_the_run_before_the_next_save(
    program, tmp_path, monkeypatch
):
    waits, wait = [], Checkpoints.wait

    def slow(self):
        wait(self)
        waits.append(self.newest())

    def check_lease():
        if 2 in waits:
            raise LostLease("lost")

    monkeypatch.setattr(Checkpoints, "wait", slow)
    with pytest.raises(LostLease):
        program.tiny(tmp_path, steps=8, every=2, check_lease=check_lease)
    assert [path.name for path in tmp_path.glob("checkpoints*/*")] == ["step_2"]


def test_a_folder_of_checkpoints_is_its_owners_alone(tmp_path):
    """A process takes over while another one, suspended, still writes."""

    def lost():
        raise LostLease("lost")

    folder = epath.Path(tmp_path / "checkpoints")
    with pytest.raises(LostLease), own_folder(folder, lost) as first:
        (first / "step_2").mkdir(parents=True)
        with own_folder(folder, lambda: None) as second:
            assert [path.name for path in second.iterdir()] == ["step_2"]
            (second / "step_4").mkdir()
            # The first process wakes, and finishes the save at which it was suspended.
            (first / "step_3").mkdir(parents=True)
            assert sorted(path.name for path in second.iterdir()) == ["step_2", "step_4"]
        assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", first.name]
    with own_folder(folder, lambda: None):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.slow
def test_a_suspended_runner_leaves_the_artifact_to_the_one_that_took_over(spawn, tmp_path):
    """The lease expires after two seconds; the first runner is suspended until all is made."""

    def rows():
        files = list(tmp_path.rglob("metrics.jsonl"))
        return [row["step"] for row in read_metrics(files[0])] if files else []

    first = spawn("leased", tmp_path)
    while len(rows()) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    second = spawn("leased", tmp_path)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 75, err
    assert re.fullmatch(
        r"Another process took over \S+ \(it\) because this one was silent for a minute; run the "
        r"same command to continue\.",
        err.strip().splitlines()[-1],
    )
    assert rows() == list(range(1, 13))
    stands = {path for path in made if {"policy", "metrics.jsonl", "manifest.json"} & {*path.parts}}
    assert len(stands) == 3
    assert all(path.read_bytes() == made[path] for path in stands)
    third = spawn("leased", tmp_path)
    assert (third.communicate(timeout=60), third.returncode)[1] == 0
    assert all(path.read_bytes() == made[path] for path in stands)


def test_a_full_disk_while_a_policy_is_exported_is_one_sentence(tmp_path, tiny, limited):
    """safetensors raises an exception of its own for it."""

    def export_policy(job):
        with job.output_dir("policy") as folder:
            limited(20_000)
            export(tiny.state, tiny.spec, tiny.text, folder)

    node, workspace = Made(label=("x",), function=export_policy), Workspace(tmp_path)
    with pytest.raises(ArtifactError) as e:
        run([node], workspace, show=False)
    limited(resource.RLIM_INFINITY)
    assert str(e.value) == (
        f"{tmp_path} cannot be written (File too large); make room or choose another workspace, "
        "and run the same command: finished work is kept."
    )
    assert not list(pathlib.Path(workspace.path(node)).glob("*policy*"))


@pytest.mark.slow
def test_every_damage_is_one_sentence_or_does_not_matter(tmp_path, state):
    saved, like = jax.device_get(state), jax.tree.map(lambda x: x * 0, state)
    with Checkpoints(tmp_path / "c", 1) as checkpoints:
        checkpoints.save(3, state, COUNTS)
    sentence = (
        rf"^The checkpoint {tmp_path}/c/step_3 cannot be read \([^\n]+\); delete that folder and "
        r"run the same command to train from the start\.$"
    )
    refused = set()
    shutil.copytree(tmp_path / "c", tmp_path / "good")
    for file in [f for f in (tmp_path / "good").rglob("*") if f.is_file()]:
        for damage in ("gone", "cut", "flipped"):
            shutil.rmtree(tmp_path / "c")
            shutil.copytree(tmp_path / "good", tmp_path / "c")
            damaged = tmp_path / "c" / file.relative_to(tmp_path / "good")
            content = bytearray(file.read_bytes())
            if damage == "gone":
                damaged.unlink()
            elif damage == "cut":
                damaged.write_bytes(content[: len(content) // 2])
            elif content:
                content[len(content) // 2] ^= 16
                damaged.write_bytes(content)
            with Checkpoints(tmp_path / "c", 1) as checkpoints:
                if checkpoints.newest() != 3:
                    continue
                try:
                    restored, _ = checkpoints.restore(like)
                except ArtifactError as e:
                    assert re.match(sentence, str(e)), e
                    refused.add((file.stat().st_size > 20_000, damage))
                else:
                    same(saved, jax.device_get(restored))
    assert {(True, "gone"), (True, "cut"), (True, "flipped")} <= refused  # the arrays' files


def test_a_complete_run_leaves_no_checkpoint_that_a_killed_save_did_not_remove(program, tmp_path):
    program.tiny(tmp_path, steps=3)
    folder = tmp_path / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_3"]
    # Killed before the save of step 3 had removed what it replaces.
    shutil.copytree(folder / "step_3", folder / "step_2")
    program.tiny(tmp_path, steps=3)
    assert [p.name for p in folder.iterdir()] == ["step_3"]


def test_another_model_is_refused_and_an_older_checkpoint_is_named(tmp_path, state):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, COUNTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_2", "step_3"]
    wider = jax.tree.map(
        lambda x: jax.device_put(np.zeros((*x.shape, 2), x.dtype), x.sharding), state.moments
    )
    with (
        Checkpoints(tmp_path, 2) as checkpoints,
        pytest.raises(ArtifactError, match=r"step_3 cannot be read .* to continue from step 2\.$"),
    ):
        checkpoints.restore(state._replace(moments=wider))


def test_the_checksum_sees_one_bit_and_no_mesh(state):
    params = jax.device_get(state.params)
    spread = init_state(params, Optimizer(), make_mesh(MeshShape(2, 2, 2)))
    assert int(checksum(spread)) == int(checksum(state)) != 0
    leaves, tree = jax.tree.flatten(jax.device_get(state))
    bits = leaves[0].view(np.uint32).copy()
    bits.flat[5] ^= 1
    assert int(checksum(jax.tree.unflatten(tree, [bits.view(np.float32), *leaves[1:]]))) != int(
        checksum(state)
    )


def test_seconds_of_saves_are_counted(tmp_path, state):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, COUNTS)
        checkpoints.wait()
        first = dict(checkpoints.seconds)
    assert first["seconds_checkpoint_blocked"] > 0
    assert first["seconds_checkpoint_background"] > 0
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.restore(state)
        assert checkpoints.seconds.keys() == first.keys()
        checkpoints.save(2, state, COUNTS)
        checkpoints.wait()
        assert all(checkpoints.seconds[name] > 0 for name in first)


def test_metrics_that_lost_rows_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n')
    with pytest.raises(ArtifactError) as error:
        Metrics(path, 3)
    assert str(error.value) == (
        f"{path} has lost rows of the first 3 steps; delete the directory {tmp_path} and run "
        "again: only that run is made anew."
    )
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_metrics_of_a_suspended_process_do_not_reach_the_file_of_its_successor(tmp_path):
    path = tmp_path / "metrics.jsonl"
    suspended = Metrics(path, 0)
    suspended.write({"step": 1})
    successor = Metrics(path, 1)
    suspended.write({"step": 2})
    suspended.flush()
    successor.write({"step": 2, "again": True})
    for metrics in (suspended, successor):
        metrics.close()
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2, "again": True}]


def test_metrics_in_a_bucket_are_written_whole_before_each_checkpoint(monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: Bucket())
    path = "s3://bucket/run/metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write({"step": 1})
    assert list(read_metrics(path)) == []
    metrics.flush()
    metrics.write({"step": 2})
    again = Metrics(path, 1)
    again.write({"step": 2, "again": True})
    again.flush()
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2, "again": True}]


LAUNCHER = """
import os, signal, sys
from launch.flags import run_main
def main(_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        print("released")
run_main(main)
"""


def test_sigterm_outside_a_guard_unwinds_and_exits_with_its_code():
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (75, "released\n")
    assert (
        done.stderr
        == "Stopped by SIGTERM. Run the same command to continue; finished work is kept.\n"
    )
