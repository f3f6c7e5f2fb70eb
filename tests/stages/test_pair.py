"""A join and a selection over tables, with every number of what was dropped."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from deltapref_jax.config import ConfigError
from deltapref_jax.pairs.build import Rules
from deltapref_jax.records import LogProb, Pair, Rating, TokenSequence, Verdict, digest, schema
from deltapref_jax.stages.pair import PairTable

DIMENSIONS = ("factuality", "signal_to_noise")
RULES = Rules(
    chosen="strong",
    rejected="weak",
    min_traces={"strong": 1, "weak": 1},
    finishes=("eos", "stop"),
    label_by="generator",
    stratum="any",
)


def ids(bench, generator):
    return [row.trace_id for row in bench.traces(generator, ["x"] * 6).rows]


def ratings(bench, generator, values):
    """`values`: a row of [traces, dimensions]; given in another order than that of the config."""
    return bench.given(
        Rating,
        [
            Rating(trace, "j", dimension, value, 0.0, 1.0, [0.2] * 5)
            for trace, row in zip(ids(bench, generator), values, strict=True)
            for dimension, value in reversed(list(zip(DIMENSIONS, row, strict=True)))
        ],
    )


def verdicts(bench, generator, right):
    return bench.given(
        Verdict,
        [
            Verdict(trace, correct, "", "")
            for trace, correct in zip(ids(bench, generator), right, strict=True)
        ],
    )


def node(bench, finish="eos", rated=True, rules=RULES, **changes):
    fields = {
        "dimensions": DIMENSIONS,
        "keep": "all",
        "rank_by": "sum",
        "fraction": 1.0,
        "kept": 0,
        "seed": 0,
        "draw": 0,
    }
    rated_tables = {
        "strong": ratings(bench, "strong", [(5, 1 + i / 2) for i in range(6)]),
        "weak": ratings(bench, "weak", [(i, 1) for i in range(6)]),
    }
    return PairTable(
        label=("pair", "x"),
        prompts=bench.prompts,
        traces={
            "strong": bench.traces("strong", [f"s{'x' * i}" for i in range(6)]),
            "weak": bench.traces("weak", [f"w{i}" for i in range(6)], finish),
        },
        verdicts={
            "strong": verdicts(bench, "strong", [True, True, False, True, False, None]),
            "weak": verdicts(bench, "weak", [False, True, False, False, True, None]),
        },
        ratings=rated_tables if rated else {},
        rules=rules,
        **fields | changes,
    )


def test_tables_are_joined(bench):
    made = node(bench)
    rows = bench.rows(Pair, made)
    assert bench.schema(made) == schema(Pair)
    assert [r.prompt_id for r in rows] == [q.prompt_id for q in bench.questions]
    assert [r.chosen_id for r in rows] == ids(bench, "strong")
    # in the config's order of dimensions
    assert [r.rejected_rating for r in rows] == [[i, 1] for i in range(6)]
    assert [r.chosen_correct for r in rows] == [True, True, False, True, False, None]
    assert bench.stats(made) == {
        "prompts": 6,
        "dropped_unfinished": 0,
        "dropped_sample": 0,
        "dropped_unshared": 0,
        "dropped_identical": 0,
        "dropped_tie": 0,
        "dropped_stratum": 0,
        "pool": 6,
        "tied_samples": 0,
        "kept": 6,
        "tied_at_cut": 0,
        "chosen_tokens": 3.5,
        "rejected_tokens": 2.0,
        "rows": 6,
        "sample_delta": np.mean([5 - i + i / 2 for i in range(6)]),
    }


def test_what_is_dropped_and_what_is_not_kept_is_counted(bench):
    made = node(
        bench,
        finish=["eos", "length", "stop", "eos", "eos", "eos"],
        keep="top",
        rank_by="signal_to_noise",
        fraction=0.4,
        rules=dataclasses.replace(RULES, stratum="right_wrong"),
    )
    rows, stats = bench.rows(Pair, made), bench.stats(made)
    counted = (stats[n] for n in ("dropped_unfinished", "dropped_stratum", "pool", "kept"))
    assert tuple(counted) == (1, 3, 2, 1)
    assert [r.prompt_id for r in rows] == [bench.questions[3].prompt_id]
    assert stats["sample_delta"] == 1.5


@pytest.mark.parametrize(
    ("by", "kept"), [("factuality", [0, 1]), ("signal_to_noise", [4, 5]), ("sum", [0, 1])]
)
def test_top_by_a_dimension_or_the_sum(bench, by, kept):
    rows = bench.rows(Pair, node(bench, keep="top", rank_by=by, fraction=1 / 3))
    assert [r.prompt_id for r in rows] == [bench.questions[i].prompt_id for i in kept]


def test_bottom_by_the_reference_margin(bench, worked):
    traces = {"strong": bench.traces("strong", worked[0]), "weak": bench.traces("weak", worked[1])}
    sequences = {name: bench.tokens(table) for name, table in traces.items()}
    # Rows of this length leave the longest sequences without a log-probability.
    lengths = sorted(
        max(
            row.length
            for node in sequences.values()
            for row in bench.rows(TokenSequence, node)
            if row.matched and row.prompt_id == q.prompt_id
        )
        for q in bench.questions
    )
    logprobs = {name: bench.score(node, row_length=lengths[-2]) for name, node in sequences.items()}
    made = dataclasses.replace(
        node(bench, rated=False, dimensions=(), keep="bottom", rank_by="reference_margin", kept=2),
        traces=traces,
        sequences=sequences,
        logprobs=logprobs,
        reference_weights=bench.weights,
    )
    rows, stats = bench.rows(Pair, made), bench.stats(made)
    found = {
        row.trace_id: row.logprob
        for table in logprobs.values()
        for row in bench.rows(LogProb, table)
        if row.matched
    }
    margins = {
        q.prompt_id: found[digest(q.prompt_id, "strong")] - found[digest(q.prompt_id, "weak")]
        for q in bench.questions
        if None not in (found[digest(q.prompt_id, "strong")], found[digest(q.prompt_id, "weak")])
    }
    assert stats["dropped_unscored"] == 6 - len(margins) >= 1
    assert stats["pool"] == len(margins)
    smallest = sorted(margins, key=margins.get)[:2]
    assert {row.prompt_id for row in rows} == set(smallest)
    assert stats["reference_margin"] == pytest.approx(np.mean([margins[p] for p in smallest]))
    with pytest.raises(ConfigError, match="^The table .* was made by the weights"):
        bench.make(dataclasses.replace(made, reference_weights="other"))


def test_a_judge_may_direct(bench):
    rows = bench.rows(Pair, node(bench, rules=dataclasses.replace(RULES, label_by="judge")))
    assert [r.chosen_model for r in rows] == ["strong"] * 6
    assert all(sum(r.chosen_rating) > sum(r.rejected_rating) for r in rows)


def test_without_a_judge_there_are_no_ratings(bench):
    made = node(bench, rated=False, dimensions=())
    assert {r.chosen_rating for r in bench.rows(Pair, made)} == {None}
    assert "sample_delta" not in bench.stats(made)


def test_the_rungs_of_a_balanced_ladder_have_the_same_verdicts(bench):
    """Strong has 3 right-wrong, 1 wrong-wrong and a wrong-right; mid 2, 2 and none."""
    right = {
        "strong": [True, True, True, False, False, None],
        "mid": [True, True, False, False, None, False],
        "weak": [False, False, False, False, True, False],
    }
    rules = {
        chosen: dataclasses.replace(
            RULES, chosen=chosen, min_traces=dict.fromkeys(("weak", "mid", "strong"), 1)
        )
        for chosen in ("strong", "mid")
    }
    tables = {
        "traces": {g: bench.traces(g, [f"{g}{'x' * i}" for i in range(6)]) for g in right},
        "verdicts": {g: verdicts(bench, g, values) for g, values in right.items()},
    }
    for draw in range(3):
        for chosen in ("strong", "mid"):
            made = dataclasses.replace(
                node(bench, rated=False, dimensions=(), rules=rules[chosen], draw=draw),
                balance="correctness",
                rungs=tuple(rules.values()),
                **tables,
            )
            rows, stats = bench.rows(Pair, made), bench.stats(made)
            cells = Counter((r.chosen_correct, r.rejected_correct) for r in rows)
            assert cells == {(True, False): 2, (False, False): 1}
            assert (stats["pool"], stats["kept"], stats["dropped_balance"]) == (6, 3, 3)
            assert (stats["balance_right_wrong"], stats["balance_wrong_right"]) == (2, 0)
    alone = dataclasses.replace(rules["mid"], stratum="both_right")
    with pytest.raises(
        ValueError,
        match=r"^No pair is left for strong against weak: the rungs' "
        r"pools of \{'strong': 6, 'mid': 0\} pairs have no correctness in common",
    ):
        bench.make(dataclasses.replace(made, rules=rules["strong"], rungs=(rules["strong"], alone)))


def test_no_pair_left_is_one_sentence(bench):
    with pytest.raises(
        ValueError,
        match=r"^No pair is left for strong against weak: \{'prompts': 6, "
        r"'dropped_unfinished': 6, .* 'pool': 0, .*\}\. Use more prompts, longer "
        r"traces \(config\.sampling\.max_tokens\) or another stratum\.$",
    ):
        bench.make(node(bench, finish="length"))
