"""What a cluster's environment says: the size of the JAX job, and the GPUs of this process.

Importing this module does not import JAX.
"""

import os
import pathlib
import re
import time
import urllib.error
import urllib.request
from typing import Any

from deltapref_jax.config import ConfigError

_METADATA_ATTEMPTS, _METADATA_SECONDS = 3, 2
# By JAX's class: the system's name, and the variables that its jobs are read from.
_SYSTEMS = {
    "GkeTpuCluster": (
        "GKE",
        (
            "TPU_PROCESS_ADDRESSES",
            "TPU_WORKER_HOSTNAMES",
            "TPU_WORKER_ID",
            "MEGASCALE_NUM_SLICES",
            "MEGASCALE_SLICE_ID",
            "MEGASCALE_COORDINATOR_ADDRESS",
        ),
    ),
    "K8sCluster": ("Kubernetes", ("JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST")),
    "OmpiCluster": (
        "Open MPI",
        (
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_MCA_orte_hnp_uri",
        ),
    ),
    "SlurmCluster": (
        "SLURM",
        (
            "SLURM_JOB_ID",
            "SLURM_LOCALID",
            "SLURM_NTASKS",
            "SLURM_PROCID",
            "SLURM_STEP_NODELIST",
        ),
    ),
}


def stated_number(key: str, least: int, most: int = 10**6) -> int | None:
    """The whole number that a variable of the environment holds; None if it is unset or empty.

    Raises:
      ConfigError: it holds something else, or a number that is not from `least` to `most`.
    """
    text = os.environ.get(key, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ConfigError(
            f"{key} is {text!r}; set it to a whole number from {least} to {most:,}, or unset it."
        )
    return int(text)


def detected_job() -> tuple[int, int | None] | None:
    """Number of processes of the job that JAX detects on its own, and that of this one.

    JAX has no public function for it, and `jax.distributed.initialize` fails where there is no job.

    Returns:
      None without a job. The number of this process is None where finding it takes a server.

    Raises:
      ConfigError: JAX cannot read the job, or the metadata server of a Cloud TPU fails.
    """
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        name = cluster.__name__
        if cluster.opt_in_only_method or name == "GceTpuCluster":
            continue
        if name == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # JAX joins indexed Jobs only, and its test for one needs rights.
        try:
            if cluster.is_env_present():
                return _read_job(cluster)
        except ConfigError:
            raise
        except Exception as e:  # JAX parses the variables without checks, so it may be of any type.
            system, keys = _SYSTEMS.get(name, (name, ()))
            found = [f"{key}={os.environ[key][:60]}" for key in keys if key in os.environ]
            raise ConfigError(
                f"A job of {system} is detected and cannot be read ({type(e).__name__}: {e}) from "
                f"{', '.join(found) or 'the environment'}; correct it, or set JAX_NUM_PROCESSES=1 "
                "for this process alone."
            ) from e
    count = _cloud_tpu_processes()  # JAX's own test of it takes seconds where there is no pod.
    return (count, None) if count > 1 else None


def _read_job(cluster: Any) -> tuple[int, int | None]:
    """Number of processes and of this one; reads all that a job of several will be joined by."""
    name = cluster.__name__
    if name == "GkeTpuCluster":
        # Its process count asks the metadata server about slices, which GKE describes in the
        # environment wherever there is more than one.
        slices, hosts = detected_slices(), len(cluster._get_worker_list_in_slice())
        if slices * hosts > 1:
            _check_position("TPU_WORKER_ID", hosts, "hosts")
            if os.environ.get("MEGASCALE_SLICE_ID"):
                _check_position("MEGASCALE_SLICE_ID", slices, "slices")
        return slices * hosts, None
    count = cluster.get_process_count()
    if count == 1 or name not in ("OmpiCluster", "SlurmCluster"):
        return count, None
    # They are read from the environment alone, so that a dry run can find the faults of a run.
    cluster.get_coordinator_address(
        timeout_secs=0, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
    )
    cluster.get_local_process_id()
    return count, cluster.get_process_id()


def _check_position(key: str, count: int, what: str) -> None:
    """Refuses the number of a host or slice that is not below how many there are."""
    position = stated_number(key, 0)
    if position is None or position >= count:
        raise ConfigError(
            f"{key} is {'not set' if position is None else position} where the environment "
            f"describes {count} {what}; number them from 0, or set JAX_NUM_PROCESSES=1 for this "
            "host alone."
        )


def unused_variables() -> str:
    """One sentence on variables of a TPU pod that describe none here; empty without any."""
    from jax._src import cloud_tpu_init

    names = [key for key in _SYSTEMS["GkeTpuCluster"][1] if key in os.environ]
    if not names or cloud_tpu_init.running_in_cloud_tpu_vm:
        return ""
    return (
        f"Not used: {', '.join(f'{key}={os.environ[key][:60]}' for key in names)}, because JAX "
        "finds no TPU chips, or no libtpu, on this machine. --devices=HOSTSxDEVICES states the "
        "devices of a dry run."
    )


def _cloud_tpu_processes() -> int:
    """Number of hosts of a Cloud TPU over all slices; 1 where this is not a host of one."""
    from jax._src import cloud_tpu_init

    # JAX sets TPU_SKIP_MDS_QUERY where it finds no TPU chips.
    if not cloud_tpu_init.running_in_cloud_tpu_vm or "TPU_SKIP_MDS_QUERY" in os.environ:
        return 1
    if not _metadata("agent-worker-number"):
        return 1
    return detected_slices() * len(_metadata("worker-network-endpoints").split(","))


def detected_slices() -> int:
    """Number of TPU slices of the job, as GKE's environment or a Cloud TPU's metadata say.

    Raises:
      ConfigError: MEGASCALE_NUM_SLICES is no number, or the metadata server fails.
    """
    from jax._src import cloud_tpu_init

    slices = stated_number("MEGASCALE_NUM_SLICES", 1)
    on_gke = any(key.startswith(("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDR")) for key in os.environ)
    if not slices and not on_gke and cloud_tpu_init.running_in_cloud_tpu_vm:
        found = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata("tpu-env"), re.M)
        slices = int(found[1]) if found else 1
    return slices or 1


def _metadata(key: str) -> str:
    """Returns an attribute of this machine from Google's metadata server; empty if it has none.

    Raises:
      ConfigError: the server answers with an error. An empty value instead would make a host of a
        pod run alone.
    """
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    failure = ""
    for attempt in range(_METADATA_ATTEMPTS):
        time.sleep(0.5 * attempt)
        try:
            with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as response:
                return response.read().decode()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return ""
            failure = str(e)
        except OSError:  # No server answers: this machine is not in Google's cloud.
            pass
    if failure:
        raise ConfigError(
            f"The metadata server {server} does not say whether this host belongs to a TPU pod "
            f"({failure}); run the command again, or set JAX_NUM_PROCESSES=1 for this host alone."
        )
    return ""


def local_device_ids() -> list[int] | None:
    """GPUs of this process, as indices of those it sees: as stated, or under SLURM and Open MPI.

    None leaves the choice to JAX. There it would be one GPU for every task, the one with the task's
    number on its node, however many the task sees.

    Raises:
      ConfigError: the tasks of this node cannot share its GPUs evenly, or JAX_LOCAL_DEVICE_IDS is
        no list of numbers.
    """
    if stated := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", stated):
            raise ConfigError(
                f"JAX_LOCAL_DEVICE_IDS is {stated!r}; set it to numbers of devices with commas "
                "between them, such as 0,1."
            )
        return [int(device) for device in stated.split(",")]
    rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    tasks, gpus = _tasks_on_node(), visible_gpus()
    if rank is None or not tasks or not gpus:
        return None
    if tasks == 1 or gpus == 1 or _sees_only_its_own():
        return list(range(gpus))
    if gpus % tasks:
        raise ConfigError(
            f"{tasks} tasks on this node cannot share {gpus} GPUs evenly; start a number of tasks "
            "per node that divides the GPUs, or set JAX_LOCAL_DEVICE_IDS for each task."
        )
    share = gpus // tasks
    return list(range(int(rank) * share, (int(rank) + 1) * share))


def _tasks_on_node() -> int:
    """Number of processes of the job on this node; 0 if the environment does not say it."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(size)
    counts: list[int] = []  # SLURM writes "4(x2),1" for two nodes with four tasks and one with one.
    for part in (
        os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or ""
    ).split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(os.environ.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else 0


def visible_gpus() -> int:
    """Number of GPUs that this process sees, without starting a backend."""
    for key in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if (listed := os.environ.get(key)) is not None:
            # SLURM writes "NoDevFiles" for a task without GPUs, and -1 ends CUDA's list.
            return len([d for d in listed.split(",") if d.strip() not in ("", "-1", "NoDevFiles")])
    if count := os.environ.get("SLURM_GPUS_ON_NODE"):
        return int(count)
    return len([d for d in pathlib.Path("/dev").glob("nvidia*") if d.name[6:].isdigit()])


def _sees_only_its_own() -> bool:
    """Whether SLURM binds tasks to GPUs, so that each sees none of another task."""
    bind = f"{os.environ.get('SLURM_GPU_BIND', '')},{os.environ.get('SLURM_TRES_BIND', '')}"
    if "none" in bind:
        return False
    return (
        "SLURM_GPUS_PER_TASK" in os.environ  # It implies a binding.
        or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
        or bool(re.search(r"(single|per_task|map|mask)\w*:", bind))
    )
