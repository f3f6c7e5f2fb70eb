"""Loads Hugging Face folders and GGUF files into a stacked decoder."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.folder import model_files, resolve, unfetched, weights_hash
from deltapref_jax.models.gguf import open_gguf_model
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.stored import (
    Stored,
    StoredParameter,
    check_tensors,
    open_folder,
    unread_folder,
)
from deltapref_jax.text.template import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model for pure functions: use `nnx.merge(graphdef, state)` inside `jax.jit`.

    Attributes:
      graphdef: structure of the decoder.
      state: its parameters, on the host or in their files; callers place them on their devices.
      spec: its sizes.
      text: its tokenizer and chat template.
      weights: `weights_hash` of the files that it was loaded from.
      config: contents of its config.json, which an export of the model keeps.
    """

    graphdef: nnx.GraphDef
    state: nnx.State
    spec: ModelSpec
    text: ChatTokenizer
    weights: str
    config: Mapping[str, Any]


def abstract(
    spec: ModelSpec, dtype: Any = jnp.float32, adapters: Adapters = NO_ADAPTERS
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the structure and the shapes of a decoder, without allocating its arrays."""
    return nnx.split(
        nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), dtype=dtype, adapters=adapters))
    )


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested mapping of parameters by name, as `nnx.replace_by_pure_dict` takes it."""
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *outer, last = name.split(".")
        branch = tree
        for key in outer:
            branch = branch.setdefault(key, {})
        branch[last] = array
    return tree


def load(path: str, dtype: str = "float32", params: str | None = "float32") -> LoadedModel:
    """Loads a Hugging Face folder, a GGUF file (dequantised) or a model of the hub.

    The parameters are host arrays; `open_model` reads them when they are placed on devices.

    Args:
      path: a path or a name, see `resolve`.
      dtype: dtype of the computation.
      params: dtype of the parameters; float32 for parameters that are trained, None for each
        tensor's stored dtype.

    Raises:
      FileNotFoundError: there is no model, or the folder is incomplete.
      ValueError: the architecture is not supported, or a tensor is missing or has another shape.
    """
    model = open_model(path, dtype, params)
    return dataclasses.replace(model, state=jax.tree.map(np.asarray, model.state))


def open_model(path: str, dtype: str = "float32", params: str | None = "float32") -> LoadedModel:
    """Opens a model; arguments and errors are those of `load`.

    Its parameters are `StoredParameter`, of which `mesh.place` has every process read the parts of
    its own devices alone.
    """
    local_path, stored = _open(path)
    spec = stored.spec
    graphdef, state = assemble(stored, path, dtype, params)
    text, weights = ChatTokenizer.load(local_path), weights_hash(path)
    return LoadedModel(graphdef, state, spec, text, weights, stored.config)


def assemble(
    stored: Stored, path: str, dtype: str = "float32", params: str | None = "float32"
) -> tuple[nnx.GraphDef, nnx.State]:
    """Builds a decoder and its parameters, `StoredParameter`, from an opened model.

    Args:
      stored: the opened model.
      path: its path, for error messages.
      dtype: see `load`.
      params: see `load`.

    Raises:
      ValueError: see `stored.check_tensors`.
    """
    places = check_tensors(stored, path)
    graphdef, state = abstract(stored.spec, jnp.dtype(dtype))
    numbers = None if params is None else jnp.dtype(params)
    flat = {
        name: StoredParameter(stored, parameter, places[name], numbers)
        for name, parameter in parameters(stored.spec).items()
    }
    nnx.replace_by_pure_dict(state, unflatten(flat))
    return graphdef, state


def inspect_model(path: str) -> tuple[ModelSpec, ChatTokenizer]:
    """Returns the sizes and the tokenizer of a model, and checks it without reading its weights.

    Of a model on the hub, config and tokenizer are fetched and checked first, then the headers of
    its safetensors are read there; its weights stay where they are.

    Raises:
      FileNotFoundError: there is no model, or the folder is incomplete.
      ValueError: the architecture is not supported, a tensor is missing or has another shape, or
        the tokenizer cannot be used.
    """
    stored, text = open_model_files(path)
    return stored.spec, text


def open_model_files(path: str) -> tuple[Stored, ChatTokenizer]:
    """Opens a model without reading its weights, and checks it; errors are `inspect_model`'s."""
    if remote := unfetched(path):
        repo, files = remote
        local_path = resolve(path, weights=False)
        text = ChatTokenizer.load(local_path)
        headers = {file: repo.tensors(file) for file in files}
        stored = unread_folder(Path(local_path), path, headers)
    else:
        local_path, stored = _open(path)
        text = ChatTokenizer.load(local_path)
    check_tensors(stored, path)
    return stored, text


def _open(path: str) -> tuple[str, Stored]:
    """Returns a model's local path, and the model with its weights unread."""
    local_path = resolve(path)
    model_files(local_path)
    opened = open_gguf_model if os.path.isfile(local_path) else open_folder
    return local_path, opened(Path(local_path))
