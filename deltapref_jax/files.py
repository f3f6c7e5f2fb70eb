"""Files that are there whole or not at all, and their checksums; files of a bucket, and their copies on this machine.

A path that begins with `gs://` is in a bucket of Google Cloud Storage. Small files are read and written there through
`etils.epath`; libraries that know only local files (safetensors, tokenizers, Arrow, the profiler) get a local copy.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "EPATH_USE_TF", "false"
)  # one way into buckets, whether or not TensorFlow is installed too

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
"""Errors of a file system that takes no more."""


class ArtifactError(RuntimeError):
    """An artifact is damaged or cannot be written; the message names the file and the remedy."""


def write_atomic(path: epath.Path, data: bytes) -> None:
    """Puts `data` at `path`, on disk before it has the name.

    Raises:
      ArtifactError: it cannot be written; nothing of it is left.
    """
    if remote(path):  # an object appears whole when its upload ends
        with _bucket_errors(path, unwritable):
            path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, e) from e


def unwritable(path: Any, e: Exception) -> ArtifactError:
    """The sentence for a file that cannot be written."""
    why = getattr(e, "strerror", None) or str(e).strip() or type(e).__name__
    return ArtifactError(
        f"{path} cannot be written ({why.splitlines()[0]}); make room or choose another workspace, "
        "and run the same command: finished work is kept."
    )


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: epath.Path) -> str:
    """64 hex digits, without reading the whole file into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in a bucket."""
    return "://" in os.fspath(path)


@functools.cache
def _bucket() -> Any:
    """The file system of Google Cloud Storage, as it is used here and by `etils`.

    Raises:
      ConfigError: its package is not installed.
    """
    try:
        import fsspec
        import gcsfs  # noqa: F401  (brings google-cloud-storage, which Orbax asks about the bucket)
    except ImportError as e:
        raise ConfigError(
            "A path begins with gs:// and the package gcsfs is not installed; "
            "pip install 'deltapref-jax[gcs]'."
        ) from e
    fsspec.config.conf["gcs"] = {"use_listings_cache": False} | fsspec.config.conf.get(
        "gcs", {}
    )  # others write too
    logging.getLogger("gcsfs").setLevel(
        logging.CRITICAL
    )  # it logs the traceback of what it then raises
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _bucket_errors(path: Any, sentence: Callable[[Any, Exception], Exception]) -> Iterator[None]:
    """What the network and the bucket raise (gcsfs, aiohttp and google-auth have dozens of kinds) as one sentence."""
    try:
        yield
    except (ArtifactError, ConfigError):
        raise
    except Exception as e:
        raise sentence(path, e) from e


def _unreadable(path: Any, e: Exception) -> ArtifactError:
    why = (str(e).strip() or type(e).__name__).splitlines()[0]
    return ArtifactError(
        f"{path} cannot be read ({why}); check the name, this machine's credentials for Google Cloud "
        "Storage and its connection, and run the same command."
    )


def check_bucket(root: str | os.PathLike[str]) -> None:
    """Refuses a workspace in a bucket that cannot be used, before anything is made.

    Raises:
      ConfigError: the package for it is missing, there is no such bucket, or it is not of Google Cloud Storage.
      ArtifactError: it cannot be read.
    """
    path = os.fspath(root)
    if not remote(path):
        return
    if not path.startswith("gs://"):
        raise ConfigError(
            f"The workspace {path} is in no bucket of Google Cloud Storage; give a folder or gs://…."
        )
    name = "gs://" + path.removeprefix("gs://").split("/")[0]
    with _bucket_errors(name, _unreadable):
        if not _bucket().exists(name):
            raise ConfigError(
                f"There is no bucket {name}, or this machine's credentials may not see it; check the "
                "name, or make it."
            )


def local_copy(path: str) -> str:
    """`path` itself, or for a file or folder in a bucket its copy on this machine, made once for the same content.

    Copies lie in `~/.cache/deltapref-jax` (`XDG_CACHE_HOME`), named by the generations of their objects; nothing there
    is needed again once the program has ended.

    Raises:
      ConfigError: the package for buckets is missing.
      FileNotFoundError: there is nothing at `path`.
      ArtifactError: it cannot be read, or this machine has no room for it.
    """
    if not remote(path):
        return path
    root = path.rstrip("/").removeprefix("gs://")
    with _bucket_errors(path, _unreadable):
        found = {
            name: info
            for name, info in _bucket().find(root, detail=True).items()
            if info["type"] == "file"
        }
    if not found:
        raise FileNotFoundError(f"There is nothing at {path}; check the path.")
    stamp = sha256(
        json.dumps(
            sorted((name, info["size"], info.get("generation")) for name, info in found.items())
        ).encode()
    )[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltapref-jax"
    place = cache / stamp / os.path.basename(root)
    if not place.exists():
        coming = cache / f".{stamp}.{uuid.uuid4().hex}"
        try:
            download(
                {name: coming / os.path.relpath(name, os.path.dirname(root)) for name in found}
            )
            with contextlib.suppress(OSError):  # another process was faster
                coming.rename(cache / stamp)
        finally:
            shutil.rmtree(coming, ignore_errors=True)
    return str(place)


def download(files: Mapping[str, Path]) -> None:
    """Objects of a bucket, by name, to the files named, whose folders are made.

    Raises:
      ArtifactError: one cannot be read, or this machine has no room for it.
    """
    with _bucket_errors(next(iter(files)), _unreadable):
        try:
            for target in files.values():
                target.parent.mkdir(parents=True, exist_ok=True)
            _bucket().get(
                [name.removeprefix("gs://") for name in files],
                [str(file) for file in files.values()],
            )
        except OSError as e:
            if e.errno in UNWRITABLE_ERRNOS:
                raise unwritable(e.filename or next(iter(files.values())), e) from e
            raise


@contextlib.contextmanager
def staged_dir(folder: epath.Path) -> Iterator[Path]:
    """A local folder to write into that becomes `folder`: that itself, or for a bucket one that is uploaded at the end.

    Raises:
      ArtifactError: it cannot be uploaded.
    """
    if not remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="deltapref-") as scratch:
        yield Path(scratch)
        files = [file for file in sorted(Path(scratch).rglob("*")) if file.is_file()]
        targets = [os.fspath(folder / file.relative_to(scratch).as_posix()) for file in files]
        with _bucket_errors(folder, unwritable):
            _bucket().put(
                [str(file) for file in files], [name.removeprefix("gs://") for name in targets]
            )


def content_hash(path: Path) -> str:
    """16 hex digits of a file's or folder's name and contents: a moved one has the same."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    parts = [[f.relative_to(path).as_posix(), file_sha256(epath.Path(f))] for f in files]
    return digest(path.name, parts)
