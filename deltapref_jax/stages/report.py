"""report: everything a study made, to one page and one summary."""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping

import pyarrow as pa
from etils import epath
from pyarrow import csv

from deltapref_jax.analysis.report import draw, render
from deltapref_jax.analysis.study import ArtifactRecord, Study
from deltapref_jax.analysis.suites import accuracies
from deltapref_jax.analysis.summary import summarise, summary_json
from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.config import ADDED, DIMENSIONS, STUDENT, Experiment, Run, model_of
from deltapref_jax.judging.rubric import RUBRIC
from deltapref_jax.records import SuiteAccuracy, to_table
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.judge_mean import MeanRatingTable
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.retest import RetestTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.score import LogProbTable
from deltapref_jax.stages.tokens import SequenceTable
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.tune import RateTable
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.training.checkpoint import read_metrics


class Report(Node, stage="report", version=18):
    """report.html, summary.json, accuracies.csv, and each figure as an SVG file."""

    experiment: Experiment
    abouts: tuple[str, ...]  # words for the page, which are hashed nowhere else
    suites: Mapping[str, PromptTable]
    prompts: PromptTable
    traces: Mapping[str, TraceTable]  # by generator, as are verdicts, sequences and logprobs
    verdicts: Mapping[str, VerdictTable]
    ratings: Mapping[str, Mapping[str, RatingTable | MeanRatingTable]]  # judge → generator
    sequences: Mapping[str, SequenceTable]
    logprobs: Mapping[str, LogProbTable]
    student: Mapping[str, ResultTable]  # by suite
    capability: Mapping[str, Mapping[str, ResultTable]]  # generator → suite
    audits: Mapping[str, AuditTable]  # by judge, as are the next two
    trace_audits: Mapping[str, AuditTable]
    retests: Mapping[str, RetestTable]
    pairs: Mapping[str, Mapping[int, PairTable]]  # arm → draw
    policies: Mapping[str, Mapping[Run, Policy]]  # arm → run
    results: Mapping[str, Mapping[Run, Mapping[str, ResultTable]]]  # arm → run → suite
    rates: Mapping[str, RateTable] = dataclasses.field(default_factory=dict, metadata=ADDED)

    def make(self, job: Job) -> None:
        """Summarises, draws and renders."""
        study = self.study(job)
        summary = summarise(study)
        figures = draw(study, summary)
        rubric = {dimension: RUBRIC.question(dimension) for dimension in DIMENSIONS}
        for name, figure in figures.items():
            job.write_file(f"{name}.svg", figure.svg.encode())
        table = io.BytesIO()
        rows = accuracies(study, {a.name: a.doubt for a in summary.arms})
        csv.write_csv(to_table(SuiteAccuracy, rows), table)
        job.write_file("accuracies.csv", table.getvalue())
        job.write_file("report.html", render(study, summary, figures, rubric).encode())
        job.write_file("summary.json", summary_json(summary).encode())

    def study(self, job: Job) -> Study:
        """Everything that the page is made from."""
        artifacts = []
        versions: dict[str, dict[str, None]] = {}  # library → its versions in order, each once
        for node in self.inputs().values():
            m = job.workspace.manifest(node)
            artifacts.append(ArtifactRecord(m.stage, node.name, m.key, m.seconds, m.stats))
            for library, version in m.versions.items():
                versions.setdefault(library, {})[version] = None

        results = functools.partial(result_rows, job)
        return Study(
            experiment=self.experiment,
            prompts=job.table(self.prompts),
            suites=job.tables(self.suites),
            traces=job.tables(self.traces),
            verdicts=job.tables(self.verdicts),
            ratings={judge: job.tables(tables) for judge, tables in self.ratings.items()},
            audits=job.tables(self.audits),
            trace_audits=job.tables(self.trace_audits),
            retests=job.tables(self.retests),
            pairs={arm: job.tables(draws) for arm, draws in self.pairs.items()},
            results={arm: results_of_policies(job, runs) for arm, runs in self.results.items()},
            student=results(self.student) if self.student else None,
            capability={
                name: results(tables) for name, tables in self.capability.items() if tables
            },
            metrics={
                arm: {
                    run: list(read_metrics(job.local_input(policy, "metrics.jsonl")))
                    for run, policy in runs.items()
                }
                for arm, runs in self.policies.items()
            },
            pair_counts={
                arm: {draw: job.workspace.manifest(pairs).stats for draw, pairs in draws.items()}
                for arm, draws in self.pairs.items()
            },
            rates=job.tables(self.rates),
            trials={
                objective: {rate: results(tables) for rate, tables in node.results.items()}
                for objective, node in self.rates.items()
            },
            artifacts=artifacts,
            lessons=lessons(self.experiment),
            versions={library: ", ".join(seen) for library, seen in versions.items()},
        )


def result_rows(job: Job, tables: Mapping[str, ResultTable]) -> pa.Table:
    """Rows of `records.Result` of all suites, without texts and answers.

    The page shows none of them, and they are most of what the tables hold.
    """
    return pa.concat_tables(
        table.drop_columns(["text", "answer"]) for table in job.tables(tables).values()
    )


def results_of_policies(
    job: Job, runs: Mapping[Run, Mapping[str, ResultTable]]
) -> dict[Run, pa.Table]:
    """Rows of `records.Result` of every policy of an arm, by the first run that trained it.

    Draws that give equal pairs, such as of top pairs without a tie at the cut, train one policy
    per seed, whose results are one artifact. Counted by draw, it would stand for several trainings
    that agree.

    Args:
      job: of the page.
      runs: run → suite → table; empty where nothing is evaluated.
    """
    first: dict[tuple[int, tuple[str | None, ...]], Run] = {}
    for run, tables in runs.items():
        if tables:
            keys = tuple(job.workspace.key(table) for table in tables.values())
            first.setdefault((run.seed, keys), run)
    return {run: result_rows(job, runs[run]) for run in first.values()}


def lessons(e: Experiment) -> dict[str, list[str] | None]:
    """Families that the student and the generators learnt from, by name.

    A model that this project made has them in `recipe.json`; None where a folder does not say.
    """
    models = {STUDENT: e.student} | {g.name: model_of(e, g.model) for g in e.generators}
    return {name: _tasks(model.path) for name, model in models.items()}


def _tasks(folder: str) -> list[str] | None:
    recipe = epath.Path(folder) / "recipe.json"
    try:
        tasks = json.loads(recipe.read_text())["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
    return list(dict.fromkeys(tasks)) if known else None
