"""A study without models, run as a program by the tests: `python toy_study.py MODE ROOT [NUMBER]`.

Children are forked from one process that imports no JAX, so that hundreds of them start and die
within seconds.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable

import pyarrow as pa

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.shards import Made, Pass, Shards, make_shards
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.processes import versions

SHARDS, ROWS = 3, 40
INDEPENDENT = 6  # artifacts of `independent`
STUDY = "toy"


def log(job: Job, what: str) -> None:
    """One line, which processes that share a workspace append without mixing theirs."""
    with open(pathlib.Path(job.workspace.root) / "made.log", "a") as file:
        file.write(f"{job.node.name} {what}\n")


class Numbers(Node, stage="numbers", version=1, sharded=True):
    """Shards of random numbers."""

    seed: int
    nap: float = runtime(default=0.0)

    def make(self, job: Job) -> None:
        def make(shard: int) -> tuple[pa.Table, dict[str, float]]:
            log(job, f"{shard}")
            time.sleep(self.nap)
            rng = random.Random(f"{self.seed}|{shard}")
            rows = [{"id": f"{shard}-{i}", "x": rng.random()} for i in range(ROWS)]
            return pa.Table.from_pylist(rows), {"tokens": float(shard)}

        job.shards(SHARDS, make, total=SHARDS * ROWS)


class Doubled(Node, stage="doubled", version=1):
    """Twice the numbers, and `more`."""

    source: Node
    more: float = 0.0

    def make(self, job: Job) -> None:
        table = job.table(self.source)
        doubled = [2 * x + self.more for x in table["x"].to_pylist()]
        job.write(table.set_column(1, "x", pa.array(doubled)))


class Folder(Node, stage="folder", version=1):
    """Ten steps with a checkpoint after each: a directory that a killed run leaves half-way."""

    steps: int
    source: Node
    nap: float = runtime(default=0.0)

    def make(self, job: Job) -> None:
        log(job, "train")
        place, total = job.dir / "checkpoint.json", sum(job.table(self.source)["x"].to_pylist())
        state = json.loads(place.read_text()) if place.exists() else {"step": 0, "value": 0.0}
        while state["step"] < self.steps:
            state = {"step": state["step"] + 1, "value": state["value"] * 0.9 + total}
            scratch = job.dir / "scratch"
            scratch.write_text(json.dumps(state))
            scratch.replace(place)
            time.sleep(self.nap)
        (job.dir / "policy").mkdir(exist_ok=True)
        (job.dir / "policy" / "weights").write_text(json.dumps(state))
        job.write_file("metrics.jsonl", b'{"step": 10}\n')
        job.files += ["policy/*"]


class Meeting(Node, stage="meeting", version=1):
    """An artifact that is held until `runners` processes hold one each, and then for a moment."""

    number: int
    runners: int = runtime()

    def make(self, job: Job) -> None:
        log(job, f"start {os.getpid()} {time.monotonic()}")
        limit = time.monotonic() + 20
        while len(started(pathlib.Path(job.workspace.root))) < self.runners:
            if time.monotonic() > limit:
                break
            time.sleep(0.01)
        time.sleep(0.02)
        job.write_file("number", str(self.number).encode())
        log(job, f"end {os.getpid()} {time.monotonic()}")


class Answers(Node, stage="answers", version=1, sharded=True):
    """A model's answers to one of its suites, in shards, two of them in one pass."""

    source: Node
    suite: int
    nap: float = runtime(default=0.0)

    def batch(self) -> object:
        return self.source

    @classmethod
    def make_batch(cls, work: "list[tuple[Answers, Job]]") -> None:
        suites = {Shards(job, [ROWS] * SHARDS, SHARDS * ROWS): node for node, job in work}
        numbers = work[0][1].table(work[0][0].source)["x"].to_pylist()

        def make(chosen: Pass, advance: Callable[[int], None]) -> list[Made]:
            made = []
            for shards, i in chosen:
                log(shards.job, f"{i}")
                time.sleep(suites[shards].nap)
                limit = suites[shards].suite / 10
                right = [x > limit for x in numbers[i * ROWS : (i + 1) * ROWS]]
                made.append(Made(pa.table({"right": right}), {"tokens": float(i)}, 1 / len(chosen)))
            return made

        make_shards(list(suites), make, 2 * ROWS)


def started(root: pathlib.Path) -> set[str]:
    """Process ids of the runners that have begun an artifact."""
    lines = (root / "made.log").read_text().split("\n")[:-1]
    return {line.split()[2] for line in lines if line.split()[1] == "start"}


def nodes(nap: float = 0.002) -> dict[str, Node]:
    a = Numbers(label=("numbers", "a"), seed=1, nap=nap)
    b = Numbers(label=("numbers", "b"), seed=2, nap=nap)
    c = Doubled(label=("doubled", "b"), source=b)
    return {"a": a, "c": c, "d": Folder(label=("folder", "b"), steps=10, source=c, nap=nap)}


def answers(nap: float = 0.005) -> list[Node]:
    """Answers of three models to four suites, and the folder that training them leaves."""
    models = [Numbers(label=("numbers", str(i)), seed=i, nap=nap) for i in range(3)]
    nodes: list[Node] = [
        Folder(label=("folder", str(i)), steps=10, source=model, nap=nap)
        for i, model in enumerate(models)
    ]
    return nodes + [
        Answers(label=("answers", str(i), str(suite)), source=model, suite=suite, nap=nap)
        for i, model in enumerate(models)
        for suite in range(4)
    ]


def independent(runners: int) -> list[Node]:
    return [
        Meeting(label=("meeting", str(i)), number=i, runners=runners) for i in range(INDEPENDENT)
    ]


def child(root: str, wanted: list[Node], die_at: int | None = None) -> int:
    """Forks a process that makes `wanted`, or kills itself at file-system event `die_at`."""
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(BaseException):
        if die_at is not None:
            count = iter(range(10**9))
            for name in ("fsync", "replace", "unlink", "mkdir", "rename", "symlink"):
                setattr(os, name, _deadly(getattr(os, name), count, die_at))
        run(wanted, Workspace(root), STUDY, show=False)
        os._exit(0)
    os._exit(1)


def study(root: str, nap: float = 0.002, die_at: int | None = None) -> int:
    """`child` of the whole toy study."""
    return child(root, list(nodes(nap).values()), die_at)


def _deadly(function, count, die_at: int):
    def wrapped(*args, **kwargs):
        if next(count) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def crash_everywhere(root: str) -> int:
    """Kills one run at every file-system event, each in a workspace of its own, and continues it.

    Returns the number of events.
    """
    at = 0
    while True:
        place = f"{root}/{at:03d}"
        if code(study(place, 0.0, at)) == 0:
            return at
        assert code(study(place, 0.0)) == 0, f"not continued after event {at}"
        at += 1


def crash_randomly(root: str, seed: int) -> int:
    """Kills runs of one workspace after random times, until one gets through; returns the kills."""
    rng, kills = random.Random(seed), 0
    while True:
        pid = study(root, 0.004)
        if kills >= 25:
            assert code(pid) == 0
            return kills
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        kills += code(pid) == -signal.SIGKILL


def main(mode: str, root: str, number: str = "0") -> None:
    os.makedirs(root, exist_ok=True)
    pa.Table.from_pylist(
        [{"x": 1}]
    )  # what this and the next line import is not imported by every child
    versions()
    os.fsync = lambda _: None  # what a killed process wrote, the kernel keeps
    if mode == "once":
        assert code(study(root)) == 0
    elif mode == "everywhere":
        print(crash_everywhere(root))
    elif mode == "randomly":
        print(crash_randomly(root, int(number)))
    elif mode == "together":
        assert [code(pid) for pid in [study(root, 0.02) for _ in range(3)]] == [0, 0, 0]
    elif mode == "answers":
        pids = [child(root, answers()) for _ in range(int(number))]
        assert [code(pid) for pid in pids] == [0] * int(number)
    elif mode == "independent":
        wanted = independent(int(number))
        pids = [child(root, wanted) for _ in range(int(number))]
        assert [code(pid) for pid in pids] == [0] * int(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
