"""Imports point one way: a part of the package imports only parts in earlier rows."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = [
    {"config", "display"},
    {"callables", "cluster"},
    {"jax_job"},
    {"records", "progress", "processes", "validation"},
    {"files", "devices"},
    {"artifacts", "hub", "mesh", "preemption"},
    {"models", "text", "data", "answers", "synthetic"},
    {"scoring"},
    {"sampling", "judging", "pairs", "training", "analysis"},
    {"stages"},
]
ROW = {name: i for i, names in enumerate(ROWS) for name in names}
ALLOWED = {
    ("models", "text"),  # a model is loaded with its tokenizer
    ("data", "synthetic"),  # the world is a source of prompts
    ("data", "text"),  # preference data is read as tokens
}


def imported(path):
    """Yields the full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges():
    """Yields (file, the part of the package that it is in, a part that it imports)."""
    for path in sorted((ROOT / "deltapref_jax").rglob("*.py")):
        inside = path.relative_to(ROOT / "deltapref_jax").parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if (
                parts[0] == "deltapref_jax"
                and len(parts) > 1
                and parts[1] != inside
                and parts[1] in ROW
            ):
                yield path, inside, parts[1]


def test_every_part_of_the_package_has_its_row():
    parts = {
        p.name.removesuffix(".py")
        for p in (ROOT / "deltapref_jax").iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    } - {"__init__"}
    assert parts == set(ROW)


def test_imports_point_to_earlier_rows():
    wrong = [
        f"{path.relative_to(ROOT)} imports {to}"
        for path, at, to in edges()
        if ROW[to] >= ROW[at] and (at, to) not in ALLOWED
    ]
    assert wrong == []


def test_exceptions_are_used():
    assert {(at, to) for _, at, to in edges()} >= ALLOWED


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("deltapref_jax", {"configs", "launch", "evals", "tests"}),
        ("evals", {"configs", "launch", "tests"}),
        ("launch", {"configs", "tests"}),
    ],
)
def test_folders_do_not_import(folder, banned):
    wrong = [
        f"{path}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] in banned
    ]
    assert wrong == []


def test_configs_import_config_alone():
    own = ("deltapref_jax.", "launch", "evals")
    wrong = [
        f"{path}: {name}"
        for path in (ROOT / "configs").glob("*.py")
        for name in imported(path)
        if name.startswith(own) and not name.startswith("deltapref_jax.config.")
    ]
    assert wrong == []
