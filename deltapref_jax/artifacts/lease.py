"""Leases: processes and hosts share work by claiming pieces of it; a claim that is not renewed expires.

A claim is a small JSON file with its owner and the time it runs out; a thread renews it. It is judged and replaced
under a file lock, so that on one file system two processes never hold it at once. Object stores have no such lock:
there two hosts may rarely claim the same piece. So may hosts whose clocks differ by most of a lease, and a process that
slept through its own. Work is then done twice, which costs time and nothing else, since whoever makes a shard makes the
same bytes.
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
    """Gives back every lease of this process."""
    for lease in list(_held):
        lease.release()


def _here() -> str:
    """Host and process namespace: where a process id means something."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


class Lease:
    """The right to do one piece of work, kept alive until `release`.

    Attributes:
      lost: another process took the lease over because this one did not renew it in time.
    """

    def __init__(self, path: epath.Path, seconds: float = LEASE_SECONDS):
        self._path, self._seconds = path, seconds
        self._owner = {"host": _here(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._remote = "://" in os.fspath(path)
        self._stop = threading.Event()
        self.lost = False

    def take(self) -> bool:
        """Whether the lease is ours now; one that expired, or whose process is gone, is taken over."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self._held_by_another():
                return False
            self._write()
        _held.add(self)
        threading.Thread(target=self._renew, daemon=True).start()
        return True

    def release(self) -> None:
        """Gives the lease back."""
        self._stop.set()
        _held.discard(self)
        with (
            contextlib.suppress(Exception),
            self._locked(),
        ):  # a bucket's errors are of many kinds; the lease expires
            if self._read().get("id") == self._owner["id"]:
                self._path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._remote:
            yield
            return
        with open(os.fspath(self._path.parent / ".lock"), "a") as file:
            with contextlib.suppress(
                OSError
            ):  # a file system without locks is treated like an object store
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, Any]:
        try:
            held = json.loads(self._path.read_text())
            return held if {"host", "pid", "id", "expires"} <= held.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _held_by_another(self) -> bool:
        held = self._read()
        if not held or held["id"] == self._owner["id"] or held["expires"] < time.time():
            return False
        if held["host"] == self._owner["host"]:
            try:
                os.kill(held["pid"], 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass
        return True

    def _write(self) -> None:
        text = json.dumps(self._owner | {"expires": time.time() + self._seconds})
        if self._remote:
            self._path.write_text(text)
            return
        temporary = self._path.parent / f".{self._owner['id']}"
        temporary.write_text(text)
        temporary.replace(self._path)

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            with contextlib.suppress(Exception), self._locked():
                if self._stop.is_set():
                    return
                if self._read().get("id") != self._owner["id"]:
                    self.lost = True
                    return
                self._write()
