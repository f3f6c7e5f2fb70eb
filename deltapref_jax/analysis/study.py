"""The tables that a page is made from, and their traces lined up in one order."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from deltapref_jax.config import Experiment, Run, domains_of


def columns(table: pa.Table, *names: str) -> list[np.ndarray]:
    """Columns of a table as NumPy arrays [rows]; strings, and booleans with nulls, are objects."""
    return [table.column(name).to_numpy() for name in names]


class ArtifactRecord(NamedTuple):
    """What an artifact's manifest says; one record per label that the study has for it."""

    stage: str
    label: str  # the planner's, such as "judge/exact/weak"
    key: str  # name of its directory
    seconds: float
    stats: Mapping[str, float]


class RatingMatrix(NamedTuple):
    """One judge's ratings of all traces."""

    dimensions: tuple[str, ...]
    matrix: np.ndarray  # [traces, dimensions] in rating points, NaN where a trace was not rated
    mass: float  # mean probability on the labels 1 to 5

    @property
    def mean(self) -> np.ndarray:
        """Rating of every trace, averaged over the dimensions, [traces]."""
        return self.matrix.mean(axis=1)


@dataclasses.dataclass
class Study:
    """A study's config, tables and artifact records; the names are the record types of the rows."""

    experiment: Experiment
    prompts: pa.Table  # Prompt
    suites: Mapping[str, pa.Table]  # suite → Prompt
    traces: Mapping[str, pa.Table]  # generator → Trace; token ids are not needed
    verdicts: Mapping[str, pa.Table]  # generator → Verdict
    ratings: Mapping[str, Mapping[str, pa.Table]]  # judge → generator → Rating
    audits: Mapping[str, pa.Table]  # judge → Audit, of solutions by program
    pairs: Mapping[str, Mapping[int, pa.Table]]  # arm → draw → Pair
    # arm → run → Result, all suites; texts and answers are not needed
    results: Mapping[str, Mapping[Run, pa.Table]]
    student: pa.Table | None  # Result, before training
    capability: Mapping[str, pa.Table]  # generator → Result
    metrics: Mapping[str, Mapping[Run, Sequence[Mapping[str, float]]]]  # arm → run → metrics.jsonl
    pair_counts: Mapping[str, Mapping[int, Mapping[str, float]]]  # arm → draw → stats of its pairs
    artifacts: Sequence[ArtifactRecord]
    trace_audits: Mapping[str, pa.Table] = dataclasses.field(default_factory=dict)  # of traces
    retests: Mapping[str, pa.Table] = dataclasses.field(default_factory=dict)  # judge → Retest
    rates: Mapping[str, pa.Table] = dataclasses.field(default_factory=dict)  # objective → RateTrial
    # objective → rate → Result, of the tuning suites
    trials: Mapping[str, Mapping[str, pa.Table]] = dataclasses.field(default_factory=dict)
    # "student" or generator → families of its lessons, None where its folder does not say
    lessons: Mapping[str, Sequence[str] | None] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # library → version

    @functools.cached_property
    def domains(self) -> list[str]:
        """Domains that average a suite, "in" before "out"."""
        return domains_of(self.experiment.suites)

    @functools.cached_property
    def distinct_artifacts(self) -> list[ArtifactRecord]:
        """Every artifact once, under its first label."""
        by_key: dict[str, ArtifactRecord] = {}
        for artifact in self.artifacts:
            by_key.setdefault(artifact.key, artifact)
        return list(by_key.values())

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """Trace id → row in arrays over all traces: the tables of all generators in turn."""
        return {trace: row for row, trace in enumerate(self.trace_column("trace_id"))}

    def trace_column(self, name: str) -> np.ndarray:
        """A column of all traces, in the order of `row_of`."""
        return np.concatenate([np.zeros(0), *(columns(t, name)[0] for t in self.traces.values())])

    def rows_of(self, trace_ids: np.ndarray) -> np.ndarray:
        """Rows of traces by id, int [n]; -1 where an id is unknown."""
        return np.array([self.row_of.get(i, -1) for i in trace_ids], int)

    def pairs_of(self, arm: str) -> pa.Table:
        """Rows of `records.Pair` of all draws of an arm, one after another."""
        return pa.concat_tables(self.pairs[arm].values())

    def first_draw(self, arm: str) -> pa.Table:
        """Rows of `records.Pair` of an arm's first draw: every pair once."""
        return self.pairs[arm][min(self.pairs[arm])]

    def pair_rows(self, pairs: pa.Table) -> list[np.ndarray]:
        """Rows of the chosen and of the rejected traces of pairs, int [P] each.

        Raises:
          KeyError: the study does not have a trace of a pair.
        """
        sides = columns(pairs, "chosen_id", "rejected_id")
        return [np.array([self.row_of[i] for i in ids], int) for ids in sides]

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """Verdict of every trace, [traces]: 1, 0, or NaN where there is none."""
        correct = np.full(len(self.row_of), np.nan)
        for table in self.verdicts.values():
            ids, verdicts = columns(table, "trace_id", "correct")
            rows = self.rows_of(ids)
            correct[rows[rows >= 0]] = verdicts[rows >= 0].astype(float)  # None becomes NaN
        return correct

    @functools.cached_property
    def rated(self) -> dict[str, RatingMatrix]:
        """Ratings by judge, with a row per trace as in `row_of`."""
        return {judge: self._matrix(tables) for judge, tables in self.ratings.items() if tables}

    def _matrix(self, tables: Mapping[str, pa.Table]) -> RatingMatrix:
        table = pa.concat_tables(tables.values())
        ids, dimension, rating, mass = columns(table, "trace_id", "dimension", "rating", "mass")
        dimensions = tuple(dict.fromkeys(dimension))
        rows = self.rows_of(ids)
        known = rows >= 0
        places = np.array([dimensions.index(d) for d in dimension], int)
        matrix = np.full((len(self.row_of), len(dimensions)), np.nan)
        matrix[rows[known], places[known]] = rating[known]
        return RatingMatrix(dimensions, matrix, float(np.mean(mass)))
