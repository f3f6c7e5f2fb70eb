"""Leases, by which processes and hosts share work: each claims a piece, and claims expire.

A claim is a small JSON file with its owner, which a thread rewrites. It expires when it has not
been rewritten for a lease's time. That is judged by the times of the file system and of the process
that looks, and never by a time that another host wrote: clocks of hosts may differ by hours. Claims
are read and replaced under a file lock, so that on one file system two processes never hold the
same lease. Object stores have no such lock, so two hosts may rarely claim the same piece there. A
process that was suspended past its own expiry loses its lease too, and notices when it asks
(`Lease.held`). A shard is then made twice. That costs time only, because every process that makes a
shard writes the same bytes.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from deltapref_jax.files import ArtifactError

LEASE_SECONDS = 60.0
_held: set["Lease"] = set()
_seen: dict[str, tuple[str, float]] = {}
"""Claims of others, by path: their text, and the time (`_clock`) at which it was first seen."""


class LostLease(ArtifactError):
    """Another process took over the artifact at work; the sentence names it."""

    code = os.EX_TEMPFAIL  # 75, as after a preemption: run the same command again


def _clock() -> float:
    """Seconds that also pass while the machine is suspended, where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def release_all() -> None:
    """Releases every lease that this process holds."""
    for lease in list(_held):
        lease.release()


def remove_claims(folder: epath.Path) -> None:
    """Removes the claims on a local artifact that is complete, with their folder and its lock.

    They are those of killed processes, or of one that is about to remove its claim itself. The
    lock may go too: a process that still waits for it, or makes it anew, finds the artifact
    complete, and claims of a complete artifact guard nothing.
    """
    # Under the lock no process is writing a claim, but one may make the lock anew, and `rmdir` says
    # with a ValueError that the folder is not empty.
    with contextlib.suppress(OSError, ValueError), Lease(folder / "all")._locked():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _pid_namespace() -> str:
    """Host name and PID namespace, within which a process id identifies a process.

    Containers on one host have namespaces of their own.
    """
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


class Lease:
    """The exclusive right to do one piece of work, renewed by a thread until `release`.

    Attributes:
      lost: whether another process took the lease over because it was not renewed in time.
    """

    def __init__(self, path: epath.Path, seconds: float = LEASE_SECONDS):
        self._path, self._seconds = path, seconds
        self._owner = {"host": _pid_namespace(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._remote = "://" in os.fspath(path)
        self._lock = os.fspath(path.parent / ".lock")
        self._stop = threading.Event()
        self._renewed = _clock()
        self.lost = False

    def take(self, on_taken: Callable[[], None] = lambda: None) -> bool:
        """Takes the lease if it is free, expired or of a dead process; returns whether it did.

        It is not taken either where another process completes the artifact at this moment and
        removes the claims (`remove_claims`).

        Args:
          on_taken: called before any other process can take the lease over.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._locked():
                if self._held_by_another():
                    return False
                self._write()
                on_taken()
        except FileNotFoundError:
            return False
        _held.add(self)
        threading.Thread(target=self._keep_renewing, daemon=True).start()
        return True

    def held(self) -> bool:
        """Whether the claim is still this process's own, as its file says at this moment.

        The claim is renewed if its thread was late. In a bucket only a late claim is read.
        """
        late = _clock() - self._renewed > self._seconds / 2
        if not self.lost and (late or not self._remote):
            # A claim that cannot be read at the moment is not lost.
            with contextlib.suppress(Exception):
                self._renew() if late else self._look()
        return not self.lost

    def release(self) -> None:
        """Stops renewal and deletes the claim if it is still this process's own."""
        self._stop.set()
        _held.discard(self)
        # A bucket raises errors of many types. If the claim cannot be deleted, it expires.
        with contextlib.suppress(Exception), self._locked():
            if self._read().get("id") == self._owner["id"]:
                self._path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._remote:
            yield
            return
        with open(self._lock, "a") as file:
            # A file system without locks is treated like an object store.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _text(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _read(self) -> dict[str, Any]:
        """The claim as it is stored, or {} if it is missing, damaged, incomplete or nonsense."""
        try:
            return _parse(self._text())
        except (OSError, ValueError):
            return {}

    def _held_by_another(self) -> bool:
        claim = self._read()
        if not claim or claim["id"] == self._owner["id"] or self._expired(json.dumps(claim)):
            return False
        # A claim of this host whose process is gone need not expire first.
        if claim["host"] == self._owner["host"]:
            try:
                os.kill(claim["pid"], 0)  # Signal 0 only checks whether the process exists.
            except ProcessLookupError:
                return False
            except PermissionError:  # It exists and belongs to another user.
                pass
        return True

    def _expired(self, text: str) -> bool:
        """Whether the claim `text` of another has not been rewritten for a lease's time."""
        path, now = os.fspath(self._path), _clock()
        # The time starts again whenever the claim was rewritten.
        if path not in _seen or _seen[path][0] != text:
            _seen[path] = text, now
        if now - _seen[path][1] >= self._seconds:
            return True
        with contextlib.suppress(OSError):
            if not self._remote:  # The file system's own clock gives both times.
                os.utime(self._lock)
                age = os.stat(self._lock).st_mtime - os.stat(path).st_mtime
                return age >= self._seconds
        return False

    def _write(self) -> None:
        # The expiry is for people; to others it shows that the claim was rewritten.
        text = json.dumps(self._owner | {"expires": time.time() + self._seconds})
        if self._remote:
            self._path.write_text(text)
        else:
            # The rename prevents half-written claims after a crash, or on a file system without
            # locks.
            temporary = self._path.parent / f".{self._owner['id']}"
            try:
                temporary.write_text(text)
                temporary.replace(self._path)
            except BaseException:  # The exceptions of signals are none of Exception.
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        self._renewed = _clock()

    def _look(self) -> None:
        """Notes that the lease is lost if the claim is another's or gone."""
        try:
            self.lost = _parse(self._text()).get("id") != self._owner["id"]
        except ValueError:
            self.lost = True

    def _renew(self) -> None:
        try:
            with self._locked():
                # After `release` the claim is deleted and must not come back.
                if not self._stop.is_set():
                    self._look()
                    if not self.lost:
                        self._write()
        except FileNotFoundError:
            # The folder of claims is gone: another process completed the artifact.
            self.lost = True

    def _keep_renewing(self) -> None:
        """Renews after each quarter of the lease, so that one failed write does not lose it."""
        while not self.lost and not self._stop.wait(self._seconds / 4):
            with contextlib.suppress(Exception):
                self._renew()


def _parse(text: str) -> dict[str, Any]:
    """A claim, or {} if a field is missing or is none that a process could have written.

    Raises:
      ValueError: it is no JSON.
    """
    claim = json.loads(text or "{}")
    if not isinstance(claim, dict) or not {"host", "pid", "id", "expires"} <= claim.keys():
        return {}
    # Process 0, and negative ones, would mean whole groups of processes to `os.kill`.
    pid = claim["pid"]
    return claim if isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 2**31 else {}
