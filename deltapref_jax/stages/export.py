"""The pairs of an arm in TRL's columns, from the tables of a study."""

from typing import Any

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Arm, judge_of
from deltapref_jax.data.export import trl_rows
from deltapref_jax.records import Pair, Prompt, Rating, Trace
from deltapref_jax.stages.report import Report


def arm_rows(workspace: Workspace, report: Report, arm: Arm, draw: int = 0) -> list[dict[str, Any]]:
    """One row per pair of an arm, as `data.export.trl_rows` has them.

    Ratings are summed over the dimensions of the arm's judge; null where it has not rated.

    Args:
      workspace: where the arm's pairs are complete.
      report: of the study.
      arm: of the study.
      draw: of its pairs.
    """
    node = report.pairs[arm.name][draw]
    traces = [
        trace
        for name in dict.fromkeys((arm.chosen, arm.rejected))
        for trace in workspace.rows(Trace, node.traces[name])
    ]
    ratings: dict[str, float] = {}
    for table in report.ratings.get(judge_of(report.experiment, arm), {}).values():
        for row in workspace.rows(Rating, table) if workspace.complete(table) else []:
            ratings[row.trace_id] = ratings.get(row.trace_id, 0.0) + row.rating
    pairs = workspace.rows(Pair, node)
    return trl_rows(pairs, workspace.rows(Prompt, node.prompts), traces, ratings)
