"""The dry run of `launch.train`: what a file holds, and what training on it will take.

The file is read and tokenised, and steps are packed, as a run does it; nothing is written.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from deltapref_jax.artifacts.node import Node
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import OBJECTIVE_KINDS, PairTraining
from deltapref_jax.devices import Devices
from deltapref_jax.mesh import rows_of
from deltapref_jax.models.flops import forward_flops
from deltapref_jax.models.lora import adapters
from deltapref_jax.models.weights import describe_model
from deltapref_jax.records import TokenSequence, from_table
from deltapref_jax.stages.meshes import training_lines
from deltapref_jax.stages.pairs_file import steps_of
from deltapref_jax.stages.score import LogProbTable, read_logprobs, table_files
from deltapref_jax.stages.tokens import FileSequences
from deltapref_jax.stages.train import Policy
from deltapref_jax.training.data import Data, StepData
from deltapref_jax.training.monitor import step_flops
from launch.cost import Estimate, Estimator, Work, checkpoint_bytes, policy_bytes
from launch.dry_run import plan_rows, short_bytes, show_rows
from launch.trained import show_data
from launch.workload import Step, step_line

_PACKED = 20  # steps that are packed for an estimate


class FileCost(Estimator):
    """Estimates of a policy's artifacts, by the sequences of its file.

    Args:
      policy: its node, with all four sizes of its mesh.
      workspace: where finished artifacts are.
      rows: the sequences of the file.
      data: the steps.
    """

    def __init__(
        self, policy: Policy, workspace: Workspace, rows: Sequence[TokenSequence], data: Data
    ):
        super().__init__(policy, workspace, round(float(np.mean([row.length for row in rows]))))
        self._policy, self._rows, self._data = policy, rows, data

    def __call__(self, node: Node) -> Estimate:
        """What making the artifact takes, whether it is there or not."""
        unit = OBJECTIVE_KINDS[self._data.kind].unit
        if isinstance(node, FileSequences):
            items = len(self._data.groups) + self._data.dropped
            count = len(self._rows)
            work = Work(items, "pairs" if unit == "pair" else "examples", count, rows=count)
            return self.estimate(node, work, 0, True, 0)
        if isinstance(node, LogProbTable):
            known = read_logprobs(table_files(node.table), node.weights) if node.table else {}
            new = [row for row in self._rows if row.sequence_id not in known]
            work = Work(len(new), "sequences", len(new), node.row_length, len(self._rows))
            tokens = sum(row.length for row in new)
            return self.estimate(node, work, tokens, True, self._forward_flops(node, new))
        assert isinstance(node, Policy)
        share = self._data.steps / len(self.steps)
        spec = self._spec(node.student.place)
        shape = adapters(node.training.lora, spec)
        read = [_sequences(step) for step in self.steps]
        return self.estimate(
            node,
            Work(self._data.steps, "steps", round(share * sum(read)), node.training.row_length),
            share * sum(step.tokens for step in self.steps),
            True,
            share * sum(step_flops(spec, step, shape) for step in self.steps),
        )

    def _forward_flops(self, node: LogProbTable, rows: Sequence[TokenSequence]) -> float:
        """Of every sequence by itself."""
        spec = self._spec(node.model.place)
        lengths = Counter((row.length, int(row.targets.sum())) for row in rows)
        return sum(
            count * forward_flops(spec, np.arange(length), targets)
            for (length, targets), count in lengths.items()
        )

    @functools.cached_property
    def steps(self) -> list[StepData]:
        """Steps of the run, evenly spread and packed as it packs them."""
        last = self._data.steps - 1
        chosen = np.unique(np.linspace(0, last, min(_PACKED, last + 1)).round().astype(int))
        shards = self._policy.mesh.data * self._policy.mesh.fsdp
        return [self._data(int(step)).drop_empty_halves(shards) for step in chosen]

    def notes(self) -> Iterable[str]:
        """What the numbers of tokens are, how a step is cut, and what checkpoints take."""
        data, t, steps = self._data, self._policy.training, self.steps
        epochs = data.steps * data.batch / len(data.groups)
        yield (
            f"Tokens: of the file's own sequences, which are trained on {epochs:.3g} times; those "
            f"of training, and its FLOPs, by {len(steps):,} of {data.steps:,} steps, packed as a "
            "run packs them."
        )
        mesh = {axis: getattr(self._policy.mesh, axis) for axis in ("data", "fsdp", "tensor")}
        whole = rows_of(t.rows, mesh) * t.row_length
        micros = sum(batch.tokens.size for step in steps for batch, _ in step.micros) / whole
        baseline = sum(step.positions for step in steps) / whole - micros
        read = sum(len(names) for step in steps for names in step.traces[: len(step.micros)])
        step = Step(
            round(micros / len(steps), 1),
            baseline / len(steps),
            round(read / len(steps)),
            round(sum(s.tokens for s in steps) / sum(map(_sequences, steps))),
            sum(s.filled for s in steps) / sum(s.positions for s in steps),
        )
        yield step_line(data.kind, step, mesh, measured=True)
        spec = self._spec(self._policy.student.place)
        yield (
            f"Checkpoints: one in {t.checkpoint_every:,} steps, of "
            f"{short_bytes(checkpoint_bytes(spec, t))}; the newest {t.keep_checkpoints:,} and the "
            f"policy of {short_bytes(policy_bytes(spec))} stay."
        )


def _sequences(step: StepData) -> int:
    """Sequences that a step reads."""
    return sum(map(len, step.traces))


def show_file_plan(
    console: Console, p: PairTraining, policy: Policy, workspace: Workspace, devices: Devices
) -> None:
    """Prints what the file holds and what training on it takes; see `show_rows`.

    Args:
      console: where to.
      p: validated.
      policy: its node, with all four sizes of its mesh.
      workspace: where artifacts are looked up.
      devices: that are assumed.

    Raises:
      ConfigError: what a run refuses of the file.
      ArtifactError: the workspace cannot be written.
    """
    for line in training_lines(policy.training):
        console.print(line, highlight=False)
    sequences = policy.sequences["file"]
    assert isinstance(sequences, FileSequences)
    if workspace.complete(sequences):
        table, counts = workspace.table(sequences), workspace.manifest(sequences).stats
    else:
        table, counts = sequences.read()
    rows = from_table(TokenSequence, table)
    data = steps_of(p, policy, rows, devices, functools.cache(describe_model))
    counts |= {"dropped_mismatched": float(data.dropped_mismatched)}
    show_data(console, p.data.path, table.schema.metadata, counts)
    cost = FileCost(policy, workspace, rows, data)
    show_rows(console, plan_rows(policy, workspace, cost), workspace, cost, cost.notes())
