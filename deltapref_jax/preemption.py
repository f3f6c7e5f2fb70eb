"""Preemption and errors in multi-process jobs: SIGTERM, shutdown of the whole group, exit codes.

Importing this module does not import JAX.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from deltapref_jax.display import printable
from deltapref_jax.jax_job import is_joining
from deltapref_jax.processes import process_count, process_index


class Preempted(BaseException):
    """Raised on SIGTERM (preemption).

    A BaseException, so that `except Exception` does not swallow it.
    """

    code = 75
    """Exit code of a preempted program: EX_TEMPFAIL of sysexits.h, "run the same command again"."""


_STOPPED = "Stopped by SIGTERM. Run the same command to continue; finished work is kept."


_AGAIN_SECONDS = 1.0  # after which a signal whose exception got lost is sent again
_unheard: tuple[int, BaseException] | None = None  # the last signal and the exception raised for it


def raise_on_signals() -> None:
    """Makes SIGTERM raise `Preempted`, and Ctrl-C KeyboardInterrupt, until `stop_raising`.

    They are raised in the main thread, so that `finally` releases leases. Python drops an exception
    that is raised inside a garbage-collection callback, a weak reference's callback or `__del__`,
    and some libraries drop one in a bare `except`. So a thread sends the signal again each second
    unless the main thread is handling its exception, which it does from the first `finally` or
    `except` that the exception reaches.
    """
    signal.signal(signal.SIGTERM, _raise_for_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # It may be ignored.
        signal.signal(signal.SIGINT, _raise_for_signal)
    sys.unraisablehook = _show_unraisable
    # The thread polls, because a lock or an event would not be safe in a signal handler.
    threading.Thread(target=_raise_again, daemon=True).start()


def stop_raising() -> None:
    """Tells that the exception of a signal has reached the entry point, which now ends."""
    global _unheard
    _unheard = None


def unheard_signal() -> BaseException | None:
    """The exception of a signal that has not reached the entry point; None if there is none.

    A library may have turned it into another exception, as lazy imports do.
    """
    return _unheard[1] if _unheard else None


def _raise_for_signal(number: int, _: Any) -> NoReturn:
    global _unheard
    error = Preempted(_STOPPED) if number == signal.SIGTERM else KeyboardInterrupt()
    _unheard = number, error
    raise error


def _raise_again() -> None:
    main = threading.main_thread().ident
    assert main is not None
    while True:
        time.sleep(_AGAIN_SECONDS)
        if _unheard and not _handles(main, type(_unheard[1])):
            signal.pthread_kill(main, _unheard[0])


def _handles(thread: int, kind: type[BaseException]) -> bool:
    """Whether a thread is in a `finally` or `except` behind an exception of `kind`."""
    current: Any = sys._current_exceptions().get(thread)
    e = current[1] if isinstance(current, tuple) else current  # A tuple until Python 3.11.
    while e is not None and not isinstance(e, kind):
        e = e.__context__
    return e is not None


def _show_unraisable(unraisable: Any) -> None:
    """Prints an exception that Python dropped, unless the user need not know of it.

    A signal's exception is raised again. The event loops of tensorstore and gcsfs are closed while
    their threads still run when the program ends.
    """
    e = unraisable.exc_value
    closed = isinstance(e, RuntimeError) and str(e) == "Event loop is closed"
    if not (closed or isinstance(e, Preempted | KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)


class ProcessGroupShutdown:
    """Stops all processes of a JAX job within seconds when one is preempted or fails.

    A process that exited alone would leave the others waiting for it in a collective. So two
    daemon threads block on keys of JAX's coordination service: one that its own SIGTERM handler
    sets when any process is preempted, and one that a process sets here when it exits. They call
    `on_exit` and end the process themselves, because the main thread may be stuck in a collective
    with a process that is gone. While a `PreemptionGuard` is entered, it handles SIGTERM instead.

    Args:
      client: client of the coordination service.
      index: rank of this process.
      count: number of processes.
      on_exit: releases what this process holds, such as leases.
    """

    # XLA's preemption_sync_manager.cc sets this key when a process receives SIGTERM.
    _PREEMPTION_KEY = "RECEIVED_PREEMPTION_NOTICE"
    _STOP_KEY, _EXITED_KEY = "deltapref/stops", "deltapref/gone"
    _EXIT_TIMEOUT_MS = 10_000  # per process, for which process 0 keeps the service running

    def __init__(self, client: Any, index: int, count: int, on_exit: Callable[[], None]):
        self._client, self._index, self._count, self._on_exit = client, index, count, on_exit
        self._state_lock, self._exit_lock = threading.Lock(), threading.Lock()
        self._preempted = self._guarded = False
        self._listeners = [
            threading.Thread(target=self._listen, args=arguments, daemon=True)
            for arguments in (
                (self._PREEMPTION_KEY, self._on_preemption),
                (self._STOP_KEY, self._on_stop),
            )
        ]
        for listener in self._listeners:
            listener.start()

    def close(self) -> None:
        """Joins the threads; to be called after the service has been shut down.

        A thread that returned from C++ after the interpreter is finalized would abort the process.
        """
        for listener in self._listeners:
            listener.join(10)
        self._client = None  # The client must not outlive the service.

    def _listen(self, key: str, callback: Callable[[str], None]) -> None:
        while True:
            try:
                value = self._client.blocking_key_value_get(key, 60_000)
                break
            except Exception as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    return  # The service has been shut down.
        callback(value)

    def _on_preemption(self, _: str) -> None:
        with self._state_lock:
            self._preempted = True
            if self._guarded:
                return
        self.exit_all(Preempted.code, _STOPPED)

    def _on_stop(self, value: str) -> None:
        index, code, message = json.loads(value)
        if code != Preempted.code:
            message = f"Process {index} of {self._count} stopped: {message}"
        self.exit_all(code, message)

    def set_guarded(self, guarded: bool) -> None:
        """Tells whether a `PreemptionGuard` handles SIGTERM from now on.

        A preemption that the guard did not handle before it was left is handled here.
        """
        with self._state_lock:
            self._guarded = guarded
            missed = self._preempted and not guarded
        if missed:
            # Every process got the notice, and some may still be saving: they are not told again.
            self.exit_all(Preempted.code, _STOPPED, notify_others=False)

    def exit_all(self, code: int, message: str, notify_others: bool = True) -> NoReturn:
        """Ends this process with `message` on stderr, and by default all others too."""
        self._exit_lock.acquire()  # Never released: a second caller waits here for `os._exit`.
        if notify_others:
            self._set(self._STOP_KEY, json.dumps([self._index, code, message]))
        print(printable(message), file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._on_exit()
        if self._index:
            self._set(f"{self._EXITED_KEY}/{self._index}")
        else:
            with contextlib.suppress(Exception):
                for other in range(1, self._count):
                    self._client.blocking_key_value_get(
                        f"{self._EXITED_KEY}/{other}", self._EXIT_TIMEOUT_MS
                    )
                # The others set their key just before they exit. One that still ran when the
                # service ends would be aborted by its client.
                time.sleep(2)
        os._exit(code)  # JAX's own atexit shutdown would wait for all processes.

    def _set(self, key: str, value: str = "") -> None:
        # The set fails if another process was first, or if the service is gone.
        with contextlib.suppress(Exception):
            self._client.key_value_set(key, value)


_group: ProcessGroupShutdown | None = None


@atexit.register  # Registered before JAX's own shutdown, and so run after it.
def _close_group() -> None:
    if _group:
        # JAX's own handler does not come first where JAX was imported before this module.
        sys.modules["jax"].distributed.shutdown()
        _group.close()


def install_group_shutdown(on_exit: Callable[[], None]) -> None:
    """Makes the processes of this JAX job, if there are several, stop together.

    To be called once, after `processes.start_processes`; see `ProcessGroupShutdown`.
    """
    global _group
    if process_count() > 1:
        # The coordination service's client, on which jax.experimental.multihost_utils is built,
        # has no public name.
        from jax._src import distributed

        _group = ProcessGroupShutdown(
            distributed.global_state.client, process_index(), process_count(), on_exit
        )


def exit_all(code: int, message: str, notify_others: bool = True) -> NoReturn:
    """Ends the program with `message` on stderr, and by default the job's other processes too."""
    if _group:
        _group.exit_all(code, message, notify_others)
    print(printable(message), file=sys.stderr)
    exit_process(code)


def exit_process(code: int = 0) -> NoReturn:
    """Ends this process after its atexit handlers, without finalizing the interpreter.

    The handlers include JAX's shutdown barrier with the other processes. C++ destructors that would
    run after them may hang or abort (exit code 134 instead of `code`): on a busy machine that was
    seen in one of a dozen to thirty exits.
    """
    if not is_joining():  # JAX's handler would wait for a job that this process is not part of.
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def abort_all_on_error(e: Exception) -> None:
    """Ends the job with the traceback of `e`; returns if this is its only process."""
    if _group:
        # If `e` is a collective that failed because another process stopped, then that process's
        # own message arrives within these seconds and ends this process.
        time.sleep(2)
        traceback.print_exception(e)
        _group.exit_all(1, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")


class PreemptionGuard:
    """While entered, SIGTERM is recorded instead of raised, so that a loop can save before exit.

    In a multi-process job, SIGTERM to one process is passed on to the others by JAX's coordination
    service, and `should_stop` becomes true at the same step on all of them.
    """

    def __init__(self) -> None:
        self._received = False
        self._single_process = process_count() == 1
        self._previous_handler: Any = None

    def __enter__(self) -> "PreemptionGuard":
        if self._single_process and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._record)
        if _group:
            _group.set_guarded(True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if _group and kind is None:
            _group.set_guarded(False)
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        if self._received and kind is None:
            raise Preempted(_STOPPED)

    def _record(self, *_: Any) -> None:
        self._received = True

    def should_stop(self, step: int) -> bool:
        """Whether to save after `step` and exit; every process must call it at every step."""
        if self._single_process:
            return self._received
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
