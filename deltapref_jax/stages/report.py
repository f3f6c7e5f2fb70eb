"""report: everything a study made, to one page and one summary."""

from collections.abc import Mapping

import pyarrow as pa

from deltapref_jax.analysis.report import draw, render
from deltapref_jax.analysis.study import ArtifactRecord, Study
from deltapref_jax.analysis.summary import summarise, summary_json
from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.config import DIMENSIONS, Experiment
from deltapref_jax.judging.rubric import RUBRIC
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.score import LogProbTable
from deltapref_jax.stages.tokens import SequenceTable
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.training.checkpoint import read_metrics


class Report(Node, stage="report", version=9):
    """report.html, summary.json, and each figure as an SVG file."""

    experiment: Experiment
    abouts: tuple[str, ...]  # words for the page, which are hashed nowhere else
    suites: Mapping[str, PromptTable]
    prompts: PromptTable
    traces: Mapping[str, TraceTable]  # by generator, as are verdicts, sequences and logprobs
    verdicts: Mapping[str, VerdictTable]
    ratings: Mapping[str, Mapping[str, RatingTable]]  # judge → generator
    sequences: Mapping[str, SequenceTable]
    logprobs: Mapping[str, LogProbTable]
    student: Mapping[str, ResultTable]  # by suite
    capability: Mapping[str, Mapping[str, ResultTable]]  # generator → suite
    audits: Mapping[str, AuditTable]  # by judge
    pairs: Mapping[str, PairTable]  # by arm
    policies: Mapping[str, Mapping[int, Policy]]  # arm → seed
    results: Mapping[str, Mapping[int, Mapping[str, ResultTable]]]  # arm → seed → suite

    def make(self, job: Job) -> None:
        """Summarises, draws and renders."""
        study = self.study(job)
        summary = summarise(study)
        figures = draw(study, summary)
        rubric = {dimension: RUBRIC.question(dimension) for dimension in DIMENSIONS}
        for name, svg in figures.items():
            job.write_file(f"{name}.svg", svg.encode())
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

        def results(tables: Mapping[str, ResultTable]) -> pa.Table:
            # The page shows no answers, and their texts are most of what the tables hold.
            return pa.concat_tables(
                table.drop_columns(["text", "answer"]) for table in job.tables(tables).values()
            )

        return Study(
            experiment=self.experiment,
            prompts=job.table(self.prompts),
            suites=job.tables(self.suites),
            traces=job.tables(self.traces),
            verdicts=job.tables(self.verdicts),
            ratings={judge: job.tables(tables) for judge, tables in self.ratings.items()},
            audits=job.tables(self.audits),
            pairs=job.tables(self.pairs),
            results={
                arm: {seed: results(tables) for seed, tables in seeds.items() if tables}
                for arm, seeds in self.results.items()
            },
            student=results(self.student) if self.student else None,
            capability={
                name: results(tables) for name, tables in self.capability.items() if tables
            },
            metrics={
                arm: {
                    seed: list(read_metrics(job.local_input(policy, "metrics.jsonl")))
                    for seed, policy in seeds.items()
                }
                for arm, seeds in self.policies.items()
            },
            pair_counts={
                arm: job.workspace.manifest(pairs).stats for arm, pairs in self.pairs.items()
            },
            artifacts=artifacts,
            versions={library: ", ".join(seen) for library, seen in versions.items()},
        )
