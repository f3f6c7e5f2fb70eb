"""Runs a delta study: every artifact that the config calls for and that is not there yet, then the page.

    python -m launch.ablate --config=configs/quickstart.py [--dry_run] [--verify] [--config.training.steps=60 …]

Arms can be watched while they train: --config.trackers="('tensorboard',)", --profile_steps=10:12.
"""

from collections.abc import Mapping

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.config import Experiment
from deltapref_jax.validation import validate
from deltapref_jax.workspace import Node, Workspace, run
from launch.flags import define_profile_steps, run_main, window

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file with get_config().")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and its cost, and make nothing.")
_VERIFY = flags.DEFINE_bool("verify", False, "Check the checksums of everything that stands.")
_PROFILE = define_profile_steps()


def stage_table() -> dict:
    """Stage names to functions; evals and the package's stages meet here."""
    from deltapref_jax.stages import (
        audit,
        judge,
        pair,
        prompts,
        report,
        sample,
        score,
        train,
        verify,
    )
    from evals.evaluate import evaluate

    return {
        "prompts": prompts.prompts,
        "sample": sample.sample,
        "verify": verify.verify,
        "judge": judge.judge,
        "score": score.score,
        "pair": pair.pair,
        "train": train.train_arm,
        "evaluate": evaluate,
        "audit": audit.audit,
        "report": report.report,
    }


def main(_: list[str]) -> None:
    """Validate, plan, make, show."""
    experiment: Experiment = validate(_CONFIG.value)
    profile = window(_PROFILE.value)
    from deltapref_jax.artifacts.lease import release_all
    from deltapref_jax.mesh import check_rows, make_mesh
    from deltapref_jax.preemption import install_group_shutdown
    from deltapref_jax.processes import start_processes
    from deltapref_jax.stages.study import check_models, plan
    from evals.evaluate import describe

    start_processes()
    install_group_shutdown(release_all)
    workspace = Workspace(experiment.workspace)
    nodes = plan(experiment, describe, profile)
    check_models(experiment)
    console = Console()
    if _DRY_RUN.value:
        from launch.cost import plan_table

        console.print(plan_table(experiment, nodes, workspace))
        return
    mesh = make_mesh(
        experiment.mesh
    )  # sizes that do not fit the devices are refused before anything is made
    for field in ("training", "scoring"):
        part = getattr(experiment, field)
        check_rows(f"config.{field}", part.rows, part.row_length, mesh)
    before = {
        name: node
        for name, node in nodes.items()
        if not name.startswith(("train/", "evaluate/", "report"))
    }
    if "evaluate/student" in nodes:
        before["evaluate/student"] = nodes["evaluate/student"]
    run(before, stage_table(), workspace, verify=_VERIFY.value)
    _say_detectable(console, workspace, nodes, experiment)
    run(nodes, stage_table(), workspace, verify=_VERIFY.value)
    _show(console, workspace, nodes)


def _say_detectable(
    console: Console, workspace: Workspace, nodes: Mapping[str, Node], e: Experiment
) -> None:
    """Before the arms train: the smallest difference to the student that this set-up would find."""
    from deltapref_jax.analysis.findings import DOMAIN_WORDS
    from deltapref_jax.analysis.statistics import minimum_detectable

    if "evaluate/student" not in nodes:
        return
    seeds = min((len(a.seeds) for a in e.arms), default=1)
    found = minimum_detectable(workspace.table(nodes["evaluate/student"]), seeds)
    changes = ", ".join(
        f"{points:.1f} points {DOMAIN_WORDS[domain]}" for domain, points in found.items()
    )
    console.print(
        f"Smallest detectable change of an arm: {changes} ({seeds} seed{'s' * (seeds > 1)}, 80% power, "
        "two-sided 5% level, sampling error alone).",
        soft_wrap=True,
    )


def _show(console: Console, workspace: Workspace, nodes: Mapping[str, Node]) -> None:
    import json

    from deltapref_jax.analysis.report import terminal_table

    folder = workspace.path(nodes["report"])
    console.print(terminal_table(json.loads((folder / "summary.json").read_text())))
    console.print(f"Page: {folder / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
