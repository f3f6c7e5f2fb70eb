"""Every config is validated, planned, and its programs traced full-size; nothing is allocated."""

import importlib
import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltapref_jax import stages
from deltapref_jax.artifacts.node import in_order
from deltapref_jax.config import NURSERY, ConfigError, ModelZoo, Objective
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.spec import ModelSpec, Rope
from deltapref_jax.pairs.build import build
from deltapref_jax.records import Trace
from deltapref_jax.sampling.plan import Plan
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.stages import nursery
from deltapref_jax.stages.programs import pair_programs, study_programs
from deltapref_jax.stages.study import plan
from deltapref_jax.synthetic.world import problem, solution
from deltapref_jax.training.loop import Run
from deltapref_jax.training.shapes import step_programs
from deltapref_jax.training.state import Optimizer
from deltapref_jax.validation import validate, validate_model_zoo, validate_pair_training
from tests.marks import mostly

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_CONFIGS = ("__init__", "by_size")  # modules that hold no config themselves
NAMES = sorted(f.stem for f in (ROOT / "configs").glob("*.py") if f.stem not in NO_CONFIGS)
# mine: tests/test_docs.py, paper: tests/launch/test_paper.py
STUDIES = [name for name in NAMES if name not in ("mine", "nursery", "paper", "train")]
HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelSpec(
        49_152, 576, 30, 9, 3, 64, 1536, ropes=(Rope(1e5),), max_positions=8192
    ),
    "gemma3-270m.gguf": spec_from_hf(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262_144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "max_position_embeddings": 32_768,
        }
    ),
}


PUBLISHED = ROOT / "tests" / "models" / "published"
HUB |= {
    file.parent.relative_to(PUBLISHED).as_posix(): spec_from_hf(json.loads(file.read_text()))
    for file in PUBLISHED.rglob("config.json")
}


def config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def small_models():
    """Shapes of the models that ship, from the config that trains them."""
    found = {}
    for p in config("nursery").models:
        base = found.get(p.base)
        found[p.name] = (
            ModelSpec(
                640,
                p.width,
                p.layers,
                p.heads,
                p.kv_heads,
                p.width // p.heads,
                p.mlp,
                max_positions=1024,
            )
            if base is None
            else type(base)(**vars(base) | {"layers": max(base.layers, p.layers)})
        )
    return {str(pathlib.Path(NURSERY) / name): spec for name, spec in found.items()}


SPECS = small_models() | HUB
SHAPES = {pathlib.Path(path).name: spec for path, spec in SPECS.items()}


def models(e):
    return [
        e.student,
        *([e.reference] if e.reference.path else []),
        *(g.model for g in e.generators),
        *(j.model for j in e.judges),
    ]


@pytest.fixture
def study(request, text, tmp_path, monkeypatch):
    """An experiment whose models have the right shape and no weights, so that it can be planned."""

    def inspect_shape(path):
        return SHAPES[pathlib.Path(path).name], text

    monkeypatch.setattr(stages.study, "inspect_model", inspect_shape)
    e = config(request.param)
    if "reasoning_gym" in {p.kind for p in (*e.prompts, *(s.prompts for s in e.suites))}:
        pytest.importorskip("reasoning_gym")
    validate(e)
    for model in models(e):
        if model.path:
            folder = tmp_path / pathlib.Path(model.path).name
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({"shape": repr(SPECS[model.path])}))
            save_file(
                {"name": np.frombuffer(folder.name.encode(), np.uint8)},
                folder / "model.safetensors",
            )
            model.path = str(folder)
    return e


@pytest.fixture(autouse=True)
def nothing_is_allocated(one_device):
    held = sum(x.nbytes for x in jax.live_arrays())
    yield
    assert sum(x.nbytes for x in jax.live_arrays()) - held < 1 << 16


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def trace(found):
    """Traces the programs of a study, and checks that what one returns the others take."""
    results = {each.label: each.program.result() for each in found}
    for each in found:
        args, result = each.program.args, results[each.label]
        if each.name == "gradient":
            grads, sums, s = result
            assert shapes(grads) == shapes(args[0])
            assert {x.shape for x in sums.values()} == {()}
            assert s.shape == args[3].weight.shape
        elif each.name == "zeros":
            gradient = next(x for x in found if (x.of, x.name) == (each.of, "gradient"))
            assert shapes(result) == shapes(gradient.program.args[5])
        elif each.name in ("insert", "add"):
            assert shapes(result) == shapes(args[0])
        elif each.name == "apply":
            assert shapes(result[0]) == shapes(args[0])
            assert result[1].shape == ()
        elif each.name == "logprobs":
            assert result[0].shape == result[1].shape == (max_segments(*args[1].tokens.shape),)
            assert result[0].dtype == jnp.float32
        elif each.name == "labels":
            assert (result.shape, result.dtype) == ((*args[1].tokens.shape, 5), jnp.float32)
        elif each.name == "decode":
            cache, chunk = result
            assert shapes(cache) == shapes(args[2])
            steps = each.program.kwargs["decode_steps"]
            assert chunk.tokens.shape == chunk.logprobs.shape == (steps, *args[3].token.shape)
        elif each.name == "grow":
            decode = next(x for x in found if (x.of, x.name) == (each.of, "decode"))
            assert shapes(result) == shapes(decode.program.args[2].v[0])
        else:
            insert = next(x for x in found if (x.of, x.name) == (each.of, "insert"))
            assert (each.name, shapes(result)) == ("prefill", shapes(insert.program.args[1]))
    return {each.label for each in found}


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    assert f"--config=configs/{name}.py" in module.__doc__
    found = config(name)
    assert found.name == name
    assert found == config(name)  # nothing is shared between two calls


def stand_in_keys(nodes):
    """The key of every node and of what it is made from, were the contents of each its key."""
    keys = {}
    for node in in_order(nodes):
        keys[node] = node.key({name: keys[source] for name, source in node.inputs().items()})
    return keys


@pytest.mark.parametrize("study", STUDIES, indirect=True)
def test_studies_are_planned(study):
    report = plan(study)
    policies = {(arm, s): p for arm, seeds in report.policies.items() for s, p in seeds.items()}
    assert set(policies) == {(a.name, run) for a in study.arms for run in a.runs}
    keys = stand_in_keys(policies.values())
    assert len({keys[policy] for policy in policies.values()}) == len(policies)
    assert {"in", "out"} == {s.domain for s in study.suites}
    used = {a.chosen for a in study.arms} | {a.rejected for a in study.arms}
    assert used == {g.name for g in study.generators}
    assert {a.objective for a in study.arms} == {o.name for o in study.objectives}


@pytest.mark.parametrize(
    "study",
    mostly(pytest.mark.slow, STUDIES, *map(STUDIES.index, ("delta_grid", "qwen_30b_a3b"))),
    indirect=True,
)
def test_programs_of_studies_are_traced(study, one_device):
    labels = trace(
        study_programs(
            study, lambda path: SHAPES[pathlib.Path(path).name], lambda shape, whole: one_device
        )
    )
    kinds = {o.kind for o in study.objectives}
    assert {f"train {kind}: gradient" for kind in kinds} <= labels
    assert ("train kto: logprobs" in labels) == ("kto" in kinds)
    assert "score reference: logprobs" in labels
    judges = {j.name for j in study.judges if j.kind == "model"}
    assert {f"judge {name}: labels" for name in judges} <= labels
    assert any(label.startswith("sample ") and label.endswith(": decode") for label in labels)


def test_the_nursery_is_planned_and_its_programs_are_traced(one_device):
    found = validate_model_zoo(config("nursery"))
    assert isinstance(found, ModelZoo)
    models = nursery.plan(found)
    assert {p.name for p in found.models} == set(models)
    planned = in_order(models.values())
    assert {"tokenizer"} | {f"model/{name}" for name in models} == {n.name for n in planned}
    for p in found.models:
        spec = SPECS[str(pathlib.Path(NURSERY) / p.name)]
        run = Run(
            Objective(kind="sft"), 1, p.rows, p.row_length, optimizer=Optimizer(1.0, 0.01, b2=0.98)
        )
        programs = step_programs(spec, run, one_device, branched=p.curriculum == "judge")
        assert shapes(programs["gradient"].result()[0]) == shapes(programs["gradient"].args[0])
        if p.name in found.release and p.curriculum == "solve":
            for filtered in (False, True):
                plan = Plan(spec, found.sampling, one_device, "float32")
                decode = plan.programs(filtered)["decode"]
                assert shapes(decode.result()[0]) == shapes(decode.args[2])


def test_a_single_arm_wants_data_and_student_and_its_programs_are_traced(one_device):
    single = config("train")
    with pytest.raises(ConfigError, match=r"^config\.data\.path is empty; give a "):
        validate_pair_training(single)
    single.data.path, (single.student.path, spec) = "pairs.jsonl", next(iter(HUB.items()))
    validate_pair_training(single)
    labels = trace(pair_programs(single, lambda path: spec, lambda shape, whole: one_device))
    assert {"train dpo: gradient", "train dpo: apply", "score reference: logprobs"} <= labels


@pytest.mark.parametrize("name", STUDIES)
def test_models_that_ship_are_those_that_the_configs_name(name):
    e, release = config(name), config("nursery").release
    for model in models(e):
        if model.path.startswith(NURSERY):
            assert pathlib.Path(model.path).name in release
        else:
            assert model.path in ("", *HUB)


@pytest.mark.parametrize("study", ["quickstart", "delta_grid"], indirect=True)
def test_the_reversed_arm_has_the_exchanged_pairs_of_the_arm_that_it_controls(study):
    """On solutions by what the generators believe, many of which are one text."""
    beliefs = {model.name: model.beliefs for model in config("nursery").models}
    problems = {f"{t} {i}": problem(t, 2, 100, i) for t in ("chain", "shop") for i in range(150)}
    traces, correct = {}, {}
    for g in study.generators:
        rng = random.Random(g.name)
        held = beliefs[pathlib.Path(g.model.path).name]
        traces[g.name] = []
        for prompt, asked in problems.items():
            for sample in range(g.samples):
                text, trace_id = solution(asked, rng, 0.02, held), f"{g.name} {sample} {prompt}"
                traces[g.name].append(
                    Trace(trace_id, prompt, g.name, "w", sample, text, np.arange(3), "eos", -1.0, 3)
                )
                correct[trace_id] = text.endswith(f"Answer: {asked.answer}")
    planned = plan(study).pairs
    made = {
        name: build(list(problems), traces, correct, {}, planned[name][0].rules)
        for name in ("dpo-fair", "dpo-strong", "dpo-reversed")
    }
    (rungs, counts), (turned, of_turned) = made["dpo-strong"], made["dpo-reversed"]
    assert [(p.prompt_id, p.chosen_id, p.rejected_id) for p in rungs] == [
        (p.prompt_id, p.rejected_id, p.chosen_id) for p in turned
    ]
    assert [p.chosen_correct for p in rungs] == [p.rejected_correct for p in turned]
    assert counts == of_turned and 0 < counts["dropped_identical"] < 290
    assert [p.prompt_id for p in rungs] == [p.prompt_id for p in made["dpo-fair"][0]]
