"""A process joins the job that its cluster's environment describes, and no other."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from deltapref_jax import cluster
from deltapref_jax.config import ConfigError
from deltapref_jax.processes import start_processes

ROOT = Path(__file__).resolve().parent.parent
PREFIXES = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "GCE_", "CUDA_")
SLURM = {  # srun, two nodes with two tasks each; this is the first task of the second node
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {  # mpirun, second of two processes on one node
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,job-1.svc", "TPU_WORKER_ID": "1"}
GKE_SLICES = GKE | {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.fixture
def joined(monkeypatch):
    """Sets an environment and calls `start_processes`; returns what JAX's client would be given."""
    for key in os.environ:
        if key.startswith(PREFIXES) and key != "JAX_PLATFORMS":
            monkeypatch.delenv(key)
    calls = []

    def initialize(coordinator_address=None, num_processes=None, process_id=None, **more):
        address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        ids = more["local_device_ids"]
        calls.append(
            cloud_tpu_cluster.clusters.ClusterEnv.auto_detect_unset_distributed_params(
                address, num_processes, process_id, ids, None, 5
            )
        )

    monkeypatch.setattr(jax.distributed, "initialize", initialize)

    def start(variables, tpu=False):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        for module in ("cloud_tpu_init", "clusters.cloud_tpu_cluster", "clusters.cluster"):
            monkeypatch.setattr(f"jax._src.{module}.running_in_cloud_tpu_vm", tpu)
        began = time.monotonic()
        start_processes()
        assert calls or time.monotonic() - began < 2.5  # JAX's own test takes 3 s without a pod
        return calls[0] if calls else None

    return start


@pytest.mark.parametrize(
    ("variables", "tpu", "expected"),
    [
        (SLURM, False, ("node007:61441", 4, 2, [0])),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, False, ("node007:61441", 4, 2, [0, 1])),
        (OPEN_MPI, False, ("10.96.0.1:62624", 2, 1, [1])),
        (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, False, ("10.96.0.1:62624", 2, 1, [2, 3])),
        (GKE | {"MEGASCALE_NUM_SLICES": "1"}, True, ("localhost:8482", 2, 1, None)),
        (GKE_SLICES, True, ("localhost:8482", 4, 3, None)),
        (
            GKE_SLICES | {"JAX_COORDINATOR_PORT": "8476"},
            True,
            ("localhost:8476", 4, 3, None),
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            False,
            ("host:1", 2, 1, None),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"} | SLURM, False, ("host:1", 4, 2, [0])),
    ],
)
def test_a_process_joins_its_job(joined, metadata, monkeypatch, variables, tpu, expected):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # JAX asks six times for what is not there
    port = str(cloud_tpu_cluster.coordinator_port)
    address = expected[0].replace(":8482", f":{port}")
    # JAX asks the metadata server for what GKE did not put into the environment.
    assert joined({"GCE_METADATA_IP": metadata[1]} | variables, tpu) == (address, *expected[1:])


@pytest.mark.parametrize(
    ("variables", "tpu"),
    [
        ({}, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({key: SLURM[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS")}, False),  # sbatch, no srun
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, False),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, True),
        (GKE, False),  # CPU pods of the same job have no chips
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_a_process_alone_starts_without_asking_a_server(joined, monkeypatch, variables, tpu):
    monkeypatch.setattr(cluster, "_metadata", None)
    assert joined(variables, tpu) is None


def test_a_cloud_tpu_pod_is_joined(joined, metadata):
    attributes, server = metadata
    attributes |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "x:y:127.0.0.1,x:y:127.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '1'\n",
    }
    address = f"127.0.0.1:{cloud_tpu_cluster.coordinator_port}"
    assert joined({"GCE_METADATA_IP": server}, tpu=True) == (address, 2, 1, None)


def test_slices_of_one_cloud_tpu_host_each_are_joined(joined, metadata):
    attributes, server = metadata
    attributes |= {
        "agent-worker-number": "0",
        "worker-network-endpoints": "x:y:127.0.0.2",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1'\n",
    }
    address = f"127.0.0.1:{cloud_tpu_cluster.coordinator_port}"
    assert joined({"GCE_METADATA_IP": server}, tpu=True) == (address, 2, 1, None)


@pytest.mark.parametrize(
    "attributes",
    [
        {"agent-worker-number": "0", "worker-network-endpoints": "x:y:127.0.0.1", "tpu-env": ""},
        {"agent-worker-number": "0", "worker-network-endpoints": "x:y:127.0.0.1"},
        {},  # a virtual machine of Compute Engine
    ],
)
def test_a_single_cloud_tpu_host_starts_at_once(joined, metadata, attributes):
    metadata[0].update(attributes)
    assert joined({"GCE_METADATA_IP": metadata[1]}, tpu=True) is None


def test_a_tpu_host_without_a_metadata_server_starts_alone(joined, monkeypatch):
    monkeypatch.setattr(cluster, "_METADATA_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "_METADATA_ATTEMPTS", 2)
    assert joined({"GCE_METADATA_IP": "127.0.0.1:9"}, tpu=True) is None


def test_a_metadata_server_that_fails_does_not_make_a_host_run_alone(joined, metadata, monkeypatch):
    monkeypatch.setattr(cluster, "_METADATA_ATTEMPTS", 1)
    metadata[0]["agent-worker-number"] = 503
    with pytest.raises(ConfigError) as e:
        joined({"GCE_METADATA_IP": metadata[1]}, tpu=True)
    assert str(e.value) == (
        f"The metadata server {metadata[1]} does not say whether this host belongs to a TPU pod "
        "(HTTP Error 503: Service Unavailable); run the command again, or set JAX_NUM_PROCESSES=1 "
        "for this host alone."
    )


ONE_A_NODE = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "2"}


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        (ONE_A_NODE | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [*range(8)]),
        (ONE_A_NODE | {"SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        (ONE_A_NODE | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        (ONE_A_NODE | {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, [1]),
        (SLURM | {"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
        (SLURM | {"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0"}, [0]),
        (
            SLURM
            | {
                "SLURM_LOCALID": "1",
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_GPUS_PER_TASK": "2",
            },
            [0, 1],
        ),
        (
            SLURM
            | {
                "SLURM_LOCALID": "1",
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_TRES_BIND": "gres/gpu:single:2",
            },
            [0, 1],
        ),
        (
            SLURM
            | {
                "SLURM_LOCALID": "1",
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_GPUS_PER_TASK": "1",
                "SLURM_GPU_BIND": "none",
            },
            [1],
        ),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "CUDA_VISIBLE_DEVICES": "0,1,2"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_a_task_takes_its_share_of_the_gpus_of_its_node(joined, monkeypatch, variables, ids):
    del joined  # It clears the environment.
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert cluster.local_device_ids() == ids


def test_gpus_that_tasks_cannot_share_are_refused(joined):
    with pytest.raises(ConfigError) as e:
        joined(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert str(e.value) == (
        "2 tasks on this node cannot share 3 GPUs evenly; start a number of tasks per node that "
        "divides the GPUs, or set JAX_LOCAL_DEVICE_IDS for each task."
    )


PROGRAM = """
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import gather_to_host, make_mesh, place
from deltapref_jax.preemption import exit_process
from deltapref_jax.processes import agreed, process_count, process_index, start_processes

start_processes()
mesh = make_mesh(MeshShape(-1, 2))
host = np.arange(64.0, dtype=np.float32).reshape(8, 8)
for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp"), PartitionSpec()):
    for dtype in (None, np.float32):
        placed = place({"a": host}, {"a": NamedSharding(mesh, spec)}, dtype)["a"]
        for part in placed.addressable_shards:
            np.testing.assert_array_equal(np.asarray(part.data), host[part.index])
        np.testing.assert_array_equal(gather_to_host(placed), host)
total = jax.jit(lambda x: x.sum())(placed)
found = process_index(), process_count(), jax.device_count(), agreed(process_index() == 0), total
# In one write, and not where the collectives' library prints lines of its own at any time.
sys.stderr.write(" ".join(map(str, ("\\nfound", *found, "\\n"))))
exit_process()
"""


@pytest.mark.slow
def test_two_processes_join_and_agree():
    """Under SLURM; `launch/test_pod.py` has the other systems, and whole studies."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
    common = clean | {
        "JAX_COORDINATOR_PORT": port,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    task = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=common | SLURM | task | {"SLURM_PROCID": index, "SLURM_LOCALID": index},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in "01"
    ]
    try:
        ended = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    for index, (_, error) in enumerate(ended):
        assert f"found {index} 2 8 True 2016.0 " in error.splitlines(), error
