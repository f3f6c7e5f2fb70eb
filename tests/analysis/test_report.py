"""The page of a small study: self-contained, escaped, complete, and its sentences follow the numbers."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from deltapref_jax.analysis.findings import judge_sentence, outcome
from deltapref_jax.analysis.report import draw, render, terminal_table
from deltapref_jax.analysis.study import Study
from deltapref_jax.analysis.summary import summarise
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
from deltapref_jax.records import AUDIT, PAIR, PROMPT, RATING, RESULT, TRACE, VERDICT, digest

QUESTIONS = [f"q{i}" for i in range(12)]
NASTY = "</script><b>bold</b> & 'quoted'"


def made(schema, rows):
    return pa.Table.from_pylist(rows, schema=schema)


def evaluated(p, seed):
    right = np.random.default_rng(seed).random((2, 40, 2)) < p
    return made(
        RESULT,
        [
            {
                "suite": f"{d}-suite",
                "domain": d,
                "task": "t",
                "prompt_id": f"{q}",
                "sample": s,
                "correct": bool(right[i, q, s]),
                "finish": "eos" if s else "length",
                "tokens": 9,
            }
            for i, d in enumerate(("in", "out"))
            for q in range(40)
            for s in range(2)
        ],
    )


def traces(name):
    return made(
        TRACE,
        [
            {
                "trace_id": f"{name}-{q}",
                "prompt_id": q,
                "generator": name,
                "weights": "w",
                "sample": 0,
                "text": NASTY if q == "q0" else f"{name} says {q}",
                "token_ids": [1],
                "finish": "eos",
                "logprob": -1.0,
                "tokens": 3,
            }
            for q in QUESTIONS
        ],
    )


def ratings(judge, name, points):
    return made(
        RATING,
        [
            {
                "trace_id": f"{name}-{q}",
                "judge": judge,
                "dimension": d,
                "rating": points + i / 20,
                "spread": 0.0,
                "mass": 1.0,
                "distribution": [0, 0, 0, 0, 1.0],
            }
            for i, q in enumerate(QUESTIONS)
            for d in DIMENSIONS
        ],
    )


def pairs(chosen):
    return made(
        PAIR,
        [
            {
                "pair_id": digest(chosen, q),
                "prompt_id": q,
                "chosen_id": f"{chosen}-{q}",
                "rejected_id": f"weak-{q}",
                "chosen_model": chosen,
                "rejected_model": "weak",
                "chosen_rating": None,
                "rejected_rating": None,
                "chosen_correct": True,
                "rejected_correct": False,
            }
            for q in QUESTIONS
        ],
    )


def audited(judge, blind):
    return made(
        AUDIT,
        [
            {
                "prompt_id": f"{q}",
                "judge": judge,
                "target": "" if g == 0 else d,
                "degree": g,
                "dimension": d,
                "rating": 3.0 if d in blind else 5.0 - g,
            }
            for q in range(6)
            for d in DIMENSIONS
            for g in range(3)
        ],
    )


@pytest.fixture
def study():
    names = {"weak": 2.0, "mid": 3.0, "strong": 4.0}
    experiment = Experiment(
        name="tiny",
        question="Does it <count>?",
        about="A small world.",
        prompts=(Prompts(tasks=("chain",), count=12),),
        generators=tuple(Generator(name=n, about=f"{n} one") for n in names),
        judges=(Judge(name="exact"), Judge(name="model", kind="model")),
        objectives=(Objective(name="dpo"), Objective(name="sft", kind="sft")),
        arms=(
            *(Arm(name=f"dpo-{n}", chosen=n, rejected="weak") for n in ("mid", "strong")),
            Arm(
                name="top",
                chosen="strong",
                rejected="weak",
                keep="top",
                fraction=0.5,
                group="selection",
            ),
            Arm(
                name="random",
                chosen="strong",
                rejected="weak",
                keep="random",
                fraction=0.5,
                group="selection",
            ),
            Arm(name="sft", chosen="strong", rejected="weak", objective="sft", group="control"),
        ),
        suites=tuple(
            Suite(name=f"{d}-suite", domain=d, prompts=Prompts(tasks=("shop",), count=40))
            for d in ("in", "out")
        ),
    )
    asked = made(
        PROMPT,
        [
            {
                "prompt_id": q,
                "task": "chain",
                "messages": json.dumps([{"role": "user", "content": q}]),
                "answer": "1",
                "checker": "world",
                "meta": "{}",
            }
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
    return Study(
        experiment=json.loads(json.dumps(dataclasses.asdict(experiment))),
        prompts=asked,
        suites={f"{d}-suite": asked for d in ("in", "out")},
        traces={n: traces(n) for n in names},
        verdicts={
            n: made(
                VERDICT,
                [
                    {"trace_id": f"{n}-{q}", "correct": n != "weak", "answer": "1", "note": ""}
                    for q in QUESTIONS
                ],
            )
            for n in names
        },
        ratings={j: {n: ratings(j, n, p) for n, p in names.items()} for j in ("exact", "model")},
        audits={"exact": audited("exact", ()), "model": audited("model", ("numerical_precision",))},
        pairs={a.name: pairs(a.chosen) for a in experiment.arms},
        results={
            a.name: {"0": evaluated(0.9 if a.name == "dpo-strong" else 0.4, 7)}
            for a in experiment.arms
        },
        student=evaluated(0.4, 7),
        capability={n: evaluated(p, 3) for n, p in zip(names, (0.2, 0.5, 0.9), strict=True)},
        metrics={f"{a.name}/0": metrics for a in experiment.arms},
        manifests={
            "prompts": {
                "key": "k",
                "stage": "prompts",
                "seconds": 2.0,
                "versions": {"jax": "1"},
                "stats": {"rows": 12.0, "duplicate": 3.0},
            }
        },
    )


def test_numbers_and_sentences(study):
    s = summarise(study)
    json.dumps(s, allow_nan=False)
    arms = {a["name"]: a for a in s["arms"]}
    assert arms["dpo-strong"]["in"]["change"][1] > 0
    assert arms["sft"]["in"]["change"][0] == 0
    assert arms["dpo-strong"]["sample_delta"] == pytest.approx({"exact": 2.0, "model": 2.0})
    assert {(c["a"], c["b"], c["kind"]) for c in s["contrasts"]} == {
        ("top", "random", "random"),
        ("top", "dpo-strong", "all"),
    }
    text = " ".join(f["text"] for f in s["findings"])
    assert "no effect detected" in text and "an effect of" in text
    assert "fell together" in text
    assert any(
        "Judge model cannot carry a conclusion on numerical precision" in t
        for t in s["judge_sentences"]
    )
    assert {(d["where"], d["what"], d["count"]) for d in s["dropped"]} == {
        ("prompts", "duplicate", 3)
    }


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
    assert any(p["chosen"]["text"] == NASTY for p in json.loads(data))
    assert "<b>bold</b>" not in page
    table = terminal_table(s)
    assert table.row_count == 1 + len(s["arms"])


def test_outcome_says_what_was_not_detected():
    assert outcome([3.0, 1.0, 5.0]) == "+3.0 [+1.0, +5.0] points"
    assert outcome([1.0, -1.96, 3.96]) == (
        "no effect detected (+1.0 [-2.0, +4.0]; an effect of 4.2 points would have been)"
    )


def test_what_a_judge_may_be_used_for():
    auc = {d: [0.9, 0.8, 1.0] for d in DIMENSIONS}
    base = {"name": "j", "kind": "model", "auc": auc, "auc_mean": 0.9, "useless": []}
    assert "in every dimension" in judge_sentence(base, True)
    weak = base | {"auc": auc | {"factuality": [0.7, 0.6, 0.8]}}
    assert (
        judge_sentence(weak, True)
        == "Judge j is usable but weak, with an AUC below 0.8, on factuality (0.70)."
    )
    blind = base | {"auc_mean": 0.55, "useless": list(DIMENSIONS)}
    assert judge_sentence(blind, True).endswith("below 0.65. The exact judge carries it.")
