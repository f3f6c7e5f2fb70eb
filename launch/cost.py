"""What making an artifact will take: sequences, tokens, FLOPs, memory, disk and seconds.

Numbers of sequences are upper bounds: every source full, nothing dropped. What finished artifacts
of the workspace took (`launch.rates`) gives tokens and bytes of a sequence, and seconds; without
them tokens are those of the longest sequences, bytes are a guess, and seconds are not known.
"""

import dataclasses
import functools
import os

import numpy as np

from deltapref_jax.artifacts.node import Node, in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import DIMENSIONS, ConfigError, Judge, Model, Scoring, Training
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.judging.rubric import PARAPHRASES
from deltapref_jax.mesh import rows_of
from deltapref_jax.models.flops import forward_flops, training_flops
from deltapref_jax.models.folder import has_weights
from deltapref_jax.models.lora import adapters
from deltapref_jax.models.memory import (
    BYTES,
    sampling_memory,
    scoring_memory,
    trained_parameters,
    training_memory,
)
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import describe_model
from deltapref_jax.records import Prompt
from deltapref_jax.sampling.plan import cache_positions
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.judge_mean import MeanRatingTable
from deltapref_jax.stages.micro_batches import fill_in
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.retest import RetestTable
from deltapref_jax.stages.sample import TraceTable, asked
from deltapref_jax.stages.score import LogProbTable
from deltapref_jax.stages.students import Page, StudentsReport
from deltapref_jax.stages.tokens import TraceSequences
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.tune import RateTable
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.synthetic.corrupt import DEGREES
from deltapref_jax.text.template import ChatTokenizer
from launch.rates import Kind, Rates, Taken, read_rates, sequences_of_step

_QUICKLY_MADE = 10_000  # synthetic questions, in a second
_FOLDER_BYTES = 12_000  # of manifest, shard descriptions and claims
# Compressed bytes of a row, and of each token in it, as they were in the quickstart.
_ROW_BYTES = {
    "prompts": (100, 0),
    "sample": (50, 4),
    "verify": (20, 0),
    "judge": (50, 0),
    "judge_mean": (50, 0),
    "audit": (10, 0),
    "retest": (20, 0),
    "tokens": (20, 2),
    "score": (40, 0),
    "pair": (100, 0),
    "evaluate": (40, 4),
    "tune": (50, 0),
    "report": (1_000_000, 0),
    "recipe": (20_000, 0),
    "students": (1_000_000, 0),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What has to be done for an artifact.

    Attributes:
      items: what it consists of, at most.
      unit: of them, in the plural.
      sequences: that a model reads or writes, or rows of a table that no model makes.
      longest: tokens of the longest sequence; 0 where no model reads any.
      rows: of its table; 0 where it is none.
    """

    items: int
    unit: str
    sequences: int
    longest: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What making an artifact takes.

    Attributes:
      work: sequences and what they give.
      tokens: of all sequences.
      measured: whether tokens are by the mean of finished artifacts; otherwise all are the longest.
      flops: model FLOPs of matrix products.
      memory: bytes per device; 0 without a model.
      disk: bytes that stay.
      seconds: None where the rate is not known.
    """

    work: Work
    tokens: float
    measured: bool
    flops: float
    memory: float
    disk: float
    seconds: float | None


class Estimator:
    """What artifacts take by the sizes of their models, and by what finished ones took.

    Args:
      goal: whose inputs are all the others.
      workspace: where finished artifacts are.
      length: tokens that a sequence is counted with.
      platform: of the devices, which a cache's memory depends on.
    """

    def __init__(self, goal: Node, workspace: Workspace, length: int, platform: str = "cpu"):
        self._goal, self._workspace, self._length = goal, workspace, length
        self._platform = platform
        self._spec = functools.cache(lambda path: describe_model(path)[0])
        self._by_weights = self._known_weights()

    @functools.cached_property
    def rates(self) -> Rates:
        """What finished artifacts of the workspace took."""
        return read_rates(self._workspace, self._spec_of)

    def estimate(
        self, node: Node, work: Work, tokens: float, measured: bool, flops: float
    ) -> Estimate:
        """What making the artifact takes, whether it is there or not."""
        taken = self.taken(node)
        rate = taken.seconds / taken.sequences if taken.sequences else None
        return Estimate(
            work,
            tokens,
            measured,
            flops,
            self._memory(node),
            self._disk(node, work, taken),
            None if rate is None else work.sequences * rate,
        )

    def taken(self, node: Node) -> Taken:
        """What finished artifacts like this one took."""
        return self.rates.taken.get(self._kind(node), Taken())

    def _known_weights(self) -> dict[str, str]:
        """Path of a model by the hash of its weights, of all models of the plan."""
        paths: dict[str, str] = {}
        for node in in_order([self._goal]):
            model = _model(node)
            if model:
                paths[_weights(node)] = model.place
        return paths

    def _spec_of(self, weights: str, path: str) -> ModelSpec | None:
        """Sizes of a model of the plan, or of another one that is on this machine."""
        known = self._by_weights.get(weights) if weights else None
        known = known or (path if path in self._by_weights.values() else "")
        if not known and not os.path.exists(path):
            return None
        try:
            return self._spec(known or path)
        except (OSError, ValueError):
            return None

    def _kind(self, node: Node) -> Kind:
        model = _model(node)
        if model is None:
            return node.stage, None, "", 0
        rank = node.training.lora.rank if isinstance(node, Policy) else 0
        dtype = node.dtype if isinstance(node, LogProbTable) else model.dtype
        return node.stage, self._spec(model.place).quantised(model.quantization), dtype, rank

    def _memory(self, node: Node) -> float:
        model = _model(node)
        if model is None:
            return 0.0
        spec = self._spec(model.place).quantised(model.quantization)
        if isinstance(node, TraceTable | ResultTable):
            slots, length = node.sampling.slots, cache_positions(node.sampling, self._platform)
            return sampling_memory(spec, slots, length, model.dtype, node.mesh)
        assert isinstance(node, Policy | LogProbTable | RatingTable | AuditTable | RetestTable)
        sizes = {axis: max(1, size) for axis, size in dataclasses.asdict(node.mesh).items()}
        if isinstance(node, Policy):
            training = fill_in(node.training, [self._length], sizes, spec, model.dtype)
            return training_memory(spec, training, model.dtype, node.mesh)
        if isinstance(node, LogProbTable):
            rows = rows_of(node.rows, sizes)
            return scoring_memory(spec, rows, node.row_length, node.dtype, node.mesh)
        rows, length = rows_of(node.scoring.rows, sizes), node.scoring.row_length
        return scoring_memory(spec, rows, length, model.dtype, node.mesh)

    def _disk(self, node: Node, work: Work, taken: Taken) -> float:
        """Bytes that stay: an exported policy with its checkpoints, or a table."""
        if isinstance(node, Policy):
            spec, t = self._spec(node.student.place), node.training
            return policy_bytes(spec) + t.keep_checkpoints * checkpoint_bytes(spec, t)
        if taken.sequences:
            return work.sequences * taken.disk / taken.sequences + _FOLDER_BYTES
        row, token = _ROW_BYTES.get(node.stage, (100, 0))
        length = self._length if token else 0
        return work.rows * (row + token * length) + _FOLDER_BYTES


def policy_bytes(spec: ModelSpec) -> int:
    """Of an exported policy, whose weights are float32, and of its folder."""
    return spec.parameters * 4 + _FOLDER_BYTES


def checkpoint_bytes(spec: ModelSpec, t: Training) -> int:
    """Of one checkpoint: what is trained in float32, and two moments."""
    return trained_parameters(spec, t) * (4 + 2 * BYTES[t.moments])


class Cost(Estimator):
    """Estimates of a study's artifacts."""

    def __init__(self, report: Page, workspace: Workspace, platform: str = "cpu"):
        sampling = report.experiment.sampling
        super().__init__(report, workspace, sampling.longest, platform)
        self._answer = sampling.max_tokens
        self._rows: dict[Node, int] = {}

    def __call__(self, node: Node) -> Estimate:
        """What making the artifact takes, whether it is there or not."""
        work, taken = self.work(node), self.taken(node)
        length, measured = float(work.longest), bool(taken.tokens)
        if measured:
            length = min(length, taken.tokens / taken.sequences)
        tokens, flops = work.sequences * length, work.sequences * self._flops(node, length)
        return self.estimate(node, work, tokens, measured, flops)

    def most_flops(self, node: Node) -> float:
        """FLOPs by formula if every sequence is as long as the config allows."""
        work = self.work(node)
        return work.sequences * self._flops(node, work.longest)

    def work(self, node: Node) -> Work:
        """Items, sequences and rows of an artifact."""
        if isinstance(node, PromptTable):
            questions = self._questions(node)
            return Work(questions, "prompts", questions, rows=questions)
        if isinstance(node, TraceTable):
            traces = self._traces(node)
            return Work(traces, "traces", traces, self._length, traces)
        if isinstance(node, VerdictTable):
            traces = self._traces(node.traces)
            return Work(traces, "verdicts", traces, rows=traces)
        if isinstance(node, TraceSequences | LogProbTable):
            table = node if isinstance(node, TraceSequences) else node.sequences
            assert isinstance(table, TraceSequences)  # of a study
            sequences = 2 * self._traces(table.traces)  # matched and mismatched
            longest = self._length if isinstance(node, LogProbTable) else 0
            return Work(sequences, "sequences", sequences, longest, sequences)
        if isinstance(node, RatingTable):
            return _rated(node.judge, node.scoring, self._traces(node.traces))
        if isinstance(node, MeanRatingTable):
            traces = self.work(next(iter(node.ratings.values()))[node.generator]).sequences
            ratings = traces * len(node.judge.dimensions)
            return Work(ratings, "ratings", traces, rows=ratings)
        if isinstance(node, AuditTable):
            if node.traces:
                audited = min(node.count, self._questions(node.prompts))
                return _rated(node.judge, node.scoring, audited * (1 + len(DIMENSIONS)))
            problems = min(node.count, self._questions(node.prompts))
            return _rated(node.judge, node.scoring, problems * (1 + len(DIMENSIONS) * DEGREES))
        if isinstance(node, RetestTable):
            pairs = min(node.count, self._questions(node.prompts))
            return _rated(node.judge, node.scoring, 2 * pairs * len(PARAPHRASES))
        if isinstance(node, ResultTable):
            answers = self._questions(node.questions) * node.samples
            return Work(answers, "answers", answers, self._length, answers)
        if isinstance(node, PairTable):
            pairs = self._pool(node)
            return Work(pairs, "pairs", pairs, rows=pairs)
        if isinstance(node, Policy):
            return self._trained(node)
        if isinstance(node, RateTable):
            return Work(len(node.rates), "rates", len(node.rates), rows=len(node.rates))
        if isinstance(node, StudentsReport):
            return Work(1, "pages", 1, rows=1 + len(node.reports))  # with a copy of theirs
        return Work(1, "pages", 1, rows=1)

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

    def _pool(self, pairs: PairTable) -> int:
        pool = self._questions(pairs.prompts)
        return max(1, min(pairs.kept, pool) if pairs.kept else int(pool * pairs.fraction))

    def _trained(self, policy: Policy) -> Work:
        t = policy.training
        assert policy.pairs is not None  # policies of a study have pairs
        steps = t.steps
        if t.budget == "epochs":
            steps = -(-int(self._pool(policy.pairs) * t.epochs) // t.pairs_per_step)
        sequences = steps * sum(_sequences_of_step(policy))
        return Work(steps, "steps", sequences, min(self._length, t.row_length or self._length))

    def _flops(self, node: Node, length: float) -> float:
        """Of one sequence."""
        model, positions = _model(node), np.arange(round(length))
        if model is None:
            return 0.0
        spec = self._spec(model.place)
        if isinstance(node, RatingTable | AuditTable | RetestTable):
            return forward_flops(spec, positions, len(node.judge.dimensions))
        targets = min(self._answer, len(positions))
        if isinstance(node, Policy):
            work = spec, positions, targets, adapters(node.training.lora, spec)
            trained, baseline = _sequences_of_step(node)
            both = trained * training_flops(*work) + baseline * forward_flops(*work)
            return both / (trained + baseline)
        return forward_flops(spec, positions, targets)


def _sequences_of_step(policy: Policy) -> tuple[int, int]:
    objective, t = policy.objective, policy.training
    return sequences_of_step(objective.kind, objective.baseline_fraction, t.pairs_per_step)


def _model(node: Node) -> Model | None:
    """The model that makes an artifact; None where none does."""
    if isinstance(node, TraceTable):
        return node.generator.model
    if isinstance(node, RatingTable | AuditTable | RetestTable):
        return None if node.judge.kind == "exact" else node.judge.model
    if isinstance(node, LogProbTable | ResultTable):
        return node.model
    return node.student if isinstance(node, Policy) else None


def _weights(node: Node) -> str:
    """Hash of the model's weights; "" of a policy that is not trained yet."""
    return str(node.student_weights if isinstance(node, Policy) else getattr(node, "weights", ""))


def _rated(judge: Judge, scoring: Scoring, texts: int) -> Work:
    ratings = texts * len(judge.dimensions)
    longest = 0 if judge.kind == "exact" else scoring.row_length
    return Work(ratings, "ratings", texts, longest, ratings)


def check_prompts(report: Page, workspace: Workspace) -> None:
    """Compares prompts with config.sampling.max_prompt, as sampling will do.

    Looked at are tables of prompts that are there, and sources that are on this machine, with the
    tokenizers of models that have one.

    Raises:
      ConfigError: the longest prompt is too long.
    """
    read = functools.cache(lambda table: _known_prompts(table, workspace))
    texts = functools.cache(lambda path: describe_model(path)[1])
    longest = functools.cache(
        lambda table, path, system, prefix: max(
            (len(_prompt_ids(texts(path), asked(p, system, prefix))) for p in read(table)),
            default=0,
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


def _prompt_ids(text: ChatTokenizer | None, messages: list[dict[str, str]]) -> list[int]:
    """A prompt's tokens; none for a model without a tokenizer."""
    return text.prompt_ids(messages) if text else []


def described_alone(goal: Node) -> list[str]:
    """Paths of the models of a plan that have no weights, so that a config.json describes them."""
    models = {m.place: m.path for m in map(_model, in_order([goal])) if m}
    return [path for place, path in models.items() if not has_weights(place)]


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
