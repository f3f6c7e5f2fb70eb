"""The documentation names what exists: files, definitions, fields, flags, links and commands.

What is checked is what stands in code font, by its form: see `problem_with`.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import re
import shlex
import sys
import tomllib
import typing

import jax.numpy as jnp
import pytest

from deltapref_jax import config
from deltapref_jax.answers.check import check
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import NURSERY, Prompts
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.pairs.own import Candidate, select_by_function
from deltapref_jax.records import Pair, Prompt
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.recipe import without_student
from deltapref_jax.stages.students import plan_page
from deltapref_jax.stages.study import plan
from deltapref_jax.training.objectives import LOSSES, Hyper, Terms
from deltapref_jax.validation import validate

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deltapref_jax"
PAGES = sorted(
    [ROOT / name for name in ("README.md", "BUILD.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
FOREIGN = {  # names of other projects' code, of what readers bring, and of what runs write
    *("CheckpointManager", "experimental", "v1", "finally", "vmap", "shard_map", "topologies"),
    *("query_seq_lengths", "tensorboardX", "clu", "peft", "transformers", "flax"),
    *("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "JAX_COORDINATOR_ADDRESS"),
    *("questions.jsonl", "shard-00000-of-00001.parquet"),
    *("JAX_COORDINATOR_PORT", "TPU_WORKER_ID", "srun", "mpirun", "maxRestarts", "RequeueExit"),
    *("--restarts", "--restart-on-exit-codes", "--restart-on-exit-codes=75", "--max-restarts"),
    *("--grace-period", "--termination-grace-period-seconds", "--signal=TERM@120"),
    *("--gpus-per-task", "pip install 'jax[k8s]'"),
}
WHOLE_CONFIGS = (config.Experiment, config.PairTraining, config.ModelZoo)
FILE_NAME = re.compile(r"[\w.-]+\.(csv|json|jsonl|html|parquet|gguf|safetensors|md|toml|svg|jinja)")


def load_refresh():
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks_and_rest(text):
    """Fenced and indented code of a page, and the page without it."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = "\n".join(re.findall(r"(?<=\n)    .*", "\n" + rest))
    return fenced, indented, re.sub(r"(?<=\n)    (?! ).*", "", "\n" + rest)


def spans(page):
    """Everything in code font, on one line each."""
    found = re.findall(r"`([^`]+)`", blocks_and_rest(page.read_text())[2])
    return sorted({" ".join(span.split()) for span in found})


def commands():
    """(page, command line) of every `python -m …` in code."""
    for page in PAGES:
        fenced, indented, _ = blocks_and_rest(page.read_text())
        code = "\n".join([indented, *(body for _, body in fenced), *spans(page)])
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if part.strip().startswith(("python -m launch.", "python -m docs.")):
                    yield page, part.strip().removesuffix("…")


@functools.cache
def trees():
    folders = ("deltapref_jax", "launch", "configs", "evals", "docs", "tests")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for path in files
        if path != pathlib.Path(__file__)
    }


@functools.cache
def words():
    """Identifiers of the code, and words of its strings that are no docstrings."""
    found = set()
    for tree in trees().values():
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name"):
                if isinstance(value := getattr(node, field, None), str):
                    found.add(value.split(".")[0])
            if (
                isinstance(value := getattr(node, "value", None), str)
                and id(node) not in docstrings
            ):
                found |= set(re.findall(r"[\w-]+", value))
    return found


@functools.cache
def modules():
    """Dotted names of modules, and what they define; `deltapref_jax.` may be left out."""
    found = {}
    for path, tree in trees().items():
        parts = path.relative_to(ROOT).with_suffix("").parts
        names = set()
        for node in tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            names |= {getattr(each, "id", getattr(each, "name", "")) for each in targets}
        for start in range(1 + (parts[0] == "deltapref_jax")):
            found[".".join(parts[start:])] = names
    return found


@functools.cache
def classes():
    return {
        node.name: node
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def members(node):
    """Names of a class's fields, methods and attributes, those of its bases included."""
    found = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    found |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    found |= {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes():
            found |= members(classes()[base.id])
    return found


def is_field(path):
    """Whether `config.training.rows`, with or without [0], is a field of a whole config."""

    def in_class(kind, names):
        if not names:
            return True
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        name = names[0].split("[")[0]
        if name not in hints:
            return False
        hint = hints[name]
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        return in_class(hint, names[1:])

    names = path.split(".")[1:]
    return any(in_class(kind, names) for kind in WHOLE_CONFIGS)


def is_name(dotted):
    """Whether a dotted name is a module, a definition in one, or a member of a class.

    What begins with nothing of the project is looked up in the package of that name.
    """
    parts = dotted.split(".")
    if parts[0] in classes():
        return parts[1] in members(classes()[parts[0]])
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in modules():
            return parts[end : end + 1] == [] or parts[end] in modules()[name]
    if is_variable(parts):
        return True
    try:
        functools.reduce(getattr, parts[1:], importlib.import_module(parts[0]))
    except (ImportError, AttributeError):
        return False
    return True


def is_variable(parts):
    """`job.rows`, `sampling.shard`: a variable of the code named like a class, with its member."""
    name = parts[0].replace("_", "")
    matching = [node for each, node in classes().items() if each.lower().endswith(name)]
    return len(parts) == 2 and any(parts[1] in members(node) for node in matching)


def is_path(path):
    return any((base / path).exists() for base in (ROOT, PACKAGE))


def flags_of(module):
    """Flags that an entry point defines, its own and those of launch/flags.py."""
    found = {"help", "config"}
    for path in (ROOT / f"{module.replace('.', '/')}.py", ROOT / "launch" / "flags.py"):
        for node in ast.walk(trees()[path]):
            function = getattr(node, "func", None)
            name = getattr(function, "attr", "") or getattr(function, "id", "")
            if name.lower().startswith("define_") and node.args:
                # a function of launch/flags.py that defines a flag gets its name as an argument
                found.add(getattr(node.args[0], "value", ""))
    return found


@functools.cache
def all_flags():
    entry_points = [f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py")]
    return set().union(*map(flags_of, entry_points))


def problem_with(span):
    """What is wrong with a piece of code font, or ""."""
    if span in FOREIGN:
        return ""
    if span.startswith("pip install "):
        extras = re.findall(r"\[(\w+)\]", span)
        return "" if set(extras) <= extras_of_the_project() else "no such extra"
    if span.startswith("--"):
        return problem_with_flag(span.split("=")[0].removeprefix("--"), all_flags())
    if match := re.fullmatch(r"([\w./-]+\.py):\d+", span):
        return "" if is_path(match[1]) else "no such file"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) and ("/" in span or span.endswith(".py")):
        known = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir())}
        if span.split("/")[0] in known or span.endswith((".py", ".md")):
            return "" if is_path(span) else "no such file or folder"
        return "" if span.split("/")[0] in words() else "no such folder"
    if FILE_NAME.fullmatch(span):
        known = {path.name for path in ROOT.rglob("*.*") if ".git" not in path.parts}
        return "" if span in known or span in strings() else "no such file"
    if re.fullmatch(r"config(\.\w+(\[\d\])?)+", span):
        return "" if is_field(span) or is_name(span) else "no such field"
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+(\(.*\))?", span):
        return "" if is_name(span.split("(")[0]) else "no such name"
    if match := re.fullmatch(r"(\w+)\(.*\)", span):
        return problem_with_call(match[1], span)
    if re.fullmatch(r"[A-Za-z_]\w*", span):
        return "" if span in words() else "no such identifier or string"
    return ""


def problem_with_flag(flag, known):
    if flag.startswith("config."):
        return "" if is_field(flag) else "no such field"
    return "" if flag in known or flag.removeprefix("no") in known else "no such flag"


def problem_with_call(name, span):
    """A call of a config class has its fields; anything else is a known word."""
    call = ast.parse(span.replace("…", "..."), mode="eval").body
    given = {keyword.arg for keyword in call.keywords}
    if dataclasses.is_dataclass(kind := getattr(config, name, None)):
        unknown = given - {field.name for field in dataclasses.fields(kind)}
        return f"no field {unknown}" if unknown else ""
    return "" if name in words() else "no such function"


@functools.cache
def strings():
    return {
        node.value
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@functools.cache
def extras_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_exists(page):
    if page.name == "CHANGELOG.md":
        return
    problems = {span: problem_with(span) for span in spans(page)}
    assert {span: problem for span, problem in problems.items() if problem} == {}


def test_names_of_others_are_used():
    assert set() == FOREIGN - {span for page in PAGES for span in spans(page)}


@pytest.mark.parametrize(
    "wrong",
    [
        "stages/nothing.py",
        "deltapref_jax/nothing/",
        "nothing.py:12",
        "config.training.nothing",
        "config.generators[0].nothing",
        "Engine.nothing",
        "training.loop.nothing",
        "nothing_at_all",
        "NothingAtAll",
        "--nothing",
        "--config.training.nothing=1",
        "Prompts(nothing=1)",
        "optax.nothing",
        "pip install -e '.[nothing]'",
        "job.nothing",
        "nothing.html",
    ],
)
def test_what_does_not_exist_is_found(wrong):
    assert problem_with(wrong)


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = blocks_and_rest(page.read_text())[2]
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)", file.read_text(), re.M) if file.suffix == ".md" else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert broken == []


def test_every_page_is_linked():
    linked = {ROOT / name for name in ("README.md", "BUILD.md", "CHANGELOG.md")}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            linked.add((page.parent / target).resolve())
    assert [str(page) for page in PAGES if page not in linked] == []


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_are_right(page, command):
    words = shlex.split(command, comments=True)
    module, arguments = words[2], words[3:]
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.is_file()
    if module == "launch.inspect_model" and arguments[0] == "PATH":  # the one without a flag
        arguments = arguments[1:]
    for argument in arguments:
        assert argument.startswith("--"), argument
        flag, _, value = argument.removeprefix("--").partition("=")
        assert problem_with_flag(flag, flags_of(module)) == ""
        if flag == "config":
            assert (ROOT / value).is_file()


def test_lines_have_at_most_100_columns():
    long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 100 and not line.startswith(("|", "    "))
    ]
    assert long == []


def test_pages_taken_from_the_code_are_fresh():
    refresh = load_refresh()
    stale = [name for name, text in refresh.pages().items() if (ROOT / name).read_text() != text]
    assert stale == [], f"run `{refresh.COMMAND}` at the root of the project"


def test_every_field_and_column_is_documented():
    text = (ROOT / "docs" / "config.md").read_text()
    for kind in vars(config).values():
        if dataclasses.is_dataclass(kind):
            section = text.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
            for field in dataclasses.fields(kind):
                item = section.split(f"\n- `{field.name}`: ")[1].split("\n- ")[0]
                # type, default, and the comment
                assert re.search(r", `[^`]*`\. [^*\s]", " ".join(item.split())), (kind, item)
    formats = (ROOT / "docs" / "formats.md").read_text()
    assert f"\n- `{Pair._fields[0]}`, string: " in formats.split("\n### Pair\n")[1]


def test_every_line_number_of_the_tour_is_refreshed():
    text = (ROOT / "docs" / "tour.md").read_text()
    refreshed = [(match[2], match[3]) for match in load_refresh().PLACE.finditer(text)]
    assert refreshed == re.findall(r"([\w./-]+\.py):(\d+)", text)
    assert refreshed


def test_a_line_number_is_that_of_the_definition(tmp_path, monkeypatch):
    refresh = load_refresh()
    monkeypatch.setattr(refresh, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("class A:\n    def f(self): ...\n\ndef f(): ...\n")
    assert refresh.with_lines("1. `A.f` (`a.py:9`), `f`\n   (`a.py:1`)") == (
        "1. `A.f` (`a.py:2`), `f`\n   (`a.py:4`)"
    )
    with pytest.raises(LookupError, match="a.py has no g"):
        refresh.with_lines("`g` (`a.py:1`)")


def example_code(heading):
    """The code block under a heading of extend.md."""
    text = (ROOT / "docs" / "extend.md").read_text().split(f"# {heading}\n")[1]
    return text.split("\n## ")[0].split("```python\n")[1].split("```")[0]


def example(heading):
    """The names that the code block under a heading of extend.md defines."""
    code = example_code(heading)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    names = {}
    exec(compile(code, f"extend.md, {heading}", "exec"), names)
    return argparse.Namespace(**{k: v for k, v in names.items() if k.isidentifier()})


@pytest.fixture
def restored():
    """Takes back what an example adds to a table."""
    tables = (config.OBJECTIVE_KINDS, LOSSES)
    kept = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, kept, strict=True):
        table.clear()
        table.update(entries)


def test_an_objective(restored):
    example("An objective")
    zero = dict.fromkeys(Hyper._fields, 0.0)
    h = Hyper(**zero | {"beta": 0.5})
    terms = Terms(jnp.array([-1.0, -3.0]), jnp.array([-3.0, -3.0]), None, None, None)
    expected = jnp.log1p(jnp.exp(-0.5 * jnp.array([2.0, 0.0])))
    assert jnp.allclose(LOSSES["contrast"](terms, h), expected, rtol=1e-6)
    e = importlib.import_module("configs.quickstart").get_config()
    e.objectives += (config.Objective(name="contrast", kind="contrast"),)
    assert validate(e)


def test_a_stage(tmp_path):
    ShortPrompts = example("A stage").ShortPrompts
    source = Prompts(tasks=("chain",), count=20)
    prompts = PromptTable(label=("prompts",), sources=(source,), contents=("",), suites={})
    workspace = Workspace(tmp_path)
    run([prompts], workspace, show=False)
    rows = workspace.rows(Prompt, prompts)
    most = sorted(len(row.question) for row in rows)[10]
    short = ShortPrompts(label=("short",), prompts=prompts, most=most)
    run([short], workspace, show=False)
    expected = [row for row in rows if len(row.question) <= most]
    assert workspace.rows(Prompt, short) == expected
    assert 0 < len(expected) < len(rows)


def test_a_judge():
    ratings, counts = example("A judge").by_length([], [], ["", "x" * 250, "x" * 9999])
    assert ratings.expectation.tolist() == [[1.0], [3.0], [5.0]]
    assert counts == {}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Puts the code under a heading into a module that Python finds."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, heading):
        (tmp_path / f"{name}.py").write_text(example_code(heading))
        importlib.invalidate_caches()

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_checker(own_module, tmp_path):
    own_module("my_checks", "A checker")
    (tmp_path / "q.jsonl").write_text('{"prompt": "Name a multiple of 7.", "of": 7}\n')
    source = Prompts("jsonl", str(tmp_path / "q.jsonl"), checker="my_checks:multiple")
    ((prompt,), _) = read_prompts(source)
    said = [check(prompt._asdict(), text).correct for text in ("3 and 21", "22", "none")]
    assert said == [True, False, None]


def test_a_source_of_prompts(own_module):
    own_module("my_prompts", "A source of prompts")
    source = Prompts(kind="my_prompts:squares", count=4, checker="exact")
    prompts, _ = read_prompts(source)
    assert [prompt.answer for prompt in prompts] == ["0", "1", "4", "9"]
    assert prompts[3].question == "What is 3 * 3?"


def test_a_selection(own_module):
    own_module("my_pairs", "A selection")
    chosen = {"a": (5.0, 100), "b": (4.0, 900), "c": (2.0, 10), "d": (3.0, 100)}
    given = [
        Candidate(*(name,) * 5, tokens, 1, None, None, *({"step_coherence": r} for r in (value, 1)))
        for name, (value, tokens) in chosen.items()
    ]
    kept = select_by_function("my_pairs:clear_steps", list(chosen), given, 2, 2, (0, 0))
    assert kept == ["a", "d"]


def test_the_config_of_the_page_of_arms_is_valid():
    names = {}
    for _, block in blocks_and_rest((ROOT / "docs" / "arms.md").read_text())[0]:
        exec(compile(block, "arms.md", "exec"), names)
    e = validate(names["e"])
    twins = {arm.name: arm for arm in e.arms if "-equal-epochs" in arm.name}
    assert twins["dpo-top-equal-epochs"].steps == e.training.steps // 4
    assert len(plan(e).policies) == len(e.arms)


def test_the_config_of_the_page_of_the_recipe_is_valid():
    (block,) = blocks_and_rest((ROOT / "docs" / "recipe.md").read_text())[0]
    names = {}
    exec(compile(block[1], "recipe.md", "exec"), names)
    e = validate(without_student(names["get_config"]()))
    assert e.student.path == e.generators[0].model.path
    assert e.student is not e.generators[0].model


def test_the_config_of_the_page_of_students_is_planned():
    ((_, block),) = blocks_and_rest((ROOT / "docs" / "students.md").read_text())[0]
    names = {}
    exec(compile(block, "students.md", "exec"), names)
    page = plan_page(validate(names["get_config"]()))
    assert {name: len(r.policies) for name, r in page.reports.items()} == {"oak": 18, "elm": 18}


def test_the_first_study_is_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    e = validate(importlib.import_module("configs.mine").get_config())
    files = [e.prompts[0].path, *(suite.prompts.path for suite in e.suites)]
    for i, path in enumerate(files):
        (tmp_path / path).write_text(f'{{"question": "What is {i} + 3?", "answer": "{i + 3}"}}\n')
    models = {
        "models/student": "student",
        "models/weak": "oak-weak",
        "models/strong": "oak-strong",
        "models/judge": "judge",
    }
    for model in (e.student, *(g.model for g in e.generators), *(j.model for j in e.judges)):
        model.path = f"{NURSERY}/{models.pop(model.path)}"  # no model is shared by two fields
    report = plan(e)
    assert set(report.policies) == {arm.name for arm in e.arms} == {"all", "top", "random"}
    assert report.pairs["top"][0].ratings.keys() == {"weak", "strong"}
    node = report.suites["held_out"]
    workspace = Workspace(tmp_path / "workspace")
    run([node], workspace, show=False)
    (question,) = workspace.rows(Prompt, node)
    assert (question.question, question.answer, question.checker) == ("What is 1 + 3?", "4", "math")


def test_the_tests_of_inputs_that_once_went_wrong_are_there():
    page = (ROOT / "docs" / "formats.md").read_text()
    part = page.split("## Inputs that once went wrong\n")[1].split("\n### ")[0]
    named = re.findall(r"`(\S+\.py)::(test_\w+)`", part)
    assert len(named) == part.count("\n- ") > 10
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
