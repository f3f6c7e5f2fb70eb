"""In bfloat16 a mesh computes what one device does, and no device holds a whole unembedding."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.products import ring_sum
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.scoring.logprobs import sequence_logprobs
from deltapref_jax.scoring.packing import PackedBatch
from deltapref_jax.scoring.projection import token_logprobs
from tests.marks import mostly

SPEC = ModelSpec(200, 64, 2, 8, 4, 16, 128, tied=False, biases=("q", "down"))
ADAPTED = Adapters(4, ("q", "k", "v", "o", "gate", "up", "down"))


def packed():
    """Eight rows of two sequences of 32 tokens."""
    ids = np.random.default_rng(0).integers(0, 200, (8, 64)).astype(np.int32)
    positions = np.tile(np.arange(32, dtype=np.int32), (8, 2))
    segments = np.repeat(np.arange(1, 17).reshape(8, 2), 32, axis=1).astype(np.int32)
    return PackedBatch(ids, positions, segments, np.where(positions > 0, segments, 0))


def gradient(spec, mesh, dtype, remat="attention", adapters=NO_ADAPTERS):
    """A compiled function (parameters, batch) -> (loss, gradient), and its arguments."""
    model = Decoder(spec, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), adapters=adapters)
    graphdef, state = nnx.split(model)
    r = np.random.default_rng(1)
    state = jax.tree.map(lambda x: x + jnp.asarray(0.04 * r.normal(size=x.shape), x.dtype), state)
    batch = packed()
    if mesh is not None:
        state = jax.device_put(state, shardings(state, mesh))
        batch = shard(batch, mesh, BATCH)

    @jax.jit
    @jax.value_and_grad
    def run(state, batch):
        sums, _ = sequence_logprobs(nnx.merge(graphdef, state), batch, 16, remat, mesh)
        return sums @ jnp.arange(16.0) / 16

    return run, state, batch


@functools.cache
def result(shape, dtype, remat="attention", adapters=NO_ADAPTERS):
    mesh = None if shape is None else make_mesh(MeshShape(*shape))
    run, *arguments = gradient(SPEC, mesh, dtype, remat, adapters)
    return jax.device_get(run(*arguments))


def distance(a, b):
    """The largest relative distance of two gradients' parameters, in norm."""
    return max(
        np.linalg.norm(np.ravel(x) - np.ravel(y)) / np.linalg.norm(np.ravel(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8]
QUICK = (2, 2, 2, 1)
FEW = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2)]


@pytest.mark.parametrize(
    "shape",
    [
        QUICK,
        *mostly(pytest.mark.slow, [(shape,) for shape in FEW]),
        *mostly(pytest.mark.exhaustive, [(s,) for s in SHAPES if s not in (QUICK, *FEW)]),
    ],
)
def test_a_mesh_is_one_device_in_bfloat16_within_the_distance_of_float32(shape):
    exact, single = result(None, "float32"), result(None, "bfloat16")
    assert distance(result(shape, "bfloat16"), single) < distance(single, exact)


@pytest.mark.parametrize("remat", ["none", "projections"])
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 2, 2, 2)])
def test_adapters_on_a_mesh_are_those_of_one_device(shape, remat):
    one = result(None, "float32", "none", ADAPTED)
    assert distance(result(shape, "float32", remat, ADAPTED), one) < 1e-4


def shapes_in(text):
    return {
        tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
    }


def test_no_device_holds_the_whole_unembedding_or_its_gradient():
    """The vocabulary of 4,480 entries is read in three slices; fsdp shards the width."""

    def found(mesh):
        r = np.random.default_rng(0)
        hidden, matrix = (
            jnp.asarray(r.normal(size=n), t)
            for n, t in (((8, 16, 64), jnp.bfloat16), ((4480, 64), jnp.float32))
        )
        labels = jnp.asarray(r.integers(0, 4480, (8, 16)))
        if mesh is not None:
            matrix = shard(matrix, mesh, PartitionSpec("tensor", "fsdp"))
            hidden, labels = shard((hidden, labels), mesh, BATCH)
        gradient = jax.grad(
            lambda h, w: token_logprobs(h, w, labels, labels > 9, mesh).sum(), argnums=(0, 1)
        )
        return shapes_in(jax.jit(gradient).lower(hidden, matrix).compile().as_text())

    assert (4480, 64) in found(None)
    spread = found(make_mesh(MeshShape(1, 8)))
    assert (4480, 64 // 8) in spread
    assert (4480, 64) not in spread


@pytest.mark.parametrize("axis", [0, 1])
def test_a_ring_leaves_each_device_its_part_of_the_sum(axis):
    mesh = make_mesh(MeshShape(1, 8))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 24)), jnp.float32)
    out = PartitionSpec(*("fsdp" if i == axis else None for i in range(2)))
    run = jax.shard_map(
        lambda x: ring_sum(x[0], axis, "fsdp"),
        mesh=mesh,
        in_specs=PartitionSpec("fsdp"),
        out_specs=out,
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(run)(x), x.sum(axis=0), atol=1e-5)
