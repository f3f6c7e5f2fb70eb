"""The devices of a job in numbers: those attached, or those that a dry run assumes.

Importing this module does not import JAX.
"""

import importlib.util
import os
import re
from typing import NamedTuple

from deltapref_jax.cluster import detected_slices, local_device_ids, visible_gpus
from deltapref_jax.config import ConfigError
from deltapref_jax.jax_job import described_job

_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
_TWO_A_CHIP = ("v2", "v3", "tpu7x")  # TPU versions whose chips are two devices each


class Devices(NamedTuple):
    """The devices that a mesh is made over, in numbers.

    Attributes:
      total: devices in all.
      per_host: devices of one host.
      slices: groups of devices with a fast network: slices of TPUs, hosts of GPUs or CPUs.
      platform: "tpu", "gpu" or "cpu".
      memory: bytes of one device; 0: not known.
      pinned_host: whether arrays of a device can lie in its host's pinned memory.
    """

    total: int
    per_host: int
    slices: int = 1
    platform: str = "cpu"
    memory: int = 0
    pinned_host: bool = True

    @property
    def of_host(self) -> "Devices":
        """Those of one host, which samples and evaluates on its own."""
        return self._replace(total=self.per_host, slices=1)

    @property
    def words(self) -> str:
        """Their number, as in "4 devices"."""
        return f"{self.total} device{'s' * (self.total > 1)}"

    @property
    def layout(self) -> str:
        """How they are spread, as in "16 tpu devices on 4 hosts in 2 slices"."""
        hosts = self.total // self.per_host
        slices = f" in {self.slices} slices" if self.slices > 1 and self.platform == "tpu" else ""
        devices = self.words.replace("device", f"{self.platform} device")
        return f"{devices} on {hosts} host{'s' * (hosts > 1)}{slices}"


def attached_devices() -> Devices:
    """The devices of this job; starts JAX's backend."""
    import jax

    devices, own = jax.devices(), jax.local_devices()
    return Devices(
        len(devices),
        len(own),
        count_slices(devices),
        devices[0].platform,
        (own[0].memory_stats() or {}).get("bytes_limit", 0),
        any(memory.kind == "pinned_host" for memory in own[0].addressable_memories()),
    )


def count_slices(devices: list) -> int:
    """Number of groups of devices with a fast network: slices of TPUs, hosts of GPUs or CPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def assumed_devices(stated: str = "") -> Devices:
    """Devices of the job that this host belongs to, without joining it or starting an accelerator.

    A device that is started on one host of a pod waits for the other hosts.

    Args:
      stated: HOSTSxDEVICES or SLICESxHOSTSxDEVICES, with "gpu:" before it for GPUs; "": as many
        hosts as the environment describes, with as many devices as this one.

    Raises:
      ConfigError: `stated` is something else, or the job cannot be read (`described_job`).
    """
    import jax

    # Nothing after this touches an accelerator, which another process may be using.
    jax.config.update("jax_platforms", "cpu")
    job = described_job()  # What a run would refuse is refused with stated devices too.
    if not stated:
        platform, per_host = _host_devices()
        hosts = job.processes
        slices = detected_slices() if platform == "tpu" else hosts
        return Devices(hosts * per_host, per_host, slices, platform)
    match = re.fullmatch(r"(?:(tpu|gpu):)?(?:(\d{1,6})x)?(\d{1,6})x(\d{1,6})", stated)
    sizes = [int(size or 1) for size in match.groups()[1:]] if match else [0]
    if match is None or min(sizes) < 1:
        raise ConfigError(
            f"--devices is {stated!r}; give HOSTSxDEVICES, such as 4x4, with SLICESx before it for "
            "several slices and gpu: before that for GPUs."
        )
    slices, hosts, per_host = sizes
    platform = match[1] or "tpu"
    total = slices * hosts * per_host
    return Devices(total, per_host, slices * hosts if platform == "gpu" else slices, platform)


def _host_devices() -> tuple[str, int]:
    """Platform and number of the devices that JAX would have in this process."""
    import jax
    from jax._src import hardware_utils

    asked = os.environ.get("JAX_PLATFORMS", "")
    chips, version = hardware_utils.num_available_tpu_chips_and_device_id()
    if chips and "tpu" in (asked or "tpu") and importlib.util.find_spec("libtpu"):
        return "tpu", chips * (2 if version and version.name in _TWO_A_CHIP else 1)
    gpus = visible_gpus()
    if gpus and asked != "cpu" and any(map(importlib.util.find_spec, _GPU_PLUGINS)):
        return "gpu", len(local_device_ids() or range(gpus))
    return "cpu", len(jax.local_devices())
