"""Pairs in the columns that TRL and its kin read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltapref_jax.config import ConfigError

Row = dict[str, Any]


def trl_rows(
    pairs: Sequence[Row],
    prompts: Sequence[Row],
    traces: Sequence[Row],
    ratings: Mapping[str, float],
) -> list[Row]:
    """{prompt, chosen, rejected} as message lists (explicit prompt), with models, ratings and correctness.

    Args:
      pairs: of PAIR.
      prompts: of PROMPT.
      traces: of TRACE.
      ratings: trace id to rating points; null in the rows of other traces.
    """
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
            "chosen_rating": ratings.get(p["chosen_id"]),
            "rejected_rating": ratings.get(p["rejected_id"]),
            "chosen_correct": p["chosen_correct"],
            "rejected_correct": p["rejected_correct"],
        }
        for p in pairs
    ]


def write_rows(rows: Sequence[Row], path: str) -> None:
    """Writes Parquet or JSON lines, by the file's ending.

    Raises:
      ConfigError: another ending, or the file cannot be written.
    """
    if not path.endswith((".parquet", ".jsonl")):
        raise ConfigError(
            f"The output {path!r} ends in neither .parquet nor .jsonl; name one of the two."
        )
    try:
        if path.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(path).write_text(lines, encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"The output {path} cannot be written ({e.strerror or e}); name a file in a folder that is "
            "there."
        ) from e
