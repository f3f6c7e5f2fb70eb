"""Content-addressed artifacts: what a stage made, found again by what it was made from.

    workspace/<stage>/<key>/
      shard-00000-of-00004.parquet    written under a temporary name, put in place whole
      shard-00000-of-00004.json       its checksum, rows and counts; the shard counts as done when this stands
      claims/…                        leases of running work; they expire
      manifest.json                   written last: the artifact is complete when it stands

The key is a hash of the stage, its version, its config and the keys of its inputs. Tables hold no times, hosts or
paths, so a shard made twice is the same bytes: work is done at least once, results stand exactly once. On a POSIX file
system claims are exclusive; on an object store two hosts may rarely do the same shard, which costs time and nothing else.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from deltapref_jax.progress import progress
from deltapref_jax.records import digest

LEASE_SECONDS = 60.0
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pyarrow", "deltapref-jax")

Stats = dict[str, float]


class ArtifactError(RuntimeError):
    """An artifact is damaged or cannot be written; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Node:
    """An artifact wanted: a stage, its config and its inputs. `label` and `local` (paths, mesh) are not hashed."""

    stage: str
    label: str
    config: Mapping[str, Any]
    inputs: Mapping[str, "Node"] = dataclasses.field(default_factory=dict)
    local: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: int = 1

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits."""
        return digest(self.stage, self.version, self.config, {name: node.key for name, node in self.inputs.items()})


Stage = Callable[["Job"], None]


def _write(path: epath.Path, data: bytes) -> None:
    """Puts `data` at `path` whole or not at all."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if hasattr(file, "fileno"):
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(f"{path} cannot be written ({e.strerror or e}); make room or choose another workspace and "
                            "run the same command: finished work is kept.") from e


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Workspace:
    """A directory or bucket of artifacts."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = epath.Path(root)

    def path(self, node: Node) -> epath.Path:
        """Directory of the artifact."""
        return self.root / node.stage / node.key

    def complete(self, node: Node) -> bool:
        """Whether the manifest stands and every file it names has its size.

        Raises:
          ArtifactError: a file is missing or cut.
        """
        if not (self.path(node) / "manifest.json").exists():
            return False
        for name, (size, _) in self.manifest(node)["files"].items():
            file = self.path(node) / name
            if not file.exists() or file.stat().length != size:
                raise self._damaged(node, name, "missing" if not file.exists() else "of another size than written")
        return True

    def manifest(self, node: Node) -> dict[str, Any]:
        """The manifest of a complete artifact."""
        try:
            return json.loads((self.path(node) / "manifest.json").read_text())
        except (OSError, ValueError) as e:
            raise self._damaged(node, "manifest.json", f"unreadable ({e})") from e

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
                raise self._damaged(node, name, "missing") from e
            if _sha(data) != sha:
                raise self._damaged(node, name, "not what was written (checksum)")
            tables.append(pq.read_table(pa.BufferReader(data)))
        return pa.concat_tables(tables)

    def _damaged(self, node: Node, name: str, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path(node) / name} ({node.label}) is {what}; delete the directory "
                             f"{self.path(node)} and run again: only that artifact is made anew.")


class Claim:
    """A lease on a piece of work, kept alive by a thread until released; use as a context manager."""

    def __init__(self, path: epath.Path, seconds: float = LEASE_SECONDS):
        self._path, self._seconds = path, seconds
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._stop = threading.Event()

    def take(self) -> bool:
        """Whether the lease is ours now; a lease that expired, or whose process is gone, is taken over."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if not self._stale():
                return False
            with contextlib.suppress(OSError):  # another process may be taking it over at the same moment
                self._path.replace(self._path.parent / f".{self._owner['id']}")
                (self._path.parent / f".{self._owner['id']}").unlink()
        try:
            with self._path.open("x") as file:
                file.write(self._text())
        except (FileExistsError, FileNotFoundError):
            return False
        threading.Thread(target=self._renew, daemon=True).start()
        return True

    def release(self) -> None:
        """Gives the lease back."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _text(self) -> str:
        return json.dumps(self._owner | {"expires": time.time() + self._seconds})

    def _stale(self) -> bool:
        try:
            held = json.loads(self._path.read_text())
        except FileNotFoundError:
            return True
        except (OSError, ValueError):  # being written this moment, or cut by a crash
            with contextlib.suppress(OSError):
                return time.time() - self._path.stat().mtime > self._seconds
            return True
        if held["host"] == self._owner["host"]:
            try:
                os.kill(held["pid"], 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return held["expires"] < time.time()

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            with contextlib.suppress(OSError):
                temporary = self._path.parent / f".{self._owner['id']}.renew"
                temporary.write_text(self._text())
                if self._stop.is_set():
                    temporary.unlink(missing_ok=True)
                    return
                temporary.replace(self._path)


class Job:
    """What a stage gets: its config, its inputs, a directory, and a place for counts.

    Attributes:
      config: hashed part of the node.
      local: the part that is not hashed: paths, mesh.
      dir: the artifact's directory; it may hold the work of a killed run.
      stats: counts for the manifest; those of shards are added up.
    """

    def __init__(self, node: Node, workspace: Workspace, show: bool = True):
        self.node, self.workspace, self._show = node, workspace, show
        self.config, self.local = node.config, node.local
        self.dir = workspace.path(node)
        self.stats: Stats = {}
        self.files: list[str] = []

    def table(self, name: str) -> pa.Table:
        """An input's table."""
        return self.workspace.table(self.node.inputs[name])

    def tables(self, prefix: str) -> dict[str, pa.Table]:
        """Tables of all inputs named `prefix/…`, by the rest of their names."""
        return {name.removeprefix(prefix + "/"): self.table(name) for name in self.node.inputs
                if name.startswith(prefix + "/")}

    def path(self, name: str) -> epath.Path:
        """An input's directory."""
        return self.workspace.path(self.node.inputs[name])

    def write(self, table: pa.Table) -> None:
        """The whole table as one shard."""
        self.shards(1, lambda _: (table, {}), unit="rows")

    def shards(self, count: int, make: Callable[[int], tuple[pa.Table, Stats]], unit: str = "traces",
               total: int | None = None) -> None:
        """Makes every shard that is not there; several processes share the work by claiming shards.

        Args:
          count: of shards.
          make: shard index to its table and counts; a pure function, so that whoever makes a shard makes the same bytes.
          unit: of the rows, for the progress bar.
          total: rows in all; None hides the time left.
        """
        names = [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]
        with progress(self._show) as bar:
            task = bar.add_task(self.node.label, total=total, unit=unit, note="")
            done: set[str] = set()
            while len(done) < count:
                before = len(done)
                for i, name in enumerate(names):
                    if name not in done and self._shard(i, name, make):
                        done.add(name)
                        bar.advance(task, self._sidecar(name)["rows"])
                if len(done) == before:
                    time.sleep(0.2)  # others hold what is left
        for name in names:
            side = self._sidecar(name)
            self.files.append(f"{name}.parquet")
            for key, value in side["stats"].items():
                self.stats[key] = self.stats.get(key, 0) + value
            self.stats["rows"] = self.stats.get("rows", 0) + side["rows"]

    def _sidecar(self, name: str) -> dict[str, Any]:
        return json.loads((self.dir / f"{name}.json").read_text())

    def _shard(self, index: int, name: str, make: Callable[[int], tuple[pa.Table, Stats]]) -> bool:
        """Whether the shard stands; makes it if nobody else is at it."""
        if (self.dir / f"{name}.json").exists():
            return True
        claim = Claim(self.dir / "claims" / name)
        if not claim.take():
            return False
        try:
            if (self.dir / f"{name}.json").exists():
                return True
            table, stats = make(index)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd", version="2.6", data_page_version="1.0")
            data = sink.getvalue().to_pybytes()
            _write(self.dir / f"{name}.parquet", data)
            _write(self.dir / f"{name}.json",
                   json.dumps({"rows": table.num_rows, "stats": stats, "sha256": _sha(data)}).encode())
            return True
        finally:
            claim.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lease of the whole artifact, for stages that write a directory; waits while another holds it."""
        claim = Claim(self.dir / "claims" / "all")
        while not claim.take():
            time.sleep(0.5)
        try:
            yield
        finally:
            claim.release()

    def finish(self, seconds: float) -> None:
        """Writes the manifest."""
        files = {}
        for name in self.files:
            data = (self.dir / name).read_bytes()
            files[name] = (len(data), _sha(data))
        for side in self.dir.glob("shard-*.json"):  # a shard that changed since it was made is not blessed
            stated, name = json.loads(side.read_text())["sha256"], side.name.removesuffix(".json") + ".parquet"
            if name in files and files[name][1] != stated:
                raise ArtifactError(f"{self.dir / name} ({self.node.label}) is not what was written (checksum); delete "
                                    f"{side} and run again: only that shard is made anew.")
        manifest = {
            "stage": self.node.stage, "label": self.node.label, "version": self.node.version, "key": self.node.key,
            "config": self.node.config, "local": self.node.local,
            "inputs": {name: node.key for name, node in self.node.inputs.items()},
            "files": files, "stats": self.stats, "seconds": round(seconds, 3), "versions": versions(),
        }
        _write(self.dir / "manifest.json", json.dumps(manifest, indent=1, default=str).encode())


@functools.cache
def versions() -> dict[str, str]:
    """Python, platform, device and library versions of this process."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    import jax  # late: planning and tests of the workspace do not need it

    return found | {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}


def in_order(wanted: Mapping[str, Node]) -> list[Node]:
    """Every node behind `wanted`, inputs before what needs them, each key once."""
    ordered: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.key not in ordered:
            for source in node.inputs.values():
                visit(source)
            ordered[node.key] = node

    for node in wanted.values():
        visit(node)
    return list(ordered.values())


def run(wanted: Mapping[str, Node], stages: Mapping[str, Stage], workspace: Workspace, show: bool = True) -> None:
    """Makes what is missing of `wanted`, in order; what stands is left alone.

    Raises:
      ArtifactError: a finished artifact is damaged, or the workspace cannot be written.
    """
    for node in in_order(wanted):
        if workspace.complete(node):
            continue
        try:
            workspace.path(node).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ArtifactError(f"The workspace {workspace.root} cannot be written ({e.strerror or e}); "
                                "choose another with --config.workspace=…") from e
        job = Job(node, workspace, show)
        began = time.monotonic()
        stages[node.stage](job)
        job.finish(time.monotonic() - began)
