"""Reads files of safetensors by ranges of bytes, and writes them tensor by tensor.

The layout is that of https://github.com/huggingface/safetensors#format: the length of the header
(8 bytes, little-endian), the header (JSON), and the tensors behind it, one after another.
The library maps files into memory, where the pages that were read count as the process's own; here
the bytes of a part are read, and no others.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deltapref_jax.files import ByteReader

DTYPES: Mapping[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}
"""NumPy's dtypes by safetensors' names: of numbers, and of the bytes of quantised tensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {"BOOL": 8, "C64": 64} | {f"{sign}{n}": n for sign in "UIF" for n in (8, 16, 32, 64)}
_LONGEST_HEADER = 100_000_000  # bytes, the library's own limit


class Entry(NamedTuple):
    """A tensor of a file."""

    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    first: int  # offset of its first byte in the file
    end: int


def read_header(file: ByteReader) -> dict[str, Entry]:
    """Returns the tensors of a file by their names; reads none of them.

    Raises:
      ValueError: the header is damaged, or the file is shorter or longer than it says.
    """
    if file.size < 8:
        raise ValueError("the file is shorter than the length of its header")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _LONGEST_HEADER):
        raise ValueError("the file is shorter than its header")
    header = json.loads(file.read(8, length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    start, end = 8 + length, 8 + length
    found = []
    for name, info in header.items():
        try:
            shape = tuple(int(n) for n in info["shape"])
            first, last = (start + int(offset) for offset in info["data_offsets"])
            found.append((first, last, name, str(info["dtype"]), shape))
        except (TypeError, KeyError, ValueError) as e:
            raise ValueError(f"tensor {name} has no dtype, shape and offsets in its header") from e
    entries = {}
    for first, last, name, dtype, shape in sorted(found):
        # Of dtypes that are not known here, which are refused later, the size is not checked.
        bits = 16 if dtype == "BF16" else _BITS.get(dtype)
        if first != end or last < first or (bits and (last - first) * 8 != math.prod(shape) * bits):
            raise ValueError(f"tensor {name} does not lie where its shape says")
        entries[name], end = Entry(dtype, shape, first, last), last
    if end != file.size:
        raise ValueError(f"the file has {file.size} bytes and its header calls for {end}")
    return entries


def read_tensor(file: ByteReader, entry: Entry, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads a part of a tensor: slices of its leading axes, of step 1.

    Of the bytes of a file on this machine no others are read. Of an object in a bucket, where a
    request takes as long as a megabyte, whole rows are.
    """
    dtype, shape = DTYPES[entry.dtype], entry.shape
    ranges = [s.indices(n)[:2] for s, n in zip(index, shape, strict=False)]
    ranges += [(0, n) for n in shape[len(ranges) :]]
    # Axes behind the last one that is cut lie together.
    cut = [i for i, (r, n) in enumerate(zip(ranges, shape, strict=True)) if r != (0, n)]
    last = cut[-1] if cut and not file.slow_start else 0
    inner = math.prod(shape[last + 1 :]) * dtype.itemsize
    outer = [range(*r) for r in ranges[:last]]
    lengths = [len(o) for o in outer] + [ranges[last][1] - ranges[last][0] if shape else 1]
    piece = lengths[-1] * inner if shape else dtype.itemsize
    out = np.empty(math.prod(lengths[:-1]) * piece, np.uint8)
    strides = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(last)]
    begin = entry.first + (ranges[last][0] * inner if shape else 0)
    offsets = np.zeros(1, np.int64) + begin
    for steps, stride in zip(outer, strides, strict=True):
        offsets = (offsets[:, None] + np.asarray(steps, np.int64) * stride).reshape(-1)
    file.read_pieces(offsets, piece, out)
    array = out.view(dtype).reshape(*(lengths if shape else ()), *shape[last + 1 :])
    return array[tuple(slice(None) for _ in lengths) + tuple(slice(*r) for r in ranges[last + 1 :])]


def header_bytes(
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and the offset of every tensor in it.

    The bytes are those of the library: tensors in the order of their names, since all have one
    dtype, and a header filled up to a multiple of 8.

    Args:
      tensors: dtype and shape by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(tensors):
        dtype, shape = np.dtype(tensors[name][0]), tensors[name][1]
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + o for n, o in offsets.items()}


class TensorWriter:
    """Writes a file of safetensors whose tensors come in any order, and in blocks of rows."""

    def __init__(
        self, path: str | os.PathLike[str], tensors: Mapping[str, tuple[Any, tuple[int, ...]]]
    ):
        """Creates the file with its header.

        Args:
          path: of the file.
          tensors: dtype and shape by name; all have one dtype.
        """
        header, self._offsets = header_bytes(tensors)
        self._file = io.BufferedWriter(io.FileIO(path, "wb"))
        self._file.write(header)

    def write(self, tensor: str, row: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, from the row `row` on."""
        row_bytes = rows.nbytes // max(1, len(rows))
        self._file.seek(self._offsets[tensor] + row * row_bytes)
        self._file.write(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data)

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
