"""Second read-outs, which no domain averages: greedy twins of a domain's suites, pass@k."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.page import Measured, Readout
from deltapref_jax.analysis.study import Study
from deltapref_jax.config import TUNING, Suite


def read_suites(suites: Sequence[Suite]) -> st.Read:
    """Reads the answers to suites: the share of right samples of every question, or pass@k."""

    def read(results: pa.Table, _: str) -> Mapping[str, st.Answers]:
        name_of = st.columns(results, "suite")[0]
        return {suite.name: _read(suite, results, name_of == suite.name) for suite in suites}

    return read


def _read(suite: Suite, results: pa.Table, rows: np.ndarray) -> st.Answers:
    answers = st.answers(results, rows)
    if suite.readout != "pass":
        return answers
    right = np.rint(answers.mean * answers.samples).astype(int)
    return answers._replace(mean=st.pass_at_k(answers.samples, right, suite.k))


def read_difference(a: Sequence[Suite], b: Sequence[Suite]) -> st.Read:
    """Reads, question by question, the answers to suites `a` minus those to suites `b`.

    `b` asks the questions of `a` again: its suites have the same prompts.
    """
    again = {s.name: next(other.name for other in b if other.prompts == s.prompts) for s in a}

    def read(results: pa.Table, domain: str) -> Mapping[str, st.Answers]:
        of_a, of_b = (read_suites(suites)(results, domain) for suites in (a, b))
        return {
            name: answers._replace(mean=answers.mean - of_b[again[name]].mean)
            for name, answers in of_a.items()
        }

    return read


def words(suite: Suite) -> str:
    """What a suite reads, such as "pass@4 of 8 samples at temperature 1"."""
    samples = f"{suite.samples} samples" if suite.samples > 1 else "one sample"
    drawn = f"{samples} at temperature {suite.temperature:g}" if suite.temperature else "greedy"
    return f"pass@{suite.k} of {drawn}" if suite.readout == "pass" else f"accuracy, {drawn}"


def groups(suites: Sequence[Suite]) -> list[list[Suite]]:
    """Suites with a read-out that are read together.

    Those that read questions of a domain's suites again, in one way, are averaged as the domain is;
    every other stands alone.
    """
    alike: dict[tuple[str, str, int, float, int], list[Suite]] = {}
    for suite in suites:
        if suite.readout not in ("", TUNING):
            way = (suite.domain, suite.readout, suite.samples, suite.temperature, suite.k)
            alike.setdefault(way, []).append(suite)
    grouped = []
    for again in alike.values():
        together = [s for s in again if len(read_again([s], suites)) == 1]
        # Each of a domain's suites counts once, as it does in the domain.
        if len(read_again(together, suites)) < len(together):
            together = []
        grouped += [together] * bool(together) + [[s] for s in again if s not in together]
    return grouped


def read_again(again: Sequence[Suite], suites: Sequence[Suite]) -> list[Suite]:
    """The suites that a domain averages whose questions are those of some second read-outs."""
    questions = [suite.prompts for suite in again]
    return [s for s in _averaged(again, suites) if s.prompts in questions]


def _averaged(again: Sequence[Suite], suites: Sequence[Suite]) -> list[Suite]:
    domains = {suite.domain for suite in again}
    return [s for s in suites if s.domain in domains and not s.readout]


def is_greedy_twin(again: Sequence[Suite], suites: Sequence[Suite]) -> bool:
    """Whether suites answer greedily what suites of their domain, all or some, sample."""
    sampled = any(s.temperature for s in read_again(again, suites))
    return again[0].readout == "accuracy" and not again[0].temperature and sampled


def readouts(study: Study, kinds: Mapping[str, Kind]) -> list[Readout]:
    """The read-outs of the student and their change by every arm, p values adjusted over all.

    Args:
      study: with the student's results.
      kinds: of the arms, see `components`.
    """
    assert study.student is not None
    grouped = groups(study.experiment.suites)
    found = [
        fx.effects(study.student, study.results, group[0].domain, kinds, read=read_suites(group))
        for group in grouped
    ]
    changes = fx.measured(
        {(i, arm): of_arms.change(arm) for i, of_arms in enumerate(found) for arm in of_arms.names}
    )
    suites = study.experiment.suites
    twins = [i for i, group in enumerate(grouped) if is_greedy_twin(group, suites)]
    differences = {
        i: fx.effects(
            study.student,
            study.results,
            grouped[i][0].domain,
            kinds,
            read=read_difference(read_again(grouped[i], suites), grouped[i]),
        )
        for i in twins
    }
    lost = fx.measured(
        {(i, arm): of.change(arm) for i, of in differences.items() for arm in of.names}
    )
    return [
        _readout(
            study,
            group,
            kinds,
            {arm: changes[i, arm] for arm in of_arms.names},
            {arm: lost[i, arm] for arm in of_arms.names if i in twins},
        )
        for i, (group, of_arms) in enumerate(zip(grouped, found, strict=True))
    ]


def _readout(
    study: Study,
    group: Sequence[Suite],
    kinds: Mapping[str, Kind],
    changes: dict[str, Measured],
    lost: dict[str, Measured],
) -> Readout:
    assert study.student is not None
    suites = study.experiment.suites
    domain, asked, every = group[0].domain, read_again(group, suites), _averaged(group, suites)
    part = "all" if len(asked) == len(every) else f"{len(group)} of"
    sampled = {}
    if lost:
        of_arms = fx.effects(study.student, study.results, domain, kinds, read=read_suites(asked))
        sampled = {arm: of_arms.change(arm).estimate for arm in of_arms.names}
    return Readout(
        suite=group[0].name if len(group) == 1 else f"{part} {len(every)} suites",
        domain=domain,
        what=words(group[0]),
        greedy_twin=bool(lost),
        read_again=[suite.name for suite in asked],
        averaged=len(every),
        student=st.accuracy(study.student, domain, read=read_suites(group)),
        changes=changes,
        sampled=sampled,
        lost=lost,
    )
