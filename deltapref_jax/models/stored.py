"""A model in files: its spec, and the tensors that hold each of its parameters.

Hugging Face stores a matrix as [out, in], with heads and their widths as one axis; a decoder's are
[in, heads, width] or [in, out]. Some families keep several matrices in one tensor, one below the
other, and experts are one tensor each, except in GGUF and in gpt-oss's files.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.files import ArtifactError, ByteReader, remote
from deltapref_jax.models import mxfp4
from deltapref_jax.models.config_json import quantisation, spec_from_hf
from deltapref_jax.models.families import FAMILIES
from deltapref_jax.models.folder import (
    OTHER_PARTS,
    ROTARY,
    check_index,
    model_files,
    resolve,
)
from deltapref_jax.models.host_arrays import (
    aligned_empty,
    cast,
    copy_transposed,
    finite,
    not_finite,
)
from deltapref_jax.models.parameters import PARAMETERS, Parameter, parameters
from deltapref_jax.models.safetensors_file import DTYPES, read_header, read_tensor
from deltapref_jax.models.spec import ModelSpec

_BLOCK_BYTES = 1 << 20  # that are read from a file at a time; they stay in the processor's cache
_REQUEST_BYTES = 16 << 20  # that are asked of a bucket at a time

_THREADS = min(4, os.cpu_count() or 1)  # that read layers

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of stored tensors by their names."""

_DTYPES = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that are numbers by themselves; others need scales, which nothing here reads."""


class Stored(NamedTuple):
    """An opened model: nothing of its weights is read before `read` is called."""

    spec: ModelSpec
    config: Mapping[str, Any]  # its config.json, or what that would be
    shapes: Shapes
    dtypes: Mapping[str, np.dtype[Any]]  # of the numbers that `read` returns
    # Maps the name of a tensor, and slices of its axes, to its numbers: () means all of it.
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    gguf: bool = False
    in_bucket: bool = False


class Place(NamedTuple):
    """Where one layer's parameter lies: rows of one tensor, or one tensor per expert."""

    tensors: tuple[str, ...]
    rows: tuple[int, int] | None  # first and end; None means all
    # Where the tensor has the parameter's axes, as stacked experts have: its first column there,
    # and how many columns further the next one lies.
    columns: tuple[int, int] | None = None


Headers = Mapping[str, Iterable[tuple[str, str, tuple[int, ...]]]]
"""Name, dtype and shape of the tensors of every file of safetensors."""


def open_folder(path: str | Path) -> Stored:
    """Opens a Hugging Face folder, here or in a bucket.

    Args:
      path: of the folder; of one in a bucket, a text that begins with `gs://`.

    Raises:
      FileNotFoundError: the folder is incomplete.
      ValueError: it is damaged, or describes a model that is not supported.
      ArtifactError: it is in a bucket and cannot be read.
    """
    path = os.fspath(path)
    local = Path(resolve(path) if remote(path) else path)
    config, spec = _read_config(local, path)
    at = ""  # the file that is being read
    try:
        files = [file for file in model_files(path) if file.endswith(".safetensors")]
        if folders := [file for file in files if os.path.isdir(file)]:
            raise IsADirectoryError(f"{os.path.basename(folders[0])} is a folder and no file")
        opened = {os.path.basename(file): ByteReader(file) for file in files}
        entries = {}
        for name, file in opened.items():
            at = name
            entries[name] = read_header(file)
    except ArtifactError:
        raise
    except Exception as e:  # what is read from damaged bytes can fail in many ways
        where = "" if not at else f"{at}: "
        raise ValueError(f"The model in {path} cannot be read ({where}{e}); fetch it again.") from e
    headers = {
        name: [(tensor, entry.dtype, entry.shape) for tensor, entry in found.items()]
        for name, found in entries.items()
    }
    shapes, owners = _shapes(config, path, headers)
    check_index(local, path, entries)
    dtypes = {
        name: DTYPES[entries[owners[name][0]][owners[name][1]].dtype]
        if name in owners
        else DTYPES["BF16"]  # dequantised
        for name in shapes
    }

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name in owners:
            file, stored_name = owners[name]
            array = read_tensor(opened[file], entries[file][stored_name], index)
        else:
            file = owners[name + mxfp4.SCALES][0]
            array = mxfp4.read_matrices(read, name, index)
        if array.dtype == np.float64:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
                array = array.astype(np.float32)
        if not finite(array):
            raise ValueError(not_finite(name, f"{file} of {path}"))
        return array

    return Stored(spec, config, shapes, dtypes, read, in_bucket=remote(path))


def unread_folder(folder: Path, where: str, headers: Headers) -> Stored:
    """A model whose weights are still on the hub, for `check_tensors` alone.

    Args:
      folder: holds its config.json.
      where: the model, for messages.
      headers: of its files on the hub.

    Raises:
      ValueError: it is damaged, or describes a model that is not supported.
    """
    config, spec = _read_config(folder, where)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        raise FileNotFoundError(f"Tensor {name} of {where} has not been fetched.")

    headers = {file: list(tensors) for file, tensors in headers.items()}
    check_index(folder, where, {file: [t[0] for t in tensors] for file, tensors in headers.items()})
    return Stored(spec, config, _shapes(config, where, headers)[0], {}, read)


def _read_config(path: Path, where: str) -> tuple[Mapping[str, Any], ModelSpec]:
    """Reads a folder's config.json; messages call the model `where`.

    Raises:
      ValueError: the file is damaged, or describes a model that is not supported.
    """
    try:
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
    except Exception as e:  # of the text, of JSON, or of the file system
        raise ValueError(f"The model in {path} cannot be read ({e}); fetch it again.") from e
    try:
        return config, spec_from_hf(config)
    except ValueError as e:
        raise ValueError(f"The model {where} cannot be used: {e}") from e


def _shapes(
    config: Mapping[str, Any], where: str, files: Headers
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, str]]]:
    """Returns the shape of every tensor by its name, and its file and its name there.

    Raises:
      ValueError: a tensor is in two files, or is quantised.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    owners: dict[str, tuple[str, str]] = {}
    packed = (mxfp4.BLOCKS, mxfp4.SCALES) if quantisation(config) == "mxfp4" else ()
    for file, headers in files.items():
        for stored_name, dtype, shape in headers:
            name = _text_name(stored_name) if "text_config" in config else stored_name
            if not name:
                continue
            if name in owners:
                raise ValueError(
                    f"Tensor {stored_name} of {where} is in {owners[name][0]} and in {file}; leave "
                    "one of the two files, or give the folder an index that names its shards."
                )
            if packed and name.endswith(packed):
                if dtype != "U8":
                    raise ValueError(
                        f"Tensor {stored_name} of {where} is stored as {dtype}, and MXFP4 has "
                        "bytes (U8); fetch it again."
                    )
            elif dtype not in _DTYPES:
                raise ValueError(
                    f"Tensor {stored_name} of {where} is stored as {dtype}, and quantised weights "
                    "are not supported; give the model in float32, bfloat16 or float16."
                )
            owners[name], shapes[name] = (file, stored_name), shape
    return mxfp4.whole_shapes(shapes, where) if packed else shapes, owners


def _text_name(name: str) -> str:
    """The name that a tensor of a model with images has in the model of its text; or empty."""
    if name.startswith(OTHER_PARTS):
        return ""
    name = name.removeprefix("language_model.")
    return name.replace("model.language_model.", "model.", 1)


def places(spec: ModelSpec, gguf: bool) -> dict[str, list[Place]]:
    """Returns where each parameter lies: one place per layer, or one alone if it isn't stacked.

    Parameters whose tensors have one name lie in that tensor one below the other, in the order of
    `parameters.PARAMETERS`.
    """
    ends: dict[str, int] = {}  # rows that are taken, by tensor
    stacked = FAMILIES[spec.family].stacked_experts and not gguf
    of_experts = [p.gguf if gguf else p.tensor for p in parameters(spec).values() if p.of_experts]
    found: dict[str, list[Place]] = {}
    for p in parameters(spec).values():
        pattern = p.gguf if gguf else p.tensor
        found[p.name] = []
        for layer in range(spec.layers if p.stacked else 1):
            if p.of_experts and (stacked or not p.inputs):
                name, together = pattern.format(layer=layer), of_experts.count(pattern)
                first = ends.get(name, 0)
                ends[name] = first + 1
                found[p.name].append(Place((name,), None, (first, together)))
                continue
            if p.batch and not gguf:
                count = p.shape(spec)[0]
                names = tuple(pattern.format(layer=layer, expert=e) for e in range(count))
                found[p.name].append(Place(names, None))
                continue
            name = pattern.format(layer=layer)
            first = ends.get(name, 0)
            ends[name] = first + stored_shape(p, spec)[0]
            found[p.name].append(Place((name,), (first, ends[name])))
    return {
        name: [
            # A parameter that has its tensor for itself takes all rows.
            place._replace(rows=None) if place.rows == (0, ends.get(place.tensors[0])) else place
            for place in layers
        ]
        for name, layers in found.items()
    }


def stored_shape(p: Parameter, spec: ModelSpec) -> tuple[int, ...]:
    """Shape of a parameter's rows in a file, of one expert where it has experts."""
    shape = p.shape(spec)
    if p.inputs:
        return p.sides(spec)[::-1]
    return shape if p.dims[0] == "V" or p.of_experts else (math.prod(shape),)


def from_stored(array: np.ndarray, p: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """Converts rows of a tensor to the layout of a parameter of `shape`, without its experts."""
    return (array.T if p.inputs else array).reshape(shape)


def parts(
    array: np.ndarray, p: Parameter, place: Place, spec: ModelSpec
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that hold a parameter of one layer, each with what it holds of it."""
    if place.columns:
        yield place.tensors[0], array
        return
    for tensor, piece in zip(place.tensors, array if p.batch else [array], strict=True):
        yield tensor, to_stored(piece, p, spec)


def to_stored(array: np.ndarray, p: Parameter, spec: ModelSpec) -> np.ndarray:
    """Converts a parameter of one layer, or one of its experts, to the rows of a tensor."""
    if not p.inputs:
        return np.ascontiguousarray(array.reshape(stored_shape(p, spec)))
    return np.ascontiguousarray(array.reshape(p.sides(spec)).T)


def joined(parts: list[np.ndarray], place: Place) -> np.ndarray:
    """Returns a tensor of its parameters' parts, in the order of `places`."""
    if len(parts) == 1:
        return parts[0]
    if place.columns:
        return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
    return np.concatenate(parts)


def check_tied(stored: Stored, path: str) -> None:
    """Refuses a tied model whose file has an output projection of its own with other weights.

    `transformers` 5 computes with it, and 4 with the embedding. Where both tensors are there, each
    process reads the two of them, a block at a time.

    Raises:
      ValueError: the tensors differ.
    """
    head, embedding = (next(p for p in PARAMETERS if p.name == name) for name in ("head", "embed"))
    names = [p.gguf if stored.gguf else p.tensor for p in (head, embedding)]
    if not stored.spec.tied or not set(names) <= stored.shapes.keys():
        return
    rows = stored.shapes[names[1]][0]
    for first in range(0, rows, step := 4096):
        index = (slice(first, min(first + step, rows)), slice(None))
        ours, theirs = (stored.read(name, index) for name in names)
        if not np.array_equal(ours, theirs):
            raise ValueError(
                f"Tensor {names[0]} of {path} differs from {names[1]}, and config.json says that "
                "they are one (tie_word_embeddings); set it to false, or leave the tensor out."
            )


def check_tensors(stored: Stored, path: str) -> dict[str, list[Place]]:
    """Returns `places` of a model, after comparing shapes.

    Raises:
      ValueError: a tensor is missing, has another shape, or the decoder has no use for it.
    """
    spec, shapes = stored.spec, stored.shapes
    found = places(spec, stored.gguf)
    expected: dict[str, tuple[int, ...]] = {}
    for p in parameters(spec).values():
        for place in found[p.name]:
            shape = stored_shape(p, spec)
            if place.columns:
                *outer, last = p.shape(spec)
                shape = (*outer, last * place.columns[1])
            elif p.batch and stored.gguf:
                shape = (p.shape(spec)[0], *shape)
            if place.rows:
                shape = (place.rows[1], *shape[1:])
            for tensor in place.tensors:
                # Of a tensor with several parameters the last one has all rows.
                expected[tensor] = max(expected.get(tensor, shape), shape)
    for tensor, shape in expected.items():
        if tensor not in shapes:
            raise ValueError(
                f"{path} has no tensor {tensor!r}; its config.json does not describe its weights."
            )
        if shapes[tensor] != shape:
            raise ValueError(
                f"Tensor {tensor} of {path} has the shape {shapes[tensor]}; its config.json "
                f"calls for {shape}."
            )
    # Old checkpoints hold rotary frequencies; a tied model may hold its output projection twice.
    unexpected = sorted(
        name
        for name in shapes.keys() - expected.keys()
        if not name.endswith(ROTARY)
        and not (spec.tied and name in ("lm_head.weight", "output.weight"))
    )
    if unexpected:
        raise ValueError(
            f"{path} holds {len(unexpected)} tensors that its config.json does not call for, "
            f"such as {unexpected[0]!r}."
        )
    return found


_Target = tuple[np.ndarray, list[slice]]
"""An array to fill, and the part of a parameter, of one layer, that belongs there."""


class StoredParameter:
    """A parameter of all layers that is read from its file part by part.

    It is indexed by slices, as `jax.make_array_from_callback` does for every device, and reads the
    rows and columns of that part: of a matrix whole heads, and a vector as a whole.
    `numpy.asarray` reads all of it.
    """

    def __init__(self, stored: Stored, p: Parameter, layers: list[Place], dtype: Any = None):
        """Reads nothing; a dtype of None is that of the file."""
        self._stored, self._p, self._layers, self._dtype = stored, p, layers, dtype
        self.shape = (*((len(layers),) if p.stacked else ()), *p.shape(stored.spec))
        self.ndim = len(self.shape)

    @property
    def in_bucket(self) -> bool:
        """Whether whole rows are read however few of their columns are wanted."""
        return self._stored.in_bucket

    @property
    def row_axes(self) -> tuple[int, ...]:
        """Axes of which a part is read without the rest: layers, experts and rows of a matrix."""
        stacked, experts, p = int(self._p.stacked), int(self._p.batch), self._p
        rows = (stacked + experts + p.inputs,) if p.inputs or p.dims[0] == "V" else ()
        return (*range(stacked + experts), *rows)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arrays that are read."""
        return np.dtype(self._dtype or self._stored.dtypes[self._layers[0].tensors[0]])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part, in the parameter's dtype."""
        return self.read_parts([index])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of it."""
        return self.read_parts([(slice(None),) * self.ndim], dtype)[0]

    def read_parts(
        self, indices: Sequence[tuple[slice, ...]], dtype: Any = None
    ) -> list[np.ndarray]:
        """Reads several parts, with what they have in common in the file read once.

        Besides the parts, each of `_THREADS` holds a block of the file at a time.

        Args:
          indices: slices of all axes, of step 1.
          dtype: of the arrays; None for the parameter's.

        Raises:
          ValueError: a tensor holds NaN or infinity.
        """
        parts = [
            [slice(*x.indices(n)) for x, n in zip(index, self.shape, strict=True)]
            for index in indices
        ]
        out = [
            aligned_empty(tuple(s.stop - s.start for s in part), dtype or self.dtype)
            for part in parts
        ]
        if not self._p.stacked:
            self._fill(self._layers[0], list(zip(out, parts, strict=True)))
            return out

        def fill(i: int) -> None:
            targets = [
                (array[i - part[0].start], part[1:])
                for array, part in zip(out, parts, strict=True)
                if part[0].start <= i < part[0].stop
            ]
            if targets:
                self._fill(self._layers[i], targets)

        wanted = range(min(p[0].start for p in parts), max(p[0].stop for p in parts))
        if len(wanted) == 1:
            fill(wanted[0])
            return out
        # Reads and copies of NumPy leave Python's lock to other threads.
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, wanted))
        return out

    def _fill(self, place: Place, targets: list[_Target]) -> None:
        """Reads the parts of one layer."""
        p = self._p
        sizes = p.shape(self._stored.spec)
        if place.columns:
            for out, slices in targets:
                out[...] = self._read_layer(place, slices)
        elif p.inputs and p.batch and not self._stored.gguf:
            for expert, tensor in enumerate(place.tensors):
                chosen = [
                    (out[expert - s[0].start], s[1:])
                    for out, s in targets
                    if s[0].start <= expert < s[0].stop
                ]
                if chosen:
                    self._fill_rows(tensor, 0, chosen, sizes[1:])
        elif not p.batch and (p.inputs or p.dims[0] == "V"):
            first = place.rows[0] if place.rows else 0
            self._fill_rows(place.tensors[0], first, targets, sizes)
        else:
            for out, slices in targets:
                out[...] = self._read_layer(place, slices)

    def _fill_rows(
        self, tensor: str, first: int, targets: list[_Target], sizes: tuple[int, ...]
    ) -> None:
        """Reads parts of a matrix whose rows begin at `first` of a tensor, block by block.

        Parts of the same rows whose columns touch are read together.
        """
        n = self._p.inputs
        # By rows: the columns of every part, and its array as [rows, columns] or transposed.
        groups: dict[tuple[int, int], list[tuple[slice, np.ndarray]]] = {}
        for out, slices in targets:
            ins, outs = (slices[:n], slices[n:]) if n else (slices[1:], slices[:1])
            in_sizes, out_sizes = (sizes[:n], sizes[n:]) if n else (sizes[1:], sizes[:1])
            columns, rows = _flat(ins, in_sizes), _flat(outs, out_sizes)
            flat = (columns, rows) if n else (rows, columns)
            array = out.reshape([s.stop - s.start for s in flat])
            groups.setdefault((rows.start, rows.stop), []).append((columns, array))
        for (start, stop), parts in groups.items():
            for columns, members in _touching(parts):
                width = columns.stop - columns.start
                block_bytes = _REQUEST_BYTES if self.in_bucket else _BLOCK_BYTES
                step = max(1, block_bytes // (width * self._stored.dtypes[tensor].itemsize))
                for row in range(start, stop, step):
                    end = min(row + step, stop)
                    block = self._stored.read(tensor, (slice(first + row, first + end), columns))
                    for own, array in members:
                        piece = block[:, own.start - columns.start : own.stop - columns.start]
                        if n:
                            copy_transposed(array[:, row - start : end - start], piece)
                        else:
                            array[row - start : end - start] = cast(piece, array.dtype)

    def _read_layer(self, place: Place, slices: list[slice]) -> np.ndarray:
        """Reads a part of what is no matrix of rows: a vector, or all experts' tensor of GGUF."""
        p = self._p
        if place.columns:
            first, step = place.columns
            *outer, last = slices
            wide = slice(last.start * step, last.stop * step)
            block = self._stored.read(place.tensors[0], (*outer, wide))
            return block[..., first::step]
        if not p.batch:
            return self._read_vector(place.tensors[0], (place.rows or (0,))[0], slices)
        array = self._stored.read(place.tensors[0], (slices[0],))  # [experts, out, in]
        rest, shape = tuple(slices[1:]), p.shape(self._stored.spec)[1:]
        return np.stack([from_stored(x, p, shape)[rest] for x in array])

    def _read_vector(self, tensor: str, first: int, slices: list[slice]) -> np.ndarray:
        """A vector is small: it is read whole."""
        sizes = self._p.shape(self._stored.spec)
        rows = slice(first, first + math.prod(sizes))
        return self._stored.read(tensor, (rows,)).reshape(sizes)[tuple(slices)]


def _flat(slices: Sequence[slice], sizes: Sequence[int]) -> slice:
    """Slices of several axes, of which the first alone is cut, as one range of all of them."""
    inner = math.prod(sizes[1:])
    assert all((s.start, s.stop) == (0, n) for s, n in zip(slices[1:], sizes[1:], strict=True))
    return slice(slices[0].start * inner, slices[0].stop * inner)


def _touching(
    parts: list[tuple[slice, np.ndarray]],
) -> Iterator[tuple[slice, list[tuple[slice, np.ndarray]]]]:
    """Yields ranges of columns without gaps, and the parts within each."""
    members: list[tuple[slice, np.ndarray]] = []
    start, stop = 0, -1
    for columns, array in sorted(parts, key=lambda part: (part[0].start, part[0].stop)):
        if members and columns.start > stop:
            yield slice(start, stop), members
            members = []
        start = columns.start if not members else start
        stop = max(stop, columns.stop) if members else columns.stop
        members.append((columns, array))
    yield slice(start, stop), members
