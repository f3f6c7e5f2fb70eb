"""verify: traces to verdicts. Is the answer right?"""

import dataclasses
from collections.abc import Mapping

import pyarrow as pa

from deltapref_jax.answers.check import check
from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node
from deltapref_jax.config import ADDED
from deltapref_jax.records import Prompt, Trace, Verdict, from_table, to_table
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable

_SHARD = 4096  # traces


class VerdictTable(Node, stage="verify", version=6, sharded=True):
    """VERDICT: every trace against the reference answer of its prompt.

    Attributes:
      checkers: hash of the code of every checker that is the user's own (`callables.code_hash`).
    """

    prompts: PromptTable
    traces: TraceTable
    checkers: Mapping[str, str] = dataclasses.field(default_factory=dict, metadata=ADDED)

    def make(self, job: Job) -> None:
        """Checks one shard of traces at a time."""
        prompts = {prompt.prompt_id: prompt for prompt in job.rows(Prompt, self.prompts)}
        traces = job.table(self.traces)

        def make(shard: int) -> tuple[pa.Table, Stats]:
            part = from_table(Trace, traces.slice(shard * _SHARD, _SHARD))
            verdicts = [
                verdict(
                    prompts[trace.prompt_id],
                    trace.trace_id,
                    trace.text,
                    trace.finish,
                    f"trace {trace.trace_id} by generator {trace.generator}",
                )
                for trace in part
            ]
            return to_table(Verdict, verdicts), {
                "correct": float(sum(v.correct is True for v in verdicts)),
                "checked": float(sum(v.correct is not None for v in verdicts)),
                "unfinished": float(sum(v.note == "unfinished" for v in verdicts)),
            }

        job.shards(-(-traces.num_rows // _SHARD), make, total=traces.num_rows)


def verdict(prompt: Prompt, trace_id: str, text: str, finish: str, where: str) -> Verdict:
    """Whether a trace is right. One that its budget cut off is wrong, whatever stands in it.

    `where` says which trace it is, for messages.

    Raises:
      ConfigError: the user's own checker fails, or returns something else than it should.
    """
    if finish == "length" and prompt.checker:
        return Verdict(trace_id, False, "", "unfinished")
    checked = check(prompt._asdict(), text, where)
    return Verdict(trace_id, checked.correct, checked.answer, checked.note)
