"""What a stage gets to make one artifact: its inputs, a directory, and a place for counts."""

import contextlib
import datetime
import functools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from etils import epath

from deltapref_jax.artifacts.lease import Lease, LostLease
from deltapref_jax.artifacts.node import Node
from deltapref_jax.artifacts.shards import (
    Busy,
    Made,
    Pass,
    Shards,
    Stats,
    bad_shard,
    read_sidecar,
    standing,
)
from deltapref_jax.artifacts.workspace import Manifest, Workspace
from deltapref_jax.display import count
from deltapref_jax.files import (
    download,
    file_sha256,
    remote,
    staged_dir,
    write_atomic,
)
from deltapref_jax.processes import agreed, gathered, process_index, versions, wait_for_all
from deltapref_jax.progress import log
from deltapref_jax.records import Record


class Finished(Exception):
    """Another runner finished the artifact in the meantime."""


class Job:
    """The making of one artifact.

    Attributes:
      dir: the artifact's directory; it may hold the work of a killed run.
      stats: counts for the manifest; those of shards are added up.
      finished: whether this job wrote the manifest.
      advance: moves the bar by so many rows of the shard at hand, for a stage whose shards take
        long.
      shard_seconds: that the shards took, whoever made them.
      files: what the artifact consists of, relative to `dir`, beside its shards; patterns like
        `policy/*` are allowed.
    """

    def __init__(self, node: Node, workspace: Workspace, show: bool = True):
        self.node, self.workspace = node, workspace
        self.dir = workspace.path(node)
        self.stats: Stats = {}
        self.files: list[str] = []
        self.show = show and process_index() == 0
        self._first = process_index() == 0
        self.advance: Callable[[int], None] = lambda rows: None
        self.shard_seconds = 0.0
        self._began = time.time()
        self._lease: Lease | None = None
        # checksums of files that went to a bucket, so that they are not fetched back for them
        self._uploaded: dict[str, tuple[int, str]] = {}
        self._open = contextlib.ExitStack()
        self.finished = False
        self._announced = False

    def table(self, node: Node) -> pa.Table:
        """The table of an input."""
        return self.workspace.table(node)

    def tables(self, nodes: Mapping[Any, Node]) -> dict[Any, pa.Table]:
        """The tables of several inputs, by their names."""
        return {name: self.table(node) for name, node in nodes.items()}

    def rows(self, record: type[Record], node: Node) -> list[Record]:
        """The table of an input as records."""
        return self.workspace.rows(record, node)

    def local_input(self, node: Node, part: str) -> Path:
        """File or folder `part` of an input on this machine, checksums verified.

        What is in a bucket is copied, and the copy stays until `close`.

        Raises:
          ArtifactError: a file is missing or was changed; it is named.
        """
        if not remote(self.dir):
            self.workspace.complete(node, verify=True)
            return Path(self.workspace.path(node) / part)
        sums = {
            file: sha
            for file, (_, sha) in self.workspace.manifest(node).files.items()
            if f"{file}/".startswith(f"{part}/")
        }
        scratch = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="deltapref-")))
        download({os.fspath(self.workspace.path(node) / file): scratch / file for file in sums})
        for file, sha in sums.items():
            if file_sha256(epath.Path(scratch / file)) != sha:
                raise self.workspace.damaged(node, file, "not what was written (checksum)")
        return scratch / part

    @contextlib.contextmanager
    def output_dir(self, name: str) -> Iterator[Path]:
        """A folder to write into, which becomes the artifact's folder `name`.

        All processes of a JAX job enter and leave it together. On a disk they share the folder; of
        an artifact in a bucket each has a folder of its own, whose files are uploaded.

        Raises:
          LostLease: another process took the artifact over; the folder is left as it was.
        """
        if not remote(self.dir):
            # A hidden folder beside the final one, since a rename is atomic only within a file
            # system.
            temporary = Path(self.dir / f".{name}.{gathered(uuid.uuid4().hex)[0]}")
            try:
                if self._first:
                    self.check_lease()
                    # What a killed run left is removed now: after the writing, which may take
                    # longer than the lease, it could be the work of another process.
                    shutil.rmtree(self.dir / name, ignore_errors=True)
                    temporary.mkdir()
                wait_for_all(f"folder {name}")
                yield temporary
                wait_for_all(f"files of {name}")
                if self._first:
                    self.check_lease()
                    temporary.rename(self.dir / name)
            finally:
                if self._first:
                    shutil.rmtree(temporary, ignore_errors=True)
        else:
            own: dict[str, tuple[int, str]] = {}
            with staged_dir(self.dir / name) as folder:
                yield folder
                self.check_lease()
                own = {
                    f"{name}/{file.relative_to(folder).as_posix()}": (
                        file.stat().st_size,
                        file_sha256(epath.Path(file)),
                    )
                    for file in folder.rglob("*")
                    if file.is_file()
                }
            for uploaded in gathered(own):
                self._uploaded |= {file: (size, sha) for file, (size, sha) in uploaded.items()}

    def write_file(self, name: str, data: bytes) -> None:
        """A file of the artifact, whole."""
        self.check_lease()
        if self._first:
            write_atomic(self.dir / name, data, self.check_lease)
        self.files.append(name)

    def write(self, table: pa.Table) -> None:
        """The whole table as one shard."""
        self.shards(1, lambda _: (table, {}), unit="rows")

    def shards(
        self,
        count: int,
        make: Callable[[int], tuple[pa.Table, Stats]],
        unit: str = "traces",
        total: int | None = None,
        together: bool = False,
    ) -> None:
        """Makes every shard that is not there; several processes share the work by claiming shards.

        Args:
          count: of shards; an empty table has one too, so that it has its columns.
          make: shard index to its table and counts; a pure function, so that whoever makes a shard
            makes the same bytes.
          unit: of the rows, for the progress bar.
          total: rows in all; None hides the time left.
          together: the processes of a JAX job make every shard as one, as a global mesh needs it.

        Raises:
          Busy: other runners hold all shards that are left.
        """

        def one(shards: Pass, advance: Callable[[int], None]) -> list[Made]:
            self.advance = advance
            return [Made(*make(i)) for _, i in shards]

        for _ in standing([Shards(self, [1] * count, total, together)], one, 1, unit):
            pass

    def log_start(self, stood: str = "") -> None:
        """Says in the log that the artifact is being made, and what of it stood, once."""
        if self.show and not self._announced:
            log(f"{self.node.name}: starts{stood}")
        self._announced = True

    def claim(self) -> None:
        """Holds the whole artifact until `close`, so that no other runner makes it too.

        Raises:
          Busy: another runner holds it.
          Finished: another runner finished it.
        """
        if self._lease:  # the runner has claimed it
            return
        lease = Lease(self.dir / "claims" / "all")
        clean = functools.partial(self.workspace.remove_temporary, self.node)
        if not agreed(self._first and lease.take(clean)):
            raise Busy
        self._lease = lease
        # Another runner may have finished the artifact between the look and the lease.
        if agreed(self.workspace.complete(self.node)):
            raise Finished
        self._began = time.time()
        self.log_start()

    def check_lease(self) -> None:
        """Checks that this process still holds what it claimed, if anything; asked before a write.

        Raises:
          LostLease: another process took the artifact over, which is its alone from then on.
        """
        if self._lease and self._first and not self._lease.held():
            raise LostLease(
                f"Another process took over {self.dir} ({self.node.name}) because this one was "
                "silent for a minute; run the same command to continue."
            )

    def close(self) -> None:
        """Gives back the lease of `claim`, and the copies of `local_input`."""
        self._open.close()
        if self._lease and self._first:
            self._lease.release()
        self._lease = None

    def conclude(self) -> None:
        """Finishes the artifact in process 0, unless that is done, and says what making it took."""
        # Another runner may have made the last shard, and finished the artifact, at this moment.
        if process_index() == 0 and not self.finished and not self.workspace.complete(self.node):
            manifest = self.finish()
            if self.show:
                log(f"{self.node.name}: {_what_it_took(manifest)}")

    def finish(self) -> Manifest:
        """Writes the manifest and returns it.

        Raises:
          ArtifactError: a file changed since it was made.
          LostLease: another process took the artifact over.
        """
        node = self.node
        self.check_lease()
        names = [
            file
            for pattern in self.files
            for file in ([pattern] if "*" not in pattern else self._matching(pattern))
        ]
        ended = time.time()
        manifest = Manifest(
            stage=node.stage,
            label=list(node.label),
            version=node.version,
            key=self.dir.name,
            config=node.describe(),
            inputs={
                name: {
                    "path": os.path.relpath(self.workspace.path(source), self.workspace.root),
                    "content": self.workspace.manifest(source).content,
                }
                for name, source in node.inputs().items()
            },
            files={name: list(self._checked(name)) for name in names},
            stats=self.stats,
            versions=versions(),
            # A process that makes shards also waits for others, and makes shards of others.
            seconds=round(self.shard_seconds if node.sharded else ended - self._began, 3),
            started=_stamp(self._began),
            ended=_stamp(ended),
        ).sealed()
        text = json.dumps(manifest._asdict(), indent=1)
        # The manifest is written last: from here the artifact is complete.
        write_atomic(self.dir / "manifest.json", text.encode(), self.check_lease)
        self.finished = True
        return manifest

    def _matching(self, pattern: str) -> list[str]:
        return sorted(os.path.relpath(file, self.dir) for file in self.dir.glob(pattern))

    def _checked(self, name: str) -> tuple[int, str]:
        """Size and checksum of a file; a shard must still be what its maker wrote."""
        file, shard = self.dir / name, name.removesuffix(".parquet")
        is_shard = shard != name and (self.dir / f"{shard}.json").exists()
        if not file.exists():
            raise bad_shard(self, shard, f"{file} is missing")
        if name in self._uploaded:
            return self._uploaded[name]
        sha = file_sha256(file)
        if is_shard and sha != read_sidecar(self, shard)["sha256"]:
            raise bad_shard(self, shard, f"{file} is not what was written (checksum)")
        return file.stat().length, sha


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _what_it_took(manifest: Manifest) -> str:
    """What making the artifact took: rows, steps, seconds and tokens per second."""
    parts = [
        count(manifest.stats[f"{unit}s"], unit)
        for unit in ("row", "step")
        if f"{unit}s" in manifest.stats
    ]
    parts.append(f"{manifest.seconds:,.1f} s")
    if manifest.stats.get("tokens") and manifest.seconds:
        parts.append(f"{manifest.stats['tokens'] / manifest.seconds:,.0f} tokens/s")
    return ", ".join(parts)
