"""Tables given to a stage, as artifacts of a stage that only writes them."""

import random

import pytest

from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Generator, MeshShape, Model
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.records import Prompt, Trace, digest, to_table
from deltapref_jax.stages.score import LogProbTable
from deltapref_jax.stages.tokens import TraceSequences
from deltapref_jax.synthetic import world
from deltapref_jax.text.template import ChatTokenizer

QUESTIONS = world.prompts(("chain", "shop"), 6, 1, 3)


class Given(Node, stage="given", version=1):
    """A table that a test writes down.

    Attributes:
      content: digest of the rows.
      metadata: of the table's schema.
      generator: that wrote a table of traces.
    """

    content: str
    metadata: dict[str, str]
    record: type = runtime()
    rows: tuple = runtime()
    generator: Generator | None = runtime(default=None)

    def make(self, job):
        table = to_table(self.record, self.rows)
        job.write(table.replace_schema_metadata(self.metadata) if self.metadata else table)


def given(record, rows, **metadata):
    content = digest(record.__name__, to_table(record, rows).to_pylist())
    return Given(
        label=("given", record.__name__),
        content=content,
        metadata=metadata,
        record=record,
        rows=tuple(rows),
    )


def trace(prompt_id, generator, text, finish="eos", token_ids=(1,)):
    return Trace(
        trace_id=digest(prompt_id, generator),
        prompt_id=prompt_id,
        generator=generator,
        weights="",
        sample=0,
        text=text,
        token_ids=list(token_ids),
        finish=finish,
        logprob=-1.0,
        tokens=len(text),
    )


class Bench:
    """Makes one stage's artifact in a workspace of its own."""

    mesh = MeshShape()
    given = staticmethod(given)

    def __init__(self, root, folder):
        self.workspace, self.folder = Workspace(root), str(folder)
        self.weights, self.model = weights_hash(self.folder), Model(path=self.folder)
        self.tokenizer = ChatTokenizer.load(self.folder).identity
        self.questions = QUESTIONS
        self.prompts = given(Prompt, QUESTIONS)

    def traces(self, generator, texts, finish="eos", token_ids=None):
        """One trace of every question; `finish` for all of them, or one each."""
        finishes = [finish] * len(texts) if isinstance(finish, str) else finish
        sampled = token_ids or [(1,)] * len(texts)
        rows = [
            trace(question.prompt_id, generator, *parts)
            for question, *parts in zip(self.questions, texts, finishes, sampled, strict=False)
        ]
        return given(Trace, rows)

    def tokens(self, traces, sampled=False, shard=4):
        """The traces under the student's tokenizer; by default their texts."""
        return TraceSequences(
            label=("tokens",),
            tokenizer=self.tokenizer,
            model=self.model,
            prompts=self.prompts,
            traces=traces,
            sampled=sampled,
            shard=shard,
        )

    def score(self, sequences, rows=8, row_length=160, shard=8, **fields):
        """The student scores sequences."""
        return LogProbTable(
            label=("score",),
            sequences=sequences,
            weights=self.weights,
            dtype="float32",
            rows=rows,
            row_length=row_length,
            shard=shard,
            model=self.model,
            mesh=self.mesh,
            **fields,
        )

    def make(self, node):
        run([node], self.workspace, show=False)
        return node

    def rows(self, record, node):
        return self.workspace.rows(record, self.make(node))

    def schema(self, node):
        return self.workspace.table(node).schema

    def stats(self, node):
        return self.workspace.manifest(self.make(node)).stats


@pytest.fixture
def bench(tmp_path, tiny_folder):
    return Bench(tmp_path, tiny_folder)


@pytest.fixture(scope="session")
def worked():
    """A clean and a careless solution of every question."""
    problems = [world.from_meta(question.meta) for question in QUESTIONS]
    return (
        [world.solution(p) for p in problems],
        [world.solution(p, random.Random(i), 0.7) for i, p in enumerate(problems)],
    )
