"""The page of a small study is self-contained, escaped, complete, and follows the numbers."""

import dataclasses
import html
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from deltapref_jax.analysis.findings import judge_sentence, outcome
from deltapref_jax.analysis.page import Evaluation, JudgeAudit, JudgeSummary
from deltapref_jax.analysis.report import draw, render, terminal_table
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.study import ArtifactRecord, Study
from deltapref_jax.analysis.summary import plain, summarise, summary_json
from deltapref_jax.config import (
    DIMENSIONS,
    Arm,
    Experiment,
    Generator,
    Judge,
    Objective,
    Prompts,
    Suite,
)
from deltapref_jax.progress import plain_console
from deltapref_jax.records import (
    Audit,
    Pair,
    Prompt,
    Rating,
    Result,
    Trace,
    Verdict,
    digest,
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
    return to_table(
        Audit,
        [
            Audit(f"{q}", judge, d if g else "", g, d, 3.0 if d in blind else 5.0 - g)
            for q in range(6)
            for d in DIMENSIONS
            for g in range(3)
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
        pairs={name: pairs(a.chosen) for name, a in arms.items()},
        results={name: {0: evaluated(0.9 if name == "dpo-strong" else 0.4, 7)} for name in arms},
        student=evaluated(0.4, 7),
        capability={n: evaluated(p, 3) for n, p in zip(GENERATORS, (0.2, 0.5, 0.9), strict=True)},
        metrics={name: {0: metrics} for name in arms},
        pair_counts={name: {"prompts": 12.0, "pool": 12.0, "chosen_tokens": 3.5} for name in arms},
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
    assert arms["dpo-strong"].changes["in"].change.low > 0
    assert arms["sft"].changes["in"].change.value == 0
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
    assert "no effect detected" in text and "an effect of" in text
    assert "fell together" in text
    assert any(
        "Judge model cannot carry a conclusion on numerical precision" in t
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
    for svg in drawn.values():
        ElementTree.fromstring(svg)
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
    assert [(d.where, d.what, d.count) for d in s.dropped] == [("prompts", "duplicate", 3)]
    assert [(x.stage, x.artifacts, x.share, x.padding) for x in s.stages] == [
        ("judge", 1, 75.0, 25.0),
        ("prompts", 1, 25.0, None),
    ]


def test_json_has_the_fields_of_a_summary_and_null_for_nan(study):
    s = summarise(study)
    written = json.loads(summary_json(s))
    arm = next(a for a in written["arms"] if a["name"] == "top")
    assert (arm["keep"], arm["seeds"], arm["training"]["kl"]) == ("top", 1, None)
    assert arm["in"]["change"] == list(s.arms[2].changes["in"].change)
    assert written["student"].keys() == {"in", "out", "truncated", "tokens"}
    assert written["judges"][0]["auc"]["factuality"] == [1.0, 1.0, 1.0]
    assert plain(Evaluation({"in": Estimate(1.0, 0.0, math.nan)}, 2.0, math.inf)) == {
        "in": [1.0, 0.0, None],
        "truncated": 2.0,
        "tokens": None,
    }


def test_a_pair_of_an_unknown_trace_is_an_error(study):
    known = study.pairs["top"]
    study.pairs["top"] = known.set_column(2, "chosen_id", [["nobody"] * known.num_rows])
    with pytest.raises(KeyError, match="nobody"):
        summarise(study)


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


def test_page_is_self_contained_and_escaped(study):
    s = summarise(study)
    figures = draw(study, s)
    assert {"ladder", "selection", "training", "audit", "agreement-model"} == set(figures)
    page = render(study, s, figures, dict.fromkeys(DIMENSIONS, "well?"))
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "Does it &lt;count&gt;?" in page and "A small world." in page and "strong one" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[
        1
    ]
    shown = json.loads(data)
    assert any(p["chosen"]["text"] == NASTY for p in shown)
    assert {arm for p in shown for arm in p["arms"]} == {a.name for a in s.arms}
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


def test_outcome_says_what_was_not_detected():
    assert outcome(Estimate(3.0, 1.0, 5.0)) == "+3.0 [+1.0, +5.0] points"
    assert outcome(Estimate(1.0, -1.96, 3.96)) == (
        "no effect detected (+1.0 [-2.0, +4.0]; an effect of 4.2 points would have been)"
    )


def test_what_a_judge_may_be_used_for():
    auc = {d: Estimate(0.9, 0.8, 1.0) for d in DIMENSIONS}
    nan = Estimate(math.nan, math.nan, math.nan)

    def sentence(audit, has_exact=True):
        judge = JudgeSummary("j", "model", 1, DIMENSIONS, {}, 1.0, nan, math.nan, math.nan, audit)
        return judge_sentence(judge, has_exact)

    good = JudgeAudit(auc, 0.9, {}, [])
    assert "in every dimension (lowest AUC 0.90; 0.8 was wanted)" in sentence(good)
    weak = dataclasses.replace(good, auc=auc | {"factuality": Estimate(0.7, 0.6, 0.8)})
    assert (
        sentence(weak) == "Judge j is usable but weak, with an AUC below 0.8, on factuality (0.70)."
    )
    blind = dataclasses.replace(good, auc_mean=0.55, useless=list(DIMENSIONS))
    assert sentence(blind).endswith("below 0.65. The exact judge carries it.")
    assert sentence(blind, has_exact=False).endswith("below 0.65.")
    assert "was not measured" in sentence(None)


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
