"""Makes preference pairs and their data card from generators, prompts and a budget.

    python -m launch.recipe --config=configs/quickstart.py --out=pairs.parquet [--dry_run]
        [--study=workspace/by_name/quickstart/report] [--traces=400 | --flops=1e13]

It measures the generators on the config's suites, lets the two with the widest gap answer the
prompts, has every judge rate the traces, and writes the pairs that are worth keeping in TRL's
columns, with a card of the same name beside them (pairs.md). No student is trained; arms, claims
and training of the config are not read. Everything is an artifact of the workspace: a study of the
same config makes none of it again. --study names what the choice of pairs rests on.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from deltapref_jax.artifacts.runner import run, say_made
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Arm, ConfigError, Experiment, domains_of
from deltapref_jax.display import count
from deltapref_jax.progress import plain_console, say
from deltapref_jax.validation import validate
from launch.flags import define_initialization_timeout, run_main

if TYPE_CHECKING:
    from deltapref_jax.analysis.proposal import Evidence, GeneratorPair
    from deltapref_jax.stages.recipe import DataCard
    from deltapref_jax.stages.report import Report
    from launch.budget import Budget
    from launch.cost import Cost

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file with get_config().")
_OUT = flags.DEFINE_string("out", None, "File of the pairs; .parquet or .jsonl.")
_STUDY = flags.DEFINE_string(
    "study", "", "Folder of a finished study's page (with summary.json), or that file: evidence."
)
_TRACES = flags.DEFINE_integer(
    "traces",
    None,
    "Traces to sample at most, for which fewer prompts are answered; without a budget all are.",
    lower_bound=1,
)
_FLOPS = flags.DEFINE_float(
    "flops",
    None,
    "FLOPs at most, by formula and as if all sequences were as long as the config allows, of "
    "measuring the generators, sampling, judging, audits and retests.",
    lower_bound=1.0,
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and its cost, and make nothing.")
_TIMEOUT = define_initialization_timeout()


def main(_: list[str]) -> None:
    """Measure the generators, propose, make the pairs and the card, write both."""
    if not isinstance(_CONFIG.value, Experiment):
        validate(_CONFIG.value)  # refuses it
    from deltapref_jax.analysis.proposal import ARM, Proposal, evidence_lines, select_by
    from deltapref_jax.artifacts.lease import release_all
    from deltapref_jax.data.export import check_output
    from deltapref_jax.devices import assumed_devices, attached_devices
    from deltapref_jax.preemption import install_group_shutdown
    from deltapref_jax.processes import process_index, start_processes
    from deltapref_jax.stages.recipe import at_most, card_of, without_student
    from deltapref_jax.stages.study import plan
    from launch.budget import sizes
    from launch.cost import Cost, check_prompts
    from launch.dry_run import show_plan

    e = validate(without_student(_CONFIG.value))
    out, dry = str(_OUT.value), _DRY_RUN.value
    check_output(out)
    _check(e)
    evidence = _evidence(_STUDY.value)
    selection = select_by(evidence, e.judges)
    if dry:
        devices = assumed_devices("")
    else:
        start_processes(_TIMEOUT.value)
        install_group_shutdown(release_all)
        devices = attached_devices()
    workspace = Workspace(e.workspace)
    measuring = plan(e, None, devices, weights=not dry)
    # Judges are retested on pairs: those of any two generators cost the same at most.
    any_two = Arm(ARM, e.generators[0].name, e.generators[1].name)
    costed = plan(dataclasses.replace(e, arms=(any_two,)), None, devices, weights=False)
    cost = Cost(costed, workspace)
    budget, questions = _budget(costed, cost), sizes(e.prompts)
    if budget:
        least = next(n for n in itertools.count(1) if round(selection.fraction * n) >= 1)
        budget.check(least, sum(questions))
        room = budget.prompts(*budget.dearest)
        if room < sum(questions):
            at_most(e.prompts, questions, room)
    check_prompts(measuring, workspace)
    console = plain_console()
    results = [node for tables in measuring.capability.values() for node in tables.values()]
    study = f"{e.name}-recipe"
    made = [] if dry else run(results, workspace, study)
    generators = _generators(measuring, workspace, cost, budget)
    prompts, about = e.prompts, "no budget was given, and all prompts of the config are answered"
    if budget:
        room = budget.prompts(*generators[:2])
        share = f"{min(room, sum(questions)):,} of the config's {sum(questions):,} prompts"
        about = f"{budget.flag} {budget.most:g} {budget.unit} has room for {share}"
        if room < sum(questions):
            prompts = at_most(e.prompts, questions, room)
    proposal = Proposal(generators, selection, evidence_lines(evidence), about)
    planned = dataclasses.replace(e, prompts=prompts, arms=(proposal.arm,))
    report = plan(validate(planned), None, devices, weights=not dry)
    card = card_of(report, proposal)
    if process_index() == 0:
        if _CONFIG.value.arms:
            say(console, "The config's arms, objectives, claims and training are not read.")
        _say_proposal(console, proposal.generators.why, selection.why, about, evidence)
    if dry:
        show_plan(console, card, workspace, platform=devices.platform)
        return
    made += run([card], workspace, study)
    say_made([card], made, workspace)
    if process_index() == 0:
        _write(console, workspace, card, out)


def _check(e: Experiment) -> None:
    """Refuses a config of which no pair can be made, and two budgets.

    Raises:
      ConfigError: one sentence.
    """
    if len(e.generators) < 2:
        raise ConfigError(
            f"config.generators has {count(len(e.generators), 'generator')}, and a pair needs a "
            "chosen and a rejected trace of two; add generators that are further apart."
        )
    if not domains_of(e.suites):
        raise ConfigError(
            "config.suites is empty, and the generators are chosen by what they get right; add a "
            "suite of questions that can be checked."
        )
    if _TRACES.value and _FLOPS.value:
        raise ConfigError(
            f"--traces is {_TRACES.value} and --flops {_FLOPS.value:g}; give one budget."
        )


def _evidence(path: str) -> "Evidence | None":
    """What --study says, if it is given.

    Raises:
      ConfigError: there is no summary, or it is none.
    """
    from etils import epath

    from deltapref_jax.analysis.proposal import read_evidence

    if not path:
        return None
    file = epath.Path(path)
    file = file if file.name.endswith(".json") else file / "summary.json"
    if not file.exists() or file.is_dir():
        raise ConfigError(
            f"--study is {path!r}, where there is no summary.json; give the folder of a study's "
            "page, such as workspace/by_name/quickstart/report."
        )
    return read_evidence(file.read_bytes().decode(errors="replace"), str(file))


def _budget(report: "Report", cost: "Cost") -> "Budget | None":
    """The budget of --traces or --flops; None without one."""
    from launch.budget import Budget, fixed_flops, flops_of_prompt

    if _TRACES.value:
        samples = {g.name: float(g.samples) for g in report.experiment.generators}
        return Budget(_TRACES.value, "--traces", "traces", 0.0, samples)
    if _FLOPS.value:
        of_prompt = flops_of_prompt(report, cost)
        return Budget(_FLOPS.value, "--flops", "FLOPs", fixed_flops(report, cost), of_prompt)
    return None


def _generators(
    report: "Report", workspace: Workspace, cost: "Cost", budget: "Budget | None"
) -> "GeneratorPair":
    """The two generators to take; in a dry run before they were measured, the two dearest.

    Raises:
      ConfigError: no two of them are shown to differ.
    """
    from deltapref_jax.analysis.proposal import GeneratorPair, choose_generators
    from deltapref_jax.stages.recipe import capabilities
    from launch.budget import Budget, flops_of_prompt

    flops = flops_of_prompt(report, cost)
    results = [node for tables in report.capability.values() for node in tables.values()]
    if not all(map(workspace.complete, results)):
        a, b = (budget or Budget(0, "", "", 0, flops)).dearest
        why = f"not known before they are measured; the plan is that of {a} and {b}, whose traces "
        return GeneratorPair(a, b, f"{why}take most")
    domain = domains_of(report.experiment.suites)[0]
    return choose_generators(capabilities(workspace, report), domain, flops)


def _say_proposal(
    console: Console, generators: str, selection: str, budget: str, evidence: "Evidence | None"
) -> None:
    say(console, f"Generators: {generators}.")
    say(console, f"Pairs: {selection}.")
    say(console, f"Budget: {budget}.")
    if evidence is None:
        say(console, "No study: these are the paper's defaults and not measured here (--study).")


def _write(console: Console, workspace: Workspace, card: "DataCard", out: str) -> None:
    """The pairs, and their card beside them."""
    from etils import epath

    from deltapref_jax.data.export import write_rows
    from deltapref_jax.files import write_atomic
    from deltapref_jax.stages.export import arm_rows

    arm = card.proposal.arm
    rows: Sequence[dict] = arm_rows(workspace, card, arm)
    write_rows(rows, out)
    beside = epath.Path(out).with_suffix(".md")
    write_atomic(beside, (workspace.path(card) / "card.md").read_bytes())
    say(console, f"{count(len(rows), 'pair')}: {out}")
    say(console, f"Data card: {beside}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    run_main(main, listed=Experiment)
