"""Trains the small models that ship with the project, and measures them.

    python -m launch.nursery --config=configs/nursery.py                 # over an hour on two cores
    python -m launch.nursery --config=configs/nursery.py --measure_only   # what is there, again

Beside the models stands `measured.json`: how each was trained, a solver's accuracy in percent and a
judge's AUC against known corruption, each with its 95% interval.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from absl import flags
from ml_collections import config_flags

from deltapref_jax.artifacts.runner import run, say_made
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Experiment, Judge, Model, ModelZoo, Prompts, SmallModel
from deltapref_jax.files import unwritable
from deltapref_jax.progress import plain_console
from deltapref_jax.validation import validate_model_zoo
from launch.flags import run_main

_CONFIG = config_flags.DEFINE_config_file("config", None, "ModelZoo: a file with get_config().")
_MEASURE_ONLY = flags.DEFINE_bool(
    "measure_only", False, "Measure the models in the output folder, and train none."
)

_AUDITED = Prompts(count=60, seed=901)  # problems that a judge is measured on, of its own families


def release(zoo: ModelZoo, workspace: Workspace) -> None:
    """Trains what is missing and copies the released models to the output folder."""
    from deltapref_jax.stages.nursery import plan

    nodes = plan(zoo)
    wanted = list(nodes.values())
    say_made(wanted, run(wanted, workspace, zoo.name), workspace)
    for name in zoo.release:
        folder = workspace.path(nodes[name]) / "model"
        shutil.copytree(folder, Path(zoo.output) / name, dirs_exist_ok=True)


def measure(zoo: ModelZoo, workspace: Workspace, model: SmallModel) -> dict[str, Any]:
    """A released model's accuracy by domain, or its AUC by dimension; each [value, low, high]."""
    from deltapref_jax.analysis.judges import audit
    from deltapref_jax.analysis.statistics import accuracy
    from deltapref_jax.stages.study import audit_table, prompt_table, result_tables

    path = Model(path=str(Path(zoo.output) / model.name))
    e = Experiment(student=path, suites=zoo.suites, sampling=zoo.sampling)
    if model.curriculum == "judge":
        judge = Judge(name=model.name, kind="model", model=path)
        problems = (dataclasses.replace(_AUDITED, tasks=model.tasks),)
        table = audit_table(e, judge, prompt_table(("prompts",), problems, {}))
        say_made([table], run([table], workspace), workspace)
        found = audit(workspace.table(table), judge.dimensions)
        auc = found.auc if found else {}
        return {dimension: [round(x, 3) for x in estimate] for dimension, estimate in auc.items()}
    suites = {s.name: prompt_table(("suite", s.name), (s.prompts,), {}) for s in zoo.suites}
    tables = result_tables(e, ("evaluate", model.name), suites, path, None)
    if not tables:
        return {}
    wanted = list(tables.values())
    say_made(wanted, run(wanted, workspace), workspace)
    results = pa.concat_tables(workspace.table(table) for table in tables.values())
    return {
        domain: [round(x, 1) for x in accuracy(results, domain)]
        for domain in dict.fromkeys(suite.domain for suite in zoo.suites)
    }


def main(_: list[str]) -> None:
    """Train, release, measure."""
    zoo: ModelZoo = validate_model_zoo(_CONFIG.value)
    try:
        Path(zoo.output).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(zoo.output, e) from e
    workspace = Workspace(zoo.workspace)
    if not _MEASURE_ONLY.value:
        release(zoo, workspace)
    console, measured = plain_console(), {}
    for model in zoo.models:
        if model.name in zoo.release:
            numbers = measure(zoo, workspace, model)
            measured[model.name] = {"recipe": dataclasses.asdict(model)} | numbers
            console.print(model.name, numbers)
    (Path(zoo.output) / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    console.print(f"Models: {zoo.output}", soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main, listed=ModelZoo)
