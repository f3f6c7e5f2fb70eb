"""The tables of a dry run: what is missing of every stage, and what making it will take."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from deltapref_jax.artifacts.node import Node, first_of_equals, in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.devices import Devices
from deltapref_jax.files import remote
from deltapref_jax.mesh import rows_of
from deltapref_jax.progress import say
from deltapref_jax.stages.micro_batches import choose_row_length
from deltapref_jax.stages.students import Page
from deltapref_jax.stages.train import Policy
from launch.cost import Cost, Estimate, Estimator, described_alone
from launch.workload import step_line, step_of

_STAGES = (
    "prompts",
    "sample",
    "verify",
    "judge",
    "judge_mean",
    "audit",
    "retest",
    "tokens",
    "score",
    "pair",
    "train",
    "evaluate",
    "tune",
    "report",
    "recipe",
    "students",
)  # in the order of the flow


@dataclasses.dataclass
class Row:
    """One artifact of the plan.

    Attributes:
      node: the artifact.
      key: "" while an input is missing, whose contents the key hashes.
      there: whether it is complete.
      same_as: an earlier node that is the same artifact, such as the pairs of two arms.
      estimate: None of what is there, and of what is the same as another.
    """

    node: Node
    key: str
    there: bool
    same_as: Node | None
    estimate: Estimate | None


def assumed_line(devices: Devices) -> str:
    """Says which devices a dry run assumes."""
    memory = "" if devices.platform == "cpu" else " with room for every model"
    return (
        f"Assumed: {devices.layout}{memory}; a dry run joins no job and starts no device. "
        "--devices states others."
    )


def show_alone(console: Console, goal: Node) -> None:
    """Prints which models of the plan are described by their config.json alone, if any."""
    if alone := described_alone(goal):
        say(
            console,
            f"Planned by config.json alone: {', '.join(alone)}; a run needs their weights and "
            "tokenizers.",
        )


def plan_rows(goal: Node, workspace: Workspace, cost: Callable[[Node], Estimate]) -> list[Row]:
    """A row per node; equal nodes, whose artifacts will be one, are counted once."""
    rows: list[Row] = []
    for node, first in first_of_equals(in_order([goal])).items():
        same_as = None if first is node else first
        key = workspace.key(node) or ""
        there = bool(key) and workspace.complete(node)
        estimate = None if there or same_as else cost(node)
        rows.append(Row(node, key, there, same_as, estimate))
    return rows


def show_plan(
    console: Console,
    report: Page,
    workspace: Workspace,
    every: bool = False,
    platform: str = "cpu",
) -> None:
    """Prints the plan of a study, and what its numbers rest on.

    Raises:
      ArtifactError: something is missing, and the workspace cannot be written.

    Args:
      console: where to.
      report: of the study.
      workspace: where artifacts are looked up.
      every: a row per artifact too, before those per stage.
      platform: of the devices that are assumed.
    """
    cost = Cost(report, workspace, platform)
    rows = plan_rows(report, workspace, cost)
    console.print(f"{report.experiment.name}: {report.experiment.question}", highlight=False)
    if every:
        console.print(_artifact_table(rows))
        console.print("")
    missing = [row for row in rows if not row.same_as and not row.there]
    show_rows(console, rows, workspace, cost, [*_token_notes(missing), *_step_notes(missing)])


def show_rows(
    console: Console,
    rows: Sequence[Row],
    workspace: Workspace,
    cost: Estimator,
    notes: Iterable[str],
) -> None:
    """Prints a row per stage of which something is missing, and what the numbers rest on.

    Raises:
      ArtifactError: something is missing, and the workspace cannot be written.

    Args:
      console: where to.
      rows: of the plan.
      workspace: where artifacts are looked up.
      cost: that the rows' estimates are from.
      notes: what tokens rest on, and how full the training steps are.
    """
    distinct = [row for row in rows if not row.same_as]
    missing = [row for row in distinct if not row.there]

    if not missing:
        notes = [f"All {len(distinct)} artifacts are in {workspace.root}; nothing is to be made."]
    else:
        workspace.check_writable()
        console.print(_stage_table(distinct))
        console.print("")
        notes = _notes(distinct, missing, workspace, cost, notes)
    for sentence in notes:
        console.print(sentence, highlight=False)


def _table(*names: str) -> Table:
    """An empty table that fits 80 columns; all columns but the first hold numbers."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in names:
        justify: Literal["left", "right"] = "left" if name == names[0] else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def _stage_table(rows: Sequence[Row]) -> Table:
    """A row per stage of which something is missing, and their sum."""
    table = _table("stage", "missing", "items", "tokens", "FLOPs", "memory", "disk", "time")
    total = 0
    for stage in _STAGES:
        of_stage = [row for row in rows if row.node.stage == stage]
        estimates = [row.estimate for row in of_stage if row.estimate]
        if estimates:
            items = sum(e.work.items for e in estimates)
            unit = estimates[0].work.unit if items > 1 else estimates[0].work.unit.rstrip("s")
            table.add_row(
                stage,
                f"{len(estimates)} of {len(of_stage)}",
                f"{items:,} {unit}",
                *_cells(estimates),
            )
        total += len(estimates)
    table.add_section()
    everything = [row.estimate for row in rows if row.estimate]
    table.add_row("in all", f"{total} of {len(rows)}", "", *_cells(everything))
    return table


def _artifact_table(rows: Sequence[Row]) -> Table:
    """A row per node."""
    table = _table("artifact", "key", "items", "tokens", "disk", "time")
    for column in table.columns[:2]:
        column.no_wrap, column.overflow, column.justify = False, "fold", "left"
    table.columns[1].min_width = 16
    for row in rows:
        key = row.key or (f"as {row.same_as.name}" if row.same_as else "?")
        if row.estimate:
            tokens, _, _, disk, time = _cells([row.estimate])
            table.add_row(row.node.name, key, f"{row.estimate.work.items:,}", tokens, disk, time)
        else:
            table.add_row(row.node.name, key, "there" if row.there else "")
    return table


def _cells(estimates: Sequence[Estimate]) -> list[str]:
    """Tokens, FLOPs, memory, disk and time of several artifacts; "?" is not known."""
    read = [e for e in estimates if e.tokens]
    sign = "≈" if all(e.measured for e in read) else "≤"
    tokens = sum(e.tokens for e in read)
    memory = max(e.memory for e in estimates)
    seconds = [e.seconds for e in estimates]
    known = sum(s for s in seconds if s is not None)
    time = _time(known) if known else ""
    if None in seconds:
        time = f"{time} + ?" if known else "?"
    return [
        f"{sign} {_short(tokens)}" if tokens else "",
        _short(sum(e.flops for e in estimates)) if tokens else "",
        short_bytes(memory) if memory else "",
        short_bytes(sum(e.disk for e in estimates)),
        time,
    ]


def _notes(
    rows: Sequence[Row],
    missing: Sequence[Row],
    workspace: Workspace,
    cost: Estimator,
    notes: Iterable[str],
) -> Iterable[str]:
    """What the numbers are and rest on, one sentence each."""
    complete = {
        stage: sum(row.there for row in rows if row.node.stage == stage) for stage in _STAGES
    }
    whole = [s for s, n in complete.items() if n and n == sum(r.node.stage == s for r in rows)]
    if whole:
        yield f"Complete: {', '.join(f'{stage} ({complete[stage]})' for stage in whole)}."
    behind = sum(not row.key for row in missing)
    if behind:
        yield (
            f"Of the {len(missing)} missing artifacts {behind} are made from others that are "
            "missing; until these are made it is not known whether some of them are there."
        )
    estimates = [row.estimate for row in missing if row.estimate]
    yield from notes
    if any(e.tokens for e in estimates):
        yield (
            "FLOPs: of matrix products, by formula from each model's config.json. Memory: of one "
            "device, by formula: weights, gradients, moments, cache, and an estimate of "
            "activations; the largest artifact counts, and a mesh axis of -1 as one device."
        )
    yield (
        "Disk: policies and checkpoints by formula, tables by rows, at the size of finished "
        "ones' rows or else of the quickstart's."
    )
    yield _time_note([row for row in missing if row.estimate], cost)
    yield _disk_note(sum(e.disk for e in estimates), workspace)


def _token_notes(missing: Sequence[Row]) -> Iterable[str]:
    """What the numbers of tokens of a study are."""
    read = [row.estimate for row in missing if row.estimate and row.estimate.tokens]
    if any(not e.measured for e in read):
        yield (
            "Tokens: ≤, if every prompt, trace and row is as long as the config allows and "
            "nothing is dropped."
        )
    if any(e.measured for e in read):
        yield "Tokens: ≈, by the mean length in finished artifacts; nothing is dropped."


def _step_notes(missing: Sequence[Row]) -> Iterable[str]:
    """How full the training steps are, one sentence for each kind of objective."""
    found: dict[str, str] = {}
    for row in missing:
        node = row.node
        if isinstance(node, Policy) and node.objective.kind not in found and row.estimate:
            sizes = {axis: max(1, n) for axis, n in dataclasses.asdict(node.mesh).items()}
            work, t, measured = row.estimate.work, node.training, row.estimate.measured
            length = round(row.estimate.tokens / work.sequences) if measured else work.longest
            shapes = (rows_of(t.rows, sizes), t.row_length or choose_row_length([work.longest]))
            t = dataclasses.replace(t, rows=shapes[0], row_length=shapes[1])
            step = step_of(t, node.objective, length, sizes, measured)
            found[node.objective.kind] = step_line(node.objective.kind, step, sizes, measured)
    return found.values()


def _time_note(missing: Sequence[Row], cost: Estimator) -> str:
    unknown = dict.fromkeys(
        row.node.stage for row in missing if row.estimate and row.estimate.seconds is None
    )
    rates = cost.rates
    known = (
        f"Time: at the rates of {rates.artifacts} finished artifacts in the workspace, made on "
        f"{rates.machine}, by stage and size of model, for one runner"
    )
    if not unknown:
        return known + "."
    if not rates.artifacts:
        return "Time: rate unknown, since the workspace has no finished artifact."
    which = ", ".join(stage for stage in _STAGES if stage in unknown)
    return f"{known}; rate unknown (?) of {which}, of which none of the size is finished."


def _disk_note(needed: float, workspace: Workspace) -> str:
    if remote(workspace.root):
        return f"About {short_bytes(needed)} will be written to {workspace.root}."
    place = Path(workspace.root).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = f"About {short_bytes(needed)} will be written to {workspace.root}"
    if needed > free:
        return (
            f"{wanted}, where only {short_bytes(free)} are free: free some, or choose another "
            "place with --config.workspace=…"
        )
    return f"{wanted}, where {short_bytes(free)} are free."


def _short(number: float) -> str:
    """Two or three digits and a prefix, such as 1.2M."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            break
        number, prefix = number / 1000, "Z"
    return f"{_digits(number)}{prefix}"


def short_bytes(number: float) -> str:
    """Returns two or three digits and a unit, such as 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 999.5:
            break
        number, unit = number / 1024, "PiB"
    return f"{_digits(number)} {unit}"


def _digits(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 and number != round(number) else f"{number:.0f}"


def _time(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.4 h or 2.5 days."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
