"""Writes the pairs of one arm of a study in TRL's columns; ratings are summed over the arm's judge's dimensions.

python -m launch.export --config=configs/quickstart.py --arm=dpo-strong --out=pairs.parquet
"""

from absl import flags
from ml_collections import config_flags

from deltapref_jax.config import Experiment, check_choice, judge_of
from deltapref_jax.validation import validate
from deltapref_jax.workspace import Workspace
from launch.flags import run_main

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file with get_config().")
_ARM = flags.DEFINE_string("arm", None, "Name of the arm.")
_OUT = flags.DEFINE_string("out", None, "File to write; .parquet or .jsonl.")


def main(_: list[str]) -> None:
    """Find the arm's tables in the workspace and write them."""
    experiment: Experiment = validate(_CONFIG.value)
    from deltapref_jax.data.export import trl_rows, write_rows
    from deltapref_jax.stages.study import plan
    from evals.evaluate import describe

    arm = check_choice("--arm", str(_ARM.value), [a.name for a in experiment.arms])
    of = next(a for a in experiment.arms if a.name == arm)
    workspace = Workspace(experiment.workspace)
    nodes = plan(experiment, describe)
    node = nodes[f"pair/{arm}"]
    if not workspace.complete(node):
        raise FileNotFoundError(
            f"The pairs of arm {arm!r} are not in {experiment.workspace}; run launch.ablate "
            "with this config first."
        )
    traces = [
        t
        for name, source in node.inputs.items()
        if name.startswith("sample/")
        for t in workspace.table(source).to_pylist()
    ]
    ratings: dict[str, float] = {}
    for name in dict.fromkeys((of.chosen, of.rejected)):
        rated = nodes.get(f"judge/{judge_of(experiment, of)}/{name}")
        for row in (
            workspace.table(rated).to_pylist() if rated and workspace.complete(rated) else []
        ):
            ratings[row["trace_id"]] = ratings.get(row["trace_id"], 0.0) + row["rating"]
    rows = trl_rows(
        workspace.table(node).to_pylist(),
        workspace.table(node.inputs["prompts"]).to_pylist(),
        traces,
        ratings,
    )
    write_rows(rows, str(_OUT.value))
    print(f"{len(rows)} pairs: {_OUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "arm", "out"])
    run_main(main)
