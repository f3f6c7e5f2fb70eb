"""Schemas of the tables that stages exchange (Parquet). One row per trace wherever work is per trace.

Joins go by `prompt_id` and `trace_id`; both are content hashes, so they mean the same in every workspace.
"""

import hashlib
import json
from typing import Any

import pyarrow as pa


def digest(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of `parts` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


PROMPT = pa.schema(
    [
        ("prompt_id", pa.string()),  # digest of task and messages
        ("task", pa.string()),  # synthetic family, reasoning-gym task, or the file's stem
        ("messages", pa.string()),  # JSON list of {"role", "content"}; the last one is the user's
        ("answer", pa.string()),  # reference answer; "" where there is none
        ("checker", pa.string()),  # one of config.CHECKERS
        (
            "meta",
            pa.string(),
        ),  # JSON that the checker needs (the problem's parameters), "{}" otherwise
    ]
)

TRACE = pa.schema(
    [
        ("trace_id", pa.string()),  # digest of prompt, generator identity and sample index
        ("prompt_id", pa.string()),
        ("generator", pa.string()),  # name in the config
        ("weights", pa.string()),  # hash of the generator's weights
        ("sample", pa.int32()),  # index among the traces of this prompt by this generator
        ("text", pa.string()),  # decoded without special tokens and without the stop string
        (
            "token_ids",
            pa.list_(pa.int32()),
        ),  # as sampled, the end token included where there is one
        ("finish", pa.string()),  # "eos", "stop" or "length"
        ("logprob", pa.float64()),  # nats; sum over token_ids, temperature 1, unfiltered
        ("tokens", pa.int32()),  # len(token_ids)
    ]
)

VERDICT = pa.schema(
    [
        ("trace_id", pa.string()),
        ("correct", pa.bool_()),  # null where the prompt has no checker
        ("answer", pa.string()),  # what was extracted from the trace; "" if nothing
        ("note", pa.string()),  # "", "no answer", "unfinished", "timeout" or the checker's error
    ]
)

RATING = pa.schema(
    [
        ("trace_id", pa.string()),
        ("judge", pa.string()),
        ("dimension", pa.string()),
        ("rating", pa.float32()),  # expectation over the labels 1 to 5
        ("spread", pa.float32()),  # standard deviation over the labels
        ("mass", pa.float32()),  # probability on the label set before renormalising
        ("distribution", pa.list_(pa.float32())),  # [5], over the labels 1 to 5, sums to 1
    ]
)

LOGPROB = pa.schema(
    [
        ("prompt_id", pa.string()),  # of the context
        ("trace_id", pa.string()),  # of the completion
        ("matched", pa.bool_()),  # False: the completion belongs to another prompt (KTO's baseline)
        ("logprob", pa.float64()),  # nats; sum over the completion's target tokens
        (
            "tokens",
            pa.int32(),
        ),  # target tokens summed over; 0 with a null logprob where the row was too long
    ]
)

PAIR = pa.schema(
    [
        ("pair_id", pa.string()),  # digest of chosen_id and rejected_id
        ("prompt_id", pa.string()),
        ("chosen_id", pa.string()),  # trace ids
        ("rejected_id", pa.string()),
        ("chosen_model", pa.string()),  # generator names
        ("rejected_model", pa.string()),
        (
            "chosen_rating",
            pa.list_(pa.float32()),
        ),  # by the arm's judge, in its order of dimensions; null if unrated
        ("rejected_rating", pa.list_(pa.float32())),
        ("chosen_correct", pa.bool_()),
        ("rejected_correct", pa.bool_()),
    ]
)

SEQUENCE = pa.schema(
    [  # preference data from a file: one row per prompt with one completion, after the length rule
        ("group", pa.int32()),  # the two rows of a pair have one number, chosen first
        ("prompt_id", pa.string()),  # digest of the prompt as it was given
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),  # all of it is scored
        ("desirable", pa.bool_()),  # chosen, or labelled true
        ("where", pa.string()),  # file and line
    ]
)

RESULT = pa.schema(
    [  # evaluation: one row per question and sample
        ("suite", pa.string()),
        ("domain", pa.string()),
        ("task", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("correct", pa.bool_()),  # an unfinished trace is wrong
        ("finish", pa.string()),
        ("tokens", pa.int32()),
    ]
)


AUDIT = pa.schema(
    [  # a judge's ratings of solutions corrupted on purpose
        ("prompt_id", pa.string()),
        ("judge", pa.string()),
        ("target", pa.string()),  # dimension that was corrupted; "" for the clean solution
        ("degree", pa.int32()),  # 0 (clean) to 4
        ("dimension", pa.string()),  # dimension that was rated
        ("rating", pa.float32()),
    ]
)


def table(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of `schema`; a missing or additional key is an error."""
    for row in rows:
        if row.keys() != set(schema.names):
            raise ValueError(
                f"A row has columns {sorted(row)}; the table has {sorted(schema.names)}."
            )
    return pa.Table.from_pylist(rows, schema=schema)
