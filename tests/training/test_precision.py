"""Dtypes of a step, and bfloat16 moments: stochastic rounding keeps them moving and unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import MeshShape, Objective
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.sharding import shardings
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training import step as programs
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.objectives import Hyper
from deltapref_jax.training.state import Optimizer, init_state, round_randomly, scale_by_adam

B2 = 0.999


def equations(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for value in e.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("length", [64, 256])  # plain and blockwise attention
def test_products_are_bfloat16_and_parameters_gradients_and_moments_float32(
    program, one_device, length
):
    spec = program.SPEC
    params = abstract(spec)[1]
    segments = max_segments(4, length)
    steps = programs.programs(spec, "bfloat16", "dpo", Optimizer(), segments, one_device)
    ids, number = (
        jax.ShapeDtypeStruct((4, length), jnp.int32),
        jax.ShapeDtypeStruct((segments,), jnp.float32),
    )
    index = jax.ShapeDtypeStruct((segments,), jnp.int32)
    batch = programs.PackedBatch(ids, ids, ids, ids, None)
    examples = programs.Examples(index, index, number, number, number, number)
    arguments = (
        params,
        nnx.State({}),
        batch,
        examples,
        Hyper(*[jax.ShapeDtypeStruct((), jnp.float32)] * 9),
        jax.eval_shape(steps.zeros),
    )
    traced = jax.make_jaxpr(steps.gradient)(*arguments)
    seen = list(equations(traced.jaxpr))
    factors = [[v.aval.dtype for v in e.invars] for e in seen if e.primitive.name == "dot_general"]
    assert len(factors) > 3 * 8
    assert all(jnp.bfloat16 in pair for pair in factors)
    rows = [e.outvars[0].aval for e in seen if e.primitive.name == "scatter-add"]
    table = [x for x in rows if x.shape == (spec.vocab, spec.width)]
    assert [x.dtype for x in table] == [
        jnp.float32
    ]  # a frequent token's gradient is a sum of thousands
    grads, sums, s = jax.eval_shape(steps.gradient, *arguments)
    assert {x.dtype for x in jax.tree.leaves((grads, sums, s))} == {jnp.dtype("float32")}
    state = init_state(nnx.state(Decoder(spec, rngs=nnx.Rngs(0))), Optimizer(), one_device)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def run(program, folder, mesh, dtype="float32", moments="float32", seed=0, kind="dpo"):
    config = Run(
        Objective(name=kind, kind=kind, learning_rate=1e-3),
        4,
        32,
        program.LENGTH,
        warmup=0.0,
        schedule="constant",
        optimizer=Optimizer(moments=moments),
        checkpoint_every=100,
        seed=seed,
    )
    params = nnx.state(Decoder(program.SPEC, rngs=nnx.Rngs(0)))
    source = program.data(kind, 32)(0)
    params, _ = train(program.SPEC, params, lambda step: source, config, mesh, folder, dtype=dtype)
    return jax.device_get(params), np.array(
        [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
    )


@pytest.mark.slow
def test_a_run_in_bfloat16_follows_the_run_in_float32(program, one_device, tmp_path):
    """Losses differ by at most 1% of their decrease in four steps, with bfloat16 moments too."""
    _, exact = run(program, tmp_path / "float32", one_device)
    decrease = exact[0] - exact[-1]
    assert decrease > 0.05
    for name, options in (
        ("bfloat16", {"dtype": "bfloat16"}),
        ("moments", {"moments": "bfloat16"}),
    ):
        params, losses = run(program, tmp_path / name, one_device, **options)
        assert np.abs(losses - exact).max() < 0.01 * decrease, name
        assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


def test_the_seed_of_the_rounding_is_the_runs(program, one_device, tmp_path):
    first, again, other = (
        run(program, tmp_path / name, one_device, moments="bfloat16", seed=seed)[0]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(
        (x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )


def test_random_rounding_has_the_right_neighbours_and_the_right_mean():
    x = jnp.float32(1 + 2**-9)  # a quarter of the way from 1 to the next, 1 + 2⁻⁷
    bits = jnp.arange(2**16, dtype=jnp.uint32)
    values = np.asarray(round_randomly(jnp.broadcast_to(x, bits.shape), bits), np.float64)
    assert set(values) == {1.0, 1 + 2**-7}
    assert values.mean() == float(x)  # over all bits exactly
    assert (
        np.asarray(round_randomly(jnp.broadcast_to(-x, bits.shape), bits), np.float64) == -values
    ).all()
    for exact in (0.0, 1.0, -3.5, 2.0**-120):
        assert set(np.asarray(round_randomly(jnp.full(64, exact), bits[-64:]), np.float64)) == {
            exact
        }


def moments_after(steps, gradient, size, round_plainly=False):
    """v of `size` parameters, all with the same gradient at every step."""
    transform = scale_by_adam(0.9, B2, 1e-8, "float32" if round_plainly else "bfloat16")
    params = {"embed": jnp.zeros(size)}

    def step(i, state):
        _, state = transform.update(
            {"embed": jnp.full(size, gradient(i))}, state, params, seed=jnp.uint32(3)
        )
        if round_plainly:
            state = state._replace(
                nu=jax.tree.map(lambda v: v.astype(jnp.bfloat16).astype(jnp.float32), state.nu)
            )
        return state

    return np.asarray(
        jax.jit(lambda s: jax.lax.fori_loop(0, steps, step, s))(transform.init(params)).nu["embed"],
        np.float64,
    )


def test_plain_rounding_stalls_the_second_moment_and_random_rounding_does_not():
    """v approaches g² = 1 like 1 - b2ᵗ.

    Rounded to the nearest, it stops at a quarter, where a step adds less than half an ulp. It does
    not decay either once the gradient is 0, because 0.999 v is rounded back to v.
    """
    up = 1 - B2**1500
    assert moments_after(1500, lambda i: 1.0, 1, round_plainly=True) == pytest.approx(0.25)
    got = moments_after(1500, lambda i: 1.0, 4096)
    assert got.mean() == pytest.approx(up, rel=0.01)
    assert got.std() < 0.1 * up

    def half(i):
        return jnp.where(i < 500, 1.0, 0.0)

    down = (1 - B2**500) * B2**1000
    assert moments_after(1500, half, 1, round_plainly=True) == pytest.approx(0.25)
    assert moments_after(1500, half, 4096).mean() == pytest.approx(down, rel=0.01)


def test_rounding_does_not_depend_on_the_mesh_and_depends_on_seed_step_and_path():
    adam = scale_by_adam(0.9, B2, 1e-8, "bfloat16")
    grads = {"blocks": {name: jnp.full((2, 64, 64), 0.3) for name in ("gate", "up")}}

    def moments(mesh, seed, count):
        state = jax.eval_shape(adam.init, grads)
        state = jax.tree.map(
            lambda x, s: jax.device_put(jnp.zeros(x.shape, x.dtype), s),
            state,
            shardings(state, mesh),
        )
        given = jax.device_put(grads, shardings(grads, mesh))
        run = jax.jit(
            lambda g, s, n: adam.update(g, s, seed=n)[1], out_shardings=shardings(state, mesh)
        )
        after = run(given, state._replace(count=state.count + count), np.uint32(seed))
        return jax.device_get((after.mu["blocks"], after.nu["blocks"]))

    one, spread = make_mesh(MeshShape(), jax.devices()[:1]), make_mesh(MeshShape(2, 2, 2))
    first = moments(one, 1, 0)
    assert {str(x.dtype) for x in jax.tree.leaves(first)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, first, moments(spread, 1, 0))
    another, later = moments(one, 2, 0)[1], moments(one, 1, 7)[1]
    v = first[1]
    for x, y in (
        (v["gate"], v["up"]),
        (v["up"], another["up"]),
        (v["up"], later["up"]),
        (v["up"][0], v["up"][1]),
    ):
        assert 0.2 < (x != y).mean() < 0.6
