"""A study of several students: what is made once, what is each one's, and the page of all."""

import copy
import dataclasses
import json
import re
import urllib.parse
from collections import Counter

import pytest
from flax import nnx

from deltapref_jax.artifacts.node import distinct, in_order
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    Arm,
    Claim,
    ConfigError,
    Experiment,
    Generator,
    Model,
    Objective,
    Prompts,
    Run,
    Sampling,
    Scoring,
    Student,
    Suite,
    Training,
    by_student,
    of_student,
)
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.stages.students import part_of_page, plan_page, reports_of
from deltapref_jax.stages.study import plan
from deltapref_jax.validation import validate

SHARED = {"prompts", "sample", "verify", "tokens", "pair"}


@pytest.fixture(scope="module")
def other_folder(text, tmp_path_factory):
    """Another random decoder with the tokenizer of `tiny_folder`."""
    spec = ModelSpec(len(text.tokenizer), 32, 1, 4, 2, 8, 64, tied=False, max_positions=512)
    folder = tmp_path_factory.mktemp("other")
    export(nnx.state(Decoder(spec, rngs=nnx.Rngs(1))), spec, text, folder)
    return folder


@pytest.fixture(scope="module")
def experiment(tiny_folder, other_folder, tmp_path_factory):
    def suite(name, domain):
        prompts = Prompts(tasks=(name,), count=12, difficulty=1, seed=9)
        return Suite(name=name, domain=domain, prompts=prompts)

    return validate(
        Experiment(
            name="two",
            question="Does it hold?",
            workspace=str(tmp_path_factory.mktemp("students") / "workspace"),
            prompts=(Prompts(tasks=("chain",), count=8, difficulty=1),),
            generators=(
                Generator(name="weak", model=Model(str(tiny_folder))),
                Generator(name="strong", model=Model(str(tiny_folder)), temperature=0.5),
            ),
            students=(
                Student(name="a.b", model=Model(str(tiny_folder))),
                Student(name="50% b", model=Model(str(other_folder))),
            ),
            objectives=(Objective(name="dpo"), Objective(name="sft", kind="sft")),
            arms=(
                Arm(name="dpo", chosen="strong", rejected="weak", seeds=(0, 1)),
                Arm(name="sft", chosen="strong", rejected="weak", objective="sft"),
            ),
            claims=(
                Claim(kind="change", a="dpo", domain="out"),
                Claim(kind="contrast", a="dpo", b="sft", domain="in"),
            ),
            suites=(suite("chain", "in"), suite("shop", "out")),
            training=Training(
                pairs_per_step=4,
                steps=1,
                rows=8,
                row_length=160,
                finishes=("eos", "stop", "length"),
            ),
            sampling=Sampling(max_prompt=96, max_tokens=8, slots=8, chunk=4),
            scoring=Scoring(rows=8, row_length=160),
        )
    )


def identities(node):
    """The key of everything behind a node by label, were the contents of every artifact its key."""
    found = {}
    for n in in_order([node]):
        found[n] = n.key({name: found[source] for name, source in n.inputs().items()})
    return {n.name: key for n, key in found.items()}


def test_what_hangs_on_no_student_is_made_once_and_named_once(experiment):
    page = plan_page(experiment)
    nodes = in_order([page])
    names = {n.name for n in nodes}
    own = {n for n in names if n.startswith("students/")}
    assert {n.split("/")[0] for n in names - own} == {*SHARED, "suite", "capability", "report"}
    assert {n.split("/")[1] for n in own} == set(reports_of(page)) == {"a.b", "50% b"}
    assert {n.split("/")[2] for n in own} == {"score", "train", "evaluate", "report"}
    keys = {n: n.key({name: s.name for name, s in n.inputs().items()}) for n in nodes}
    assert len({(n.name, keys[n]) for n in nodes}) == len(names)  # a label is one artifact
    stages = Counter(n.stage for n in distinct([page]))
    assert stages == {
        "prompts": 3,
        "sample": 2,
        "verify": 2,
        "tokens": 2,
        "score": 2 * 2,
        "pair": 1,
        "train": 2 * 3,
        # two generators; students before, of which one is the weak generator; three policies each
        "evaluate": 2 * (2 + 1 + 2 * 3),
        "report": 2,
        "students": 1,
    }


def test_a_student_of_several_has_the_keys_of_a_study_of_its_own(experiment):
    page = identities(plan_page(experiment))
    for name, model in {s.name: s.model for s in experiment.students}.items():
        alone = dataclasses.replace(experiment, students=(), student=copy.deepcopy(model))
        for label, key in identities(plan(validate(alone))).items():
            assert key in (page.get(label), page.get(f"students/{name}/{label}")), label


def test_a_config_without_students_hashes_none(experiment):
    report = plan(of_student(experiment, "a.b"))
    assert report.experiment.students == ()
    assert "students" not in report.config()["experiment"]
    assert list(plan_page(experiment).config()["experiment"]["students"][0]) == ["name", "model"]
    (same,) = reports_of(plan_page(by_student(experiment)["a.b"])).values()
    assert identities(same) == identities(report)


def test_pairs_that_the_reference_ranks_are_each_students(experiment):
    ranked = Arm(name="margin", chosen="strong", rejected="weak", keep="top", by="reference_margin")
    ranked.fraction = 0.5
    names = {n.name for n in in_order([plan_page(dataclasses.replace(experiment, arms=(ranked,)))])}
    assert {"students/a.b/pair/margin", "students/50% b/pair/margin"} <= names


def test_some_arms_of_all_students(experiment):
    page = part_of_page(plan_page(experiment), ["sft"])
    names = {n.name for n in in_order([page])}
    assert {n for n in names if "/train/" in n} == {
        "students/a.b/train/sft/0",
        "students/50% b/train/sft/0",
    }
    assert [list(of) for of in page.after.values()] == [["sft"], ["sft"]]


def test_two_students_that_are_one_model_are_refused(experiment, tiny_folder):
    twin = Student(name="twin", model=Model(f"{tiny_folder}/"))
    with pytest.raises(
        ConfigError, match=r"^Students 'a\.b' and 'twin' are one model; name another, or remove one"
    ):
        plan_page(dataclasses.replace(experiment, students=(*experiment.students, twin)))


@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "",
            "--student is empty and the config has several students; choose one of 'a.b', '50% b'.",
        ),
        ("c", "--student is 'c'; choose one of 'a.b', '50% b'."),
    ],
)
def test_an_entry_point_for_one_student_wants_its_name(experiment, name, sentence):
    with pytest.raises(ConfigError) as e:
        of_student(experiment, name)
    assert str(e.value) == sentence
    with pytest.raises(ConfigError, match=r"^--student is 'c' and the config has one student; "):
        of_student(of_student(experiment, "a.b"), "c")


@pytest.mark.slow
def test_one_page_shows_the_students_and_holds_their_pages(experiment):
    page, workspace = plan_page(experiment), Workspace(experiment.workspace)
    made = run([page], workspace, experiment.name, show=False)
    folders = {str(workspace.path(n)): n.stage for n in made}
    assert Counter(folders.values()) == Counter(n.stage for n in distinct([page]))
    folder = workspace.path(page)
    text = (folder / "report.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["students"] == ["a.b", "50% b"]
    for name, report in reports_of(page).items():
        own = json.loads((workspace.path(report) / "summary.json").read_text())
        assert summary["before"][name] == own["student"]
        for claim, mine in zip(summary["claims"], own["claims"], strict=True):
            assert claim["effects"][name]["estimate"] == mine["effect"]["estimate"]
        for arm, mine in zip(summary["arms"], own["arms"], strict=True):
            for d in ("in", "out"):
                assert arm["changes"][name][d]["estimate"] == mine[d]["estimate"]
        # The link on the page leads to a copy of the student's own page.
        assert summary["pages"][name] in re.findall(r'href="(pages/[^"]+)"', text)
        copied = folder / urllib.parse.unquote(summary["pages"][name])
        assert copied.read_text() == (workspace.path(report) / "report.html").read_text()
        files = set(workspace.manifest(report).files)
        assert {f.name for f in copied.parent.iterdir()} == files >= {"accuracies.csv"}
    for arm in summary["arms"]:
        for d in ("in", "out"):
            (between,) = arm["differences"][d]
            a, b = (arm["changes"][name][d]["estimate"][0] for name in summary["students"])
            assert between["effect"]["estimate"][0] == pytest.approx(a - b)
    assert set(workspace.manifest(page).files) >= {"report.html", "summary.json", "claims.svg"}
    # A run again makes nothing.
    assert run([plan_page(experiment)], workspace, experiment.name, show=False) == []
    policies = {workspace.key(r.policies["dpo"][Run(0, 0)]) for r in reports_of(page).values()}
    assert len(policies) == 2
    links = workspace.root / "by_name" / "two" / "students" / "a.b" / "train" / "dpo" / "0"
    assert (links / "manifest.json").exists()
