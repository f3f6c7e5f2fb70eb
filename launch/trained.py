"""What a run of launch.train did, for the terminal."""

import json
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import OBJECTIVE_KINDS
from deltapref_jax.stages.tokens import FileSequences
from deltapref_jax.stages.train import Policy

_WORDS = {  # counts of a manifest, in words; those that are zero are not shown
    "read": "rows read",
    "groups": "trained on",
    "same": "of them pairs whose two answers are the same",
    "shared_prompt": "without 'prompt', which is what both answers begin with",
    "empty_prompt": "an empty prompt, kept",
    "merged_prompt": "no token of the prompt stays: it merges with the answer, kept",
    "repeated_prompt": "answers that begin with the whole 'prompt', which is taken out of them",
    "echoed_prompt": "an answer that begins with a prompt of one or two words, kept as it is",
    "text_among_messages": "rows of text (no chat template) in a file that has messages too",
    "one_label": "examples, and all of them have the same label",
    "empty": "an empty answer, dropped",
    "too_long": "longer than row_length, dropped",
    "truncated": "sequences cut to row_length",
    "truncated_to_nothing": "no answer within row_length, dropped",
    "unscored": "nothing to score, dropped",
    "undesirable": "not desirable, left out (SFT)",
    "prompt_not_prefix": "template no prefix, tokenised apart",
    "masked_turns": "tokens of user turns (or of weight 0) inside answers, not trained on",
    "dropped_mismatched": "mismatched rows too long or not given, left out",
    "truncated_mismatched": "mismatched rows cut to row_length",
}


def show(console: Console, workspace: Workspace, policy: Policy) -> None:
    """What was read, left out and cut; the first and the last step; where everything is."""
    sequences = policy.sequences["file"]
    assert isinstance(sequences, FileSequences)
    folder = workspace.path(policy)
    counts, stats = workspace.manifest(sequences).stats, workspace.manifest(policy).stats
    with next(workspace.path(sequences).glob("*.parquet")).open("rb") as file:
        about = {key.decode(): text.decode() for key, text in pq.read_schema(file).metadata.items()}
    console.print(f"Data: {sequences.data.path} ({about['format']})", soft_wrap=True)
    if ignored := json.loads(about["ignored"]):
        console.print(f"  {len(ignored)} columns ignored: {', '.join(ignored)}", soft_wrap=True)
    counts |= {"dropped_mismatched": stats["dropped_mismatched"]}
    for name, words in _WORDS.items():
        if counts.get(name):
            console.print(f"  {counts[name]:,.0f} {words}")
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
