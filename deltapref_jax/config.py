"""The experiment as typed data: every field once, with its unit and its reason.

`configs/*.py` build one `Experiment` each; absl's `--config.student.path=...` overrides its fields. `validate` turns
a bad value into one sentence before any device works. This module imports nothing of the project.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence

DIMENSIONS = (
    "factuality",
    "strategy_coherence",
    "step_coherence",
    "numerical_precision",
    "signal_to_noise",
)
"""The five rating dimensions of arXiv 2604.08723: 1 to 5 each, higher is better."""

NURSERY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "synthetic", "models")
"""Folder of the small Hugging Face models that ship with the project."""

PROMPT_KINDS = ("synthetic", "reasoning_gym", "jsonl", "parquet", "hub", "tfds")
CHECKERS = ("", "world", "reasoning_gym", "math", "exact")
JUDGE_KINDS = ("exact", "model")
OBJECTIVE_KINDS = ("dpo", "dpo_norm", "kto", "sft")
KEEPS = ("all", "top", "random", "matched")
STRATA = ("any", "chosen_right", "both_right", "both_wrong", "right_wrong")
BUDGETS = ("steps", "epochs")
DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A field of the experiment has a value that cannot work; the message names field, value and remedy."""


def choose(field: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`; otherwise raises `ConfigError` listing them."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{field} is {value!r}; choose one of {', '.join(repr(k) for k in known)}.")
    return value


@dataclasses.dataclass
class Prompts:
    """Questions from one source."""

    kind: str = "synthetic"  # one of PROMPT_KINDS
    path: str = ""  # file (jsonl, parquet), hub data set name or local data set folder (hub), builder directory (tfds)
    split: str = "train"  # split of a hub or TFDS data set
    tasks: tuple[str, ...] = ()  # synthetic families, or reasoning-gym tasks; mixed in equal numbers
    count: int = 0  # questions kept; 0: all (files only)
    difficulty: int = 2  # synthetic difficulty setting, 1 (easy) upward
    seed: int = 0  # of the question generators, and of the draw when `count` is below what a file holds
    prompt_field: str = "prompt"  # column with the question: text or a list of chat messages
    answer_field: str = "answer"  # column with the reference answer
    checker: str = ""  # how answers of a file are checked: "math", "exact", or "" (unchecked)


@dataclasses.dataclass
class Model:
    """A Hugging Face folder, a hub name or a GGUF file."""

    path: str = ""  # "" means: the student's
    dtype: str = "float32"  # of activations and weights in forward passes


@dataclasses.dataclass
class Generator:
    """A model together with the way it is asked and sampled."""

    name: str = ""
    model: Model = dataclasses.field(default_factory=Model)
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    samples: int = 1  # traces per prompt
    system: str = ""  # system message; "" for none
    prefix: str = ""  # put before the question inside the user message, such as a worked example


@dataclasses.dataclass
class Judge:
    """Rates traces from 1 to 5 on each dimension."""

    name: str = ""
    kind: str = "exact"  # "exact": by program, from the known truth of the synthetic world; "model": by score tokens
    model: Model = dataclasses.field(default_factory=Model)  # of kind "model"
    noise: float = 0.0  # standard deviation of normal noise added by the exact judge, in rating points
    seed: int = 0  # of that noise
    dimensions: tuple[str, ...] = DIMENSIONS


@dataclasses.dataclass
class Objective:
    """A loss with its hyperparameters; arms name it."""

    name: str = ""
    kind: str = "dpo"  # one of OBJECTIVE_KINDS
    beta: float = 0.1  # dpo, kto: 0.01 to 0.5; dpo_norm (length-normalised): 5 to 10
    learning_rate: float = 1e-4
    desirable_weight: float = 1.0  # KTO w_D
    undesirable_weight: float = 1.0  # KTO w_U


@dataclasses.dataclass
class Arm:
    """One data set × one objective × seeds."""

    name: str = ""
    chosen: str = ""  # generator that writes the chosen traces
    rejected: str = ""  # generator that writes the rejected traces; the same one: two samples, see `direction`
    direction: str = "generator"  # "generator" (as named; by seed where both are one generator) or a judge's name
    keep: str = "all"  # one of KEEPS
    by: str = "sum"  # what `top` and `matched` rank by: a dimension, or "sum" of them all, as judged by `judge`
    judge: str = ""  # whose ratings the selection uses; "": the first judge
    fraction: float = 1.0  # share of the pool of pairs kept
    stratum: str = "any"  # one of STRATA: by verified correctness of chosen and rejected
    objective: str = "dpo"  # name of an Objective
    seeds: tuple[int, ...] = (0,)
    group: str = "ladder"  # figure that the arm belongs to: "ladder", "selection" or "control"


@dataclasses.dataclass
class Training:
    """What all arms share."""

    pairs_per_step: int = 32
    budget: str = "steps"  # "steps": every arm trains `steps` steps; "epochs": every arm sees its pairs `epochs` times
    steps: int = 30
    epochs: float = 1.0
    warmup: float = 0.1  # share of the steps
    schedule: str = "linear"  # "linear", "cosine" or "constant", after warm-up
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm
    rows: int = 16  # rows of one micro-batch, over all devices
    row_length: int = 512  # tokens in one packed row
    over_length: str = "drop"  # a sequence longer than a row: "drop" (counted) or "error"
    checkpoint_every: int = 10  # steps
    keep_checkpoints: int = 1
    finishes: tuple[str, ...] = ("eos", "stop")  # traces that ended otherwise are not trained on


@dataclasses.dataclass
class Suite:
    """A group of evaluation tasks."""

    name: str = ""
    domain: str = "in"  # "in" or "out" of the training domain
    prompts: Prompts = dataclasses.field(default_factory=Prompts)
    samples: int = 1  # k traces per question at `temperature`
    temperature: float = 1.0


@dataclasses.dataclass
class Sampling:
    """The decoding loop's fixed shapes."""

    max_prompt: int = 128  # tokens; a longer prompt is an error
    max_tokens: int = 192  # tokens of one trace
    slots: int = 64  # rows decoded at once
    chunk: int = 16  # decode steps per dispatch
    shard: int = 256  # prompts in one shard: what a killed run may have to repeat
    stop: tuple[str, ...] = ()  # strings that end a trace, cut from it


@dataclasses.dataclass
class Scoring:
    """Packed forward passes without gradient: scoring and judging."""

    rows: int = 16
    row_length: int = 512
    shard: int = 1024  # traces in one shard


@dataclasses.dataclass
class MeshShape:
    """Devices along each mesh axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class Experiment:
    """One study: what is asked, and everything needed to answer it."""

    name: str = ""
    question: str = ""  # one sentence, shown on top of the page
    workspace: str = "workspace"  # directory or bucket of the artifacts
    seed: int = 0
    prompts: tuple[Prompts, ...] = ()  # training questions
    generators: tuple[Generator, ...] = ()
    judges: tuple[Judge, ...] = ()
    student: Model = dataclasses.field(default_factory=Model)
    reference: Model = dataclasses.field(default_factory=Model)  # "" path: the student before training
    objectives: tuple[Objective, ...] = ()
    arms: tuple[Arm, ...] = ()
    suites: tuple[Suite, ...] = ()
    training: Training = dataclasses.field(default_factory=Training)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    scoring: Scoring = dataclasses.field(default_factory=Scoring)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)


@dataclasses.dataclass
class Pupil:
    """A small decoder that the nursery raises."""

    name: str = ""
    base: str = ""  # pupil whose weights it starts from; "": its own random ones
    lesson: str = "solve"  # "solve": worked solutions; "judge": the five ratings of flawed solutions
    layers: int = 3  # sizes are the base's where there is one; more layers than it has are grown on top
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 352
    tasks: tuple[str, ...] = ()  # synthetic families, drawn evenly; a family named twice is drawn twice as often
    difficulties: tuple[int, ...] = (2,)  # drawn evenly
    error_rate: float = 0.0  # careless steps per step in the solutions it learns from
    steps: int = 1000
    rows: int = 32  # packed rows of one step
    row_length: int = 256
    learning_rate: float = 2e-3  # peak; 5% warm-up, then cosine to a tenth
    seed: int = 0


@dataclasses.dataclass
class Nursery:
    """The models that ship with the project, and how they came about."""

    name: str = "nursery"
    workspace: str = "workspace"
    output: str = NURSERY  # folder that receives one Hugging Face folder per released pupil
    vocab: int = 640  # tokens of the tokenizer that all pupils share
    pupils: tuple[Pupil, ...] = ()
    release: tuple[str, ...] = ()  # names of the pupils to ship
    suites: tuple[Suite, ...] = ()  # measured for every released solver
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)


def model_of(experiment: Experiment, model: Model) -> Model:
    """`model` with the empty path resolved to the student's."""
    return dataclasses.replace(model, path=model.path or experiment.student.path)


def _unique(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if not name:
            raise ConfigError(f"A {kind} has no name; give every {kind} one.")
        if names.count(name) > 1:
            raise ConfigError(f"Two {kind}s are named {name!r}; names must differ.")


def _number(field: str, value: float, low: float, high: float = math.inf) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        upper = f" and at most {high:g}" if high < math.inf else ""
        raise ConfigError(f"{field} is {value!r}; it must be at least {low:g}{upper}.")


def _prompts(field: str, prompts: Prompts) -> None:
    choose(f"{field}.kind", prompts.kind, PROMPT_KINDS)
    choose(f"{field}.checker", prompts.checker, CHECKERS)
    _number(f"{field}.count", prompts.count, 0)
    _number(f"{field}.difficulty", prompts.difficulty, 1)
    if prompts.kind in ("synthetic", "reasoning_gym"):
        if not prompts.tasks:
            raise ConfigError(f"{field}.tasks is empty; name at least one task for kind {prompts.kind!r}.")
        if prompts.count < len(prompts.tasks):
            raise ConfigError(f"{field}.count is {prompts.count}; it must be at least the {len(prompts.tasks)} tasks.")
    elif not prompts.path:
        raise ConfigError(f"{field}.path is empty; kind {prompts.kind!r} needs a file, folder or data set name.")


def validate_nursery(nursery: Nursery) -> Nursery:
    """Checks every name and size of `nursery` and returns it.

    Raises:
      ConfigError: one sentence that names the field, its value and the remedy.
    """
    _unique("pupil", [p.name for p in nursery.pupils])
    known: list[str] = []
    for p in nursery.pupils:
        where = f"of pupil {p.name!r}"
        if p.base:
            choose(f"base {where} (a pupil listed before it)", p.base, known)
        choose(f"lesson {where}", p.lesson, ("solve", "judge"))
        if not p.tasks or not p.difficulties:
            raise ConfigError(f"tasks or difficulties {where} is empty; name at least one of each.")
        _number(f"error_rate {where}", p.error_rate, 0, 1)
        for field in ("layers", "width", "heads", "kv_heads", "mlp", "steps", "rows", "row_length"):
            _number(f"{field} {where}", getattr(p, field), 1)
        if not p.base and (p.heads % p.kv_heads or p.width % p.heads or p.width // p.heads % 2):
            raise ConfigError(f"heads {where} is {p.heads}, kv_heads {p.kv_heads} and width {p.width}; heads must be a "
                              "multiple of kv_heads and divide width into even parts.")
        known.append(p.name)
    for name in nursery.release:
        choose("config.release", name, known)
    for s, suite in enumerate(nursery.suites):
        _prompts(f"config.suites[{s}].prompts", suite.prompts)
    return nursery


def validate(experiment: Experiment) -> Experiment:
    """Checks every name and size of `experiment` and returns it.

    Raises:
      ConfigError: one sentence that names the field, its value and the remedy. Nothing has been read or written.
    """
    e = experiment
    if not e.name:
        raise ConfigError("config.name is empty; name the experiment.")
    if not e.student.path:
        raise ConfigError("config.student.path is empty; give a Hugging Face folder, a hub name or a GGUF file.")
    for field, group in (("generator", e.generators), ("judge", e.judges), ("objective", e.objectives),
                         ("arm", e.arms), ("suite", e.suites)):
        _unique(field, [item.name for item in group])
    if not e.prompts:
        raise ConfigError("config.prompts is empty; name at least one source of training questions.")
    for i, prompts in enumerate(e.prompts):
        _prompts(f"config.prompts[{i}]", prompts)
    for s, suite in enumerate(e.suites):
        _prompts(f"config.suites[{s}].prompts", suite.prompts)
        choose(f"config.suites[{s}].domain", suite.domain, ("in", "out"))
        _number(f"config.suites[{s}].samples", suite.samples, 1)
        _number(f"config.suites[{s}].temperature", suite.temperature, 0)
    for model, field in [(e.student, "student"), (e.reference, "reference")] + [
            (g.model, f"generator {g.name}") for g in e.generators] + [(j.model, f"judge {j.name}") for j in e.judges]:
        choose(f"dtype of {field}", model.dtype, DTYPES)
    for g in e.generators:
        _number(f"temperature of generator {g.name!r}", g.temperature, 0)
        _number(f"top_p of generator {g.name!r}", g.top_p, 1e-6, 1)
        _number(f"top_k of generator {g.name!r}", g.top_k, 0)
        _number(f"samples of generator {g.name!r}", g.samples, 1)
    for j in e.judges:
        choose(f"kind of judge {j.name!r}", j.kind, JUDGE_KINDS)
        _number(f"noise of judge {j.name!r}", j.noise, 0)
        if not j.dimensions:
            raise ConfigError(f"Judge {j.name!r} has no dimensions; name at least one of {', '.join(DIMENSIONS)}.")
        for dimension in j.dimensions:
            choose(f"dimension of judge {j.name!r}", dimension, DIMENSIONS)
        if j.kind == "exact" and any(p.kind != "synthetic" for p in e.prompts):
            raise ConfigError(f"Judge {j.name!r} is exact and needs synthetic prompts; use kind 'model' for others.")
    for o in e.objectives:
        choose(f"kind of objective {o.name!r}", o.kind, OBJECTIVE_KINDS)
        _number(f"beta of objective {o.name!r}", o.beta, 1e-9)
        _number(f"learning_rate of objective {o.name!r}", o.learning_rate, 0)
        _number(f"desirable_weight of objective {o.name!r}", o.desirable_weight, 0)
        _number(f"undesirable_weight of objective {o.name!r}", o.undesirable_weight, 0)
    _validate_arms(e)
    _validate_sizes(e)
    return e


def _validate_arms(e: Experiment) -> None:
    generators = {g.name: g for g in e.generators}
    judges = {j.name: j for j in e.judges}
    for a in e.arms:
        where = f"of arm {a.name!r}"
        choose(f"chosen {where}", a.chosen, generators)
        choose(f"rejected {where}", a.rejected, generators)
        choose(f"direction {where}", a.direction, ("generator", *judges))
        choose(f"keep {where}", a.keep, KEEPS)
        choose(f"stratum {where}", a.stratum, STRATA)
        choose(f"objective {where}", a.objective, [o.name for o in e.objectives])
        choose(f"group {where}", a.group, ("ladder", "selection", "control"))
        _number(f"fraction {where}", a.fraction, 1e-9, 1)
        if not a.seeds or len(set(a.seeds)) < len(a.seeds):
            raise ConfigError(f"seeds {where} is {a.seeds!r}; give at least one seed, each once.")
        if a.chosen == a.rejected and generators[a.chosen].samples < 2:
            raise ConfigError(f"Arm {a.name!r} pairs two samples of {a.chosen!r}; set its samples to at least 2.")
        if a.keep in ("top", "matched") or a.direction != "generator":
            if not judges:
                raise ConfigError(f"Arm {a.name!r} uses ratings, and config.judges is empty; add a judge.")
            judge = judges[choose(f"judge {where}", a.judge or next(iter(judges)), judges)]
            choose(f"by {where}", a.by, ("sum", *judge.dimensions))


def _validate_sizes(e: Experiment) -> None:
    t, s = e.training, e.sampling
    choose("config.training.budget", t.budget, BUDGETS)
    choose("config.training.schedule", t.schedule, ("linear", "cosine", "constant"))
    choose("config.training.over_length", t.over_length, ("drop", "error"))
    for field, value in (("pairs_per_step", t.pairs_per_step), ("steps", t.steps), ("rows", t.rows),
                         ("row_length", t.row_length), ("checkpoint_every", t.checkpoint_every),
                         ("keep_checkpoints", t.keep_checkpoints)):
        _number(f"config.training.{field}", value, 1)
    _number("config.training.epochs", t.epochs, 1e-9)
    _number("config.training.warmup", t.warmup, 0, 1)
    _number("config.training.clip", t.clip, 1e-9)
    _number("config.training.weight_decay", t.weight_decay, 0)
    for finish in t.finishes:
        choose("config.training.finishes", finish, ("eos", "stop", "length"))
    for field, value in (("max_prompt", s.max_prompt), ("max_tokens", s.max_tokens), ("slots", s.slots),
                         ("chunk", s.chunk), ("shard", s.shard)):
        _number(f"config.sampling.{field}", value, 1)
    for field, value in (("rows", e.scoring.rows), ("row_length", e.scoring.row_length), ("shard", e.scoring.shard)):
        _number(f"config.scoring.{field}", value, 1)
    sizes = dataclasses.astuple(e.mesh)
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"config.mesh is {e.mesh}; sizes are positive, and at most one is -1.")
