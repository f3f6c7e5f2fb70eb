"""Writes the pairs of one arm of a study in TRL's columns, or as the token ids that are trained on.

    python -m launch.export --config=configs/quickstart.py --arm=dpo-strong --out=pairs.parquet
    python -m launch.export --config=configs/quickstart.py --arm=dpo-strong --out=ids.parquet --ids

In TRL's columns ratings are summed over the dimensions of the arm's judge. The token ids are for
launch.train, whose --config.table can then be the study's own log-probabilities. An arm of KTO
becomes labelled examples with the prompts that its baseline puts before their completions. Of a
config with several students, --student names the one whose tokens are written.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import OBJECTIVE_KINDS, Arm, Experiment, check_choice, of_student
from deltapref_jax.display import count, printable
from deltapref_jax.records import Pair, TokenSequence
from deltapref_jax.validation import validate
from launch.flags import define_student, run_main

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file with get_config().")
_ARM = flags.DEFINE_string("arm", None, "Name of the arm.")
_DRAW = flags.DEFINE_integer("draw", 0, "Draw of its pairs.")
_OUT = flags.DEFINE_string("out", None, "File to write; .parquet or .jsonl.")
_STUDENT = define_student()
_IDS = flags.DEFINE_bool("ids", False, "Write token ids instead of messages.")


def main(_: list[str]) -> None:
    """Find the arm's tables in the workspace and write them."""
    e: Experiment = of_student(validate(_CONFIG.value), _STUDENT.value)
    from deltapref_jax.data.export import check_output, write_rows
    from deltapref_jax.stages.export import arm_rows
    from deltapref_jax.stages.study import plan

    check_output(str(_OUT.value))
    name = check_choice("--arm", str(_ARM.value), [arm.name for arm in e.arms])
    arm = next(arm for arm in e.arms if arm.name == name)
    workspace = Workspace(e.workspace)
    report = plan(e)
    draw = int(check_choice("--draw", str(_DRAW.value), [str(draw) for draw in arm.draws]))
    node = report.pairs[name][draw]
    both = tuple(dict.fromkeys((arm.chosen, arm.rejected)))
    needed = [node, *(report.sequences[generator] for generator in both if _IDS.value)]
    if not all(workspace.complete(table) for table in needed):
        raise FileNotFoundError(
            f"The pairs of arm {name!r} are not in {e.workspace}; run launch.ablate with this "
            "config first."
        )
    if _IDS.value:
        pairs = workspace.rows(Pair, node)
        tables = [workspace.rows(TokenSequence, report.sequences[side]) for side in both]
        rows = _id_rows(e, arm, pairs, [row for table in tables for row in table])
    else:
        rows = arm_rows(workspace, report, arm, draw)
    write_rows(rows, str(_OUT.value))
    print(printable(f"{count(int(workspace.manifest(node).stats['rows']), 'pair')}: {_OUT.value}"))


def _id_rows(
    e: Experiment, arm: Arm, pairs: list[Pair], sequences: list[TokenSequence]
) -> list[dict[str, Any]]:
    """The arm's pairs as token ids, or its labelled examples where KTO's baseline is measured."""
    from deltapref_jax.data.export import labelled_token_rows, token_rows

    matched = {row.trace_id: row for row in sequences if row.matched}
    kind = next(o.kind for o in e.objectives if o.name == arm.objective)
    if not OBJECTIVE_KINDS[kind].baseline:
        return token_rows(pairs, matched)
    # The study measures no baseline on rows that were too long to be scored.
    mismatched = {
        row.trace_id: row
        for row in sequences
        if not row.matched and row.length <= e.scoring.row_length
    }
    return labelled_token_rows(pairs, matched, mismatched)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "arm", "out"])
    run_main(main, listed=Experiment)
