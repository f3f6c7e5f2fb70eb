"""Runs `launch.compile_programs` in child processes, with a time limit for every program."""

import contextlib
import importlib.util
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltapref_jax.config import ConfigError
from launch.compile_programs import Request, Result

_START_SECONDS = 300.0  # of a child, until its first program: imports, and tracing of shapes


def check_compiler(cache: str) -> None:
    """Checks that there is a compiler for TPUs, and makes the folder for its results.

    Raises:
      ConfigError: libtpu is not installed, or the folder cannot be made.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "Compiling for TPUs needs the package libtpu, which is not installed and needs no TPU; "
            "run pip install 'deltapref-jax[tpu]'."
        )
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"--cache is {cache!r}, which cannot be made ({e.strerror}); name another folder."
        ) from e


def compile_each(request: Request, seconds: float, labels: Sequence[str] = ()) -> Iterator[Result]:
    """Compiles programs one by one; those that take too long or crash the compiler are left.

    Args:
      request: what is compiled.
      seconds: that one program may take.
      labels: of the programs, in this order; all without any.

    Yields:
      The result of every program.

    Raises:
      ConfigError: the programs cannot be made, with the sentence of the child.
    """
    left = list(labels)
    while True:
        with _Child(request, left) as child:
            left = child.labels()
            yield from child.results(seconds)
            left = left[child.seen :]
            # A child ends early only after a program that it did not survive.
            if not left or not child.seen:
                return


class _Child:
    """A process that compiles."""

    def __init__(self, request: Request, labels: Sequence[str]):
        self._folder = tempfile.TemporaryDirectory()
        place = Path(self._folder.name) / "request"
        place.write_bytes(pickle.dumps((request, list(labels))))
        self._errors = Path(self._folder.name) / "errors"
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch.compile_programs", str(place)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.seen = 0  # programs that it began with

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        # The threads of the compiler do not end by themselves in the middle of a program.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._folder.cleanup()

    def labels(self) -> list[str]:
        """Labels of the programs that it will compile.

        Raises:
          ConfigError: it ended, or says nothing.
        """
        mark, value = self._next(_START_SECONDS)
        if mark != "list":
            sentence = value if mark == "error" else f"{mark}: {self._last_error()}"
            raise ConfigError(f"The programs of the config cannot be made: {sentence}")
        return list(value)

    def results(self, seconds: float) -> Iterator[Result]:
        """Yields the results of its programs; of one that it did not finish, what is known."""
        while True:
            mark, value = self._next(_START_SECONDS)
            if mark != "start":
                return
            self.seen += 1
            known = Result(**value)
            mark, value = self._next(seconds)
            if mark == "done":
                yield Result(**value)
                continue
            if mark == "timed out":
                known.status, known.seconds = "timed out", seconds
            else:
                known.status, known.error = "crashed", self._last_error()
            yield known
            return

    def _next(self, seconds: float) -> tuple[str, Any]:
        """The next message; its mark is "timed out" or "ended" where there is none."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if not line:
                return "ended", None
            if line.startswith("@"):
                mark, _, value = line[1:].partition(" ")
                return mark, json.loads(value)
        return "timed out", None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def _last_error(self) -> str:
        """The last line that the child or its compiler wrote."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it wrote no error"
