"""The plan of a dry run: every artifact, which exist, and what the rest will cost at most."""

import functools

from rich.table import Table

from deltapref_jax.artifacts.node import Node, in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import DIMENSIONS, OBJECTIVE_KINDS, ConfigError, Judge, Scoring
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.models.folder import resolve
from deltapref_jax.records import Prompt
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.report import Report
from deltapref_jax.stages.sample import TraceTable, asked
from deltapref_jax.stages.score import LogProbTable
from deltapref_jax.stages.tokens import TraceSequences
from deltapref_jax.stages.train import Policy
from deltapref_jax.synthetic.corrupt import DEGREES
from deltapref_jax.text.template import ChatTokenizer

_QUICKLY_MADE = 10_000  # synthetic questions, in a second


class Cost:
    """Upper bounds by artifact: every source full, every prompt and trace at its longest."""

    def __init__(self, report: Report, workspace: Workspace):
        self._report, self._workspace = report, workspace
        sampling = report.experiment.sampling
        self._longest = sampling.max_prompt + sampling.max_tokens
        self._rows: dict[Node, int] = {}

    def __call__(self, node: Node) -> tuple[int, int]:
        """Traces and tokens that making the artifact takes: sampled, read, or trained on."""
        if isinstance(node, TraceTable):
            return self._traces(node), self._traces(node) * self._longest
        if isinstance(node, LogProbTable):
            assert isinstance(node.sequences, TraceSequences)  # of a study
            sequences = 2 * self._traces(node.sequences.traces)  # matched and mismatched
            return sequences, sequences * self._longest
        if isinstance(node, RatingTable):
            return self._rated(node.judge, node.scoring, self._traces(node.traces))
        if isinstance(node, AuditTable):
            problems = min(node.count, self._questions(node.prompts))
            solutions = problems * (1 + len(DIMENSIONS) * DEGREES)
            return self._rated(node.judge, node.scoring, solutions)
        if isinstance(node, ResultTable):
            answers = self._questions(node.questions) * node.samples
            return answers, answers * self._longest
        if isinstance(node, Policy):
            return self._trained(node)
        return 0, 0

    def _questions(self, prompts: PromptTable) -> int:
        if prompts not in self._rows:
            if self._workspace.complete(prompts):
                self._rows[prompts] = int(self._workspace.manifest(prompts).stats["rows"])
            else:  # a count of 0 means all that a file holds
                self._rows[prompts] = sum(
                    p.count or len(read_prompts(p)[0]) for p in prompts.sources
                )
        return self._rows[prompts]

    def _traces(self, table: TraceTable) -> int:
        return self._questions(table.prompts) * table.generator.samples

    def _rated(self, judge: Judge, scoring: Scoring, texts: int) -> tuple[int, int]:
        return texts, 0 if judge.kind == "exact" else texts * scoring.row_length

    def _trained(self, policy: Policy) -> tuple[int, int]:
        t, kind = policy.training, OBJECTIVE_KINDS[policy.objective.kind]
        assert policy.pairs is not None  # policies of a study have pairs
        pool = max(1, int(self._questions(policy.pairs.prompts) * policy.pairs.fraction))
        pairs = t.pairs_per_step * t.steps
        if t.budget == "epochs":
            pairs = int(pool * t.epochs) + t.pairs_per_step
        # KTO reads each completion behind another prompt too
        traces = pairs * (1 if kind.unit == "token" else 2) * (1 + kind.baseline)
        return traces, traces * min(self._longest, t.row_length)


def check_prompts(report: Report, workspace: Workspace) -> None:
    """Compares prompts with config.sampling.max_prompt, as sampling will do.

    Looked at are tables of prompts that are there, and sources that are on this machine.

    Raises:
      ConfigError: the longest prompt is too long.
    """
    read = functools.cache(lambda table: _known_prompts(table, workspace))
    texts = functools.cache(lambda path: ChatTokenizer.load(resolve(path, weights=False)))
    longest = functools.cache(
        lambda table, path, system, prefix: max(
            (len(texts(path).prompt_ids(asked(p, system, prefix))) for p in read(table)), default=0
        )
    )
    lengths = {}
    for node in in_order([report]):
        if isinstance(node, TraceTable) and not workspace.complete(node):
            g = node.generator
            lengths[node.name] = longest(node.prompts, g.model.place, g.system, g.prefix)
        elif isinstance(node, ResultTable) and not workspace.complete(node):
            lengths[node.name] = longest(node.questions, node.model.place, node.system, node.prefix)
    worst = max(lengths, key=lambda name: lengths[name], default="")
    most = report.experiment.sampling.max_prompt
    if worst and lengths[worst] > most:
        raise ConfigError(
            f"The longest prompt of {worst} has {lengths[worst]} tokens and "
            f"config.sampling.max_prompt is {most}; raise it."
        )


def _known_prompts(table: PromptTable, workspace: Workspace) -> list[Prompt]:
    if workspace.complete(table):
        return list(workspace.rows(Prompt, table))
    local = [
        source
        for source in table.sources
        if source.kind in ("jsonl", "parquet", "tfds")
        or (source.kind == "synthetic" and source.count <= _QUICKLY_MADE)
    ]
    return [prompt for source in local for prompt in read_prompts(source)[0]]


def plan_table(report: Report, workspace: Workspace) -> Table:
    """A row per artifact: name, key, whether it is there, and what making it takes.

    A key hashes the contents of the inputs, so before these are made nobody knows whether what is
    behind them is there: such artifacts have a "?", and a sum of their own.
    """
    cost = Cost(report, workspace)
    e = report.experiment
    table = Table(title=f"{e.name}: {e.question}", title_justify="left")
    table.add_column("artifact", overflow="fold")
    table.add_column("key", no_wrap=True)
    table.add_column("there")
    table.add_column("traces ≤", justify="right", no_wrap=True)
    table.add_column("tokens ≤", justify="right", no_wrap=True)
    sums = {"yes": [0, 0, 0], "no": [0, 0, 0], "?": [0, 0, 0]}  # artifacts, traces, tokens
    for node in in_order([report]):
        key = workspace.key(node)
        there = "?" if key is None else "yes" if workspace.complete(node) else "no"
        needs = (0, 0) if there == "yes" else cost(node)
        sums[there] = [a + b for a, b in zip(sums[there], (1, *needs), strict=True)]
        table.add_row(node.name, key or "", there, *(f"{n:,}" if n else "" for n in needs))
    table.add_section()
    total = sum(count for count, _, _ in sums.values())
    table.add_row(f"{total} artifacts")
    for there, words in (("yes", "there"), ("no", "missing"), ("?", "behind missing ones")):
        count, traces, tokens = sums[there]
        table.add_row(f"{count} {words}", "", there, f"{traces:,}", f"{tokens:,}")
    return table
