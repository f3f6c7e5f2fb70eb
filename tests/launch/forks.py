"""Runs entry points in forks of one process that has imported everything: `python forks.py`.

A line of JSON on stdin has the entry point, its arguments, the folder that it runs in, its
environment and a folder for what it prints; the answer is its exit code. So a case takes a fraction
of a second and is otherwise what a user's command is: its own process, with its exit code, its
stderr and its signals.
"""

import json
import os
import runpy
import signal
import sys
import time
from typing import NoReturn

import flax.nnx  # noqa: F401
import gguf  # noqa: F401
import jax  # noqa: F401  (imported before the forks, and its backends start in them)
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import transformers  # noqa: F401

import deltapref_jax.analysis.report  # noqa: F401
import deltapref_jax.data.sources  # noqa: F401
import deltapref_jax.stages.nursery  # noqa: F401
import deltapref_jax.stages.pairs_file  # noqa: F401
import deltapref_jax.stages.study  # noqa: F401

SECONDS = 120  # after which a case is killed


def child(
    entry: str, arguments: list[str], folder: str, environment: dict[str, str], printed: str
) -> None:
    """Becomes the entry point, with files for what it prints."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    out, err = (os.open(os.path.join(printed, name), flags, 0o644) for name in ("out", "err"))
    os.environ.clear()
    os.environ.update(environment)
    become(entry, arguments, folder, out, err)


def become(entry: str, arguments: list[str], folder: str, out: int, err: int) -> NoReturn:
    """Runs the entry point in a session of its own, so that all of it can be killed, and exits."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(folder)
    sys.argv = [entry, *arguments]
    code = 1
    try:
        runpy.run_module(entry, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else bool(e.code)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Answers every line."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(*json.loads(line))
        deadline, status = time.monotonic() + SECONDS, 0
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.005)
        status = ended[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    main()
