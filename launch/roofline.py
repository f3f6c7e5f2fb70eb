"""Predicted times of programs: the largest of three bounds, as if the others hid behind it.

    compute       executed FLOPs / peak FLOP/s of the chip
    memory        bytes read and written / bandwidth of the main memory
    interconnect  bytes received / bandwidth of one torus axis, of NVLink, or of the network between
                  slices of TPUs or hosts of GPUs

A program cannot be faster than its bound and is usually slower: kernels do not reach the peak, and
collectives are not hidden whole.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from deltapref_jax.mesh import AXES, across_slices
from launch.chips import Topology
from launch.compile_programs import Result
from launch.workload import Step


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds of one call by each bound."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Of the bound that holds."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def binding(self) -> str:
        """Name of the bound that holds."""
        times = {
            "compute": self.compute,
            "memory": self.memory,
            "interconnect": self.interconnect,
        }
        return max(times, key=lambda name: times[name])


def bounds(result: Result, topology: Topology) -> Bounds | None:
    """The bounds of a program; None where the chip's rates are not known, or it does not fit."""
    chip, devices = topology.chip, math.prod(result.mesh.values())
    if not chip.flops or not result.fits:
        return None
    compute = result.executed / devices / chip.flops
    return Bounds(compute, result.memory_traffic / chip.bandwidth, _interconnect(result, topology))


def _interconnect(result: Result, topology: Topology) -> float:
    """Seconds of all collectives, one after another."""
    devices, chip = topology.devices, topology.chip
    sizes = [result.mesh[axis] for axis in AXES]
    # Meshes of one host span no others.
    slices = devices.slices if math.prod(sizes) == devices.total else 1
    crossed = across_slices(sizes, slices, devices.platform == "tpu")
    assert crossed, f"{sizes} do not divide over the slices"
    across = dict(zip(AXES, crossed, strict=True))
    seconds = 0.0
    for _, axes, group, received, _ in result.collectives:
        # A device shares what comes from other slices with the group's members in its slice: of
        # what the others of its group have, it receives one part from each other slice.
        parts = min(group, math.prod(across[axis] for axis in axes.split(" x "))) - 1
        far = received * parts / (group - 1)
        seconds += max((received - far) / chip.link, far / chip.network)
    return seconds


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a stage reaches at best, predicted.

    Attributes:
      of: objective, judge or generator.
      seconds: of a training step, a batch or a chunk of decoding.
      tokens: per second, on all devices of the topology.
      mfu: model FLOPs per second, as a share of the peak.
      bound: that holds for most of the time.
    """

    stage: str
    of: str
    seconds: float
    tokens: float
    mfu: float
    bound: str


def speeds(results: Sequence[Result], topology: Topology, steps: Mapping[str, Step]) -> list[Speed]:
    """The speed of every stage all of whose programs fit.

    Args:
      results: of all programs.
      topology: the devices.
      steps: how a training step is cut, by the kind of the objective.
    """
    groups = {
        (r.stage, r.of): [x for x in results if (x.stage, x.of) == (r.stage, r.of)] for r in results
    }
    found = []
    for (stage, of), members in groups.items():
        if stage == "train":
            step = steps[of]
            calls = {"zeros": 1.0, "gradient": step.micro_batches, "apply": 1.0}
            calls["logprobs"] = step.baseline
            calls["add"] = max(0.0, math.ceil(step.micro_batches) - 1.0)
            # Rows are not full where the step's sequences do not fill them.
            full = step.micro_batches * _of_name(members, "gradient").tokens
            share = step.sequences * step.length / full if full else 1.0
            found += _speed(stage, of, members, topology, calls, share)
        elif stage in ("score", "judge"):
            found += _speed(stage, of, members, topology, {members[0].name: 1.0})
        else:
            for name in ("prefill", "decode"):
                if any(r.name == name for r in members):
                    found += _speed(name, of, members, topology, {name: 1.0})
    return found


def _of_name(members: Sequence[Result], name: str) -> Result:
    return next(r for r in members if r.name == name)


def _speed(
    stage: str,
    of: str,
    members: Sequence[Result],
    topology: Topology,
    calls: Mapping[str, float],
    share: float = 1.0,
) -> list[Speed]:
    """One speed, or none where a program does not fit; `share` of the tokens are there."""
    used = [r for r in members if r.name in calls]
    each = [(r, bounds(r, topology)) for r in used]
    known = [(r, b, calls[r.name]) for r, b in each if b is not None]
    # A step whose update is only described still has the time of its gradient.
    if any(b is None and r.flops for r, b in each) or not known:
        return []
    seconds = sum(b.seconds * n for _, b, n in known)
    devices = math.prod(known[0][0].mesh.values())
    copies = topology.devices.total / devices  # hosts that sample on their own
    tokens = share * sum(r.tokens * n for r, _, n in known)
    flops = share * sum(r.flops * n for r, _, n in known)
    slowest = max(known, key=lambda x: x[1].seconds * x[2])[1].binding
    mfu = flops / seconds / (devices * topology.chip.flops) if seconds else 0.0
    return [Speed(stage, of, seconds, copies * tokens / seconds, mfu, slowest)]
