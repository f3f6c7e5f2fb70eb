"""What to change where a program does not fit; every proposal is compiled before it is made.

Where there is no compiler for the devices, proposals are by formula too.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from deltapref_jax.config import (
    REMATS,
    STUDENT,
    ConfigError,
    Experiment,
    MeshShape,
    PairTraining,
    Training,
)
from launch.chips import Topology, parse_topology
from launch.compile_programs import Request, Result
from launch.compiler import compile_each
from launch.roofline import Speed, speeds
from launch.workload import steps_of

Config = Experiment | PairTraining
Change = tuple[str, Callable[[Config], None]]
"""A flag, and what it does to a config."""

Fit = Callable[[Config, Topology], Config]
"""A config and devices to the config with the sizes of its meshes; raises ConfigError."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Flags with which a stage's programs fit, the results of compiling them, and their speeds."""

    flags: tuple[str, ...]
    results: tuple[Result, ...]
    predicted: tuple[Speed, ...]


def propose(
    request: Request, given: Config, refused: Result, fit: Fit, seconds: float
) -> Proposal | None:
    """The first combination of changes with which the programs of a refused one's stage fit.

    Args:
      request: that the program was refused in.
      given: its config as the user gave it, before meshes were chosen.
      refused: the program.
      fit: chooses meshes.
      seconds: that one program may take to compile.
    """
    for changes in _combinations(_changes(request.config, refused)):
        config = copy.deepcopy(given)
        for _, change in changes:
            change(config)
        try:
            config = fit(config, request.topology)
        except ConfigError:
            continue  # this mesh does not fit the devices or the rows
        of = (*refused.of.split(", "), *_moved(request.config, config))
        tried = dataclasses.replace(request, config=config, stages=(refused.stage,), of=of)
        results = _compiled(tried, refused, seconds)
        if results and all(r.fits for r in results):
            reached = speeds(results, request.topology, steps_of(config))
            return Proposal(tuple(flag for flag, _ in changes), tuple(results), tuple(reached))
    return None


def _compiled(request: Request, refused: Result, seconds: float) -> list[Result]:
    """Results of the programs of the request, the refused one first, until one does not fit."""
    results = []
    first = ((refused.stage, refused.name),)
    for result in compile_each(dataclasses.replace(request, first=first), seconds):
        results.append(result)
        if not result.fits:
            break
    return results


def _moved(before: Config, after: Config) -> Iterator[str]:
    """Generators whose mesh is another one after a change; they may share its programs no more."""
    if isinstance(before, Experiment) and isinstance(after, Experiment):
        for old, new in zip(before.generators, after.generators, strict=True):
            if old.mesh != new.mesh:
                yield new.name


def _combinations(changes: Sequence[Sequence[Change]]) -> Iterator[tuple[Change, ...]]:
    """Single changes first, then several together, the least costly ones first."""
    for count in range(1, len(changes) + 1):
        for kinds in itertools.combinations(changes, count):
            yield from itertools.product(*kinds)


def _changes(config: Config, refused: Result) -> list[list[Change]]:
    """Changes by kind, in the order of what they cost."""
    if refused.stage == "train":
        return [kind for kind in _training_changes(config.training, refused) if kind]
    assert isinstance(config, Experiment)
    if refused.stage == "sample":
        return _sampling_changes(config, refused)
    shards = refused.mesh["data"] * refused.mesh["fsdp"]
    rows = _halves(config.scoring.rows, shards)
    judges = [f"config.judges[{i}]" for i, j in enumerate(config.judges) if j.name == refused.of]
    owner = judges[0] if refused.stage == "judge" else "config.scoring"
    return [[_set("config.scoring.rows", n) for n in rows], _sharded(owner, refused)]


def _training_changes(t: Training, refused: Result) -> Iterator[list[Change]]:
    # Recomputing less than "attention" keeps too much to be worth a compilation of a large model.
    stronger = REMATS[REMATS.index(t.remat) + 1 :] if t.remat in REMATS else REMATS
    yield [_set("config.training.remat", remat) for remat in stronger if remat != "none"]
    shards = refused.mesh["data"] * refused.mesh["fsdp"]
    yield [_set("config.training.rows", rows) for rows in _halves(t.rows, shards)]
    # Moments on the host cost time alone; in bfloat16 they change what is trained, and its key.
    yield [] if t.offload_moments else [_set("config.training.offload_moments", True)]
    yield [] if t.moments == "bfloat16" else [_set("config.training.moments", "bfloat16")]
    yield _sharded("config.training", refused)


def _sampling_changes(e: Experiment, refused: Result) -> list[list[Change]]:
    devices, shards = math.prod(refused.mesh.values()), refused.mesh["data"] * refused.mesh["fsdp"]
    names = refused.of.split(", ")
    # All whose programs these are: each has a mesh of its own, the student that of sampling.
    owners = [f"config.generators[{i}]" for i, g in enumerate(e.generators) if g.name in names]
    owners += ["config.sampling"] * (STUDENT in names)
    tensors = [n for n in (2, 4, 8) if n > refused.mesh["tensor"] and devices % n == 0]
    wider = [_mesh(owners, MeshShape(data=devices // n, tensor=n)) for n in tensors]
    slots = [_set("config.sampling.slots", n) for n in _halves(e.sampling.slots, shards)[:3]]
    return [kind for kind in (wider, slots) if kind]


def _halves(rows: int, shards: int) -> list[int]:
    """Fewer rows, down to one of every shard."""
    found = []
    while rows % 2 == 0 and rows // 2 % shards == 0:
        rows //= 2
        found.append(rows)
    return found


def _sharded(stage: str, refused: Result) -> list[Change]:
    """Weights over all devices instead of copies."""
    data, fsdp, tensor = (refused.mesh[axis] for axis in ("data", "fsdp", "tensor"))
    return [_mesh([stage], MeshShape(1, data * fsdp, tensor, 1))] if data > 1 else []


def _set(path: str, value: object) -> Change:
    def change(config: Config) -> None:
        *outer, last = path.split(".")[1:]
        part = config
        for name in outer:
            part = getattr(part, name)
        setattr(part, last, value)

    return f"--{path}={value}", change


def _mesh(owners: Sequence[str], shape: MeshShape) -> Change:
    sizes = {axis: size for axis, size in dataclasses.asdict(shape).items() if size > 1}

    def change(config: Config) -> None:
        for owner in owners:
            part = config
            for name in owner.split(".")[1:]:
                index = name.partition("[")[2].rstrip("]")
                part = getattr(part, name.partition("[")[0])
                part = part[int(index)] if index else part  # type: ignore[index]
            part.mesh = dataclasses.replace(shape)  # type: ignore[union-attr]

    flags = [f"--{owner}.mesh.{axis}={size}" for owner in owners for axis, size in sizes.items()]
    return " ".join(flags), change


@dataclasses.dataclass(frozen=True)
class Tried:
    """A topology that was looked at: "fits", or what does not."""

    topology: Topology
    verdict: str


def smallest(request: Request, given: Config, fit: Fit, seconds: float) -> list[Tried]:
    """Topologies of the same chip, smallest first, until one holds every program.

    A topology is left at its first program that does not fit, and is not compiled for if no mesh
    fits it. The last one that is returned holds the study, if any does.

    Args:
      request: of the topology that was asked for; its `first` are those likely to be refused.
      given: the config before meshes were chosen.
      fit: chooses meshes.
      seconds: that one program may take to compile.
    """
    tried = []
    for shape in request.topology.chip.shapes:
        slices = request.topology.slices
        topology = parse_topology(f"{request.topology.chip.name}:{shape}", slices)
        try:
            config = fit(copy.deepcopy(given), topology)
        except ConfigError as e:
            tried.append(Tried(topology, str(e)))
            continue
        verdict = "fits"
        attempt = dataclasses.replace(request, config=config, topology=topology)
        for result in compile_each(attempt, seconds):
            if not result.fits:
                verdict = f"{result.label}: {result.status}"
                break
        tried.append(Tried(topology, verdict))
        if verdict == "fits":
            break
    return tried
