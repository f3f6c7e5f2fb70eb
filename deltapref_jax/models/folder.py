"""Where the files of a model are, which of them define it, and the hash of their content."""

import functools
import hashlib
import json
import os
from pathlib import Path

from deltapref_jax.files import local_copy, remote
from deltapref_jax.text.gguf_file import gguf_parts
from deltapref_jax.text.template import named_end_ids

_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def resolve(path: str) -> str:
    """Returns a local folder or file for `path`.

    A name like `organisation/model` is downloaded from the hub; a `gs://` path is copied.

    Raises:
      FileNotFoundError: `path` does not exist locally, on the hub or in the bucket.
    """
    if remote(path):
        return local_copy(path)
    if os.path.exists(path):
        return path
    if path.count("/") == 1 and not path.startswith((".", "/")) and not path.endswith(".gguf"):
        from huggingface_hub import snapshot_download

        try:
            # Weights in other formats than safetensors are not fetched: a repository may hold both.
            return snapshot_download(
                path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
            )
        # The hub's client raises dozens of types; all of them mean that the model is not available.
        except Exception as e:
            raise FileNotFoundError(
                f"The hub did not give {path!r} ({type(e).__name__}) and there is no such folder; "
                "give a local Hugging Face folder or a .gguf file."
            ) from e
    raise FileNotFoundError(
        f"There is no model at {path}; give a Hugging Face folder, a hub name or a .gguf file."
    )


def model_files(path: str) -> list[Path]:
    """Returns the files that define a model: its weights, its config and its tokenizer.

    Raises:
      FileNotFoundError: a Hugging Face folder or a split GGUF file is incomplete.
    """
    root = Path(path)
    # A single file is a GGUF file, which holds its config and tokenizer too, or one of its parts.
    if root.is_file():
        return [Path(part) for part in gguf_parts(path)]
    weights = sorted(root.glob("*.safetensors"))
    index = root / "model.safetensors.index.json"
    if not (root / "config.json").exists() or not (weights or index.exists()):
        raise FileNotFoundError(
            f"The folder {path} has no {'config.json' if weights else 'safetensors'}; "
            "give a complete Hugging Face folder."
        )
    # An index names the shards of the model, of which one can be missing after a broken download;
    # what lies beside them is a part of another save, a copy or an adapter.
    if index.exists():
        named = _indexed(index)
        for name in sorted(named - {file.name for file in weights}):
            raise FileNotFoundError(
                f"The folder {path} has no {name}, which {index.name} names; "
                "give a complete Hugging Face folder."
            )
        weights = [file for file in weights if file.name in named]
    elif (root / "model.safetensors").exists():
        weights = [root / "model.safetensors"]
    return weights + [root / name for name in _TEXT_FILES if (root / name).exists()]


def _indexed(index: Path) -> set[str]:
    """Returns the names of the files that an index of shards names.

    Raises:
      ValueError: the index is damaged.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("weight_map names something that is no file beside it")
    except Exception as e:  # json, text and lookup raise different types
        raise ValueError(
            f"The index {index} cannot be read ({type(e).__name__}: {e}); fetch it again."
        ) from e
    return names


@functools.lru_cache(maxsize=256)
def _file_hash(path: str, size: int, mtime: int) -> str:
    """Hashes a file; size and time of modification are keys of the cache."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(path: str) -> str:
    """Returns 16 hex digits over weights, config and tokenizer, independent of their location.

    End tokens of generation_config.json are a part of it where config.json names others.

    Raises:
      FileNotFoundError: there is no model at `path`.
      ValueError: its index is damaged.
    """
    digest = hashlib.sha256()
    root = resolve(path)
    for file in model_files(root):
        stat = file.stat()
        # A GGUF file has the same hash under any name, as a folder has.
        name = "gguf" if file.suffix == ".gguf" else file.name
        digest.update(f"{name} {_file_hash(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    if (Path(root) / "generation_config.json").exists():
        ends, others = (
            _end_ids_or_none(Path(root) / name)
            for name in ("generation_config.json", "config.json")
        )
        if ends != others:
            digest.update(f"end tokens {ends}\n".encode())
    return digest.hexdigest()[:16]


def _end_ids_or_none(file: Path) -> list[int] | None:
    """The end tokens that a file names; None of a damaged one, which loading refuses."""
    try:
        return named_end_ids(file)
    except ValueError:
        return None
