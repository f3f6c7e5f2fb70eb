"""What a run of launch.train did, for the terminal."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import OBJECTIVE_KINDS
from deltapref_jax.display import COUNTS
from deltapref_jax.stages.tokens import FileSequences
from deltapref_jax.stages.train import Policy


def show(console: Console, workspace: Workspace, policy: Policy) -> None:
    """What was read, left out and cut; the first and the last step; where everything is."""
    sequences = policy.sequences["file"]
    assert isinstance(sequences, FileSequences)
    folder = workspace.path(policy)
    counts, stats = workspace.manifest(sequences).stats, workspace.manifest(policy).stats
    with next(workspace.path(sequences).glob("*.parquet")).open("rb") as file:
        about = pq.read_schema(file).metadata
    counts |= {"dropped_mismatched": stats["dropped_mismatched"]}
    show_data(console, sequences.data.path, about, counts)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    console.print(_metrics([json.loads(line) for line in lines]))
    _show_speed(console, policy, stats)
    for logprobs in policy.logprobs.values():
        if held := workspace.manifest(logprobs).stats["from_table"]:
            console.print(f"{held:,.0f} log-probabilities are those of config.table.")
        console.print(f"Reference table: {workspace.path(logprobs)}", soft_wrap=True)
    console.print(
        f"Metrics: {folder / 'metrics.jsonl'}\nPolicy: {folder / 'policy'}", soft_wrap=True
    )
    if (folder / "adapter").exists():
        console.print(f"Adapter: {folder / 'adapter'}", soft_wrap=True)


def show_data(
    console: Console, path: str, about: Mapping[bytes, bytes], counts: Mapping[str, float]
) -> None:
    """What was read of a file, left out and cut.

    Args:
      console: where to.
      path: of the file.
      about: metadata of its table of sequences.
      counts: of `FileSequences.read`.
    """
    console.print(f"Data: {path} ({about[b'format'].decode()})", soft_wrap=True)
    if ignored := json.loads(about[b"ignored"]):
        console.print(f"  {len(ignored)} columns ignored: {', '.join(ignored)}", soft_wrap=True)
    for name, words in COUNTS["tokens"].items():
        if counts.get(name):
            console.print(f"  {counts[name]:,.0f} {words}")


def _show_speed(console: Console, policy: Policy, stats: dict[str, float]) -> None:
    """Steps, tokens per second, padding, and the time that checkpoints took."""
    wanted, batch = policy.training.pairs_per_step, int(stats["batch"])
    unit = OBJECTIVE_KINDS[policy.objective.kind].unit
    whole = batch < wanted * (2 if unit == "example" else 1)
    console.print(
        f"{stats['steps']:,.0f} step{'s' * (stats['steps'] != 1)} of {batch:,} "
        f"{'pair' if unit == 'pair' else 'example'}{'s' * (batch != 1)}"
        + f", which are all there are (config.training.pairs_per_step is {wanted:,})"
        * whole,
        soft_wrap=True,
    )
    if stats["seconds_steady"]:
        speed = stats["tokens_steady"] / stats["seconds_steady"]
        padding = 1 - stats["filled"] / stats["positions"]
        console.print(
            f"{speed:,.0f} tokens/s after the first step, which compiles and took "
            f"{stats['seconds_first_step']:.1f} s; {padding:.1%} of the positions were padding",
            soft_wrap=True,
        )
    console.print(
        f"Checkpoints: training stood still for {stats['seconds_checkpoint_blocked']:.1f} s, and "
        f"{stats['seconds_checkpoint_background']:.1f} s were written while it went on",
        soft_wrap=True,
    )


def _metrics(rows: list[dict[str, Any]]) -> Table:
    """The first and the last step; a step of KTO may have one side alone."""
    ends = rows[0], rows[-1]
    table = Table("", *(f"step {row['step']}" for row in ends))
    for name in ends[0] | ends[1]:
        if name in ("loss", "nll_loss", "kl", "grad_norm") or name.startswith(
            ("rewards/", "logps/")
        ):
            table.add_row(name, *(f"{row[name]:.4f}" if name in row else "" for row in ends))
    return table
