"""A model in files: its spec, and the tensors that hold each of its parameters.

Hugging Face stores a matrix as [out, in], with heads and their widths as one axis; a decoder's are
[in, heads, width] or [in, out]. Some families keep several matrices in one tensor, one below the
other, and experts are one tensor each, except in GGUF.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.folder import model_files
from deltapref_jax.models.parameters import Parameter, parameters
from deltapref_jax.models.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of stored tensors by their names."""

_DTYPES = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that are numbers by themselves; others need scales, which nothing here reads."""
_OTHER_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""Tensors of a model that reads images too, which have no part in its text."""


class Stored(NamedTuple):
    """An opened model: nothing of its weights is read before `read` is called."""

    spec: ModelSpec
    config: Mapping[str, Any]  # its config.json, or what that would be
    shapes: Shapes
    # Maps the name of a tensor, and slices of its axes, to its numbers: () means all of it.
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    gguf: bool = False


class Place(NamedTuple):
    """Where one layer's parameter lies: rows of one tensor, or one tensor per expert."""

    tensors: tuple[str, ...]
    rows: tuple[int, int] | None  # first and end; None means all


Headers = Mapping[str, Iterable[tuple[str, str, tuple[int, ...]]]]
"""Name, dtype and shape of the tensors of every file of safetensors."""


def open_folder(path: Path) -> Stored:
    """Opens a Hugging Face folder.

    Raises:
      FileNotFoundError: the folder is incomplete.
      ValueError: it is damaged, or describes a model that is not supported.
    """
    config, spec = _read_config(path, str(path))
    try:
        files = [file for file in model_files(str(path)) if file.suffix == ".safetensors"]
        if folders := [file for file in files if file.is_dir()]:
            raise IsADirectoryError(f"{folders[0].name} is a folder and no file")
        handles = {file.name: safe_open(file, framework="numpy") for file in files}
    except Exception as e:  # safetensors raises different types on a truncated file
        raise ValueError(f"The model in {path} cannot be read ({e}); fetch it again.") from e

    def headers(handle: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name in handle.keys():  # noqa: SIM118
            header = handle.get_slice(name)  # reads no weights
            yield name, header.get_dtype(), tuple(header.get_shape())

    shapes, owners = _shapes(config, str(path), {f: headers(h) for f, h in handles.items()})

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        file, stored_name = owners[name]
        tensor = handles[file].get_slice(stored_name)
        return tensor[index] if index else tensor[:]

    return Stored(spec, config, shapes, read)


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

    return Stored(spec, config, _shapes(config, where, headers)[0], read)


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
            if dtype not in _DTYPES:
                raise ValueError(
                    f"Tensor {stored_name} of {where} is stored as {dtype}, and quantised weights "
                    "are not supported; give the model in float32, bfloat16 or float16."
                )
            owners[name], shapes[name] = (file, stored_name), shape
    return shapes, owners


def _text_name(name: str) -> str:
    """The name that a tensor of a model with images has in the model of its text; or empty."""
    if name.startswith(_OTHER_PARTS):
        return ""
    name = name.removeprefix("language_model.")
    return name.replace("model.language_model.", "model.", 1)


def places(spec: ModelSpec, gguf: bool) -> dict[str, list[Place]]:
    """Returns where each parameter lies: one place per layer, or one alone if it isn't stacked.

    Parameters whose tensors have one name lie in that tensor one below the other, in the order of
    `parameters.PARAMETERS`.
    """
    ends: dict[str, int] = {}  # rows that are taken, by tensor
    found: dict[str, list[Place]] = {}
    for p in parameters(spec).values():
        pattern = p.gguf if gguf else p.tensor
        found[p.name] = []
        for layer in range(spec.layers if p.stacked else 1):
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
    return shape if p.dims[0] == "V" else (math.prod(shape),)


def from_stored(array: np.ndarray, p: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """Converts rows of a tensor to the layout of a parameter of `shape`, without its experts."""
    return (array.T if p.inputs else array).reshape(shape)


def to_stored(array: np.ndarray, p: Parameter, spec: ModelSpec) -> np.ndarray:
    """Converts a parameter of one layer, or one of its experts, to the rows of a tensor."""
    if not p.inputs:
        return np.ascontiguousarray(array.reshape(stored_shape(p, spec)))
    return np.ascontiguousarray(array.reshape(p.sides(spec)).T)


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
            if p.batch and stored.gguf:
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
        if not name.endswith("rotary_emb.inv_freq")
        and not (spec.tied and name in ("lm_head.weight", "output.weight"))
    )
    if unexpected:
        raise ValueError(
            f"{path} holds {len(unexpected)} tensors that its config.json does not call for, "
            f"such as {unexpected[0]!r}."
        )
    return found


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

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part, in the parameter's dtype."""
        slices = [slice(*x.indices(n)) for x, n in zip(index, self.shape, strict=True)]
        layers = self._layers[slices.pop(0)] if self._p.stacked else self._layers
        parts = [self._read_layer(place, slices) for place in layers]
        array = np.stack(parts) if self._p.stacked else parts[0]
        return array.astype(self._dtype or array.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of it."""
        array = self[(slice(None),) * self.ndim]
        return array.astype(dtype or array.dtype, copy=False)

    def _read_layer(self, place: Place, slices: list[slice]) -> np.ndarray:
        p = self._p
        if not p.batch:
            rows = place.rows or (0, None)
            return self._read_matrix(place.tensors[0], rows, slices)
        chosen = range(p.shape(self._stored.spec)[0])[slices[0]]
        if self._stored.gguf:  # one tensor [experts, out, in]
            array = self._stored.read(place.tensors[0], (slices[0],))
            rest = tuple(slices[1:])
            return np.stack(
                [from_stored(x, p, p.shape(self._stored.spec)[1:])[rest] for x in array]
            )
        return np.stack(
            [self._read_matrix(place.tensors[e], (0, None), slices[1:]) for e in chosen]
        )

    def _read_matrix(
        self, tensor: str, rows: tuple[int, int | None], slices: list[slice]
    ) -> np.ndarray:
        """Reads a part of a matrix or vector whose rows begin at rows[0] of a tensor."""
        p, sizes = self._p, self._p.shape(self._stored.spec)[self._p.batch :]
        first = rows[0]
        if not p.inputs and p.dims[0] == "V":
            return self._stored.read(tensor, tuple(slices))
        if not p.inputs:  # a vector is small: it is read whole
            end = first + math.prod(sizes)
            return self._stored.read(tensor, (slice(first, end),)).reshape(sizes)[tuple(slices)]
        sides = [(slices[: p.inputs], sizes[: p.inputs]), (slices[p.inputs :], sizes[p.inputs :])]
        (columns, in_shape, in_rest), (outs, out_shape, out_rest) = (_flat(*side) for side in sides)
        outs = slice(first + outs.start, first + outs.stop)
        block = self._stored.read(tensor, (outs, columns))
        return block.T.reshape(*in_shape, *out_shape)[(*in_rest, *out_rest)]


def _flat(
    slices: list[slice], sizes: tuple[int, ...]
) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """Slices of several axes as one range of the axis that they are in a file.

    Returns:
      The range, the shape that it unfolds to, and what is still to be cut out of that: a range
      holds whole entries of the first axis.
    """
    inner = math.prod(sizes[1:])
    first = slices[0]
    return (
        slice(first.start * inner, first.stop * inner),
        (first.stop - first.start, *sizes[1:]),
        (slice(None), *slices[1:]),
    )
