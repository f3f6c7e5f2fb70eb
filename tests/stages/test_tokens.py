"""Traces to token sequences: the ids that were sampled, or the text under another tokenizer."""

from collections import Counter

import numpy as np
import pytest

from deltapref_jax.records import TokenSequence, Trace, schema

FINISH = ["eos", "length", "stop", "eos", "eos", "eos"]


def ids(sequences):
    return [sequence.completion_ids.tolist() for sequence in sequences]


@pytest.fixture
def sampled(text, worked):
    """Ids as a generator might have sampled them: trace 3 is spelt letter by letter."""
    found = [
        text.completion_ids(answer, finish == "eos")
        for answer, finish in zip(worked[1], FINISH, strict=True)
    ]
    letters = [i for letter in worked[1][3] for i in text.encode_plain(letter)]
    assert letters != found[3][:-1]
    assert text.decode(letters) == worked[1][3]
    # the stop string is cut from the text and not from the ids
    found[2] += text.encode_plain("\n\n")
    found[3] = [*letters, text.end_ids[0]]
    return found


def test_with_the_generators_own_tokenizer_the_completion_is_what_was_sampled(
    bench, worked, sampled
):
    made = bench.tokens(bench.traces("g", worked[1], FINISH, sampled), sampled=True)
    rows = bench.rows(TokenSequence, made)
    assert bench.schema(made) == schema(TokenSequence)
    assert ids(row for row in rows if row.matched) == sampled
    assert bench.stats(made) == {"traces": 6, "retokenised_differently": 2, "rows": 12}


def test_with_another_tokenizer_it_is_the_text_with_an_end_only_where_it_ended(
    bench, text, worked, sampled
):
    made = bench.tokens(bench.traces("g", worked[1], FINISH, sampled), sampled=False)
    rows = [row for row in bench.rows(TokenSequence, made) if row.matched]
    for row, answer, finish in zip(rows, worked[1], FINISH, strict=True):
        end = [text.end_ids[0]] if finish == "eos" else []
        assert row.completion_ids.tolist() == text.encode_plain(answer) + end
    assert bench.stats(made) == {"traces": 6, "retokenised_differently": 0, "rows": 12}


@pytest.mark.parametrize("shard", [4, 100])
def test_every_shard_is_its_matched_sequences_then_its_mismatched_ones(bench, text, worked, shard):
    given = bench.traces("g", worked[0])
    made = bench.tokens(given, shard=shard)
    rows = bench.rows(TokenSequence, made)
    order = [
        (trace.trace_id, matched)
        for start in range(0, 6, shard)
        for matched in (True, False)
        for trace in given.rows[start : start + shard]
    ]
    assert [(row.trace_id, row.matched) for row in rows] == order
    assert len(list(bench.workspace.path(made).glob("*.parquet"))) == -(-6 // shard)
    prompts = {q.prompt_id: text.prompt_ids(q.chat()) for q in bench.questions}
    own = {trace.trace_id: trace for trace in given.rows}
    for row in rows:
        trace = own[row.trace_id]
        assert row.prompt_ids.tolist() == prompts[row.prompt_id]
        assert (row.prompt_id == trace.prompt_id) == row.matched
        assert row.completion_ids.tolist() == text.completion_ids(trace.text, True)
        assert (row.scored, row.group, row.desirable) == (None, None, None)


def test_shards_do_not_decide_who_is_whose_partner(bench, worked):
    tables = [bench.tokens(bench.traces("g", worked[0]), shard=shard) for shard in (1, 4, 6)]
    partners = [
        {row.trace_id: row.prompt_id for row in bench.rows(TokenSequence, table) if not row.matched}
        for table in tables
    ]
    assert partners[0] == partners[1] == partners[2]


@pytest.mark.parametrize("samples", [2, 3])
def test_a_partner_never_has_the_same_prompt(bench, worked, samples):
    first = bench.traces("g", worked[0]).rows
    rows = [
        row._replace(trace_id=f"{row.trace_id}-{i}", sample=i)
        for row in first
        for i in range(samples)
    ]
    made = bench.tokens(bench.given(Trace, rows))
    own = {row.trace_id: row.prompt_id for row in rows}
    others = [row for row in bench.rows(TokenSequence, made) if not row.matched]
    assert all(row.prompt_id != own[row.trace_id] for row in others)
    # each completion and each place behind a prompt is used once
    assert sorted(row.trace_id for row in others) == sorted(own)
    assert Counter(row.prompt_id for row in others) == Counter(own.values())


def test_sequence_ids_tell_prompts_borders_and_completions_apart(bench, worked):
    rows = bench.rows(TokenSequence, bench.tokens(bench.traces("g", worked[0])))
    assert len({row.sequence_id for row in rows}) == 12
    first = rows[0]
    moved = first._replace(
        prompt_ids=np.append(first.prompt_ids, first.completion_ids[0]),
        completion_ids=first.completion_ids[1:],
    )
    assert moved.sequence_id != first.sequence_id
    assert first._replace(trace_id="x", matched=False).sequence_id == first.sequence_id
