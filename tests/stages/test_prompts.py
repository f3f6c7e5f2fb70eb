import json

import pytest

from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError, Prompts
from deltapref_jax.records import Prompt
from deltapref_jax.stages.study import prompt_table
from deltapref_jax.synthetic import world


def make(root, wanted):
    workspace = Workspace(root)
    run([wanted], workspace, show=False)
    return workspace.rows(Prompt, wanted), workspace.manifest(wanted).stats


def jsonl(path, questions):
    path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    return Prompts(kind="jsonl", path=str(path))


def test_sources_are_joined_without_duplicates_and_without_what_is_evaluated(tmp_path):
    long = " ".join(f"w{i}" for i in range(14))
    a = jsonl(tmp_path / "a.jsonl", ["One?", "Two?", "", "Three?", f"So {long} in all?"])
    (tmp_path / "sub").mkdir()
    b = jsonl(tmp_path / "sub" / "a.jsonl", ["Two?", "Four?"])
    evaluated = jsonl(tmp_path / "s.jsonl", ["three", long, "Five?"])
    suite = prompt_table(("suite", "s"), (evaluated,), {})
    rows, counts = make(tmp_path / "w", prompt_table(("prompts",), (a, b), {"s": suite}))
    assert [row.question for row in rows] == ["One?", "Two?", "Four?"]
    assert counts == {
        "read": 7.0,
        "empty": 1.0,
        "duplicate": 1.0,
        "overlap_exact": 1.0,
        "overlap_13_gram": 1.0,
        "rows": 3,
    }


def test_a_suite_is_its_own_table_so_that_its_questions_stay_apart(tmp_path):
    source = Prompts(tasks=("euclid",), count=4, seed=9)
    rows, counts = make(tmp_path, prompt_table(("suite", "euclid"), (source,), {}))
    assert rows == world.prompts(("euclid",), 4, 2, 9)
    assert counts["rows"] == 4


def test_nothing_left_is_one_sentence(tmp_path):
    evaluated = jsonl(tmp_path / "s.jsonl", ["one", "two"])
    suite = prompt_table(("suite", "s"), (evaluated,), {})
    asked = jsonl(tmp_path / "a.jsonl", ["One?", "Two!"])
    with pytest.raises(
        ConfigError,
        match=r"^All 2 training questions overlap evaluation questions; give other "
        r"sources, or another seed\.$",
    ):
        make(tmp_path / "w", prompt_table(("prompts",), (asked,), {"s": suite}))
