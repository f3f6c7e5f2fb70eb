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
JUDGE_KINDS = ("exact", "model", "mean")
KEEPS = ("all", "top", "bottom", "middle", "random", "matched")
RANKED = ("top", "bottom", "middle", "matched")  # those that rank pairs, see Arm.by
STRATA = ("any", "chosen_right", "both_right", "both_wrong", "right_wrong", "wrong_right")
SYMMETRIC = ("any", "both_right", "both_wrong")  # strata that an exchange of the sides keeps
STUDENT = "student"  # its name beside those of generators, none of which may have it
REFERENCE_MARGIN = "reference_margin"  # what pairs may be ranked by besides ratings
SAMPLES = ("first", "best", "worst", "right", "wrong")
BALANCES = ("", "correctness", "chosen_length")
UNJUDGED = ("generator", "coin")  # directions of pairs that no judge gives
CLAIM_KINDS = ("change", "contrast", "slope")
DOMAINS = ("in", "out")
BUDGETS = ("steps", "epochs")
GROUPS = ("ladder", "selection", "control")
TUNING = "tuning"
READOUTS = ("", "accuracy", "pass", TUNING)
OVER_LENGTHS = ("error", "drop", "truncate")
TRUNCATION_MODES = ("keep_start", "keep_end")
DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("", "int8", "fp8")
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

ADDED = {"added": True}
"""Metadata of a field that is newer than artifacts: it is hashed where it is not its default alone,
so that what was made before it keeps its key."""


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

    # One of PROMPT_KINDS, or "module:function" (docs/extend.md), which yields rows as a file has.
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
    # How answers of a file are checked: "math", "exact", "" (unchecked), or "module:function"
    # (docs/extend.md).
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
    # One of QUANTIZATIONS: matrices of layers in one byte a weight; generators and judges only.
    quantization: str = ""
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
class Student(Fields):
    """One of several students that a study trains (`Experiment.students`)."""

    # What the page, the log and the links call it.
    name: str = ""
    # What its arms start from.
    model: Model = dataclasses.field(default_factory=Model)


@dataclasses.dataclass
class Judge(Fields):
    """Rates traces from 1 to 5 on each dimension."""

    # What arms, figures and tables call it.
    name: str = ""
    # "exact": by program, from the known truth of the synthetic world; "model": by score tokens;
    # "mean": the mean of the judges `of`, each brought to one scale (`stages.judge_mean`).
    kind: str = "exact"
    # Of kind "model".
    model: Model = dataclasses.field(default_factory=Model)
    # Standard deviation of normal noise added by the exact judge, in rating points.
    noise: float = 0.0
    # Of that noise.
    seed: int = 0
    # Of DIMENSIONS; a model reads a trace once, and a short question for each of them.
    dimensions: tuple[str, ...] = DIMENSIONS
    # Names of the judges that a judge of kind "mean" averages.
    of: tuple[str, ...] = dataclasses.field(default=(), metadata=ADDED)
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
    # Learning rates to try in place of `learning_rate`; all arms of the objective, but those with
    # a rate of their own, take the one whose policy answers the suites of readout "tuning" best.
    rates: tuple[float, ...] = dataclasses.field(default=(), metadata=ADDED)
    # Arm of the objective that tries them, with its first seed and draw.
    tuned_by: str = dataclasses.field(default="", metadata=ADDED)


class Run(NamedTuple):
    """One training of an arm; as text, its seed, and its draw where that is not 0."""

    draw: int  # of its pairs
    seed: int  # of the order of its data, and of new adapters

    def __str__(self) -> str:
        return f"draw{self.draw}-{self.seed}" if self.draw else str(self.seed)


@dataclasses.dataclass
class Arm(Fields):
    """One data set × one objective × seeds."""

    # What figures and tables call it; the label of its artifacts.
    name: str = ""
    # Generator that writes the chosen traces.
    chosen: str = ""
    # Generator that writes the rejected traces; the same one: two samples, see `direction`.
    rejected: str = ""
    # "generator" (as named; two samples of one: the second is chosen), a judge's name, or "coin"
    # (half of the pairs turned around by chance: a placebo, of a stratum with no right side and of
    # all or random pairs).
    direction: str = "generator"
    # One of KEEPS, or "module:function" (docs/extend.md), which returns the pairs to keep.
    keep: str = "all"
    # What RANKED keeps rank by: a dimension, or "sum" of them all, as judged by `judge`, or
    # "reference_margin": log-probability of the chosen trace minus that of the rejected one under
    # the reference, in nats. The same ratings choose "best" and "worst" samples; without either it
    # stays "sum".
    by: str = "sum"
    # Whose ratings shape the pairs, where `direction` names no judge; "": the first judge.
    judge: str = ""
    # Share of the pool of pairs kept.
    fraction: float = 1.0
    # Pairs kept, instead of a share; 0: by `fraction`.
    pairs: int = 0
    # One of STRATA: by verified correctness of chosen and rejected.
    stratum: str = "any"
    # Of SAMPLES: which of the traces that `chosen` wrote for a prompt is chosen: the first one, the
    # best or worst as rated by `judge`, or a right or wrong one. Those that are equal are drawn.
    chosen_sample: str = "first"
    # Likewise of `rejected`.
    rejected_sample: str = "first"
    # Name of an Objective.
    objective: str = "dpo"
    # One policy is trained per seed: of the order of its data, and of new adapters.
    seeds: tuple[int, ...] = (0,)
    # One set of pairs is drawn per draw, and trained on with every seed: of random and matched
    # pairs, of ties at the cut, and of coins.
    draws: tuple[int, ...] = (0,)
    # Optimizer steps, instead of the budget of `training`; 0: as there.
    steps: int = 0
    # Passes over the arm's pairs, instead of the budget of `training`; 0: as there.
    epochs: float = 0.0
    # Pairs of one step; 0: as in `training`.
    pairs_per_step: int = 0
    # Peak; 0: the objective's.
    learning_rate: float = 0.0
    # Figure that the arm belongs to, one of GROUPS.
    group: str = "ladder"

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every training of the arm."""
        return tuple(Run(draw, seed) for draw in self.draws for seed in self.seeds)


@dataclasses.dataclass
class Claim(Fields):
    """A comparison that is named before the run; all others on the page are exploratory."""

    # One of CLAIM_KINDS: the "change" of arm `a` against the student, its "contrast" with arm `b`
    # (a minus b), or the "slope" of the change on the generator delta over a ladder.
    kind: str = "contrast"
    # Name of an arm; not in "slope".
    a: str = ""
    # Name of an arm, in "contrast".
    b: str = ""
    # Name of the objective whose ladder has the slope, in "slope".
    objective: str = ""
    # Domain of the suites: "in" or "out".
    domain: str = "out"
    # Points (in "slope": per 10 points of generator delta) below which an effect does not matter.
    margin: float = 2.0


@dataclasses.dataclass
class Lora(Fields):
    """Low-rank adapters: W + (alpha / rank) A B, where A and B are trained (arXiv 2106.09685)."""

    # Columns of A and rows of B; 0: all weights are trained, and there are no adapters.
    rank: int = 0
    # Above 0.
    alpha: float = 16.0
    # Which matrices of every layer are adapted; (): all of LORA_TARGETS that the student's family
    # has, which are those of attention and of a dense MLP, and no experts.
    targets: tuple[str, ...] = ()


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
    # Rows of one micro-batch over all devices; 0: two per device, which pad least.
    rows: int = 16
    # Tokens in one packed row; 0: as many as 99% of the sequences need (not in launch.train).
    row_length: int = 512
    # A sequence longer than a row: "drop" (counted), "error"; launch.train: "truncate" too.
    over_length: str = "drop"
    # What the backward pass recomputes: "none" or, more and more, one of models.decoder.POLICIES;
    # "auto": the least that fits the devices' memory, by stages.micro_batches.choose_remat.
    remat: str = "auto"
    # Rank 0 trains all weights.
    lora: Lora = dataclasses.field(default_factory=Lora)
    # Of Adam's two moments; "bfloat16" halves their memory, rounded stochastically.
    moments: str = "float32"
    # Whether the moments lie in the host's memory between updates: less on the devices while
    # gradients are computed, and the time to move them twice a step. The numbers are the same.
    offload_moments: bool = dataclasses.field(default=False, metadata=UNHASHED)
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
    # "in" or "out" of the training domain; not in "tuning".
    domain: str = "in"
    # Evaluation questions; training questions that overlap them are dropped.
    prompts: Prompts = dataclasses.field(default_factory=Prompts)
    # K traces per question at `temperature`.
    samples: int = 1
    # Of the student and of policies; generators are measured at their own. 0 is greedy.
    temperature: float = 1.0
    # Of READOUTS. "": the accuracy is averaged into that of the domain. A second read-out stands
    # beside it, of the student and the arms: "accuracy", or "pass" (pass@k, without bias).
    # "tuning": learning rates are chosen by its questions (`Objective.rates`), and nothing else is.
    readout: str = ""
    # Samples of a question of which one must be right, for read-out "pass".
    k: int = 0


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

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, a prompt and its trace."""
        return self.max_prompt + self.max_tokens


@dataclasses.dataclass
class Scoring(Fields):
    """Packed forward passes without gradient: scoring and judging."""

    # Packed rows of one forward pass over all devices; 0: two per device.
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
    # Instead of `student`: two or more, each of which all arms are trained from (docs/students.md);
    # traces, ratings and pairs are made once.
    students: tuple[Student, ...] = dataclasses.field(default=(), metadata=ADDED)
    # "" path: the student before training.
    reference: Model = dataclasses.field(default_factory=Model)
    # Parquet file or folder of the reference's log-probabilities; what it lacks is computed.
    table: str = dataclasses.field(default="", metadata=UNHASHED)
    # Losses that arms name.
    objectives: tuple[Objective, ...] = ()
    # What is trained.
    arms: tuple[Arm, ...] = ()
    # What the page claims, adjusted for their number; (): see `claims_of`.
    claims: tuple[Claim, ...] = ()
    # Generators that must have a usable trace of a prompt for any arm to train on it, so that arms
    # share prompts; (): those of all arms, so that an arm with another generator may change the
    # prompts of every arm.
    shared_by: tuple[str, ...] = ()
    # Strata whose arms share their prompts: those that have a pair in every one of them, for which
    # several samples of the generators are looked through; (): an arm uses what its stratum has.
    shared_strata: tuple[str, ...] = ()
    # Of BALANCES: what has the same joint distribution on every rung of the ladders
    # (docs/arms.md#rungs), which keep as many random pairs as that allows: the verdicts of chosen
    # and rejected, or the length of the chosen traces; "": rungs keep all pairs.
    balance: str = ""
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
    if arm.direction not in UNJUDGED:
        return arm.direction
    return arm.judge or next((j.name for j in experiment.judges), "")


def samples_of(arm: Arm) -> tuple[str, str]:
    """Which samples become the chosen and the rejected trace."""
    return arm.chosen_sample, arm.rejected_sample


def sides_of(arm: Arm) -> tuple[tuple[str, str], tuple[str, str]]:
    """Generator and sample of the chosen and of the rejected traces."""
    return (arm.chosen, arm.chosen_sample), (arm.rejected, arm.rejected_sample)


def uses_ratings(arm: Arm) -> bool:
    """Whether a judge directs or ranks the pairs of `arm`, or chooses their traces."""
    return arm.direction not in UNJUDGED or not unread_ratings(arm)


def unread_ratings(arm: Arm) -> set[str]:
    """The fields that say who rates and what, if no rating ranks pairs of `arm` or chooses traces.

    A function that selects pairs is given their gaps.
    """
    ranks = arm.keep not in KEEPS or (arm.keep in RANKED and arm.by != REFERENCE_MARGIN)
    chooses = bool({"best", "worst"} & set(samples_of(arm)))
    return set() if ranks or chooses else {"judge", "by"}


def is_balanced(e: Experiment, arm: Arm) -> bool:
    """Whether `arm` is a rung of a balanced ladder."""
    return bool(e.balance) and arm in ladder_of(e, arm.objective)


def draws_pairs(e: Experiment, arm: Arm) -> bool:
    """Whether another draw may give `arm` other pairs."""
    by_chance = arm.direction == "coin" or samples_of(arm) != ("first", "first")
    return arm.keep != "all" or by_chance or is_balanced(e, arm)


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
    # Careless steps per step in the solutions it learns from: coin tosses.
    error_rate: float = 0.0
    # Names of `synthetic.beliefs.BELIEFS` that the authors of these solutions hold: they err by
    # rule. Of a judge: those that its solutions' authors may hold; each author holds some.
    beliefs: tuple[str, ...] = ()
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


def claims_of(e: Experiment) -> tuple[Claim, ...]:
    """The claims of a study: its own, or the two questions of the field out of domain.

    They are the slope of the first ladder of three arms or more, and the first arm of top pairs
    minus the arm of as many random ones; in domain where no suite is out of it. Without a suite in
    domain there is no slope, because the generator delta is measured there.
    """
    if e.claims:
        return e.claims
    domain = "out" if "out" in domains_of(e.suites) else "in"
    slopes = [
        Claim(kind="slope", objective=o, domain=domain, margin=0.5)
        for o in dict.fromkeys(a.objective for a in e.arms if a.group == "ladder")
        if "in" in domains_of(e.suites) and len(ladder_of(e, o)) > 2
    ]
    contrasts = [
        Claim(kind="contrast", a=a.name, b=b.name, domain=domain)
        for a in e.arms
        for b in e.arms
        if a.keep == "top" and as_many_at_random(e, a, b)
    ]
    return (*slopes[:1], *contrasts[:1])


def domains_of(suites: Sequence[Suite]) -> list[str]:
    """Domains that average a suite, "in" before "out"."""
    return [d for d in DOMAINS if any(s.domain == d and not s.readout for s in suites)]


def greedy_twin(suite: Suite) -> Suite:
    """A second read-out of the suite's questions: one answer each, decoded greedily."""
    return dataclasses.replace(
        suite,
        name=f"{suite.name}-greedy",
        prompts=dataclasses.replace(suite.prompts),
        samples=1,
        temperature=0.0,
        readout="accuracy",
        k=0,
    )


def differing(e: Experiment, a: Arm, b: Arm) -> set[str]:
    """Names of the fields in which two arms differ, apart from names, groups, seeds and draws.

    An arm that names the first judge does not differ from one that names none.
    """
    same = {"name", "group", "seeds", "draws"}
    if judge_of(e, a) == judge_of(e, b):
        same.add("judge")
    fields = {field.name for field in dataclasses.fields(Arm)}
    return {name for name in fields - same if getattr(a, name) != getattr(b, name)}


def ladder_of(e: Experiment, objective: str) -> list[Arm]:
    """The rungs of an objective's ladder: arms of its group that differ in generators alone.

    Their generators direct their pairs, because a pair that a judge or a coin directed is not
    chosen for its author. Where arms of the group differ in more, such as a selection or a budget,
    the rungs are the most that are alike, and the first of those where as many are.
    """
    of = "ladder", objective, "generator"
    ours = [a for a in e.arms if (a.group, a.objective, a.direction) == of]
    alike = [[b for b in ours if not differing_rungs(e, a, b)] for a in ours]
    return max(alike, key=len, default=[])


def differing_rungs(e: Experiment, a: Arm, b: Arm) -> set[str]:
    """Fields in which two arms differ apart from their generators, of those that are read."""
    unread = unread_ratings(a) & unread_ratings(b)
    return differing(e, a, b) - {"chosen", "rejected"} - unread


def as_many_at_random(e: Experiment, a: Arm, b: Arm) -> bool:
    """Whether b keeps as many random pairs of the data that a keeps other pairs of."""
    return b.keep == "random" and differing(e, a, b) <= {"keep"} | unread_ratings(b)


def training_of(training: Training, arm: Arm) -> Training:
    """`training` with the budget and the pairs per step of `arm`, where it has its own."""
    if arm.steps:
        training = dataclasses.replace(
            training, budget="steps", steps=arm.steps, epochs=Training().epochs
        )
    if arm.epochs:
        training = dataclasses.replace(
            training, budget="epochs", epochs=arm.epochs, steps=Training().steps
        )
    if arm.pairs_per_step:
        training = dataclasses.replace(training, pairs_per_step=arm.pairs_per_step)
    return training


def objective_of(e: Experiment, arm: Arm) -> Objective:
    """The objective of `arm`, with the arm's learning rate where it has its own."""
    objective = next(o for o in e.objectives if o.name == arm.objective)
    rate = arm.learning_rate or objective.learning_rate
    return dataclasses.replace(objective, learning_rate=rate, rates=(), tuned_by="")


def is_tuned(e: Experiment, arm: Arm) -> bool:
    """Whether the learning rate of an arm is chosen among several (`Objective.rates`)."""
    (rates,) = [o.rates for o in e.objectives if o.name == arm.objective]
    return bool(rates) and not arm.learning_rate


def budget_twin(arm: Arm, training: Training) -> Arm:
    """`arm` with the other budget, for an arm that keeps a share of its pool of pairs.

    With as many steps as an arm of the whole pool it sees every pair more often; with as many
    epochs it takes fewer steps. What a selection does can be told from what either does only where
    both arms are trained: `arms += [budget_twin(a, training) for a in arms if a.keep != "all"]`.

    Args:
      arm: of equal steps if its budget is "steps", and then its twin is of equal epochs; of equal
        epochs otherwise, and its twin of equal steps.
      training: of the experiment.

    Raises:
      ConfigError: the arm keeps all pairs, or a number of pairs, of which nobody knows the share
        before the pool is made.
    """
    if arm.pairs or not 0 < arm.fraction < 1:
        kept = f"{arm.pairs} pairs" if arm.pairs else f"a fraction of {arm.fraction:g}"
        raise ConfigError(
            f"Arm {arm.name!r} keeps {kept}, and a twin of another budget needs a fraction below "
            "1; set config.arms.fraction, or the twin's steps or epochs by hand."
        )
    own = training_of(training, arm)
    if own.budget == "steps":
        steps = max(1, round(own.steps * arm.fraction))
        return dataclasses.replace(arm, name=f"{arm.name}-equal-epochs", steps=steps, epochs=0.0)
    epochs = own.epochs / arm.fraction
    return dataclasses.replace(arm, name=f"{arm.name}-equal-steps", epochs=epochs, steps=0)


def by_student(e: Experiment) -> dict[str, Experiment]:
    """The study of every student by the student's name; that of the only one by ""."""
    if not e.students:
        return {"": e}
    return {s.name: dataclasses.replace(e, student=s.model, students=()) for s in e.students}


def of_student(e: Experiment, name: str) -> Experiment:
    """The study of the student that `--student` names; it is "" where the config has one student.

    Raises:
      ConfigError: the config has no such student, or several and none is named.
    """
    studies = by_student(e)
    if not name and e.students:
        raise ConfigError(
            f"--student is empty and the config has several students; choose one of "
            f"{', '.join(map(repr, studies))}."
        )
    if name and not e.students:
        raise ConfigError(
            f"--student is {name!r} and the config has one student; leave the flag out."
        )
    return studies[check_choice("--student", name, studies)]


def model_of(experiment: Experiment, model: Model) -> Model:
    """`model` with the empty path resolved to the student's, and its revision."""
    if model.path:
        return model
    student = experiment.student
    return dataclasses.replace(model, path=student.path, revision=student.revision)


def quantised_sentence(experiment: Experiment) -> str:
    """Says which models of a study are quantised, and which are not; "" where none is."""
    student = experiment.student
    parts = [
        f"generator {g.name} samples, and is evaluated, with {g.model.quantization} weights"
        + (" of the student's files" if model_of(experiment, g.model).path == student.path else "")
        for g in experiment.generators
        if g.model.quantization
    ] + [
        f"judge {j.name} rates with {j.model.quantization} weights"
        for j in experiment.judges
        if j.model.quantization
    ]
    if not parts:
        return ""
    return (
        f"Quantised: {'; '.join(parts)}. Products are computed in each model's dtype. The student, "
        "its policies and the reference are not quantised."
    )


def reference_of(student: Model, reference: Model) -> Model:
    """The reference model: the student before training where none is named."""
    return reference if reference.path else student
