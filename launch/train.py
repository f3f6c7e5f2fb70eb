"""Trains one arm from any file of preference pairs: no study, resumable.

    python -m launch.train --config.data.path=pairs.parquet --config.student.path=FOLDER [--dry_run]

Data, by its columns: prompt, chosen, rejected (the prompt may also be what both begin with) ·
prompt, completion, label · prompt_ids, chosen_ids, rejected_ids · prompt_ids, completion_ids,
label; text or messages; .jsonl, .parquet, a hub name or a data set folder. The reference's
log-probabilities are computed once and kept in the workspace, unless --config.table names a table.
Run the same command again to continue a killed run. --dry_run reads the file, prints what training
on it takes, and makes nothing. Most used, with their defaults:

    --config.data.path              the pairs: a file, folder or hub name
    --config.data.split             split of a folder or hub data set (train)
    --config.data.name, .revision   subset of a hub data set; branch, tag or commit ('', '')
    --config.student.path           the model: a Hugging Face folder, hub name or .gguf file
    --config.student.revision       branch, tag or commit of a hub name ('')
    --config.student.dtype          float32 or bfloat16, of the computation; weights stay float32
                                    (float32)
    --config.reference.path         another reference; without it, the student before training
    --config.table                  Parquet file or folder of the reference's log-probabilities
    --config.workspace              directory, or gs://bucket/place, of all that is made (workspace)

    --config.objective.kind         dpo, dpo_norm, hinge, ipo, robust, cdpo, apo_zero, apo_down,
                                    simpo; kto, apo_zero_unpaired; sft (dpo)
    --config.objective.beta         weight of the log-ratio to the reference, per nat (0.1)
    --config.objective.learning_rate    at its peak (5e-07)
    --config.objective.label_smoothing, .gamma, .nll_weight    of robust and cdpo; of simpo; of
                                    pairs (0.0, 0.5, 0.0)
    --config.objective.desirable_weight, .undesirable_weight, .baseline_fraction    of KTO
                                    (1.0, 1.0, 1.0)
    --config.training.epochs        passes over the data (1.0)
    --config.training.budget        epochs, or steps: as many as config.training.steps (epochs)
    --config.training.pairs_per_step    pairs of a step; twice as many examples of KTO (32)
    --config.training.warmup        share of the steps in which the learning rate rises (0.1)
    --config.training.schedule      linear, cosine or constant, after the warm-up (linear)
    --config.training.clip          largest norm of a gradient (1.0)
    --config.training.weight_decay  decay of AdamW (0.0)
    --config.seed                   of the order of the data (0)

    --config.training.row_length    tokens of a row, and of the longest sequence (2048)
    --config.training.over_length   drop (counted), error or truncate, for longer sequences (drop)
    --config.data.truncation_mode   keep_start or keep_end, for truncate (keep_start)
    --config.training.rows          rows of a micro-batch over all devices; 0: 2 a device (8)
    --config.training.remat         none, projections, attention or block: less memory, more
                                    computed twice; auto: the least that fits (auto)
    --config.training.moments       float32 or bfloat16, of Adam's moments (float32)
    --config.training.offload_moments   they lie on the host between updates: less memory, more
                                    time (False)
    --config.training.lora.rank     of adapters, trained instead of all weights; 0: none (0)
    --config.training.lora.alpha    adapters are scaled by alpha / rank (16.0)
    --config.training.lora.targets  adapted matrices, such as "('q_proj', 'v_proj')"; all if none is
                                    named
    --config.training.mesh.data, .fsdp, .tensor, .context    devices along each axis; 0: chosen,
                                    -1: all that are left (0, 0, 0, 0)
    --config.training.checkpoint_every  steps between checkpoints (50)
    --config.trackers               "('tensorboard',)" or "('wandb',)": metrics while it trains;
                                    metrics.jsonl always is

Every field, with unit and reason: docs/config.md. A file like configs/train.py holds a whole run.
"""

from pathlib import Path

from ml_collections import config_flags

from deltapref_jax.artifacts.runner import run, say_made
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import PairTraining
from deltapref_jax.progress import plain_console, say
from deltapref_jax.validation import validate_pair_training
from launch.flags import (
    check_dry_run,
    define_dry_run,
    define_initialization_timeout,
    define_profile_steps,
    run_main,
    window,
)

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Python file whose get_config() gives a PairTraining; without one, configs/train.py.",
)
_DRY_RUN, _DEVICES = define_dry_run()
_PROFILE = define_profile_steps()
_TIMEOUT = define_initialization_timeout()


def main(_: list[str]) -> None:
    """Validate, plan, make, show."""
    p: PairTraining = validate_pair_training(_CONFIG.value)
    profile = window(_PROFILE.value)
    check_dry_run(_DRY_RUN.value, _DEVICES.value)
    # JAX is imported only now, so that a wrong flag or config is refused at once
    from deltapref_jax.artifacts.lease import release_all
    from deltapref_jax.cluster import unused_variables
    from deltapref_jax.devices import assumed_devices, attached_devices
    from deltapref_jax.mesh import is_first
    from deltapref_jax.preemption import install_group_shutdown
    from deltapref_jax.processes import start_processes
    from deltapref_jax.stages.meshes import training_lines
    from deltapref_jax.stages.pairs_file import check, plan
    from launch.trained import show

    workspace, console = Workspace(p.workspace), plain_console()
    if _DRY_RUN.value:  # A job would be joined only when all of its hosts run the command.
        from launch.dry_run import assumed_line, show_alone
        from launch.file_plan import show_file_plan

        devices = assumed_devices(_DEVICES.value)
        policy = plan(p, profile, devices, weights=False)
        say(console, assumed_line(devices))
        if not _DEVICES.value and (unused := unused_variables()):
            console.print(unused, soft_wrap=True, markup=False, highlight=False)
        show_alone(console, policy)
        show_file_plan(console, p, policy, workspace, devices)
        return
    start_processes(_TIMEOUT.value)
    install_group_shutdown(release_all)
    policy = plan(p, profile, attached_devices())
    if is_first():
        if unused := unused_variables():
            console.print(unused, soft_wrap=True, markup=False, highlight=False)
        for line in training_lines(policy.training):
            say(console, line)
    made = run(list(policy.sequences.values()), workspace, p.name)
    check(p, policy, workspace)
    made += run([policy], workspace, p.name)
    say_made([policy], made, workspace)
    if is_first():
        show(console, workspace, policy)


if __name__ == "__main__":
    run_main(main, str(Path(__file__).resolve().parent.parent / "configs" / "train.py"))
