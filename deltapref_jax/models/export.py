"""Writes a decoder as a Hugging Face folder of its own family."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from deltapref_jax.mesh import is_first
from deltapref_jax.models.config_json import portable, spec_to_hf
from deltapref_jax.models.parameters import Parameter, parameters
from deltapref_jax.models.safetensors_file import TensorWriter
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.stored import Place, joined, places, stored_shape, to_stored
from deltapref_jax.processes import wait_for_all
from deltapref_jax.text.template import ChatTokenizer

_SHARD_BYTES = 4 << 30
"""A file of safetensors is at most this large, unless one tensor is larger."""

_BLOCK_BYTES = 64 << 20  # of a table of the vocabulary that are brought together at a time


def export(
    state: nnx.State,
    spec: ModelSpec,
    text: ChatTokenizer,
    folder: str | os.PathLike[str],
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder; every process of a job must call it.

    The processes share the work file by file. Parameters are brought together layer by layer, so
    neither a host nor a chip holds more than one layer's matrix of them at a time. The folder holds
    config.json, generation_config.json, safetensors (with an index above 4 GiB) and the tokenizer;
    `transformers` loads it as a model of its own family.

    Args:
      state: parameters of a decoder without adapters.
      spec: its sizes.
      text: its tokenizer and chat template.
      folder: is created if it does not exist; the same on a disk that all processes share, or a
        folder of each process for its own files.
      dtype: dtype of the stored tensors.
      config: config.json of the model that it was; None for a plain Llama that came from no file.
    """
    root = Path(folder)
    end_ids = list(text.end_ids)
    ids = {
        "eos_token_id": end_ids,
        "bos_token_id": text.tokenizer.bos_token_id,
        "pad_token_id": text.tokenizer.pad_token_id,
    }
    write_folder(state, spec, root, dtype, config, ids)
    if not is_first():
        return
    # Samplers such as that of `transformers` take their end tokens from this file.
    (root / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    text.save(root)


def write_folder(
    state: nnx.State,
    spec: ModelSpec,
    root: Path,
    dtype: str,
    config: Mapping[str, Any] | None,
    ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and the weights of a decoder; arguments as in `export`.

    Args:
      ids: special tokens that config.json names.
    """
    root.mkdir(parents=True, exist_ok=True)
    sources = _sources(spec)
    shapes = {tensor: _stored_shape(parts, spec) for tensor, parts in sources.items()}
    itemsize = jnp.dtype(dtype).itemsize
    files = _files({name: math.prod(shape) * itemsize for name, shape in shapes.items()})
    writers: dict[str, TensorWriter] = {}
    with contextlib.ExitStack() as opened:
        # The files are those of any number of processes, which take turns with them.
        for file, names in list(files.items())[jax.process_index() :: jax.process_count()]:
            tensors = {name: (jnp.dtype(dtype), shapes[name]) for name in names}
            writer = TensorWriter(root / file, tensors)
            opened.callback(writer.close)
            writers |= dict.fromkeys(names, writer)
        leaves = _leaves(state, spec)
        for tensor, parts in sources.items():
            for row, rows in _rows(parts, leaves, spec, dtype, tensor in writers):
                writers[tensor].write(tensor, row, rows)
    wait_for_all("weights")
    if not is_first():
        return
    fields = portable(config) if config is not None else spec_to_hf(spec)
    fields |= {"dtype": dtype, "torch_dtype": dtype, **(ids or {})}
    (root / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if len(files) > 1:  # The index comes when all that it names is there.
        total = sum(math.prod(shape) * itemsize for shape in shapes.values())
        index = {name: file for file, names in files.items() for name in names}
        (root / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
        )


_At = tuple[int, ...]
"""Index of a part of a parameter: its layer, and its expert where each has its own tensor."""


class _Part(NamedTuple):
    """A part of a parameter that lies in one tensor."""

    p: Parameter
    at: _At
    place: Place


def _sources(spec: ModelSpec) -> dict[str, list[_Part]]:
    """Which parts of which parameters lie in a tensor, by its name and in the order of `places`."""
    found = places(spec, gguf=False)
    sources: dict[str, list[_Part]] = {}
    for name, p in parameters(spec).items():
        for layer, place in enumerate(found[name]):
            for expert, tensor in enumerate(place.tensors):
                at: _At = (layer,) if p.stacked else ()
                if p.batch and not place.columns:
                    at += (expert,)
                sources.setdefault(tensor, []).append(_Part(p, at, place))
    return sources


def _stored_shape(parts: list[_Part], spec: ModelSpec) -> tuple[int, ...]:
    if parts[0].place.columns:
        *outer, last = parts[0].p.shape(spec)
        return (*outer, last * len(parts))
    shapes = [stored_shape(part.p, spec) for part in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _leaves(state: nnx.State, spec: ModelSpec) -> dict[str, Any]:
    """The parameters by their names."""
    flat = nnx.to_pure_dict(state)
    return {
        name: flat["blocks"][p.short] if p.stacked else flat[name]
        for name, p in parameters(spec).items()
    }


def _rows(
    parts: list[_Part],
    leaves: Mapping[str, Any],
    spec: ModelSpec,
    dtype: str,
    mine: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the rows of a tensor in blocks, and the number of the first of each.

    Every process must iterate, since what is spread over processes is fetched together; only where
    the tensor is `mine` anything is yielded.
    """
    if parts[0].place.columns:  # The columns of several parameters alternate.
        held = [_fetch(leaves[part.p.name], part.at, mine) for part in parts]
        arrays = [array.astype(jnp.dtype(dtype), copy=False) for array in held if array is not None]
        if arrays:
            yield 0, joined(arrays, parts[0].place)
        return
    row = 0
    for p, at, _ in parts:
        leaf = leaves[p.name]
        if at:
            blocks: list[_At | slice] = [at]
        else:  # A table of the vocabulary has no layers, and is fetched in blocks of rows instead.
            step = max(1, _BLOCK_BYTES // (math.prod(leaf.shape[1:]) * 4))
            blocks = [slice(i, min(i + step, leaf.shape[0])) for i in range(0, leaf.shape[0], step)]
        for block in blocks:
            array = _fetch(leaf, block, mine)
            if array is not None:
                array = array.astype(jnp.dtype(dtype), copy=False)
                yield row, array if not at and p.dims[0] == "V" else to_stored(array, p, spec)
            row += (
                block.stop - block.start if isinstance(block, slice) else stored_shape(p, spec)[0]
            )


def _fetch(leaf: Any, at: "_At | slice", mine: bool) -> np.ndarray | None:
    """A layer, or rows, of a parameter on the host; None if it is not `mine`.

    Of an array that several devices hold, that part alone is brought together.
    """
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        first, size = (at.start, at.stop - at.start) if isinstance(at, slice) else (at, 0)
        part = _gathered(leaf, np.asarray(first, np.int32), size)
        # Without the wait, a process that writes nothing would fetch far ahead of the others.
        part.block_until_ready()
        return np.asarray(part.addressable_data(0)) if mine else None
    if not mine:
        return None
    if isinstance(leaf, jax.Array | np.ndarray):
        return np.asarray(leaf)[at]
    # A parameter in a file, which is indexed by slices.
    ranges = (at,) if isinstance(at, slice) else tuple(slice(i, i + 1) for i in at)
    array = leaf[ranges + (slice(None),) * (len(leaf.shape) - len(ranges))]
    return array if isinstance(at, slice) else array.reshape(leaf.shape[len(at) :])


def _gathered(leaf: jax.Array, first: np.ndarray, size: int) -> jax.Array:
    """A part of an array on every device: at an index, or `size` rows from a row on."""
    assert isinstance(leaf.sharding, NamedSharding)
    mesh = leaf.sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    return _gather(everywhere, size)(leaf, jax.device_put(first, everywhere))


@functools.lru_cache(maxsize=64)
def _gather(everywhere: NamedSharding, size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def rows(x: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size)

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        for i in index:
            x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x

    return jax.jit(rows if size else at, out_shardings=everywhere)


def write_tensors(tensors: dict[str, np.ndarray], path: Path, mode_from: Path) -> None:
    """Writes a safetensors file with the permissions of the file `mode_from`."""
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, mode_from.stat().st_mode)  # safetensors makes files that only the owner can read


def _files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The names of the tensors of every file: one, or shards of at most `_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        # A shard is never empty, so a tensor above the limit gets a file of its own.
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards)
    }
