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
import pyarrow.parquet as pq
from etils import epath

from deltapref_jax.artifacts.lease import LEASE_SECONDS, Lease, LostLease
from deltapref_jax.artifacts.node import Node
from deltapref_jax.artifacts.workspace import Manifest, Workspace
from deltapref_jax.files import (
    ArtifactError,
    download,
    file_sha256,
    remote,
    sha256,
    staged_dir,
    write_atomic,
)
from deltapref_jax.processes import agreed, process_count, process_index, versions
from deltapref_jax.progress import Counter, log
from deltapref_jax.records import Record

Stats = dict[str, float]


class Busy(Exception):
    """Another runner holds what is left of an artifact; the runner comes back to it."""


class Finished(Exception):
    """Another runner finished the artifact in the meantime."""


class Job:
    """The making of one artifact.

    Attributes:
      dir: the artifact's directory; it may hold the work of a killed run.
      stats: counts for the manifest; those of shards are added up.
      finished: whether this job wrote the manifest.
      share: of the time since the claim that was spent on this artifact, where several were made in
        one pass.
      files: what the artifact consists of, relative to `dir`, beside its shards; patterns like
        `policy/*` are allowed.
    """

    def __init__(self, node: Node, workspace: Workspace, show: bool = True):
        self.node, self.workspace = node, workspace
        self.dir = workspace.path(node)
        self.stats: Stats = {}
        self.share = 1.0
        self.files: list[str] = []
        self.show = show and process_index() == 0
        self._first = process_index() == 0
        # `_elsewhere` corrects the seconds: work of other makers is added, and waiting subtracted.
        self._began, self._elsewhere = time.time(), 0.0
        self._lease: Lease | None = None
        # checksums of files that went to a bucket, so that they are not fetched back for them
        self._uploaded: dict[str, tuple[int, str]] = {}
        self._open = contextlib.ExitStack()
        self._counter: Counter | None = None
        self.finished = False
        self._announced = False
        self._stood = ""  # how many shards stood when this job began to make one
        self._advanced = 0  # rows of the shard at hand that the bar counts already

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
        """A folder on this machine to write into; it becomes the artifact's folder `name`.

        Raises:
          LostLease: another process took the artifact over; the folder is left as it was.
        """
        if not remote(self.dir):
            # A hidden folder beside the final one, since a rename is atomic only within a file
            # system.
            temporary = Path(self.dir / f".{name}.{uuid.uuid4().hex}")
            try:
                temporary.mkdir()
                yield temporary
                # Writing may have taken longer than the lease, so it is checked right before the
                # rename.
                self.check_lease()
                shutil.rmtree(self.dir / name, ignore_errors=True)  # of a killed run
                temporary.rename(self.dir / name)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        else:
            with staged_dir(self.dir / name) as folder:
                yield folder
                self.check_lease()
                self._uploaded |= {
                    f"{name}/{file.relative_to(folder).as_posix()}": (
                        file.stat().st_size,
                        file_sha256(epath.Path(file)),
                    )
                    for file in folder.rglob("*")
                    if file.is_file()
                }

    def write_file(self, name: str, data: bytes) -> None:
        """A file of the artifact, whole."""
        self.check_lease()
        if self._first:
            write_atomic(self.dir / name, data)
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
          count: of shards; 0 is taken for 1, so that an empty table has its columns.
          make: shard index to its table and counts; a pure function, so that whoever makes a shard
            makes the same bytes.
          unit: of the rows, for the progress bar.
          total: rows in all; None hides the time left.
          together: the processes of a JAX job make every shard as one, as a global mesh needs it.

        Raises:
          Busy: other runners hold all shards that are left.
        """
        count = max(count, 1)
        names = [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]
        with Counter(self.node.name, total, unit, self.show) as self._counter:
            done: set[str] = set()
            while len(done) < count:
                before = len(done)
                for i, name in enumerate(names):
                    if done and not self._announced:
                        self._stood = f", {len(done)} of {count} shards are complete"
                    if name not in done and self._shard(i, name, make, together):
                        done.add(name)
                        self.advance(self._sidecar(name)["rows"] - self._advanced)
                        self._advanced = 0
                if len(done) == before:
                    if process_count() == 1:
                        raise Busy
                    # the processes of a job take the same steps, so this one waits for the others
                    time.sleep(0.2)
                    self._elsewhere -= 0.2
        for name in names:
            side = self._sidecar(name)
            self.files.append(f"{name}.parquet")
            for key, value in side["stats"].items():
                self.stats[key] = self.stats.get(key, 0) + value
            self.stats["rows"] = self.stats.get("rows", 0) + side["rows"]
            self._elsewhere += 0 if side["maker"] == self._maker else side["seconds"]

    def advance(self, rows: int) -> None:
        """Moves the bar within a shard, for a stage whose shards take long."""
        if self._counter:
            self._counter.advance(rows)
            self._advanced += rows

    @functools.cached_property
    def _maker(self) -> str:
        return uuid.uuid4().hex

    def _sidecar(self, name: str) -> dict[str, Any]:
        path = self.dir / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise self._bad_shard(name, f"{path} is unreadable") from e

    def _bad_shard(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"{what} ({self.node.name}); delete {self.dir / name}.json and run again: only that "
            "shard is made anew."
        )

    def _shard(
        self,
        index: int,
        name: str,
        make: Callable[[int], tuple[pa.Table, Stats]],
        together: bool,
    ) -> bool:
        """Whether the shard stands; makes it if nobody else is at it."""
        done = self.dir / f"{name}.json"
        # Where the processes make a shard together, all of them must take the same branch.
        decide = agreed if together else bool
        if decide(done.exists()):
            return True
        lease = Lease(self.dir / "claims" / name)
        writes = self._first or not together
        if not decide(writes and lease.take()):
            return False
        self.log_start()
        try:
            # Another runner may have finished the shard between the look and the lease.
            if decide(done.exists()):
                return True
            began = time.time()
            table, stats = make(index)
            if writes:
                # The file is made in memory, so that the checksum is that of what was meant to be
                # written.
                sink = pa.BufferOutputStream()
                pq.write_table(
                    table, sink, compression="zstd", version="2.6", data_page_version="1.0"
                )
                data = sink.getvalue().to_pybytes()
                write_atomic(self.dir / f"{name}.parquet", data)
                side = {
                    "rows": table.num_rows,
                    "stats": stats,
                    "sha256": sha256(data),
                    "seconds": time.time() - began,
                    "maker": self._maker,
                }
                # The sidecar is written last: the shard is done when it stands.
                write_atomic(done, json.dumps(side).encode())
            return decide(True)
        finally:
            lease.release()

    def log_start(self) -> None:
        """Says in the log that the artifact is being made, once."""
        if self.show and not self._announced:
            log(f"{self.node.name}: starts{self._stood}")
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
        if not agreed(self._first and lease.take()):
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
            seconds=round(self.share * (ended - self._began) + self._elsewhere, 3),
            started=_stamp(self._began),
            ended=_stamp(ended),
        ).sealed()
        text = json.dumps(manifest._asdict(), indent=1)
        # The manifest is written last: from here the artifact is complete.
        write_atomic(self.dir / "manifest.json", text.encode())
        self._remove_leftovers()
        self.finished = True
        return manifest

    def _matching(self, pattern: str) -> list[str]:
        return sorted(os.path.relpath(file, self.dir) for file in self.dir.glob(pattern))

    def _remove_leftovers(self) -> None:
        """Removes temporary files and folders of killed processes.

        Their age is that against the manifest, which was just written on the same file system: this
        host's clock may be hours ahead of the one that times the files that another is writing.
        """
        now = (self.dir / "manifest.json").stat().mtime
        for path in self.dir.glob(".*.*"):
            with contextlib.suppress(OSError):
                if path.stat().mtime < now - LEASE_SECONDS:
                    path.rmtree() if path.is_dir() else path.unlink()

    def _checked(self, name: str) -> tuple[int, str]:
        """Size and checksum of a file; a shard must still be what its maker wrote."""
        file, shard = self.dir / name, name.removesuffix(".parquet")
        is_shard = shard != name and (self.dir / f"{shard}.json").exists()
        if not file.exists():
            raise self._bad_shard(shard, f"{file} is missing")
        if name in self._uploaded:
            return self._uploaded[name]
        sha = file_sha256(file)
        if is_shard and sha != self._sidecar(shard)["sha256"]:
            raise self._bad_shard(shard, f"{file} is not what was written (checksum)")
        return file.stat().length, sha


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
