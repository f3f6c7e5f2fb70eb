"""What a study's stages read and write, and how a training step is cut into micro-batches.

The counts are those of a dry run (`launch.cost`).
"""

import dataclasses
from collections.abc import Iterator, Mapping

from deltapref_jax.artifacts.node import distinct
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    STUDENT,
    Experiment,
    Objective,
    PairTraining,
    Training,
)
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.micro_batches import filled_line
from deltapref_jax.stages.retest import RetestTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.score import LogProbTable
from deltapref_jax.stages.study import plan
from deltapref_jax.stages.train import Policy
from launch.cost import Cost
from launch.rates import sequences_of_step


@dataclasses.dataclass(frozen=True)
class Load:
    """Sequences of one stage and model.

    Attributes:
      stage: "train", "score", "judge" or "sample".
      of: kind of objective, name of the judge or generator, "student".
      sequences: that are read or written.
      prompt: tokens of a sequence that are read; what is sampled comes on top.
      written: tokens of a sequence that are sampled.
      prompts: that are prefilled, each once for all its samples.
    """

    stage: str
    of: str
    sequences: int
    prompt: int
    written: int = 0
    prompts: int = 0

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * (self.prompt + self.written)


def study_load(e: Experiment) -> list[Load]:
    """The loads of a study, whether its artifacts are there or not.

    Raises:
      ConfigError, OSError: the study cannot be planned, such as for want of its prompts.
    """
    report = plan(e, weights=False)
    cost = Cost(report, Workspace(e.workspace))
    s, found = e.sampling, dict[tuple[str, str, int], Load]()
    for node in distinct([report]):
        work = cost.work(node)
        for stage, of in _model_of(node):
            if work.longest:
                key = stage, of, work.longest
                written, prompts = 0, 0
                if isinstance(node, TraceTable | ResultTable):
                    samples = (node.generator if isinstance(node, TraceTable) else node).samples
                    written, prompts = s.max_tokens, work.sequences // samples
                load = found.setdefault(key, Load(stage, of, 0, work.longest - written, written))
                found[key] = dataclasses.replace(
                    load,
                    sequences=load.sequences + work.sequences,
                    prompts=load.prompts + prompts,
                )
    return list(found.values())


def _model_of(node: object) -> Iterator[tuple[str, str]]:
    """Stage and name of the programs that make an artifact; none where no model does."""
    if isinstance(node, TraceTable):
        yield "sample", node.generator.name
    elif isinstance(node, ResultTable):
        yield "sample", node.label[1] if node.label[0] == "capability" else STUDENT
    elif isinstance(node, RatingTable | AuditTable | RetestTable):
        yield "judge", node.judge.name
    elif isinstance(node, LogProbTable):
        yield "score", "reference"
    elif isinstance(node, Policy):
        yield "train", node.objective.kind


def pair_load(p: PairTraining) -> list[Load]:
    """The load of a training from a file whose rows are not counted.

    How long an epoch is, and how many sequences the reference scores, is not known.
    """
    t, kind = p.training, p.objective.kind
    if t.budget == "epochs":
        return []
    fraction = p.objective.baseline_fraction
    sequences = t.steps * sum(sequences_of_step(kind, fraction, t.pairs_per_step))
    return [Load("train", kind, sequences, t.row_length)]


@dataclasses.dataclass(frozen=True)
class Step:
    """How a training step is cut into micro-batches.

    Attributes:
      micro_batches: of the gradient; half a one counts 0.5.
      baseline: micro-batches of KTO's baseline.
      sequences: of the step, without the baseline's.
      length: tokens of each, all of them or in the mean.
      filled: share of the positions of these micro-batches that hold a token.
    """

    micro_batches: float
    baseline: float
    sequences: int
    length: int
    filled: float


def longest_of(config: Experiment | PairTraining) -> int:
    """Tokens of the longest sequence that a config allows."""
    if isinstance(config, PairTraining):
        return config.training.row_length
    return config.sampling.longest


def steps_of(config: Experiment | PairTraining) -> dict[str, Step]:
    """How a step of every kind of objective is cut into micro-batches, by the kind."""
    t, mesh = config.training, dataclasses.asdict(config.training.mesh)
    objectives = [config.objective] if isinstance(config, PairTraining) else config.objectives
    return {o.kind: step_of(t, o, longest_of(config), mesh) for o in objectives}


def step_of(
    t: Training,
    objective: Objective,
    length: int,
    mesh: Mapping[str, int],
    measured: bool = False,
) -> Step:
    """The micro-batches of a step.

    Args:
      t: shapes, none of them open.
      objective: that is trained.
      length: tokens of every sequence, of which rows hold whole ones.
      mesh: devices along every axis.
      measured: the length is a mean; sequences of different lengths are packed without a gap.
    """
    row_shards = mesh["data"] * mesh["fsdp"]
    fraction = objective.baseline_fraction
    sequences, unmatched = sequences_of_step(objective.kind, fraction, t.pairs_per_step)
    length = min(length, t.row_length)
    held = t.rows * (t.row_length / length if measured else t.row_length // length)

    def batches(count: float) -> float:
        # A last micro-batch that is half empty runs as half of it (`packing.drop_empty_half`).
        part = 2 if t.rows % 2 == 0 and t.rows // 2 % row_shards == 0 else 1
        return -(-count * part // held) / part

    micros = batches(sequences)
    filled = sequences * length / (micros * t.rows * t.row_length)
    return Step(micros, batches(unmatched), sequences, length, filled)


def step_line(kind: str, step: Step, mesh: Mapping[str, int], measured: bool = False) -> str:
    """A sentence on how full a training step is, and a second one if it is too empty.

    `measured` says whether the length is a mean and not the longest. Shorter sequences than the
    longest may fill more or less.
    """
    batches = f"{step.micro_batches:g} micro-batch{'es' * (step.micro_batches != 1)}"
    many, warning = (
        f"A step of {kind}: {step.sequences:,} sequences",
        filled_line(step.filled, mesh),
    )
    if measured:
        sentence = (
            f"{many} of about {step.length:,} tokens in {batches}, about {step.filled:.0%} of the "
            "positions filled."
        )
        return f"{sentence} {warning}".rstrip()
    sentence = (
        f"{many}; if all have the longest {step.length:,} tokens, they fill {step.filled:.0%} of "
        f"the positions of {batches}."
    )
    return f"{sentence} Then {warning}" if warning else sentence
