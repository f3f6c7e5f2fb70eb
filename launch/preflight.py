"""Compiles a config's programs for accelerators that are not there: do they fit, and how fast?

    python -m launch.preflight --config=configs/dpo_8b.py --topology=v5e:4x4
    python -m launch.preflight --config=… --topology=v5p-64 --num_slices=2 --json=preflight.json

Topologies are v5e:4x4, v6e:2x4, v5p:2x4x4, tpu7x:2x2x1 and the like, or accelerator types such as
v5litepod-16; GPUs and CPUs (h100:2x8, cpu:1x4) are described by formula. No accelerator is used, no
weights are read (config.json is enough, also on the hub), and nothing is made. Times and chip-hours
are predictions: bounds of a roofline, of which the largest holds.
"""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.config import (
    OBJECTIVE_KINDS,
    ConfigError,
    Experiment,
    PairTraining,
    check_choice,
    model_of,
    of_student,
    reference_of,
)
from deltapref_jax.progress import plain_console
from deltapref_jax.validation import validate, validate_pair_training
from launch.chips import Topology, parse_topology
from launch.flags import define_count, define_output, define_student, run_main

if TYPE_CHECKING:
    from launch.preflight_tables import Printer

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An Experiment or a PairTraining: a file with get_config()."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Devices to compile for, such as v5e:4x4, v5p-64 or v5litepod-16; h100:2x8 are two hosts of "
    "eight GPUs, by formula.",
)
_STUDENT = define_student()
_SLICES = define_count("num_slices", 1, "Slices of that topology.", 64)
_LEVEL = flags.DEFINE_string(
    "level",
    "O0",
    "Optimisation level of XLA: O0 (seconds to minutes; less memory than a run takes by up to a "
    "tenth, and more traffic) or default (that of a run, minutes).",
)
_SECONDS = define_count("compile_seconds", 900, "Seconds that one program may take to compile.")
_COMPILE = flags.DEFINE_bool("compile", True, "Without: everything by formula, without libtpu.")
_PROPOSE = flags.DEFINE_bool("propose", True, "Look for changes with which a refused stage fits.")
_SMALLEST = flags.DEFINE_bool(
    "smallest", False, "Also look for the smallest topology of the chip that holds every program."
)
_ONLY = flags.DEFINE_list("stages", [], "Stages to look at, of train, score, judge and sample.")
_JSON = define_output("json")
_CACHE = flags.DEFINE_string(
    "cache",
    str(Path.home() / ".cache" / "deltapref-jax" / "preflight"),
    "Folder of results by the hash of their program, topology and compiler.",
)

_LOG_WIDTH = 130  # characters of a line where there is no terminal


def main(_: list[str]) -> None:
    """Validates, compiles, prints."""
    given = _validated(_CONFIG.value)
    topology = parse_topology(str(_TOPOLOGY.value), _SLICES.value)
    from launch.compile_programs import LEVELS

    check_choice("--level", _LEVEL.value, LEVELS)
    for stage in _ONLY.value:
        check_choice("--stages", stage, ("train", "score", "judge", "sample"))
    if _SMALLEST.value and not topology.chip.shapes:
        raise ConfigError(
            "--smallest compares what fits with a device's memory, which of a CPU differs by "
            "machine; leave it out, or name a TPU or a GPU."
        )
    report = preflight(
        given,
        topology,
        Options(
            _LEVEL.value,
            float(_SECONDS.value),
            _COMPILE.value,
            _PROPOSE.value,
            _SMALLEST.value,
            tuple(_ONLY.value),
            _CACHE.value,
        ),
        _console(),
    )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


def _console() -> Console:
    """A console whose tables are not broken where there is no terminal."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=_LOG_WIDTH)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a preflight is made; see the flags of the same names."""

    level: str = "O0"
    compile_seconds: float = 900.0
    compiled: bool = True
    propose: bool = True
    smallest: bool = False
    stages: tuple[str, ...] = ()
    cache: str = ""


def _validated(config: Any) -> Experiment | PairTraining:
    if isinstance(config, PairTraining):
        if _STUDENT.value:
            raise ConfigError(
                f"--student is {_STUDENT.value!r} and a PairTraining has one student; leave the "
                "flag out."
            )
        return validate_pair_training(config)
    return of_student(validate(config), _STUDENT.value)


def preflight(
    given: Experiment | PairTraining, topology: Topology, options: Options, console: Console
) -> dict[str, Any]:
    """Compiles, prints what was found, and returns it as a JSON object.

    Raises:
      ConfigError: a mesh does not fit the topology, libtpu is missing, the cache cannot be made,
        or the programs cannot be.
      FileNotFoundError, ValueError: a model's config.json is not there, or is not supported.
    """
    from deltapref_jax.models.weights import describe_model
    from launch.compile_programs import Request
    from launch.compiler import check_compiler, compile_each
    from launch.preflight_tables import Printer
    from launch.proposals import propose, smallest
    from launch.roofline import speeds
    from launch.workload import steps_of

    compiled = options.compiled and topology.chip.platform == "tpu"
    if compiled:
        check_compiler(options.cache)
    specs = {place: describe_model(place)[0] for place in _places(given)}
    fit = functools.partial(fit_config, specs=specs)
    config = fit(copy.deepcopy(given), topology)
    request = Request(
        config, specs, topology, options.level, compiled, options.cache, options.stages
    )
    show = Printer(console, topology, compiled, options.level)
    show.beginning(config)

    results = list(compile_each(request, options.compile_seconds))
    show.programs(results)
    steps = steps_of(config)
    reached = speeds(results, topology, steps)
    show.steps(steps, dataclasses.asdict(config.training.mesh))
    loads = [x for x in _loads(given, show) if x.stage in (options.stages or (x.stage,))]
    hours = show.stages(reached, loads)

    report: dict[str, Any] = {
        "topology": topology.name,
        "chips": topology.chips,
        "level": options.level if compiled else "by formula",
        "programs": [dataclasses.asdict(r) for r in results],
        "steps": {kind: dataclasses.asdict(step) for kind, step in steps.items()},
        "predicted": [dataclasses.asdict(s) for s in reached],
        "predicted_chip_hours": hours,
    }
    seen: set[tuple[str, str]] = set()
    for refused in [r for r in results if r.status == "refused"] if options.propose else ():
        if (refused.stage, refused.of) in seen:
            continue  # the same change has to serve the whole stage
        seen.add((refused.stage, refused.of))
        proposal = propose(request, given, refused, fit, options.compile_seconds)
        report.setdefault("proposals", []).append(
            {
                "refused": refused.label,
                "proposal": proposal and dataclasses.asdict(proposal),
                "predicted_chip_hours": show.proposal(refused, proposal, loads),
            }
        )
    if options.smallest:
        tight = sorted(results, key=lambda r: -(r.peak or r.needed) - r.beside)
        request = dataclasses.replace(request, first=tuple((r.stage, r.name) for r in tight))
        tried = smallest(request, given, fit, options.compile_seconds)
        show.smallest(tried)
        report["smallest"] = [[t.topology.name, t.verdict] for t in tried]
    return report


def _places(config: Experiment | PairTraining) -> list[str]:
    """Places of all models."""
    models = [config.student, reference_of(config.student, config.reference)]
    if isinstance(config, Experiment):
        own = [g.model for g in config.generators]
        own += [j.model for j in config.judges if j.kind == "model"]
        models += [model_of(config, model) for model in own]
    return list(dict.fromkeys(model.place for model in models))


def fit_config(
    config: Experiment | PairTraining, topology: Topology, specs: dict[str, Any]
) -> Experiment | PairTraining:
    """The config with the sizes of its meshes, chosen as a run would on these devices.

    A model that the devices have no room for has the mesh that lacks least, so that the compiler
    says what is missing; the meshes of the others are those of a run.

    Raises:
      ConfigError: a mesh does not fit the devices or the rows.
    """
    from deltapref_jax.stages.meshes import fit_meshes, fit_training
    from deltapref_jax.stages.micro_batches import fill_in
    from launch.workload import longest_of

    devices, of, student = topology.devices, specs.__getitem__, config.student
    if isinstance(config, PairTraining):
        training = fit_training(config.training, student, devices, of, refuse=False)
    else:
        config = fit_meshes(config, devices, of, refuse=False)
        training = config.training
    sizes = dataclasses.asdict(training.mesh)
    lengths, spec = [longest_of(config)], specs[student.place]
    training = fill_in(training, lengths, sizes, spec, student.dtype, devices.memory)
    return dataclasses.replace(config, training=training)


def _loads(config: Experiment | PairTraining, show: "Printer") -> list[Any]:
    """What the whole config reads and writes; nothing where that is not known."""
    from launch.workload import pair_load, study_load

    if isinstance(config, PairTraining):
        if config.training.budget == "epochs":
            show.say("The chip-hours are not known: how long an epoch is, the file's pairs decide.")
        elif OBJECTIVE_KINDS[config.objective.kind].reference:
            show.say("The chip-hours of scoring are not known: the file's pairs decide them.")
        return pair_load(config)
    try:
        return study_load(copy.deepcopy(config))
    except (OSError, ValueError) as e:
        show.say(f"The chip-hours of the study are not known: {e}")
        return []


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    run_main(main, listed=Experiment)
