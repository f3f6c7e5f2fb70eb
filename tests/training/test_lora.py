"""A step of adapters is that of dense W + sAB, and its base is not differentiated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import OBJECTIVE_KINDS, Lora, MeshShape, Objective
from deltapref_jax.files import ArtifactError
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.lora import adapters, add_adapters
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.logprobs import sequence_logprobs
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training import step as programs
from deltapref_jax.training.loop import Run, train, train_step
from deltapref_jax.training.objectives import Hyper
from deltapref_jax.training.state import Optimizer, init_state
from tests.marks import mostly

LORA = Lora(4, 8.0)


@pytest.fixture(scope="module")
def base(program):
    return nnx.state(Decoder(program.SPEC, rngs=nnx.Rngs(0)))


def stirred(trained):
    """Adapters whose B is not 0, so that A has a gradient and the policy is not its base."""
    leaves, tree = jax.tree.flatten(trained)
    r = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [x + r.normal(0, 0.05, x.shape).astype(np.float32) for x in leaves]
    )


def compiled(program, kind, mesh, lora=LORA, dtype="float32", remat="none"):
    return programs.programs(
        program.SPEC,
        dtype,
        kind,
        Optimizer(),
        max_segments(32, program.LENGTH),
        mesh,
        remat,
        adapters(lora, program.SPEC),
    )


def hyper(kind, data, z0=0.0):
    o = Objective(kind=kind)
    return Hyper(
        *map(np.float32, (o.beta, 0, o.gamma, 0, 1, 1, z0, data.total, data.chosen_tokens))
    )


def dense(program, params, trained, scale):
    """The base's parameters with W + scale · AB in place of every W, by a loop over layers."""
    tree, parts = nnx.to_pure_dict(params), nnx.to_pure_dict(trained)["blocks"]
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        w, a, b = tree["blocks"][name], parts[f"{name}_a"], parts[f"{name}_b"]
        tree["blocks"][name] = jnp.stack(
            [
                w[i] + scale * (a[i].reshape(-1, 4) @ b[i].reshape(4, -1)).reshape(w[i].shape)
                for i in range(program.SPEC.layers)
            ]
        )
    whole = abstract(program.SPEC)[1]
    nnx.replace_by_pure_dict(whole, tree)
    return whole


@pytest.mark.parametrize(("kind", "remat"), [("dpo", "none"), ("kto", "block")])
def test_a_step_is_that_of_dense_matrices(program, base, one_device, kind, remat):
    trained, frozen = add_adapters(program.SPEC, base, LORA, 5)
    trained, data = stirred(trained), program.data(kind, 32)(0)
    (batch, examples), h = data.micros[0], hyper(kind, data, 0.3)
    steps = compiled(program, kind, one_device, remat=remat)
    grads, sums, s = steps.gradient(trained, frozen, batch, examples, h, steps.zeros())
    graphdef, _ = abstract(program.SPEC)

    @jax.jit
    def naive(trained):
        model = nnx.merge(graphdef, dense(program, base, trained, 2.0))
        s, n = sequence_logprobs(model, batch, max_segments(32, program.LENGTH))
        return programs._UNITS[OBJECTIVE_KINDS[kind].unit](kind, s, n, examples, h)[0], s

    (want, scored), wanted = jax.value_and_grad(naive, has_aux=True)(trained)
    np.testing.assert_allclose(s, scored, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(sums["loss"], want, rtol=1e-5)
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == jnp.float32
        assert np.abs(exact).max() > 1e-5
        np.testing.assert_allclose(got, exact, rtol=2e-3, atol=2e-6)


def products(jaxpr):
    """Shapes of every product's result and of every sum over places, inner programs included."""
    found = []
    for e in jaxpr.eqns:
        if e.primitive.name in ("dot_general", "scatter-add"):
            found.append(e.outvars[0].aval.shape)
        for value in e.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("shape", [MeshShape(1), MeshShape(2, 2, 2)])
def test_nothing_of_the_bases_shapes_is_computed(program, base, shape):
    mesh = make_mesh(shape, jax.devices()[: 8 if shape.fsdp > 1 else 1])
    data = program.data("dpo", 32)(0)
    (batch, examples), h, counted = data.micros[0], hyper("dpo", data), {}
    spec = program.SPEC
    sizes = {
        tuple(sorted(x.shape[1:] if x.shape[0] == spec.layers else x.shape))
        for x in jax.tree.leaves(base)
    }
    sizes |= {
        tuple(sorted((spec.heads * spec.head_width, spec.width)))
    }  # of o, as it is multiplied
    # On a mesh, products are those of a device's share.
    sizes |= {
        tuple(sorted((*size[:i], size[i] // max(1, shape.tensor), *size[i + 1 :])))
        for size in sizes
        for i in range(len(size))
    }
    for lora in (LORA, Lora()):
        steps = compiled(program, "dpo", mesh, lora)
        trained, frozen = add_adapters(program.SPEC, base, lora, 5)
        arguments = (trained, frozen, batch, examples, h, jax.eval_shape(steps.zeros))
        shapes = [
            tuple(sorted(x)) for x in products(jax.make_jaxpr(steps.gradient)(*arguments).jaxpr)
        ]
        counted[lora.rank] = sum(x in sizes for x in shapes)
        grads = jax.eval_shape(steps.gradient, *arguments)[0]
        moments = jax.eval_shape(Optimizer().transform().init, trained)
        assert jax.tree.structure(grads) == jax.tree.structure(trained)
        assert len(jax.tree.leaves(moments)) == 2 * len(jax.tree.leaves(trained)) + 1
    assert counted[0] >= 9  # seven matrices of a layer, the embedding and the unembedding
    assert counted[4] == 0


def run(
    program,
    params,
    folder,
    mesh,
    rows=32,
    steps=4,
    lora=LORA,
    source=None,
    moments="float32",
    **more,
):
    config = Run(
        Objective(name="dpo", learning_rate=1e-2),
        steps,
        rows,
        program.LENGTH,
        warmup=0.0,
        schedule="constant",
        optimizer=Optimizer(moments=moments),
        checkpoint_every=2,
        lora=lora,
        seed=7,
    )
    trained, _ = train(
        program.SPEC, params, source or program.data("dpo", rows), config, mesh, folder, **more
    )
    return jax.device_get(trained)


@pytest.mark.exhaustive
def test_micro_batches_and_devices_do_not_matter(program, base, one_device, tmp_path):
    whole = run(program, base, tmp_path / "whole", one_device)
    spread = make_mesh(MeshShape(2, 2, 2))
    for name, rows, mesh in (("eight", 4, one_device), ("spread", 32, spread)):
        other = run(program, base, tmp_path / name, mesh, rows)
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-4)  # steps of 1e-2
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["rewards/margins"] != last["rewards/margins"]


@pytest.mark.parametrize("moments", mostly(pytest.mark.exhaustive, ["float32", "bfloat16"], 0))
def test_resumed_is_uninterrupted_and_another_base_is_refused(
    program, base, one_device, tmp_path, moments
):
    whole = run(program, base, tmp_path / "whole", one_device, moments=moments, base="one")
    source = program.data("dpo", 32)

    def stops(step):
        if step == 3:
            raise KeyboardInterrupt
        return source(step)

    with pytest.raises(KeyboardInterrupt):
        run(program, base, tmp_path / "cut", one_device, source=stops, moments=moments, base="one")
    with pytest.raises(ArtifactError) as error:
        run(program, base, tmp_path / "cut", one_device, moments=moments, base="two")
    assert str(error.value) == (
        f"The checkpoint {tmp_path}/cut/checkpoints/step_2 holds adapters of the base weights "
        "'one' and this run's base has the weights 'two'; train from that base, or delete the "
        "folder of checkpoints to train from the start."
    )
    resumed = run(program, base, tmp_path / "cut", one_device, moments=moments, base="one")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


def test_a_bfloat16_base_stays_what_it_is_and_rates_betas_and_alphas_compile_once(
    program, base, one_device
):
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    steps, losses = compiled(program, "kto", one_device, dtype="bfloat16"), set()
    data = program.data("kto", 32)(0)
    for arm in range(4):
        trained, frozen = add_adapters(program.SPEC, stored, Lora(4, 4.0 * (arm + 1)), arm)
        assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
        kept = nnx.to_pure_dict(frozen)
        assert str(kept["blocks"].pop("scale").dtype) == "float32"
        assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {"bfloat16"}
        state = init_state(stirred(trained), Optimizer(), one_device)
        state, sums, _ = train_step(
            steps,
            state,
            data,
            Objective(kind="kto", beta=0.1 * (arm + 1)),
            1e-3 / (arm + 1),
            one_device,
            frozen,
            arm,
        )
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}
        losses.add(float(sums["loss"]))
        assert [f._cache_size() for f in (steps.gradient, steps.apply, steps.logprobs)] == [1, 1, 1]
    assert len(losses) == 4
