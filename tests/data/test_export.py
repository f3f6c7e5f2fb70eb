import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from deltapref_jax.config import ConfigError
from deltapref_jax.data.export import trl_rows, write_rows

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1?"}]
PROMPTS = [{"prompt_id": "p", "messages": json.dumps(CHAT)}]
TRACES = [
    {"trace_id": t, "text": text}
    for t, text in (("a", "Answer: 2"), ("b", "Answer: 3"), ("c", "é"))
]
PAIRS = [
    {
        "pair_id": "1",
        "prompt_id": "p",
        "chosen_id": "a",
        "rejected_id": "b",
        "chosen_model": "big",
        "rejected_model": "small",
        "chosen_correct": True,
        "rejected_correct": False,
    },
    {
        "pair_id": "2",
        "prompt_id": "p",
        "chosen_id": "c",
        "rejected_id": "b",
        "chosen_model": "big",
        "rejected_model": "small",
        "chosen_correct": None,
        "rejected_correct": False,
    },
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
