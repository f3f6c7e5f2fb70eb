"""What a run of launch.train did, for the terminal."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from deltapref_jax.config import OBJECTIVE_KINDS
from deltapref_jax.workspace import Node, Workspace

_WORDS = {  # counts of a manifest, in words; those that are zero are not shown
    "read": "rows read",
    "groups": "trained on",
    "same": "of them pairs whose two answers are the same",
    "empty": "an empty answer, dropped",
    "too_long": "longer than row_length, dropped",
    "cut": "sequences cut to row_length",
    "cut_away": "no answer within row_length, dropped",
    "unscored": "nothing to score, dropped",
    "undesirable": "not desirable, left out (SFT)",
    "apart": "template no prefix, tokenised apart",
    "mismatched_dropped": "mismatched rows too long, left out",
    "mismatched_cut": "mismatched rows cut to row_length",
}


def show(console: Console, workspace: Workspace, nodes: dict[str, Node]) -> None:
    """What was read, left out and cut; the first and the last step; where everything is."""
    import pyarrow.parquet as pq

    tokens, folder = nodes["tokens"], workspace.path(nodes["policy"])
    counts = workspace.manifest(tokens)["stats"]
    stats = workspace.manifest(nodes["policy"])["stats"]
    with next(workspace.path(tokens).glob("*.parquet")).open("rb") as file:
        about = pq.read_schema(file).metadata
    console.print(
        f"Data: {tokens.local['data']['path']} ({about[b'format'].decode()})", soft_wrap=True
    )
    if ignored := json.loads(about[b"ignored"]):
        console.print(f"  {len(ignored)} columns ignored: {', '.join(ignored)}", soft_wrap=True)
    found = counts | {
        name: stats[name] for name in _WORDS if name.startswith("mismatched") and name in stats
    }
    for name, words in _WORDS.items():
        if found.get(name):
            console.print(f"  {found[name]:,.0f} {words}")
    console.print(
        _metrics([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    )
    asked, batch = nodes["policy"].config["training"]["pairs_per_step"], int(stats["batch"])
    unit = OBJECTIVE_KINDS[nodes["policy"].config["objective"]["kind"]].unit
    whole = batch < asked * (2 if unit == "example" else 1)
    console.print(
        f"{stats['steps']:,.0f} steps of {batch:,} {'pairs' if unit == 'pair' else 'examples'}"
        + f", which are all there are (config.training.pairs_per_step is {asked:,})" * whole,
        soft_wrap=True,
    )
    if stats.get("seconds_steady"):
        speed, padding = (
            stats["tokens_steady"] / stats["seconds_steady"],
            1 - stats["filled"] / stats["positions"],
        )
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
    if "reference" in nodes:
        console.print(f"Reference table: {workspace.path(nodes['reference'])}", soft_wrap=True)
    console.print(
        f"Metrics: {folder / 'metrics.jsonl'}\nPolicy: {folder / 'policy'}", soft_wrap=True
    )
    if (folder / "adapter").exists():
        console.print(f"Adapter: {folder / 'adapter'}", soft_wrap=True)


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
