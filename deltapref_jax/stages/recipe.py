"""recipe: pairs without a student, chosen by what was measured, and their data card."""

import dataclasses
from collections.abc import Mapping, Sequence

import pyarrow as pa

from deltapref_jax.analysis.data_card import data_card
from deltapref_jax.analysis.proposal import Proposal
from deltapref_jax.analysis.summary import summarise
from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    TUNING,
    ConfigError,
    Experiment,
    Model,
    Objective,
    Prompts,
    model_of,
)
from deltapref_jax.models.licence import licence
from deltapref_jax.stages.report import Report


class DataCard(Report, stage="recipe", version=1):
    """card.md: what a recipe's pairs are, how they were chosen and what they were made from.

    Its inputs are those of a study's page that need no student, so that a study of the same config
    has the same artifacts.

    Attributes:
      proposal: whose arm is the only one.
      licences: by path of a model, as its own files state them.
    """

    proposal: Proposal
    licences: Mapping[str, str]

    def make(self, job: Job) -> None:
        """Summarises the tables and writes the card."""
        study = self.study(job)
        card = data_card(study, summarise(study), self.proposal, self.licences, job.dir.name)
        job.write_file("card.md", card.encode())


def without_student(e: Experiment) -> Experiment:
    """The config's generators, prompts, judges and suites, without what trains a student.

    Where all other models have a path the student may have none: a generator's stands in for it,
    and is looked at and not trained.
    """
    models = [*(g.model for g in e.generators), *(j.model for j in e.judges if j.kind == "model")]
    student = e.student
    if not student.path and models and all(model.path for model in models):
        student = dataclasses.replace(models[0], quantization="")
    # No rate is tuned, and the questions that would tune one stay out of the training prompts.
    suites = tuple(
        dataclasses.replace(s, readout="accuracy") if s.readout == TUNING else s for s in e.suites
    )
    return dataclasses.replace(
        e,
        student=student,
        reference=Model(),
        table="",
        trackers=(),
        objectives=(Objective(name="dpo"),),
        arms=(),
        suites=suites,
        claims=(),
        shared_by=(),
        shared_strata=(),
        balance="",
    )


def card_of(report: Report, proposal: Proposal) -> DataCard:
    """The data card of a report whose one arm is the proposal's.

    Raises:
      FileNotFoundError: the hub does not give a file that states a model's licence.
    """
    e, arm = report.experiment, proposal.arm
    both = {arm.chosen: None, arm.rejected: None}

    def of_both(tables: Mapping) -> dict:
        return {name: tables[name] for name in both}

    models = [*(g.model for g in e.generators if g.name in both)]
    models += [j.model for j in e.judges if j.kind == "model"]
    parts = {field.name: getattr(report, field.name) for field in dataclasses.fields(Report)} | {
        "label": ("recipe",),
        "traces": of_both(report.traces),
        "verdicts": of_both(report.verdicts),
        "ratings": {judge: of_both(tables) for judge, tables in report.ratings.items()},
        # The others' traces are not sampled.
        "trace_audits": {
            judge: dataclasses.replace(node, traces=of_both(node.traces))
            for judge, node in report.trace_audits.items()
        },
        "sequences": {},
        "logprobs": {},
        "student": {},
        "policies": {},
        "results": {},
    }
    places = dict.fromkeys(model_of(e, model).place for model in models)
    return DataCard(**parts, proposal=proposal, licences={p: licence(p) for p in places})


def capabilities(workspace: Workspace, report: Report) -> dict[str, pa.Table]:
    """Generator to its answers to all suites, once they are complete."""
    return {
        name: pa.concat_tables(workspace.table(node) for node in tables.values())
        for name, tables in report.capability.items()
    }


def at_most(sources: Sequence[Prompts], sizes: Sequence[int], count: int) -> tuple[Prompts, ...]:
    """`sources` with `count` questions in all, in the proportions that they have.

    Args:
      sources: of prompts.
      sizes: questions of every source.
      count: fewer than they have together.

    Raises:
      ConfigError: a source would have none of one of its tasks, or no question at all.
    """
    ends = [round(count * sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes))]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for i, (source, number) in enumerate(zip(sources, counts, strict=True)):
        if number < max(1, len(source.tasks)):
            raise ConfigError(
                f"The budget has room for {count} prompts, of which {number} would be of "
                f"config.prompts[{i}], which needs at least {max(1, len(source.tasks))}; raise "
                "the budget, or take out sources or tasks."
            )
    return tuple(
        dataclasses.replace(source, count=number)
        for source, number in zip(sources, counts, strict=True)
    )
