"""Every bad value gives one sentence with field, value and remedy; a good config passes."""

import copy
import dataclasses
import pickle
import re
import sys
import typing

import pytest

from deltapref_jax.config import (
    TRACKERS,
    Arm,
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Lora,
    MeshShape,
    Model,
    ModelZoo,
    Objective,
    PairTraining,
    Prompts,
    SmallModel,
    Suite,
    model_of,
)
from deltapref_jax.validation import validate, validate_model_zoo

GOOD = Experiment(
    name="good",
    question="?",
    student=Model("here"),
    prompts=(Prompts(tasks=("chain", "shop"), count=4), Prompts(kind="jsonl", path="x.jsonl")),
    generators=(Generator(name="weak", samples=2), Generator(name="strong", model=Model("there"))),
    judges=(
        Judge(name="m", kind="model", dimensions=("factuality", "signal_to_noise")),
        Judge(name="n", kind="model"),
    ),
    objectives=(Objective(name="dpo"), Objective(name="kto", kind="kto")),
    arms=(
        Arm(name="a", chosen="strong", rejected="weak"),
        Arm(name="zero", chosen="weak", rejected="weak", objective="kto"),
        Arm(
            name="top", chosen="strong", rejected="weak", keep="top", by="factuality", fraction=0.5
        ),
    ),
    suites=(Suite(name="s", prompts=Prompts(tasks=("shop",), count=5)),),
)
CASES = [  # path of a field, value, sentence
    ("name", "", "config.name is empty; name the experiment."),
    ("name", 3, "config.name is 3; it must be text."),
    ("seed", -1, "config.seed is -1; it must be at least 0."),
    ("trackers", ("mlflow",), "config.trackers is 'mlflow'; choose one of 'tensorboard', 'wandb'."),
    ("trackers", "wandb", "config.trackers is 'wandb'; it must be a tuple, such as (value,)."),
    ("student", "here", "config.student is 'here'; it must be a Model."),
    ("prompts", (), "config.prompts is empty; name at least one source of training questions."),
    (
        "prompts",
        Prompts(),
        "config.prompts is Prompts(*; it must be a tuple of parts, such as (Prompts(…),), or ().",
    ),
    (
        "generators",
        [],
        "config.generators is []; it must be a tuple of parts, such as (Generator(…),), or ().",
    ),
    ("arms", (1,), "config.arms[0] is 1; it must be an Arm."),
    (
        "generators",
        (),
        "chosen of arm 'a' is 'strong' and the config has none to choose from; add it.",
    ),
    (
        "name",
        "../../x",
        "config.name, '../../x', holds a slash, which separates labels; use another sign.",
    ),
    ("name", ".x", "config.name, '.x', begins with a dot, which hides a folder; remove it."),
    (
        "generators.0.name",
        ".x",
        "The name of generator '.x' begins with a dot, which hides a folder; remove it.",
    ),
    (
        "prompts.0.tasks",
        (),
        "config.prompts[0].tasks is empty; name at least one task for kind 'synthetic'.",
    ),
    (
        "prompts.0.tasks",
        "chain",
        "config.prompts[0].tasks is 'chain'; it must be a tuple, such as (value,).",
    ),
    (
        "prompts.0.count",
        1,
        "config.prompts[0].count is 1; it must be at least 2, the number of its tasks.",
    ),
    ("prompts.0.difficulty", 0, "config.prompts[0].difficulty is 0; it must be at least 1."),
    ("prompts.0.seed", -3, "config.prompts[0].seed is -3; it must be at least 0."),
    (
        "prompts.1.path",
        "",
        "config.prompts[1].path is empty; kind 'jsonl' needs a file, folder or data set name.",
    ),
    (
        "prompts.1.checker",
        "regex",
        "config.prompts[1].checker is 'regex'; choose one of '', 'world', 'reasoning_gym', "
        "'math', 'exact'.",
    ),
    ("prompts.1.count", -2, "config.prompts[1].count is -2; it must be at least 0."),
    ("generators.0.name", "", "A generator has no name; give every generator one."),
    (
        "generators.0.name",
        "we\x1bak",
        r"The name of generator 'we\x1bak' holds a control character; use letters, digits and "
        "signs that can be seen.",
    ),
    (
        "arms.1.name",
        "..",
        "The name of arm '..' is of no use as a name; give it 1 to 200 characters that are not all "
        "dots.",
    ),
    (
        "name",
        "x\ny",
        r"config.name, 'x\ny', holds a control character; use letters, digits and signs that can "
        "be seen.",
    ),
    (
        "suites.0.name",
        "x" * 201,
        "The name of suite 'xx* is of no use as a name; give it 1 to 200 characters that are not "
        "all dots.",
    ),
    ("generators.0.name", "strong", "Two generators are named 'strong'; names must differ."),
    (
        "generators.1.top_p",
        0.0,
        "top_p of generator 'strong' is 0.0; it must be at least 1e-06 and at most 1.",
    ),
    ("generators.1.top_k", -1, "top_k of generator 'strong' is -1; it must be at least 0."),
    ("generators.1.samples", 0, "samples of generator 'strong' is 0; it must be at least 1."),
    (
        "generators.1.samples",
        2.5,
        "config.generators[1].samples is 2.5; it must be a whole number.",
    ),
    (
        "generators.1.temperature",
        "1",
        "config.generators[1].temperature is '1'; it must be a number.",
    ),
    (
        "generators.1.model.dtype",
        "fp8",
        "dtype of generator strong is 'fp8'; choose one of 'float32', 'bfloat16'.",
    ),
    (
        "judges.0.dimensions",
        (),
        "Judge 'm' has no dimensions; name at least one of factuality, strategy_coherence, "
        "step_coherence, numerical_precision, signal_to_noise.",
    ),
    (
        "judges.0.dimensions",
        ("style",),
        "dimension of judge 'm' is 'style'; choose one of 'factuality', *.",
    ),
    (
        "judges.0.kind",
        "exact",
        "Judge 'm' is exact and needs synthetic prompts; use kind 'model' for others.",
    ),
    ("judges.0.noise", -0.1, "noise of judge 'm' is -0.1; it must be at least 0."),
    ("judges.0.seed", -1, "seed of judge 'm' is -1; it must be at least 0."),
    ("judges", (), "Arm 'top' uses ratings, and config.judges is empty; add a judge."),
    (
        "objectives.1.kind",
        "ppo",
        "kind of objective 'kto' is 'ppo'; choose one of 'dpo', 'dpo_norm', *, 'kto', "
        "'apo_zero_unpaired', 'sft'.",
    ),
    (
        "objectives.0.label_smoothing",
        0.1,
        "label_smoothing of objective 'dpo' is 0.1 and its kind 'dpo' has none; "
        "leave it at 0.0 or choose one of 'robust', 'cdpo'.",
    ),
    (
        "objectives",
        (Objective(name="r", kind="robust", label_smoothing=0.5),),
        "label_smoothing of objective 'r' is 0.5; it must be at least 0 and at most 0.4999.",
    ),
    (
        "objectives.0.gamma",
        2.0,
        "gamma of objective 'dpo' is 2.0 and its kind 'dpo' has none; leave it at 0.5 or "
        "choose one of 'simpo'.",
    ),
    (
        "objectives.0.desirable_weight",
        3.0,
        "desirable_weight of objective 'dpo' is 3.0 and its kind 'dpo' has none; "
        "leave it at 1.0 or choose one of 'kto', 'apo_zero_unpaired'.",
    ),
    ("objectives.0.gamma", -0.5, "gamma of objective 'dpo' is -0.5; it must be at least 0."),
    (
        "objectives.0.nll_weight",
        -1.0,
        "nll_weight of objective 'dpo' is -1.0; it must be at least 0.",
    ),
    (
        "objectives.1.nll_weight",
        1.0,
        "nll_weight of objective 'kto' is 1.0 and its kind 'kto' has none; leave it at "
        "0.0 or choose one of 'dpo', *, 'simpo'.",
    ),
    (
        "objectives.1.baseline_fraction",
        0.0,
        "baseline_fraction of objective 'kto' is 0.0; it must be at least 1e-09 and at most 1.",
    ),
    (
        "objectives.0.baseline_fraction",
        0.5,
        "baseline_fraction of objective 'dpo' is 0.5 and its kind 'dpo' has none; "
        "leave it at 1.0 or choose one of 'kto'.",
    ),
    ("objectives.0.beta", 0.0, "beta of objective 'dpo' is 0.0; it must be at least 1e-09."),
    (
        "objectives.0.learning_rate",
        -1e-4,
        "learning_rate of objective 'dpo' is -0.0001; it must be at least 0.",
    ),
    (
        "objectives.0.learning_rate",
        float("inf"),
        "learning_rate of objective 'dpo' is inf; it must be at least 0 and at most 1e+06, for a "
        "larger one is a typing error.",
    ),
    (
        "objectives.1.desirable_weight",
        -1.0,
        "desirable_weight of objective 'kto' is -1.0; it must be at least 0.",
    ),
    (
        "objectives.1.undesirable_weight",
        -1.0,
        "undesirable_weight of objective 'kto' is -1.0; it must be at least 0.",
    ),
    ("arms.0.rejected", "none", "rejected of arm 'a' is 'none'; choose one of 'weak', 'strong'."),
    (
        "arms.0.direction",
        "coin",
        "direction of arm 'a' is 'coin'; choose one of 'generator', 'm', 'n'.",
    ),
    (
        "arms.0.keep",
        "best",
        "keep of arm 'a' is 'best'; choose one of 'all', 'top', 'random', 'matched'.",
    ),
    (
        "arms.0.stratum",
        "wrong",
        "stratum of arm 'a' is 'wrong'; choose one of 'any', *, 'right_wrong'.",
    ),
    (
        "arms.0.group",
        "other",
        "group of arm 'a' is 'other'; choose one of 'ladder', 'selection', 'control'.",
    ),
    (
        "arms.0.fraction",
        0.0,
        "fraction of arm 'a' is 0.0; it must be at least 1e-09 and at most 1.",
    ),
    (
        "arms.0.seeds",
        (),
        "seeds of arm 'a' is (); give at least one seed from 0 upward, each once.",
    ),
    (
        "arms.0.seeds",
        (1, 1),
        "seeds of arm 'a' is (1, 1); give at least one seed from 0 upward, each once.",
    ),
    (
        "arms.0.seeds",
        (-1,),
        "seeds of arm 'a' is (-1,); give at least one seed from 0 upward, each once.",
    ),
    ("arms.0.seeds", 0, "config.arms[0].seeds is 0; it must be a tuple, such as (value,)."),
    ("arms.0.seeds", (0, "1"), "config.arms[0].seeds[1] is '1'; it must be a whole number."),
    (
        "arms.0.fraction",
        0.5,
        "fraction of arm 'a' is 0.5 and nothing reads it, for its keep is 'all'; leave it at 1.0.",
    ),
    ("arms.0.judge", "me", "judge of arm 'a' is 'me'; choose one of 'm', 'n'."),
    (
        "arms.2",
        Arm("top", "strong", "weak", direction="m", judge="n"),
        "judge of arm 'top' is 'n' and nothing reads it, for its direction is 'm'; leave it at ''.",
    ),
    (
        "arms.2",
        Arm("top", "strong", "weak", direction="m", by="step_coherence"),
        "by of arm 'top' is 'step_coherence'; choose one of 'sum', 'factuality', "
        "'signal_to_noise'.",
    ),
    (
        "judges.0.noise",
        0.5,
        "noise of judge 'm' is 0.5 and nothing reads it, for its kind is 'model'; leave it at 0.0.",
    ),
    (
        "judges.0.seed",
        1,
        "seed of judge 'm' is 1 and nothing reads it, for its kind is 'model'; leave it at 0.",
    ),
    (
        "judges.0",
        Judge("m", seed=1),
        "seed of judge 'm' is 1 and nothing reads it, for its noise is 0; leave it at 0.",
    ),
    (
        "judges.0",
        Judge("m", model=Model("there")),
        "model of judge 'm' is Model(path='there', dtype='float32', revision='') and nothing reads "
        "it, for its kind is 'exact'; leave it at Model(path='', dtype='float32', revision='').",
    ),
    (
        "generators.0.model",
        Model(revision="v1"),
        "revision of generator * is 'v1' and nothing reads it, for its path is empty; "
        "leave it at ''.",
    ),
    (
        "reference",
        Model(revision="v1"),
        "revision of reference is 'v1' and nothing reads it, for its path is empty; leave it at "
        "''.",
    ),
    (
        "prompts.1.name",
        "main",
        "config.prompts[1].name is 'main' and nothing reads it, for its kind is 'jsonl'; leave it "
        "at ''.",
    ),
    (
        "prompts.1.revision",
        "v1",
        "config.prompts[1].revision is 'v1' and nothing reads it, for its kind is 'jsonl'; leave "
        "it at ''.",
    ),
    (
        "prompts.1.difficulty",
        3,
        "config.prompts[1].difficulty is 3 and nothing reads it, for its kind is 'jsonl'; leave it "
        "at 2.",
    ),
    (
        "prompts.1.tasks",
        ("chain",),
        "config.prompts[1].tasks is ('chain',) and nothing reads it, for its kind is 'jsonl'; "
        "leave it at ().",
    ),
    (
        "prompts.1.split",
        "test",
        "config.prompts[1].split is 'test' and nothing reads it, for its kind is 'jsonl'; leave it "
        "at 'train'.",
    ),
    (
        "prompts.0.checker",
        "math",
        "config.prompts[0].checker is 'math' and nothing reads it, for its kind is 'synthetic'; "
        "leave it at ''.",
    ),
    (
        "suites.0.prompts",
        Prompts("jsonl", "x.jsonl"),
        "config.suites[0].prompts.checker is empty, and a suite counts the answers that are right; "
        "set it to 'math' or 'exact'.",
    ),
    (
        "training.epochs",
        2.0,
        "config.training.epochs is 2.0 and nothing reads it, for config.training.budget is "
        "'steps'; leave it at 1.0.",
    ),
    (
        "reference.dtype",
        "bfloat16",
        "config.reference.dtype is 'bfloat16' and nothing reads it, for config.reference.path is "
        "empty; leave it at 'float32'.",
    ),
    ("arms.2.judge", "me", "judge of arm 'top' is 'me'; choose one of 'm', 'n'."),
    (
        "arms.2.by",
        "step_coherence",
        "by of arm 'top' is 'step_coherence'; choose one of 'sum', 'factuality', "
        "'signal_to_noise'.",
    ),
    (
        "generators.0.samples",
        1,
        "Arm 'zero' pairs two samples of 'weak'; set its samples to at least 2.",
    ),
    ("suites.0.samples", 0, "config.suites[0].samples is 0; it must be at least 1."),
    ("suites.0.temperature", -1.0, "config.suites[0].temperature is -1.0; it must be at least 0."),
    (
        "suites.0.prompts.kind",
        "csv",
        "config.suites[0].prompts.kind is 'csv'; choose one of 'synthetic', *, 'tfds'.",
    ),
    (
        "training.budget",
        "hours",
        "config.training.budget is 'hours'; choose one of 'steps', 'epochs'.",
    ),
    (
        "training.schedule",
        "step",
        "config.training.schedule is 'step'; choose one of 'linear', 'cosine', 'constant'.",
    ),
    (
        "training.over_length",
        "cut",
        "config.training.over_length is 'cut'; choose one of 'drop', 'error'.",
    ),
    ("training.pairs_per_step", 0, "config.training.pairs_per_step is 0; it must be at least 1."),
    ("training.epochs", 0.0, "config.training.epochs is 0.0; it must be at least 1e-09."),
    ("training.warmup", 1.5, "config.training.warmup is 1.5; it must be at least 0 and at most 1."),
    ("training.clip", 0.0, "config.training.clip is 0.0; it must be at least 1e-09."),
    ("training.weight_decay", -0.1, "config.training.weight_decay is -0.1; it must be at least 0."),
    (
        "training.finishes",
        ("end",),
        "config.training.finishes is 'end'; choose one of 'eos', 'stop', 'length'.",
    ),
    (
        "training.finishes",
        "eos",
        "config.training.finishes is 'eos'; it must be a tuple, such as (value,).",
    ),
    ("training.steps", True, "config.training.steps is True; it must be a whole number."),
    ("sampling.chunk", 0, "config.sampling.chunk is 0; it must be at least 1."),
    (
        "sampling.stop",
        "\n\n",
        r"config.sampling.stop is '\n\n'; it must be a tuple, such as (value,).",
    ),
    (
        "training.steps",
        10**23,
        "config.training.steps is 100000000000000000000000; it must be at least 1 and at most "
        "1,000,000,000, for more could not be finished.",
    ),
    (
        "prompts.0.count",
        10**15,
        "config.prompts[0].count is 1000000000000000; it must be at least 0 and at most "
        "100,000,000, for more could not be finished.",
    ),
    (
        "generators.0.samples",
        10**12,
        "samples of generator 'weak' is 1000000000000; it must be at least 1 and at most "
        "1,000,000, for more could not be finished.",
    ),
    (
        "arms.0.seeds",
        (0, 2**63),
        "seeds of arm 'a' is 9223372036854775808; it must be at least 0 and at most "
        "9,223,372,036,854,775,807, for seeds have 63 bits.",
    ),
    (
        "training.rows",
        2**22,
        "config.training has 4,194,304 rows of 512 tokens; the positions of one pass are counted "
        "in 31 bits, so make rows or row_length smaller.",
    ),
    (
        "student.path",
        "a\0b",
        r"config.student.path is 'a\x00b'; a text has no NUL character.",
    ),
    ("scoring.shard", 0, "config.scoring.shard is 0; it must be at least 1."),
    (
        "training.mesh",
        MeshShape(-1, -1),
        "config.training.mesh is data=-1 fsdp=-1; sizes are positive, 0 where they are to "
        "be chosen, and at most one is -1.",
    ),
    (
        "generators.1.mesh.tensor",
        -2,
        "config.generators[1].mesh is tensor=-2; sizes are positive, 0 where they are to "
        "be chosen, and at most one is -1.",
    ),
    (
        "scoring.mesh.fsdp",
        2**30,
        "config.scoring.mesh.fsdp is 1073741824; it must be at least -1 and at most 1,048,576, for "
        "no pod has more devices.",
    ),
    (
        "sampling.mesh.context",
        2,
        "config.sampling.mesh.context is 2, and decoding has no rows to split; leave it at 0.",
    ),
    (
        "generators.0.mesh.context",
        2,
        "config.generators[0].mesh.context is 2, and decoding has no rows to split; leave it at 0.",
    ),
    (
        "judges.1",
        Judge(name="n", kind="exact", mesh=MeshShape(2)),
        "mesh of judge 'n' is data=2 and nothing reads it, for its kind is 'exact'; leave it at 0 "
        "in every size.",
    ),
    (
        "training.remat",
        "all",
        "config.training.remat is 'all'; choose one of 'none', 'projections', 'attention', "
        "'block'.",
    ),
    (
        "training.moments",
        "int8",
        "config.training.moments is 'int8'; choose one of 'float32', 'bfloat16'.",
    ),
    ("training.lora.rank", -1, "config.training.lora.rank is -1; it must be at least 0."),
    ("training.lora.rank", 8.0, "config.training.lora.rank is 8.0; it must be a whole number."),
    (
        "training.lora",
        Lora(8, 0.0),
        "config.training.lora.alpha is 0.0; it must be at least 1e-09.",
    ),
    (
        "training.lora",
        Lora(8, targets=("q_proj", "lm_head")),
        "config.training.lora.targets is 'lm_head'; choose one of 'q_proj', *, 'down_proj'.",
    ),
    (
        "training.lora",
        Lora(8, targets=()),
        "config.training.lora.targets is (); name at least one of q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj, each once.",
    ),
    (
        "training.lora",
        Lora(8, targets=("q_proj", "q_proj")),
        "config.training.lora.targets is ('q_proj', 'q_proj'); name at least one of q_proj, *, "
        "each once.",
    ),
    (
        "training.lora.targets",
        "q_proj",
        "config.training.lora.targets is 'q_proj'; it must be a tuple, such as (value,).",
    ),
    (
        "training.lora.alpha",
        32.0,
        "config.training.lora has alpha or targets and the rank 0, with which all weights "
        "are trained; set config.training.lora.rank, or leave the others as they are.",
    ),
    (
        "training.mesh.context",
        7,
        "config.training.row_length is 512 and config.training.mesh.context splits each row over 7 "
        "devices; make row_length a multiple of that.",
    ),
]


def changed(path, value):
    e = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    if last.isdigit():  # an item of a tuple
        items = list(getattr(e, way[0]))
        items[int(last)] = value
        way, last, value = [], way[0], tuple(items)
    at = e
    for step in way:
        at = at[int(step)] if step.isdigit() else getattr(at, step)
    setattr(at, last, value)
    return e


CONFIGS = (Experiment, PairTraining, ModelZoo)


def parts_of(kind):
    """A config class and those of its fields, at any depth."""
    parts = {kind}
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                parts |= parts_of(part)
    return parts


@pytest.mark.parametrize(
    "kind", sorted(set().union(*map(parts_of, CONFIGS)), key=str), ids=lambda kind: kind.__name__
)
def test_an_attribute_that_is_no_field_cannot_be_set(kind):
    part = kind()
    fields = [field.name for field in dataclasses.fields(part)]
    with pytest.raises(ConfigError) as error:
        setattr(part, f"{fields[-1]}x", 1)
    assert str(error.value) == (
        f"{kind.__name__} has no field '{fields[-1]}x' (did you mean '{fields[-1]}'?); it has "
        f"{', '.join(fields)}."
    )
    with pytest.raises(ConfigError, match=rf"^{kind.__name__} has no field 'QQQ'; it has"):
        part.QQQ = 1
    for copied in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part)):
        assert copied == part == dataclasses.replace(part)
        with pytest.raises(ConfigError):
            copied.QQQ = 1


def test_two_fields_that_are_one_object_are_refused():
    e = copy.deepcopy(GOOD)
    e.suites = (Suite(name="s", prompts=e.prompts[0]),)
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        "config.prompts[0] and config.suites[0].prompts are one and the same object, so that a "
        "flag for one would change both; build a Prompts for each."
    )
    e.suites = (Suite(name="s", prompts=dataclasses.replace(e.prompts[0])),)
    validate(e)
    e.generators[0].model = e.student
    with pytest.raises(
        ConfigError, match=r"^config\.generators\[0\]\.model and config\.student are"
    ):
        validate(e)


def test_a_reference_that_no_objective_reads_is_refused():
    e = copy.deepcopy(GOOD)
    e.objectives, e.reference = (Objective(name="dpo", kind="sft"),), Model("there")
    e.arms = e.arms[:1]
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        "config.reference.path is 'there' and nothing reads it, for no arm's objective has a "
        "reference; leave it at ''."
    )


@pytest.mark.parametrize(("path", "value", "sentence"), CASES, ids=lambda x: str(x)[:30])
def test_a_bad_value_is_one_sentence(path, value, sentence):
    with pytest.raises(ConfigError) as error:
        validate(changed(path, value))
    assert re.fullmatch(re.escape(sentence).replace(r"\*", ".*"), str(error.value)), str(
        error.value
    )


def test_a_number_that_python_does_not_write_is_one_sentence():
    with pytest.raises(ConfigError) as error:
        validate(changed("training.steps", 10**5000))
    assert str(error.value) == (
        "config.training.steps is a number of thousands of digits; it must be at least 1 and at "
        "most 1,000,000,000, for more could not be finished."
    )


def test_what_is_right_passes_unchanged():
    e = copy.deepcopy(GOOD)
    assert validate(e) is e
    assert e == GOOD


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("generators.1.temperature", 0),
        ("arms.0.fraction", 1),
        ("objectives.0.learning_rate", 0.0),
        ("training.mesh.data", 4),
        ("sampling.mesh.fsdp", -1),
        ("objectives.0.nll_weight", 1),
        ("objectives.1.baseline_fraction", 0.1),
        (
            "objectives",
            (
                Objective(name="dpo", kind="cdpo", label_smoothing=0.4),
                Objective(name="kto", kind="kto"),
            ),
        ),
        ("training.lora", Lora(8, 32, ("v_proj",))),
        ("training.moments", "bfloat16"),
        ("arms.2.by", "sum"),
        ("arms.2.judge", "n"),
        ("arms.1.direction", "n"),
        ("training.warmup", 1.0),
    ],
)
def test_what_is_just_right(path, value):
    assert validate(changed(path, value)) == changed(path, value)


def test_an_empty_path_is_the_students():
    assert model_of(GOOD, Model(dtype="bfloat16")) == Model("here", "bfloat16")
    assert model_of(GOOD, Model("there")) == Model("there")


def test_a_nursery_is_typed_too():
    with pytest.raises(
        ConfigError, match=r"^config\.models\[0\]\.tasks is 'chain'; it must be a tuple, such as "
    ):
        validate_model_zoo(ModelZoo(models=(SmallModel(name="oak", tasks="chain"),)))


def test_a_tracker_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(TRACKERS, "wandb", "no_such_package")
    with pytest.raises(ConfigError) as error:
        validate(dataclasses.replace(GOOD, trackers=("wandb",)))
    assert str(error.value) == (
        "config.trackers has 'wandb' and no_such_package is not installed; pip install "
        "no_such_package."
    )


def test_reasoning_gym_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    gym = Prompts(kind="reasoning_gym", tasks=("gcd",), count=1)
    with pytest.raises(ConfigError) as error:
        validate(dataclasses.replace(GOOD, prompts=(gym,)))
    assert str(error.value) == (
        "Prompts of kind 'reasoning_gym' need the package reasoning-gym, which is not installed; "
        "run pip install 'deltapref-jax[gym]'."
    )
