"""report: everything a study made, to one page and one summary."""

import json

import pyarrow as pa

from deltapref_jax.analysis.report import draw, render
from deltapref_jax.analysis.study import Study
from deltapref_jax.analysis.summary import summarise
from deltapref_jax.config import DIMENSIONS
from deltapref_jax.judging.rubric import RUBRIC
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.workspace import Job

VERSION = 8


def _by_first(tables: dict[str, pa.Table]) -> dict[str, dict[str, pa.Table]]:
    """`a/b` → table as a → b → table."""
    found: dict[str, dict[str, pa.Table]] = {}
    for name, table in tables.items():
        first, second = name.split("/", 1)
        found.setdefault(first, {})[second] = table
    return found


def report(job: Job) -> None:
    """Every artifact of the study to report.html, summary.json, and each figure as an SVG file."""
    results = job.tables("evaluate")
    student = results.pop("student", None)
    trained = [name.removeprefix("train/") for name in job.node.inputs if name.startswith("train/")]
    study = Study(
        experiment=json.loads(json.dumps(job.config["experiment"])),
        prompts=job.table("prompts"),
        suites=job.tables("suite"),
        traces=job.tables("sample"),
        verdicts=job.tables("verify"),
        ratings=_by_first(job.tables("judge")),
        audits=job.tables("audit"),
        pairs=job.tables("pair"),
        results=_by_first(results),
        student=student,
        capability=job.tables("capability"),
        metrics={
            name: list(read_metrics(job.here(f"train/{name}", "metrics.jsonl"))) for name in trained
        },
        manifests={name: job.workspace.manifest(node) for name, node in job.node.inputs.items()},
    )
    summary = summarise(study)
    figures = draw(study, summary)
    rubric = {d: RUBRIC.question(d) for d in DIMENSIONS}
    for name, svg in figures.items():
        job.put(f"{name}.svg", svg.encode())
    job.put("report.html", render(study, summary, figures, rubric).encode())
    job.put("summary.json", (json.dumps(summary, indent=1) + "\n").encode())
