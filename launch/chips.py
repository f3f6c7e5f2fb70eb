"""Accelerators by name: what a chip has, and the groups of chips that can be booked.

Names are those of Cloud TPU and GKE: a topology such as v5e:4x4 or v5p:2x4x4, or an accelerator
type such as v5litepod-16 or v5p-64. GPUs are named by hosts and GPUs of a host, such as h100:2x8.
"""

import dataclasses
import math
import re

from deltapref_jax.config import ConfigError
from deltapref_jax.devices import Devices

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. All numbers are of one device, as JAX counts them.

    Attributes:
      name: what a topology begins with.
      memory: bytes that a program and what lies beside it can have.
      flops: dense bfloat16 FLOP/s.
      bandwidth: bytes/s of the main memory.
      link: bytes/s received from the neighbours along one axis of the torus, in both directions;
        of GPUs from all others of the host.
      network: bytes/s received from other slices, or from other hosts of GPUs.
      devices: per chip.
      cores: per chip, where accelerator types count cores and not chips.
      shapes: topologies that can be booked, smallest first. GPUs have others too, and so has a 3D
        torus: whole cubes of 4x4x4, with ascending sides. Among these the smallest is looked for.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    platform: str = "tpu"
    devices: int = 1
    cores: int = 1
    shapes: tuple[str, ...] = ()


# TPU memory: the limit that the compiler of libtpu 0.0.42 states when it refuses a program.
# TPU FLOP/s, memory and interconnect: docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p,tpu7x}. A chip's
# interconnect is stated as the sum over ports and directions (400, 800, 1200 and 1200 GB/s over 4,
# 4, 6 and 6 ports), and two of the ports receive along one axis: a quarter of it on a 2D torus, a
# sixth on a 3D torus. Network: 6.4 and 25.6 Tbit/s a pod of 256 chips, 50 and 100 Gbit/s a chip.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
    "16x16x24",
)
_NODES = ("1x1", "1x2", "1x4", "1x8", "2x8", "4x8", "8x8", "16x8", "32x8", "64x8")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 100e9, 3.1e9, shapes=_FLAT),
        Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 200e9, 12.5e9, shapes=_FLAT),
        Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 200e9, 6.25e9, cores=2, shapes=_CUBES),
        # Each chip is two devices, which share its memory, interconnect and network.
        Chip(
            "tpu7x",
            94.75 * GIB,
            2307e12 / 2,
            7380e9 / 2,
            200e9 / 2,
            12.5e9 / 2,
            devices=2,
            cores=2,
            shapes=_CUBES,
        ),
        # GPUs: NVIDIA's data sheets, without sparsity; NVLink in one direction; an adapter of
        # 400 Gbit/s a GPU (A100: 200). About 6% of the memory is the driver's and the allocator's.
        Chip("a100", 75 * GIB, 312e12, 2039e9, 300e9, 25e9, "gpu", shapes=_NODES),
        Chip("h100", 75 * GIB, 989e12, 3350e9, 450e9, 50e9, "gpu", shapes=_NODES),
        Chip("h200", 132 * GIB, 989e12, 4800e9, 450e9, 50e9, "gpu", shapes=_NODES),
        # What a CPU has differs by machine, so that times are not predicted.
        Chip("cpu", 0.0, 0.0, 0.0, 0.0, 0.0, "cpu"),
    )
}
"""Chips by name."""

_CLOUD_NAMES = {"v5litepod": "v5e", "v5e": "v5e", "v6e": "v6e", "v5p": "v5p", "tpu7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are booked together.

    Attributes:
      chip: their kind.
      shape: of one slice, such as "4x4"; of GPUs and CPUs hosts and devices of a host.
      slices: of TPUs.
    """

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        """Such as v5e:4x4, or 2 x v5e:4x4."""
        return f"{self.slices} x " * (self.slices > 1) + f"{self.chip.name}:{self.shape}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(map(int, self.shape.split("x"))) * self.slices

    @property
    def host_bounds(self) -> tuple[int, ...]:
        """Chips of one host along the axes of the slice.

        Slices of v5e and v6e of up to eight chips are one host (ct5lp-hightpu-8t and
        ct6e-standard-8t of GKE); larger ones, and all of v5p and tpu7x, have four chips a host.
        """
        if self.chip.platform != "tpu":
            return 1, int(self.shape.split("x")[1])
        if self.shape in ("1x1", "2x4"):
            return (*map(int, self.shape.split("x")), 1)
        return 2, 2, 1

    @property
    def devices(self) -> Devices:
        """What meshes are made over."""
        total = self.chips * self.chip.devices
        per_host = math.prod(self.host_bounds) * self.chip.devices
        platform = self.chip.platform
        slices = self.slices if platform == "tpu" else total // per_host
        return Devices(total, per_host, slices, platform, int(self.chip.memory))


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Reads a topology or an accelerator type.

    Raises:
      ConfigError: there is none of that name; the sentence lists those that there are.
    """
    name, _, shape = text.strip().lower().partition(":")
    if match := re.fullmatch(r"([a-z0-9]+)-(\d+)", name):
        name = _CLOUD_NAMES.get(match[1], match[1])
        shape = _shape_of_count(text, name, int(match[2]))
    chip = CHIPS.get(_CLOUD_NAMES.get(name, name))
    if chip is None:
        raise ConfigError(
            f"--topology is {text!r}; known are {', '.join(map(_listed, CHIPS.values()))}."
        )
    if chip.platform != "tpu":
        if num_slices > 1:
            raise ConfigError(
                f"--num_slices is {num_slices} and {chip.name} has no slices; give hosts and "
                f"devices of a host, such as --topology={chip.name}:2x8."
            )
        return Topology(chip, _hosts(text, chip, shape))
    if shape not in chip.shapes and not _has_cubes(chip, shape):
        raise ConfigError(
            f"--topology is {text!r}; {chip.name} has the topologies {', '.join(chip.shapes)}"
            + (", and others of whole cubes, such as 4x4x12." if chip.shapes is _CUBES else ".")
        )
    return Topology(chip, shape, num_slices)


def _has_cubes(chip: Chip, shape: str) -> bool:
    """Whether a shape is one of whole cubes, no larger than the largest."""
    if chip.shapes is not _CUBES or not re.fullmatch(r"\d{1,3}x\d{1,3}x\d{1,3}", shape):
        return False
    sides, largest = (list(map(int, s.split("x"))) for s in (shape, chip.shapes[-1]))
    whole = all(side and side % 4 == 0 for side in sides) and sides == sorted(sides)
    return whole and math.prod(sides) <= math.prod(largest)


def _listed(chip: Chip) -> str:
    shapes = "|".join(chip.shapes) if chip.platform == "tpu" else "HOSTSxDEVICES"
    return f"{chip.name}:{shapes}"


def _hosts(text: str, chip: Chip, shape: str) -> str:
    match = re.fullmatch(r"(?:(\d{1,5})x)?(\d{1,3})", shape or "1")
    if not match or not int(match[1] or 1) * int(match[2]):
        raise ConfigError(
            f"--topology is {text!r}; give hosts and devices of a host, such as {chip.name}:2x8."
        )
    return f"{int(match[1] or 1)}x{int(match[2])}"


def _shape_of_count(text: str, name: str, count: int) -> str:
    """The shape of an accelerator type, which counts chips, or cores where a chip has two."""
    chip = CHIPS.get(name)
    if chip is None or chip.platform != "tpu":
        raise ConfigError(
            f"--topology is {text!r}; known are {', '.join(map(_listed, CHIPS.values()))}."
        )
    by_count = {math.prod(map(int, shape.split("x"))): shape for shape in chip.shapes}
    chips, odd = divmod(count, chip.cores)
    if odd or chips not in by_count:
        known = ", ".join(f"{text.split('-')[0]}-{n * chip.cores}" for n in by_count)
        raise ConfigError(f"--topology is {text!r}; the sizes of its kind are {known}.")
    return by_count[chips]
