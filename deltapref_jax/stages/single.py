"""One arm from a file of pairs: tokens, the reference's log-probabilities of them, and a policy.

    file ──tokens──▶ sequences ──reference──▶ log-probabilities ──policy──▶ metrics.jsonl, policy/ (a model folder)

A row of the reference table belongs to the tokens that were scored (`row_id`), so one table serves every run whose
sequences it covers; it carries the hash of the weights that made it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, MeshShape, Pairs, PairTraining
from deltapref_jax.data.blocks import check_place
from deltapref_jax.data.preferences import cut, limit, read_preferences
from deltapref_jax.files import local
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.lora import check_rank
from deltapref_jax.models.weights import LoadedModel, inspect_model, load, resolve, weights_hash
from deltapref_jax.records import LOGPROB, SEQUENCE
from deltapref_jax.scoring.derange import derange
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.stages.study import content
from deltapref_jax.stages.train import data_of, train_arm
from deltapref_jax.text.preference import tokenise
from deltapref_jax.text.template import Text
from deltapref_jax.training.data import Group, Row
from deltapref_jax.workspace import Job, Node, Stats, Workspace

VERSION = 3
SHARD = 1024  # sequences scored between two marks: what a killed run may have to repeat
_DERANGEMENT = 0  # seed of the mismatched partners: one for all runs, so that they share a table


class Line(NamedTuple):
    """A row of `records.SEQUENCE`: one prompt with one completion."""

    group: int
    prompt_id: str
    prompt: Any  # int32 array, token ids
    completion: Any  # likewise
    desirable: bool
    where: str

    @property
    def row_id(self) -> str:
        """Names the tokens."""
        return row_id(self.prompt, self.completion)


def row_id(prompt: np.ndarray, completion: np.ndarray) -> str:
    """16 hex digits of the tokens and of where the completion begins."""
    ids = np.concatenate([[len(prompt)], prompt, completion]).astype("<i4")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def plan(single: PairTraining, profile: tuple[int, int] | None = None) -> dict[str, Node]:
    """The nodes of a run: tokens, reference (where it is needed and no table is given), policy.

    A hub name stands for what the data set held when it was first read.

    Args:
      single: validated.
      profile: first and last training step, from 1, that JAX's profiler traces.

    Raises:
      ConfigError: the data file or the table is not there, the table is of other weights than the reference, the
        reference has another tokenizer, or adapters are wider than the student.
      FileNotFoundError, ValueError: a model is not there, or not one that can be loaded.
    """
    check_place(single.data.path)
    kind, student = single.objective.kind, single.student
    teacher = single.reference if single.reference.path else student
    (spec, text), (_, other) = inspect_model(student.path), inspect_model(teacher.path)
    check_rank(single.training.lora, spec)
    known = other.tokenizer.get_vocab()
    if OBJECTIVE_KINDS[kind].reference and any(
        known.get(t, i) != i for t, i in text.tokenizer.get_vocab().items()
    ):
        raise ConfigError(
            f"The reference {teacher.path} has another tokenizer than the student {student.path}, so "
            "that it cannot score the student's tokens; choose a reference with the same tokenizer."
        )
    weights = {"student": weights_hash(student.path), "reference": weights_hash(teacher.path)}
    length = {
        "length": single.training.row_length,
        "rule": single.training.over_length,
        "mode": single.data.truncation_mode,
    }
    mesh = dataclasses.asdict(single.mesh)
    path = Path(local(single.data.path))
    tokens = Node(
        "tokens",
        "tokens",
        {
            "data": content(path) if path.exists() else single.data.path,
            "split": single.data.split,
            "kind": kind,
            "tokenizer": weights["student"],
            "limit": length,
        },
        {},
        {"data": dataclasses.asdict(single.data), "model": student.path},
        VERSION,
    )
    nodes, config = {"tokens": tokens}, {}
    inputs = {"tokens": tokens}
    if single.table:
        check_table(single.table, weights["reference"])
        config = {"table": content(Path(local(single.table)))}
    elif OBJECTIVE_KINDS[kind].reference:
        inputs["reference"] = nodes["reference"] = Node(
            "reference",
            "reference",
            {
                "weights": weights["reference"],
                "dtype": teacher.dtype,
                "mismatched": OBJECTIVE_KINDS[kind].baseline,
                "limit": length,
                "rows": single.training.rows,
            },
            {"tokens": tokens},
            {"model": teacher.path, "mesh": mesh},
            VERSION,
        )
    nodes["policy"] = Node(
        "policy",
        single.name,
        config
        | weights
        | {
            "objective": dataclasses.asdict(single.objective),
            "training": dataclasses.asdict(single.training),
            "seed": single.seed,
            "dtype": student.dtype,
            "limit": length,
        },
        inputs,
        {
            "student": dataclasses.asdict(student),
            "mesh": mesh,
            "table": single.table,
            "watch": {"trackers": single.trackers, "profile": profile},
        },
        VERSION,
    )
    return nodes


def check(workspace: Workspace, nodes: Mapping[str, Node]) -> None:
    """Refuses what tokens and config show to be untrainable; to be called when the tokens are made, before the rest.

    Raises:
      ConfigError: see `groups_of` and `data_of`.
    """
    node = nodes["policy"]
    models = [
        node.local["student"]["path"],
        *([nodes["reference"].local["model"]] if "reference" in nodes else []),
    ]
    groups, _ = groups_of(sequences(workspace.table(nodes["tokens"])), node.config)
    data_of(
        groups,
        node.config,
        make_mesh(MeshShape(**node.local["mesh"])),
        {path: inspect_model(path)[0] for path in models},
    )


def tokens(job: Job) -> None:
    """The file to SEQUENCE, whose schema's metadata names the format and the columns that were ignored."""
    c, source = job.config, Pairs(**job.local["data"])

    def make(_: int) -> tuple[pa.Table, Stats]:
        text = Text.load(resolve(job.local["model"]))
        unit = OBJECTIVE_KINDS[c["kind"]].unit
        alone = unit != "pair"
        found = read_preferences(
            source, functools.partial(tokenise, text), alone, len(text.tokenizer)
        )
        if "unpaired" in found.format and not alone:
            raise ConfigError(
                f"{source.path} holds labelled examples and no pairs, which the objective {c['kind']!r} "
                "needs; set config.objective.kind to 'kto' or 'sft', or give chosen and rejected."
            )
        groups = [g for g in found.groups if unit != "token" or g[0]["desirable"]]
        undesirable = len(found.groups) - len(groups)
        if not groups:
            raise ConfigError(
                f"{source.path} has no example that is chosen or labelled true, which SFT trains on; "
                "choose another objective."
            )
        found.groups = [g for g in groups if not any(row["empty"] for row in g)]
        empty = len(groups) - len(found.groups)
        if not found.groups:
            raise ConfigError(
                f"All {empty} pairs or examples of {source.path} have an empty answer; give it some that "
                "have none."
            )
        kept, counts = limit(found, c["limit"]["length"], c["limit"]["rule"], c["limit"]["mode"])
        same = sum(
            np.array_equal(*(row["completion_ids"] for row in g)) for g in kept if len(g) == 2
        )
        rows = [row | {"group": i} for i, group in enumerate(kept) for row in group]
        table = pa.table(
            {
                name: pa.array([row[name] for row in rows], SEQUENCE.field(name).type)
                for name in SEQUENCE.names
            }
        )
        about = {"format": found.format, "ignored": json.dumps(found.ignored)}
        return table.replace_schema_metadata(about), {
            k: float(v)
            for k, v in (
                found.counts
                | counts
                | {"undesirable": undesirable, "empty": empty, "same": same, "groups": len(kept)}
            ).items()
        }

    job.shards(1, make, "rows")


def sequences(table: pa.Table) -> list[Line]:
    """Rows of a SEQUENCE table; token ids stay arrays."""

    def arrays(name: str) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for chunk in table[name].chunks:
            offsets, flat = chunk.offsets.to_numpy(), chunk.values.to_numpy()
            found += [flat[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        return found

    rest = [table[name].to_pylist() for name in ("group", "prompt_id", "desirable", "where")]
    return [
        Line(g, key, p, c, good, where)
        for g, key, p, c, good, where in zip(
            rest[0],
            rest[1],
            arrays("prompt_ids"),
            arrays("completion_ids"),
            rest[2],
            rest[3],
            strict=True,
        )
    ]


def mismatched(
    rows: Sequence[Line], length: int, rule: str, mode: str
) -> tuple[list[Line | None], Stats]:
    """Every completion behind another prompt, under the length rule; None where that dropped it.

    Raises:
      ConfigError: the rule is "error" and such a row is too long, or no arrangement exists (`derange`).
    """
    found: list[Line | None] = []
    stats = {"mismatched_dropped": 0.0, "mismatched_cut": 0.0}
    for row, j in zip(rows, derange([row.prompt_id for row in rows], _DERANGEMENT), strict=True):
        other = row._replace(prompt=rows[j].prompt, prompt_id=rows[j].prompt_id)
        size = len(other.prompt) + len(other.completion)
        if size > length and rule == "error":
            raise ConfigError(
                f"{row.where} has a completion that is {size} tokens long behind the prompt of "
                f"{rows[j].where} (KTO's baseline), and config.training.row_length is {length}; raise "
                "it, or set config.training.over_length to 'drop' or 'truncate'."
            )
        kept = (
            None
            if size > length and rule == "drop"
            else cut(other.prompt, other.completion, length, mode)
        )
        stats["mismatched_dropped"] += kept is None
        stats["mismatched_cut"] += kept is not None and size > length
        found.append(None if kept is None else other._replace(prompt=kept[0], completion=kept[1]))
    return found, stats


def reference(job: Job) -> None:
    """SEQUENCE to LOGPROB: `trace_id` is `row_id`, and the schema's metadata holds the hash of the weights."""
    c = job.config
    rows = sequences(job.table("tokens"))
    wanted = [(row, True) for row in rows]
    if c["mismatched"]:
        wanted += [(row, False) for row in mismatched(rows, **c["limit"])[0] if row is not None]
    loaded: list[LoadedModel] = []

    def make(shard: int) -> tuple[pa.Table, Stats]:
        if not loaded:
            loaded.append(load(job.local["model"], c["dtype"]))
        part = wanted[shard * SHARD : (shard + 1) * SHARD]
        found = [Row(row.prompt, row.completion) for row, _ in part]
        scores = score_sequences(
            loaded[0].spec,
            loaded[0].state,
            [row.pieces for row in found],
            c["rows"],
            c["limit"]["length"],
            make_mesh(MeshShape(**job.local["mesh"])),
            c["dtype"],
        )
        table = pa.table(
            {
                "prompt_id": [row.prompt_id for row, _ in part],
                "trace_id": [row.row_id for row, _ in part],
                "matched": [matched for _, matched in part],
                "logprob": scores.sums,
                "tokens": [row.targets for row in found],
            }
        ).cast(LOGPROB)
        return (
            table.replace_schema_metadata({"weights": c["weights"], "dtype": c["dtype"]}),
            {
                "tokens": sum(row.tokens for row in found),
                "positions": scores.positions,
                "filled": scores.filled,
            },
        )

    job.shards(-(-len(wanted) // SHARD), make, "rows", len(wanted), together=True)


def _table_files(path: str) -> list[Path]:
    place = Path(local(path))
    found = [place] if place.is_file() else sorted(place.glob("*.parquet"))
    if not found:
        raise ConfigError(
            f"There is no Parquet file at {path}; check config.table, or leave it empty to have the "
            "log-probabilities computed."
        )
    return found


def check_table(path: str, weights: str) -> None:
    """Refuses a table of log-probabilities that other weights than `weights` made.

    Raises:
      ConfigError: it is not there, not readable, does not say which weights made it, or names others.
    """
    for file in _table_files(path):
        try:
            schema = pq.read_schema(file)
        except Exception as e:  # pyarrow raises many kinds for a damaged file
            raise ConfigError(
                f"{file} is not a readable Parquet file ({e}); write it again."
            ) from e
        made = (schema.metadata or {}).get(b"weights", b"").decode()
        if made != weights or not {"trace_id", "logprob"} <= set(schema.names):
            raise ConfigError(
                f"The table {file} was made by the weights {made or '(not named)'} and the reference has "
                f"the weights {weights}; name the model that made it in config.reference.path, or leave "
                "config.table empty to have it computed."
            )


def file_groups(job: Job, _: LoadedModel) -> tuple[list[Group], Stats]:
    """Sequences and their reference log-probabilities as the objective reads them; raises what `groups_of` does."""
    tables = (
        [job.table("reference")]
        if "reference" in job.node.inputs
        else [
            pq.read_table(file)
            for file in (_table_files(job.local["table"]) if job.local["table"] else [])
        ]
    )
    known: dict[str, float] = {}
    for table in tables:
        known |= dict(zip(table["trace_id"].to_pylist(), table["logprob"].to_pylist(), strict=True))
    return groups_of(sequences(job.table("tokens")), job.config, known, job.local["table"])


def groups_of(
    rows: Sequence[Line],
    config: Mapping[str, Any],
    known: Mapping[str, float] | None = None,
    table: str = "",
) -> tuple[list[Group], Stats]:
    """Sequences as the objective reads them, and counts for the manifest.

    Args:
      rows: of the whole file.
      config: of the policy's node.
      known: reference log-probabilities by `row_id`; None: none is known yet.
      table: where they come from, for messages.

    Raises:
      ConfigError: a sequence is not among `known`, or what `mismatched` refuses.
    """
    kind = OBJECTIVE_KINDS[config["objective"]["kind"]]
    others, stats = (
        mismatched(rows, **config["limit"]) if kind.baseline else ([None] * len(rows), {})
    )
    if kind.reference and known is not None:
        _all_known([row for row in [*rows, *others] if row is not None], known, table)

    def made(row: Line) -> Row:
        return Row(
            row.prompt, row.completion, known.get(row.row_id, 0.0) if known else 0.0, row.where
        )

    groups: list[list[int]] = []
    for i, row in enumerate(rows):
        if i and rows[i - 1].group == row.group:
            groups[-1].append(i)
        else:
            groups.append([i])
    partners = [None if other is None else made(other) for other in others]
    return [
        Group(
            tuple(made(rows[i]) for i in members),
            float(rows[members[0]].desirable),
            partners[members[0]],
        )
        for members in groups
    ], stats


def _all_known(rows: Sequence[Line], known: Mapping[str, float], table: str) -> None:
    missing = [row for row in rows if known.get(row.row_id) is None]
    if missing:
        raise ConfigError(
            f"The table {table} has no log-probability for {len(missing)} of {len(rows)} sequences, such "
            f"as that of {missing[0].where}; it was made of other tokens (another file, template, "
            "row_length or objective): leave config.table empty to have them computed."
        )


def policy(job: Job) -> None:
    """SEQUENCE and LOGPROB to metrics.jsonl, checkpoints/ and policy/."""
    train_arm(job, file_groups)


STAGES = {"tokens": tokens, "reference": reference, "policy": policy}
