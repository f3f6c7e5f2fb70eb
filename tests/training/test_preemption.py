"""A SIGTERM or an error of one process stops all processes of a job, in time, with one message."""

import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh
from deltapref_jax.preemption import Preempted
from deltapref_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow
STOPPED = "Stopped by SIGTERM. Run the same command to continue; finished work is kept."
SHUTDOWN_SECONDS = 30  # A collective would wait for minutes.


@pytest.fixture
def two(spawn):
    """Starts two processes of a job with four devices each, and kills them at the end."""
    started = []

    def start(mode, root):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        for index in "01":
            started.append(
                spawn(
                    mode,
                    root,
                    devices=4,
                    JAX_COORDINATOR_ADDRESS=address,
                    JAX_NUM_PROCESSES="2",
                    JAX_PROCESS_ID=index,
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def state(program):
    return program.global_state(make_mesh(MeshShape(2, 2, 2)))


def exits(processes, seconds):
    """Exit code and last line on stderr of every process, all of which must exit within `seconds`.

    Tracebacks of tensorstore's threads, whose event loop is closed while they run, are ignored.
    """
    deadline = time.monotonic() + seconds
    errors = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    print(*errors)
    ignored = re.compile(r"Traceback \(most|  File |    |RuntimeError: Event loop is closed|$")
    lines = [
        [line for line in text.splitlines() if not ignored.match(line)] or [""] for text in errors
    ]
    return [(process.returncode, own[-1]) for process, own in zip(processes, lines, strict=True)]


@pytest.mark.parametrize("mode", ["together", "alone"])
def test_sigterm_in_a_stage_ends_both_and_releases_the_leases(two, tmp_path, mode):
    processes = two(mode, tmp_path)
    while not all((tmp_path / f"at-{index}").exists() for index in (0, 1)):
        assert all(process.poll() is None for process in processes), exits(
            processes, SHUTDOWN_SECONDS
        )
        time.sleep(0.05)
    claims = next((tmp_path / "w" / "stage").iterdir()) / "claims"
    assert len(list(claims.glob("shard-*"))) == (1 if mode == "together" else 2)
    processes[1].send_signal(signal.SIGTERM)
    assert exits(processes, SHUTDOWN_SECONDS) == [(Preempted.code, STOPPED)] * 2
    assert list(claims.glob("shard-*")) == []


def test_a_disk_that_is_full_for_one_process_stops_both_and_leaves_the_last_checkpoint(
    two, state, tmp_path
):
    sentence = (
        f"The checkpoint {tmp_path}/step_2 cannot be written (File too large); make room or choose "
        "another workspace, and run the same command: the checkpoint of step 1 is untouched."
    )
    assert exits(two("full", tmp_path), 60) == [
        (2, f"Process 1 of 2 stopped: {sentence}"),
        (2, sentence),
    ]
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.newest() == 1
        restored, _ = checkpoints.restore(jax.tree.map(lambda x: x * 0, state))
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_shard_of_a_checkpoint_that_one_process_misses_stops_both(two, state, tmp_path):
    with Checkpoints(tmp_path / "0", 1) as checkpoints:
        checkpoints.save(1, state, dict.fromkeys(checkpoints.seconds, 0.0))
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    max(
        (file for file in (tmp_path / "1").rglob("*") if file.is_file()),
        key=lambda f: f.stat().st_size,
    ).unlink()
    (code, other), (first, sentence) = exits(two("view", tmp_path), 60)
    assert (code, first) == (2, 2)
    assert sentence.startswith(f"The checkpoint {tmp_path}/1/step_1 cannot be read (")
    assert sentence.endswith(
        "; delete that folder and run the same command to train from the start."
    )
    assert other == f"Process 1 of 2 stopped: {sentence}"
    assert (tmp_path / "0" / "step_1").exists()


def test_a_job_that_nothing_stops_ends_with_zero(two, tmp_path):
    assert [code for code, _ in exits(two("fine", tmp_path), 120)] == [0, 0]
