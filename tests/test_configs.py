"""Every config is validated, planned, and its programs traced full-size; nothing is allocated."""

import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from deltapref_jax import stages
from deltapref_jax.artifacts.node import in_order
from deltapref_jax.config import NURSERY, ConfigError, ModelZoo, model_of
from deltapref_jax.judging.scorer import _label_probability_fn
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.decoder import empty_cache, unstacked
from deltapref_jax.models.sharding import ROWS
from deltapref_jax.models.spec import ModelSpec, Rope
from deltapref_jax.models.weights import abstract
from deltapref_jax.sampling.programs import Slots, advance, grow, insert, prefill
from deltapref_jax.scoring.logprobs import logprob_fn
from deltapref_jax.scoring.packing import PackedBatch, max_segments
from deltapref_jax.stages import nursery
from deltapref_jax.stages.study import plan
from deltapref_jax.training.state import Optimizer, TrainState
from deltapref_jax.training.step import Examples, Hyper, programs
from deltapref_jax.validation import validate, validate_model_zoo, validate_pair_training

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = sorted(f.stem for f in (ROOT / "configs").glob("*.py") if f.stem != "__init__")
STUDIES = [name for name in NAMES if name not in ("mine", "nursery", "train")]  # mine: test_docs
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


def shape_of(e, model):
    return SHAPES[pathlib.Path(model_of(e, model).path).name]


@pytest.fixture(autouse=True)
def nothing_is_allocated(one_device):
    held = sum(x.nbytes for x in jax.live_arrays())
    yield
    assert sum(x.nbytes for x in jax.live_arrays()) - held < 1 << 16


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(rows, length, branched=False):
    ids = array(jnp.int32, rows, length)
    return PackedBatch(ids, ids, ids, ids, ids if branched else None)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


@functools.cache
def trace_training(spec, dtype, kind, optimizer, rows, length, mesh, branched=False):
    segments = max_segments(rows, length)
    steps = programs(spec, dtype, kind, optimizer, segments, mesh)
    params = abstract(spec)[1]
    number, index = array(jnp.float32, segments), array(jnp.int32, segments)
    examples = Examples(index, index, number, number, number, number)
    grads, sums, s = jax.eval_shape(
        steps.gradient,
        params,
        nnx.State({}),
        packed(rows, length, branched),
        examples,
        Hyper(*[array(jnp.float32)] * len(Hyper._fields)),
    )
    assert shapes(grads) == shapes(params)
    assert {x.shape for x in sums.values()} == {()}
    assert s.shape == (segments,)
    state = TrainState(params, jax.eval_shape(optimizer.transform().init, params))
    after, norm = jax.eval_shape(steps.apply, state, grads, array(jnp.float32), array(jnp.uint32))
    assert shapes(after) == shapes(state)
    assert norm.shape == ()


@functools.cache
def trace_scoring(spec, dtype, rows, length, mesh):
    segments = max_segments(rows, length)
    sums, counts = jax.eval_shape(
        logprob_fn(spec, dtype, segments, mesh), abstract(spec)[1], packed(rows, length)
    )
    assert sums.shape == counts.shape == (segments,)
    assert sums.dtype == jnp.float32


@functools.cache
def trace_judging(spec, dtype, rows, length, mesh):
    p = jax.eval_shape(
        _label_probability_fn(spec, dtype, mesh),
        abstract(spec)[1],
        packed(rows, length, branched=True),
        array(jnp.int32, 2, 77),
        array(jnp.int32, 5),
    )
    assert (p.shape, p.dtype) == ((77, 5), jnp.float32)


@functools.cache
def trace_sampling(spec, dtype, slots, chunk, prompt, tokens, mesh):
    assert prompt + tokens <= spec.max_positions
    dtype, kept = jnp.dtype(dtype), {}
    graphdef, params = abstract(spec, dtype)

    def split(params):
        kept["graphdef"], weights = unstacked(graphdef, params)
        return weights

    weights = jax.eval_shape(split, params)
    cache = jax.eval_shape(lambda: empty_cache(spec, slots, 64, dtype))
    place = jax.sharding.NamedSharding(mesh, ROWS)
    prompts = jax.eval_shape(
        lambda w: prefill(kept["graphdef"], w, jnp.zeros((4, prompt), int), place), weights
    )
    longest = jax.eval_shape(lambda c: grow(c, prompt + tokens), cache)
    assert shapes(longest) == shapes(
        jax.eval_shape(lambda: empty_cache(spec, slots, prompt + tokens, dtype))
    )
    index = array(jnp.int32, slots)
    assert shapes(
        jax.eval_shape(insert, longest, prompts, index, index, array(jnp.int32))
    ) == shapes(longest)
    number = array(jnp.float32, slots)
    table = Slots(
        index, index, index, array(bool, slots), array(jnp.uint32, slots, 2), number, number, index
    )
    for filtered in (False, True):
        after, out = jax.eval_shape(
            functools.partial(advance, kept["graphdef"], decode_steps=chunk, filtered=filtered),
            weights,
            longest,
            table,
            array(jnp.int32, 2),
            array(jnp.int32),
            array(jnp.int32),
        )
        assert shapes(after) == shapes(longest)
        assert out.tokens.shape == out.logprobs.shape == (chunk, slots)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    assert f"--config=configs/{name}.py" in module.__doc__
    found = config(name)
    assert found.name == name
    assert found == config(name)  # nothing is shared between two calls


def stand_in_key(node):
    """The key, were the contents of every input its key."""
    return node.key({name: stand_in_key(source) for name, source in node.inputs().items()})


@pytest.mark.parametrize("study", STUDIES, indirect=True)
def test_studies_are_planned(study):
    report = plan(study)
    policies = {(arm, s): p for arm, seeds in report.policies.items() for s, p in seeds.items()}
    assert set(policies) == {(a.name, s) for a in study.arms for s in a.seeds}
    hashed = {stand_in_key(policy) for policy in policies.values()}
    assert len(hashed) == len(policies)
    assert {"in", "out"} == {s.domain for s in study.suites}
    used = {a.chosen for a in study.arms} | {a.rejected for a in study.arms}
    assert used == {g.name for g in study.generators}
    assert {a.objective for a in study.arms} == {o.name for o in study.objectives}


@pytest.mark.parametrize("study", STUDIES, indirect=True)
def test_programs_of_studies_are_traced(study, one_device):
    e, t, c, s = study, study.training, study.scoring, study.sampling
    student = shape_of(e, e.student)
    optimizer = Optimizer(t.clip, t.weight_decay)
    for o in e.objectives:
        trace_training(
            student, e.student.dtype, o.kind, optimizer, t.rows, t.row_length, one_device
        )
    trace_scoring(student, e.student.dtype, c.rows, c.row_length, one_device)
    for g in e.generators:
        trace_sampling(
            shape_of(e, g.model),
            g.model.dtype,
            s.slots,
            s.chunk,
            s.max_prompt,
            s.max_tokens,
            one_device,
        )
    for j in e.judges:
        if j.kind == "model":
            trace_judging(shape_of(e, j.model), j.model.dtype, c.rows, c.row_length, one_device)


def test_the_nursery_is_planned_and_its_programs_are_traced(one_device):
    found = validate_model_zoo(config("nursery"))
    assert isinstance(found, ModelZoo)
    models = nursery.plan(found)
    assert {p.name for p in found.models} == set(models)
    planned = in_order(models.values())
    assert {"tokenizer"} | {f"model/{name}" for name in models} == {n.name for n in planned}
    s = found.sampling
    for p in found.models:
        spec = SPECS[str(pathlib.Path(NURSERY) / p.name)]
        trace_training(
            spec,
            "float32",
            "sft",
            Optimizer(1.0, 0.01, b2=0.98),
            p.rows,
            p.row_length,
            one_device,
            branched=p.curriculum == "judge",
        )
        if p.name in found.release and p.curriculum == "solve":
            trace_sampling(
                spec, "float32", s.slots, s.chunk, s.max_prompt, s.max_tokens, one_device
            )


def test_a_single_arm_wants_data_and_student_and_its_programs_are_traced(one_device):
    single = config("train")
    with pytest.raises(ConfigError, match=r"^config\.data\.path is empty; give a "):
        validate_pair_training(single)
    single.data.path, (single.student.path, spec) = "pairs.jsonl", next(iter(HUB.items()))
    t = validate_pair_training(single).training
    trace_training(
        spec,
        single.student.dtype,
        single.objective.kind,
        Optimizer(t.clip, t.weight_decay),
        t.rows,
        t.row_length,
        one_device,
    )
    trace_scoring(spec, single.student.dtype, t.rows, t.row_length, one_device)


@pytest.mark.parametrize("name", STUDIES)
def test_models_that_ship_are_those_that_the_configs_name(name):
    e, release = config(name), config("nursery").release
    for model in models(e):
        if model.path.startswith(NURSERY):
            assert pathlib.Path(model.path).name in release
        else:
            assert model.path in ("", *HUB)
