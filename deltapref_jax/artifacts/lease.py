"""Leases, by which processes and hosts share work: each claims a piece, and claims expire.

A claim is a small JSON file with its owner and its expiry time, which a thread renews. It is read
and replaced under a file lock, so that on one file system two processes never hold the same lease.
Object stores have no such lock, so two hosts may rarely claim the same piece there. The same holds
for hosts whose clocks differ by most of a lease, and for a process that was suspended past its own
expiry. The work is then done twice. That costs time only, because every process that makes a shard
writes the same bytes.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

LEASE_SECONDS = 60.0
_held: set["Lease"] = set()


def release_all() -> None:
    """Releases every lease that this process holds."""
    for lease in list(_held):
        lease.release()


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
        self._stop = threading.Event()
        self.lost = False

    def take(self) -> bool:
        """Takes the lease if it is free, expired or of a dead process; returns whether it did."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self._held_by_another():
                return False
            self._write()
        _held.add(self)
        threading.Thread(target=self._renew, daemon=True).start()
        return True

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
        with open(os.fspath(self._path.parent / ".lock"), "a") as file:
            # A file system without locks is treated like an object store.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, Any]:
        """The claim as it is stored, or {} if it is missing, damaged or incomplete."""
        try:
            claim = json.loads(self._path.read_text())
            return claim if {"host", "pid", "id", "expires"} <= claim.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _held_by_another(self) -> bool:
        claim = self._read()
        if not claim or claim["id"] == self._owner["id"] or claim["expires"] < time.time():
            return False
        if claim["host"] == self._owner["host"]:
            try:
                os.kill(claim["pid"], 0)  # Signal 0 only checks whether the process exists.
            except ProcessLookupError:
                return False
            except PermissionError:  # It exists and belongs to another user.
                pass
        return True

    def _write(self) -> None:
        text = json.dumps(self._owner | {"expires": time.time() + self._seconds})
        if self._remote:
            self._path.write_text(text)
            return
        # The rename prevents half-written claims after a crash, or on a file system without locks.
        temporary = self._path.parent / f".{self._owner['id']}"
        temporary.write_text(text)
        temporary.replace(self._path)

    def _renew(self) -> None:
        """Renews after each quarter of the lease, so that one failed write does not lose it."""
        while not self._stop.wait(self._seconds / 4):
            with contextlib.suppress(Exception), self._locked():
                if self._stop.is_set():
                    return
                if self._read().get("id") != self._owner["id"]:
                    self.lost = True
                    return
                self._write()
