"""Pairs in the columns that TRL and other trainers read, as messages or as token ids."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltapref_jax.config import ConfigError
from deltapref_jax.records import Pair, Prompt, TokenSequence, Trace

Row = dict[str, Any]


def trl_rows(
    pairs: Sequence[Pair],
    prompts: Sequence[Prompt],
    traces: Sequence[Trace],
    ratings: Mapping[str, float],
) -> list[Row]:
    """{prompt, chosen, rejected} as message lists, with models, ratings and correctness.

    Args:
      pairs: become one row each.
      prompts: at least those of the pairs.
      traces: at least those of the pairs.
      ratings: trace id to rating points; the rating of any other trace is null.
    """
    asked = {prompt.prompt_id: prompt.chat() for prompt in prompts}
    text = {trace.trace_id: trace.text for trace in traces}

    def answer(trace_id: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text[trace_id]}]

    return [
        {
            "prompt": asked[p.prompt_id],
            "chosen": answer(p.chosen_id),
            "rejected": answer(p.rejected_id),
            "chosen_model": p.chosen_model,
            "rejected_model": p.rejected_model,
            "chosen_rating": ratings.get(p.chosen_id),
            "rejected_rating": ratings.get(p.rejected_id),
            "chosen_correct": p.chosen_correct,
            "rejected_correct": p.rejected_correct,
        }
        for p in pairs
    ]


def token_rows(pairs: Sequence[Pair], sequences: Mapping[str, TokenSequence]) -> list[Row]:
    """{prompt_ids, chosen_ids, rejected_ids} rows: exactly the tokens that were scored.

    Args:
      pairs: become one row each.
      sequences: trace id to its sequence, for at least the traces of the pairs.

    Raises:
      ConfigError: a sequence has tokens that are no targets, or the two prompts of a pair differ;
        neither can be written in these columns.
    """
    rows = []
    for pair in pairs:
        chosen, rejected = _halves(pair, sequences)
        if not np.array_equal(chosen.prompt_ids, rejected.prompt_ids):
            raise ConfigError(
                f"Pair {pair.pair_id} has different prompt tokens before its chosen and its "
                "rejected trace; export it as messages."
            )
        rows.append(
            {
                "prompt_ids": chosen.prompt_ids.tolist(),
                "chosen_ids": chosen.completion_ids.tolist(),
                "rejected_ids": rejected.completion_ids.tolist(),
            }
        )
    return rows


def labelled_token_rows(
    pairs: Sequence[Pair],
    sequences: Mapping[str, TokenSequence],
    mismatched: Mapping[str, TokenSequence],
) -> list[Row]:
    """{prompt_ids, completion_ids, label, mismatched_prompt_ids} rows: a study's KTO examples.

    Args:
      pairs: become two rows each, chosen first.
      sequences: trace id to its sequence, for at least the traces of the pairs.
      mismatched: trace id to its completion behind another prompt; null for any other trace.

    Raises:
      ConfigError: a sequence has tokens that are no targets.
    """
    rows = []
    for pair in pairs:
        for sequence, label in zip(_halves(pair, sequences), (True, False), strict=True):
            other = mismatched.get(sequence.trace_id)
            rows.append(
                {
                    "prompt_ids": sequence.prompt_ids.tolist(),
                    "completion_ids": sequence.completion_ids.tolist(),
                    "label": label,
                    "mismatched_prompt_ids": None if other is None else other.prompt_ids.tolist(),
                }
            )
    return rows


def _halves(
    pair: Pair, sequences: Mapping[str, TokenSequence]
) -> tuple[TokenSequence, TokenSequence]:
    """The chosen and the rejected sequence, all of whose completion tokens are targets."""
    chosen, rejected = sequences[pair.chosen_id], sequences[pair.rejected_id]
    if chosen.scored is not None or rejected.scored is not None:
        raise ConfigError(
            f"Pair {pair.pair_id} has completion tokens that are no targets, which token ids "
            "cannot express; export it as messages."
        )
    return chosen, rejected


def check_output(path: str) -> None:
    """Checks the name of a file to write, before there is anything to be written.

    Raises:
      ConfigError: it has an unknown ending, or its folder is not there.
    """
    if not path.endswith((".parquet", ".jsonl")):
        raise ConfigError(
            f"The output {path!r} ends in neither .parquet nor .jsonl; name one of the two."
        )
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(
            f"The output {path} cannot be written (No such file or directory); name a file in a "
            "folder that is there."
        )


def write_rows(rows: Sequence[Row], path: str) -> None:
    """Writes Parquet or JSON lines, by the file's ending.

    Raises:
      ConfigError: see `check_output`, or the file cannot be written.
    """
    check_output(path)
    try:
        if path.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(path).write_text(lines, encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"The output {path} cannot be written ({e.strerror or e}); name a file in a folder "
            "that is there."
        ) from e
