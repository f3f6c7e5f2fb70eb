"""Repositories of the Hugging Face hub: what a commit holds, and local copies of its files.

The list of a repository's files comes first, with the hub's own hashes, and files are fetched one
by one when they are needed. Copies are in the hub library's cache; with HF_HUB_OFFLINE=1 they are
all that is used.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from etils import epath

from deltapref_jax.files import ArtifactError, file_sha256, is_unwritable, write_atomic
from deltapref_jax.progress import log

Kind = Literal["model", "dataset"]

_ANSWER_SECONDS = 10.0
_LARGE_BYTES = 50_000_000
"""Downloads above this size are announced, because they take a while."""


class HubFile(NamedTuple):
    """A file of a repository."""

    size: int  # in bytes
    sha256: str  # of its content, where the hub stores it by that hash (LFS); otherwise ""


class Repository:
    """A repository of the hub at one commit.

    Attributes:
      name: `organisation/name`.
      kind: "model" or "dataset".
      commit: 40 hex digits.
      files: all files by their path; offline, those that have been fetched.
      offline: whether only what has been fetched can be used.
    """

    def __init__(self, name: str, kind: Kind, commit: str, files: Mapping[str, HubFile] | None):
        self.name, self.kind, self.commit = name, kind, commit
        self._folder = _cache_folder(name, kind) / "snapshots" / commit
        self.offline = files is None
        self.files = _fetched(self._folder) if files is None else files

    @property
    def where(self) -> str:
        """What is looked at, for messages."""
        place = f"{_word(self.kind)} {self.name} at {self.commit[:12]}"
        return f"The cached copy of the {place}" if self.offline else f"The hub's {place}"

    @property
    def remedy(self) -> str:
        """What to do about a file that the repository lacks, for messages."""
        if self.offline:
            return "unset HF_HUB_OFFLINE to fetch it"
        return "choose a repository that is complete"

    def has(self, names: Iterable[str]) -> bool:
        """Whether all these files have been fetched."""
        return all((self._folder / name).exists() for name in names)

    def fetch(self, names: Iterable[str]) -> Path:
        """Returns the local folder of the commit, after fetching what it lacks of `names`.

        Raises:
          FileNotFoundError: the hub does not give a file, or there is no room for it.
        """
        missing = [name for name in names if not self.has([name])]
        size = sum(self.files[name].size for name in missing)
        if size > _LARGE_BYTES:
            log(f"Fetching {len(missing)} files of {self.name}, {size / 1e9:.2f} GB.", always=True)
        for name in missing:
            self._download(name)
        return self._folder

    def tensors(self, name: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yields name, dtype and shape of every tensor of a safetensors file, from its header.

        Raises:
          FileNotFoundError: the hub does not give the header.
        """
        from huggingface_hub import HfApi

        with _hub_errors(self.name, self.kind, self.commit):
            header = HfApi().parse_safetensors_file_metadata(
                self.name, name, revision=self.commit, timeout=_ANSWER_SECONDS
            )
        for tensor, info in header.tensors.items():
            yield tensor, info.dtype, tuple(info.shape)

    def _download(self, name: str) -> None:
        from huggingface_hub import hf_hub_download

        with _hub_errors(self.name, self.kind, self.commit):
            copy = hf_hub_download(self.name, name, repo_type=self.kind, revision=self.commit)
        # The library compares sizes only, and a proxy or a disk can change content of equal size.
        wanted = self.files[name].sha256
        if wanted and file_sha256(epath.Path(copy)) != wanted:
            os.unlink(os.path.realpath(copy))
            raise FileNotFoundError(
                f"{name} of {self.name} arrived with another content than the hub has; it has "
                "been removed: run the same command again."
            )


@functools.cache
def repository(name: str, revision: str, kind: Kind) -> Repository:
    """What the hub has; a branch stands for one commit as long as the program runs.

    Args:
      name: `organisation/name`.
      revision: branch, tag or commit; "" is the default branch.
      kind: of the repository.

    Raises:
      FileNotFoundError: the hub has no such repository or revision, does not show it to this
        machine, or does not answer within seconds; offline, nothing of it has been fetched.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return _cached_repository(name, revision, kind)
    with _hub_errors(name, kind, revision):
        info: Any = HfApi().repo_info(
            name,
            repo_type=kind,
            revision=revision or None,
            files_metadata=True,
            timeout=_ANSWER_SECONDS,
        )
    files = {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else "")
        for file in info.siblings
    }
    _remember(name, kind, revision, info.sha)
    return Repository(name, kind, info.sha, files)


def _cache_folder(name: str, kind: Kind) -> Path:
    """A repository's folder in the library's cache, whose layout is documented.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _fetched(folder: Path) -> dict[str, HubFile]:
    """Files of a commit in the cache; they are links into a folder of contents."""
    files = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return {
        file.relative_to(folder).as_posix(): HubFile(file.stat().st_size, "")
        for file in files
        if file.exists()
    }


def _remember(name: str, kind: Kind, revision: str, commit: str) -> None:
    """Notes the commit of a branch or tag in the cache, so that it can be used offline."""
    note = _cache_folder(name, kind) / "refs" / (revision or "main")
    if revision == commit or (note.is_file() and note.read_text() == commit):
        return
    # A cache that cannot be written serves what it has; a download into it has its own sentence.
    with contextlib.suppress(OSError, ArtifactError):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(epath.Path(note), commit.encode())


def _cached_repository(name: str, revision: str, kind: Kind) -> Repository:
    """What has been fetched of a repository.

    Raises:
      FileNotFoundError: nothing has been fetched of that revision.
    """
    folder = _cache_folder(name, kind)
    note = folder / "refs" / (revision or "main")
    commit = note.read_text().strip() if note.is_file() else revision
    if not note.is_file() and not (commit and (folder / "snapshots" / commit).is_dir()):
        at = f" at {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"Nothing of the hub's {_word(kind)} {name!r}{at} is in this machine's cache, and "
            "HF_HUB_OFFLINE is set; unset it to fetch it, or give a folder or file that exists."
        )
    return Repository(name, kind, commit, None)


def _word(kind: Kind) -> str:
    return "data set" if kind == "dataset" else kind


@contextlib.contextmanager
def _hub_errors(name: str, kind: Kind, revision: str) -> Iterator[None]:
    """Turns every exception of the hub's client into one sentence.

    Raises:
      FileNotFoundError: for any of them.
    """
    try:
        yield
    # The client raises dozens of types, of its own and of the HTTP library of its version.
    except Exception as e:
        _refuse(e, name, kind, revision)


def _refuse(e: Exception, name: str, kind: Kind, revision: str) -> NoReturn:
    from huggingface_hub import constants, errors

    # This is how the library says that neither the hub nor its cache gives a file.
    if isinstance(e, errors.LocalEntryNotFoundError) and isinstance(e.__cause__, Exception):
        e = e.__cause__
    what = f"{_word(kind)} {name!r}"
    status = getattr(getattr(e, "response", None), "status_code", None)
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    if isinstance(e, errors.GatedRepoError):
        sentence = (
            f"The hub's {what} is gated; accept its terms on its page, and set HF_TOKEN to a token "
            "of that account."
        )
    elif isinstance(e, errors.RevisionNotFoundError):
        sentence = (
            f"The hub's {what} has no revision {revision!r}; give a branch, a tag or a whole "
            "commit, or leave revision empty."
        )
    # The hub does not tell a repository that is missing from one that the token may not see.
    elif status in (401, 403) or isinstance(
        e, errors.RepositoryNotFoundError | errors.HFValidationError
    ):
        sentence = (
            f"The hub has no {what} that this machine may see, and there is no such file or "
            "folder here; check the name, or set HF_TOKEN to a token that may read it."
        )
    elif is_unwritable(e):
        sentence = (
            f"There is no room for {name} in {constants.HF_HUB_CACHE} ({reason}); make room, or "
            "set HF_HOME to another folder."
        )
    elif isinstance(e, errors.EntryNotFoundError) and status is not None:
        sentence = f"The hub's {what} lacks a file that it lists ({reason}); give another revision."
    elif status is not None:
        sentence = (
            f"The hub answers with status {status} for the {what}; run the same command again "
            "later, or give a local folder."
        )
    elif isinstance(e, errors.SafetensorsParsingError):
        sentence = f"A safetensors file of the hub's {what} is damaged ({reason}); choose another."
    else:
        sentence = (
            f"The hub at {constants.ENDPOINT} cannot be reached for the {what} "
            f"({type(e).__name__}), and there is no such file or folder here; check "
            "the name and this machine's connection, or set HF_HUB_OFFLINE=1 to use what was "
            "fetched before."
        )
    raise FileNotFoundError(sentence) from e
