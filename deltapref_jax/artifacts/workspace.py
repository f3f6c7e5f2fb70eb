"""Content-addressed artifacts on disk or in a bucket: looked up by what they were made from.

    workspace/<stage>/<key>/
      shard-00000-of-00004.parquet    written under a temporary name, put in place whole
      shard-00000-of-00004.json       checksum, rows and counts; the shard is done when this stands
      claims/…                        leases of running work; they expire (`lease`)
      manifest.json                   written last: the artifact is complete when it stands
    workspace/index.json              names of a study's artifacts and their folders, for people
    workspace/by_name/<study>/…       the same as links, where the file system has links

Tables hold no times, hosts or paths, so a shard made twice is the same bytes: work is done at least
once, results stand exactly once, and the checksums of an artifact's files are its contents.
"""

import contextlib
import errno
import json
import os
import stat
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from deltapref_jax.artifacts.lease import Lease, remove_claims
from deltapref_jax.artifacts.node import Node
from deltapref_jax.files import (
    ArtifactError,
    check_bucket,
    file_sha256,
    remote,
    sha256,
    write_atomic,
)
from deltapref_jax.records import Record, digest, from_table


class Manifest(NamedTuple):
    """What stands about a complete artifact."""

    stage: str
    label: list[str]  # of the study that made it
    version: int
    key: str
    config: dict[str, Any]  # all fields of the node but its inputs
    inputs: dict[str, dict[str, str]]  # input → {"path", "content"}
    files: dict[str, list[Any]]  # name → [bytes, SHA-256]
    stats: dict[str, float]  # counts
    versions: dict[str, str]  # of libraries
    seconds: float  # of work, whoever did it, without waiting
    started: str  # UTC
    ended: str
    digest: str = ""  # of all fields above

    @property
    def content(self) -> str:
        """16 hex digits of the artifact's files."""
        return digest({name: sha for name, (_, sha) in self.files.items()})

    def sealed(self) -> "Manifest":
        """The manifest with its digest, so that edits are noticed."""
        # The round trip through JSON gives the digest the same types as a manifest that was read.
        plain = json.loads(json.dumps(self._asdict() | {"digest": ""}, default=str))
        return Manifest(**plain | {"digest": digest(plain)})


class Workspace:
    """A directory or bucket of artifacts.

    Raises:
      ConfigError: the bucket is not there, or the package for it is missing.
    """

    def __init__(self, root: str | os.PathLike[str]):
        check_bucket(root)
        self.root = epath.Path(root)
        self._keys: dict[Node, str] = {}
        self._contents: dict[Node, str] = {}

    def key(self, node: Node) -> str | None:
        """The node's key; None while an input is missing, whose contents the key hashes."""
        if node not in self._keys:
            contents: dict[str, str] = {}
            for name, source in node.inputs().items():
                if source not in self._contents and not self.complete(source):
                    return None
                contents[name] = self._contents[source]
            self._keys[node] = node.key(contents)
        return self._keys[node]

    def path(self, node: Node) -> epath.Path:
        """Directory of the artifact.

        Raises:
          ArtifactError: an input is missing, so that the directory is not known yet.
        """
        key = self.key(node)
        if key is None:
            raise ArtifactError(
                f"The inputs of {node.name} are not in {self.root}; run the study first."
            )
        return self.root / node.stage / key

    def complete(self, node: Node, verify: bool = False) -> bool:
        """Whether the manifest stands and every file it names has its size.

        Files younger than the manifest, and with `verify` all files, must have their checksum too.

        Raises:
          ArtifactError: a file is missing or was changed; it is named.
        """
        if self.key(node) is None:
            return False
        stands = self.path(node) / "manifest.json"
        if not stands.exists():
            return False
        manifest = self.manifest(node)
        finished = stands.stat().mtime
        for name, (size, sha) in manifest.files.items():
            file = self.path(node) / name
            if not file.exists():
                raise self.damaged(node, name, "missing")
            found = file.stat()
            if found.length != size:
                raise self.damaged(
                    node, name, f"{found.length} bytes long and not {size} as written"
                )
            # times are whole seconds; a file of a bucket would cost a download
            young = found.mtime > finished - (not remote(file))
            if (verify or young) and file_sha256(file) != sha:
                raise self.damaged(node, name, "not what was written (checksum)")
        # The keys of what is made from this artifact hash its contents.
        self._contents[node] = manifest.content
        return True

    def manifest(self, node: Node) -> Manifest:
        """The manifest of a complete artifact.

        Raises:
          ArtifactError: it is missing, cut, edited, or another artifact's.
        """
        try:
            manifest = Manifest(**json.loads((self.path(node) / "manifest.json").read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise self.damaged(node, "manifest.json", "missing or unreadable") from e
        if manifest.key != self.key(node):
            raise self.damaged(node, "manifest.json", "another artifact's")
        if manifest != manifest.sealed():
            raise self.damaged(node, "manifest.json", "not what was written (digest)")
        return manifest

    def table(self, node: Node) -> pa.Table:
        """All shards in order, checksums verified.

        Raises:
          ArtifactError: a file is missing or was changed; it is named.
        """
        tables = []
        for name, (_, sha) in self.manifest(node).files.items():
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

    def rows(self, record: type[Record], node: Node) -> list[Record]:
        """The table's rows as records."""
        return from_table(record, self.table(node))

    def damaged(self, node: Node, name: str, what: str) -> ArtifactError:
        """The sentence for a file that is not as it was written."""
        return ArtifactError(
            f"{self.path(node) / name} ({node.name}) is {what}; delete the directory "
            f"{self.path(node)} and run again: only that artifact is made anew."
        )

    def remove_temporary(self, node: Node) -> None:
        """Removes temporary files and folders from an artifact that no other process works on.

        One that was suspended, and whose lease this process has taken over, may still want to
        rename them. It finds them missing and leaves.
        """
        if not remote(self.root):
            for path in self.path(node).glob(".*.*"):
                _remove(path)

    def remove_leftovers(self, node: Node) -> None:
        """Removes what killed and suspended processes left in an artifact that is complete."""
        if not remote(self.root):
            folder = self.path(node)
            self.remove_temporary(node)
            # A suspended process continues a checkpoint in a folder that is its successor's now.
            for path in folder.glob("checkpoints.*"):
                _remove(path)
            remove_claims(folder / "claims")

    def check_writable(self) -> None:
        """Checks that artifacts can be put here, and creates nothing; a bucket is not asked.

        Raises:
          ArtifactError: the folder, or the one in which it would be made, cannot be written.
        """
        if remote(self.root):
            return
        place = os.path.abspath(self.root)
        try:
            while not _is_folder(place):
                place = os.path.dirname(place)
            system = os.statvfs(place)
            if system.f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            if not os.access(place, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            # The kernel's own file systems, such as /proc, have no room and permit root everything;
            # an unnamed file leaves no trace where it can be made.
            if not system.f_blocks and hasattr(os, "O_TMPFILE"):
                os.close(os.open(place, os.O_TMPFILE | os.O_WRONLY))
        except OSError as e:
            raise self.unwritable(e) from e

    def unwritable(self, e: OSError) -> ArtifactError:
        """The sentence for a workspace in which no folder can be made."""
        return ArtifactError(
            f"The workspace {self.root} cannot be written ({e.strerror or e}); choose another with "
            "--config.workspace=…"
        )

    def write_index(self, study: str, nodes: Iterable[Node]) -> None:
        """Names the complete artifacts of `study` in index.json, and as links under by_name/.

        The index is for people and nothing reads it: a runner that finds another one writing leaves
        it to its own next time, and a workspace that cannot be written goes without.
        """
        with contextlib.suppress(OSError, ArtifactError):
            self._write_index(study, list(nodes))

    def _clean_index(self) -> None:
        """Removes temporary files of the index and its claim, which killed processes left."""
        if not remote(self.root):
            for path in [*self.root.glob(".index.json.*"), *self.root.glob("claims/.*")]:
                if path.name != ".lock":
                    _remove(path)

    def _write_index(self, study: str, nodes: list[Node]) -> None:
        entries = {
            node.name: os.path.join(node.stage, self._keys[node])
            for node in nodes
            if node in self._contents
        }
        file = self.root / "index.json"
        # The index is read, changed and written, so only one runner does it at a time.
        lease = Lease(self.root / "claims" / "index")
        if not lease.take(self._clean_index):
            return
        try:
            index: dict[str, dict[str, str]] = {}
            with contextlib.suppress(OSError, ValueError):
                index = json.loads(file.read_text())
            if index.get(study) != entries:
                index[study] = entries
                write_atomic(file, json.dumps(index, indent=1, sort_keys=True).encode())
        finally:
            lease.release()
        if not remote(self.root):
            named = (node for node in nodes if node.name in entries)
            _link_all(
                Path(self.root, "by_name", file_name(study)),
                {"/".join(map(file_name, node.label)): Path(self.path(node)) for node in named},
            )


def _is_folder(path: str) -> bool:
    """Whether there is a folder; False: there is nothing.

    Raises:
      OSError: it is a file, or its name cannot be looked up.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return True


def _remove(path: epath.Path) -> None:
    """Removes a file or folder, unless another process does that too."""
    with contextlib.suppress(OSError):
        path.rmtree() if path.is_dir() else path.unlink()


def file_name(word: str) -> str:
    """A word of a label as a file name that means nothing else, such as "a%2Fb" for "a/b"."""
    name = urllib.parse.quote(word, safe=" +,=@()[]")
    return name.replace(".", "%2E") if word in (".", "..") else name


def _link_all(root: Path, folders: Mapping[str, Path]) -> None:
    """Makes relative links under `root`, one per name, and removes all others there.

    A name that continues another one goes without: its link would lie in the other's folder.
    """
    wanted = {}
    for name, folder in folders.items():
        words = name.split("/")
        if not any("/".join(words[:n]) in folders for n in range(1, len(words))):
            wanted[name] = folder
    for path in sorted(root.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_symlink() and path.relative_to(root).as_posix() not in wanted:
            path.unlink()
        elif path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    for name, folder in wanted.items():
        link = root / name
        target = os.path.relpath(folder, link.parent)
        if not (link.is_symlink() and os.readlink(link) == target):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target)
