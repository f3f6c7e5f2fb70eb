"""Two processes in a cluster's environment make the tables of one process, stage by stage.

Sums over devices are taken in another order than on one device, so numbers are equal to float32's
rounding: 2e-5 in the rows of tables and in metrics, whose values are of order 1 to 100, and 1e-5 in
the trained weights. Everything else is equal: ids, tokens, texts, verdicts, counts and their order.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from deltapref_jax.config import (
    Arm,
    Experiment,
    Generator,
    Judge,
    Model,
    Objective,
    Prompts,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from tests.marks import mostly

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CLUSTERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "GCE_", "CUDA_")
ABLATE = """
import os, sys
from absl import flags

if os.environ.pop("ON_TPU_VM", ""):
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster, cluster

    for module in (cloud_tpu_init, cloud_tpu_cluster, cluster):
        module.running_in_cloud_tpu_vm = True
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)
if "MEGASCALE_SLICE_ID" in os.environ:  # JAX counts all CPUs as one slice; here a process is one.
    from jax.experimental import mesh_utils

    from deltapref_jax import devices, mesh

    hybrid = mesh_utils.create_hybrid_device_mesh

    def by_process(inside, across, devices, **_):
        print("hybrid mesh", inside, across, file=sys.stderr)
        return hybrid(inside, across, devices, process_is_granule=True)

    mesh_utils.create_hybrid_device_mesh = by_process
    for module in (devices, mesh):
        module.count_slices = lambda devices: len({d.process_index for d in devices})
import launch.ablate
from launch.flags import run_main

flags.mark_flag_as_required("config")
run_main(launch.ablate.main)
"""
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
# By system: variables of each process, and meshes that are stated; the others are chosen.
SYSTEMS = {
    "gke": ({"TPU_WORKER_HOSTNAMES": "localhost,localhost"}, ()),
    # Two slices of one host each, whose metadata differ in the number of the slice.
    "cloud tpu": (
        {},
        ("training.mesh.data=2", "scoring.mesh.data=2", "judges[0].mesh.fsdp=4"),
    ),
    "slurm": (
        SLURM,
        ("training.mesh.tensor=2", "sampling.mesh.tensor=2", "generators[0].mesh.data=2"),
    ),
}
MESHES = {
    "gke": "Meshes: training fsdp=4; scoring fsdp=4; on each host sampling data=2.",
    "cloud tpu": "Meshes: training data=2 fsdp=2; scoring data=2 fsdp=2; judge model fsdp=4; on "
    "each host sampling data=2.",
    "slurm": "Meshes: training fsdp=2 tensor=2; scoring fsdp=4; on each host sampling tensor=2; "
    "generator weak data=2.",
}
HYBRID = {"hybrid mesh [1, 2, 1, 1] [2, 1, 1, 1]", "hybrid mesh [1, 2, 1, 1] [1, 2, 1, 1]"}


@pytest.fixture(scope="module")
def study(tiny_folder, tmp_path_factory):
    """A config file, and a folder for compiled programs that all runs share."""
    e = Experiment(
        name="pod",
        prompts=(Prompts(tasks=("chain",), count=8, difficulty=1, seed=1),),
        generators=(Generator(name="weak"), Generator(name="strong", temperature=0.5)),
        judges=(Judge(name="model", kind="model", model=Model(path=str(tiny_folder))),),
        student=Model(path=str(tiny_folder)),
        objectives=(Objective(name="kto", kind="kto", learning_rate=1e-3),),
        arms=(Arm(name="kto", chosen="strong", rejected="weak", objective="kto"),),
        suites=(
            Suite(
                name="chain",
                prompts=Prompts(tasks=("chain",), count=4, difficulty=1, seed=9),
                samples=2,
            ),
        ),
        training=Training(
            pairs_per_step=4,
            steps=3,
            warmup=0.0,
            rows=8,
            row_length=160,
            finishes=("eos", "stop", "length"),
        ),
        sampling=Sampling(max_prompt=200, max_tokens=8, slots=8, chunk=4, shard=4),
        scoring=Scoring(rows=8, row_length=512, shard=4),
    )
    folder = tmp_path_factory.mktemp("pod")
    (folder / "study.py").write_text(
        f"from deltapref_jax.config import *\n\n\ndef get_config():\n    return {e!r}\n"
    )
    return folder


def start(study, workspace, devices, flags=(), **variables):
    """Starts launch.ablate in an environment that has these variables of a cluster alone."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            ABLATE,
            f"--config={study}/study.py",
            f"--config.workspace={workspace}",
            *(f"--config.{flag}" for flag in flags),
        ],
        env=clean
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(study / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def one(study):
    """The workspace of one process with one device."""
    process = start(study, study / "one", 1)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Meshes" not in out
    return study / "one"


def artifacts(workspace):
    index = json.loads((workspace / "index.json").read_text())["pod"]
    return {label: workspace / path for label, path in index.items()}


def table(folder):
    """All shards of a table in order."""
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet")))


def assert_equal_rows(label, ours, theirs, tolerance):
    assert ours.schema.equals(theirs.schema, check_metadata=True), label
    for name in ours.schema.names:
        kind = ours.schema.field(name).type
        values = [t[name].to_pylist() for t in (ours, theirs)]
        numbers = kind.value_type if pa.types.is_list(kind) else kind
        if pa.types.is_floating(numbers):
            assert [v is None for v in values[0]] == [v is None for v in values[1]], (label, name)
            known = [np.array([v for v in side if v is not None], float) for side in values]
            np.testing.assert_allclose(*known, rtol=tolerance, atol=tolerance, err_msg=label)
        else:
            assert values[0] == values[1], (label, name)


def assert_equal_policies(ours, theirs):
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (ours, theirs)
    ]
    assert len(rows[0]) == len(rows[1]) == 3
    for one_row, other in zip(*rows, strict=True):
        assert one_row.keys() == other.keys()
        for name, value in one_row.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
    assert rows[0][0]["loss"] != rows[0][2]["loss"]
    weights, others = (load_file(f / "policy" / "model.safetensors") for f in (ours, theirs))
    assert weights.keys() == others.keys()
    for name, array in weights.items():
        np.testing.assert_allclose(others[name], array, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("system", mostly(pytest.mark.exhaustive, list(SYSTEMS), 0))
def test_two_processes_make_the_tables_of_one(study, one, system, metadata_server):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables, flags = SYSTEMS[system]
    own = {
        "gke": lambda index: {"TPU_WORKER_ID": index, "ON_TPU_VM": "1"},
        "cloud tpu": lambda index: {"MEGASCALE_SLICE_ID": index, "ON_TPU_VM": "1"},
        "slurm": lambda index: {"SLURM_PROCID": index, "SLURM_LOCALID": index},
    }[system]
    workspace, processes = study / system, []
    for index in "01":
        attributes, server = metadata_server()
        if system == "cloud tpu":
            attributes |= {
                "agent-worker-number": "0",
                "worker-network-endpoints": "x:y:localhost",
                "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_COORDINATOR_ADDRESS: 'localhost'",
            }
        more = variables | own(index) | {"GCE_METADATA_IP": server, "JAX_COORDINATOR_PORT": port}
        processes.append(start(study, workspace, 2, flags, **more))
    try:
        ended = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    # Process 0 alone says which meshes there are, and shows the results.
    assert MESHES[system] in ended[0][0].splitlines()
    assert "Page: " in ended[0][0]
    # Gloo's lines may be torn in two, also behind their last word or in front of their number.
    of_gloo = re.compile(r"\[Gloo\]|connected to|peer ranks|^[\s:\d]*$")
    said = [line for line in ended[1][0].splitlines() if not of_gloo.search(line)]
    assert [line.partition(" processes at ")[0] for line in said] == ["Waits for 2"]
    # With two slices the meshes of all devices span them, by data or, as these are CPUs, by fsdp.
    for _, err in ended:
        hybrid = {line for line in err.splitlines() if line.startswith("hybrid mesh")}
        assert hybrid == (HYBRID if system == "cloud tpu" else set())

    made, expected = artifacts(workspace), artifacts(one)
    assert made.keys() == expected.keys()
    for label, folder in made.items():
        if label == "train/kto/0":
            assert_equal_policies(expected[label], folder)
        elif label != "report":
            assert_equal_rows(label, table(expected[label]), table(folder), 2e-5)
    assert (made["report"] / "report.html").exists()
    # Both processes sample: each compiles in the first shard that it makes.
    compiled = [
        json.loads(file.read_text())["stats"]["compile_seconds"] > 0
        for label in ("sample/weak", "sample/strong")
        for file in made[label].glob("shard-*.json")
    ]
    assert sum(compiled) >= 2
