"""Pairs in the columns that TRL and its kin read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltapref_jax.config import ConfigError

Row = dict[str, Any]


def trl_rows(pairs: Sequence[Row], prompts: Sequence[Row], traces: Sequence[Row]) -> list[Row]:
    """{prompt, chosen, rejected} as message lists (explicit prompt), with models, summed ratings and correctness."""
    asked = {row["prompt_id"]: json.loads(row["messages"]) for row in prompts}
    text = {row["trace_id"]: row["text"] for row in traces}

    def answer(trace_id: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text[trace_id]}]

    return [
        {
            "prompt": asked[p["prompt_id"]],
            "chosen": answer(p["chosen_id"]),
            "rejected": answer(p["rejected_id"]),
            "chosen_model": p["chosen_model"],
            "rejected_model": p["rejected_model"],
            "chosen_rating": None if p["chosen_rating"] is None else float(sum(p["chosen_rating"])),
            "rejected_rating": None if p["rejected_rating"] is None else float(sum(p["rejected_rating"])),
            "chosen_correct": p["chosen_correct"],
            "rejected_correct": p["rejected_correct"],
        }
        for p in pairs
    ]


def write_rows(rows: Sequence[Row], path: str) -> None:
    """Writes Parquet or JSON lines, by the file's ending.

    Raises:
      ConfigError: another ending.
    """
    if path.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.endswith(".jsonl"):
        Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        raise ConfigError(f"The output {path!r} ends in neither .parquet nor .jsonl; name one of the two.")
