"""Files that are there whole or not at all, and their checksums."""

import contextlib
import errno
import hashlib
import os
import uuid
from typing import Any

from etils import epath

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
"""Errors of a file system that takes no more."""


class ArtifactError(RuntimeError):
    """An artifact is damaged or cannot be written; the message names the file and the remedy."""


def write_whole(path: epath.Path, data: bytes) -> None:
    """Puts `data` at `path`, on disk before it has the name.

    Raises:
      ArtifactError: it cannot be written; nothing of it is left.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        if "://" in os.fspath(path):  # an object appears whole when its upload ends
            path.write_bytes(data)
            return
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, e) from e


def unwritable(path: Any, e: OSError) -> ArtifactError:
    """The sentence for a file that cannot be written."""
    return ArtifactError(f"{path} cannot be written ({e.strerror or e}); make room or choose another workspace, and "
                         "run the same command: finished work is kept.")


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: epath.Path) -> str:
    """64 hex digits, without reading the whole file into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
