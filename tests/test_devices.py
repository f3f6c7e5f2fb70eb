"""What a dry run assumes of the devices, without joining a job or starting one of them."""

import os

import jax
import pytest

from deltapref_jax import cluster, devices
from deltapref_jax.config import ConfigError
from deltapref_jax.devices import Devices, assumed_devices, attached_devices

CLUSTERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "GCE_", "CUDA_")
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}


@pytest.fixture
def described(monkeypatch):
    """Sets an environment, and the devices that this host seems to have."""
    for key in os.environ:
        if key.startswith(CLUSTERS) and key != "JAX_PLATFORMS":
            monkeypatch.delenv(key)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)

    def of(variables, platform="cpu", count=2):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        for module in ("cloud_tpu_init", "clusters.cloud_tpu_cluster", "clusters.cluster"):
            name = f"jax._src.{module}.running_in_cloud_tpu_vm"
            monkeypatch.setattr(name, platform == "tpu")
        monkeypatch.setattr(devices, "_host_devices", lambda: (platform, count))
        return assumed_devices()

    return of


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "platform", "count", "expected", "words"),
    [
        ({}, "cpu", 1, Devices(1, 1, 1, "cpu"), "1 cpu device on 1 host"),
        (GKE, "tpu", 4, Devices(16, 4, 1, "tpu"), "16 tpu devices on 4 hosts"),
        (
            GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "x"},
            "tpu",
            4,
            Devices(32, 4, 2, "tpu"),
            "32 tpu devices on 8 hosts in 2 slices",
        ),
        (SLURM, "gpu", 8, Devices(16, 8, 2, "gpu"), "16 gpu devices on 2 hosts"),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, "gpu", 8, Devices(8, 8, 1, "gpu"), "8 gpu devices on"),
    ],
)
def test_the_environment_says_how_many_hosts(
    described, metadata, variables, platform, count, expected, words
):
    found = described(variables | {"GCE_METADATA_IP": metadata[1]}, platform, count)
    assert found == expected
    assert found.layout.startswith(words)


def test_a_cloud_tpus_metadata_says_how_many_slices(described, metadata):
    attributes, server = metadata
    attributes |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "x:y:127.0.0.1,x:y:127.0.0.2",
        "tpu-env": "MEGASCALE_NUM_SLICES: '4'\n",
    }
    assert described({"GCE_METADATA_IP": server}, "tpu", 4) == Devices(32, 4, 4, "tpu")
    assert cluster.detected_slices() == 4


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("4x4", Devices(16, 4, 1, "tpu")),
        ("2x4x4", Devices(32, 4, 2, "tpu")),
        ("gpu:2x8", Devices(16, 8, 2, "gpu")),
        ("tpu:1x8", Devices(8, 8, 1, "tpu")),
    ],
)
def test_stated_devices(monkeypatch, stated, expected):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert assumed_devices(stated) == expected


@pytest.mark.parametrize(
    "stated", ["4", "4x0", "x4", "npu:4x4", "1x2x3x4", "4x-4", "9" * 50 + "x1"]
)
def test_anything_else_is_refused(monkeypatch, stated):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(ConfigError) as e:
        assumed_devices(stated)
    assert str(e.value) == (
        f"--devices is {stated!r}; give HOSTSxDEVICES, such as 4x4, with SLICESx before it for "
        "several slices and gpu: before that for GPUs."
    )


def test_attached_devices_are_those_of_jax():
    assert attached_devices() == Devices(8, 8, 1, "cpu", 0)


def test_a_dry_run_on_one_host_of_a_pod_waits_for_no_other(command, tmp_path):
    """It ends while no other host is there, with meshes for the whole job."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    done = command(
        *("launch.ablate", "--config=configs/quickstart.py", "--dry_run"),
        *(f"--config.workspace={tmp_path}/w", "--config.training.rows=8"),
        environment=clean
        | SLURM
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "COLUMNS": "120",
        },
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == [
        "Assumed: 8 cpu devices on 2 hosts; a dry run joins no job and starts no device. --devices "
        "states others.",
        "Meshes: training fsdp=8; scoring fsdp=8; on each host sampling data=4.",
    ]
    assert not (tmp_path / "w").exists()
