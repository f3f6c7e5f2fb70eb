"""Several students of one study: whether what was found of one holds for another.

Whether an effect is shown in one student and not in another says nothing about whether they differ.
So every two students are compared by the difference of their effects, which are paired by question:
all students answer the same ones. Their trainings are taken as independent.
"""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from rich.table import Table

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import figures
from deltapref_jax.analysis.claims import claim_about, claim_verdict, claim_words
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.figures import Drawn
from deltapref_jax.analysis.findings import DOMAIN_WORDS, listed, mark_names, no_rungs, points
from deltapref_jax.analysis.page import Measured, MeasuredBy
from deltapref_jax.analysis.report import doubt_caption, render_template
from deltapref_jax.analysis.summary import claim_weights
from deltapref_jax.config import (
    Claim,
    Experiment,
    Run,
    claims_of,
    domains_of,
    quantised_sentence,
)

Key = TypeVar("Key", bound=Hashable)
SummaryJson = Mapping[str, Any]  # content of a student's summary.json


class StudentResults(NamedTuple):
    """Answers of one student, rows of `records.Result`; texts and answers are not needed."""

    before: pa.Table
    after: Mapping[str, Mapping[Run, pa.Table]]  # arm → run


@dataclass
class Difference:
    """An effect in student a minus the same effect in student b."""

    a: str
    b: str
    effect: Measured  # adjusted over the differences of its table
    verdict: str  # of claims: whether they differ


@dataclass
class ClaimByStudent:
    """A comparison that was named before the run, in every student."""

    claim: Claim
    what: str  # in words
    about: str  # what its arms are
    unit: str
    effects: dict[str, Measured]  # by student, adjusted over all claims and students
    verdicts: dict[str, str]  # by student
    differences: list[Difference]  # of every two students
    sentence: str
    # By student, where one rung decides a slope (`claims.RUNG_RULE`): as on the student's own page.
    hangs_on: dict[str, str] = field(default_factory=dict)


@dataclass
class ArmByStudent:
    """The changes of one arm."""

    name: str
    changes: dict[str, MeasuredBy]  # by student and domain, adjusted over all arms too
    differences: dict[str, list[Difference]]  # by domain, likewise


@dataclass
class StudentsSummary:
    """All numbers and sentences of the page of several students."""

    name: str
    question: str
    domains: list[str]
    students: list[str]
    models: dict[str, str]  # path of every student
    pages: dict[str, str]  # of every student, relative to this page
    before: dict[str, dict[str, Any]]  # evaluation of every student before training
    suites: dict[str, dict[str, list[float]]]  # suite → student → accuracy with its interval
    limits: dict[str, dict[str, str]]  # suite → student → "floor", "ceiling" or ""
    claims: list[ClaimByStudent] = field(default_factory=list)
    arms: list[ArmByStudent] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # arms of the config
    doubts: dict[str, str] = field(default_factory=dict)  # by arm, see `page.ArmSummary.doubt`
    unmeasured: list[str] = field(default_factory=list)  # what no interval of the page contains
    quantised: str = ""


Found = Mapping[str, Mapping[str, fx.Effects]]  # domain → student → effects of its arms


def summarise_students(
    e: Experiment,
    summaries: Mapping[str, SummaryJson],
    results: Mapping[str, StudentResults],
    pages: Mapping[str, str],
) -> StudentsSummary:
    """All numbers of the page, and its sentences.

    Args:
      e: the config, with its students.
      summaries: of every student's own page.
      results: of every student; empty where nothing is evaluated.
      pages: path of every student's own page, relative to this one.
    """
    first = next(iter(summaries.values()))
    s = StudentsSummary(
        name=e.name,
        question=e.question,
        domains=domains_of(e.suites),
        students=list(summaries),
        models={student.name: student.model.path for student in e.students},
        pages=dict(pages),
        before={name: of["student"] for name, of in summaries.items() if of["student"]},
        suites={
            suite["suite"]: {
                name: own["accuracy"]["student"]
                for name, of in summaries.items()
                for own in of["suites"]
                if own["suite"] == suite["suite"]
            }
            for suite in first["suites"]
        },
        limits={
            suite["suite"]: {
                name: own["limit"]
                for name, of in summaries.items()
                for own in of["suites"]
                if own["suite"] == suite["suite"]
            }
            for suite in first["suites"]
        },
        left_out=first["left_out"],
        # Pairs are the same for every student, and so is the judge that shaped them.
        doubts={arm["name"]: arm["doubt"] for arm in first["arms"] if arm["doubt"]},
        quantised=quantised_sentence(e),
    )
    if not results:
        return s
    kinds = {
        name: {arm["name"]: Kind(arm["objective"], arm["redrawn"]) for arm in of["arms"]}
        for name, of in summaries.items()
    }
    found = {
        d: {name: fx.effects(r.before, r.after, d, kinds[name]) for name, r in results.items()}
        for d in s.domains
    }
    s.claims = _claims(e, first["ladders"], found)
    for i, claim in enumerate(s.claims):
        claim.hangs_on = hanging(summaries, i)
        claim.what, claim.about = (mark_names(t, s.doubts) for t in (claim.what, claim.about))
    s.arms = _arms(found)
    left_out = {objective: of["left_out"] for objective, of in first["ladders"].items()}
    s.unmeasured = [*no_rungs(left_out), *_unmeasured(s, found)]
    return s


def _claims(
    e: Experiment, ladders: Mapping[str, Mapping[str, Any]], found: Found
) -> list[ClaimByStudent]:
    """The claims of the config in every student; `ladders`: of a student's summary, for all."""
    claims = claims_of(e)
    weights = {}
    for i, claim in enumerate(claims):
        names = next(iter(found[claim.domain].values())).names if claim.domain in found else ()
        rungs = ladders.get(claim.objective, {}).get("rungs", {})
        if weighed := claim_weights(claim, names, rungs):
            weights[i] = weighed
    effects, differences = _compared({i: (claims[i].domain, w) for i, w in weights.items()}, found)
    by_student = []
    for i, claim in enumerate(claims):
        own = {student: m for (j, student), m in effects.items() if j == i}
        between = [
            Difference(a, b, m, difference_verdict(m, claim.margin))
            for (j, a, b), m in differences.items()
            if j == i
        ]
        by_student.append(
            ClaimByStudent(
                claim=claim,
                what=claim_words(claim),
                about=claim_about(claim, e, ladders.get(claim.objective, {}).get("rungs", {})),
                unit="points per 10 points of generator delta"
                if claim.kind == "slope"
                else "points",
                effects=own,
                verdicts={student: claim_verdict(claim, m) for student, m in own.items()},
                differences=between,
                sentence=claim_sentence(claim, own, between),
            )
        )
    return by_student


def hanging(summaries: Mapping[str, SummaryJson], claim: int) -> dict[str, str]:
    """What the students' own pages say of rungs that decide a claim, by student."""
    sentences = {name: of["claims"][claim]["hangs_on"] for name, of in summaries.items()}
    return {name: sentence for name, sentence in sentences.items() if sentence}


def _compared(
    wanted: Mapping[Key, tuple[str, Mapping[str, float]]], found: Found
) -> tuple[dict[tuple[Key, str], Measured], dict[tuple[Key, str, str], Measured]]:
    """Effects of every student, and differences of every two, each adjusted over its table.

    Args:
      wanted: domain, and what the change of every arm counts.
      found: effects of the arms.
    """
    of_all = {d: fx.joint(students) for d, students in found.items()}
    effects, differences = {}, {}
    for key, (d, weights) in wanted.items():
        for student, own in found[d].items():
            # Estimate and interval are those of the student's own page. The draws of several
            # students are joint only where they are made together.
            joint = of_all[d].combined(_named(student, weights))
            effects[key, student] = own.combined(weights)._replace(draws=joint.draws)
        for a, b in itertools.combinations(found[d], 2):
            minus = {arm: -weight for arm, weight in weights.items()}
            between = of_all[d].combined(_named(a, weights) | _named(b, minus))
            differences[key, a, b] = between
    return fx.measured(effects), fx.measured(differences)


def _named(student: str, weights: Mapping[str, float]) -> dict[str, float]:
    return {f"{student}/{arm}": weight for arm, weight in weights.items()}


def difference_verdict(effect: Measured, margin: float) -> str:
    """Whether two students differ: they do, are the same at the margin, or it is undecided."""
    small = effect.bound < margin
    if effect.shown:
        return f"they differ{f', by less than {margin:g}' if small else ''}"
    return f"the same within ±{margin:g}" if small else "whether they differ is undecided"


def claim_sentence(
    claim: Claim, effects: Mapping[str, Measured], differences: Sequence[Difference]
) -> str:
    """In which students an effect is shown; the difference says whether they differ in it."""
    if not effects:
        return "not measured: an arm of it is missing."
    digits = 2 if claim.kind == "slope" else 1

    def those(which: Callable[[Measured], bool]) -> list[str]:
        return [
            f"{student} ({points(m.estimate, digits)})"
            for student, m in effects.items()
            if which(m)
        ]

    gains = those(lambda m: m.shown and m.estimate.value > 0)
    losses = those(lambda m: m.shown and m.estimate.value < 0)
    rest = those(lambda m: not m.shown)
    parts = [
        f"a {what} is shown in {'all students, ' * (len(names) == len(effects))}{listed(names)}"
        for what, names in (("gain", gains), ("loss", losses))
        if names
    ]
    if rest:
        nothing = "none in" if parts else "neither a gain nor a loss is shown in"
        parts.append(f"{nothing} {listed(rest)}")
    text = ", ".join(parts)
    if differences:
        widest = max(differences, key=lambda d: abs(d.effect.estimate.value))
        among = "between them" if len(differences) == 1 else "widest apart"
        estimate = points(widest.effect.estimate, digits)
        text += f"; {among}, {widest.a} minus {widest.b} is {estimate}: {widest.verdict}"
    if len(differences) > 1:
        apart = sum(d.effect.shown for d in differences)
        text += f" ({apart} of {len(differences)} pairs of students differ)"
    return f"{text}."


def _arms(found: Found) -> list[ArmByStudent]:
    """Changes of all arms, which no claim named."""
    names = next(iter(next(iter(found.values())).values())).names
    wanted = {(arm, d): (d, {arm: 1.0}) for arm in names for d in found}
    effects, differences = _compared(wanted, found)
    students = next(iter(found.values()))
    return [
        ArmByStudent(
            arm,
            {s: {d: effects[(arm, d), s] for d in found} for s in students},
            {
                d: [
                    Difference(a, b, differences[(arm, d), a, b], "")
                    for a, b in itertools.combinations(students, 2)
                ]
                for d in found
            },
        )
        for arm in names
    ]


def _unmeasured(s: StudentsSummary, found: Found) -> list[str]:
    """What no interval of the page contains."""
    noise = {name: of.noise for name, of in next(iter(found.values())).items()}
    alone = [name for name, of_arms in noise.items() if all(n.seed is None for n in of_arms)]
    sentences = []
    if alone:
        drawn = any(n.draw is not None for name in alone for n in noise[name])
        rest = " and, where several were made, of draws of pairs, but" if drawn else " alone and"
        sentences.append(
            f"The noise of training of {listed(alone)}: no arm has several seeds, so the intervals "
            f"are of questions{rest} too short."
        )
    sentences += [f"{c.what}: an arm of it is missing." for c in s.claims if not c.effects]
    flagged = [
        f"{suite} ({', '.join(f'{limit} of {name}' for name, limit in of.items() if limit)})"
        for suite, of in s.limits.items()
        if any(of.values())
    ]
    if flagged:
        sentences.append(
            f"Room to change: {listed(flagged)}, before any arm trains. A student with less room "
            "can change less, so a difference between students may be one of room."
        )
    sentences.append(
        f"Any other student: {len(s.students)} were chosen and not drawn, and what differs between "
        "them (size, family, what they learnt before) is not told apart."
    )
    return sentences


def draw_claims(s: StudentsSummary) -> dict[str, Drawn]:
    """The page's figure: claims by student, with the band of their margins."""
    rows = [
        figures.Row(c.what, {name: m.estimate for name, m in c.effects.items()}, c.claim.margin)
        for c in s.claims
        if c.effects
    ]
    unit = "points; shaded: within the margin"
    return {"claims": figures.forest(rows, unit)} if rows else {}


def render_students(s: StudentsSummary, drawn: Mapping[str, Drawn], e: Experiment) -> str:
    """The page as text, which fetches nothing."""
    return render_template("students.html.jinja", drawn, s.doubts, s=s, experiment=e)


def students_table(summary: Mapping[str, Any]) -> Table:
    """The short table that a run of several students ends with.

    Args:
      summary: content of `summary.json`.
    """
    table = Table(
        title=summary["question"],
        title_justify="left",
        caption="points of accuracy against each student before training, 95% intervals"
        + doubt_caption(summary["doubts"]),
        caption_justify="left",
    )
    table.add_column("arm", overflow="fold")
    table.add_column("student", overflow="fold")
    domains = summary["domains"]
    for d in domains:
        table.add_column(DOMAIN_WORDS[d], justify="right", no_wrap=True)
    for name, student in summary["before"].items():
        table.add_row("before", name, *(f"{student[d][0]:.1f}%" for d in domains))
    for arm in summary["arms"]:
        table.add_section()
        for name, change in arm["changes"].items():
            arm_name = mark_names(arm["name"], summary["doubts"])
            table.add_row(arm_name, name, *(points(change[d]["estimate"]) for d in domains))
        for between in zip(*(arm["differences"][d] for d in domains), strict=True):
            minus = f"{between[0]['a']} minus {between[0]['b']}"
            table.add_row("", minus, *(points(x["effect"]["estimate"]) for x in between))
    return table
