"""This process in a multi-process JAX job: joining it, rank, agreement, versions.

Importing this module does not import JAX, so that a program can check its flags, or fork, first.
"""

import contextlib
import functools
import importlib.metadata
import json
import platform
import sys
from typing import Any

from deltapref_jax.jax_job import described_job, join

_PACKAGES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
    "pyarrow",
    "deltapref-jax",
)


def start_processes(timeout: int = 300) -> None:
    """Joins the multi-process JAX job that the environment describes; a lone process goes on.

    JAX itself detects jobs of Open MPI, SLURM, GKE, Cloud TPU VMs and indexed Jobs of Kubernetes.
    `JAX_COORDINATOR_ADDRESS`, with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, describes a job where
    JAX detects none. `JAX_NUM_PROCESSES=1` without an address keeps a process alone anywhere.

    Args:
      timeout: seconds to wait for the other processes.

    Raises:
      ConfigError: the environment describes half a job, or one that cannot be read or joined; the
        tasks of a node cannot share its GPUs evenly; or the metadata server of a Cloud TPU fails.
    """
    job = described_job()
    if not job.alone:
        join(job, timeout)


def _distributed_jax() -> Any:
    """The `jax` module if this process has joined a JAX job, otherwise None."""
    jax = sys.modules.get("jax")
    return jax if jax is not None and jax.distributed.is_initialized() else None


def process_index() -> int:
    """The rank of this process in its JAX job; 0 if it has joined none."""
    jax = _distributed_jax()
    return jax.process_index() if jax else 0


def process_count() -> int:
    """The number of processes of the JAX job; 1 if this process has joined none."""
    jax = _distributed_jax()
    return jax.process_count() if jax else 1


def agreed(value: bool) -> bool:
    """Returns the value that process 0 passes; a collective, so every process must call it."""
    if process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gathered(value: Any) -> list[Any]:
    """Returns what every process passes, by rank; a collective, so every process must call it.

    Args:
      value: what JSON holds.
    """
    if process_count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)
    ]


def wait_for_all(name: str) -> None:
    """Waits until every process has called it with this name."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@functools.cache
def _package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def versions() -> dict[str, str]:
    """Versions of Python, platform and libraries; with the devices if JAX has been imported."""
    known = dict(_package_versions())
    if jax := sys.modules.get("jax"):
        known |= {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}
    return known
