"""Log-probabilities once per sequence, matched and mismatched, in the order of their table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.records import LogProb, schema


def naive(model, prompt, completion):
    """Sum of log-softmax over the completion, one unpacked sequence, logits in full."""
    tokens = np.zeros((1, 160), np.int32)
    tokens[0, : len(prompt) + len(completion)] = [*prompt, *completion]
    decoder = nnx.merge(model.graphdef, model.state)
    hidden = decoder.hidden(jnp.asarray(tokens), jnp.arange(160)[None], jnp.ones((1, 160), int))
    rows = jax.nn.log_softmax(hidden[0] @ decoder.unembedding().T)
    return sum(float(rows[len(prompt) + i - 1, token]) for i, token in enumerate(completion))


def test_rows_are_the_models_log_probabilities(bench, tiny, worked):
    finish = ["eos", "length", "eos", "stop", "eos", "eos"]
    given = bench.traces("g", worked[1], finish)
    made = bench.score(bench.tokens(given))
    rows = bench.rows(LogProb, made)
    assert bench.schema(made) == schema(LogProb)
    prompts = {q.prompt_id: tiny.text.prompt_ids(q.chat()) for q in bench.questions}
    traces = {t.trace_id: t for t in given.rows}
    assert {(r.trace_id, r.matched) for r in rows} == {
        (t, m) for t in traces for m in (True, False)
    }
    assert len(rows) == 12
    for r in rows:
        trace = traces[r.trace_id]
        assert (r.prompt_id == trace.prompt_id) == r.matched
        ended = trace.finish == "eos"
        completion = tiny.text.completion_ids(trace.text, ended)
        # the end token only where it ended
        assert r.tokens == len(tiny.text.encode_plain(trace.text)) + ended
        if r.trace_id in list(traces)[:2]:
            want = naive(tiny, prompts[r.prompt_id], completion)
            assert r.logprob == pytest.approx(want, rel=1e-5)
    assert sorted(r.prompt_id for r in rows if not r.matched) == sorted(prompts)


def test_shards_and_shapes_do_not_matter(bench, worked):
    traces = bench.traces("g", worked[0])
    few = bench.score(bench.tokens(traces))
    one = bench.score(bench.tokens(traces, shard=100), rows=16, row_length=256, shard=200)
    some, others = bench.rows(LogProb, few), bench.rows(LogProb, one)

    def by_row(rows):
        return {(r.prompt_id, r.trace_id): r.logprob for r in rows}

    assert by_row(some) == pytest.approx(by_row(others), rel=1e-5)
    assert bench.stats(few)["too_long"] == 0


def test_rows_that_do_not_fit_are_null_and_counted(bench, worked):
    given = bench.traces("g", [*worked[0][:5], "so " * 200])
    made = bench.score(bench.tokens(given))
    rows = bench.rows(LogProb, made)
    long = given.rows[5].trace_id
    assert {(r.logprob, r.tokens) for r in rows if r.trace_id == long} == {(None, 0)}
    assert all(r.logprob < 0 < r.tokens for r in rows if r.trace_id != long)
    assert bench.stats(made)["too_long"] == 2
