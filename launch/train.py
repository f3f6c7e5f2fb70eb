"""Trains one arm from any file of preference pairs; no study, no reference pass during training, resumable.

    python -m launch.train --config.data.path=pairs.parquet --config.student.path=FOLDER

Data, by its columns: prompt, chosen, rejected (the prompt may also be what both begin with) · prompt, completion,
label · prompt_ids, chosen_ids, rejected_ids · prompt_ids, completion_ids, label; text or messages; .jsonl, .parquet, a
hub name or a data set folder. The reference's log-probabilities are computed once and kept in the workspace, unless
--config.table names a table. Run the same command again to continue a killed run. Most used:

    --config.data.path            file, folder or hub name; --config.data.split for the last two
    --config.student.path         Hugging Face folder, hub name or .gguf file; --config.student.dtype=bfloat16
    --config.objective.kind       dpo, dpo_norm, kto, sft …; with .beta and .learning_rate
    --config.training.epochs      passes over the data, or --config.training.budget=steps and .steps
    --config.training.pairs_per_step, .rows, .row_length     a step's pairs; its micro-batches; tokens of a row
    --config.training.over_length     drop (counted), error or truncate a sequence longer than row_length;
                                  --config.data.truncation_mode=keep_start or keep_end
    --config.reference.path       another reference than the student before training; --config.table, its table
    --config.workspace            directory, or gs://bucket/place, of everything that is made
    --config.seed                 order of the data
    --config.trackers="('tensorboard',)"    or 'wandb': metrics while it trains; --profile_steps=10:12

Every field, with unit and reason: `Single` in deltapref_jax/config.py. A file like configs/train.py holds a whole run.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.config import Single
from deltapref_jax.validation import validate_single
from deltapref_jax.workspace import Workspace, run
from launch.flags import define_profile_steps, run_main, window

_CONFIG = config_flags.DEFINE_config_file("config", None, "Single: a file with get_config().")
_PROFILE = define_profile_steps()


def main(_: list[str]) -> None:
    """Validate, plan, make, show."""
    single: Single = validate_single(_CONFIG.value)
    profile = window(_PROFILE.value)
    from deltapref_jax.mesh import is_first, start_processes
    from deltapref_jax.stages.single import STAGES, plan
    from launch.trained import show

    start_processes()
    workspace = Workspace(single.workspace)
    nodes = plan(single, profile)
    run(nodes, STAGES, workspace)
    if is_first():
        show(Console(), workspace, nodes)


if __name__ == "__main__":
    flags.FLAGS.set_default("config", str(Path(__file__).resolve().parent.parent / "configs" / "train.py"))
    run_main(main)
