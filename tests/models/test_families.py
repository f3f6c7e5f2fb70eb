"""Every family against `transformers`: `make_family_fixtures` wrote what is expected here.

`family_checks` compares, and `python -m tests.models.family_table` writes its figures to
docs/models.md.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, place, read_by_layer
from deltapref_jax.models.decoder import unstacked
from deltapref_jax.models.export import write_folder
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.sharding import shardings
from deltapref_jax.models.stored import open_folder, stored_shape
from deltapref_jax.models.weights import abstract, assemble
from tests.marks import mostly
from tests.models.family_checks import (
    BOUNDS,
    CASES,
    bfloat16_ratio,
    cached_difference,
    decode,
    devices_difference,
    gradient_difference,
    logits_difference,
    logits_of,
    packed,
    packed_difference,
    prefill,
    read_case,
    round_trip_differences,
    shared_difference,
)
from tests.models.family_table import HEAD, bounds, rows_of_page


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return read_case(request.param)


FEW = pytest.mark.parametrize(
    "case",
    mostly(
        pytest.mark.exhaustive,
        CASES,
        *map(CASES.index, ("llama", "gemma3", "phi3", "qwen3-moe", "gpt-oss")),
    ),
    indirect=True,
)
"""Families that differ the most, and all others where every case of every test is wanted."""


def test_logits_are_those_of_transformers(case):
    assert logits_difference(case) <= BOUNDS[logits_difference]


@FEW
@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_the_reference_is(case):
    assert bfloat16_ratio(case) <= BOUNDS[bfloat16_ratio]


@FEW
@pytest.mark.slow
def test_weights_in_the_dtype_of_the_computation_change_no_bit(case):
    """They are cast before products anyway, and norms stay float32."""
    stored = open_folder(case.folder)
    graphdef, lazy = assemble(stored, str(case.folder), "bfloat16", "bfloat16")
    state = jax.tree.map(np.asarray, lazy)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "bfloat16"}
    for tokens in case.rows:
        row = packed([tokens], 96)[:3]
        cast = logits_of(graphdef, case.state, *row)
        np.testing.assert_array_equal(np.asarray(logits_of(graphdef, state, *row)), cast)


@FEW
@pytest.mark.slow
def test_packed_rows_have_the_logits_of_their_sequences(case):
    assert packed_difference(case) <= BOUNDS[packed_difference]


@FEW
@pytest.mark.slow
def test_a_shared_prompt_changes_no_logit(case):
    difference = shared_difference(case)
    if difference is None:
        pytest.skip("LongRoPE: prompts are not shared, see dispatch.shares_prompts")
    assert difference <= BOUNDS[shared_difference]


@FEW
def test_greedy_decoding_in_a_cache_gives_the_same_tokens(case):
    prompt, greedy = case.expected["prompt"], case.expected["greedy"]
    length = len(prompt) + len(greedy)
    spec = case.spec.within(length)
    graphdef, state = unstacked(abstract(spec)[0], case.state)
    # As the sampler does: the prompt is padded, and its last token is fed again.
    padded = np.pad(prompt, (0, len(greedy)))[None]
    cache, found = prefill(graphdef, state, padded), []
    tokens, positions = prompt[None, -1:], np.asarray([[len(prompt) - 1]])
    while len(found) < len(greedy):
        logits, cache = decode(graphdef, state, tokens, positions, cache)
        found.append(int(np.argmax(logits[0, -1])))
        tokens, positions = np.asarray([[found[-1]]], np.int32), positions[:, -1:] + 1
    assert found == greedy.tolist()


@FEW
@pytest.mark.slow
def test_a_cache_has_the_logits_of_the_full_forward_pass(case):
    assert cached_difference(case) <= BOUNDS[cached_difference]


@FEW
@pytest.mark.slow
def test_the_gradient_of_a_dpo_step_is_that_of_torch(case):
    assert gradient_difference(case) <= BOUNDS[gradient_difference]


@FEW
@pytest.mark.slow
def test_eight_devices_have_the_gradient_of_one(case):
    assert devices_difference(case) <= BOUNDS[devices_difference]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_written_as_they_were_read(case, dtype, tmp_path):
    assert round_trip_differences(case, dtype, tmp_path) == 0


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases, and with
def test_float16_is_written_as_it_was_read(name, tmp_path):
    assert round_trip_differences(read_case(name), "float16", tmp_path) == 0
    dtypes = {x.dtype.name for x in load_file(tmp_path / "b" / "model.safetensors").values()}
    assert dtypes == {"float16"}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float16"
    biases = any(n.endswith(".bias") for n in load_file(tmp_path / "b" / "model.safetensors"))
    assert biases == (name == "qwen2")


def test_every_parameter_has_the_declared_shape(case):
    flat = nnx.to_pure_dict(case.state)
    for name, p in parameters(case.spec).items():
        array = flat["blocks"][p.short] if p.stacked else flat[name]
        assert array.shape == ((case.spec.layers,) if p.stacked else ()) + p.shape(case.spec)
        assert np.prod(stored_shape(p, case.spec)) * (p.shape(case.spec)[0] if p.batch else 1) == (
            np.prod(p.shape(case.spec))
        )
    assert case.spec.parameters == sum(x.size for x in jax.tree.leaves(case.state))


def test_transformers_reads_what_is_written(case, tmp_path):
    """Its config class gives the exported config.json the meaning of the first one."""
    from transformers import AutoConfig

    write_folder(case.state, case.spec, tmp_path, "float32", case.config)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.model_type == json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert open_folder(tmp_path).spec == case.spec


@pytest.mark.parametrize(
    "shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 4, "tensor": 2}], ids=str
)
def test_devices_read_their_own_parts(case, shape):
    """Parameters that are placed from their files equal those that are placed from the host."""
    mesh = make_mesh(MeshShape(**({"data": 1, "fsdp": 1} | shape)))
    _, lazy = assemble(open_folder(case.folder), str(case.folder))
    placed = place(lazy, shardings(case.state, mesh))
    for ours, whole in zip(jax.tree.leaves(placed), jax.tree.leaves(case.state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), whole)


def test_the_table_of_the_docs_is_within_its_bounds():
    """`python -m tests.models.family_table NAME` writes the row of a new fixture."""
    rows = rows_of_page()
    allowed = rows.pop("allowed")
    assert allowed == bounds()
    assert list(rows) == [name for name in CASES if name in rows]
    for name, row in rows.items():
        for column, figure, bound in zip(HEAD[1:], row[1:], allowed[1:], strict=True):
            if column == "round trip":
                assert figure == bound, (name, column)
            elif figure != "-":
                assert float(figure) <= float(bound), (name, column)


@FEW
def test_accelerators_get_their_parts_layer_by_layer(case):
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=4))
    _, lazy = assemble(open_folder(case.folder), str(case.folder))
    flat = zip(jax.tree.leaves(lazy), jax.tree.leaves(case.state), strict=True)
    places_ = jax.tree.leaves(shardings(case.state, mesh))
    for (x, whole), sharding in zip(flat, places_, strict=True):
        if x.ndim > 2:
            ours = read_by_layer(x, sharding, np.float32)
            assert ours.sharding == sharding
            np.testing.assert_array_equal(np.asarray(ours), whole)
