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

from deltapref_jax.files import remote
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.folder import (
    has_weights,
    model_files,
    resolve,
    unfetched,
)
from deltapref_jax.models.gguf import open_gguf_model
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.quantization import FORMATS, QuantisedMatrix
from deltapref_jax.models.sharding import path_name
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.stored import (
    Stored,
    StoredParameter,
    check_tensors,
    check_tied,
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
      config: contents of its config.json, which an export of the model keeps.
    """

    graphdef: nnx.GraphDef
    state: nnx.State
    spec: ModelSpec
    text: ChatTokenizer
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


def load(
    path: str, dtype: str = "float32", params: str | None = "float32", quantization: str = ""
) -> LoadedModel:
    """Loads a Hugging Face folder, a GGUF file (dequantised) or a model of the hub.

    The parameters are host arrays; `open_model` reads them when they are placed on devices.

    Args:
      path: a path or a name, see `resolve`.
      dtype: dtype of the computation.
      params: dtype of the parameters, but for norms, which the computation reads in float32;
        float32 for parameters that are trained, None for each tensor's stored dtype.
      quantization: format of the matrices of layers, a name of `quantization.FORMATS`, of a model
        that is not trained; "" leaves them as `params` says.

    Raises:
      FileNotFoundError: there is no model, or the folder is incomplete.
      ValueError: the architecture is not supported, or a tensor is missing or has another shape.
    """
    model = open_model(path, dtype, params, quantization)
    return dataclasses.replace(model, state=jax.tree.map(np.asarray, model.state))


def open_model(
    path: str, dtype: str = "float32", params: str | None = "float32", quantization: str = ""
) -> LoadedModel:
    """Opens a model; arguments and errors are those of `load`.

    Its parameters are `StoredParameter`, of which `mesh.place` has every process read the parts of
    its own devices alone.
    """
    local_path, stored = _open(path)
    graphdef, state = assemble(stored, path, dtype, params, quantization)
    spec = stored.spec.quantised(quantization)
    text = _tokenizer(local_path, spec, path)
    return LoadedModel(graphdef, state, spec, text, stored.config)


_IMAGE_TOKENS = ("<image_soft_token>",)
"""Tokens that Gemma 3's tokenizer has, and a decoder of text has no row for."""


def _tokenizer(folder: str, spec: ModelSpec, path: str) -> ChatTokenizer:
    """Loads the tokenizer of a model, all of whose ids must have a row of the embedding.

    Raises:
      ValueError: a token has an id beyond the vocabulary; see also `ChatTokenizer.load`.
    """
    text = ChatTokenizer.load(folder)
    tokens = text.tokenizer.get_vocab().items()
    ids = {i: repr(t) for t, i in tokens if i >= spec.vocab and t not in _IMAGE_TOKENS}
    ids |= {i: ids.get(i, "eos_token_id") for i in text.end_ids if i >= spec.vocab}
    for i in sorted(ids):
        raise ValueError(
            f"The tokenizer of {path} has the token {ids[i]} with the id {i}, and the embedding "
            f"has {spec.vocab} rows (vocab_size); give the tokenizer of this model."
        )
    return text


def assemble(
    stored: Stored,
    path: str,
    dtype: str = "float32",
    params: str | None = "float32",
    quantization: str = "",
) -> tuple[nnx.GraphDef, nnx.State]:
    """Builds a decoder and its parameters, `StoredParameter`, from an opened model.

    Args:
      stored: the opened model.
      path: its path, for error messages.
      dtype: see `load`.
      params: see `load`.
      quantization: see `load`.

    Raises:
      ValueError: see `stored.check_tensors` and `stored.check_tied`.
    """
    places = check_tensors(stored, path)
    check_tied(stored, path)
    spec = stored.spec.quantised(quantization)
    graphdef, state = abstract(spec, jnp.dtype(dtype))
    declared = parameters(spec)
    flat: dict[str, Any] = {}
    for name, p in parameters(stored.spec).items():
        # A quantised matrix is rounded once, from what the file has.
        exact = p.scale in declared
        kept = np.dtype(np.float32) if exact else params and p.stored_dtype(spec, params)
        flat[name] = StoredParameter(stored, p, places[name], kept)
    nnx.replace_by_pure_dict(state, unflatten(_quantised(flat, spec, path)))
    return graphdef, state


def quantised_state(state: nnx.State, spec: ModelSpec, name: str = "the model") -> nnx.State:
    """Returns the parameters of a decoder of a quantised spec.

    Args:
      state: parameters of the same decoder without quantization.
      spec: with a quantization.
      name: the model, for messages.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    flat = _quantised({path_name(path): leaf for path, leaf in leaves}, spec, name)
    _, found = abstract(spec)
    nnx.replace_by_pure_dict(found, unflatten(flat))
    return found


def _quantised(flat: Mapping[str, Any], spec: ModelSpec, path: str) -> dict[str, Any]:
    """Parameters by name, of which those that the spec has quantised are `QuantisedMatrix`."""
    declared, found = parameters(spec), dict(flat)
    for name, array in flat.items():
        p = declared[name]
        if p.scale in declared:
            form, where = FORMATS[spec.quantization], f"Parameter {name} of {path}"
            found[name] = QuantisedMatrix(array, p.batch, p.inputs, form, where)
            found[p.scale] = found[name].scales
    return found


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
    if unfetched(path):
        # What is wrong with the tokenizer is said before headers are asked for.
        folder = resolve(path, weights=False)
        spec = unread_folder(Path(folder), path, {}).spec
        text = _tokenizer(folder, spec, path)
        return _open_unread(path), text
    stored = _open_unread(path)
    return stored, _tokenizer(resolve(path), stored.spec, path)


def _open_unread(path: str) -> Stored:
    """Opens a model and compares the shapes of its tensors; of one on the hub it reads headers."""
    if on_hub := unfetched(path):
        repo, files = on_hub
        headers = {file: repo.tensors(file) for file in files}
        stored = unread_folder(Path(resolve(path, weights=False)), path, headers)
    else:
        stored = _open(path)[1]
    check_tensors(stored, path)
    return stored


def describe_files(path: str) -> tuple[Stored, ChatTokenizer | None]:
    """Opens a model of which a config.json may be all that there is.

    Returns:
      The model, whose shapes are empty without weights; its tokenizer, or None without one.

    Raises:
      FileNotFoundError: there is nothing at `path`, or not even a config.json.
      ValueError: see `inspect_model`.
    """
    there = has_weights(path)
    root = Path(resolve(path, weights=False))
    stored = _open_unread(path) if there else unread_folder(root, path, {})
    files = (root, root / "tokenizer.json", root / "tokenizer_config.json")
    known = any(file.is_file() for file in files)
    return stored, _tokenizer(str(root), stored.spec, path) if known else None


def describe_model(path: str) -> tuple[ModelSpec, ChatTokenizer | None]:
    """`inspect_model` for a plan: a model without weights may be a config.json alone."""
    if has_weights(path):
        return inspect_model(path)
    stored, text = describe_files(path)
    return stored.spec, text


def _open(path: str) -> tuple[str, Stored]:
    """Returns the local path of a model's tokenizer, and the model with its weights unread."""
    local_path = resolve(path)
    if os.path.isfile(local_path):
        model_files(local_path)
        return local_path, open_gguf_model(Path(local_path))
    # The weights of a folder in a bucket are read there.
    where = path if remote(path) else local_path
    model_files(where)
    return local_path, open_folder(where)
