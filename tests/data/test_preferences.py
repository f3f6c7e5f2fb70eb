"""Formats to token ids: TRL's goldens, every format and place, broken rows, the length limit."""

import functools
import json
import pathlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltapref_jax.config import ConfigError, Pairs
from deltapref_jax.data.blocks import BLOCK, json_row
from deltapref_jax.data.preferences import LengthLimit, cut, limit_lengths, read_sequences
from deltapref_jax.records import TokenSequence
from deltapref_jax.text.preference import Example, tokenise
from deltapref_jax.text.template import ChatTokenizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "data"
STUDENT = GOLDEN.parents[2] / "deltapref_jax" / "synthetic" / "models" / "student"
CASES = json.loads((GOLDEN / "data_goldens.json").read_text())["cases"]
USER = [{"role": "user", "content": "two plus two?"}]
GOOD, BAD = ([{"role": "assistant", "content": c}] for c in ("four.", "the dog."))


@functools.cache
def text(name="tokenizer_plain"):
    return ChatTokenizer.load(str(GOLDEN / name))


def write(rows, path):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ANY = LengthLimit(1000, "error")


def read(path, tokenizer="tokenizer_plain", kind="dpo", limit=ANY, workers=-1, **options):
    return read_sequences(Pairs(str(path), **options), text(tokenizer), kind, limit, workers)


def sequence(prompt, completion, **options):
    return TokenSequence(np.array(prompt, np.int32), np.array(completion, np.int32), **options)


def ids(groups):
    """Groups as plain lists: prompt, completions, first label."""
    return [
        (g[0].prompt_ids.tolist(), *(s.completion_ids.tolist() for s in g), g[0].desirable)
        for g in groups
    ]


def padded(sequences):
    """Input ids, attention mask, completion mask, as TRL's collator pads them."""
    width = max(len(p) + len(c) for p, c in sequences)
    rows = [([*p, *c], [0] * len(p) + [1] * len(c)) for p, c in sequences]
    return [
        [part + [0] * (width - len(part)) for part in column]
        for column in ([r[0] for r in rows], [[1] * len(r[0]) for r in rows], [r[1] for r in rows])
    ]


def name_of(case):
    return f"{case['trainer']}-{case['name']}-{case['tokenizer'][10:]}-{case['max_length']}"


def wanted_pairs(case):
    return [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"], True) for e in case["examples"]]


@pytest.mark.parametrize("case", [c for c in CASES if c["trainer"] == "dpo"], ids=name_of)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_goldens_of_pairs(case, ending, tmp_path):
    path = write(case["rows"], tmp_path / f"rows.{ending}")
    if case["name"] == "empty_completion":  # TRL trains on the end token; we drop the pair
        with pytest.raises(
            ConfigError, match="^All 1 pairs or examples of .* have an empty answer"
        ):
            read(path, case["tokenizer"])
        asked = [Example(r["prompt"], (r["chosen"], r["rejected"])) for r in case["rows"]]
        got = [
            (t.prompt.tolist(), *(c.tolist() for c in t.completions), True)
            for t in tokenise(text(case["tokenizer"]), asked)
        ]
        assert got == wanted_pairs(case)
        return
    found = read(path, case["tokenizer"])
    limit = LengthLimit(case["max_length"] or 1000, "truncate", case["truncation_mode"])
    if not case["kept"]:
        with pytest.raises(
            ConfigError,
            match=r"^None of the 1 pairs or examples is left: .* 1 have no answer within",
        ):
            read(path, case["tokenizer"], limit=limit)
        return
    assert ids(found.groups) == wanted_pairs(case)
    assert all(s.scored is None for g in found.groups for s in g)
    kept = read(path, case["tokenizer"], limit=limit).groups
    assert len(kept) == case["kept"]
    rows = [g[0] for g in kept] + [g[1] for g in kept]
    got = padded([(r.prompt_ids.tolist(), r.completion_ids.tolist()) for r in rows])
    assert got == [case["batch"][k] for k in ("input_ids", "attention_mask", "completion_mask")]


@pytest.mark.parametrize("case", [c for c in CASES if c["trainer"] == "kto"], ids=name_of)
def test_goldens_of_examples(case, tmp_path):
    groups = read(write(case["rows"], tmp_path / "rows.jsonl"), case["tokenizer"], "kto").groups
    if "chosen" in case["rows"][0]:  # TRL puts all chosen first; the order of ours is drawn anyway
        assert [g[0].desirable for g in groups] == [True, False] * 3
        groups = groups[::2] + groups[1::2]
    assert ids(groups) == [
        (e["prompt_ids"], e["completion_ids"], e["label"]) for e in case["examples"]
    ]
    size, length = case["per_device_train_batch_size"], case["max_length"] or 1000
    batch, first = case["first_batch"], [group[0] for group in groups[:size]]
    # explicit partners: TRL's rotation inside a batch
    partners = [first[i - 1] for i in range(len(first))]
    for prefix, others in (("", first), ("KL_", partners)):
        rows = [
            cut(s._replace(completion_ids=o.completion_ids), LengthLimit(length, "truncate"))
            for s, o in zip(first, others, strict=True)
        ]
        assert padded([(r.prompt_ids.tolist(), r.completion_ids.tolist()) for r in rows]) == [
            batch[prefix + k] for k in ("input_ids", "attention_mask", "completion_mask")
        ]


CHAT = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
WANT = [
    (
        [3, 357, 203, 88, 293, 366, 298, 35, 4, 203, 3, 314, 203],
        [74, 276, 86, 18, 4, 203],
        [338, 367, 18, 4, 203],
        True,
    )
]
SAME = {  # the same conversation in the shapes that people bring
    "explicit messages": CHAT,
    "implicit messages (open-instruct)": {"chosen": USER + GOOD, "rejected": USER + BAD},
    "text in front of conversations (UltraFeedback)": {
        "prompt": "two plus two?",
        "chosen": USER + GOOD,
        "rejected": USER + BAD,
    },
    "prompt repeated in the conversations": {
        "prompt": USER,
        "chosen": USER + GOOD,
        "rejected": USER + BAD,
    },
    "text prompt, message answers": CHAT | {"prompt": "two plus two?"},
    "message prompt, text answers": {"prompt": USER, "chosen": "four.", "rejected": "the dog."},
    "columns of messages": {
        k: {"role": [m["role"] for m in v], "content": [m["content"] for m in v]}
        for k, v in CHAT.items()
    },
    "null fields": {k: [m | {"tool_calls": None} for m in v] for k, v in CHAT.items()},
    "ids": {"prompt_ids": WANT[0][0], "chosen_ids": WANT[0][1], "rejected_ids": WANT[0][2]},
    "end token inside a message": CHAT
    | {"chosen": [{"role": "assistant", "content": "four.<|im_end|>"}]},
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_shape(name, tmp_path):
    found = read(write([SAME[name] | {"score": 1.5, "source": "x"}], tmp_path / "rows.jsonl"))
    assert ids(found.groups) == WANT
    assert found.format == ("token ids, paired" if name == "ids" else "paired")
    assert found.ignored == ["score", "source"]
    assert {k: n for k, n in found.counts.items() if n} == {"read": 1, "groups": 1}


def test_unpaired_ids_and_labels(tmp_path):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 4], "label": label} for label in (True, 0)]
    path = write(rows, tmp_path / "rows.jsonl")
    found = read(path, kind="kto").groups
    assert ids(found) == [([5, 6], [7, 4], True), ([5, 6], [7, 4], False)]
    assert [(g[0].group, g[0].trace_id) for g in found] == [
        (0, "Line 1 of rows.jsonl"),
        (1, "Line 2 of rows.jsonl"),
    ]


def test_the_place_of_a_completion_is_its_trace_id_and_pairs_share_a_number(tmp_path):
    path = write(many(2), tmp_path / "rows.jsonl")
    places = [f"Line {i} of rows.jsonl, {side}" for i in (1, 2) for side in ("chosen", "rejected")]
    for kind, numbers in (("dpo", [0, 0, 1, 1]), ("kto", [0, 1, 2, 3])):
        found = [s for group in read(path, kind=kind).groups for s in group]
        assert [s.trace_id for s in found] == places
        assert [s.group for s in found] == numbers
        assert [s.desirable for s in found] == [True, False] * 2
        assert found[0].prompt_id == found[1].prompt_id != found[2].prompt_id


def test_implicit_text_keeps_something_of_each_side(tmp_path):
    rows = [
        {"chosen": "the answer is", "rejected": "the answer is four"},
        {"chosen": "a b", "rejected": "a c"},
    ]
    found = read(write(rows, tmp_path / "rows.jsonl"))
    t = text().tokenizer
    said = [
        (t.decode(g[0].prompt_ids), *(t.decode(s.completion_ids) for s in g)) for g in found.groups
    ]
    assert said[1] == ("a", " b<|im_end|>", " c<|im_end|>")
    assert said[0][0] + said[0][1] == "the answer is<|im_end|>"
    assert said[0][0] + said[0][2] == "the answer is four<|im_end|>"


def test_what_the_user_says_in_an_answer_is_no_target_and_is_counted(tmp_path):
    again = [{"role": "user", "content": "again?"}]
    long = [USER + GOOD + again + GOOD, USER + BAD + again + BAD]
    rows = [{"chosen": long[0], "rejected": long[1]}, CHAT]
    path = write(rows, tmp_path / "rows.jsonl")
    t = text().tokenizer
    for kind, workers in (("dpo", 0), ("dpo", 1), ("kto", 0)):
        found = read(path, kind=kind, workers=workers)
        said = [s for group in found.groups for s in group]
        assert [t.decode(s.completion_ids[s.scored]) for s in said[:2]] == [
            "four.<|im_end|>\nfour.<|im_end|>\n",
            "the dog.<|im_end|>\nthe dog.<|im_end|>\n",
        ]
        assert [s.scored for s in said[2:]] == [None, None]
        between = "<|im_start|>user\nagain?<|im_end|>\n<|im_start|>assistant\n"
        assert found.counts["masked_turns"] == 2 * len(t(between)["input_ids"])
        assert said[0].targets.sum() == sum(said[0].scored)
    short = read(path, limit=LengthLimit(len(said[0].prompt_ids) + 8, "truncate"))
    assert short.counts["masked_turns"] == sum(
        int((~s.scored).sum()) for g in short.groups for s in g if s.scored is not None
    )
    assert 0 < short.counts["masked_turns"] < found.counts["masked_turns"]


def many(n):
    return [
        {"prompt": f"two plus {i} is", "chosen": f" {i + 2}.", "rejected": " the dog.", "n": i}
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 700 rows in every place that they may be in."""
    root, rows = tmp_path_factory.mktemp("sources"), many(700)
    (root / "folder").mkdir()
    write(rows, root / "folder" / "part.parquet")
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(root / "splits")
    return {
        "jsonl": write(rows, root / "rows.jsonl"),
        "parquet": write(rows, root / "rows.parquet"),
        "saved": root / "saved",
        "splits": root / "splits",
        "folder": root / "folder",
    }


def test_every_place_gives_the_same_rows_in_the_same_order(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    want = ids(read(sources["jsonl"]).groups)
    assert len(want) == 700 > 2 * BLOCK
    assert [text().tokenizer.decode(p) for p, *_ in want] == [row["prompt"] for row in many(700)]
    for name in ("parquet", "saved", "splits", "folder"):
        found = read(sources[name])
        assert ids(found.groups) == want, name
        assert found.ignored == ["n"], name
    assert len(read(sources["splits"], split="test").groups) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_order(sources, workers):
    whole = read(sources["jsonl"])
    found = read(sources["jsonl"], workers=workers)
    assert ids(found.groups) == ids(whole.groups)
    assert [s[2:] for g in found.groups for s in g] == [s[2:] for g in whole.groups for s in g]
    assert (found.counts, found.ignored, found.format) == (
        whole.counts,
        whole.ignored,
        whole.format,
    )


SAID, MORE = (f'[{{"role": "{role}", "content": "c"}}]' for role in ("assistant", "user"))
BROKEN = [  # a second row, and what is said of it
    (
        '{"prompt": "a", "chosen": ',
        "not JSON (Expecting value: line 1 column 26 (char 25)); a file has one object a line",
    ),
    ("[1]", "not a JSON object; a file has one object a line"),
    ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
    ('{"prompt": null, "chosen": "yes", "rejected": "yet"}', "'prompt' is missing"),
    (
        '{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}',
        "half a surrogate pair (\\ud800), which is no text",
    ),
    (
        '{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}',
        "the key 'chosen' stands twice in one object",
    ),
    (
        '{"prompt": "2 + 2 =", "chosen": "2 + 2 = 4", "rejected": " 5"}',
        "'chosen' begins with the whole 'prompt' and 'rejected' does not (take it out of 'chosen')",
    ),
    (
        '{"prompt": "2 + 2 =", "chosen": " 4", "rejected": "2 + 2 = 5"}',
        "'rejected' begins with the whole 'prompt' and 'chosen' does not (take it out of "
        "'rejected')",
    ),
    (
        f'{{"prompt": [{MORE[1:-1]}, {SAID[1:-1]}], "chosen": {SAID}, "rejected": {SAID}}}',
        "'prompt' ends with a message of the assistant, and the answer would be another turn "
        "behind it (write its words at the start of both answers)",
    ),
    (
        '{"prompt": "a", "chosen": "b", "rejected": 3}',
        "'rejected' is neither text nor a list of messages",
    ),
    (
        f'{{"prompt": "a", "chosen": "b", "rejected": {SAID}}}',
        "one of 'chosen' and 'rejected' is text and the other is messages",
    ),
    (
        f'{{"prompt": "a", "chosen": [{{"role": "assistant"}}], "rejected": {SAID}}}',
        "'chosen' has a message without 'role' and 'content' as text",
    ),
    (
        f'{{"prompt": "a", "chosen": {MORE}, "rejected": {MORE}}}',
        "'chosen' ends with a message of the user and must end with the assistant's",
    ),
    (
        '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}], '
        '"rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        "the conversations in 'chosen' and 'rejected' share no first message, so there is no "
        "prompt",
    ),
]


@pytest.mark.parametrize(("line", "what"), BROKEN)
def test_a_broken_row_is_one_sentence(line, what, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    with pytest.raises(ConfigError) as error:
        read(path)
    assert str(error.value) == f"Line 3 of {path}: {what}; fix or remove the row."


def test_json_nested_too_deep_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"^not JSON \(maximum recursion .*\); a file has one object a line$"
    ):
        json_row(b"[" * 200_000)


def test_a_broken_row_of_a_worker_is_the_same_sentence(tmp_path):
    path = write(
        [*many(300), {"prompt": "a", "chosen": "b", "rejected": None}], tmp_path / "rows.jsonl"
    )
    with pytest.raises(ConfigError) as error:
        read(path, workers=1)
    assert str(error.value) == f"Line 301 of {path}: 'rejected' is missing; fix or remove the row."


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "what"), [(b"\xff", "UnicodeDecodeError: "), (b"", "OSError: ")]
)
def test_a_damaged_page_is_one_sentence(damage, what, workers, tmp_path):
    """A byte that is no text, and a page header of zeros; the rest of the file stays good."""
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.Table.from_pylist(many(700)),
        path,
        row_group_size=BLOCK,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    data = bytearray(path.read_bytes())
    at = (
        data.index(b"two plus 600 is")
        if damage
        else pq.read_metadata(path).row_group(2).column(1).data_page_offset
    )
    data[at : at + 8] = (damage * 8).ljust(8, b"\0")
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read(path, workers=workers)
    said = str(error.value)
    assert said.startswith(f"Rows 512 to 699 of {path} cannot be read ({what}")
    assert said.endswith("); write the file again.")
    assert "\n" not in said


def test_messages_without_a_template_are_one_sentence_and_text_needs_none(tmp_path):
    bare = ChatTokenizer.load(str(GOLDEN / "tokenizer_plain"))
    bare.tokenizer.chat_template = None
    given = ChatTokenizer(bare.tokenizer, "there")
    path = write(many(3), tmp_path / "a.jsonl")
    assert len(read_sequences(Pairs(path), given, "dpo", ANY).groups) == 3
    with pytest.raises(ConfigError) as error:
        read_sequences(Pairs(write([CHAT], tmp_path / "b.jsonl")), given, "dpo", ANY)
    assert str(error.value) == (
        "The tokenizer of there has no chat template; add chat_template.jinja to its folder, or "
        "give text instead of messages."
    )


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            {"prompt": "a", "completion": "b", "label": "yes"},
            "'label' is 'yes' and must be true or false",
        ),
        (
            {"prompt_ids": [1.5], "completion_ids": [2], "label": 1},
            "'prompt_ids' is not a list of token ids from 0 to 383, the model's vocabulary",
        ),
        (
            {"prompt_ids": [1], "completion_ids": [384], "label": 1},
            "'completion_ids' is not a list of token ids from 0 to 383, the model's vocabulary",
        ),
        (
            {
                **{"prompt_ids": [1], "completion_ids": [2], "label": 1},
                "mismatched_prompt_ids": [384],
            },
            "'mismatched_prompt_ids' is not a list of token ids from 0 to 383, the model's "
            "vocabulary",
        ),
        (
            {
                **{"prompt_ids": [1, 3], "completion_ids": [2], "label": 1},
                "mismatched_prompt_ids": [1, 3],
            },
            "'mismatched_prompt_ids' is the row's own prompt, and KTO's baseline needs another one",
        ),
    ],
)
def test_a_broken_example_is_one_sentence(row, what, tmp_path):
    path = write([row], tmp_path / "rows.parquet")
    with pytest.raises(ConfigError) as error:
        read(path, kind="kto")
    assert str(error.value) == f"Row 0 of {path}: {what}; fix or remove the row."


def test_other_columns_and_places_are_one_sentence(tmp_path):
    path = write([{"question": "a", "good": "b"}], tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError) as error:
        read(path)
    assert str(error.value) == (
        f"{path} has the columns good, question, which are no preference data; rename them to one "
        "of: prompt_ids, chosen_ids, rejected_ids; prompt_ids, completion_ids, label; chosen, "
        "rejected; prompt, completion, label."
    )
    for name, content, sentence in (
        (
            "none.jsonl",
            None,
            r"^There is no data file or folder \S+none\.jsonl; check config\.data\.path\.$",
        ),
        ("empty.jsonl", "\n", r"^\S+empty\.jsonl holds no row; give it some\.$"),
        (
            "cut.parquet",
            "PAR1",
            r"^\S+cut\.parquet is not a readable Parquet file \(.*\); write it again\.$",
        ),
        (
            "rows.csv",
            "a,b\n",
            r"^The data file \S+rows\.csv ends in neither \.jsonl nor \.parquet; convert ",
        ),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=sentence):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("prompt", "full", "empty"),
    [
        ("a", "b", ["", " \n"]),
        (USER, BAD, [[{"role": "assistant", "content": c}] for c in ("", " ")]),
        ([5], [6], [[]]),
    ],
)
def test_an_empty_answer_is_dropped_and_counted(prompt, full, empty, tmp_path):
    ids = "_ids" * isinstance(full[0], int)
    rows = [
        {f"prompt{ids}": prompt, f"chosen{ids}": full, f"rejected{ids}": other}
        for other in [full, *empty]
    ]
    path = write(rows, tmp_path / "rows.jsonl")
    pairs, examples, chosen = (read(path, kind=kind) for kind in ("dpo", "kto", "sft"))
    assert [s.trace_id for g in pairs.groups for s in g] == [
        f"Line 1 of rows.jsonl, {side}" for side in ("chosen", "rejected")
    ]
    assert pairs.counts["empty"] == examples.counts["empty"] == len(empty)
    assert [g[0].desirable for g in examples.groups] == [True, False] + [True] * len(empty)
    assert len(chosen.groups) == chosen.counts["undesirable"] == len(rows)
    assert (pairs.counts["same"], examples.counts["same"]) == (1, 0)
    with pytest.raises(ConfigError) as error:
        read(write(rows[1:], tmp_path / "rows.jsonl"))
    assert str(error.value) == (
        f"All {len(empty)} pairs or examples of {path} have an empty answer; give it some that "
        "have none."
    )


def test_an_objective_without_its_data_is_one_sentence(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": False}]
    path = write(rows, tmp_path / "rows.jsonl")
    for kind, sentence in (
        (
            "dpo",
            f"{path} holds labelled examples and no pairs, which the objective 'dpo' needs; set "
            "config.objective.kind to 'kto' or 'sft', or give chosen and rejected.",
        ),
        (
            "sft",
            f"{path} has no example that is chosen or labelled true, which SFT trains on; choose "
            "another objective.",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            read(path, kind=kind)
        assert str(error.value) == sentence
    assert len(read(path, kind="kto").groups) == 1


@pytest.fixture
def lengths(tmp_path):
    """Three pairs of token ids: short, a long chosen, a prompt that fills ten tokens."""
    rows = [
        {"prompt_ids": [5] * p, "chosen_ids": [*range(10, 10 + c), 4], "rejected_ids": [7, 4]}
        for p, c in ((2, 3), (4, 9), (10, 1))
    ]
    return read(write(rows, tmp_path / "rows.jsonl")).groups


@pytest.mark.parametrize(
    ("rule", "mode", "kept", "counts"),
    [
        (
            "drop",
            "keep_start",
            [([5] * 2, [10, 11, 12, 4], [7, 4])],
            {"too_long": 2, "truncated": 0, "truncated_to_nothing": 0},
        ),
        (
            "truncate",
            "keep_start",
            [([5] * 2, [10, 11, 12, 4], [7, 4]), ([5] * 4, [*range(10, 16)], [7, 4])],
            {"too_long": 0, "truncated": 1, "truncated_to_nothing": 1},
        ),
        (
            "truncate",
            "keep_end",
            [
                ([5] * 2, [10, 11, 12, 4], [7, 4]),
                ([], [*range(10, 19), 4], [7, 4]),
                ([5] * 8, [10, 4], [7, 4]),
            ],
            {"too_long": 0, "truncated": 3, "truncated_to_nothing": 0},
        ),
    ],
)
def test_the_length_rule_counts_what_it_does(lengths, rule, mode, kept, counts):
    found, got = limit_lengths(lengths, LengthLimit(10, rule, mode))
    assert [g[:3] for g in ids(found)] == kept
    assert got == counts | {"unscored": 0}
    assert all(s.length <= 10 for g in found for s in g)


def test_too_long_may_be_an_error(lengths):
    with pytest.raises(
        ConfigError,
        match=r"^Line 2 of \S+ has a sequence of 14 tokens, and "
        r"config\.training\.row_length is 10; raise it, or set "
        r"config\.training\.over_length to 'drop' or 'truncate'\.$",
    ):
        limit_lengths(lengths, LengthLimit(10, "error"))


def test_a_mask_is_cut_as_its_completion():
    masked = sequence(range(5), range(10, 16), scored=np.array([1, 1, 0, 0, 1, 1], bool))
    for mode, length, want in (
        ("keep_start", 20, [True, True, False, False, True, True]),
        ("keep_start", 9, [True, True, False, False]),
        ("keep_start", 7, None),  # all that is left is a target
        ("keep_end", 4, [False, False, True, True]),
        ("keep_end", 2, None),
    ):
        short = cut(masked, LengthLimit(length, "truncate", mode))
        assert (short.scored if want is None else short.scored.tolist()) == want
        assert short.length == min(length, 11)
        assert short.targets.sum() == (len(short.completion_ids) if want is None else sum(want)) - (
            not len(short.prompt_ids) and want is None
        )
    late = masked._replace(scored=np.array([0, 0, 0, 0, 0, 1], bool))
    assert cut(late, LengthLimit(10, "truncate")) is None
    groups, counts = limit_lengths([[masked], [late]], LengthLimit(10, "truncate"))
    assert ([len(groups), counts["truncated"], counts["truncated_to_nothing"]]) == [1, 1, 1]


def test_a_completion_that_nothing_scores_is_dropped_and_counted(tmp_path):
    rows = [{"prompt_ids": p, "completion_ids": [4], "label": True} for p in ([], [5])]
    found = read(write(rows, tmp_path / "rows.jsonl"), kind="kto", limit=LengthLimit(10, "drop"))
    assert (ids(found.groups), found.counts["unscored"]) == ([([5], [4], True)], 1)
    assert cut(sequence([5, 6], [7]), LengthLimit(2, "truncate")) is None


def test_prompts_without_text_and_prompts_that_answers_share_are_counted(tmp_path):
    rows = [
        {"prompt": "", "chosen": "four", "rejected": "five"},
        {"prompt": " \n", "chosen": "four", "rejected": "five"},
        {"prompt": "2 + 2?", "chosen": "four", "rejected": "five"},
    ]
    counts = read(write(rows, tmp_path / "a.jsonl")).counts
    assert (counts["empty_prompt"], counts["shared_prompt"]) == (2, 0)
    empty = {"prompt": [{"role": "user", "content": " "}], "chosen": GOOD, "rejected": BAD}
    assert read(write([empty], tmp_path / "b.jsonl")).counts["empty_prompt"] == 1
    rows = [{"chosen": "It is four", "rejected": "It is five"}] * 2
    counts = read(write(rows, tmp_path / "c.jsonl")).counts
    assert (counts["empty_prompt"], counts["shared_prompt"]) == (0, 2)
    rows = [{"chosen": USER + GOOD, "rejected": USER + BAD}]
    assert read(write(rows, tmp_path / "d.jsonl")).counts["shared_prompt"] == 0


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_are_counted(label, tmp_path):
    rows = [{"prompt": "2 + 2?", "completion": c, "label": label} for c in ("four", "five")]
    path = write(rows, tmp_path / "a.jsonl")
    assert read(path, kind="kto").counts["one_label"] == 2
    path = write([*rows, rows[0] | {"label": not label}], tmp_path / "b.jsonl")
    assert read(path, kind="kto").counts["one_label"] == 0
    if label:
        assert read(write(rows, tmp_path / "c.jsonl"), kind="sft").counts["one_label"] == 0


@pytest.mark.parametrize("tokenizer", ["tokenizer_plain", "tokenizer_bos"])
def test_what_the_user_says_in_a_conversation_of_text_is_no_target(tokenizer, tmp_path):
    asked = "\n\nHuman: 2 + 2?\n\nAssistant:"
    chosen, rejected = (
        f"{asked} {a}\n\nHuman: Sure?\n\nAssistant: {b}" for a, b in (("4", "Yes"), ("5", "No"))
    )
    path = write([{"chosen": chosen, "rejected": rejected}], tmp_path / "x.jsonl")
    found = read(path, tokenizer)
    decode = text(tokenizer).tokenizer.decode
    end = text(tokenizer).tokenizer.eos_token
    scored = [decode(s.completion_ids[s.scored]) for s in found.groups[0]]
    assert scored == [f" 4 Yes{end}", f" 5 No{end}"]
    whole = [decode(s.completion_ids) for s in found.groups[0]]
    assert whole == [c.removeprefix(asked) + end for c in (chosen, rejected)]
    assert found.counts["masked_turns"] == sum(int((~s.scored).sum()) for s in found.groups[0])


def test_a_prompt_that_text_answers_repeat_stands_once_and_is_counted(tmp_path):
    asked = "Q: 2 + 2?\nA:"
    rows = [
        {"prompt": asked, "chosen": asked + " four", "rejected": asked + " five"},
        {"prompt": asked, "chosen": " four", "rejected": " five"},
        {"prompt": "Hello", "chosen": "Hello! And you?", "rejected": "Yes"},
    ]
    found = read(write(rows, tmp_path / "a.jsonl"))
    first, second, third = ids(found.groups)
    assert first == second
    assert third != first
    counts = found.counts
    assert (counts["repeated_prompt"], counts["echoed_prompt"], counts["groups"]) == (1, 1, 3)
    rows = [{"prompt": asked, "completion": asked * n + " four", "label": True} for n in (0, 1)]
    found = read(write(rows, tmp_path / "b.jsonl"), kind="kto")
    assert ids(found.groups)[0] == ids(found.groups)[1]
    assert found.counts["repeated_prompt"] == 1


def test_rows_of_text_among_rows_of_messages_are_counted(tmp_path):
    rows = [
        {"prompt": "2 + 2?", "chosen": "four", "rejected": "five"},
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    ]
    assert read(write(rows, tmp_path / "a.jsonl")).counts["text_among_messages"] == 1
    for i, row in enumerate(rows):
        assert read(write([row] * 2, tmp_path / f"{i}.jsonl")).counts["text_among_messages"] == 0


def test_a_prompt_that_merges_with_its_answers_is_counted(tmp_path):
    rows = [{"prompt": "a", "chosen": "y", "rejected": "b"}]
    path = write(rows, tmp_path / "a.jsonl")
    text = ChatTokenizer.load(str(STUDENT))
    found = read_sequences(Pairs(str(path)), text, "dpo", ANY)
    assert [len(s.prompt_ids) for s in found.groups[0]] == [0, 0]
    assert (found.counts["merged_prompt"], found.counts["empty_prompt"]) == (1, 0)
    path = write([{"prompt": "2 + 2?", "chosen": "y", "rejected": "b"}], tmp_path / "b.jsonl")
    assert read_sequences(Pairs(str(path)), text, "dpo", ANY).counts["merged_prompt"] == 0


def test_messages_of_weight_0_are_no_targets(tmp_path):
    def counts(weight):
        turns = [GOOD[0] | {"weight": weight}, *USER, *GOOD]
        rows = [{"prompt": USER, "chosen": turns, "rejected": BAD}]
        found = read(write(rows, tmp_path / f"{weight}.jsonl"))
        return found.counts["masked_turns"], found.groups[0][0]

    (scored, whole), (masked, cut_out) = counts(1), counts(0)
    assert masked > scored > 0
    assert whole.completion_ids.tolist() == cut_out.completion_ids.tolist()
    dropped = whole.scored & ~cut_out.scored
    said = text().tokenizer.decode(whole.completion_ids[dropped])
    assert said.startswith(GOOD[0]["content"])
    assert not (cut_out.scored & ~whole.scored).any()
    for weight, sentence in (
        (0, "an answer has no message of the assistant but those with 'weight' 0"),
        (0.5, "'chosen' has a message with 'weight' 0.5, which must be 0 or 1"),
    ):
        row = {"prompt": USER, "chosen": [GOOD[0] | {"weight": weight}], "rejected": BAD}
        with pytest.raises(ConfigError, match=sentence):
            read(write([row], tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["Prompt", "Chosen", "Rejected"], "'Chosen' is perhaps 'chosen', 'Prompt' is perhaps"),
        (["prompt", "accepted", "rejected"], "'accepted' is perhaps 'chosen'"),
        (["prompt", "response_chosen", "rejected"], "'response_chosen' is perhaps 'chosen'"),
        (["prompt", "completions", "label"], "'completions' is perhaps 'completion'"),
    ],
)
def test_columns_that_nearly_match_are_named(columns, hint, tmp_path):
    with pytest.raises(ConfigError) as error:
        read(write([dict.fromkeys(columns, "a")], tmp_path / "rows.jsonl"))
    assert f"prompt, completion, label ({hint}" in str(error.value)
