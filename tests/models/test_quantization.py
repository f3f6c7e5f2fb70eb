"""Quantised matrices: their bounds, their products, meshes, and decoding, for every family."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, place, shard
from deltapref_jax.models.decoder import empty_cache, unstacked
from deltapref_jax.models.parameters import parameters, weight_bytes
from deltapref_jax.models.quantization import (
    FORMATS,
    QuantisedMatrix,
    channel_scales,
    quantise,
)
from deltapref_jax.models.sharding import BATCH, RULES, path_name, shardings, spec_for
from deltapref_jax.models.spec import Experts, ModelSpec
from deltapref_jax.models.stored import open_folder
from deltapref_jax.models.weights import abstract, assemble, quantised_state
from tests.marks import mostly

HERE = Path(__file__).parent / "families"
CASES = sorted(folder.name for folder in HERE.iterdir())
BIG = ModelSpec(128_256, 4096, 32, 32, 8, 128, 14_336, tied=False)
SPARSE = dataclasses.replace(BIG, experts=Experts(8, 2, 512, True))


@dataclasses.dataclass(eq=False)
class Case:
    spec: ModelSpec
    graphdef: object
    state: object  # quantised, on the host
    dequantised: object  # float32 parameters of the decoder without quantization
    plain: object  # its structure
    rows: list


def case_of(name, quantization="int8"):
    stored = open_folder(HERE / name)
    graphdef, lazy = assemble(stored, name, quantization=quantization)
    plain, whole = assemble(stored, name)
    state, spec = jax.tree.map(np.asarray, lazy), stored.spec.quantised(quantization)
    flat = named(state)
    dequantised = jax.tree_util.tree_map_with_path(
        lambda path, x: dequantise(flat, parameters(spec)[path_name(path)], np.asarray(x)), whole
    )
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, spec.vocab, n) for n in (41, 23)]
    return Case(spec, graphdef, state, dequantised, plain, rows)


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def dequantise(flat, p, original):
    """q * scale of a matrix, and every other parameter as it is."""
    if p.scale not in flat:
        return original
    axes = tuple(range(1 + p.batch, 1 + p.batch + p.inputs))
    return flat[p.name].astype(np.float32) * np.expand_dims(flat[p.scale], axes)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return case_of(request.param)


FEW = pytest.mark.parametrize(
    "case",
    mostly(pytest.mark.exhaustive, CASES, *map(CASES.index, ("llama", "gemma3", "qwen3-moe"))),
    indirect=True,
)


def logits_from(model, hidden):
    return jnp.einsum(
        "bld,vd->blv", hidden, model.unembedding(), preferred_element_type=jnp.float32
    )


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_of(graphdef, state, batch, mesh=None):
    model = nnx.merge(graphdef, state)
    return logits_from(model, model.hidden(*batch, mesh=mesh))


@functools.partial(jax.jit, static_argnums=0)
def decode(graphdef, state, tokens, positions, cache):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.decode(tokens, positions, cache)
    return logits_from(model, hidden), cache


def batch_of(rows, length=48):
    """Every sequence in a row of its own."""
    tokens, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        positions[i, : len(row)] = np.arange(len(row))
        segments[i, : len(row)] = 1
    return tokens, positions, segments


def test_int8_weights_are_within_half_a_scale():
    w = np.random.default_rng(0).normal(size=(300, 4, 8)).astype(np.float32)
    w[:, 0, 0], w[:, 1, 1] = 0, np.abs(w[:, 1, 1]) * 1e-30
    scale = channel_scales(w, (0,), FORMATS["int8"])
    q = quantise(w, scale, FORMATS["int8"])
    assert scale.shape == (4, 8)
    assert q.dtype == np.int8
    np.testing.assert_array_equal(q[:, 0, 0], 0)
    others = scale[scale > np.finfo(np.float32).tiny]
    np.testing.assert_allclose(others, np.abs(w).max(0).ravel()[1:] / 127, rtol=1e-6)
    # The largest weight of every channel has the largest number, and the sign of no weight turns.
    assert (np.abs(q).max(axis=0).ravel()[1:] == 127).all()
    assert (q * w >= 0).all()
    error = np.abs(w - q.astype(np.float64) * scale)
    assert (error <= scale * (0.5 + 1e-5)).all()
    assert error.max() > 0.4 * scale.max()


def test_float8_weights_are_within_a_sixteenth_or_half_the_smallest_step():
    w = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    w[:1500] *= 1e-4
    scale = channel_scales(w, (0,), FORMATS["fp8"])
    q = quantise(w, scale, FORMATS["fp8"])
    assert np.isfinite(q.astype(np.float32)).all()
    error = np.abs(w - q.astype(np.float64) * scale)
    assert (error <= np.maximum(np.abs(w) / 16, scale / 1024) * (1 + 1e-5)).all()


def test_quantised_weights_of_any_part_are_those_of_the_whole():
    w = np.random.default_rng(0).normal(size=(3, 2, 16, 24)).astype(np.float32)
    matrix = QuantisedMatrix(w, 1, 1, FORMATS["int8"], "w")
    whole, scales = np.asarray(matrix), np.asarray(matrix.scales)
    expected = channel_scales(w, (2,), FORMATS["int8"])
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(whole, quantise(w, expected[:, :, None], FORMATS["int8"]))
    part = (slice(1, 3), slice(0, 1), slice(4, 9), slice(8, 20))
    fresh = QuantisedMatrix(w, 1, 1, FORMATS["int8"], "w")
    np.testing.assert_array_equal(fresh[part], whole[part])
    np.testing.assert_array_equal(fresh.scales[(*part[:2], part[3])], scales[1:3, :1, 8:20])


def test_channels_are_read_once_for_scales_and_once_for_weights():
    class Counted:
        shape, read = (2, 16, 24), 0

        def __getitem__(self, index):
            part = np.ones(self.shape, np.float32)[index]
            Counted.read += part.size
            return part

    matrix = QuantisedMatrix(Counted(), 0, 1, FORMATS["int8"], "w")
    np.asarray(matrix), np.asarray(matrix.scales)
    assert Counted.read == 2 * 16 * 24
    # Four devices that divide the inputs read the whole once more than their parts.
    Counted.read, matrix = 0, QuantisedMatrix(Counted(), 0, 1, FORMATS["int8"], "w")
    for i in range(4):
        assert matrix[:, 4 * i : 4 * i + 4, :].shape == (2, 4, 24)
    assert Counted.read == 2 * 2 * 16 * 24


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(value):
    w = np.ones((2, 4, 4), np.float32)
    w[1, 2, 3] = value
    with pytest.raises(
        ValueError,
        match=r"^Parameter blocks\.q of m has a weight that is not finite in layer 1 and cannot be "
        r"quantised; check the model's weights, or fetch it again\.$",
    ):
        np.asarray(QuantisedMatrix(w, 0, 1, FORMATS["int8"], "Parameter blocks.q of m"))


@pytest.mark.parametrize("spec", [BIG, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("quantization", sorted(FORMATS))
def test_exactly_one_rule_matches_every_quantised_leaf(spec, quantization):
    spec = spec.quantised(quantization)
    shapes = named(abstract(spec)[1])
    scales = {name for name in shapes if name.endswith("_scale")}
    assert len(scales) == 7
    for name, leaf in shapes.items():
        (rule,) = {rule for rule in RULES if f".{name}".endswith(f".{rule}")}
        assert rule == name
        assert leaf.dtype == parameters(spec)[name].stored_dtype(spec, "float32")
    mesh = make_mesh(MeshShape(1, 4, 2))
    for name in scales:
        matrix = name.removesuffix("_scale")
        p = parameters(spec)[matrix]
        whole = [*spec_for(matrix, shapes[matrix].shape, mesh), None, None, None]
        lead = 1 + p.batch
        expected = whole[:lead] + whole[lead + p.inputs : shapes[matrix].ndim]
        assert list(spec_for(name, shapes[name].shape, mesh)) == expected, name


def test_bytes_of_a_model_are_those_of_its_arrays():
    for spec in (BIG, SPARSE, BIG.quantised("int8"), SPARSE.quantised("fp8")):
        shapes = named(abstract(spec)[1])
        expected = sum(
            leaf.size * parameters(spec)[name].stored_dtype(spec, "bfloat16").itemsize
            for name, leaf in shapes.items()
        )
        assert weight_bytes(spec, "bfloat16") == expected
    # 8.03 billion parameters: 6.98 in one byte, 1.05 in two, and scales.
    assert 9.07e9 < weight_bytes(BIG.quantised("int8"), "bfloat16") < 9.10e9
    assert BIG.quantised("int8").parameters == BIG.parameters


def test_matrices_alone_are_quantised(case):
    flat = named(case.state)
    for name, array in flat.items():
        p = parameters(case.spec)[name]
        if p.inputs and p.short != "router":
            assert array.dtype == np.int8, name
            assert (
                flat[p.scale].shape
                == array.shape[: 1 + p.batch] + array.shape[1 + p.batch + p.inputs :]
            )
        else:
            assert array.dtype == np.float32, name


def test_the_forward_pass_is_that_of_dequantised_weights(case):
    batch = batch_of(case.rows)
    ours = np.asarray(logits_of(case.graphdef, case.state, batch))
    theirs = np.asarray(logits_of(case.plain, case.dequantised, batch))
    used = batch[2] > 0
    np.testing.assert_allclose(ours[used], theirs[used], rtol=0, atol=5e-5)


@FEW
@pytest.mark.slow
def test_a_cache_has_the_logits_of_the_full_forward_pass(case):
    tokens, half = case.rows[0], 20
    spec = case.spec.within(len(tokens))
    full = logits_of(case.graphdef, case.state, batch_of([tokens]))[0, : len(tokens)]
    graphdef, state = unstacked(abstract(spec)[0], case.state)
    cache, found = empty_cache(spec, 1, len(tokens)), []
    for span in (slice(0, half), *(slice(i, i + 1) for i in range(half, len(tokens)))):
        positions = np.arange(len(tokens))[None, span]
        logits, cache = decode(graphdef, state, tokens[None, span], positions, cache)
        found.append(np.asarray(logits[0]))
    np.testing.assert_allclose(np.concatenate(found), full, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "shape",
    [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 4, "tensor": 2}, {"fsdp": 2, "context": 2}],
    ids=str,
)
def test_eight_devices_have_the_weights_of_one(case, shape, request):
    """Scales are those of whole channels, also where devices divide the inputs."""
    name = request.node.callspec.params["case"]
    mesh = make_mesh(MeshShape(**({"data": -1, "fsdp": 1} | shape)))
    _, lazy = assemble(open_folder(HERE / name), name, quantization="int8")
    placed = place(lazy, shardings(lazy, mesh))
    for ours, whole in zip(jax.tree.leaves(placed), jax.tree.leaves(case.state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), whole)
        assert ours.dtype == whole.dtype


@FEW
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"fsdp": 2, "tensor": 2, "context": 2}, {"fsdp": 2, "tensor": 4}], ids=str
)
def test_eight_devices_have_the_logits_of_one(case, shape):
    batch = batch_of(case.rows * 2)
    one = np.asarray(logits_of(case.graphdef, case.state, batch))
    mesh = make_mesh(MeshShape(**({"data": 1} | shape)))
    state = place(case.state, shardings(case.state, mesh))
    many = logits_of(case.graphdef, state, shard(batch, mesh, BATCH), mesh)
    used = batch[2] > 0
    np.testing.assert_allclose(np.asarray(many)[used], one[used], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-llama3", "float32"), ("llama-llama3", "bfloat16"), ("qwen3-moe", "float32")],
)
def test_float8_is_computed_as_dequantised_weights(name, dtype):
    found = case_of(name, "fp8")
    batch = batch_of(found.rows)
    graphdef, plain = (
        abstract(s, jnp.dtype(dtype))[0] for s in (found.spec, found.spec.quantised(""))
    )
    ours = np.asarray(logits_of(graphdef, found.state, batch))
    theirs = np.asarray(logits_of(plain, found.dequantised, batch))
    used = batch[2] > 0
    atol = 5e-5 if dtype == "float32" else 0.05 * np.abs(theirs[used]).max()
    np.testing.assert_allclose(ours[used], theirs[used], rtol=0, atol=atol)


def test_a_state_is_quantised_as_files_are(case):
    """Arrays on the host and parameters in files have one quantisation."""
    whole = jax.tree.map(np.asarray, case.dequantised)
    again = named(jax.tree.map(np.asarray, quantised_state(whole, case.spec)))
    for name, array in named(case.state).items():
        if array.dtype == np.int8:  # quantising what was quantised changes nothing
            np.testing.assert_array_equal(again[name], array)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_steps(graphdef, state, token, cache, steps):
    """The loop of `sampling.programs.advance`, without its draws."""
    model = nnx.merge(graphdef, state)

    def step(carry):
        i, token, cache = carry
        hidden, cache = model.decode(token, jnp.full_like(token, i), cache)
        return i + 1, jnp.argmax(hidden, axis=-1).astype(jnp.int32) % 64, cache

    return jax.lax.while_loop(lambda carry: carry[0] < steps, step, (0, token, cache))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_keeps_one_byte_a_weight(dtype):
    """The compiler must not keep converted copies of the matrices through the loop."""
    spec = ModelSpec(64, 512, 6, 4, 2, 64, 2048).quantised("int8")
    shapes = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros(
            x.shape, parameters(spec)[path_name(path)].stored_dtype(spec, dtype)
        ),
        abstract(spec, jnp.dtype(dtype))[1],
    )
    graphdef, state = unstacked(abstract(spec, jnp.dtype(dtype))[0], shapes)
    cache = empty_cache(spec, 8, 32, jnp.dtype(dtype))
    token = np.zeros((8, 1), np.int32)
    memory = decode_steps.lower(graphdef, state, token, cache, 4).compile().memory_analysis()
    weights, largest = weight_bytes(spec, dtype), 512 * 2048
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert weights < 1.02 * spec.parameters
    assert memory.argument_size_in_bytes - weights - cache_bytes < 1e5
    # Two matrices in float32 (gate and up), where all of them would be 4 * 20 MB.
    assert memory.temp_size_in_bytes < 2.1 * 4 * largest
