"""The experiment as typed data: every field once, with its unit and its reason.

`configs/*.py` build one `Experiment` each; absl's `--config.student.path=...` overrides its fields. The checks are in
`validation`. This module imports nothing of the project.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Iterable
from typing import NamedTuple

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
KEEPS = ("all", "top", "random", "matched")
STRATA = ("any", "chosen_right", "both_right", "both_wrong", "right_wrong")
BUDGETS = ("steps", "epochs")
OVER_LENGTHS = ("error", "drop", "truncate")
TRUNCATION_MODES = ("keep_start", "keep_end")
DTYPES = ("float32", "bfloat16")
TRACKERS = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
}  # name to the package that must be installed
REMATS = ("none", "projections", "attention", "block")
LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # Hugging Face's names


class ObjectiveKind(NamedTuple):
    """What an objective trains on; its loss has the same name in `training.objectives.LOSSES`."""

    unit: str  # one term of the loss: a "pair", an "example" (either half of a pair, labelled), a "token" of the chosen
    reference: bool  # needs reference log-probabilities
    baseline: bool = False  # needs mismatched rows: KTO's z0
    smoothed: bool = False  # has `label_smoothing`


OBJECTIVE_KINDS = {
    "dpo": ObjectiveKind("pair", True),
    "dpo_norm": ObjectiveKind("pair", True),  # length-normalised
    "hinge": ObjectiveKind("pair", True),
    "ipo": ObjectiveKind("pair", True),
    "robust": ObjectiveKind("pair", True, smoothed=True),
    "cdpo": ObjectiveKind("pair", True, smoothed=True),  # conservative
    "apo_zero": ObjectiveKind("pair", True),
    "apo_down": ObjectiveKind("pair", True),
    "simpo": ObjectiveKind("pair", False),
    "kto": ObjectiveKind("example", True, baseline=True),
    "apo_zero_unpaired": ObjectiveKind("example", True),
    "sft": ObjectiveKind("token", False),
}
"""Every objective by name; equations and papers are in `training.objectives`."""


class ConfigError(ValueError):
    """A field of the experiment has a value that cannot work; the message names field, value and remedy."""


def choose(field: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`; otherwise raises `ConfigError` listing them."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(
            f"{field} is {value!r}; choose one of {', '.join(repr(k) for k in known)}."
        )
    return value


def need_reasoning_gym() -> None:
    """Raises `ConfigError` where reasoning-gym is not installed.

    It is an extra, because one of its dependencies needs a C compiler.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError(
            "Prompts of kind 'reasoning_gym' need the package reasoning-gym, which is not "
            "installed; run pip install 'deltapref-jax[gym]'."
        )


@dataclasses.dataclass
class Prompts:
    """Questions from one source."""

    kind: str = "synthetic"  # one of PROMPT_KINDS
    path: str = ""  # file (jsonl, parquet), hub data set name or local data set folder (hub), builder directory (tfds)
    split: str = "train"  # split of a hub or TFDS data set
    tasks: tuple[
        str, ...
    ] = ()  # synthetic families, or reasoning-gym tasks; mixed in equal numbers
    count: int = 0  # questions kept; 0: all (files only)
    difficulty: int = 2  # synthetic difficulty setting, 1 (easy) upward
    seed: int = (
        0  # of the question generators, and of the draw when `count` is below what a file holds
    )
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
    about: str = ""  # what it is, for the page


@dataclasses.dataclass
class Judge:
    """Rates traces from 1 to 5 on each dimension."""

    name: str = ""
    kind: str = "exact"  # "exact": by program, from the known truth of the synthetic world; "model": by score tokens
    model: Model = dataclasses.field(default_factory=Model)  # of kind "model"
    noise: float = (
        0.0  # standard deviation of normal noise added by the exact judge, in rating points
    )
    seed: int = 0  # of that noise
    dimensions: tuple[str, ...] = DIMENSIONS


@dataclasses.dataclass
class Objective:
    """A loss with its hyperparameters; arms name it."""

    name: str = ""
    kind: str = "dpo"  # one of OBJECTIVE_KINDS
    beta: float = 0.1  # per nat: 0.01 to 0.5; per nat a token in dpo_norm: 5 to 10, and simpo: 2 to 10; not in sft
    learning_rate: float = 1e-4
    label_smoothing: float = (
        0.0  # robust, cdpo: share of pairs whose label is assumed to be flipped, 0 to below 0.5
    )
    gamma: float = (
        0.5  # simpo: margin wanted between the two rewards, 0 upward (in the paper 0.3 to 1.6)
    )
    nll_weight: float = (
        0.0  # pairs: weight, 0 upward, of the chosen traces' negative log-likelihood a token
    )
    desirable_weight: float = 1.0  # kto, apo_zero_unpaired: w_D, 0 upward
    undesirable_weight: float = 1.0  # kto, apo_zero_unpaired: w_U, 0 upward
    baseline_fraction: float = (
        1.0  # kto: share of a step's rows that z0 is measured on, above 0 to 1
    )


@dataclasses.dataclass
class Arm:
    """One data set × one objective × seeds."""

    name: str = ""
    chosen: str = ""  # generator that writes the chosen traces
    rejected: str = (
        ""  # generator that writes the rejected traces; the same one: two samples, see `direction`
    )
    direction: str = "generator"  # "generator" (as named; two samples of one: the second is chosen) or a judge's name
    keep: str = "all"  # one of KEEPS
    by: str = "sum"  # what `top` and `matched` rank by: a dimension, or "sum" of them all, as judged by `judge`
    judge: str = ""  # whose ratings the selection uses; "": the first judge
    fraction: float = 1.0  # share of the pool of pairs kept
    stratum: str = "any"  # one of STRATA: by verified correctness of chosen and rejected
    objective: str = "dpo"  # name of an Objective
    seeds: tuple[int, ...] = (0,)
    group: str = "ladder"  # figure that the arm belongs to: "ladder", "selection" or "control"


@dataclasses.dataclass
class Lora:
    """Low-rank adapters: W + (alpha / rank) A B, in which only A and B are trained (arXiv 2106.09685)."""

    rank: int = (
        0  # columns of A and rows of B; 0: all weights are trained, and there are no adapters
    )
    alpha: float = 16.0  # above 0
    targets: tuple[str, ...] = LORA_TARGETS  # which matrices of every layer are adapted


@dataclasses.dataclass
class Training:
    """What all arms share."""

    pairs_per_step: int = 32
    budget: str = "steps"  # "steps": `steps` steps; "epochs": an arm's pairs `epochs` times, up to whole steps
    steps: int = 30
    epochs: float = 1.0
    warmup: float = 0.1  # share of the steps
    schedule: str = "linear"  # "linear", "cosine" or "constant", after warm-up
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm
    rows: int = 16  # rows of one micro-batch over all devices; two per device pad least
    row_length: int = 512  # tokens in one packed row
    over_length: str = "drop"  # a sequence longer than a row: "drop" (counted), "error"; launch.train: "truncate" too
    remat: str = (
        "none"  # what the backward pass recomputes, more and more: see models.decoder.POLICIES
    )
    lora: Lora = dataclasses.field(default_factory=Lora)
    moments: str = (
        "float32"  # of Adam's two moments; "bfloat16" halves their memory, rounded stochastically
    )
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
    context: int = 1  # devices that share one row's columns: for rows too long for one; training and scoring only


@dataclasses.dataclass
class Experiment:
    """One study: what is asked, and everything needed to answer it."""

    name: str = ""
    question: str = ""  # one sentence, shown on top of the page
    about: str = ""  # what is asked and who answers, for the page
    workspace: str = "workspace"  # directory or bucket of the artifacts
    trackers: tuple[
        str, ...
    ] = ()  # of TRACKERS: who is shown an arm's metrics besides metrics.jsonl, while it trains
    seed: int = 0
    prompts: tuple[Prompts, ...] = ()  # training questions
    generators: tuple[Generator, ...] = ()
    judges: tuple[Judge, ...] = ()
    student: Model = dataclasses.field(default_factory=Model)
    reference: Model = dataclasses.field(
        default_factory=Model
    )  # "" path: the student before training
    objectives: tuple[Objective, ...] = ()
    arms: tuple[Arm, ...] = ()
    suites: tuple[Suite, ...] = ()
    training: Training = dataclasses.field(default_factory=Training)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    scoring: Scoring = dataclasses.field(default_factory=Scoring)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)


@dataclasses.dataclass
class Pairs:
    """A file of preference data that somebody brings; `data.preferences` lists the formats."""

    path: str = ""  # .jsonl or .parquet file, hub data set name, or local data set folder
    split: str = "train"  # split of a hub data set or folder
    workers: int = (
        4  # processes that tokenise; a file of less than a thousand rows each needs fewer
    )
    truncation_mode: str = (
        "keep_start"  # of over_length "truncate": the end of a sequence that stays; TRL's names
    )


@dataclasses.dataclass
class Single:
    """One arm trained from a file of pairs, without the rest of a study."""

    name: str = "train"
    workspace: str = "workspace"  # directory or bucket of tokens, reference table and policy
    trackers: tuple[
        str, ...
    ] = ()  # of TRACKERS: who is shown its metrics besides metrics.jsonl, while it trains
    seed: int = 0  # of the order of the data
    data: Pairs = dataclasses.field(default_factory=Pairs)
    student: Model = dataclasses.field(default_factory=Model)
    reference: Model = dataclasses.field(
        default_factory=Model
    )  # "" path: the student before training
    table: str = ""  # Parquet file or folder of the reference's log-probabilities; "": computed once and kept
    objective: Objective = dataclasses.field(default_factory=lambda: Objective(name="dpo"))
    training: Training = dataclasses.field(
        default_factory=Training
    )  # row_length is the longest sequence too
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)


def judge_of(experiment: Experiment, arm: Arm) -> str:
    """Name of the judge whose ratings count for `arm`: its direction's, its own, or the first; "" if there is none."""
    if arm.direction != "generator":
        return arm.direction
    return arm.judge or next((j.name for j in experiment.judges), "")


@dataclasses.dataclass
class Pupil:
    """A small decoder that the nursery raises."""

    name: str = ""
    base: str = ""  # pupil whose weights it starts from; "": its own random ones
    lesson: str = (
        "solve"  # "solve": worked solutions; "judge": the five ratings of flawed solutions
    )
    layers: int = (
        3  # sizes are the base's where there is one; more layers than it has are grown on top
    )
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 352
    tasks: tuple[
        str, ...
    ] = ()  # synthetic families, drawn evenly; a family named twice is drawn twice as often
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
