"""One arm from a file of pairs, without the rest of a study: launch.train.

file ──tokens──▶ SEQUENCE ──score──▶ LOGPROB ──train──▶ metrics.jsonl, policy/ (a model folder)
"""

import functools

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, PairTraining, reference_of
from deltapref_jax.data.blocks import check_place
from deltapref_jax.data.dataset import content_of
from deltapref_jax.data.preferences import LengthLimit
from deltapref_jax.devices import Devices
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.lora import check_rank
from deltapref_jax.models.weights import inspect_model
from deltapref_jax.records import TokenSequence
from deltapref_jax.stages.meshes import fit_training
from deltapref_jax.stages.pinned import pinned
from deltapref_jax.stages.score import LogProbTable, known_table, read_logprobs, table_files
from deltapref_jax.stages.study import check_same_vocabulary
from deltapref_jax.stages.tokens import FileSequences
from deltapref_jax.stages.train import Policy, file_examples, referenced
from deltapref_jax.training.monitor import MonitorConfig

_SHARD = 1024  # sequences scored between two marks: what a killed run may have to repeat


def plan(
    p: PairTraining, profile: tuple[int, int] | None = None, devices: Devices | None = None
) -> Policy:
    """The policy's node; its inputs are the file's sequences and their reference log-probabilities.

    Args:
      p: validated.
      profile: first and last training step, from 1, that JAX's profiler traces.
      devices: that the mesh must fit; the policy's config has its sizes. None: the mesh is not
        looked at before it is made.

    Raises:
      ConfigError: the data file or the table is not there, the table is of other weights than the
        reference, the reference has another tokenizer, adapters are wider than the student, or the
        mesh does not fit.
      FileNotFoundError, ValueError: a model is not there, or not one that can be loaded.
    """
    training = p.training
    if devices:
        inspect = functools.cache(inspect_model)
        training = fit_training(training, p.student, devices, lambda path: inspect(path)[0])
    check_place(p.data.path)
    p = pinned(p)
    kind, reference = p.objective.kind, reference_of(p.student, p.reference)
    spec, tokenizer = inspect_model(p.student.place)
    check_rank(p.training.lora, spec)
    if OBJECTIVE_KINDS[kind].reference:
        check_same_vocabulary(tokenizer, inspect_model(reference.place)[1])
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
    weights = weights_hash(reference.place)
    logprobs = LogProbTable(
        label=("score",),
        sequences=sequences,
        weights=weights,
        dtype=reference.dtype,
        rows=p.training.rows,
        row_length=length,
        shard=_SHARD,
        known=known_table(p.table, weights),
        model=reference,
        table=p.table,
        mesh=training.mesh,
    )
    return Policy(
        label=(p.name,),
        pairs=None,
        sequences={"file": sequences},
        logprobs={"file": logprobs} if OBJECTIVE_KINDS[kind].reference else {},
        student_weights=weights_hash(p.student.place),
        reference_weights=weights,
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
      ConfigError: see `Policy.data`, or the table lacks sequences of the file.
    """
    rows = workspace.rows(TokenSequence, policy.sequences["file"])
    examples = file_examples(rows)
    paths = {p.student.place, reference_of(p.student, p.reference).place}
    specs = {path: inspect_model(path)[0] for path in paths if path}
    zeros: dict[str, dict[str, float]] = {}  # any value will do, since nothing is trained
    for row in rows:
        zeros.setdefault(row.trace_id, {})[row.sequence_id] = 0.0
    groups = referenced(p.objective.kind, examples, rows, zeros)
    policy.data(groups, make_mesh(policy.mesh), specs)
    if p.table:
        check_known(rows, read_logprobs(table_files(p.table), policy.reference_weights), p.table)


def check_known(rows: list[TokenSequence], known: dict[str, float], table: str) -> None:
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
