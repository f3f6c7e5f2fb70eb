"""Every bad value gives one sentence with field, value and remedy; a good config passes."""

import copy
import dataclasses
import pickle
import re
import sys
import types
import typing

import pytest

from deltapref_jax.config import (
    TRACKERS,
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
    PairTraining,
    Prompts,
    SmallModel,
    Student,
    Suite,
    Training,
    as_many_at_random,
    budget_twin,
    claims_of,
    differing,
    domains_of,
    greedy_twin,
    is_balanced,
    model_of,
    objective_of,
    samples_of,
    training_of,
)
from deltapref_jax.validation import validate, validate_model_zoo

FEW_RUNGS = (
    "config.balance is 'correctness' and the ladder has fewer than two rungs; leave it at '', or "
    "give two arms of group 'ladder' other generators and nothing else that differs."
)
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
        "generators.0.name",
        "student",
        "A generator is named 'student', which tables and programs call the model that is trained; "
        "give it another name.",
    ),
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
        "generators.1.model.quantization",
        "int4",
        "quantization of generator strong is 'int4'; choose one of '', 'int8', 'fp8'.",
    ),
    (
        "student.quantization",
        "int8",
        "config.student.quantization is 'int8', and the student is trained, and its policies are "
        "evaluated, with the weights that its files have; leave it empty: generators and judges "
        "alone may be quantised.",
    ),
    (
        "reference",
        Model("there", quantization="fp8"),
        "config.reference.quantization is 'fp8', and the reference must agree with the student, "
        "which has the weights that its files have; leave it empty: generators and judges alone "
        "may be quantised.",
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
        "dice",
        "direction of arm 'a' is 'dice'; choose one of 'generator', 'coin', 'm', 'n'.",
    ),
    (
        "arms.0.keep",
        "best",
        "keep of arm 'a' is 'best'; choose one of 'all', 'top', *, 'random', 'matched'.",
    ),
    (
        "arms.0.stratum",
        "wrong",
        "stratum of arm 'a' is 'wrong'; choose one of 'any', *, 'wrong_right'.",
    ),
    (
        "arms.0.chosen_sample",
        "last",
        "chosen_sample of arm 'a' is 'last'; choose one of 'first', 'best', *, 'wrong'.",
    ),
    (
        "arms.0.chosen_sample",
        "best",
        "chosen_sample of arm 'a' is 'best', and generator 'strong' writes one trace of a prompt; "
        "set its samples to at least 2.",
    ),
    (
        "arms.0.by",
        "reference_margin",
        "by of arm 'a' is 'reference_margin' and nothing reads it, for its keep is 'all'; leave it "
        "at 'sum'.",
    ),
    (
        "balance",
        "length",
        "config.balance is 'length'; choose one of '', 'correctness', 'chosen_length'.",
    ),
    (
        "shared_strata",
        ("both_right", "any"),
        "config.shared_strata is 'any'; choose one of 'chosen_right', *, 'wrong_right'.",
    ),
    (
        "shared_strata",
        ("both_right", "both_wrong"),
        "config.shared_strata is ('both_right', 'both_wrong'), and no arm has one of them as its "
        "stratum; name at least two strata of arms, each once.",
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
        "'signal_to_noise', 'reference_margin'.",
    ),
    (
        "arms.2",
        Arm("top", "strong", "weak", direction="m", judge="m"),
        "judge of arm 'top' is 'm' and nothing reads it, for its direction is 'm'; leave it at ''.",
    ),
    (
        "arms.0.judge",
        "m",
        "judge of arm 'a' is 'm' and nothing reads it, for no ratings shape its pairs; leave it at "
        "''.",
    ),
    (
        "arms.2",
        Arm("top", "strong", "weak", keep="random", fraction=0.5, judge="n"),
        "judge of arm 'top' is 'n' and nothing reads it, for no ratings shape its pairs; leave it "
        "at ''.",
    ),
    (
        "arms.2",
        Arm("top", "strong", "weak", keep="top", by="reference_margin", fraction=0.5, judge="n"),
        "judge of arm 'top' is 'n' and nothing reads it, for no ratings shape its pairs; leave it "
        "at ''.",
    ),
    (
        "arms.0.by",
        "step_coherence",
        "by of arm 'a' is 'step_coherence' and nothing reads it, for its keep is 'all'; leave it "
        "at 'sum'.",
    ),
    (
        "arms.2.keep",
        "random",
        "by of arm 'top' is 'factuality' and nothing reads it, for its keep is 'random'; leave it "
        "at 'sum'.",
    ),
    (
        "arms.2",
        Arm("top", "strong", "weak", direction="m", by="factuality"),
        "by of arm 'top' is 'factuality' and nothing reads it, for its keep is 'all'; leave it at "
        "'sum'.",
    ),
    (
        "arms.1",
        Arm("zero", "weak", "weak", chosen_sample="best", by="reference_margin"),
        "by of arm 'zero' is 'reference_margin' and nothing reads it, for its keep is 'all'; leave "
        "it at 'sum'.",
    ),
    (
        "arms.2.fraction",
        1.0,
        "keep of arm 'top' is 'top' and its fraction of 1 keeps every pair; set fraction below 1, "
        "or pairs, or leave keep at 'all'.",
    ),
    *(
        (
            "arms.0",
            Arm("a", "strong", "weak", direction="coin", stratum=stratum),
            f"stratum of arm 'a' is '{stratum}', which tells chosen from rejected, and its "
            "direction 'coin', whose pairs would be directed again; choose one of 'any', "
            "'both_right', 'both_wrong'.",
        )
        for stratum in ("chosen_right", "right_wrong", "wrong_right")
    ),
    *(
        (
            "arms.0",
            Arm("a", "strong", "weak", direction="coin", keep=keep, fraction=0.5),
            f"keep of arm 'a' is '{keep}', which tells chosen from rejected, and its direction "
            "'coin', whose pairs would be directed again; choose one of 'all', 'random'.",
        )
        for keep in ("top", "bottom", "middle", "matched")
    ),
    (
        "judges.0.dimensions",
        ("factuality", "factuality"),
        "dimensions of judge 'm' is ('factuality', 'factuality'); name each once.",
    ),
    (
        "generators.1",
        Generator("strong", temperature=0.0, top_p=0.9),
        "top_p of generator 'strong' is 0.9 and nothing reads it, for its temperature is 0; leave "
        "it at 1.0.",
    ),
    (
        "generators.1",
        Generator("strong", temperature=0.0, top_k=4),
        "top_k of generator 'strong' is 4 and nothing reads it, for its temperature is 0; leave it "
        "at 0.",
    ),
    (
        "generators.0.temperature",
        0.0,
        "samples of generator 'weak' is 2 and its temperature is 0, at which all samples are one; "
        "leave samples at 1, or set the temperature above 0.",
    ),
    (
        "suites.0",
        Suite("s", "in", Prompts(tasks=("shop",), count=5), samples=4, temperature=0.0),
        "config.suites[0].samples is 4 and its temperature is 0, at which all samples are one; "
        "leave samples at 1, or set the temperature above 0.",
    ),
    (
        "suites",
        (*GOOD.suites, Suite("t", "out", Prompts(tasks=("shop",), count=5), readout="tuning")),
        "config.suites[1].domain is 'out' and nothing reads it, for its readout is 'tuning'; leave "
        "it at 'in'.",
    ),
    (
        "prompts.1.seed",
        3,
        "config.prompts[1].seed is 3 and nothing reads it, for its count is 0; leave it at 0.",
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
        "model of judge 'm' is Model(path='there', dtype='float32', quantization='', revision='') "
        "and nothing reads it, for its kind is 'exact'; leave it at Model(path='', "
        "dtype='float32', quantization='', revision='').",
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
        "'signal_to_noise', 'reference_margin'.",
    ),
    (
        "generators.0.samples",
        1,
        "Arm 'zero' pairs two samples of 'weak'; set its samples to at least 2.",
    ),
    ("arms.0.steps", -1, "steps of arm 'a' is -1; it must be at least 0."),
    ("arms.0.epochs", -0.5, "epochs of arm 'a' is -0.5; it must be at least 0."),
    ("arms.0.pairs_per_step", -4, "pairs_per_step of arm 'a' is -4; it must be at least 0."),
    ("arms.0.learning_rate", -1e-4, "learning_rate of arm 'a' is -0.0001; it must be at least 0."),
    (
        "arms.0",
        Arm("a", "strong", "weak", steps=10, epochs=2.0),
        "steps of arm 'a' is 10 and epochs 2; set one of the two.",
    ),
    (
        "judges.1.of",
        ("m",),
        "of of judge 'n' is ('m',) and nothing reads it, for its kind is 'model'; leave it at ().",
    ),
    (
        "judges.1",
        Judge("n", kind="mean", of=("m", "n")),
        "of of judge 'n' (a judge of another kind) is 'n'; choose one of 'm'.",
    ),
    (
        "judges.1",
        Judge("n", kind="mean", of=("m",), dimensions=("factuality",)),
        "of of judge 'n' is ('m',); name at least two judges, each once.",
    ),
    (
        "judges",
        (*GOOD.judges, Judge("o", kind="mean", of=("n", "m"))),
        "dimension of judge 'o', rated by 'm', is 'strategy_coherence'; choose one of "
        "'factuality', 'signal_to_noise'.",
    ),
    (
        "judges.1",
        Judge("n", kind="mean", seed=3),
        "of of judge 'n' is (); name at least two judges, each once.",
    ),
    (
        "suites.0.readout",
        "greedy",
        "config.suites[0].readout is 'greedy'; choose one of '', 'accuracy', 'pass', 'tuning'.",
    ),
    (
        "objectives.0.rates",
        (1e-3,),
        "rates of objective 'dpo' is (0.001,); give at least two, ascending, that differ in their "
        "first six digits.",
    ),
    (
        "objectives.0.rates",
        (1e-3, 1e-4),
        "rates of objective 'dpo' is (0.001, 0.0001); give at least two, ascending, that differ in "
        "their first six digits.",
    ),
    ("objectives.0.rates", (0.0, 1e-4), "rates of objective 'dpo' is 0.0; it must be *"),
    (
        "objectives.0.rates",
        (1e-4, 1e-3),
        "Objective 'dpo' has rates and no suite has the readout 'tuning'; add a suite of questions "
        "that choose among them.",
    ),
    (
        "objectives.0",
        Objective("dpo", learning_rate=1e-3, rates=(1e-4, 1e-3)),
        "learning_rate of objective 'dpo' is 0.001 and nothing reads it, for its rates take its "
        "place; leave it at 0.0001.",
    ),
    (
        "objectives.0.tuned_by",
        "a",
        "tuned_by of objective 'dpo' is 'a' and nothing reads it, for its rates are empty; leave "
        "it at ''.",
    ),
    (
        "suites",
        (*GOOD.suites, Suite("t", "in", Prompts(tasks=("shop",), count=5), readout="tuning")),
        "Suite 't' has the readout 'tuning' and no objective has rates to choose from; give an "
        "objective rates, or remove the suite.",
    ),
    (
        "suites.0.readout",
        "accuracy",
        "Every suite of config.suites is a second read-out, and none is averaged into a domain; "
        "leave the readout of one at ''.",
    ),
    (
        "suites.0.k",
        2,
        "config.suites[0].k is 2 and nothing reads it, for its readout is ''; leave it at 0.",
    ),
    (
        "suites.0",
        Suite("s", "in", Prompts(tasks=("shop",), count=5), samples=4, readout="pass", k=5),
        "config.suites[0].k is 5 and its samples 4; pass@k is measured on k samples or more, and k "
        "is at least 1.",
    ),
    (
        "suites.0",
        Suite("s", "in", Prompts(tasks=("shop",), count=5), samples=4, readout="pass"),
        "config.suites[0].k is 0 and its samples 4; pass@k is measured on k samples or more, and k "
        "is at least 1.",
    ),
    (
        "suites.0",
        Suite("s", "in", Prompts(tasks=("shop",), count=5), 4, 0.0, "pass", 2),
        "config.suites[0].temperature is 0, at which all samples of a question are one; set it "
        "above 0 for the readout 'pass'.",
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
        "config.training.remat is 'all'; choose one of 'auto', 'none', 'projections', "
        "'attention', 'block'.",
    ),
    (
        "training.moments",
        "int8",
        "config.training.moments is 'int8'; choose one of 'float32', 'bfloat16'.",
    ),
    (
        "training.offload_moments",
        1,
        "config.training.offload_moments is 1; it must be True or False.",
    ),
    ("training.steps", True, "config.training.steps is True; it must be a whole number."),
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
        Lora(8, targets=("q_proj", "q_proj")),
        "config.training.lora.targets is ('q_proj', 'q_proj'); name some of q_proj, *, each once.",
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


def of_students(**fields):
    """GOOD with two students, all of whose generators and judges have models of their own."""
    e = copy.deepcopy(GOOD)
    for item in (*e.generators, *e.judges):
        item.model = Model("theirs")
    e.student = Model()
    e.students = (
        Student(name="a", model=Model("here")),
        Student(name="b", model=Model("there", dtype="bfloat16")),
    )
    return dataclasses.replace(e, **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, ""),
        ({"table": "known.parquet", "reference": Model("one")}, ""),
        (
            {"student": Model("here")},
            "config.student and config.students are both set; leave config.student as Model(), or "
            "config.students empty.",
        ),
        (
            {"students": (Student(name="a", model=Model("here")),)},
            "config.students has one student; set config.student instead, or add another.",
        ),
        (
            {"students": (Student(name="a", model=Model("here")), Student(name="b"))},
            "The path of student 'b' is empty; give a Hugging Face folder, a hub name or a GGUF "
            "file.",
        ),
        (
            {"students": tuple(Student(name="a", model=Model(x)) for x in "xy")},
            "Two students are named 'a'; names must differ.",
        ),
        (
            {"students": tuple(Student(name=x, model=Model(x, "int8")) for x in "xy")},
            "dtype of student x is 'int8'; choose one of 'float32', 'bfloat16'.",
        ),
        (
            {
                "students": (
                    Student(name="a", model=Model("x")),
                    Student(name="b", model=Model("y", quantization="int8")),
                )
            },
            "config.students[b].model.quantization is 'int8', and the student is trained, and its "
            "policies are evaluated, with the weights that its files have; leave it empty: "
            "generators and judges alone may be quantised.",
        ),
        (
            {"generators": (Generator(name="weak"), Generator(name="strong", model=Model("x")))},
            "config.generators[weak].model.path is empty, which means the student's model, and "
            "config.students has several; name the model, so that all students learn from the same "
            "traces and ratings.",
        ),
        (
            {"judges": (Judge(name="m", kind="model"),)},
            "config.judges[m].model.path is empty, which means the student's model, and "
            "config.students has several; name the model, so that all students learn from the same "
            "traces and ratings.",
        ),
        (
            {"table": "known.parquet"},
            "config.table has the log-probabilities of one reference, and each of config.students "
            "is its own; leave the table empty, or set config.reference.path.",
        ),
    ],
)
def test_several_students_share_all_but_themselves(fields, sentence):
    e = of_students(**fields)
    if not sentence:
        assert validate(e) is e
        return
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == sentence


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


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"group": "control"},
            FEW_RUNGS,
        ),
        (
            {"keep": "random", "fraction": 0.5},
            "Arm 'a' is a rung of a ladder with config.balance 'correctness', and its keep is "
            "'random'; give it another group, or leave config.balance at ''.",
        ),
        # Arms that another directs are no rungs.
        ({"direction": "coin"}, FEW_RUNGS),
        ({"direction": "m"}, FEW_RUNGS),
        (
            {"rejected_sample": "worst", "by": "factuality"},
            "Arm 'a' is a rung of a ladder with config.balance 'correctness', and its pairs are "
            "shaped by ratings; give it another group, or leave config.balance at ''.",
        ),
        ({"draws": (0, 1)}, ""),
    ],
)
def test_a_ladder_that_is_balanced(fields, sentence):
    arms = (Arm("a", "strong", "weak", **fields), Arm("b", "weak", "weak", **fields))
    e = dataclasses.replace(copy.deepcopy(GOOD), arms=arms, balance="correctness")
    if not sentence:
        assert validate(e) is e
        return
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "fields", [{"stratum": "right_wrong"}, {"direction": "coin"}, {"keep": "random", "pairs": 2}]
)
def test_an_arm_of_the_group_that_is_no_rung_balances_nothing(fields):
    rungs = (Arm("a", "strong", "weak"), Arm("b", "weak", "weak"))
    e = dataclasses.replace(copy.deepcopy(GOOD), arms=rungs, balance="correctness")
    e.arms += (Arm("c", "strong", "weak", **fields),)
    assert [is_balanced(validate(e), a) for a in e.arms] == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "possible"),
    [
        ({"rejected_sample": "right", "stratum": "right_wrong"}, False),
        ({"chosen_sample": "wrong", "stratum": "right_wrong"}, False),
        ({"chosen_sample": "wrong", "stratum": "chosen_right"}, False),
        ({"rejected_sample": "wrong", "stratum": "wrong_right"}, False),
        ({"rejected_sample": "wrong", "stratum": "both_right", "direction": "coin"}, False),
        ({"rejected_sample": "right", "stratum": "right_wrong", "direction": "m"}, True),
        ({"rejected_sample": "wrong", "stratum": "right_wrong"}, True),
        ({"rejected_sample": "wrong", "stratum": "chosen_right"}, True),
        ({"chosen_sample": "right", "rejected_sample": "wrong"}, True),
    ],
)
def test_samples_that_a_stratum_rules_out(fields, possible):
    e = copy.deepcopy(GOOD)
    for g in e.generators:
        g.samples = 2
    e.arms = (arm := Arm("a", "strong", "weak", **fields),)
    if possible:
        assert validate(e) is e
        return
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        f"Arm 'a' takes the samples {samples_of(arm)!r} of chosen and rejected, and no pair of "
        f"these is in the stratum {arm.stratum!r}; choose others in chosen_sample, "
        "rejected_sample or stratum."
    )


def test_samples_that_a_stratum_of_the_same_prompts_rules_out():
    e = copy.deepcopy(GOOD)
    for g in e.generators:
        g.samples = 2
    e.arms = (Arm("a", "strong", "weak", stratum="wrong_right", rejected_sample="right"),)
    e.shared_strata = ("wrong_right", "both_right")
    assert validate(e) is e
    e.shared_strata = ("wrong_right", "both_wrong")
    with pytest.raises(ConfigError, match=r"no pair of these is in the stratum 'both_wrong'"):
        validate(e)


def test_a_slope_needs_a_suite_in_domain():
    e = copy.deepcopy(GOOD)
    e.arms += (Arm("third", "weak", "strong"),)
    e.generators[1].samples = 2
    e.arms[1].objective = "dpo"
    e.arms[2].group = "selection"
    slope = Claim(kind="slope", objective="dpo", domain="in")
    assert [c.kind for c in claims_of(e)] == ["slope"]
    e.claims = (slope,)
    assert validate(e) is e
    e.suites[0].domain = e.claims[0].domain = "out"
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        "config.claims[0] is a slope on the generator delta, which is measured in domain, and no "
        "suite is averaged there; add one of domain 'in' without a readout, or claim a contrast."
    )
    e.claims = ()
    assert claims_of(e) == () and validate(e) is e


@pytest.mark.parametrize(
    ("fields", "strata", "sentence"),
    [
        (
            {},
            ("both_wrong",),
            "config.shared_strata is ('both_wrong',); name at least two strata of arms, each once.",
        ),
        (
            {},
            ("both_wrong", "both_wrong"),
            "config.shared_strata is ('both_wrong', 'both_wrong'); name at least two strata of "
            "arms, each once.",
        ),
        (
            {"direction": "coin"},
            ("both_wrong", "right_wrong"),
            "direction of arm 'a' is 'coin', and its stratum 'both_wrong' is one of "
            "config.shared_strata, whose pairs are found as the generators wrote them; leave it at "
            "'generator'.",
        ),
        (
            {},
            ("both_wrong", "right_wrong"),
            "config.shared_strata needs a right and a wrong trace of a prompt by generator "
            "'strong', which writes one; set its samples to at least 2.",
        ),
        ({}, ("both_wrong", "wrong_right"), ""),
    ],
)
def test_strata_that_share_prompts(fields, strata, sentence):
    arm = Arm("a", "strong", "weak", stratum="both_wrong", **fields)
    e = dataclasses.replace(copy.deepcopy(GOOD), arms=(arm,), shared_strata=strata)
    if not sentence:
        assert validate(e) is e
        return
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "objective", [Objective("dpo", kind="sft"), Objective("dpo", nll_weight=0.2)]
)
def test_a_coin_is_no_placebo_for_what_imitates(objective):
    e = copy.deepcopy(GOOD)
    e.arms[0].direction = "coin"
    assert validate(e) is e
    e.objectives = (objective, e.objectives[1])
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        "direction of arm 'a' is 'coin', and its objective 'dpo' imitates the chosen traces, "
        "whoever wrote them, so that it is no placebo; choose an objective of pairs or examples "
        "without nll_weight."
    )


@pytest.mark.parametrize(
    ("objective", "moves"),
    [
        (Objective("dpo", kind="kto", desirable_weight=1.3), True),
        (Objective("dpo", kind="apo_zero_unpaired", undesirable_weight=0.5), True),
        (Objective("dpo", kind="kto", desirable_weight=0.5, undesirable_weight=0.5), False),
        (Objective("dpo", kind="apo_down"), True),
        (Objective("dpo", kind="apo_zero"), False),
    ],
)
def test_a_coin_is_no_placebo_for_what_moves_both_traces(objective, moves):
    e = copy.deepcopy(GOOD)
    e.arms[0].direction, e.objectives = "coin", (objective, e.objectives[1])
    if not moves:
        assert validate(e) is e
        return
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        "direction of arm 'a' is 'coin', and its objective 'dpo' on average moves both traces of a "
        "pair the same way, whoever wrote them, so that it is no placebo; choose a kind other than "
        "'apo_down', and desirable_weight equal to undesirable_weight."
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"direction": "coin", "stratum": "both_wrong"},
        {"direction": "coin", "keep": "random", "fraction": 0.5},
        {"direction": "coin", "chosen": "weak", "chosen_sample": "right"},
        {"chosen": "weak", "chosen_sample": "best", "by": "factuality", "judge": "m"},
        {"keep": "matched", "fraction": 0.5, "by": "factuality", "judge": "m"},
        {"keep": "no_file_functions:pick", "judge": "n"},
        {"keep": "top", "pairs": 3, "by": "reference_margin"},
    ],
)
def test_what_an_arm_reads_is_right(fields, monkeypatch):
    own = types.ModuleType("no_file_functions")
    own.pick = lambda candidates, k, seed: []
    monkeypatch.setitem(sys.modules, "no_file_functions", own)
    arm = Arm(**{"name": "a", "chosen": "strong", "rejected": "weak"} | fields)
    e = dataclasses.replace(copy.deepcopy(GOOD), arms=(arm,))
    assert validate(e) is e


def test_a_reference_that_a_selection_reads_is_right():
    e = copy.deepcopy(GOOD)
    e.objectives, e.reference = (Objective(name="dpo", kind="sft"),), Model("there")
    e.arms = (Arm("a", "strong", "weak", keep="bottom", by="reference_margin", fraction=0.5),)
    e.judges = ()
    assert validate(e) is e


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
        ("training.offload_moments", True),
        ("arms.2.by", "sum"),
        ("arms.2.judge", "n"),
        ("arms.1.direction", "n"),
        ("training.warmup", 1.0),
    ],
)
def test_what_is_just_right(path, value):
    assert validate(changed(path, value)) == changed(path, value)


def test_an_arm_may_have_a_budget_a_batch_and_a_learning_rate_of_its_own():
    by_steps = Training(steps=40, pairs_per_step=8, warmup=0.2)
    by_epochs = Training(budget="epochs", epochs=3.0)
    own = Arm("a", "strong", "weak", steps=10, pairs_per_step=4)
    assert training_of(by_steps, Arm()) is by_steps
    assert training_of(by_steps, own) == Training(steps=10, pairs_per_step=4, warmup=0.2)
    # What a budget does not read has its default, so that equal runs have equal keys.
    assert training_of(by_epochs, own) == Training(steps=10, pairs_per_step=4)
    assert training_of(by_steps, Arm(epochs=2.5)) == Training(
        budget="epochs", epochs=2.5, pairs_per_step=8, warmup=0.2
    )
    e = dataclasses.replace(GOOD, objectives=(Objective("dpo", learning_rate=3e-4),))
    assert objective_of(e, Arm()) == e.objectives[0]
    assert objective_of(e, Arm(learning_rate=1e-5)) == Objective("dpo", learning_rate=1e-5)


def test_an_arm_that_names_the_first_judge_is_one_that_names_none():
    named = dataclasses.replace(GOOD.arms[2], judge="m")
    other = dataclasses.replace(named, judge="n", by="sum")
    assert differing(GOOD, GOOD.arms[2], named) == set()
    assert differing(GOOD, GOOD.arms[2], other) == {"judge", "by"}
    assert differing(GOOD, Arm(direction="m"), Arm(direction="n")) == {"direction"}


def test_random_pairs_are_of_the_same_pool_if_the_same_ratings_choose_its_traces():
    top, at_random = GOOD.arms[2], dataclasses.replace(GOOD.arms[2], keep="random", by="sum")
    assert as_many_at_random(GOOD, top, at_random)
    assert as_many_at_random(GOOD, top, dataclasses.replace(at_random, judge="n"))
    best, worse = (
        dataclasses.replace(arm, chosen_sample="best", by=by)
        for arm, by in ((top, "factuality"), (at_random, "sum"))
    )
    assert not as_many_at_random(GOOD, best, worse)
    assert as_many_at_random(GOOD, best, dataclasses.replace(worse, by="factuality"))
    assert not as_many_at_random(GOOD, best, dataclasses.replace(worse, judge="n"))


def test_a_slope_is_of_rungs_that_differ_in_their_generators_alone():
    e = copy.deepcopy(GOOD)
    e.arms = tuple(Arm(f"a{i}", "strong", "weak", steps=i // 2) for i in range(3))
    e.claims = (Claim(kind="slope", objective="dpo", domain="in"),)
    with pytest.raises(ConfigError) as error:
        validate(e)
    assert str(error.value) == (
        "config.claims[0] is the slope of a ladder of 'dpo', which has 2 arms that differ in their "
        "generators alone; a slope needs at least 3."
    )
    e.arms[2].steps = 0
    assert validate(e) is e


def test_a_twin_has_the_other_budget():
    """Equal epochs are as many as the whole pool has in all steps, and equal steps likewise."""
    top = Arm("top", "strong", "weak", keep="top", fraction=0.25)
    twin = budget_twin(top, Training(steps=24))
    assert (twin.name, twin.steps, twin.epochs) == ("top-equal-epochs", 6, 0.0)
    assert differing(GOOD, top, twin) == {"steps"}
    assert budget_twin(dataclasses.replace(top, fraction=0.01), Training(steps=24)).steps == 1
    other = budget_twin(top, Training(budget="epochs", epochs=2.0))
    assert (other.name, other.steps, other.epochs) == ("top-equal-steps", 0, 8.0)
    # The twin of a twin is the arm with its budget written out.
    back = budget_twin(dataclasses.replace(other, name="x"), Training(steps=24))
    assert (back.steps, back.epochs) == (0, 32.0)
    validate(dataclasses.replace(copy.deepcopy(GOOD), arms=(top, twin, other)))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, "a fraction of 1"),
        ({"keep": "top", "pairs": 30}, "30 pairs"),
        ({"keep": "top", "fraction": -1.0}, "a fraction of -1"),
    ],
)
def test_a_twin_of_an_unknown_share_is_one_sentence(fields, kept):
    with pytest.raises(ConfigError) as error:
        budget_twin(Arm("a", **fields), Training())
    assert str(error.value) == (
        f"Arm 'a' keeps {kept}, and a twin of another budget needs a fraction below 1; set "
        "config.arms.fraction, or the twin's steps or epochs by hand."
    )


def test_a_greedy_twin_is_a_second_read_out_of_the_same_questions():
    e = copy.deepcopy(GOOD)
    e.suites[0].samples = 4
    twin = greedy_twin(e.suites[0])
    assert (twin.name, twin.samples, twin.temperature, twin.readout) == (
        "s-greedy",
        1,
        0.0,
        "accuracy",
    )
    assert twin.prompts == e.suites[0].prompts and twin.prompts is not e.suites[0].prompts
    e.suites += (
        twin,
        dataclasses.replace(
            twin, name="o", domain="out", prompts=Prompts(tasks=("shop",), count=5)
        ),
    )
    assert domains_of(validate(e).suites) == ["in"]
    claimed = dataclasses.replace(e, claims=(Claim(kind="change", a="a", domain="out"),))
    with pytest.raises(
        ConfigError, match=r"^config\.claims\[0\]\.domain is 'out'; choose one of 'in'"
    ):
        validate(claimed)


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
