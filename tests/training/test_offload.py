"""Moments that lie in the host's memory between updates: the same numbers, another place."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import Lora, MeshShape, Objective
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.lora import add_adapters
from deltapref_jax.models.program import device_bytes
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training.checkpoint import Checkpoints, read_metrics
from deltapref_jax.training.loop import Run, train, train_step
from deltapref_jax.training.shapes import step_programs
from deltapref_jax.training.state import Optimizer, init_state
from deltapref_jax.training.step import programs
from tests.marks import mostly

FULL, LORA, ONE = Lora(), Lora(4, 8.0), MeshShape(1)
OBJECTIVE = Objective(name="dpo", kind="dpo", learning_rate=1e-3)


def how(program, offload, moments="float32", lora=FULL):
    return Run(
        OBJECTIVE,
        4,
        16,
        program.LENGTH,
        warmup=0.0,
        schedule="constant",
        optimizer=Optimizer(moments=moments, offload_moments=offload),
        checkpoint_every=2,
        lora=lora,
        seed=3,
    )


def parameters(program):
    return nnx.state(Decoder(program.SPEC, rngs=nnx.Rngs(0)))


def trained(program, folder, mesh, run):
    """Parameters, moments and metrics of a run, or of what is left of it."""
    base = parameters(program)
    train(program.SPEC, base, program.data("dpo", 16), run, mesh, folder)
    like = init_state(add_adapters(program.SPEC, base, run.lora, 0)[0], run.optimizer, mesh)
    with Checkpoints(folder / "checkpoints", 1) as checkpoints:
        state, _ = checkpoints.restore(like)
    return jax.device_get(state), list(read_metrics(folder / "metrics.jsonl"))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert a[1] == b[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "lora", "devices"),
    mostly(
        pytest.mark.exhaustive,
        [("float32", FULL, 8), ("bfloat16", FULL, 8), ("bfloat16", LORA, 8), ("float32", LORA, 1)],
        *(0, 2),
    ),
)
def test_a_run_is_that_of_moments_on_the_devices_bit_for_bit(
    program, tmp_path, moments, lora, devices
):
    """Also one that was stopped half way and continued with its moments in the other memory."""
    mesh = make_mesh(MeshShape(1, devices // 2, 2) if devices > 1 else ONE, jax.devices()[:devices])
    on_device, on_host = (how(program, offload, moments, lora) for offload in (False, True))
    expected = trained(program, tmp_path / "device", mesh, on_device)
    assert_equal(trained(program, tmp_path / "host", mesh, on_host), expected)
    for first, then in ((on_device, on_host), (on_host, on_device)):
        folder = tmp_path / f"to-host-{then.optimizer.offload_moments}"
        trained(program, folder, mesh, dataclasses.replace(first, steps=2))
        assert_equal(trained(program, folder, mesh, then), expected)


def on_device():
    """Bytes of the buffers of arrays that lie on one device; views of a buffer count once."""
    arrays = [x for x in jax.live_arrays() if len(x.sharding.device_set) == 1]
    kept = [x for x in arrays if x.sharding.memory_kind == "device"]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in kept}.values())


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_checkpoint_leaves_no_copy_of_moments_on_the_devices(program, one_device, tmp_path):
    state = init_state(parameters(program), Optimizer(offload_moments=True), one_device)
    before = on_device()
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {})
        assert on_device() - before < 0.1 * size(state.params)  # the checksum
        checkpoints.wait()
        restored, _ = checkpoints.restore(state)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)


def test_moments_lie_on_the_host_between_updates(program, one_device):
    compiled = programs(
        program.SPEC, "float32", "dpo", Optimizer(), max_segments(32, program.LENGTH), one_device
    )
    params, last, held = parameters(program), [], []

    def gradient(*arguments):
        """Also counts the bytes that lie on the device when it is dispatched."""
        held.append(on_device())
        return compiled.gradient(*arguments)

    watched = compiled._replace(gradient=gradient)
    for offload in (True, False):
        state = init_state(params, Optimizer(offload_moments=offload), one_device)
        for step in range(2):
            before, data = state, program.data("dpo", 32)(step)
            # A hidden transfer would be an error.
            with jax.transfer_guard("disallow"):
                state, *_ = train_step(watched, state, data, OBJECTIVE, 1e-3, one_device)
            # No second copy is left in either memory.
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.moments)}
            assert kinds == {"pinned_host" if offload else "device"}
            assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
        last.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *last)
    assert held[3] - held[1] == size(last[0].moments)


@pytest.mark.parametrize(("remat", "lora"), [("none", FULL), ("block", FULL), ("block", LORA)])
def test_no_moments_lie_beside_the_programs_of_a_gradient(program, remat, lora):
    mesh = make_mesh(MeshShape(1, 8))
    run = dataclasses.replace(how(program, False, lora=lora), remat=remat)
    found = step_programs(program.SPEC, run, mesh)
    optimizer = dataclasses.replace(run.optimizer, offload_moments=True)
    offloaded = step_programs(program.SPEC, dataclasses.replace(run, optimizer=optimizer), mesh)
    state = found["apply"].args[0]
    for name in found.keys() - {"apply"}:
        less = device_bytes(found[name].beside) - device_bytes(offloaded[name].beside)
        assert less == device_bytes(state.moments), name
    # An update has them all.
    assert device_bytes(found["apply"].args) == device_bytes(offloaded["apply"].args)
    assert found["apply"].beside == offloaded["apply"].beside
