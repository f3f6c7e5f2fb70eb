"""audit: a judge against corruptions of a known dimension and a known degree."""

import random
from typing import NamedTuple

import pyarrow as pa

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import DIMENSIONS, Judge, MeshShape, Scoring
from deltapref_jax.records import Audit, Prompt, digest, schema
from deltapref_jax.stages.judge import rater
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.world import from_meta, solution


class _Case(NamedTuple):
    """A solution to rate."""

    prompt: Prompt
    target: str  # dimension that was corrupted; "" for the clean solution
    degree: int
    text: str


class AuditTable(Node, stage="audit", version=3):
    """AUDIT: ratings of solutions of the first `count` synthetic questions, clean and corrupted.

    Every question is solved by program and corrupted in every dimension and degree.

    Attributes:
      weights: hash of the judge's weights; "" of the exact judge.
    """

    prompts: PromptTable
    judge: Judge
    weights: str
    scoring: Scoring
    count: int
    seed: int
    mesh: MeshShape = runtime()

    def make(self, job: Job) -> None:
        """Rates all solutions in one pass."""
        synthetic = [p for p in job.rows(Prompt, self.prompts) if p.checker == "world"]
        cases = [case for prompt in synthetic[: self.count] for case in self._cases(prompt)]
        ids = [digest(case.prompt.prompt_id, case.target, case.degree) for case in cases]
        rate = rater(self.judge, self.scoring, self.mesh)
        ratings, job.stats = rate([c.prompt for c in cases], ids, [c.text for c in cases])
        d = len(self.judge.dimensions)
        columns = {
            "prompt_id": [case.prompt.prompt_id for case in cases for _ in range(d)],
            "judge": [self.judge.name] * (len(cases) * d),
            "target": [case.target for case in cases for _ in range(d)],
            "degree": [case.degree for case in cases for _ in range(d)],
            "dimension": list(self.judge.dimensions) * len(cases),
            "rating": ratings.expectation.reshape(-1),
        }
        job.write(pa.table(columns).cast(schema(Audit)))

    def _cases(self, prompt: Prompt) -> list[_Case]:
        problem = from_meta(prompt.meta)
        # Python seeds from a string alike in every process; each question has draws of its own.
        rng = random.Random(f"{self.seed}|{prompt.prompt_id}")
        return [_Case(prompt, "", 0, solution(problem))] + [
            _Case(prompt, dimension, degree, corrupt(problem, dimension, degree, rng))
            for dimension in DIMENSIONS
            for degree in range(1, DEGREES + 1)
        ]
