"""Learning rates that a study chooses, on questions that nothing else is measured on."""

import dataclasses
import json
import os

import numpy as np
import pytest

from deltapref_jax.artifacts.node import in_order
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    Arm,
    ConfigError,
    Experiment,
    Generator,
    Model,
    Objective,
    Prompts,
    Run,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from deltapref_jax.records import Prompt, RateTrial, Result, from_table, to_table
from deltapref_jax.stages.study import part_of, plan
from deltapref_jax.stages.tune import RateTable
from deltapref_jax.validation import validate
from launch.cost import Cost


def questions(task, count, seed):
    return Prompts(tasks=(task,), count=count, difficulty=1, seed=seed)


@pytest.fixture
def tuned(tiny_folder, tmp_path):
    """One objective that tries two rates, the second of them far too large."""
    return Experiment(
        name="tuned",
        workspace=str(tmp_path / "workspace"),
        prompts=(questions("chain", 8, 1),),
        generators=(Generator(name="weak"), Generator(name="strong", temperature=0.5)),
        student=Model(path=str(tiny_folder)),
        objectives=(Objective(name="sft", kind="sft", rates=(1e-3, 1e-2), tuned_by="one"),),
        arms=(
            Arm(name="one", chosen="strong", rejected="weak", objective="sft", seeds=(3, 4)),
            Arm("own", "strong", "weak", objective="sft", learning_rate=5e-3),
        ),
        suites=(
            Suite(name="measured", prompts=questions("chain", 4, 9)),
            Suite(name="tuning", prompts=questions("chain", 6, 9), readout="tuning"),
        ),
        training=Training(
            pairs_per_step=4, steps=1, rows=8, row_length=160, finishes=("eos", "stop", "length")
        ),
        sampling=Sampling(max_prompt=96, max_tokens=8, slots=8, chunk=4),
        scoring=Scoring(rows=8, row_length=160),
    )


def test_tuning_questions_are_asked_of_the_trials_alone(tuned):
    report = plan(validate(tuned))
    assert set(report.suites) == set(report.student) == {"measured"}
    assert {s for runs in report.results["one"].values() for s in runs} == {"measured"}
    (table,) = report.rates.values()
    assert {rate: set(suites) for rate, suites in table.results.items()} == {
        "0.001": {"tuning"},
        "0.01": {"tuning"},
    }
    trials = {rate: suites["tuning"].policy for rate, suites in table.results.items()}
    assert {r: (p.objective.learning_rate, p.seed) for r, p in trials.items()} == {
        "0.001": (1e-3, 3),
        "0.01": (1e-2, 3),
    }
    # The arm's policies wait for the choice; one of an own rate does not.
    assert {p.rates for p in report.policies["one"].values()} == {table}
    assert report.policies["own"][Run(0, 0)].rates is None
    assert part_of(report, ["one"]).rates == report.rates and part_of(report, ["own"]).rates == {}
    assert Cost(report, Workspace(tuned.workspace)).work(table).unit == "rates"


@pytest.mark.parametrize(
    ("right", "chosen"), [((1, 3, 2), 1e-4), ((3, 3, 1), 1e-5), ((0, 1, 4), 1e-3)]
)
def test_the_best_rate_is_chosen_and_the_lowest_of_equal_ones(right, chosen):
    """Right answers to the four questions of one suite; all rates solve one of two of another."""

    def answers(suite, count, solved):
        return [
            Result(suite, "", "t", f"{suite}-{q}", 0, "", "", q < solved, "eos", -1.0, 3)
            for q in range(count)
        ]

    class Made:
        def tables(self, results):
            return {"a": to_table(Result, results["a"]), "b": to_table(Result, results["b"])}

        def write(self, table):
            self.trials = from_table(RateTrial, table)

    rates = (1e-5, 1e-4, 1e-3)
    results = {
        f"{rate:g}": {"a": answers("a", 4, n), "b": answers("b", 2, 1)}
        for rate, n in zip(rates, right, strict=True)
    }
    made = Made()
    RateTable(label=("tune", "dpo"), rates=rates, results=results).make(made)
    assert [t.learning_rate for t in made.trials if t.chosen] == [chosen]
    assert [t.accuracy for t in made.trials] == [100 * (n / 4 + 1 / 2) / 2 for n in right]
    assert all(t.low <= t.accuracy <= t.high and t.questions == 6 for t in made.trials)


@pytest.mark.slow
def test_the_better_rate_trains_all_arms_of_the_objective(tuned):
    e = validate(tuned)
    workspace, report = Workspace(e.workspace), plan(e)
    run([report], workspace, e.name, show=False)
    (table,) = report.rates.values()
    trials = workspace.rows(RateTrial, table)
    right = {
        rate: [r.correct for r in workspace.rows(Result, suites["tuning"])]
        for rate, suites in table.results.items()
    }
    assert [t.accuracy for t in trials] == [100 * np.mean(v) for v in right.values()]
    best = int(np.argmax([t.accuracy for t in trials]))
    assert [t.chosen for t in trials] == [i == best for i in range(2)]
    # No question of the trials is one that the policies are measured on, or trained on.
    (asked,) = {suites["tuning"].questions for suites in table.results.values()}
    tuning = {p.prompt_id for p in workspace.rows(Prompt, asked)}
    measured = {p.prompt_id for p in workspace.rows(Prompt, report.suites["measured"])}
    trained = {p.prompt_id for p in workspace.rows(Prompt, report.prompts)}
    assert {t.questions for t in trials} == {len(tuning)} == {2}
    assert not tuning & measured and not tuning & trained
    # A study that is given the rate trains the same policies.
    rate = trials[best].learning_rate
    given = dataclasses.replace(
        e,
        objectives=(Objective(name="sft", kind="sft", learning_rate=rate),),
        suites=e.suites[:1],
    )
    again = plan(validate(given))
    run([policy for p in again.policies.values() for policy in p.values()], workspace, show=False)
    for arm, runs in report.policies.items():
        for seed, policy in runs.items():
            ours, other = (workspace.path(p) for p in (policy, again.policies[arm][seed]))
            weights = "policy/model.safetensors"
            assert (ours / weights).read_bytes() == (other / weights).read_bytes()
            assert (ours / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    summary = json.loads((workspace.path(report) / "summary.json").read_text())
    (choice,) = summary["rates"]
    assert choice["chosen"] == f"{rate:g}" and choice["questions"] == len(tuning)
    assert choice["edge"] == ("lowest", "highest")[best]
    assert {a["name"]: a["training"]["learning_rate"] for a in summary["arms"]} == {
        "one": rate,
        "own": 5e-3,
    }
    assert any("may lie outside" in text for text in summary["unmeasured"])
    # Everything stands.
    manifests = [workspace.path(node) / "manifest.json" for node in in_order([report])]
    before = [os.stat(path).st_mtime_ns for path in manifests]
    run([plan(e)], workspace, e.name, show=False)
    assert [os.stat(path).st_mtime_ns for path in manifests] == before


def test_an_arm_that_tries_rates_must_be_one_of_the_objective(tuned):
    (objective,) = tuned.objectives
    for name in ("own", "nobody"):
        tuned.objectives = (dataclasses.replace(objective, tuned_by=name),)
        with pytest.raises(ConfigError, match=f"{name!r}; choose one of 'one'"):
            validate(tuned)
