"""Checkpoints of a run: asynchronous Orbax saves, and a metrics file that matches them.

The position in the data is the step number, so a checkpoint holds the training state, its checksum
and the run's counts so far. Orbax writes under a temporary name, and deletes older checkpoints only
when the new one is complete, so a failed save leaves the checkpoint before it untouched. A run has
its folder of checkpoints under a name of its own while it works (`own_folder`), so that a process
that was suspended cannot write among the checkpoints of the one that took over.
"""

import contextlib
import gc
import json
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.args import Composite, JsonRestore, JsonSave, StandardRestore, StandardSave

from deltapref_jax.files import ArtifactError, remote, unwritable, write_atomic
from deltapref_jax.processes import gathered, process_index, wait_for_all
from deltapref_jax.training.state import TrainState, in_memory, on_host

Array = jax.Array


@jax.jit
def checksum(state: TrainState) -> Array:
    """Sums the bits of all numbers in `state`, read as unsigned integers, modulo 2³².

    Integer addition is associative, so the uint32 result is the same on every mesh. It is needed
    because the files are compressed without a checksum: a flipped bit would restore as another
    number.
    """
    # Numbers are summed as bits, each as an unsigned integer of its own width, so that NaN and -0.0
    # count too.
    uints = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = [
        jax.lax.bitcast_convert_type(x, uints[x.dtype.itemsize]) for x in jax.tree.leaves(state)
    ]
    return sum((jnp.sum(b, dtype=jnp.uint32) for b in bits), jnp.uint32(0))


@contextlib.contextmanager
def _on_devices(state: TrainState) -> Iterator[TrainState]:
    """The state as Orbax and `checksum` take it: with moments that lie on the host copied back.

    The copies are deleted in the end, because Orbax refers to them until its next save.
    """
    if not on_host(state.moments):
        yield state
        return
    # Until they are on the host, the devices hold them too.
    jax.block_until_ready(state.moments)
    moments = jax.device_put(state.moments, in_memory("device", state.moments))
    try:
        yield state._replace(moments=moments)
    finally:
        jax.tree.map(lambda x: x.delete(), moments)


def _barrier(*, key: str, timeout_ms: int) -> None:
    """The barrier at which the processes' writer threads wait for each other.

    Orbax enters its barriers in a `finally`, and raises a save's exception only after them. So a
    writer whose save failed would wait in vain for others that have stopped; it raises at once.
    """
    failure = sys.exc_info()[1]
    if failure and threading.current_thread() is not threading.main_thread():
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@contextlib.contextmanager
def own_folder(folder: epath.Path, check_lease: Callable[[], None]) -> Iterator[epath.Path]:
    """Moves `folder` to a name that only this job knows, and back in the end.

    Whoever takes over the work of a killed or suspended process moves the folder to another name.
    The suspended one finds its own gone, and what it still writes there is no checkpoint of its
    successor's; the next run removes it. A bucket's folder keeps its name, because objects cannot
    be renamed.

    Raises:
      ArtifactError: what `check_lease` raises, if another process took the work over.
    """
    if remote(folder):
        yield folder
        return
    own = folder.with_name(f"{folder.name}.{gathered(uuid.uuid4().hex)[0]}")
    if process_index() == 0:
        found = [*folder.parent.glob(folder.name), *folder.parent.glob(f"{folder.name}.*")]
        found.sort(key=_newest_step)
        # Of several, the others are what suspended processes wrote after they had been replaced.
        for path in found[:-1]:
            shutil.rmtree(path, ignore_errors=True)
        for path in found[-1:]:
            path.rename(own)
    wait_for_all("folder of checkpoints")
    try:
        yield own
    finally:
        if process_index() == 0:
            check_lease()
            if own.exists():
                own.rename(folder)


def _newest_step(folder: epath.Path) -> int:
    """The number of the newest complete checkpoint in the folder, by their names; 0 for none."""
    steps = [re.fullmatch(r"step_(\d+)", path.name) for path in folder.iterdir()]
    return max((int(step[1]) for step in steps if step), default=0)


class Checkpoints:
    """The checkpoints of one run in `folder`; a context manager that waits for the last save.

    Args:
      folder: of the checkpoints.
      keep: how many remain.
      base: hash of the base weights, if the states are adapters.
      final: where the folder is found when this process has ended, if not there; for sentences.

    Attributes:
      seconds: `seconds_checkpoint_blocked`, during which training waited for saves, and
        `seconds_checkpoint_background`, during which files were written while it continued. They
        include earlier processes of the run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int,
        base: str = "",
        final: str | os.PathLike[str] = "",
    ):
        self._base = base
        self.seconds = {"seconds_checkpoint_blocked": 0.0, "seconds_checkpoint_background": 0.0}
        self._keep = keep
        self._saving_step, self._save_returned_at, self._failed = 0, 0.0, False
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            step_prefix="step",
            create=True,
            # Half-written checkpoints of a killed process are deleted at the next start.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._count_background, barrier_sync_fn=_barrier
            ),
        )
        # Orbax wants absolute local paths; a bucket's address must stay as it is.
        path = epath.Path(folder)
        self._manager = ocp.CheckpointManager(
            path if remote(path) else path.absolute(), options=options
        )
        self._final = epath.Path(final or self._manager.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except ArtifactError:
            if kind is None:  # Otherwise the exception that ended the run is more useful.
                raise
        finally:
            self._manager.close()
            if self._failed:
                self._collect_coroutines()

    def _collect_coroutines(self) -> None:
        """Collects the unfinished coroutines that Orbax leaves after a failure.

        Collected later, they would print warnings at a random place.
        """
        del self._manager
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            gc.collect()
        finally:
            sys.unraisablehook = hook

    def _count_background(self) -> None:
        # Orbax calls this when a save is complete.
        if self._save_returned_at:
            self.seconds["seconds_checkpoint_background"] += (
                time.monotonic() - self._save_returned_at
            )

    def newest(self) -> int:
        """Returns the steps done in the newest complete checkpoint, 0 if there is none."""
        # The manager answers None where there is no checkpoint; step numbers begin at 1.
        return self._manager.latest_step() or 0

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Returns the newest state and its counts.

        The state has the shapes, dtypes and shardings of `like`, whose mesh may differ from the
        mesh that it was saved from.

        Raises:
          ArtifactError: a file is missing, truncated or changed, or the checkpoint is of another
            model, optimizer or base.
        """
        step = self.newest()
        # The target's shardings decide where shards are read to, so the mesh may differ from the
        # saved one.
        shapes = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            like,
            in_memory("device", like),
        )
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        target = {
            "state": shapes,
            "checksum": jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated),
        }
        try:
            restored = self._manager.restore(
                step, args=Composite(state=StandardRestore(target), counts=JsonRestore())
            )
            # The sum is taken over what lies on the devices, so damage on the way there is found
            # too.
            if int(checksum(restored["state"]["state"])) != int(restored["state"]["checksum"]):
                raise ValueError("its checksum is another than when it was written")
        except Exception as e:  # Tensorstore and Orbax raise many types for a damaged file.
            older = [s for s in self._manager.all_steps() if s < step]
            remedy = f"continue from step {max(older)}" if older else "train from the start"
            raise ArtifactError(
                f"The checkpoint {self._path(step)} cannot be read ({self._summarize(e)}); delete "
                f"that folder and run the same command to {remedy}."
            ) from None
        # Only the base of adapters is compared: the shapes would match those of another base.
        counts = restored["counts"]
        if (saved_base := counts.pop("base", "")) != self._base:
            raise ArtifactError(
                f"The checkpoint {self._path(step)} holds adapters of the base weights "
                f"{saved_base!r} and this run's base has the weights {self._base!r}; train from "
                "that base, or delete the folder of checkpoints to train from the start."
            )
        self.seconds = {name: counts[name] for name in self.seconds}
        places = jax.tree.map(lambda x: x.sharding, like)
        return jax.device_put(restored["state"]["state"], places), counts

    def save(self, steps_done: int, state: TrainState, counts: dict[str, float]) -> None:
        """Starts to write `state` and `counts`; returns once the state is copied to the host.

        Raises:
          ArtifactError: this or the previous save cannot be written. The last complete checkpoint
            is untouched.
        """
        # One save at a time: an error of the one before is raised here, before a new one starts.
        self.wait()
        began = time.monotonic()
        # 0 says that this save has not returned: background time is counted from its return.
        self._saving_step, self._save_returned_at = steps_done, 0.0
        try:
            with _on_devices(state) as copied:
                tree = {"state": copied, "checksum": checksum(copied)}
                saved_counts = counts | self.seconds | {"base": self._base}
                self._manager.save(
                    steps_done,
                    args=Composite(state=StandardSave(tree), counts=JsonSave(saved_counts)),
                )
        except Exception as e:
            raise self._save_error(e) from None
        self._save_returned_at = time.monotonic()
        self.seconds["seconds_checkpoint_blocked"] += self._save_returned_at - began

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          ArtifactError: it cannot be written.
        """
        began = time.monotonic()
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._save_error(e) from None
        self.seconds["seconds_checkpoint_blocked"] += time.monotonic() - began

    def prune(self) -> None:
        """Removes checkpoints that newer ones replace, when the run is complete.

        A save removes them itself, unless its process is killed in between; until the run ends they
        are one more to return to.
        """
        self.wait()
        for step in sorted(self._manager.all_steps())[: -self._keep]:
            self._manager.delete(step)

    def _summarize(self, e: BaseException) -> str:
        """Returns the first line of an error, without the details that tensorstore adds to it."""
        self._failed = True
        # These would keep alive what `_collect_coroutines` is to collect.
        e.__traceback__ = e.__cause__ = e.__context__ = None
        if system := re.search(r"([A-Z][\w ]+) \[os_error_code='\d+'\]", str(e)):
            return system.group(1)
        lines = str(e).strip().splitlines()
        return lines[0].split(". See full")[0][:200].rstrip(".: ") if lines else type(e).__name__

    def _path(self, step: int) -> str:
        return os.fspath(self._final / f"step_{step}")

    def _save_error(self, e: BaseException) -> ArtifactError:
        reason = self._summarize(e)
        # The manager's cached list of steps may hold the failed one.
        self._manager.reload()
        last = self.newest()
        kept = f"the checkpoint of step {last} is untouched" if last else "there is no earlier one"
        return ArtifactError(
            f"The checkpoint {self._path(self._saving_step)} cannot be written ({reason}); make "
            f"room or choose another workspace, and run the same command: {kept}."
        )


class Metrics:
    """`metrics.jsonl`: one JSON object per step, truncated to the step that a run resumes from.

    A bucket's objects cannot be appended to, so the whole file is written there at every `flush`.
    A local file stays open: a process that was suspended appends to its own file, and not to the
    one that another process has put there since.

    Raises:
      ArtifactError: the rows of the steps done are not all there, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resumed: int,
        check_lease: Callable[[], None] = lambda: None,
    ):
        self._path = epath.Path(path)
        self._check_lease = check_lease
        self._rows = (
            [row for row in read_metrics(path) if row["step"] <= resumed] if resumed else []
        )
        # The rows must be the steps 1 to `resumed` without a gap; a checkpoint may outlive a lost
        # disk page.
        if [row["step"] for row in self._rows] != list(range(1, resumed + 1)):
            raise ArtifactError(
                f"{path} has lost rows of the first {resumed} steps; delete the directory "
                f"{self._path.parent} and run again: only that run is made anew."
            )
        self._remote = "://" in os.fspath(self._path)
        write_atomic(self._path, self._text(), check_lease)
        # A local file is appended to, so its rows need not stay in memory; a bucket's are kept.
        if not self._remote:
            self._rows.clear()
            self._file = self._path.open("a", encoding="utf-8")

    def _text(self) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in self._rows).encode()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row.

        Raises:
          ArtifactError: the file cannot be written.
        """
        if self._remote:
            self._rows.append(row)
            return
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as e:
            raise unwritable(self._path, e) from e

    def flush(self) -> None:
        """Makes the rows so far durable; to be called before the checkpoint of the same step."""
        if self._remote:
            write_atomic(self._path, self._text(), self._check_lease)
            return
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if not self._remote:
            with contextlib.suppress(OSError):  # What could not be written was reported by `write`.
                self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics file, which may be missing.

    A last line without its newline was cut by a crash, and is skipped.
    """
    if not epath.Path(path).exists():
        return
    for line in epath.Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
