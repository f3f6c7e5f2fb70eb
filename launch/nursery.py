"""Raises the small models that ship with the project, measures them, and puts them where they ship from.

    python -m launch.nursery --config=configs/nursery.py
"""

import dataclasses
import json
import shutil
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.config import Model, Nursery
from deltapref_jax.validation import validate_nursery
from deltapref_jax.workspace import Node, Workspace, run
from launch.flags import run_main

_CONFIG = config_flags.DEFINE_config_file("config", None, "Nursery: a file with get_config().")


def main(_: list[str]) -> None:
    """Raise, release, measure."""
    nursery: Nursery = validate_nursery(_CONFIG.value)
    from deltapref_jax.analysis.statistics import accuracy
    from deltapref_jax.stages import prompts
    from deltapref_jax.stages.nursery import plan, pupil, tokenizer
    from deltapref_jax.stages.study import prompts_node
    from evals.evaluate import describe, evaluate

    workspace = Workspace(nursery.workspace)
    stages = {"tokenizer": tokenizer, "pupil": pupil, "prompts": prompts.prompts, "evaluate": evaluate}
    nodes = plan(nursery)
    run(nodes, stages, workspace)
    for name in nursery.release:
        shutil.copytree(workspace.path(nodes[f"pupil/{name}"]) / "model", Path(nursery.output) / name,
                        dirs_exist_ok=True)
    suites = {f"suite/{s.name}": prompts_node(f"suite/{s.name}", (s.prompts,), {}) for s in nursery.suites}
    measured: dict[str, dict] = {}
    for p in nursery.pupils:
        if p.name not in nursery.release:
            continue
        measured[p.name] = {"pupil": dataclasses.asdict(p)}
        if p.lesson == "solve" and suites:
            model = Model(path=str(Path(nursery.output) / p.name))
            config, local = describe(nursery.suites, nursery.sampling, 0, nursery.mesh, model, False)
            node = Node("evaluate", f"evaluate/{p.name}", config, suites, local)
            run({node.label: node}, stages, workspace)
            for domain in dict.fromkeys(s.domain for s in nursery.suites):
                measured[p.name][domain] = [round(x, 1) for x in accuracy(workspace.table(node), domain)]
    (Path(nursery.output) / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    console = Console()
    for name, found in measured.items():
        console.print(name, {k: v for k, v in found.items() if k != "pupil"})
    console.print(f"Models: {nursery.output}", soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
