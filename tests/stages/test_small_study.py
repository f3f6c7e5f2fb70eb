"""A whole study of tiny models: what is made, what a change leaves alone, and where it is found."""

import dataclasses
import json
import os
import shutil
from collections import Counter

import pytest

from deltapref_jax.artifacts.node import in_order
from deltapref_jax.artifacts.runner import run, say_made
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    Arm,
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
from deltapref_jax.progress import plain_console
from deltapref_jax.records import Pair, Prompt, Result, TokenSequence
from deltapref_jax.stages.study import part_of, plan
from deltapref_jax.validation import validate
from launch.ablate import say_policies, say_standing
from launch.dry_run import plan_rows

QUESTIONS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]


def questions_file(folder, rows=QUESTIONS):
    """The file has one name everywhere, since its stem is the questions' task."""
    folder.mkdir(exist_ok=True)
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Prompts(kind="jsonl", path=str(path), checker="exact")


def suite(name, domain="in", **fields):
    prompts = Prompts(tasks=(name,), count=3, difficulty=1, seed=9)
    return Suite(name=name, domain=domain, prompts=prompts, **fields)


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """The experiment and its finished workspace."""
    root = tmp_path_factory.mktemp("study")
    e = Experiment(
        name="small study",
        workspace=str(root / "workspace"),
        prompts=(questions_file(root),),
        generators=(Generator(name="weak"), Generator(name="strong", temperature=0.5)),
        student=Model(path=str(tiny_folder)),
        objectives=(Objective(name="dpo"), Objective(name="kto", kind="kto")),
        arms=(
            Arm(name="dpo", chosen="strong", rejected="weak", seeds=(0, 1)),
            Arm(name="kto", chosen="strong", rejected="weak", objective="kto"),
        ),
        suites=(suite("chain"), suite("shop", "out", samples=2)),
        training=Training(
            pairs_per_step=4, steps=1, rows=8, row_length=160, finishes=("eos", "stop", "length")
        ),
        sampling=Sampling(max_prompt=200, max_tokens=8, slots=8, chunk=4, shard=5),
        scoring=Scoring(rows=8, row_length=160, shard=5),
    )
    run([plan(validate(e))], Workspace(e.workspace), e.name, show=False)
    return e


@pytest.fixture
def again(made, tmp_path):
    """The function of changed fields to the report and workspace of a run that continues `made`."""
    root = shutil.copytree(made.workspace, tmp_path / "workspace", symlinks=True)

    def of(**fields):
        e = validate(dataclasses.replace(made, workspace=str(root), **fields))
        report, workspace = plan(e), Workspace(root)
        run([report], workspace, e.name, show=False)
        return report, workspace

    of.root = root
    return of


def artifacts(root):
    """Folders that have a manifest, as `stage/key`."""
    return {"/".join(path.parts[-3:-1]) for path in root.glob("*/*/manifest.json")}


def times(root):
    """When every file of an artifact was written."""
    found = [p for folder in artifacts(root) for p in (root / folder).rglob("*") if p.is_file()]
    return {p: p.stat().st_mtime_ns for p in found if "claims" not in p.parts}


def counts(folders):
    return Counter(folder.split("/")[0] for folder in folders)


def test_another_run_makes_nothing(again):
    before = times(again.root)
    again()
    assert times(again.root) == before


def test_one_more_suite_and_generator_leave_pairs_policies_and_results_alone(made, again):
    before, old = times(again.root), artifacts(again.root)
    first, _ = again()
    report, workspace = again(
        suites=(*made.suites, suite("euclid", "out")),
        generators=(*made.generators, Generator(name="idle", temperature=0.9)),
    )
    after = times(again.root)
    assert {p: after[p] for p in before} == before
    for arm, seeds in first.policies.items():
        assert workspace.path(report.pairs[arm][0]) == workspace.path(first.pairs[arm][0])
        for seed, policy in seeds.items():
            assert workspace.path(report.policies[arm][seed]) == workspace.path(policy)
            for name, result in first.results[arm][seed].items():
                assert workspace.path(report.results[arm][seed][name]) == workspace.path(result)
    assert counts(artifacts(again.root) - old) == {
        # the suite, and the training questions, which are looked through once more and equal
        "prompts": 2,
        "sample": 1,
        "verify": 1,
        # the suite by strong, by the student, which is weak, and by three policies; idle on all
        "evaluate": 5 + 3,
        "report": 1,
    }
    assert workspace.path(report.prompts) != workspace.path(first.prompts)
    assert workspace.table(report.prompts) == workspace.table(first.prompts)


def test_a_changed_file_of_equal_questions_stops_the_rebuild(again, tmp_path):
    before, old = times(again.root), artifacts(again.root)
    first, _ = again()
    file = questions_file(tmp_path / "other", [*QUESTIONS, QUESTIONS[2]])
    report, workspace = again(prompts=(file,))
    (added,) = artifacts(again.root) - old
    assert str(workspace.path(report.prompts)) == str(again.root / added)
    assert workspace.path(report.prompts) != workspace.path(first.prompts)
    assert workspace.manifest(report.prompts).stats["duplicate"] == 1
    assert {p: t for p, t in times(again.root).items() if p in before} == before
    assert workspace.path(report) == workspace.path(first)
    index = json.loads((again.root / "index.json").read_text())["small study"]
    assert index["prompts"] == added


def test_another_question_does_not_stop_it(made, again, tmp_path):
    file = questions_file(
        tmp_path / "other", [*QUESTIONS[1:], {"prompt": "What is 3?", "answer": "3"}]
    )
    report = plan(dataclasses.replace(made, prompts=(file,)))
    workspace = Workspace(again.root)
    run([report.prompts], workspace, show=False)
    assert len(workspace.rows(Prompt, report.prompts)) == len(QUESTIONS)
    for name in ("weak", "strong"):
        assert not workspace.complete(report.traces[name])
        assert workspace.key(report.sequences[name]) is None


def test_there_is_one_table_of_results_for_every_policy_and_suite(made):
    report, workspace = plan(made), Workspace(made.workspace)
    tables = [report.student, *report.capability.values()]
    tables += [of_seed for seeds in report.results.values() for of_seed in seeds.values()]
    assert len(tables) == 1 + 2 + 3
    paths = set()
    for of_suite in tables:
        assert list(of_suite) == ["chain", "shop"]
        for name, node in of_suite.items():
            rows = workspace.rows(Result, node)
            samples = {"chain": 1, "shop": 2}[name]
            assert {row.suite for row in rows} == {name}
            assert len(rows) == 3 * samples
            paths.add(str(workspace.path(node)))
    # the student before training is the weak generator
    assert paths == {str(p) for p in workspace.path(report.student["chain"]).parent.iterdir()}
    assert len(paths) == 2 * (1 + 1 + 3)


def test_the_end_of_a_study_names_the_folder_of_every_policy(made, capsys):
    report, workspace = plan(made), Workspace(made.workspace)
    say_policies(plain_console(width=60), workspace, {"": report})
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    rows = {tuple(line[:2]): line[2] for line in lines if len(line) == 3 and line[1] in ("0", "1")}
    assert set(rows) == {("dpo", "0"), ("dpo", "1"), ("kto", "0")}
    assert lines[0] == ["Policies", "in", f"{made.workspace}:"]
    for (arm, seed), folder in rows.items():
        assert os.path.isfile(f"{made.workspace}/{folder}/model.safetensors")
        assert folder == f"train/{workspace.key(report.policies[arm][Run(0, int(seed))])}/policy"


def test_a_continued_study_says_what_stands(made, again, capsys):
    report = plan(dataclasses.replace(made, workspace=str(again.root)))
    workspace = Workspace(again.root)
    shutil.rmtree(workspace.path(report.policies["dpo"][Run(0, 1)]))
    assert not say_standing(Workspace(again.root), report)
    said = capsys.readouterr().err
    # What is behind the missing policy has no key yet, so it is not known to stand.
    assert said[20:] == (
        "22 of 26 artifacts stand: prompts 3 of 3, sample 2 of 2, verify 2 of 2, tokens 2 of 2, "
        "score 2 of 2, evaluate 8 of 10, pair 1 of 1, train 2 of 3, report 0 of 1\n"
    )
    # The plan of a dry run counts the same, and so does the end of a run.
    rows = plan_rows(report, workspace, lambda node: None)
    assert sum(not row.same_as for row in rows) == 26
    assert say_standing(Workspace(made.workspace), plan(made))
    assert "26 of 26 artifacts stand: " in capsys.readouterr().err
    whole = Workspace(made.workspace)
    nodes = in_order([plan(made)])
    for wanted, end in (
        (nodes, "26 made here"),
        (nodes[1:], "25 made here, 1 stood or made elsewhere"),
        ([], "0 made here, 26 stood or made elsewhere"),
    ):
        for node in nodes:
            whole.complete(node)
        say_made(nodes, wanted, whole)
        assert capsys.readouterr().err[20:] == f"26 artifacts: {end}\n"
    say_standing(Workspace(again.root / "other"), report)
    assert capsys.readouterr().err == ""


def test_what_arms_train_on_is_the_sequences_of_their_pairs(made):
    report, workspace = plan(made), Workspace(made.workspace)
    pairs = workspace.rows(Pair, report.pairs["dpo"][0])
    assert workspace.path(report.pairs["dpo"][0]) == workspace.path(report.pairs["kto"][0])
    matched = {
        row.trace_id
        for node in report.sequences.values()
        for row in workspace.rows(TokenSequence, node)
        if row.matched
    }
    assert len(pairs) > 4
    assert {t for pair in pairs for t in (pair.chosen_id, pair.rejected_id)} <= matched


def test_the_inputs_of_the_report_are_all_artifacts(made):
    report, workspace = plan(made), Workspace(made.workspace)
    nodes = in_order([report])
    assert {*report.inputs().values(), report} == set(nodes)
    folders = {str(workspace.path(node).relative_to(workspace.root)) for node in nodes}
    assert folders == artifacts(workspace.root)
    said = workspace.manifest(report).inputs
    assert said.keys() == report.inputs().keys()
    for name, node in report.inputs().items():
        path = str(workspace.path(node).relative_to(workspace.root))
        assert said[name] == {"path": path, "content": workspace.manifest(node).content}
    listed = workspace.manifest(report).files
    assert {"report.html", "summary.json"} <= set(listed)
    page = (workspace.path(report) / "report.html").read_text()
    assert f"jax {workspace.manifest(report).versions['jax']}" in page


def test_the_page_names_the_versions_of_all_artifacts(again):
    report, workspace = again()
    old = workspace.manifest(report.prompts)
    file = workspace.path(report.prompts) / "manifest.json"
    file.write_text(
        json.dumps(old._replace(versions={"numpy": "1.0", "x": "2"}).sealed()._asdict())
    )
    shutil.rmtree(workspace.path(report))
    report, workspace = again()
    page = (workspace.path(report) / "report.html").read_text()
    # the suites come first among the inputs
    assert f" · numpy {old.versions['numpy']}, 1.0 · " in page
    assert f"python {old.versions['python']} · " in page
    assert " · x 2</p>" in page


def test_the_index_names_every_artifact_and_links_lead_to_their_folders(made):
    report, workspace = plan(made), Workspace(made.workspace)
    nodes = in_order([report])
    index = json.loads((workspace.root / "index.json").read_text())
    assert index == {
        "small study": {node.name: f"{node.stage}/{workspace.key(node)}" for node in nodes}
    }
    links = workspace.root / "by_name" / "small study"
    for node in nodes:
        link = links.joinpath(*node.label)
        assert os.path.islink(link)
        assert not os.path.isabs(os.readlink(link))
        assert os.path.realpath(link) == os.path.realpath(workspace.path(node))
        assert (link / "manifest.json").exists()
    found = [
        p for folder, names, _ in os.walk(links) for p in names if os.path.islink(f"{folder}/{p}")
    ]
    assert len(found) == len(nodes)


def test_some_arms_alone_are_artifacts_of_the_whole_study(made, again):
    old = artifacts(again.root)
    whole, workspace = again()
    part = part_of(whole, ["kto"])
    named = [node for node in in_order([whole]) if workspace.complete(node)]
    run([part], workspace, made.name, show=False, also_named=named)
    assert counts(artifacts(again.root) - old) == {"report": 1}
    summary = json.loads((workspace.path(part) / "summary.json").read_text())
    assert [arm["name"] for arm in summary["arms"]] == ["kto"]
    assert summary["left_out"] == ["dpo"]
    page = (workspace.path(part) / "report.html").read_text()
    assert "1 of the 2 arms of the config (kto)" in page and "Left out: dpo." in page
    # what was left out keeps its name in the index
    index = json.loads((workspace.root / "index.json").read_text())["small study"]
    assert set(index) == {node.name for node in in_order([whole])}
    assert index["report"] == f"report/{workspace.key(part)}"
