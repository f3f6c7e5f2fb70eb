"""Second read-outs, which no domain averages: greedy twins of a domain's suites, pass@k."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.page import Readout
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


def words(suite: Suite) -> str:
    """What a suite reads, such as "pass@4 of 8 samples at temperature 1"."""
    samples = f"{suite.samples} samples" if suite.samples > 1 else "one sample"
    drawn = f"{samples} at temperature {suite.temperature:g}" if suite.temperature else "greedy"
    return f"pass@{suite.k} of {drawn}" if suite.readout == "pass" else f"accuracy, {drawn}"


def groups(suites: Sequence[Suite]) -> list[list[Suite]]:
    """Suites with a read-out that are read together.

    Those that read all questions of a domain again, in one way, are averaged as the domain is;
    every other stands alone.
    """
    alike: dict[tuple[str, str, int, float, int], list[Suite]] = {}
    for suite in suites:
        if suite.readout not in ("", TUNING):
            way = (suite.domain, suite.readout, suite.samples, suite.temperature, suite.k)
            alike.setdefault(way, []).append(suite)
    grouped = []
    for again in alike.values():
        grouped += [again] if _is_whole(again, suites) else [[suite] for suite in again]
    return grouped


def _is_whole(again: Sequence[Suite], suites: Sequence[Suite]) -> bool:
    """Whether suites read all questions of their domain again."""
    averaged = [s.prompts for s in suites if s.domain == again[0].domain and not s.readout]
    questions = [suite.prompts for suite in again]
    return len(questions) == len(averaged) and all(q in questions for q in averaged)


def is_greedy_twin(again: Sequence[Suite], suites: Sequence[Suite]) -> bool:
    """Whether suites answer greedily all questions that their domain answers by sampling."""
    sampled = any(s.temperature for s in suites if s.domain == again[0].domain and not s.readout)
    greedy = again[0].readout == "accuracy" and not again[0].temperature
    return greedy and sampled and _is_whole(again, suites)


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
    return [
        Readout(
            suite=group[0].name if len(group) == 1 else f"all {len(group)} suites",
            domain=group[0].domain,
            what=words(group[0]),
            greedy_twin=is_greedy_twin(group, study.experiment.suites),
            student=st.accuracy(study.student, group[0].domain, read=read_suites(group)),
            changes={arm: changes[i, arm] for arm in of_arms.names},
        )
        for i, (group, of_arms) in enumerate(zip(grouped, found, strict=True))
    ]
