"""Checks of a whole config before a device is used; every bad value gives one sentence."""

import dataclasses
import functools
import importlib.util
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from deltapref_jax.callables import (
    CHECKER,
    SELECTION,
    SOURCE,
    is_callable_name,
    load_callable,
)
from deltapref_jax.config import (
    BALANCES,
    BUDGETS,
    CHECKERS,
    CLAIM_KINDS,
    DIMENSIONS,
    DTYPES,
    GROUPS,
    JUDGE_KINDS,
    KEEPS,
    LORA_TARGETS,
    OBJECTIVE_KINDS,
    OVER_LENGTHS,
    PROMPT_KINDS,
    QUANTIZATIONS,
    RANKED,
    READOUTS,
    REFERENCE_MARGIN,
    REMATS,
    SAMPLES,
    STRATA,
    STUDENT,
    SYMMETRIC,
    TRACKERS,
    TRUNCATION_MODES,
    TUNING,
    UNJUDGED,
    Arm,
    Claim,
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Lora,
    MeshShape,
    Model,
    ModelZoo,
    Objective,
    Pairs,
    PairTraining,
    Prompts,
    Sampling,
    Scoring,
    Suite,
    Training,
    check_choice,
    domains_of,
    draws_pairs,
    is_balanced,
    judge_of,
    ladder_of,
    need_reasoning_gym,
    samples_of,
    uses_ratings,
)
from deltapref_jax.display import printable

MAX_NAME = 200
"""Characters of a name: file systems allow 255 bytes in the name of a link."""

_ZOO_PLACES = {
    "name": "the models",
    "workspace": "a folder for the work at hand",
    "output": "a folder for the finished models",
}

_VERDICTS = {  # of chosen and rejected; "" is any
    "chosen_right": ("right", ""),
    "both_right": ("right", "right"),
    "both_wrong": ("wrong", "wrong"),
    "right_wrong": ("right", "wrong"),
    "wrong_right": ("wrong", "right"),
}

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    tuple: "a tuple, such as (value,)",
}


def _check_class(config: Any, expected: type) -> None:
    """Refuses the config of another entry point."""
    if not isinstance(config, expected):
        raise ConfigError(
            f"--config gives {type(config).__name__} where {expected.__name__} is needed; its "
            f"get_config() must return deltapref_jax.config.{expected.__name__}."
        )
    _check_types("config", config)
    _check_shared("config", config, {})


def _check_shared(path: str, value: Any, seen: dict[int, str]) -> None:
    """Refuses two fields that are one object: a flag for one of them would change both."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_shared(f"{path}[{i}]", item, seen)
    elif dataclasses.is_dataclass(value):
        if id(value) in seen:
            raise ConfigError(
                f"{seen[id(value)]} and {path} are one and the same object, so that a flag for "
                f"one would change both; build {_one(type(value))} for each."
            )
        seen[id(value)] = path
        for field in dataclasses.fields(value):
            _check_shared(f"{path}.{field.name}", getattr(value, field.name), seen)


def _one(kind: type) -> str:
    """The name of a class with its article, such as "an Arm"."""
    return f"a{'n' * kind.__name__.startswith(tuple('AEIO'))} {kind.__name__}"


def _refuse_unread(field: str, value: Any, default: Any, is_read: Any, reason: str) -> None:
    """Refuses a value that nothing reads, because it would misdescribe the run."""
    if value != default and not is_read:
        raise ConfigError(
            f"{field} is {_shown(value)} and nothing reads it, for {reason}; leave it at "
            f"{_shown(default)}."
        )


def _check_types(path: str, config: Any) -> None:
    """Refuses values whose type is not that of their field.

    Flags are not typed: a string where a tuple belongs would be iterated letter by letter.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value, field = getattr(config, name), f"{path}.{name}"
        items = [(field, hint, value)]
        if (typing.get_origin(hint) or hint) is tuple and isinstance(value, tuple):
            item_hint = typing.get_args(hint)[0]
            items = [(f"{field}[{i}]", item_hint, item) for i, item in enumerate(value)]
        for item_field, item_hint, item in items:
            expected = typing.get_origin(item_hint) or item_hint
            allowed = int | float if expected is float else expected
            # isinstance(True, int) holds.
            if isinstance(item, bool) != (expected is bool) or not isinstance(item, allowed):
                kind = _KINDS.get(expected) or _one(expected)
                part: Any = (*typing.get_args(hint), None)[0]
                if expected is tuple and isinstance(part, type) and dataclasses.is_dataclass(part):
                    kind = f"a tuple of parts, such as ({part.__name__}(…),), or ()"
                raise ConfigError(f"{item_field} is {_shown(item)}; it must be {kind}.")
            if isinstance(item, str) and "\0" in item:
                raise ConfigError(f"{item_field} is {_shown(item)}; a text has no NUL character.")
            if dataclasses.is_dataclass(item):
                _check_types(item_field, item)


def _check_names(kind: str, names: Sequence[str]) -> None:
    """Checks that names are there, are unique, and can be part of a label."""
    for name in names:
        if not name:
            raise ConfigError(f"A {kind} has no name; give every {kind} one.")
        _check_name(f"The name of {kind} {name!r}", name)
        if names.count(name) > 1:
            raise ConfigError(f"Two {kind}s are named {name!r}; names must differ.")


def _check_name(what: str, name: str) -> None:
    """Checks that a name can be shown on one line and be the name of a link."""
    if "/" in name:
        raise ConfigError(f"{what} holds a slash, which separates labels; use another sign.")
    if printable(name) != name or "\n" in name or "\t" in name:
        raise ConfigError(
            f"{what} holds a control character; use letters, digits and signs that can be seen."
        )
    if len(name) > MAX_NAME or not name.strip(". "):
        raise ConfigError(
            f"{what[:80]} is of no use as a name; give it 1 to {MAX_NAME} characters that are not "
            "all dots."
        )
    if name.startswith("."):
        raise ConfigError(f"{what} begins with a dot, which hides a folder; remove it.")


def _check_range(
    field: str, value: float, low: float, high: float = math.inf, why: str = ""
) -> None:
    """Checks that low ≤ value ≤ high, of finite numbers; `why` says why there is an upper bound."""
    # Comparisons of whole numbers are exact however large they are.
    if low <= value <= high and (isinstance(value, int) or math.isfinite(value)):
        return
    upper = ""
    if high < math.inf and (value > high or not why):
        upper = f" and at most {high:,}" if isinstance(high, int) else f" and at most {high:g}"
    because = f", for {why}" if why and value > high else ""
    raise ConfigError(f"{field} is {_shown(value)}; it must be at least {low:g}{upper}{because}.")


def _check_count(field: str, value: int, low: int = 1, high: int = 10**9) -> None:
    """Checks a number of steps, rows or the like that work grows with."""
    _check_range(field, value, low, high, "more could not be finished")


def _check_size(field: str, value: int, high: int = 2**24) -> None:
    """Checks an axis of an array."""
    _check_range(field, value, 1, high, "a larger array fits no device")


def _check_seed(field: str, value: int) -> None:
    _check_range(field, value, 0, 2**63 - 1, "seeds have 63 bits")


def _check_strength(field: str, value: float, low: float = 0.0, high: float = 1e6) -> None:
    """Checks a factor of numbers in float32, which a larger one would make infinite."""
    _check_range(field, value, low, high, "a larger one is a typing error")


def _check_rows(field: str, rows: int, row_length: int) -> None:
    """Checks the shape of packed rows; 0 is chosen."""
    _check_range(f"{field}.rows", rows, 0, 2**24, "a larger array fits no device")
    low = int(field != "config.training")
    _check_range(f"{field}.row_length", row_length, low, 2**24, "a larger array fits no device")
    if rows * row_length >= 2**31:
        raise ConfigError(
            f"{field} has {rows:,} rows of {row_length:,} tokens; the positions of one pass are "
            "counted in 31 bits, so make rows or row_length smaller."
        )


def _shown(value: Any) -> str:
    """A value for a sentence; Python refuses to write whole numbers of thousands of digits."""
    if isinstance(value, MeshShape):
        return value.stated or "0 in every size"
    try:
        return repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}…"
    except ValueError:
        return "a number of thousands of digits"


def _check_named(field: str, value: str, known: Sequence[str], arguments: tuple[str, ...]) -> None:
    """Checks that a value is one of `known`, or names a function that takes these arguments."""
    if is_callable_name(value):
        load_callable(field, value, arguments)
    else:
        check_choice(field, value, known)


def _check_prompts(field: str, prompts: Prompts) -> None:
    _check_named(f"{field}.kind", prompts.kind, PROMPT_KINDS, SOURCE)
    _check_named(f"{field}.checker", prompts.checker, CHECKERS, CHECKER)
    own = is_callable_name(prompts.kind)
    if prompts.kind == "reasoning_gym":
        need_reasoning_gym()
    _check_count(f"{field}.count", prompts.count, 0, 10**8)
    _check_range(
        f"{field}.difficulty", prompts.difficulty, 1, 100, "a longer problem fits no prompt"
    )
    _check_seed(f"{field}.seed", prompts.seed)
    if prompts.kind in ("synthetic", "reasoning_gym"):
        if not prompts.tasks:
            raise ConfigError(
                f"{field}.tasks is empty; name at least one task for kind {prompts.kind!r}."
            )
        if prompts.count < len(prompts.tasks):
            raise ConfigError(
                f"{field}.count is {prompts.count}; it must be at least "
                f"{len(prompts.tasks)}, the number of its tasks."
            )
    elif not prompts.path and not own:
        raise ConfigError(
            f"{field}.path is empty; kind {prompts.kind!r} needs a file, folder or data set name."
        )
    stored = prompts.kind not in ("synthetic", "reasoning_gym")
    for name, is_read in (
        ("path", stored),
        ("split", own or prompts.kind in ("hub", "tfds")),
        ("name", own or prompts.kind == "hub"),
        ("revision", own or prompts.kind == "hub"),
        ("tasks", own or not stored),
        ("difficulty", own or prompts.kind == "synthetic"),
        ("seed", own or not stored or prompts.count),
        ("prompt_field", stored),
        ("answer_field", stored),
        ("checker", stored),
    ):
        value, default = getattr(prompts, name), getattr(Prompts(), name)
        reason = "its count is 0" if name == "seed" else f"its kind is {prompts.kind!r}"
        _refuse_unread(f"{field}.{name}", value, default, is_read, reason)


def validate_model_zoo(zoo: ModelZoo) -> ModelZoo:
    """Checks every name and size of `zoo` and returns it.

    Raises:
      ConfigError: one sentence that names the field, its value and the remedy.
    """
    _check_class(zoo, ModelZoo)
    if "://" in zoo.workspace:
        raise ConfigError(
            f"config.workspace is {zoo.workspace}; the nursery needs a folder on this machine."
        )
    for field in ("name", "workspace", "output"):
        if not getattr(zoo, field):
            raise ConfigError(f"config.{field} is empty; name {_ZOO_PLACES[field]}.")
    _check_name(f"config.name, {zoo.name!r},", zoo.name)
    _check_range("config.vocab", zoo.vocab, 260, 2**20, "a larger array fits no device")
    if not zoo.models:
        raise ConfigError("config.models is empty; name at least one model to train.")
    _check_names("model", [p.name for p in zoo.models])
    _check_names("suite", [suite.name for suite in zoo.suites])
    known: list[str] = []
    for p in zoo.models:
        where = f"of model {p.name!r}"
        if p.base:
            check_choice(f"base {where} (a model listed before it)", p.base, known)
        check_choice(f"curriculum {where}", p.curriculum, ("solve", "judge"))
        if not p.tasks or not p.difficulties:
            raise ConfigError(f"tasks or difficulties {where} is empty; name at least one of each.")
        _check_range(f"error_rate {where}", p.error_rate, 0, 1)
        for difficulty in p.difficulties:
            _check_range(
                f"difficulties {where}", difficulty, 1, 100, "a longer problem fits no prompt"
            )
        for field in ("layers", "width", "heads", "kv_heads", "mlp"):
            _check_size(f"{field} {where}", getattr(p, field), 2**16)
        _check_count(f"steps {where}", p.steps)
        _check_size(f"rows {where}", p.rows)
        _check_size(f"row_length {where}", p.row_length, 1024)
        _check_strength(f"learning_rate {where}", p.learning_rate)
        _check_seed(f"seed {where}", p.seed)
        _check_mesh("config.mesh", zoo.mesh, (f"row_length {where}", p.row_length))
        if not p.base and (p.heads % p.kv_heads or p.width % p.heads or p.width // p.heads % 2):
            raise ConfigError(
                f"heads {where} is {p.heads}, kv_heads {p.kv_heads} and width {p.width}; heads "
                "must be a multiple of kv_heads and divide width into even parts."
            )
        known.append(p.name)
    for name in zoo.release:
        check_choice("config.release", name, known)
    _check_suites(zoo.suites)
    _check_sampling(zoo.sampling)
    return zoo


def validate_pair_training(single: PairTraining) -> PairTraining:
    """Checks every name and size of `single` and returns it.

    Raises:
      ConfigError: one sentence that names the field, its value and the remedy.
    """
    _check_class(single, PairTraining)
    if not single.data.path:
        raise ConfigError(
            "config.data.path is empty; give a .jsonl or .parquet file, a hub data set or its "
            "folder."
        )
    _check_range("config.data.workers", single.data.workers, 0, 1024, "no machine has more cores")
    check_choice("config.data.truncation_mode", single.data.truncation_mode, TRUNCATION_MODES)
    check_choice("config.training.over_length", single.training.over_length, OVER_LENGTHS)
    if not single.training.row_length:
        raise ConfigError(
            "config.training.row_length is 0, and the rows of a file are cut to it before their "
            "lengths are known; give a length."
        )
    check_choice("config.objective.kind", single.objective.kind, OBJECTIVE_KINDS)
    for field in ("rates", "tuned_by"):
        value, default = getattr(single.objective, field), getattr(Objective(), field)
        _refuse_unread(f"config.objective.{field}", value, default, False, "it is of a study")
    _check_objective(single.objective, "in config.objective")
    # The fields shared with a study are checked as a study of this objective. A study does not
    # truncate, so over_length is replaced; it has been checked above.
    validate(
        Experiment(
            name=single.name,
            seed=single.seed,
            trackers=single.trackers,
            workspace=single.workspace,
            prompts=(Prompts(kind="jsonl", path=single.data.path),),
            scoring=Scoring(single.training.rows, single.training.row_length),
            student=single.student,
            reference=single.reference,
            objectives=(dataclasses.replace(single.objective, name=single.objective.kind),),
            training=dataclasses.replace(single.training, over_length="drop"),
        )
    )
    _check_unused(single)
    kind = single.objective.kind
    for field, value in (("reference.path", single.reference.path), ("table", single.table)):
        if value and not OBJECTIVE_KINDS[kind].reference:
            raise ConfigError(
                f"config.{field} is {value!r} and objective {kind!r} has no reference; leave it "
                "empty."
            )
    return single


def _check_unused(single: PairTraining) -> None:
    """Refuses values that the run would ignore, as they would misdescribe it."""
    t = single.training
    # field, default, whether the run reads it, why not
    for field, default, is_read, reason in (
        (
            "training.finishes",
            Training().finishes,
            False,
            "a file does not say how its answers ended",
        ),
        (
            "data.split",
            Pairs().split,
            not single.data.path.endswith((".jsonl", ".json", ".parquet")),
            "config.data.path names a file",
        ),
        (
            "data.truncation_mode",
            Pairs().truncation_mode,
            t.over_length == "truncate",
            f"config.training.over_length is {t.over_length!r}",
        ),
    ):
        value = functools.reduce(getattr, field.split("."), single)
        _refuse_unread(f"config.{field}", value, default, is_read, reason)


def validate(experiment: Experiment) -> Experiment:
    """Checks every name and size of `experiment` and returns it.

    Raises:
      ConfigError: one sentence that names the field, its value and the remedy. Nothing has been
        read or written.
    """
    e = experiment
    _check_class(e, Experiment)
    for tracker in e.trackers:
        package = TRACKERS[check_choice("config.trackers", tracker, TRACKERS)]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"config.trackers has {tracker!r} and {package} is not installed; pip install "
                f"{package}."
            )
    if not e.name:
        raise ConfigError("config.name is empty; name the experiment.")
    _check_name(f"config.name, {e.name!r},", e.name)
    if not e.workspace:
        raise ConfigError("config.workspace is empty; name a folder or bucket for the artifacts.")
    _check_seed("config.seed", e.seed)
    if e.students:
        _check_students(e)
    elif not e.student.path:
        raise ConfigError(
            "config.student.path is empty; give a Hugging Face folder, a hub name or a GGUF file."
        )
    for field, group in (
        ("student", e.students),
        ("generator", e.generators),
        ("judge", e.judges),
        ("objective", e.objectives),
        ("arm", e.arms),
        ("suite", e.suites),
    ):
        _check_names(field, [item.name for item in group])
    if STUDENT in [g.name for g in e.generators]:
        raise ConfigError(
            f"A generator is named {STUDENT!r}, which tables and programs call the model that is "
            "trained; give it another name."
        )
    if not e.prompts:
        raise ConfigError(
            "config.prompts is empty; name at least one source of training questions."
        )
    for i, prompts in enumerate(e.prompts):
        _check_prompts(f"config.prompts[{i}]", prompts)
    _check_suites(e.suites)
    _check_tuning(e)
    _check_models(e)
    for o in e.objectives:
        check_choice(f"kind of objective {o.name!r}", o.kind, OBJECTIVE_KINDS)
        _check_objective(o, f"of objective {o.name!r}")
    _check_arms(e)
    for i, claim in enumerate(e.claims):
        _check_claim(f"config.claims[{i}]", claim, e)
    _check_training(e.training)
    _check_sizes(e)
    _check_reference(e)
    return e


def _check_students(e: Experiment) -> None:
    """Checks that there are several students, and that nothing else of the study hangs on one."""
    if e.student != Model():
        raise ConfigError(
            "config.student and config.students are both set; leave config.student as Model(), or "
            "config.students empty."
        )
    if len(e.students) < 2:
        raise ConfigError(
            "config.students has one student; set config.student instead, or add another."
        )
    for s in e.students:
        if not s.model.path:
            raise ConfigError(
                f"The path of student {s.name!r} is empty; give a Hugging Face folder, a hub name "
                "or a GGUF file."
            )
    borrowed = [f"config.generators[{g.name}]" for g in e.generators if not g.model.path]
    borrowed += [
        f"config.judges[{j.name}]" for j in e.judges if j.kind == "model" and not j.model.path
    ]
    if borrowed:
        raise ConfigError(
            f"{borrowed[0]}.model.path is empty, which means the student's model, and "
            "config.students has several; name the model, so that all students learn from the same "
            "traces and ratings."
        )
    if e.table and not e.reference.path:
        raise ConfigError(
            "config.table has the log-probabilities of one reference, and each of config.students "
            "is its own; leave the table empty, or set config.reference.path."
        )


def _check_reference(e: Experiment) -> None:
    """Refuses a reference that no arm reads."""
    path, dtype = e.reference.path, e.reference.dtype
    reason = "config.reference.path is empty"
    _refuse_unread("config.reference.dtype", dtype, Model().dtype, path, reason)
    kinds = {o.name: o.kind for o in e.objectives}
    is_read = not e.arms or any(
        OBJECTIVE_KINDS[kinds[a.objective]].reference or a.by == REFERENCE_MARGIN for a in e.arms
    )
    reason = "no arm's objective has a reference"
    _refuse_unread("config.reference.path", path, "", is_read, reason)


def _check_suites(suites: Sequence[Suite]) -> None:
    for s, suite in enumerate(suites):
        _check_prompts(f"config.suites[{s}].prompts", suite.prompts)
        if not suite.prompts.checker and suite.prompts.kind not in ("synthetic", "reasoning_gym"):
            raise ConfigError(
                f"config.suites[{s}].prompts.checker is empty, and a suite counts the answers that "
                "are right; set it to 'math' or 'exact'."
            )
        check_choice(f"config.suites[{s}].domain", suite.domain, ("in", "out"))
        _check_count(f"config.suites[{s}].samples", suite.samples, high=10**6)
        _check_strength(f"config.suites[{s}].temperature", suite.temperature)
        _check_readout(f"config.suites[{s}]", suite)
        _check_greedy(f"config.suites[{s}].samples", suite.samples, suite.temperature)
    if suites and not domains_of(suites):
        raise ConfigError(
            "Every suite of config.suites is a second read-out, and none is averaged into a "
            "domain; leave the readout of one at ''."
        )


def _check_readout(field: str, suite: Suite) -> None:
    """Checks the fields of a second read-out."""
    check_choice(f"{field}.readout", suite.readout, READOUTS)
    is_pass = suite.readout == "pass"
    reason = f"its readout is {suite.readout!r}"
    _refuse_unread(f"{field}.k", suite.k, 0, is_pass, reason)
    _refuse_unread(f"{field}.domain", suite.domain, "in", suite.readout != TUNING, reason)
    if is_pass and not 1 <= suite.k <= suite.samples:
        raise ConfigError(
            f"{field}.k is {suite.k} and its samples {suite.samples}; pass@k is measured on k "
            "samples or more, and k is at least 1."
        )
    if is_pass and not suite.temperature:
        raise ConfigError(
            f"{field}.temperature is 0, at which all samples of a question are one; set it above 0 "
            "for the readout 'pass'."
        )


def _check_greedy(field: str, samples: int, temperature: float) -> None:
    """Refuses several samples that are one."""
    if samples > 1 and not temperature:
        raise ConfigError(
            f"{field} is {samples} and its temperature is 0, at which all samples are one; leave "
            "samples at 1, or set the temperature above 0."
        )


def _check_models(e: Experiment) -> None:
    """Checks dtype and revision of all models, and the fields of generators and judges."""
    for model, field in (
        [(e.student, "student"), (e.reference, "reference")]
        + [(s.model, f"student {s.name}") for s in e.students]
        + [(g.model, f"generator {g.name}") for g in e.generators]
        + [(j.model, f"judge {j.name}") for j in e.judges]
    ):
        check_choice(f"dtype of {field}", model.dtype, DTYPES)
        check_choice(f"quantization of {field}", model.quantization, QUANTIZATIONS)
        reason = "its path is empty"
        _refuse_unread(f"revision of {field}", model.revision, "", model.path, reason)
    trained = "student is trained, and its policies are evaluated, with the weights that"
    for model, field, why in (
        (e.student, "student", trained),
        *((s.model, f"students[{s.name}].model", trained) for s in e.students),
        (
            e.reference,
            "reference",
            "reference must agree with the student, which has the weights that",
        ),
    ):
        if model.quantization:
            raise ConfigError(
                f"config.{field}.quantization is {model.quantization!r}, and the {why} its files "
                "have; leave it empty: generators and judges alone may be quantised."
            )
    for g in e.generators:
        _check_strength(f"temperature of generator {g.name!r}", g.temperature)
        _check_range(f"top_p of generator {g.name!r}", g.top_p, 1e-6, 1)
        _check_range(f"top_k of generator {g.name!r}", g.top_k, 0, 2**24, "no vocabulary has more")
        _check_count(f"samples of generator {g.name!r}", g.samples, high=10**6)
        _check_greedy(f"samples of generator {g.name!r}", g.samples, g.temperature)
        for field, value, off in (("top_p", g.top_p, 1.0), ("top_k", g.top_k, 0)):
            name, greedy = f"{field} of generator {g.name!r}", "its temperature is 0"
            _refuse_unread(name, value, off, g.temperature, greedy)
    for j in e.judges:
        check_choice(f"kind of judge {j.name!r}", j.kind, JUDGE_KINDS)
        _check_strength(f"noise of judge {j.name!r}", j.noise)
        _check_seed(f"seed of judge {j.name!r}", j.seed)
        if not j.dimensions:
            raise ConfigError(
                f"Judge {j.name!r} has no dimensions; name at least one of {', '.join(DIMENSIONS)}."
            )
        for dimension in j.dimensions:
            check_choice(f"dimension of judge {j.name!r}", dimension, DIMENSIONS)
        if len(set(j.dimensions)) < len(j.dimensions):
            raise ConfigError(
                f"dimensions of judge {j.name!r} is {j.dimensions!r}; name each once."
            )
        _check_mean(j, e.judges)
        kind = f"its kind is {j.kind!r}"
        noisy = j.kind == "exact" and j.noise
        silent = "its noise is 0" if j.kind == "exact" else kind
        for field, default, is_read, reason in (
            ("model", Model(), j.kind == "model", kind),
            ("noise", 0.0, j.kind == "exact", kind),
            ("seed", 0, noisy, silent),
            ("mesh", MeshShape(), j.kind == "model", kind),
            ("of", (), j.kind == "mean", kind),
        ):
            name = f"{field} of judge {j.name!r}"
            _refuse_unread(name, getattr(j, field), default, is_read, reason)
        if j.kind == "exact" and any(p.kind != "synthetic" for p in e.prompts):
            raise ConfigError(
                f"Judge {j.name!r} is exact and needs synthetic prompts; use kind 'model' for "
                "others."
            )


def _check_mean(judge: Judge, judges: Sequence[Judge]) -> None:
    """Checks that a mean is one of several judges that rate its dimensions."""
    if judge.kind != "mean":
        return
    others = {j.name: j for j in judges if j.kind != "mean"}
    for name in judge.of:
        check_choice(f"of of judge {judge.name!r} (a judge of another kind)", name, others)
    if len(set(judge.of)) < max(2, len(judge.of)):
        raise ConfigError(
            f"of of judge {judge.name!r} is {judge.of!r}; name at least two judges, each once."
        )
    for name in judge.of:
        for dimension in judge.dimensions:
            rated = others[name].dimensions
            check_choice(f"dimension of judge {judge.name!r}, rated by {name!r},", dimension, rated)


def _check_tuning(e: Experiment) -> None:
    """Checks the learning rates that objectives try, and the suites that choose among them."""
    suites = [suite.name for suite in e.suites if suite.readout == TUNING]
    tuned = [o for o in e.objectives if o.rates]
    if suites and not tuned:
        raise ConfigError(
            f"Suite {suites[0]!r} has the readout 'tuning' and no objective has rates to choose "
            "from; give an objective rates, or remove the suite."
        )
    for o in e.objectives:
        where, reason = f"of objective {o.name!r}", "its rates are empty"
        _refuse_unread(f"tuned_by {where}", o.tuned_by, "", o.rates, reason)
    for o in tuned:
        where, reason = f"of objective {o.name!r}", "its rates take its place"
        _refuse_unread(
            f"learning_rate {where}", o.learning_rate, Objective.learning_rate, False, reason
        )
        for rate in o.rates:
            _check_range(f"rates {where}", rate, 1e-12, 1)
        if len(o.rates) < 2 or [f"{r:g}" for r in o.rates] != list(
            dict.fromkeys(f"{r:g}" for r in sorted(o.rates))
        ):
            raise ConfigError(
                f"rates {where} is {o.rates!r}; give at least two, ascending, that differ in their "
                "first six digits."
            )
        if not suites:
            raise ConfigError(
                f"Objective {o.name!r} has rates and no suite has the readout 'tuning'; add a "
                "suite of questions that choose among them."
            )
        own = [a.name for a in e.arms if a.objective == o.name and not a.learning_rate]
        check_choice(f"tuned_by {where} (an arm of it without a rate of its own)", o.tuned_by, own)


def _check_objective(o: Objective, where: str) -> None:
    """Checks ranges, and refuses values that the kind ignores: they would misdescribe the arm."""
    _check_strength(f"beta {where}", o.beta, 1e-9)
    for field in ("learning_rate", "gamma", "nll_weight", "desirable_weight", "undesirable_weight"):
        _check_strength(f"{field} {where}", getattr(o, field))
    _check_range(f"label_smoothing {where}", o.label_smoothing, 0, 0.4999)
    _check_range(f"baseline_fraction {where}", o.baseline_fraction, 1e-9, 1)
    # field, default, the kinds that read it
    for field, default, kinds in (
        ("beta", 0.1, [k for k, v in OBJECTIVE_KINDS.items() if v.unit != "token"]),
        ("gamma", 0.5, ["simpo"]),
        ("desirable_weight", 1.0, [k for k, v in OBJECTIVE_KINDS.items() if v.unit == "example"]),
        ("undesirable_weight", 1.0, [k for k, v in OBJECTIVE_KINDS.items() if v.unit == "example"]),
        ("label_smoothing", 0.0, [k for k, v in OBJECTIVE_KINDS.items() if v.smoothed]),
        ("nll_weight", 0.0, [k for k, v in OBJECTIVE_KINDS.items() if v.unit == "pair"]),
        ("baseline_fraction", 1.0, [k for k, v in OBJECTIVE_KINDS.items() if v.baseline]),
    ):
        if getattr(o, field) != default and o.kind not in kinds:
            raise ConfigError(
                f"{field} {where} is {getattr(o, field)!r} and its kind {o.kind!r} has none; leave "
                f"it at {default} or choose one of {', '.join(map(repr, kinds))}."
            )


def _check_arms(e: Experiment) -> None:
    generators = {g.name: g for g in e.generators}
    judges = {j.name: j for j in e.judges}
    for name in e.shared_by:
        check_choice("config.shared_by", name, [g.name for g in e.generators])
    for a in e.arms:
        where = f"of arm {a.name!r}"
        check_choice(f"chosen {where}", a.chosen, generators)
        check_choice(f"rejected {where}", a.rejected, generators)
        check_choice(f"direction {where}", a.direction, (*UNJUDGED, *judges))
        _check_named(f"keep {where}", a.keep, KEEPS, SELECTION)
        check_choice(f"stratum {where}", a.stratum, STRATA)
        check_choice(f"objective {where}", a.objective, [o.name for o in e.objectives])
        check_choice(f"group {where}", a.group, GROUPS)
        _check_range(f"fraction {where}", a.fraction, 1e-9, 1)
        everything = "its keep is 'all'"
        _refuse_unread(f"fraction {where}", a.fraction, 1.0, a.keep != "all", everything)
        for field, values in (("seeds", a.seeds), ("draws", a.draws)):
            if not values or len(set(values)) < len(values) or min(values) < 0:
                raise ConfigError(
                    f"{field} {where} is {values!r}; give at least one {field[:-1]} from 0 upward, "
                    "each once."
                )
            _check_seed(f"{field} {where}", max(values))
        _check_count(f"steps {where}", a.steps, 0)
        _check_range(f"epochs {where}", a.epochs, 0, 10**6, "more could not be finished")
        _check_count(f"pairs_per_step {where}", a.pairs_per_step, 0)
        _check_strength(f"learning_rate {where}", a.learning_rate)
        if a.steps and a.epochs:
            raise ConfigError(
                f"steps {where} is {a.steps} and epochs {a.epochs:g}; set one of the two."
            )
        nothing = "nothing of its pairs is drawn"
        _refuse_unread(f"draws {where}", a.draws, (0,), draws_pairs(e, a), nothing)
        _check_samples(e, a, generators)
        _check_range(f"pairs {where}", a.pairs, 0, 2**40)
        _refuse_unread(f"pairs {where}", a.pairs, 0, a.keep != "all", everything)
        if a.pairs and a.fraction != 1.0:
            raise ConfigError(
                f"pairs {where} is {a.pairs} and fraction {a.fraction:g}; set one of the two."
            )
        if a.chosen == a.rejected and generators[a.chosen].samples < 2:
            raise ConfigError(
                f"Arm {a.name!r} pairs two samples of {a.chosen!r}; set its samples to at least 2."
            )
        rated = uses_ratings(a)
        # A function of the user's own may do without the ratings that it would be given.
        needed = uses_ratings(a if a.keep in KEEPS else dataclasses.replace(a, keep="all"))
        if needed and not judges:
            raise ConfigError(
                f"Arm {a.name!r} uses ratings, and config.judges is empty; add a judge."
            )
        if a.judge:
            check_choice(f"judge {where}", a.judge, judges)
            judged = a.direction not in UNJUDGED
            reason = f"its direction is {a.direction!r}" if judged else "no ratings shape its pairs"
            _refuse_unread(f"judge {where}", a.judge, "", rated and not judged, reason)
        if rated and judges and a.by != REFERENCE_MARGIN:
            dimensions = judges[judge_of(e, a)].dimensions
            check_choice(f"by {where}", a.by, ("sum", *dimensions, REFERENCE_MARGIN))
        unranked = f"its keep is {a.keep!r}"
        rated_samples = {"best", "worst"} & set(samples_of(a)) and a.by != REFERENCE_MARGIN
        _refuse_unread(f"by {where}", a.by, "sum", a.keep in RANKED or rated_samples, unranked)
        if a.keep in KEEPS and a.keep != "all" and a.fraction == 1 and not a.pairs:
            raise ConfigError(
                f"keep {where} is {a.keep!r} and its fraction of 1 keeps every pair; set fraction "
                "below 1, or pairs, or leave keep at 'all'."
            )
        if a.direction == "coin":
            _check_coin(e, a)
    _check_shared_strata(e)
    _check_balance(e)


def _check_coin(e: Experiment, a: Arm) -> None:
    """Refuses what tells the two sides of a pair apart after a coin was thrown: no placebo is left.

    A stratum of right over wrong pairs would keep those that the coin left, or turned, so. A loss
    that raises the chosen trace more than it lowers the rejected one, or less, moves both.
    """
    for field, allowed in (("stratum", SYMMETRIC), ("keep", ("all", "random"))):
        value = getattr(a, field)
        if value not in allowed:
            raise ConfigError(
                f"{field} of arm {a.name!r} is {value!r}, which tells chosen from rejected, and "
                "its direction 'coin', whose pairs would be directed again; choose one of "
                f"{', '.join(map(repr, allowed))}."
            )
    o = next(o for o in e.objectives if o.name == a.objective)
    if OBJECTIVE_KINDS[o.kind].unit == "token" or o.nll_weight:
        raise ConfigError(
            f"direction of arm {a.name!r} is 'coin', and its objective {o.name!r} imitates the "
            "chosen traces, whoever wrote them, so that it is no placebo; choose an objective of "
            "pairs or examples without nll_weight."
        )
    if o.kind == "apo_down" or o.desirable_weight != o.undesirable_weight:
        raise ConfigError(
            f"direction of arm {a.name!r} is 'coin', and its objective {o.name!r} on average moves "
            "both traces of a pair the same way, whoever wrote them, so that it is no placebo; "
            "choose a kind other than 'apo_down', and desirable_weight equal to undesirable_weight."
        )


def _check_samples(e: Experiment, a: Arm, generators: Mapping[str, Generator]) -> None:
    """Refuses a choice among samples where there is one sample, or that no stratum's pair has."""
    for side, name in (("chosen", a.chosen), ("rejected", a.rejected)):
        field = f"{side}_sample of arm {a.name!r}"
        which = check_choice(field, getattr(a, f"{side}_sample"), SAMPLES)
        if which != "first" and generators[name].samples < 2:
            raise ConfigError(
                f"{field} is {which!r}, and generator {name!r} writes one trace of a prompt; set "
                "its samples to at least 2."
            )
    for stratum in (a.stratum, *(e.shared_strata if a.stratum in e.shared_strata else ())):
        verdicts = _VERDICTS.get(stratum, ("", ""))
        # A judge or a coin may turn the pair around before its stratum is read.
        ways = [verdicts] if a.direction == "generator" else [verdicts, verdicts[::-1]]
        if all(
            any({"right", "wrong"} == set(both) for both in zip(way, samples_of(a), strict=True))
            for way in ways
        ):
            raise ConfigError(
                f"Arm {a.name!r} takes the samples {samples_of(a)!r} of chosen and rejected, and "
                f"no pair of these is in the stratum {stratum!r}; choose others in chosen_sample, "
                "rejected_sample or stratum."
            )


def _check_balance(e: Experiment) -> None:
    """Refuses a ladder whose rungs can't be balanced."""
    balance = check_choice("config.balance", e.balance, BALANCES)
    rungs = [a for a in e.arms if is_balanced(e, a)]
    if balance and len({(a.chosen, a.rejected) for a in rungs}) < 2:
        raise ConfigError(
            f"config.balance is {balance!r} and the ladder has fewer than two rungs; leave it at "
            "'', or give two arms of group 'ladder' other generators and nothing else that differs."
        )
    for a in rungs:
        if a.keep != "all" or uses_ratings(a):
            why = f"keep is {a.keep!r}" if a.keep != "all" else "pairs are shaped by ratings"
            raise ConfigError(
                f"Arm {a.name!r} is a rung of a ladder with config.balance {balance!r}, and its "
                f"{why}; give it another group, or leave config.balance at ''."
            )


def _check_shared_strata(e: Experiment) -> None:
    """Refuses strata that can't share prompts, and arms whose pairs are turned around later."""
    strata = e.shared_strata
    for stratum in strata:
        check_choice("config.shared_strata", stratum, [s for s in STRATA if s != "any"])
    arms = [a for a in e.arms if a.stratum in strata]
    if strata and (len(set(strata)) < max(2, len(strata)) or not arms):
        missing = "" if arms else ", and no arm has one of them as its stratum"
        raise ConfigError(
            f"config.shared_strata is {strata!r}{missing}; name at least two strata of arms, each "
            "once."
        )
    generators = {g.name: g for g in e.generators}
    for a in arms:
        if a.direction != "generator":
            raise ConfigError(
                f"direction of arm {a.name!r} is {a.direction!r}, and its stratum {a.stratum!r} is "
                "one of config.shared_strata, whose pairs are found as the generators wrote them; "
                "leave it at 'generator'."
            )
        for i, name in enumerate((a.chosen, a.rejected)):
            wanted = {_VERDICTS[stratum][i] for stratum in strata} - {""}
            if len(wanted) > 1 and generators[name].samples < 2:
                raise ConfigError(
                    "config.shared_strata needs a right and a wrong trace of a prompt by generator "
                    f"{name!r}, which writes one; set its samples to at least 2."
                )


def _check_claim(field: str, claim: Claim, e: Experiment) -> None:
    """Checks that the claim names what it compares, and nothing else."""
    check_choice(f"{field}.kind", claim.kind, CLAIM_KINDS)
    check_choice(f"{field}.domain", claim.domain, domains_of(e.suites))
    _check_range(f"{field}.margin", claim.margin, 1e-9, 100)
    arms, of_kind = [a.name for a in e.arms], f"its kind is {claim.kind!r}"
    if claim.kind == "slope":
        check_choice(f"{field}.objective", claim.objective, [o.name for o in e.objectives])
        rungs = len(ladder_of(e, claim.objective))
        if rungs < 3:
            raise ConfigError(
                f"{field} is the slope of a ladder of {claim.objective!r}, which has {rungs} arms "
                "that differ in their generators alone; a slope needs at least 3."
            )
        if "in" not in domains_of(e.suites):
            raise ConfigError(
                f"{field} is a slope on the generator delta, which is measured in domain, and no "
                "suite is averaged there; add one of domain 'in' without a readout, or claim a "
                "contrast."
            )
    else:
        check_choice(f"{field}.a", claim.a, arms)
    if claim.kind == "contrast":
        check_choice(f"{field}.b", claim.b, [name for name in arms if name != claim.a])
    _refuse_unread(f"{field}.a", claim.a, "", claim.kind != "slope", of_kind)
    _refuse_unread(f"{field}.b", claim.b, "", claim.kind == "contrast", of_kind)
    _refuse_unread(f"{field}.objective", claim.objective, "", claim.kind == "slope", of_kind)


def _check_lora(lora: Lora) -> None:
    _check_range("config.training.lora.rank", lora.rank, 0, 2**16, "no matrix is as wide")
    _check_strength("config.training.lora.alpha", lora.alpha, 1e-9)
    for target in lora.targets:
        check_choice("config.training.lora.targets", target, LORA_TARGETS)
    if len(set(lora.targets)) < len(lora.targets):
        raise ConfigError(
            f"config.training.lora.targets is {lora.targets!r}; name some of "
            f"{', '.join(LORA_TARGETS)}, each once."
        )
    if not lora.rank and lora != Lora():
        raise ConfigError(
            "config.training.lora has alpha or targets and the rank 0, with which all weights are "
            "trained; set config.training.lora.rank, or leave the others as they are."
        )


def _check_training(t: Training) -> None:
    check_choice("config.training.budget", t.budget, BUDGETS)
    check_choice("config.training.schedule", t.schedule, ("linear", "cosine", "constant"))
    check_choice("config.training.remat", t.remat, ("auto", *REMATS))
    check_choice("config.training.moments", t.moments, DTYPES)
    _check_lora(t.lora)
    # Traces are scored whole, so a study cannot truncate them.
    check_choice("config.training.over_length", t.over_length, ("drop", "error"))
    for field, value in (
        ("pairs_per_step", t.pairs_per_step),
        ("steps", t.steps),
        ("checkpoint_every", t.checkpoint_every),
        ("keep_checkpoints", t.keep_checkpoints),
    ):
        _check_count(f"config.training.{field}", value)
    _check_rows("config.training", t.rows, t.row_length)
    _check_range("config.training.epochs", t.epochs, 1e-9, 10**6, "more could not be finished")
    for field in ("steps", "epochs"):
        value, default = getattr(t, field), getattr(Training(), field)
        reason = f"config.training.budget is {t.budget!r}"
        _refuse_unread(f"config.training.{field}", value, default, t.budget == field, reason)
    _check_range("config.training.warmup", t.warmup, 0, 1)
    _check_strength("config.training.clip", t.clip, 1e-9, 1e30)
    _check_strength("config.training.weight_decay", t.weight_decay)
    for finish in t.finishes:
        check_choice("config.training.finishes", finish, ("eos", "stop", "length"))


def _check_sampling(s: Sampling) -> None:
    _check_size("config.sampling.max_prompt", s.max_prompt)
    _check_size("config.sampling.max_tokens", s.max_tokens)
    _check_size("config.sampling.slots", s.slots, 2**20)
    _check_size("config.sampling.chunk", s.chunk)
    _check_count("config.sampling.shard", s.shard)
    if "" in s.stop:
        raise ConfigError(
            "config.sampling.stop holds an empty string, which every text contains; remove it."
        )
    _check_mesh("config.sampling.mesh", s.mesh)


def _check_mesh(field: str, mesh: MeshShape, row_length: tuple[str, int] | None = None) -> None:
    """Checks the sizes of a mesh; `row_length`: field and value of what its context divides."""
    sizes = dataclasses.asdict(mesh)
    if list(sizes.values()).count(-1) > 1 or min(sizes.values()) < -1:
        raise ConfigError(
            f"{field} is {mesh.stated}; sizes are positive, 0 where they are to be chosen, "
            "and at most one is -1."
        )
    for axis, size in sizes.items():
        _check_range(f"{field}.{axis}", size, -1, 2**20, "no pod has more devices")
    if row_length is None:
        if mesh.context not in (0, 1):
            raise ConfigError(
                f"{field}.context is {mesh.context}, and decoding has no rows to split; leave it "
                "at 0."
            )
    elif mesh.context > 1 and row_length[1] % mesh.context:
        raise ConfigError(
            f"{row_length[0]} is {row_length[1]} and {field}.context splits each row over "
            f"{mesh.context} devices; make row_length a multiple of that."
        )


def _check_meshes(e: Experiment) -> None:
    """Checks the meshes of all stages and models, as far as that needs no devices."""
    training = "config.training.row_length", e.training.row_length
    scoring = "config.scoring.row_length", e.scoring.row_length
    _check_mesh("config.training.mesh", e.training.mesh, training)
    _check_mesh("config.scoring.mesh", e.scoring.mesh, scoring)
    for i, judge in enumerate(e.judges):
        _check_mesh(f"config.judges[{i}].mesh", judge.mesh, scoring)
    for i, generator in enumerate(e.generators):
        _check_mesh(f"config.generators[{i}].mesh", generator.mesh)


def _check_sizes(e: Experiment) -> None:
    """Checks sampling, scoring and the meshes."""
    _check_sampling(e.sampling)
    _check_rows("config.scoring", e.scoring.rows, e.scoring.row_length)
    _check_count("config.scoring.shard", e.scoring.shard)
    _check_meshes(e)
