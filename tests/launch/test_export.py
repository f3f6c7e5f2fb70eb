"""Log-probabilities of a study serve an arm that is trained by itself, and conversely."""

import dataclasses
import json
import types

import pyarrow.parquet as pq
import pytest
from absl import flags

from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    Arm,
    Experiment,
    Generator,
    Model,
    Objective,
    Pairs,
    PairTraining,
    Prompts,
    Run,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from deltapref_jax.records import LogProb, Pair, TokenSequence
from deltapref_jax.stages import pairs_file, study
from deltapref_jax.validation import validate, validate_pair_training
from launch import export

# Entry points define flags of one name, and a process of the tests may import several of them.
for flag in flags.FLAGS.flags_by_module_dict()["launch.export"]:
    delattr(flags.FLAGS, flag.name)

TRAINING = Training(
    pairs_per_step=4,
    steps=2,
    rows=8,
    row_length=128,
    warmup=0.0,
    checkpoint_every=9,
    finishes=("eos", "stop", "length"),
)
KTO = Objective(name="kto", kind="kto", learning_rate=1e-3)


@pytest.fixture(scope="module")
def experiment(tiny_folder, tmp_path_factory):
    """Two generators, which are the student at two temperatures."""
    path = str(tiny_folder)
    return validate(
        Experiment(
            name="tiny",
            question="Are tables shared?",
            workspace=str(tmp_path_factory.mktemp("study")),
            prompts=(Prompts(tasks=("chain",), count=8, difficulty=1),),
            generators=(
                Generator(name="weak", model=Model(path), samples=2),
                Generator(name="strong", model=Model(path), temperature=0.5),
            ),
            student=Model(path),
            objectives=(Objective(name="dpo"), KTO),
            arms=tuple(
                Arm(name=name, chosen="strong", rejected="weak", objective=objective)
                for name, objective in (("arm", "dpo"), ("kto", "kto"))
            ),
            suites=(Suite(name="s", prompts=Prompts(tasks=("shop",), count=2)),),
            training=TRAINING,
            sampling=Sampling(max_prompt=96, max_tokens=12, slots=8),
            scoring=Scoring(rows=8, row_length=128, shard=6),
        )
    )


def scored(e):
    """Makes the arm's pairs and log-probabilities; the workspace and the report's node."""
    workspace, report = Workspace(e.workspace), study.plan(e)
    run([report.pairs["arm"][0], *report.logprobs.values()], workspace, show=False)
    return workspace, report


@pytest.fixture(scope="module")
def made(experiment):
    return scored(experiment)


@pytest.fixture
def exported(experiment, made, tmp_path, monkeypatch):
    """Writes an arm as launch.export does with --ids; the rows as a table."""

    def write(arm):
        out = tmp_path / f"{arm}.parquet"
        given = {
            "_CONFIG": experiment,
            "_ARM": arm,
            "_OUT": str(out),
            "_IDS": True,
            "_DRAW": 0,
            "_STUDENT": "",
        }
        for name, value in given.items():
            monkeypatch.setattr(export, name, types.SimpleNamespace(value=value))
        export.main([])
        return pq.read_table(out)

    return write


@pytest.fixture
def trained(exported, experiment, tmp_path):
    """Trains on an exported arm as launch.train does; the workspace and the policy's node."""

    def train(name, kind, table="", rows=16, arm="arm"):
        data = tmp_path / f"{arm}-{rows}.parquet"
        pq.write_table(exported(arm).slice(0, rows), data)
        p = validate_pair_training(
            PairTraining(
                workspace=str(tmp_path / name),
                data=Pairs(str(data)),
                student=experiment.student,
                table=str(table),
                objective=Objective(name=kind, kind=kind, learning_rate=1e-3),
                training=dataclasses.replace(TRAINING, finishes=("eos", "stop")),
            )
        )
        workspace, policy = Workspace(p.workspace), pairs_file.plan(p)
        run(list(policy.sequences.values()), workspace, show=False)
        pairs_file.check(p, policy, workspace)
        run([policy], workspace, show=False)
        return workspace, policy

    return train


def metrics(workspace, policy):
    lines = (workspace.path(policy) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logprobs(workspace, *nodes):
    """Log-probability by sequence id."""
    rows = [row for node in nodes for row in workspace.rows(LogProb, node)]
    return {row.sequence_id: row.logprob for row in rows}


def test_an_exported_arm_has_the_tokens_of_the_study(made, trained):
    workspace, report = made
    pairs = workspace.rows(Pair, report.pairs["arm"][0])
    rows = {
        row.trace_id: row
        for node in report.sequences.values()
        for row in workspace.rows(TokenSequence, node)
        if row.matched
    }
    elsewhere, policy = trained("alone", "dpo")
    found = elsewhere.rows(TokenSequence, policy.sequences["file"])
    assert len(pairs) == 8
    assert [row.sequence_id for row in found] == [
        rows[trace].sequence_id for pair in pairs for trace in (pair.chosen_id, pair.rejected_id)
    ]


def test_the_studys_table_leaves_nothing_to_score_and_trains_the_same(
    experiment, made, trained, monkeypatch
):
    alone = trained("alone", "dpo")
    with monkeypatch.context() as m:
        m.setattr("deltapref_jax.stages.score.score_sequences", lambda *_: pytest.fail("scored"))
        given = trained("given", "dpo", table=f"{experiment.workspace}/score")
    stats = [w.manifest(policy.logprobs["file"]).stats for w, policy in (alone, given)]
    assert stats[0]["rows"] == stats[1]["rows"] == stats[1]["from_table"] > 0
    assert stats[0]["from_table"] == 0
    assert "positions" not in stats[1]
    one, other = (logprobs(w, policy.logprobs["file"]) for w, policy in (alone, given))
    assert one == pytest.approx(other, rel=2e-6)
    study_table = logprobs(made[0], *made[1].logprobs.values())
    assert other.items() <= study_table.items()  # the very numbers
    for row, again in zip(metrics(*alone), metrics(*given), strict=True):
        assert row == pytest.approx(again, rel=2e-5, abs=2e-5)


def test_mismatched_rows_that_the_studys_table_lacks_are_scored(experiment, made, trained):
    """Half of the pairs: a derangement of them puts completions behind other prompts."""
    alone = trained("alone", "kto", rows=4)
    workspace, policy = trained("given", "kto", f"{experiment.workspace}/score", rows=4)
    sequences = workspace.rows(TokenSequence, policy.sequences["file"])
    study_table = logprobs(made[0], *made[1].logprobs.values())
    known = [s for s in sequences if s.sequence_id in study_table]
    matched = [s for s in sequences if s.matched]
    assert {s.sequence_id for s in matched} <= study_table.keys()
    stats = workspace.manifest(policy.logprobs["file"]).stats
    assert stats["rows"] == len(sequences) == 2 * len(matched)
    assert stats["from_table"] == len(known) >= len(matched)
    assert len(known) < len(sequences)
    assert stats["positions"] > 0
    one, other = (logprobs(w, node.logprobs["file"]) for w, node in (alone, (workspace, policy)))
    assert one == pytest.approx(other, rel=2e-6)
    for row, again in zip(metrics(*alone), metrics(workspace, policy), strict=True):
        assert row == pytest.approx(again, rel=2e-5, abs=2e-5)


def test_an_exported_arm_of_kto_is_trained_on_as_in_the_study(
    experiment, made, exported, trained, monkeypatch
):
    """The file brings the prompts of the study's mismatched rows, so nothing is left to score."""
    workspace, report = made
    node = report.policies["kto"][Run(0, 0)]
    run([node], workspace, show=False)
    table = exported("kto")
    assert table.column_names == ["prompt_ids", "completion_ids", "label", "mismatched_prompt_ids"]
    assert table["label"].to_pylist() == [True, False] * 8
    assert table["mismatched_prompt_ids"].null_count == 0
    with monkeypatch.context() as m:
        m.setattr("deltapref_jax.stages.score.score_sequences", lambda *_: pytest.fail("scored"))
        m.setattr("deltapref_jax.stages.tokens.derange", lambda *_: pytest.fail("drawn"))
        again, policy = trained("kto", "kto", f"{experiment.workspace}/score", arm="kto")
    stats = again.manifest(policy.logprobs["file"]).stats
    assert stats["from_table"] == stats["rows"] == 32
    assert again.manifest(policy.sequences["file"]).stats["dropped_mismatched"] == 0
    assert metrics(again, policy) == metrics(workspace, node)


def test_a_table_of_launch_train_serves_the_study_and_the_rest_is_scored(
    experiment, made, trained, tmp_path
):
    elsewhere, policy = trained("alone", "dpo")
    table = elsewhere.path(policy.logprobs["file"])
    given = logprobs(elsewhere, policy.logprobs["file"])
    e = dataclasses.replace(experiment, workspace=str(tmp_path / "again"), table=str(table))
    workspace, report = scored(validate(e))
    used = 0
    for name, node in report.logprobs.items():
        rows = workspace.rows(LogProb, node)
        own = made[0].rows(LogProb, made[1].logprobs[name])
        assert [row._replace(logprob=0.0) for row in rows] == [
            row._replace(logprob=0.0) for row in own
        ]
        assert [row.logprob for row in rows] == pytest.approx(
            [row.logprob for row in own], rel=2e-6
        )
        found = [row for row in rows if row.sequence_id in given]
        assert all(row.logprob == given[row.sequence_id] for row in found)
        stats = workspace.manifest(node).stats
        assert stats["from_table"] == len(found) > 0
        assert stats["rows"] == len(rows) > len(found)
        assert stats["positions"] > 0
        used += len(found)
    assert used >= len(given)  # equal traces of two prompts or generators are used twice
