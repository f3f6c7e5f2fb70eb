"""Runners of the toy study as forked children that are disturbed at a file-system event.

The parent has imported everything, so that a child is the user's command within milliseconds, with
its own process, signals, exit code and stderr. What is changed in a child before it becomes the
command: the length of leases, the clock where a case asks for it, and an audit hook that counts the
calls that change the workspace and disturbs the process before one of them.
"""

import dataclasses
import fcntl
import itertools
import mmap
import os
import pathlib
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable

import ml_collections.config_flags  # noqa: F401  (imported before the forks)

import deltapref_jax.stages.report  # noqa: F401
from deltapref_jax.artifacts import job, lease
from tests.launch import forks
from tests.launch.forks import jax

LEASE_SECONDS = 3.0  # instead of a minute; a runner that is suspended for longer is taken over
LIMIT_SECONDS = 120.0  # after which a runner hangs and is killed
NO_MORE_BYTES = "no more bytes"
"""The disturbance after which no file of the process can grow, as on a disk that is full."""

_HEADER = struct.Struct("qq?")  # events, number and whether the process was disturbed
_PIPE_BYTES = 1 << 20  # more than a runner ever prints


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What happens to a runner: a signal or NO_MORE_BYTES, before file-system event `event`."""

    what: signal.Signals | str
    event: int


def disturb(pid: int, what: signal.Signals | str) -> None:
    """Sends the signal, or takes from the process the right to make files longer."""
    if what == NO_MORE_BYTES:
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    else:
        os.kill(pid, what)


class Runner:
    """One runner at work, and what became of it.

    Attributes:
      code: exit code, or minus the signal that killed it; None while it runs.
      seconds: from start to end.
      hit: whether it was disturbed while it ran.
    """

    def __init__(
        self,
        arguments: list[str],
        workspace: pathlib.Path,
        disturbance: Disturbance | None = None,
        clock: float = 0.0,
        warm: bool = False,
    ):
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # written by the child, read by the parent
        self._err, err = os.pipe()
        fcntl.fcntl(err, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._err, False)
        self.code: int | None = None
        self.hit, self._text = False, b""
        self._began, self.seconds = time.monotonic(), 0.0
        self.pid = os.fork()
        if not self.pid:
            try:
                self._prepare(str(workspace), disturbance, clock, warm)
                arguments = [*arguments, f"--config.workspace={workspace}"]
                out = os.open(os.devnull, os.O_WRONLY)
                forks.become("launch.ablate", arguments, str(workspace.parent), out, err)
            finally:
                os._exit(99)
        os.close(err)

    def _prepare(
        self, workspace: str, disturbance: Disturbance | None, clock: float, warm: bool
    ) -> None:
        """Changes this process, which is the child, as the case wants it."""
        # A shell that starts the harness in the background has it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        lease.Lease.__init__.__defaults__ = (LEASE_SECONDS,)
        job.LEASE_SECONDS = LEASE_SECONDS
        # Only the first run writes the compilation cache, which a killed process could damage.
        seconds = 0 if warm else 1e9
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        if clock:
            _shift_clock(clock)
        count = itertools.count(1)

        def event(name: str) -> None:
            number = next(count)
            hit = disturbance is not None and number == disturbance.event
            self._note(number, hit, name)
            if hit:
                disturb(os.getpid(), disturbance.what)

        # A killed process loses nothing that it has written, so no disk needs to be waited for.
        os.fsync = lambda _: event("fsync")
        sys.addaudithook(_hook(workspace, event))

    def _note(self, number: int, hit: bool, name: str) -> None:
        _, at, before = _HEADER.unpack_from(self._shared)
        _HEADER.pack_into(self._shared, 0, number, number if hit else at, hit or before)
        if hit:
            self._shared[_HEADER.size : _HEADER.size + 200] = name.encode()[:200].ljust(200)

    @property
    def events(self) -> int:
        """How many calls have changed the workspace."""
        return _HEADER.unpack_from(self._shared)[0]

    @property
    def moment(self) -> str:
        """The event before which the runner was disturbed; "" if it was none."""
        _, number, hit = _HEADER.unpack_from(self._shared)
        if not hit:
            return ""
        name = self._shared[_HEADER.size : _HEADER.size + 200].decode(errors="replace").strip()
        return f"event {number}: {name}"

    def look(self) -> str:
        """The runner's state: "runs", "stopped" or "ended"."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            self.hit = self.hit or bool(self.moment)
            if pid and os.WIFSTOPPED(status):
                return "stopped"
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self._began
                return "ended"
        return "runs" if self.code is None else "ended"

    def wait(self, until: Callable[[], bool] = lambda: False) -> str:
        """Waits until the runner has stopped or ended, or `until` is true; returns its state."""
        while (state := self.look()) == "runs" and not until():
            if time.monotonic() - self._began > LIMIT_SECONDS:
                os.killpg(self.pid, signal.SIGABRT)
            time.sleep(0.002)
        return state

    def disturb(self, what: signal.Signals | str) -> None:
        """Disturbs the runner now, unless it has ended."""
        if self.look() != "ended":
            self.hit = True
            disturb(self.pid, what)

    @property
    def stderr(self) -> str:
        """All that the runner has printed on stderr."""
        while True:
            try:
                part = os.read(self._err, _PIPE_BYTES)
            except BlockingIOError:  # A process of the runner still holds the pipe.
                break
            if not part:
                break
            self._text += part
        return self._text.decode(errors="replace")

    def close(self) -> None:
        """Gives back what the parent holds; the runner has ended."""
        os.close(self._err)
        self._shared.close()


def _hook(workspace: str, event: Callable[[str], None]) -> Callable[[str, tuple], None]:
    """An audit hook (PEP 578) that calls `event` before the workspace is changed."""
    changes = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}

    def hook(name: str, arguments: tuple) -> None:
        if name == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif name not in changes:
            return
        path = arguments[1 if name in ("os.rename", "os.symlink") else 0]
        if isinstance(path, str | bytes | os.PathLike):
            path = os.fsdecode(path)
            if path.startswith(workspace):
                event(f"{name.removeprefix('os.')} {os.path.relpath(path, workspace)}")

    return hook


def _shift_clock(seconds: float) -> None:
    """Makes the clock of this process differ from that of the file system."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def session_members(pid: int) -> list[int]:
    """Processes of the session that a runner led, which should all be gone when it ended."""
    members = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # It has ended meanwhile.
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members
