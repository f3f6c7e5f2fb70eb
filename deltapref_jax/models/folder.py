"""Where the files of a model are, which of them define it, and the hash of their content.

Of a model on the hub the list of its files is read first, then its config and tokenizer are
fetched, and its weights only when they are needed (`resolve`).
"""

import fnmatch
import functools
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from deltapref_jax.files import local_copy, remote
from deltapref_jax.hub import Repository, repository
from deltapref_jax.text.gguf_file import gguf_parts
from deltapref_jax.text.template import named_end_ids

_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_INDEX = "model.safetensors.index.json"
_FETCHED_FIRST = (
    _INDEX,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that describe a model: all that its tokenizer and its spec need."""


def resolve(path: str, weights: bool = True) -> str:
    """Returns a local folder or file for `path`.

    A place like `organisation/model` or `organisation/model@revision` is fetched from the hub; a
    `gs://` path is copied.

    Args:
      path: of a model.
      weights: whether the weights of a model on the hub are fetched, or config and tokenizer alone.

    Raises:
      FileNotFoundError: `path` does not exist locally, on the hub or in the bucket.
      ValueError: the model's index is damaged.
    """
    if remote(path):
        return local_copy(path)
    repo = hub_repository(path)
    if repo is None:
        return path
    root = _fetch_description(repo)
    if weights:
        repo.fetch(weight_files(repo.files, root / _INDEX, repo.where, repo.remedy))
    return str(root)


def hub_repository(path: str) -> Repository | None:
    """The hub's repository that `path` names; None if it exists here or in a bucket.

    Raises:
      FileNotFoundError: there is nothing at `path`, here or on the hub.
    """
    if remote(path) or os.path.exists(path):
        return None
    name = re.fullmatch(r"([^/@.][^/@]*/[^/@]+)(?:@(.+))?", path)
    if name is None or path.endswith(".gguf"):
        raise FileNotFoundError(
            f"There is no model at {path}; give a Hugging Face folder, a hub name or a .gguf file."
        )
    return repository(name[1], name[2] or "", "model")


def unfetched(path: str) -> tuple[Repository, list[str]] | None:
    """The repository and the files of weights, where those are still on the hub.

    Raises:
      FileNotFoundError: there is nothing at `path`, or the repository holds no complete model.
      ValueError: the model's index is damaged.
    """
    repo = hub_repository(path)
    if repo is None:
        return None
    names = weight_files(repo.files, _fetch_description(repo) / _INDEX, repo.where, repo.remedy)
    return None if repo.has(names) else (repo, names)


def _fetch_description(repo: Repository) -> Path:
    """The local folder of a model on the hub, with its config, tokenizer and index."""
    has_weights = any(fnmatch.fnmatch(name, "*.safetensors*") for name in repo.files)
    if "config.json" not in repo.files or not has_weights:
        raise FileNotFoundError(
            f"{repo.where} has no {'config.json' if has_weights else 'safetensors'}; {repo.remedy}."
        )
    return repo.fetch(
        name
        for name in repo.files
        if any(fnmatch.fnmatch(name, pattern) for pattern in _FETCHED_FIRST)
        and not name.endswith(".safetensors")
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
    names = {file.name for file in root.glob("*.safetensors")}
    if not (root / "config.json").exists() or not (names or (root / _INDEX).exists()):
        raise FileNotFoundError(
            f"The folder {path} has no {'config.json' if names else 'safetensors'}; "
            "give a complete Hugging Face folder."
        )
    weights = weight_files(
        names, root / _INDEX, f"The folder {path}", "give a complete Hugging Face folder"
    )
    return [root / name for name in weights] + [
        root / name for name in _TEXT_FILES if (root / name).exists()
    ]


def weight_files(names: Collection[str], index: Path, where: str, remedy: str) -> list[str]:
    """Returns the names of the files that hold a model's weights, sorted.

    Args:
      names: of all files there are.
      index: of the shards; need not exist.
      where: the model, for messages.
      remedy: for a file that is not there.

    Raises:
      FileNotFoundError: the index names a file that is not there.
      ValueError: the index is damaged.
    """
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    # An index names the shards of the model, of which one can be missing after a broken download;
    # what lies beside them is a part of another save, a copy or an adapter.
    if index.exists():
        named = _indexed(index)
        for name in sorted(named - set(found)):
            raise FileNotFoundError(f"{where} has no {name}, which {index.name} names; {remedy}.")
        return [name for name in found if name in named]
    return ["model.safetensors"] if "model.safetensors" in found else found


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


def _content_hash(file: Path) -> str:
    stat = file.stat()
    return _file_hash(str(file), stat.st_size, stat.st_mtime_ns)


def weights_hash(path: str) -> str:
    """Returns 16 hex digits over weights, config and tokenizer, independent of their location.

    End tokens of generation_config.json are a part of it where config.json names others. Of a
    model on the hub the hashes of weights are the hub's own, so that they need not be fetched.

    Raises:
      FileNotFoundError: there is no model at `path`.
      ValueError: its index is damaged.
    """
    digest = hashlib.sha256()
    repo = hub_repository(path)
    if repo is None:
        root = Path(resolve(path))
        # A GGUF file has the same hash under any name, as a folder has.
        contents = [
            ("gguf" if file.suffix == ".gguf" else file.name, _content_hash(file))
            for file in model_files(str(root))
        ]
    else:
        root = _fetch_description(repo)
        names = weight_files(repo.files, root / _INDEX, repo.where, repo.remedy)
        names += [name for name in _TEXT_FILES if name in repo.files]
        contents = [(n, repo.files[n].sha256 or _content_hash(root / n)) for n in names]
    for name, content in contents:
        digest.update(f"{name} {content}\n".encode())
    if (root / "generation_config.json").exists():
        ends, others = (
            _end_ids_or_none(root / name) for name in ("generation_config.json", "config.json")
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
