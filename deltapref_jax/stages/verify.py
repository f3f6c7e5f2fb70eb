"""Traces to verdicts: is the answer right?"""

import pyarrow as pa

from deltapref_jax.answers.check import check
from deltapref_jax.records import VERDICT, table
from deltapref_jax.workspace import Job, Stats

VERSION = 3
_SHARD = 4096  # traces


def verdict(prompt: dict, trace: dict) -> dict:
    """One row of VERDICT. A trace that its budget cut off is wrong, whatever stands in it."""
    if trace["finish"] == "length" and prompt["checker"]:
        return {"trace_id": trace["trace_id"], "correct": False, "answer": "", "note": "unfinished"}
    found = check(prompt, trace["text"])
    return {
        "trace_id": trace["trace_id"],
        "correct": found.correct,
        "answer": found.answer,
        "note": found.note,
    }


def verify(job: Job) -> None:
    """Checks the input `sample` against the answers of the input `prompts`."""
    prompts = {prompt["prompt_id"]: prompt for prompt in job.table("prompts").to_pylist()}
    traces = job.table("sample").select(["trace_id", "prompt_id", "text", "finish"])

    def make(shard: int) -> tuple[pa.Table, Stats]:
        mine = traces.slice(shard * _SHARD, _SHARD).to_pylist()
        rows = [verdict(prompts[trace["prompt_id"]], trace) for trace in mine]
        counts = {
            "correct": sum(row["correct"] is True for row in rows),
            "checked": sum(row["correct"] is not None for row in rows),
            "unfinished": sum(row["note"] == "unfinished" for row in rows),
        }
        return table(VERDICT, rows), {name: float(count) for name, count in counts.items()}

    job.shards(-(-traces.num_rows // _SHARD), make, total=traces.num_rows)
