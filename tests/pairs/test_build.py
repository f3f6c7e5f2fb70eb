"""Which traces meet, which of the two is chosen, and a waterfall that adds up."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.config import SYMMETRIC
from deltapref_jax.pairs.build import STRATA, Rules, build
from deltapref_jax.records import Pair, Trace, digest, from_table, to_table

PROMPTS = [digest("prompt", i) for i in range(40)]
RULES = Rules(
    "strong", "weak", {"strong": 1, "mid": 1, "weak": 2}, ("eos", "stop"), "generator", "any"
)


MIRRORED = ("right_wrong", "wrong_right")


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


def test_an_exchange_of_the_sides_keeps_a_symmetric_stratum():
    verdicts = list(itertools.product((True, False, None), repeat=2))
    kept = [s for s, has in STRATA.items() if all(has(c, r) == has(r, c) for c, r in verdicts)]
    assert tuple(kept) == SYMMETRIC


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


@pytest.mark.parametrize("samples", list(itertools.product(("first", "best", "right"), repeat=2)))
@pytest.mark.parametrize(("stratum", "mirror"), [(s, s) for s in SYMMETRIC] + [MIRRORED])
@pytest.mark.parametrize("sides", [("strong", "weak"), ("weak", "weak")])
def test_exchanged_sides_give_exchanged_pairs(samples, stratum, mirror, sides):
    """Of few texts, so that many are equal, and with ties."""
    rng = np.random.default_rng(0)
    traces = several(3)
    for rows in traces.values():
        rows[:] = [row._replace(text="abc"[rng.integers(3)]) for row in rows]
    every = [row.trace_id for rows in traces.values() for row in rows]
    correct = {i: bool(rng.integers(2)) for i in every}
    ratings = {i: [float(rng.integers(2))] for i in every}
    needed = {"mid": 1, "strong": 1, "weak": 2}
    rules = Rules(*sides, needed, ("eos",), "generator", stratum, (0, 0), samples)
    turned = dataclasses.replace(
        rules,
        chosen=sides[1],
        rejected=sides[0],
        samples=samples[::-1],
        stratum=mirror,
        exchanged=True,
    )
    rows, counts = made(traces, rules, correct, ratings)
    others, of_turned = made(traces, turned, correct, ratings)
    assert counts == of_turned and counts["dropped_identical"]
    assert list(zip(ids(rows, "chosen"), ids(rows, "rejected"), strict=True)) == list(
        zip(ids(others, "rejected"), ids(others, "chosen"), strict=True)
    )


def test_exchanged_sides_of_shared_strata_give_exchanged_pairs():
    rng = np.random.default_rng(0)
    traces = several(3)
    for rows in traces.values():
        rows[:] = [row._replace(text="ab"[rng.integers(2)]) for row in rows]
    correct = {row.trace_id: bool(rng.integers(2)) for rows in traces.values() for row in rows}
    strata = ("both_right", "right_wrong")
    rules = dataclasses.replace(RULES, stratum="both_right", shared_strata=strata)
    turned = dataclasses.replace(rules, chosen="weak", rejected="strong", exchanged=True)
    rows, others = made(traces, rules, correct)[0], made(traces, turned, correct)[0]
    assert len(rows) > 5 and ids(rows, "chosen") == ids(others, "rejected")
    assert ids(rows, "rejected") == ids(others, "chosen")


def test_a_judge_labels_by_the_sum_and_drops_ties():
    ratings = {
        # Sums that float32 rounds apart are ties too.
        digest(p, "weak", s): [3.0 + s * 2.0**-22, 1.0 + (i % 3 if s else 1)]
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
        assert sum(row.chosen_rating) - sum(row.rejected_rating) == pytest.approx(1)


def test_a_judge_may_turn_a_pair_of_two_generators_round():
    ratings = {
        digest(p, g, 0): [float(1 + (g == "weak"))] for p in PROMPTS for g in ("weak", "strong")
    }
    rows, _ = made(world(), dataclasses.replace(RULES, label_by="judge"), ratings=ratings)
    assert {row.chosen_model for row in rows} == {"weak"}


def test_a_coin_turns_half_of_the_pairs_around_and_every_draw_others():
    prompts = [digest("prompt", i) for i in range(400)]
    traces = world(prompts)
    faces = []
    for draw in range(2):
        rules = dataclasses.replace(RULES, label_by="coin", coin=(0, draw))
        rows, counts = made(traces, rules, prompts=prompts)
        assert counts["pool"] == 400
        assert {(r.chosen_model, r.rejected_model) for r in rows} == {
            ("strong", "weak"),
            ("weak", "strong"),
        }
        faces.append(np.array([r.chosen_model == "strong" for r in rows]))
        assert abs(faces[-1].mean() - 0.5) < 4.5 * (0.25 / 400) ** 0.5
    assert abs((faces[0] == faces[1]).mean() - 0.5) < 4.5 * (0.25 / 400) ** 0.5


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
        ("wrong_right", {(False, True)}),
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


def several(n=4, prompts=PROMPTS):
    """`n` samples of every generator for every prompt."""
    return {
        g: [trace(p, g, s) for p in prompts for s in range(n)] for g in ("weak", "mid", "strong")
    }


RATED = {  # sample → ratings on two dimensions; the first two tie in the second one
    0: [1.0, 4.0],
    1: [3.0, 4.0 + 2e-7],
    2: [5.0, 1.0],
    3: [2.0, 1.0],
}


@pytest.mark.parametrize(
    ("samples", "dimension", "chosen", "rejected", "tied"),
    [
        (("first", "first"), None, {0}, {0}, 0),
        (("best", "first"), None, {1}, {0}, 0),
        (("best", "worst"), 0, {2}, {0}, 0),
        (("worst", "best"), 0, {0}, {2}, 0),
        (("best", "worst"), 1, {0, 1}, {2, 3}, 80),
    ],
)
def test_the_best_and_the_worst_of_n_samples(samples, dimension, chosen, rejected, tied):
    ratings = {
        digest(p, g, s): RATED[s] for p in PROMPTS for g in ("strong", "weak") for s in RATED
    }
    rules = dataclasses.replace(RULES, samples=samples)
    rows, counts = build(PROMPTS, several(), {}, ratings, rules, dimension)
    at = {digest(p, g, s): s for p in PROMPTS for g in ("strong", "weak") for s in RATED}
    assert {at[i] for i in ids(rows, "chosen")} == chosen
    assert {at[i] for i in ids(rows, "rejected")} == rejected
    assert (counts["pool"], counts["tied_samples"]) == (40, tied)
    if tied:  # a fair draw, and another one for another coin
        share = np.mean([at[i] == 0 for i in ids(rows, "chosen")])
        assert 0.2 < share < 0.8
        again = build(PROMPTS, several(), {}, ratings, dataclasses.replace(rules, coin=(0, 1)), 1)
        assert again[0] != rows


def test_two_samples_of_one_generator_are_its_best_and_its_worst():
    ratings = {digest(p, "weak", s): RATED[s] for p in PROMPTS for s in RATED}
    rules = Rules(
        "weak", "weak", {"weak": 2}, ("eos",), "generator", "any", samples=("best", "worst")
    )
    rows, _ = build(PROMPTS, several(), {}, ratings, rules, 0)
    assert ids(rows, "chosen") == [digest(p, "weak", 2) for p in PROMPTS]
    assert ids(rows, "rejected") == [digest(p, "weak", 0) for p in PROMPTS]


def test_a_right_and_a_wrong_sample():
    correct = {
        digest(p, g, s): s == 2 or (s == 3 and i % 2 == 0)
        for i, p in enumerate(PROMPTS)
        for g in ("strong", "weak")
        for s in range(4)
    }
    correct |= {digest(PROMPTS[0], "weak", s): True for s in range(4)}  # none is wrong
    correct |= {digest(PROMPTS[1], "strong", s): None for s in range(4)}  # none was checked
    rules = dataclasses.replace(RULES, samples=("right", "wrong"))
    rows, counts = made(several(), rules, correct)
    assert {(r.chosen_correct, r.rejected_correct) for r in rows} == {(True, False)}
    assert (counts["dropped_sample"], counts["pool"]) == (2, 38)
    # Every rejected trace is one of two or three; half of the chosen ones are.
    assert counts["tied_samples"] == 38 + 19


def test_strata_that_share_their_prompts():
    """With first samples alone, a prompt lies in one of these strata."""
    strata = ("both_right", "both_wrong", "right_wrong", "wrong_right")
    right = {  # prompt → the right samples of strong and of weak
        0: ((0, 1), (2,)),
        1: ((3,), (0, 1, 2)),
        2: ((), (1,)),  # strong is never right
        3: ((0,), (0, 1, 2, 3)),  # weak is never wrong
    }
    correct = {
        digest(PROMPTS[p], g, s): s in right[p][g == "weak"]
        for p in right
        for g in ("strong", "weak")
        for s in range(4)
    }
    found = {}
    for stratum in strata:
        rules = dataclasses.replace(RULES, stratum=stratum, shared_strata=strata)
        rows, counts = made(several(), rules, correct, prompts=PROMPTS[:4])
        assert [r.prompt_id for r in rows] == PROMPTS[:2]
        assert (counts["dropped_unshared"], counts["dropped_stratum"]) == (2, 0)
        wanted = {"both_right": (1, 1), "both_wrong": (0, 0)}.get(stratum) or (
            (1, 0) if stratum == "right_wrong" else (0, 1)
        )
        assert {(r.chosen_correct, r.rejected_correct) for r in rows} == {wanted}
        found[stratum] = rows
    # Strata of one verdict share the trace that has it.
    assert ids(found["both_right"], "rejected") == ids(found["wrong_right"], "rejected")
    assert ids(found["both_right"], "chosen") == ids(found["right_wrong"], "chosen")
    two = dataclasses.replace(
        RULES, stratum="wrong_right", shared_strata=("both_wrong", "wrong_right")
    )
    rows, _ = made(several(), two, correct, prompts=PROMPTS[:4])
    assert [r.prompt_id for r in rows] == PROMPTS[:3]


def test_a_shared_stratum_needs_two_texts():
    traces = {
        g: [trace(PROMPTS[0], g, s, "the same") for s in range(3)] for g in ("strong", "weak")
    }
    correct = {digest(PROMPTS[0], g, s): s == 0 for g in ("strong", "weak") for s in range(3)}
    strata = ("both_right", "right_wrong")
    rules = Rules(
        "strong",
        "weak",
        {"strong": 1, "weak": 1},
        ("eos",),
        "generator",
        "both_right",
        shared_strata=strata,
    )
    assert made(traces, rules, correct, prompts=PROMPTS[:1])[1]["dropped_unshared"] == 1


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
