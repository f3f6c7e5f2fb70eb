"""Trains the small models that ship with the project, and measures them.

    python -m launch.nursery --config=configs/nursery.py                 # over an hour on two cores
    python -m launch.nursery --config=configs/nursery.py --measure_only   # what is there, again

Beside the models stands `measured.json`: how each was trained, a solver's accuracy in percent at
the suites' temperature and under greedy decoding, the mean negative log-probability of its sampled
tokens, and a judge's AUC against known corruption, with 95% intervals.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from absl import flags
from ml_collections import config_flags

from deltapref_jax.artifacts.runner import run, say_made
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    Experiment,
    Judge,
    Model,
    ModelZoo,
    Prompts,
    SmallModel,
    domains_of,
)
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
    """What a released model can do: a solver's `accuracies`, or a judge's AUC by dimension.

    Each AUC is [value, low, high].
    """
    from deltapref_jax.analysis.judges import audit
    from deltapref_jax.stages.study import audit_table, prompt_table

    path = Model(path=str(Path(zoo.output) / model.name))
    e = Experiment(student=path, suites=zoo.suites, sampling=zoo.sampling)
    if model.curriculum != "judge":
        return accuracies(e, workspace, model.name)
    judge = Judge(name=model.name, kind="model", model=path)
    problems = (dataclasses.replace(_AUDITED, tasks=model.tasks),)
    table = audit_table(e, judge, prompt_table(("prompts",), problems, {}))
    say_made([table], run([table], workspace), workspace)
    found = audit(workspace.table(table), judge.dimensions)
    auc = found.auc if found else {}
    return {dimension: [round(x, 3) for x in estimate] for dimension, estimate in auc.items()}


def accuracies(e: Experiment, workspace: Workspace, name: str) -> dict[str, Any]:
    """The student's accuracy on the suites as they are, and under greedy decoding.

    Returns:
      For every domain [value, low, high] in percent, the same under "greedy"; under "suites" both
      values of every suite; everywhere "entropy": the mean negative log-probability of the sampled
      tokens in nats, which at temperature 1 is an unbiased estimate of the entropy per token.
    """
    from deltapref_jax.analysis.statistics import accuracy
    from deltapref_jax.stages.study import prompt_table, result_tables

    questions = {s.name: prompt_table(("suite", s.name), (s.prompts,), {}) for s in e.suites}
    # One greedy answer a question: further ones would be the same.
    greedy = tuple(dataclasses.replace(s, temperature=0.0, samples=1) for s in e.suites)
    readouts = {
        label: result_tables(
            dataclasses.replace(e, suites=suites), (label, name), questions, e.student, None
        )
        for label, suites in (("sampled", e.suites), ("greedy", greedy))
    }
    wanted = [table for tables in readouts.values() for table in tables.values()]
    if not wanted:
        return {}
    say_made(wanted, run(wanted, workspace), workspace)
    found = {
        label: {suite: workspace.table(table) for suite, table in tables.items()}
        for label, tables in readouts.items()
    }
    domains = domains_of(e.suites)
    all_of = {label: pa.concat_tables(tables.values()) for label, tables in found.items()}
    by_domain = {
        label: {domain: [round(x, 1) for x in accuracy(results, domain)] for domain in domains}
        for label, results in all_of.items()
    }
    suites = {
        suite.name: {
            label: round(accuracy(found[label][suite.name], suite.domain).value, 1)
            for label in found
        }
        | {"entropy": entropy(found["sampled"][suite.name])}
        for suite in e.suites
    }
    return {
        **by_domain["sampled"],
        "greedy": by_domain["greedy"],
        "entropy": entropy(all_of["sampled"]),
        "suites": suites,
    }


def entropy(results: pa.Table) -> float:
    """Mean negative log-probability of the sampled tokens, in nats a token."""
    logprob, tokens = (pc.sum(results[column]).as_py() for column in ("logprob", "tokens"))
    return round(-logprob / max(tokens, 1), 4)


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
