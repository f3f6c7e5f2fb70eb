"""pair: a join and a selection over tables; an arm costs nothing until it trains."""

from collections.abc import Mapping

import numpy as np

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.pairs.build import Rules, build
from deltapref_jax.pairs.select import sample_delta, select
from deltapref_jax.records import Pair, Prompt, Rating, Trace, Verdict, to_table
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.verify import VerdictTable


class PairTable(Node, stage="pair", version=3):
    """PAIR: the pairs that an arm trains on. Arms that differ only in objective or seeds share it.

    Attributes:
      traces: by generator, of all generators whose prompts the arms share (`rules.min_traces`).
      verdicts: of the chosen and of the rejected generator.
      ratings: of both, by the arm's judge, where ratings shape the pairs.
      dimensions: of that judge; empty where nobody's ratings are read.
      keep: one of `config.KEEPS`.
      rank_by: what "top" and "matched" rank by: a dimension, or "sum".
      seed: of the random draws of the selection.
    """

    prompts: PromptTable
    traces: Mapping[str, TraceTable]
    verdicts: Mapping[str, VerdictTable]
    ratings: Mapping[str, RatingTable]
    rules: Rules
    dimensions: tuple[str, ...]
    keep: str
    rank_by: str
    fraction: float
    seed: int

    def make(self, job: Job) -> None:
        """Builds the pool and selects from it."""
        traces = {name: job.rows(Trace, node) for name, node in self.traces.items()}
        correct = {
            verdict.trace_id: verdict.correct
            for node in self.verdicts.values()
            for verdict in job.rows(Verdict, node)
        }
        ratings = self._ratings(job)
        prompts = [prompt.prompt_id for prompt in job.rows(Prompt, self.prompts)]
        pool, counts = build(prompts, traces, correct, ratings, self.rules)
        if not pool:
            raise ValueError(
                f"No pair is left for {self.rules.chosen} against {self.rules.rejected}: {counts}. "
                "Use more prompts, longer traces (config.sampling.max_tokens) or another stratum."
            )
        tokens = {trace.trace_id: trace.tokens for rows in traces.values() for trace in rows}
        dimension = None if self.rank_by == "sum" else self.dimensions.index(self.rank_by)
        kept = select(pool, self.keep, self.fraction, self.seed, dimension, tokens)
        job.stats |= {name: float(count) for name, count in counts.items()} | {
            "kept": float(len(kept)),
            "chosen_tokens": float(np.mean([tokens[pair.chosen_id] for pair in kept])),
            "rejected_tokens": float(np.mean([tokens[pair.rejected_id] for pair in kept])),
        }
        if ratings:
            job.stats["sample_delta"] = float(np.mean(sample_delta(kept, dimension)))
        job.write(to_table(Pair, kept))

    def _ratings(self, job: Job) -> dict[str, list[float]]:
        """Ratings of every trace, in the order of `dimensions`."""
        place = {dimension: i for i, dimension in enumerate(self.dimensions)}
        ratings: dict[str, list[float]] = {}
        for node in self.ratings.values():
            for row in job.rows(Rating, node):
                rated = ratings.setdefault(row.trace_id, [0.0] * len(place))
                rated[place[row.dimension]] = row.rating
        return ratings
