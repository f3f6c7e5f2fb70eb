"""Runs a delta study: every artifact of the config that is not there yet, then the page.

    python -m launch.ablate --config=configs/quickstart.py [--dry_run [--all_rows]] [--verify]
        [--only=GLOB,…] [--config.training.steps=60 …] [--config.generators[weak].temperature=0.7]

Several runners may work in one workspace: each takes what is ready and not held by another. Arms
can be watched while they train: --config.trackers="('tensorboard',)", --profile_steps=10:12.
"""

import contextlib
import fnmatch
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from deltapref_jax.artifacts.node import Node, distinct, in_order
from deltapref_jax.artifacts.runner import run, say_made
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError, Experiment, domains_of, quantised_sentence
from deltapref_jax.display import count
from deltapref_jax.files import ArtifactError
from deltapref_jax.progress import plain_console, say
from deltapref_jax.validation import validate
from launch.flags import (
    check_dry_run,
    define_dry_run,
    define_initialization_timeout,
    define_profile_steps,
    run_main,
    window,
)

if TYPE_CHECKING:
    from deltapref_jax.stages.evaluate import ResultTable
    from deltapref_jax.stages.report import Report
    from deltapref_jax.stages.students import Page

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file with get_config().")
_DRY_RUN, _DEVICES = define_dry_run()
_ALL_ROWS = flags.DEFINE_bool("all_rows", False, "With --dry_run: a row per artifact too.")
_ONLY = flags.DEFINE_string(
    "only",
    None,
    "Run these arms alone: names or patterns, such as dpo-*,kto-top. The others keep their part in "
    "what arms share, so that artifacts are those of the whole study.",
)
_VERIFY = flags.DEFINE_bool("verify", False, "Check the checksums of everything that stands.")
_PROFILE = define_profile_steps()
_TIMEOUT = define_initialization_timeout()


def main(_: list[str]) -> None:
    """Validate, plan, make, show."""
    e: Experiment = validate(_CONFIG.value)
    arms = _arms(e, _ONLY.value)
    profile = window(_PROFILE.value)
    check_dry_run(_DRY_RUN.value, _DEVICES.value)
    # JAX is imported only now, so that a wrong flag or config is refused at once
    from deltapref_jax.artifacts.lease import release_all
    from deltapref_jax.cluster import unused_variables
    from deltapref_jax.devices import assumed_devices, attached_devices
    from deltapref_jax.preemption import install_group_shutdown
    from deltapref_jax.processes import process_index, start_processes
    from deltapref_jax.stages.meshes import mesh_lines
    from deltapref_jax.stages.students import part_of_page, plan_page, reports_of

    if _DRY_RUN.value:  # A job would be joined only when all of its hosts run the command.
        from launch.dry_run import assumed_line, show_alone, show_plan

        devices = assumed_devices(_DEVICES.value)
    else:
        start_processes(_TIMEOUT.value)
        install_group_shutdown(release_all)
        devices = attached_devices()
    workspace = Workspace(e.workspace)
    # Meshes that do not fit the devices are refused here, before anything is made.
    whole = plan_page(e, profile, devices, weights=not _DRY_RUN.value)
    report = whole if arms is None else part_of_page(whole, arms)
    console = plain_console()
    if _DRY_RUN.value:
        say(console, assumed_line(devices))
    if process_index() == 0:
        if not _DEVICES.value and (unused := unused_variables()):
            console.print(unused, soft_wrap=True, markup=False, highlight=False)
        if quantised := quantised_sentence(report.experiment):
            say(console, quantised)
        meshes = {
            name: mesh_lines(own.experiment, devices) for name, own in reports_of(report).items()
        }
        first = next(iter(meshes.values()))
        alike = all(lines == first for lines in meshes.values())
        for name, lines in {"": first}.items() if alike else meshes.items():
            say_of(console, name, lines)
    if _DRY_RUN.value:
        from launch.cost import check_prompts

        show_alone(console, report)
        show_plan(console, report, workspace, _ALL_ROWS.value, devices.platform)
        check_prompts(report, workspace)
        return
    complete = say_standing(workspace, report)
    # what the arms train on comes first, so that what they can show is said before they train
    others = [] if arms is None else _standing(workspace, whole)
    make = functools.partial(
        run, workspace=workspace, study=e.name, verify=_VERIFY.value, also_named=others
    )
    made = make(_before_training(report))
    if process_index() == 0:
        for name, own in reports_of(report).items():
            say_of(console, name, _detectable(workspace, own))
    made += make([report])
    if made or not complete:
        say_made([report], made, workspace)
    if process_index() == 0:
        _show(console, workspace, report)


def _arms(e: Experiment, patterns: str | None) -> list[str] | None:
    """Names of the arms that --only chooses, in the config's order; None without the flag.

    Raises:
      ConfigError: a pattern matches no arm, or there is none.
    """
    if patterns is None:
        return None
    if not patterns.strip():
        raise ConfigError(
            "--only is empty; name arms or patterns, such as --only=dpo-*,kto-top, or leave it out "
            "to run all arms."
        )
    names = [arm.name for arm in e.arms]
    chosen: set[str] = set()
    for pattern in patterns.split(","):
        name = pattern.strip()
        matched = [name] if name in names else fnmatch.filter(names, name)
        if not matched:
            known = f"the study has {', '.join(map(repr, names))}" if names else "it has no arms"
            raise ConfigError(f"--only has {name!r}, which matches no arm; {known}.")
        chosen |= set(matched)
    return [name for name in names if name in chosen]


def _standing(workspace: Workspace, report: Node) -> list[Node]:
    """Artifacts of the whole study that stand, so that its index keeps them."""
    standing = []
    for node in in_order([report]):
        # what is damaged is said when it is wanted
        with contextlib.suppress(ArtifactError):
            if workspace.complete(node):
                standing.append(node)
    return standing


def _before_training(report: Node) -> list[Node]:
    """Every node of the study that no policy is behind, but for pages."""
    from deltapref_jax.stages.report import Report
    from deltapref_jax.stages.train import Policy

    return [
        node
        for node in in_order([report])
        if node is not report
        and not isinstance(node, Report)
        and not any(isinstance(n, Policy) for n in in_order([node]))
    ]


def say_of(console: Console, student: str, sentences: Iterable[str]) -> None:
    """Says something of one of several students, or of the only one, whose name is ""."""
    for sentence in sentences:
        say(console, f"Student {student}: {sentence}" if student else sentence)


def say_standing(workspace: Workspace, report: Node) -> bool:
    """Of a run that continues: how many artifacts of every stage stand.

    Returns:
      Whether all stand.
    """
    from deltapref_jax.processes import process_index
    from deltapref_jax.progress import log

    if process_index() != 0:
        return False
    nodes = distinct([report])
    of_stage = Counter(node.stage for node in nodes)
    standing = Counter(node.stage for node in nodes if workspace.complete(node))
    if standing:
        counts = ", ".join(
            f"{stage} {standing[stage]} of {number}" for stage, number in of_stage.items()
        )
        log(f"{standing.total()} of {count(len(nodes), 'artifact')} stand: {counts}", always=True)
    return standing.total() == len(nodes)


def _detectable(workspace: Workspace, report: "Report") -> Iterator[str]:
    """Before the arms train: the smallest change that this set-up is expected to show."""
    import pyarrow as pa

    from deltapref_jax.analysis.findings import DOMAIN_WORDS
    from deltapref_jax.analysis.noise import MOST, planned

    if not report.student:
        return

    def results(tables: Mapping[str, "ResultTable"]) -> pa.Table:
        return pa.concat_tables(workspace.table(node) for node in tables.values())

    student = results(report.student)
    others = {name: results(tables) for name, tables in report.capability.items() if tables}
    sizes = {d: planned(student, others, d) for d in domains_of(report.experiment.suites)}
    changes = ", ".join(
        f"{f'{size:.1f} points' if size <= MOST else 'none'} {DOMAIN_WORDS[d]}"
        for d, size in sizes.items()
    )
    yield (
        f"Expected smallest detectable change of an arm: {changes} (80% power, one comparison "
        "alone at a two-sided 5%, paired as the most similar generator; without the noise of "
        "training)."
    )


def _retokenised(workspace: Workspace, report: "Report") -> Iterator[str]:
    """How many traces would have had other tokens had their text been read again."""
    stats = [workspace.manifest(node).stats for node in report.sequences.values()]
    differently = sum(s["retokenised_differently"] for s in stats)
    if differently:
        yield (
            f"{differently:,.0f} of {count(sum(s['traces'] for s in stats), 'trace')} would have "
            "other tokens were their text read again. That is no fault: a model may sample a "
            "spelling that its tokenizer would not choose, and traces are scored and trained on as "
            "the tokens that were sampled."
        )


def say_policies(console: Console, workspace: Workspace, reports: Mapping[str, "Report"]) -> None:
    """The folder of every policy, by student, arm and run (seed, and draw where not 0)."""
    table = Table()
    for name in (*["student"] * any(reports), "arm", "run", "folder"):
        table.add_column(name, overflow="fold")
    for student, report in reports.items():
        for arm, runs in report.policies.items():
            for key, policy in runs.items():
                folder = workspace.path(policy).relative_to(workspace.root) / "policy"
                table.add_row(*[student] * bool(student), arm, str(key), str(folder))
    if table.rows:
        # A table's title would be wrapped at the table's width.
        console.print(f"Policies in {workspace.root}:", soft_wrap=True)
        console.print(table)


def _show(console: Console, workspace: Workspace, report: "Page") -> None:
    from deltapref_jax.analysis.report import terminal_table
    from deltapref_jax.analysis.students import students_table
    from deltapref_jax.stages.students import reports_of

    folder, reports = workspace.path(report), reports_of(report)
    summary = json.loads((folder / "summary.json").read_text())
    console.print(students_table(summary) if any(reports) else terminal_table(summary))
    if any(reports):
        for claim in summary["claims"]:
            say(console, f"{claim['what']}: {claim['sentence']}")
    if left_out := summary["left_out"]:
        say(
            console,
            f"{len(left_out)} of {len(report.experiment.arms)} arms were left out by --only; the "
            "page names them.",
        )
    say_policies(console, workspace, reports)
    for name, own in reports.items():
        say_of(console, name, _retokenised(workspace, own))
        if report.experiment.table:
            held = sum(workspace.manifest(n).stats["from_table"] for n in own.logprobs.values())
            say_of(console, name, [f"{held:,.0f} log-probabilities are those of config.table."])
    console.print(f"Page: {folder / 'report.html'}", soft_wrap=True)
    console.print(f"Artifacts by name: {workspace.root / 'index.json'}", soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main, listed=Experiment)
