"""What is found in a file of weights when all of it is read: its hash, and numbers to refuse."""

import collections
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deltapref_jax.files import (
    ArtifactError,
    BucketObject,
    ByteReader,
    cache_folder,
    write_atomic,
)
from deltapref_jax.models.host_arrays import finite
from deltapref_jax.models.mxfp4 import SCALES
from deltapref_jax.models.safetensors_file import DTYPES, read_header
from deltapref_jax.records import digest
from deltapref_jax.text.gguf_file import open_gguf

_BLOCK_BYTES = 1 << 20  # of a file here that are read at a time
_REQUEST_BYTES = 16 << 20  # of an object in a bucket
_THREADS = 4  # that read and check; the hash is one thread's

_SCALES_AT = {
    "Q8_0": (0, 1),
    "Q4_0": (0, 1),
    "Q4_1": (0, 2),
    "Q5_0": (0, 1),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (104, 1),
}
"""Where a block of GGUF has its scales: float16, the first one and their count.

The structs block_q8_0 to block_q6_K of llama.cpp's ggml-common.h.
"""


class Content(NamedTuple):
    """A file of weights."""

    sha256: str  # 64 hex digits
    not_finite: tuple[str, ...]  # tensors that hold NaN or infinity


def read_content(path: str) -> Content:
    """Reads a file here or an object in a bucket once, from its beginning to its end.

    The numbers are checked block by block beside the hash, by other threads. Of a damaged file
    the hash alone is taken, for whoever opens it is told what is wrong.

    Args:
      path: of a file; if its name ends in .safetensors or .gguf, its numbers are checked.

    Raises:
      OSError: it cannot be opened.
      ArtifactError: it is in a bucket and cannot be read, or was cut while it was read.
    """
    file = ByteReader(path)
    hashed, bad = hashlib.sha256(), dict[str, None]()
    waiting: collections.deque[tuple[str, np.ndarray, int, Future[bool]]] = collections.deque()
    # Memory that is used again costs no first touch, which takes as long as the check.
    size = max(1, min(file.size, _REQUEST_BYTES if file.slow_start else _BLOCK_BYTES))
    free = [np.empty(size, np.uint8) for _ in range(2 * _THREADS)]

    def take() -> None:
        name, memory, length, good = waiting.popleft()
        if not good.result():
            bad[name] = None
        hashed.update(memory[:length].data)
        free.append(memory)

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, dtype, first, length in _blocks(file, path, size):
            if not free:
                take()
            memory = free.pop()
            good = pool.submit(_read_block, file, name, dtype, first, memory[:length])
            waiting.append((name, memory, length, good))
        while waiting:
            take()
    if path.endswith(".gguf"):
        bad = dict.fromkeys(_not_finite_in_gguf(path))
    return Content(hashed.hexdigest(), tuple(bad))


def _blocks(file: ByteReader, path: str, size: int) -> Iterator[tuple[str, str, int, int]]:
    """Yields tensor, dtype, first byte and length of blocks of `size`, in the order of the file."""
    spans, end = [], 0
    if path.endswith(".safetensors"):
        try:
            entries = read_header(file)
            spans = [(name, e.dtype, e.first, e.end) for name, e in entries.items()]
        except (ValueError, TypeError, KeyError, AttributeError):
            spans = []
    first = spans[0][2] if spans else file.size
    end = spans[-1][3] if spans else first
    for name, dtype, start, stop in [("", "", 0, first), *spans, ("", "", end, file.size)]:
        for at in range(start, stop, size):
            yield name, dtype, at, min(size, stop - at)


def _read_block(file: ByteReader, name: str, dtype: str, first: int, data: np.ndarray) -> bool:
    """Reads bytes of a file into `data`; returns whether they hold no NaN and no infinity."""
    file.read_pieces(np.asarray([first]), len(data), data)
    if dtype == "U8" and name.endswith(SCALES):
        return int(data.max()) < 255  # NaN in E8M0; there is no infinity
    if dtype not in DTYPES:
        return True
    numbers = data.view(DTYPES[dtype])
    if dtype == "F64":
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite when it is read
            numbers = numbers.astype(np.float32)
    return finite(numbers)


def _not_finite_in_gguf(path: str) -> Iterator[str]:
    """Yields the tensors whose numbers, or whose blocks' scales, hold NaN or infinity."""
    try:
        tensors = open_gguf(path).tensors
    except ValueError:
        return
    for name, tensor in tensors.items():
        kind, data = tensor.type.name, tensor.data.reshape(-1)
        if kind in DTYPES:
            pieces = data.view(DTYPES[kind])
        elif kind in _SCALES_AT:
            from gguf.constants import GGML_QUANT_SIZES

            first, count = _SCALES_AT[kind]
            halves = data.view(np.float16).reshape(-1, GGML_QUANT_SIZES[tensor.type][1] // 2)
            pieces = halves[:, first : first + count]
        else:
            continue
        step = max(1, _BLOCK_BYTES // pieces[:1].nbytes)
        blocks = (pieces[at : at + step] for at in range(0, len(pieces), step))
        if not all(finite(np.ascontiguousarray(block)) for block in blocks):
            yield name


@functools.lru_cache(maxsize=256)
def _local_content(path: str, size: int, modified: int) -> Content:
    """Size and time of modification are keys of the cache."""
    return read_content(path)


def local_content(path: str | os.PathLike[str]) -> Content:
    """`read_content` of a file here, which is read once in a program unless it changes."""
    stat = os.stat(path)
    return _local_content(os.fspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def bucket_content(path: str, about: BucketObject) -> Content:
    """`read_content` of an object in a bucket, kept on this machine for its generation."""
    note = cache_folder() / "content" / f"{digest(path, *about)}.json"
    if note.exists():
        found: Any = json.loads(note.read_text())
        return Content(found["sha256"], tuple(found["not_finite"]))
    content = read_content(path)
    with contextlib.suppress(OSError, ArtifactError):  # without a note it is read again
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(epath.Path(note), json.dumps(content._asdict()).encode())
    return content
