import dataclasses
import json

import pytest
from deltapref_jax.workspace import Node, Workspace, run

from deltapref_jax.config import ConfigError, Prompts
from deltapref_jax.stages.prompts import prompts
from deltapref_jax.synthetic import world


def node(label, sources, suites=None):
    fields = [dataclasses.asdict(s) | {"path": ""} for s in sources]
    return Node(
        "prompts", label, {"sources": fields}, suites or {}, {"paths": [s.path for s in sources]}
    )


def make(root, wanted):
    run({wanted.label: wanted}, {"prompts": prompts}, Workspace(root), show=False)
    return Workspace(root).table(wanted).to_pylist(), Workspace(root).manifest(wanted)["stats"]


def jsonl(path, questions):
    path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    return Prompts(kind="jsonl", path=str(path))


def asked(rows):
    return [json.loads(row["messages"])[-1]["content"] for row in rows]


def test_sources_are_joined_without_duplicates_and_without_what_is_evaluated(tmp_path):
    long = " ".join(f"w{i}" for i in range(14))
    a = jsonl(tmp_path / "a.jsonl", ["One?", "Two?", "", "Three?", f"So {long} in all?"])
    (tmp_path / "sub").mkdir()
    b = jsonl(tmp_path / "sub" / "a.jsonl", ["Two?", "Four?"])
    suite = node("suite/s", (jsonl(tmp_path / "s.jsonl", ["three", long, "Five?"]),))
    rows, counts = make(tmp_path / "w", node("prompts", (a, b), {"suite/s": suite}))
    assert asked(rows) == ["One?", "Two?", "Four?"]
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
    rows, counts = make(tmp_path, node("suite/euclid", (source,)))
    assert rows == world.prompts(("euclid",), 4, 2, 9)
    assert counts["rows"] == 4


def test_nothing_left_is_one_sentence(tmp_path):
    suite = node("suite/s", (jsonl(tmp_path / "s.jsonl", ["one", "two"]),))
    with pytest.raises(
        ConfigError,
        match=r"^All 2 training questions overlap evaluation questions; give other "
        r"sources, or another seed\.$",
    ):
        make(
            tmp_path / "w",
            node("prompts", (jsonl(tmp_path / "a.jsonl", ["One?", "Two!"]),), {"suite/s": suite}),
        )
