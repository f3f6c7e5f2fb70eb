"""This process: its place in a JAX job, its notice to leave, what it runs on. JAX is not imported here, only asked."""

import contextlib
import functools
import importlib.metadata
import platform
import signal
import sys
import threading
from typing import Any

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pyarrow", "deltapref-jax")


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


def _leave(*_: Any) -> None:
    raise Preempted("Stopped by SIGTERM. Run the same command to continue; finished work is kept.")


def leave_on_sigterm() -> None:
    """From now on SIGTERM raises `Preempted` in the main thread, so that leases are given back on the way out."""
    signal.signal(signal.SIGTERM, _leave)


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
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
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
