"""What a page is made from, and its tables lined up by trace."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa


class Rated(NamedTuple):
    """One judge's ratings of all traces."""

    dimensions: tuple[str, ...]
    matrix: np.ndarray  # [traces, dimensions] in rating points, NaN where a trace was not rated
    mass: float  # mean probability on the labels 1 to 5

    @property
    def mean(self) -> np.ndarray:
        """[traces], over the dimensions."""
        return self.matrix.mean(axis=1)


@dataclasses.dataclass
class Study:
    """Tables and manifests; every mapping is by the planner's labels without their first part."""

    experiment: dict[str, Any]  # the config as plain data
    prompts: pa.Table
    suites: Mapping[str, pa.Table]  # suite → PROMPT
    traces: Mapping[str, pa.Table]  # generator → TRACE; token ids are not needed
    verdicts: Mapping[str, pa.Table]  # generator → VERDICT
    ratings: Mapping[str, Mapping[str, pa.Table]]  # judge → generator → RATING
    audits: Mapping[str, pa.Table]  # judge → AUDIT
    pairs: Mapping[str, pa.Table]  # arm → PAIR
    results: Mapping[str, Mapping[str, pa.Table]]  # arm → seed → RESULT
    student: pa.Table | None
    capability: Mapping[str, pa.Table]  # generator → RESULT
    metrics: Mapping[str, list[dict]]  # "arm/seed" → rows of metrics.jsonl
    manifests: Mapping[str, dict]  # label → manifest

    @functools.cached_property
    def domains(self) -> list[str]:
        """Those that the suites have, "in" before "out"."""
        return [
            d for d in ("in", "out") if any(s["domain"] == d for s in self.experiment["suites"])
        ]

    @functools.cached_property
    def place(self) -> dict[str, int]:
        """Trace id to row, over all generators in order."""
        ids = [i for table in self.traces.values() for i in table["trace_id"].to_pylist()]
        return {trace: row for row, trace in enumerate(ids)}

    def column(self, name: str) -> np.ndarray:
        """A column of all traces, in the order of `place`."""
        if not self.traces:
            return np.zeros(0)
        return np.concatenate(
            [t[name].to_numpy(zero_copy_only=False) for t in self.traces.values()]
        )

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """Verdict of every trace: 1, 0, or NaN where there is none."""
        found = np.full(len(self.place), np.nan)
        for table in self.verdicts.values():
            for trace, correct in zip(
                table["trace_id"].to_pylist(), table["correct"].to_pylist(), strict=True
            ):
                if correct is not None and trace in self.place:
                    found[self.place[trace]] = correct
        return found

    @functools.cached_property
    def rated(self) -> dict[str, Rated]:
        """Ratings by judge, lined up with `place`."""
        return {
            judge: _lined_up(tables, self.place) for judge, tables in self.ratings.items() if tables
        }

    def rows(self, arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the chosen and of the rejected traces of an arm's pairs, [P] each."""
        pairs = self.pairs[arm]
        return tuple(
            np.array([self.place[i] for i in pairs[side].to_pylist()], int)  # type: ignore[return-value]
            for side in ("chosen_id", "rejected_id")
        )

    def stats(self, label: str) -> dict[str, Any]:
        """Counts of an artifact; empty if it is not in the study."""
        return self.manifests.get(label, {}).get("stats", {})


def _lined_up(tables: Mapping[str, pa.Table], place: Mapping[str, int]) -> Rated:
    table = pa.concat_tables(tables.values())
    dimension = table["dimension"].to_numpy(zero_copy_only=False).astype(str)
    dimensions = tuple(dict.fromkeys(dimension.tolist()))
    matrix = np.full((len(place), len(dimensions)), np.nan)
    rows = np.array([place.get(i, -1) for i in table["trace_id"].to_pylist()], int)
    columns = np.array([dimensions.index(d) for d in dimension.tolist()], int)
    known = rows >= 0
    matrix[rows[known], columns[known]] = table["rating"].to_numpy()[known]
    return Rated(dimensions, matrix, float(np.mean(table["mass"].to_numpy())))
