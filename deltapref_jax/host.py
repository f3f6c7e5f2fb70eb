"""This process: its place in a JAX job, its notice to leave, what it runs on. JAX is not imported here, only asked."""

import atexit
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

_PACKAGES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
    "pyarrow",
    "deltapref-jax",
)


def process() -> tuple[int, int]:
    """Index of this process in its JAX job, and how many there are; (0, 1) where no such job was joined."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def agreed(here: bool) -> bool:
    """What process 0 says; every process of the JAX job must ask."""
    if process()[1] == 1:
        return here
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(here)))


class Preempted(BaseException):
    """The machine is wanted back. Like KeyboardInterrupt this is no error that a caller may swallow."""

    code = 75
    """Exit code of a program that left so (EX_TEMPFAIL of sysexits.h: the same command again will do)."""


_STOPPED = "Stopped by SIGTERM. Run the same command to continue; finished work is kept."


def _leave(*_: Any) -> None:
    raise Preempted(_STOPPED)


def leave_on_sigterm() -> None:
    """From now on SIGTERM raises `Preempted` in the main thread, so that leases are given back on the way out."""
    signal.signal(signal.SIGTERM, _leave)


class Company:
    """The processes of a JAX job, which leave together: what stops one, SIGTERM or an error, stops all within seconds.

    A process that stopped alone would leave the others waiting for it in a collective. So two threads listen to JAX's
    coordination service: for the SIGTERM of any process, which JAX's own handler passes on there, and for the word of a
    process that stops. They give back the leases and end the process themselves, for its main thread may be waiting for
    one that is gone. While a `Notice` is entered, SIGTERM is its to answer.

    Args:
      client: of the coordination service.
      index: of this process.
      count: of all.
      parting: gives back what is held.
    """

    # where XLA's preemption_sync_manager.cc says that a process was told to leave
    _NOTICE = "RECEIVED_PREEMPTION_NOTICE"
    _WORD, _GONE = "deltapref/stops", "deltapref/gone"
    _PATIENCE = 10_000  # ms that process 0, which runs the service, stays for the others

    def __init__(self, client: Any, index: int, count: int, parting: Callable[[], None]):
        self._client, self._index, self._count, self._parting = client, index, count, parting
        self._state, self._last = threading.Lock(), threading.Lock()
        self._noticed = self._answering = False
        self._listeners = [
            threading.Thread(target=self._listen, args=how, daemon=True)
            for how in ((self._NOTICE, self._notice), (self._WORD, self._word))
        ]
        for listener in self._listeners:
            listener.start()

    def close(self) -> None:
        """After the service has ended: threads that came back to an interpreter that is gone would abort it."""
        for listener in self._listeners:
            listener.join(10)
        self._client = None  # it must not outlive the service

    def _listen(self, key: str, answer: Callable[[str], None]) -> None:
        while True:
            try:
                said = self._client.blocking_key_value_get(key, 60_000)
                break
            except Exception as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    return  # the job has ended
        answer(said)

    def _notice(self, _: str) -> None:
        with self._state:
            self._noticed = True
            if self._answering:
                return
        self.leave(Preempted.code, _STOPPED)

    def _word(self, said: str) -> None:
        index, code, sentence = json.loads(said)
        self.leave(
            code,
            sentence
            if code == Preempted.code
            else f"Process {index} of {self._count} stopped: {sentence}",
        )

    def answering(self, begins: bool) -> None:
        """Between True and False the caller answers SIGTERM; one that came and found no answer is answered here."""
        with self._state:
            self._answering = begins
            missed = self._noticed and not begins
        if missed:
            self.leave(
                Preempted.code, _STOPPED, tell=False
            )  # all were told, and others may be saving still

    def leave(self, code: int, sentence: str, tell: bool = True) -> NoReturn:
        """Ends this process with `sentence` on stderr, and with `tell` all others too."""
        self._last.acquire()  # never given back: who comes second waits for the end
        if tell:
            self._say(self._WORD, json.dumps([self._index, code, sentence]))
        print(sentence, file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._parting()
        if self._index:
            self._say(f"{self._GONE}/{self._index}")
        else:
            with contextlib.suppress(Exception):
                for other in range(1, self._count):
                    self._client.blocking_key_value_get(f"{self._GONE}/{other}", self._PATIENCE)
                time.sleep(
                    2
                )  # they said so just before: one that saw the service end first would be aborted by it
        os._exit(code)  # not through JAX's own good-bye, which waits for all

    def _say(self, key: str, what: str = "") -> None:
        with contextlib.suppress(Exception):  # another was first, or the service is gone
            self._client.key_value_set(key, what)


_company: Company | None = None


@atexit.register  # before JAX registers its own end of the job, and so after it
def _end() -> None:
    if _company:
        sys.modules["jax"].distributed.shutdown()  # where JAX was imported first
        _company.close()


def keep_company(parting: Callable[[], None]) -> None:
    """From now on the processes of this JAX job, if they are several, leave together; see `Company`."""
    global _company
    if process()[1] > 1:
        from jax._src import (
            distributed,
        )  # what jax.experimental.multihost_utils is made of has no public name

        _company = Company(distributed.global_state.client, *process(), parting)


def leave(code: int, sentence: str, tell: bool = True) -> NoReturn:
    """Ends the program with a sentence on stderr; with `tell` the other processes of the job end too."""
    if _company:
        _company.leave(code, sentence, tell)
    print(sentence, file=sys.stderr)
    finished(code)


def finished(code: int = 0) -> NoReturn:
    """Ends this process, whose work is done.

    Everything that is to run at the end runs, JAX's good-bye to the other processes first. What C++ does after that may
    hang or abort (code 134 instead of ours): it did in one of a dozen to thirty ends on a busy machine.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def crashed(e: Exception) -> None:
    """Before an unforeseen error ends this process: if there are others, they end too."""
    if _company:
        time.sleep(
            2
        )  # if it is a collective that lost a process which stopped, that one's word ends this one too
        traceback.print_exception(e)
        _company.leave(1, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")


class Notice:
    """While entered, SIGTERM is noted, not raised, so that a loop can save before it leaves.

    In a JAX job of several processes the notice of one (SIGTERM, which is how pods are told) is passed on to the others
    by JAX's coordination service, and all of them reach the same step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._alone = process()[1] == 1
        self._before: Any = None

    def __enter__(self) -> "Notice":
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        if _company:
            _company.answering(True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if _company and kind is None:
            _company.answering(False)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._noted and kind is None:
            _leave()

    def _note(self, *_: Any) -> None:
        self._noted = True

    def reached(self, step: int) -> bool:
        """Whether to save after this step and leave; to be asked at every step, by every process."""
        if self._alone:
            return self._noted
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@functools.cache
def _packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def versions() -> dict[str, str]:
    """Python, platform and library versions of this process, and its devices where JAX is in use."""
    found = dict(_packages())
    if jax := sys.modules.get("jax"):
        found |= {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}
    return found
