"""Writes a decoder as a Hugging Face folder of its own family."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from deltapref_jax.models.config_json import portable, spec_to_hf
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.stored import places, to_stored
from deltapref_jax.text.template import ChatTokenizer

_SHARD_BYTES = 4 << 30
"""A file of safetensors is at most this large, unless one tensor is larger."""


def export(
    state: nnx.State,
    spec: ModelSpec,
    text: ChatTokenizer,
    folder: str | os.PathLike[str],
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> str:
    """Writes a Hugging Face folder and returns its `weights_hash`.

    The folder holds config.json, generation_config.json, safetensors (with an index above 4 GiB)
    and the tokenizer; `transformers` and vLLM load it as a model of its own family.

    Args:
      state: parameters of a decoder without adapters.
      spec: its sizes.
      text: its tokenizer and chat template.
      folder: is created if it does not exist.
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
    # Samplers such as that of `transformers` take their end tokens from this file.
    (root / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    text.save(root)
    return weights_hash(str(root))


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
    tensors: dict[str, list[np.ndarray]] = {}  # the rows of a tensor, one parameter's each
    flat = nnx.to_pure_dict(state)
    found = places(spec, gguf=False)
    for name, p in parameters(spec).items():
        leaf = flat["blocks"][p.short] if p.stacked else flat[name]
        array = np.asarray(jax.device_get(leaf)).astype(jnp.dtype(dtype))
        for place, part in zip(found[name], array if p.stacked else [array], strict=True):
            for tensor, piece in zip(place.tensors, part if p.batch else [part], strict=True):
                tensors.setdefault(tensor, []).append(to_stored(piece, p, spec))
    fields = portable(config) if config is not None else spec_to_hf(spec)
    fields |= {"dtype": dtype, "torch_dtype": dtype, **(ids or {})}
    (root / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    _save(
        {
            name: rows[0] if len(rows) == 1 else np.concatenate(rows)
            for name, rows in tensors.items()
        },
        root,
    )


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
