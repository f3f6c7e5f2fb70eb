"""Data sets of the `datasets` library: on the hub at one commit, or in a folder here."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltapref_jax.config import ConfigError, Pairs, Prompts, check_choice
from deltapref_jax.files import content_hash, local_copy
from deltapref_jax.hub import Repository, repository


def on_hub(source: Pairs | Prompts) -> bool:
    """Whether the path of a data set is a name on the hub: there is nothing at it here."""
    return bool(source.path) and not os.path.exists(local_copy(source.path))


def content_of(source: Pairs | Prompts) -> str:
    """What a data set holds, for keys: the hash of its files, or its name and commit on the hub.

    A subset is a part of the content. On the hub, subset and split are looked up; no data is
    fetched.

    Raises:
      FileNotFoundError: the hub does not give the data set.
      ConfigError: it has no such subset or split, or several subsets and none is named; or what
        is on this machine has no revisions or subsets and one is named.
    """
    if on_hub(source):
        repo = repository(source.path, source.revision, "dataset")
        if not _offline(repo):
            with _one_sentence(source):
                _check_split(source, _builder(source, repo))
        content = f"{source.path}@{repo.commit}"
    else:
        path = Path(local_copy(source.path))
        one_subset = path.is_file() or _saved(path)
        for field, value in (("revision", source.revision), ("name", one_subset and source.name)):
            if value:
                raise ConfigError(
                    f"{field} of the data {source.path} is {value!r}, and it is on this machine, "
                    f"where it has no {field}; leave the field empty."
                )
        content = content_hash(path)
    return f"{content} {source.name}" if source.name else content


def load_split(source: Pairs | Prompts) -> Any:
    """Loads a split of a data set on the hub, or in a folder (of data files, or saved there).

    Raises:
      FileNotFoundError: the hub does not give the data set.
      ConfigError: the data set cannot be loaded.
    """
    import datasets

    if on_hub(source):
        repo = repository(source.path, source.revision, "dataset")
        if _offline(repo):
            return _cached_split(source, repo)
        with _one_sentence(source):
            builder = _builder(source, repo)
            builder.download_and_prepare()
            return builder.as_dataset(split=source.split)
    folder = Path(local_copy(source.path))
    with _one_sentence(source):
        if not _saved(folder):
            return datasets.load_dataset(str(folder), source.name or None, split=source.split)
        data = datasets.load_from_disk(str(folder))
        return data[source.split] if isinstance(data, dict) else data


def _saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _offline(repo: Repository) -> bool:
    """Whether a data set is read from the cache; HF_DATASETS_OFFLINE is a switch of its own."""
    import datasets

    return repo.offline or bool(datasets.config.HF_HUB_OFFLINE)


def _builder(source: Pairs | Prompts, repo: Repository) -> Any:
    """The library's description of a data set on the hub.

    Raises:
      ConfigError: it has no such subset, or several and none is named.
      ConnectionError: the hub does not give it.
    """
    import datasets

    subset = source.name or None
    try:
        builder = datasets.load_dataset_builder(source.path, subset, revision=repo.commit)
        # Where the hub does not answer, the library takes what it has of any other commit.
        if builder.hash != repo.commit:
            raise ConnectionError(f"the hub does not give the commit {repo.commit}")
        return builder
    except ValueError:  # also of data files that cannot be read
        subsets = datasets.get_dataset_config_names(source.path, revision=repo.commit)
        if source.name in subsets or len(subsets) == 1 and not source.name:
            raise
        check_choice(f"The subset (name) of the data set {source.path}", source.name, subsets)
        raise


def _check_split(source: Pairs | Prompts, builder: Any) -> None:
    files = builder.config.data_files
    # A split can be written as parts of several, such as train[:100]+test.
    for part in source.split.split("+") if files else ():
        split = part.split("[")[0].strip()
        if split != "all":
            check_choice(f"The split of the data set {source.path}", split, map(str, files))


def _cached_split(source: Pairs | Prompts, repo: Repository) -> Any:
    """A split that was loaded from the hub before, at the same commit.

    The library itself would give the newest that it has, of whatever commit.

    Raises:
      FileNotFoundError: it was not loaded before.
      ConfigError: several subsets were, and none is named.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *organisation, name = source.path.split("/")
    folder = "___".join([*organisation, camelcase_to_snakecase(name)])
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / folder
    found = sorted(root.glob(f"{source.name or '*'}/*/{repo.commit}"))
    if not found:
        raise FileNotFoundError(
            f"{repo.where} has no data, and HF_HUB_OFFLINE is set; unset it to fetch the data."
        )
    if len(found) > 1:
        subsets = [path.parts[-3] for path in found]
        check_choice(f"The subset (name) of the data set {source.path}", source.name, subsets)
    subset, version, commit = found[0].parts[-3:]
    with _one_sentence(source):
        return Cache(
            repo_id=source.path, dataset_name=name, config_name=subset, version=version, hash=commit
        ).as_dataset(split=source.split)


@contextlib.contextmanager
def _one_sentence(source: Pairs | Prompts) -> Iterator[None]:
    """Turns the exceptions of the `datasets` library, which are of dozens of types, into one.

    Raises:
      ConfigError: for any of them.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise ConfigError(
            f"The data set {source.path!r} (split {source.split!r}) cannot be loaded ({reason}); "
            "check name, split and connection, or give a local folder."
        ) from e
