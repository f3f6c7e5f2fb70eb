"""Experiment to artifacts: the graph of everything a study needs, each thing once.

`plan` returns the node of the report, whose inputs are all tables and policies of the study; what
they are of (judge, generator, arm, seed, suite) are the keys of its mappings.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from deltapref_jax.artifacts.node import in_order
from deltapref_jax.callables import code_hash, code_hashes, is_callable_name
from deltapref_jax.config import (
    GROUPS,
    OBJECTIVE_KINDS,
    RANKED,
    REFERENCE_MARGIN,
    SYMMETRIC,
    TUNING,
    UNJUDGED,
    Arm,
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Model,
    Objective,
    Prompts,
    Run,
    Suite,
    check_choice,
    is_balanced,
    is_tuned,
    judge_of,
    mesh_of,
    model_of,
    objective_of,
    reference_of,
    samples_of,
    sides_of,
    training_of,
    uses_ratings,
)
from deltapref_jax.data.dataset import content_of
from deltapref_jax.data.sources import task_names
from deltapref_jax.devices import Devices
from deltapref_jax.files import content_hash, local_copy
from deltapref_jax.judging.rubric import label_ids
from deltapref_jax.models.folder import planned_hash, weights_hash
from deltapref_jax.models.lora import fit_lora
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import describe_model, inspect_model
from deltapref_jax.pairs.build import Rules
from deltapref_jax.records import digest
from deltapref_jax.stages.audit import AuditTable
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.judge import RatingTable
from deltapref_jax.stages.judge_mean import MeanRatingTable
from deltapref_jax.stages.meshes import fit_meshes
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.pinned import pinned
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.report import Report
from deltapref_jax.stages.retest import RetestTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.stages.score import LogProbTable, known_table
from deltapref_jax.stages.tokens import SequenceTable, TraceSequences
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.tune import RateTable
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.training.monitor import MonitorConfig

_AUDIT_COUNT = 60  # problems a judge is audited on
_AUDITED_TRACES = 100  # traces that are edited: an AUC of 0.8 is known to about 0.08
_RETESTED_PAIRS = 60  # rated under every wording: a correlation of 0.6 is known to about 0.17

# A model's path to its shape and tokenizer; the weights are not read. A model that is planned and
# has no weights may have no tokenizer.
Inspect = Callable[[str], tuple[ModelSpec, ChatTokenizer | None]]
# A model's path to the hash of its weights.
WeightsOf = Callable[[str], str]


def plan(
    e: Experiment,
    profile: tuple[int, int] | None = None,
    devices: Devices | None = None,
    weights: bool = True,
) -> Report:
    """Every artifact of the study, as the inputs of its report.

    Args:
      e: validated.
      profile: first and last training step, from 1, that JAX's profiler traces in every arm.
      devices: that the meshes must fit; the report's experiment has their sizes (`fit_meshes`).
        None: no mesh is looked at before a stage makes it.
      weights: whether every model must have its weights and its tokenizer. False: a config.json is
        enough, for a plan that is looked at and not made.

    Raises:
      FileNotFoundError, ValueError: a model is not there or cannot be used (see `check_models`).
      ConfigError: a prompt file or table is not there, a task is not known, or a mesh does not fit.
    """
    # Several nodes ask about one model, whose files are read once.
    inspect: Inspect = functools.cache(inspect_model if weights else describe_model)
    weights_of = weights_hash if weights else planned_hash
    e = pinned(e)
    check_models(e, inspect)
    lora = fit_lora(e.training.lora, inspect(e.student.place)[0])
    e = dataclasses.replace(e, training=dataclasses.replace(e.training, lora=lora))
    if devices:
        e = fit_meshes(e, devices, lambda path: inspect(path)[0])
    suites = {
        s.name: prompt_table(("suite", s.name), (s.prompts,), {})
        for s in e.suites
        if s.readout != TUNING
    }
    # What chooses the learning rates must not be what the policies are measured on.
    tuning = {
        s.name: prompt_table(("suite", s.name), (s.prompts,), suites)
        for s in e.suites
        if s.readout == TUNING
    }
    # A second read-out of a suite's own questions holds out no others, and so remakes nothing.
    averaged = [s.prompts for s in e.suites if not s.readout]
    held_out = {
        s.name: {**suites, **tuning}[s.name]
        for s in e.suites
        if not s.readout or s.prompts not in averaged
    }
    prompts = prompt_table(("prompts",), e.prompts, held_out)

    # What is known of every trace: its verdict, its ratings, its tokens, its reference.
    traces = {g.name: _traces(e, g, prompts, weights_of) for g in e.generators}
    verdicts = {
        name: VerdictTable(
            label=("verify", name),
            prompts=prompts,
            traces=table,
            checkers=code_hashes([p.checker for p in e.prompts]),
        )
        for name, table in traces.items()
    }
    ratings = _all_ratings(e, prompts, traces, weights_of)
    # Only generators whose traces an arm reads are tokenised and scored.
    used = {name for arm in e.arms for name in (arm.chosen, arm.rejected)}
    sequences: dict[str, SequenceTable] = {
        g.name: _sequences(e, g, prompts, traces[g.name], inspect)
        for g in e.generators
        if g.name in used
    }
    logprobs = _logprobs(e, sequences, weights_of)

    # The models before training.
    student = result_tables(e, ("evaluate", "student"), suites, e.student, None, None, weights_of)
    capability = {
        g.name: result_tables(
            e, ("capability", g.name), suites, model_of(e, g.model), None, g, weights_of
        )
        for g in e.generators
    }
    synthetic = any(source.kind == "synthetic" for source in e.prompts)
    measured = [j for j in e.judges if j.kind != "mean"]
    audits = {j.name: audit_table(e, j, prompts, weights_of) for j in measured if synthetic}
    trace_audits = {j.name: _trace_audit(e, j, prompts, traces, weights_of) for j in measured}
    retests = {j.name: _retest(e, j, prompts, traces, weights_of) for j in measured if e.arms}

    # Arms.
    pairs = {
        arm.name: {
            draw: _pairs(
                e, arm, draw, prompts, traces, verdicts, ratings, sequences, logprobs, weights_of
            )
            for draw in arm.draws
        }
        for arm in e.arms
    }
    monitor = MonitorConfig(e.trackers, profile)
    policy = functools.partial(
        _policy, e, pairs=pairs, sequences=sequences, logprobs=logprobs, weights_of=weights_of
    )
    rates = {o.name: _rates(e, o, policy, tuning) for o in e.objectives if o.rates}
    policies = {
        arm.name: {
            run: policy(
                ("train", arm.name, str(run)),
                arm,
                run,
                rates=rates[arm.objective] if is_tuned(e, arm) else None,
                monitor=monitor,
            )
            for run in arm.runs
        }
        for arm in e.arms
    }
    results = {
        arm: {
            run: result_tables(e, ("evaluate", arm, str(run)), suites, e.student, policy)
            for run, policy in runs.items()
        }
        for arm, runs in policies.items()
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
        trace_audits=trace_audits,
        retests=retests,
        pairs=pairs,
        policies=policies,
        results=results,
        rates=rates,
    )


def part_of(report: Report, arms: Collection[str]) -> Report:
    """The report of some arms, by name; everything behind it is part of the whole study.

    Keys stay the same, and arms share prompts with those that are left out.
    """
    policies = {name: report.policies[name] for name in arms}
    behind = set(in_order(policy for runs in policies.values() for policy in runs.values()))
    return dataclasses.replace(
        report,
        sequences={name: node for name, node in report.sequences.items() if node in behind},
        logprobs={name: node for name, node in report.logprobs.items() if node in behind},
        pairs={name: report.pairs[name] for name in arms},
        policies=policies,
        results={name: report.results[name] for name in arms},
        rates={name: node for name, node in report.rates.items() if node in behind},
    )


def check_models(e: Experiment, inspect: Inspect = inspect_model) -> None:
    """Refuses models that the study cannot use, before anything is made.

    Looked at are architecture, tensors, tokenizer, template and a judge's labels.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the model and the remedy.
    """
    longest = e.sampling.longest
    for model in (e.student, e.reference, *(g.model for g in e.generators)):
        spec, text = inspect(model_of(e, model).place)
        if text:
            text.check_template()
        if longest > spec.max_positions:
            raise ConfigError(
                f"config.sampling.max_prompt + max_tokens is {longest} and the model "
                f"{model_of(e, model).path} has {spec.max_positions} positions; lower one of the "
                "two."
            )
    spec, tokenizer = inspect(e.student.place)
    fit_lora(e.training.lora, spec)
    reference = inspect(model_of(e, e.reference).place)[1]
    if tokenizer and reference:
        check_same_vocabulary(tokenizer, reference)
    for judge in e.judges:
        if judge.kind == "model":
            text = inspect(model_of(e, judge.model).place)[1]
            if text:
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
    if is_callable_name(source.kind):
        at_path = content_hash(path) if source.path and path.exists() else source.path
        return digest(code_hash(source.kind), at_path, source.name, source.revision)
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


def _traces(e: Experiment, g: Generator, prompts: PromptTable, weights_of: WeightsOf) -> TraceTable:
    model = model_of(e, g.model)
    return TraceTable(
        label=("sample", g.name),
        prompts=prompts,
        generator=dataclasses.replace(g, model=model),
        weights=weights_of(model.place),
        sampling=e.sampling,
        seed=e.seed,
        mesh=mesh_of(g.mesh, e.sampling.mesh),
    )


def _judge(e: Experiment, judge: Judge, weights_of: WeightsOf) -> tuple[Judge, str]:
    """The judge with its model's path, and the hash of its weights."""
    if judge.kind == "exact":
        return judge, ""
    model = model_of(e, judge.model)
    return dataclasses.replace(judge, model=model), weights_of(model.place)


def _all_ratings(
    e: Experiment,
    prompts: PromptTable,
    traces: Mapping[str, TraceTable],
    weights_of: WeightsOf,
) -> dict[str, dict[str, RatingTable | MeanRatingTable]]:
    """By judge, in the config's order, and generator."""
    own = {
        j.name: _ratings(e, j, prompts, traces, weights_of) for j in e.judges if j.kind != "mean"
    }
    means = {
        j.name: {
            g: MeanRatingTable(
                label=("judge", j.name, g),
                ratings={name: own[name] for name in j.of},
                generator=g,
                judge=j,
            )
            for g in traces
        }
        for j in e.judges
        if j.kind == "mean"
    }
    return {j.name: {**own.get(j.name, {}), **means.get(j.name, {})} for j in e.judges}


def _ratings(
    e: Experiment,
    judge: Judge,
    prompts: PromptTable,
    traces: Mapping[str, TraceTable],
    weights_of: WeightsOf,
) -> dict[str, RatingTable]:
    """Of one judge, by generator."""
    judge, weights = _judge(e, judge, weights_of)
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


def audit_table(
    e: Experiment, judge: Judge, prompts: PromptTable, weights_of: WeightsOf = weights_hash
) -> AuditTable:
    """Node of a judge's audit on the synthetic questions of `prompts`."""
    judge, weights = _judge(e, judge, weights_of)
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


def _trace_audit(
    e: Experiment,
    judge: Judge,
    prompts: PromptTable,
    traces: Mapping[str, TraceTable],
    weights_of: WeightsOf,
) -> AuditTable:
    """Node of a judge's audit on edited traces of the generators."""
    judge, weights = _judge(e, judge, weights_of)
    return AuditTable(
        label=("audit", judge.name, "traces"),
        prompts=prompts,
        judge=judge,
        weights=weights,
        scoring=e.scoring,
        count=_AUDITED_TRACES,
        seed=e.seed,
        traces=traces,
        finishes=tuple(e.training.finishes),
        mesh=mesh_of(judge.mesh, e.scoring.mesh),
    )


def _retest(
    e: Experiment,
    judge: Judge,
    prompts: PromptTable,
    traces: Mapping[str, TraceTable],
    weights_of: WeightsOf,
) -> RetestTable:
    """Node of a judge's retest on generators whose pairs any judge shapes, else on all of them."""
    shaped = [a for a in e.arms if uses_ratings(a)]
    generators = tuple(sorted({(a.chosen, a.rejected) for a in shaped or e.arms}))
    judge, weights = _judge(e, judge, weights_of)
    return RetestTable(
        label=("retest", judge.name),
        prompts=prompts,
        traces={n: t for n, t in traces.items() if any(n in pair for pair in generators)},
        generators=generators,
        finishes=tuple(e.training.finishes),
        judge=judge,
        weights=weights,
        scoring=e.scoring,
        count=_RETESTED_PAIRS,
        mesh=mesh_of(judge.mesh, e.scoring.mesh),
    )


def _sequences(
    e: Experiment, g: Generator, prompts: PromptTable, traces: TraceTable, inspect: Inspect
) -> TraceSequences:
    student, own = inspect(e.student.place)[1], inspect(model_of(e, g.model).place)[1]
    # Without tokenizers, in a plan that is not made, a model is taken to have its own.
    tokenizer = student.identity if student else ""
    return TraceSequences(
        label=("tokens", g.name),
        prompts=prompts,
        traces=traces,
        tokenizer=tokenizer,
        sampled=own is not None and own.identity == tokenizer,
        shard=e.scoring.shard,
        model=e.student,
    )


def _logprobs(
    e: Experiment, sequences: Mapping[str, SequenceTable], weights_of: WeightsOf
) -> dict[str, LogProbTable]:
    """Under the reference, of the generators whose traces an objective or a selection needs it."""
    kinds = {o.name: o.kind for o in e.objectives}
    with_reference = [
        a for a in e.arms if OBJECTIVE_KINDS[kinds[a.objective]].reference or _by_margin(a)
    ]
    read = {name for arm in with_reference for name in (arm.chosen, arm.rejected)}
    reference = reference_of(e.student, e.reference)
    weights = weights_of(reference.place)
    if e.table and not read:
        raise ConfigError(
            f"config.table is {e.table!r} and no arm's objective or selection has a reference; "
            "leave it empty."
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
    weights_of: WeightsOf = weights_hash,
) -> dict[str, ResultTable]:
    """Results of a model on every suite; a generator is asked and sampled in its own manner."""

    def of(suite: Suite) -> ResultTable:
        asked = generator or Generator(temperature=suite.temperature)
        return ResultTable(
            label=(*label, suite.name),
            questions=suites[suite.name],
            policy=policy,
            # A trained policy is an input and is hashed by its contents.
            weights="" if policy else weights_of(model.place),
            suite=suite.name,
            domain="" if suite.readout else suite.domain,
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
            checkers=code_hashes([suite.prompts.checker]),
        )

    # Generators have no second read-outs: they are sampled in their own manner.
    return {s.name: of(s) for s in e.suites if s.name in suites and not (generator and s.readout)}


def _pairs(
    e: Experiment,
    arm: Arm,
    draw: int,
    prompts: PromptTable,
    traces: Mapping[str, TraceTable],
    verdicts: Mapping[str, VerdictTable],
    ratings: Mapping[str, Mapping[str, RatingTable | MeanRatingTable]],
    sequences: Mapping[str, SequenceTable],
    logprobs: Mapping[str, LogProbTable],
    weights_of: WeightsOf,
) -> PairTable:
    """Arms that differ only in objective or seeds get equal nodes.

    Ratings and log-probabilities are inputs where they shape the pairs, and only then.
    """
    rated, by_margin = uses_ratings(arm), _by_margin(arm)
    ladder = [a for a in e.arms if is_balanced(e, a)] if is_balanced(e, arm) else []
    rungs = tuple({str(r): r for r in (_rules(e, a, draw) for a in ladder)}.values())
    authors = dict.fromkeys(n for a in (arm, *ladder) for n in (a.chosen, a.rejected))
    judge = next((j for j in e.judges if rated and j.name == judge_of(e, arm)), None)
    both = tuple(dict.fromkeys((arm.chosen, arm.rejected)))
    needed = [
        g.name for g in e.generators if any(g.name in usable_traces(e, a) for a in (arm, *ladder))
    ]
    return PairTable(
        label=("pair", arm.name, *([f"draw{draw}"] if draw else [])),
        prompts=prompts,
        traces={name: traces[name] for name in needed},
        verdicts={name: verdicts[name] for name in authors},
        ratings={name: ratings[judge.name][name] for name in both} if judge else {},
        rules=_rules(e, arm, draw),
        dimensions=judge.dimensions if judge else (),
        keep=arm.keep,
        selection=code_hashes([arm.keep]),
        # What does not matter has one fixed value, so that equal arms get equal keys.
        rank_by=arm.by if rated or by_margin else "sum",
        fraction=1.0 if arm.keep == "all" or arm.pairs else arm.fraction,
        kept=arm.pairs,
        seed=e.seed,
        draw=0 if arm.keep == "all" and not rungs else draw,
        sequences={name: sequences[name] for name in both} if by_margin else {},
        logprobs={name: logprobs[name] for name in both} if by_margin else {},
        reference_weights=weights_of(reference_of(e.student, e.reference).place)
        if by_margin
        else "",
        balance=e.balance if rungs else "",
        rungs=rungs,
    )


def _rules(e: Experiment, arm: Arm, draw: int) -> Rules:
    """How the pairs of an arm are made."""
    label_by = arm.direction if arm.direction in UNJUDGED else "judge"
    drawn = label_by == "coin" or samples_of(arm) != ("first", "first")
    shares = arm.stratum in e.shared_strata
    return Rules(
        arm.chosen,
        arm.rejected,
        usable_traces(e, arm),
        tuple(e.training.finishes),
        label_by,
        arm.stratum,
        (e.seed, draw) if drawn else (0, 0),
        samples_of(arm),
        e.shared_strata if shares else (),
        # Of two such arms only a symmetric stratum can be one of the shared ones for both.
        _is_exchanged(e, arm) and (arm.stratum in SYMMETRIC or not shares),
    )


def _is_exchanged(e: Experiment, arm: Arm) -> bool:
    """Whether the sides of `arm` are those of another arm exchanged, which comes first.

    Rungs come first, and controls last, whose pairs are to be those of what they control.
    """
    sides = sides_of(arm)
    arms = sorted(e.arms, key=lambda a: GROUPS.index(a.group))
    return next(sides_of(a) for a in arms if sides_of(a) in (sides, sides[::-1])) != sides


def _by_margin(arm: Arm) -> bool:
    """Whether the reference's log-probabilities rank the pairs of an arm."""
    return arm.keep in RANKED and arm.by == REFERENCE_MARGIN


def _rates(
    e: Experiment,
    objective: Objective,
    policy: Callable[..., Policy],
    tuning: Mapping[str, PromptTable],
) -> RateTable:
    """The learning rates of an objective, each tried by one policy of its arm `tuned_by`."""
    (arm,) = [a for a in e.arms if a.name == objective.tuned_by]

    def results(rate: float) -> dict[str, ResultTable]:
        label = ("tune", objective.name, f"{rate:g}")
        tried = policy(label, dataclasses.replace(arm, learning_rate=rate), arm.runs[0])
        return result_tables(e, label, tuning, e.student, tried)

    return RateTable(
        label=("tune", objective.name),
        rates=objective.rates,
        results={f"{rate:g}": results(rate) for rate in objective.rates},
    )


def _policy(
    e: Experiment,
    label: tuple[str, ...],
    arm: Arm,
    run: Run,
    pairs: Mapping[str, Mapping[int, PairTable]],
    sequences: Mapping[str, SequenceTable],
    logprobs: Mapping[str, LogProbTable],
    weights_of: WeightsOf,
    rates: RateTable | None = None,
    monitor: MonitorConfig | None = None,
) -> Policy:
    objective = objective_of(e, arm)
    both = tuple(dict.fromkeys((arm.chosen, arm.rejected)))
    with_reference = OBJECTIVE_KINDS[objective.kind].reference
    return Policy(
        label=label,
        pairs=pairs[arm.name][run.draw],
        sequences={name: sequences[name] for name in both},
        logprobs={name: logprobs[name] for name in both} if with_reference else {},
        student_weights=weights_of(e.student.place),
        reference_weights=weights_of(reference_of(e.student, e.reference).place),
        objective=objective,
        training=training_of(e.training, arm),
        seed=run.seed,
        student=e.student,
        rates=rates,
        mesh=e.training.mesh,
        monitor=monitor or MonitorConfig(),
    )
