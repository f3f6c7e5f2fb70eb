"""A model in files: its spec, and the tensors that hold each of its parameters.

Hugging Face stores a matrix as [out, in], with heads and their widths as one axis; a decoder's are
[in, heads, width] or [in, out]. Some families keep several matrices in one tensor, one below the
other, and experts are one tensor each, except in GGUF.
"""

import json
import math
from collections.abc import Callable, Mapping
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
    read: Callable[[str], np.ndarray]  # maps the name of a tensor to its numbers
    gguf: bool = False


class Place(NamedTuple):
    """Where one layer's parameter lies: rows of one tensor, or one tensor per expert."""

    tensors: tuple[str, ...]
    rows: tuple[int, int] | None  # first and end; None means all


def open_folder(path: Path) -> Stored:
    """Opens a Hugging Face folder.

    Raises:
      FileNotFoundError: the folder is incomplete.
      ValueError: it is damaged, or describes a model that is not supported.
    """
    try:
        config = json.loads((path / "config.json").read_text())
        files = [file for file in model_files(str(path)) if file.suffix == ".safetensors"]
        handles = {file.name: safe_open(file, framework="flax") for file in files}
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
    except Exception as e:  # json and safetensors raise different types on a truncated file
        raise ValueError(f"The model in {path} cannot be read ({e}); fetch it again.") from e
    spec = spec_from_hf(config)
    owners: dict[str, str] = {}
    stored_names: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, handle in handles.items():
        for stored in handle.keys():  # noqa: SIM118
            name = _text_name(stored) if "text_config" in config else stored
            if not name:
                continue
            if name in owners:
                raise ValueError(
                    f"Tensor {stored} of {path} is in {owners[name]} and in {file}; leave one of "
                    "the two files, or give the folder an index that names its shards."
                )
            header = handle.get_slice(stored)  # reads no weights
            if header.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"Tensor {stored} of {path} is stored as {header.get_dtype()}, and quantised "
                    "weights are not supported; give the model in float32, bfloat16 or float16."
                )
            owners[name], stored_names[name] = file, stored
            shapes[name] = tuple(header.get_shape())

    def read(name: str) -> np.ndarray:
        return np.asarray(handles[owners[name]].get_tensor(stored_names[name]))

    return Stored(spec, config, shapes, read)


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


def read_parameter(stored: Stored, p: Parameter, layers: list[Place]) -> np.ndarray:
    """Reads a parameter of all layers, in its stored dtype."""
    shape = p.shape(stored.spec)
    arrays = []
    for place in layers:
        parts = []
        for tensor in place.tensors:
            array = stored.read(tensor)
            array = array[slice(*place.rows)] if place.rows else array
            if p.batch and stored.gguf:
                parts += [from_stored(expert, p, shape[1:]) for expert in array]
            else:
                parts.append(from_stored(array, p, shape[p.batch :]))
        arrays.append(np.stack(parts) if p.batch else parts[0])
    return np.stack(arrays) if p.stacked else arrays[0]
