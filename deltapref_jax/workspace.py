"""Content-addressed artifacts: what a stage made, found again by what it was made from.

    workspace/<stage>/<key>/
      shard-00000-of-00004.parquet    written under a temporary name, put in place whole
      shard-00000-of-00004.json       its checksum, rows and counts; the shard counts as done when this stands
      claims/…                        leases of running work; they expire (`lease`)
      manifest.json                   written last: the artifact is complete when it stands

The key is a hash of the stage, its version, its config and the keys of its inputs. Tables hold no times, hosts or
paths, so a shard made twice is the same bytes: work is done at least once, results stand exactly once.

In a JAX job of several processes all of them run every stage; process 0 decides what is missing, holds the leases of
whole artifacts and writes manifests. Shards are shared out among the processes, unless their stage makes them together.
"""

import contextlib
import datetime
import functools
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from deltapref_jax.files import (
    UNWRITABLE_ERRNOS,
    ArtifactError,
    check_bucket,
    download,
    file_sha256,
    remote,
    sha256,
    staged_dir,
    unwritable,
    write_atomic,
)
from deltapref_jax.lease import LEASE_SECONDS, Lease
from deltapref_jax.node import Node, in_order
from deltapref_jax.processes import agreed, process_index, versions
from deltapref_jax.progress import progress
from deltapref_jax.records import digest

Stats = dict[str, float]


Stage = Callable[["Job"], None]


class Workspace:
    """A directory or bucket of artifacts.

    Raises:
      ConfigError: the bucket is not there, or the package for it is missing.
    """

    def __init__(self, root: str | os.PathLike[str]):
        check_bucket(root)
        self.root = epath.Path(root)

    def path(self, node: Node) -> epath.Path:
        """Directory of the artifact."""
        return self.root / node.stage / node.key

    def complete(self, node: Node, verify: bool = False) -> bool:
        """Whether the manifest stands and every file it names has its size.

        Files that are younger than the manifest, and with `verify` all files, must have their checksum too.

        Raises:
          ArtifactError: a file is missing or was changed; it is named.
        """
        stands = self.path(node) / "manifest.json"
        if not stands.exists():
            return False
        files = self.manifest(node)["files"]
        written = stands.stat().mtime
        for name, (size, sha) in files.items():
            file = self.path(node) / name
            if not file.exists():
                raise self.damaged(node, name, "missing")
            stat = file.stat()
            if stat.length != size:
                raise self.damaged(
                    node, name, f"{stat.length} bytes long and not {size} as written"
                )
            young = stat.mtime > written - (
                not remote(file)
            )  # whole seconds; a bucket's files cost a download
            if (verify or young) and file_sha256(file) != sha:
                raise self.damaged(node, name, "not what was written (checksum)")
        return True

    def manifest(self, node: Node) -> dict[str, Any]:
        """The manifest of a complete artifact.

        Raises:
          ArtifactError: it is missing, cut, edited, or another artifact's.
        """
        try:
            found = json.loads((self.path(node) / "manifest.json").read_text())
            matches = found["key"] == node.key
            seal = found.pop("digest", None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise self.damaged(node, "manifest.json", "missing or unreadable") from e
        if not matches:
            raise self.damaged(node, "manifest.json", "another artifact's")
        if seal not in (None, digest(found)):  # manifests of earlier versions have none
            raise self.damaged(node, "manifest.json", "not what was written (digest)")
        return found

    def table(self, node: Node) -> pa.Table:
        """All shards in order, checksums verified.

        Raises:
          ArtifactError: a file is missing or was changed; it is named.
        """
        tables = []
        for name, (_, sha) in self.manifest(node)["files"].items():
            if not name.endswith(".parquet"):
                continue
            try:
                data = (self.path(node) / name).read_bytes()
            except OSError as e:
                raise self.damaged(node, name, "missing") from e
            if sha256(data) != sha:
                raise self.damaged(node, name, "not what was written (checksum)")
            tables.append(pq.read_table(pa.BufferReader(data)))
        return pa.concat_tables(tables)

    def damaged(self, node: Node, name: str, what: str) -> ArtifactError:
        """The sentence for a file that is not as it was written."""
        return ArtifactError(
            f"{self.path(node) / name} ({node.label}) is {what}; delete the directory "
            f"{self.path(node)} and run again: only that artifact is made anew."
        )


class _Finished(Exception):
    """Another runner finished the artifact while this one waited for its lease."""


class Job:
    """What a stage gets: its config, its inputs, a directory, and a place for counts.

    Attributes:
      config: hashed part of the node.
      local: the part that is not hashed: paths, mesh.
      dir: the artifact's directory; it may hold the work of a killed run.
      stats: counts for the manifest; those of shards are added up.
      files: what the artifact consists of, relative to `dir`, beside its shards; patterns like `policy/*` are allowed.
    """

    def __init__(self, node: Node, workspace: Workspace, show: bool = True):
        self.node, self.workspace = node, workspace
        self.config, self.local = node.config, node.local
        self.dir = workspace.path(node)
        self.stats: Stats = {}
        self.files: list[str] = []
        self._first = process_index() == 0
        self._show = show and self._first
        self._began, self._elsewhere = time.time(), 0.0
        self._lease: Lease | None = None
        self._sums: dict[
            str, tuple[int, str]
        ] = {}  # of files that are not to be fetched back from a bucket for that
        self._open = contextlib.ExitStack()

    def table(self, name: str) -> pa.Table:
        """An input's table."""
        return self.workspace.table(self.node.inputs[name])

    def tables(self, prefix: str) -> dict[str, pa.Table]:
        """Tables of all inputs named `prefix/…`, by the rest of their names."""
        return {
            name.removeprefix(prefix + "/"): self.table(name)
            for name in self.node.inputs
            if name.startswith(prefix + "/")
        }

    def path(self, name: str) -> epath.Path:
        """An input's directory, checksums verified."""
        self.workspace.complete(self.node.inputs[name], verify=True)
        return self.workspace.path(self.node.inputs[name])

    def here(self, name: str, part: str) -> Path:
        """File or folder `part` of an input on this machine, checksums verified; a bucket's is copied until `close`.

        Raises:
          ArtifactError: a file is missing or was changed; it is named.
        """
        node = self.node.inputs[name]
        if not remote(self.dir):
            return Path(self.path(name) / part)
        sums = {
            file: sha
            for file, (_, sha) in self.workspace.manifest(node)["files"].items()
            if f"{file}/".startswith(f"{part}/")
        }
        place = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="deltapref-")))
        download({os.fspath(self.workspace.path(node) / file): place / file for file in sums})
        for file, sha in sums.items():
            if file_sha256(epath.Path(place / file)) != sha:
                raise self.workspace.damaged(node, file, "not what was written (checksum)")
        return place / part

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A folder on this machine to write into; it becomes the artifact's folder `name`."""
        with staged_dir(self.dir / name) as place:
            yield place
            if remote(self.dir):
                self._sums |= {
                    f"{name}/{file.relative_to(place).as_posix()}": (
                        file.stat().st_size,
                        file_sha256(epath.Path(file)),
                    )
                    for file in place.rglob("*")
                    if file.is_file()
                }

    def put(self, name: str, data: bytes) -> None:
        """A file of the artifact, whole."""
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
          make: shard index to its table and counts; a pure function: whoever makes a shard makes the same bytes.
          unit: of the rows, for the progress bar.
          total: rows in all; None hides the time left.
          together: the processes of a JAX job make every shard as one, as a global mesh needs it.
        """
        count = max(count, 1)
        names = [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]
        with progress(self._show) as bar:
            task = bar.add_task(self.node.label, total=total, unit=unit, note="")
            done: set[str] = set()
            while len(done) < count:
                before = len(done)
                for i, name in enumerate(names):
                    if name not in done and self._shard(i, name, make, together):
                        done.add(name)
                        bar.advance(task, self._sidecar(name)["rows"])
                if len(done) == before:  # others hold what is left
                    time.sleep(0.2)
                    self._elsewhere -= 0.2
        for name in names:
            side = self._sidecar(name)
            self.files.append(f"{name}.parquet")
            for key, value in side["stats"].items():
                self.stats[key] = self.stats.get(key, 0) + value
            self.stats["rows"] = self.stats.get("rows", 0) + side["rows"]
            self._elsewhere += 0 if side["maker"] == self._maker else side["seconds"]

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
            f"{what} ({self.node.label}); delete {self.dir / name}.json and run again: only that "
            "shard is made anew."
        )

    def _shard(
        self, index: int, name: str, make: Callable[[int], tuple[pa.Table, Stats]], together: bool
    ) -> bool:
        """Whether the shard stands; makes it if nobody else is at it."""
        done = self.dir / f"{name}.json"
        decide = agreed if together else bool
        if decide(done.exists()):
            return True
        lease = Lease(self.dir / "claims" / name)
        writes = self._first or not together
        if not decide(writes and lease.take()):
            return False
        try:
            if decide(done.exists()):
                return True
            began = time.time()
            table, stats = make(index)
            if writes:
                sink = pa.BufferOutputStream()
                pq.write_table(
                    table, sink, compression="zstd", version="2.6", data_page_version="1.0"
                )
                data = sink.getvalue().to_pybytes()
                write_atomic(self.dir / f"{name}.parquet", data)
                write_atomic(
                    done,
                    json.dumps(
                        {
                            "rows": table.num_rows,
                            "stats": stats,
                            "sha256": sha256(data),
                            "seconds": time.time() - began,
                            "maker": self._maker,
                        }
                    ).encode(),
                )
            return decide(True)
        finally:
            lease.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For stages that write a directory: holds the whole artifact's lease until the manifest stands.

        Waits while another runner holds it; if that one finished the artifact, the stage is left.
        """
        lease = Lease(self.dir / "claims" / "all")
        while not agreed(self._first and lease.take()):
            time.sleep(0.5)
        self._lease = lease
        if agreed(self.workspace.complete(self.node)):
            raise _Finished
        self._began = time.time()
        yield

    def close(self) -> None:
        """Gives back the lease of `alone`, and the copies of `here`."""
        self._open.close()
        if self._lease and self._first:
            self._lease.release()

    def finish(self) -> None:
        """Writes the manifest.

        Raises:
          ArtifactError: a file changed since it was made, or another runner took the artifact over.
        """
        if self._lease and self._lease.lost:
            raise ArtifactError(
                f"Another process took over {self.dir} ({self.node.label}) because this one was silent "
                "for a minute; run the same command to continue."
            )
        names = [
            f
            for pattern in self.files
            for f in (
                [pattern]
                if "*" not in pattern
                else sorted(os.path.relpath(found, self.dir) for found in self.dir.glob(pattern))
            )
        ]
        files = {name: self._checked(name) for name in names}
        ended = time.time()
        manifest = {
            "stage": self.node.stage,
            "label": self.node.label,
            "version": self.node.version,
            "key": self.node.key,
            "config": self.node.config,
            "local": self.node.local,
            "inputs": {name: node.key for name, node in self.node.inputs.items()},
            "files": files,
            "stats": self.stats,
            "versions": versions(),
            "seconds": round(
                ended - self._began + self._elsewhere, 3
            ),  # of work, whoever did it, without waiting
            "started": _stamp(self._began),
            "ended": _stamp(ended),
        }
        manifest = json.loads(json.dumps(manifest, default=str))  # as it will be read
        write_atomic(
            self.dir / "manifest.json",
            json.dumps(manifest | {"digest": digest(manifest)}, indent=1).encode(),
        )
        for left in self.dir.glob(".*.*"):  # by killed processes
            with contextlib.suppress(OSError):
                if left.stat().mtime < ended - LEASE_SECONDS:
                    left.unlink()

    def _checked(self, name: str) -> tuple[int, str]:
        """Size and checksum of a file; a shard must still be what its maker wrote."""
        file, shard = self.dir / name, name.removesuffix(".parquet")
        made = (
            self._sidecar(shard)["sha256"]
            if (self.dir / f"{shard}.json").exists() and shard != name
            else None
        )
        if not file.exists():
            raise self._bad_shard(shard, f"{file} is missing")
        if name in self._sums:
            return self._sums[name]
        sha = file_sha256(file)
        if made and sha != made:
            raise self._bad_shard(shard, f"{file} is not what was written (checksum)")
        return file.stat().length, sha


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def run(
    wanted: Mapping[str, Node],
    stages: Mapping[str, Stage],
    workspace: Workspace,
    show: bool = True,
    verify: bool = False,
) -> None:
    """Makes what is missing of `wanted`, in order; what stands is left alone.

    Args:
      wanted: nodes by label.
      stages: functions by stage name.
      workspace: where artifacts are looked for and put.
      show: progress bars.
      verify: checksums of everything that stands, not only of what is read.

    Raises:
      ArtifactError: a finished artifact is damaged, or the workspace cannot be written.
    """
    for node in in_order(wanted):
        if agreed(workspace.complete(node, verify)):
            continue
        try:
            workspace.path(node).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ArtifactError(
                f"The workspace {workspace.root} cannot be written ({e.strerror or e}); "
                "choose another with --config.workspace=…"
            ) from e
        job = Job(node, workspace, show)
        try:
            stages[node.stage](job)
            if process_index() == 0:
                job.finish()
        except _Finished:
            pass
        except OSError as e:
            if e.errno in UNWRITABLE_ERRNOS:
                raise unwritable(e.filename or job.dir, e) from e
            raise
        finally:
            job.close()
    agreed(True)  # nobody reads before process 0 has written
