"""What is beside and inside of a page: numbers of figures, accuracies of runs, pairs, suites."""

import csv
import dataclasses
import io
import json
import math
import pathlib
import re
import urllib.parse

import numpy as np
import pyarrow as pa
import pytest

from deltapref_jax.analysis import noise, pair_browser, readouts, suites
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.report import draw, render
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.summary import summarise
from deltapref_jax.config import DIMENSIONS, Prompts, Run, Suite, greedy_twin
from deltapref_jax.display import COUNTS
from deltapref_jax.records import Prompt, Result, SuiteAccuracy, Trace, from_table, to_table
from tests.analysis.test_effects import found
from tests.analysis.test_report import (
    DOMAINS,
    GENERATORS,
    data_of,
    evaluated,
    read_out,
    study,  # noqa: F401
)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_figure_has_its_numbers_as_a_link(study):  # noqa: F811
    s = summarise(study)
    drawn = draw(study, s)
    page = render(study, s, drawn, {})
    links = dict(
        re.findall(r'download="([^"]+)\.csv" href="data:text/csv;charset=utf-8,([^"]*)"', page)
    )
    assert links.keys() == drawn.keys()
    assert all(urllib.parse.unquote(links[name]) == drawn[name].csv for name in drawn)
    changes = {a.name: a.changes for a in s.arms}
    ladder = [r for r in rows_of(drawn["ladder"].csv) if r["line"] == "DPO"]
    shown = {(r["domain"], r["arm"]): r for r in ladder}
    assert len(ladder) == 4
    for d in DOMAINS:
        for arm in ("dpo-mid", "dpo-strong"):
            r = shown[d, arm]
            numbers = [float(r[name]) for name in ("change in points", "low", "high")]
            assert numbers == list(changes[arm][d].estimate)
    (claim,) = rows_of(drawn["claims"].csv)
    assert (claim["claim"], float(claim["high"])) == (
        s.claims[0].what,
        s.claims[0].effect.estimate.high,
    )
    curves = rows_of(drawn["training"].csv)
    assert len(curves) == sum(2 * 8 for _ in s.arms)
    assert float(curves[3]["nats"]) == pytest.approx(-0.1 * 3 / 0.1)
    assert len(rows_of(drawn["audit"].csv)) == 2 * len(DIMENSIONS) * 3


def test_means_of_the_long_table_are_the_pages_numbers(study):  # noqa: F811
    study.results["dpo-mid"] = {Run(0, i): evaluated(0.5, i) for i in range(3)}
    s = summarise(study)
    rows = from_table(
        SuiteAccuracy, to_table(SuiteAccuracy, suites.accuracies(study, {"dpo-mid": "why"}))
    )
    assert len(rows) == len(DOMAINS) * (1 + len(GENERATORS) + 3 + 4)
    assert {r.readout for r in rows} == {""}

    def mean(arm, domain, generator=None):
        of = arm, generator, domain
        return np.mean([r.accuracy for r in rows if (r.arm, r.generator, r.domain) == of])

    for d in DOMAINS:
        for g in s.generators:
            assert mean(None, d, g.name) == pytest.approx(g.evaluation.accuracy[d].value)
        assert mean(None, d) == pytest.approx(s.student.accuracy[d].value)
        for a in s.arms:
            change = a.changes[d].estimate.value
            assert mean(a.name, d) - mean(None, d) == pytest.approx(change)
    assert {(r.seed, r.draw) for r in rows if r.arm == "dpo-mid"} == {(0, 0), (1, 0), (2, 0)}
    assert all(r.low <= r.accuracy <= r.high and r.questions == 40 for r in rows)
    assert {r.arm for r in rows if r.doubt == "why"} == {"dpo-mid"}
    # A domain of one suite has the interval of the domain.
    before = next(r for r in rows if r.arm is r.generator is None and r.domain == "in")
    assert (before.low, before.high) == tuple(st.accuracy(study.student, "in"))[1:]


def test_read_outs_of_domains_of_one_suite_are_twins_and_in_the_long_table(study):  # noqa: F811
    """Every arm answers 4 of 40 questions more, greedily and in one of two samples."""
    e = study.experiment
    one = next(s for s in e.suites if s.domain == "in")
    again = dataclasses.replace(one, name="in-pass", samples=2, readout="pass", k=2)
    study.experiment = dataclasses.replace(
        e, suites=(*e.suites, *map(greedy_twin, e.suites), again)
    )

    def with_rows(table, right):
        more = read_out(table, "in-suite", 2, lambda r, s: int(r.prompt_id) < right > s, "in-pass")
        for d in DOMAINS:
            name = f"{d}-suite"
            more += read_out(
                table, name, 1, lambda r, s: int(r.prompt_id) < right, f"{name}-greedy"
            )
        return pa.concat_tables([table, to_table(Result, more)])

    study.student = with_rows(study.student, 10)
    study.results = {
        arm: {run: with_rows(t, 14) for run, t in runs.items()}
        for arm, runs in study.results.items()
    }
    s = summarise(study)
    assert [(r.suite, r.greedy_twin) for r in s.readouts] == [
        ("in-suite-greedy", True),
        ("out-suite-greedy", True),
        ("in-pass", False),
    ]
    (shown,) = (a for a in s.arms if a.changes["in"].shown)
    (text, _) = (f.text for f in s.findings if f.topic == "Sampled and greedy")
    assert text.startswith(f"in domain {shown.name} changed ") and "and +10.0 [" in text
    # Sampled minus greedy is the mean over questions of the two changes' difference.
    twin = s.readouts[0]
    arm, run = shown.name, next(iter(study.results[shown.name]))

    def gaps(suite):
        tables = [study.results[arm][run], study.student]
        rows = [st.answers(t, st.columns(t, "suite")[0] == suite).mean for t in tables]
        return 100 * (rows[0] - rows[1])

    lost = gaps("in-suite") - gaps("in-suite-greedy")
    found = twin.lost[arm].estimate
    assert found.value == pytest.approx(lost.mean())
    error = 1.96 * lost.std(ddof=1) / math.sqrt(len(lost))
    assert (found.low, found.high) == pytest.approx(
        (found.value - error, found.value + error), abs=0.1 * error
    )
    greedy = twin.changes[arm].estimate.value
    assert f"greedy ({greedy / twin.sampled[arm].value:.0%} of it), sampled minus greedy " in text
    assert "prefers" not in text
    rows = from_table(SuiteAccuracy, to_table(SuiteAccuracy, suites.accuracies(study, {})))
    held = {(r.arm, r.suite): r for r in rows if r.readout}
    assert len(held) == len(s.readouts) * (1 + len(s.arms))
    for r in s.readouts:
        before = held[None, r.suite]
        assert (before.accuracy, before.low, before.high) == pytest.approx(tuple(r.student))
        assert (before.readout, before.domain) == (r.what, r.domain)
        for a in s.arms:
            change = r.changes[a.name].estimate.value
            assert held[a.name, r.suite].accuracy - before.accuracy == pytest.approx(change)


def test_a_greedy_twin_reads_a_domain_that_is_sampled():
    inside = [Suite(name=n, prompts=Prompts(tasks=(n,)), samples=2) for n in ("a", "b")]
    greedy = [dataclasses.replace(s, temperature=0.0) for s in inside]
    twins = [greedy_twin(s) for s in inside]
    assert readouts.groups([*inside, *twins]) == [twins]
    assert readouts.is_greedy_twin(twins, [*inside, *twins])
    assert readouts.is_greedy_twin(twins[:1], [*inside[:1], *twins[:1]])
    assert readouts.is_greedy_twin(twins[:1], [*inside, *twins[:1]])
    assert readouts.read_again(twins[1:], [*inside, *twins[1:]]) == inside[1:]
    apart = dataclasses.replace(twins[0], prompts=Prompts(tasks=("c",)))
    assert readouts.groups([*inside, *twins, apart]) == [twins, [apart]]
    assert not readouts.is_greedy_twin([apart], [*inside, apart])
    assert not readouts.is_greedy_twin(twins, [*greedy, *twins])


def test_changes_by_suite_average_to_the_domain(study):  # noqa: F811
    s = summarise(study)
    assert [(x.suite, x.limit) for x in s.suites] == [("in-suite", ""), ("out-suite", "")]
    for a in s.arms:
        for x in s.suites:
            assert x.changes[a.name].estimate == a.changes[x.domain].estimate


def test_floors_and_ceilings_are_flagged_with_what_they_do_to_the_mean():
    low, high, some = (Estimate(v, v - 4, v + 4) for v in (5.0, 95.0, 50.0))
    assert suites._limit({"student": low, "strong": low}) == "floor"
    assert suites._limit({"student": low, "strong": some}) == ""
    assert suites._limit({"student": high, "strong": some}) == "ceiling"
    # Wide intervals show no floor, and no ceiling: of ten questions, three right and nine.
    wide = Estimate(30.0, 10.0, 60.0)
    assert suites._limit({"student": wide, "strong": Estimate(16.0, 8.0, 24.0)}) == ""
    assert suites._limit({"student": Estimate(90.0, 70.0, 100.0), "strong": high}) == ""

    def suite(name, limit):
        return suites.SuiteSummary(name, "out", 9, "", 1, {}, limit)

    assert suites.limit_sentences([suite("a", ""), suite("b", "floor"), suite("c", "ceiling")]) == [
        "b (floor) and c (ceiling) have 2 of 3 equal shares in the mean out of domain, and little "
        "room to fall (floor) or little room to rise (ceiling): where they do not move, a change "
        "of 1 point out of domain stands for about 3.0 points on the other 1."
    ]
    assert suites.limit_sentences([suite("a", "")]) == []


def test_what_the_models_had_learnt_is_said(study):  # noqa: F811
    assert "is unknown" in suites.lessons_sentence(study)
    study.lessons = {"student": ["shop"], "weak": ["shop"], "strong": None}
    assert suites.lessons_sentence(study) == (
        "Families out of domain: shop was in the lessons of all 2 models; so out of domain means "
        "outside of the training pairs, and not unseen. It is unknown for strong."
    )
    study.lessons = {"student": ["chain"]}
    assert suites.lessons_sentence(study) == (
        "Families out of domain: shop was in no model's lessons."
    )


def test_a_purchase_leaves_what_the_components_say():
    rng = np.random.default_rng(0)
    before = (rng.random((300, 2)) < 0.5).astype(int)

    def run(shift):
        return (rng.random(before.shape) < 0.5 + shift / 100).astype(int)

    arms = {f"a{i}": [run(shift) for shift in rng.normal(0, 6, 3)] for i in range(8)}
    e = found(before, **arms)
    runs = {name: [Run(0, i) for i in range(3)] for name in arms}
    b = noise.budgets({"in": e}, runs)["in"]
    assert (b.seeds, b.draws, b.draw, set(b.shares)) == (3, 1, None, {"questions", "seeds"})
    assert sum(b.shares.values()) == pytest.approx(100)
    t = noise.student(e.freedom({b.arm: 1.0}))
    assert t > 1.96
    bought = {o.what: (o.half_width / t) ** 2 for o in b.options}
    variance = b.questions**2 + b.seed**2 / 3
    assert (b.half_width / t) ** 2 == pytest.approx(variance, rel=1e-3)
    assert bought["twice the questions"] == pytest.approx(variance - b.questions**2 / 2, rel=1e-3)
    # A fourth seed takes a quarter of the seeds' variance, and of the interaction within questions.
    rest = e.noise[0].seed.rest / 3
    seed = variance - b.seed**2 / 3 / 4 - rest / 4
    assert bought["one more seed of every arm"] == pytest.approx(seed, rel=1e-3)
    assert b.buy == "one more seed of every arm"
    estimate = e.change(b.arm).estimate
    assert b.half_width == pytest.approx((estimate.high - estimate.low) / 2, rel=0.07)
    # An effect must be larger to be shown among eight arms than alone.
    alone = noise.detectable(e.error({b.arm: 1.0}), e.freedom({b.arm: 1.0}))
    assert b.detectable == pytest.approx(alone)
    assert b.half_width < b.detectable < b.detectable_adjusted


def test_no_change_is_promised_that_an_accuracy_cannot_have():
    """One pair of seeds, 80 points apart, is all that the noise of seeds is known from."""
    rng = np.random.default_rng(0)
    before, *runs = ((rng.random((60, 2)) < share).astype(int) for share in (0.5, 0.1, 0.9))
    e = found(before, arm=runs)
    b = noise.budgets({"in": e}, {"arm": [Run(0, 0), Run(0, 1)]})["in"]
    assert math.isinf(b.detectable) and math.isinf(b.detectable_adjusted)
    assert b.half_width == 100 and all(o.half_width <= 100 for o in b.options)


@pytest.mark.parametrize("changed", [0, 9, 40])
def test_few_unlike_answers_promise_no_detectable_change(changed):
    before = np.zeros((40, 2), int)
    after = before.copy()
    after[:changed, 0] = 1
    e = found(before, arm=[after])
    b = noise.budgets({"in": e}, {"arm": [Run(0, 0)]})["in"]
    low, high = e.change("arm").estimate[1:]
    assert b.half_width == pytest.approx((high - low) / 2) and b.half_width > 1
    assert math.isnan(b.detectable) and b.options == [] and "more questions" in b.buy


ATTACKS = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "{{ s.name }}{% raw %}",
    "\u2028\u2029 lines",
    '"]}\\" onload=x',
    "]]>&lt;b&gt;",
    "\x00\ud800",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_of_a_trace_leaves_the_data(study, attack):  # noqa: F811
    if "\ud800" not in attack:  # which no table can hold, but a prompt's JSON can
        for name, table in study.traces.items():
            traces = [t._replace(text=attack) for t in from_table(Trace, table)]
            study.traces[name] = to_table(Trace, traces)
    messages = json.dumps([{"role": "user", "content": attack}])
    prompts = [p._replace(messages=messages) for p in from_table(Prompt, study.prompts)]
    study.prompts = to_table(Prompt, prompts)
    clean = render(study, summarise(study), {}, {})
    # What the script reads is the text, and the page has two scripts: the data, and the browser.
    assert {p["question"] for p in data_of(clean)["pairs"]} == {attack}
    assert clean.count("<script") == clean.count("</script>") == 2
    assert "<!--" not in clean and "\u2028" not in clean
    clean.encode()


def test_the_browser_says_how_many_pairs_it_holds(study):  # noqa: F811
    whole = pair_browser.browser(study, {})
    assert (whole.total, len(whole.pairs), whole.judges) == (24, 24, ["exact", "model"])
    strong = next(p for p in whole.pairs if p.chosen.model == "strong")
    assert strong.arms == ["dpo-strong", "top", "random", "sft"]
    assert (strong.stratum, strong.gaps) == ("right / wrong", {"exact": 2.0, "model": 2.0})
    evidence = strong.chosen.ratings["model"]["factuality"]
    assert (evidence.labels, evidence.mass) == ([0, 0, 0, 0, 100], 1.0)
    few = pair_browser.browser(study, {}, pairs=6)
    assert (few.total, len(few.pairs)) == (24, 6)
    assert {p.chosen.model for p in few.pairs} == {"mid", "strong"}
    small = pair_browser.browser(study, {}, size=6000)
    assert 0 < len(small.pairs) < 24
    assert len(pair_browser.script_json(small)) < 8000
    page = render(study, summarise(study), {}, {})
    assert "holds 24 of the 24 different pairs" in page


def test_every_count_of_something_dropped_has_words():
    """Counts are written as literals in stages and what they call; the page shows those with words.

    A count without words would be left out of the page without a trace.
    """
    package = pathlib.Path(suites.__file__).parents[1]
    written = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r'"((?:dropped|overlap|truncated|tied)_\w+)"', path.read_text())
    }
    worded = {name for counts in COUNTS.values() for name in counts}
    assert {"dropped_unfinished", "tied_at_cut"} <= written
    assert written <= worded
