"""Checkpoints of a run: asynchronous Orbax saves, the newest few kept, and a metrics file that matches them.

The position in the data is the step number, so a checkpoint is the training state and nothing else.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deltapref_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run in `folder`; use as a context manager so that the last save is finished."""

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix="step", create=True,
                                               cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def newest(self) -> int:
        """Steps done in the newest complete checkpoint; 0 if there is none."""
        return self._manager.latest_step() or 0

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes, dtypes and shardings of `like` (its own mesh is not needed).

        Raises:
          ValueError: the checkpoint cannot be read, or is of another model.
        """
        step = self.newest()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except Exception as e:  # tensorstore and orbax raise many kinds for a damaged file
            raise ValueError(f"The checkpoint of step {step} in {self._manager.directory} cannot be read ({e}); "
                             "delete that step's folder to continue from the one before it.") from e

    def save(self, steps_done: int, state: TrainState) -> None:
        """Starts to write `state`; returns once it is copied to the host."""
        self._manager.save(steps_done, args=ocp.args.StandardSave(state))


class Metrics:
    """`metrics.jsonl`: one JSON object per step, cut back to the step that a run resumes from."""

    def __init__(self, path: str | os.PathLike[str], resumed: int):
        kept = [row for row in read_metrics(path) if row["step"] <= resumed] if resumed else []
        self._path = path
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Rows of a metrics file; a last line cut by a crash is passed over, a missing file has none."""
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file.readlines():
            if line.endswith("\n"):
                yield json.loads(line)
