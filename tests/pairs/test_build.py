"""Which traces meet, which of the two is chosen, and a waterfall that adds up."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.pairs.build import Rules, build
from deltapref_jax.records import Pair, Trace, digest, from_table, to_table

PROMPTS = [digest("prompt", i) for i in range(40)]
RULES = Rules(
    "strong", "weak", {"strong": 1, "mid": 1, "weak": 2}, ("eos", "stop"), "generator", "any"
)


def trace(prompt, generator, sample=0, text=None, finish="eos"):
    text = f"{generator} {sample} {prompt}" if text is None else text
    ids = np.arange(3)
    trace_id = digest(prompt, generator, sample)
    return Trace(trace_id, prompt, generator, "w", sample, text, ids, finish, -1.0, len(ids))


def change(traces, generator, row, **fields):
    traces[generator][row] = traces[generator][row]._replace(**fields)


def world(prompts=PROMPTS, **options):
    """Two samples of every generator for every prompt."""
    return {
        g: [trace(p, g, s, **options) for p in prompts for s in (1, 0)]
        for g in ("weak", "mid", "strong")
    }


def made(traces, rules=RULES, correct=None, ratings=None, prompts=PROMPTS):
    rows, counts = build(prompts, traces, correct or {}, ratings or {}, rules)
    dropped = sum(n for name, n in counts.items() if name.startswith("dropped_"))
    assert counts["prompts"] == len(prompts) == dropped + counts["pool"]
    assert counts["pool"] == len(rows)
    assert from_table(Pair, to_table(Pair, rows)) == rows
    return rows, counts


def ids(rows, side):
    return [getattr(row, f"{side}_id") for row in rows]


def test_first_samples_meet_in_the_order_of_the_prompts():
    rows, counts = made(world())
    assert counts["pool"] == 40
    assert [row.prompt_id for row in rows] == PROMPTS
    assert ids(rows, "chosen") == [digest(p, "strong", 0) for p in PROMPTS]
    assert ids(rows, "rejected") == [digest(p, "weak", 0) for p in PROMPTS]
    assert {
        (r.chosen_model, r.rejected_model, r.chosen_rating, r.chosen_correct) for r in rows
    } == {("strong", "weak", None, None)}
    assert {row.pair_id for row in rows} == {
        digest(c, r) for c, r in zip(ids(rows, "chosen"), ids(rows, "rejected"), strict=True)
    }


def test_arms_of_a_sweep_share_prompts_and_rejected_traces():
    traces = world()
    change(traces, "mid", 4, finish="length")  # both of prompt 2
    change(traces, "mid", 5, finish="length")
    change(traces, "weak", 10, finish="length")  # one of two of prompt 5: "weak" needs two
    change(traces, "strong", 15, text=" \n")  # first of prompt 7: the second takes its place
    arms = {
        c: made(traces, dataclasses.replace(RULES, chosen=c)) for c in ("weak", "mid", "strong")
    }
    kept = [p for i, p in enumerate(PROMPTS) if i not in (2, 5)]
    for rows, counts in arms.values():
        assert [row.prompt_id for row in rows] == kept
        assert counts["dropped_unfinished"] == 2
    assert ids(arms["mid"][0], "rejected") == ids(arms["strong"][0], "rejected")
    assert ids(arms["strong"][0], "chosen")[kept.index(PROMPTS[7])] == digest(
        PROMPTS[7], "strong", 1
    )
    assert ids(arms["weak"][0], "rejected") == ids(arms["mid"][0], "rejected")
    assert ids(arms["weak"][0], "chosen") == [digest(p, "weak", 1) for p in kept]


def test_a_generator_that_repeats_the_rejected_trace_drops_its_prompt_from_all_arms():
    traces = world()
    first = {trace.prompt_id: trace.text for trace in traces["weak"] if trace.sample == 0}
    change(traces, "mid", 9, text=first[PROMPTS[4]] + "\n")  # the first sample of prompt 4
    change(traces, "weak", 12, text=first[PROMPTS[6]])  # the second sample of prompt 6
    for c in ("weak", "mid", "strong"):
        rows, counts = made(traces, dataclasses.replace(RULES, chosen=c))
        assert counts["dropped_identical"] == 2
        assert [row.prompt_id for row in rows] == [
            p for i, p in enumerate(PROMPTS) if i not in (4, 6)
        ]


def test_a_judge_labels_by_the_sum_and_drops_ties():
    ratings = {
        digest(p, "weak", s): [3.0, 1.0 + (i % 3 if s else 1)]
        for i, p in enumerate(PROMPTS)
        for s in (0, 1)
    }
    rows, counts = made(
        world(), dataclasses.replace(RULES, chosen="weak", label_by="judge"), ratings=ratings
    )
    assert counts["dropped_tie"] == sum(i % 3 == 1 for i in range(40))
    for row in rows:
        i = PROMPTS.index(row.prompt_id)
        assert row.chosen_id == digest(row.prompt_id, "weak", int(i % 3 == 2))
        assert sum(row.chosen_rating) - sum(row.rejected_rating) == 1


def test_a_judge_may_turn_a_pair_of_two_generators_round():
    ratings = {
        digest(p, g, 0): [float(1 + (g == "weak"))] for p in PROMPTS for g in ("weak", "strong")
    }
    rows, _ = made(world(), dataclasses.replace(RULES, label_by="judge"), ratings=ratings)
    assert {row.chosen_model for row in rows} == {"weak"}


def test_identical_answers_are_dropped_up_to_blanks_around_them():
    traces = world()
    for i, row in enumerate(traces["strong"][:6]):
        change(traces, "strong", i, text=f" weak {row.sample} {row.prompt_id}\n")
    _, counts = made(traces)
    assert counts["dropped_identical"] == 3


@pytest.mark.parametrize(
    ("stratum", "kept"),
    [
        ("any", {(c, r) for c in (True, False, None) for r in (True, False, None)}),
        ("chosen_right", {(True, r) for r in (True, False, None)}),
        ("both_right", {(True, True)}),
        ("both_wrong", {(False, False)}),
        ("right_wrong", {(True, False)}),
    ],
)
def test_strata(stratum, kept):
    cases = [(c, r) for c in (True, False, None) for r in (True, False, None)]
    correct = {
        digest(p, g, 0): case[g == "weak"]
        for p, case in zip(PROMPTS, cases, strict=False)
        for g in ("strong", "weak")
    }
    rows, counts = made(
        world(PROMPTS[:9]),
        dataclasses.replace(RULES, stratum=stratum),
        correct,
        prompts=PROMPTS[:9],
    )
    assert {(r.chosen_correct, r.rejected_correct) for r in rows} == kept
    assert counts["dropped_stratum"] == 9 - len(kept)


def test_a_finish_that_is_not_named_does_not_count():
    assert made(world(finish="length"))[1]["dropped_unfinished"] == 40
    assert (
        made(world(finish="length"), dataclasses.replace(RULES, finishes=("eos", "length")))[1][
            "pool"
        ]
        == 40
    )


CELL = st.tuples(
    st.sampled_from(["eos", "stop", "length"]),
    st.sampled_from(["a", "b", " a ", ""]),
    st.integers(1, 3),
    st.sampled_from([True, False, None]),
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(st.tuples(CELL, CELL, CELL), max_size=8),
    st.sampled_from(["weak", "strong"]),
    st.sampled_from(["generator", "judge"]),
    st.sampled_from(["any", "chosen_right", "right_wrong"]),
    st.randoms(),
)
def test_the_waterfall_always_adds_up_and_row_order_does_not_matter(
    cells, chosen, label_by, stratum, random
):
    traces, correct, ratings = {"weak": [], "strong": []}, {}, {}
    for p, row in zip(PROMPTS, cells, strict=False):
        for (g, s), (finish, words, score, right) in zip(
            (("weak", 0), ("weak", 1), ("strong", 0)), row, strict=True
        ):
            traces[g].append(trace(p, g, s, words, finish))
            correct[digest(p, g, s)], ratings[digest(p, g, s)] = right, [float(score)]
    rules = Rules(chosen, "weak", {"weak": 2, "strong": 1}, ("eos", "stop"), label_by, stratum)
    rows, counts = made(traces, rules, correct, ratings, PROMPTS[: len(cells)])
    for rows_of in traces.values():
        random.shuffle(rows_of)
    assert made(traces, rules, correct, ratings, PROMPTS[: len(cells)]) == (rows, counts)
