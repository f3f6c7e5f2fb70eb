import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltapref_jax.config import ConfigError, Prompts
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.records import Prompt, digest, from_table, to_table
from deltapref_jax.synthetic import world

QUESTIONS = [
    ("What is 1+1?", "2"),
    ("What is 2+2?", "4"),
    ("  ", "0"),
    ("What is 1+1?", "2"),
    ("Name π.", "3.14"),
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3+3?"}]


def write_jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def questions(rows):
    return [row.question for row in rows]


def test_jsonl_text_and_messages_with_empty_and_duplicate_questions_counted(tmp_path):
    rows = [{"prompt": q, "answer": a} for q, a in QUESTIONS] + [
        {"prompt": CHAT, "answer": 6},
        {"prompt": None},
    ]
    path = write_jsonl(tmp_path / "asked.jsonl", rows)
    found, counts = read_prompts(Prompts(kind="jsonl", path=path, checker=""))
    assert counts == {"read": 7, "empty": 2, "duplicate": 1}
    assert questions(found) == ["What is 1+1?", "What is 2+2?", "Name π.", "What is 3+3?"]
    assert found[3].chat() == CHAT
    assert [row.answer for row in found] == ["2", "4", "3.14", "6"]
    assert {(row.task, row.checker, row.meta) for row in found} == {("asked", "", "{}")}
    assert found[0].prompt_id == digest("asked", found[0].messages)
    assert from_table(Prompt, to_table(Prompt, found)) == found


def test_parquet_with_named_columns_equals_jsonl(tmp_path):
    rows = [{"q": q, "a": a} for q, a in QUESTIONS]
    write_jsonl(tmp_path / "x.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = [
        read_prompts(
            Prompts(
                kind=kind,
                path=str(tmp_path / f"x.{kind}"),
                prompt_field="q",
                answer_field="a",
                checker="math",
            )
        )
        for kind in ("jsonl", "parquet")
    ]
    assert found[0] == found[1]
    assert found[0][0][0].checker == "math"


def test_count_draws_by_the_seed_and_keeps_the_order(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"Question {i:03d}"} for i in range(50)])
    drawn = [
        questions(read_prompts(Prompts(kind="jsonl", path=path, count=10, seed=s))[0])
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert len(set(drawn[0])) == 10
    assert drawn[0] != drawn[2]


def test_synthetic_is_the_world():
    found, counts = read_prompts(Prompts(tasks=("chain", "sorting"), count=7, difficulty=1, seed=3))
    assert found == world.prompts(("chain", "sorting"), 7, 1, 3)
    assert counts == {"read": 7, "empty": 0, "duplicate": 0}


@pytest.mark.parametrize(
    "task", ["gsm_symbolic", "chain_sum", "gcd", "number_sorting", "word_sorting", "syllogism"]
)
def test_reasoning_gym_meta_is_what_its_scorer_needs(task):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    found, _ = read_prompts(Prompts(kind="reasoning_gym", tasks=(task,), count=3, seed=5))
    score = reasoning_gym.get_score_answer_fn(task)
    for row in found:
        meta = json.loads(row.meta)
        assert row.checker == "reasoning_gym"
        assert score(answer=row.answer, entry=meta["entry"]) == 1.0
        assert score(answer="rubbish", entry=meta["entry"]) < 1.0


def test_reasoning_gym_mixes_tasks_evenly_and_follows_the_seed():
    pytest.importorskip("reasoning_gym")
    source = Prompts(kind="reasoning_gym", tasks=("gcd", "chain_sum"), count=5, seed=1)
    found = read_prompts(source)[0]
    assert [row.task for row in found] == ["gcd"] * 3 + ["chain_sum"] * 2
    assert found == read_prompts(source)[0]


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"question": q, "answer": a} for q, a in QUESTIONS[:3]])
    return str(folder)


def test_hub_local_folder(hub_folder):
    found, counts = read_prompts(
        Prompts(kind="hub", path=hub_folder, prompt_field="question", checker="math")
    )
    assert questions(found) == ["What is 1+1?", "What is 2+2?"]
    assert counts == {"read": 3, "empty": 1, "duplicate": 0}
    assert found[0].task == "gsm"


def test_hub_unknown_split_is_one_sentence(hub_folder):
    with pytest.raises(
        ConfigError,
        match=r"^The data set '\S+gsm' \(split 'nope'\) cannot be loaded \(ValueError: "
        r".*\); check name, split and connection, or give a local folder\.$",
    ):
        read_prompts(Prompts(kind="hub", path=hub_folder, split="nope", prompt_field="question"))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Written by TFDS itself, in array_record format, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            chat = tfds.features.Sequence(
                {"role": tfds.features.Text(), "content": tfds.features.Text()}
            )
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"question": tfds.features.Text(), "answer": tfds.features.Text(), "chat": chat}
                ),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (q, a) in enumerate(QUESTIONS):
                yield i, {"question": q, "answer": a, "chat": CHAT}

    builder = Tiny(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_tfds_array_record_folder(tfds_folder):
    found, counts = read_prompts(
        Prompts(kind="tfds", path=tfds_folder, prompt_field="question", checker="math")
    )
    assert sorted(questions(found)) == sorted({q for q, _ in QUESTIONS if q.strip()})
    assert counts == {"read": 5, "empty": 1, "duplicate": 1}
    assert {(questions([row])[0], row.answer) for row in found} <= set(QUESTIONS)
    assert {row.task for row in found} == {"tiny"}
    assert "tensorflow" not in sys.modules


def test_tfds_messages(tfds_folder):
    found, counts = read_prompts(Prompts(kind="tfds", path=tfds_folder, prompt_field="chat"))
    assert [row.chat() for row in found] == [CHAT]
    assert counts["duplicate"] == 4


BROKEN = {
    "not JSON": (
        b'{"prompt": "a", "answer": "1"}\n\n{"prompt": "b"\n',
        r"^Line 3 of \S+ is not JSON \(.*\); fix or remove it\.$",
    ),
    "not UTF-8": (
        b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xff"}\n',
        r"^Line 2 of \S+ is not JSON \(.*utf-8.*\); fix",
    ),
    "key twice": (
        b'{"prompt": "a", "prompt": "b"}\n',
        r"^Line 1 of \S+: the key 'prompt' stands twice in one object; fix or remove it\.$",
    ),
    "not an object": (b'["a"]\n', r"^Line 1 of \S+ is not a JSON object; fix or remove it\.$"),
    "no column": (
        b'{"question": "a", "level": 1}\n',
        r"^Line 1 of \S+ has no column 'prompt'; it has \['level', 'question'\]: set "
        r"prompt_field\.$",
    ),
    "no answer": (
        b'{"prompt": "a"}\n',
        r"^Line 1 of \S+ has no 'answer' and the checker 'math' needs one; set "
        r"answer_field, or checker to ''\.$",
    ),
    "number": (
        b'{"prompt": 3, "answer": "1"}\n',
        r"^Line 1 of \S+ has a prompt that is neither text nor a list of chat "
        r"messages; each message needs 'role' and 'content', both text\.$",
    ),
    "no role": (
        b'{"prompt": [{"text": "a"}], "answer": "1"}\n',
        "neither text nor a list of chat messages",
    ),
    "assistant last": (
        b'{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}\n',
        r"whose last message is not the user's; cut the answer off\.$",
    ),
    "no messages": (b'{"prompt": [], "answer": "1"}\n', "last message is not the user's"),
    "only blanks": (
        b'{"prompt": " ", "answer": "1"}\n',
        r"^The source \S+ holds no question with text; give it some\.$",
    ),
    "nothing": (b"", "holds no question with text"),
}


REFUSED = {
    "null": (None, r"has no 'answer' and the checker 'math' needs one; set answer_field"),
    "empty text": ("", r"has empty text in 'answer', which no trace can be checked against; give "),
    "blanks": (" \n", r"has empty text in 'answer'"),
    "object": ({"value": "10"}, r"has an object in 'answer'"),
    "empty list": ([], r"has an empty list in 'answer'; give at least one accepted answer"),
    "list of lists": ([["1"]], r"has a list in 'answer'"),
    "list with null": (["1", None], r"has null in 'answer'"),
    "nan": (float("nan"), r"has nan in 'answer'"),
    "infinity": (float("inf"), r"has inf in 'answer'"),
    "worked": (
        "We add. " * 60,
        r"has a text of 479 characters in 'answer', which states no answer",
    ),
}


UNREAD = {
    "choices": (["red", "blue"], "Which? red"),
    "options": (["A) red", "B) blue"], "Which?"),
    "choices of ARC": ({"text": ["red", "blue"], "label": ["A", "B"]}, "Which?"),
    "system": ("Be short.", "Which?"),
    "context": ("Red is warm.", "Which?"),
    "tools": ([{"name": "add"}], "Which?"),
    "input": ("red or blue", "Which?"),
    "problem": ("red or blue", "Which?"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_belongs_to_a_question_is_not_passed_over(tmp_path, case):
    value, question = UNREAD[case]
    column = case.partition(" ")[0]
    rows = [{"prompt": question, "answer": "red", column: value}]
    source = Prompts(kind="jsonl", path=write_jsonl(tmp_path / "x.jsonl", rows), checker="exact")
    with pytest.raises(ConfigError) as error:
        read_prompts(source)
    assert str(error.value) == (
        f"Line 1 of {source.path} has a column {column!r} that would not be read, and 'prompt' "
        "does not hold it; write it into the prompt, or remove it."
    )
    held = value.get("text") if isinstance(value, dict) else value
    texts = [str(t) for t in held] if column in ("choices", "options") else [str(held)]
    for fine in ({column: None}, {"prompt": question + "\n" + "\n".join(texts)}):
        write_jsonl(tmp_path / "x.jsonl", [rows[0] | fine])
        assert read_prompts(source)[1]["read"] == 1


@pytest.mark.parametrize(
    "prompt",
    [
        [{"from": "human", "value": "Which?"}],
        json.dumps([{"role": "user", "content": "Which?"}]),
        {"role": "user", "content": "Which?"},
        [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}],
    ],
)
def test_every_form_of_messages_is_a_question(tmp_path, prompt):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": prompt}, {"prompt": "Which?"}])
    found, counts = read_prompts(Prompts(kind="jsonl", path=path))
    assert [p.question for p in found] == ["Which?"]
    assert counts["duplicate"] == 1


def test_a_call_in_a_question_is_refused(tmp_path):
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    rows = [{"prompt": [called, {"role": "user", "content": "Which?"}]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(ConfigError, match="has messages with 'tool_calls', which is not read"):
        read_prompts(Prompts(kind="jsonl", path=path))


@pytest.mark.parametrize("case", REFUSED)
def test_a_reference_answer_that_is_none_is_refused_with_its_line(tmp_path, case):
    answer, sentence = REFUSED[case]
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": answer}]
    source = Prompts(kind="jsonl", path=write_jsonl(tmp_path / "x.jsonl", rows), checker="math")
    with pytest.raises(ConfigError, match=rf"^Line 2 of \S+x\.jsonl {sentence}"):
        read_prompts(source)
    source.checker = ""
    assert read_prompts(source)[1]["read"] == 2  # what is not checked may be anything


@pytest.mark.parametrize("checker", ["math", "exact"])
@pytest.mark.parametrize(
    ("answer", "gold", "answers"),
    [
        ("4 * 2 = 8.\n#### 8", "8", None),
        ("2400 / 2 = 1200.\n#### 1,200\n", "1,200", None),
        ("#### 8", "8", None),
        ('["34"]', "34", None),
        ("['34']", "34", None),
        ('["a", "b"]', '["a", "b"]', None),
        ("[1, 2]", "[1, 2]", None),
        ("So " * 200 + r"\boxed{8}.", "So " * 200 + r"\boxed{8}.", None),
        ("#### A heading\nand text", "#### A heading\nand text", None),
        (6, "6", None),
        (0, "0", None),
        (2.5, "2.5", None),
        (True, "True", None),
        (" x ", "x", None),
        (["$2$"], "$2$", None),
        (["Monday", "Mon"], "Monday", ["Monday", "Mon"]),
        ([2, 3.5], "2", ["2", "3.5"]),
        (["x", "x"], "x", None),
    ],
)
def test_reference_answers_as_public_sets_hold_them(tmp_path, checker, answer, gold, answers):
    rows = [{"prompt": "a", "answer": answer}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    found = read_prompts(Prompts(kind="jsonl", path=path, checker=checker))[0][0]
    assert found.answer == gold
    assert json.loads(found.meta) == ({"answers": answers} if answers else {})


@pytest.mark.parametrize("case", BROKEN)
def test_broken_jsonl_names_the_line(tmp_path, case):
    data, sentence = BROKEN[case]
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(ConfigError, match=sentence):
        read_prompts(Prompts(kind="jsonl", path=str(tmp_path / "x.jsonl"), checker="math"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            Prompts(kind="jsonl", path="/nowhere.jsonl"),
            r"^There is no prompt file /nowhere\.jsonl; check prompts\.path\.$",
        ),
        (
            Prompts(kind="tfds", path="/nowhere"),
            r"^There is no prompt file /nowhere; check prompts\.path\.$",
        ),
        (Prompts(kind="csv"), r"^prompts\.kind is 'csv'; choose one of 'synthetic', .*'tfds'\.$"),
        (Prompts(tasks=("nope",), count=1), r"^synthetic task is 'nope'; choose one of .*'chain'"),
    ],
)
def test_unknown_names_are_listed(source, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_prompts(source)


@pytest.mark.parametrize("task", ["nope", "composite"])
def test_an_unknown_task_of_reasoning_gym_lists_the_known_ones(task):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(
        ConfigError, match=rf"^reasoning_gym task is '{task}'; choose one of .*'gcd'"
    ):
        read_prompts(Prompts(kind="reasoning_gym", tasks=(task,), count=1))


def test_an_entry_without_an_answer_of_its_own_has_none():
    pytest.importorskip("reasoning_gym")
    found, _ = read_prompts(Prompts(kind="reasoning_gym", tasks=("graph_color",), count=1))
    assert found[0].answer == ""


def test_reasoning_gym_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ConfigError,
        match=r"^Prompts of kind 'reasoning_gym' need the package reasoning-gym, which is not "
        r"installed; run pip install 'deltapref-jax\[gym\]'\.$",
    ):
        read_prompts(Prompts(kind="reasoning_gym", tasks=("gcd",), count=1))


def test_damaged_files_are_one_sentence(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        ConfigError,
        match=r"^\S+x\.parquet is not a readable Parquet file \(.*\); write it again\.$",
    ):
        read_prompts(Prompts(kind="parquet", path=str(tmp_path / "x.parquet")))
    with pytest.raises(
        ConfigError,
        match=r"^The TFDS data set in \S+ \(split 'train'\) cannot be read \(.*\); give "
        r"the builder's version directory, in array_record format\.$",
    ):
        read_prompts(Prompts(kind="tfds", path=str(tmp_path)))
