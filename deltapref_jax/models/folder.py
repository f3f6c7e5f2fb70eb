"""Where the files of a model are, which of them define it, and the hash of their content.

Of a model on the hub the list of its files is read first, then its config and tokenizer are
fetched, and its weights only when they are needed (`resolve`). The weights of a folder in a bucket
stay there, and are read there by ranges of bytes.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from deltapref_jax.files import bucket_objects, local_copy, remote
from deltapref_jax.hub import Repository, repository
from deltapref_jax.models.content import bucket_content, local_content
from deltapref_jax.models.host_arrays import not_finite
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
OTHER_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""Tensors of a model that reads images too, which have no part in its text."""
ROTARY = "rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints hold, and that nothing reads."""


def resolve(path: str, weights: bool = True) -> str:
    """Returns a local folder or file for `path`.

    A place like `organisation/model` or `organisation/model@revision` is fetched from the hub. Of a
    folder at a `gs://` path config, tokenizer and index are copied; a file there is copied whole.

    Args:
      path: of a model.
      weights: whether the weights of a model on the hub are fetched, or config and tokenizer alone.

    Raises:
      FileNotFoundError: `path` does not exist locally, on the hub or in the bucket.
      ValueError: the model's index is damaged.
    """
    if remote(path):
        return local_copy(path, lambda name: not name or _describes(name))
    repo = hub_repository(path)
    if repo is None:
        return path
    root = _fetch_description(repo, weights)
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


def has_weights(path: str) -> bool:
    """Whether there are weights at `path`, besides a config.json that describes them.

    Raises:
      FileNotFoundError: there is nothing at `path`, or not even a config.json.
    """
    repo = hub_repository(path)
    names: Collection[str]
    if repo:
        names = repo.files
    elif remote(path):
        names = bucket_objects(path)
    else:
        names = [""] if os.path.isfile(path) else os.listdir(path)
    if "" in names:  # `path` is a file
        return True
    if any(fnmatch.fnmatch(name, "*.safetensors*") for name in names):
        return True
    where = repo.where if repo else f"The folder {path}"
    if "config.json" not in names:
        raise FileNotFoundError(f"{where} has no config.json; give a model, or a config.json.")
    _check_pickles(names, where)
    return False


def _check_pickles(names: Collection[str], where: str) -> None:
    """Refuses weights that are pickles alone.

    Raises:
      FileNotFoundError: there is one among `names`.
    """
    for name in sorted(names):
        if fnmatch.fnmatch(name, "pytorch_model*.bin") or name.endswith((".pth", ".ckpt")):
            raise FileNotFoundError(
                f"{where} has no safetensors, and {name} is a pickle, which can run code as it is "
                "read; convert it with save_pretrained of transformers, which writes safetensors."
            )


def planned_hash(path: str) -> str:
    """`weights_hash`, or for a model without weights a hash of where it is and of its config.json.

    It tells models of a plan apart, and is no key of anything that is made.

    Raises:
      FileNotFoundError: see `has_weights`.
      ValueError: see `weights_hash`.
    """
    if has_weights(path):
        return weights_hash(path)
    config = (Path(resolve(path, weights=False)) / "config.json").read_bytes()
    return hashlib.sha256(f"{path}\n".encode() + config).hexdigest()[:16]


def _fetch_description(repo: Repository, weights: bool = True) -> Path:
    """The local folder of a model on the hub, with its config, tokenizer and index.

    Raises:
      FileNotFoundError: it has no config.json, or no weights where `weights` are wanted.
    """
    there = any(fnmatch.fnmatch(name, "*.safetensors*") for name in repo.files)
    if "config.json" not in repo.files or weights and not there:
        _check_pickles(() if there else repo.files, repo.where)
        raise FileNotFoundError(
            f"{repo.where} has no {'config.json' if there else 'safetensors'}; {repo.remedy}."
        )
    return repo.fetch(name for name in repo.files if _describes(name))


def _describes(name: str) -> bool:
    """Whether a file of a model is config, tokenizer or index, by its name."""
    described = any(fnmatch.fnmatch(name, pattern) for pattern in _FETCHED_FIRST)
    return described and not name.endswith(".safetensors")


def model_files(path: str) -> list[str]:
    """Returns the files that define a model: its weights, its config and its tokenizer.

    Args:
      path: a local path, or `gs://`; a folder's weights are where it is, and its other files here.

    Raises:
      FileNotFoundError: a Hugging Face folder or a split GGUF file is incomplete.
    """
    root = Path(resolve(path) if remote(path) else path)
    # A single file is a GGUF file, which holds its config and tokenizer too, or one of its parts.
    if root.is_file():
        return gguf_parts(str(root))
    there = bucket_objects(path) if remote(path) else os.listdir(root) if root.is_dir() else ()
    names = any(name.endswith(".safetensors") for name in there)
    if not (root / "config.json").exists() or not (names or (root / _INDEX).exists()):
        _check_pickles(() if names else there, f"The folder {path}")
        raise FileNotFoundError(
            f"The folder {path} has no {'config.json' if names else 'safetensors'}; "
            "give a complete Hugging Face folder."
        )
    weights = weight_files(
        there, root / _INDEX, f"The folder {path}", "give a complete Hugging Face folder"
    )
    return [f"{path.rstrip('/')}/{name}" for name in weights] + [
        str(root / name) for name in _TEXT_FILES if (root / name).exists()
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
      ValueError: the index is damaged, or the files are those of two models, or of an adapter.
    """
    if "adapter_config.json" in names:
        raise ValueError(
            f"{where} has an adapter_config.json, and transformers computes with that adapter, "
            "which is not read here; merge it into the weights, or move it to a folder of its own."
        )
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    # An index names the shards of the model, of which one can be missing after a broken download;
    # what lies beside them is a part of another save, a copy or an adapter.
    if index.exists():
        named = set(indexed(index).values())
        if "model.safetensors" in found and named != {"model.safetensors"}:
            raise ValueError(
                f"{where} has model.safetensors and {index.name}, which transformers does not "
                "read beside it; remove the one that is not the model's."
            )
        for name in sorted(named - set(found)):
            raise FileNotFoundError(f"{where} has no {name}, which {index.name} names; {remedy}.")
        return [name for name in found if name in named]
    return ["model.safetensors"] if "model.safetensors" in found else found


def indexed(index: Path) -> dict[str, str]:
    """Returns the name of the file of every tensor that an index of shards names.

    Raises:
      ValueError: the index is damaged.
    """
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
        if not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ValueError("weight_map names something that is no file beside it")
    except Exception as e:  # json, text and lookup raise different types
        raise ValueError(
            f"The index {index} cannot be read ({type(e).__name__}: {e}); fetch it again."
        ) from e
    return files


def check_index(folder: Path, where: str, headers: Mapping[str, Collection[str]]) -> None:
    """Compares an index, if there is one, with the tensors of the shards.

    Args:
      folder: holds the index.
      where: the model, for messages.
      headers: names of the tensors of every file that the index names.

    Raises:
      ValueError: it leaves a tensor out, or names another file than the tensor's.
    """
    if not headers or not (folder / _INDEX).exists():
        return
    named = indexed(folder / _INDEX)
    owners = {tensor: file for file, tensors in headers.items() for tensor in tensors}
    for tensor in sorted(named.keys() | owners.keys()):
        said, owner = named.get(tensor, "no file"), owners.get(tensor, "no file")
        if said != owner and not tensor.endswith(ROTARY):
            raise ValueError(
                f"Tensor {tensor} of {where} is in {owner}, and {_INDEX} says in {said}; fetch the "
                "model again."
            )


def weights_hash(path: str) -> str:
    """Returns 16 hex digits over weights, config and tokenizer, independent of their location.

    End tokens of generation_config.json are a part of it where config.json names others. Weights
    are read once in a program, and checked for NaN and infinity as they are. Of a model on the hub
    the hashes of weights are the hub's own, so that they need not be fetched.

    Raises:
      FileNotFoundError: there is no model at `path`.
      ValueError: its index is damaged, or a tensor holds NaN or infinity.
    """
    digest = hashlib.sha256()
    repo = hub_repository(path)
    if repo is None:
        root = Path(resolve(path))
        # A GGUF file has the same hash under any name, as a folder has.
        contents = [
            ("gguf" if file.endswith(".gguf") else os.path.basename(file), _finite_hash(file, path))
            for file in model_files(path)
        ]
    else:
        root = _fetch_description(repo)
        names = weight_files(repo.files, root / _INDEX, repo.where, repo.remedy)
        names += [name for name in _TEXT_FILES if name in repo.files]
        contents = [(n, repo.files[n].sha256 or local_content(root / n).sha256) for n in names]
    for name, content in contents:
        digest.update(f"{name} {content}\n".encode())
    if (root / "generation_config.json").exists():
        ends, others = (
            _end_ids_or_none(root / name) for name in ("generation_config.json", "config.json")
        )
        if ends != others:
            digest.update(f"end tokens {ends}\n".encode())
    return digest.hexdigest()[:16]


def _finite_hash(file: str, path: str) -> str:
    """The SHA-256 of a file of the model at `path`, whose numbers must be finite.

    Raises:
      ValueError: a tensor that is read holds NaN or infinity.
    """
    if remote(file):
        content = bucket_content(file, bucket_objects(file)[""])
    else:
        content = local_content(file)
    for tensor in content.not_finite:
        if not tensor.startswith(OTHER_PARTS) and not tensor.endswith(ROTARY):
            where = path if file.endswith(".gguf") else f"{os.path.basename(file)} of {path}"
            raise ValueError(not_finite(tensor, where))
    return content.sha256


def _end_ids_or_none(file: Path) -> list[int] | None:
    """The end tokens that a file names; None of a damaged one, which loading refuses."""
    try:
        return named_end_ids(file)
    except ValueError:
        return None
