"""train: one arm and seed; pairs, sequences and reference log-probabilities become a policy."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import (
    ADDED,
    OBJECTIVE_KINDS,
    ConfigError,
    MeshShape,
    Model,
    Objective,
    Training,
)
from deltapref_jax.mesh import gather_to_host, is_first, make_mesh, platform_of
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.export import export
from deltapref_jax.models.lora import export_adapter, merge
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import open_model
from deltapref_jax.progress import log
from deltapref_jax.records import Pair, RateTrial, TokenSequence
from deltapref_jax.stages.micro_batches import device_memory, fill_in, filled_line
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.score import LogProbTable, input_logprobs
from deltapref_jax.stages.tokens import SequenceTable
from deltapref_jax.training.data import Data, Group, ReferencedSequence
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.monitor import MonitorConfig
from deltapref_jax.training.state import Optimizer

if TYPE_CHECKING:
    from deltapref_jax.stages.tune import RateTable


class Policy(Node, stage="train", version=4):
    """metrics.jsonl, checkpoints/ and policy/ (a Hugging Face folder) of one training run.

    Of a run of adapters the policy is base and adapters merged, and the adapters alone lie in
    adapter/, in PEFT's format.

    Attributes:
      pairs: of the arm; None: the groups are those of the sequences (data from a file).
      sequences: of all completions, by generator.
      logprobs: of the same sequences under the reference; empty where the objective needs none.
      student_weights: hash of the weights that training starts from.
      reference_weights: hash of the weights that `logprobs` must be made by.
      student: where the student is; its dtype is that of the computation.
      rates: that has the learning rate; None: the objective has it.
    """

    pairs: PairTable | None
    sequences: Mapping[str, SequenceTable]
    logprobs: Mapping[str, LogProbTable]
    student_weights: str
    reference_weights: str
    objective: Objective
    training: Training
    seed: int
    student: Model
    rates: "RateTable | None" = dataclasses.field(default=None, metadata=ADDED)
    mesh: MeshShape = runtime()
    monitor: MonitorConfig = runtime(default=MonitorConfig())

    def make(self, job: Job) -> None:
        """Trains, or continues a killed run, and exports."""
        adapters = self.training.lora
        # Weights that are trained are float32; the frozen base of adapters keeps its stored dtype.
        model = open_model(
            self.student.place, self.student.dtype, None if adapters.rank else "float32"
        )
        groups, counts = self.groups(job)
        mesh = make_mesh(self.mesh)
        lengths = [row.sequence.length for group in groups for row in group.rows]
        training = fill_in(
            self.training,
            lengths,
            mesh.shape,
            model.spec,
            self.student.dtype,
            device_memory(),
            str(model.state["embed"].dtype),
        )
        models = {self.student.place: model.spec}
        data = self.data(groups, platform_of(mesh), mesh.shape, models, training)
        first = data(0).drop_empty_halves(mesh.shape["data"] * mesh.shape["fsdp"])
        if line := filled_line(first.filled / first.positions, mesh.shape):
            log(f"{self.name}: {line}", always=True)
        trained, metrics = train(
            model.spec,
            model.state,
            data,
            run_of(training, self._objective(job), data.steps, self.seed),
            mesh,
            job.dir,
            label=self.name,
            dtype=self.student.dtype,
            # Policy and reference agree before training only if they are the same weights.
            guard=self.reference_weights == self.student_weights,
            monitor=self.monitor,
            base=self.student_weights if adapters.rank else "",
            check_lease=job.check_lease,
        )
        if adapters.rank:
            trained = gather_to_host(trained)  # Adapters are small.
        with job.output_dir("policy") as folder:
            export(
                merge(model.state, trained, adapters),
                model.spec,
                model.text,
                folder,
                config=model.config,
            )
        if adapters.rank:
            with job.output_dir("adapter") as folder:
                if is_first():
                    export_adapter(trained, model.spec, adapters, self.student, folder)
        job.stats |= metrics | counts
        job.stats |= {
            "groups": float(len(data.groups)),
            "steps": float(data.steps),
            "batch": float(data.batch),
            "epochs": data.steps * data.batch / len(data.groups),
            "dropped_long": data.dropped + counts["dropped_long"],
            "dropped_mismatched": float(data.dropped_mismatched),
        }
        job.files += ["metrics.jsonl", "policy/*", "adapter/*"]

    def _objective(self, job: Job) -> Objective:
        """With the learning rate that was chosen, where several were tried."""
        if self.rates is None:
            return self.objective
        (rate,) = [row.learning_rate for row in job.rows(RateTrial, self.rates) if row.chosen]
        return dataclasses.replace(self.objective, learning_rate=rate)

    def groups(self, job: Job) -> tuple[list[Group], Stats]:
        """What the objective reads, with references, and counts for the manifest.

        Raises:
          ConfigError: a table was made by other weights than the reference, or nothing was scored.
        """
        rows: list[TokenSequence] = []
        logprobs: dict[str, Mapping[str, float]] = {}  # by trace: those of the trace's own table
        for name, node in self.sequences.items():
            table_rows = job.rows(TokenSequence, node)
            if name in self.logprobs:
                table = input_logprobs(job, self.logprobs[name], self.reference_weights)
                logprobs |= {row.trace_id: table for row in table_rows}
            rows += table_rows
        counts: Stats = {}
        if self.pairs is None:
            examples = file_examples(rows)
        else:
            pairs = job.rows(Pair, self.pairs)
            examples = pair_examples(self.objective.kind, pairs, rows)
            counts["pairs"] = float(len(pairs))
        groups = referenced(self.objective.kind, examples, rows, logprobs)
        if not groups:
            raise ConfigError(
                f"None of the {len(examples)} pairs or examples has reference log-probabilities: "
                "their rows are longer than config.scoring.row_length; raise it."
            )
        return groups, counts | {"dropped_long": float(len(examples) - len(groups))}

    def data(
        self,
        groups: Sequence[Group],
        platform: str,
        mesh: Mapping[str, int],
        models: Mapping[str, ModelSpec],
        training: Training,
    ) -> Data:
        """The steps of the run.

        Args:
          groups: of the whole data set.
          platform: of the devices: "cpu", "gpu" or "tpu".
          mesh: devices along every axis.
          models: that read the sequences, by path.
          training: the config without open shapes (`fill_in`).

        Raises:
          ConfigError: what `Data` refuses, or a sequence that a model was not made for.
        """
        split = mesh["context"] > 1
        data = Data(
            groups,
            self.objective.kind,
            training,
            self.seed,
            self.objective.baseline_fraction,
            shares_prompts(platform, split, training.row_length, models[self.student.place]),
        )
        check_sequences([row.sequence for group in data.groups for row in group.all_rows], models)
        return data


def run_of(t: Training, objective: Objective, steps: int, seed: int) -> Run:
    """What of objective and training config reaches the loop."""
    return Run(
        objective,
        steps,
        t.rows,
        t.row_length,
        t.warmup,
        t.schedule,
        optimizer=Optimizer(
            t.clip, t.weight_decay, moments=t.moments, offload_moments=t.offload_moments
        ),
        checkpoint_every=t.checkpoint_every,
        keep_checkpoints=t.keep_checkpoints,
        remat=t.remat,
        lora=t.lora,
        # The seed of a run is 32 bits wide.
        seed=seed % 2**32,
    )


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """The sequences of one term of the loss: a pair, chosen first, or a single one with a label."""

    sequences: tuple[TokenSequence, ...]
    desirable: float = 1.0  # KTO's label, 1 or 0


def pair_examples(
    kind: str, pairs: Sequence[Pair], rows: Sequence[TokenSequence]
) -> list[LossTerm]:
    """Pairs as the objective reads them: DPO takes pairs, KTO both halves, SFT the chosen ones."""
    needed = {trace for pair in pairs for trace in (pair.chosen_id, pair.rejected_id)}
    by_trace = {row.trace_id: row for row in rows if row.matched and row.trace_id in needed}
    examples = []
    for pair in pairs:
        chosen, rejected = by_trace[pair.chosen_id], by_trace[pair.rejected_id]
        if OBJECTIVE_KINDS[kind].unit == "pair":
            examples.append(LossTerm((chosen, rejected)))
        elif OBJECTIVE_KINDS[kind].unit == "example":
            examples += [LossTerm((chosen,), 1.0), LossTerm((rejected,), 0.0)]
        else:
            examples.append(LossTerm((chosen,)))
    return examples


def file_examples(rows: Sequence[TokenSequence]) -> list[LossTerm]:
    """Groups of a file, which was read for the objective: sequences of one group number."""
    groups: dict[int | None, list[TokenSequence]] = {}
    for row in rows:
        if row.matched:
            groups.setdefault(row.group, []).append(row)
    return [LossTerm(tuple(group), float(bool(group[0].desirable))) for group in groups.values()]


def referenced(
    kind: str,
    examples: Sequence[LossTerm],
    rows: Sequence[TokenSequence],
    logprobs: Mapping[str, Mapping[str, float]],
) -> list[Group]:
    """Examples with their reference log-probabilities and, for KTO's baseline, mismatched rows.

    `logprobs` are by trace id and then by sequence id: equal tokens that two tables hold have equal
    log-probabilities but for rounding, and a trace keeps to its own table.

    An example without a reference that the objective needs (its sequence was too long to be scored)
    is left out; one whose mismatched row was too long to be scored stays, without it.
    """
    objective = OBJECTIVE_KINDS[kind]
    used = {s.trace_id for example in examples for s in example.sequences}
    mismatched = {
        row.trace_id: row
        for row in rows
        if objective.baseline and not row.matched and row.trace_id in used
    }

    def reference(sequence: TokenSequence | None) -> ReferencedSequence | None:
        if sequence is None or not objective.reference:
            return sequence and ReferencedSequence(sequence)
        logprob = logprobs[sequence.trace_id].get(sequence.sequence_id)
        return None if logprob is None else ReferencedSequence(sequence, logprob)

    groups = []
    for example in examples:
        scored = [reference(sequence) for sequence in example.sequences]
        complete = tuple(row for row in scored if row is not None)
        if len(complete) == len(scored):
            other = reference(mismatched.get(example.sequences[0].trace_id))
            groups.append(Group(complete, example.desirable, other))
    return groups


def check_sequences(sequences: Sequence[TokenSequence], models: Mapping[str, ModelSpec]) -> None:
    """Refuses sequences that a model was not made for.

    Raises:
      ConfigError: a sequence is longer than the model's positions, or has an id that it has not.
    """
    longest = max(sequence.length for sequence in sequences)
    largest = max(
        int(np.max(ids))
        for sequence in sequences
        for ids in (sequence.prompt_ids, sequence.completion_ids)
        if len(ids)
    )
    for path, spec in models.items():
        if longest > spec.max_positions:
            raise ConfigError(
                f"A sequence of {longest} tokens is longer than the {spec.max_positions} positions "
                f"that the model {path} was made for; lower config.training.row_length, so that "
                "over_length applies."
            )
        if largest >= spec.vocab:
            raise ConfigError(
                f"The data have the token id {largest} and the model {path} has the ids 0 to "
                f"{spec.vocab - 1}; use the tokenizer of that model."
            )
