"""Loads Hugging Face folders and GGUF files into a stacked decoder, and exports a folder.

`_NAMES` is the only table of tensor names: a decoder's parameter, its name in safetensors and its
name in GGUF. Hugging Face stores a projection as [out, in]; the decoder's are [in, heads, width] or
[in, out], so tensors are transposed and reshaped when they are read or written.
"""

import dataclasses
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.folder import model_files, resolve, unfetched, weights_hash
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec, spec_from_hf, spec_to_hf
from deltapref_jax.text.gguf_tokenizer import field, open_gguf
from deltapref_jax.text.template import ChatTokenizer

# Parameter of `Decoder`: (name in safetensors, name in GGUF); {} stands for the layer.
_NAMES = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
    "blocks.attention_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "blocks.q": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "blocks.k": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "blocks.v": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "blocks.o": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "blocks.mlp_norm": (
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight",
    ),
    "blocks.gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "blocks.up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "blocks.down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
}
_TRANSPOSED = ("q", "k", "v", "o", "gate", "up", "down")
"""Parameters whose last two axes (after reshaping) are transposed in a file."""
_DTYPES = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that are numbers by themselves; others need scales, which nothing here reads."""
_SHARD_BYTES = 4 << 30
"""A file of safetensors is at most this large, unless one tensor is larger."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of stored tensors by their names."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model for pure functions: use `nnx.merge(graphdef, state)` inside `jax.jit`.

    Attributes:
      graphdef: structure of the decoder.
      state: its parameters as host arrays; callers place them on their devices.
      spec: its sizes.
      text: its tokenizer and chat template.
      weights: `weights_hash` of the files that it was loaded from.
    """

    graphdef: nnx.GraphDef
    state: nnx.State
    spec: ModelSpec
    text: ChatTokenizer
    weights: str


def _read_folder(path: Path) -> tuple[ModelSpec, Callable[[str], np.ndarray], Shapes]:
    """Returns the spec, a function that reads a tensor by name, and the shapes of all tensors."""
    spec = _read_spec(path)
    try:
        files = [file for file in model_files(str(path)) if file.suffix == ".safetensors"]
        handles = {file.name: safe_open(file, framework="flax") for file in files}
    except Exception as e:  # safetensors raises different types on a truncated file
        raise ValueError(f"The model in {path} cannot be read ({e}); fetch it again.") from e

    def headers(handle: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name in handle.keys():  # noqa: SIM118
            header = handle.get_slice(name)  # reads no weights
            yield name, header.get_dtype(), tuple(header.get_shape())

    shapes, owners = _shapes(str(path), {file: headers(h) for file, h in handles.items()})
    return spec, lambda name: np.asarray(handles[owners[name]].get_tensor(name)), shapes


def _read_spec(path: Path) -> ModelSpec:
    """Reads a folder's config.json.

    Raises:
      ValueError: the file is damaged, or describes a model that is not supported.
    """
    try:
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
    except Exception as e:  # of the text, of JSON, or of the file system
        raise ValueError(f"The model in {path} cannot be read ({e}); fetch it again.") from e
    return spec_from_hf(config)


def _shapes(
    where: str, files: Mapping[str, Iterable[tuple[str, str, tuple[int, ...]]]]
) -> tuple[Shapes, dict[str, str]]:
    """Returns the shape of every tensor, and the file that it is in.

    Args:
      where: the model, for messages.
      files: name, dtype and shape of the tensors of every file of safetensors.

    Raises:
      ValueError: a tensor is in two files, or is quantised.
    """
    shapes: Shapes = {}
    owners: dict[str, str] = {}
    for file, headers in files.items():
        for name, dtype, shape in headers:
            if name in owners:
                raise ValueError(
                    f"Tensor {name} of {where} is in {owners[name]} and in {file}; leave one of "
                    "the two files, or give the folder an index that names its shards."
                )
            if dtype not in _DTYPES:
                raise ValueError(
                    f"Tensor {name} of {where} is stored as {dtype}, and quantised weights are not "
                    "supported; give the model in float32, bfloat16 or float16."
                )
            owners[name], shapes[name] = file, shape
    return shapes, owners


def _read_gguf(path: Path) -> tuple[ModelSpec, Callable[[str], np.ndarray], Shapes]:
    """Returns what `_read_folder` does; the function dequantises the tensor that it reads."""
    from gguf.quants import dequantize

    reader = open_gguf(str(path))
    kind = field(reader, "general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def metadata(name: str, default: Any = None) -> Any:
        return field(reader, f"{kind}.{name}", default)

    _check_gguf(path, reader, str(kind))
    heads, width = metadata("attention.head_count"), metadata("embedding_length")
    epsilon = metadata("attention.layer_norm_rms_epsilon", 1e-5)
    # Llama 3's scaling of frequencies is a tensor in GGUF, other scalings are a name.
    scaling = "llama3" if "rope_freqs.weight" in tensors else metadata("rope.scaling.type", "none")
    spec = spec_from_hf(
        {
            "model_type": kind,
            "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
            "hidden_size": width,
            "num_hidden_layers": metadata("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata("attention.head_count_kv", heads),
            "head_dim": metadata("attention.key_length"),
            "intermediate_size": metadata("feed_forward_length"),
            "rope_theta": metadata("rope.freq_base", 1e4),
            # GGUF stores float32: the shortest decimal gives 1e-5 and not 9.99e-6.
            "rms_norm_eps": float(str(np.float32(epsilon))),
            "tie_word_embeddings": "output.weight" not in tensors,
            "max_position_embeddings": metadata("context_length"),
            "rope_parameters": {"rope_type": "default" if scaling == "none" else scaling},
        }
    )

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in (("attn_q", spec.heads), ("attn_k", spec.kv_heads)):
            # llama.cpp interleaves the two halves of every head of a Llama; this inverts it.
            if part in name:
                pairs = array.reshape(count, -1, 2, array.shape[-1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    # GGUF lists the axes of a tensor from the innermost to the outermost.
    return spec, read, {name: tuple(map(int, t.shape[::-1])) for name, t in tensors.items()}


_GGUF_FIELDS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "vocab_size",
    "tensor_data_layout",
)
"""Fields of a GGUF file's architecture that are read, or that change nothing."""


def _check_gguf(path: Path, reader: Any, kind: str) -> None:
    """Refuses a part of a model, and fields that change what a decoder computes.

    Raises:
      ValueError: it names the field.
    """
    parts = field(reader, "split.count", 0)
    if parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model (split.count); merge them with "
            "llama-gguf-split --merge."
        )
    if field(reader, "tokenizer.ggml.tokens") is None:
        raise ValueError(f"{path} has no tokenizer.ggml.tokens; give a whole model.")
    heads, width = (
        field(reader, f"{kind}.{name}") for name in ("attention.head_count", "embedding_length")
    )
    whole = field(reader, f"{kind}.attention.key_length")
    # Without the field a head is as wide as the model's width over its heads.
    if whole is None and isinstance(heads, int) and isinstance(width, int) and heads:
        whole = width // heads
    # Rotary embeddings of a part of a head, and values of another width, are not implemented.
    for name in ("rope.dimension_count", "attention.value_length"):
        value = field(reader, f"{kind}.{name}", whole)
        if value != whole:
            raise ValueError(
                f"{path} has the {kind}.{name} {value} and heads of {whole}; only equal ones are "
                "supported."
            )
    # A field that is not known is refused unless its value says that it does nothing: 0, or 1 for a
    # scale.
    for key in reader.fields:
        name = key.removeprefix(f"{kind}.")
        if name == key or name in _GGUF_FIELDS:
            continue
        value = field(reader, key)
        neutral = (True,) if name == "attention.causal" else (0, 1) if "scal" in name else (0,)
        if value not in neutral:
            raise ValueError(
                f"{path} has the {key} {reprlib.repr(value)}, and a decoder with that option is "
                "not supported; give a model without it."
            )


def abstract(
    spec: ModelSpec, dtype: Any = jnp.float32, adapters: Adapters = NO_ADAPTERS
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the structure and the shapes of a decoder, without allocating its arrays."""
    return nnx.split(
        nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), dtype=dtype, adapters=adapters))
    )


def stored_name(parameter: str) -> str:
    """Returns the name in safetensors of a parameter such as "blocks.q"; {} is the layer."""
    return _NAMES[parameter][0]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Joins the keys of nested mappings by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load(path: str, dtype: str = "float32", params: str | None = "float32") -> LoadedModel:
    """Loads a Hugging Face folder, a GGUF file (dequantised) or a model of the hub.

    Args:
      path: a path or a name, see `resolve`.
      dtype: dtype of the computation.
      params: dtype of the parameters; float32 for parameters that are trained, None for each
        tensor's stored dtype.

    Raises:
      FileNotFoundError: there is no model, or the folder is incomplete.
      ValueError: the architecture is not supported, or a tensor is missing or has another shape.
    """
    local_path, gguf, (spec, read, shapes) = _open(path)
    state = assemble(spec, read, gguf, path, shapes, params)
    graphdef = abstract(spec, jnp.dtype(dtype))[0]
    return LoadedModel(graphdef, state, spec, ChatTokenizer.load(local_path), weights_hash(path))


def inspect_model(path: str) -> tuple[ModelSpec, ChatTokenizer]:
    """Returns the sizes and the tokenizer of a model, and checks it without reading its weights.

    Of a model on the hub, config and tokenizer are fetched and checked first, then the headers of
    its safetensors are read there; its weights stay where they are.

    Raises:
      FileNotFoundError: there is no model, or the folder is incomplete.
      ValueError: the architecture is not supported, a tensor is missing or has another shape, or
        the tokenizer cannot be used.
    """
    if remote := unfetched(path):
        repo, files = remote
        local_path, gguf = resolve(path, weights=False), False
        spec, text = _read_spec(Path(local_path)), ChatTokenizer.load(local_path)
        shapes = _shapes(path, {file: repo.tensors(file) for file in files})[0]
    else:
        local_path, gguf, (spec, _, shapes) = _open(path)
        text = ChatTokenizer.load(local_path)
    _check_tensors(spec, gguf, path, shapes)
    return spec, text


def _open(path: str) -> tuple[str, bool, tuple[ModelSpec, Callable[[str], np.ndarray], Shapes]]:
    """Returns a model's local path, whether it is a GGUF file, and its spec, reader and shapes."""
    local_path = resolve(path)
    model_files(local_path)
    gguf = os.path.isfile(local_path)
    return local_path, gguf, (_read_gguf if gguf else _read_folder)(Path(local_path))


def _check_tensors(spec: ModelSpec, gguf: bool, path: str, shapes: Shapes) -> dict[str, list[str]]:
    """Returns the stored tensors of every parameter, one per layer if it is stacked.

    Raises:
      ValueError: a tensor is missing, has another shape, or the decoder has no use for it.
    """
    stored: dict[str, list[str]] = {}
    for name, leaf in _flatten(nnx.to_pure_dict(abstract(spec)[1])).items():
        source = _NAMES[name][gguf]
        stacked = "{}" in source
        stored[name] = [source.format(i) for i in range(spec.layers)] if stacked else [source]
        expected = _stored_shape(name, leaf.shape[1:] if stacked else leaf.shape)
        for tensor in stored[name]:
            if tensor not in shapes:
                raise ValueError(
                    f"{path} has no tensor {tensor!r}; its config.json does not describe its "
                    "weights."
                )
            if shapes[tensor] != expected:
                raise ValueError(
                    f"Tensor {tensor} of {path} has the shape {shapes[tensor]}; its config.json "
                    f"calls for {expected}."
                )
    # Old checkpoints hold rotary frequencies; a tied model may hold its output projection twice.
    unexpected = sorted(
        n
        for n in shapes.keys() - {tensor for layers in stored.values() for tensor in layers}
        if not n.endswith("rotary_emb.inv_freq") and not (spec.tied and n in _NAMES["head"])
    )
    if unexpected:
        raise ValueError(
            f"{path} holds {len(unexpected)} tensors that its config.json does not call for, "
            f"such as {unexpected[0]!r}."
        )
    return stored


def assemble(
    spec: ModelSpec,
    read: Callable[[str], np.ndarray],
    gguf: bool,
    path: str,
    shapes: Shapes,
    params: str | None = "float32",
) -> nnx.State:
    """Builds the parameters of a decoder, as host arrays, from a function that reads a tensor.

    Args:
      spec: sizes of the decoder.
      read: maps a stored name to its array.
      gguf: whether the names are GGUF's.
      path: the model's path, for error messages.
      shapes: of all stored tensors.
      params: dtype of the parameters, see `load`.

    Raises:
      ValueError: see `_check_tensors`.
    """
    stored = _check_tensors(spec, gguf, path, shapes)
    state = abstract(spec)[1]
    flat: dict[str, Any] = {}
    for name, leaf in _flatten(nnx.to_pure_dict(state)).items():
        stacked = "{}" in _NAMES[name][gguf]
        shape = leaf.shape[1:] if stacked else leaf.shape
        tensors = [_from_stored(read(tensor), name, shape) for tensor in stored[name]]
        array = np.stack(tensors) if stacked else tensors[0]
        flat[name] = array.astype(jnp.dtype(params or array.dtype), copy=False)
    blocks = {
        name.removeprefix("blocks."): array
        for name, array in flat.items()
        if name.startswith("blocks.")
    }
    tree = {name: array for name, array in flat.items() if not name.startswith("blocks.")}
    nnx.replace_by_pure_dict(state, tree | {"blocks": blocks})
    return state


def _flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of a parameter in `_TRANSPOSED` with heads and their widths as one axis.

    They are the input of o, and the output of q, k and v.
    """
    split = len(shape) - 1 if name.split(".")[-1] == "o" else 1
    return int(np.prod(shape[:split])), int(np.prod(shape[split:]))


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a file of a parameter of `shape`."""
    return _flat_shape(name, shape)[::-1] if name.split(".")[-1] in _TRANSPOSED else shape


def _from_stored(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Converts a stored tensor to the layout of a parameter of `shape`."""
    return (array.T if name.split(".")[-1] in _TRANSPOSED else array).reshape(shape)


def export(
    state: nnx.State,
    spec: ModelSpec,
    text: ChatTokenizer,
    folder: str | os.PathLike[str],
    dtype: str = "float32",
) -> str:
    """Writes a Hugging Face folder and returns its `weights_hash`.

    The folder holds config.json, generation_config.json, safetensors (with an index above 4 GiB)
    and the tokenizer; `transformers` and vLLM load it as a `LlamaForCausalLM`.

    Args:
      state: parameters of a decoder without adapters.
      spec: its sizes.
      text: its tokenizer and chat template.
      folder: is created if it does not exist.
      dtype: dtype of the stored tensors.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in _flatten(nnx.to_pure_dict(state)).items():
        target = _NAMES[name][0]
        array = np.asarray(jax.device_get(leaf)).astype(jnp.dtype(dtype))
        for i, part in enumerate(array if "{}" in target else [array]):
            tensors[target.format(i)] = _to_stored(part, name)
    config = spec_to_hf(spec) | {
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": list(text.end_ids),
        "bos_token_id": text.tokenizer.bos_token_id,
        "pad_token_id": text.tokenizer.pad_token_id,
    }
    (root / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Samplers such as that of `transformers` take their end tokens from this file.
    ids = {key: config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    (root / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    _save(tensors, root)
    text.save(root)
    return weights_hash(str(root))


def _to_stored(array: np.ndarray, name: str) -> np.ndarray:
    """Converts a parameter to the stored layout, [out, in] for a matrix; inverts `_from_stored`."""
    last = name.split(".")[-1]
    if last == "o":
        array = array.reshape(-1, array.shape[-1])
    elif last in _TRANSPOSED:
        array = array.reshape(array.shape[0], -1)
    return np.ascontiguousarray(array.T if last in _TRANSPOSED else array)


def write_tensors(tensors: dict[str, np.ndarray], path: Path, mode_from: Path) -> None:
    """Writes a safetensors file with the permissions of the file `mode_from`."""
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, mode_from.stat().st_mode)  # safetensors makes files that only the owner can read


def _save(tensors: dict[str, np.ndarray], root: Path) -> None:
    """Writes model.safetensors, or shards of at most `_SHARD_BYTES` and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        # A shard is never empty, so a tensor above the limit gets a file of its own.
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = array
    if len(shards) == 1:
        write_tensors(shards[0], root / "model.safetensors", root / "config.json")
        return
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(shard, root / file, root / "config.json")
        index |= dict.fromkeys(shard, file)
    total = sum(a.nbytes for a in tensors.values())
    (root / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
    )
