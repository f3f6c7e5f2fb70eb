"""Weights in and out: Hugging Face folders and GGUF files to a stacked decoder, and back to a folder.

`_NAMES` is the one table of names: our parameter, its name in safetensors and in GGUF. Hugging Face stores a projection
as [out, in]; ours are [in, heads, width] or [in, out], so a tensor is transposed and reshaped on the way.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from deltapref_jax.files import local_copy, remote
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec, spec_from_hf, spec_to_hf
from deltapref_jax.text.gguf_tokenizer import field, open_gguf
from deltapref_jax.text.template import ChatTokenizer

_NAMES = {  # ours: (safetensors, GGUF)
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
_SHARD_BYTES = 4 << 30

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready for pure functions: `nnx.merge(graphdef, state)` inside `jax.jit`."""

    graphdef: nnx.GraphDef
    state: nnx.State  # of host arrays: whoever computes places them on its devices
    spec: ModelSpec
    text: ChatTokenizer
    weights: str  # `weights_hash` of where it came from


def resolve(path: str) -> str:
    """A local folder or file for `path`; a name like `organisation/model` is fetched from the hub, `gs://…` copied.

    Raises:
      FileNotFoundError: neither a local path nor a model that the hub or the bucket gives us.
    """
    if remote(path):
        return local_copy(path)
    if os.path.exists(path):
        return path
    if path.count("/") == 1 and not path.startswith((".", "/")) and not path.endswith(".gguf"):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(
                path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
            )
        except (
            Exception
        ) as e:  # the hub's client raises dozens of kinds; all mean that we do not have the model
            raise FileNotFoundError(
                f"The hub did not give {path!r} ({type(e).__name__}) and there is no such folder; "
                "give a local Hugging Face folder or a .gguf file."
            ) from e
    raise FileNotFoundError(
        f"There is no model at {path}; give a Hugging Face folder, a hub name or a .gguf file."
    )


def _files(path: str) -> list[Path]:
    """The files that make a model what it is: its weights, its shape and its tokenizer."""
    root = Path(path)
    if root.is_file():
        return [root]
    weights = sorted(root.glob("*.safetensors"))
    if not (root / "config.json").exists() or not weights:
        raise FileNotFoundError(
            f"The folder {path} has no {'config.json' if weights else 'safetensors'}; "
            "give a complete Hugging Face folder."
        )
    index = root / "model.safetensors.index.json"
    if index.exists():
        for name in sorted(
            set(json.loads(index.read_text())["weight_map"].values())
            - {file.name for file in weights}
        ):
            raise FileNotFoundError(
                f"The folder {path} has no {name}, which {index.name} names; "
                "give a complete Hugging Face folder."
            )
    extra = [
        root / name
        for name in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        )
    ]
    return weights + [file for file in extra if file.exists()]


@functools.lru_cache(maxsize=256)
def _file_hash(path: str, size: int, mtime: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(path: str) -> str:
    """16 hex digits over weights, config and tokenizer: equal for equal content, wherever it lies.

    Raises:
      FileNotFoundError: no model at `path`.
    """
    digest = hashlib.sha256()
    for file in _files(resolve(path)):
        stat = file.stat()
        name = "gguf" if file.suffix == ".gguf" else file.name
        digest.update(f"{name} {_file_hash(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def _read_folder(path: Path) -> tuple[ModelSpec, Callable[[str], np.ndarray], set[str]]:
    """Spec, a reader of one tensor by name, and the names."""
    try:
        config = json.loads((path / "config.json").read_text())
        handles = [safe_open(file, framework="flax") for file in sorted(path.glob("*.safetensors"))]
    except Exception as e:  # a cut file fails in json or in safetensors' own ways
        raise ValueError(f"The model in {path} cannot be read ({e}); fetch it again.") from e
    where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    return spec_from_hf(config), lambda name: np.asarray(where[name].get_tensor(name)), set(where)


def _read_gguf(path: Path) -> tuple[ModelSpec, Callable[[str], np.ndarray], set[str]]:
    from gguf.quants import dequantize

    reader = open_gguf(str(path))
    kind = field(reader, "general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def size(name: str, default: Any = None) -> Any:
        return field(reader, f"{kind}.{name}", default)

    heads, width = size("attention.head_count"), size("embedding_length")
    epsilon = size("attention.layer_norm_rms_epsilon", 1e-5)
    scaling = "llama3" if "rope_freqs.weight" in tensors else size("rope.scaling.type", "none")
    spec = spec_from_hf(
        {
            "model_type": kind,
            "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
            "hidden_size": width,
            "num_hidden_layers": size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": size("attention.head_count_kv", heads),
            "head_dim": size("attention.key_length"),
            "intermediate_size": size("feed_forward_length"),
            "rope_theta": size("rope.freq_base", 1e4),
            "rms_norm_eps": float(
                str(np.float32(epsilon))
            ),  # stored in float32: 1e-5 and not 9.99…e-6
            "tie_word_embeddings": "output.weight" not in tensors,
            "max_position_embeddings": size("context_length"),
            "rope_parameters": {"rope_type": "default" if scaling == "none" else scaling},
        }
    )

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in (("attn_q", spec.heads), ("attn_k", spec.kv_heads)):
            if (
                part in name
            ):  # llama.cpp interleaves the two halves of every head of a Llama; undo it
                array = (
                    array.reshape(count, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
                )
        return array

    return spec, read, set(tensors)


def abstract(
    spec: ModelSpec, dtype: Any = jnp.float32, adapters: Adapters = NO_ADAPTERS
) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a decoder without its arrays."""
    return nnx.split(
        nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), dtype=dtype, adapters=adapters))
    )


def stored_name(parameter: str) -> str:
    """Name in safetensors of one of our parameters, such as "blocks.q"; {} stands for the layer."""
    return _NAMES[parameter][0]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return flat


def load(path: str, dtype: str = "float32", params: str | None = "float32") -> Loaded:
    """A model from a Hugging Face folder, a GGUF file (dequantised) or a hub name.

    Args:
      path: see `resolve`.
      dtype: of the computation.
      params: of the weights kept: those to be trained are float32; None leaves each tensor as it is stored.

    Raises:
      FileNotFoundError: nothing there, or an incomplete folder.
      ValueError: an unsupported architecture, or a tensor that is missing or has another shape; it is named.
    """
    place, gguf, (spec, read, names) = _open(path)
    state = assemble(spec, read, gguf, path, names, params)
    return Loaded(
        abstract(spec, jnp.dtype(dtype))[0],
        state,
        spec,
        ChatTokenizer.load(place),
        weights_hash(place),
    )


def look(path: str) -> tuple[ModelSpec, ChatTokenizer]:
    """The shape and the tokenizer of a model that `load` would take, as far as that shows without reading its numbers.

    Raises:
      FileNotFoundError: nothing there, or an incomplete folder.
      ValueError: an unsupported architecture, a missing tensor, or a tokenizer that cannot be used.
    """
    place, gguf, (spec, _, names) = _open(path)
    for name in _flat(nnx.to_pure_dict(abstract(spec)[1])):
        _stored_names(name, spec, gguf, path, names)
    return spec, ChatTokenizer.load(place)


def _open(path: str) -> tuple[str, bool, tuple[ModelSpec, Callable[[str], np.ndarray], set[str]]]:
    """Where a model is, whether it is a GGUF file, and its spec, reader and tensor names."""
    place = resolve(path)
    _files(place)
    gguf = os.path.isfile(place)
    return place, gguf, (_read_gguf if gguf else _read_folder)(Path(place))


def _stored_names(name: str, spec: ModelSpec, gguf: bool, path: str, names: set[str]) -> list[str]:
    """Stored tensors of a parameter, one per layer if it is stacked; all are among `names`, or `ValueError`."""
    source = _NAMES[name][gguf]
    stored = [source.format(i) for i in range(spec.layers)] if "{}" in source else [source]
    missing = [s for s in stored if s not in names]
    if missing:
        raise ValueError(
            f"{path} has no tensor {missing[0]!r}; its config.json does not describe its weights."
        )
    return stored


def assemble(
    spec: ModelSpec,
    read: Callable[[str], np.ndarray],
    gguf: bool,
    path: str,
    names: set[str],
    params: str | None = "float32",
) -> nnx.State:
    """Parameters of a decoder, host arrays, from a reader of stored tensors; see `load` for what is raised."""
    shapes = abstract(spec)[1]
    flat: dict[str, Any] = {}
    wanted = set()
    for name, leaf in _flat(nnx.to_pure_dict(shapes)).items():
        source = _NAMES[name][gguf]
        layers = _stored_names(name, spec, gguf, path, names)
        wanted |= set(layers)
        shape = leaf.shape[1:] if "{}" in source else leaf.shape
        tensors = [_shaped(read(s), name, shape, f"{s} of {path}") for s in layers]
        array = np.stack(tensors) if "{}" in source else tensors[0]
        flat[name] = array.astype(jnp.dtype(params or array.dtype), copy=False)
    unexpected = sorted(
        n
        for n in names - wanted
        if not n.endswith("rotary_emb.inv_freq") and not (spec.tied and n in _NAMES["head"])
    )
    if unexpected:
        raise ValueError(
            f"{path} holds {len(unexpected)} tensors that its config.json does not call for, "
            f"such as {unexpected[0]!r}."
        )
    blocks = {
        name.removeprefix("blocks."): array
        for name, array in flat.items()
        if name.startswith("blocks.")
    }
    tree = {name: array for name, array in flat.items() if not name.startswith("blocks.")} | {
        "blocks": blocks
    }
    nnx.replace_by_pure_dict(shapes, tree)
    return shapes


def _shaped(array: np.ndarray, name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    last = name.split(".")[-1]
    flat: tuple[int, ...]
    if last in _TRANSPOSED:
        array = array.T
        flat = (
            (int(np.prod(shape[:-1])), shape[-1])
            if last == "o"
            else (shape[0], int(np.prod(shape[1:])))
        )
    else:
        flat = shape
    if array.shape != flat:
        stored, wanted = (s[::-1] if last in _TRANSPOSED else s for s in (array.shape, flat))
        raise ValueError(
            f"Tensor {where} has the shape {stored}; its config.json calls for {wanted}."
        )
    return array.reshape(shape)


def export(
    state: nnx.State,
    spec: ModelSpec,
    text: ChatTokenizer,
    folder: str | os.PathLike[str],
    dtype: str = "float32",
) -> str:
    """Writes config.json, safetensors (with an index above 4 GiB) and the tokenizer; returns its `weights_hash`.

    `transformers` and vLLM load the folder as a `LlamaForCausalLM`.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in _flat(nnx.to_pure_dict(state)).items():
        target = _NAMES[name][0]
        array = np.asarray(jax.device_get(leaf)).astype(jnp.dtype(dtype))
        for i, part in enumerate(array if "{}" in target else [array]):
            tensors[target.format(i)] = _stored(part, name)
    config = spec_to_hf(spec) | {
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": list(text.end_ids),
        "bos_token_id": text.tokenizer.bos_token_id,
        "pad_token_id": text.tokenizer.pad_token_id,
    }
    (root / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = {key: config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    (root / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    _save(tensors, root)
    text.save(root)
    return weights_hash(str(root))


def _stored(array: np.ndarray, name: str) -> np.ndarray:
    """Our layout to the [out, in] that is stored: the first axis of q, k, v, gate, up, down and the last of o is D."""
    last = name.split(".")[-1]
    if last == "o":
        array = array.reshape(-1, array.shape[-1])
    elif last in _TRANSPOSED:
        array = array.reshape(array.shape[0], -1)
    return np.ascontiguousarray(array.T if last in _TRANSPOSED else array)


def write_tensors(tensors: dict[str, np.ndarray], path: Path, beside: Path) -> None:
    """A safetensors file that whoever may read the file `beside` may read."""
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, beside.stat().st_mode)  # safetensors makes it the owner's alone


def _save(tensors: dict[str, np.ndarray], root: Path) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
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
