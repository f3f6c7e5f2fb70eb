"""report: everything a study made, to one page and one summary."""

import json

from deltapref_jax.analysis.report import render
from deltapref_jax.analysis.study import Study, summarise
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.workspace import Job

VERSION = 1


def report(job: Job) -> None:
    """Every artifact of the study to report.html and summary.json."""
    names = list(job.node.inputs)

    def rows(prefix: str) -> dict[str, list[dict]]:
        return {name: t.to_pylist() for name, t in job.tables(prefix).items()}

    ratings: dict[str, dict[str, list[dict]]] = {}
    for name, table in rows("judge").items():
        judge, generator = name.split("/", 1)
        ratings.setdefault(judge, {})[generator] = table
    results: dict[str, dict] = {}
    for name, table in job.tables("evaluate").items():
        if name != "student":
            arm, seed = name.rsplit("/", 1)
            results.setdefault(arm, {})[seed] = table
    trained = [name.removeprefix("train/") for name in names if name.startswith("train/")]
    study = Study(
        experiment=json.loads(json.dumps(job.config["experiment"])),
        prompts=job.table("prompts").to_pylist(), traces=rows("sample"), verdicts=rows("verify"), ratings=ratings,
        audits=rows("audit"), pairs=rows("pair"), results=results,
        student=job.table("evaluate/student") if "evaluate/student" in names else None,
        capability=job.tables("capability"),
        metrics={name: list(read_metrics(job.path(f"train/{name}") / "metrics.jsonl")) for name in trained},
        manifests={name: job.workspace.manifest(node) for name, node in job.node.inputs.items()})
    summary = summarise(study)
    job.put("report.html", render(study, summary).encode())
    job.put("summary.json", (json.dumps(summary, indent=1) + "\n").encode())
