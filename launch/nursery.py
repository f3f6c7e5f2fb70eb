"""Raises the small models that ship with the project, measures them, and puts them where they ship from.

    python -m launch.nursery --config=configs/nursery.py                  # more than an hour on two cores
    python -m launch.nursery --config=configs/nursery.py --measure_only   # what is there, again

Beside the models stands `measured.json`: how each was raised, a solver's accuracy in percent and a judge's AUC against
known corruption, each with its 95% interval.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.config import Judge, Model, ModelZoo, Prompts, SmallModel, Scoring
from deltapref_jax.validation import validate_nursery
from deltapref_jax.workspace import Node, Workspace, run
from launch.flags import run_main

_CONFIG = config_flags.DEFINE_config_file("config", None, "ModelZoo: a file with get_config().")
_MEASURE_ONLY = flags.DEFINE_bool(
    "measure_only", False, "Measure the models in the output folder, and raise none."
)

_AUDITED = Prompts(count=60, seed=901)  # problems that a judge is measured on, of its own families


def release(nursery: ModelZoo, workspace: Workspace) -> None:
    """Raises what is missing and copies the released pupils to the output folder."""
    from deltapref_jax.stages.nursery import plan, pupil, tokenizer

    nodes = plan(nursery)
    run(nodes, {"tokenizer": tokenizer, "pupil": pupil}, workspace)
    for name in nursery.release:
        shutil.copytree(
            workspace.path(nodes[f"pupil/{name}"]) / "model",
            Path(nursery.output) / name,
            dirs_exist_ok=True,
        )


def measure(nursery: ModelZoo, workspace: Workspace, who: SmallModel) -> dict[str, Any]:
    """A released pupil's accuracy by domain, or its AUC by dimension; each [value, low, high]."""
    from deltapref_jax.analysis.judges import audit as aucs
    from deltapref_jax.analysis.statistics import accuracy
    from deltapref_jax.models.weights import weights_hash
    from deltapref_jax.stages import audit, prompts
    from deltapref_jax.stages.study import prompts_node
    from evals.evaluate import describe, evaluate

    stages = {"prompts": prompts.prompts, "evaluate": evaluate, "audit": audit.audit}
    model = Model(path=str(Path(nursery.output) / who.name))
    if who.lesson == "judge":
        judge = Judge(name=who.name, kind="model", model=model)
        fields = dataclasses.asdict(judge)
        fields.pop("model")
        asked = prompts_node("prompts", (dataclasses.replace(_AUDITED, tasks=who.tasks),), {})
        node = Node(
            "audit",
            f"audit/{who.name}",
            {
                "judge": fields,
                "scoring": dataclasses.asdict(Scoring()),
                "weights": weights_hash(model.path),
                "dtype": model.dtype,
                "count": _AUDITED.count,
                "seed": 0,
            },
            {"prompts": asked},
            {"model": dataclasses.asdict(model), "mesh": dataclasses.asdict(nursery.mesh)},
            audit.VERSION,
        )
        run({node.label: node}, stages, workspace)
        found = aucs(workspace.table(node), judge.dimensions)["auc"]
        return {dimension: [round(x, 3) for x in estimate] for dimension, estimate in found.items()}
    if not nursery.suites:
        return {}
    suites = {
        f"suite/{s.name}": prompts_node(f"suite/{s.name}", (s.prompts,), {}) for s in nursery.suites
    }
    config, local = describe(nursery.suites, nursery.sampling, 0, nursery.mesh, model, False)
    node = Node("evaluate", f"evaluate/{who.name}", config, suites, local)
    run({node.label: node}, stages, workspace)
    results = workspace.table(node)
    return {
        domain: [round(x, 1) for x in accuracy(results, domain)]
        for domain in dict.fromkeys(s.domain for s in nursery.suites)
    }


def main(_: list[str]) -> None:
    """Raise, release, measure."""
    nursery: ModelZoo = validate_nursery(_CONFIG.value)
    workspace = Workspace(nursery.workspace)
    if not _MEASURE_ONLY.value:
        release(nursery, workspace)
    measured = {
        p.name: {"pupil": dataclasses.asdict(p)} | measure(nursery, workspace, p)
        for p in nursery.pupils
        if p.name in nursery.release
    }
    (Path(nursery.output) / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    console = Console()
    for name, found in measured.items():
        console.print(name, {k: v for k, v in found.items() if k != "pupil"})
    console.print(f"Models: {nursery.output}", soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
