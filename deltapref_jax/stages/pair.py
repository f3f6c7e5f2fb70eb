"""pair: a join and a selection over tables; an arm costs nothing until it trains."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.callables import is_callable_name
from deltapref_jax.config import ADDED, RANKED, REFERENCE_MARGIN
from deltapref_jax.pairs.balance import balanced
from deltapref_jax.pairs.build import Rules, build
from deltapref_jax.pairs.own import candidates, select_by_function
from deltapref_jax.pairs.select import kept_count, reference_margin, sample_delta, select
from deltapref_jax.records import (
    Pair,
    Prompt,
    Rating,
    TokenSequence,
    Trace,
    Verdict,
    to_table,
)
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.judge_mean import MeanRatingTable
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.score import LogProbTable, input_logprobs
from deltapref_jax.stages.tokens import SequenceTable
from deltapref_jax.stages.verify import VerdictTable


class PairTable(Node, stage="pair", version=5):
    """PAIR: the pairs that an arm trains on. Arms that differ only in objective or seeds share it.

    Attributes:
      traces: by generator, of all generators whose prompts the arms share (`rules.min_traces`).
      verdicts: of the chosen and of the rejected generator.
      ratings: of both, by the arm's judge, where ratings shape the pairs.
      dimensions: of that judge; empty where nobody's ratings are read.
      keep: one of `config.KEEPS`, or the user's own function as `module:function`.
      rank_by: what `config.RANKED` rank by: a dimension, "sum" or "reference_margin"; samples by
        the first two.
      fraction: of the pool that is kept, where `kept` is 0.
      kept: pairs kept.
      seed: of the random draws of the selection.
      draw: likewise; 0 where nothing is drawn.
      sequences: of both generators, where the reference's log-probabilities rank the pairs.
      logprobs: of these sequences under the reference.
      reference_weights: hash of the weights that `logprobs` must be made by.
      balance: of `config.BALANCES`.
      rungs: of a balanced ladder, `rules` among them.
      selection: hash of the code of the user's own function (`callables.code_hash`).
    """

    prompts: PromptTable
    traces: Mapping[str, TraceTable]
    verdicts: Mapping[str, VerdictTable]
    ratings: Mapping[str, RatingTable | MeanRatingTable]
    rules: Rules
    dimensions: tuple[str, ...]
    keep: str
    rank_by: str
    fraction: float
    kept: int
    seed: int
    draw: int
    sequences: Mapping[str, SequenceTable] = dataclasses.field(default_factory=dict, metadata=ADDED)
    logprobs: Mapping[str, LogProbTable] = dataclasses.field(default_factory=dict, metadata=ADDED)
    reference_weights: str = dataclasses.field(default="", metadata=ADDED)
    balance: str = dataclasses.field(default="", metadata=ADDED)
    rungs: tuple[Rules, ...] = dataclasses.field(default=(), metadata=ADDED)
    selection: Mapping[str, str] = dataclasses.field(default_factory=dict, metadata=ADDED)

    def make(self, job: Job) -> None:
        """Builds the pool and selects from it."""
        traces = {name: job.rows(Trace, node) for name, node in self.traces.items()}
        correct = {
            verdict.trace_id: verdict.correct
            for node in self.verdicts.values()
            for verdict in job.rows(Verdict, node)
        }
        ratings = self._ratings(job)
        questions = job.rows(Prompt, self.prompts)
        prompts = [prompt.prompt_id for prompt in questions]
        by_dimension = self.rank_by in self.dimensions
        dimension = self.dimensions.index(self.rank_by) if by_dimension else None
        pool, counts = build(prompts, traces, correct, ratings, self.rules, dimension)
        logprobs = self._logprobs(job)
        if self.rank_by == REFERENCE_MARGIN:
            scored = [p for p in pool if {p.chosen_id, p.rejected_id} <= logprobs.keys()]
            counts |= {"dropped_unscored": len(pool) - len(scored), "pool": len(scored)}
            pool = scored
        if not pool:
            raise ValueError(
                f"No pair is left for {self.rules.chosen} against {self.rules.rejected}: {counts}. "
                "Use more prompts, longer traces (config.sampling.max_tokens) or another stratum."
            )
        tokens = {trace.trace_id: trace.tokens for rows in traces.values() for trace in rows}
        if self.balance:
            pools = [build(prompts, traces, correct, {}, rules)[0] for rules in self.rungs]
            own, seed = self.rungs.index(self.rules), (self.seed, self.draw)
            whole, (pool, cells) = len(pool), balanced(own, pools, self.balance, seed, tokens)
            if not pool:
                sizes = {r.chosen: len(p) for r, p in zip(self.rungs, pools, strict=True)}
                raise ValueError(
                    f"No pair is left for {self.rules.chosen} against {self.rules.rejected}: the "
                    f"rungs' pools of {sizes} pairs have no {self.balance.replace('_', ' ')} in "
                    "common. Use more prompts, or leave config.balance at ''."
                )
            counts |= {"dropped_balance": whole - len(pool)}
            counts |= {f"balance_{cell}": count for cell, count in cells.items()}
        deltas = None
        if self.rank_by == REFERENCE_MARGIN:
            deltas = reference_margin(pool, logprobs)
        elif self.keep in RANKED:
            deltas = sample_delta(pool, dimension)
        k = kept_count(len(pool), self.kept, self.fraction)
        drawn_by = (self.seed, self.draw)
        if is_callable_name(self.keep):
            both = [t for side in (self.rules.chosen, self.rules.rejected) for t in traces[side]]
            wanted = k if self.kept or self.fraction < 1 else None
            given = candidates(pool, questions, both, self.dimensions)
            kept, ties = select_by_function(self.keep, pool, given, k, wanted, drawn_by), 0
        else:
            kept, ties = select(pool, self.keep, k, drawn_by, deltas, tokens)
        job.stats |= {name: float(count) for name, count in counts.items()} | {
            "kept": float(len(kept)),
            "tied_at_cut": float(ties),
            "chosen_tokens": float(np.mean([tokens[pair.chosen_id] for pair in kept])),
            "rejected_tokens": float(np.mean([tokens[pair.rejected_id] for pair in kept])),
        }
        if ratings:
            job.stats["sample_delta"] = float(np.mean(sample_delta(kept, dimension)))
        if logprobs:
            job.stats["reference_margin"] = float(np.mean(reference_margin(kept, logprobs)))
        job.write(to_table(Pair, kept))

    def _logprobs(self, job: Job) -> dict[str, float]:
        """Log-probability of every trace that the reference has scored, by trace id.

        Raises:
          ConfigError: other weights than those of the reference made a table.
        """
        found: dict[str, float] = {}
        for name, node in self.logprobs.items():
            logprobs = input_logprobs(job, node, self.reference_weights)
            rows = job.rows(TokenSequence, self.sequences[name])
            found |= {
                row.trace_id: logprobs[row.sequence_id]
                for row in rows
                if row.matched and row.sequence_id in logprobs
            }
        return found

    def _ratings(self, job: Job) -> dict[str, list[float]]:
        """Ratings of every trace, in the order of `dimensions`."""
        place = {dimension: i for i, dimension in enumerate(self.dimensions)}
        ratings: dict[str, list[float]] = {}
        for node in self.ratings.values():
            for row in job.rows(Rating, node):
                rated = ratings.setdefault(row.trace_id, [0.0] * len(place))
                rated[place[row.dimension]] = row.rating
        return ratings
