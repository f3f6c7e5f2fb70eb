import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from deltapref_jax.config import ConfigError, Pairs
from deltapref_jax.data.export import token_rows, trl_rows, write_rows
from deltapref_jax.data.preferences import LengthLimit, read_sequences
from deltapref_jax.records import Pair, Prompt, TokenSequence, Trace

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1?"}]
PROMPTS = [Prompt("p", "task", json.dumps(CHAT), "2", "", "{}")]
TRACES = [
    Trace(t, "p", "big", "", 0, text, np.array([1], np.int32), "eos", -1.0, 1)
    for t, text in (("a", "Answer: 2"), ("b", "Answer: 3"), ("c", "é"))
]
PAIRS = [
    Pair("1", "p", "a", "b", "big", "small", None, None, True, False),
    Pair("2", "p", "c", "b", "big", "small", None, None, None, False),
]
EXPECTED = [
    {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "Answer: 2"}],
        "rejected": [{"role": "assistant", "content": "Answer: 3"}],
        "chosen_model": "big",
        "rejected_model": "small",
        "chosen_rating": 7.5,
        "rejected_rating": 2.5,
        "chosen_correct": True,
        "rejected_correct": False,
    },
    {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "é"}],
        "rejected": [{"role": "assistant", "content": "Answer: 3"}],
        "chosen_model": "big",
        "rejected_model": "small",
        "chosen_rating": None,
        "rejected_rating": 2.5,
        "chosen_correct": None,
        "rejected_correct": False,
    },
]


def test_pairs_become_trl_columns():
    assert trl_rows(PAIRS, PROMPTS, TRACES, {"a": 7.5, "b": 2.5}) == EXPECTED


def sequence(prompt, completion, **options):
    return TokenSequence(np.array(prompt, np.int32), np.array(completion, np.int32), **options)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_token_rows_are_trained_on_with_the_tokens_that_were_scored(tmp_path, text, ending):
    """The ids are no canonical tokenisation of their text: they must not be tokenised again."""
    scored = {t: sequence([5, 6], c) for t, c in (("a", [7, 2]), ("b", [8, 9, 2]), ("c", [7]))}
    rows = token_rows(PAIRS, scored)
    assert rows == [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]},
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9, 2]},
    ]
    path = str(tmp_path / f"tokens.{ending}")
    write_rows(rows, path)
    found = read_sequences(Pairs(path), text, "dpo", LengthLimit(10, "error"))
    wanted = [[scored[p.chosen_id], scored[p.rejected_id]] for p in PAIRS]
    assert [[s.sequence_id for s in group] for group in found.groups] == [
        [s.sequence_id for s in group] for group in wanted
    ]


@pytest.mark.parametrize(
    ("rejected", "sentence"),
    [
        (
            sequence([5], [7, 2], scored=np.array([False, True])),
            "Pair 1 has completion tokens that are no targets, which token ids cannot express; "
            "export it as messages.",
        ),
        (
            sequence([6], [7, 2]),
            "Pair 1 has different prompt tokens before its chosen and its rejected trace; export "
            "it as messages.",
        ),
    ],
)
def test_what_token_ids_cannot_express_is_one_sentence(rejected, sentence):
    with pytest.raises(ConfigError) as error:
        token_rows(PAIRS[:1], {"a": sequence([5], [8, 2]), "b": rejected})
    assert str(error.value) == sentence


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_written_files_read_back_with_datasets(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(tmp_path / f"pairs.{ending}")
    write_rows(EXPECTED, path)
    rows = (
        pq.read_table(path).to_pylist()
        if ending == "parquet"
        else [json.loads(line) for line in Path(path).read_text().splitlines()]
    )
    assert rows == EXPECTED
    kind = "json" if ending == "jsonl" else ending
    assert list(datasets.load_dataset(kind, data_files=path, split="train")) == EXPECTED


def test_other_ending_is_one_sentence():
    with pytest.raises(
        ConfigError,
        match=r"^The output 'pairs\.csv' ends in neither \.parquet nor \.jsonl; name one "
        r"of the two\.$",
    ):
        write_rows(EXPECTED, "pairs.csv")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_folder_that_is_not_there_is_one_sentence(tmp_path, ending):
    with pytest.raises(
        ConfigError,
        match=r"^The output \S+ cannot be written \(.*No such file or directory.*\); name "
        r"a file in a folder that is there\.$",
    ):
        write_rows(EXPECTED, str(tmp_path / "nowhere" / f"pairs.{ending}"))
