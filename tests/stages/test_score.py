"""Log-probabilities once per sequence, matched and mismatched, in the order of their table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

from deltapref_jax.config import ConfigError
from deltapref_jax.models.weights import open_model
from deltapref_jax.records import LogProb, TokenSequence, schema, to_table
from deltapref_jax.stages import score
from deltapref_jax.stages.score import known_table


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


def test_rows_are_in_the_order_of_the_sequences_and_name_them(bench, worked):
    sequences = bench.tokens(bench.traces("g", worked[0]))
    made = bench.score(sequences, shard=5)  # shards of both tables do not coincide
    rows, wanted = bench.rows(LogProb, made), bench.rows(TokenSequence, sequences)
    assert [(r.trace_id, r.prompt_id, r.matched, r.sequence_id) for r in rows] == [
        (s.trace_id, s.prompt_id, s.matched, s.sequence_id) for s in wanted
    ]
    assert [r.tokens for r in rows] == [int(s.targets.sum()) for s in wanted]
    metadata = bench.workspace.table(made).schema.metadata
    assert metadata == {b"weights": bench.weights.encode(), b"dtype": b"float32"}


def test_weights_are_read_in_the_dtype_of_the_computation(bench, worked, monkeypatch):
    """They need two bytes and not four, and the log-probabilities are those of casting later."""
    sequences, used = bench.tokens(bench.traces("g", worked[0])), []

    def opened(path, dtype, params):
        used.append(params)
        return open_model(path, dtype, given or params)

    monkeypatch.setattr(score, "open_model", opened)
    found = []
    for given in ("", "float32"):
        made = dataclasses.replace(bench.score(sequences), dtype="bfloat16", shard=100 + len(given))
        found.append([row.logprob for row in bench.rows(LogProb, made)])
    assert used == ["bfloat16"] * 2
    assert found[0] == found[1]


@pytest.fixture
def table(bench, worked, tmp_path):
    """Writes rows of a table of log-probabilities, and returns them and the file's path.

    Its values are those of no model, so that it is seen where they are used.
    """

    def write(part, weights=bench.weights):
        sequences = bench.tokens(bench.traces("g", worked[0]))
        rows = bench.rows(LogProb, bench.score(sequences))[part]
        rows = [row._replace(logprob=-1000.0 - i) for i, row in enumerate(rows)]
        path = tmp_path / "table.parquet"
        pq.write_table(to_table(LogProb, rows).replace_schema_metadata({"weights": weights}), path)
        return rows, str(path)

    return write


def test_a_table_of_some_rows_is_used_and_counted(bench, worked, table):
    held, path = table(slice(2, 7))
    traces = bench.traces("g", worked[0])
    alone = bench.score(bench.tokens(traces))
    known = known_table(path, bench.weights)
    made = bench.score(bench.tokens(traces), known=known, table=path)
    rows, computed = bench.rows(LogProb, made), bench.rows(LogProb, alone)
    assert rows[2:7] == held
    assert [r.sequence_id for r in rows] == [r.sequence_id for r in computed]
    rest = [(r, c) for i, (r, c) in enumerate(zip(rows, computed, strict=True)) if not 2 <= i < 7]
    assert [r.logprob for r, _ in rest] == pytest.approx([c.logprob for _, c in rest], rel=1e-5)
    assert (bench.stats(made)["from_table"], bench.stats(alone)["from_table"]) == (5, 0)
    assert bench.workspace.key(made) != bench.workspace.key(alone)


def test_a_table_of_all_rows_needs_no_model(bench, worked, table, monkeypatch):
    held, path = table(slice(None))
    monkeypatch.setattr(score, "open_model", lambda *_: pytest.fail("the model was loaded"))
    known = known_table(path, bench.weights)
    made = bench.score(bench.tokens(bench.traces("g", worked[0])), known=known, table=path)
    assert bench.rows(LogProb, made) == held
    assert bench.stats(made)["from_table"] == 12
    assert "positions" not in bench.stats(made)


def test_a_row_without_log_probability_is_computed(bench, worked, table):
    held, path = table(slice(None))
    nulls = [row._replace(logprob=None, tokens=0) if i == 3 else row for i, row in enumerate(held)]
    pq.write_table(
        to_table(LogProb, nulls).replace_schema_metadata({"weights": bench.weights}), path
    )
    known = known_table(path, bench.weights)
    made = bench.score(bench.tokens(bench.traces("g", worked[0])), known=known, table=path)
    rows = bench.rows(LogProb, made)
    assert -1000 < rows[3].logprob < 0 < rows[3].tokens
    assert bench.stats(made)["from_table"] == 11


@pytest.mark.parametrize(("weights", "named"), [("f" * 16, "f" * 16), ("", "(not named)")])
def test_a_table_by_other_weights_is_refused(bench, worked, table, weights, named):
    _, path = table(slice(3), weights)
    sentence = (
        f"The table {path} was made by the weights {named} and the reference has the weights "
        f"{bench.weights}; name the model that made it in config.reference.path, or leave "
        "config.table empty to have it computed."
    )
    with pytest.raises(ConfigError) as planned:
        known_table(path, bench.weights)
    # and again when it is read, since the file may have been replaced in the meantime
    sequences = bench.tokens(bench.traces("g", worked[0]))
    with pytest.raises(ConfigError) as made:
        bench.make(bench.score(sequences, known="looked at before", table=path))
    assert str(planned.value) == str(made.value) == sentence
