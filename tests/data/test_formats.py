"""Rows to examples: where the prompt is, repeated prompts, tools, and rows that are refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltapref_jax.config import ConfigError, Pairs
from deltapref_jax.data.formats import PROMPT_LIKE, is_empty, read_example
from deltapref_jax.data.preferences import LengthLimit, read_sequences
from deltapref_jax.text.template import ChatTokenizer

SYSTEM = [{"role": "system", "content": "You sort words."}]
USER = [{"role": "user", "content": "Sort: b a"}]
GOOD, BAD = ([{"role": "assistant", "content": c}] for c in ("a b", "b a"))
MORE = [{"role": "user", "content": "And c?"}]


def read(row, name="paired", columns=()):
    return read_example(row, name, 0, set(columns) | row.keys())


@pytest.mark.parametrize("column", ["question", "instruction", "system", "query", "problem"])
@pytest.mark.parametrize("answers", [("The sum is 4", "The sum is 5"), ("Yes", "No")])
def test_a_question_under_another_name_is_not_passed_over(column, answers):
    row = {column: "2 + 2?", "chosen": answers[0], "rejected": answers[1], "source": "x"}
    with pytest.raises(ValueError) as error:
        read(row)
    assert str(error.value) == (
        f"'prompt' is missing, and {column!r} would not be read (rename the question's column to "
        "'prompt', or remove them if the answers begin with the question)"
    )
    assert read(row | {"prompt": "2 + 2?"}).prompt == "2 + 2?"


@pytest.mark.parametrize("column", ["Prompt", "PROMPT", "Question", "text"])
def test_a_prompt_in_other_letters_is_not_passed_over(column):
    with pytest.raises(ValueError, match=f"^'prompt' is missing, and '{column}' would not be read"):
        read({column: "2 + 2?", "chosen": "The sum is 4", "rejected": "The sum is 5"})


def test_answers_of_messages_beside_their_question_name_its_column():
    row = {"conversations": USER, "chosen": GOOD, "rejected": BAD}
    with pytest.raises(ValueError, match="^'prompt' is missing, and 'conversations' would not be"):
        read(row)
    assert read({"prompt": USER, "chosen": GOOD[0], "rejected": BAD[0]})[:2] == (USER, (GOOD, BAD))


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("prompt", ["Sort: b a", USER])
def test_a_system_message_in_a_column_of_its_own_is_not_passed_over(column, prompt):
    answers = ("a b", "b a") if isinstance(prompt, str) else (GOOD, BAD)
    row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    with pytest.raises(ValueError) as error:
        read(row | {column: "You sort words."})
    assert str(error.value) == (
        f"{column!r} would not be read (give it as a first message of 'prompt', or remove the "
        "column)"
    )
    for nothing in (None, "", " \n"):
        assert read(row | {column: nothing})[:2] == read(row)[:2]
    held = "You sort words. Sort: b a" if isinstance(prompt, str) else SYSTEM + USER
    assert read(row | {"prompt": held, column: "You sort words."}).prompt == held


def test_functions_in_a_column_of_their_own_are_not_passed_over():
    row = {"prompt": USER, "completion": GOOD, "label": True, "functions": [{"name": "sort"}]}
    with pytest.raises(ValueError, match="^'functions' would not be read .give it as 'tools'"):
        read(row, "unpaired")


def test_words_behind_the_assistants_name_belong_to_the_answers():
    asked = "\n\nHuman: 2 + 2?\n\nAssistant:"
    found = read({"chosen": asked + " It is 4", "rejected": asked + " It is 5"})
    assert found[:2] == (asked, (" It is 4", " It is 5"))
    more = asked + " It is 4\n\nHuman: Sure?\n\nAssistant:"
    found = read({"chosen": more + " Yes, 4", "rejected": more + " Yes, 5"})
    assert found[:2] == (more, (" Yes, 4", " Yes, 5"))


def test_answers_that_share_nothing_have_no_prompt():
    for shared in ("", " \n"):
        with pytest.raises(ValueError, match=r"^'prompt' is missing, and 'chosen' and 'rejected' "):
            read({"chosen": shared + "Yes", "rejected": shared + "No"})
    found = read({"chosen": "Q: 2? A: two", "rejected": "Q: 2? A: one", "score": 1})
    assert found[:2] == ("Q: 2? A:", (" two", " one"))
    conversations = {"chosen": USER + GOOD, "rejected": USER + BAD, "question": "Sort: b a"}
    assert read(conversations).prompt == USER  # they hold it


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("order", [1, -1])
def test_one_row_without_the_prompt_that_the_others_have_is_refused(order, ending, text, tmp_path):
    rows = [
        {"prompt": "Count:", "chosen": " 1 2", "rejected": " 2 1"},
        {"chosen": "Count: 1 2 3", "rejected": "Count: 3 2 1"},
    ]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{"prompt": None} | row for row in rows[::order]]), path
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[::order]))
    place = {("jsonl", 1): "Line 2", ("jsonl", -1): "Line 1", ("parquet", 1): "Row 1"}
    with pytest.raises(ConfigError) as error:
        read_sequences(Pairs(str(path)), text, "dpo", LengthLimit(99, "error"))
    assert str(error.value) == (
        f"{place.get((ending, order), 'Row 0')} of {path}: 'prompt' is missing; fix or remove the "
        "row."
    )


def test_names_of_prompts_are_those_that_no_format_reads():
    assert not PROMPT_LIKE & {"prompt", "chosen", "rejected", "completion", "label", "tools"}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "want"),
    [
        (USER, USER + GOOD, USER + BAD, USER),
        (USER, SYSTEM + USER + GOOD, SYSTEM + USER + BAD, SYSTEM + USER),
        (SYSTEM + USER, SYSTEM + USER + GOOD, SYSTEM + USER + BAD, SYSTEM + USER),
        (USER, USER + GOOD, BAD, USER),  # one side repeats it
        ("Sort: b a", USER + GOOD, BAD, USER),
        (USER + GOOD + MORE, USER + GOOD + MORE + BAD, BAD, USER + GOOD + MORE),
        ("Sort: b a", SYSTEM + USER + GOOD, SYSTEM + USER + BAD, SYSTEM + USER),
        (" Sort: b a\n", USER + GOOD, USER + BAD, USER),
        ("user: Sort: b a", USER + GOOD, USER + BAD, USER),
        (None, SYSTEM + USER + GOOD, SYSTEM + USER + BAD, SYSTEM + USER),
    ],
)
def test_a_repeated_prompt_stands_once(prompt, chosen, rejected, want):
    found = read({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert found.prompt == want
    assert found.completions == (chosen[-1:], rejected[-1:])


def test_a_completion_that_repeats_the_prompt_and_one_that_goes_on():
    def unpaired(prompt, completion):
        row = {"prompt": prompt, "completion": completion, "label": True}
        return read(row, "unpaired")[:2]

    for prompt in (USER, "Sort: b a"):
        assert unpaired(prompt, USER + GOOD) == (USER, (GOOD,))
        assert unpaired(prompt, SYSTEM + USER + GOOD) == (SYSTEM + USER, (GOOD,))
        assert unpaired(prompt, GOOD) == (USER, (GOOD,))
    assert unpaired(USER + GOOD, MORE + BAD) == (USER + GOOD, (MORE + BAD,))
    assert unpaired(USER, GOOD + MORE + BAD) == (USER, (GOOD + MORE + BAD,))


OTHER = [{"role": "user", "content": "Sort: b a "}]  # a space more


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "sentence"),
    [
        (OTHER, USER + GOOD, USER + BAD, "'prompt' and the first messages of 'chosen' differ"),
        (USER, GOOD, OTHER + BAD, "'prompt' and the first messages of 'rejected' differ"),
        (SYSTEM + USER, USER + GOOD, USER + BAD, "'prompt' and the first messages of 'chosen' dif"),
        ("And c?", USER + GOOD, USER + BAD, "'prompt' and the first messages of 'chosen' differ"),
        (USER, SYSTEM + USER + GOOD, BAD, "'chosen' and 'rejected' begin with different messages"),
        (
            USER + GOOD,
            USER + GOOD,
            USER + GOOD + BAD,
            "'chosen' or 'rejected' has no answer behind",
        ),
    ],
)
def test_a_prompt_that_is_repeated_differently_is_one_sentence(prompt, chosen, rejected, sentence):
    with pytest.raises(ValueError) as error:
        read({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert str(error.value).startswith(sentence)
    if "differ (" in str(error.value):
        assert str(error.value).endswith(" differ (make them equal, or leave one of them out)")


@pytest.mark.parametrize(
    ("prompt", "completion", "sentence"),
    [
        (OTHER, USER + GOOD, "'prompt' and the first messages of 'completion' differ (make them "),
        ("And c?", USER + GOOD, "'prompt' and the first messages of 'completion' differ (make "),
        (USER + GOOD, SYSTEM + MORE + BAD, "'prompt' and the first messages of 'completion' diff"),
        (USER + GOOD, USER + GOOD, "'completion' has no answer behind the prompt"),
    ],
)
def test_a_completion_that_repeats_it_differently_is_one_sentence(prompt, completion, sentence):
    with pytest.raises(ValueError) as error:
        read({"prompt": prompt, "completion": completion, "label": True}, "unpaired")
    assert str(error.value).startswith(sentence)


SCHEMA = {"type": "function", "function": {"name": "sort", "description": "Sorts words"}}
CALL = {"type": "function", "function": {"name": "sort", "arguments": {"words": ["b", "a"]}}}
SPELT = {"type": "function", "function": {"name": "sort", "arguments": '{"words": ["b", "a"]}'}}
CALLED = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOOL = [{"role": "tool", "content": "a b"}]
WRITES = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = {
    "an answer that is a call": {
        "prompt": USER,
        "chosen": CALLED,
        "rejected": BAD,
        "tools": [SCHEMA],
    },
    "content that is null": {
        "prompt": USER + [{"role": "assistant", "content": None, "tool_calls": [CALL]}] + TOOL,
        "chosen": GOOD,
        "rejected": BAD,
        "tools": [SCHEMA],
    },
    "arguments and schemas as JSON": {
        "prompt": USER + [{"role": "assistant", "tool_calls": [SPELT]}] + TOOL,
        "chosen": GOOD,
        "rejected": BAD,
        "tools": json.dumps([SCHEMA]),
    },
    "a call inside the answer": {
        "prompt": USER,
        "chosen": CALLED + TOOL + GOOD,
        "rejected": CALLED + TOOL + BAD,
        "tools": [SCHEMA],
    },
}
ASKED = f"<|im_start|>system\n{json.dumps([SCHEMA])}<|im_end|>\n<|im_start|>user\nSort: b a"
SAID = f"<call>{json.dumps(CALL['function'])}</call><|im_end|>\n"


@pytest.fixture(scope="module")
def writer(tokenizer_folder):
    loaded = ChatTokenizer.load(str(tokenizer_folder))
    loaded.tokenizer.chat_template = WRITES
    return ChatTokenizer(loaded.tokenizer, "here")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_tools_and_calls_reach_the_template(name, ending, writer, tmp_path):
    path = tmp_path / f"rows.{ending}"
    plain = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    rows = [ROWS[name], plain | {"tools": "" if isinstance(ROWS[name]["tools"], str) else []}]
    if ending == "parquet":  # gives every message and call the keys of all of them, null if absent
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_sequences(Pairs(str(path)), writer, "dpo", LengthLimit(500, "error"))
    decode = writer.tokenizer.decode
    (chosen, rejected), (other, _) = found.groups
    prompt = decode(chosen.prompt_ids)
    assert prompt.startswith(ASKED)
    assert decode(other.prompt_ids).startswith("<|im_start|>user\nSort: b a<|im_end|>")
    assert found.ignored == [] and found.counts["empty"] == 0
    targets = [decode(s.completion_ids[s.targets[len(s.prompt_ids) :]]) for s in found.groups[0]]
    if name == "an answer that is a call":
        assert targets == [SAID, "b a<|im_end|>\n"]
    elif name == "a call inside the answer":
        assert targets == [SAID + "a b<|im_end|>\n", SAID + "b a<|im_end|>\n"]
        assert "a b" not in decode(rejected.completion_ids[rejected.scored])
    else:
        assert SAID in prompt
        assert targets == ["a b<|im_end|>\n", "b a<|im_end|>\n"]
    assert chosen.prompt_id != other.prompt_id


def test_the_same_messages_with_other_tools_are_another_prompt(writer, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    tools = [None, [SCHEMA], [SCHEMA | {"strict": True}], [SCHEMA]]
    path.write_text("".join(json.dumps(row | {"tools": t}) + "\n" for t in tools))
    found = read_sequences(Pairs(str(path)), writer, "dpo", LengthLimit(500, "error"))
    none, one, other, again = (group[0].prompt_id for group in found.groups)
    assert len({none, one, other}) == 3 and one == again


def test_an_empty_answer_has_neither_text_nor_a_call():
    assert is_empty([{"role": "assistant", "content": " "}])
    assert not is_empty(CALLED)
    assert not is_empty([*CALLED, {"role": "assistant", "content": ""}])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tools": "[{"}, "'tools' is not JSON ("),
        ({"tools": [1]}, "'tools' is not a list of JSON schemas"),
        ({"tools": {"name": "sort"}}, "'tools' is not a list of JSON schemas"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "'tools' are given and 'prompt' is text, which has no place for them",
        ),
        (
            {"chosen": [{"role": "assistant", "tool_calls": ["sort"]}]},
            "'chosen' has 'tool_calls' that are no list of objects",
        ),
        (
            {"chosen": [{"role": "assistant", "content": None, "tool_calls": []}]},
            "'chosen' has a message without 'role' and 'content' as text",
        ),
    ],
)
def test_broken_tools_are_one_sentence(change, sentence):
    with pytest.raises(ValueError) as error:
        read(ROWS["an answer that is a call"] | change)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (ROWS["an answer that is a call"], "tools"),
        ({"prompt": USER, "chosen": CALLED, "rejected": BAD}, "tool_calls"),
    ],
)
def test_a_template_that_does_not_write_them_is_one_sentence(row, what, text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError) as error:
        read_sequences(Pairs(str(path)), text, "dpo", LengthLimit(500, "error"))
    assert str(error.value) == (
        f"Line 1 of {path}: the chat template of {text.where} does not write {what!r}; remove "
        "them, or use a model whose template does; fix or remove the row."
    )


@pytest.mark.parametrize(
    ("column", "value", "how"),
    [
        ("context", "b is first", "write it into 'prompt'"),
        ("input", "b a", "write it into 'prompt'"),
        ("Question", "b a", "write it into 'prompt'"),
        ("problem", "b a", "write it into 'prompt'"),
        ("history", [["Hi", "Hello"]], "write it into 'prompt'"),
        ("history", [{"role": "user", "content": "Hi"}], "write it into 'prompt'"),
        ("options", ["a b", "b a"], "write it into 'prompt'"),
        ("images", ["a.png"], "models of text see no image: leave out such rows"),
    ],
)
def test_a_part_of_the_question_in_a_column_of_its_own_is_not_passed_over(column, value, how):
    row = {"prompt": "Sort the words", "chosen": "1", "rejected": "2"}
    with pytest.raises(ValueError) as error:
        read(row | {column: value})
    assert str(error.value) == f"{column!r} would not be read ({how}, or remove the column)"
    assert read(row | {column: "Sort the"}).prompt == "Sort the words"  # the prompt holds it
    for nothing in (None, "", [], [None], False):
        assert read(row | {column: nothing}).prompt == "Sort the words"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["context", "Context"])
def test_such_a_column_is_found_in_every_kind_of_file(column, ending, text, tmp_path):
    rows = [{"prompt": "Count:", "chosen": " 1 2", "rejected": " 2 1", column: "to two"}]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=f"{column!r} would not be read"):
        read_sequences(Pairs(str(path)), text, "dpo", LengthLimit(99, "error"))


def test_system_messages_that_differ_are_named_where_there_is_a_prompt():
    sides = [[{"role": "system", "content": c}, *USER] for c in ("Be short.", "Be long.")]
    row = {"prompt": "Sort: b a", "chosen": sides[0] + GOOD, "rejected": sides[1] + BAD}
    with pytest.raises(ValueError) as error:
        read(row)
    want = "'chosen' and 'rejected' begin with different messages before the answer"
    assert str(error.value) == want
