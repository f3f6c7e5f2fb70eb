"""retest: a judge's ratings of some pairs when its rubric is worded otherwise."""

import dataclasses
import json
import random
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import Judge, MeshShape, Scoring
from deltapref_jax.judging.rubric import PARAPHRASES
from deltapref_jax.records import Prompt, Retest, Trace, schema
from deltapref_jax.stages.judge import rater
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable, asked


class RetestTable(Node, stage="retest", version=1):
    """RETEST: both traces of up to `count` pairs under every wording of `PARAPHRASES`.

    A pair has the first finished traces of two generators for one question, or the first two of
    one; questions are drawn at random, and of each a pair of generators. An exact judge reads no
    rubric: its noise is drawn anew for every wording.

    Attributes:
      traces: by generator.
      generators: those of chosen and rejected traces, of every pair of generators.
      finishes: of traces that pairs may have.
      weights: hash of the judge's weights; "" of the exact judge.
    """

    prompts: PromptTable
    traces: Mapping[str, TraceTable]
    generators: tuple[tuple[str, str], ...]
    finishes: tuple[str, ...]
    judge: Judge
    weights: str
    scoring: Scoring
    count: int
    mesh: MeshShape = runtime()

    def make(self, job: Job) -> None:
        """Rates all traces once per wording."""
        pairs = self._pairs(job)
        prompts = [prompt for pair in pairs for prompt, _ in pair]
        traces = [trace for pair in pairs for _, trace in pair]
        ids, texts = [t.trace_id for t in traces], [t.text for t in traces]
        tables = []
        for wording, rubric in enumerate(PARAPHRASES):
            judge = dataclasses.replace(self.judge, seed=self.judge.seed + wording + 1)
            rate = rater(judge, self.scoring, self.mesh, rubric=rubric, drop_long=True)
            ratings, stats = rate(prompts, ids, texts)
            gone = np.isnan(ratings.expectation).any(axis=1).reshape(-1, 2).any(axis=1)
            for name, value in (stats | {"too_long": float(gone.sum())}).items():
                job.stats[name] = job.stats.get(name, 0.0) + value
            d = len(judge.dimensions)
            columns = {
                "chosen_id": [trace for trace in ids[0::2] for _ in range(d)],
                "rejected_id": [trace for trace in ids[1::2] for _ in range(d)],
                "judge": [judge.name] * (len(pairs) * d),
                "wording": [wording] * (len(pairs) * d),
                "dimension": list(judge.dimensions) * len(pairs),
                "chosen": ratings.expectation[0::2].reshape(-1),
                "rejected": ratings.expectation[1::2].reshape(-1),
            }
            table = pa.table(columns).cast(schema(Retest))
            tables.append(table.filter(pa.array(np.repeat(~gone, d))))
        job.write(pa.concat_tables(tables))

    def _pairs(self, job: Job) -> list[list[tuple[Prompt, Trace]]]:
        """Two traces each, chosen first, behind the prompt that their generator was asked."""
        found: dict[tuple[str, str], list[Trace]] = {}
        for name, table in self.traces.items():
            for trace in sorted(job.rows(Trace, table), key=lambda t: t.sample):
                if trace.finish in self.finishes and trace.text.strip():
                    found.setdefault((name, trace.prompt_id), []).append(trace)
        pairs: list[list[tuple[Prompt, Trace]]] = []
        # Ids are digests, so that their order is a random one.
        for prompt in sorted(job.rows(Prompt, self.prompts), key=lambda prompt: prompt.prompt_id):
            chosen, rejected = random.Random(prompt.prompt_id).choice(self.generators)
            sides = [
                (rejected, found.get((rejected, prompt.prompt_id), [])),
                (chosen, found.get((chosen, prompt.prompt_id), [])[chosen == rejected :]),
            ]
            if len(pairs) < self.count and all(traces for _, traces in sides):
                pairs.append([self._asked(prompt, *side) for side in reversed(sides)])
        return pairs

    def _asked(self, prompt: Prompt, generator: str, traces: list[Trace]) -> tuple[Prompt, Trace]:
        g = self.traces[generator].generator
        conversation = json.dumps(asked(prompt, g.system, g.prefix))
        return prompt._replace(messages=conversation), traces[0]
