"""A tiny DPO run as a program, for tests that need processes: `python program.py MODE …`.

`main` lists the modes. Children are forked before JAX starts its backend, so that the imports run
once, and they read compiled steps from a cache.
"""

import functools
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.lease import Lease, release_all
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import MeshShape, Objective
from deltapref_jax.jax_job import let_collectives_wait
from deltapref_jax.mesh import gather_to_host, make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export  # noqa: F401  (before the forks, once)
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.preemption import (
    Preempted,
    PreemptionGuard,
    exit_process,
    install_group_shutdown,
)
from deltapref_jax.processes import start_processes
from deltapref_jax.records import TokenSequence
from deltapref_jax.training.checkpoint import Checkpoints
from deltapref_jax.training.data import Group, ReferencedSequence, pack_step
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer, init_state
from launch.flags import run_main

SPEC = ModelSpec(64, 32, 2, 4, 2, 8, 64, tied=False)
PAIRS, LENGTH = 16, 64


def mismatch(row, other):
    """The completion of `row` behind the prompt of `other`."""
    return row._replace(sequence=row.sequence._replace(prompt_ids=other.sequence.prompt_ids))


def data(kind, rows):
    """Data of a step: 32 sequences of 40 to 64 tokens, one a row, in 32 / rows micro-batches."""

    def at(step):
        r = np.random.default_rng(step)
        sequences = [
            TokenSequence(r.integers(0, 64, 16), r.integers(0, 64, r.integers(24, 48)))
            for _ in range(2 * PAIRS)
        ]
        flat = [ReferencedSequence(sequence, -150.0) for sequence in sequences]
        if kind == "dpo":
            groups = [Group((flat[i], flat[i + PAIRS])) for i in range(PAIRS)]
        else:
            groups = [
                Group((row,), i % 2, mismatch(row, flat[i - 1])) for i, row in enumerate(flat)
            ]
        return pack_step(groups, kind, rows, LENGTH)

    return at


def tiny(
    folder,
    kind="dpo",
    rows=32,
    steps=6,
    every=100,
    mesh=None,
    source=None,
    offload=False,
    **more,
):
    """Trains; returns all parameters as host arrays, and the counts."""
    how = Run(
        Objective(name=kind, kind=kind, learning_rate=1e-3),
        steps,
        rows,
        LENGTH,
        warmup=0.0,
        schedule="constant",
        optimizer=Optimizer(offload_moments=offload),
        checkpoint_every=every,
    )
    params = nnx.state(Decoder(SPEC, rngs=nnx.Rngs(0)))
    mesh = mesh or make_mesh(MeshShape(), jax.devices()[:1])
    params, counts = train(SPEC, params, source or data(kind, rows), how, mesh, folder, **more)
    return gather_to_host(params), counts


def save(params, path):
    """Writes parameters to a file whose bytes can be compared."""
    np.savez(path, *jax.tree.leaves(params))


def child(root, folder, delay=None):
    """Forks a process that trains 12 steps, saving every other, and dies after `delay` seconds."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        steps, began = data("dpo", 32), []

        def source(step):
            if not began:
                began.append(time.monotonic())
                if delay is not None:
                    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            time.sleep(0.02)
            return steps(step)

        params, _ = tiny(folder, steps=12, every=2, source=source)
        save(params, folder / "params.npz")
        (folder / "seconds").write_text(str(time.monotonic() - began[0]) if began else "0")
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
    os._exit(1)


def kill(root, kills, seed):
    """Runs uninterrupted once, then with kills at random times until there were `kills`."""
    rng, done, runs = random.Random(seed), 0, 0
    assert child(root, root / "whole") == 0
    assert child(root, root / "again") == 0  # The compiled steps are in the cache now.
    seconds = float((root / "again" / "seconds").read_text())
    while True:
        folder = root / f"cut-{runs}"
        code = child(root, folder, rng.uniform(0, 1.2 * seconds) if done < kills else None)
        if code == 0:
            runs += 1
            if done >= kills:
                break
        assert code in (0, -signal.SIGKILL)
        done += code != 0
    print(done, runs)


def both(root, port, index):
    """Runs one of two processes with four devices each: DPO and KTO, 4 steps, saved at the last.

    The moments of KTO lie on the hosts of their devices.
    """
    let_collectives_wait()
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = make_mesh(MeshShape(2, 2, 2))
    for kind in ("dpo", "kto"):
        params, _ = tiny(root / kind, kind, 16, steps=4, mesh=mesh, offload=kind == "kto")
        if index == 0:
            save(params, root / kind / "params.npz")


def preempt(root, port, index):
    """Runs one of two processes; the second gets SIGTERM at step 3, and both save the same step."""
    let_collectives_wait()
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    steps = data("dpo", 32)

    def source(step):
        if step == 3 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return steps(step)

    try:
        tiny(root / "left", steps=200, mesh=make_mesh(MeshShape(2, 2, 2)), source=source)
    except Preempted as e:
        print(e, flush=True)
        os._exit(Preempted.code)  # JAX's shutdown would fail if the other process has exited.


class Endless(Node, stage="stage", version=1):
    """A table whose shards never end, in collectives, or else in one compiled program each."""

    root: Path = runtime()
    index: int = runtime()
    together: bool = runtime()

    def make(self, job: Job) -> None:
        endless = jax.jit(lambda x: jax.lax.while_loop(lambda y: y < 1e30, lambda y: jnp.cos(y), x))

        def shard(_):
            (self.root / f"at-{self.index}").touch()
            if self.together:
                while True:
                    multihost_utils.process_allgather(np.ones(3))
            return jax.block_until_ready(endless(1.0))

        job.shards(4, shard, together=self.together)


def shards(root, index, together):
    """Makes an `Endless` table."""
    node = Endless(label=("it",), root=root, index=index, together=together)
    run([node], Workspace(root / "w"), show=False)


class Trained(Node, stage="trained", version=1):
    """A run of 12 steps, exported."""

    def make(self, job: Job) -> None:
        steps = data("dpo", 32)

        def source(step):
            time.sleep(0.1)
            return steps(step)

        params, _ = tiny(job.dir, steps=12, every=2, source=source, check_lease=job.check_lease)
        with job.output_dir("policy") as folder:
            save(params, folder / "params.npz")
        job.files += ["metrics.jsonl", "policy/*"]


def leased(root, _):
    """Makes a `Trained` artifact; its lease expires after two seconds."""
    Lease.__init__.__defaults__ = (2.0,)
    run([Trained(label=("it",))], Workspace(root / "w"), show=False)


def global_state(mesh):
    """The initial training state."""
    return init_state(nnx.state(Decoder(SPEC, rngs=nnx.Rngs(0))), Optimizer(), mesh)


def full(root, index):
    """Saves three checkpoints; from the second on, the disk of process 1 is full."""
    state = global_state(make_mesh(MeshShape(2, 2, 2)))
    with PreemptionGuard(), Checkpoints(root, 1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        for step in (2, 3):
            checkpoints.save(step, state, {})


def view(root, index):
    """Restores the newest checkpoint in `root/INDEX`."""
    with PreemptionGuard(), Checkpoints(root / str(index), 1) as checkpoints:
        checkpoints.restore(global_state(make_mesh(MeshShape(2, 2, 2))))


def fine(root, index):
    """Runs one collective and exits."""
    multihost_utils.sync_global_devices("done")


def in_group(mode, root):
    """Runs `mode` as one of the processes that the environment describes, as `launch` does."""

    def job(_):
        start_processes()
        install_group_shutdown(release_all)
        mode(root, jax.process_index())

    sys.argv = sys.argv[:1]
    run_main(job)


MODES = {"kill": kill, "both": both, "preempt": preempt} | {
    name: functools.partial(in_group, mode)
    for name, mode in {
        "alone": functools.partial(shards, together=False),
        "together": functools.partial(shards, together=True),
        "full": full,
        "view": view,
        "fine": fine,
        "leased": leased,
    }.items()
}


def main(mode, root, *numbers):
    """Runs `kill ROOT KILLS SEED`, `both|preempt ROOT PORT INDEX`, or another MODE with ROOT."""
    MODES[mode](Path(root), *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
    exit_process()  # As in `launch`: finalizing the interpreter may hang.
