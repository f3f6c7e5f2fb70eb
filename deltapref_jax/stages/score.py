"""score: log-probabilities of one generator's traces under one model, matched and mismatched.

The mismatched rows (a prompt with another prompt's trace) are what KTO's baseline is measured on; they come from one
seeded derangement, are scored here once, and are shared by all arms.
"""

import json

import pyarrow as pa

from deltapref_jax.config import MeshShape, Scoring
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import LoadedModel, load
from deltapref_jax.records import LOGPROB
from deltapref_jax.scoring.derange import derange
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.text.template import Text
from deltapref_jax.training.data import Row
from deltapref_jax.workspace import Job, Stats

VERSION = 2


class Sequences:
    """Token sequences of (prompt, trace) under one tokenizer; each prompt is rendered once."""

    def __init__(self, text: Text, prompts: list[dict], traces: list[dict]):
        self._prompts = {
            row["prompt_id"]: text.prompt_ids(json.loads(row["messages"])) for row in prompts
        }
        done = text.completions_ids(
            [t["text"] for t in traces], [t["finish"] == "eos" for t in traces]
        )
        self._completions = {t["trace_id"]: ids for t, ids in zip(traces, done, strict=True)}

    def row(self, prompt_id: str, trace_id: str, reference: float = 0.0) -> Row:
        """A prompt with a trace; the end token is a target only where the trace ended with it."""
        return Row(self._prompts[prompt_id], self._completions[trace_id], reference, trace_id)


def score(job: Job) -> None:
    """TRACE and PROMPT to LOGPROB; config: the model's weights hash and dtype, the batch shape, the seed."""
    traces = job.table("sample").to_pylist()
    prompts = job.table("prompts").to_pylist()
    shape = Scoring(**job.config["scoring"])
    partner = derange([t["prompt_id"] for t in traces], job.config["seed"])
    loaded: list[LoadedModel] = []

    def make(shard: int) -> tuple[pa.Table, Stats]:
        if not loaded:
            loaded.append(load(job.local["model"]["path"], job.config["dtype"]))
        which = range(shard * shape.shard, min((shard + 1) * shape.shard, len(traces)))
        rows = [(t["prompt_id"], t["trace_id"], True) for t in (traces[i] for i in which)]
        rows += [(traces[partner[i]]["prompt_id"], traces[i]["trace_id"], False) for i in which]
        return _score(
            loaded[0],
            Sequences(loaded[0].text, prompts, [traces[i] for i in which]),
            rows,
            shape,
            job,
        )

    job.shards(-(-len(traces) // shape.shard), make, "rows", 2 * len(traces), together=True)


def _score(
    model: LoadedModel, sequences: Sequences, rows: list[tuple[str, str, bool]], shape: Scoring, job: Job
) -> tuple[pa.Table, Stats]:
    found = [sequences.row(prompt, trace) for prompt, trace, _ in rows]
    scores = score_sequences(
        model.spec,
        model.state,
        [row.pieces for row in found],
        shape.rows,
        shape.row_length,
        make_mesh(MeshShape(**job.local["mesh"])),
        job.config["dtype"],
    )
    table = pa.table(
        {
            "prompt_id": [prompt for prompt, _, _ in rows],
            "trace_id": [trace for _, trace, _ in rows],
            "matched": [matched for _, _, matched in rows],
            "logprob": scores.sums,
            "tokens": [
                0 if total is None else row.targets
                for row, total in zip(found, scores.sums, strict=True)
            ],
        }
    ).cast(LOGPROB)
    fits = [row.tokens for row, total in zip(found, scores.sums, strict=True) if total is not None]
    return table, {
        "tokens": sum(fits),
        "positions": scores.positions,
        "filled": scores.filled,
        "too_long": len(rows) - len(fits),
    }
