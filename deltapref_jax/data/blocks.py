"""Rows of a file, folder or hub data set, in blocks that Grain reads in any order.

Every row comes with its place in the source, for messages.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from deltapref_jax.config import ConfigError, Pairs
from deltapref_jax.data.dataset import load_split
from deltapref_jax.files import local_copy

BLOCK = 256  # rows that are read and tokenised together


class Blocks:
    """Random access to blocks of (place, row) for Grain; subclasses read rows start to stop.

    Attributes:
      path: as it was given, for messages; the file read may be a copy of it on this machine.
      rows: number of rows.
    """

    def __init__(self, path: str, rows: int):
        self.path, self.rows = path, rows
        self._file = local_copy(path)

    def __len__(self) -> int:
        return math.ceil(self.rows / BLOCK)

    def __getitem__(self, block: int) -> list[tuple[str, Any]]:
        start, stop = block * BLOCK, min((block + 1) * BLOCK, self.rows)
        return list(self._read(start, stop))

    def _read(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        raise NotImplementedError


class _Jsonl(Blocks):
    def __init__(self, path: str):
        found, at = [], 0
        with open(local_copy(path), "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append((at, number))
                at += len(line)
        self._lines = np.asarray(found, np.int64).reshape(-1, 2)
        super().__init__(path, len(found))

    def _read(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        with open(self._file, "rb") as file:
            for at, number in self._lines[start:stop].tolist():
                file.seek(at)
                yield f"Line {number} of {self.path}", file.readline()


class _Parquet(Blocks):
    """A Parquet file; row numbers start at 0, and reading a damaged page raises ConfigError."""

    def __init__(self, path: str, columns: Sequence[str]):
        meta = pq.read_metadata(local_copy(path))
        self._columns = columns
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        super().__init__(path, meta.num_rows)

    def _read(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        last = int(np.searchsorted(self._starts, stop - 1, "right")) - 1
        try:
            table = _row_groups(self._file, first, last, tuple(self._columns))
            rows = table.slice(start - self._starts[first], stop - start).to_pylist()
        except Exception as e:  # pyarrow raises many types for a damaged page
            raise ConfigError(
                f"Rows {start} to {stop - 1} of {self.path} cannot be read ({_first_line(e)}); "
                "write the file again."
            ) from e
        for i, row in enumerate(rows, start):
            yield f"Row {i} of {self.path}", row


@functools.lru_cache(maxsize=2)  # blocks are read in order, many of them from one row group
def _row_groups(path: str, first: int, last: int, columns: tuple[str, ...]) -> Any:
    with pq.ParquetFile(path) as file:
        return file.read_row_groups(range(first, last + 1), columns=list(columns))


class _Arrow(Blocks):
    """A data set of the `datasets` library; row numbers start at 0."""

    def __init__(self, path: str, data: Any):
        self._data = data
        super().__init__(path, len(data))

    def _read(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        for i, row in enumerate(self._data.select(range(start, stop)).to_list(), start):
            yield f"Row {i} of {self.path}", row


def open_blocks(
    source: Pairs, read: Callable[[Sequence[str]], set[str]]
) -> tuple[Blocks, list[str]]:
    """The rows of a source, and its columns.

    Args:
      source: a file, folder or hub name.
      read: maps the names of all columns to those of the columns that are read.

    Raises:
      ConfigError: the source is missing or damaged.
    """
    path = source.path
    if not os.path.isfile(local_copy(path)):
        check_place(path)
        data = load_split(source)
        wanted = read(data.column_names)
        return _Arrow(
            path, data.select_columns([c for c in data.column_names if c in wanted])
        ), data.column_names
    try:
        names = pq.read_schema(local_copy(path)).names if path.endswith(".parquet") else None
    except Exception as e:  # pyarrow raises many types for a damaged file
        raise ConfigError(f"{path} is not a readable Parquet file ({e}); write it again.") from e
    if names is not None:
        wanted = read(names)
        return _Parquet(path, [c for c in names if c in wanted]), names
    if not path.endswith((".jsonl", ".json")):
        raise ConfigError(
            f"The data file {path} ends in neither .jsonl nor .parquet; convert it to one of the "
            "two."
        )
    lines = _Jsonl(path)
    if not lines.rows:
        raise ConfigError(f"{path} holds no row; give it some.")
    where, first = lines[0][0]
    try:
        return lines, list(json_row(first))
    except ValueError as e:
        raise ConfigError(f"{where}: {e}; fix or remove the row.") from e


def check_place(path: str) -> None:
    """Refuses a path that is not there and cannot be a hub name.

    Raises:
      ConfigError: there is nothing at `path`, which looks like a path and not like a hub name.
    """
    here = (
        path.endswith((".jsonl", ".json", ".parquet"))
        or path.count("/") > 1
        or path.startswith((".", "/"))
    )
    if here and not os.path.exists(local_copy(path)):
        raise ConfigError(f"There is no data file or folder {path}; check config.data.path.")


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


class RepeatedKeyError(ValueError):
    """A key that stands twice in a JSON object, of which `json` keeps the last in silence."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of `json`, which itself keeps the last value of a repeated key.

    Raises:
      RepeatedKeyError: a key stands twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object")
    return row


def json_row(line: bytes) -> dict[str, Any]:
    """A line of a JSON lines file.

    Raises:
      ValueError: the line is not a JSON object, has a key twice in one object, or has half of a
        surrogate pair, which is no text.
    """
    try:
        row = json.loads(line.strip(), object_pairs_hook=unique_keys)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = ascii(e.object[e.start]).strip("'")
        raise ValueError(f"half a surrogate pair ({half}), which is no text") from e
    except UnicodeError as e:
        raise ValueError(f"not JSON ({e})") from e
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError) as e:  # part of a longer value, or nested too deep
        raise ValueError(f"not JSON ({e}); a file has one object a line") from e
    if not isinstance(row, dict):
        raise ValueError("not a JSON object; a file has one object a line")
    return row
