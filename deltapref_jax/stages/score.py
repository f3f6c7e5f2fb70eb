"""score: log-probabilities of one generator's traces under one model, matched and mismatched.

The mismatched rows (a prompt with another prompt's trace) are what KTO's baseline is measured on; they come from one
seeded derangement, are scored here once, and are shared by all arms.
"""

import json

import jax
import numpy as np
import pyarrow as pa

from deltapref_jax.config import ConfigError, MeshShape, Scoring
from deltapref_jax.mesh import make_mesh, put
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.weights import Loaded, load
from deltapref_jax.records import LOGPROB
from deltapref_jax.scoring.logprobs import scorer
from deltapref_jax.scoring.packing import capacity, pack
from deltapref_jax.text.template import Text
from deltapref_jax.training.data import Row
from deltapref_jax.workspace import Job, Stats

VERSION = 1


def derange(prompt_ids: list[str], seed: int) -> list[int]:
    """For every trace another trace of another prompt, each used once; a pure function of both arguments.

    Traces are put in seeded order with equal prompts next to each other and shifted by the largest group: no trace can
    meet its own prompt.

    Raises:
      ConfigError: more than half of the traces belong to one prompt, so that there is no such arrangement.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompt_ids):
        groups.setdefault(prompt, []).append(i)
    names = list(groups)
    np.random.default_rng(seed).shuffle(names)
    order = [i for name in names for i in groups[name]]
    shift = max(map(len, groups.values()))
    if 2 * shift > len(order):
        raise ConfigError(f"{shift} of {len(order)} traces belong to one prompt, so KTO's baseline cannot pair every "
                          "trace with another prompt; use more prompts.")
    partner = [0] * len(order)
    for place, i in enumerate(order):
        partner[i] = order[(place + shift) % len(order)]
    return partner


class Sequences:
    """Token sequences of (prompt, trace) under one tokenizer; each prompt is rendered once."""

    def __init__(self, text: Text, prompts: list[dict], traces: list[dict]):
        self._prompts = {row["prompt_id"]: text.prompt_ids(json.loads(row["messages"])) for row in prompts}
        done = text.completions_ids([t["text"] for t in traces], [t["finish"] == "eos" for t in traces])
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
    loaded: list[Loaded] = []

    def make(shard: int) -> tuple[pa.Table, Stats]:
        if not loaded:
            loaded.append(load(job.local["model"]["path"], job.config["dtype"]))
        which = range(shard * shape.shard, min((shard + 1) * shape.shard, len(traces)))
        rows = [(t["prompt_id"], t["trace_id"], True) for t in (traces[i] for i in which)]
        rows += [(traces[partner[i]]["prompt_id"], traces[i]["trace_id"], False) for i in which]
        return _score(loaded[0], Sequences(loaded[0].text, prompts, [traces[i] for i in which]), rows, shape, job)

    job.shards(-(-len(traces) // shape.shard), make, "rows", 2 * len(traces), together=True)


def _score(model: Loaded, sequences: Sequences, rows: list[tuple[str, str, bool]], shape: Scoring, job: Job) -> tuple[
        pa.Table, Stats]:
    mesh = make_mesh(MeshShape(**job.local["mesh"]))
    run = scorer(model.spec, job.config["dtype"], capacity(shape.rows, shape.row_length), mesh)
    params = jax.device_put(model.state, shardings(model.state, mesh))
    samples = [sequences.row(prompt, trace).sample() for prompt, trace, _ in rows]
    fits = [i for i, s in enumerate(samples) if len(s.tokens) <= shape.row_length]
    sums: list[float | None] = [None] * len(rows)
    micros = pack([samples[i] for i in fits], [[j] for j in range(len(fits))], shape.rows, shape.row_length)
    for micro in micros:
        got = np.asarray(run(params, put(micro.batch, mesh, BATCH))[0], np.float64)
        for segment, j in enumerate(micro.order):
            sums[fits[j]] = float(got[segment])
    table = pa.table({
        "prompt_id": [prompt for prompt, _, _ in rows],
        "trace_id": [trace for _, trace, _ in rows],
        "matched": [matched for _, _, matched in rows],
        "logprob": sums,
        "tokens": [int(s.targets.sum()) if sums[i] is not None else 0 for i, s in enumerate(samples)],
    }).cast(LOGPROB)
    tokens = sum(len(samples[i].tokens) for i in fits)
    return table, {"tokens": tokens, "positions": len(micros) * shape.rows * shape.row_length,
                   "too_long": len(rows) - len(fits)}
