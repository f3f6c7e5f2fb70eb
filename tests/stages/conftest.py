"""Tables given to a stage, as artifacts of a stage that only writes them."""

import dataclasses

import pytest
from deltapref_jax.workspace import Node, Workspace, run

from deltapref_jax import records
from deltapref_jax.config import MeshShape, Scoring
from deltapref_jax.models.weights import weights_hash
from deltapref_jax.records import digest, table
from deltapref_jax.stages import audit, judge, pair, score, train
from deltapref_jax.synthetic import world

QUESTIONS = world.prompts(("chain", "shop"), 6, 1, 3)


def write(job):
    job.write(table(getattr(records, job.local["schema"]), job.local["rows"]))


STAGES = {
    "given": write,
    "audit": audit.audit,
    "judge": judge.judge,
    "pair": pair.pair,
    "score": score.score,
    "train": train.train_arm,
}


class Bench:
    """Makes one stage's artifact in a workspace of its own."""

    def __init__(self, root, folder):
        self.workspace, self.folder, self.weights = (
            Workspace(root),
            str(folder),
            weights_hash(str(folder)),
        )
        self.questions = QUESTIONS
        self.prompts = self.given("PROMPT", QUESTIONS)

    def given(self, schema, rows):
        return Node(
            "given", schema, {"rows": digest(schema, rows)}, {}, {"schema": schema, "rows": rows}
        )

    def traces(self, generator, texts, finish="eos"):
        """One trace of every question; `finish` for all of them, or one each."""
        each = [finish] * len(texts) if isinstance(finish, str) else finish
        return self.given(
            "TRACE",
            [
                {
                    "trace_id": digest(q["prompt_id"], generator),
                    "prompt_id": q["prompt_id"],
                    "generator": generator,
                    "weights": "",
                    "sample": 0,
                    "text": words,
                    "token_ids": [1],
                    "finish": end,
                    "logprob": -1.0,
                    "tokens": len(words),
                }
                for q, words, end in zip(self.questions, texts, each, strict=False)
            ],
        )

    def score(self, traces, seed=0, **shape):
        """The student scores."""
        scoring = dataclasses.asdict(Scoring(**{"rows": 8, "row_length": 160, "shard": 4} | shape))
        return Node(
            "score",
            "score",
            {"weights": self.weights, "dtype": "float32", "seed": seed, "scoring": scoring},
            {"sample": traces, "prompts": self.prompts},
            {"model": {"path": self.folder}, "mesh": self.mesh},
        )

    mesh = dataclasses.asdict(MeshShape())

    def make(self, node):
        run({"it": node}, STAGES, self.workspace, show=False)
        return node

    def rows(self, node):
        return self.workspace.table(self.make(node)).to_pylist()

    def stats(self, node):
        return self.workspace.manifest(self.make(node))["stats"]


@pytest.fixture
def bench(tmp_path, tiny_folder):
    return Bench(tmp_path, tiny_folder)


@pytest.fixture(scope="session")
def worked():
    """A clean and a careless solution of every question."""
    import random

    problems = [world.from_meta(q["meta"]) for q in QUESTIONS]
    return (
        [world.solution(p) for p in problems],
        [world.solution(p, random.Random(i), 0.7) for i, p in enumerate(problems)],
    )
