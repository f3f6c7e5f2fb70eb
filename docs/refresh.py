"""Writes what the documentation takes from the code: `python -m docs.refresh`, at the root.

    docs/config.md      all of it, from deltapref_jax/config.py
    docs/formats.md     the columns of every table, from deltapref_jax/records.py
    docs/tour.md        the line numbers behind names: `name` (`file.py:12`)
    README.md           the code of configs/mine.py
    docs/benchmarks/shipped-models.md   its tables, from synthetic/models/measured.json

`tests/test_docs.py` fails where one of them is not what this program would write.
"""

import ast
import importlib
import json
import pathlib
import re
import textwrap

from launch.fields import classes, fields_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = "python -m docs.refresh"
WIDTH = 100
PLACE = re.compile(r"`([\w.]+)`\s+\(`([\w/]+\.py):(\d+)`\)")
CONFIG_INTRODUCTION = f"""\
# Every field of a config

Written by `{COMMAND}` from `deltapref_jax/config.py`; edit that file instead.

A study is an [Experiment](#experiment), one run from a file of pairs is a
[PairTraining](#pairtraining), and the models that ship are described by a [ModelZoo](#modelzoo).
Any field can be set on the command line by its path, such as `--config.training.steps=60` or
`--config.generators[weak].temperature=0.7`, where an item of a list has its name or its number in
brackets. A field marked *not hashed* says where something is or how it is shown: two runs that
differ only there share their artifacts. `deltapref_jax/validation.py` refuses values that cannot
work, before a device is used."""


def _item(text: str) -> str:
    """One item of a list; a name in backticks is not broken."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _linked(type_: str, names: set[str]) -> str:
    """A type in code font, or a link to its class on this page."""
    links = [f"[{n}](#{n.lower()})" for n in re.findall(r"\w+", type_) if n in names]
    return " of ".join([f"`{type_}`", *links]) if type_ not in names else links[0]


def config_page() -> str:
    """docs/config.md: choices first, then the classes, whole configs before their parts."""
    source = (ROOT / "deltapref_jax" / "config.py").read_text()
    declared = [c for c in classes(source) if c.decorator_list]
    whole = ("Experiment", "PairTraining", "ModelZoo")
    declared.sort(key=lambda c: whole.index(c.name) if c.name in whole else len(whole))
    names = {c.name for c in declared}
    parts = [CONFIG_INTRODUCTION, *_choices(source)]
    for class_ in declared:
        parts.append(f"\n## {class_.name}\n\n{ast.get_docstring(class_)}\n")
        for field in fields_of(class_, source):
            hidden = "" if field.hashed else " *Not hashed.*"
            kind = _linked(field.type, names)
            about = f"`{field.name}`: {kind}, `{field.default}`. {field.comment}{hidden}"
            parts.append(_item(about.strip()))
    return "\n".join(parts) + "\n"


def _choices(source: str) -> list[str]:
    """The values that named fields can have, from the tuples and tables in capitals."""
    config = importlib.import_module("deltapref_jax.config")
    rows = ["\n## Choices\n"]
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        value = getattr(config, name)
        if isinstance(value, tuple) or (
            isinstance(value, dict) and name not in ("UNHASHED", "ADDED")
        ):
            rows.append(_item(f"`{name}`: " + ", ".join(f'`"{each}"`' for each in value)))
    return rows


def record_tables() -> str:
    """Every table of `records`: its columns with Arrow types and meanings."""
    records = importlib.import_module("deltapref_jax.records")
    source = (ROOT / "deltapref_jax" / "records.py").read_text()
    parts = []
    for class_ in classes(source):
        if not any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in class_.bases):
            continue
        schema = records.schema(getattr(records, class_.name))
        summary = (ast.get_docstring(class_) or "").splitlines()[0]
        parts.append(f"\n### {class_.name}\n\n{summary}\n")
        for field in fields_of(class_, source):
            arrow = str(schema.field(field.name).type)
            kind = arrow.replace("item: ", "").replace("element: ", "")
            about = f": {field.comment}" if field.comment else ""
            parts.append(_item(f"`{field.name}`, {kind}{about}"))
    return "\n".join(parts) + "\n"


def line_of(path: str, name: str) -> int:
    """The line where a function or class is defined; `Class.method` and `outer.inner` are found.

    Raises:
      LookupError: the file has no such definition.
    """
    nodes: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    for part in name.split("."):
        nodes = [
            child
            for node in nodes
            for child in ast.walk(node)
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part
        ]
    if not nodes:
        raise LookupError(f"{path} has no {name}.")
    assert isinstance(nodes[0], ast.FunctionDef | ast.ClassDef)
    return nodes[0].lineno


def with_lines(text: str) -> str:
    """`text` with the line numbers that the code has now."""
    return PLACE.sub(
        lambda m: m[0].replace(f":{m[3]}`", f":{line_of(m[2], m[1])}`"),
        text,
    )


def between(text: str, mark: str, body: str) -> str:
    """`text` with `body` between the two comments that are named `mark`.

    Raises:
      LookupError: the comments are not there.
    """
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    if begin not in text or end not in text:
        raise LookupError(f"There is no part {mark!r} between {begin.strip()} and {end}.")
    before, rest = text.split(begin)
    return before + begin + body + end + rest.split(end)[1]


def first_study() -> str:
    """The code of configs/mine.py, as a block."""
    source = (ROOT / "configs" / "mine.py").read_text()
    docstring = ast.parse(source).body[0]
    code = "\n".join(source.splitlines()[docstring.end_lineno :]).strip()
    return f"\n```python\n{code}\n```\n\n"


def shipped_models() -> str:
    """What the shipped models believe, and what was measured of them, as tables."""
    beliefs = importlib.import_module("deltapref_jax.synthetic.beliefs").BELIEFS
    families = importlib.import_module("deltapref_jax.synthetic.families").FAMILIES
    models = ROOT / "deltapref_jax" / "synthetic" / "models"
    measured = json.loads((models / "measured.json").read_text())
    solvers = {name: m for name, m in measured.items() if "suites" in m}
    holders = {b: [n for n, m in solvers.items() if b in m["recipe"]["beliefs"]] for b in beliefs}
    parts = [
        "\n| belief | skill | the wrong rule | held by |\n|---|---|---|---|\n",
        *(
            f"| `{b.name}` | {b.skill} | {b.about} | {', '.join(holders[b.name])} |\n"
            for b in beliefs.values()
        ),
        "\n| model | careless | in domain, greedy | sampled | out of domain, greedy | sampled | "
        "nats a token |\n|---|---|---|---|---|---|---|\n",
    ]
    for name, m in solvers.items():
        cells = [m["greedy"]["in"], m["in"], m["greedy"]["out"], m["out"]]
        row = " | ".join(f"{v:.1f} [{low:.1f}, {high:.1f}]" for v, low, high in cells)
        careless = m["recipe"]["error_rate"]
        parts.append(f"| {name} | {careless} | {row} | {m['entropy']:.3f} |\n")
    suites = next(iter(solvers.values()))["suites"]
    parts.append(f"\n| greedy, sampled | {' | '.join(suites)} |\n|---|{'---|' * len(suites)}\n")
    for name, m in solvers.items():
        row = " | ".join(f"{s['greedy']:.1f}, {s['sampled']:.1f}" for s in m["suites"].values())
        parts.append(f"| {name} | {row} |\n")
    row = " | ".join(
        "domain" if families[s].domain == "in" else ", ".join(families[s].shares) or "nothing"
        for s in suites
    )
    parts.append(f"| shares with the domain | {row} |\n")
    judges = {name: m for name, m in measured.items() if "suites" not in m}
    for name, m in judges.items():
        auc = {d: e for d, e in m.items() if d != "recipe"}
        parts.append(f"\n| AUC | {' | '.join(auc)} |\n|---|{'---|' * len(auc)}\n")
        row = " | ".join(f"{v:.2f} [{low:.2f}, {high:.2f}]" for v, low, high in auc.values())
        parts.append(f"| {name} | {row} |\n")
    return "".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Path to text, of every page that this program writes."""
    read = {name: (ROOT / name).read_text() for name in ("README.md", "docs/tour.md")}
    formats = (ROOT / "docs" / "formats.md").read_text()
    shipped = (ROOT / "docs" / "benchmarks" / "shipped-models.md").read_text()
    return {
        "docs/config.md": config_page(),
        "docs/formats.md": between(formats, "tables", record_tables() + "\n"),
        "docs/tour.md": with_lines(read["docs/tour.md"]),
        "docs/benchmarks/shipped-models.md": between(shipped, "measured", shipped_models()),
        "README.md": between(read["README.md"], "configs/mine.py", first_study()),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / name).write_text(text)
