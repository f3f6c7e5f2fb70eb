"""students: the pages of several students, and one page that compares them.

Each student has a whole study of its own (`stages.study`). What does not hang on the student is the
same node in all of them: prompts, traces, verdicts, ratings and pairs are made once.
"""

import dataclasses
import json
import shutil
import urllib.parse
from collections.abc import Collection, Mapping
from typing import Any

from deltapref_jax.analysis.students import (
    StudentResults,
    draw_claims,
    render_students,
    summarise_students,
)
from deltapref_jax.analysis.summary import summary_json
from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, first_of_equals, in_order
from deltapref_jax.artifacts.workspace import file_name
from deltapref_jax.config import ConfigError, Experiment, Run, by_student
from deltapref_jax.devices import Devices
from deltapref_jax.processes import process_index
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.report import Report, result_rows, results_of_policies
from deltapref_jax.stages.study import part_of, plan


class StudentsReport(Node, stage="students", version=2):
    """report.html, summary.json and claims.svg; in pages/, every student's own page and files."""

    experiment: Experiment
    reports: Mapping[str, Report]  # by student, as are the others
    before: Mapping[str, Mapping[str, ResultTable]]  # suite
    after: Mapping[str, Mapping[str, Mapping[Run, Mapping[str, ResultTable]]]]  # arm → run → suite

    def make(self, job: Job) -> None:
        """Compares, draws and renders."""
        summaries: dict[str, dict[str, Any]] = {}
        pages: dict[str, str] = {}
        for name, report in self.reports.items():
            summaries[name] = json.loads(job.local_input(report, "summary.json").read_text())
            pages[name] = urllib.parse.quote(f"pages/{file_name(name)}/report.html")
        with job.output_dir("pages") as folder:
            # On a disk all processes share the folder, and in a bucket each uploads its own.
            for name, report in self.reports.items() if process_index() == 0 else ():
                (folder / file_name(name)).mkdir()
                for file in job.workspace.manifest(report).files:
                    shutil.copy(job.local_input(report, file), folder / file_name(name) / file)
        job.files.append("pages/*/*")
        results = {
            name: StudentResults(
                result_rows(job, suites),
                {arm: results_of_policies(job, runs) for arm, runs in self.after[name].items()},
            )
            for name, suites in self.before.items()
            if suites and self.after[name]
        }
        summary = summarise_students(self.experiment, summaries, results, pages)
        drawn = draw_claims(summary)
        for name, figure in drawn.items():
            job.write_file(f"{name}.svg", figure.svg.encode())
        job.write_file("report.html", render_students(summary, drawn, self.experiment).encode())
        job.write_file("summary.json", summary_json(summary).encode())


Page = Report | StudentsReport


def plan_page(
    e: Experiment,
    profile: tuple[int, int] | None = None,
    devices: Devices | None = None,
    weights: bool = True,
) -> Page:
    """Every artifact of the study of one student or several, as the inputs of its page.

    The labels of what hangs on one of several students begin with "students" and its name. The
    arguments are those of `study.plan`.

    Raises:
      FileNotFoundError, ValueError: a model is not there or cannot be used.
      ConfigError: see `study.plan`; or two students are one model.
    """
    studies = {name: plan(own, profile, devices, weights) for name, own in by_student(e).items()}
    if not e.students:
        return studies[""]
    return _compared(e, _labelled(studies))


def part_of_page(page: Page, arms: Collection[str]) -> Page:
    """The page of some arms, by name, as `study.part_of`."""
    if isinstance(page, Report):
        return part_of(page, arms)
    reports = {name: part_of(report, arms) for name, report in page.reports.items()}
    return _compared(page.experiment, reports)


def reports_of(page: Page) -> Mapping[str, Report]:
    """The study of every student by the student's name; that of the only one by ""."""
    return {"": page} if isinstance(page, Report) else page.reports


def _compared(e: Experiment, reports: Mapping[str, Report]) -> StudentsReport:
    return StudentsReport(
        label=("report",),
        experiment=e,
        reports=reports,
        before={name: report.student for name, report in reports.items()},
        after={name: report.results for name, report in reports.items()},
    )


def _labelled(reports: Mapping[str, Report]) -> dict[str, Report]:
    """The reports, with the student's name in the label of what not all of them have.

    Raises:
      ConfigError: two reports are the same artifact.
    """
    first = first_of_equals(in_order(reports.values()))
    for name, report in reports.items():
        twin = next(other for other, each in reports.items() if first[each] is first[report])
        if twin != name:
            raise ConfigError(
                f"Students {twin!r} and {name!r} are one model; name another, or remove one."
            )
    # A student that is a generator too has its results under two labels.
    behind = [
        {(first[node], node.label) for node in in_order([report])} for report in reports.values()
    ]
    common = set.intersection(*behind)
    renamed: dict[tuple[str, Node], Node] = {}

    def of(student: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: of(student, part) for key, part in value.items()}
        if not isinstance(value, Node) or (first[value], value.label) in common:
            return value
        if (student, value) not in renamed:
            fields = {
                f.name: of(student, getattr(value, f.name)) for f in dataclasses.fields(value)
            }
            fields["label"] = ("students", student, *value.label)
            renamed[student, value] = type(value)(**fields)
        return renamed[student, value]

    return {name: of(name, report) for name, report in reports.items()}
