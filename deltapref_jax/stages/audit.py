"""audit: a judge against corruptions of a known dimension and a known degree."""

import dataclasses
import json
import random
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from deltapref_jax.answers.check import check
from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import ADDED, DIMENSIONS, Judge, MeshShape, Scoring
from deltapref_jax.judging.edit import edit
from deltapref_jax.records import Audit, Prompt, Trace, digest, schema
from deltapref_jax.stages.judge import rater
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable, asked
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.world import from_meta, solution


class _Case(NamedTuple):
    """A text to rate."""

    prompt: Prompt  # as it was asked
    target: str  # dimension that was corrupted; "" for the text as it was
    degree: int
    text: str


class AuditTable(Node, stage="audit", version=4):
    """AUDIT: ratings of texts as they were and corrupted on purpose.

    Without `traces` the texts are solutions by program of the first `count` synthetic questions,
    corrupted in every dimension and degree (`synthetic.corrupt`). With them they are traces that
    the generators wrote, of up to `count` questions drawn at random one each, by a generator that
    is drawn; each trace is edited once in every dimension, to a degree that is drawn
    (`judging.edit`). Edits that a trace has no place for are counted as `uneditable`.

    Attributes:
      weights: hash of the judge's weights; "" of the exact judge.
      traces: by generator.
      finishes: of the traces that may be edited.
    """

    prompts: PromptTable
    judge: Judge
    weights: str
    scoring: Scoring
    count: int
    seed: int
    traces: Mapping[str, TraceTable] = dataclasses.field(default_factory=dict, metadata=ADDED)
    finishes: tuple[str, ...] = dataclasses.field(default=(), metadata=ADDED)
    mesh: MeshShape = runtime()

    def make(self, job: Job) -> None:
        """Rates all texts in one pass."""
        cases = self._edited(job) if self.traces else self._corrupted(job)
        ids = [digest(case.prompt.prompt_id, case.target, case.degree) for case in cases]
        # An edit may make a trace too long that was not.
        rate = rater(self.judge, self.scoring, self.mesh, drop_long=True)
        ratings, stats = rate([c.prompt for c in cases], ids, [c.text for c in cases])
        job.stats |= stats
        d = len(self.judge.dimensions)
        correct = [check(case.prompt._asdict(), case.text).correct for case in cases]
        columns = {
            "prompt_id": [case.prompt.prompt_id for case in cases for _ in range(d)],
            "judge": [self.judge.name] * (len(cases) * d),
            "target": [case.target for case in cases for _ in range(d)],
            "degree": [case.degree for case in cases for _ in range(d)],
            "dimension": list(self.judge.dimensions) * len(cases),
            "rating": ratings.expectation.reshape(-1),
            "correct": [right for right in correct for _ in range(d)],
            "characters": [len(case.text) for case in cases for _ in range(d)],
        }
        job.stats["too_long"] = float(np.isnan(ratings.expectation).any(axis=1).sum())
        rated = ~np.isnan(ratings.expectation).reshape(-1)
        job.write(pa.table(columns).cast(schema(Audit)).filter(pa.array(rated)))

    def _corrupted(self, job: Job) -> list[_Case]:
        synthetic = [p for p in job.rows(Prompt, self.prompts) if p.checker == "world"]
        return [
            _Case(prompt, target, degree, text)
            for prompt in synthetic[: self.count]
            for target, degree, text in self._solutions(prompt)
        ]

    def _solutions(self, prompt: Prompt) -> list[tuple[str, int, str]]:
        problem = from_meta(prompt.meta)
        rng = self._rng(prompt)
        return [("", 0, solution(problem))] + [
            (dimension, degree, corrupt(problem, dimension, degree, rng))
            for dimension in DIMENSIONS
            for degree in range(1, DEGREES + 1)
        ]

    def _edited(self, job: Job) -> list[_Case]:
        usable = {
            name: {
                trace.prompt_id: trace
                for trace in job.rows(Trace, table)
                if trace.sample == 0 and trace.finish in self.finishes and trace.text.strip()
            }
            for name, table in self.traces.items()
        }
        # Ids are digests, so that their order is a random one.
        prompts = sorted(job.rows(Prompt, self.prompts), key=lambda prompt: prompt.prompt_id)
        drawn: list[tuple[Prompt, Trace, random.Random]] = []
        for prompt in prompts:
            rng = self._rng(prompt)
            generator = rng.choice(list(self.traces))
            if len(drawn) < self.count and prompt.prompt_id in usable[generator]:
                drawn.append((prompt, usable[generator][prompt.prompt_id], rng))
        cases = []
        for prompt, trace, rng in drawn:
            g = self.traces[trace.generator].generator
            seen = prompt._replace(messages=json.dumps(asked(prompt, g.system, g.prefix)))
            cases.append(_Case(seen, "", 0, trace.text))
            others = [other.text for _, other, _ in drawn if other is not trace]
            for dimension in DIMENSIONS:
                degree = rng.randint(1, DEGREES)
                text = edit(prompt.question, trace.text, dimension, degree, others, rng)
                if text is not None:
                    cases.append(_Case(seen, dimension, degree, text))
        job.stats["uneditable"] = float(len(drawn) * (1 + len(DIMENSIONS)) - len(cases))
        return cases

    def _rng(self, prompt: Prompt) -> random.Random:
        # Python seeds from a string alike in every process; each question has draws of its own.
        return random.Random(f"{self.seed}|{prompt.prompt_id}")
