"""Disturbs a toy study in every way that a machine can, and proves that it ends as if undisturbed.

    python -m tests.kill.harness --cases 100 --seed 0
    python -m tests.kill.harness --seed 0 --case 17 --keep /tmp/kills   # one case again

A case runs `python -m launch.ablate` in one to three processes on one workspace, disturbs them, and
gives the same command again until it ends with 0. Then every table, policy, page and index equals
that of an undisturbed run, no file and no process is left over, every exit code is the documented
one, and stderr has one sentence and no traceback. The table on stdout has a line for each case, and
the exit code is 1 if any failed.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

HOUR = 3600.0
DISK, BYTES = "full disk", "no more bytes"  # a small tmpfs; a limit on the process


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to disturb a study.

    Attributes:
      what: a signal, DISK, BYTES, or None for no disturbance.
      when: "time", or "event": before a call that changes the workspace.
      runners: processes that start together.
      victims: how many of them are disturbed.
      times: how often the command is given and disturbed, before it is left alone.
      clock: seconds by which the clocks of neighbouring runners differ.
    """

    what: signal.Signals | str | None
    when: str = "event"
    runners: int = 1
    victims: int = 1
    times: int = 1
    clock: float = 0.0

    @property
    def name(self) -> str:
        """The kind in words."""
        what = self.what.name if isinstance(self.what, signal.Signals) else self.what or "nothing"
        words = [what]
        if self.times > 1:
            words.append(f"{self.times} times")
        if self.runners > 1:
            words.append(f"{self.victims if self.what else 0} of {self.runners} runners")
        if self.clock:
            words.append(f"clocks {self.clock / HOUR:+.0f} h")
        return ", ".join(words)


KINDS = (
    Kind(SIGKILL, "event"),
    Kind(SIGTERM, "event"),
    Kind(SIGINT, "event"),
    Kind(SIGSTOP, "event"),
    Kind(DISK),
    Kind(BYTES, "event"),
    Kind(SIGKILL, "time"),
    Kind(SIGTERM, "time"),
    Kind(SIGINT, "time"),
    Kind(SIGSTOP, "time"),
    Kind(SIGKILL, "event", times=4),
    Kind(None, runners=2),
    Kind(None, runners=3),
    Kind(None, runners=2, clock=HOUR),
    Kind(SIGKILL, "event", runners=2),
    Kind(SIGKILL, "time", runners=3, victims=2),
    Kind(SIGTERM, "event", runners=2),
    Kind(SIGTERM, "time", runners=3, victims=3),
    Kind(SIGINT, "event", runners=3, victims=2),
    Kind(SIGSTOP, "event", runners=2),
    Kind(SIGSTOP, "event", clock=-HOUR),
    Kind(SIGKILL, "event", clock=-HOUR),
    Kind(BYTES, "time", runners=2),
    Kind(SIGTERM, "time", times=3),
    Kind(DISK, runners=2, victims=2),
    Kind(SIGKILL, "time", runners=2, victims=2, clock=HOUR),
)
"""A run of at least so many cases has each of them once."""

# Exit codes of a runner that was disturbed while it ran. A SIGTERM before Python could handle it
# kills the process. A suspended runner may find that all is done, or that it was taken over.
CODES: dict[Any, set[int]] = {
    SIGKILL: {-SIGKILL},
    SIGTERM: {75, -SIGTERM},
    SIGINT: {130},
    SIGSTOP: {0, 75},
    DISK: {0, 2},
    BYTES: {0, 2},
}
SENTENCES = {
    2: r"\S+ .*cannot be written .*; (make room|choose another) .*",
    75: r"Stopped by SIGTERM.* Run the same command to continue.*|Another process took over .*",
    130: r"Stopped.*",
}
# Lines of progress, and of libraries.
NOTICES = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*|\[transformers\] PyTorch was not found\..*|"
)


@dataclasses.dataclass
class Reference:
    """The undisturbed run that all cases are compared with."""

    arguments: list[str]
    contents: dict[str, Any]
    seconds: float
    events: int
    kilobytes: int


@dataclasses.dataclass
class Result:
    """One line of the table."""

    number: int
    kind: str
    moment: str
    codes: str
    seconds: float
    problems: list[str]


def run_case(number: int, seed: int, root: pathlib.Path, reference: Reference) -> Result:
    """Disturbs the study as the case says, lets it end, and compares."""
    case = _Case(KINDS[number % len(KINDS)], random.Random(f"{seed}|{number}"), root, reference)
    began = time.monotonic()
    with case.disk():
        for _ in range(case.kind.times):
            case.disturbed()
        case.make_room()
        case.undisturbed()
        case.compare()
    return Result(
        number,
        case.kind.name,
        "; ".join(case.moments) or "-",
        " ".join(case.codes),
        time.monotonic() - began,
        case.problems,
    )


class _Case:
    """One case at work; `moments`, `codes` and `problems` are what the table says of it."""

    def __init__(self, kind: Kind, rng: random.Random, root: pathlib.Path, reference: Reference):
        self.kind, self._rng, self._root, self._reference = kind, rng, root, reference
        self._workspace = root / "workspace"
        self.moments: list[str] = []
        self.codes: list[str] = []
        self.problems: list[str] = []

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """The workspace's disk: a small one where the case wants it, for as long as it runs."""
        self._workspace.mkdir(parents=True)
        if self.kind.what != DISK:
            yield
            return
        kilobytes = int(self._reference.kilobytes * self._rng.uniform(0.02, 0.95))
        self.moments.append(f"{kilobytes} of {self._reference.kilobytes} kB")
        _mount(self._workspace, kilobytes)
        try:
            yield
        finally:
            _unmount(self._workspace)

    def make_room(self) -> None:
        """Makes a small disk large."""
        if self.kind.what == DISK:
            _mount(self._workspace, 100 * self._reference.kilobytes, again=True)

    def disturbed(self) -> None:
        """The command in all its runners, of which the victims are disturbed."""
        from tests.kill.runners import Disturbance, Runner

        kind, what = self.kind, None if self.kind.what == DISK else self.kind.what
        by_event = what is not None and kind.when == "event"
        events = [
            self._rng.randint(1, max(self._reference.events // kind.runners, 1))
            for _ in range(kind.victims)
        ]
        runners = [
            Runner(
                self._reference.arguments,
                self._workspace,
                Disturbance(what, events[i]) if by_event and i < kind.victims else None,
                kind.clock if (i + (kind.runners == 1)) % 2 else 0.0,
            )
            for i in range(kind.runners)
        ]
        victims = runners[: kind.victims] if kind.what else []
        if kind.when == "time" and what:
            wait = self._rng.uniform(0.05, 0.95) * self._reference.seconds
            began = time.monotonic()
            runners[0].wait(lambda: time.monotonic() - began > wait)
            self.moments.append(f"{wait:.2f} s")
            for victim in victims:
                victim.disturb(what)
        if what == SIGSTOP:
            runners += self._wake(victims[0], runners[1:])
        for runner in runners:
            runner.wait()
        self.moments += [v.moment for v in victims if v.moment]
        for runner in runners:
            hit = kind.what == DISK or runner.hit
            self._check(runner, CODES[kind.what] if hit and runner in victims else {0})

    def _wake(self, sleeper: Any, others: Sequence[Any]) -> list[Any]:
        """Continues a suspended runner after its lease ran out, while its successor works or after.

        Returns the successor if it was started for that.
        """
        from tests.kill.runners import LEASE_SECONDS, Runner

        sleeper.wait()
        started = [] if others else [Runner(self._reference.arguments, self._workspace)]
        successor = [*others, *started][0]
        until = time.monotonic() + LEASE_SECONDS + self._rng.choice((0.5, 1.0, 2.0, 60.0))
        successor.wait(lambda: time.monotonic() > until)
        if sleeper.look() != "ended":
            os.kill(sleeper.pid, SIGCONT)
        return started

    def undisturbed(self) -> None:
        """The same command again."""
        from tests.kill.runners import Runner

        runner = Runner(self._reference.arguments, self._workspace)
        runner.wait()
        self._check(runner, {0})

    def _check(self, runner: Any, expected: set[int]) -> None:
        """Exit code, stderr and what is left of a runner that has ended."""
        from tests.kill.runners import session_members

        self.codes.append(str(runner.code))
        lines = [line for line in runner.stderr.splitlines() if not NOTICES.fullmatch(line)]
        if runner.code not in expected:
            codes = " or ".join(map(str, sorted(expected)))
            self.problems.append(
                f"exit code {runner.code} instead of {codes} ({' / '.join(lines)})"
            )
        wanted = SENTENCES.get(runner.code or 0)
        right = len(lines) == 1 and re.fullmatch(wanted, lines[0]) if wanted else not lines
        if not right:
            self.problems.append(f"stderr of exit code {runner.code}: {' / '.join(lines)}")
        deadline = time.monotonic() + 5
        while (members := session_members(runner.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if members:
            self.problems.append(f"{len(members)} processes are left over")
            os.killpg(runner.pid, SIGKILL)
        runner.close()

    def compare(self) -> None:
        """Compares the workspace with the undisturbed one."""
        from tests.kill.compare import contents, differences

        self.problems += differences(self._reference.contents, contents(self._workspace))


def make_reference(root: pathlib.Path) -> Reference:
    """Writes the study and runs it twice: to fill the compilation cache, and to be compared with.

    Raises:
      RuntimeError: the undisturbed study fails, or its two runs differ.
    """
    from tests.kill.compare import contents, differences
    from tests.kill.runners import Runner
    from tests.kill.study import write_study

    # Only children start JAX's backends: a process with their threads could not be forked.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(write_study, root).result()
    arguments = [f"--config={root / 'study.py'}"]
    found, runners = [], []
    for name in ("first", "second"):
        workspace = root / name / "workspace"
        workspace.mkdir(parents=True)
        runner = Runner(arguments, workspace, warm=name == "first")
        runner.wait()
        if runner.code:
            raise RuntimeError(f"The undisturbed study ends with {runner.code}: {runner.stderr}")
        found.append(contents(workspace))
        runners.append(runner)
    if problems := differences(*found):
        raise RuntimeError(f"Two undisturbed runs differ: {'; '.join(problems)}")
    blocks = sum(path.lstat().st_blocks for path in workspace.rglob("*"))
    return Reference(arguments, found[1], runner.seconds, runner.events, blocks // 2)


def private_mounts() -> bool:
    """Gives this process mounts of its own, which end with it; returns whether it may have them."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS
    if libc.unshare(new_user | new_mounts):
        return False
    pathlib.Path("/proc/self/setgroups").write_text("deny")
    pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    pathlib.Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with _scratch() as folder:
        try:
            _mount(folder, 64)
        except OSError:
            return False
        _unmount(folder)
    return True


@contextlib.contextmanager
def _scratch() -> Iterator[pathlib.Path]:
    """A folder that is removed; a TemporaryDirectory would be when a forked child exits."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mount(folder: pathlib.Path, kilobytes: int, again: bool = False) -> None:
    """Mounts a tmpfs of a size, or gives the one that is mounted another size."""
    remount = 32 if again else 0  # MS_REMOUNT
    options = f"size={kilobytes}k".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(remount), options):
        raise OSError(ctypes.get_errno(), f"{folder} cannot be mounted")


def _unmount(folder: pathlib.Path) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(folder), 2)  # MNT_DETACH


def _run_and_clean(
    number: int, seed: int, root: pathlib.Path, reference: Reference, keep: pathlib.Path | None
) -> Result:
    folder = root / f"case-{number}"
    try:
        result = run_case(number, seed, folder, reference)
        if keep and result.problems:
            shutil.copytree(folder, keep / folder.name, symlinks=True, dirs_exist_ok=True)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100, help="how many")
    parser.add_argument("--case", type=int, nargs="+", help="these cases alone")
    parser.add_argument("--seed", type=int, default=0, help="of moments and sizes")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for workspaces that differ")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    return parser.parse_args()


def _environment(root: pathlib.Path) -> None:
    """What JAX and other libraries read when they are imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "HF_HUB_OFFLINE": "1",
        "NO_GCE_CHECK": "true",
    }
    os.environ.pop("XLA_FLAGS", None)


def main() -> int:
    """Runs the cases and prints their table; returns the exit code."""
    given, began = _parse(), time.monotonic()
    # Before JAX is imported, since a process with threads cannot have a user namespace of its own.
    mounts = private_mounts()
    numbers = given.case or list(range(given.cases))
    if not mounts:
        print("No tmpfs may be mounted here: cases of a full disk are left out.")
        numbers = [n for n in numbers if KINDS[n % len(KINDS)].what != DISK]
    results: list[Result] = []
    with _scratch() as root:
        _environment(root)
        reference = make_reference(root)
        print(
            f"undisturbed: {reference.seconds:.1f} s, {reference.events} file-system events, "
            f"{len(reference.contents)} paths, {reference.kilobytes} kB",
            flush=True,
        )
        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(given.jobs, fork) as pool:
            waiting = [
                pool.submit(_run_and_clean, n, given.seed, root, reference, given.keep)
                for n in numbers
            ]
            for future in concurrent.futures.as_completed(waiting):
                results.append(future.result())
                _print(results[-1])
    failed = [
        result.number for result in sorted(results, key=lambda r: r.number) if result.problems
    ]
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(r) for r in results]))
    print(
        f"{len(results)} cases, {len(results) - len(failed)} equal, {len(failed)} failed"
        f"{' (' + ', '.join(map(str, failed)) + ')' if failed else ''}; seed {given.seed}, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def _print(result: Result) -> None:
    equal = "; ".join(result.problems) or "equal"
    print(
        f"{result.number:4}  {result.kind:42}  {result.seconds:5.1f} s  codes {result.codes:12}  "
        f"{result.moment}  {equal}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
