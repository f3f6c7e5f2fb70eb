"""judge_mean: the mean of several judges' ratings of one generator's traces."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.config import Judge
from deltapref_jax.judging.scorer import Ratings
from deltapref_jax.stages.judge import RatingTable, rating_table


class MeanRatingTable(Node, stage="judge_mean", version=1):
    """RATING: the mean of the judges of `judge.of`, each brought to one scale in every dimension.

    A judge whose ratings spread twice as wide would weigh twice in every gap, whatever it is worth.
    So a judge's ratings are standardised, over all traces of all generators, and get the mean and
    the standard deviation that the judges have on average: rating points, which may lie a little
    outside of 1 to 5. `spread` is the standard deviation between the judges on that scale; `mass`
    and `distribution` are means over the judges.

    Attributes:
      ratings: by judge and generator.
      generator: whose traces the table has.
    """

    ratings: Mapping[str, Mapping[str, RatingTable]]
    generator: str
    judge: Judge

    def make(self, job: Job) -> None:
        """Standardises and averages dimension by dimension."""
        judges = [job.tables(tables) for tables in self.ratings.values()]
        ids: list[str] | None = None
        parts = []
        for tables in judges:
            rows = {name: _matrices(table, self.judge.dimensions) for name, table in tables.items()}
            everywhere = np.concatenate([m["rating"] for _, m in rows.values()])
            own, matrices = rows[self.generator]
            ids = own if ids is None else ids
            assert own == ids  # every judge rates every trace, in the order of the table
            parts.append((matrices, everywhere.mean(axis=0), everywhere.std(axis=0)))
        mean = np.mean([m for _, m, _ in parts], axis=0)
        scale = np.mean([s for _, _, s in parts], axis=0)
        rated = np.stack(
            # A judge that rates all traces alike says nothing, and adds nothing.
            [mean + scale * (m["rating"] - a) / np.where(s > 0, s, 1.0) for m, a, s in parts]
        )
        ratings = Ratings(
            expectation=rated.mean(axis=0),
            spread=rated.std(axis=0),
            mass=np.mean([m["mass"] for m, _, _ in parts], axis=0),
            distribution=np.mean([m["distribution"] for m, _, _ in parts], axis=0),
        )
        job.stats |= {"traces": float(len(ids or [])), "judges": float(len(parts))}
        job.write(rating_table(self.judge, ids or [], ratings))


def _matrices(
    table: pa.Table, dimensions: tuple[str, ...]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Trace ids, and columns as [traces, dimensions] and [traces, dimensions, 5]."""
    rows = table.select(["trace_id", "dimension", "rating", "mass", "distribution"]).to_pydict()
    place = {dimension: i for i, dimension in enumerate(dimensions)}
    ids = list(dict.fromkeys(rows["trace_id"]))
    row_of = {trace: i for i, trace in enumerate(ids)}
    shape = (len(ids), len(dimensions))
    found = {
        "rating": np.zeros(shape),
        "mass": np.zeros(shape),
        "distribution": np.zeros((*shape, 5)),
    }
    for i, (trace, dimension) in enumerate(zip(rows["trace_id"], rows["dimension"], strict=True)):
        if dimension in place:
            for name, matrix in found.items():
                matrix[row_of[trace], place[dimension]] = rows[name][i]
    return ids, found
