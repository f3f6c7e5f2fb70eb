"""A study without models, run as a program by test_workspace.py: `python toy_study.py MODE ROOT [SEED]`.

Children are forked from one process that imports no JAX, so that hundreds of them start and die within seconds.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time

import pyarrow as pa
from deltapref_jax.workspace import Job, Node, Workspace, run

from deltapref_jax.processes import versions

SHARDS, ROWS = 3, 40


def _log(job: Job, what: str) -> None:
    with open(pathlib.Path(job.workspace.root) / "made.log", "a") as file:
        file.write(f"{job.node.label} {what}\n")


def numbers(job: Job) -> None:
    def make(shard: int) -> tuple[pa.Table, dict[str, float]]:
        _log(job, f"{shard}")
        time.sleep(job.local["nap"])
        rng = random.Random(f"{job.config['seed']}|{shard}")
        rows = [{"id": f"{shard}-{i}", "x": rng.random()} for i in range(ROWS)]
        return pa.Table.from_pylist(rows), {"tokens": float(shard)}

    job.shards(SHARDS, make, total=SHARDS * ROWS)


def doubled(job: Job) -> None:
    table = job.table("source")
    job.write(table.set_column(1, "x", pa.array([2 * x for x in table["x"].to_pylist()])))


def folder(job: Job) -> None:
    """Ten steps with a checkpoint after each: a directory that a killed run leaves half-way."""
    with job.alone():
        _log(job, "train")
        place, total = job.dir / "checkpoint.json", sum(job.table("source")["x"].to_pylist())
        state = json.loads(place.read_text()) if place.exists() else {"step": 0, "value": 0.0}
        while state["step"] < 10:
            state = {"step": state["step"] + 1, "value": state["value"] * 0.9 + total}
            scratch = job.dir / "scratch"
            scratch.write_text(json.dumps(state))
            scratch.replace(place)
            time.sleep(job.local["nap"])
        (job.dir / "policy").mkdir(exist_ok=True)
        (job.dir / "policy" / "weights").write_text(json.dumps(state))
        job.put("metrics.jsonl", b'{"step": 10}\n')
    job.files += ["policy/*"]


STAGES = {"numbers": numbers, "doubled": doubled, "folder": folder}


def nodes(nap: float = 0.002) -> dict[str, Node]:
    local = {"nap": nap}
    a = Node("numbers", "numbers/a", {"seed": 1}, local=local)
    b = Node("numbers", "numbers/b", {"seed": 2}, local=local)
    c = Node("doubled", "doubled/b", {}, {"source": b})
    return {"a": a, "c": c, "d": Node("folder", "folder/b", {"steps": 10}, {"source": c}, local)}


def child(root: str, nap: float = 0.002, die_at: int | None = None) -> int:
    """Forks a process that makes the study; with `die_at` it kills itself at that file-system event."""
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(BaseException):
        if die_at is not None:
            count = iter(range(10**9))
            for name in ("fsync", "replace", "unlink", "mkdir", "rename"):
                setattr(os, name, _deadly(getattr(os, name), count, die_at))
        run(nodes(nap), STAGES, Workspace(root), show=False)
        os._exit(0)
    os._exit(1)


def _deadly(function, count, die_at: int):
    def wrapped(*args, **kwargs):
        if next(count) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def crash_everywhere(root: str) -> int:
    """Every event of an otherwise uninterrupted run is a place to die; each place gets a workspace of its own."""
    at = 0
    while True:
        place = f"{root}/{at:03d}"
        if code(child(place, 0.0, at)) == 0:
            return at
        assert code(child(place, 0.0)) == 0, f"not continued after event {at}"
        at += 1


def crash_randomly(root: str, seed: int) -> int:
    """One workspace, killed again and again after random times until a run gets through; returns the kills."""
    rng, kills = random.Random(seed), 0
    while True:
        pid = child(root, 0.004)
        if kills >= 25:
            assert code(pid) == 0
            return kills
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        kills += code(pid) == -signal.SIGKILL


def main(mode: str, root: str, seed: str = "0") -> None:
    os.makedirs(root, exist_ok=True)
    pa.Table.from_pylist(
        [{"x": 1}]
    )  # what this and the next line import is not imported by every child
    versions()
    os.fsync = lambda _: None  # what a killed process wrote, the kernel keeps
    if mode == "once":
        assert code(child(root)) == 0
    elif mode == "everywhere":
        print(crash_everywhere(root))
    elif mode == "randomly":
        print(crash_randomly(root, int(seed)))
    elif mode == "together":
        assert [code(pid) for pid in [child(root, 0.02) for _ in range(3)]] == [0, 0, 0]


if __name__ == "__main__":
    main(*sys.argv[1:])
