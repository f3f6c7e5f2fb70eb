"""The process in which answers are graded, and the one that asks it.

    this process ──request──▶ worker: imports sympy, math-verify, reasoning-gym once
                                 └─ fork ──▶ child: confined, grades one answer, ends
    this process ◀──reply───  worker ◀──reply── child, or its end

The worker never parses an answer itself. A child that hangs, crashes or takes too much memory
costs its own time and not the imports, and a verdict depends on its question alone, not on what
was graded before.
"""

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from deltapref_jax.answers import sandbox
from deltapref_jax.answers.grade import GRADERS, Grader

WALL_SECONDS = 30.0  # of one answer; its CPU time ends sooner (`sandbox.CPU_SECONDS`)
START_SECONDS = 120.0  # more for imports, from a slow disk
_MAX_NOTE = 300  # characters

Reply = dict[str, Any]  # "correct" and "note"; or "import", from a child to its worker


class Worker:
    """Grades answers in a process that is started when needed and again when it died.

    A worker may be shared by threads; they take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        """The process id, while one runs."""
        return self._process.pid if self._process else None

    def grade(
        self,
        request: Mapping[str, Any],
        cpu_seconds: int = sandbox.CPU_SECONDS,
        seconds: float = WALL_SECONDS,
    ) -> tuple[bool, str]:
        """Whether the answer is right, and a note: "", "timeout", "the checker died", or an error.

        Args:
          request: "kind" (of `GRADERS`), "answer", and what the grader of this kind needs.
          cpu_seconds: CPU time of the grader.
          seconds: wall time of the grader.
        """
        line = json.dumps({**request, "cpu_seconds": cpu_seconds, "seconds": seconds}) + "\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = _start()
            try:
                reply = _ask(self._process, line.encode(), seconds + START_SECONDS)
            except TimeoutError:
                reply = {"correct": False, "note": "timeout"}
                self.close()
            except (EOFError, OSError):  # such as when the system ran out of memory
                reply = {"correct": False, "note": "the checker died"}
                self.close()
            except BaseException:  # such as Preempted: the next question must not get this reply
                self.close()
                raise
        return reply["correct"], reply["note"]

    def close(self) -> None:
        """Ends the process, and the child that may be grading."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # half a request may wait in the buffer
            process.stdin.close()


def _start() -> "subprocess.Popen[bytes]":
    """Starts a worker in a session of its own, so that Ctrl-C in the terminal does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",  # sympy's steps follow the order of sets
            "OPENBLAS_NUM_THREADS": "1",  # a process with threads must not fork
            "OMP_NUM_THREADS": "1",
        },
    )


def _ask(process: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> Reply:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    return json.loads(_read(process.stdout.fileno(), seconds, b"\n"))


def _read(fd: int, seconds: float, end: bytes = b"") -> bytes:
    """Reads up to `end`, or to the end of the file where `end` is empty.

    Raises:
      TimeoutError: it is not there in time.
      EOFError: the file ended before `end`.
    """
    deadline, data = time.monotonic() + seconds, b""
    while not end or not data.endswith(end):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        more = os.read(fd, 65536)
        if not more:
            if end:
                raise EOFError
            return data
        data += more
    return data


def serve() -> None:
    """The worker: answers each line of standard input by one line, until the input ends."""
    import gc
    import logging
    import warnings

    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "r+b") as null:  # what a library prints is no reply
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    gc.disable()  # so that a child shares the pages that it only reads
    absent: set[str] = set()
    for line in requests:
        request = json.loads(line)
        try:
            grader = GRADERS[request["kind"]](request)
            reply = _grade(grader, request, absent)
        except Exception as e:  # the prompt lacks what its grader needs
            reply = _failure(e)
        json.dump(reply, replies)
        print(file=replies, flush=True)


def _failure(e: BaseException) -> Reply:
    return {"correct": False, "note": f"{type(e).__name__}: {e}"[:_MAX_NOTE]}


def _grade(grader: Grader, request: Mapping[str, Any], absent: set[str]) -> Reply:
    """Grades in a child. A module that it lacks is imported here, and another child tries again."""
    while True:
        reply = _fork(grader, request, absent)
        if "import" not in reply:
            return reply
        try:
            importlib.import_module(reply["import"])
        except Exception:  # an optional one, or one that does not load
            absent.add(reply["import"])
        else:
            if reply["import"] not in sys.modules:
                absent.add(reply["import"])


def _fork(grader: Grader, request: Mapping[str, Any], absent: set[str]) -> Reply:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(write_end, grader, request, absent)
    os.close(write_end)
    try:
        data = _read(read_end, request["seconds"])
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return {"correct": False, "note": "timeout"}
    finally:
        os.close(read_end)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) == signal.SIGXCPU
        return {"correct": False, "note": "timeout" if late else "the checker died"}
    return json.loads(data) if data else {"correct": False, "note": "the checker died"}


def _child(
    write_end: int, grader: Grader, request: Mapping[str, Any], absent: set[str]
) -> NoReturn:
    """Grades one answer, confined, writes the reply and ends."""
    refused: list[str] = []

    def leave(reply: Reply) -> NoReturn:
        os.write(write_end, json.dumps(reply).encode())
        os._exit(0)

    def import_first(name: str) -> None:
        # Only parts of packages that the graders have loaded: nothing else is needed.
        if name in absent or name.split(".")[0] not in sys.modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        leave({"import": name})

    try:
        os.dup2(0, 2)
        os.dup2(write_end, 3)
        write_end = 3
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        sandbox.confine(refused.append, import_first, request["cpu_seconds"])
        correct = bool(grader(request["answer"]) >= 1.0)
    except BaseException as e:
        leave({"correct": False, "note": f"refused: {refused[0]}"} if refused else _failure(e))
    leave({"correct": correct, "note": f"refused: {refused[0]}" if refused and not correct else ""})
