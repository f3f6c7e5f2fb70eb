"""The experiment as typed data: every field once, with its unit and its reason.

`configs/*.py` build one `Experiment` each; absl's `--config.student.path=...` overrides its fields.
The checks are in `validation`. This module imports nothing of the project.
"""

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

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


UNHASHED = {"hashed": False}
"""Metadata of a field that says where something is or how it is shown, and never what is computed:
two runs that differ only there share their artifacts."""


class ObjectiveKind(NamedTuple):
    """What an objective trains on; its loss has the same name in `training.objectives.LOSSES`."""

    # One term of the loss: a "pair", an "example" (either half of a pair, labelled), a "token" of
    # the chosen.
    unit: str
    # Needs reference log-probabilities.
    reference: bool
    # Needs mismatched rows: KTO's z0.
    baseline: bool = False
    # Has `label_smoothing`.
    smoothed: bool = False


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
    """A field has a value that cannot work; the message names field, value and remedy."""


def no_such_field(kind: str, name: str, known: Sequence[str]) -> str:
    """The sentence for a field that the class `kind` does not have; it names the nearest."""
    near = difflib.get_close_matches(name, known, 1)
    nearest = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{kind} has no field {name!r}{nearest}; it has {', '.join(known)}."


def check_choice(field: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`; otherwise raises `ConfigError` listing them."""
    known = tuple(known)
    if not known:
        raise ConfigError(f"{field} is {value!r} and the config has none to choose from; add it.")
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


class Fields:
    """Base of all parts of a config: an attribute that is no field cannot be set.

    A misspelt field of a config file would otherwise be ignored in silence.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field.

        Raises:
          ConfigError: the class has no such field.
        """
        known = [field.name for field in dataclasses.fields(cast(Any, self))]
        if name not in known:
            raise ConfigError(no_such_field(type(self).__name__, name, known))
        super().__setattr__(name, value)


@dataclasses.dataclass
class Prompts(Fields):
    """Questions from one source."""

    # One of PROMPT_KINDS.
    kind: str = "synthetic"
    # File (jsonl, parquet), hub data set name or local data set folder (hub), builder directory
    # (tfds).
    path: str = dataclasses.field(default="", metadata=UNHASHED)
    # Split of a hub or TFDS data set.
    split: str = "train"
    # Synthetic families, or reasoning-gym tasks; mixed in equal numbers.
    tasks: tuple[str, ...] = ()
    # Questions kept; 0: all (files only).
    count: int = 0
    # Synthetic difficulty setting, 1 (easy) upward.
    difficulty: int = 2
    # Of the question generators, and of the draw when `count` is below what a file holds.
    seed: int = 0
    # Column with the question: text or a list of chat messages.
    prompt_field: str = "prompt"
    # Column with the reference answer.
    answer_field: str = "answer"
    # How answers of a file are checked: "math", "exact", or "" (unchecked).
    checker: str = ""
    # Subset of a hub data set (its "config"), where it has several; it is a part of the content.
    name: str = dataclasses.field(default="", metadata=UNHASHED)
    # Branch, tag or commit of a hub data set, "": the default branch; its commit is hashed.
    revision: str = dataclasses.field(default="", metadata=UNHASHED)


@dataclasses.dataclass
class MeshShape(Fields):
    """Devices along each mesh axis. 0: chosen, see docs/running.md; -1: all that are left.

    With a -1 the axes that are 0 have one device.
    """

    # Devices that have copies of the weights, and rows of their own.
    data: int = 0
    # Devices that divide weights and moments, and have rows of their own.
    fsdp: int = 0
    # Devices that divide each layer's heads and MLP columns.
    tensor: int = 0
    # Devices that share one row's columns: for rows too long for one; training, scoring and judging
    # only, and never chosen.
    context: int = 0

    @property
    def stated(self) -> str:
        """The sizes that are not 0, such as "data=2 fsdp=-1"; empty if all are to be chosen."""
        sizes = dataclasses.asdict(self)
        return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size)


@dataclasses.dataclass
class Model(Fields):
    """A Hugging Face folder, a hub name or a GGUF file."""

    # "" means: the student's.
    path: str = dataclasses.field(default="", metadata=UNHASHED)
    # Of activations and weights in forward passes.
    dtype: str = "float32"
    # Branch, tag or commit of a hub name, "": the default branch; manifests have the commit.
    revision: str = dataclasses.field(default="", metadata=UNHASHED)

    @property
    def place(self) -> str:
        """Path and revision as one text, which `models.folder.resolve` finds the model by."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclasses.dataclass
class Generator(Fields):
    """A model together with the way it is asked and sampled."""

    # What arms, figures and tables call it.
    name: str = ""
    # An empty path: the student's model, so that only the sampling differs.
    model: Model = dataclasses.field(default_factory=Model)
    # 0 is greedy.
    temperature: float = 1.0
    # Tokens are drawn from the most likely ones that together have this probability; 1: off.
    top_p: float = 1.0
    # 0: off.
    top_k: int = 0
    # Traces per prompt.
    samples: int = 1
    # System message; "" for none.
    system: str = ""
    # Put before the question inside the user message, such as a worked example.
    prefix: str = ""
    # What it is, for the page.
    about: str = dataclasses.field(default="", metadata=UNHASHED)
    # Of each host's devices, for its traces and for its evaluation; without a size: the mesh of
    # `sampling`.
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape, metadata=UNHASHED)


@dataclasses.dataclass
class Judge(Fields):
    """Rates traces from 1 to 5 on each dimension."""

    # What arms, figures and tables call it.
    name: str = ""
    # "exact": by program, from the known truth of the synthetic world; "model": by score tokens.
    kind: str = "exact"
    # Of kind "model".
    model: Model = dataclasses.field(default_factory=Model)
    # Standard deviation of normal noise added by the exact judge, in rating points.
    noise: float = 0.0
    # Of that noise.
    seed: int = 0
    # Of DIMENSIONS; a model reads a trace once, and a short question for each of them.
    dimensions: tuple[str, ...] = DIMENSIONS
    # Of all devices, of kind "model"; without a size: the mesh of `scoring`.
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape, metadata=UNHASHED)


@dataclasses.dataclass
class Objective(Fields):
    """A loss with its hyperparameters; arms name it."""

    # What arms call it.
    name: str = dataclasses.field(default="", metadata=UNHASHED)
    # One of OBJECTIVE_KINDS.
    kind: str = "dpo"
    # Per nat: 0.01 to 0.5; per nat a token in dpo_norm: 5 to 10, and simpo: 2 to 10; not in sft.
    beta: float = 0.1
    # Peak, reached after warm-up.
    learning_rate: float = 1e-4
    # In robust and cdpo: share of pairs whose label is assumed to be flipped, 0 to below 0.5.
    label_smoothing: float = 0.0
    # In simpo: margin wanted between the two rewards, 0 upward (in the paper 0.3 to 1.6).
    gamma: float = 0.5
    # In objectives of pairs: weight, 0 upward, of the chosen traces' negative log-likelihood per
    # token.
    nll_weight: float = 0.0
    # In kto and apo_zero_unpaired: w_D, 0 upward.
    desirable_weight: float = 1.0
    # In kto and apo_zero_unpaired: w_U, 0 upward.
    undesirable_weight: float = 1.0
    # In kto: share of a step's rows that z0 is measured on, above 0 to 1.
    baseline_fraction: float = 1.0


@dataclasses.dataclass
class Arm(Fields):
    """One data set × one objective × seeds."""

    # What figures and tables call it; the label of its artifacts.
    name: str = ""
    # Generator that writes the chosen traces.
    chosen: str = ""
    # Generator that writes the rejected traces; the same one: two samples, see `direction`.
    rejected: str = ""
    # "generator" (as named; two samples of one: the second is chosen) or a judge's name.
    direction: str = "generator"
    # One of KEEPS.
    keep: str = "all"
    # What `top` and `matched` rank by: a dimension, or "sum" of them all, as judged by `judge`.
    by: str = "sum"
    # Whose ratings the selection uses; "": the first judge.
    judge: str = ""
    # Share of the pool of pairs kept.
    fraction: float = 1.0
    # One of STRATA: by verified correctness of chosen and rejected.
    stratum: str = "any"
    # Name of an Objective.
    objective: str = "dpo"
    # One policy is trained per seed: of the order of its data, and of new adapters.
    seeds: tuple[int, ...] = (0,)
    # Figure that the arm belongs to: "ladder", "selection" or "control".
    group: str = "ladder"


@dataclasses.dataclass
class Lora(Fields):
    """Low-rank adapters: W + (alpha / rank) A B, where A and B are trained (arXiv 2106.09685)."""

    # Columns of A and rows of B; 0: all weights are trained, and there are no adapters.
    rank: int = 0
    # Above 0.
    alpha: float = 16.0
    # Which matrices of every layer are adapted.
    targets: tuple[str, ...] = LORA_TARGETS


@dataclasses.dataclass
class Training(Fields):
    """What all arms share."""

    # Pairs of one step over all devices: losses are means over them.
    pairs_per_step: int = 32
    # "steps": `steps` steps; "epochs": an arm's pairs `epochs` times, up to whole steps.
    budget: str = "steps"
    # Optimizer steps of every arm, with budget "steps".
    steps: int = 30
    # Passes over an arm's own pairs, with budget "epochs".
    epochs: float = 1.0
    # Share of the steps.
    warmup: float = 0.1
    # "linear", "cosine" or "constant", after warm-up.
    schedule: str = "linear"
    # AdamW's: per step, times the learning rate; norm weights are not decayed.
    weight_decay: float = 0.0
    # Global gradient norm.
    clip: float = 1.0
    # Rows of one micro-batch over all devices; two per device pad least.
    rows: int = 16
    # Tokens in one packed row.
    row_length: int = 512
    # A sequence longer than a row: "drop" (counted), "error"; launch.train: "truncate" too.
    over_length: str = "drop"
    # What the backward pass recomputes, more and more: see models.decoder.POLICIES.
    remat: str = "none"
    # Rank 0 trains all weights.
    lora: Lora = dataclasses.field(default_factory=Lora)
    # Of Adam's two moments; "bfloat16" halves their memory, rounded stochastically.
    moments: str = "float32"
    # Steps between checkpoints: what a killed run may have to repeat.
    checkpoint_every: int = dataclasses.field(default=10, metadata=UNHASHED)
    # Newest ones that stay on disk; more allow a return behind a damaged one.
    keep_checkpoints: int = dataclasses.field(default=1, metadata=UNHASHED)
    # Traces that ended otherwise are not trained on.
    finishes: tuple[str, ...] = dataclasses.field(default=("eos", "stop"), metadata=UNHASHED)
    # Of all devices.
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape, metadata=UNHASHED)


@dataclasses.dataclass
class Suite(Fields):
    """A group of evaluation tasks."""

    # What figures and tables call it.
    name: str = ""
    # "in" or "out" of the training domain.
    domain: str = "in"
    # Evaluation questions; training questions that overlap them are dropped.
    prompts: Prompts = dataclasses.field(default_factory=Prompts)
    # K traces per question at `temperature`.
    samples: int = 1
    # Of the student and of policies; generators are measured at their own. 0 is greedy.
    temperature: float = 1.0


@dataclasses.dataclass
class Sampling(Fields):
    """The decoding loop's fixed shapes."""

    # Tokens; a longer prompt is an error.
    max_prompt: int = 128
    # Tokens of one trace.
    max_tokens: int = 192
    # Rows decoded at once.
    slots: int = 64
    # Decode steps per dispatch.
    chunk: int = 16
    # Prompts in one shard of traces and questions in one shard of results: what a killed run may
    # have to repeat. Another value makes all that is behind them again, because files are hashed.
    shard: int = 256
    # Strings that end a trace, cut from it.
    stop: tuple[str, ...] = ()
    # Of each host's devices: every host samples shards of its own.
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape, metadata=UNHASHED)


@dataclasses.dataclass
class Scoring(Fields):
    """Packed forward passes without gradient: scoring and judging."""

    # Packed rows of one forward pass over all devices.
    rows: int = 16
    # Tokens in one packed row; the longest sequence must fit.
    row_length: int = 512
    # Traces in one shard: what a killed run may have to repeat. Another value makes all that is
    # behind the tables again: their files are hashed, and rows that are packed otherwise are
    # rounded otherwise.
    shard: int = 1024
    # Of all devices.
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape, metadata=UNHASHED)


@dataclasses.dataclass
class Experiment(Fields):
    """One study: what is asked, and everything needed to answer it."""

    # The study's folder of links, and what the index calls it.
    name: str = ""
    # One sentence, shown on top of the page.
    question: str = ""
    # What is asked and who answers, for the page.
    about: str = ""
    # Directory or bucket of the artifacts.
    workspace: str = dataclasses.field(default="workspace", metadata=UNHASHED)
    # Of TRACKERS: who is shown an arm's metrics besides metrics.jsonl, while it trains.
    trackers: tuple[str, ...] = dataclasses.field(default=(), metadata=UNHASHED)
    # Of sampled traces, evaluations, audits and random selections; arms have their own.
    seed: int = 0
    # Training questions.
    prompts: tuple[Prompts, ...] = ()
    # What writes the traces of the training questions; all are measured on the suites.
    generators: tuple[Generator, ...] = ()
    # What rates every trace.
    judges: tuple[Judge, ...] = ()
    # What every arm starts from.
    student: Model = dataclasses.field(default_factory=Model)
    # "" path: the student before training.
    reference: Model = dataclasses.field(default_factory=Model)
    # Parquet file or folder of the reference's log-probabilities; what it lacks is computed.
    table: str = dataclasses.field(default="", metadata=UNHASHED)
    # Losses that arms name.
    objectives: tuple[Objective, ...] = ()
    # What is trained.
    arms: tuple[Arm, ...] = ()
    # Generators that must have a usable trace of a prompt for any arm to train on it, so that arms
    # share prompts; (): those of all arms, so that an arm with another generator may change the
    # prompts of every arm.
    shared_by: tuple[str, ...] = ()
    # What every model is evaluated on.
    suites: tuple[Suite, ...] = ()
    # Of all arms.
    training: Training = dataclasses.field(default_factory=Training)
    # Of all traces and evaluations.
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    # Of the reference and of model judges.
    scoring: Scoring = dataclasses.field(default_factory=Scoring)


@dataclasses.dataclass
class Pairs(Fields):
    """A file of preference data that somebody brings; `data.preferences` lists the formats."""

    # .jsonl or .parquet file, hub data set name, or local data set folder.
    path: str = dataclasses.field(default="", metadata=UNHASHED)
    # Split of a hub data set or folder.
    split: str = "train"
    # Processes that tokenise; a file of less than a thousand rows each needs fewer.
    workers: int = dataclasses.field(default=4, metadata=UNHASHED)
    # Of over_length "truncate": the end of a sequence that stays; TRL's names.
    truncation_mode: str = "keep_start"
    # Subset of a hub data set (its "config"), where it has several; it is a part of the content.
    name: str = dataclasses.field(default="", metadata=UNHASHED)
    # Branch, tag or commit of a hub data set, "": the default branch; its commit is hashed.
    revision: str = dataclasses.field(default="", metadata=UNHASHED)


@dataclasses.dataclass
class PairTraining(Fields):
    """One arm trained from a file of pairs, without the rest of a study."""

    # What the index calls the run and its policy.
    name: str = "train"
    # Directory or bucket of tokens, reference table and policy.
    workspace: str = "workspace"
    # Of TRACKERS: who is shown its metrics besides metrics.jsonl, while it trains.
    trackers: tuple[str, ...] = ()
    # Of the order of the data.
    seed: int = 0
    # The file of pairs.
    data: Pairs = dataclasses.field(default_factory=Pairs)
    # What is trained.
    student: Model = dataclasses.field(default_factory=Model)
    # "" path: the student before training.
    reference: Model = dataclasses.field(default_factory=Model)
    # Parquet file or folder of the reference's log-probabilities; "": computed once and kept.
    table: str = ""
    # The loss with its hyperparameters; its name is not used.
    objective: Objective = dataclasses.field(default_factory=lambda: Objective(name="dpo"))
    # Its `row_length` is the longest sequence too.
    training: Training = dataclasses.field(default_factory=Training)


def judge_of(experiment: Experiment, arm: Arm) -> str:
    """Name of the judge whose ratings count for `arm`; "" if there is none.

    It is the judge that directs the arm's pairs, else the arm's own, else the first.
    """
    if arm.direction != "generator":
        return arm.direction
    return arm.judge or next((j.name for j in experiment.judges), "")


@dataclasses.dataclass
class SmallModel(Fields):
    """A small decoder that the nursery raises."""

    # What `base` and `release` call it.
    name: str = ""
    # SmallModel whose weights it starts from; "": its own random ones.
    base: str = ""
    # "solve": worked solutions; "judge": the five ratings of flawed solutions.
    curriculum: str = "solve"
    # Sizes are the base's where there is one; more layers than it has are grown on top.
    layers: int = 3
    # Channels of the residual stream.
    width: int = 128
    # Query heads; they divide the width into even parts.
    heads: int = 4
    # Key and value heads; they divide the query heads.
    kv_heads: int = 2
    # Hidden channels of the MLP.
    mlp: int = 352
    # Synthetic families, drawn evenly; a family named twice is drawn twice as often.
    tasks: tuple[str, ...] = ()
    # Drawn evenly.
    difficulties: tuple[int, ...] = (2,)
    # Careless steps per step in the solutions it learns from.
    error_rate: float = 0.0
    # Optimizer steps, each of fresh samples.
    steps: int = 1000
    # Packed rows of one step.
    rows: int = 32
    # Tokens in one packed row.
    row_length: int = 256
    # Peak; 5% warm-up, then cosine to a tenth.
    learning_rate: float = 2e-3
    # Of its first weights and of its data.
    seed: int = 0


@dataclasses.dataclass
class ModelZoo(Fields):
    """The models that ship with the project, and how they came about."""

    # What the index calls the run.
    name: str = "nursery"
    # Directory or bucket of the artifacts.
    workspace: str = "workspace"
    # Folder that receives one Hugging Face folder per released model.
    output: str = NURSERY
    # Tokens of the tokenizer that all models share.
    vocab: int = 640
    # A base comes before what starts from it.
    models: tuple[SmallModel, ...] = ()
    # Names of the models to ship.
    release: tuple[str, ...] = ()
    # Measured for every released solver.
    suites: tuple[Suite, ...] = ()
    # Of the suites.
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    # Of all devices: the small models train on it.
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)


def mesh_of(own: MeshShape, stage: MeshShape) -> MeshShape:
    """The mesh of a generator or judge: its own if that has a size, else that of its stage."""
    return stage if own == MeshShape() else own


def model_of(experiment: Experiment, model: Model) -> Model:
    """`model` with the empty path resolved to the student's, and its revision."""
    if model.path:
        return model
    student = experiment.student
    return dataclasses.replace(model, path=student.path, revision=student.revision)


def reference_of(student: Model, reference: Model) -> Model:
    """The reference model: the student before training where none is named."""
    return reference if reference.path else student
