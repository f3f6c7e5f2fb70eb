"""What a workspace holds, without what is time, so that two of them can be compared."""

import hashlib
import json
import os
import pathlib
import re
from typing import Any

# Seconds and rates, with the tokens that a rate is of, and the name under which one of several
# runners made what has two names in the study.
_TIME = re.compile(r".*seconds.*|.*per_second|tokens_steady|started|ended|digest|label")
_TABLE_OF_TIMES = re.compile(rb"<caption>Where the time went.*?</table>", re.DOTALL)
_PAGE = ("report.html", "summary.json")  # files with times in them
_CHECKPOINT = re.compile(r"(.*/checkpoints/step_\d+)/.*")


def contents(root: pathlib.Path) -> dict[str, Any]:
    """Every path of a workspace, with its content: a link's target, JSON, or a checksum.

    A checkpoint counts as one entry: Orbax gives its files random names.
    """
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = pathlib.Path(folder, name)
            key = path.relative_to(root).as_posix()
            if inside := _CHECKPOINT.fullmatch(key):
                found[inside[1]] = "checkpoint"
            elif path.is_symlink():
                found[key] = os.readlink(path)
            elif path.is_file():
                found[key] = _content(path, key, root)
            else:
                found.setdefault(key, "folder")
    return found


def _content(path: pathlib.Path, key: str, root: pathlib.Path) -> Any:
    data = path.read_bytes()
    if not key.endswith(".parquet"):  # The config of a page names its workspace.
        data = data.replace(os.fsencode(root), b"(workspace)")
    if path.name == "report.html":
        data = _TABLE_OF_TIMES.sub(b"", data)
    elif path.suffix == ".json" and "/policy/" not in key:
        try:
            return _timeless(json.loads(data), key)
        except ValueError:
            pass
    return hashlib.sha256(data).hexdigest()


def _timeless(value: Any, key: str) -> Any:
    """JSON without what is time, and without checksums of files that hold times."""
    if isinstance(value, list):
        return [_timeless(part, key) for part in value]
    if not isinstance(value, dict):
        return value
    if "files" in value:
        value = value | {"files": {k: v for k, v in value["files"].items() if k not in _PAGE}}
    if key.endswith("/summary.json"):  # "stages" says where the time went
        value = {k: v for k, v in value.items() if k != "stages"}
    return {k: _timeless(v, key) for k, v in value.items() if not _TIME.fullmatch(k)}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between two workspaces, a phrase for each path."""
    lines = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    lines += [f"{key} is left over" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            lines.append(f"{key} differs{_where(expected[key], found[key])}")
    return lines


def _where(a: Any, b: Any) -> str:
    """The first field in which two JSON values differ, as " at stats.rows: 1 and 2"."""
    path = []
    while isinstance(a, dict) and isinstance(b, dict):
        name = next(k for k in [*a, *b] if a.get(k) != b.get(k))
        path.append(name)
        a, b = a.get(name), b.get(name)
    return f" at {'.'.join(path)}: {str(a)[:60]} and {str(b)[:60]}" if path else ""
