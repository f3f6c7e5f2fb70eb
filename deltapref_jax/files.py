"""Atomic writes and checksums; files in a bucket, and their copies on this machine.

A path that begins with `gs://` is in a bucket of Google Cloud Storage. Small files are read and
written there through `etils.epath`. Libraries that open only local files (safetensors, tokenizers,
Arrow, JAX's profiler) get a local copy.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# epath prefers TensorFlow's file system where TensorFlow is installed. With this, buckets are
# accessed through gcsfs everywhere, so that errors and credentials are the same on all machines.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath  # noqa: E402

from deltapref_jax.config import ConfigError  # noqa: E402
from deltapref_jax.records import digest  # noqa: E402

UNWRITABLE_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
)
"""Error numbers of a file system that is full, over quota, read-only or not permitted."""


_ANSWER_SECONDS = 10.0


class ArtifactError(RuntimeError):
    """An artifact is damaged or cannot be written; the message names the file and the remedy."""

    code = 2  # exit code of the entry points


def write_atomic(
    path: epath.Path, data: bytes, check_lease: Callable[[], None] = lambda: None
) -> None:
    """Writes `data` to `path`, which either does not change or holds all of it, also after a crash.

    Args:
      path: a file in a folder that exists.
      data: all that it holds.
      check_lease: called when the temporary file stands, which whoever takes the folder over
        removes. So a process that is suspended at any moment cannot replace its successor's file.

    Raises:
      ArtifactError: the file cannot be written; the temporary file has been removed.
    """
    if remote(path):  # An object store makes an object visible only when its upload is complete.
        check_lease()
        with _bucket_errors(path, unwritable):
            path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # Without fsync, the rename may reach the disk before the data does.
            os.fsync(file.fileno())
        check_lease()
        temporary.replace(path)
    except BaseException as e:  # The exceptions of signals are none of Exception.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise unwritable(path, e) from e
        raise


def is_unwritable(e: BaseException) -> bool:
    """Whether `e` is an error of a file system that cannot be written (UNWRITABLE_ERRNOS).

    The libraries in Rust (safetensors, tokenizers) raise exceptions of their own, with the number
    of the system's error in their text.
    """
    number = re.search(r"\(os error (\d+)\)", str(e))
    return (int(number[1]) if number else getattr(e, "errno", None)) in UNWRITABLE_ERRNOS


def unwritable(path: Any, e: Exception) -> ArtifactError:
    """Returns the error to raise for a file that cannot be written because of `e`."""
    reason = getattr(e, "strerror", None) or str(e).strip() or type(e).__name__
    if number := re.search(r"\(os error (\d+)\)", reason):
        reason = os.strerror(int(number[1]))
    return ArtifactError(
        f"{path} cannot be written ({reason.splitlines()[0]}); make room or choose another "
        "workspace, and run the same command: finished work is kept."
    )


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: epath.Path) -> str:
    """Returns the SHA-256 of a file as 64 hex digits, reading it in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in a bucket."""
    return "://" in os.fspath(path)


@functools.cache
def _gcs() -> Any:
    """Returns the fsspec file system of Google Cloud Storage, configured for `etils` too.

    Raises:
      ConfigError: gcsfs is not installed.
    """
    try:
        import fsspec
        import gcsfs  # noqa: F401  (brings google-cloud-storage, with which Orbax looks up buckets)
        import google.auth
    except ImportError as e:
        raise ConfigError(
            "A path begins with gs:// and the package gcsfs is not installed; "
            "pip install 'deltapref-jax[gcs]'."
        ) from e
    # A cached listing would not show what other processes have written since.
    settings = {"use_listings_cache": False} | fsspec.config.conf.get("gcs", {})
    if "token" not in settings:
        # gcsfs would ask the metadata server of a machine without credentials for a quarter of a
        # minute more, after google.auth, which asks it too.
        try:
            google.auth.default()
            settings["token"] = "google_default"
        except google.auth.exceptions.GoogleAuthError:
            settings["token"] = "anon"
    fsspec.config.conf["gcs"] = settings
    # gcsfs logs the traceback of every exception that it raises, also of those handled here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _bucket_errors(path: Any, to_error: Callable[[Any, Exception], Exception]) -> Iterator[None]:
    """Turns any exception of network and bucket into `to_error(path, exception)`.

    gcsfs, aiohttp and google-auth raise dozens of unrelated exception types.
    """
    try:
        yield
    except (ArtifactError, ConfigError):
        raise
    except Exception as e:
        raise to_error(path, e) from e


def _unreadable(path: Any, e: Exception) -> ArtifactError:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    return ArtifactError(
        f"{path} cannot be read ({reason}); check the name, this machine's credentials for Google "
        "Cloud Storage and its connection, and run the same command."
    )


def check_bucket(root: str | os.PathLike[str]) -> None:
    """Checks, before anything is written, that a workspace in a bucket can be used.

    Raises:
      ConfigError: gcsfs is not installed, the bucket does not exist, or it is not in Google Cloud
        Storage.
      ArtifactError: the bucket cannot be read.
    """
    path = os.fspath(root)
    if not remote(path):
        return
    if not path.startswith("gs://"):
        raise ConfigError(
            f"The workspace {path} is in no bucket of Google Cloud Storage; give a folder or "
            "gs://…."
        )
    bucket = "gs://" + path.removeprefix("gs://").split("/")[0]
    if not _exists(bucket):
        raise ConfigError(
            f"There is no bucket {bucket}, or this machine's credentials may not see it; check the "
            "name, or make it."
        )


@functools.cache
def _exists(bucket: str) -> bool:
    """Whether there is a bucket that this machine may see; asked before it is read or written.

    gcsfs repeats a failed request six times over half a minute, more than once for one question.

    Raises:
      ArtifactError: Google Cloud Storage did not answer within `_ANSWER_SECONDS`.
    """
    with _bucket_errors(bucket, _unreadable):
        try:
            return bool(_gcs().exists(bucket, timeout=_ANSWER_SECONDS))
        except TimeoutError as e:
            raise TimeoutError(f"no answer within {_ANSWER_SECONDS:g} seconds") from e


class BucketObject(NamedTuple):
    """What a bucket says of an object."""

    size: int  # in bytes
    generation: str  # another one after every write


def bucket_objects(path: str) -> dict[str, BucketObject]:
    """Returns the objects at a path in a bucket by their names below it; "" for `path` itself.

    Raises:
      ConfigError: gcsfs is not installed.
      FileNotFoundError: nothing is at `path`.
      ArtifactError: `path` cannot be read.
    """
    root = path.rstrip("/").removeprefix("gs://")
    _exists("gs://" + root.split("/")[0])
    with _bucket_errors(path, _unreadable):
        found = _gcs().find(root, detail=True).items()
        objects = {
            name.removeprefix(root).lstrip("/"): BucketObject(
                int(info["size"]), str(info.get("generation"))
            )
            for name, info in found
            if info["type"] == "file"
        }
    if not objects:
        raise FileNotFoundError(f"There is nothing at {path}; check the path.")
    return objects


def cache_folder() -> Path:
    """Returns the folder of what is copied from buckets: it may be deleted between two runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltapref-jax"


def local_copy(path: str, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """Returns a local path to the file or folder at `path`: itself, or a cached copy from a bucket.

    Copies are in `cache_folder`, in a folder named by a hash of the objects' names, sizes and
    generations, so that changed content is copied again.

    Args:
      path: of a file or folder.
      wanted: of the objects in a bucket's folder, by their names in it, those to copy.

    Raises:
      ConfigError: gcsfs is not installed.
      FileNotFoundError: nothing is at `path`.
      ArtifactError: `path` cannot be read, or this machine has no room for the copy.
    """
    if not remote(path):
        # The system has an error of its own for a name like this, in every question about it.
        if any(len(os.fsencode(part)) > 255 for part in path.split("/")):
            raise FileNotFoundError(f"There is nothing at {path[:80]}…; check the path.")
        return path
    root = path.rstrip("/").removeprefix("gs://")
    objects = {
        f"{root}/{name}".rstrip("/"): info
        for name, info in bucket_objects(path).items()
        if wanted(name)
    }
    if not objects:
        raise FileNotFoundError(f"{path} holds nothing of what is looked for; check the path.")
    identity = sorted((name, *info) for name, info in objects.items())
    key, cache = sha256(json.dumps(identity).encode())[:16], cache_folder()
    copy = cache / key / os.path.basename(root)
    if not copy.exists():
        incoming = cache / f".{key}.{uuid.uuid4().hex}"
        parent = os.path.dirname(root)
        try:
            download({name: incoming / os.path.relpath(name, parent) for name in objects})
            with contextlib.suppress(OSError):  # Another process has put the same copy there.
                incoming.rename(cache / key)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
    return str(copy)


class ByteReader:
    """Reads ranges of bytes of a file, here or in a bucket; several threads may read at once.

    Attributes:
      name: of the file.
      size: in bytes.
      slow_start: whether a read takes long however short it is, as a request to a bucket does.
    """

    def __init__(self, path: str):
        """Opens the file.

        Raises:
          OSError: it cannot be opened.
          ArtifactError: it is in a bucket and cannot be read.
        """
        self._path, self.name, self.slow_start = path, os.path.basename(path), remote(path)
        if self.slow_start:
            with _bucket_errors(path, _unreadable):
                self.size = int(_gcs().info(path)["size"])
            return
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read(self, first: int, length: int) -> bytes:
        """Returns `length` bytes from the byte `first` on."""
        out = np.empty(length, np.uint8)
        self.read_pieces(np.asarray([first]), length, out)
        return out.tobytes()

    def read_pieces(self, offsets: np.ndarray, length: int, out: np.ndarray) -> None:
        """Reads pieces of one length into `out` (uint8), one behind the other.

        Raises:
          ArtifactError: a piece cannot be read, or the file ends before it does.
        """
        if not length or not len(offsets):
            return
        if self.slow_start:
            self._request(offsets, length, out)
            return
        if len(offsets) > 1 and hasattr(os, "posix_fadvise"):
            # The system would fetch short pieces page by page; so it fetches what lies between too.
            span = int(offsets[-1]) + length - int(offsets[0])
            os.posix_fadvise(self._file, int(offsets[0]), span, os.POSIX_FADV_WILLNEED)
        memory, file, at, preadv = out.data, self._file, 0, os.preadv
        for offset in offsets.tolist():
            done = preadv(file, (memory[at : at + length],), offset)
            while done < length:  # a read may be shorter than what was asked for
                more = preadv(file, (memory[at + done : at + length],), offset + done)
                if not more:
                    raise ArtifactError(
                        f"{self._path} ends in the middle of a tensor; it was cut while it was "
                        "read: fetch it again."
                    )
                done += more
            at += length

    def _request(self, offsets: np.ndarray, length: int, out: np.ndarray) -> None:
        path = self._path.removeprefix("gs://")
        starts = offsets.tolist()
        with _bucket_errors(self._path, _unreadable):
            pieces = _gcs().cat_ranges(
                [path] * len(starts), starts, [start + length for start in starts]
            )
            data = b"".join(pieces)
            if len(data) != len(out):
                raise EOFError(f"{len(data)} of {len(out)} bytes came")
        out[:] = np.frombuffer(data, np.uint8)


def download(files: Mapping[str, Path]) -> None:
    """Downloads objects, given by name, to local files, creating their folders.

    Raises:
      ArtifactError: an object cannot be read, or this machine has no room for it.
    """
    with _bucket_errors(next(iter(files)), _unreadable):
        try:
            for target in files.values():
                target.parent.mkdir(parents=True, exist_ok=True)
            _gcs().get(
                [name.removeprefix("gs://") for name in files],
                [str(file) for file in files.values()],
            )
        except OSError as e:
            # gcsfs raises OSError for failed requests too; only these are of the local disk.
            if e.errno in UNWRITABLE_ERRNOS:
                raise unwritable(e.filename or next(iter(files.values())), e) from e
            raise


@contextlib.contextmanager
def staged_dir(folder: epath.Path) -> Iterator[Path]:
    """Yields a local directory whose files end up in `folder`.

    That is `folder` itself if it is local. For a bucket it is a temporary directory, uploaded on
    exit unless an exception is raised.

    Raises:
      ArtifactError: the files cannot be uploaded.
    """
    if not remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="deltapref-") as scratch:
        yield Path(scratch)
        files = [file for file in sorted(Path(scratch).rglob("*")) if file.is_file()]
        targets = [os.fspath(folder / file.relative_to(scratch).as_posix()) for file in files]
        with _bucket_errors(folder, unwritable):
            _gcs().put(
                [str(file) for file in files], [name.removeprefix("gs://") for name in targets]
            )


def content_hash(path: Path) -> str:
    """Returns 16 hex digits of the name and contents of a file or folder, wherever it is."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    parts = [[f.relative_to(path).as_posix(), file_sha256(epath.Path(f))] for f in files]
    return digest(path.name, parts)
