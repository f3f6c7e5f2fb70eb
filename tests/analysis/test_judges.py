"""Judges: what stands beside them, and where an arm that one of them shaped is marked."""

import dataclasses
import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from deltapref_jax.analysis import judges
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.data_card import data_card
from deltapref_jax.analysis.findings import MARK, mark_names
from deltapref_jax.analysis.judges import describe
from deltapref_jax.analysis.page import JudgeAudit
from deltapref_jax.analysis.proposal import ARM, GeneratorPair, Proposal, Selection
from deltapref_jax.analysis.report import draw, render, terminal_table
from deltapref_jax.analysis.students import (
    StudentResults,
    draw_claims,
    render_students,
    students_table,
    summarise_students,
)
from deltapref_jax.analysis.summary import summarise, summary_json
from deltapref_jax.config import DIMENSIONS, Claim, Judge, Student, model_of
from deltapref_jax.records import Audit, Rating, Retest, to_table
from tests.analysis.test_report import DOMAINS, GENERATORS, QUESTIONS, study  # noqa: F401


def rated(judge, values):
    """Ratings of every dimension; `values`: generator → one per question."""
    return {
        g: to_table(
            Rating,
            [
                Rating(f"{g}-{q}", judge, d, value, 0.0, 1.0, [0.2] * 5)
                for q, value in zip(QUESTIONS, of_generator, strict=True)
                for d in DIMENSIONS
            ],
        )
        for g, of_generator in values.items()
    }


def retested(judge, chosen, rejected):
    """A retest of strong against weak: `chosen` and `rejected` [wordings, questions]."""
    return to_table(
        Retest,
        [
            Retest(f"strong-{q}", f"weak-{q}", judge, w, d, float(c), float(r))
            for w, (of_chosen, of_rejected) in enumerate(zip(chosen, rejected, strict=True))
            for q, c, r in zip(QUESTIONS, of_chosen, of_rejected, strict=True)
            for d in DIMENSIONS
        ],
    )


@pytest.fixture
def noisy(study):  # noqa: F811
    """The study with `top` ranked by a judge whose gaps are noise, retested."""
    e = study.experiment
    arms = tuple(dataclasses.replace(a, judge="model") if a.name == "top" else a for a in e.arms)
    study.experiment = dataclasses.replace(e, arms=arms)
    rng = np.random.default_rng(0)
    own = {g: rng.uniform(1, 5, len(QUESTIONS)) for g in GENERATORS}
    study.ratings["model"] = rated("model", own)
    again = rng.uniform(1, 5, (2, 3, len(QUESTIONS)))
    study.retests = {"model": retested("model", *again)}
    study.pair_counts["top"] = {0: {"pool": 12.0, "kept": 3.0, "tied_at_cut": 5.0}}
    known = [own["strong"] - own["weak"], *(again[0] - again[1])]
    return study, np.array(known).T


def test_reliability_is_that_of_gaps_over_all_wordings(noisy):
    tables, gaps = noisy
    found = describe(tables, "model").reliability
    assert found.keys() == {*DIMENSIONS, "sum"}
    one = st.mean_correlation(gaps - gaps.mean(axis=0))
    assert (found["sum"].readings, found["sum"].pairs) == (4, len(QUESTIONS))
    for reliability in found.values():
        assert reliability.one == pytest.approx(one, abs=1e-6)
        assert reliability.averaged == pytest.approx(st.spearman_brown(one, 4), abs=1e-6)


def test_gaps_are_compared_on_the_pairs_of_every_arm_that_a_judge_ranked(noisy):
    tables, gaps = noisy
    s = summarise(tables)
    model = next(j for j in s.judges if j.name == "model")
    assert [(p.arm, p.by, p.tied) for p in model.on_pairs] == [
        ("dpo-mid", [], None),
        ("top", ["sum"], 5),
    ]
    top = model.on_pairs[1]
    # The exact judge rates strong two points above weak: only rounding tells gaps apart.
    assert math.isnan(top.dimensions["sum"])
    assert top.chance_top == 0.25
    expected = st.top_share(math.sqrt(max(0.0, model.reliability["sum"].one)), 0.25)
    assert top.expected_top == expected
    # All pairs are tied by the truth, so that those kept are of its top by chance.
    assert top.true_top == pytest.approx(0.25)
    # Verdict and length stand beside the judges, on the same pairs and under the same columns.
    assert [j.name for j in s.trivial] == ["correctness", "length"]
    for j in s.trivial:
        assert [p.arm for p in j.on_pairs] == ["dpo-mid", "top"]
        assert j.audit.auc.keys() == set(DIMENSIONS)
    # Corrupted texts of the fixture are wrong, and longer.
    assert {j.audit.auc["factuality"].value for j in s.trivial} == {1.0}


def test_a_top_by_truth_shares_what_is_tied_at_the_cut():
    np.testing.assert_allclose(judges._in_top(np.array([5, 3, 3, 3, 1.0]), 2), [1, *[1 / 3] * 3, 0])


def test_an_arm_of_a_judge_below_the_bar_is_marked_wherever_it_is_named(noisy):
    tables, _ = noisy
    tables.experiment.claims = (Claim(kind="contrast", a="top", b="random"),)
    s = summarise(tables)
    marked = {a.name: a.doubt for a in s.arms if a.doubt}
    assert marked.keys() == {"top"}
    assert marked["top"].startswith(
        "judge model shaped its pairs by sum, where how its rubric is worded changes"
    )
    assert s.claims[0].what == "top† minus random, out of domain"
    sample = next(f for f in s.findings if f.topic.startswith("Sample delta"))
    assert sample.topic == f"Sample delta, DPO, judge model{MARK}"
    drawn = draw(tables, s)
    assert f"top, judge model{MARK}" in drawn["selection"].csv
    assert "\ntop†," in drawn["training"].csv
    page = render(tables, s, drawn, {})
    # Every cell that names the arm; what is left are config, ids and the claim's own explanation.
    assert not re.search(r"<td[^>]*>top</td>", page)
    assert len(re.findall(r"<td[^>]*>top <span class=\"mark\" title=", page)) >= 5
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert "top†" in data["arms"] and "top" not in data["arms"]
    cells = list(terminal_table(json.loads(summary_json(s))).columns[0].cells)
    assert "top†" in cells and "top" not in cells
    names = ("a", "b")
    e = tables.experiment
    e = dataclasses.replace(e, students=tuple(Student(name=n, model=e.student) for n in names))
    several = summarise_students(
        e,
        dict.fromkeys(names, json.loads(summary_json(s))),
        dict.fromkeys(names, StudentResults(tables.student, tables.results)),
        dict.fromkeys(names, "report.html"),
    )
    assert several.doubts == marked
    assert several.claims[0].what == "top† minus random, out of domain"
    page = render_students(several, draw_claims(several), e)
    assert f"† top: {marked['top']}." in page
    assert "<td>top†</td>" in page and "<td>top</td>" not in page
    found = students_table(json.loads(summary_json(several)))
    assert "top†" in found.columns[0].cells and "top" not in found.columns[0].cells
    assert found.caption.endswith(
        f"{MARK}: the judge is below the bar or not measured, see the page"
    )
    assert all(d in s.arms[0].changes for d in DOMAINS)


def test_a_name_inside_of_another_is_not_marked():
    text = "dpo-top minus dpo-top-model and kto-dpo-top; dpo-top, (dpo-top)"
    assert mark_names(text, ["dpo-top"]) == (
        "dpo-top† minus dpo-top-model and kto-dpo-top; dpo-top†, (dpo-top†)"
    )
    assert mark_names(mark_names(text, ["dpo-top"]), ["dpo-top"]).count(MARK) == 3
    assert mark_names(text, []) == text


def test_edited_traces_decide_where_both_audits_are_there(noisy):
    tables, _ = noisy
    tables.retests = {}

    def audited(after):
        return to_table(
            Audit,
            [
                Audit(f"{q}", "model", target, g, d, after if g else 3.0, True, 9)
                for q in range(30)
                for target, g in [("", 0), *((d, 1) for d in DIMENSIONS)]
                for d in DIMENSIONS
            ],
        )

    tables.trace_audits = {"model": audited(1.0)}
    judge = describe(tables, "model")
    assert judge.audit.auc["numerical_precision"].value == 0.5
    assert judges.failings(judge, "numerical_precision") == {}
    tables.trace_audits = {"model": audited(3.0)}
    judge = describe(tables, "model")
    assert judges.failings(judge, "sum") == {"its AUC on edited traces is below 0.65": 0.5}


def test_the_sum_is_judged_by_its_own_auc(noisy):
    """Every edit costs its own dimension a point and brings another one two: the sum rises."""
    tables, _ = noisy
    tables.retests, tables.audits = {}, {}
    beside = dict(zip(DIMENSIONS, [*DIMENSIONS[1:], DIMENSIONS[0]], strict=True))
    tables.trace_audits = {
        "model": to_table(
            Audit,
            [
                Audit(q, "model", t, g, d, 3.0 - (d == t) + 2 * (g and d == beside[t]), True, 9)
                for q in QUESTIONS
                for t, g in [("", 0), *((d, 1) for d in DIMENSIONS)]
                for d in DIMENSIONS
            ],
        )
    }
    judge = describe(tables, "model")
    assert {a.value for a in judge.edited.auc.values()} == {1.0}
    assert judge.edited.auc_sum.value == 0.0
    assert judges.failings(judge, "sum") == {"its AUC on edited traces is below 0.65": 0.0}
    assert not any(judges.failings(judge, d) for d in DIMENSIONS)


def test_an_arm_is_marked_for_all_that_ratings_shaped_its_pairs_by(noisy):
    tables, _ = noisy
    e = tables.experiment
    top = dataclasses.replace(next(a for a in e.arms if a.name == "top"), judge="model")
    by = {"by": "factuality"}
    shaped = {
        "ranked": (dataclasses.replace(top, **by), ["factuality"]),
        "directed": (
            dataclasses.replace(top, direction="model", **by),
            ["sum", "factuality"],
        ),
        "sampled": (
            dataclasses.replace(top, keep="all", chosen_sample="best", by="reference_margin"),
            ["sum"],
        ),
        "by-function": (dataclasses.replace(top, keep="mine:keep"), [*DIMENSIONS]),
        "margin": (dataclasses.replace(top, by="reference_margin"), []),
        "random": (dataclasses.replace(top, keep="random"), []),
    }
    for name, (arm, want) in shaped.items():
        assert judges.shaped_by(arm, DIMENSIONS) == want, name
    good, bad = st.Estimate(0.9, 0.8, 1.0), st.Estimate(0.5, 0.4, 0.6)
    auc = dict.fromkeys(DIMENSIONS, good)
    judge = dataclasses.replace(
        describe(tables, "model"),
        reliability={},
        edited=JudgeAudit(auc | {"numerical_precision": bad}, bad, {}, {}),
    )

    def doubt(name, judge):
        return judges.doubt(e, shaped[name][0], [judge])

    assert doubt("ranked", judge) == "" and doubt("random", judge) == ""
    of_sum = "judge model shaped its pairs by sum, where its AUC on edited traces is below 0.65: "
    assert doubt("directed", judge) == doubt("sampled", judge) == f"{of_sum}0.50"
    assert doubt("by-function", judge).startswith("judge model shaped its pairs by numerical prec")
    never = dataclasses.replace(judge, audit=None, edited=None)
    assert doubt("ranked", never) == (
        "judge model shaped its pairs by factuality, where it was measured neither against known "
        "corruption nor against itself"
    )
    assert doubt("random", never) == ""


def test_a_mean_judge_is_audited_and_retested_as_its_ratings_are_made(noisy):
    tables, _ = noisy
    e, rng = tables.experiment, np.random.default_rng(1)
    # The second judge's scale is four times as wide, and it rates a dimension that no other has.
    members = {"a": DIMENSIONS[:2], "b": DIMENSIONS[:3]}
    n = len(QUESTIONS)
    own, again = (
        {j: rng.normal(3, spread, (count, 2, n)) for j, spread in (("a", 1), ("b", 4))}
        for count in (1, 3)
    )
    spread = {j: own[j].std() for j in members}
    level, width = (np.mean([f(own[j]) for j in members]) for f in (np.mean, np.std))

    def mean(values):
        scaled = [level + width * (values[j] - own[j].mean()) / spread[j] for j in members]
        return np.mean(scaled, axis=0)  # [wordings, sides, questions]

    def of(dimensions, table):
        return table.filter(pc.is_in(table["dimension"], pa.array(dimensions)))

    both = Judge(name="both", kind="mean", of=("a", "b"), dimensions=DIMENSIONS[:2])
    judges = [Judge(name=j, kind="exact", dimensions=d) for j, d in members.items()]
    tables.experiment = dataclasses.replace(e, judges=(*e.judges, *judges, both))
    for j, values in (own | {"both": mean(own)}).items():
        sides = zip(("strong", "weak"), values[0], strict=True)
        dims = members.get(j, both.dimensions)
        tables.ratings[j] = {g: of(dims, r) for g, r in rated(j, dict(sides)).items()}
    for j, dims in members.items():
        tables.retests[j] = of(dims, retested(j, again[j][:, 0], again[j][:, 1]))
        edited = {("", 0): own[j][0, 0], (dims[0], 2): own[j][0, 1]}
        audits = [
            Audit(q, j, target, degree, d, float(value), None, 10)
            for (target, degree), values in edited.items()
            for q, value in zip(QUESTIONS, values, strict=True)
            for d in dims
        ]
        tables.trace_audits[j] = to_table(Audit, audits)
    found = describe(tables, "both")
    before, worse = mean(own)[0]
    gaps = np.vstack([before - worse, *(c - r for c, r in mean(again))]).T
    one = st.mean_correlation(gaps - gaps.mean(axis=0))
    assert found.reliability.keys() == {*both.dimensions, "sum"}
    for reliability in found.reliability.values():
        assert (reliability.readings, reliability.pairs) == (4, n)
        assert reliability.one == pytest.approx(one, abs=1e-5)
    assert found.edited.auc.keys() == {DIMENSIONS[0]}
    assert found.edited.auc[DIMENSIONS[0]].value == pytest.approx((before > worse).mean())
    np.testing.assert_allclose(
        [found.edited.curves[DIMENSIONS[0]][g] for g in (0, 1)], [before.mean(), worse.mean()]
    )


def test_a_judge_is_compared_on_one_draw_and_not_on_pairs_that_a_coin_directed(noisy):
    tables, _ = noisy
    whole = tables.pairs["dpo-mid"][0]
    assert judges.widest_arm(tables) == "dpo-mid"
    # Three draws of half of the pairs are not more pairs, and a coin's are last whatever they are.
    tables.pairs["random"] = dict.fromkeys(range(3), whole.slice(0, whole.num_rows // 2 + 1))
    tables.pairs["coin"] = {0: pa.concat_tables([whole, whole])}
    e = tables.experiment
    coin = dataclasses.replace(e.arms[0], name="coin", direction="coin")
    tables.experiment = dataclasses.replace(e, arms=(*e.arms, coin))
    assert judges.widest_arm(tables) == "dpo-mid"
    before = summarise(tables)
    tables.pairs["dpo-mid"] |= {1: whole, 2: whole}
    after = summarise(tables)
    found, again = (next(j for j in s.judges if j.name == "model") for s in (before, after))
    assert found.on_pairs[0].pairs == again.on_pairs[0].pairs == whole.num_rows
    assert found.on_pairs[1].true_top == again.on_pairs[1].true_top == pytest.approx(0.25)
    assert before.agreement == after.agreement


def test_the_card_of_pairs_says_that_their_judge_is_below_the_bar(noisy):
    tables, _ = noisy
    e = tables.experiment
    top = next(a for a in e.arms if a.name == "top")
    arm = dataclasses.replace(top, name=ARM)
    tables.experiment = dataclasses.replace(e, arms=(arm,), claims=())
    tables.pairs, tables.student = {ARM: tables.pairs["top"]}, None
    tables.pair_counts, tables.artifacts = {ARM: tables.pair_counts["top"]}, ()
    selection = Selection(0.25, "sum", "model", "the study said so")
    proposal = Proposal(GeneratorPair("strong", "weak", "why"), selection, (), "all")
    licences = {model_of(e, m).place: "mit" for m in [*(g.model for g in e.generators), e.student]}
    card = data_card(tables, summarise(tables), proposal, licences, "key")
    why = judges.doubt(tables.experiment, arm, summarise(tables).judges)
    assert f"- {MARK} The judge is below the bar or not measured: {why}." in card.splitlines()
