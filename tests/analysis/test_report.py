"""The page of a small study is self-contained, escaped, complete, and follows the numbers."""

import csv
import dataclasses
import html
import io
import json
import math
import re
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.claims import RUNG_RULE, claim_verdict
from deltapref_jax.analysis.components import Kind, kinds_of
from deltapref_jax.analysis.controls import _Control, bound, controls, judged
from deltapref_jax.analysis.findings import excluded, judge_sentence, outcome
from deltapref_jax.analysis.page import Evaluation, JudgeAudit, JudgeSummary, Measured
from deltapref_jax.analysis.proposal import read_evidence
from deltapref_jax.analysis.report import draw, render, terminal_table
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.study import ArtifactRecord, Study
from deltapref_jax.analysis.summary import plain, summarise, summary_json
from deltapref_jax.config import (
    DIMENSIONS,
    Arm,
    Claim,
    Experiment,
    Generator,
    Judge,
    Model,
    Objective,
    Prompts,
    Run,
    Suite,
    Training,
    budget_twin,
    claims_of,
    greedy_twin,
)
from deltapref_jax.progress import plain_console
from deltapref_jax.records import (
    Audit,
    Pair,
    Prompt,
    RateTrial,
    Rating,
    Result,
    Trace,
    Verdict,
    digest,
    from_table,
    to_table,
)

QUESTIONS = [f"q{i}" for i in range(12)]
NASTY = "</script><b>bold</b> & 'quoted'"
GENERATORS = {"weak": 2.0, "mid": 3.0, "strong": 4.0}  # rating of the first trace
DOMAINS = ("in", "out")


def evaluated(p, seed):
    right = np.random.default_rng(seed).random((2, 40, 2)) < p
    return to_table(
        Result,
        [
            Result(
                f"{d}-suite",
                d,
                "t",
                f"{q}",
                s,
                "It is 7.",
                "7",
                bool(right[i, q, s]),
                ("length", "eos")[s],
                -2.5,
                9,
            )
            for i, d in enumerate(DOMAINS)
            for q in range(40)
            for s in range(2)
        ],
    )


def traces(name):
    ids = np.array([1])
    return to_table(
        Trace,
        [
            Trace(f"{name}-{q}", q, name, "w", 0, text, ids, "eos", -1.0, 3)
            for q in QUESTIONS
            for text in [NASTY if q == "q0" else f"{name} says {q}"]
        ],
    )


def verdicts(name):
    return to_table(Verdict, [Verdict(f"{name}-{q}", name != "weak", "1", "") for q in QUESTIONS])


def ratings(judge, name, points):
    five = [0.0, 0.0, 0.0, 0.0, 1.0]
    return to_table(
        Rating,
        [
            Rating(f"{name}-{q}", judge, d, points + i / 20, 0.0, 1.0, five)
            for i, q in enumerate(QUESTIONS)
            for d in DIMENSIONS
        ],
    )


def pairs(chosen):
    return to_table(
        Pair,
        [
            Pair(
                pair_id=digest(chosen, q),
                prompt_id=q,
                chosen_id=f"{chosen}-{q}",
                rejected_id=f"weak-{q}",
                chosen_model=chosen,
                rejected_model="weak",
                chosen_rating=None,
                rejected_rating=None,
                chosen_correct=True,
                rejected_correct=False,
            )
            for q in QUESTIONS
        ],
    )


def audited(judge, blind):
    """Six texts, corrupted in every dimension in two degrees: each rated in all dimensions."""
    texts = [("", 0), *((d, g) for d in DIMENSIONS for g in (1, 2))]
    return to_table(
        Audit,
        [
            Audit(f"{q}", judge, target, g, d, rating, not g, 9 + g)
            for q in range(6)
            for target, g in texts
            for d in DIMENSIONS
            for rating in [3.0 if d in blind else 5.0 - g * (d == target)]
        ],
    )


def tiny_experiment():
    strong = Arm(chosen="strong", rejected="weak")
    half = dataclasses.replace(strong, fraction=0.5, group="selection")
    return Experiment(
        name="tiny",
        question="Does it <count>?",
        about="A small world.",
        prompts=(Prompts(tasks=("chain",), count=12),),
        generators=tuple(Generator(name=n, about=f"{n} one") for n in GENERATORS),
        judges=(Judge(name="exact"), Judge(name="model", kind="model")),
        objectives=(Objective(name="dpo"), Objective(name="sft", kind="sft")),
        arms=(
            Arm(name="dpo-mid", chosen="mid", rejected="weak"),
            dataclasses.replace(strong, name="dpo-strong"),
            dataclasses.replace(half, name="top", keep="top"),
            dataclasses.replace(half, name="random", keep="random"),
            dataclasses.replace(strong, name="sft", objective="sft", group="control"),
        ),
        suites=tuple(
            Suite(name=f"{d}-suite", domain=d, prompts=Prompts(tasks=("shop",), count=40))
            for d in DOMAINS
        ),
    )


@pytest.fixture
def study():
    experiment = tiny_experiment()
    asked = to_table(
        Prompt,
        [
            Prompt(q, "chain", json.dumps([{"role": "user", "content": q}]), "1", "world", "{}")
            for q in QUESTIONS
        ],
    )
    metrics = [
        {
            "step": i + 1,
            "epoch": (i + 1) / 4,
            "loss": 0.7,
            "grad_norm": 1.0,
            "rewards/chosen": -0.1 * i,
            "rewards/rejected": -0.2 * i,
            "logps/chosen": -5.0,
            "logps/rejected": -6.0,
        }
        for i in range(8)
    ]
    arms = {a.name: a for a in experiment.arms}
    return Study(
        experiment=experiment,
        prompts=asked,
        suites={f"{d}-suite": asked for d in DOMAINS},
        traces={n: traces(n) for n in GENERATORS},
        verdicts={n: verdicts(n) for n in GENERATORS},
        ratings={
            j: {n: ratings(j, n, p) for n, p in GENERATORS.items()} for j in ("exact", "model")
        },
        audits={"exact": audited("exact", ()), "model": audited("model", ("numerical_precision",))},
        pairs={name: {0: pairs(a.chosen)} for name, a in arms.items()},
        results={
            name: {Run(0, 0): evaluated(0.9 if name == "dpo-strong" else 0.4, 7)} for name in arms
        },
        student=evaluated(0.4, 7),
        capability={n: evaluated(p, 3) for n, p in zip(GENERATORS, (0.2, 0.5, 0.9), strict=True)},
        metrics={name: {Run(0, 0): metrics} for name in arms},
        pair_counts={
            name: {0: {"prompts": 12.0, "pool": 12.0, "chosen_tokens": 3.5}} for name in arms
        },
        artifacts=[
            ArtifactRecord("prompts", "prompts", "k", 2.0, {"rows": 12.0, "duplicate": 3.0}),
            ArtifactRecord("prompts", "suite/in-suite", "k", 2.0, {"rows": 12.0, "duplicate": 3.0}),
            ArtifactRecord(
                "judge", "judge/model/weak", "j", 6.0, {"positions": 8.0, "filled": 6.0}
            ),
        ],
        versions={"jax": "1"},
    )


def test_numbers_and_sentences(study):
    s = summarise(study)
    arms = {a.name: a for a in s.arms}
    assert arms["dpo-strong"].changes["in"].estimate.low > 0
    assert arms["sft"].changes["in"].estimate.value == 0
    assert arms["dpo-strong"].sample_delta == pytest.approx({"exact": 2.0, "model": 2.0})
    assert arms["top"].pair_judge == "exact" and arms["random"].pair_judge == ""
    assert arms["top"].waterfall == {"prompts": 12, "pool": 12}
    assert arms["top"].strata == {
        "right_right": 0,
        "right_wrong": 100,
        "wrong_right": 0,
        "wrong_wrong": 0,
    }
    assert {(c.a, c.b, c.kind) for c in s.contrasts} == {
        ("top", "random", "random"),
        ("top", "dpo-strong", "all"),
    }
    assert {(c.a, c.b) for c in s.controls} == {("sft", "dpo-strong")}
    text = " ".join(f.text for f in s.findings)
    assert "no effect shown" in text and "excluded: above" in text
    claims = {c.what: c for c in s.claims}
    assert list(claims) == ["top minus random, out of domain"]
    (claim,) = s.claims
    assert claim.effect.estimate.value == 0 and "undecided" in claim.verdict
    assert s.noise["in"].seed is None and s.noise["in"].questions == 0
    assert "too few differ in how they changed" in s.noise["in"].buy and s.noise["in"].options == []
    assert "fell together" in text
    assert any(
        "Judge model cannot carry a conclusion on 1 of 5 dimensions: its AUC on corrupted "
        "solutions is below 0.65: numerical precision 0.50. The exact judge carries it." in t
        for t in s.judge_sentences
    )


HOSTILE = "[/red] [bold \x1b[31m \x00\x07 $x^$ <b> \ud800"


def test_a_config_with_markup_escape_codes_and_control_characters_is_shown(study, capsys):
    """`validate` refuses such names; a study that was made before must still be shown."""
    e = study.experiment
    arms = tuple(dataclasses.replace(a, name=a.name + HOSTILE) for a in e.arms)
    generators = tuple(dataclasses.replace(g, about=HOSTILE) for g in e.generators)
    study.experiment = dataclasses.replace(
        e, question=HOSTILE, about=HOSTILE, arms=arms, generators=generators
    )
    for field in ("pairs", "results", "metrics", "pair_counts"):
        named = {name + HOSTILE: value for name, value in getattr(study, field).items()}
        setattr(study, field, named)
    s = summarise(study)
    drawn = draw(study, s)
    for figure in drawn.values():
        ElementTree.fromstring(figure.svg)
    page = render(study, s, drawn, dict.fromkeys(DIMENSIONS, HOSTILE))
    page.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert "&lt;b&gt;" in page
    plain_console(width=250).print(terminal_table(json.loads(summary_json(s))))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"[/red] [bold \x1b[31m \x00\x07 $x^$ <b> \ud800" in out


def test_an_artifact_of_two_labels_counts_once(study):
    s = summarise(study)
    assert [(d.where, d.what, d.count) for d in s.dropped] == [
        ("prompts", "prompts that repeat another, dropped", 3)
    ]
    assert [(x.stage, x.artifacts, x.share, x.padding) for x in s.stages] == [
        ("judge", 1, 75.0, 25.0),
        ("prompts", 1, 25.0, None),
    ]


def test_json_has_the_fields_of_a_summary_and_null_for_nan(study):
    s = summarise(study)
    written = json.loads(summary_json(s))
    arm = next(a for a in written["arms"] if a["name"] == "top")
    assert (arm["keep"], arm["seeds"], arm["training"]["kl"]) == ("top", 1, None)
    assert arm["in"]["estimate"] == list(s.arms[2].changes["in"].estimate)
    assert written["student"].keys() == {"in", "out", "truncated", "tokens", "surprise"}
    assert written["judges"][0]["auc"]["factuality"][0::2] == [1.0, 1.0]
    assert plain(Evaluation({"in": Estimate(1.0, 0.0, math.nan)}, 2.0, math.inf, 0.3)) == {
        "in": [1.0, 0.0, None],
        "truncated": 2.0,
        "tokens": None,
        "surprise": 0.3,
    }


def test_a_recipe_reads_the_effects_of_a_summary(study):
    s = summarise(study)
    evidence = read_evidence(summary_json(s), "summary.json")
    assert evidence.domains == tuple(s.domains)
    assert [(c.a, c.b, c.effects) for c in evidence.contrasts] == [
        (c.a, c.b, c.difference) for c in s.contrasts if c.kind in ("random", "all")
    ]
    assert evidence.contrasts
    assert [c.split(":")[0] for c in evidence.claims] == [c.what for c in s.claims]


def test_a_pair_of_an_unknown_trace_is_an_error(study):
    known = study.pairs["top"][0]
    study.pairs["top"] = {0: known.set_column(2, "chosen_id", [["nobody"] * known.num_rows])}
    with pytest.raises(KeyError, match="nobody"):
        summarise(study)


def test_quantised_models_are_named_on_the_page(study):
    plain_page = render(study, summarise(study), {}, {})
    assert "Quantised" not in plain_page
    e = study.experiment
    e.student.path = "s"
    e.generators[2].model = Model("big", quantization="int8")
    e.generators[0].model.quantization = "fp8"  # with the student's path
    e.judges[1].model = Model("j", quantization="int8")
    s = summarise(study)
    assert s.quantised == (
        "Quantised: generator weak samples, and is evaluated, with fp8 weights of the student's "
        "files; generator strong samples, and is evaluated, with int8 weights; judge model rates "
        "with int8 weights. Products are computed in each model's dtype. The student, its policies "
        "and the reference are not quantised."
    )
    assert [g.quantization for g in s.generators] == ["fp8", "", "int8"]
    assert [j.quantization for j in s.judges] == ["", "int8"]
    page = html.unescape(render(study, s, {}, {}))
    assert s.quantised in page
    for cell in ("<td>strong, int8</td>", "<td>mid</td>", "(model, int8)"):
        assert cell in page


def with_arms(study, *arms):
    """The study with further arms, of the pairs and answers of the arm "top"."""
    e = dataclasses.replace(study.experiment, arms=(*study.experiment.arms, *arms))
    fields = {}
    for field in ("pairs", "results", "metrics", "pair_counts"):
        held = getattr(study, field)
        fields[field] = held | {a.name: held["top"] for a in arms}
    return dataclasses.replace(study, experiment=e, **fields)


def test_twins_are_compared_with_each_other_and_with_arms_of_their_own_budget(study):
    study.experiment.training = Training(steps=24)
    arms = {a.name: a for a in study.experiment.arms}
    twins = [budget_twin(arms[name], Training(steps=24)) for name in ("top", "random")]
    same_but_seeds = dataclasses.replace(arms["top"], name="top-again", seeds=(3,))
    own = dataclasses.replace(arms["top"], name="top-7", steps=7)
    study = with_arms(study, *twins, same_but_seeds, own)
    s = summarise(study)
    assert {(c.a, c.b, c.kind) for c in s.contrasts} == {
        ("top", "random", "random"),
        ("top", "dpo-strong", "all"),
        ("top-again", "random", "random"),
        ("top-again", "dpo-strong", "all"),
        ("top-equal-epochs", "random-equal-epochs", "random"),
        ("top-equal-epochs", "dpo-strong", "all_epochs"),
    }
    assert {(c.a, c.b) for c in s.budgets} == {
        ("top-equal-epochs", "top"),
        ("top-equal-epochs", "top-again"),
        ("random-equal-epochs", "random"),
        ("top-7", "top"),
        ("top-7", "top-again"),
    }
    assert [a.budget for a in s.arms[-4:]] == ["equal epochs", "equal epochs", "", "7 steps"]
    figures = draw(study, s)
    gap = "DPO, gap in the sum of all dimensions"
    assert f'"{gap}, equal epochs",in,"top, judge exact",top-equal-e' in figures["selection"].csv
    page = render(study, s, figures, {})
    assert "<td>top-equal-epochs</td>" in page
    assert "against all pairs of the pool for as many epochs" in page.lower()


def test_a_sentence_on_selections_has_one_budget_and_one_measure(study):
    """Of two budgets it would say that arms keep twice as many fractions as they do."""
    study.experiment.training = Training(steps=24)
    arms = {a.name: a for a in study.experiment.arms}
    top, random = arms["top"], arms["random"]
    twins = [budget_twin(a, Training(steps=24)) for a in (top, random)]
    six = {"fraction": 1.0, "pairs": 6}
    margin = dataclasses.replace(top, by="reference_margin", name="sure")
    added = (
        dataclasses.replace(top, name="top-6", **six),
        dataclasses.replace(random, name="random-6", **six),
        margin,
        dataclasses.replace(margin, name="unsure", keep="bottom"),
    )
    study = with_arms(study, *twins, *added)
    s = summarise(study)
    texts = {f.topic: f.text for f in s.findings}
    gap = "largest gap in the sum of all dimensions"
    both = texts["Sample delta, DPO, judge exact"]
    assert both.startswith(
        f"training on the 50% of pairs and 6 pairs (strong over weak) with the {gap}"
    )
    assert (
        "gainst as many pairs drawn at random: in domain +0.0 to +0.0 points over 2 comparisons, 0 "
        "of them shown" in both
    )
    epochs = texts["Sample delta, DPO, judge exact, equal epochs"]
    assert epochs.startswith(f"training on the 50% of pairs (strong over weak) with the {gap}")
    assert "gainst as many pairs drawn at random: in domain no effect shown" in epochs
    assert texts["Margin of the reference, DPO"].startswith(
        "training on the 50% of pairs (strong over weak) with the largest margin of the reference, "
    )
    assert "as many pairs of the smallest margins: in" in texts["Margin of the reference, DPO"]
    page = render(study, s, {}, {})
    assert "top 6 pairs by exact</td>" in page and "top 50% of pairs by exact</td>" in page
    figure = draw(study, s)["selection"]
    assert {p.split(",")[-4] for p in figure.csv.splitlines()[1:]} == {"50.0", "100.0"}
    assert "DPO, margin of the reference, in domain" in figure.svg


def test_draws_of_one_seed_are_in_the_intervals_and_said_to_be(study):
    """Three draws of random pairs with one seed measure what a draw changes, and no seed."""
    study = with_arms(study, Arm(name="dpo-weak", chosen="weak", rejected="weak"))
    e = study.experiment
    e.claims = (Claim(kind="slope", objective="dpo", domain="in", margin=0.5),)
    e.arms = tuple(
        dataclasses.replace(a, draws=(0, 1, 2)) if a.name == "random" else a for a in e.arms
    )
    study.results["random"] = {Run(d, 0): evaluated(0.4 + 0.05 * d, 90 + d) for d in range(3)}
    s = summarise(study)
    assert [a.name for a in s.arms if a.redrawn] == ["top", "random"]
    assert s.unmeasured[0] == (
        "The noise of training seeds: no arm has several, and draws of pairs that share one do not "
        "differ by it, so every interval is too short. Those of 2 of 6 arms, whose pairs are "
        "drawn, have what another draw changes (degrees of freedom by kind: random pairs, dpo: "
        "2); those of the other 4 are of questions alone."
    )
    # No draw moves the arm in the middle, so its budget has none.
    budget = s.noise["in"]
    assert not next(a for a in s.arms if a.name == budget.arm).redrawn
    assert (budget.draw, budget.draw_freedom, budget.drawn) == (None, 0, False)
    page = render(study, s, {}, {})
    assert (
        "Intervals are of questions and draws of pairs (of arms whose pairs are drawn): training "
        "seeds are not measured." in page
    )
    # The slope has three rungs, so that leaving one out leaves no slope.
    (claim,) = s.claims
    assert claim.hangs_on == ("Hangs on every one of its 3 rungs: without one, no slope is left.")
    assert page.index(claim.hangs_on) < page.index("Not measured, or not in the intervals")
    assert RUNG_RULE in page


def test_what_another_draw_moves_is_measured(study):
    arms = {a.name: a for a in study.experiment.arms}
    names = ("dpo-strong", "top", "random")
    assert [kinds_of(study)[n].draw for n in names] == ["", "ties, dpo", "random pairs, dpo"]
    # Without a tie, or where all pairs are kept, another draw gives the same pairs.
    for name in ("top", "random"):
        study.pair_counts[name] = {0: {"pool": 12.0, "kept": 12.0, "tied_at_cut": 0.0}}
    assert [kinds_of(study)[n].draw for n in names] == ["", "", ""]
    for name in ("top", "random"):
        study.pair_counts[name][0] |= {"kept": 6.0, "tied_at_cut": 2.0}
    assert [kinds_of(study)[n].draw for n in names[1:]] == ["ties, dpo", "random pairs, dpo"]
    study.pair_counts["top"][0] |= {"tied_at_cut": 0.0, "tied_samples": 1.0}
    assert kinds_of(study)["top"].draw == "ties, dpo"
    # Several draws tell themselves, and a coin turns pairs around.
    whole = study.pairs["top"][0]
    study.pairs["top"] = {0: whole, 1: whole.take(list(range(whole.num_rows))[::-1])}
    assert kinds_of(study)["top"].draw == ""
    study.pairs["top"][1] = whole.slice(1)
    assert kinds_of(study)["top"].draw == "ties, dpo"
    arms["top"].steps, arms["random"].direction = 8, "coin"
    assert kinds_of(study)["top"].draw == "ties, dpo, its own budget"
    assert kinds_of(study)["random"] == ("dpo", "coin, dpo")


def test_the_page_says_whose_noise_an_arm_borrows(study):
    study.experiment.arms[1].seeds = (0, 1)
    study.results["dpo-strong"] = {Run(0, i): evaluated(0.9, 7 + i) for i in range(2)}
    study.results["random"] = {Run(d, 0): evaluated(0.4, 90 + d) for d in range(3)}
    s = summarise(study)
    assert (
        "Seeds of a kind of which no arm has several: sft (1 arm). Their intervals have the noise "
        "of other kinds (dpo), which may differ." in s.unmeasured
    )
    assert (
        "Draws of pairs of a kind of which no arm has several: ties, dpo (1 arm). Their intervals "
        "have the noise of other kinds (random pairs, dpo), which may differ." in s.unmeasured
    )


def test_degrees_of_freedom_are_of_the_kind_that_lends_them(study):
    for name, arm in {a.name: a for a in study.experiment.arms}.items():
        arm.seeds = {"dpo-mid": (0, 1, 2), "sft": (0, 1)}.get(name, (0,))
    sft = next(a for a in study.experiment.arms if a.name == "sft")
    study = with_arms(study, dataclasses.replace(sft, name="sft-one", seeds=(0,)))
    study.results["dpo-mid"] = {Run(0, i): evaluated(0.4, 70 + i) for i in range(3)}
    study.results["sft"] = {Run(0, i): evaluated(0.4, 80 + i) for i in range(2)}
    assert (
        "The noise of training in 4 of 6 arms, which have one seed: they borrow what the others "
        "measured (degrees of freedom by kind: dpo: 2; sft: 1)." in summarise(study).unmeasured
    )


def test_the_page_shows_the_budget_of_every_arm(study):
    study.experiment.arms[1].learning_rate = 2e-5
    study.experiment.arms[1].pairs_per_step = 4
    s = summarise(study)
    t = {a.name: a.training for a in s.arms}
    assert (t["top"].steps, t["top"].epochs, t["top"].learning_rate) == (8, 2.0, 1e-4)
    assert (t["dpo-strong"].pairs_per_step, t["top"].pairs_per_step) == (4, 32)
    page = render(study, s, {}, {})
    assert "<tr><td>dpo-strong</td><td>8</td><td>4</td><td>2.00</td><td>2e-05</td>" in page


def read_out(table, suite, samples, change, name="", domain=""):
    """The rows of a suite as those of a second read-out, or another suite, with other verdicts."""
    rows = [r for r in from_table(Result, table) if r.suite == suite]
    name = name or f"{suite}-2"
    return [
        r._replace(suite=name, domain=domain, sample=s, finish="length", correct=change(r, s))
        for r in rows
        if r.sample == 0
        for s in range(samples)
    ]


def test_controls_are_recognised_from_the_config_and_judged(study):
    arms = {a.name: a for a in study.experiment.arms}
    added = (
        dataclasses.replace(arms["top"], name="seeds", seeds=(1, 2)),
        dataclasses.replace(arms["random"], name="draws", draws=(1, 2)),
        dataclasses.replace(arms["random"], name="other-draws", draws=(3,)),
        dataclasses.replace(arms["dpo-strong"], name="coin", direction="coin", group="control"),
        dataclasses.replace(
            arms["dpo-strong"], name="reversed", chosen="weak", rejected="strong", group="control"
        ),
        # Neither exchanges the sides of the same pairs.
        dataclasses.replace(
            arms["top"], name="top-reversed", chosen="weak", rejected="strong", group="control"
        ),
        dataclasses.replace(arms["dpo-mid"], name="other-generators", chosen="weak"),
    )
    study = with_arms(study, *added)
    better, same, worse = evaluated(0.9, 7), evaluated(0.4, 7), evaluated(0.05, 7)
    study.results |= {
        "seeds": {Run(0, 1): same, Run(0, 2): same},
        "draws": {Run(1, 0): same, Run(2, 0): same},
        "other-draws": {Run(3, 0): better},
        "coin": {Run(0, 0): better},
        "reversed": {Run(0, 0): worse},
    }
    s = summarise(study)
    got = {
        (c.kind, c.arms): (c.effects["in"].estimate.value, c.came_out) for c in s.control_results
    }
    gain = next(a for a in s.arms if a.name == "dpo-strong").changes["in"].estimate.value
    assert gain > 20
    # Nothing but the two draws themselves says how far draws may differ.
    assert got[("random", ("draws",))] == (0, None)
    assert got[("random", ("random", "draws"))] == (0, None)  # ± 5 is more than the margin of 2
    value, came_out = got[("random", ("random", "other-draws"))]
    assert value == pytest.approx(-gain)
    assert got[("placebo", ("coin",))] == (pytest.approx(gain), False)
    value, came_out = got[("negative", ("dpo-strong", "reversed"))]
    assert value > gain and came_out
    assert got[("null", ("seeds",))] == (0, None)
    assert got[("null", ("top", "seeds"))] == (0, None)
    assert {key for key in got if key[0] in ("null", "negative")} == {
        ("null", ("seeds",)),
        ("null", ("top", "seeds")),
        ("negative", ("dpo-strong", "reversed")),
    }
    page = render(study, s, {}, {})
    assert "Controls that must come out" in page and "No arm of this page is a control" not in page
    assert page.index("Controls that must come out") < page.index('<ul class="findings">')
    assert "seeds, seed 1 minus seed 2" in page and "did not come out" in page


def estimated(low, value, high, shown):
    p = 0.01 if shown else 0.2
    return Measured(Estimate(value, low, high), p, p, max(-low, high))


@pytest.mark.parametrize(
    "kind, inside, outside, want",
    [
        # Shown in one domain is not shown in all, and it is named.
        (
            "negative",
            estimated(2.0, 5.0, 8.0, True),
            estimated(-7.0, -3.0, 1.0, False),
            (None, "a difference is shown in domain, none out of domain"),
        ),
        (
            "negative",
            estimated(2.0, 5.0, 8.0, True),
            estimated(-7.0, -4.0, -1.0, True),
            (False, "the exchanged pairs do better out of domain"),
        ),
        (
            "negative",
            estimated(2.0, 5.0, 8.0, True),
            estimated(1.0, 3.0, 5.0, True),
            (True, "a difference is shown in domain and out of domain"),
        ),
        # As large as four margins of the claims.
        (
            "placebo",
            estimated(-0.1, 3.9, 7.9, False),
            estimated(-1.0, 0.0, 1.0, False),
            (None, "up to 7.9 points are not excluded, of at most 2"),
        ),
        (
            "placebo",
            estimated(-9.0, -3.0, 1.5, False),
            estimated(-1.0, 0.0, 1.0, False),
            (True, "no gain above +1.5"),
        ),
        (
            "random",
            estimated(-1.9, -0.5, 0.9, False),
            estimated(-1.0, 0.0, 1.0, False),
            (True, "to within ±1.9"),
        ),
    ],
)
def test_a_control_comes_out_in_all_domains_within_the_margin(kind, inside, outside, want):
    assert judged(kind, {"in": inside, "out": outside}, [], 2.0) == want


def test_only_two_single_seeds_may_differ_by_four_margins(study):
    study.experiment.claims = (
        Claim(a="top", b="random", margin=1.5),
        Claim(a="top", b="dpo-strong", margin=3.0),
        Claim(kind="slope", objective="dpo", margin=0.5),
    )
    one, two = [Run(0, 0)], [Run(0, 0), Run(0, 1)]
    bounds = {
        (kind, len(a), len(b)): bound(study.experiment, _Control(kind, "", ("x",), a, b))
        for kind, a, b in (
            ("null", one, one),
            ("null", two, two),
            ("random", one, one),
            ("placebo", one, ()),
        )
    }
    assert list(bounds.values()) == [6.0, 1.5, 1.5, 1.5]


def test_a_negative_control_that_shows_nothing_is_undecided(study):
    strong = study.experiment.arms[1]
    exchanged = dataclasses.replace(
        strong, name="reversed", chosen="weak", rejected="strong", group="control"
    )
    study = with_arms(study, exchanged)
    study.results["reversed"] = study.results["dpo-strong"]
    (control,) = summarise(study).control_results
    assert (control.kind, control.came_out) == ("negative", None)
    assert control.verdict == "undecided: no difference is shown"


def test_two_seeds_of_an_arm_are_compared_with_the_noise_of_other_arms(study):
    for name, arm in {a.name: a for a in study.experiment.arms}.items():
        arm.seeds = {"dpo-mid": (0, 1), "dpo-strong": (0, 1, 2)}.get(name, (0,))
    study.results["dpo-mid"] = {Run(0, 0): evaluated(0.1, 70), Run(0, 1): evaluated(0.9, 71)}
    study.results["dpo-strong"] = {Run(0, i): evaluated(0.9, 7 + i) for i in range(3)}
    with mock.patch.object(fx, "effects", side_effect=fx.effects) as effects:
        apart, near = controls(study, {})
    # Their 80 points are in no noise that they are compared with.
    assert apart.arms == ("dpo-mid",)
    assert apart.verdict == "did not come out: a difference is shown in domain and out of domain"
    assert near.arms == ("dpo-strong",)
    assert near.verdict.startswith("undecided: up to") and near.verdict.endswith("of at most 8")
    for estimate in (m.estimate for c in (apart, near) for m in c.effects.values()):
        assert -100 <= estimate.low <= estimate.high <= 100
    # What is compared is no further arm that measures the noise: 1 + 2 degrees of freedom.
    assert effects.call_args.kwargs["measuring"] == study.results
    # Another kind's noise is none that they are compared with.
    of_kinds = controls(study, {"dpo-mid": Kind("kto"), "dpo-strong": Kind("dpo")})
    alone = "undecided: no other arm of its kind has several seeds to compare with"
    assert [c.verdict for c in of_kinds] == [alone, alone]
    study.results["dpo-strong"] = {Run(0, 0): evaluated(0.9, 7)}
    assert [c.verdict for c in controls(study, {})] == [alone]


def test_draws_of_other_seeds_are_compared_with_the_noise_of_seeds_too(study):
    (random,) = [a for a in study.experiment.arms if a.keep == "random"]
    twins = [dataclasses.replace(random, name=f"twin-{i}", draws=(i,), seeds=(i,)) for i in (8, 9)]
    study = with_arms(study, *twins)
    study.results["random"] = {Run(d, 0): evaluated(0.4, 90 + d) for d in range(3)}
    for i, twin in zip((8, 9), twins, strict=True):
        study.results[twin.name] = {Run(i, i): evaluated(0.4, i)}
    kinds = {a.name: Kind("dpo", "random pairs") for a in study.experiment.arms}
    (control,) = [c for c in controls(study, kinds) if c.arms == ("twin-8", "twin-9")]
    assert control.verdict == (
        "undecided: no other arm of its kind has several seeds to compare with"
    )
    study.results["dpo-mid"] = {Run(0, i): evaluated(0.4, 70 + i) for i in range(3)}
    (control,) = [c for c in controls(study, kinds) if c.arms == ("twin-8", "twin-9")]
    assert "to compare with" not in control.verdict


def test_a_page_without_controls_says_so(study):
    s = summarise(study)
    assert s.control_results == []
    assert "No arm of this page is a control that must come out" in render(study, s, {}, {})


def test_second_read_outs_stand_beside_the_domains(study):
    """In 30 of 40 questions all arms go from one right sample of four to two."""
    plain_summary = summarise(study)
    suite = Suite(
        name="in-suite-2",
        prompts=Prompts(tasks=("shop",), count=40),
        samples=4,
        readout="pass",
        k=2,
    )
    e = study.experiment
    study.experiment = dataclasses.replace(e, suites=(*e.suites, suite))

    def with_rows(table, right):
        more = read_out(table, "in-suite", 4, lambda r, s: int(r.prompt_id) < 30 and s < right)
        return pa.concat_tables([table, to_table(Result, more)])

    study.student = with_rows(study.student, 1)
    study.results = {
        arm: {run: with_rows(t, 2) for run, t in runs.items()}
        for arm, runs in study.results.items()
    }
    s = summarise(study)
    (found,) = s.readouts
    assert (found.suite, found.domain) == ("in-suite-2", "in")
    assert found.what == "pass@2 of 4 samples at temperature 1"
    # 1 - C(3, 2) / C(4, 2) = 1/2, and 1 - C(2, 2) / C(4, 2) = 5/6, in 30 of 40 questions.
    assert found.student.value == pytest.approx(100 * 30 / 40 / 2)
    for arm in s.arms:
        assert found.changes[arm.name].estimate.value == pytest.approx(
            100 * 30 / 40 * (5 / 6 - 1 / 2)
        )
    # Nothing else has changed: no domain averages it, and lengths are those of the domains.
    assert s.domains == plain_summary.domains and s.suites == plain_summary.suites
    for name in ("student", "arms", "claims", "contrasts", "noise"):
        assert plain(getattr(s, name)) == plain(getattr(plain_summary, name))
    page = render(study, s, {}, {})
    assert "in-suite-2, in domain: pass@2 of 4 samples at temperature 1" in page


def test_a_domain_that_is_read_again_greedily_is_one_read_out(study):
    """Sampled, every arm gains; greedily, each question of the two suites has one answer."""
    e = study.experiment
    (suite,) = [s for s in e.suites if s.domain == "in"]
    other = dataclasses.replace(suite, name="more", prompts=Prompts(tasks=("chain",), count=40))
    study.experiment = dataclasses.replace(
        e, suites=(*e.suites, other, greedy_twin(suite), greedy_twin(other))
    )

    def with_rows(table, right):
        more = read_out(table, suite.name, 1, lambda r, s: False, "more", domain="in")
        for name in (f"{suite.name}-greedy", "more-greedy"):
            more += read_out(table, suite.name, 1, lambda r, s: int(r.prompt_id) < right, name)
        return pa.concat_tables([table, to_table(Result, more)])

    study.student = with_rows(study.student, 10)
    study.results = {
        arm: {run: with_rows(t, 16) for run, t in runs.items()}
        for arm, runs in study.results.items()
    }
    s = summarise(study)
    (found,) = s.readouts
    assert (found.suite, found.what, found.greedy_twin) == (
        "all 2 suites",
        "accuracy, greedy",
        True,
    )
    assert found.student.value == pytest.approx(100 * 10 / 40)
    assert all(c.estimate.value == pytest.approx(100 * 6 / 40) for c in found.changes.values())
    texts = [f.text for f in s.findings if f.topic == "Sampled and greedy"]
    shown = [a for a in s.arms if a.changes["in"].shown]
    assert shown and len(texts) == 1
    assert f"{shown[0].name} changed" in texts[0] and "+15.0" in texts[0]
    page = render(study, s, {}, {})
    assert page.count("<th>sampled minus greedy</th>") == 1
    lost = found.lost[s.arms[-1].name].estimate
    assert f"{lost.value:+.1f}" in page[page.index("sampled minus greedy</th>") :]


def test_a_twin_of_some_suites_says_what_greedy_keeps_of_these(study):
    """One of two suites has a twin, and the domain's change is not the change of that suite.

    It keeps less of every arm than of the one before, and the least comes first.
    """
    e = study.experiment
    (suite,) = [s for s in e.suites if s.domain == "in"]
    other = dataclasses.replace(suite, name="more", prompts=Prompts(tasks=("chain",), count=40))
    study.experiment = dataclasses.replace(e, suites=(*e.suites, other, greedy_twin(other)))

    def with_rows(table, right, greedy):
        more = read_out(
            table, suite.name, 1, lambda r, s: int(r.prompt_id) < right, "more", domain="in"
        )
        more += read_out(
            table, suite.name, 1, lambda r, s: int(r.prompt_id) < greedy, "more-greedy"
        )
        return pa.concat_tables([table, to_table(Result, more)])

    study.student = with_rows(study.student, 10, 20)
    study.results = {
        arm: {run: with_rows(t, 30, 32 - 2 * i) for run, t in runs.items()}
        for i, (arm, runs) in enumerate(study.results.items())
    }
    s = summarise(study)
    (found,) = s.readouts
    assert (found.suite, found.greedy_twin) == ("more-greedy", True)
    assert (found.read_again, found.averaged) == (["more"], 2)
    (text,) = (f.text for f in s.findings if f.topic == "Sampled and greedy")
    shown = [a for a in s.arms if a.changes["in"].shown]
    kept = {a.name: 2 * (12 - 2 * i) / 40 for i, a in enumerate(s.arms) if a in shown}
    assert len(kept) > 1 and list(study.results) == [a.name for a in s.arms]
    assert f"{shown[0].changes['in'].estimate.value:+.1f}" != "+50.0"
    assert text.startswith(
        "in domain, over the 1 of 2 suites that were answered greedily too (more), "
        f"greedy decoding keeps {min(kept.values()):.0%} to {max(kept.values()):.0%} of the "
        f"{len(kept)} changes that are shown as sampled"
    )
    named = re.findall(
        r"(\S+) changed \+50\.0 points sampled and \+\S+ \[[^]]*\] greedy \((\d+)%", text
    )
    # A claim names the first two.
    assert named == [("random", "30"), ("top", "40"), ("sft", "20"), ("dpo-strong", "50")]


def test_answers_have_the_mean_surprise_of_their_tokens(study):
    """Of what the domains average, over all tokens and not over answers."""
    rows = from_table(Result, study.student)
    longer = [r._replace(tokens=3, logprob=-6.0) for r in rows if r.sample == 0]
    ignored = [r._replace(domain="", suite="again", logprob=-99.0) for r in rows]
    shorter = [r for r in rows if r.sample == 1]  # 2.5 nats over 9 tokens
    study.student = to_table(Result, [*longer, *shorter, *ignored])
    assert summarise(study).student.surprise == pytest.approx((6.0 + 2.5) / (3 + 9))


def test_a_study_that_only_sampled_has_a_page(study):
    bare = dataclasses.replace(
        study, student=None, ratings={}, audits={}, pairs={}, results={}, capability={}, metrics={}
    )
    s = summarise(bare)
    assert (s.student, s.arms, s.judges, s.findings) == (None, [], [], [])
    assert [(g.name, g.traces, g.evaluation) for g in s.generators] == [
        (n, 12, None) for n in GENERATORS
    ]
    page = render(bare, s, draw(bare, s), {})
    assert "there is nothing to conclude yet" in page
    assert terminal_table(json.loads(summary_json(s))).row_count == 0


def data_of(page):
    """What the page's script reads."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, page, re.DOTALL)[1])


def test_page_is_self_contained_and_escaped(study):
    s = summarise(study)
    figures = draw(study, s)
    assert set(figures) == {
        "claims",
        "ladder",
        "selection",
        "training",
        "audit",
        "agreement-model",
    }
    page = render(study, s, figures, dict.fromkeys(DIMENSIONS, "well?"))
    assert not re.search(r'(?:src|href)="(?!#|data:text/csv)', page)
    assert "Does it &lt;count&gt;?" in page and "A small world." in page and "strong one" in page
    held = data_of(page)
    assert any(p["chosen"]["text"] == NASTY for p in held["pairs"])
    assert {arm for p in held["pairs"] for arm in p["arms"]} == {a.name for a in s.arms}
    assert "<b>bold</b>" not in page
    config = json.loads(html.unescape(re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)[-1]))
    assert config["generators"][0]["name"] == "weak"
    assert not config.keys() & {"workspace", "trackers", "table"}
    table = terminal_table(json.loads(summary_json(s)))
    assert table.row_count == 1 + len(s.arms)


def test_the_page_shows_every_stage_of_the_flow_and_the_versions(study):
    s = summarise(study)
    page = render(study, s, draw(study, s), dict.fromkeys(DIMENSIONS, "well?"))
    flow = re.search(r'<div class="flow">(.*?)</div>', page, re.DOTALL)[1]
    stages = ["sample", "verify", "judge", "pair", "tokens", "score", "train", "evaluate"]
    assert re.findall(r"─(\w+)─+▶", flow) == stages
    assert '<p class="soft">jax 1</p>' in page


def test_outcome_says_what_is_excluded():
    shown = Measured(Estimate(3.0, 1.0, 5.0), 0.01, 0.03, 4.7)
    assert outcome(shown) == "+3.0 [+1.0, +5.0] points"
    # The interval alone shows nothing where the adjusted p value does not.
    assert outcome(dataclasses.replace(shown, p_adjusted=0.06)) == (
        "not shown in its table (+3.0 [+1.0, +5.0]; excluded: 0 by its own interval, but among all "
        "comparisons of its table one as far from 0 comes by chance, adjusted p = 0.060)"
    )
    nothing = Measured(Estimate(3.0, -1.0, 7.0), 0.3, 0.4, 6.5)
    assert outcome(nothing) == (
        "no effect shown (+3.0 [-1.0, +7.0]; excluded: above +7.0 and below -1.0)"
    )
    assert excluded(nothing) == "above +7.0 and below -1.0"


@pytest.mark.parametrize(
    "p, bound, want",
    [
        (0.01, 4.7, "gain shown"),
        (0.01, 1.9, "gain shown, smaller than the margin of 2"),
        (0.3, 1.9, "equivalent: within ±2"),
        (0.3, 2.1, "undecided: neither shown nor within ±2"),
    ],
)
def test_a_claim_is_shown_equivalent_or_undecided(p, bound, want):
    effect = Measured(Estimate(1.0, -0.5, 2.5), p, p, bound)
    assert claim_verdict(Claim(a="x", b="y"), effect) == want
    assert claim_verdict(Claim(a="x", b="y"), None) == "not measured: an arm of it is missing"


def test_what_a_judge_may_be_used_for():
    auc = {d: Estimate(0.9, 0.8, 1.0) for d in DIMENSIONS}
    nan = Estimate(math.nan, math.nan, math.nan)

    def judge(audit, name="j", kind="model"):
        return JudgeSummary(name, kind, "", 1, DIMENSIONS, {}, 1.0, nan, math.nan, math.nan, audit)

    def sentence(audit, *others):
        return judge_sentence(judge(audit), [judge(audit), *others])

    exact = judge(None, "exact", "exact")

    good = JudgeAudit(auc, 0.9, {}, {})
    assert "in every dimension (lowest AUC 0.90; 0.8 was wanted)" in sentence(good)
    weak = dataclasses.replace(good, auc=auc | {"factuality": Estimate(0.7, 0.6, 0.8)})
    assert (
        sentence(weak) == "Judge j is usable but weak, with an AUC below 0.8, on factuality (0.70)."
    )
    blind = dataclasses.replace(good, auc=dict.fromkeys(DIMENSIONS, Estimate(0.55, 0.5, 0.6)))
    assert "on 5 of 5 dimensions: its AUC on corrupted solutions is below 0.65: fact" in sentence(
        blind
    )
    assert sentence(blind, exact).endswith("noise 0.55. The exact judge carries it.")
    assert sentence(blind).endswith("noise 0.55.")
    # An exact judge with noise of its own is below the bar too, in all or in some dimensions.
    assert sentence(blind, judge(blind, "exact", "exact")).endswith("noise 0.55.")
    some = dataclasses.replace(good, auc=auc | {"factuality": Estimate(0.5, 0.4, 0.6)})
    able = [d.replace("_", " ") for d in DIMENSIONS if d != "factuality"]
    assert sentence(blind, judge(some, "exact", "exact")).endswith(
        f" The exact judge carries {', '.join(able[:-1])} and {able[-1]}."
    )
    part = dataclasses.replace(good, auc={d: auc[d] for d in DIMENSIONS[:3]})
    rest = " and ".join(d.replace("_", " ") for d in DIMENSIONS[3:])
    assert "in 3 of 5 dimensions (lowest AUC 0.90; " in sentence(part)
    assert sentence(part).endswith(f"; not measured: {rest}.")
    assert "was measured neither" in sentence(None)


def test_arms_that_were_left_out_are_named_with_the_comparisons_that_need_them(study):
    for name in ("random", "dpo-strong"):
        for field in ("pairs", "results", "metrics", "pair_counts"):
            del getattr(study, field)[name]
    s = summarise(study)
    assert [a.name for a in s.arms] == ["dpo-mid", "top", "sft"]
    assert s.left_out == ["dpo-strong", "random"]
    assert s.uncompared == ["top minus dpo-strong", "top minus random", "sft minus dpo-strong"]
    assert (s.contrasts, s.controls) == ([], [])
    part = s.findings[0]
    assert part.topic == "Part of the study"
    assert "3 of the 5 arms of the config (dpo-mid, top and sft)" in part.text
    assert "Left out: dpo-strong and random." in part.text
    page = render(study, s, draw(study, s), dict.fromkeys(DIMENSIONS, "well?"))
    assert "missing: top minus dpo-strong, top minus random and sft minus dpo-strong." in page
    assert '<h2 id="arms">Arms of this run</h2>' in page


def ladder_study(study):
    """A ladder of three rungs in the study, with arms of its group that are none."""
    rung = study.experiment.arms[0]
    beside = {
        "topped": {"keep": "top", "fraction": 0.5},
        "tossed": {"direction": "coin"},
        "longer": {"steps": 7, "pairs_per_step": 4},
    }
    added = [dataclasses.replace(rung, name=n, **own) for n, own in beside.items()]
    study = with_arms(
        study,
        dataclasses.replace(rung, name="dpo-weak", chosen="weak", judge="model"),
        *added,
    )
    study.pairs["dpo-weak"] = {0: pairs("weak")}
    for i, arm in enumerate(("dpo-weak", "dpo-mid", "dpo-strong", *beside)):
        study.results[arm] = {Run(0, 0): evaluated((0.3, 0.45, 0.8, 0.1, 0.9, 0.95)[i], 50 + i)}
    study.experiment.claims = (Claim(kind="slope", objective="dpo", domain="in", margin=0.5),)
    return study


def test_a_slope_of_some_rungs_says_which_are_missing(study):
    """A fourth rung of the config was not run."""
    study = ladder_study(study)
    s = summarise(study)
    assert "rungs" not in s.claims[0].about
    absent = dataclasses.replace(study.experiment.arms[0], name="absent", rejected="strong")
    study.experiment.arms += (absent,)
    (claim,) = (s := summarise(study)).claims
    assert claim.about.endswith("; over 3 of its 4 rungs, without absent")
    assert s.left_out == ["absent"]


def test_judges_are_compared_where_both_direct_pairs_or_both_rank_them(study):
    top = next(a for a in study.experiment.arms if a.name == "top")
    ranked = dataclasses.replace(top, judge="model", name="ranked")
    directed = {
        f"by-{j}": dataclasses.replace(top, direction=j, name=f"by-{j}") for j in ("exact", "model")
    }
    s = summarise(with_arms(study, ranked, *directed.values()))
    assert [(c.a, c.b) for c in s.survival] == [("top", "ranked"), ("by-exact", "by-model")]


def test_without_a_suite_in_domain_the_page_says_why_there_is_no_slope(study):
    study = ladder_study(study)
    outside = tuple(suite for suite in study.experiment.suites if suite.domain == "out")
    study.experiment = dataclasses.replace(study.experiment, suites=outside, claims=())

    def out(table):
        return table.filter(pc.equal(table["domain"], "out"))

    study.student = out(study.student)
    study.capability = {name: out(table) for name, table in study.capability.items()}
    study.results = {
        name: {run: out(table) for run, table in runs.items()}
        for name, runs in study.results.items()
    }
    s = summarise(study)
    assert s.domains == ["out"] and not s.ladders["dpo"].rungs
    assert [c.claim.kind for c in s.claims] == ["contrast"]
    why = "the generator delta is measured in domain, where no suite is averaged"
    assert [left for name, left in s.ladders["dpo"].left_out.items() if "dpo" in name] == [why] * 3
    assert any(f"dpo-strong ({why})" in text for text in s.unmeasured)


def test_slope_claim_and_figure_are_of_the_same_rungs(study):
    study = ladder_study(study)
    s = summarise(study)
    changes = {a.name: a.changes["in"].estimate.value for a in s.arms}
    deltas = {a.name: a.delta for a in s.arms}
    rungs = ["dpo-weak", "dpo-mid", "dpo-strong"]
    assert list(s.ladders["dpo"].rungs) == rungs
    want = 10 * np.polyfit([deltas[r] for r in rungs], [changes[r] for r in rungs], 1)[0]
    assert s.trends[0].per_10.estimate.value == pytest.approx(want)
    assert s.claims[0].effect.estimate.value == pytest.approx(want)
    rows = csv.DictReader(io.StringIO(draw(study, s)["ladder"].csv))
    lines = {}
    for row in rows:
        if row["domain"] == "in":
            lines.setdefault(row["line"], []).append(row["arm"])
    assert sorted(lines["DPO"]) == sorted(rungs)
    assert lines["DPO, no rung, 4 pairs a step, 7 steps"] == ["longer"]
    left_out = (
        "The slope of the DPO ladder leaves out topped (it has fraction 0.5, keep top), tossed "
        "(its pairs are directed by coin) and longer (it has pairs per step 4, steps 7): its rungs "
        "differ in their generators alone."
    )
    assert left_out in s.unmeasured and left_out in html.unescape(render(study, s, {}, {}))
    # The default claims count rungs too.
    assert [c.kind for c in claims_of(dataclasses.replace(study.experiment, claims=()))][0] == (
        "slope"
    )
    fewer = [a for a in study.experiment.arms if a.name != "dpo-weak"]
    e = dataclasses.replace(study.experiment, claims=(), arms=tuple(fewer))
    assert [c.kind for c in claims_of(e)] == ["contrast"]


def how(study):
    page = html.unescape(render(study, summarise(study), {}, {}))
    text = page[page.index('id="how"') : page.index('id="generators"')]
    return re.sub(r"<[^>]+>", "", text)


def test_rungs_share_prompts_and_rejected_traces_only_where_they_do(study):
    study = ladder_study(study)
    alone = "in the author of the chosen trace and in nothing else"
    assert (
        f"The rungs of the DPO ladder share prompts and rejected traces, so they differ {alone}"
        in (how(study))
    )
    study.pairs["dpo-mid"] = {0: pairs("mid").slice(0, 9)}
    text = how(study)
    assert alone not in text and (
        "The rungs of the DPO ladder have 9 of 12 prompts with a rejected trace in common" in text
    )
    study.experiment.arms = study.experiment.arms[1:5]  # one rung is no ladder
    for held in (study.pairs, study.results):
        for name in set(held) - {a.name for a in study.experiment.arms}:
            del held[name]
    assert "rungs" not in how(study)


def test_how_it_was_done_has_the_rates_and_steps_that_were_trained(study):
    e = study.experiment
    text = how(study)
    assert "Training: 30 steps of up to 32 pairs, however many an arm keeps. Objectives: " in text
    assert "dpo (learning rate 0.0001, beta 0.1), sft (learning rate 0.0001)." in text
    assert "unless" not in text and "inside and outside of the training domain" in text
    e.training = Training(steps=30, pairs_per_step=4)
    e.arms[1].steps, e.arms[0].learning_rate = 7, 2e-5
    e.objectives[0].rates, e.objectives[0].tuned_by = (1e-4, 3e-4), "dpo-strong"
    study.rates = {"dpo": to_table(RateTrial, [RateTrial(1e-4, 40, 30.0, 20.0, 40.0, False)])}
    trial = RateTrial(3e-4, 40, 40.0, 30.0, 50.0, True)
    study.rates["dpo"] = pa.concat_tables([study.rates["dpo"], to_table(RateTrial, [trial])])
    text = how(study)
    assert (
        "Training: 30 steps of 4 pairs, however many an arm keeps, unless the table of arms under "
        "Training says otherwise (1 of 5 arms have steps, epochs or pairs a step of their own)."
    ) in text
    assert (
        "dpo (learning rate 0.0003, chosen of the 2 that were tried, but in 1 of its 4 arms their "
        "own, beta 0.1)"
    ) in text


def test_the_lead_of_a_chosen_rate_is_paired_and_without_the_noise_of_training(study):
    e = study.experiment
    e.objectives[0].rates, e.objectives[0].tuned_by = (1e-4, 3e-4, 1e-3), "dpo-strong"
    values = {1e-4: (38.0, False), 3e-4: (40.0, True), 1e-3: (10.0, False)}
    trials = [RateTrial(rate, 40, v, v - 9, v + 9, best) for rate, (v, best) in values.items()]
    study.rates = {"dpo": to_table(RateTrial, trials)}

    def tuned(right):
        rows = [r for r in from_table(Result, evaluated(0.5, 1)) if r.domain == "in"]
        return to_table(
            Result, [r._replace(domain="", correct=int(r.prompt_id) in right) for r in rows]
        )

    answered = {"0.0001": range(15), "0.0003": range(16), "0.001": range(4)}
    study.trials = {"dpo": {rate: tuned(right) for rate, right in answered.items()}}
    s = summarise(study)
    (found,) = s.rates
    assert {rate: lead.estimate.value for rate, lead in found.leads.items()} == pytest.approx(
        {"0.0001": 100 / 40, "0.001": 100 * 12 / 40}
    )
    assert not found.leads["0.0001"].shown and found.leads["0.001"].shown
    page = render(study, s, {}, {})
    assert "its lead is shown over 1 of the 2 others" in page
    assert "Intervals are of questions alone: each rate trained one policy" in page


def test_curves_that_nothing_was_measured_of_are_not_said_to_be_well(study):
    assert "so in none" not in render(study, summarise(study), {}, {})  # they fall
    for runs in study.metrics.values():
        for run, rows in runs.items():
            runs[run] = [{k: v for k, v in r.items() if "rewards" not in k} for r in rows]
    page = render(study, summarise(study), {}, {})
    assert "so in none" not in page and "(0 of 5 arms train against a reference" in page
