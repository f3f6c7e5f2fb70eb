"""Experiment to artifacts: the graph of everything a study needs, each thing once.

`plan` returns the node of the report, whose inputs are all tables and policies of the study; what
they are of (judge, generator, arm, seed, suite) are the keys of its mappings.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from deltapref_jax.artifacts.node import in_order
from deltapref_jax.config import (
    OBJECTIVE_KINDS,
    Arm,
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Model,
    Prompts,
    Suite,
    check_choice,
    judge_of,
    mesh_of,
    model_of,
    reference_of,
)
from deltapref_jax.data.dataset import content_of
from deltapref_jax.data.sources import task_names
from deltapref_jax.devices import Devices
from deltapref_jax.files import content_hash, local_copy
from deltapref_jax.judging.rubric import label_ids
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.lora import check_rank
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import inspect_model
from deltapref_jax.pairs.build import Rules
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.meshes import fit_meshes
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.pinned import pinned
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.report import Report
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.score import LogProbTable, known_table
from deltapref_jax.stages.tokens import SequenceTable, TraceSequences
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.training.monitor import MonitorConfig

_AUDIT_COUNT = 60  # problems a judge is audited on

# A model's path to its shape and tokenizer; the weights are not read.
Inspect = Callable[[str], tuple[ModelSpec, ChatTokenizer]]


def plan(
    e: Experiment, profile: tuple[int, int] | None = None, devices: Devices | None = None
) -> Report:
    """Every artifact of the study, as the inputs of its report.

    Args:
      e: validated.
      profile: first and last training step, from 1, that JAX's profiler traces in every arm.
      devices: that the meshes must fit; the report's experiment has their sizes (`fit_meshes`).
        None: no mesh is looked at before a stage makes it.

    Raises:
      FileNotFoundError, ValueError: a model is not there or cannot be used (see `check_models`).
      ConfigError: a prompt file or table is not there, a task is not known, or a mesh does not fit.
    """
    # Several nodes ask about one model, whose files are read once.
    inspect: Inspect = functools.cache(inspect_model)
    e = pinned(e)
    check_models(e, inspect)
    if devices:
        e = fit_meshes(e, devices, lambda path: inspect(path)[0])
    suites = {s.name: prompt_table(("suite", s.name), (s.prompts,), {}) for s in e.suites}
    prompts = prompt_table(("prompts",), e.prompts, suites)

    # What is known of every trace: its verdict, its ratings, its tokens, its reference.
    traces = {g.name: _traces(e, g, prompts) for g in e.generators}
    verdicts = {
        name: VerdictTable(label=("verify", name), prompts=prompts, traces=table)
        for name, table in traces.items()
    }
    ratings = {j.name: _ratings(e, j, prompts, traces) for j in e.judges}
    # Only generators whose traces an arm reads are tokenised and scored.
    used = {name for arm in e.arms for name in (arm.chosen, arm.rejected)}
    sequences: dict[str, SequenceTable] = {
        g.name: _sequences(e, g, prompts, traces[g.name], inspect)
        for g in e.generators
        if g.name in used
    }
    logprobs = _logprobs(e, sequences)

    # The models before training.
    student = result_tables(e, ("evaluate", "student"), suites, e.student, None)
    capability = {
        g.name: result_tables(e, ("capability", g.name), suites, model_of(e, g.model), None, g)
        for g in e.generators
    }
    synthetic = any(source.kind == "synthetic" for source in e.prompts)
    audits = {j.name: audit_table(e, j, prompts) for j in e.judges if synthetic}

    # Arms.
    pairs = {arm.name: _pairs(e, arm, prompts, traces, verdicts, ratings) for arm in e.arms}
    monitor = MonitorConfig(e.trackers, profile)
    policies = {
        arm.name: {
            seed: _policy(e, arm, seed, pairs[arm.name], sequences, logprobs, monitor)
            for seed in arm.seeds
        }
        for arm in e.arms
    }
    results = {
        arm: {
            seed: result_tables(e, ("evaluate", arm, str(seed)), suites, e.student, policy)
            for seed, policy in seeds.items()
        }
        for arm, seeds in policies.items()
    }
    return Report(
        label=("report",),
        experiment=e,
        abouts=tuple(generator.about for generator in e.generators),
        suites=suites,
        prompts=prompts,
        traces=traces,
        verdicts=verdicts,
        ratings=ratings,
        sequences=sequences,
        logprobs=logprobs,
        student=student,
        capability=capability,
        audits=audits,
        pairs=pairs,
        policies=policies,
        results=results,
    )


def part_of(report: Report, arms: Collection[str]) -> Report:
    """The report of some arms, by name; everything behind it is part of the whole study.

    Keys stay the same, and arms share prompts with those that are left out.
    """
    policies = {name: report.policies[name] for name in arms}
    behind = set(in_order(policy for seeds in policies.values() for policy in seeds.values()))
    return dataclasses.replace(
        report,
        sequences={name: node for name, node in report.sequences.items() if node in behind},
        logprobs={name: node for name, node in report.logprobs.items() if node in behind},
        pairs={name: report.pairs[name] for name in arms},
        policies=policies,
        results={name: report.results[name] for name in arms},
    )


def check_models(e: Experiment, inspect: Inspect = inspect_model) -> None:
    """Refuses models that the study cannot use, before anything is made.

    Looked at are architecture, tensors, tokenizer, template and a judge's labels.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the model and the remedy.
    """
    longest = e.sampling.max_prompt + e.sampling.max_tokens
    for model in (e.student, e.reference, *(g.model for g in e.generators)):
        spec, text = inspect(model_of(e, model).place)
        text.check_template()
        if longest > spec.max_positions:
            raise ConfigError(
                f"config.sampling.max_prompt + max_tokens is {longest} and the model "
                f"{model_of(e, model).path} has {spec.max_positions} positions; lower one of the "
                "two."
            )
    spec, tokenizer = inspect(e.student.place)
    check_rank(e.training.lora, spec)
    check_same_vocabulary(tokenizer, inspect(model_of(e, e.reference).place)[1])
    for judge in e.judges:
        if judge.kind == "model":
            text = inspect(model_of(e, judge.model).place)[1]
            text.check_template()
            label_ids(text)


def check_same_vocabulary(student: ChatTokenizer, reference: ChatTokenizer) -> None:
    """Refuses a reference that reads the student's token ids as other tokens.

    Raises:
      ConfigError: a token of the student has another id under the reference.
    """
    known = reference.tokenizer.get_vocab()
    if any(known.get(token, i) != i for token, i in student.tokenizer.get_vocab().items()):
        raise ConfigError(
            f"The reference {reference.where} has another tokenizer than the student "
            f"{student.where}, so that it cannot score the student's tokens; choose a reference "
            "with the same tokenizer."
        )


def prompt_table(
    label: tuple[str, ...], sources: tuple[Prompts, ...], suites: Mapping[str, PromptTable]
) -> PromptTable:
    """Node of a table of questions; `suites` are what they must not overlap.

    Raises:
      ConfigError: a file or builder directory is not there, or a task is not known.
    """
    contents = tuple(_content(source) for source in sources)
    return PromptTable(label=label, sources=sources, contents=contents, suites=suites)


def _content(source: Prompts) -> str:
    """What a source's path holds; of a data set on the hub, its name and commit."""
    path = Path(local_copy(source.path))
    if source.kind in ("synthetic", "reasoning_gym"):
        for task in source.tasks:
            check_choice(f"{source.kind} task", task, task_names(source.kind))
    if source.kind in ("jsonl", "parquet") and not path.is_file():
        raise ConfigError(f"There is no prompt file {source.path}; check prompts.path.")
    if source.kind == "tfds" and not path.is_dir():
        raise ConfigError(f"There is no TFDS builder directory {source.path}; check prompts.path.")
    if source.kind == "hub":
        return content_of(source)
    return content_hash(path) if source.path and path.exists() else source.path


def usable_traces(e: Experiment, arm: Arm) -> dict[str, int]:
    """Usable traces that a prompt of `arm` must have, by generator, so that arms share prompts.

    The generators are those of `shared_by`, or of all arms, and the arm's own. One that an arm
    pairs with itself must have two traces.
    """
    sharing = [a for a in e.arms if not e.shared_by or {a.chosen, a.rejected} <= set(e.shared_by)]
    needed = {name for a in (*sharing, arm) for name in (a.chosen, a.rejected)} | set(e.shared_by)
    twice = {a.chosen for a in (*sharing, arm) if a.chosen == a.rejected}
    return {g.name: 1 + (g.name in twice) for g in e.generators if g.name in needed}


def _traces(e: Experiment, g: Generator, prompts: PromptTable) -> TraceTable:
    model = model_of(e, g.model)
    return TraceTable(
        label=("sample", g.name),
        prompts=prompts,
        generator=dataclasses.replace(g, model=model),
        weights=weights_hash(model.place),
        sampling=e.sampling,
        seed=e.seed,
        mesh=mesh_of(g.mesh, e.sampling.mesh),
    )


def _judge(e: Experiment, judge: Judge) -> tuple[Judge, str]:
    """The judge with its model's path, and the hash of its weights."""
    if judge.kind == "exact":
        return judge, ""
    model = model_of(e, judge.model)
    return dataclasses.replace(judge, model=model), weights_hash(model.place)


def _ratings(
    e: Experiment, judge: Judge, prompts: PromptTable, traces: Mapping[str, TraceTable]
) -> dict[str, RatingTable]:
    """Of one judge, by generator."""
    judge, weights = _judge(e, judge)
    return {
        name: RatingTable(
            label=("judge", judge.name, name),
            prompts=prompts,
            traces=table,
            judge=judge,
            weights=weights,
            scoring=e.scoring,
            system=table.generator.system,
            prefix=table.generator.prefix,
            mesh=mesh_of(judge.mesh, e.scoring.mesh),
        )
        for name, table in traces.items()
    }


def audit_table(e: Experiment, judge: Judge, prompts: PromptTable) -> AuditTable:
    """Node of a judge's audit on the synthetic questions of `prompts`."""
    judge, weights = _judge(e, judge)
    return AuditTable(
        label=("audit", judge.name),
        prompts=prompts,
        judge=judge,
        weights=weights,
        scoring=e.scoring,
        count=_AUDIT_COUNT,
        seed=e.seed,
        mesh=mesh_of(judge.mesh, e.scoring.mesh),
    )


def _sequences(
    e: Experiment, g: Generator, prompts: PromptTable, traces: TraceTable, inspect: Inspect
) -> TraceSequences:
    tokenizer = inspect(e.student.place)[1].identity
    return TraceSequences(
        label=("tokens", g.name),
        prompts=prompts,
        traces=traces,
        tokenizer=tokenizer,
        sampled=inspect(model_of(e, g.model).place)[1].identity == tokenizer,
        shard=e.scoring.shard,
        model=e.student,
    )


def _logprobs(e: Experiment, sequences: Mapping[str, SequenceTable]) -> dict[str, LogProbTable]:
    """Under the reference, of the generators whose traces an objective with a reference reads."""
    kinds = {o.name: o.kind for o in e.objectives}
    with_reference = [a for a in e.arms if OBJECTIVE_KINDS[kinds[a.objective]].reference]
    read = {name for arm in with_reference for name in (arm.chosen, arm.rejected)}
    reference = reference_of(e.student, e.reference)
    weights = weights_hash(reference.place)
    if e.table and not read:
        raise ConfigError(
            f"config.table is {e.table!r} and no arm's objective has a reference; leave it empty."
        )
    known = known_table(e.table, weights)
    return {
        name: LogProbTable(
            label=("score", name),
            sequences=table,
            weights=weights,
            dtype=reference.dtype,
            rows=e.scoring.rows,
            row_length=e.scoring.row_length,
            shard=2 * e.scoring.shard,  # matched and mismatched
            known=known,
            model=reference,
            table=e.table,
            mesh=e.scoring.mesh,
        )
        for name, table in sequences.items()
        if name in read
    }


def result_tables(
    e: Experiment,
    label: tuple[str, ...],
    suites: Mapping[str, PromptTable],
    model: Model,
    policy: Policy | None,
    generator: Generator | None = None,
) -> dict[str, ResultTable]:
    """Results of a model on every suite; a generator is asked and sampled in its own manner."""

    def of(suite: Suite) -> ResultTable:
        asked = generator or Generator(temperature=suite.temperature)
        return ResultTable(
            label=(*label, suite.name),
            questions=suites[suite.name],
            policy=policy,
            # A trained policy is an input and is hashed by its contents.
            weights="" if policy else weights_hash(model.place),
            suite=suite.name,
            domain=suite.domain,
            samples=suite.samples,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            system=asked.system,
            prefix=asked.prefix,
            sampling=e.sampling,
            seed=e.seed,
            model=model,
            mesh=mesh_of(asked.mesh, e.sampling.mesh),
        )

    return {suite.name: of(suite) for suite in e.suites}


def _pairs(
    e: Experiment,
    arm: Arm,
    prompts: PromptTable,
    traces: Mapping[str, TraceTable],
    verdicts: Mapping[str, VerdictTable],
    ratings: Mapping[str, Mapping[str, RatingTable]],
) -> PairTable:
    """Arms that differ only in objective or seeds get equal nodes.

    Ratings are an input where they shape the pairs, and only then.
    """
    by_judge = arm.direction != "generator"
    rated = by_judge or arm.keep in ("top", "matched")
    judge = next((j for j in e.judges if rated and j.name == judge_of(e, arm)), None)
    both = tuple(dict.fromkeys((arm.chosen, arm.rejected)))
    needed = usable_traces(e, arm)
    return PairTable(
        label=("pair", arm.name),
        prompts=prompts,
        traces={name: traces[name] for name in needed},
        verdicts={name: verdicts[name] for name in both},
        ratings={name: ratings[judge.name][name] for name in both} if judge else {},
        rules=Rules(
            arm.chosen,
            arm.rejected,
            needed,
            tuple(e.training.finishes),
            "judge" if by_judge else "generator",
            arm.stratum,
        ),
        dimensions=judge.dimensions if judge else (),
        keep=arm.keep,
        # What does not matter has one fixed value, so that equal arms get equal keys.
        rank_by=arm.by if rated else "sum",
        fraction=1.0 if arm.keep == "all" else arm.fraction,
        seed=e.seed,
    )


def _policy(
    e: Experiment,
    arm: Arm,
    seed: int,
    pairs: PairTable,
    sequences: Mapping[str, SequenceTable],
    logprobs: Mapping[str, LogProbTable],
    monitor: MonitorConfig,
) -> Policy:
    objective = next(o for o in e.objectives if o.name == arm.objective)
    both = tuple(dict.fromkeys((arm.chosen, arm.rejected)))
    with_reference = OBJECTIVE_KINDS[objective.kind].reference
    return Policy(
        label=("train", arm.name, str(seed)),
        pairs=pairs,
        sequences={name: sequences[name] for name in both},
        logprobs={name: logprobs[name] for name in both} if with_reference else {},
        student_weights=weights_hash(e.student.place),
        reference_weights=weights_hash(reference_of(e.student, e.reference).place),
        objective=objective,
        training=e.training,
        seed=seed,
        student=e.student,
        mesh=e.training.mesh,
        monitor=monitor,
    )
