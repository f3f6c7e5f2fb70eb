"""Experiment to artifacts: the graph of everything a study needs, each thing once.

Labels: prompts · suite/S · sample/G · verify/G · judge/J/G · score/G · capability/G · audit/J · pair/A · train/A/seed ·
evaluate/A/seed · evaluate/student · report.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from deltapref_jax.config import (
    OBJECTIVE_KINDS,
    Arm,
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Model,
    Prompts,
    choose,
    judge_of,
    model_of,
)
from deltapref_jax.data.sources import task_names
from deltapref_jax.files import file_sha256, local
from deltapref_jax.judging.rubric import label_ids
from deltapref_jax.models.lora import check_rank
from deltapref_jax.models.weights import inspect_model, weights_hash
from deltapref_jax.records import digest
from deltapref_jax.stages import audit, judge, pair, prompts, report, sample, score, train, verify
from deltapref_jax.workspace import Node

Describe = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
_AUDIT_COUNT = 60  # problems a judge is audited on


def _source(source: Prompts) -> dict[str, Any]:
    """A source's fields with its path replaced by name and content: moved files are the same source."""
    fields = dataclasses.asdict(source)
    path = Path(local(source.path))
    if source.kind in ("synthetic", "reasoning_gym"):
        known = task_names(source.kind)
        for task in source.tasks:
            choose(f"{source.kind} task", task, known)
    if source.kind in ("jsonl", "parquet") and not path.is_file():
        raise ConfigError(f"There is no prompt file {source.path}; check prompts.path.")
    if source.kind == "tfds" and not path.is_dir():
        raise ConfigError(f"There is no TFDS builder directory {source.path}; check prompts.path.")
    if source.path and path.exists():  # what is not here is a name on the hub
        fields["path"] = content(path)
    return fields


def content(path: Path) -> str:
    """16 hex digits of a file's or folder's name and content: a moved one is the same."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return digest(
        path.name, [[f.relative_to(path).as_posix(), file_sha256(epath.Path(f))] for f in files]
    )


def prompts_node(label: str, sources: tuple[Prompts, ...], suites: Mapping[str, Node]) -> Node:
    """Node of a table of questions; `suites` are what they must not overlap.

    Raises:
      ConfigError: a file or builder directory is not there, or a task is not known.
    """
    return Node(
        "prompts",
        label,
        {"sources": [_source(s) for s in sources]},
        suites,
        {"paths": [s.path for s in sources]},
        prompts.VERSION,
    )


def ladder_of(e: Experiment) -> dict[str, int]:
    """Usable traces that a prompt must have of every generator, so that all arms share their prompts.

    A generator that an arm pairs with itself must have two.
    """
    zero = {a.chosen for a in e.arms if a.chosen == a.rejected}
    return {g.name: 1 + (g.name in zero) for g in e.generators}


def check_models(e: Experiment) -> None:
    """Looks at every model once before anything is made: architecture, tensors, tokenizer, template, a judge's labels.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the model and the remedy.
    """
    see = functools.cache(inspect_model)
    for model in (e.student, e.reference, *(g.model for g in e.generators)):
        see(model_of(e, model).path)[1].check_template()
    check_rank(e.training.lora, see(e.student.path)[0])
    for j in e.judges:
        if j.kind == "model":
            text = see(model_of(e, j.model).path)[1]
            text.check_template()
            label_ids(text)


def plan(
    e: Experiment, describe_evaluation: Describe, profile: tuple[int, int] | None = None
) -> dict[str, Node]:
    """Every artifact of the study by label, inputs before what needs them.

    Args:
      e: validated.
      describe_evaluation: `evals.evaluate.describe` (the package does not import evals).
      profile: first and last training step, from 1, that JAX's profiler traces in every arm.

    Raises:
      FileNotFoundError: a model that the study names is not there.
      ConfigError: a prompt file is not there.
    """
    nodes: dict[str, Node] = {}
    mesh = dataclasses.asdict(e.mesh)
    student, reference = e.student, e.reference if e.reference.path else e.student
    for s in e.suites:
        nodes[f"suite/{s.name}"] = prompts_node(f"suite/{s.name}", (s.prompts,), {})
    suites = {label: node for label, node in nodes.items() if label.startswith("suite/")}
    nodes["prompts"] = prompts_node("prompts", e.prompts, suites)
    for g in e.generators:
        _generator(nodes, e, dataclasses.replace(g, model=model_of(e, g.model)), reference, mesh)

    def evaluation(
        label: str, model: Model, policy: Node | None, generator: Generator | None = None
    ) -> None:
        config, local = describe_evaluation(
            e.suites, e.sampling, e.seed, e.mesh, model, policy is not None, generator
        )
        inputs = suites | ({} if policy is None else {"policy": policy})
        nodes[label] = Node("evaluate", label, config, inputs, local)

    if e.suites:
        evaluation("evaluate/student", student, None)
        for g in e.generators:
            evaluation(f"capability/{g.name}", model_of(e, g.model), None, g)
    if any(p.kind == "synthetic" for p in e.prompts):
        for j in e.judges:
            config, local = _judge(e, j, mesh)
            nodes[f"audit/{j.name}"] = Node(
                "audit",
                f"audit/{j.name}",
                config | {"count": _AUDIT_COUNT, "seed": e.seed},
                {"prompts": nodes["prompts"]},
                local,
                audit.VERSION,
            )
    for a in e.arms:
        node = nodes[f"pair/{a.name}"] = _pair(nodes, e, a)
        for seed in a.seeds:
            label = f"train/{a.name}/{seed}"
            nodes[label] = _train(nodes, e, a, seed, node, student, reference, label, profile)
            if e.suites:
                evaluation(f"evaluate/{a.name}/{seed}", student, nodes[label])
    described = dataclasses.asdict(e)
    described.pop("workspace")
    described.pop("trackers")
    nodes["report"] = Node(
        "report", "report", {"experiment": described}, dict(nodes), {}, report.VERSION
    )
    return nodes


def _generator(
    nodes: dict[str, Node], e: Experiment, g: Generator, reference: Model, mesh: dict[str, int]
) -> None:
    """Nodes of one generator: its traces, and what is known of every trace."""
    config, local = sample.describe(g, e.sampling, e.seed, e.mesh)
    traces = nodes[f"sample/{g.name}"] = Node(
        "sample", f"sample/{g.name}", config, {"prompts": nodes["prompts"]}, local, sample.VERSION
    )
    inputs = {"sample": traces, "prompts": nodes["prompts"]}
    nodes[f"verify/{g.name}"] = Node("verify", f"verify/{g.name}", {}, inputs, {}, verify.VERSION)
    for j in e.judges:
        config, local = _judge(e, j, mesh)
        label = f"judge/{j.name}/{g.name}"
        nodes[label] = Node("judge", label, config, inputs, local, judge.VERSION)
    kinds = {o.name: o.kind for o in e.objectives}
    if any(
        OBJECTIVE_KINDS[kinds[a.objective]].reference and g.name in (a.chosen, a.rejected)
        for a in e.arms
    ):
        nodes[f"score/{g.name}"] = Node(
            "score",
            f"score/{g.name}",
            {
                "weights": weights_hash(reference.path),
                "dtype": reference.dtype,
                "seed": e.seed,
                "scoring": dataclasses.asdict(e.scoring),
            },
            inputs,
            {"model": dataclasses.asdict(reference), "mesh": mesh},
            score.VERSION,
        )


def _judge(e: Experiment, j: Judge, mesh: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = dataclasses.asdict(j)
    fields.pop("model")
    config: dict[str, Any] = {"judge": fields, "scoring": dataclasses.asdict(e.scoring)}
    if j.kind == "exact":
        return config, {"mesh": mesh}
    model = model_of(e, j.model)
    return config | {"weights": weights_hash(model.path), "dtype": model.dtype}, {
        "model": dataclasses.asdict(model),
        "mesh": mesh,
    }


def _pair(nodes: dict[str, Node], e: Experiment, a: Arm) -> Node:
    """Arms that differ only in objective or seeds share this node; ratings are an input where they shape the pairs."""
    ladder = ladder_of(e)
    by_judge = a.direction != "generator"
    rated = by_judge or a.keep in ("top", "matched")
    who = next((j for j in e.judges if rated and j.name == judge_of(e, a)), None)
    config = {
        "chosen": a.chosen,
        "rejected": a.rejected,
        "ladder": ladder,
        "direction": "judge" if by_judge else "generator",
        "keep": a.keep,
        "by": a.by if rated else "sum",
        "fraction": 1.0 if a.keep == "all" else a.fraction,
        "stratum": a.stratum,
        "finishes": list(e.training.finishes),
        "seed": e.seed,
        "dimensions": list(who.dimensions) if who else [],
    }
    inputs = {"prompts": nodes["prompts"]}
    for name in ladder:
        inputs[f"sample/{name}"] = nodes[f"sample/{name}"]
    for name in dict.fromkeys((a.chosen, a.rejected)):
        inputs[f"verify/{name}"] = nodes[f"verify/{name}"]
        if who:
            inputs[f"judge/{name}"] = nodes[f"judge/{who.name}/{name}"]
    return Node("pair", f"pair/{a.name}", config, inputs, {}, pair.VERSION)


def _train(
    nodes: dict[str, Node],
    e: Experiment,
    a: Arm,
    seed: int,
    pairs: Node,
    student: Model,
    reference: Model,
    label: str,
    profile: tuple[int, int] | None,
) -> Node:
    objective = next(o for o in e.objectives if o.name == a.objective)
    config = {
        "objective": dataclasses.asdict(objective),
        "training": dataclasses.asdict(e.training),
        "seed": seed,
        "student": weights_hash(student.path),
        "reference": weights_hash(reference.path),
        "dtype": student.dtype,
    }
    inputs = {"pairs": pairs, "prompts": nodes["prompts"]}
    for name in dict.fromkeys((a.chosen, a.rejected)):
        inputs[f"sample/{name}"] = nodes[f"sample/{name}"]
        if f"score/{name}" in nodes and OBJECTIVE_KINDS[objective.kind].reference:
            inputs[f"score/{name}"] = nodes[f"score/{name}"]
    return Node(
        "train",
        label,
        config,
        inputs,
        {
            "student": dataclasses.asdict(student),
            "mesh": dataclasses.asdict(e.mesh),
            "watch": {"trackers": e.trackers, "profile": profile},
        },
        train.VERSION,
    )
