import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from deltapref_jax.config import ConfigError
from deltapref_jax.data.export import trl_rows, write_rows

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1?"}]
PROMPTS = [{"prompt_id": "p", "messages": json.dumps(CHAT)}]
TRACES = [{"trace_id": t, "text": text} for t, text in (("a", "Answer: 2"), ("b", "Answer: 3"), ("c", "é"))]
PAIRS = [
    {"pair_id": "1", "prompt_id": "p", "chosen_id": "a", "rejected_id": "b", "chosen_model": "big",
     "rejected_model": "small", "chosen_rating": [4.5, 3.0], "rejected_rating": [1.5, 1.0], "chosen_correct": True,
     "rejected_correct": False},
    {"pair_id": "2", "prompt_id": "p", "chosen_id": "c", "rejected_id": "b", "chosen_model": "big",
     "rejected_model": "small", "chosen_rating": None, "rejected_rating": None, "chosen_correct": None,
     "rejected_correct": False},
]
EXPECTED = [
    {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "Answer: 2"}],
     "rejected": [{"role": "assistant", "content": "Answer: 3"}], "chosen_model": "big", "rejected_model": "small",
     "chosen_rating": 7.5, "rejected_rating": 2.5, "chosen_correct": True, "rejected_correct": False},
    {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "é"}],
     "rejected": [{"role": "assistant", "content": "Answer: 3"}], "chosen_model": "big", "rejected_model": "small",
     "chosen_rating": None, "rejected_rating": None, "chosen_correct": None, "rejected_correct": False},
]


def test_pairs_become_trl_columns():
    assert trl_rows(PAIRS, PROMPTS, TRACES) == EXPECTED


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_written_files_read_back_with_datasets(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(tmp_path / f"pairs.{ending}")
    write_rows(EXPECTED, path)
    rows = pq.read_table(path).to_pylist() if ending == "parquet" else [
        json.loads(line) for line in Path(path).read_text().splitlines()]
    assert rows == EXPECTED
    kind = "json" if ending == "jsonl" else ending
    assert list(datasets.load_dataset(kind, data_files=path, split="train")) == EXPECTED


def test_other_ending_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^The output 'pairs\.csv' ends in neither \.parquet nor \.jsonl; name one "
                                          r"of the two\.$"):
        write_rows(EXPECTED, "pairs.csv")
