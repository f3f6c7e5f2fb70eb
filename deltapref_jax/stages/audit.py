"""audit: a judge against corruptions of a known dimension and a known degree."""

import random

import pyarrow as pa

from deltapref_jax.config import DIMENSIONS, Judge, MeshShape, Model, Scoring
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.judging.scorer import rate_traces
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import load
from deltapref_jax.records import AUDIT, digest
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.world import from_meta, meta, solution
from deltapref_jax.workspace import Job

VERSION = 1


def audit(job: Job) -> None:
    """The first `count` synthetic questions of PROMPT, solved, corrupted in every dimension and degree, and rated."""
    fields = dict(job.config["judge"])
    who = Judge(
        **fields
        | {"model": Model(**job.local.get("model", {})), "dimensions": tuple(fields["dimensions"])}
    )
    questions = [row for row in job.table("prompts").to_pylist() if row["checker"] == "world"][
        : job.config["count"]
    ]
    cases = []
    for row in questions:
        problem = from_meta(row["meta"])
        rng = random.Random(f"{job.config['seed']}|{row['prompt_id']}")
        cases.append((row["prompt_id"], "", 0, problem, solution(problem)))
        for dimension in DIMENSIONS:
            for degree in range(1, DEGREES + 1):
                cases.append(
                    (
                        row["prompt_id"],
                        dimension,
                        degree,
                        problem,
                        corrupt(problem, dimension, degree, rng),
                    )
                )
    texts = [case[4] for case in cases]
    if who.kind == "exact":
        ids = [digest(case[0], case[1], case[2]) for case in cases]
        ratings = rate_exactly(
            [meta(case[3]) for case in cases], texts, ids, who.dimensions, who.noise, who.seed
        )
    else:
        ratings, job.stats = rate_traces(
            load(who.model.path, who.model.dtype),
            [case[3].question for case in cases],
            texts,
            who.dimensions,
            Scoring(**job.config["scoring"]),
            make_mesh(MeshShape(**job.local["mesh"])),
            who.model.dtype,
        )
    d = len(who.dimensions)
    job.write(
        pa.table(
            {
                "prompt_id": [case[0] for case in cases for _ in range(d)],
                "judge": [who.name] * (len(cases) * d),
                "target": [case[1] for case in cases for _ in range(d)],
                "degree": [case[2] for case in cases for _ in range(d)],
                "dimension": list(who.dimensions) * len(cases),
                "rating": ratings.expectation.reshape(-1),
            }
        ).cast(AUDIT)
    )
