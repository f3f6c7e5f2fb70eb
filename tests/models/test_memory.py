"""Memory by formula against shapes, and against what XLA's compiler plans."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deltapref_jax.config import Lora, MeshShape, Training
from deltapref_jax.models.lora import adapters
from deltapref_jax.models.memory import (
    BYTES,
    sampling_memory,
    scoring_memory,
    trained_parameters,
    training_memory,
)
from deltapref_jax.models.program import placed_weights
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import PackedBatch, max_segments
from deltapref_jax.training.state import Optimizer
from deltapref_jax.training.step import Examples, Hyper, programs

SPEC = ModelSpec(640, 128, 3, 4, 2, 32, 352)
ONE = MeshShape()


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_sampling_holds_weights_cache_and_logits():
    weights = size(abstract(SPEC)[1])
    cache = 2 * 3 * 2 * 32 * 200 * 8  # keys and values, layers, kv heads, width, positions, slots
    assert sampling_memory(SPEC, 8, 200, "float32", ONE) == weights + 4 * cache + 8 * 640 * 4
    half = sampling_memory(SPEC, 8, 200, "bfloat16", ONE)
    norms = (2 * 3 + 1) * 128  # they stay float32
    assert half == weights / 2 + 2 * norms + 2 * cache + 8 * 640 * 4
    spread = sampling_memory(SPEC, 8, 200, "float32", MeshShape(data=2, fsdp=2, tensor=2))
    assert spread == weights / 4 + (4 * cache + 8 * 640 * 4) / 8


def test_training_state_is_that_of_the_optimizer():
    one_token = Training(rows=1, row_length=1, remat="none")
    params = abstract(SPEC)[1]
    state = size(jax.eval_shape(Optimizer().transform().init, params))
    held = training_memory(SPEC, one_token, "float32", ONE)
    activations = 4 * (3 + 2) * (4 * 128 + 3 * 128 + 4 * 64 + 3 * 352)
    assert held == pytest.approx(3 * size(params) + state + activations, abs=16)  # counters
    half = training_memory(
        SPEC, Training(rows=1, row_length=1, remat="none", moments="bfloat16"), "float32", ONE
    )
    assert held - half == 4 * SPEC.parameters


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_offloaded_moments_are_on_the_devices_in_an_update_alone(moments):
    def needed(row_length, offload, activations=1.0):
        training = Training(
            rows=1,
            row_length=row_length,
            remat="block",
            moments=moments,
            offload_moments=offload,
        )
        return training_memory(SPEC, training, "float32", ONE, activations)

    held = 2 * BYTES[moments] * SPEC.parameters
    # Weights and gradients are there all the time; the larger of the two programs counts.
    assert needed(1, True) == 8 * SPEC.parameters + held < needed(1, False)
    long = 2**15
    assert needed(long, True) == needed(long, False) - held > needed(1, True)
    whole, half_more = needed(long, True), needed(long, True, 1.5)
    assert half_more - whole == 0.5 * (whole - 8 * SPEC.parameters)


def test_adapters_are_counted():
    training = Training(remat="none", lora=Lora(rank=4))
    shapes = nnx.to_pure_dict(abstract(SPEC, jnp.float32, adapters(training.lora, SPEC))[1])
    trained = [x for name, x in shapes["blocks"].items() if name.endswith(("_a", "_b"))]
    assert trained_parameters(SPEC, training) == sum(x.size for x in jax.tree.leaves(trained))
    assert trained_parameters(SPEC, Training()) == SPEC.parameters


def test_the_base_of_adapters_is_held_as_it_is_stored(one_device):
    training = Training(rows=1, row_length=1, remat="none", lora=Lora(rank=4))
    trained = trained_parameters(SPEC, training)
    activations = 4 * (3 + 2) * (4 * 128 + 3 * 128 + 4 * 64 + 3 * 352)
    for frozen in ("float32", "bfloat16"):
        base = size(placed_weights(abstract(SPEC)[1], SPEC, one_device, frozen))
        held = training_memory(SPEC, training, "float32", ONE, frozen=frozen)
        assert held == base + 20 * trained + activations
    assert held == training_memory(SPEC, training, "float32", ONE)  # as published models are


def test_rows_and_weights_are_divided_over_the_mesh():
    whole = scoring_memory(SPEC, 8, 512, "float32", ONE)
    assert scoring_memory(SPEC, 8, 512, "float32", MeshShape(fsdp=4)) == whole / 4
    weights = 4 * SPEC.parameters
    split = scoring_memory(SPEC, 8, 512, "float32", MeshShape(data=4, context=2))
    assert split == weights + (whole - weights) / 8


@pytest.mark.parametrize("remat", ["none", "projections", "attention", "block"])
def test_activations_are_near_what_the_compiler_plans(one_device, remat):
    rows, length = 4, 512
    training = Training(rows=rows, row_length=length, remat=remat)
    segments = max_segments(rows, length)
    compiled = programs(SPEC, "float32", "dpo", Optimizer(), segments, one_device, remat)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    index, number = (jax.ShapeDtypeStruct((segments,), d) for d in (jnp.int32, jnp.float32))
    hyper = Hyper(*[jax.ShapeDtypeStruct((), jnp.float32)] * len(Hyper._fields))
    planned = (
        compiled.gradient.lower(
            abstract(SPEC)[1],
            nnx.State({}),
            PackedBatch(ids, ids, ids, ids, None),
            Examples(index, index, number, number, number, number),
            hyper,
            jax.eval_shape(compiled.zeros),
        )
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    state = 20 if remat == "none" else 16
    estimate = training_memory(SPEC, training, "float32", ONE) - state * SPEC.parameters
    assert 0.7 < estimate / planned < 1.4
