"""The licence that a model's own files state."""

from pathlib import Path

from deltapref_jax.files import local_copy, remote
from deltapref_jax.models.folder import hub_repository

NOT_STATED = "not stated"
_CARD = "README.md"
_TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


def licence(place: str) -> str:
    """What a model's README.md has as `license`, else the title of its LICENSE file.

    Args:
      place: a folder, a file in one, a name on the hub, or a folder in a bucket.

    Returns:
      the licence's name with the file that states it, or that no file does.

    Raises:
      FileNotFoundError: there is no such model, or the hub does not give a file of it.
    """
    names = (_CARD, *_TEXTS)
    repo = hub_repository(place)
    if repo is not None:
        folder = repo.fetch([name for name in names if name in repo.files])
    elif not remote(place):
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
    elif place.endswith(".gguf"):
        return NOT_STATED
    else:
        folder = Path(local_copy(place, lambda name: name in (*names, "config.json")))
    found = [_of_card(folder / _CARD), *(_of_text(folder / name) for name in _TEXTS)]
    missing = "not known: the hub is offline" if repo and repo.offline else NOT_STATED
    return next(filter(None, found), missing)


def _of_card(file: Path) -> str:
    """The `license` of a model card's metadata, with `license_name` where it is "other"."""
    from huggingface_hub import metadata_load

    if not file.is_file():
        return ""
    try:
        metadata = metadata_load(file) or {}
    except Exception:  # the library raises several types for a front matter that is no YAML
        return ""
    named = [metadata.get(key) for key in ("license", "license_name")]
    found = [str(name) for name in named if isinstance(name, str) and name.strip()]
    return f"{', '.join(found)} ({_CARD})" if found else ""


def _of_text(file: Path) -> str:
    """The first line of a licence's text."""
    if not file.is_file():
        return ""
    lines = (line.strip() for line in file.read_text(errors="replace").splitlines())
    first = next(filter(None, lines), "")
    return f"{first[:100]} ({file.name})" if first else ""
