"""Two processes of four devices each: what they read, what memory that takes, and what they write.

The folders that they write are those of one process with one device, byte for byte.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from tests.marks import mostly

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FAMILIES = pathlib.Path(__file__).parent / "families"
CASES = ("llama-llama3", "phi3", "qwen3-moe", "gemma3")
WRITE = """
import sys
from pathlib import Path
from deltapref_jax.config import MeshShape
from deltapref_jax.processes import start_processes
start_processes()
from deltapref_jax.mesh import make_mesh, place
from deltapref_jax.models import export
from deltapref_jax.models.sharding import shardings
from deltapref_jax.models.stored import open_folder
from deltapref_jax.models.weights import assemble
from deltapref_jax.preemption import exit_process
import jax

export._SHARD_BYTES = 15_000
export._BLOCK_BYTES = 3_000
out, *folders = sys.argv[1:]
for folder in map(Path, folders):
    stored = open_folder(folder)
    _, state = assemble(stored, str(folder))
    for axes in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        shape = MeshShape(**axes) if jax.device_count() == 8 else MeshShape()
        mesh = make_mesh(shape)
        placed = place(state, shardings(state, mesh))
        for dtype in ("float32", "bfloat16"):
            target = Path(out) / folder.name / "-".join(axes) / dtype
            target.parent.mkdir(parents=True, exist_ok=True)
            export.write_folder(placed, stored.spec, target, dtype, stored.config)
exit_process()
"""


def run(count, arguments, environment=None):
    """Starts `count` processes of a job, of eight devices together if there are two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    devices = 4 if count == 2 else 1
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=(environment or os.environ)
            | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": str(ROOT),
            }
            | (job | {"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, ended
    return [out for out, _ in ended]


def test_two_processes_write_the_bytes_of_one(tmp_path):
    folders = [str(FAMILIES / case) for case in CASES]
    for name, count in (("one", 1), ("two", 2)):
        run(count, ["-c", WRITE, str(tmp_path / name), *folders])
    ours, theirs = (
        {
            str(file.relative_to(root)): file.read_bytes()
            for file in root.rglob("*")
            if file.is_file()
        }
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    shards = [name for name in ours if name.startswith("phi3/fsdp/float32/model-")]
    assert len(shards) > 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A gigabyte in the layout of an 8B Llama."""
    folder = tmp_path_factory.mktemp("model")
    run(1, ["-m", "launch.bench_weights", "--run=make", f"--folder={folder}"])
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "mesh", mostly(pytest.mark.exhaustive, ["fsdp=8", "fsdp=2:tensor=4", "data=2:fsdp=4"], 1)
)
def test_a_process_reads_the_bytes_of_its_devices_and_holds_little_beside(folder, mesh):
    arguments = ["-m", "launch.bench_weights", "--run=part", f"--folder={folder}", f"--mesh={mesh}"]
    for out in run(2, arguments):
        found = json.loads(out.splitlines()[-1])
        # The kernel counts headers and the index too.
        assert 0 < found["read"] <= found["read_by_kernel"] <= found["of_devices"] + 100_000
        assert found["beyond_buffers"] <= 0.3 * found["share"]
