"""Suites: accuracy and changes with intervals, floors and ceilings, and what models had learnt.

Whether a suite is at its floor or ceiling is judged by answers of the student and the generators,
all given before any arm trained, so what training did can't decide which suites are flagged.
"""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import readouts
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.findings import DOMAIN_WORDS, listed
from deltapref_jax.analysis.page import SuiteSummary
from deltapref_jax.analysis.study import Study
from deltapref_jax.config import STUDENT, TUNING, Suite
from deltapref_jax.records import Prompt, SuiteAccuracy, from_table

FLOOR, CEILING = 10, 90  # percent of right answers
RULE = (
    f"A suite is flagged as floor where every model is shown to be at most at {FLOOR}% before any "
    "arm trains (its 95% interval ends there or below), and as ceiling where the student is shown "
    f"to be at least at {CEILING}% (its interval begins there or above); arms have no say in it."
)


def summaries(study: Study) -> list[SuiteSummary]:
    """Accuracy of the student and of every generator before training, without changes."""
    assert study.student is not None
    tables = {STUDENT: study.student} | dict(study.capability)
    summed = []
    for d in study.domains:
        by_model = {name: st.by_question(table, d) for name, table in tables.items()}
        for suite, answers in by_model[STUDENT].items():
            first = from_table(Prompt, study.suites[suite][:1]) if suite in study.suites else []
            accuracy = {
                name: st.suite_accuracy(suites[suite])
                for name, suites in by_model.items()
                if suite in suites
            }
            summed.append(
                SuiteSummary(
                    suite=suite,
                    domain=d,
                    questions=len(answers.questions),
                    example=first[0].question if first else "",
                    samples=int(answers.samples.max()),
                    accuracy=accuracy,
                    limit=_limit(accuracy),
                )
            )
    return summed


def changes(
    study: Study, suites: Sequence[SuiteSummary], kinds: Mapping[str, Kind]
) -> dict[tuple[str, str], fx.Effect]:
    """The change of every arm in every suite, by suite and arm.

    Args:
      study: tables.
      suites: of `summaries`.
      kinds: of the arms, see `components`.
    """
    found: dict[tuple[str, str], fx.Effect] = {}
    for s in suites:
        of_arms = _effects(study, s.suite, s.domain, kinds)
        found |= {(s.suite, arm): of_arms.change(arm) for arm in of_arms.names}
    return found


def _effects(study: Study, suite: str, domain: str, kinds: Mapping[str, Kind]) -> fx.Effects:
    """Changes of all arms in one suite, with the components of noise that it shows itself."""

    def of_suite(table: pa.Table) -> pa.Table:
        return table.filter(pc.equal(table["suite"], suite))

    assert study.student is not None
    after = {
        arm: {run: of_suite(table) for run, table in runs.items()}
        for arm, runs in study.results.items()
    }
    return fx.effects(of_suite(study.student), after, domain, kinds)


def _limit(accuracy: Mapping[str, st.Estimate]) -> str:
    if all(e.high <= FLOOR for e in accuracy.values()):
        return "floor"
    return "ceiling" if accuracy[STUDENT].low >= CEILING else ""


def limit_sentences(suites: Sequence[SuiteSummary]) -> list[str]:
    """What suites at their floor or ceiling do to the mean of their domain, by domain."""
    sentences = []
    for d in dict.fromkeys(s.domain for s in suites):
        of_domain = [s for s in suites if s.domain == d]
        flagged = [s for s in of_domain if s.limit]
        if not flagged:
            continue
        named = listed([f"{s.suite} ({s.limit})" for s in flagged])
        k, free = len(of_domain), len(of_domain) - len(flagged)
        mean = (
            f"where they do not move, a change of 1 point {DOMAIN_WORDS[d]} stands for about "
            f"{k / free:.1f} points on the other {free}"
            if free
            else f"no suite {DOMAIN_WORDS[d]} has room for both"
        )
        limits = {s.limit for s in flagged}
        room = [
            f"little room to {verb} ({limit})"
            for limit, verb in (("floor", "fall"), ("ceiling", "rise"))
            if limit in limits
        ]
        sentences.append(
            f"{named} {'has' if len(flagged) == 1 else 'have'} {len(flagged)} of {k} equal shares "
            f"in the mean {DOMAIN_WORDS[d]}, and {' or '.join(room)}: {mean}."
        )
    return sentences


def lessons_sentence(study: Study) -> str:
    """Whether the families of the suites out of domain were in what the models learnt from."""
    outside = [s for s in study.experiment.suites if s.domain == "out" and not s.readout]
    families = list(dict.fromkeys(task for s in outside for task in s.prompts.tasks))
    if not families:
        return ""
    known = {name: tasks for name, tasks in study.lessons.items() if tasks is not None}
    unknown = [name for name in study.lessons if name not in known]
    if not known:
        return (
            "Whether the models had met the families of the suites out of domain before is "
            "unknown: no model's folder says what it learnt from."
        )
    # A family with the models that had it; families with the same models share a clause.
    learnt = {f: tuple(name for name, tasks in known.items() if f in tasks) for f in families}
    clauses = []
    for names in dict.fromkeys(learnt.values()):
        of_names = [f for f, models in learnt.items() if models == names]
        whose = f"all {len(known)} models" if len(names) == len(known) > 1 else listed(names)
        where = f"in the lessons of {whose}" if names else "in no model's lessons"
        clauses.append(f"{listed(of_names)} {'were' if len(of_names) > 1 else 'was'} {where}")
    unseen = "; so out of domain means outside of the training pairs, and not unseen"
    rest = f" It is unknown for {listed(unknown)}." if unknown else ""
    return (
        f"Families out of domain: {', and '.join(clauses)}{unseen if any(learnt.values()) else ''}."
        f"{rest}"
    )


def accuracies(study: Study, doubts: Mapping[str, str]) -> Iterator[SuiteAccuracy]:
    """Rows of the long table: the student before training, generators, then every run of every arm.

    After the suites that a domain averages come second read-outs, which generators do not have.

    Args:
      study: tables.
      doubts: by arm, see `page.ArmSummary.doubt`.
    """
    again = [s for s in study.experiment.suites if s.readout not in ("", TUNING)]
    runs = [(arm, run, t) for arm, tables in study.results.items() for run, t in tables.items()]
    if study.student is not None:
        yield from _accuracies(study, study.student, again)
    for generator, table in study.capability.items():
        for row in _accuracies(study, table, ()):
            yield row._replace(generator=generator)
    for arm, run, table in runs:
        for row in _accuracies(study, table, again):
            yield row._replace(arm=arm, seed=run.seed, draw=run.draw, doubt=doubts.get(arm, ""))


def _accuracies(study: Study, table: pa.Table, again: Sequence[Suite]) -> Iterator[SuiteAccuracy]:
    """Accuracies of one table of answers, of nobody yet."""
    for d in study.domains:
        for suite, answers in st.by_question(table, d).items():
            yield _row(suite, d, "", answers)
    for other in again:
        (answers,) = readouts.read_suites([other])(table, "").values()
        yield _row(other.name, other.domain, readouts.words(other), answers)


def _row(suite: str, domain: str, readout: str, answers: st.Answers) -> SuiteAccuracy:
    accuracy, low, high = st.suite_accuracy(answers)
    return SuiteAccuracy(
        arm=None,
        generator=None,
        seed=None,
        draw=None,
        suite=suite,
        domain=domain,
        readout=readout,
        questions=len(answers.questions),
        samples=int(answers.samples.max()),
        accuracy=accuracy,
        low=low,
        high=high,
        doubt="",
    )
