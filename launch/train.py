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
    --config.workspace            directory of everything that is made
    --config.seed                 order of the data

Every field, with unit and reason: `Single` in deltapref_jax/config.py. A file like configs/train.py holds a whole run.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from deltapref_jax.config import Single
from deltapref_jax.validation import validate_single
from deltapref_jax.workspace import Node, Workspace, run
from launch.flags import run_main

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).resolve().parent.parent / "configs" / "train.py"), "Single: a file with get_config().")

_WORDS = {  # counts of a manifest, in words; those that are zero are not shown
    "read": "rows read", "groups": "trained on", "too_long": "longer than row_length, dropped",
    "cut": "sequences cut to row_length", "cut_away": "no answer within row_length, dropped",
    "unscored": "nothing to score, dropped", "undesirable": "not desirable, left out (SFT)",
    "apart": "template no prefix, tokenised apart", "mismatched_dropped": "mismatched rows too long, left out",
    "mismatched_cut": "mismatched rows cut to row_length"}


def main(_: list[str]) -> None:
    """Validate, plan, make, show."""
    single: Single = validate_single(_CONFIG.value)
    from deltapref_jax.mesh import is_first, start_processes
    from deltapref_jax.stages.single import STAGES, plan

    start_processes()
    workspace = Workspace(single.workspace)
    nodes = plan(single)
    run(nodes, STAGES, workspace)
    if is_first():
        show(Console(), workspace, nodes)


def show(console: Console, workspace: Workspace, nodes: dict[str, Node]) -> None:
    """What was read, left out and cut; the first and the last step; where everything is."""
    import pyarrow.parquet as pq

    tokens, folder = nodes["tokens"], workspace.path(nodes["policy"])
    counts = workspace.manifest(tokens)["stats"]
    stats = workspace.manifest(nodes["policy"])["stats"]
    about = pq.read_schema(next(workspace.path(tokens).glob("*.parquet"))).metadata
    console.print(f"Data: {tokens.local['data']['path']} ({about[b'format'].decode()})", soft_wrap=True)
    if ignored := json.loads(about[b"ignored"]):
        console.print(f"  {len(ignored)} columns ignored: {', '.join(ignored)}", soft_wrap=True)
    found = counts | {name: stats[name] for name in _WORDS if name.startswith("mismatched") and name in stats}
    for name, words in _WORDS.items():
        if found.get(name):
            console.print(f"  {found[name]:,.0f} {words}")
    console.print(_metrics([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]))
    if "reference" in nodes:
        console.print(f"Reference table: {workspace.path(nodes['reference'])}", soft_wrap=True)
    console.print(f"Metrics: {folder / 'metrics.jsonl'}\nPolicy: {folder / 'policy'}", soft_wrap=True)


def _metrics(rows: list[dict[str, Any]]) -> Table:
    table = Table("", f"step {rows[0]['step']}", f"step {rows[-1]['step']}")
    for name in rows[0]:
        if name == "loss" or name.startswith(("rewards/", "logps/")):
            table.add_row(name, *(f"{row[name]:.4f}" for row in (rows[0], rows[-1])))
    return table


if __name__ == "__main__":
    run_main(main)
