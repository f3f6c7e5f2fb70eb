"""train: one arm and seed. Pairs join traces and reference log-probabilities; a policy folder comes out."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Lora, MeshShape, Objective, Training
from deltapref_jax.mesh import fetch, is_first, make_mesh
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.lora import export_adapter, merge
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel, export, load
from deltapref_jax.stages.score import Sequences
from deltapref_jax.training.data import Data, Group, Row
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer
from deltapref_jax.training.watch import Watch
from deltapref_jax.workspace import Job, Stats

VERSION = 3


def groups_of(
    kind: str,
    pairs: list[dict],
    sequences: Sequences,
    matched: dict[str, float],
    mismatched: dict[str, tuple[str, float]],
) -> list[Group]:
    """Pairs as the objective reads them: DPO takes pairs, KTO both halves of each, SFT the chosen ones.

    A pair without a reference that the objective needs (its row was too long to be scored) is left out; an example
    whose mismatched row was too long to be scored stays, without it.
    """
    unit, reference, baseline, _ = OBJECTIVE_KINDS[kind]

    def row(prompt: str, trace: str) -> Row:
        return sequences.row(prompt, trace, matched.get(trace, 0.0))

    groups: list[Group] = []
    for p in pairs:
        prompt, sides = p["prompt_id"], (p["chosen_id"], p["rejected_id"])
        if unit == "token":
            groups.append(Group((row(prompt, sides[0]),)))
        elif reference and not all(trace in matched for trace in sides):
            continue
        elif unit == "example":
            for trace, label in zip(sides, (1.0, 0.0), strict=True):
                other = (
                    sequences.row(mismatched[trace][0], trace, mismatched[trace][1])
                    if (baseline and trace in mismatched)
                    else None
                )
                groups.append(Group((row(prompt, trace),), label, other))
        else:
            groups.append(Group((row(prompt, sides[0]), row(prompt, sides[1]))))
    return groups


def references(job: Job, wanted: str) -> tuple[dict[str, float], dict[str, tuple[str, float]]]:
    """Reference log-probabilities by trace, and (prompt, log-probability) of its mismatched row.

    Raises:
      ConfigError: a table was made by other weights than the reference that this arm names.
    """
    matched: dict[str, float] = {}
    mismatched: dict[str, tuple[str, float]] = {}
    for name, node in job.node.inputs.items():
        if not name.startswith("score/"):
            continue
        made = node.config["weights"]
        if made != wanted:
            raise ConfigError(
                f"The log-probabilities of {name.removeprefix('score/')!r} were made by the weights "
                f"{made} and this arm's reference has the weights {wanted}; score the traces with the "
                "reference."
            )
        for row in job.table(name).to_pylist():
            if row["logprob"] is None:
                continue
            if row["matched"]:
                matched[row["trace_id"]] = row["logprob"]
            else:
                mismatched[row["trace_id"]] = (row["prompt_id"], row["logprob"])
    return matched, mismatched


def arm_groups(job: Job, model: LoadedModel) -> tuple[list[Group], Stats]:
    """PAIR, TRACE, LOGPROB and PROMPT of an arm as the objective reads them, and counts for the manifest."""
    c = job.config
    kind, pairs = c["objective"]["kind"], job.table("pairs").to_pylist()
    needed = {p[side] for p in pairs for side in ("chosen_id", "rejected_id")}
    traces = [
        t
        for table in job.tables("sample").values()
        for t in table.to_pylist()
        if t["trace_id"] in needed
    ]
    matched, mismatched = references(job, c["reference"])
    sequences = Sequences(model.text, job.table("prompts").to_pylist(), traces)
    groups = groups_of(kind, pairs, sequences, matched, mismatched)
    if not groups:
        raise ConfigError(
            f"None of the {len(pairs)} pairs has reference log-probabilities: their rows are longer "
            "than config.scoring.row_length; raise it."
        )
    unscored = len(pairs) * (2 if OBJECTIVE_KINDS[kind].unit == "example" else 1) - len(groups)
    return groups, {"pairs": float(len(pairs)), "dropped_long": float(unscored)}


def data_of(
    groups: list[Group], config: Mapping[str, Any], mesh: Mesh, models: Mapping[str, ModelSpec]
) -> Data:
    """The steps of an arm.

    Args:
      groups: of the whole data set.
      config: of the arm's node: objective, training, seed.
      mesh: that it is trained on.
      models: whose sequences these are, by path.

    Raises:
      ConfigError: what `Data` refuses, or a sequence that a model was not made for.
    """
    training, objective = config["training"], Objective(**config["objective"])
    data = Data(
        groups,
        objective.kind,
        Training(**training | {"lora": Lora(**training["lora"])}),
        config["seed"],
        objective.baseline_fraction,
        shares_prompts(mesh, training["row_length"]),
    )
    rows = [row for group in data.groups for row in (*group.rows, group.mismatched) if row]
    longest = max(row.tokens for row in rows)
    largest = max(int(np.max(ids)) for row in rows for ids in row.pieces if len(ids))
    for path, spec in models.items():
        if longest > spec.max_positions:
            raise ConfigError(
                f"A sequence of {longest} tokens is longer than the {spec.max_positions} positions that "
                f"the model {path} was made for; lower config.training.row_length, so that over_length "
                "applies."
            )
        if largest >= spec.vocab:
            raise ConfigError(
                f"The data have the token id {largest} and the model {path} has the ids 0 to "
                f"{spec.vocab - 1}; use the tokenizer of that model."
            )
    return data


def train_arm(
    job: Job, read: Callable[[Job, LoadedModel], tuple[list[Group], Stats]] = arm_groups
) -> None:
    """What `read` finds to metrics.jsonl, checkpoints/ and policy/ (a Hugging Face folder).

    Of a run of adapters the policy is base and adapters merged; the adapters alone lie in adapter/, in PEFT's format.
    """
    c = job.config
    folder = job.dir
    lora = Lora(**c["training"]["lora"])
    with job.alone():
        path = job.local["student"]["path"]
        model = load(path, c["dtype"], None if lora.rank else "float32")
        groups, stats = read(job, model)
        training = Training(**c["training"] | {"lora": lora})
        mesh = make_mesh(MeshShape(**job.local["mesh"]))
        data = data_of(groups, c, mesh, {path: model.spec})
        run = Run(
            Objective(**c["objective"]),
            data.steps,
            training.rows,
            training.row_length,
            training.warmup,
            training.schedule,
            optimizer=Optimizer(training.clip, training.weight_decay, moments=training.moments),
            checkpoint_every=training.checkpoint_every,
            keep_checkpoints=training.keep_checkpoints,
            remat=training.remat,
            lora=lora,
            seed=c["seed"] % 2**32,
        )
        guard = c["reference"] == c["student"]
        trained, counts = train(
            model.spec,
            model.state,
            data,
            run,
            mesh,
            folder,
            job.node.label,
            c["dtype"],
            guard,
            Watch(**job.local.get("watch", {})),
            model.weights if lora.rank else "",
        )
        trained = fetch(trained)
        if is_first():
            with job.making("policy") as place:
                export(merge(model.state, trained, lora), model.spec, model.text, place)
            if lora.rank:
                with job.making("adapter") as place:
                    export_adapter(trained, lora, path, place)
    dropped = data.dropped + stats.pop("dropped_long", 0.0)
    job.stats |= (
        counts
        | stats
        | {
            "groups": float(len(data.groups)),
            "steps": float(data.steps),
            "batch": float(data.batch),
            "dropped_long": dropped,
            "dropped_mismatched": float(data.dropped_mismatched),
        }
    )
    job.files += ["metrics.jsonl", "policy/*", "adapter/*"]
