"""Fields as their classes declare them: name, type, default and the comment above.

The dataclasses of `deltapref_jax/config.py` are the one place where a field is declared; the
documentation and `--help` are made from their source.
"""

import ast
import io
import pathlib
import re
import shutil
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from deltapref_jax import config


class Field(NamedTuple):
    """One field of a class."""

    name: str
    type: str  # as it is written
    default: str  # as it would be written in a config; "" where there is none
    comment: str
    hashed: bool


def classes(source: str) -> list[ast.ClassDef]:
    """The classes at the top level of a source file."""
    return [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def fields_of(class_: ast.ClassDef, source: str) -> list[Field]:
    """The annotated fields of a class of `source`, in their order."""
    comments, lines = _comments(source), source.splitlines()
    return [
        Field(
            node.target.id,
            ast.unparse(node.annotation),
            _default(node),
            _field_comment(node, comments, lines),
            "UNHASHED" not in ast.unparse(node),
        )
        for node in class_.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _comments(source: str) -> dict[int, str]:
    """Every comment of a source file by its line, without the number sign."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _field_comment(node: ast.AnnAssign, comments: dict[int, str], lines: list[str]) -> str:
    """The comment lines right above a field, and those on its own lines."""
    first = node.lineno
    while first > 1 and lines[first - 2].strip().startswith("#"):
        first -= 1
    end = node.end_lineno or node.lineno
    return " ".join(comments[i] for i in range(first, end + 1) if i in comments)


def _default(node: ast.AnnAssign) -> str:
    value = node.value
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given:
            value = given["default"]
        else:
            factory = given["default_factory"]
            value = factory.body if isinstance(factory, ast.Lambda) else factory
            text = ast.unparse(value) + "()" * (not isinstance(value, ast.Call))
            return text.replace("'", '"')
    return ast.unparse(value).replace("'", '"') if value is not None else ""


def config_help(root: type) -> str:
    """Every field of a config as the flag that sets it, for `--help`.

    Args:
      root: the class that get_config() returns, such as `config.Experiment`.
    """
    source = pathlib.Path(config.__file__).read_text(encoding="utf-8")
    by_class = {class_.name: fields_of(class_, source) for class_ in classes(source)}
    width = min(shutil.get_terminal_size().columns, 100)
    wrapper = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False)
    wrapper.break_on_hyphens = False
    introduction = wrapper.fill(
        f"Fields of the config, {root.__name__}, as --FIELD=DEFAULT (type): meaning. NAME stands "
        "for the name of an item, as in --config.generators[weak].temperature=0.7, or for its "
        "number, from 0."
    )
    wrapper.initial_indent, wrapper.subsequent_indent = "  ", "      "
    lines = [wrapper.fill(line) for line in _flag_lines("--config", root.__name__, by_class, {})]
    return "\n".join([introduction, "", *lines, ""])


def _flag_lines(
    path: str, class_: str, by_class: Mapping[str, list[Field]], listed: dict[str, str]
) -> Iterator[str]:
    """A line per field; of a class that was listed before, one line says where."""
    listed[class_] = path
    for field in by_class[class_]:
        inner = f"{path}.{field.name}"
        part = next((name for name in re.findall(r"\w+", field.type) if name in by_class), None)
        if part is None:
            yield f"{inner}={field.default} ({field.type}): {_with_choices(field.comment)}"
            continue
        if field.type.startswith("tuple"):
            # What an item is called is its first field; a hub data set's name is its subset's.
            named = by_class[part][0].name == "name"
            inner += "[NAME]" if named else "[0]"
        if part in listed:
            names = ", ".join(f".{each.name}" for each in by_class[part])
            yield f"{inner} has {names}, as {listed[part]}: {field.comment}"
        else:
            yield from _flag_lines(inner, part, by_class, listed)


def _with_choices(comment: str) -> str:
    """A comment with the values of a constant instead of its name, such as "One of KEEPS."."""

    def values(match: re.Match[str]) -> str:
        value = getattr(config, match[0], None)
        return ", ".join(map(repr, value)) if isinstance(value, tuple | dict) else match[0]

    return re.sub(r"\b[A-Z_]{4,}\b", values, comment)
