"""One arm from a file of pairs, without the rest of a study: launch.train.

file ──tokens──▶ SEQUENCE ──score──▶ LOGPROB ──train──▶ metrics.jsonl, policy/ (a model folder)
"""

import dataclasses
import functools
from collections.abc import Sequence

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Model, PairTraining, reference_of
from deltapref_jax.data.blocks import check_place
from deltapref_jax.data.dataset import content_of
from deltapref_jax.data.preferences import LengthLimit
from deltapref_jax.devices import Devices, attached_devices
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.folder import planned_hash, weights_hash
from deltapref_jax.models.lora import fit_lora
from deltapref_jax.models.weights import describe_model, inspect_model
from deltapref_jax.records import TokenSequence
from deltapref_jax.stages.meshes import fit_training
from deltapref_jax.stages.micro_batches import fill_in
from deltapref_jax.stages.pinned import pinned
from deltapref_jax.stages.score import LogProbTable, known_table, read_logprobs, table_files
from deltapref_jax.stages.study import Inspect, check_same_vocabulary
from deltapref_jax.stages.tokens import FileSequences
from deltapref_jax.stages.train import Policy, file_examples, referenced
from deltapref_jax.training.data import Data
from deltapref_jax.training.monitor import MonitorConfig

_SHARD = 1024  # sequences scored between two marks: what a killed run may have to repeat


def plan(
    p: PairTraining,
    profile: tuple[int, int] | None = None,
    devices: Devices | None = None,
    weights: bool = True,
) -> Policy:
    """The policy's node; its inputs are the file's sequences and their reference log-probabilities.

    Args:
      p: validated.
      profile: first and last training step, from 1, that JAX's profiler traces.
      devices: that the mesh must fit; the policy's config has its sizes. None: the mesh is not
        looked at before it is made.
      weights: whether the models must have their weights. False: config and tokenizer are enough,
        for a plan that is looked at and not made.

    Raises:
      ConfigError: the data file or the table is not there, the table is of other weights than the
        reference, the reference has another tokenizer, adapters are wider than the student, the
        student has no tokenizer, or the mesh does not fit.
      FileNotFoundError, ValueError: a model is not there, or not one that can be loaded.
    """
    # The mesh is looked at before the data, which may be on the hub, and needs the student.
    p = dataclasses.replace(p, student=pinned(p.student))
    training = p.training
    inspect: Inspect = functools.cache(inspect_model if weights else describe_model)
    weights_of = weights_hash if weights else planned_hash
    if devices:
        training = fit_training(training, p.student, devices, lambda path: inspect(path)[0])
    check_place(p.data.path)
    p = pinned(p)
    kind, reference = p.objective.kind, reference_of(p.student, p.reference)
    spec, tokenizer = inspect(p.student.place)
    if tokenizer is None:
        raise ConfigError(
            f"The student {p.student.path} has no tokenizer, which gives the file its tokens; put "
            "its tokenizer.json and tokenizer_config.json beside config.json."
        )
    training = dataclasses.replace(training, lora=fit_lora(p.training.lora, spec))
    if OBJECTIVE_KINDS[kind].reference and (other := inspect(reference.place)[1]):
        check_same_vocabulary(tokenizer, other)
    length, rule = p.training.row_length, p.training.over_length
    sequences = FileSequences(
        label=("tokens",),
        tokenizer=tokenizer.identity,
        model=p.student,
        content=content_of(p.data),
        data=p.data,
        kind=kind,
        limit=LengthLimit(length, rule, p.data.truncation_mode),
    )
    reference_weights = weights_of(reference.place)
    logprobs = LogProbTable(
        label=("score",),
        sequences=sequences,
        weights=reference_weights,
        dtype=reference.dtype,
        rows=p.training.rows,
        row_length=length,
        shard=_SHARD,
        known=known_table(p.table, reference_weights),
        model=reference,
        table=p.table,
        mesh=training.mesh,
    )
    return Policy(
        label=(p.name,),
        pairs=None,
        sequences={"file": sequences},
        logprobs={"file": logprobs} if OBJECTIVE_KINDS[kind].reference else {},
        student_weights=weights_of(p.student.place),
        reference_weights=reference_weights,
        objective=p.objective,
        training=training,
        seed=p.seed,
        student=p.student,
        mesh=training.mesh,
        monitor=MonitorConfig(p.trackers, profile),
    )


def check(p: PairTraining, policy: Policy, workspace: Workspace) -> None:
    """Refuses what tokens and config show to be untrainable, before the reference is scored.

    Raises:
      ConfigError: see `steps_of`.
    """
    rows = workspace.rows(TokenSequence, policy.sequences["file"])
    mesh = dataclasses.replace(policy.mesh, **make_mesh(policy.mesh).shape)
    steps_of(p, dataclasses.replace(policy, mesh=mesh), rows, attached_devices(), inspect_model)


def steps_of(
    p: PairTraining,
    policy: Policy,
    rows: Sequence[TokenSequence],
    devices: Devices,
    inspect: Inspect,
) -> Data:
    """The steps of the run, packed as the run packs them; all references are 0.

    Args:
      p: validated.
      policy: its node, with all four sizes of its mesh.
      rows: the sequences of the file.
      devices: that it is trained on.
      inspect: gives the sizes of models.

    Raises:
      ConfigError: see `Policy.data`, or the table lacks sequences of the file.
    """
    examples, student = file_examples(rows), policy.student
    specs = {model.place: inspect(model.place)[0] for model in (student, *_references(policy))}
    zeros: dict[str, dict[str, float]] = {}  # any value will do, since nothing is trained
    for row in rows:
        zeros.setdefault(row.trace_id, {})[row.sequence_id] = 0.0
    groups = referenced(p.objective.kind, examples, rows, zeros)
    mesh = dataclasses.asdict(policy.mesh)
    lengths = [row.length for row in rows]
    spec, dtype = specs[student.place], student.dtype
    training = fill_in(policy.training, lengths, mesh, spec, dtype, devices.memory)
    data = policy.data(groups, devices.platform, mesh, specs, training)
    if p.table:
        check_known(rows, read_logprobs(table_files(p.table), policy.reference_weights), p.table)
    return data


def _references(policy: Policy) -> list[Model]:
    """The model that scores the file, if any."""
    return [table.model for table in policy.logprobs.values()]


def check_known(rows: Sequence[TokenSequence], known: dict[str, float], table: str) -> None:
    """Refuses a table that lacks sequences of the file; mismatched ones that it lacks are scored.

    Raises:
      ConfigError: the table was made of other tokens.
    """
    matched = [row for row in rows if row.matched]
    missing = [row for row in matched if row.sequence_id not in known]
    if missing:
        raise ConfigError(
            f"The table {table} has no log-probability for {len(missing)} of {len(matched)} "
            f"sequences, such as that of {missing[0].trace_id}; it was made of other tokens "
            "(another file, template, row_length or objective): leave config.table empty to have "
            "them computed."
        )
