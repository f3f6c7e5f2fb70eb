"""Trains one arm from any file of preference pairs; no study, no reference pass during training, resumable.

    python -m launch.train --config.data.path=pairs.parquet --config.student.path=FOLDER

Data, by its columns: prompt, chosen, rejected (the prompt may also be what both begin with) · prompt, completion,
label · prompt_ids, chosen_ids, rejected_ids · prompt_ids, completion_ids, label; text or messages; .jsonl, .parquet, a
hub name or a data set folder. The reference's log-probabilities are computed once and kept in the workspace, unless
--config.table names a table. Run the same command again to continue a killed run. Most used:

    --config.data.path            file, folder or hub name; --config.data.split for the last two
    --config.student.path         Hugging Face folder, hub name or .gguf file; --config.student.dtype=bfloat16
    --config.objective.kind       dpo, dpo_norm, hinge, ipo, robust, cdpo, apo_zero, apo_down, simpo; kto,
                                  apo_zero_unpaired; sft; with .beta, .learning_rate, .nll_weight, .label_smoothing …
    --config.training.epochs      passes over the data, or --config.training.budget=steps and .steps
    --config.training.pairs_per_step, .rows, .row_length     a step's pairs; its micro-batches (two rows per device
                                  pad least); tokens of a row
    --config.training.over_length     drop (counted), error or truncate a sequence longer than row_length;
                                  --config.data.truncation_mode=keep_start or keep_end
    --config.training.warmup, .schedule, .weight_decay, .clip     share of the steps; linear, cosine or constant
    --config.training.lora.rank   adapters instead of all weights; .alpha, .targets="('q_proj', 'v_proj')"
    --config.training.remat       projections, attention or block: less memory, more computed twice
    --config.training.moments     bfloat16: half the memory of Adam's moments
    --config.mesh.data, .fsdp, .tensor, .context     devices along each axis; -1 takes what is left
    --config.reference.path       another reference than the student before training; --config.table, its table
    --config.workspace            directory, or gs://bucket/place, of everything that is made
    --config.seed                 order of the data
    --config.trackers="('tensorboard',)"    or 'wandb': metrics while it trains; --profile_steps=10:12

Every field, with unit and reason: `Single` in deltapref_jax/config.py. A file like configs/train.py holds a whole run.
"""

from pathlib import Path

from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.config import Single
from deltapref_jax.validation import validate_single
from deltapref_jax.workspace import Workspace, run
from launch.flags import define_profile_steps, run_main, window

_CONFIG = config_flags.DEFINE_config_file("config", None, "Single: a file with get_config(); configs/train.py if none.")
_PROFILE = define_profile_steps()


def main(_: list[str]) -> None:
    """Validate, plan, make, show."""
    single: Single = validate_single(_CONFIG.value)
    profile = window(_PROFILE.value)
    from deltapref_jax.mesh import check_rows, is_first, make_mesh, start_processes
    from deltapref_jax.stages.single import STAGES, plan
    from launch.trained import show

    start_processes()
    check_rows("config.training", single.training.rows, single.training.row_length, make_mesh(single.mesh))
    workspace = Workspace(single.workspace)
    nodes = plan(single, profile)
    run(nodes, STAGES, workspace)
    if is_first():
        show(Console(), workspace, nodes)


if __name__ == "__main__":
    run_main(main, str(Path(__file__).resolve().parent.parent / "configs" / "train.py"))
