"""Checkpoints of a run: asynchronous Orbax saves, the newest few kept, and a metrics file that matches them.

The position in the data is the step number, so a checkpoint is the training state, a sum that proves it, and the run's
counts so far. Orbax writes under a temporary name and deletes older ones when the new one stands, so that whatever
happens to a save, the one before it is untouched.
"""

import gc
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.args import Composite, JsonRestore, JsonSave, StandardRestore, StandardSave

from deltapref_jax.files import ArtifactError, unwritable, write_atomic
from deltapref_jax.training.state import TrainState

Array = jax.Array


@jax.jit
def checksum(state: TrainState) -> Array:
    """Sum of all bits of `state`, read as integers modulo 2³²: uint32, the same on every mesh, for the order is free.

    Files are compressed without a checksum of their own: one flipped bit would be read as another number.
    """
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = [
        jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]) for x in jax.tree.leaves(state)
    ]
    return sum((jnp.sum(b, dtype=jnp.uint32) for b in bits), jnp.uint32(0))


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Where the processes' writers wait for each other; one whose save failed would wait in vain, and does not.

    Orbax passes its barriers in a `finally`, and only then says that a save failed.
    """
    failure = sys.exc_info()[1]
    if failure and threading.current_thread() is not threading.main_thread():
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
    """The checkpoints of one run in `folder`; use as a context manager so that the last save is finished.

    Attributes:
      seconds: `seconds_checkpoint_blocked`, in which training stood still for saves, and
        `seconds_checkpoint_background`, in which files were written while it went on; of earlier processes too.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, base: str = ""):
        self._base = base  # hash of the weights that the states need besides themselves
        self.seconds = {"seconds_checkpoint_blocked": 0.0, "seconds_checkpoint_background": 0.0}
        self._saving, self._returned, self._failed = 0, 0.0, False
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            step_prefix="step",
            create=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._written, barrier_sync_fn=_barrier
            ),
        )
        path = epath.Path(folder)
        self._manager = ocp.CheckpointManager(
            path if "://" in os.fspath(path) else path.absolute(), options=options
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except ArtifactError:
            if kind is None:  # what ended the run is the better sentence
                raise
        finally:
            self._manager.close()
            if self._failed:
                self._discard()

    def _discard(self) -> None:
        """Half-run coroutines of a failure, which Orbax leaves behind: they would complain when collected later."""
        del self._manager
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            gc.collect()
        finally:
            sys.unraisablehook = hook

    def _written(self) -> None:
        if self._returned:
            self.seconds["seconds_checkpoint_background"] += time.monotonic() - self._returned

    def newest(self) -> int:
        """Steps done in the newest complete checkpoint; 0 if there is none."""
        return self._manager.latest_step() or 0

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The newest state and its counts, with the shapes, dtypes and shardings of `like` (another mesh is fine).

        Raises:
          ArtifactError: a file is missing, cut or changed, or the checkpoint is of another model, optimizer or base.
        """
        step = self.newest()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        wanted = {
            "state": shapes,
            "checksum": jax.ShapeDtypeStruct((), jnp.uint32, sharding=everywhere),
        }
        try:
            found = self._manager.restore(
                step, args=Composite(state=StandardRestore(wanted), counts=JsonRestore())
            )
            if int(checksum(found["state"]["state"])) != int(found["state"]["checksum"]):
                raise ValueError("its checksum is another than when it was written")
        except Exception as e:  # tensorstore and orbax raise many kinds for a damaged file
            older = [s for s in self._manager.all_steps() if s < step]
            remedy = f"continue from step {max(older)}" if older else "train from the start"
            raise ArtifactError(
                f"The checkpoint {self._place(step)} cannot be read ({self._why(e)}); delete that "
                f"folder and run the same command to {remedy}."
            ) from None
        counts = found["counts"]
        if (made := counts.pop("base", "")) != self._base:
            raise ArtifactError(
                f"The checkpoint {self._place(step)} holds adapters of the base weights {made!r} and "
                f"this run's base has the weights {self._base!r}; train from that base, or delete the "
                "folder of checkpoints to train from the start."
            )
        self.seconds = {name: counts[name] for name in self.seconds}
        return found["state"]["state"], counts

    def save(self, steps_done: int, state: TrainState, counts: dict[str, float]) -> None:
        """Starts to write `state` and `counts`; returns once the state is copied to the host.

        Raises:
          ArtifactError: this or the previous save cannot be written; the last complete checkpoint is untouched.
        """
        self.wait()
        began = time.monotonic()
        self._saving, self._returned = steps_done, 0.0
        try:
            tree = {"state": state, "checksum": checksum(state)}
            about = counts | self.seconds | {"base": self._base}
            self._manager.save(
                steps_done, args=Composite(state=StandardSave(tree), counts=JsonSave(about))
            )
        except Exception as e:
            raise self._unwritten(e) from None
        self._returned = time.monotonic()
        self.seconds["seconds_checkpoint_blocked"] += self._returned - began

    def wait(self) -> None:
        """Until the last save is complete.

        Raises:
          ArtifactError: it cannot be written.
        """
        began = time.monotonic()
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._unwritten(e) from None
        self.seconds["seconds_checkpoint_blocked"] += time.monotonic() - began

    def _why(self, e: BaseException) -> str:
        """The first line of an error, without the essay that tensorstore adds to it."""
        self._failed = True
        e.__traceback__ = e.__cause__ = e.__context__ = (
            None  # they would keep what `_discard` is to collect
        )
        if system := re.search(r"([A-Z][\w ]+) \[os_error_code='\d+'\]", str(e)):
            return system.group(1)
        lines = str(e).strip().splitlines()
        return lines[0].split(". See full")[0][:200].rstrip(".: ") if lines else type(e).__name__

    def _place(self, step: int) -> str:
        return os.fspath(self._manager.directory / f"step_{step}")

    def _unwritten(self, e: BaseException) -> ArtifactError:
        why = self._why(e)
        self._manager.reload()
        last = self.newest()
        kept = f"the checkpoint of step {last} is untouched" if last else "there is no earlier one"
        return ArtifactError(
            f"The checkpoint {self._place(self._saving)} cannot be written ({why}); make room "
            f"or choose another workspace, and run the same command: {kept}."
        )


class Metrics:
    """`metrics.jsonl`: one JSON object per step, cut back to the step that a run resumes from.

    A bucket's objects cannot be appended to: there the file is written whole at every `flush`.
    """

    def __init__(self, path: str | os.PathLike[str], resumed: int):
        self._path = epath.Path(path)
        self._rows = (
            [row for row in read_metrics(path) if row["step"] <= resumed] if resumed else []
        )
        if [row["step"] for row in self._rows] != list(range(1, resumed + 1)):
            raise ArtifactError(
                f"{path} has lost rows of the first {resumed} steps; delete the directory "
                f"{self._path.parent} and run again: only that run is made anew."
            )
        self._remote = "://" in os.fspath(self._path)
        write_atomic(self._path, self._text())
        if not self._remote:
            self._rows.clear()

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
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise unwritable(self._path, e) from e

    def flush(self) -> None:
        """What was written so far is safe: to be called before the checkpoint that it belongs to."""
        if self._remote:
            write_atomic(self._path, self._text())
            return
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Rows of a metrics file; a last line cut by a crash is passed over, a missing file has none."""
    if not epath.Path(path).exists():
        return
    for line in epath.Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
