"""Compiles a study's programs for devices that are not there, in a process of its own.

The compiler may run for minutes, or crash; the process that prints (`launch.preflight`) then ends
this one and starts another for the programs that are left.

    python -m launch.compile_programs REQUEST      REQUEST: a pickled `Request`
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltapref_jax.config import Experiment, PairTraining
from deltapref_jax.models.spec import ModelSpec
from launch.chips import Topology
from launch.formula import estimate

if TYPE_CHECKING:
    from deltapref_jax.stages.programs import Meshes, StageProgram

Status = Literal["fits", "refused", "timed out", "crashed", "by formula"]

LEVELS = ("O0", "default")
"""Optimisation levels: XLA's lowest, in seconds to minutes, and that of a run, in minutes."""

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
      config: validated, with the sizes of its meshes.
      specs: sizes of models by their place.
      topology: the devices.
      level: one of `LEVELS`.
      compiled: whether programs are compiled; otherwise they are only described.
      cache: folder of results by the hash of their program.
      stages: whose programs are wanted; all without any.
      of: objectives, judges or generators whose programs alone are wanted; all without any.
      first: stages and names, such as ("train", "gradient"), of the programs that are compiled
        before others.
    """

    config: Experiment | PairTraining
    specs: dict[str, ModelSpec]
    topology: Topology
    level: str
    compiled: bool
    cache: str
    stages: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass
class Result:
    """What is known of one program; bytes and FLOPs are of one device, unless they say otherwise.

    Attributes:
      label: as `StageProgram.label`.
      stage: as in `StageProgram`; so are `of` and `name`.
      mesh: devices along every axis.
      status: see `Status`.
      level: the optimisation level that the figures belong to; "" without a compiler.
      beside: bytes that lie on a device while the program runs and are no argument.
      limit: bytes that the program may have: the memory without `beside`.
      arguments: bytes.
      temporaries: bytes.
      peak: bytes of the program at their most, arguments included; 0: not known.
      needed: bytes that a refused program needs, as the compiler says, or by formula.
      tokens: of one call, over all devices.
      flops: of the model, of one call, over all devices; `executed` counts what is computed again.
      collectives: kind, axes, group, bytes received and count, see `hlo.Collective`.
      memory_traffic: bytes read and written in one call.
      open_loops: loops whose trips depend on data; the most is counted.
      seconds: of compiling.
      error: the compiler's words.
    """

    label: str
    stage: str
    of: str
    name: str
    mesh: dict[str, int]
    status: Status = "by formula"
    level: str = ""
    beside: int = 0
    limit: int = 0
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    needed: int = 0
    tokens: int = 0
    flops: float = 0.0
    executed: float = 0.0
    collectives: Sequence[Sequence[Any]] = ()
    memory_traffic: float = 0.0
    open_loops: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether it fits, by the compiler or by formula."""
        return self.status in ("fits", "by formula")


def set_environment(request: Request) -> None:
    """Sets what JAX and libtpu read when they are loaded: no device of this machine is used."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        # libtpu would wait for a metadata server, and lock the TPU of this host.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }
    if not request.compiled:
        count = request.topology.devices.total
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"


def programs_of(request: Request) -> "list[StageProgram]":
    """The programs of the request's config on its devices.

    Raises:
      ValueError: two have one label, of which only one would be compiled; or shapes do not fit.
    """
    from deltapref_jax.stages.programs import pair_programs, study_programs

    meshes, config = _meshes(request.topology, request.compiled), request.config
    if isinstance(config, PairTraining):
        found = pair_programs(config, request.specs.__getitem__, meshes)
    else:
        found = study_programs(config, request.specs.__getitem__, meshes)
    labels = [each.label for each in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two are called {twice[0]!r}; rename a generator or a judge.")
    return [
        each
        for each in found
        if each.stage in (request.stages or (each.stage,))
        and (not request.of or set(request.of) & set(each.of.split(", ")))
    ]


def _meshes(topology: Topology, compiled: bool) -> "Meshes":
    import jax
    from jax.experimental import topologies

    from deltapref_jax.mesh import make_mesh

    devices: list[Any]
    if compiled:
        slices: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
        devices = list(
            topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{topology.chip.name}:{topology.shape}",
                chips_per_host_bounds=list(topology.host_bounds),
                **slices,
            ).devices
        )
    else:
        devices = jax.devices()
    per_host = topology.devices.per_host
    # A host's devices are of one slice, whatever their order among all devices.
    first = devices[0].process_index
    of_host = [d for d in devices if d.process_index == first][:per_host]

    def mesh(shape: Any, whole: bool) -> Any:
        return make_mesh(shape, devices if whole else of_host)

    return mesh


def describe(each: "StageProgram", topology: Topology) -> Result:
    """What is known of a program without compiling it."""
    from deltapref_jax.models.program import device_bytes

    beside = device_bytes(each.program.beside)
    arrays = [a for a in each.program.args if not callable(a)]
    return Result(
        each.label,
        each.stage,
        each.of,
        each.name,
        dict(each.mesh.shape),
        beside=beside,
        limit=max(0, int(topology.chip.memory) - beside),
        arguments=device_bytes(arrays),
        tokens=each.tokens,
        flops=each.flops,
        executed=each.executed,
    )


def compile_program(each: "StageProgram", request: Request) -> Result:
    """Lowers and compiles a program, or finds the result of an equal one in the cache."""
    result = describe(each, request.topology)
    if not request.compiled:
        estimate(result, each)
        if 0 < request.topology.chip.memory < result.peak + result.beside:
            result.status, result.needed = "refused", result.peak
        return result
    result.level = request.level
    if result.limit < _MIB:
        result.status, result.needed = "refused", result.arguments
        return result
    lowered = each.program.lower()
    place = Path(request.cache) / f"{_key(lowered.as_text(), result, request)}.json"
    if place.exists():
        with contextlib.suppress(ValueError, TypeError, OSError):
            return Result(**json.loads(place.read_text()) | _apart_from_compiling(result))
    began = time.monotonic()
    # The compiler refuses a program that does not fit beside what lies on the devices.
    options: dict[str, Any] = {"xla_tpu_max_hbm_size_mib": str(result.limit // _MIB)}
    try:
        compiled = lowered.compile(compiler_options=options)
    except Exception as e:  # libtpu raises several types
        if "RESOURCE_EXHAUSTED" not in str(e):
            result.status, result.error = "crashed", _first_line(e)
            return result
        result.status, result.error = "refused", _first_line(e)
        result.needed = _needed(str(e))
    else:
        _read(compiled, each, result, request)
    result.seconds = round(time.monotonic() - began, 1)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(result)))
    temporary.replace(place)
    return result


def _read(compiled: Any, each: "StageProgram", result: Result, request: Request) -> None:
    from launch.hlo import read_traffic

    memory = compiled.memory_analysis()
    result.status = "fits"
    result.arguments = memory.argument_size_in_bytes
    result.temporaries = memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    result.peak = peak or result.arguments + result.temporaries + outputs
    traffic = read_traffic(
        compiled.as_text(), result.mesh, each.program.trips, request.topology.slices
    )
    result.collectives = [dataclasses.astuple(c) for c in traffic.collectives]
    result.memory_traffic, result.open_loops = traffic.memory, traffic.open_loops


def _apart_from_compiling(result: Result) -> dict[str, Any]:
    """Names, which equal programs of two generators have of their own, and what is counted."""
    fields = ("label", "stage", "of", "name", "beside", "tokens", "flops", "executed")
    return {name: getattr(result, name) for name in fields}


def _key(text: str, result: Result, request: Request) -> str:
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    facts = [text, request.topology.name, request.level, result.limit, *versions, _reader()]
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]


def _reader() -> str:
    """Hash of the code that reads compiled programs: a change makes cached results stale."""
    return hashlib.sha256(Path(__file__).with_name("hlo.py").read_bytes()).hexdigest()


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:500]


def _needed(text: str) -> int:
    """Bytes that a refusal says a program needs."""
    match = re.search(r"\(([\d.]+)([KMG]?)\) exceeds", text) or re.search(
        r"Used ([\d.]+)([KMG]?) of", text
    )
    if not match:
        return 0
    return int(float(match[1]) * 1024 ** " KMG".index(match[2] or " "))


def main(path: str) -> None:
    """Compiles the requested programs; every line that begins with a mark is for the parent."""
    request, labels = pickle.loads(Path(path).read_bytes())
    set_environment(request)
    import jax

    if request.level == "O0":
        # The two switches of JAX 0.10 that ask for little optimisation.
        for name, value in (
            ("jax_optimization_level", "O0"),
            ("jax_exec_time_optimization_effort", -1.0),
        ):
            if hasattr(jax.config, name):
                jax.config.update(name, value)
    try:
        programs = programs_of(request)
    except ValueError as e:
        _say("error", str(e))
        return
    places = {name: i for i, name in enumerate(request.first)}
    programs.sort(key=lambda p: places.get((p.stage, p.name), len(places)))
    found = {p.label: p for p in programs}
    chosen = [found[label] for label in labels or found if label in found]
    _say("list", [p.label for p in chosen])
    for each in chosen:
        _say("start", dataclasses.asdict(describe(each, request.topology)))
        _say("done", dataclasses.asdict(compile_program(each, request)))
    _say("end", None)


def _say(mark: str, value: Any) -> None:
    print(f"@{mark} {json.dumps(value)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
