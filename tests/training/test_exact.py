"""Micro-batches, devices and processes do not change a run; arms share one compilation."""

import socket

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deltapref_jax.config import MeshShape, Objective
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.sharding import BATCH
from deltapref_jax.preemption import Preempted
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training import step as programs
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.training.loop import _hyper, train_step
from deltapref_jax.training.state import Optimizer, init_state
from tests.marks import mostly


def same_run(one, other):
    """Compares two runs, each (parameters, folder), within float32 noise."""
    for x, y in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    rows, others = (list(read_metrics(folder / "metrics.jsonl")) for _, folder in (one, other))
    for row, again in zip(rows, others, strict=True):
        assert row == pytest.approx(again, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("kind", mostly(pytest.mark.exhaustive, ["dpo", "kto"], 0))
def test_one_two_or_eight_micro_batches_on_one_or_eight_devices(program, tmp_path, kind):
    one, spread = make_mesh(MeshShape(), jax.devices()[:1]), make_mesh(MeshShape(2, 2, 2))
    assert [len(program.data(kind, rows)(0).micros) for rows in (32, 16, 4)] == [1, 2, 8]
    first, _ = program.tiny(tmp_path / "first", kind, 32, steps=2, mesh=one)
    for name, rows, mesh in (
        ("two", 16, one),
        ("eight", 4, one),
        ("spread", 32, spread),
        ("both", 4, spread),
    ):
        params, _ = program.tiny(tmp_path / name, kind, rows, steps=2, mesh=mesh)
        same_run((first, tmp_path / "first"), (params, tmp_path / name))


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def two(spawn, mode, root):
    """Runs two processes with four devices each; returns their stdout, stderr and exit codes."""
    address = port()
    processes = [spawn(mode, root, address, index, devices=4) for index in (0, 1)]
    return [(*process.communicate(timeout=1500), process.returncode) for process in processes]


@pytest.mark.slow
def test_two_processes_are_one_and_their_checkpoint_goes_on_in_one(program, spawn, tmp_path):
    for _, err, code in two(spawn, "both", tmp_path):
        assert code == 0, err
    mesh = make_mesh(MeshShape(2, 2, 2))
    for kind in ("dpo", "kto"):
        with np.load(tmp_path / kind / "params.npz") as file:
            params = [file[name] for name in file.files]
        alone, _ = program.tiny(tmp_path / "alone" / kind, kind, 16, steps=4, mesh=mesh)
        same_run((alone, tmp_path / "alone" / kind), (params, tmp_path / kind))
        longer, _ = program.tiny(tmp_path / "longer" / kind, kind, 16, steps=6, mesh=mesh)
        resumed, _ = program.tiny(tmp_path / kind, kind, 16, steps=6)
        same_run((longer, tmp_path / "longer" / kind), (resumed, tmp_path / kind))


@pytest.mark.slow
def test_sigterm_to_one_process_makes_both_save_the_same_step_and_exit(program, spawn, tmp_path):
    results = two(spawn, "preempt", tmp_path)
    assert [code for _, _, code in results] == [Preempted.code] * 2, results
    # The message comes after the log lines of gloo.
    last = [out.splitlines()[-1] for out, _, _ in results]
    assert last[0] == last[1]
    saved = [path.name for path in (tmp_path / "left" / "checkpoints").glob("step_*")]
    assert len(saved) == 1
    done = int(saved[0].removeprefix("step_"))
    assert last[0] == (
        f"Stopped by SIGTERM after step {done} of 200, which is saved in {tmp_path}/left. Run the "
        "same command to continue."
    )
    assert [row["step"] for row in read_metrics(tmp_path / "left" / "metrics.jsonl")] == list(
        range(1, done + 1)
    )


@pytest.mark.parametrize("kind", mostly(pytest.mark.slow, ["dpo", "kto"], 1))
def test_twenty_arms_compile_once(program, one_device, kind):
    """Learning rate, beta and weights are arguments of the compiled functions, not constants."""
    steps = programs.programs(
        program.SPEC,
        "float32",
        kind,
        Optimizer(),
        max_segments(32, program.LENGTH),
        one_device,
        "none",
    )
    params, batch = (
        program.nnx.state(program.Decoder(program.SPEC, rngs=program.nnx.Rngs(1))),
        program.data(kind, 32),
    )
    before, norms = None, set()
    for arm in range(20):
        objective = Objective(
            name=f"arm{arm}",
            kind=kind,
            beta=0.01 * (arm + 1),
            desirable_weight=1 + arm / 10,
            undesirable_weight=1 - arm / 40,
        )
        state = init_state(params, Optimizer(), one_device)
        for step in range(2):
            state, sums, *_ = train_step(
                steps, state, batch(step), objective, 1e-3 / (arm + 1), one_device
            )
        norms.add(float(sums["grad_norm"]))
        sizes = [
            function._cache_size() for function in (steps.gradient, steps.apply, steps.logprobs)
        ]
        before = before or sizes
        assert sizes == before
    assert before[:2] == [1, 1]
    assert len(norms) == 20


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_micro_batch_adds_its_gradient_to_the_sum_so_far(program, shape):
    """The sum is donated, and the program needs no second tree of layers' gradients beside it."""
    mesh = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)])
    steps = programs.programs(
        program.SPEC,
        "float32",
        "dpo",
        Optimizer(),
        max_segments(16, program.LENGTH),
        mesh,
        "attention",
    )
    params = program.nnx.state(program.Decoder(program.SPEC, rngs=program.nnx.Rngs(1)))
    state, data = init_state(params, Optimizer(), mesh), program.data("dpo", 16)(0)
    assert len(data.micros) == 2
    hyper = _hyper(Objective(name="dpo"), data, np.float32(0), mesh)

    def gradient(micro, total):
        rows, examples = shard(micro[0], mesh, BATCH), shard(micro[1], mesh, PartitionSpec())
        return steps.gradient(state.params, program.nnx.State({}), rows, examples, hyper, total)[0]

    alone = [jax.device_get(gradient(micro, steps.zeros())) for micro in data.micros]
    both = gradient(data.micros[1], gradient(data.micros[0], steps.zeros()))
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(
            a + b, c, rtol=0, atol=1e-6 * max(1e-3, np.abs(c).max())
        ),
        *alone,
        both,
    )
    donated = steps.zeros()
    gradient(data.micros[0], donated)
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))
