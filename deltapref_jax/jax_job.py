"""The JAX job that the environment of this process describes, and joining it.

Importing this module does not import JAX.
"""

import errno
import os
import re
import socket
import threading
from typing import Any, NamedTuple

from deltapref_jax.cluster import detected_job, local_device_ids, stated_number
from deltapref_jax.config import ConfigError

_THREADS = 32  # for eight devices with four collectives each
_MARGIN_SECONDS = 600  # by which JAX gives up later than `join`, whose sentence then comes first
_LAST_PORT = 65535


class JaxJob(NamedTuple):
    """A JAX job as seen by one of its processes.

    Attributes:
      processes: their number; 1 with an empty address: this process is alone.
      process_id: number of this process; None: JAX detects it when the job is joined.
      address: host:port of process 0; "": JAX detects it when the job is joined.
    """

    processes: int = 1
    process_id: int | None = None
    address: str = ""

    @property
    def alone(self) -> bool:
        """Whether there is no job to join."""
        return self.processes == 1 and not self.address


def described_job() -> JaxJob:
    """The job that JAX_* variables describe, with JAX's own detection for what they leave out.

    Raises:
      ConfigError: the variables contradict each other, describe half a job, or cannot be read; or
        the metadata server of a Cloud TPU fails.
    """
    count, index = stated_number("JAX_NUM_PROCESSES", 1), stated_number("JAX_PROCESS_ID", 0)
    address = _stated_address("JAX_COORDINATOR_ADDRESS")
    _stated_address("JAX_COORDINATOR_BIND_ADDRESS")
    stated_number("JAX_COORDINATOR_PORT", 1, _LAST_PORT)
    if count and index is not None:
        _check_index(index, count)
    if count == 1 and not address:
        return JaxJob()
    if address and count and index is not None:
        return JaxJob(count, index, address)
    detected = detected_job()
    if detected is None or (detected[0] == 1 and not address):
        _refuse_half()
        return JaxJob()
    count, index = count or detected[0], detected[1] if index is None else index
    if index is not None:
        _check_index(index, count)
    return JaxJob(count, index, address)


def _stated_address(key: str) -> str:
    """Value of a variable that holds host:port; empty if it is not set."""
    address = os.environ.get(key, "")
    match = re.fullmatch(r"[^\s/]+:(\d{1,5})", address)
    if address and not (match and 1 <= int(match[1]) <= _LAST_PORT):
        raise ConfigError(
            f"{key} is {address!r}; set it to host:port of process 0, with a port from 1 to "
            f"{_LAST_PORT}, such as 10.0.0.1:8476."
        )
    return address


def _check_index(index: int, count: int) -> None:
    if index >= count:
        stated = os.environ.get("JAX_PROCESS_ID")
        name = "JAX_PROCESS_ID" if stated else "The number of this process that JAX detects"
        size = "JAX_NUM_PROCESSES" if os.environ.get("JAX_NUM_PROCESSES") else "as JAX detects"
        raise ConfigError(
            f"{name} is {index} in a job of {_processes(count)} ({size}); number them from 0, each "
            "below their number."
        )


def _refuse_half() -> None:
    """Refuses variables that describe a part of a job where JAX detects no other part.

    The process would run the whole work alone, as would all others of the job.
    """
    keys = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [f"{key} is {os.environ[key]}" for key in keys if os.environ.get(key)]
    missing = [key for key in keys if not os.environ.get(key)]
    if given and os.environ.get("JAX_PROCESS_ID") != "0" or len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set and JAX detects no job of several "
            "processes here; set all three of them, or JAX_NUM_PROCESSES=1 alone for one process."
        )


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count != 1)}"


_joining = False


def is_joining() -> bool:
    """Whether this process has begun to join a job and has not succeeded.

    JAX's exit handler would then wait for the others, which may never come.
    """
    return _joining


def join(job: JaxJob, timeout: int) -> None:
    """Joins a job, and says first what is waited for.

    JAX waits in C++, where no signal handler of Python runs. So it waits in a thread of its own,
    and this one can be interrupted. JAX would end the process without an exception at its timeout,
    so that this function has a shorter one.

    Args:
      job: not of this process alone.
      timeout: seconds to wait for the other processes.

    Raises:
      ConfigError: the job cannot be joined, or not in time; `is_joining` stays true.
    """
    global _joining
    known, failures = [job], list[Exception]()

    def initialize() -> None:
        try:
            _initialize(known, timeout)
        except Exception as e:
            failures.append(e)

    _joining = True
    waiting = threading.Thread(target=initialize, daemon=True)
    waiting.start()
    waiting.join(timeout)
    count, index, address = known[-1]
    at = f" at {address}" if address else ""
    if failures:
        if isinstance(failures[0], ConfigError):
            raise failures[0]
        reason = (str(failures[0]).splitlines() or [""])[0].rstrip(".")
        raise ConfigError(
            f"The job of {_processes(count)}{at} cannot be joined ({type(failures[0]).__name__}: "
            f"{reason}); correct what describes it, or set JAX_NUM_PROCESSES=1 and no address for "
            "this process alone."
        )
    if waiting.is_alive():
        raise ConfigError(
            f"The job of {_processes(count)}{at} was not complete after {timeout} s; start all of "
            "them with the same address, which each must be able to reach, or wait longer with "
            "--initialization_timeout."
        )
    _joining = False


def _initialize(known: list[JaxJob], timeout: int) -> None:
    """Detects what `known[-1]` lacks, appends the whole job, and lets JAX join it."""
    import jax
    from jax._src import clusters

    processes, index, address = known[-1]
    detected: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        address or None, processes, index, local_device_ids(), None, timeout
    )
    address, processes, index, ids = detected
    job = JaxJob(processes, index, address)
    known.append(job)
    if index == 0:
        _check_port(address)
    print(f"Waits for {_processes(processes)} at {address}, as process {index}.", flush=True)
    let_collectives_wait()
    jax.distributed.initialize(
        address,
        processes,
        index,
        local_device_ids=ids,
        initialization_timeout=timeout + _MARGIN_SECONDS,
    )


def let_collectives_wait() -> None:
    """Gives XLA's CPU backend a thread for every collective that may wait for another process.

    It has a thread a core, and a waiting collective keeps one: on two cores the processes of a job
    could wait for each other, each in another collective, for ever. It must be called before JAX's
    backends start.
    """
    os.environ.setdefault("NPROC", str(max(_THREADS, os.cpu_count() or 1)))


def _check_port(address: str) -> None:
    """Refuses a port that process 0 cannot listen at, where JAX would end in a segmentation fault.

    Raises:
      ConfigError: another process listens at it, or this one may not.
    """
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address
    port = int(bound.rpartition(":")[2])
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("::", port))
    except OSError as e:  # Others, such as that of a machine without IPv6, are left to JAX.
        if e.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"Process 0 cannot listen at port {port} of {bound} ({e.strerror}); choose another "
                "in JAX_COORDINATOR_ADDRESS, or in JAX_COORDINATOR_PORT where JAX detects the job."
            ) from e
